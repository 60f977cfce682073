"""From a decode_vs_prefill run: the query length from which MLA's prefill pipeline is the faster one."""

from __future__ import annotations

from collections.abc import Sequence

from batch_spec import parse_batch_spec
from common import BenchmarkResult


def crossovers(results: Sequence[BenchmarkResult]) -> dict[str, dict[int, int | None]]:
    """backend -> batch size -> smallest measured q_len from which prefill wins at every longer one (None: never)."""
    times: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for row in results:
        if row.median_us is not None and row.params.get("pipeline") in ("decode", "prefill"):
            requests = parse_batch_spec(row.params["batch_spec"])
            lengths = times.setdefault((row.backend, len(requests)), {})
            lengths.setdefault(requests[0].q_len, {})[row.params["pipeline"]] = row.median_us
    found: dict[str, dict[int, int | None]] = {}
    for (backend, batch), lengths in times.items():
        found.setdefault(backend, {})[batch] = _crossover(lengths)
    return found


def _crossover(lengths: dict[int, dict[str, float]]) -> int | None:
    best = None
    for q_len in sorted(lengths, reverse=True):
        pair = lengths[q_len]
        if len(pair) == 2:
            if pair["decode"] < pair["prefill"]:
                break
            best = q_len
    return best


def report(results: Sequence[BenchmarkResult]) -> str:
    lines = ["the prefill pipeline wins from this query length on:"]
    for backend, column in crossovers(results).items():
        cells = ", ".join(f"batch {b}: {q or 'never'}" for b, q in sorted(column.items()))
        lines.append(f"  {backend}: {cells}")
    return "\n".join(lines)
