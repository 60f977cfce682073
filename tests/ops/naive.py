"""The operations' formulas once more, as plain loops over numpy scalars: what the torch references are held against.

Nothing of the package is used here. Arithmetic is float64, except where a format prescribes float32 (scales and the
division by them), so that bytes can be compared for equality.
"""

from __future__ import annotations

import bisect
import functools
import math

import numpy as np
import torch

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
LIMIT = {FN: 448.0, FNUZ: 240.0}


def fp8_value(byte: int, flavour: torch.dtype) -> float:
    """Sign, 4 exponent bits, 3 mantissa bits. e4m3fn: bias 7, NaN is 0x7F and 0xFF; e4m3fnuz: bias 8, NaN is 0x80."""
    if (byte == 0x80 and flavour == FNUZ) or (byte & 0x7F == 0x7F and flavour == FN):
        return math.nan
    bias = 7 if flavour == FN else 8
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    return sign * (math.ldexp(mantissa, -2 - bias) if exponent == 0 else math.ldexp(8 + mantissa, exponent - bias - 3))


@functools.cache
def _magnitudes(flavour: torch.dtype) -> list[float]:
    """Values of the bytes 0, 1, 2, ... up to the largest finite one, which ascend."""
    return [v for b in range(128) if not math.isnan(v := fp8_value(b, flavour)) and v <= LIMIT[flavour]]


def fp8_byte(value: float, flavour: torch.dtype) -> int:
    """Nearest byte, ties to the even one, saturating."""
    table = _magnitudes(flavour)
    magnitude = min(abs(value), table[-1])
    high = min(bisect.bisect_left(table, magnitude), len(table) - 1)
    low = max(high - 1, 0)
    below, above = magnitude - table[low], table[high] - magnitude
    byte = low if below < above or (below == above and low % 2 == 0) else high
    negative = math.copysign(1.0, value) < 0 and (byte != 0 or flavour == FN)  # fnuz has no negative zero
    return byte | 0x80 if negative else byte


def quantize(row: list[float], flavour: torch.dtype, scale_format: str = "fp32") -> tuple[list[int], np.float32]:
    """One row or tile -> (fp8 bytes, float32 scale): scale = max(amax, 1e-4) / limit, or the power of two above it."""
    amax = max(abs(np.float32(x)) for x in row)
    scale = np.maximum(amax, np.float32(1e-4)) / np.float32(LIMIT[flavour])
    if scale_format == "ue8m0":
        power = -149
        while math.ldexp(1.0, power) < float(scale):
            power += 1
        scale = np.float32(math.ldexp(1.0, power))
    return [fp8_byte(float(np.float32(x) / scale), flavour) for x in row], scale


def value_offset(layout: str, t: int, d: int, dim: int = 128) -> int:
    if layout == "row_major":
        return t * dim + d
    return (t // 16) * 16 * dim + (d // 16) * 256 + (t % 16) * 16 + d % 16


def write_key(cache: np.ndarray, slot: int, row: list[int], scale: np.float32, layout: str, page_size: int) -> None:
    page, t = divmod(slot, page_size)
    for d, byte in enumerate(row):
        cache[page, value_offset(layout, t, d)] = byte
    start = page_size * 128 + 4 * t
    cache[page, start : start + 4] = np.frombuffer(np.float32(scale).tobytes(), dtype=np.uint8)


def read_key(
    cache: np.ndarray, slot: int, layout: str, page_size: int, flavour: torch.dtype
) -> tuple[list[float], float]:
    """(unscaled values [128], scale) of a slot."""
    page, t = divmod(slot, page_size)
    row = [fp8_value(int(cache[page, value_offset(layout, t, d)]), flavour) for d in range(128)]
    start = page_size * 128 + 4 * t
    return row, float(np.frombuffer(cache[page, start : start + 4].tobytes(), dtype=np.float32)[0])


def logit(q: np.ndarray, k: list[float], k_scale: float, weights: np.ndarray) -> float:
    """q [H, 128], weights [H]: sum over heads of weight * relu(q . k) * k_scale."""
    total = 0.0
    for head in range(len(weights)):
        dot = sum(float(a) * float(b) for a, b in zip(q[head], k, strict=True))
        total += float(weights[head]) * max(dot, 0.0)
    return total * k_scale


def attention(
    q: np.ndarray, rows: list[np.ndarray], softmax_scale: float, value_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """q [H, D], one latent row per key -> (out [H, value_dim], lse [H])."""
    out, lse = np.zeros((len(q), value_dim)), np.full(len(q), -math.inf)
    for head, query in enumerate(q.astype(np.float64)):
        scores = [float((query * row).sum()) * softmax_scale for row in rows]
        if scores:
            top = max(scores)
            lse[head] = top + math.log(math.fsum(math.exp(s - top) for s in scores))
            for score, row in zip(scores, rows, strict=True):
                out[head] += math.exp(score - lse[head]) * row[:value_dim]
    return out, lse


def rope(x: np.ndarray, position: int, cos_sin: np.ndarray, is_neox: bool) -> np.ndarray:
    """Rotate the first R of the last dimension of one vector [D]; cos_sin [positions, R], cosines then sines."""
    half = cos_sin.shape[1] // 2
    y = x.astype(np.float64).copy()
    for i in range(half):
        a, b = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
        cos, sin = float(cos_sin[position, i]), float(cos_sin[position, half + i])
        y[a], y[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return y


def hadamard(x: np.ndarray) -> np.ndarray:
    """Entry (i, j) of the matrix is (-1) ** popcount(i & j) / sqrt(n)."""
    n = len(x)
    return np.array([math.fsum((-1) ** (i & j).bit_count() * float(x[j]) for j in range(n)) for i in range(n)]) / n**0.5


def normalize(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, norm: str, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    if norm == "layer":
        x = x - math.fsum(x) / len(x)
    x = x / math.sqrt(math.fsum(v * v for v in x) / len(x) + eps) * weight
    return x if bias is None else x + bias


def top_indices(logits: np.ndarray, k: int) -> list[int]:
    """Indices of the k largest, ties to the lowest index, ascending."""
    return sorted(sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k])
