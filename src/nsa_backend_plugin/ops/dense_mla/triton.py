"""Dense MLA decode in Triton: split-K over each context; lengths are read on the device only."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._triton import mla_launch, support
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.support import Support, no

available = support.available_for_large_tiles


def accepts_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    value_dim: int,
    num_kv_splits: int | None,
    **_: object,
) -> Support:
    if num_kv_splits is not None and num_kv_splits > mla_launch.MAX_FORCED_SPLITS:
        return no(f"num_kv_splits={num_kv_splits}: at most {mla_launch.MAX_FORCED_SPLITS}")
    return mla_launch.accepts(q, kv, "bf16", value_dim)


def workspace_bytes_decode(
    device: torch.device, max_batch: int, heads: int, value_dim: int, num_kv_splits: int | None
) -> int:
    return mla_launch.workspace_bytes(device_arch(device), max_batch, heads, value_dim, num_kv_splits)


def decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    page_size: int,
    value_dim: int,
    num_kv_splits: int | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    batch, heads, _ = q.shape
    arch = device_arch(q.device)
    config = mla_launch.tile(arch, "pages", heads)
    splits = num_kv_splits or mla_launch.split_count(arch, batch, heads, block_table.shape[1] * page_size, config)
    mla_launch.attend(
        q,
        kv,
        block_table,
        seq_lens,
        softmax_scale,
        kind="bf16",
        kv_scale=None,
        page_size=page_size,
        config=config,
        splits=splits,
        out=out,
        lse=lse,
        workspace=workspace,
    )


def compile_cases(arch: str) -> list[support.CompileCase]:
    return mla_launch.compile_cases(arch, ["pages"], [1, 64])
