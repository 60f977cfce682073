"""Bad input of every public function: a ValueError that names the argument, the value and what was expected."""

from __future__ import annotations

import re

import pytest
import torch

from nsa_backend_plugin.ops import (
    concat,
    dense_mla,
    index_key_cache,
    indexer_prep,
    latent_cache,
    mqa_logits,
    norm_quant,
    sparse_mla,
    topk,
)

FP8 = torch.float8_e4m3fn


def ints(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int32)


def bytes_(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(FP8)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def spread(*shape: int) -> torch.Tensor:
    """Every other value of a wider buffer: an inner stride of 2."""
    return torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2]


#: Valid keyword arguments of every public function, by name.
VALID = {
    index_key_cache.store: lambda: dict(key=torch.zeros(2, 128), cache=bytes_(3, 8448), slots=ints(2)),
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
        slots=ints(2),
        positions=ints(2),
        cos_sin_cache=torch.zeros(9, 64),
        k_rope_out=torch.zeros(2, 64),
        q_rope=torch.zeros(2, 4, 64),
        q_all=torch.zeros(2, 4, 576),
        norm_weight=torch.ones(512),
    ),
    norm_quant.rms: lambda: dict(x=torch.zeros(2, 256), weight=torch.zeros(256)),
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
        slots=ints(2),
        is_neox=True,
    ),
}

#: (function, argument, bad value, what the message says: name, value, expectation)
BAD = [
    (index_key_cache.store, "key", torch.zeros(2, 64), "key has shape [2, 64]: expected [any, 128]"),
    (index_key_cache.store, "key", ints(2, 128), "key has dtype torch.int32: expected torch.bfloat16 or"),
    (index_key_cache.store, "key", torch.zeros(128, 2).T, "key has strides (1, 2): expected stride 1"),
    (index_key_cache.store, "key", [1.0], "key=[1.0]: expected a torch.Tensor"),
    (index_key_cache.store, "cache", bytes_(3, 8447), "cache has shape [3, 8447]: expected [any, 8448]"),
    (index_key_cache.store, "slots", ints(3), "slots has shape [3]: expected [2]"),
    (index_key_cache.store, "slots", ints(2, value=192), "slots contains 192: expected"),
    (index_key_cache.store, "layout", "shuffled", "layout='shuffled': expected one of row_major, preshuffled"),
    (index_key_cache.store, "scale_format", "e8m0", "scale_format='e8m0': expected one of fp32, ue8m0"),
    (index_key_cache.store, "page_size", 24, "page_size=24: expected a multiple of 16"),
    (index_key_cache.store, "page_size", 0, "page_size=0: expected a positive int"),
    (index_key_cache.store, "fp8_dtype", torch.float8_e5m2, "fp8_dtype=torch.float8_e5m2: expected one of"),
    (index_key_cache.store, "impl", "magic", "impl='magic': expected one of"),
    (index_key_cache.gather, "seq_lens", ints(2, value=65), "seq_lens contains 65: expected 0 <= value < 65"),
    (index_key_cache.gather, "seq_lens", ints(2, value=-1), "seq_lens contains -1: expected 0 <= value"),
    (
        index_key_cache.gather,
        "block_table",
        ints(2, 1).long(),
        "block_table has dtype torch.int64: expected torch.int32",
    ),
    (index_key_cache.gather, "total_tokens", -1, "total_tokens=-1: expected at least 0"),
    (mqa_logits.paged, "q", torch.zeros(2, 1, 4, 128), "q has dtype torch.float32: expected torch.float8_e4m3fn"),
    (mqa_logits.paged, "weights", torch.zeros(2, 5), "weights has shape [2, 5]: expected [2, 4]"),
    (mqa_logits.paged, "context_lens", ints(2, value=65), "context_lens contains 65: expected 0 <= value < 65"),
    (mqa_logits.paged, "context_lens", [1, 2], "context_lens=[1, 2]: expected a torch.Tensor"),
    (mqa_logits.paged, "context_lens", ints(2, 3), "context_lens has shape [2, 3]: expected [2, 1]"),
    (mqa_logits.paged, "max_context_len", 0, "max_context_len=0: expected a positive int"),
    (mqa_logits.paged, "out", torch.zeros(2, 63), "out.shape[1]=63: expected at least 64"),
    (mqa_logits.paged, "layout", "rows", "layout='rows': expected one of row_major, preshuffled"),
    (mqa_logits.ragged, "k", torch.zeros(6, 128), "k has dtype torch.float32: expected torch.float8_e4m3fn"),
    (mqa_logits.ragged, "k_scale", torch.zeros(5), "k_scale has shape [5]: expected [6]"),
    (mqa_logits.ragged, "row_end", ints(2, value=7), "row_end contains 7: expected 0 <= value < 7"),
    (mqa_logits.ragged, "row_start", ints(2, value=-1), "row_start contains -1: expected 0 <= value"),
    (topk.select, "logits", torch.zeros(2, 8).half(), "logits has dtype torch.float16: expected torch.float32"),
    (topk.select, "lengths", ints(2, value=9), "lengths contains 9: expected 0 <= value < 9"),
    (topk.select, "k", 0, "k=0: expected a positive int"),
    (topk.select, "k", True, "k=True: expected a positive int"),
    (topk.select, "row_starts", ints(2, value=1), "row_starts + lengths contains 9: expected 0 <= value < 9"),
    (topk.select, "row_starts", ints(2, value=-3), "row_starts contains -3: expected 0 <= value"),
    (topk.select, "page_rows", ints(2), "page_rows='tensor': expected None without page_table"),
    (topk.select, "page_table", ints(2, 7), "lengths contains 8: expected 0 <= value < 8"),
    (topk.select, "page_size", 1.5, "page_size=1.5: expected a positive int"),
    (topk.select, "out", ints(2, 5), "out has shape [2, 5]: expected [2, 4]"),
    (sparse_mla.attend, "kv", torch.zeros(6, 1, 512), "kv has shape [6, 1, 512] and dtype torch.float32: expected"),
    (sparse_mla.attend, "kv", torch.zeros(6, 2, 1).to(FP8), "expected [slots, 1, bytes]"),
    (sparse_mla.attend, "kv_scale", 0.5, "kv_scale=0.5: expected a float with plain fp8 kv, else None"),
    (sparse_mla.attend, "kv", fp8(6, 1, 576), "kv_scale=None: expected a float with plain fp8 kv, else None"),
    (sparse_mla.attend, "indices", ints(2, 3, value=6), "indices contains 6: expected -1 <= value < 6"),
    (sparse_mla.attend, "indices", ints(2, 3, value=-2), "indices contains -2: expected -1 <= value < 6"),
    (sparse_mla.attend, "q", torch.zeros(2, 129, 576), "q.shape[1]=129: expected 1 to 128 heads"),
    (sparse_mla.attend, "value_dim", 600, "value_dim=600: expected at most q's last dimension 576"),
    (sparse_mla.attend, "out", torch.zeros(2, 4, 576), "out has shape [2, 4, 576]: expected [2, 4, 512]"),
    (dense_mla.decode, "page_size", 8, "page_size=8: expected one of 1, 16, 32, 64, 128"),
    (dense_mla.decode, "kv", torch.zeros(32, 1, 576).half(), "kv has dtype torch.float16: expected torch.float32"),
    (dense_mla.decode, "seq_lens", ints(2, value=17), "seq_lens contains 17: expected 0 <= value < 17"),
    (dense_mla.decode, "num_kv_splits", 0, "num_kv_splits=0: expected a positive int"),
    (dense_mla.decode, "block_table", ints(3, 1), "block_table has shape [3, 1]: expected [2, any]"),
    (latent_cache.quantize, "kv", ints(2, 576), "kv has dtype torch.int32: expected torch.bfloat16 or"),
    (latent_cache.quantize, "kv", [1.0], "kv=[1.0]: expected a torch.Tensor"),
    (latent_cache.quantize, "kv", torch.tensor(1.0), "kv has shape []: expected [any]"),
    (latent_cache.quantize, "kv", spread(2, 576), "kv has strides (1152, 2): expected stride 1"),
    (latent_cache.quantize, "kv", torch.zeros(2, 3, 4, 576), "kv.shape[2]=4: expected 1 head"),
    (latent_cache.quantize, "value_dim", 500, "value_dim=500: expected a multiple of tile_size 128"),
    (latent_cache.quantize, "value_dim", 640, "kv.shape[-1]=576: expected at least value_dim 640"),
    (latent_cache.quantize, "value_dim", 0, "value_dim=0: expected a positive int"),
    (latent_cache.quantize, "tile_size", 0, "tile_size=0: expected a positive int"),
    (latent_cache.quantize, "tile_size", 128.0, "tile_size=128.0: expected a positive int"),
    (latent_cache.quantize, "tile_size", 96, "value_dim=512: expected a multiple of tile_size 96"),
    (latent_cache.quantize, "impl", "magic", "impl='magic': expected one of"),
    (latent_cache.dequantize, "packed", bytes_(2, 527), "packed.shape[-1]=527: expected a packed row"),
    (latent_cache.dequantize, "packed", bytes_(2, 529), "packed.shape[-1]=529: expected a packed row"),
    (latent_cache.dequantize, "packed", torch.zeros(2, 656), "packed has dtype torch.float32: expected torch.uint8"),
    (latent_cache.dequantize, "packed", bytes_(2, 660)[:, :656], "packed has strides (660, 1): expected a contiguous"),
    (latent_cache.dequantize, "packed", bytes_(2, 3, 2, 656), "packed.shape[2]=2: expected 1 head"),
    (latent_cache.dequantize, "packed", None, "packed=None: expected a torch.Tensor"),
    (latent_cache.dequantize, "value_dim", -512, "value_dim=-512: expected a positive int"),
    (latent_cache.dequantize, "tile_size", True, "tile_size=True: expected a positive int"),
    (latent_cache.dequantize, "dtype", torch.float64, "dtype=torch.float64: expected one of torch.bfloat16"),
    (latent_cache.dequantize, "impl", "magic", "impl='magic': expected one of"),
    (latent_cache.store, "k_nope", ints(2, 512), "k_nope has dtype torch.int32: expected torch.bfloat16 or"),
    (latent_cache.store, "k_nope", torch.zeros(512), "k_nope has shape [512]: expected [any, any]"),
    (latent_cache.store, "k_nope", spread(2, 512), "k_nope has strides (1024, 2): expected stride 1"),
    (latent_cache.store, "k_nope", torch.zeros(3, 512), "k_rope has shape [2, 64]: expected [3, any]"),
    (latent_cache.store, "k_nope", meta(2, 512), "k_rope is on device cpu: expected meta"),
    (latent_cache.store, "k_rope", torch.zeros(2, 64).half(), "k_rope has dtype torch.float16: expected torch.float32"),
    (latent_cache.store, "k_rope", torch.zeros(3, 64), "k_rope has shape [3, 64]: expected [2, any]"),
    (latent_cache.store, "k_rope", spread(2, 64), "k_rope has strides (128, 2): expected stride 1"),
    (latent_cache.store, "k_rope", meta(2, 64), "k_rope is on device meta: expected cpu"),
    (latent_cache.store, "cache", torch.zeros(6, 1, 512), "cache has shape [6, 1, 512]"),
    (latent_cache.store, "cache", torch.zeros(6, 2, 576), "cache has shape [6, 2, 576]: expected [any, 1, any]"),
    (latent_cache.store, "cache", torch.zeros(6, 576), "cache has shape [6, 576]: expected [any, 1, any]"),
    (latent_cache.store, "cache", torch.zeros(6, 1, 576).long(), "cache has dtype torch.int64: expected"),
    (
        latent_cache.store,
        "cache",
        torch.zeros(6, 1, 600)[..., :576],
        "cache has strides (600, 600, 1): expected a contig",
    ),
    (latent_cache.store, "cache", meta(6, 1, 576), "cache is on device meta: expected cpu"),
    (latent_cache.store, "cache", None, "cache=None: expected a torch.Tensor"),
    (latent_cache.store, "slots", ints(2, value=6), "slots contains 6: expected"),
    (latent_cache.store, "slots", ints(3), "slots has shape [3]: expected [2]"),
    (latent_cache.store, "slots", torch.zeros(2), "slots has dtype torch.float32: expected torch.int32 or torch.int64"),
    (latent_cache.store, "slots", meta(2, dtype=torch.int64), "slots is on device meta: expected cpu"),
    (latent_cache.store, "positions", ints(2, value=9), "positions contains 9: expected 0 <= value < 9"),
    (latent_cache.store, "positions", ints(2, value=-1), "positions contains -1: expected 0 <= value < 9"),
    (latent_cache.store, "positions", ints(3), "positions has shape [3]: expected [2]"),
    (latent_cache.store, "positions", torch.zeros(2), "positions has dtype torch.float32: expected torch.int32 or"),
    (latent_cache.store, "positions", meta(2, dtype=torch.int32), "positions is on device meta: expected cpu"),
    (latent_cache.store, "positions", None, "positions=None: expected given with cos_sin_cache"),
    (latent_cache.store, "cos_sin_cache", None, "positions=tensor: expected given with cos_sin_cache"),
    (latent_cache.store, "cos_sin_cache", torch.zeros(9, 32), "cos_sin_cache.shape[1]=32: expected k_rope's width"),
    (latent_cache.store, "cos_sin_cache", torch.zeros(9, 64).half(), "cos_sin_cache has dtype torch.float16: expected"),
    (latent_cache.store, "cos_sin_cache", spread(9, 64), "cos_sin_cache has strides (128, 2): expected a contiguous"),
    (latent_cache.store, "cos_sin_cache", meta(9, 64), "cos_sin_cache is on device meta: expected cpu"),
    (latent_cache.store, "is_neox", "yes", "is_neox='yes': expected one of False, True"),
    (latent_cache.store, "kv_scale", 1.0, "kv_scale=1.0: expected a float with a plain fp8 cache, else None"),
    (latent_cache.store, "cache", fp8(6, 1, 576), "kv_scale=None: expected a float with a plain fp8 cache, else None"),
    (latent_cache.store, "k_rope_out", torch.zeros(2, 63), "k_rope_out has shape [2, 63]: expected [2, 64]"),
    (latent_cache.store, "k_rope_out", torch.zeros(2, 64).half(), "k_rope_out has dtype torch.float16: expected"),
    (latent_cache.store, "k_rope_out", spread(2, 64), "k_rope_out has strides (128, 2): expected stride 1"),
    (latent_cache.store, "k_rope_out", meta(2, 64), "k_rope_out is on device meta: expected cpu"),
    (latent_cache.store, "q_rope", None, "q_rope=None: expected given with q_all"),
    (latent_cache.store, "q_rope", torch.zeros(2, 4, 32), "q_rope has shape [2, 4, 32]: expected [2, any, 64]"),
    (latent_cache.store, "q_rope", torch.zeros(2, 4, 64).half(), "q_rope has dtype torch.float16: expected"),
    (latent_cache.store, "q_rope", spread(2, 4, 64), "q_rope has strides (512, 128, 2): expected stride 1"),
    (latent_cache.store, "q_rope", meta(2, 4, 64), "q_rope is on device meta: expected cpu"),
    (latent_cache.store, "q_all", None, "q_rope=tensor: expected given with q_all"),
    (latent_cache.store, "q_all", torch.zeros(2, 3, 576), "q_all has shape [2, 3, 576]: expected [2, 4, 576]"),
    (latent_cache.store, "q_all", torch.zeros(2, 4, 576).half(), "q_all has dtype torch.float16: expected"),
    (latent_cache.store, "q_all", spread(2, 4, 576), "q_all has strides (4608, 1152, 2): expected stride 1"),
    (latent_cache.store, "q_all", meta(2, 4, 576), "q_all is on device meta: expected cpu"),
    (latent_cache.store, "norm_weight", torch.zeros(64), "norm_weight has shape [64]: expected [512]"),
    (latent_cache.store, "norm_weight", ints(512), "norm_weight has dtype torch.int32: expected"),
    (latent_cache.store, "norm_weight", spread(512), "norm_weight has strides (2,): expected a contiguous tensor"),
    (latent_cache.store, "norm_weight", meta(512), "norm_weight is on device meta: expected cpu"),
    (latent_cache.store, "norm_eps", 0.0, "norm_eps=0.0: expected a positive number"),
    (latent_cache.store, "norm_eps", "small", "norm_eps='small': expected a positive number"),
    (latent_cache.store, "impl", "magic", "impl='magic': expected one of"),
    (norm_quant.rms, "x", torch.zeros(2, 200), "x.shape[1]=200: expected a multiple of 128"),
    (norm_quant.rms, "x", torch.zeros(2, 0), "x.shape[1]=0: expected a multiple of 128"),
    (norm_quant.rms, "x", torch.zeros(256), "x has shape [256]: expected [any, any]"),
    (norm_quant.rms, "x", ints(2, 256), "x has dtype torch.int32: expected torch.bfloat16 or"),
    (norm_quant.rms, "x", torch.zeros(256, 2).T, "x has strides (1, 2): expected stride 1"),
    (norm_quant.rms, "weight", torch.zeros(128), "weight has shape [128]: expected [256]"),
    (norm_quant.rms, "weight", ints(256), "weight has dtype torch.int32: expected torch.bfloat16 or"),
    (norm_quant.rms, "weight", spread(256), "weight has strides (2,): expected a contiguous tensor"),
    (norm_quant.rms, "weight", meta(256), "weight is on device meta: expected cpu"),
    (norm_quant.rms, "eps", 0.0, "eps=0.0: expected a positive number"),
    (norm_quant.rms, "eps", None, "eps=None: expected a positive number"),
    (norm_quant.rms, "scale_format", "e8m0", "scale_format='e8m0': expected one of fp32, ue8m0"),
    (norm_quant.rms, "impl", "magic", "impl='magic': expected one of"),
    (concat.q_all, "q_nope", ints(2, 4, 512), "q_nope has dtype torch.int32: expected torch.bfloat16 or"),
    (concat.q_all, "q_nope", torch.zeros(8, 512), "q_nope has shape [8, 512]: expected [any, any, any]"),
    (concat.q_all, "q_nope", spread(2, 4, 512), "q_nope has strides (4096, 1024, 2): expected stride 1"),
    (concat.q_all, "q_nope", None, "q_nope=None: expected a torch.Tensor"),
    (concat.q_all, "q_rope", torch.zeros(2, 5, 64), "q_rope has shape [2, 5, 64]: expected [2, 4, any]"),
    (concat.q_all, "q_rope", torch.zeros(2, 4, 64).half(), "q_rope has dtype torch.float16: expected torch.float32"),
    (concat.q_all, "q_rope", spread(2, 4, 64), "q_rope has strides (512, 128, 2): expected stride 1"),
    (concat.q_all, "q_rope", meta(2, 4, 64), "q_rope is on device meta: expected cpu"),
    (concat.q_all, "q_rope", None, "q_rope=None: expected a torch.Tensor"),
    (concat.q_all, "impl", "magic", "impl='magic': expected one of"),
    (concat.mla_k, "k_nope", ints(2, 4, 128), "k_nope has dtype torch.int32: expected torch.bfloat16 or"),
    (concat.mla_k, "k_nope", torch.zeros(8, 128), "k_nope has shape [8, 128]: expected [any, any, any]"),
    (concat.mla_k, "k_nope", spread(2, 4, 128), "k_nope has strides (1024, 256, 2): expected stride 1"),
    (concat.mla_k, "k_rope", torch.zeros(2, 4, 64), "k_rope has shape [2, 4, 64]: expected [2, 1, any]"),
    (concat.mla_k, "k_rope", torch.zeros(2, 1, 64).half(), "k_rope has dtype torch.float16: expected torch.float32"),
    (concat.mla_k, "k_rope", spread(2, 1, 64), "k_rope has strides (128, 128, 2): expected stride 1"),
    (concat.mla_k, "k_rope", meta(2, 1, 64), "k_rope is on device meta: expected cpu"),
    (concat.mla_k, "dtype", torch.int8, "dtype=torch.int8: expected one of"),
    (concat.mla_k, "out", torch.zeros(2, 4, 128), "out has shape [2, 4, 128]: expected [2, 4, 192]"),
    (concat.mla_k, "out", ints(2, 4, 192), "dtype=torch.int32: expected one of"),
    (concat.mla_k, "out", spread(2, 4, 192), "out has strides (1536, 384, 2): expected a contiguous tensor"),
    (concat.mla_k, "out", meta(2, 4, 192), "out is on device meta: expected cpu"),
    (concat.mla_k, "out", [0.0], "out=[0.0]: expected a torch.Tensor"),
    (concat.mla_k, "impl", "magic", "impl='magic': expected one of"),
    (indexer_prep.query, "head_gate", torch.zeros(2, 3), "head_gate has shape [2, 3]: expected [2, 4]"),
    (indexer_prep.query, "cos_sin_cache", torch.zeros(9, 130), "cos_sin_cache.shape[1]=130: expected at most 128"),
    (indexer_prep.query, "cos_sin_cache", torch.zeros(9, 63), "cos_sin_cache.shape[1]=63: expected an even rope dim"),
    (indexer_prep.query, "positions", ints(2, value=-1), "positions contains -1: expected 0 <= value < 9"),
    (indexer_prep.key_store, "norm", "batch", "norm='batch': expected one of layer, rms"),
    (indexer_prep.key_store, "norm_bias", None, "norm_bias=None: expected a tensor with norm='layer' only"),
    (indexer_prep.key_store, "norm_weight", torch.zeros(64), "norm_weight has shape [64]: expected [128]"),
    (indexer_prep.key_store, "slots", ints(2, value=192), "slots contains 192: expected"),
]


def name_of(function) -> str:
    return f"{function.__module__.split('.')[-1]}.{function.__name__}"


@pytest.mark.parametrize("function", VALID, ids=name_of)
def test_the_valid_arguments_are_valid(function):
    function(**VALID[function]())


@pytest.mark.parametrize(
    "function, argument, value, message", BAD, ids=[f"{name_of(f)}-{a}-{i}" for i, (f, a, _, _) in enumerate(BAD)]
)
def test_bad_input(function, argument, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**{**VALID[function](), argument: value})


@pytest.mark.gpu
@pytest.mark.parametrize("function", VALID, ids=name_of)
def test_mixed_devices(function):
    arguments = VALID[function]()
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    if len(tensors) < 2:
        pytest.skip("one tensor only")
    arguments[tensors[0]] = arguments[tensors[0]].cuda()
    with pytest.raises(ValueError, match="device"):
        function(**arguments)
