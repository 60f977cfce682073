"""Make a process believe that it runs on a ROCm GPU: torch, our device names, SGLang's decisions, and a fake AITER.

`sitecustomize.py`, written into a folder on PYTHONPATH, calls `install` in every process of a server before anything
else is imported. Computation stays on the CPU: operations take their torch implementation where Triton would run on
the GPU, and AITER's are fakes that check every argument. What is simulated is every decision.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import sglang_plugin

ARCH_VARIABLE = "SIMULATED_GFX"
TRITON_VARIABLE = "SIMULATED_TRITON"
AITER_VARIABLE = "SIMULATED_AITER"
PROBE_VARIABLE = "SIMULATED_PROBE_OUT"
SITE = "import tests.rocm.simulated_host as host; host.install()\n"
_CALLS = itertools.count()
ROOT = Path(__file__).resolve().parents[2]


def write_site(folder: Path) -> dict[str, str]:
    """Variables of a server's environment that put it on the simulated host."""
    (folder / "sitecustomize.py").write_text(SITE)
    sglang_plugin.declare(folder, "rocm_probe", "tests.rocm.simulated_host:register")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "NSA_PLUGIN_CPU": "1"}


def install_fakes(put: Callable[[str, types.ModuleType], None]) -> None:
    """Hand every module of the fake AITER to `put(name, module)`."""
    from tests.ops import fake_aiter, fake_aiter_attention
    from tests.rocm import fake_logits

    contents = {
        "aiter": (fake_aiter, "indexer_k_quant_and_cache cp_gather_indexer_k_quant_cache"),
        "aiter.mla": (fake_aiter_attention, "mla_decode_fwd"),
        "aiter.ops": (None, ""),
        "aiter.ops.triton": (None, ""),
        "aiter.ops.triton.fused_kv_cache": (fake_aiter, "fused_qk_rope_cat_and_cache_mla"),
        "aiter.ops.triton.pa_mqa_logits": (fake_logits, "deepgemm_fp8_paged_mqa_logits"),
        "aiter.ops.triton.fp8_mqa_logits": (fake_logits, "fp8_mqa_logits"),
    }
    for name, (source, functions) in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for function in functions.split():
            setattr(module, function, _counted(function, fake_aiter.as_declared(getattr(source, function))))
        if name == "aiter":
            for function in ("get_mla_metadata_info_v1", "get_mla_metadata_v1"):
                setattr(module, function, fake_aiter.as_declared(getattr(fake_aiter_attention, function)))
        put(name, module)


def _counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
    seen: set[str] = set()

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        if name not in seen and os.environ.get(PROBE_VARIABLE):
            seen.add(name)
            print(f"fake aiter in use: {name}", flush=True)
        return function(*args, **kwargs)

    return run


def install() -> None:
    """Called by sitecustomize: patches what later imports will read."""
    arch = os.environ[ARCH_VARIABLE]
    sys.meta_path.insert(0, _AfterImport(arch))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs a patch after a module's own code."""

    def __init__(self, arch: str):
        self._looking: set[str] = set()
        self._patches = {
            "nsa_backend_plugin.ops.arch": lambda module: _patch_arch(module, arch),
            "nsa_backend_plugin.ops._triton.support": _patch_triton_support,
            "nsa_backend_plugin.ops.dispatch": _patch_dispatch,
            "sglang.srt.utils.common": _patch_sglang_utils,
            "sglang.srt.arg_groups.overrides": _patch_overrides,
            "sglang.srt.arg_groups.model_overrides.deepseek_v2": _patch_model_overrides,
            "sglang.srt.layers.attention.dsa.utils": _patch_dsa_utils,
            "sglang.srt.mem_cache.memory_pool": _patch_pool,
        }

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        patch = self._patches.get(name)
        if patch is None or name in self._looking:
            return None
        self._looking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking.discard(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            run(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch_arch(module: types.ModuleType, arch: str) -> None:
    import torch

    module._KNOWN[torch.device("cpu")] = arch


def _patch_triton_support(module: types.ModuleType) -> None:
    """The tensors are the CPU's, so a Triton kernel cannot run whatever the device is called."""
    module.available = lambda arch: "simulated host: no GPU for Triton"


def _patch_dispatch(module: types.ModuleType) -> None:
    sys.modules["tilelang"] = None  # type: ignore[assignment]  # not installed: it would compile for a GPU
    if os.environ.get(AITER_VARIABLE, "1") == "1":
        install_fakes(sys.modules.__setitem__)


def _patch_sglang_utils(module: types.ModuleType) -> None:
    """From here on torch reports HIP; SGLang has asked before, so that its CPU code runs where nothing is decided."""
    import torch

    assert module.is_hip() is False  # cached
    torch.version.hip = "6.4.0"
    for name in [n for n in vars(module) if n.startswith(("is_gfx", "mxfp_supported"))]:
        setattr(module, name, lambda: False)
    torch.cuda.is_current_stream_capturing = lambda: False


def _patch_overrides(module: types.ModuleType) -> None:
    """The choice of page size, and it alone, sees a ROCm host; newer releases make it in `model_overrides`."""
    if not hasattr(module, "is_hip"):
        return
    asks = module.is_hip

    def is_hip() -> bool:
        return sys._getframe(1).f_code.co_name == "_deepseek_family_overrides" or asks()

    module.is_hip = is_hip


def _patch_model_overrides(module: types.ModuleType) -> None:
    """The same in newer releases, where it is the only question of this file about ROCm."""
    asks = module.get_platform

    def get_platform() -> types.SimpleNamespace:
        platform = asks()
        return types.SimpleNamespace(is_hip=True, is_npu=platform.is_npu, is_xpu=platform.is_xpu)

    module.get_platform = get_platform


def _patch_dsa_utils(module: types.ModuleType) -> None:
    import triton

    module.is_hip = lambda: True
    if TRITON_VARIABLE in os.environ:
        module.triton = types.SimpleNamespace(__version__=os.environ[TRITON_VARIABLE])
        triton.__version__ = os.environ[TRITON_VARIABLE]


def _patch_pool(module: types.ModuleType) -> None:
    """The pool's own check of the page size takes its ROCm branch."""
    original = module.DSATokenToKVPool.__init__

    def construct(self: object, *args: object, **kwargs: object) -> None:
        module._is_hip = True
        try:
            original(self, *args, **kwargs)
        finally:
            module._is_hip = False

    module.DSATokenToKVPool.__init__ = construct


def register() -> None:
    """Entry point: the ROCm indexer in place of the CPU platform's, and a record of the pages that it writes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("nsa_backend_plugin.engine.indexer.forward", _rocm_forward, HookType.AROUND)
    HookRegistry.register("nsa_backend_plugin.ops.indexer_prep.reference.key_store", _record, HookType.AROUND)


def _rocm_forward(
    original: object,
    indexer: Any,
    x: object,
    q_lora: object,
    positions: object,
    forward_batch: Any,
    layer_id: int,
    return_indices: bool = True,
    **_: object,
) -> object:
    from sglang.srt.model_executor.forward_context import get_attn_backend

    from nsa_backend_plugin.engine import indexer as path

    backend = get_attn_backend()
    rows = backend.indexer_rows(forward_batch)
    embedding = indexer.rotary_emb
    embedding.cos_sin_cache = embedding.cos_sin_cache.float()  # as on GPUs; the CPU keeps it in the model's dtype
    indexer.layer_id = layer_id
    if forward_batch.forward_mode.is_decode_or_idle():
        rows = path.Rows(rows.page_table, None, rows.lengths, rows.page_table.shape[1] * 64)
    else:
        rows = path.Rows(rows.page_table, rows.request, rows.lengths, 0, seq_lens=forward_batch.seq_lens.int())
    pool = backend.token_to_kv_pool
    return path.store_and_select(indexer, x, q_lora, positions, forward_batch, pool, rows, return_indices)


def _record(original: Callable[[Any], None], call: Any) -> None:
    import torch

    original(call)
    folder = os.environ.get(PROBE_VARIABLE)
    if folder:
        tensors = dict(call.tensors())
        cache = tensors.pop("cache")
        names = ("is_neox", "hadamard", "norm", "eps", "layout", "page_size", "scale_format")
        stored = {"norm_bias": None, **tensors, "options": {name: getattr(call, name) for name in names}}
        torch.save({**stored, "pages_at": cache.data_ptr()}, f"{folder}/{next(_CALLS):05d}.call")
        torch.save(cache, f"{folder}/{cache.data_ptr()}.pages")
