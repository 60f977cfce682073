"""Order of preference among implementations, per architecture.

A row applies when its operation matches, its architecture is the device's ("sm_90"), its vendor ("cuda", "rocm",
"cpu") or "*", and every condition holds for the call's shape summary: an exact value, or an inclusive (low, high)
range. The first row that applies wins, so specific rows stand above general ones. `source` says where the order
comes from: the benchmark command with its date and device, or the rule it follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preference:
    operation: str
    arch: str
    order: tuple[str, ...]
    source: str
    when: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, operation: str, arch: str, shape: Mapping[str, Any]) -> bool:
        vendor = "cuda" if arch.startswith("sm_") else "rocm" if arch.startswith("gfx") else arch
        if operation != self.operation or self.arch not in (arch, vendor, "*"):
            return False
        return all(key in shape and _matches(shape[key], want) for key, want in self.when.items())


def _matches(value: Any, want: Any) -> bool:
    return want[0] <= value <= want[1] if isinstance(want, tuple) else value == want


_RUN = "benchmarks/run_h200.py, NVIDIA H200, 2026-11-21"
_ANY_MORE = 1 << 30
_UNTRIED_ROCM = "rule: AITER's kernels are tuned on the hardware, ours are only compiled for it"
_PUBLIC_ROCM = "rule: MI355X, 8 and 16 heads, Triton beat TileLang (SGLang pull requests 37847, 39106); not run here"

TABLE: tuple[Preference, ...] = (
    *(
        Preference(
            "sparse_mla.attend",
            "sm_90",
            ("flash_mla", "cuda", "triton"),
            _RUN,
            {"kv": kv, "heads": heads, "tokens": (fewest, _ANY_MORE)},
        )
        for kv, heads, fewest in (
            ("packed", (33, 64), 65),
            ("packed", (65, 128), 17),
            ("bf16", (17, 32), 128),
            ("bf16", (33, 64), 64),
            ("bf16", (65, 128), 32),
        )
    ),
    Preference("sparse_mla.attend", "sm_90", ("cuda", "triton"), _RUN, {"kv": "packed"}),
    Preference("mqa_logits.ragged", "sm_90", ("deep_gemm", "triton"), _RUN),
    Preference("topk.select", "sm_90", ("cuda", "triton"), _RUN),
    Preference("dense_mla.decode", "sm_90", ("fa3", "triton"), _RUN, {"heads": (17, 32), "batch": (32, _ANY_MORE)}),
    # First fa3, also where the operation's adapter declines it: serving then leaves the step to SGLang's own call.
    Preference(
        "dense_mla.decode", "sm_90", ("fa3", "flash_mla", "triton"), _RUN, {"heads": (33, 128), "batch": (8, _ANY_MORE)}
    ),
    Preference("sparse_mla.attend", "cuda", ("cuda", "triton"), "rule: as on sm_90", {"kv": "packed"}),
    Preference("topk.select", "cuda", ("cuda", "triton"), "rule: as on sm_90"),
    Preference("mqa_logits.paged", "rocm", ("aiter", "triton"), _UNTRIED_ROCM, {"layout": "preshuffled"}),
    Preference("mqa_logits.ragged", "rocm", ("aiter", "triton"), _UNTRIED_ROCM),
    Preference("latent_cache.store", "rocm", ("aiter", "triton"), _UNTRIED_ROCM),
    Preference("sparse_mla.attend", "rocm", ("triton", "tilelang", "aiter"), _PUBLIC_ROCM),
)


def order(operation: str, arch: str, shape: Mapping[str, Any]) -> tuple[str, ...]:
    """Names in order of preference; empty when no row applies (then triton, then torch)."""
    if arch == "cpu":
        return ("torch",)
    for row in TABLE:
        if row.applies(operation, arch, shape):
            return row.order
    return ()
