"""AITER's kernels of the index-K cache (ROCm): quantize and store, gather. Checked against fakes, not run on AMD."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import INDEX_DIM
from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.arch import arch_fp8_dtype, is_rocm
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.index_key_cache import Gather, Store


def available(arch: str) -> Reason:
    if not is_rocm(arch):
        return f"AITER needs a ROCm GPU, not {arch}"
    return probe.missing("aiter", "indexer_k_quant_and_cache", "cp_gather_indexer_k_quant_cache")


def _declines_flavour(call: Store | Gather) -> Reason:
    native = arch_fp8_dtype(call.arch)
    return None if call.fp8_dtype == native else f"writes and reads {native}, not {call.fp8_dtype}"


def declines_store(call: Store) -> Reason:
    if call.key.dtype == torch.float32:
        return "takes bf16 and fp16 keys, not fp32"
    return _declines_flavour(call)


declines_gather = _declines_flavour


def store(call: Store) -> None:
    import aiter

    if call.key.shape[0] == 0:
        return
    aiter.indexer_k_quant_and_cache(
        call.key.contiguous(),
        call.cache.view(-1, call.page_size, INDEX_DIM + 4).view(call.fp8_dtype),
        call.slots.long().contiguous(),
        INDEX_DIM,  # one scale per token
        "ue8m0" if call.scale_format == "ue8m0" else "",
        preshuffle=call.layout == "preshuffled",
    )


def gather(call: Gather) -> tuple[torch.Tensor, torch.Tensor]:
    import aiter

    value, scale = call.output()
    if call.total_tokens:
        ends = torch.nn.functional.pad(call.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        aiter.cp_gather_indexer_k_quant_cache(
            call.cache.view(-1, call.page_size, INDEX_DIM + 4).view(call.fp8_dtype),
            value,
            scale.view(torch.uint8).view(-1, 4),
            call.block_table.contiguous(),
            ends,
            preshuffle=call.layout == "preshuffled",
        )
    return value, scale
