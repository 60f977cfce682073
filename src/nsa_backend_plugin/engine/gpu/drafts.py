"""Attention backends of a draft model (speculative decoding with the model's own next-token layer).

SGLang makes them from a table by name that nothing can add to: one backend per draft step, and one for the draft
model's extend over the tokens that were verified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import hooks


def create_backend(
    original: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """AROUND hook of `DraftBackendFactory._create_backend`: ours where the draft model's own backend is ours.

    The two tables that it is called with differ in what "dsa" stands for.
    """
    make = getattr(factory.draft_model_runner.attn_backend, "draft_backend", None)
    if make is None:
        return original(factory, backend_name, backend_map, *args, **kwargs)
    per_step = backend_map["dsa"] == factory._create_dsa_decode_backend
    hooks.fired("draft_backends")
    backend = make(factory, per_step)
    for each in (backend, *backend.attn_backends) if per_step else (backend,):
        each.prefill_attention_backend_str = each.decode_attention_backend_str = BACKEND_NAME
    return backend
