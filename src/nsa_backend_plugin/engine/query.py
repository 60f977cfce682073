"""The query that the model hands to every backend: its two halves or the whole, and what it is scaled by."""

from __future__ import annotations

from typing import Any

import torch

from nsa_backend_plugin.engine import contract
from nsa_backend_plugin.ops import concat


def absorbed(q: torch.Tensor, q_rope: torch.Tensor | None, layer: Any) -> torch.Tensor:
    """[T, heads, 512 + 64] of a layer; a view, no kernel, where both halves lie in one buffer already.

    q: [T, heads*512] with q_rope [T, heads, 64], or [T, heads*576] with q_rope None.
    """
    heads = layer.tp_q_head_num
    if q_rope is None:
        return q.contiguous().view(-1, heads, layer.head_dim)
    q_nope = q.view(-1, heads, layer.v_head_dim)
    return concat.q_all(q_nope, q_rope.view(-1, heads, layer.head_dim - layer.v_head_dim))


class PositionScaling:
    """Mistral-Large-3 multiplies its queries by a factor that grows with their position (`llama_4_scaling`).

    SGLang computes the factors, and leaves them to those backends which rotate the query too: others must do it.
    """

    def __init__(self, model: contract.ModelConfig):
        entry = getattr(model.hf_text_config, "llama_4_scaling", None)
        self._beta: float = entry["beta"] if entry else 0.0
        self._step: int = entry["original_max_position_embeddings"] if entry else 1

    def __call__(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """query [T, ...] scaled; itself where the model has no such scale. positions: of its rows, then of padding."""
        if not self._beta:
            return query
        factors = 1 + self._beta * torch.log(1 + torch.floor(positions[: query.shape[0]] / self._step))
        return query * factors.to(query.dtype).view(-1, *(1 for _ in query.shape[1:]))
