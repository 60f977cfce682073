"""Torch reference of the indexer's query and key preparation, in float32 throughout."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.index_pages import write
from nsa_backend_plugin.ops._torch.norm import normalize
from nsa_backend_plugin.ops._torch.quant import quantize_rows
from nsa_backend_plugin.ops._torch.rotary import rotate
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.indexer_prep import KeyStore, Query


def available(arch: str) -> Reason:
    return None


def query(call: Query) -> tuple[torch.Tensor, torch.Tensor]:
    rotated = rotate(call.q, call.positions, call.cos_sin_cache, call.is_neox, call.hadamard)
    value, scale = quantize_rows(rotated, call.scale_format, call.fp8_dtype)
    return value, call.head_gate.float() * scale * call.weight_scale


def key_store(call: KeyStore) -> None:
    normalized = normalize(call.key, call.norm_weight, call.norm_bias, call.norm, call.eps)
    rotated = rotate(normalized, call.positions, call.cos_sin_cache, call.is_neox, call.hadamard)
    value, scale = quantize_rows(rotated, call.scale_format, call.fp8_dtype)
    write(value, scale, call.cache, call.slots, layout=call.layout, page_size=call.page_size)
