"""The batch-spec grammar: a whole batch in one short word.

    spec    := segment ("_" segment)*
    segment := (<count>?) q<q_len>(k?) (s<seq_len>(k?))?

`q2k` is a 2048-token prefill, `8q1s1k` eight decodes over 1024 tokens, `q4s1k` a four-token extend (speculative
decoding), `2q2k_32q1s1k` two prefills and 32 decodes. `k` multiplies by 1024; seq_len defaults to q_len.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SEGMENT = re.compile(r"(?P<count>\d+)?q(?P<q>\d+)(?P<qk>k)?(?:s(?P<s>\d+)(?P<sk>k)?)?", re.ASCII)
#: Most requests of a batch, and most new tokens of it or tokens of one sequence: what no GPU holds is a typing error.
MAX_REQUESTS, MAX_TOKENS = 1 << 16, 1 << 24
_RANGE_KEYS = {"start", "stop", "step", "end_inclusive"}


@dataclass(frozen=True)
class BatchRequest:
    """One request: q_len new tokens at the end of a sequence of kv_len tokens."""

    q_len: int
    kv_len: int

    @property
    def is_decode(self) -> bool:
        """One new token on an existing context."""
        return self.q_len == 1 and self.kv_len > 1

    @property
    def is_prefill(self) -> bool:
        """All tokens are new."""
        return self.q_len == self.kv_len

    @property
    def is_extend(self) -> bool:
        """Several new tokens on an existing context: chunked prefill, speculative decoding."""
        return 1 < self.q_len < self.kv_len

    @property
    def context_len(self) -> int:
        """Tokens that were there before this step."""
        return self.kv_len - self.q_len

    def as_tuple(self) -> tuple[int, int]:
        return self.q_len, self.kv_len


def parse_batch_spec(spec: str) -> list[BatchRequest]:
    """Requests of a batch spec, in order. Raises ValueError that names the bad segment."""
    if not isinstance(spec, str):
        raise ValueError(f"spec={spec!r}: expected a string")
    requests = [request for segment in spec.split("_") for request in _parse_segment(segment, spec)]
    for name, value, most in (
        ("requests", len(requests), MAX_REQUESTS),
        ("new tokens", sum(r.q_len for r in requests), MAX_TOKENS),
    ):
        if value > most:
            raise ValueError(f"batch spec {spec!r}: {value} {name}, expected at most {most}")
    return requests


def _parse_segment(segment: str, spec: str) -> list[BatchRequest]:
    where = f"segment {segment!r} of batch spec {spec!r}"
    match = _SEGMENT.fullmatch(segment)
    if match is None:
        raise ValueError(f"{where}: expected <count>q<q_len>[k][s<seq_len>[k]], such as 8q1s1k")
    count = int(match["count"] or 1)
    q_len = int(match["q"]) * (1024 if match["qk"] else 1)
    kv_len = q_len if match["s"] is None else int(match["s"]) * (1024 if match["sk"] else 1)
    if not 1 <= count <= MAX_REQUESTS:
        raise ValueError(f"{where}: count is {count}, expected 1 to {MAX_REQUESTS}")
    if q_len == 0:
        raise ValueError(f"{where}: q_len is 0, expected at least 1")
    if kv_len < q_len:
        raise ValueError(f"{where}: seq_len {kv_len} is less than q_len {q_len}")
    if kv_len > MAX_TOKENS:
        raise ValueError(f"{where}: seq_len is {kv_len}, expected at most {MAX_TOKENS}")
    return [BatchRequest(q_len, kv_len)] * count


def format_batch_spec(requests: Sequence[BatchRequest]) -> str:
    """Words for a batch: `2 prefill (2x2k), 1 extend (1xq4kv1k), 32 decode (32x1k)`."""
    kinds: tuple[tuple[str, list[str]], ...] = (
        ("prefill", [_size(r.q_len) for r in requests if r.is_prefill]),
        ("extend", [f"q{_size(r.q_len)}kv{_size(r.kv_len)}" for r in requests if r.is_extend]),
        ("decode", [_size(r.kv_len) for r in requests if r.is_decode]),
    )
    return ", ".join(f"{len(names)} {kind} ({_counted(names)})" for kind, names in kinds if names)


def _counted(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count}x{name}" for name, count in counts.items())


def _size(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def get_batch_stats(requests: Sequence[BatchRequest]) -> dict[str, float]:
    """Counts, totals, maxima and averages of a batch. total_tokens counts new tokens (q_len)."""
    if not requests:
        raise ValueError("requests=[]: expected at least one request")
    total_tokens = sum(r.q_len for r in requests)
    total_kv = sum(r.kv_len for r in requests)
    return {
        "total_requests": len(requests),
        "num_decode": sum(r.is_decode for r in requests),
        "num_prefill": sum(r.is_prefill for r in requests),
        "num_extend": sum(r.is_extend for r in requests),
        "total_tokens": total_tokens,
        "total_kv_cache": total_kv,
        "max_q_len": max(r.q_len for r in requests),
        "max_kv_len": max(r.kv_len for r in requests),
        "avg_q_len": total_tokens / len(requests),
        "avg_kv_len": total_kv / len(requests),
    }


def expand_batch_specs(entries: Iterable[str | Mapping[str, Any]]) -> list[str]:
    """Specs of a list that mixes plain specs with ranges; every spec is parsed, so errors come early.

    A range is `{"template": "q{q_len}s{kv_len}k", "q_len": {"start": 1, "stop": 16, "step": 5}, "kv_len": [1, 4]}`:
    every field of the template takes a range (end_inclusive defaults to True), a list or one value, and all
    combinations are made, the last field varying fastest.
    """
    specs: list[str] = []
    for entry in entries:
        specs += [entry] if isinstance(entry, str) else _expand_range(entry)
    for spec in specs:
        parse_batch_spec(spec)
    return specs


def _expand_range(entry: Mapping[str, Any]) -> list[str]:
    template = entry.get("template")
    if not isinstance(template, str):
        raise ValueError(f"batch spec range {dict(entry)!r}: expected a string under 'template'")
    fields = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))
    given = [key for key in entry if key != "template"]
    if sorted(fields) != sorted(given):
        raise ValueError(f"template {template!r} has fields {fields}, but values are given for {given}")
    choices = [_range_values(name, entry[name]) for name in fields]
    return [template.format(**dict(zip(fields, values, strict=True))) for values in itertools.product(*choices)]


def _range_values(name: str, value: Any) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, (list, tuple)):
        return [_integer(name, v) for v in value]
    if not isinstance(value, Mapping) or not {"start", "stop"} <= set(value) <= _RANGE_KEYS:
        raise ValueError(f"{name}={value!r}: expected an int, a list, or start, stop, step, end_inclusive")
    start, stop, step = (_integer(f"{name}.{key}", value.get(key, 1)) for key in ("start", "stop", "step"))
    if step < 1:
        raise ValueError(f"{name}.step={step!r}: expected at least 1")
    values = list(range(start, stop + (1 if value.get("end_inclusive", True) else 0), step))
    if not values:
        raise ValueError(f"{name}={value!r}: the range is empty")
    return values


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected an integer")
    return value
