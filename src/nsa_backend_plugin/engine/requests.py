"""What a request may not ask: it is answered with an error before it reaches the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nsa_backend_plugin.engine import contract, hooks, launch


def inside_vocabulary(
    original: Callable[..., None],
    manager: contract.TokenizerManager,
    obj: Any,
    input_ids: Sequence[int] | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AROUND hook of the check of a request: a token that the model does not have is a ValueError, answered with 400.

    SGLang passes it on to the embedding, where it ends the server.
    """
    if input_ids and launch.selected(manager.server_args):
        hooks.fired("vocabulary")
        vocabulary = manager.model_config.vocab_size
        for token in (min(input_ids), max(input_ids)):
            if not 0 <= token < vocabulary:
                raise ValueError(f"input_ids has the token {token}: the model's tokens are 0 to {vocabulary - 1}")
    return original(manager, obj, input_ids, *args, **kwargs)
