"""What stock SGLang decides on ROCm from AITER and Triton versions, decided for our kernels instead.

Compile-checked and run on a simulated host (`tests/rocm`), not run on an AMD GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.runtime.merged_weights import MergedWeights

_resolving = False
_KEY_WEIGHT = "nsa_plugin_w_kc"


def on_rocm() -> bool:
    """Whether torch is built for ROCm."""
    return torch.version.hip is not None


@contextlib.contextmanager
def resolution() -> Iterator[None]:
    """Around SGLang's resolution of arguments that select nsa_plugin: no server arguments are published yet."""
    global _resolving
    _resolving = True
    try:
        yield
    finally:
        _resolving = False


def preshuffled_pages(original: Callable[[], bool]) -> bool:
    """AROUND hook of `aiter_can_use_preshuffle_paged_mqa`: pages of 64 tokens whenever nsa_plugin is selected.

    Stock ROCm falls to page size 1 where AITER's paged kernel cannot run (no AITER, Triton < 3.5). Ours reads and
    writes pages of 64 in either layout, and the dispatcher declines AITER's kernel where it cannot run.
    """
    from nsa_backend_plugin.engine import hooks

    if not _resolving and not _published_for_us():
        return original()
    hooks.fired("rocm_pages")
    return True


def _published_for_us() -> bool:
    from sglang.srt.runtime_context import get_server_args

    from nsa_backend_plugin.engine import launch

    try:
        return launch.selected(get_server_args())
    except ValueError:  # none are published: SGLang also asks while its modules are imported
        return False


def unquantized(hidden_states: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """The bf16 hidden states; on ROCm also of the (fp8, scale, bf16) that a fused norm hands over. Else None."""
    if isinstance(hidden_states, torch.Tensor):
        return hidden_states
    return hidden_states[2] if on_rocm() and len(hidden_states) == 3 else None


def merge_key_weight(attn: Any) -> None:
    """Give a layer on ROCm a bf16 copy of its W_UK where SGLang keeps that in fp8, with one scale, for its own GEMM."""
    if hasattr(attn, _KEY_WEIGHT) or not on_rocm() or attn.w_kc is None or attn.w_kc.dtype not in FP8_DTYPES:
        return
    setattr(attn, _KEY_WEIGHT, MergedWeights({"weight": [lambda: attn.w_kc.to(torch.bfloat16) * attn.w_scale]}))


def key_weight(attn: Any) -> torch.Tensor:
    """W_UK [heads, nope, 512] of a layer: SGLang's, or the bf16 copy of it."""
    copy = getattr(attn, _KEY_WEIGHT, None)
    return attn.w_kc if copy is None else copy.weight


def check_latent_cache(pool: Any) -> None:
    """Raise ValueError unless the latent rows are those that SGLang writes on ROCm: 576 values, no scales."""
    if pool.kv_cache_dim != LATENT_DIM + ROPE_DIM:
        raise ValueError(
            f"latent rows of {pool.kv_cache_dim} bytes: on ROCm nsa_plugin reads {LATENT_DIM + ROPE_DIM} plain values. "
            "Leave --dsa-prefill-backend and --dsa-decode-backend unset, or use --kv-cache-dtype bfloat16"
        )
