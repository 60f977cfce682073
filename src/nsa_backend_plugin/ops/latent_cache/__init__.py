"""The latent KV cache of MLA: packing to fp8, unpacking, and the fused RoPE + quantize + write of new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nsa_backend_plugin.layouts import LATENT_DIM, LATENT_TILE, packed_latent_bytes, packed_rope_offset
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch.rotary import check_rope
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Call, Fact, Step
from nsa_backend_plugin.ops.dispatch import operation


@dataclass(slots=True, eq=False, kw_only=True)
class Quantize(Call[torch.Tensor]):
    """The arguments of `quantize`, kv flattened to rows [N, d]; leading: the sizes in front of d as they were."""

    rows: torch.Tensor
    leading: torch.Size
    value_dim: int
    tile_size: int

    def facts(self) -> Mapping[str, Fact]:
        return _packed_facts(self.rows, self.value_dim, self.tile_size, self.rows.shape[1], self.rows.dtype)

    def output(self) -> torch.Tensor:
        """New packed rows [N, bytes] uint8."""
        rows, dim = self.rows.shape
        width = packed_latent_bytes(dim, self.value_dim, self.tile_size, self.rows.element_size())
        return self.rows.new_empty(rows, width, dtype=torch.uint8)

    def shaped(self, packed: torch.Tensor) -> torch.Tensor:
        """[N, bytes] as the caller gets it."""
        return packed.view(*self.leading, packed.shape[1])


@dataclass(slots=True, eq=False, kw_only=True)
class Dequantize(Call[torch.Tensor]):
    """The arguments of `dequantize`, packed flattened to rows [N, bytes]; leading: the sizes in front as they were."""

    rows: torch.Tensor
    leading: torch.Size
    value_dim: int
    tile_size: int
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        rope_bytes = self.rows.shape[1] - packed_rope_offset(self.value_dim, self.tile_size)
        return self.value_dim + rope_bytes // self.dtype.itemsize

    def facts(self) -> Mapping[str, Fact]:
        return _packed_facts(self.rows, self.value_dim, self.tile_size, self.dim, self.dtype)

    def output(self) -> torch.Tensor:
        """New rows [N, d]."""
        return self.rows.new_empty(self.rows.shape[0], self.dim, dtype=self.dtype)

    def shaped(self, kv: torch.Tensor) -> torch.Tensor:
        """[N, d] as the caller gets it."""
        return kv.view(*self.leading, kv.shape[1])


@dataclass(slots=True, eq=False, kw_only=True)
class Store(Call[None]):
    """The arguments of `store`; kind is that of the cache (`checks.kv_kind`)."""

    k_nope: torch.Tensor
    k_rope: torch.Tensor
    cache: torch.Tensor
    slots: torch.Tensor
    kind: str
    positions: torch.Tensor | None
    cos_sin_cache: torch.Tensor | None
    is_neox: bool
    kv_scale: float | None
    k_rope_out: torch.Tensor | None
    q_rope: torch.Tensor | None
    q_all: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_eps: float

    def facts(self) -> Mapping[str, Fact]:
        return {
            "tokens": self.k_nope.shape[0],
            "heads": 0 if self.q_rope is None else self.q_rope.shape[1],
            "kv": self.kind,
            "dtype": str(self.k_nope.dtype),
            "cache": str(self.cache.dtype),
            "rotated": self.positions is not None,
            "normalized": self.norm_weight is not None,
        }


def _packed_facts(rows: torch.Tensor, value_dim: int, tile_size: int, dim: int, dtype: torch.dtype) -> dict[str, Fact]:
    sizes = {"tokens": rows.shape[0], "value_dim": value_dim, "rope_dim": dim - value_dim, "tile_size": tile_size}
    return {**sizes, "dtype": str(dtype)}


def _check_packing(name: str, value: torch.Tensor, dtypes: tuple[torch.dtype, ...], value_dim: int, tile: int) -> None:
    checks.positive("value_dim", value_dim)
    checks.positive("tile_size", tile)
    checks.require(value_dim % tile == 0, "value_dim", value_dim, f"a multiple of tile_size {tile}")
    rank = value.dim() if isinstance(value, torch.Tensor) else 1
    checks.tensor(name, value, (None,) * max(rank, 1), dtypes)
    if rank == 4:
        checks.require(value.shape[2] == 1, f"{name}.shape[2]", value.shape[2], "1 head in [blocks, block_size, 1, d]")


@operation
def quantize(
    kv: torch.Tensor,
    *,
    value_dim: int = LATENT_DIM,
    tile_size: int = LATENT_TILE,
    step: Step | None = None,
    impl: str | None = None,
) -> Quantize:
    """Pack latent rows: value part to e4m3fn with one fp32 scale per tile, RoPE part as it is.

    kv: [..., d] bf16, fp16 or fp32, d >= value_dim (no RoPE part when equal), tile_size divides value_dim; of four
    dimensions [blocks, block_size, h_k, d], as FlashMLA has them, h_k is 1. Rows may be strided freely.
    Returns uint8 [..., value_dim + 4*value_dim/tile_size + itemsize*(d-value_dim)].
    Scale is max(amax, 1e-4) / 448, so an all-zero tile has the scale 1e-4/448 and not 0: dividing by 0 would store NaN
    bytes, and every kernel that quantizes here or in DeepGEMM keeps the same bound.
    Raises ValueError for bad shapes, dtypes or strides. Source: FlashMLA fp8 cache layout; SGLang quantize_k_cache.
    """
    _check_packing("kv", kv, checks.FLOAT_DTYPES, value_dim, tile_size)
    dim = kv.shape[-1]
    checks.require(dim >= value_dim, "kv.shape[-1]", dim, f"at least value_dim {value_dim}")
    checks.inner_contiguous("kv", kv)
    return Quantize(
        arch=device_arch(kv.device),
        step=step or Step(),
        impl=impl,
        rows=kv.reshape(-1, dim),
        leading=kv.shape[:-1],
        value_dim=value_dim,
        tile_size=tile_size,
    )


@operation
def dequantize(
    packed: torch.Tensor,
    *,
    value_dim: int = LATENT_DIM,
    tile_size: int = LATENT_TILE,
    dtype: torch.dtype = torch.bfloat16,
    step: Step | None = None,
    impl: str | None = None,
) -> Dequantize:
    """Unpack rows written by `quantize`: uint8 [..., bytes], contiguous -> dtype [..., d].

    dtype: bf16, fp16 or fp32, the RoPE part's type, which the bytes do not tell. An all-zero tile gives zeros.
    Raises ValueError for bad shapes, dtypes or strides.
    """
    _check_packing("packed", packed, (torch.uint8,), value_dim, tile_size)
    checks.choice("dtype", dtype, checks.FLOAT_DTYPES)
    checks.contiguous("packed", packed)
    width, rope = packed.shape[-1], packed_rope_offset(value_dim, tile_size)
    if width < rope or (width - rope) % dtype.itemsize:
        raise ValueError(
            f"packed.shape[-1]={width}: expected a packed row, {rope} bytes and a multiple of {dtype.itemsize}"
        )
    return Dequantize(
        arch=device_arch(packed.device),
        step=step or Step(),
        impl=impl,
        rows=packed.view(-1, width),
        leading=packed.shape[:-1],
        value_dim=value_dim,
        tile_size=tile_size,
        dtype=dtype,
    )


@operation
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
    step: Step | None = None,
    impl: str | None = None,
) -> Store:
    """Write new tokens into the latent cache: norm and RoPE of the key (RoPE of the query), quantization and the write.

    k_nope: [T, 512] and k_rope: [T, 64] bf16/fp16/fp32, unrotated, rows strided freely.
    norm_weight: [512] float, contiguous: RMS norm of k_nope first, rounded to its dtype; None writes k_nope as it is.
    cache: [slots, 1, 576] unquantized, or plain fp8 with kv_scale (byte = value / kv_scale), or [slots, 1, 656]
    packed; contiguous, written in place. slots: [T] int32/int64, negative = skip the write.
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
    dtype, device = k_nope.dtype, k_nope.device
    checks.tensor("k_rope", k_rope, (tokens, None), dtype, device)
    rope_dim = k_rope.shape[1]
    checks.inner_contiguous("k_nope", k_nope)
    checks.inner_contiguous("k_rope", k_rope)
    checks.tensor("cache", cache, (None, 1, None), checks.KV_DTYPES, device)
    kind = checks.kv_kind(cache, value_dim + rope_dim, value_dim, "cache")
    checks.contiguous("cache", cache)
    if (kv_scale is not None) != (kind == "fp8"):
        raise ValueError(f"kv_scale={kv_scale!r}: expected a float with a plain fp8 cache, else None")
    if kv_scale is not None:
        checks.positive_number("kv_scale", kv_scale)
    checks.tensor("slots", slots, (tokens,), checks.INT_DTYPES, device)
    checks.index_range("slots", slots, -(2**62), cache.shape[0])
    checks.choice("is_neox", is_neox, (False, True))
    _given_with("positions", positions, "cos_sin_cache", cos_sin_cache)
    if positions is not None and cos_sin_cache is not None:
        check_rope(positions, cos_sin_cache, tokens, device)
        width = cos_sin_cache.shape[1]
        checks.require(width == rope_dim, "cos_sin_cache.shape[1]", width, "k_rope's width")
    if k_rope_out is not None:
        checks.tensor("k_rope_out", k_rope_out, (tokens, rope_dim), dtype, device)
        checks.inner_contiguous("k_rope_out", k_rope_out)
    _given_with("q_rope", q_rope, "q_all", q_all)
    if q_rope is not None and q_all is not None:
        checks.require(positions is not None, "positions", positions, "given with q_rope")
        checks.tensor("q_rope", q_rope, (tokens, None, rope_dim), dtype, device)
        checks.tensor("q_all", q_all, (tokens, q_rope.shape[1], value_dim + rope_dim), dtype, device)
        checks.inner_contiguous("q_rope", q_rope)
        checks.inner_contiguous("q_all", q_all)
    if norm_weight is not None:
        checks.tensor("norm_weight", norm_weight, (value_dim,), checks.FLOAT_DTYPES, device)
        checks.contiguous("norm_weight", norm_weight)
    checks.positive_number("norm_eps", norm_eps)
    return Store(
        arch=device_arch(device),
        step=step or Step(),
        impl=impl,
        k_nope=k_nope,
        k_rope=k_rope,
        cache=cache,
        slots=slots,
        kind=kind,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        is_neox=is_neox,
        kv_scale=None if kv_scale is None else float(kv_scale),
        k_rope_out=k_rope_out,
        q_rope=q_rope,
        q_all=q_all,
        norm_weight=norm_weight,
        norm_eps=float(norm_eps),
    )


def _given_with(name: str, value: object, other_name: str, other: object) -> None:
    if (value is None) != (other is None):
        raise ValueError(f"{name}={value if value is None else 'tensor'}: expected given with {other_name}")
