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


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def apart(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros whose last dimension has stride 2."""
    return torch.zeros(*shape, 2, dtype=dtype)[..., 0]


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(FP8)


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
    (index_key_cache.store, "key", meta(torch.zeros(2, 128)), "key is on device meta: expected cpu"),
    (index_key_cache.store, "key", torch.zeros(128), "key has shape [128]: expected [any, 128]"),
    (index_key_cache.store, "cache", torch.zeros(3, 8448), "cache has dtype torch.float32: expected torch.uint8"),
    (index_key_cache.store, "cache", meta(bytes_(3, 8448)), "key is on device cpu: expected meta"),
    (index_key_cache.store, "cache", bytes_(3, 9000)[:, :8448], "cache has strides (9000, 1): expected a contiguous"),
    (index_key_cache.store, "cache", bytes_(3 * 8448 + 1)[1:].view(3, 8448), "expected 4-byte alignment"),
    (index_key_cache.store, "slots", torch.zeros(2), "slots has dtype torch.float32: expected torch.int32 or"),
    (index_key_cache.store, "slots", meta(ints(2)), "slots is on device meta: expected cpu"),
    (index_key_cache.gather, "cache", bytes_(3, 1, 8448), "cache has shape [3, 1, 8448]: expected [any, 8448]"),
    (index_key_cache.gather, "cache", meta(bytes_(3, 8448)), "block_table is on device cpu: expected meta"),
    (index_key_cache.gather, "cache", bytes_(3, 9000)[:, :8448], "cache has strides (9000, 1): expected a contiguous"),
    (index_key_cache.gather, "block_table", ints(2), "block_table has shape [2]: expected [any, any]"),
    (index_key_cache.gather, "block_table", meta(ints(2, 1)), "block_table is on device meta: expected cpu"),
    (index_key_cache.gather, "block_table", ints(2, 1, value=3), "block_table contains 3: expected 0 <= value < 3"),
    (index_key_cache.gather, "block_table", ints(2, 1, value=-1), "block_table contains -1: expected 0 <= value < 3"),
    (index_key_cache.gather, "seq_lens", ints(3), "seq_lens has shape [3]: expected [2]"),
    (index_key_cache.gather, "seq_lens", torch.zeros(2), "seq_lens has dtype torch.float32: expected torch.int32 or"),
    (index_key_cache.gather, "seq_lens", meta(ints(2)), "seq_lens is on device meta: expected cpu"),
    (index_key_cache.gather, "layout", "shuffled", "layout='shuffled': expected one of row_major, preshuffled"),
    (index_key_cache.gather, "page_size", 24, "page_size=24: expected a multiple of 16"),
    (index_key_cache.gather, "total_tokens", 9, "total_tokens=9: expected the sum of seq_lens"),
    (index_key_cache.gather, "total_tokens", 10.0, "total_tokens=10.0: expected at least 0"),
    (index_key_cache.gather, "fp8_dtype", torch.uint8, "fp8_dtype=torch.uint8: expected one of"),
    (index_key_cache.gather, "impl", "magic", "impl='magic': expected one of"),
    (mqa_logits.paged, "q", fp8(2, 4, 128), "q has shape [2, 4, 128]: expected [any, any, any, 128]"),
    (mqa_logits.paged, "q", meta(fp8(2, 1, 4, 128)), "q is on device meta: expected cpu"),
    (
        mqa_logits.paged,
        "q",
        apart(2, 1, 4, 128, dtype=FP8),
        "q has strides (1024, 1024, 256, 2): expected a",
    ),
    (mqa_logits.paged, "q", fp8(2, 1, 0, 128), "q.shape[2]=0: expected at least 1 head"),
    (mqa_logits.paged, "cache", bytes_(3, 8447), "cache has shape [3, 8447]: expected [any, 8448]"),
    (mqa_logits.paged, "cache", meta(bytes_(3, 8448)), "q is on device cpu: expected meta"),
    (mqa_logits.paged, "cache", bytes_(3, 9000)[:, :8448], "cache has strides (9000, 1): expected a contiguous"),
    (
        mqa_logits.paged,
        "weights",
        torch.zeros(2, 4).double(),
        "weights has dtype torch.float64: expected",
    ),
    (mqa_logits.paged, "weights", meta(torch.zeros(2, 4)), "weights is on device meta: expected cpu"),
    (mqa_logits.paged, "context_lens", ints(2).long(), "context_lens has dtype torch.int64: expected torch.int32"),
    (mqa_logits.paged, "context_lens", meta(ints(2)), "context_lens is on device meta: expected cpu"),
    (mqa_logits.paged, "context_lens", ints(2, value=-1), "context_lens contains -1: expected 0 <= value < 65"),
    (mqa_logits.paged, "block_table", ints(3, 1), "block_table has shape [3, 1]: expected [2, any]"),
    (mqa_logits.paged, "block_table", ints(2, 1).long(), "block_table has dtype torch.int64: expected torch.int32"),
    (mqa_logits.paged, "block_table", meta(ints(2, 1)), "block_table is on device meta: expected cpu"),
    (
        mqa_logits.paged,
        "block_table",
        apart(2, 3, dtype=torch.int32),
        "block_table has strides (6, 2): expected",
    ),
    (mqa_logits.paged, "block_table", ints(2, 1, value=3), "block_table contains 3: expected 0 <= value < 3"),
    (mqa_logits.paged, "block_table", ints(2, 1, value=-1), "block_table contains -1: expected 0 <= value < 3"),
    (mqa_logits.paged, "page_size", 24, "page_size=24: expected a multiple of 16"),
    (mqa_logits.paged, "clean", "yes", "clean='yes': expected one of False, True"),
    (mqa_logits.paged, "out", torch.zeros(3, 64), "out has shape [3, 64]: expected [2, any]"),
    (mqa_logits.paged, "out", torch.zeros(2, 64).half(), "out has dtype torch.float16: expected torch.float32"),
    (mqa_logits.paged, "out", meta(torch.zeros(2, 64)), "out is on device meta: expected cpu"),
    (mqa_logits.paged, "out", apart(2, 64), "out has strides (128, 2): expected stride 1"),
    (mqa_logits.paged, "out", torch.zeros(1, 64).expand(2, 64), "out.stride(0)=0: expected at least 64"),
    (mqa_logits.paged, "impl", "magic", "impl='magic': expected one of"),
    (mqa_logits.ragged, "q", torch.zeros(2, 4, 128), "q has dtype torch.float32: expected torch.float8_e4m3fn"),
    (mqa_logits.ragged, "q", fp8(2, 4, 64), "q has shape [2, 4, 64]: expected [any, any, 128]"),
    (mqa_logits.ragged, "q", meta(fp8(2, 4, 128)), "k is on device cpu: expected meta"),
    (mqa_logits.ragged, "q", apart(2, 4, 128, dtype=FP8), "q has strides (1024, 256, 2): expected a contiguous"),
    (mqa_logits.ragged, "q", fp8(2, 0, 128), "q.shape[1]=0: expected at least 1 head"),
    (mqa_logits.ragged, "k", fp8(6, 1, 128), "k has shape [6, 1, 128]: expected [any, 128]"),
    (
        mqa_logits.ragged,
        "k",
        torch.zeros(6, 128).to(torch.float8_e4m3fnuz),
        "k has dtype torch.float8_e4m3fnuz",
    ),
    (mqa_logits.ragged, "k", meta(fp8(6, 128)), "k is on device meta: expected cpu"),
    (mqa_logits.ragged, "k", apart(6, 128, dtype=FP8), "k has strides (256, 2): expected a contiguous"),
    (mqa_logits.ragged, "k_scale", torch.zeros(6).half(), "k_scale has dtype torch.float16: expected torch.float32"),
    (mqa_logits.ragged, "k_scale", meta(torch.zeros(6)), "k_scale is on device meta: expected cpu"),
    (mqa_logits.ragged, "weights", torch.zeros(2, 5), "weights has shape [2, 5]: expected [2, 4]"),
    (mqa_logits.ragged, "weights", torch.zeros(2, 4).half(), "weights has dtype torch.float16: expected torch.float32"),
    (mqa_logits.ragged, "weights", meta(torch.zeros(2, 4)), "weights is on device meta: expected cpu"),
    (mqa_logits.ragged, "row_start", ints(2).long(), "row_start has dtype torch.int64: expected torch.int32"),
    (mqa_logits.ragged, "row_start", ints(3), "row_start has shape [3]: expected [2]"),
    (mqa_logits.ragged, "row_start", meta(ints(2)), "row_start is on device meta: expected cpu"),
    (mqa_logits.ragged, "row_end", ints(2).long(), "row_end has dtype torch.int64: expected torch.int32"),
    (mqa_logits.ragged, "row_end", ints(2, 1), "row_end has shape [2, 1]: expected [2]"),
    (mqa_logits.ragged, "row_end", meta(ints(2)), "row_end is on device meta: expected cpu"),
    (mqa_logits.ragged, "clean", None, "clean=None: expected one of False, True"),
    (mqa_logits.ragged, "out", torch.zeros(2, 5), "out.shape[1]=5: expected at least 6"),
    (mqa_logits.ragged, "out", meta(torch.zeros(2, 6)), "out is on device meta: expected cpu"),
    (mqa_logits.ragged, "out", torch.zeros(1, 6).expand(2, 6), "out.stride(0)=0: expected at least 6"),
    (mqa_logits.ragged, "impl", "magic", "impl='magic': expected one of"),
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
    (sparse_mla.attend, "q", [1.0], "q=[1.0]: expected a torch.Tensor"),
    (sparse_mla.attend, "q", ints(2, 4, 576), "q has dtype torch.int32: expected torch.bfloat16 or"),
    (sparse_mla.attend, "q", torch.zeros(2, 576), "q has shape [2, 576]: expected [any, any, any]"),
    (sparse_mla.attend, "q", torch.zeros(2, 4, 1152)[..., ::2], "q has strides (4608, 1152, 2): expected a contig"),
    (sparse_mla.attend, "q", torch.zeros(2, 129, 576), "q.shape[1]=129: expected 1 to 128 heads"),
    (sparse_mla.attend, "kv", None, "kv=None: expected [slots, 1, bytes]"),
    (sparse_mla.attend, "kv", torch.zeros(6, 1, 512), "kv has shape [6, 1, 512] and dtype torch.float32: expected"),
    (sparse_mla.attend, "kv", torch.zeros(6, 2, 1).to(FP8), "expected [slots, 1, bytes]"),
    (sparse_mla.attend, "kv", torch.zeros(6, 1, 1152)[..., ::2], "kv has strides (1152, 1152, 2): expected stride 1"),
    (sparse_mla.attend, "kv", torch.zeros(6, 1, 576, device="meta"), "kv is on device meta: expected cpu"),
    (sparse_mla.attend, "kv", fp8(6, 1, 576), "kv_scale=None: expected a float with plain fp8 kv, else None"),
    (sparse_mla.attend, "kv_scale", 0.5, "kv_scale=0.5: expected a float with plain fp8 kv, else None"),
    (sparse_mla.attend, "indices", ints(2, 3).long(), "indices has dtype torch.int64: expected torch.int32"),
    (sparse_mla.attend, "indices", ints(3, 3), "indices has shape [3, 3]: expected [2, any]"),
    (sparse_mla.attend, "indices", ints(2, 3).to("meta"), "indices is on device meta: expected cpu"),
    (sparse_mla.attend, "indices", ints(3, 2).T, "indices has strides (1, 2): expected a contiguous tensor"),
    (sparse_mla.attend, "indices", ints(2, 3, value=6), "indices contains 6: expected -1 <= value < 6"),
    (sparse_mla.attend, "indices", ints(2, 3, value=-2), "indices contains -2: expected -1 <= value < 6"),
    (sparse_mla.attend, "softmax_scale", None, "softmax_scale=None: expected a finite number"),
    (sparse_mla.attend, "softmax_scale", float("nan"), "softmax_scale=nan: expected a finite number"),
    (sparse_mla.attend, "value_dim", 600, "value_dim=600: expected at most q's last dimension 576"),
    (sparse_mla.attend, "value_dim", 0, "value_dim=0: expected a positive int"),
    (sparse_mla.attend, "lengths", ints(3), "lengths has shape [3]: expected [2]"),
    (sparse_mla.attend, "lengths", ints(2).long(), "lengths has dtype torch.int64: expected torch.int32"),
    (sparse_mla.attend, "lengths", ints(2).to("meta"), "lengths is on device meta: expected cpu"),
    (sparse_mla.attend, "lengths", ints(2, value=4), "lengths contains 4: expected 0 <= value < 4"),
    (sparse_mla.attend, "lengths", ints(2, value=2), "lengths=[2, 2]: expected the number of slots that lead each row"),
    (sparse_mla.attend, "out", torch.zeros(2, 4, 576), "out has shape [2, 4, 576]: expected [2, 4, 512]"),
    (sparse_mla.attend, "out", torch.zeros(2, 4, 512).half(), "out has dtype torch.float16: expected torch.float32"),
    (sparse_mla.attend, "out", torch.zeros(2, 4, 512, device="meta"), "out is on device meta: expected cpu"),
    (sparse_mla.attend, "out", torch.zeros(2, 8, 512)[:, ::2], "out has strides (4096, 1024, 1): expected a contig"),
    (sparse_mla.attend, "workspace", torch.zeros(64), "workspace has dtype torch.float32: expected torch.uint8"),
    (sparse_mla.attend, "workspace", bytes_(4, 4), "workspace has shape [4, 4]: expected [any]"),
    (sparse_mla.attend, "workspace", bytes_(64)[::2], "workspace has strides (2,): expected a contiguous tensor"),
    (sparse_mla.attend, "workspace", bytes_(64)[1:], "expected 16-byte alignment"),
    (sparse_mla.attend, "workspace", bytes_(64).to("meta"), "workspace is on device meta: expected cpu"),
    (sparse_mla.attend, "impl", "magic", "impl='magic': expected one of"),
    (dense_mla.decode, "q", torch.zeros(2, 576), "q has shape [2, 576]: expected [any, any, any]"),
    (dense_mla.decode, "q", torch.zeros(2, 4, 1152)[..., ::2], "q has strides (4608, 1152, 2): expected a contiguous"),
    (dense_mla.decode, "page_size", 8, "page_size=8: expected one of 1, 16, 32, 64, 128"),
    (dense_mla.decode, "kv", torch.zeros(32, 1, 576).half(), "kv has dtype torch.float16: expected torch.float32"),
    (dense_mla.decode, "kv", torch.zeros(32, 1, 1152)[..., ::2], "kv has strides (1152, 1152, 2): expected stride 1"),
    (dense_mla.decode, "kv", torch.zeros(32, 1, 576, device="meta"), "kv is on device meta: expected cpu"),
    (dense_mla.decode, "kv", torch.zeros(15, 1, 576), "block_table contains 0: expected 0 <= value < 0"),
    (dense_mla.decode, "seq_lens", ints(2, value=17), "seq_lens contains 17: expected 0 <= value < 17"),
    (dense_mla.decode, "seq_lens", ints(2, value=-1), "seq_lens contains -1: expected 0 <= value < 17"),
    (dense_mla.decode, "seq_lens", ints(3), "seq_lens has shape [3]: expected [2]"),
    (dense_mla.decode, "seq_lens", ints(2).long(), "seq_lens has dtype torch.int64: expected torch.int32"),
    (dense_mla.decode, "seq_lens", ints(2).to("meta"), "seq_lens is on device meta: expected cpu"),
    (dense_mla.decode, "num_kv_splits", 0, "num_kv_splits=0: expected a positive int"),
    (dense_mla.decode, "softmax_scale", float("inf"), "softmax_scale=inf: expected a finite number"),
    (dense_mla.decode, "value_dim", 600, "value_dim=600: expected at most q's last dimension 576"),
    (dense_mla.decode, "block_table", ints(3, 1), "block_table has shape [3, 1]: expected [2, any]"),
    (dense_mla.decode, "block_table", ints(2, 1).long(), "block_table has dtype torch.int64: expected torch.int32"),
    (dense_mla.decode, "block_table", ints(2, 1).to("meta"), "block_table is on device meta: expected cpu"),
    (dense_mla.decode, "block_table", ints(2, 4)[:, ::2], "block_table has strides (4, 2): expected stride 1"),
    (dense_mla.decode, "block_table", ints(2, 1, value=2), "block_table contains 2: expected 0 <= value < 2"),
    (dense_mla.decode, "block_table", ints(2, 1, value=-1), "block_table contains -1: expected 0 <= value < 2"),
    (dense_mla.decode, "out", torch.zeros(2, 4, 576), "out has shape [2, 4, 576]: expected [2, 4, 512]"),
    (dense_mla.decode, "out", torch.zeros(2, 8, 512)[:, ::2], "out has strides (4096, 1024, 1): expected a contiguous"),
    (dense_mla.decode, "workspace", torch.zeros(64), "workspace has dtype torch.float32: expected torch.uint8"),
    (dense_mla.decode, "workspace", bytes_(64)[1:], "expected 16-byte alignment"),
    (latent_cache.quantize, "kv", torch.zeros(2, 576), "kv has dtype torch.float32: expected torch.bfloat16 or"),
    (latent_cache.quantize, "value_dim", 500, "value_dim=500: expected a multiple of tile_size 128"),
    (latent_cache.quantize, "value_dim", 640, "kv.shape[-1]=576: expected more than value_dim 640"),
    (latent_cache.dequantize, "packed", bytes_(2, 528), "packed.shape[-1]=528: expected a packed row"),
    (latent_cache.dequantize, "dtype", torch.float32, "dtype=torch.float32: expected one of torch.bfloat16"),
    (latent_cache.store, "cache", torch.zeros(6, 1, 512), "cache has shape [6, 1, 512]"),
    (latent_cache.store, "slots", ints(2, value=6), "slots contains 6: expected"),
    (latent_cache.store, "positions", ints(2, value=9), "positions contains 9: expected 0 <= value < 9"),
    (latent_cache.store, "positions", None, "positions=None: expected given with cos_sin_cache"),
    (latent_cache.store, "cos_sin_cache", torch.zeros(9, 32), "cos_sin_cache.shape[1]=32: expected k_rope's width"),
    (latent_cache.store, "kv_scale", 1.0, "kv_scale=1.0: expected a float with a plain fp8 cache, else None"),
    (latent_cache.store, "q_rope", torch.zeros(2, 4, 64), "expected given with q_all"),
    (norm_quant.rms, "x", torch.zeros(2, 200), "x.shape[1]=200: expected a multiple of 128"),
    (norm_quant.rms, "x", ints(2, 256), "x has dtype torch.int32: expected torch.bfloat16 or"),
    (norm_quant.rms, "x", torch.zeros(256, 2).T, "x has strides (1, 2): expected stride 1"),
    (norm_quant.rms, "weight", torch.zeros(128), "weight has shape [128]: expected [256]"),
    (norm_quant.rms, "eps", 0.0, "eps=0.0: expected a positive number"),
    (norm_quant.rms, "scale_format", "e8m0", "scale_format='e8m0': expected one of fp32, ue8m0"),
    (concat.q_all, "q_rope", torch.zeros(2, 5, 64), "q_rope has shape [2, 5, 64]: expected [2, 4, any]"),
    (concat.q_all, "q_rope", torch.zeros(2, 4, 64).half(), "q_rope has dtype torch.float16: expected torch.float32"),
    (concat.mla_k, "k_rope", torch.zeros(2, 4, 64), "k_rope has shape [2, 4, 64]: expected [2, 1, any]"),
    (concat.mla_k, "dtype", torch.int8, "dtype=torch.int8: expected one of"),
    (concat.mla_k, "out", torch.zeros(2, 4, 128), "out has shape [2, 4, 128]: expected [2, 4, 192]"),
    (indexer_prep.query, "head_gate", torch.zeros(2, 3), "head_gate has shape [2, 3]: expected [2, 4]"),
    (indexer_prep.query, "cos_sin_cache", torch.zeros(9, 130), "cos_sin_cache.shape[1]=130: expected at most 128"),
    (indexer_prep.query, "cos_sin_cache", torch.zeros(9, 63), "cos_sin_cache.shape[1]=63: expected an even rope dim"),
    (indexer_prep.query, "positions", ints(2, value=-1), "positions contains -1: expected 0 <= value < 9"),
    (indexer_prep.query, "q", fp8(2, 4, 128), "q has dtype torch.float8_e4m3fn: expected torch.bfloat16 or"),
    (indexer_prep.query, "q", torch.zeros(2, 128), "q has shape [2, 128]: expected [any, any, 128]"),
    (indexer_prep.query, "q", apart(2, 4, 128), "q has strides (1024, 256, 2): expected stride 1"),
    (indexer_prep.query, "q", meta(torch.zeros(2, 4, 128)), "head_gate is on device cpu: expected meta"),
    (indexer_prep.query, "head_gate", ints(2, 4), "head_gate has dtype torch.int32: expected torch.bfloat16 or"),
    (indexer_prep.query, "head_gate", apart(2, 4), "head_gate has strides (8, 2): expected stride 1"),
    (indexer_prep.query, "head_gate", meta(torch.zeros(2, 4)), "head_gate is on device meta: expected cpu"),
    (indexer_prep.query, "positions", ints(3), "positions has shape [3]: expected [2]"),
    (indexer_prep.query, "positions", torch.zeros(2), "positions has dtype torch.float32: expected torch.int32 or"),
    (indexer_prep.query, "positions", meta(ints(2)), "positions is on device meta: expected cpu"),
    (indexer_prep.query, "cos_sin_cache", torch.zeros(9, 64).half(), "cos_sin_cache has dtype torch.float16: expected"),
    (indexer_prep.query, "cos_sin_cache", meta(torch.zeros(9, 64)), "cos_sin_cache is on device meta: expected cpu"),
    (indexer_prep.query, "cos_sin_cache", apart(9, 64), "cos_sin_cache has strides (128, 2): expected a"),
    (indexer_prep.query, "weight_scale", "1", "weight_scale='1': expected a finite number"),
    (indexer_prep.query, "weight_scale", float("nan"), "weight_scale=nan: expected a finite number"),
    (indexer_prep.query, "is_neox", None, "is_neox=None: expected one of False, True"),
    (indexer_prep.query, "hadamard", "no", "hadamard='no': expected one of False, True"),
    (indexer_prep.query, "scale_format", "e8m0", "scale_format='e8m0': expected one of fp32, ue8m0"),
    (indexer_prep.query, "fp8_dtype", torch.uint8, "fp8_dtype=torch.uint8: expected one of"),
    (indexer_prep.query, "impl", "magic", "impl='magic': expected one of"),
    (indexer_prep.key_store, "key", torch.zeros(2, 64), "key has shape [2, 64]: expected [any, 128]"),
    (indexer_prep.key_store, "key", ints(2, 128), "key has dtype torch.int32: expected torch.bfloat16 or"),
    (indexer_prep.key_store, "key", apart(2, 128), "key has strides (256, 2): expected stride 1"),
    (indexer_prep.key_store, "key", meta(torch.zeros(2, 128)), "key is on device meta: expected cpu"),
    (indexer_prep.key_store, "norm_weight", ints(128), "norm_weight has dtype torch.int32: expected torch.bfloat16 or"),
    (indexer_prep.key_store, "norm_weight", apart(128), "norm_weight has strides (2,): expected a contiguous"),
    (indexer_prep.key_store, "norm_weight", meta(torch.zeros(128)), "norm_weight is on device meta: expected cpu"),
    (indexer_prep.key_store, "norm_bias", torch.zeros(64), "norm_bias has shape [64]: expected [128]"),
    (indexer_prep.key_store, "norm_bias", ints(128), "norm_bias has dtype torch.int32: expected torch.bfloat16 or"),
    (indexer_prep.key_store, "norm_bias", apart(128), "norm_bias has strides (2,): expected a contiguous"),
    (indexer_prep.key_store, "norm_bias", meta(torch.zeros(128)), "norm_bias is on device meta: expected cpu"),
    (indexer_prep.key_store, "positions", ints(2, value=9), "positions contains 9: expected 0 <= value < 9"),
    (indexer_prep.key_store, "positions", meta(ints(2)), "positions is on device meta: expected cpu"),
    (indexer_prep.key_store, "cos_sin_cache", torch.zeros(9, 130), "cos_sin_cache.shape[1]=130: expected at most 128"),
    (
        indexer_prep.key_store,
        "cos_sin_cache",
        apart(9, 64),
        "cos_sin_cache has strides (128, 2): expected a",
    ),
    (indexer_prep.key_store, "cache", bytes_(3, 8447), "cache has shape [3, 8447]: expected [any, 8448]"),
    (indexer_prep.key_store, "cache", bytes_(3, 9000)[:, :8448], "cache has strides (9000, 1): expected a contiguous"),
    (indexer_prep.key_store, "cache", meta(bytes_(3, 8448)), "key is on device cpu: expected meta"),
    (indexer_prep.key_store, "slots", torch.zeros(2), "slots has dtype torch.float32: expected torch.int32 or"),
    (indexer_prep.key_store, "slots", ints(3), "slots has shape [3]: expected [2]"),
    (indexer_prep.key_store, "slots", meta(ints(2)), "slots is on device meta: expected cpu"),
    (indexer_prep.key_store, "is_neox", "yes", "is_neox='yes': expected one of False, True"),
    (indexer_prep.key_store, "hadamard", None, "hadamard=None: expected one of False, True"),
    (indexer_prep.key_store, "eps", 0.0, "eps=0.0: expected a positive number"),
    (indexer_prep.key_store, "layout", "rows", "layout='rows': expected one of row_major, preshuffled"),
    (indexer_prep.key_store, "scale_format", "e8m0", "scale_format='e8m0': expected one of fp32, ue8m0"),
    (indexer_prep.key_store, "page_size", 24, "page_size=24: expected a multiple of 16"),
    (indexer_prep.key_store, "fp8_dtype", torch.uint8, "fp8_dtype=torch.uint8: expected one of"),
    (indexer_prep.key_store, "impl", "magic", "impl='magic': expected one of"),
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


def test_broken_promises_of_keys():
    """On a CPU, where values are there to be checked."""
    arguments = VALID[sparse_mla.attend]()
    arguments["indices"][1] = -1
    with pytest.raises(ValueError, match="rows_have_keys=True: expected False: a row of indices is all -1"):
        sparse_mla.attend(**arguments, rows_have_keys=True)
    with pytest.raises(ValueError, match="seq_lens contains 0: expected 1 <= value < 17"):
        dense_mla.decode(**{**VALID[dense_mla.decode](), "seq_lens": ints(2)}, rows_have_keys=True)
