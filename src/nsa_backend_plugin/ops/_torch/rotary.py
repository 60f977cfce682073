"""Rotary embedding and Hadamard rotation in torch, shared by the references."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops import checks


def check_rope(positions: torch.Tensor, cos_sin_cache: torch.Tensor, tokens: int, device: torch.device) -> None:
    """positions: [T] int32/int64; cos_sin_cache: [max_position, rope_dim] fp32, cosines then sines (SGLang's)."""
    checks.tensor("positions", positions, (tokens,), checks.INT_DTYPES, device)
    checks.tensor("cos_sin_cache", cos_sin_cache, (None, None), torch.float32, device)
    checks.contiguous("cos_sin_cache", cos_sin_cache)
    rope_dim = cos_sin_cache.shape[1]
    checks.require(rope_dim % 2 == 0 and rope_dim > 0, "cos_sin_cache.shape[1]", rope_dim, "an even rope dim")
    checks.index_range("positions", positions, 0, cos_sin_cache.shape[0])


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate the whole last dimension of x [T, ..., R] by cos_sin [T, R] (R/2 cosines, then R/2 sines), in float32.

    neox pairs dimension i with i + R/2; interleaved (GPT-J) pairs 2i with 2i + 1.
    """
    half = cos_sin.shape[-1] // 2
    shape = (cos_sin.shape[0], *(1,) * (x.dim() - 2), half)
    cos, sin = cos_sin[:, :half].reshape(shape), cos_sin[:, half:].reshape(shape)
    x = x.float()
    if is_neox:
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


def apply_leading_rope(x: torch.Tensor, cos_sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate the first R dimensions of x [T, ..., D], keep the rest, in float32."""
    rope_dim = cos_sin.shape[-1]
    return torch.cat([apply_rope(x[..., :rope_dim], cos_sin, is_neox), x[..., rope_dim:].float()], dim=-1)


def apply_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard transform (Sylvester order) of the last dimension, in float32."""
    n = x.shape[-1]
    matrix = torch.ones(1, 1, device=x.device)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return x.float() @ matrix * n**-0.5


def rotate(
    x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool, hadamard: bool
) -> torch.Tensor:
    """The indexer's rotation of x [T, ..., 128]: RoPE on the leading dimensions, then Hadamard if asked, in float32."""
    x = apply_leading_rope(x, cos_sin_cache[positions.long()], is_neox)
    return apply_hadamard(x) if hadamard else x
