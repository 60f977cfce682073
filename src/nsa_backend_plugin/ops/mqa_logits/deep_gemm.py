"""DeepGEMM's MQA logits (sgl-deep-gemm): row-major pages of 64 on Hopper and Blackwell."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.logits import row_lengths
from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.mqa_logits import Paged, Ragged

_ARCHES = ("sm_90", "sm_100", "sm_103")
_HEADS = (32, 64)
_PAGE_SIZE = 64
_NAMES = ("fp8_mqa_logits", "fp8_paged_mqa_logits", "get_num_sms", "get_paged_mqa_logits_metadata")


def available(arch: str) -> Reason:
    if arch not in _ARCHES:
        return f"DeepGEMM's MQA logits need {', '.join(_ARCHES)}, not {arch}"
    return probe.missing("deep_gemm", *_NAMES)


def declines_paged(call: Paged) -> Reason:
    next_n = call.q.shape[1]
    if call.layout != "row_major":
        return f"layout {call.layout}: reads row_major only"
    if call.page_size != _PAGE_SIZE:
        return f"page size {call.page_size}: {_PAGE_SIZE} only"
    if next_n not in (1, 2):
        return f"next_n {next_n}: 1 or 2 only"
    if next_n > 1 and call.context_lens.dim() == 2:
        return "context_lens of each query: it stops where the last query of a request does, another may see more"
    if not call.block_table.shape[1]:
        return "block_table without pages"
    return _declines(call, q=call.q, cache=call.cache, weights=call.weights)


def declines_ragged(call: Ragged) -> Reason:
    return _declines(call, q=call.q, k=call.k, k_scale=call.k_scale, weights=call.weights)


def _declines(call: Paged | Ragged, **loaded: torch.Tensor) -> Reason:
    """loaded: the tensors that it reads through TMA descriptors, which neither nothing nor any address suits."""
    heads = call.q.shape[-2]
    if heads not in _HEADS:
        return f"{heads} heads: {' or '.join(map(str, _HEADS))} only"
    if call.q.dtype != torch.float8_e4m3fn:
        return f"q is {call.q.dtype}: e4m3fn only"
    for name, tensor in loaded.items():
        if not tensor.shape[0]:
            return f"{name} is empty"
        if tensor.data_ptr() % 16:
            return f"{name} does not start at a 16-byte boundary"
    return None


def paged(call: Paged) -> torch.Tensor:
    import deep_gemm

    def plan() -> tuple[torch.Tensor, torch.Tensor]:
        # Two-dimensional lengths: with one-dimensional ones this release can deadlock (SGLang's _to_2d_context_lens).
        lengths = row_lengths(call.context_lens, call.q.shape[1]).contiguous()
        return lengths, deep_gemm.get_paged_mqa_logits_metadata(lengths, _PAGE_SIZE, deep_gemm.get_num_sms())

    lengths, schedule = call.step.once(("deep_gemm", call.q.shape[1]), plan, call.context_lens)
    logits = deep_gemm.fp8_paged_mqa_logits(
        call.q,
        call.cache.view(call.cache.shape[0], _PAGE_SIZE, 1, -1),
        call.weights.contiguous(),
        lengths,
        call.block_table,
        schedule,
        call.max_context_len,
        clean_logits=False,
    )
    return call.finish(logits[:, : call.max_context_len], None, lengths.view(-1))


def ragged(call: Ragged) -> torch.Tensor:
    import deep_gemm

    start, end = call.row_start.contiguous(), call.row_end.contiguous()
    keys = (call.k, call.k_scale.contiguous())
    logits = deep_gemm.fp8_mqa_logits(call.q, keys, call.weights.contiguous(), start, end, clean_logits=False)
    return call.finish(logits[:, : call.k.shape[0]], start, end)
