"""SGLang's JIT top-k v2 (sglang.kernels, deepseek_v4/topk_v2.cuh): decode rows, page tables, k up to 2048, CUDA.

Its plan (which rows get a cluster of blocks) depends on the lengths only: it is made once per step.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.topk import Select

_MODULE = "sglang.kernels.ops.attention.dsv4.topk"
_TRANSFORM = "topk_transform_paged_v2"
#: Its name up to 0.5.17's kernel, which leaves the places past a row's length unwritten.
_OLD_TRANSFORM = "topk_transform_512_v2"
_MAX_K = 2048
_FIRST_ARCH = 90  # thread-block clusters


def available(arch: str) -> Reason:
    if not is_cuda(arch) or int(arch[3:]) < _FIRST_ARCH:
        return f"needs thread-block clusters (sm_{_FIRST_ARCH} or later), not {arch}"
    reason = probe.missing(_MODULE, "plan_topk_v2", _TRANSFORM)
    return reason and probe.missing(_MODULE, "plan_topk_v2", _OLD_TRANSFORM)


def declines_select(call: Select) -> Reason:
    if call.k > _MAX_K:
        return f"k {call.k}: at most {_MAX_K}"
    if call.deterministic:
        return "no deterministic mode"
    if call.row_starts is not None or call.page_table is None or call.page_rows is not None:
        return "needs a page table with one row per logits row, and no row_starts"
    if call.page_size & (call.page_size - 1):
        return f"page size {call.page_size}: a power of two only"
    if call.logits.stride(0) % 4 or call.logits.data_ptr() % 16:
        return "logits rows do not start at 16-byte boundaries"
    return None if call.logits.shape[0] else "no rows"


def select(call: Select) -> torch.Tensor:
    from sglang.kernels.ops.attention.dsv4 import topk

    def plan() -> tuple[torch.Tensor, torch.Tensor]:
        lengths = call.lengths.clamp_min(0)  # read as unsigned: a negative length would be four billion
        return lengths, topk.plan_topk_v2(lengths)

    lengths, metadata = call.step.once("sglang_topk_v2", plan, call.lengths)
    transform = getattr(topk, _TRANSFORM, None)
    if transform is None:
        transform = getattr(topk, _OLD_TRANSFORM)
        call.out.fill_(-1)
    transform(call.logits, lengths, call.page_table, call.out, call.page_size, metadata)
    return call.out
