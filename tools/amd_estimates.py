"""Least times on AMD GPUs from bytes and operations over the datasheets' ceilings, as the tables of docs/amd.md.

    python -m tools.amd_estimates

Not measurements: AMD is compile-checked, not run. A real kernel reaches a part of a ceiling, and
short ones are bound by launches (some microseconds each), so these are times that nothing can beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_PAGE_SIZE, LATENT_DIM, ROPE_DIM, index_page_bytes

ROW = LATENT_DIM + ROPE_DIM
INDEX_TOKEN = index_page_bytes() / INDEX_PAGE_SIZE
TOPK, INDEX_HEADS, CONTEXT, HEAD = 2048, 32, 8192, 128


@dataclass(frozen=True)
class Gpu:
    """Peaks of AMD's datasheets: bytes/s of HBM, dense FLOP/s of the matrix cores."""

    name: str
    memory: float
    bf16: float
    fp8: float


GPUS = (Gpu("MI300X", 5.3e12, 1307.4e12, 2614.9e12), Gpu("MI355X", 8.0e12, 2.5e15, 5.0e15))


@dataclass(frozen=True)
class Estimate:
    operation: str
    shape: str
    bytes: float
    flops: float = 0
    public: str = "none"
    fp8: bool = False  # multiplied

    def microseconds(self, gpu: Gpu) -> tuple[float, str]:
        """(time, what bounds it)."""
        memory, compute = self.bytes / gpu.memory, self.flops / (gpu.fp8 if self.fp8 else gpu.bf16)
        return max(memory, compute) * 1e6, "memory" if memory >= compute else "compute"


def estimates() -> Iterator[Estimate]:
    for tokens, public in ((4, "14.3 / 24"), (64, "27.4 / 42"), (128, "33.5 / 65"), (256, "51.1 / 110")):
        yield sparse(tokens, 16, f"MI355X, Triton / TileLang of SGLang PR 39106: {public} us")
    yield sparse(64, 8)
    yield sparse(8148, 8, "MI355X, same pair, PR 37847: 1320 / 2250 us", rows=8148)
    yield Estimate(
        "mqa_logits.paged",
        f"64 requests, {CONTEXT} context, {INDEX_HEADS} heads",
        64 * (CONTEXT * (INDEX_TOKEN + 4) + INDEX_HEADS * (INDEX_DIM + 4)),
        2 * 64 * CONTEXT * INDEX_HEADS * INDEX_DIM,
        "MI355X, page 1 -> preshuffled page 64, PR 23562: 88 -> 19 us",
        fp8=True,
    )
    yield Estimate(
        "mqa_logits.ragged",
        f"{CONTEXT} causal queries, {INDEX_HEADS} heads",
        CONTEXT * (INDEX_HEADS * (INDEX_DIM + 4) + INDEX_TOKEN) + CONTEXT * CONTEXT / 2 * 4,
        2 * CONTEXT * CONTEXT / 2 * INDEX_HEADS * INDEX_DIM,
        "gfx950, AITER PRs 4538, 5434: 927 to 1373 TFLOP/s",
        fp8=True,
    )
    yield Estimate("index_key_cache.gather", f"{CONTEXT} keys of one prefill", CONTEXT * INDEX_TOKEN * 2)
    rows = f"64 rows of {CONTEXT}, k {TOPK}"
    yield Estimate("topk.select", rows, 64 * (CONTEXT + TOPK) * 4, public="none for AMD")
    yield Estimate("norm_quant.rms", "64 tokens, 1536 values; not served on ROCm", 64 * 1536 * 3)
    weights, shape = 2112 * 7168, "1 token, q_a | kv_a in fp8 blocks; not served on ROCm"
    yield Estimate("projection.linear", shape, weights, 2 * weights, fp8=True)
    yield Estimate(
        "indexer_prep.query + key_store",
        f"64 tokens, {INDEX_HEADS} heads",
        64 * ((INDEX_HEADS + 1) * INDEX_DIM * 2 + INDEX_HEADS * (INDEX_DIM + 4) + INDEX_TOKEN),
        2 * 64 * (INDEX_HEADS + 1) * INDEX_DIM * INDEX_DIM,
        "MI355X, AITER prologue, 4 -> 1 kernels, vllm PR 51315: 17.4 -> 5.9 us",
    )
    yield Estimate("latent_cache.store", "64 tokens, 16 heads, fp8 rows", 64 * (ROW * 3 + 16 * ROPE_DIM * 4))
    skipped = "MI355X, skipped, seed: -2.6 us/layer"
    yield Estimate("concat.q_all", "64 tokens, 16 heads, apart", 64 * 16 * ROW * 4, public=skipped)
    moved = CONTEXT * 2 * (16 * HEAD * 2 + ROPE_DIM + 16 * ROPE_DIM)
    yield Estimate("concat.mla_k", f"{CONTEXT} tokens, 16 heads", moved)
    yield Estimate(
        "dense_mla.decode",
        f"64 requests, {CONTEXT} context, 16 heads, bf16 rows",
        64 * (CONTEXT * ROW * 2 + 16 * (ROW + LATENT_DIM) * 2),
        2 * 64 * CONTEXT * 16 * (ROW + LATENT_DIM),
        "none; not served on ROCm",
    )


def sparse(tokens: int, heads: int, public: str = "none", rows: int | None = None) -> Estimate:
    """Attention over fp8 rows. rows: distinct ones that the queries read together (None: nothing is shared, decode)."""
    rows = tokens * TOPK if rows is None else rows
    read = rows * ROW + tokens * (TOPK * 4 + heads * (ROW + LATENT_DIM) * 2)
    shape = f"{tokens} queries, {heads} heads, top-{TOPK}, fp8 rows"
    return Estimate("sparse_mla.attend", shape, read, 2 * tokens * heads * TOPK * (ROW + LATENT_DIM), public)


def markdown() -> str:
    lines = [
        "| operation | shape | MB | GFLOP | " + " | ".join(f"{g.name} at least" for g in GPUS) + " | public figure |",
        "|---|---|---|---|" + "---|" * len(GPUS) + "---|",
    ]
    for e in estimates():
        times = [f"{time:.1f} us ({bound})" for time, bound in (e.microseconds(g) for g in GPUS)]
        cells = [e.operation, e.shape, f"{e.bytes / 1e6:.2f}", f"{e.flops / 1e9:.2f}", *times, e.public]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
