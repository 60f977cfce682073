"""The dtype of the latent cache's rows: which are served, and the scale of those that are plain fp8."""

from __future__ import annotations

import torch

from nsa_backend_plugin import settings
from nsa_backend_plugin.layouts import FP8_DTYPES, LATENT_DIM, ROPE_DIM

#: What --kv-cache-dtype may say for a model without an indexer; auto is the model's dtype, unless its checkpoint asks
#: for fp8.
NAMES = ("auto", "bf16", "bfloat16", "fp8_e4m3")
_HALF = (torch.bfloat16, torch.float16)


def plain_fp8_scale(cache: torch.Tensor) -> float | None:
    """Scale of the latent rows: SGLang writes plain fp8 rows unscaled, other rows carry or need none."""
    return 1.0 if cache.dtype in FP8_DTYPES and cache.shape[-1] == LATENT_DIM + ROPE_DIM else None


def check_name(name: str, architecture: str) -> None:
    """Raise ValueError for a --kv-cache-dtype that a model without an indexer is not served with."""
    if name not in NAMES:
        raise ValueError(
            f"--kv-cache-dtype {name} with {architecture}: nsa_plugin serves {', '.join(NAMES)} for models without an "
            "indexer. Start without it"
        )


def check_plain(kv: torch.dtype, model: torch.dtype, device: str) -> None:
    """Raise ValueError for rows of a model without an indexer that are neither the model's dtype nor plain fp8."""
    if kv == model:
        return
    if kv != torch.float8_e4m3fn:
        raise ValueError(
            f"--kv-cache-dtype {kv}: nsa_plugin keeps the latent cache of MLA models without an indexer in the model's "
            f"dtype, {model}, or in fp8_e4m3. Use --kv-cache-dtype auto"
        )
    if device != "cpu" and model not in _HALF:
        raise ValueError(
            f"--kv-cache-dtype fp8_e4m3 with --dtype {model}: nsa_plugin reads fp8 rows with queries in bfloat16 or "
            "float16. Use --kv-cache-dtype auto"
        )
    if settings.enabled("NSA_PLUGIN_EXACT"):
        raise ValueError("--kv-cache-dtype fp8_e4m3 with NSA_PLUGIN_EXACT=1: its caches are not quantized. Unset one")


def check_drafts(quantized: bool, algorithm: str | None) -> None:
    """Raise ValueError for drafts over plain fp8 rows. quantized: whether a model without an indexer has such rows."""
    if quantized and algorithm is not None:
        raise ValueError(
            f"--speculative-algorithm {algorithm} with --kv-cache-dtype fp8_e4m3: nsa_plugin was never run with drafts "
            "over fp8 rows of a model without an indexer. Start without one of them"
        )
