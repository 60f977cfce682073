"""The indexer without quantization, in float32: what exact mode serves on a CPU.

The formulas are those of `indexer_prep` and `mqa_logits`, without the Hadamard rotation, which changes no logit.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import INDEX_DIM
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch import norm as norms
from nsa_backend_plugin.ops._torch.logits import weighted_logits
from nsa_backend_plugin.ops._torch.rotary import check_rope, rotate


def query(q: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, *, is_neox: bool) -> torch.Tensor:
    """[T, H, 128] fp32: q [T, H, 128] bf16/fp16/fp32 with RoPE. positions, cos_sin_cache: as `indexer_prep.query`.

    Raises ValueError for bad shapes, dtypes or devices.
    """
    checks.tensor("q", q, (None, None, INDEX_DIM), checks.FLOAT_DTYPES)
    check_rope(positions, cos_sin_cache, q.shape[0], q.device)
    return rotate(q, positions, cos_sin_cache, is_neox, hadamard=False)


def key(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    is_neox: bool,
    norm: str = "layer",
    eps: float = 1e-6,
) -> torch.Tensor:
    """[T, 128] fp32: key [T, 128] with norm and RoPE. The other arguments: as `indexer_prep.key_store`.

    Raises ValueError for bad shapes, dtypes, devices or names.
    """
    checks.tensor("key", key, (None, INDEX_DIM), checks.FLOAT_DTYPES)
    norms.check(norm, norm_weight, norm_bias, INDEX_DIM, key.device)
    check_rope(positions, cos_sin_cache, key.shape[0], key.device)
    normalized = norms.normalize(key, norm_weight, norm_bias, norm, eps)
    return rotate(normalized, positions, cos_sin_cache, is_neox, hadamard=False)


def logits(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, S] fp32 logits of queries [T, H, 128] against keys [S, 128], both fp32. weights: [T, H] fp32.

    Raises ValueError for bad shapes, dtypes or devices. Source: as `mqa_logits`, every key's scale being 1.
    """
    checks.tensor("q", q, (None, None, INDEX_DIM), torch.float32)
    checks.tensor("k", k, (None, INDEX_DIM), torch.float32, q.device)
    checks.tensor("weights", weights, q.shape[:2], torch.float32, q.device)
    return weighted_logits(q, k, torch.ones(k.shape[0], device=k.device), weights)
