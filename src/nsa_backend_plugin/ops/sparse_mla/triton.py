"""Sparse MLA in Triton: decode with split-K, prefill with one program per token and block of heads."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._triton import mla_launch, support
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.support import Support

available = support.available_for_large_tiles


def accepts_attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kind: str,
    value_dim: int,
    **_: object,
) -> Support:
    return mla_launch.accepts(q, kv, kind, value_dim)


def workspace_bytes_attend(device: torch.device, max_tokens: int, heads: int, topk: int, value_dim: int) -> int:
    return mla_launch.workspace_bytes(device_arch(device), max_tokens, heads, value_dim)


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
    tokens, heads, _ = q.shape
    arch = device_arch(q.device)
    config = mla_launch.tile(arch, kind, heads)
    mla_launch.attend(
        q,
        kv,
        indices,
        None,
        softmax_scale,
        kind=kind,
        kv_scale=kv_scale,
        page_size=0,
        config=config,
        splits=mla_launch.split_count(arch, tokens, heads, indices.shape[1], config),
        out=out,
        lse=lse,
        workspace=workspace,
    )


def compile_cases(arch: str) -> list[support.CompileCase]:
    kinds = ["bf16"]
    if support.has_e4m3(arch):
        kinds += ["fp8"] if arch == "gfx942" else ["packed", "fp8"]
    return mla_launch.compile_cases(arch, kinds, [0])
