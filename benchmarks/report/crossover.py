"""From a decode_vs_prefill run: the query length from which MLA's prefill pipeline is the faster one."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.batch_spec import parse_batch_spec
from benchmarks.common import BenchmarkResult

#: (backend, batch size) -> query length -> pipeline -> microseconds
Times = dict[tuple[str, int], dict[int, dict[str, float]]]


def crossovers(results: Sequence[BenchmarkResult]) -> dict[str, dict[int, int | None]]:
    """backend -> batch size -> smallest measured q_len from which prefill wins at every longer one (None: never)."""
    found: dict[str, dict[int, int | None]] = {}
    for (backend, batch), lengths in _times(results).items():
        found.setdefault(backend, {})[batch] = _crossover(lengths)
    return found


def _times(results: Sequence[BenchmarkResult]) -> Times:
    times: Times = {}
    for row in results:
        if row.median_us is not None and row.params.get("pipeline") in ("decode", "prefill"):
            requests = parse_batch_spec(row.params["batch_spec"])
            lengths = times.setdefault((row.backend, len(requests)), {})
            lengths.setdefault(requests[0].q_len, {})[row.params["pipeline"]] = row.median_us
    return times


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


def tables(results: Sequence[BenchmarkResult]) -> list[str]:
    """Markdown: where the prefill pipeline starts to win, then both pipelines' times."""
    lines: list[str] = []
    for backend, column in crossovers(results).items():
        lines += [f"The prefill pipeline wins from this query length on (`{backend}`, 1k-token sequences):", ""]
        found = [(str(batch), str(q or "never")) for batch, q in sorted(column.items())]
        lines += ["| batch | " + " | ".join(b for b, _ in found) + " |", "|---" * (len(found) + 1) + "|"]
        lines += ["| query length | " + " | ".join(q for _, q in found) + " |", ""]
        lines += ["Microseconds of the layer, decode pipeline / prefill pipeline, over query length:", ""]
        lines += [*_times_table(_times(results), backend), ""]
    return lines


def _times_table(times: Times, backend: str) -> list[str]:
    batches = sorted(batch for name, batch in times if name == backend)
    q_lens = sorted({q for batch in batches for q in times[backend, batch]})
    lines = ["| batch | " + " | ".join(map(str, q_lens)) + " |", "|---" * (len(q_lens) + 1) + "|"]
    for batch in batches:
        pairs = [times[backend, batch].get(q, {}) for q in q_lens]
        cells = [f"{p['decode']:.0f} / {p['prefill']:.0f}" if len(p) == 2 else "" for p in pairs]
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return lines
