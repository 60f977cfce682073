"""What stands between an unmodified SGLang and a CPU: most functions are rows of `engine.ledger`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import hooks


@contextlib.contextmanager
def no_cuda_capability() -> Iterator[None]:
    """Answer (0, 0) to `torch.cuda.get_device_capability` while SGLang resolves arguments, where there is no CUDA.

    Its DSA branch asks torch unguarded, inside functions that are registered in closures, and only compares the major
    version with 10 and 12. The answer is the truth (no capability), it is limited to the resolution of arguments that
    select nsa_plugin, and every other caller keeps getting torch's own error.
    """
    from nsa_backend_plugin.engine.cpu import platform

    if not platform.active():
        yield
        return
    original = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: (0, 0)
    try:
        yield
    finally:
        torch.cuda.get_device_capability = original


def get_rope_cpu(
    original: Callable[..., Any],
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: int,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    partial_rotary_factor: float = 1.0,
    device: str | None = None,
) -> Any:
    """AROUND hook: the CPU factory knows deepseek_yarn only; every other RoPE comes from the general one."""
    arguments = (head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, dtype, partial_rotary_factor)
    if rope_scaling is not None and rope_scaling.get("rope_type") == "deepseek_yarn":
        return original(*arguments, device)
    hooks.fired("rope_cpu")
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    return get_rope(*arguments)


def support_triton(original: Callable[[str], bool], backend: str) -> bool:
    """AROUND hook: request and token bookkeeping of our backend takes the torch path."""
    if backend != BACKEND_NAME:
        return original(backend)
    hooks.fired("support_triton")
    return False


class _Pageable(TorchFunctionMode):
    """Memory that is asked to be pinned is not: torch refuses to pin where there is no accelerator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


def grammar_mask(original: Callable[..., torch.Tensor], grammar: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """AROUND hook: the mask of allowed tokens is asked for in pinned memory, and applied by kernels of GPUs alone."""
    hooks.fired("grammar_mask")
    grammar.apply_vocab_mask = _apply_vocab_mask
    with _Pageable():
        return original(grammar, *args, **kwargs)


def _apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")


def send_without_cuda() -> None:
    """Have a prefill server wait for what it sends as a CPU does, where SGLang records CUDA events."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender
    from sglang.srt.environ import envs

    envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX.set(False)
    hooks.fired("transfer_prefixes")
    if getattr(MooncakeKVSender, "supports_host_tensor_indices", False):
        MooncakeKVSender.supports_host_tensor_indices = False
        hooks.fired("transfer_indices")
