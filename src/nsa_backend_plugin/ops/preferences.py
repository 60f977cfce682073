"""Order of preference among implementations, per architecture.

A row applies when its operation matches, its architecture is the device's ("sm_90"), its vendor ("cuda", "rocm",
"cpu") or "*", and every condition holds for the facts of the call: an exact value, or an inclusive (low, high)
range. The first row that applies wins, so specific rows stand above general ones. `source` says where the order
comes from: the benchmark command with its date and device, or the rule it follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from nsa_backend_plugin.ops.arch import vendor
from nsa_backend_plugin.ops.call import Fact


@dataclass(frozen=True)
class Preference:
    operation: str
    arch: str
    order: tuple[str, ...]
    source: str
    when: Mapping[str, Fact | tuple[int, int]] = field(default_factory=dict)

    def holds(self, facts: Mapping[str, Fact]) -> bool:
        for key, want in self.when.items():
            value = facts[key]
            if not (want[0] <= int(value) <= want[1] if isinstance(want, tuple) else value == want):
                return False
        return True


_RUN = "benchmarks/run_h200.py, NVIDIA H200, 2026-11-21"
_LAYERS = "nsa-plugin profile --together, NVIDIA H200, 2026-11-28 (RESULTS.notes.md)"
_ANY_MORE = 1 << 30
#: FA3 can schedule for all layers: their rows have the same lengths.
_SCHEDULED: Mapping[str, Fact] = {"lengths": True}
_UNTRIED_ROCM = "rule: AITER's kernels are tuned on the hardware, ours are only compiled for it"
_PUBLIC_ROCM = "rule: MI355X, 8 and 16 heads, Triton beat TileLang (SGLang pull requests 37847, 39106); not run here"

TABLE: tuple[Preference, ...] = (
    # Neighbours share a gather. With 4096 tokens 1.6 to 2.1 times Triton's speed where they have 95% of their rows in
    # common, 1.2 to 1.3 at 80%, 0.94 to 0.98 at half and less. Short calls wait for the host, which launches more.
    Preference(
        "sparse_mla.attend",
        "sm_90",
        ("union", "triton"),
        "python -m tools.tune_union, NVIDIA H200, 2026-11-27",
        {"kv": "bf16", "heads": (1, 16), "tokens": (2048, _ANY_MORE)},
    ),
    # The decode kernel's own rate against that of the prefill kernel: FlashMLA's authors, H800.
    Preference(
        "sparse_mla.attend",
        "sm_90",
        ("flash_mla_unpacked", "flash_mla", "cuda", "triton"),
        "rule: 640 TFLOP/s against 410, less the copy of a context",
        {"kv": "packed", "heads": (33, 128), "tokens": (512, _ANY_MORE), "context": (1, 1 << 18)},
    ),
    # FlashMLA and FA3 make their schedules once per step, so these go by the columns `*_planned` of that run.
    *(
        Preference(
            "sparse_mla.attend",
            "sm_90",
            (vendor, "cuda", "triton"),
            _RUN,
            {"kv": kv, "heads": heads, "tokens": tokens, **more},
        )
        for vendor, kv, heads, tokens, more in (
            ("flash_mla", "packed", (33, 64), (9, _ANY_MORE), {}),
            ("flash_mla", "packed", (65, 128), (4, _ANY_MORE), {}),
            ("fa3", "bf16", (17, 32), (16, 255), _SCHEDULED),
            ("fa3", "bf16", (33, 64), (16, 63), _SCHEDULED),
            ("fa3", "bf16", (65, 128), (8, 63), _SCHEDULED),
            ("flash_mla", "bf16", (17, 32), (128, _ANY_MORE), {}),
            ("flash_mla", "bf16", (33, 64), (64, _ANY_MORE), {}),
            ("flash_mla", "bf16", (65, 128), (32, _ANY_MORE), {}),
        )
    ),
    Preference("sparse_mla.attend", "sm_90", ("cuda", "triton"), _RUN, {"kv": "packed"}),
    Preference("mqa_logits.ragged", "sm_90", ("deep_gemm", "triton"), _RUN),
    Preference("topk.select", "sm_90", ("cuda", "triton"), _RUN),
    Preference(
        "dense_mla.decode",
        "cuda",
        ("cuda", "triton"),
        "benchmarks/configs/fp8_rows.yaml, NVIDIA H200, 2026-11-27",
        {"dtype": "torch.float8_e4m3fn"},
    ),
    Preference("dense_mla.decode", "sm_90", ("fa3", "triton"), _RUN, {"heads": (17, 32), "batch": (32, _ANY_MORE)}),
    # With more than 64 heads, fa3 takes calls with the promise `kv_is_finite` only: serving gives it.
    Preference(
        "dense_mla.decode", "sm_90", ("fa3", "flash_mla", "triton"), _RUN, {"heads": (33, 128), "batch": (8, _ANY_MORE)}
    ),
    Preference("sparse_mla.attend", "cuda", ("cuda", "triton"), "rule: as on sm_90", {"kv": "packed"}),
    *(
        Preference(
            "projection.linear", "sm_90", ("wgmma", "cuda", "triton"), _LAYERS, {"dtype": dtype, "tokens": tokens}
        )
        for dtype, tokens in (("torch.float8_e4m3fn", (8, 32)), ("torch.bfloat16", (9, 16)))
    ),
    Preference("projection.linear", "cuda", ("cuda", "triton"), "rule: tuned on sm_90"),
    Preference("projection.per_head", "cuda", ("cuda", "triton"), "rule: tuned on sm_90"),
    Preference("topk.select", "cuda", ("cuda", "triton"), "rule: as on sm_90"),
    Preference("mqa_logits.paged", "rocm", ("aiter", "triton"), _UNTRIED_ROCM, {"layout": "preshuffled"}),
    Preference("mqa_logits.ragged", "rocm", ("aiter", "triton"), _UNTRIED_ROCM),
    Preference("latent_cache.store", "rocm", ("aiter", "triton"), _UNTRIED_ROCM),
    Preference("sparse_mla.attend", "rocm", ("triton", "tilelang", "aiter"), _PUBLIC_ROCM),
)


@cache
def rows(operation: str, arch: str) -> tuple[tuple[int, Preference], ...]:
    """The rows that may apply to calls of an operation on an architecture, with their places in TABLE."""
    return tuple(
        (place, row)
        for place, row in enumerate(TABLE)
        if row.operation == operation and row.arch in (arch, vendor(arch), "*")
    )


def applying(operation: str, arch: str, facts: Callable[[], Mapping[str, Fact]]) -> int:
    """Place in TABLE of the first row that applies to a call; -1 where none does (then Triton, then torch)."""
    known: Mapping[str, Fact] | None = None
    for place, row in rows(operation, arch):
        if not row.when:
            return place
        known = known or facts()
        if row.holds(known):
            return place
    return -1
