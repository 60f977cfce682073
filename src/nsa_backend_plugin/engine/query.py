"""The absorbed query that the model hands to every backend, in two halves or whole."""

from __future__ import annotations

from typing import Any

import torch

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
