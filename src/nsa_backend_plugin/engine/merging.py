"""The merged weights of a served model: made when SGLang has loaded it, rebuilt when SGLang has updated its weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nsa_backend_plugin.engine import hooks, indexer, launch
from nsa_backend_plugin.engine.gpu import projections, query_projection, rocm
from nsa_backend_plugin.runtime import merged_weights

logger = logging.getLogger(__name__)

#: Models of this process that may have merged weights: the target's and the draft's.
_models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def load_model(
    original: Callable[..., Any], *, device: str, memory_saver_adapter: Any, is_draft_worker: bool, **options: Any
) -> Any:
    """AROUND hook of `load_model_with_memory_saver`: merges in a region like the one that the weights were loaded in.

    So memory is planned with the merged weights, and `release_memory_occupation` frees them.
    """
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
    from sglang.srt.runtime_context import get_server_args

    loaded = original(
        device=device, memory_saver_adapter=memory_saver_adapter, is_draft_worker=is_draft_worker, **options
    )
    arguments = get_server_args()
    if not launch.selected(arguments):
        return loaded
    hooks.fired("merged_weights")
    backup = arguments.enable_weights_cpu_backup or (is_draft_worker and arguments.enable_draft_weights_cpu_backup)
    with memory_saver_adapter.region(
        GPU_MEMORY_TYPE_WEIGHTS, enable_cpu_backup=backup and arguments.weight_cache_mode == "off"
    ):
        merge(loaded.model, device)
    torch.cuda.empty_cache()  # what the weights occupied before
    return loaded


def merge(model: torch.nn.Module, device: str) -> None:
    """Merge what can be merged in every layer with an indexer of a model that is served on a device (its type), and put
    our products of few tokens before SGLang's in every MLA layer.
    """
    _models.add(model)
    for attn in layers(model):
        if _offloaded(attn, device):
            continue
        rocm.merge_key_weight(attn)
        indexer.merge_projection(attn.indexer)
        if attn.q_lora_rank is not None:
            query_projection.merge(attn)
    for module in model.modules():
        if hasattr(module, "fused_qkv_a_proj_with_mqa"):
            projections.install(module)


@contextlib.contextmanager
def updating(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """AROUND hook of what SGLang's scheduler updates weights in, from any source: rebuilds the merged ones after it."""
    with original(*args, **kwargs):
        yield
    if _models:
        hooks.fired("weight_updates")
    for model in _models:
        merged_weights.rebuild_all(model)


def settle(model: torch.nn.Module, device: str) -> None:
    """Before the first forward: forget what was replaced since loading, and log once why a layer serves itself."""
    merged_weights.drop_replaced(model)
    for attn in layers(model):
        reasons = [None if attn.indexer.use_dsa_indexer_fusion else indexer.obstacle(attn.indexer)]
        if attn.q_lora_rank is not None:
            reasons.append(query_projection.obstacle(attn))
        if _offloaded(attn, device):
            reasons = ["the layer's weights are offloaded to the CPU"]
        for reason in filter(None, reasons):
            _log_once(reason)


def layers(model: torch.nn.Module) -> Iterator[Any]:
    """Attention layers with an indexer."""
    return (module for module in model.modules() if getattr(module, "indexer", None) is not None)


def _offloaded(attn: Any, device: str) -> bool:
    return any(parameter.device.type != device for parameter in attn.parameters())


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("nsa_plugin does not merge projections where: %s", reason)
