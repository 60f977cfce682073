"""AITER's MLA decode over selected slots, bf16 or plain fp8 rows: missing slots are compacted away first.

Checked against a fake, not run on AMD.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops._vendor import aiter_mla
from nsa_backend_plugin.ops.support import Support, no


def available(arch: str) -> Support:
    return aiter_mla.available(arch)


def accepts_attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kind: str,
    kv_scale: float | None,
    value_dim: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> Support:
    if kind == "packed" or kv.dtype not in (torch.bfloat16, *FP8_DTYPES):
        return no(f"kv is {kind} ({kv.dtype}): only bfloat16 and plain fp8 rows")
    if lse is not None:
        return no("return_lse: its log-sum-exp covers splits, not rows")
    if indices.shape[1] == 0:
        return no("top-k 0")
    return aiter_mla.fits(q, kv, value_dim)


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kind: str,
    kv_scale: float | None,
    value_dim: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    entries, starts = aiter_mla.ragged(indices, indices >= 0)
    aiter_mla.decode(q, kv, entries, starts, softmax_scale, kv_scale=kv_scale, out=out)
