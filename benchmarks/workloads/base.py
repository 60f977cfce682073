"""What every workload gives to the runner, and the inputs that several of them share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from benchmarks.checked import Count, Model, check
from nsa_backend_plugin.layouts import (
    INDEX_DIM,
    INDEX_PAGE_SIZE,
    LATENT_DIM,
    index_page_bytes,
    index_scale_offset,
    packed_latent_bytes,
)
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.witness import row_distance
from tools.calls import HEAD_DIM, Calls, poison, stored

VALUE_DIM = LATENT_DIM
#: Bytes of a latent row by cache format, and of an index key with its scale.
ROW_BYTES = {"bf16": 2 * HEAD_DIM, "packed": packed_latent_bytes(HEAD_DIM), "fp8": HEAD_DIM}
INDEX_TOKEN_BYTES = index_page_bytes() // INDEX_PAGE_SIZE
#: Bars of the operation tests: cosine distance to a reference that is fed the same quantized data.
BF16_BAR = 5e-6
FP8_BAR = 2e-4
#: Rows of an output that are compared with the reference (first, last, random between).
CHECKED_ROWS = 4


@dataclass
class Problem:
    """One shape of one workload with its inputs.

    inputs: input sets of the same shape and fresh random content, taken in turn by the clock; of one public function,
    its arguments.
    run(impl, inputs, poison): the work through the public functions; impl None lets the registry choose; with
    poison, outputs are filled with what no correct result contains before the call.
    check(output, inputs): distance to the reference; must not exceed bar, or peer_bar for a peer, whose roundings
    are its own business (None: four times the bar). checked: what was compared, in words.
    bytes: least DRAM traffic of one call. flops: of one call, multiplications and additions.
    extra: what peers need besides the inputs.
    """

    inputs: list[Any]
    run: Callable[[str | None, Any, bool], Any]
    check: Callable[[Any, Any], float]
    bar: float
    checked: str
    bytes: int
    flops: int
    peer_bar: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def bar_of(self, is_peer: bool) -> float:
        if not is_peer:
            return self.bar
        return 4 * self.bar if self.peer_bar is None else self.peer_bar


Layout = Literal["row_major", "preshuffled"]
CacheFormat = Literal["packed", "bf16"]
#: Of a cache that is read whole.
DenseFormat = Literal["bf16", "fp8"]


class Params(Model):
    """Parameters that every workload has; those of a workload are a subclass."""

    min_sets: Count = Field(2, description="input sets made at least")


class QueriesOfContext(Params):
    """Queries that are the last `tokens` of `context` tokens."""

    tokens: Count = 1
    context: Count = 1

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> QueriesOfContext:
        if self.context < self.tokens:
            raise ValueError(f"context={self.context}: expected at least tokens={self.tokens}")
        return self


@dataclass(frozen=True)
class Workload:
    """build(params, device) -> Problem, for complete parameters.

    operations: registry names ("sparse_mla.attend") whose implementations are the backends; several for a chain.
    same_job: parameters that two rows may differ in and still be compared as doing the same job (cache format).
    mixed: further backends "a+b", an implementation for each operation.
    batch: how large a case is, for the horizontal axis of plots.
    """

    name: str
    operations: tuple[str, ...]
    build: Callable[[Mapping[str, Any], torch.device], Problem]
    params: type[Params]
    same_job: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    batch: Callable[[Mapping[str, Any]], int] = lambda params: int(params.get("tokens", 1))

    def complete(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with the defaults of those that are not given. Raises ValueError for unknown or bad ones."""
        return self.checked(params).model_dump()

    def checked(self, params: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Params:
        """names: see `checked.check`."""
        try:
            return check(self.params, dict(params), names)
        except ValueError as error:
            raise ValueError(f"workload {self.name}: {error}") from error

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: field.default for name, field in self.params.model_fields.items()}


def cosine_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`row_distance` of the whole tensor as one row; a wrong shape is infinitely far."""
    if actual.shape != expected.shape:
        return float("inf")
    return float(row_distance(actual.reshape(1, -1), expected.reshape(1, -1)))


def some_rows(rows: int, device: torch.device) -> torch.Tensor:
    """Up to CHECKED_ROWS row numbers: the first, the last, and random ones between."""
    picked = {0, rows - 1, *torch.randint(rows, (CHECKED_ROWS - 2,)).tolist()}
    return torch.tensor(sorted(picked), device=device)


def rows_checked(rows: int) -> str:
    return f"{min(rows, CHECKED_ROWS)} of {rows} rows against torch float32"


def runs(
    function: Callable[..., Any], *out: int, dtype: torch.dtype = torch.bfloat16
) -> Callable[[str | None, Any, bool], Any]:
    """`Problem.run` of one public function, whose inputs are its arguments. out, dtype: of a result to be poisoned that
    the arguments do not have."""

    def run(impl: str | None, item: Any, poisoned: bool) -> Any:
        given = {}
        if poisoned and "out" in item:
            item["out"].copy_(poison(1, dtype=torch.bfloat16, device=item["out"].device))
        elif poisoned and out:
            device = next(value.device for value in item.values() if isinstance(value, torch.Tensor))
            given["out"] = poison(*out, dtype=dtype, device=device)
        return function(**item, **given, impl=impl)

    return run


@functools.lru_cache(maxsize=3)
def latent_pool(kind: str, slots: int, device: torch.device) -> torch.Tensor:
    """A latent cache of random rows: "bf16" or "fp8" [slots, 1, 576], or "packed" uint8 [slots, 1, row bytes].

    The cache is shared by all input sets of a shape, which differ in the slots they read.
    """
    pool = torch.empty(slots, 1, ROW_BYTES[kind], dtype=torch.uint8, device=device)
    for chunk in pool.split(100_000):
        rows = stored(Calls(device).rows(len(chunk), HEAD_DIM), kind)
        chunk[:, 0] = rows.view(torch.uint8)
    return pool.view(rows.dtype)


@functools.lru_cache(maxsize=2)
def index_pool(pages: int, device: torch.device) -> torch.Tensor:
    """An index-K cache of random keys, uint8 [pages, 8448]. Independent values, so any layout reads it as random."""
    values = index_scale_offset(0, INDEX_PAGE_SIZE, INDEX_DIM)
    pool = torch.empty(pages, index_page_bytes(), dtype=torch.uint8, device=device)
    for chunk in pool.split(20_000):
        keys = torch.randn(chunk.shape[0], values, device=device).to(fp8_dtype(device))
        chunk[:, :values] = keys.view(torch.uint8)
        scales = torch.rand(chunk.shape[0], INDEX_PAGE_SIZE, device=device) * 0.02 + 0.005
        chunk[:, values:] = scales.view(torch.uint8)
    return pool
