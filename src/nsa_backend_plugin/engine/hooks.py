"""The ledger of every hook into SGLang, and its installation.

Importing this module imports neither SGLang nor torch. Each row names its target in SGLang; rows with a `handler` are
installed here, the two that register the name are installed by `plugin.py`, which must not fail.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import targets

logger = logging.getLogger(__name__)

#: How often each hook, or what its patch calls instead, has run in this process, by row name.
FIRED: Counter[str] = Counter()
#: Names of the rows that were installed: a draft model's backend comes after the model's own.
_installed: set[str] = set()


@dataclass(frozen=True)
class Hook:
    """One place where the plugin reaches into SGLang.

    target: dotted path in SGLang. kind: "call" (a public registration function), "append" (to a list that SGLang
    shares by reference), "hook" (HookRegistry, AROUND), "op" (a module's forward on our platform) or "subclass".
    stage: "name" (by plugin.py), "start" (when the plugin loads), "cpu" (then, on our CPU platform only), "factory"
    (when nsa_plugin is selected and its backend is created), "gpu" (then, on a GPU), "gpu_dsa" (there, for DSA models).
    handler: "module:function" below `nsa_backend_plugin.engine`. older_target: where it was in older releases.
    needed: whether the installed release needs the row. patch_point: the list of handlers that the row's patch
    (patches/<release>/<name>.patch) adds to SGLang, if it does.
    """

    name: str
    target: str
    kind: str
    stage: str
    why: str
    versions: str
    upstream: str
    handler: str = ""
    older_target: str = ""
    needed: Callable[[], bool] = lambda: True
    patch_point: str = ""

    @property
    def patched(self) -> bool:
        """Whether the row's patch is applied to the installed SGLang: the hook then stands down."""
        return targets.patched(self.path, self.name)

    @property
    def path(self) -> str:
        """The target in the installed release."""
        return self.older_target if self.older_target and not targets.exists(self.target) else self.target


_ALL = "0.5.17 to 0.5.23"
_MLA_POOL = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_oot_mla_kv_pool"
_OPEN = "public extension point"


def _bookkeeping_by_name() -> bool:
    from nsa_backend_plugin.engine import compat

    return not compat.platform_declares_triton()


def _on_rocm() -> bool:
    from nsa_backend_plugin.engine.gpu import rocm

    return rocm.on_rocm()


def _on_gpu() -> bool:
    import torch

    from nsa_backend_plugin.engine.cpu import platform

    return torch.cuda.is_available() and not platform.active()


_ROCM_PREPARE = (
    "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla_rocm."
    "DeepseekMLARocmForwardMixin.forward_absorb_rocm_prepare"
)


def _rocm_prepares_apart() -> bool:
    return _on_rocm() and targets.exists(_ROCM_PREPARE)


LEDGER: tuple[Hook, ...] = (
    Hook(
        "choice",
        "sglang.srt.server_args.add_attention_backend_choices",
        "call",
        "name",
        "adds nsa_plugin to the choices of --attention-backend",
        _ALL,
        _OPEN,
    ),
    Hook(
        "factory",
        "sglang.srt.layers.attention.attention_registry.register_attention_backend",
        "call",
        "name",
        "makes the name create our backend",
        _ALL,
        _OPEN,
    ),
    Hook(
        "resolution",
        "sglang.srt.server_args.ServerArgs.resolve_once",
        "hook",
        "start",
        "launch checks before weights are loaded, and on a CPU the answer to the unguarded question for a CUDA "
        "capability (arguments are resolved in __post_init__ in older releases)",
        _ALL,
        "not reported; the factory is SGLang's only other place to refuse, after loading",
        "launch:checked_resolution",
        "sglang.srt.server_args.ServerArgs.__post_init__",
        patch_point="sglang.srt.server_args.RESOLUTION_WRAPPERS",
    ),
    Hook(
        "forward_method",
        "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register",
        "call",
        "factory",
        "an unknown name gets the triton handler, which prefills with MHA that we do not serve",
        _ALL,
        _OPEN,
    ),
    Hook(
        "absorb_core",
        "sglang.srt.models.deepseek_common.utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS",
        "append",
        "factory",
        "without it q and k arrive concatenated",
        _ALL,
        "a list by name; no registration function",
    ),
    Hook(
        "indexer",
        "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer",
        "op",
        "cpu",
        "the DSA indexer has no torch forward",
        _ALL,
        _OPEN,
        "indexer:forward",
    ),
    Hook(
        "rope_cpu",
        "sglang.srt.layers.rotary_embedding.factory.get_rope_cpu",
        "hook",
        "cpu",
        "the CPU factory asserts deepseek_yarn",
        _ALL,
        "not reported",
        "cpu.bridges:get_rope_cpu",
    ),
    Hook(
        "support_triton",
        "sglang.srt.utils.common.support_triton",
        "hook",
        "cpu",
        "request bookkeeping launches Triton unless the backend's name is on a list",
        "releases whose platforms have no `capabilities`",
        "solved upstream by PlatformCapabilities.supports_triton",
        "cpu.bridges:support_triton",
        needed=_bookkeeping_by_name,
    ),
    Hook(
        "mla_pool",
        _MLA_POOL,
        "subclass",
        "cpu",
        "the pool of MLA models is built with index_head_dim, which SGLang's own pool class refuses",
        "releases with a builder for each out-of-tree pool",
        "solved upstream by one builder for all pools",
        needed=lambda: targets.exists(_MLA_POOL),
    ),
    Hook(
        "fused_decode",
        "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla."
        "DeepseekMLAForwardMixin.forward_absorb_prepare",
        "hook",
        "gpu_dsa",
        "fused decode path: one kernel for RoPE, quantization and the latent write, no concat, optional second stream",
        _ALL,
        "no extension point",
        "gpu.absorb:forward_absorb_prepare",
    ),
    Hook(
        "fused_decode_rocm",
        _ROCM_PREPARE,
        "hook",
        "gpu_dsa",
        "ROCm: the fused decode path where the model prepares absorbed attention by a method of its own",
        "ROCm, releases with `forward_mla_rocm`",
        "no extension point",
        "gpu.absorb:forward_absorb_prepare",
        needed=_rocm_prepares_apart,
    ),
    Hook(
        "draft_backends",
        "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend",
        "hook",
        "gpu",
        "speculative decoding: the draft model's backends come from a table by name",
        _ALL,
        "no extension point",
        "gpu.drafts:create_backend",
        patch_point="sglang.srt.speculative.draft_utils.CREATE_WRAPPERS",
    ),
    Hook(
        "prefill_key",
        "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mha."
        "DeepseekMHAForwardMixin._concat_and_cast_mha_k",
        "hook",
        "gpu",
        "dense prefill: the two parts of the key are joined by our operation, for any head count",
        _ALL,
        "no extension point; backends can bring their own for chunks of a cached prefix",
        "gpu.prefill:concat_key",
        patch_point="sglang.srt.models.deepseek_common.attention_forward_methods.forward_mha.KEY_WRAPPERS",
    ),
    Hook(
        "merged_weights",
        "sglang.srt.model_executor.model_runner_components.load_model_utils.load_model_with_memory_saver",
        "hook",
        "start",
        "two projections of one input are merged, and W_UK on ROCm is copied to bf16, once the weights are loaded: "
        "before memory is planned, and in a region of the weights' memory",
        _ALL,
        "later releases tell the platform, outside that region",
        "merging:load_model",
        needed=_on_gpu,
        patch_point="sglang.srt.model_executor.model_runner_components.load_model_utils.LOAD_WRAPPERS",
    ),
    Hook(
        "weight_updates",
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._observe_weight_load",
        "hook",
        "gpu_dsa",
        "merged weights that are copies (dequantized from fp8) are rebuilt after an update of weights from any source",
        _ALL,
        "no extension point",
        "merging:updating",
        patch_point="sglang.srt.managers.scheduler_components.weight_updater.UPDATE_WRAPPERS",
    ),
    Hook(
        "rocm_pages",
        "sglang.srt.layers.attention.dsa.utils.aiter_can_use_preshuffle_paged_mqa",
        "hook",
        "start",
        "ROCm: stock falls to page size 1 where AITER's paged kernel cannot run; ours reads pages of 64 there too",
        "ROCm, " + _ALL,
        "no extension point",
        "gpu.rocm:preshuffled_pages",
        needed=_on_rocm,
        patch_point="sglang.srt.layers.attention.dsa.utils.PAGED_MQA_WRAPPERS",
    ),
    Hook(
        "rocm_indexer",
        "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer.forward_cuda",
        "hook",
        "start",
        "ROCm: one writer of index-K pages for prefill and decode, in the layout that the readers take",
        "ROCm, " + _ALL,
        "no extension point",
        "indexer:forward_rocm",
        needed=_on_rocm,
        patch_point="sglang.srt.layers.attention.dsa.dsa_indexer.FORWARD_WRAPPERS",
    ),
    Hook(
        "gpu_dsa_backend",
        "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend",
        "subclass",
        "gpu_dsa",
        "stock metadata, graph capture, speculative decoding and isinstance checks with our attention",
        _ALL,
        "no extension point",
    ),
    Hook(
        "gpu_mla_backend",
        "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend",
        "subclass",
        "gpu",
        "stock metadata, graph capture and prefill with our decode",
        _ALL,
        "no extension point",
    ),
)


def target_exists(row: Hook) -> bool:
    """Whether the row's target exists in the installed SGLang (read from its source, nothing is imported)."""
    return targets.exists(row.path)


def install(stage: str) -> None:
    """Install the rows of a stage. "start" includes the CPU rows where SGLang runs on our CPU platform."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from nsa_backend_plugin.engine.cpu import platform

    stages = {stage}
    if stage == "start" and platform.active():
        stages.add("cpu")
    if stage == "factory":
        _teach_model_code()
    for row in LEDGER:
        if row.stage in stages and row.handler and row.name not in _installed and row.needed():
            _install(row)
            _installed.add(row.name)
    HookRegistry.apply_hooks()


def standing_down() -> list[str]:
    """Names of the rows whose patch is applied to the installed SGLang."""
    return [row.name for row in LEDGER if row.patched]


def fired(name: str, kind: str = "hook") -> None:
    """Count a run of a hook, or of the "patch" in its place, and log the first one."""
    FIRED[name] += 1
    if FIRED[name] == 1:
        logger.info("nsa_plugin %s in use: %s", kind, name)


def _install(row: Hook) -> None:
    if row.patched:
        if row.patch_point:
            module, name = row.patch_point.rsplit(".", 1)
            getattr(importlib.import_module(module), name).append(_counted(row, "patch"))
        return
    handler = _counted(row)
    if row.kind == "op":
        from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

        Indexer.register_oot_forward(Indexer, handler, "native")
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(row.path, handler, HookType.AROUND)


def _counted(row: Hook, kind: str = "hook") -> Callable[..., Any]:
    """The row's handler, imported when it first runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        fired(row.name, kind)
        return _handler(row.handler)(*args, **kwargs)

    return run


@functools.cache
def _handler(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    return getattr(importlib.import_module(f"nsa_backend_plugin.engine.{module}"), function)


def _teach_model_code() -> None:
    """The rows `forward_method` and `absorb_core`."""
    from sglang.srt.model_executor.forward_context import get_attn_backend
    from sglang.srt.models.deepseek_common import attention_backend_handler, utils

    def choose(attn: Any, forward_batch: Any) -> Any:
        fired("forward_method")
        like = getattr(get_attn_backend(), "forward_method_like", "dsa")
        return attention_backend_handler.AttentionBackendRegistry.get_handler(like)(attn, forward_batch)

    attention_backend_handler.AttentionBackendRegistry.register(BACKEND_NAME, choose)
    if BACKEND_NAME not in utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(BACKEND_NAME)
