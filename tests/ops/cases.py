"""A valid call of every public function, the smallest: what the generated tests make wrong, strided or misaligned.

Written out, not made by `tools/calls.py`: the messages that test_bad_input expects name these sizes and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nsa_backend_plugin.ops import (
    concat,
    dense_mla,
    index_key_cache,
    indexer_prep,
    latent_cache,
    mqa_logits,
    norm_quant,
    projection,
    sparse_mla,
    topk,
)
from tests.ops.implementations import DEVICE

FP8 = torch.float8_e4m3fn


def ints(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int32)


def each(count: int) -> torch.Tensor:
    """Places of rows to write: two in one place would be written in either order."""
    return torch.arange(count, dtype=torch.int32)


def bytes_(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(FP8)


#: Valid keyword arguments of every public function, by name.
VALID = {
    index_key_cache.store: lambda: dict(key=torch.zeros(2, 128), cache=bytes_(3, 8448), slots=each(2)),
    index_key_cache.gather: lambda: dict(cache=bytes_(3, 8448), block_table=ints(2, 1), seq_lens=ints(2, value=5)),
    mqa_logits.paged: lambda: dict(
        q=fp8(2, 1, 4, 128),
        cache=bytes_(3, 8448),
        weights=torch.zeros(2, 4),
        context_lens=ints(2, value=5),
        block_table=ints(2, 1),
        max_context_len=64,
    ),
    mqa_logits.ragged: lambda: dict(
        q=fp8(2, 4, 128),
        k=fp8(6, 128),
        k_scale=torch.zeros(6),
        weights=torch.zeros(2, 4),
        row_start=ints(2),
        row_end=ints(2, value=6),
    ),
    topk.select: lambda: dict(logits=torch.zeros(2, 8), lengths=ints(2, value=8), k=4),
    sparse_mla.attend: lambda: dict(
        q=torch.zeros(2, 4, 576), kv=torch.zeros(6, 1, 576), indices=ints(2, 3), softmax_scale=1.0
    ),
    dense_mla.decode: lambda: dict(
        q=torch.zeros(2, 4, 576),
        kv=torch.zeros(32, 1, 576),
        block_table=ints(2, 1),
        seq_lens=ints(2, value=9),
        softmax_scale=1.0,
        page_size=16,
    ),
    latent_cache.quantize: lambda: dict(kv=torch.zeros(2, 576, dtype=torch.bfloat16)),
    latent_cache.dequantize: lambda: dict(packed=bytes_(2, 656)),
    latent_cache.store: lambda: dict(
        k_nope=torch.zeros(2, 512),
        k_rope=torch.zeros(2, 64),
        cache=torch.zeros(6, 1, 576),
        slots=each(2),
        positions=ints(2),
        cos_sin_cache=torch.zeros(9, 64),
        k_rope_out=torch.zeros(2, 64),
        q_rope=torch.zeros(2, 4, 64),
        q_all=torch.zeros(2, 4, 576),
        norm_weight=torch.ones(512),
    ),
    norm_quant.rms: lambda: dict(x=torch.zeros(2, 256), weight=torch.zeros(256)),
    projection.linear: lambda: dict(
        x=torch.zeros(2, 256, dtype=torch.bfloat16),
        weight=fp8(3, 256),
        weight_scale=torch.zeros(1, 2),
        norm_weight=torch.zeros(256, dtype=torch.bfloat16),
    ),
    projection.per_head: lambda: dict(
        x=torch.zeros(2, 4, 64, dtype=torch.bfloat16),
        weight=torch.zeros(4, 16, 64, dtype=torch.bfloat16),
    ),
    concat.q_all: lambda: dict(q_nope=torch.zeros(2, 4, 512), q_rope=torch.zeros(2, 4, 64)),
    concat.mla_k: lambda: dict(k_nope=torch.zeros(2, 4, 128), k_rope=torch.zeros(2, 1, 64)),
    indexer_prep.query: lambda: dict(
        q=torch.zeros(2, 4, 128),
        head_gate=torch.zeros(2, 4),
        positions=ints(2),
        cos_sin_cache=torch.zeros(9, 64),
        weight_scale=1.0,
        is_neox=True,
    ),
    indexer_prep.key_store: lambda: dict(
        key=torch.zeros(2, 128),
        norm_weight=torch.zeros(128),
        norm_bias=torch.zeros(128),
        positions=ints(2),
        cos_sin_cache=torch.zeros(9, 64),
        cache=bytes_(3, 8448),
        slots=each(2),
        is_neox=True,
    ),
}

#: Tensor arguments that the valid calls leave out; what makes them valid beside them.
OPTIONAL: dict[Any, Callable[[], dict[str, Any]]] = {
    topk.select: lambda: dict(
        row_starts=ints(2),
        page_table=ints(3, 8),
        page_rows=ints(2, value=1),
        out=ints(2, 4),
    ),
    sparse_mla.attend: lambda: dict(
        lengths=ints(2, value=3), context=ints(1), out=torch.zeros(2, 4, 512), workspace=bytes_(1 << 20)
    ),
    dense_mla.decode: lambda: dict(out=torch.zeros(2, 4, 512), workspace=bytes_(1 << 20)),
    mqa_logits.paged: lambda: dict(out=torch.zeros(2, 64)),
    projection.linear: lambda: dict(out=torch.zeros(2, 3, dtype=torch.bfloat16)),
    projection.per_head: lambda: dict(out=torch.zeros(2, 4, 16, dtype=torch.bfloat16)),
    mqa_logits.ragged: lambda: dict(out=torch.zeros(2, 6)),
    concat.mla_k: lambda: dict(out=torch.zeros(2, 4, 192)),
}


#: Changes to the valid calls that make others of them, which other code computes.
VARIANTS: dict[Any, dict[str, Callable[[], dict[str, Any]]]] = {
    sparse_mla.attend: {
        "fp8 rows": lambda: dict(kv=fp8(6, 1, 576), kv_scale=0.5),
        "packed rows": lambda: dict(kv=latent_cache.quantize(torch.randn(6, 1, 576).to(torch.bfloat16))),
    },
    projection.linear: {
        "bf16 weights": lambda: dict(weight=torch.zeros(3, 256, dtype=torch.bfloat16), weight_scale=None),
    },
    dense_mla.decode: {"fp8 rows": lambda: dict(kv=fp8(32, 1, 576), kv_scale=0.5)},
}


def valid(function: Any, variant: str = "") -> dict[str, Any]:
    """Keyword arguments by name, every tensor argument among them."""
    changes = VARIANTS[function][variant]() if variant else {}
    return {**VALID[function](), **OPTIONAL.get(function, dict)(), **changes}


#: Attention's kernels take no float32, which matrix units would round.
HALF = {sparse_mla.attend, dense_mla.decode}


def filled(function: Any, variant: str = "") -> dict[str, Any]:
    """The valid call on the device, with random values where any value will do."""
    arguments = {
        name: _random(value, function in HALF).to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in valid(function, variant).items()
    }
    return {**arguments, "deterministic": True} if function is topk.select else arguments


def _random(value: torch.Tensor, half: bool) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    return torch.randn(value.shape).to(torch.bfloat16 if half and value.dtype != FP8 else value.dtype)
