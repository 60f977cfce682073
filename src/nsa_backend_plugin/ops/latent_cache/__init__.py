"""The latent KV cache of MLA: packing to fp8, unpacking, and the fused RoPE + quantize + write of new tokens."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import LATENT_DIM, LATENT_TILE, packed_latent_bytes
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch.rotary import check_rope
from nsa_backend_plugin.ops.registry import Operation

_quantize = Operation("latent_cache", "quantize")
_dequantize = Operation("latent_cache", "dequantize")
_store = Operation("latent_cache", "store")


def _check_tiles(value_dim: int, tile_size: int) -> None:
    checks.positive("value_dim", value_dim)
    checks.positive("tile_size", tile_size)
    checks.require(value_dim % tile_size == 0, "value_dim", value_dim, f"a multiple of tile_size {tile_size}")


def quantize(
    kv: torch.Tensor, *, value_dim: int = LATENT_DIM, tile_size: int = LATENT_TILE, impl: str | None = None
) -> torch.Tensor:
    """Pack latent rows: value part to e4m3fn with one fp32 scale per tile, RoPE part as it is.

    kv: [..., d] bf16 or fp16, d > value_dim. Returns uint8 [..., value_dim + 4*value_dim/tile_size + 2*(d-value_dim)].
    Scale is max(amax, 1e-4) / 448. Raises ValueError for bad shapes or dtypes.
    Source: FlashMLA fp8 cache layout; SGLang quantize_k_cache.
    """
    _check_tiles(value_dim, tile_size)
    checks.tensor("kv", kv, (None,) * max(kv.dim(), 1), (torch.bfloat16, torch.float16))
    checks.require(kv.shape[-1] > value_dim, "kv.shape[-1]", kv.shape[-1], f"more than value_dim {value_dim}")
    checks.inner_contiguous("kv", kv)
    width = packed_latent_bytes(kv.shape[-1], value_dim, tile_size, kv.element_size())
    out = torch.empty(*kv.shape[:-1], width, dtype=torch.uint8, device=kv.device)
    rows = kv.reshape(-1, kv.shape[-1])
    summary = {"tokens": rows.shape[0]}
    _quantize(impl, kv.device, summary, rows, value_dim=value_dim, tile_size=tile_size, out=out.view(-1, width))
    return out


def dequantize(
    packed: torch.Tensor,
    *,
    value_dim: int = LATENT_DIM,
    tile_size: int = LATENT_TILE,
    dtype: torch.dtype = torch.bfloat16,
    impl: str | None = None,
) -> torch.Tensor:
    """Unpack rows written by `quantize`: uint8 [..., bytes] -> dtype [..., d].

    dtype: bf16 or fp16, the RoPE part's type. Raises ValueError for bad shapes or dtypes.
    """
    _check_tiles(value_dim, tile_size)
    checks.choice("dtype", dtype, (torch.bfloat16, torch.float16))
    checks.tensor("packed", packed, (None,) * max(packed.dim(), 1), torch.uint8)
    checks.contiguous("packed", packed)
    rope_bytes = packed.shape[-1] - packed_latent_bytes(value_dim, value_dim, tile_size)
    checks.require(rope_bytes > 0 and rope_bytes % 2 == 0, "packed.shape[-1]", packed.shape[-1], "a packed row")
    out = torch.empty(*packed.shape[:-1], value_dim + rope_bytes // 2, dtype=dtype, device=packed.device)
    rows = packed.view(-1, packed.shape[-1])
    summary = {"tokens": rows.shape[0]}
    _dequantize(
        impl,
        packed.device,
        summary,
        rows,
        value_dim=value_dim,
        tile_size=tile_size,
        out=out.view(-1, out.shape[-1]),
    )
    return out


def store(
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = False,
    kv_scale: float | None = None,
    k_rope_out: torch.Tensor | None = None,
    q_rope: torch.Tensor | None = None,
    q_all: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    impl: str | None = None,
) -> None:
    """Write new tokens into the latent cache: norm and RoPE of the key (RoPE of the query), quantization and the write.

    k_nope: [T, 512] and k_rope: [T, 64] bf16/fp16/fp32, unrotated, rows strided freely.
    norm_weight: [512], float: RMS norm of k_nope first, rounded to its dtype; None writes k_nope as it is.
    cache: [slots, 1, 576] unquantized, or plain fp8 with kv_scale (byte = value / kv_scale), or [slots, 1, 656]
    packed; written in place. slots: [T] int32/int64, negative = skip the write.
    positions: [T], cos_sin_cache: [max_position, 64] fp32 (cosines, then sines): rotate k_rope (and q_rope) first;
    both None writes k_rope as it is. is_neox: half-split pairs, else interleaved.
    k_rope_out: [T, 64] receives the rotated key. q_rope: [T, H, 64] is rotated into the end of q_all: [T, H, 576], any
    strides with a contiguous last dimension, whose beginning holds the query's other part already and stays as it is
    (AITER's kernel reads and rewrites whole rows). q_rope may be the end of q_all itself.
    Raises ValueError for bad shapes, dtypes, devices, and on CPU for slots or positions out of range.
    Source: DeepSeek MLA; AITER fused_qk_rope_cat_and_cache_mla for the fusion.
    """
    checks.tensor("k_nope", k_nope, (None, None), checks.FLOAT_DTYPES)
    tokens, value_dim = k_nope.shape
    checks.tensor("k_rope", k_rope, (tokens, None), k_nope.dtype, k_nope.device)
    checks.inner_contiguous("k_nope", k_nope)
    checks.inner_contiguous("k_rope", k_rope)
    checks.require(isinstance(cache, torch.Tensor) and cache.dim() == 3, "cache", cache, "[slots, 1, bytes]")
    kind = checks.kv_kind(cache, value_dim + k_rope.shape[1], value_dim, "cache")
    checks.contiguous("cache", cache)
    checks.require(
        (kv_scale is not None) == (kind == "fp8"),
        "kv_scale",
        kv_scale,
        "a float with a plain fp8 cache, else None",
    )
    checks.tensor("slots", slots, (tokens,), checks.INT_DTYPES, k_nope.device)
    checks.index_range("slots", slots, -(2**62), cache.shape[0])
    checks.require((positions is None) == (cos_sin_cache is None), "positions", positions, "given with cos_sin_cache")
    if positions is not None and cos_sin_cache is not None:
        check_rope(positions, cos_sin_cache, tokens, k_nope.device)
        checks.require(
            cos_sin_cache.shape[1] == k_rope.shape[1],
            "cos_sin_cache.shape[1]",
            cos_sin_cache.shape[1],
            "k_rope's width",
        )
    if k_rope_out is not None:
        checks.tensor("k_rope_out", k_rope_out, k_rope.shape, k_rope.dtype, k_rope.device)
        checks.inner_contiguous("k_rope_out", k_rope_out)
    checks.require((q_rope is None) == (q_all is None), "q_rope", q_rope, "given with q_all")
    heads = 0
    if q_rope is not None and q_all is not None:
        checks.require(positions is not None, "positions", positions, "given with q_rope")
        checks.tensor("q_rope", q_rope, (tokens, None, k_rope.shape[1]), k_rope.dtype, k_rope.device)
        checks.tensor("q_all", q_all, (*q_rope.shape[:2], value_dim + k_rope.shape[1]), k_rope.dtype, k_rope.device)
        checks.inner_contiguous("q_rope", q_rope)
        checks.inner_contiguous("q_all", q_all)
        heads = q_rope.shape[1]
    if norm_weight is not None:
        checks.tensor("norm_weight", norm_weight, (value_dim,), checks.FLOAT_DTYPES, k_nope.device)
        checks.contiguous("norm_weight", norm_weight)
    checks.require(norm_eps > 0, "norm_eps", norm_eps, "a positive number")
    _store(
        impl,
        k_nope.device,
        {"tokens": tokens, "heads": heads, "kv": kind},
        k_nope,
        k_rope,
        cache,
        slots,
        kind=kind,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        is_neox=is_neox,
        kv_scale=kv_scale,
        k_rope_out=k_rope_out,
        q_rope=q_rope,
        q_all=q_all,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
    )
