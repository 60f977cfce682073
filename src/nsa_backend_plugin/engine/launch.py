"""Launch checks: what cannot be served is refused before weights are loaded, with what to do about it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nsa_backend_plugin import BACKEND_NAME, settings
from nsa_backend_plugin.engine import arguments, contract, hooks, inspection, kernels, latent_rows, release
from nsa_backend_plugin.engine.cpu import bridges
from nsa_backend_plugin.engine.gpu import rocm
from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_PAGE_SIZE, LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.ops import dense_mla, dispatch

logger = logging.getLogger(__name__)

#: Entries of a model's configuration that change its attention: name, the values that are served, the meaning.
MODEL_FEATURES: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("index_kpool", (None, 1), "pooled index keys"),
    ("learnable_sink", (None, False), "a learnable attention sink"),
    ("gated_mla", (None, False), "a gate on the attention's output"),
    ("gated_attention", (None, False), "a gate on the attention's output"),
    ("linear_attn_config", (None,), "layers of linear attention"),
)
#: Those that change the attention of a model with an indexer only.
DSA_FEATURES: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("llama_4_scaling", (None,), "queries that are scaled by position beside an indexer"),
)


def selected(server_args: Any) -> bool:
    """Whether nsa_plugin is named for any phase."""
    return BACKEND_NAME in _backends(server_args)


def checked_resolution(resolve: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of SGLang's argument resolution: our checks before and after it, when nsa_plugin is selected.

    A process that got its arguments resolved has nothing to check: they hold SGLang's choices beside the user's.
    """
    if not selected(server_args) or getattr(server_args, "_resolution_finished", False):
        return resolve(server_args, *args, **kwargs)
    hooks.fired("resolution")
    check_settings()
    check_arguments(server_args, as_given=True)
    check_variables()
    check_platform(_device_kind(server_args))
    _split_indexers_prefill(server_args)
    _choose_for_split_cache(server_args)
    page_size = server_args.page_size  # as the user wrote it: SGLang replaces it for DSA models, with a warning only
    with bridges.no_cuda_capability(), rocm.resolution():
        result = resolve(server_args, *args, **kwargs)
    if str(server_args.model_path).lower() not in ("none", "dummy"):
        model = release.model_config(server_args)
        check_model(model, page_size)
        check_drafts(model, server_args.speculative_algorithm, server_args.disaggregation_mode)
        check_kv_cache(model, server_args.kv_cache_dtype, server_args.speculative_algorithm)
        check_stages(model, server_args.pp_size)
        check_context_parallel(model, server_args)
        check_decode_context_parallel(model, server_args)
        check_hierarchical_cache(server_args)
    return result


def check_settings() -> None:
    """Raise ValueError for an unsupported SGLang, a bad NSA_PLUGIN_* value or an unknown implementation name."""
    release.require_supported()
    check_untested()
    settings.validate()
    kernels.register()
    dispatch.validate_forced()


def check_arguments(server_args: Any, as_given: bool = False) -> None:
    """Raise ValueError for arguments that nsa_plugin does not serve.

    as_given: the arguments are those of the user; else SGLang has resolved them, and filled in values of its own.
    """
    backends = {name for name in _backends(server_args) if name}
    if backends != {BACKEND_NAME}:
        raise ValueError(
            f"attention backends {', '.join(sorted(backends))}: nsa_plugin must serve prefill and decode alike, "
            "because one cache layout serves both. Use --attention-backend nsa_plugin alone"
        )
    kind = _device_kind(server_args)
    own = {name: (rule, f" on {kind}") for name, rule in arguments.ON_DEVICE[kind].items()}
    if (role := getattr(server_args, "disaggregation_mode", "null")) != "null":
        own |= {name: (rule, f" with --disaggregation-mode {role}") for name, rule in arguments.IN_PAIRS.items()}
    if _splits_prefill(server_args):
        own |= {name: (rule, " with --enable-prefill-cp") for name, rule in arguments.WITH_PREFILL_CP.items()}
    if (group := getattr(server_args, "dcp_size", 1)) != 1:
        beside = {name: (rule, f" with --dcp-size {group}") for name, rule in arguments.WITH_DECODE_CP.items()}
        own = beside | own
    general = {name: (rule, "") for name, rule in arguments.REFUSED.items() if name not in own}
    for name, (rule, where) in (general | own).items():
        value = getattr(server_args, name, rule.served[0])  # a release without the argument
        if value not in rule.served and (as_given or not rule.asked):
            given = f"{value}{where}" if where else f"is set ({value!r})"
            raise ValueError(f"{_flag(name)} {given}: nsa_plugin {rule.why}. {rule.advice}")
    if as_given:
        for name, value, default in unclassified(server_args):
            if value != default:
                raise ValueError(
                    f"{_flag(name)} is set ({value!r}): nsa_plugin does not know this argument of SGLang "
                    f"{release.version()}. Start without it, or choose another --attention-backend"
                )


def unclassified(server_args: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, default) of the arguments that `arguments.py` does not list."""
    for name, default in _defaults(type(server_args)).items():
        if not arguments.classified(name):
            yield name, getattr(server_args, name), default


def check_variables() -> None:
    """Raise ValueError for a variable of SGLang's DSA path that nsa_plugin would ignore."""
    for name, rule in arguments.REFUSED_VARIABLES.items():
        value = os.environ.get(name, "")
        if value.strip().lower() not in rule.served:
            raise ValueError(f"{name}={value}: nsa_plugin {rule.why}. {rule.advice}")


def check_untested() -> None:
    """On a release that is newer than every supported one, which the user allowed: look at it, and say what is found.

    Raises ValueError when a place that the plugin reaches into is not there, or not as it was.
    """
    package = release.installed_package()
    if release.supported(release.version()) or package is None:
        return
    found = list(inspection.findings(package))
    lost = [finding.what for finding in found if finding.breaks]
    unknown = [finding.what for finding in found if not finding.breaks]
    logger.warning(
        "nsa_plugin was never tried with SGLang %s (NSA_PLUGIN_ALLOW_UNTESTED_SGLANG). Of the places that it reaches "
        "into, %d do not fit: %s. Not known to it, so that arguments among them must keep their defaults, are %d: %s",
        release.version(),
        len(lost),
        "; ".join(lost) or "none",
        len(unknown),
        "; ".join(unknown) or "none",
    )
    if lost:
        raise ValueError(
            f"SGLang {release.version()} lacks what nsa_plugin reaches into: "
            + "; ".join(lost)
            + ". Install a supported release, or choose another --attention-backend"
        )


def check_model(model: contract.ModelConfig, page_size: int | None) -> None:
    """Raise ValueError for a model (SGLang's ModelConfig) or page size (None = not chosen) that cannot be served."""
    from sglang.srt.configs.model_config import AttentionArch

    architectures = model.hf_config.architectures or ["unknown architecture"]
    name = ", ".join(architectures)
    if model.attention_arch != AttentionArch.MLA:
        raise ValueError(
            f"{name} does not use Multi-head Latent Attention: nsa_plugin serves MLA and DSA models only. Choose "
            "another --attention-backend"
        )
    for architecture in architectures:
        reason = arguments.ARCHITECTURES.get(architecture, "is a model that nsa_plugin was never tried with")
        if reason:
            raise ValueError(
                f"{architecture} {reason}: nsa_plugin does not serve it. Choose another --attention-backend"
            )
    features = MODEL_FEATURES + DSA_FEATURES if has_indexer(model) else MODEL_FEATURES
    for entry, served, meaning in features:
        if (value := _entry(model, entry)) not in served:
            raise ValueError(f"{name} has {entry} {value}: nsa_plugin does not serve {meaning}")
    if (model.kv_lora_rank, model.qk_rope_head_dim) != (LATENT_DIM, ROPE_DIM):
        raise ValueError(
            f"{name} has kv_lora_rank {model.kv_lora_rank} and qk_rope_head_dim {model.qk_rope_head_dim}: nsa_plugin "
            f"serves {LATENT_DIM} and {ROPE_DIM}"
        )
    topk = _entry(model, "index_topk")
    if topk is not None and not arguments.INDEXED.issuperset(architectures):
        raise ValueError(
            f"{name} has index_topk {topk}: nsa_plugin was never tried with an indexer in it. Choose another "
            "--attention-backend"
        )
    if not has_indexer(model):
        _check_page_size(name, page_size, dense_mla.PAGE_SIZES)
        return
    _check_page_size(f"{name} (DSA)", page_size, (INDEX_PAGE_SIZE,))
    if model.hf_config.index_head_dim != INDEX_DIM:
        raise ValueError(f"{name} has index_head_dim {model.hf_config.index_head_dim}: nsa_plugin serves {INDEX_DIM}")
    _check_shared_topk(name, model)


def check_drafts(model: contract.ModelConfig, algorithm: str | None, role: str = "null") -> None:
    """Raise ValueError for drafts of a model that was never run with them.

    algorithm: None is no drafts. role: the disaggregation mode. SGLang's prefill server sends positions, which its own
    backend then selects in place of slots, to a draft whose steps share their top-k.
    """
    if algorithm is None:
        return
    untried = set(model.hf_config.architectures) - arguments.DRAFTED
    if untried:
        raise ValueError(
            f"--speculative-algorithm {algorithm} with {', '.join(sorted(untried))}: nsa_plugin was never run with "
            "drafts of this model. Start without it"
        )
    if role == "null":
        return
    together = f"--speculative-algorithm {algorithm} with --disaggregation-mode {role}"
    if _entry(model, "index_share_for_mtp_iteration"):
        raise ValueError(
            f"{together} and index_share_for_mtp_iteration in the model's configuration: nsa_plugin selects slots, and "
            "SGLang sends positions. Start without one of the two"
        )
    _refuse_shared_topk(together, model)


def check_hierarchical_cache(server_args: Any) -> None:
    """Raise ValueError for drafts over a hierarchical cache of a release in which it spoils them."""
    algorithm = server_args.speculative_algorithm
    if server_args.enable_hierarchical_cache and algorithm is not None and (fault := release.hicache_draft_fault()):
        raise ValueError(
            f"--enable-hierarchical-cache with --speculative-algorithm {algorithm}: SGLang {release.version()} {fault}"
            ". Start without one of the two, or use SGLang 0.5.23 or later"
        )


def check_kv_cache(model: contract.ModelConfig, name: str, algorithm: str | None) -> None:
    """Raise ValueError for a --kv-cache-dtype that a model without an indexer, or its drafts, are not served with."""
    if has_indexer(model):
        return
    latent_rows.check_name(name, ", ".join(model.hf_config.architectures))
    latent_rows.check_drafts(name == "fp8_e4m3", algorithm)


def check_stages(model: contract.ModelConfig, stages: int) -> None:
    """Raise ValueError for a pipeline of several stages of a model whose layers share their top-k.

    SGLang hands the slots that one stage selected to the next, which has a pool and an allocation of its own.
    """
    if stages > 1:
        _refuse_shared_topk(f"--pp-size {stages}", model)


def check_context_parallel(model: contract.ModelConfig, server_args: Any) -> None:
    """Raise ValueError for prefill context parallelism as nsa_plugin does not serve it."""
    if not _splits_prefill(server_args):
        if (size := getattr(server_args, "attn_cp_size", 1)) > 1:
            raise ValueError(
                f"--attn-cp-size {size} without --enable-prefill-cp: the GPUs of such a group would all compute the "
                "same attention. Add --enable-prefill-cp --cp-strategy interleave, or start without it"
            )
        return
    if not has_indexer(model):
        raise ValueError(
            f"--enable-prefill-cp with {', '.join(model.hf_config.architectures)}: nsa_plugin serves prefill context "
            "parallelism of models with an indexer only. Start without it"
        )
    _refuse_shared_topk("--enable-prefill-cp", model)
    if 1 < server_args.attn_cp_size < server_args.tp_size:
        raise ValueError(
            f"--attn-cp-size {server_args.attn_cp_size} with --tp {server_args.tp_size}: nsa_plugin was only run with "
            "a prefill that is split over all GPUs. Make the two equal"
        )
    value = os.environ.get("SGLANG_ENABLE_CP_V2", "")
    if hasattr(server_args, _SPLITS_INDEXED) and value and value.lower() in arguments.OFF:
        raise ValueError(
            f"SGLANG_ENABLE_CP_V2={value} with --enable-prefill-cp: nsa_plugin does not support SGLang's first prefill "
            "context parallelism. Unset it"
        )


def check_decode_context_parallel(model: contract.ModelConfig, server_args: Any) -> None:
    """Raise ValueError for decode context parallelism as nsa_plugin does not serve it."""
    if (size := getattr(server_args, "dcp_size", 1)) == 1:
        return
    if size < 1 or server_args.tp_size % size:
        raise ValueError(
            f"--dcp-size {size} with --tp {server_args.tp_size}: expected a number of GPUs that divides that of tensor "
            "parallelism"
        )
    if not has_indexer(model):
        return
    if not release.exists(SPLITS_ROWS_OF_INDEXED):
        raise ValueError(
            f"--dcp-size {size} with {', '.join(model.hf_config.architectures)}: SGLang {release.version()} does not "
            "split the cache of models with an indexer over GPUs. Use SGLang 0.5.22 or newer, or start without it"
        )
    _refuse_shared_topk(f"--dcp-size {size}", model)


def check_exact(model_dtype: torch.dtype, device: torch.device, role: str = "null") -> None:
    """Raise ValueError when NSA_PLUGIN_EXACT is on where it cannot be exact. role: the disaggregation mode."""
    if not settings.enabled("NSA_PLUGIN_EXACT"):
        return
    if device.type != "cpu" or model_dtype != torch.float32:
        raise ValueError(
            f"NSA_PLUGIN_EXACT=1 with {model_dtype} on {device.type}: it needs --device cpu and --dtype float32"
        )
    if role != "null":
        raise ValueError(
            f"NSA_PLUGIN_EXACT=1 with --disaggregation-mode {role}: exact index keys are not transferred. Unset it"
        )


def check_platform(device: str) -> None:
    """Raise ValueError on a CPU that SGLang does not run on our platform. device: SGLang's device type."""
    from nsa_backend_plugin.engine.cpu import platform

    if device == "cpu" and not platform.active():
        raise ValueError(
            "device cpu without nsa_plugin's CPU platform: set NSA_PLUGIN_CPU=1 in the environment of the launch, "
            "before SGLang is imported"
        )


def has_indexer(model: contract.ModelConfig) -> bool:
    """Whether SGLang takes a model for one with an indexer (DSA)."""
    from sglang.srt.configs.model_config import is_deepseek_dsa

    return is_deepseek_dsa(model.hf_config)


def _entry(model: contract.ModelConfig, name: str) -> Any:
    """An entry of the model's configuration or of its language model's; None where neither has a value."""
    return next((v for c in (model.hf_config, model.hf_text_config) if (v := getattr(c, name, None))), None)


def _indexers(model: contract.ModelConfig) -> list[str]:
    """Of each layer of a model with an indexer, "full" or "shared" (with the layer before), as SGLang reads it."""
    from sglang.srt.configs.model_config import dsa_layer_skips_topk

    config = model.hf_config
    layers = range(config.num_hidden_layers) if has_indexer(model) else ()
    return ["shared" if dsa_layer_skips_topk(config, layer) else "full" for layer in layers]


def _refuse_shared_topk(argument: str, model: contract.ModelConfig) -> None:
    """Raise ValueError where layers share their top-k."""
    if "shared" in _indexers(model):
        raise ValueError(
            f"{argument} with {', '.join(model.hf_config.architectures)}, whose layers share their top-k: "
            "nsa_plugin was never run with it. Start without it"
        )


def _check_shared_topk(name: str, model: contract.ModelConfig) -> None:
    """Raise ValueError where SGLang would let a layer take the top-k of another than the configuration says.

    It then runs an indexer without weights, or attends to everything, and says nothing: 0.5.17 does not read
    `indexer_types`.
    """
    found = _indexers(model)
    if found[0] == "shared":
        raise ValueError(f"{name} begins with a layer that takes the top-k of one before: nsa_plugin serves none such")
    types = getattr(model.hf_config, "indexer_types", None)
    if types is not None and list(types) != found:
        raise ValueError(
            f"{name} has indexer_types {list(types)}, which SGLang {release.version()} reads as {found}. Write "
            "index_topk_pattern into the configuration, or use a newer SGLang"
        )


def _check_page_size(name: str, page_size: int | None, served: tuple[int, ...]) -> None:
    if page_size is not None and page_size not in served:
        raise ValueError(
            f"--page-size {page_size} with {name}: nsa_plugin serves page size {', '.join(map(str, served))}"
        )


#: Argument of SGLang 0.5.17 to 0.5.19: a prefill that is split is that of a model with an indexer.
_SPLITS_INDEXED = "enable_dsa_prefill_context_parallel"


def _splits_prefill(server_args: Any) -> bool:
    """Whether prefill context parallelism was asked for."""
    return bool(getattr(server_args, "enable_prefill_cp", False) or getattr(server_args, _SPLITS_INDEXED, False))


def _split_indexers_prefill(server_args: Any) -> None:
    """Tell a release with `_SPLITS_INDEXED` whose prefill --enable-prefill-cp splits.

    It asks for its own backend's name, and would take ours for that of a model without an indexer.
    """
    asked = _splits_prefill(server_args) and server_args.cp_strategy is not None
    if asked and hasattr(server_args, _SPLITS_INDEXED):
        setattr(server_args, _SPLITS_INDEXED, True)


#: What SGLang selects a GPU's own tokens by, in releases that split the tokens of models with an indexer.
SPLITS_ROWS_OF_INDEXED = "sglang.kernels.ops.attention.dsa.transform_index.transform_index_page_table_dcp"


def _choose_for_split_cache(server_args: Any) -> None:
    """With decode context parallelism, choose what SGLang would choose for Blackwell's kernels, on any GPU.

    That is the rows of an fp8 cache beside an indexer, which are not ours, all queries' projection on every GPU, and
    FlashInfer's exchange. The name of the kernels decides the rows alone: ours run.
    """
    if getattr(server_args, "dcp_size", 1) == 1:
        return
    if server_args.dcp_comm_backend is None:
        server_args.dcp_comm_backend = "a2a"
    if server_args.dcp_replicate_q_proj is None:
        server_args.dcp_replicate_q_proj = False
    server_args.dsa_prefill_backend = server_args.dsa_decode_backend = "flashmla_sparse"


def _backends(server_args: Any) -> tuple[str | None, str | None]:
    base = server_args.attention_backend
    return (server_args.prefill_attention_backend or base, server_args.decode_attention_backend or base)


def _device_kind(server_args: Any) -> str:
    """ "rocm", "cpu" or "cuda", also before SGLang has found the device."""
    if rocm.on_rocm():
        return "rocm"
    device = server_args.device or ("cuda" if torch.accelerator.is_available() else "cpu")
    return "cpu" if torch.device(device).type == "cpu" else "cuda"


def _defaults(args_class: type) -> dict[str, Any]:
    """Default by name of SGLang's argument class, a dataclass in older releases, a msgspec structure in newer ones."""
    if dataclasses.is_dataclass(args_class):
        fields: Any = dataclasses.fields(args_class)
    else:
        import msgspec

        fields = msgspec.structs.fields(args_class)
    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default  # a marker class without one
        for f in fields
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
