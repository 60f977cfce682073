"""Preparation of the indexer's query and key: norm, RoPE, Hadamard rotation, fp8 quantization, fused.

Hadamard is orthonormal, so logits do not change, but q and the cached k must agree on it.
RoPE acts on the first `cos_sin_cache.shape[1]` of the 128 dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_PAGE_SIZE, SCALE_FORMATS
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch import index_pages
from nsa_backend_plugin.ops._torch import norm as norms
from nsa_backend_plugin.ops._torch.rotary import check_rope
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Call, Fact, Step
from nsa_backend_plugin.ops.dispatch import operation


@dataclass(slots=True, eq=False, kw_only=True)
class Query(Call[tuple[torch.Tensor, torch.Tensor]]):
    """The arguments of `query`."""

    q: torch.Tensor
    head_gate: torch.Tensor
    positions: torch.Tensor
    cos_sin_cache: torch.Tensor
    weight_scale: float
    is_neox: bool
    hadamard: bool
    scale_format: str
    fp8_dtype: torch.dtype

    def facts(self) -> Mapping[str, Fact]:
        return {
            "tokens": self.q.shape[0],
            "heads": self.q.shape[1],
            "dtype": str(self.q.dtype),
            "rope_dim": self.cos_sin_cache.shape[1],
            "is_neox": self.is_neox,
            "scale_format": self.scale_format,
        }

    def output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """New (q_fp8 [T, H, 128], weights [T, H])."""
        q_fp8 = torch.empty(self.q.shape, dtype=self.fp8_dtype, device=self.q.device)
        return q_fp8, torch.empty(self.q.shape[:2], dtype=torch.float32, device=self.q.device)


@dataclass(slots=True, eq=False, kw_only=True)
class KeyStore(Call[None]):
    """The arguments of `key_store`."""

    key: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor | None
    positions: torch.Tensor
    cos_sin_cache: torch.Tensor
    cache: torch.Tensor
    slots: torch.Tensor
    is_neox: bool
    norm: str
    eps: float
    hadamard: bool
    layout: str
    scale_format: str
    page_size: int
    fp8_dtype: torch.dtype

    def facts(self) -> Mapping[str, Fact]:
        return {
            "tokens": self.key.shape[0],
            "dtype": str(self.key.dtype),
            "rope_dim": self.cos_sin_cache.shape[1],
            "is_neox": self.is_neox,
            "norm": self.norm,
            "layout": self.layout,
            "scale_format": self.scale_format,
            "page_size": self.page_size,
        }


@operation
def query(
    q: torch.Tensor,
    head_gate: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    weight_scale: float,
    is_neox: bool,
    hadamard: bool = True,
    scale_format: str = "fp32",
    fp8_dtype: torch.dtype | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> Query:
    """RoPE, Hadamard and quantize the indexer's query, and fold its scale into the head gates.

    q: [T, H, 128] bf16/fp16/fp32, tokens and heads strided freely. head_gate: [T, H], any float dtype, rows strided
    freely. positions: [T] int32/int64, rows of cos_sin_cache.
    cos_sin_cache: [max_position, rope_dim] fp32, cosines then sines. weight_scale: softmax scale * H**-0.5.
    scale_format, fp8_dtype: as `index_key_cache.store`.
    Returns (q_fp8 [T, H, 128], weights [T, H] fp32), both contiguous, weights = head_gate * q_scale * weight_scale.
    Raises ValueError for bad shapes, dtypes, strides, devices or names, and on CPU for positions out of range.
    Source: DeepSeek-V3.2 indexer.
    """
    checks.tensor("q", q, (None, None, INDEX_DIM), checks.FLOAT_DTYPES)
    checks.inner_contiguous("q", q)
    checks.tensor("head_gate", head_gate, q.shape[:2], checks.FLOAT_DTYPES, q.device)
    checks.inner_contiguous("head_gate", head_gate)
    check_rope(positions, cos_sin_cache, q.shape[0], q.device)
    checks.require(cos_sin_cache.shape[1] <= INDEX_DIM, "cos_sin_cache.shape[1]", cos_sin_cache.shape[1], "at most 128")
    checks.finite("weight_scale", weight_scale)
    checks.choice("is_neox", is_neox, (False, True))
    checks.choice("hadamard", hadamard, (False, True))
    checks.choice("scale_format", scale_format, SCALE_FORMATS)
    return Query(
        arch=device_arch(q.device),
        step=step or Step(),
        impl=impl,
        q=q,
        head_gate=head_gate,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        weight_scale=weight_scale,
        is_neox=is_neox,
        hadamard=hadamard,
        scale_format=scale_format,
        fp8_dtype=index_pages.flavour(fp8_dtype, q.device),
    )


@operation
def key_store(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    is_neox: bool,
    norm: str = "layer",
    eps: float = 1e-6,
    hadamard: bool = True,
    layout: str = "row_major",
    scale_format: str = "fp32",
    page_size: int = INDEX_PAGE_SIZE,
    fp8_dtype: torch.dtype | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> KeyStore:
    """Norm, RoPE, Hadamard and quantize the indexer's key and store it into its page.

    key: [T, 128] bf16/fp16/fp32, rows strided freely. norm_weight, norm_bias: [128] (bias None for "rms"), contiguous.
    positions, cos_sin_cache: as `query`.
    cache, slots, layout, scale_format, page_size, fp8_dtype: as `index_key_cache.store`. Returns None.
    Raises ValueError for bad shapes, dtypes, strides, devices or names, and on CPU for positions or slots out of range.
    Source: DeepSeek-V3.2 indexer.
    """
    index_pages.check_write(key, cache, slots, layout, page_size, scale_format)
    norms.check(norm, norm_weight, norm_bias, INDEX_DIM, cache.device)
    checks.contiguous("norm_weight", norm_weight)
    if norm_bias is not None:
        checks.contiguous("norm_bias", norm_bias)
    check_rope(positions, cos_sin_cache, key.shape[0], cache.device)
    checks.require(cos_sin_cache.shape[1] <= INDEX_DIM, "cos_sin_cache.shape[1]", cos_sin_cache.shape[1], "at most 128")
    checks.positive_number("eps", eps)
    checks.choice("is_neox", is_neox, (False, True))
    checks.choice("hadamard", hadamard, (False, True))
    return KeyStore(
        arch=device_arch(cache.device),
        step=step or Step(),
        impl=impl,
        key=key,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        cache=cache,
        slots=slots,
        is_neox=is_neox,
        norm=norm,
        eps=eps,
        hadamard=hadamard,
        layout=layout,
        scale_format=scale_format,
        page_size=page_size,
        fp8_dtype=index_pages.flavour(fp8_dtype, cache.device),
    )
