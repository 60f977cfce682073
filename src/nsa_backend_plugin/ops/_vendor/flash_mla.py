"""FlashMLA, shared by the adapters of `sparse_mla` and `dense_mla`: from the `flash_mla` wheel, else from sgl_kernel.

The wheel (sgl-flash-mla, SGLang 0.5.22 and later) keeps the kernels for rows of DeepSeek-V3 and V3.2 on its legacy
side. sgl_kernel has the same ones (sglang-kernel 0.4.5). Both take an empty schedule, which the first call fills on the
device and later calls with the same lengths and shapes reuse.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nsa_backend_plugin.ops._torch.mla import MlaCall
from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.call import Reason

PAGE = 64
_NAMES = ("flash_mla_with_kvcache", "flash_mla_sparse_fwd", "get_mla_metadata")


@dataclass(frozen=True)
class _Library:
    """A module, and what its functions are told beside the arguments that both libraries take."""

    module: Any
    decode_options: Mapping[str, Any] = field(default_factory=dict)
    prefill_options: Mapping[str, Any] = field(default_factory=dict)


@functools.cache
def _library() -> _Library | str:
    """The library that is called from now on, or why there is none."""
    wheel = probe.missing("flash_mla", *_NAMES, "has_legacy")
    if wheel is None:
        module = importlib.import_module("flash_mla")
        if module.has_legacy():
            return _Library(module, {"use_legacy": True}, {"use_legacy": True, "return_log2_lse": True})
        wheel = "flash_mla has no legacy kernels, which read rows of 656 bytes"
    # sgl_kernel.flash_mla loads without its extension, and would fail when it is called.
    sgl_kernel = probe.missing("sgl_kernel.flashmla_ops")
    sgl_kernel = sgl_kernel or probe.missing("sgl_kernel.flash_mla", *_NAMES, "FlashMLASchedMeta")
    return f"{wheel}; {sgl_kernel}" if sgl_kernel else _Library(importlib.import_module("sgl_kernel.flash_mla"))


def missing() -> Reason:
    library = _library()
    return library if isinstance(library, str) else None


def decode(
    call: MlaCall, q: torch.Tensor, lengths: torch.Tensor | None, key: tuple[int, ...], **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [rows, heads, value_dim], lse [rows, heads]) of `flash_mla_with_kvcache` with one query per row.

    lengths: what the schedule depends on beside the shapes, the numbers in key.
    """
    library = _library()
    assert not isinstance(library, str)
    rows, heads, dim = q.shape
    schedule = call.step.once(
        ("flash_mla", rows, heads, *key),
        lambda: library.module.get_mla_metadata()[0],
        *(() if lengths is None else (lengths,)),
        device=q.device,
    )
    out, lse = library.module.flash_mla_with_kvcache(
        q=q.view(rows, 1, heads, dim),
        k_cache=call.kv.view(-1, PAGE, 1, call.kv.shape[-1]),
        head_dim_v=call.value_dim,
        tile_scheduler_metadata=schedule,
        softmax_scale=call.softmax_scale,
        causal=False,
        **arguments,
        **library.decode_options,
    )
    return out[:, 0], lse[:, :, 0]


def prefill(
    call: MlaCall, q: torch.Tensor, indices: torch.Tensor, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [tokens, heads, value_dim], binary lse [tokens, heads]) of `flash_mla_sparse_fwd` over bf16 rows."""
    library = _library()
    assert not isinstance(library, str)
    out, _, lse = library.module.flash_mla_sparse_fwd(
        q,
        call.kv,
        indices.unsqueeze(1),
        call.softmax_scale,
        call.value_dim,
        topk_length=lengths,
        **library.prefill_options,
    )
    return out, lse
