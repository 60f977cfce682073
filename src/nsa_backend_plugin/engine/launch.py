"""Launch checks: what cannot be served is refused before weights are loaded, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nsa_backend_plugin import BACKEND_NAME, settings
from nsa_backend_plugin.engine import compat, kernels
from nsa_backend_plugin.engine.gpu import rocm
from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_PAGE_SIZE, LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.ops import dense_mla, dispatch

#: Algorithms whose draft is the model's own next-token layer; SGLang resolves both to EAGLE.
SPECULATIVE = ("EAGLE", "NEXTN")
#: Arguments that move or rewrite cache rows behind the backend's back, or give it batches it does not know.
#: Name, the values that are served, and what any other value asks for.
UNSUPPORTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("enable_hierarchical_cache", (False,), "hierarchical cache (HiCache)"),
    ("enable_lmcache", (False,), "LMCache"),
    ("enable_hisparse", (False,), "HiSparse"),
    ("disaggregation_mode", ("null",), "prefill/decode disaggregation"),
    ("speculative_algorithm", (None, *SPECULATIVE), f"speculative decoding other than {' or '.join(SPECULATIVE)}"),
    ("speculative_eagle_topk", (None, 1), "drafts that branch into a tree, only chains (topk 1)"),
    ("speculative_adaptive", (False,), "a number of draft steps that changes while serving"),
    ("speculative_draft_attention_backend", (None, BACKEND_NAME), "a draft model with another backend"),
    ("enable_multi_layer_eagle", (False,), "drafts by several next-token layers"),
    ("enable_prefill_cp", (False,), "prefill context parallelism"),
    ("dcp_size", (1,), "decode context parallelism"),
    ("enable_pdmux", (False,), "prefill/decode multiplexing"),
    ("enable_two_batch_overlap", (False,), "two-batch overlap"),
    ("enable_unified_memory", (False,), "the unified memory pool"),
    ("enable_page_major_kv_layout", (False,), "the page-major KV layout"),
    (
        "remote_instance_weight_loader_start_seed_via_transfer_engine",
        (False,),
        "other instances that read its weights where they first lay (some are merged afterwards)",
    ),
)


def selected(server_args: Any) -> bool:
    """Whether nsa_plugin is named for any phase."""
    return BACKEND_NAME in _backends(server_args)


def checked_resolution(resolve: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of SGLang's argument resolution: our checks before and after it, when nsa_plugin is selected."""
    if not selected(server_args):
        return resolve(server_args, *args, **kwargs)
    check_settings()
    check_arguments(server_args)
    if server_args.device is not None:  # else SGLang finds one, and the factory asks again
        check_speculation(server_args, torch.device(server_args.device).type)
    page_size = server_args.page_size  # as the user wrote it: SGLang replaces it for DSA models, with a warning only
    with _cpu_resolution(), rocm.resolution():
        result = resolve(server_args, *args, **kwargs)
    if str(server_args.model_path).lower() not in ("none", "dummy"):
        check_model(compat.model_config(server_args), page_size)
    return result


def check_settings() -> None:
    """Raise ValueError for an unsupported SGLang, a bad NSA_PLUGIN_* value or an unknown implementation name."""
    compat.require_supported()
    settings.validate()
    kernels.register()
    dispatch.validate_forced()


def check_arguments(server_args: Any) -> None:
    """Raise ValueError for arguments that nsa_plugin does not serve."""
    backends = {name for name in _backends(server_args) if name}
    if backends != {BACKEND_NAME}:
        raise ValueError(
            f"attention backends {', '.join(sorted(backends))}: nsa_plugin must serve prefill and decode alike, "
            "because one cache layout serves both. Use --attention-backend nsa_plugin alone"
        )
    for name, served, meaning in UNSUPPORTED:
        value = getattr(server_args, name, served[0])
        if value not in served:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is set ({value!r}): nsa_plugin does not support {meaning} yet. Start without it, or choose "
                "another --attention-backend"
            )


def check_speculation(server_args: Any, device: str) -> None:
    """Raise ValueError for speculative decoding on a device (its type) without it."""
    algorithm = server_args.speculative_algorithm
    if algorithm is None:
        return
    kind = "ROCm" if rocm.on_rocm() else device
    if kind != "cuda":
        raise ValueError(
            f"--speculative-algorithm {algorithm} on {kind}: nsa_plugin supports speculative decoding on NVIDIA GPUs "
            "only. Start without it"
        )


def check_model(model: Any, page_size: int | None) -> None:
    """Raise ValueError for a model (SGLang's ModelConfig) or page size (None = not chosen) that cannot be served."""
    from sglang.srt.configs.model_config import AttentionArch, is_deepseek_dsa

    name = ", ".join(model.hf_config.architectures or ["unknown architecture"])
    if model.attention_arch != AttentionArch.MLA:
        raise ValueError(
            f"{name} does not use Multi-head Latent Attention: nsa_plugin serves MLA and DSA models only. Choose "
            "another --attention-backend"
        )
    if (model.kv_lora_rank, model.qk_rope_head_dim) != (LATENT_DIM, ROPE_DIM):
        raise ValueError(
            f"{name} has kv_lora_rank {model.kv_lora_rank} and qk_rope_head_dim {model.qk_rope_head_dim}: nsa_plugin "
            f"serves {LATENT_DIM} and {ROPE_DIM}"
        )
    if not is_deepseek_dsa(model.hf_config):
        _check_page_size(name, page_size, dense_mla.PAGE_SIZES)
        return
    _check_page_size(f"{name} (DSA)", page_size, (INDEX_PAGE_SIZE,))
    config = model.hf_config
    if config.index_head_dim != INDEX_DIM:
        raise ValueError(f"{name} has index_head_dim {config.index_head_dim}: nsa_plugin serves {INDEX_DIM}")
    if getattr(config, "index_kpool", 1) not in (None, 1):
        raise ValueError(f"{name} has index_kpool {config.index_kpool}: nsa_plugin does not serve pooled index keys")


def check_exact(model_dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError when NSA_PLUGIN_EXACT is on where it cannot be exact."""
    if settings.enabled("NSA_PLUGIN_EXACT") and (device.type != "cpu" or model_dtype != torch.float32):
        raise ValueError(
            f"NSA_PLUGIN_EXACT=1 with {model_dtype} on {device.type}: it needs --device cpu and --dtype float32"
        )


def _check_page_size(name: str, page_size: int | None, served: tuple[int, ...]) -> None:
    if page_size is not None and page_size not in served:
        raise ValueError(
            f"--page-size {page_size} with {name}: nsa_plugin serves page size {', '.join(map(str, served))}"
        )


def _backends(server_args: Any) -> tuple[str | None, str | None]:
    base = server_args.attention_backend
    return (server_args.prefill_attention_backend or base, server_args.decode_attention_backend or base)


def _cpu_resolution() -> Any:
    from nsa_backend_plugin.engine.cpu import bridges

    return bridges.no_cuda_capability()
