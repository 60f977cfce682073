"""The ledger: every place where the plugin reaches into SGLang, as data.

Importing this module imports neither SGLang nor torch. `hooks.py` installs the rows that have a handler; the two that
register the name are installed by `plugin.py`, which must not fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nsa_backend_plugin.engine import release


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One place where the plugin reaches into SGLang.

    target: dotted path in SGLang. older_target: where it was in older releases. kind: "call" (a public registration
    function), "append" (to a list that SGLang shares by reference), "hook" (HookRegistry, AROUND), "op" (a module's
    forward on our platform), "attribute" (of a class or of its objects, set) or "subclass" (nothing is installed).
    stage: "name" (by plugin.py), "start" (when the plugin loads), "cpu" (then, on our CPU platform only), "factory"
    (when nsa_plugin is selected and its backend is created), "gpu" (then, on a GPU), "gpu_dsa" (there, for DSA models).
    handler: "module:function" below `nsa_backend_plugin.engine`, which says `hooks.fired(name)` when it serves.
    on_device, in_release: whether this device needs the row, and whether a release does (its package's folder, None:
    the installed one). patch_point: the list of handlers that the row's patch (patches/<release>/<name>.patch) adds to
    SGLang, if it does.
    """

    name: str
    target: str
    older_target: str = ""
    kind: str
    stage: str
    handler: str = ""
    why: str
    versions: str = release.RANGE
    upstream: str
    on_device: Callable[[], bool] = lambda: True
    in_release: Callable[[Path | None], bool] = lambda package: True
    patch_point: str = ""

    def needed(self) -> bool:
        """Whether the installed release and this device need the row."""
        return self.on_device() and self.in_release(None)

    @property
    def patched(self) -> bool:
        """Whether the row's patch is applied to the installed SGLang: the hook then stands down."""
        return release.patched(self.path, self.name)

    @property
    def path(self) -> str:
        """The target in the installed release."""
        return self.path_in(None)

    def path_in(self, package: Path | None) -> str:
        """The target in a release."""
        return self.older_target if self.older_target and not release.exists(self.target, package) else self.target

    @property
    def target_exists(self) -> bool:
        """Whether the target exists in the installed SGLang (read from its source, nothing is imported)."""
        return release.exists(self.path)

    def problem(self, package: Path | None = None) -> str | None:
        """Why the row cannot work in a release that needs it: its target is not there, or is called in another way."""
        if not self.in_release(package):
            return None
        path = self.path_in(package)
        if not release.exists(path, package):
            return f"{self.name}: {path} is not there"
        if self.kind != "hook":
            return None
        module, function = self.handler.split(":")
        file = Path(__file__).parent / f"{module.replace('.', '/')}.py"
        target, handler = release.signature(path, package), release.signature_in(file, function)
        assert handler is not None, self.handler
        if target is None or not release.stands_in(handler, target):
            return f"{self.name}: {path} has the parameters {target}, {self.handler} takes {handler}"
        return None


_OPEN = "public extension point"
_FORWARD_METHODS = "sglang.srt.models.deepseek_common.attention_forward_methods"
_GRAMMAR = "sglang.srt.constrained.xgrammar_backend"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"
_MLA_POOL = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_oot_mla_kv_pool"
_TRANSFER_INDICES = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVSender.supports_host_tensor_indices"
_ROCM_PREPARE = f"{_FORWARD_METHODS}.forward_mla_rocm.DeepseekMLARocmForwardMixin.forward_absorb_rocm_prepare"


def _on_rocm() -> bool:
    from nsa_backend_plugin.engine.gpu import rocm

    return rocm.on_rocm()


def _on_gpu() -> bool:
    import torch

    from nsa_backend_plugin.engine.cpu import platform

    return torch.cuda.is_available() and not platform.active()


LEDGER: tuple[Hook, ...] = (
    Hook(
        name="choice",
        target="sglang.srt.server_args.add_attention_backend_choices",
        kind="call",
        stage="name",
        why="adds nsa_plugin to the choices of --attention-backend",
        upstream=_OPEN,
    ),
    Hook(
        name="factory",
        target="sglang.srt.layers.attention.attention_registry.register_attention_backend",
        kind="call",
        stage="name",
        why="makes the name create our backend",
        upstream=_OPEN,
    ),
    Hook(
        name="resolution",
        target="sglang.srt.server_args.ServerArgs.resolve_once",
        older_target="sglang.srt.server_args.ServerArgs.__post_init__",
        kind="hook",
        stage="start",
        handler="launch:checked_resolution",
        why=(
            "launch checks before weights are loaded, and on a CPU the answer to the unguarded question for a CUDA "
            "capability (arguments are resolved in __post_init__ in older releases)"
        ),
        upstream="not reported; the factory is SGLang's only other place to refuse, after loading",
        patch_point="sglang.srt.server_args.RESOLUTION_WRAPPERS",
    ),
    Hook(
        name="vocabulary",
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        kind="hook",
        stage="start",
        handler="requests:inside_vocabulary",
        why="a request with a token that the model does not have is an error, and does not end the server",
        upstream="not reported",
        patch_point="sglang.srt.managers.tokenizer_manager.VALIDATION_WRAPPERS",
    ),
    Hook(
        name="forward_method",
        target="sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register",
        kind="call",
        stage="factory",
        why="an unknown name gets the triton handler, which prefills with MHA that we do not serve",
        upstream=_OPEN,
    ),
    Hook(
        name="absorb_core",
        target="sglang.srt.models.deepseek_common.utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS",
        kind="append",
        stage="factory",
        why="without it q and k arrive concatenated",
        upstream="a list by name; no registration function",
    ),
    Hook(
        name="indexer",
        target="sglang.srt.layers.attention.dsa.dsa_indexer.Indexer",
        kind="op",
        stage="cpu",
        handler="indexer:forward",
        why="the DSA indexer has no torch forward",
        upstream=_OPEN,
    ),
    Hook(
        name="rope_cpu",
        target="sglang.srt.layers.rotary_embedding.factory.get_rope_cpu",
        kind="hook",
        stage="cpu",
        handler="cpu.bridges:get_rope_cpu",
        why="the CPU factory asserts deepseek_yarn",
        upstream="not reported",
    ),
    Hook(
        name="support_triton",
        target="sglang.srt.utils.common.support_triton",
        kind="hook",
        stage="cpu",
        handler="cpu.bridges:support_triton",
        why="request bookkeeping launches Triton unless the backend's name is on a list",
        versions="releases whose platforms have no `capabilities`",
        upstream="solved upstream by PlatformCapabilities.supports_triton",
        in_release=lambda package: not release.platform_declares_triton(package),
    ),
    Hook(
        name="grammar_mask",
        target=f"{_GRAMMAR}.XGrammarGrammar.allocate_vocab_mask",
        kind="hook",
        stage="cpu",
        handler="cpu.bridges:grammar_mask",
        why="answers that follow a grammar: their mask is asked for in pinned memory, and applied on GPUs alone",
        versions="releases that do not ask the platform whether it can pin",
        upstream="solved upstream by is_pin_memory_available",
        in_release=lambda package: release.mentions(_GRAMMAR, "pin_memory=True", package),
    ),
    Hook(
        name="mla_pool",
        target=_MLA_POOL,
        kind="subclass",
        stage="cpu",
        why="the pool of MLA models is built with index_head_dim, which SGLang's own pool class refuses",
        versions="releases with a builder for each out-of-tree pool",
        upstream="solved upstream by one builder for all pools",
        in_release=lambda package: release.exists(_MLA_POOL, package),
    ),
    Hook(
        name="transfer_indices",
        target=_TRANSFER_INDICES,
        kind="attribute",
        stage="factory",
        why="a CPU's prefill server copies the page numbers that it sends itself: stock does it through pinned memory",
        versions="releases whose sender takes them as a tensor on the host",
        upstream="not reported",
        in_release=lambda package: release.exists(_TRANSFER_INDICES, package),
    ),
    Hook(
        name="transfer_prefixes",
        target="sglang.srt.environ.Envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX",
        kind="attribute",
        stage="factory",
        why="a CPU's prefill server sends a cached prefix with the rest: stock sends it first, behind a CUDA event",
        upstream="not reported",
    ),
    Hook(
        name="fused_decode",
        target=f"{_FORWARD_METHODS}.forward_mla.DeepseekMLAForwardMixin.forward_absorb_prepare",
        kind="hook",
        stage="gpu_dsa",
        handler="gpu.absorb:forward_absorb_prepare",
        why=(
            "fused decode path: one kernel for RoPE, quantization and the latent write, no concat, optional second "
            "stream"
        ),
        upstream="no extension point",
    ),
    Hook(
        name="fused_decode_rocm",
        target=_ROCM_PREPARE,
        kind="hook",
        stage="gpu_dsa",
        handler="gpu.absorb:forward_absorb_prepare",
        why="ROCm: the fused decode path where the model prepares absorbed attention by a method of its own",
        versions="ROCm, releases with `forward_mla_rocm`",
        upstream="no extension point",
        on_device=_on_rocm,
        in_release=lambda package: release.exists(_ROCM_PREPARE, package),
    ),
    Hook(
        name="draft_backends",
        target="sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend",
        kind="hook",
        stage="gpu",
        handler="gpu.drafts:create_backend",
        why="speculative decoding: the draft model's backends come from a table by name",
        upstream="no extension point",
        patch_point="sglang.srt.speculative.draft_utils.CREATE_WRAPPERS",
    ),
    Hook(
        name="prefill_key",
        target=f"{_FORWARD_METHODS}.forward_mha.DeepseekMHAForwardMixin._concat_and_cast_mha_k",
        kind="hook",
        stage="gpu",
        handler="gpu.prefill:concat_key",
        why="dense prefill: the two parts of the key are joined by our operation, for any head count",
        upstream="no extension point; backends can bring their own for chunks of a cached prefix",
        patch_point=f"{_FORWARD_METHODS}.forward_mha.KEY_WRAPPERS",
    ),
    Hook(
        name="merged_weights",
        target="sglang.srt.model_executor.model_runner_components.load_model_utils.load_model_with_memory_saver",
        kind="hook",
        stage="start",
        handler="merging:load_model",
        why=(
            "two projections of one input are merged, and W_UK on ROCm is copied to bf16, once the weights are loaded: "
            "before memory is planned, and in a region of the weights' memory"
        ),
        upstream="later releases tell the platform, outside that region",
        on_device=_on_gpu,
        patch_point="sglang.srt.model_executor.model_runner_components.load_model_utils.LOAD_WRAPPERS",
    ),
    Hook(
        name="weight_updates",
        target=f"{_UPDATER}.SchedulerWeightUpdaterManager._observe_weight_load",
        kind="hook",
        stage="gpu_dsa",
        handler="merging:updating",
        why="merged weights that are copies (dequantized from fp8) are rebuilt after an update from any source",
        upstream="no extension point",
        patch_point=f"{_UPDATER}.UPDATE_WRAPPERS",
    ),
    Hook(
        name="few_tokens",
        target="sglang.srt.layers.quantization.fp8.Fp8LinearMethod.apply",
        kind="attribute",
        stage="gpu",
        why=(
            "projections of few tokens: a product that reads the weights once comes before the `apply` of the method "
            "objects of attention's layers, bf16 ones too, and before their `forward_absorb_core` for W_UV (sm_90)"
        ),
        upstream="--fp8-gemm-backend chooses one product for the whole model",
        on_device=_on_gpu,
    ),
    Hook(
        name="rocm_pages",
        target="sglang.srt.layers.attention.dsa.utils.aiter_can_use_preshuffle_paged_mqa",
        kind="hook",
        stage="start",
        handler="gpu.rocm:preshuffled_pages",
        why="ROCm: stock falls to page size 1 where AITER's paged kernel cannot run; ours reads pages of 64 there too",
        versions=f"ROCm, {release.RANGE}",
        upstream="no extension point",
        on_device=_on_rocm,
        patch_point="sglang.srt.layers.attention.dsa.utils.PAGED_MQA_WRAPPERS",
    ),
    Hook(
        name="rocm_indexer",
        target="sglang.srt.layers.attention.dsa.dsa_indexer.Indexer.forward_cuda",
        kind="hook",
        stage="start",
        handler="indexer:forward_rocm",
        why="ROCm: one writer of index-K pages for prefill and decode, in the layout that the readers take",
        versions=f"ROCm, {release.RANGE}",
        upstream="no extension point",
        on_device=_on_rocm,
        patch_point="sglang.srt.layers.attention.dsa.dsa_indexer.FORWARD_WRAPPERS",
    ),
    Hook(
        name="gpu_dsa_backend",
        target="sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend",
        kind="subclass",
        stage="gpu_dsa",
        why="stock metadata, graph capture, speculative decoding and isinstance checks with our attention; in a "
        "prefill on NVIDIA also with our top-k, which SGLang's indexer asks the metadata for",
        upstream="no extension point",
    ),
    Hook(
        name="gpu_mla_backend",
        target="sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend",
        kind="subclass",
        stage="gpu",
        why="stock metadata, graph capture and prefill with our decode",
        upstream="no extension point",
    ),
)
