"""What an SGLang with every patch does in place of our hooks, as JSON: `python patched_probe.py MODEL`, a DSA model.

{"ours": targets of our hooks in SGLang's registry, "down": rows that stand down, "resolution": handlers at its patch
point, "points": per row of the GPU path what its patch point gained and what the patched function then does,
"prepared": what the patched model code returned for a backend that prepares and for one that declines, "rocm": what
ROCm's own method, where there is one, returned for a backend that prepares, "refused": the error of a launch with
another page size, "pool": class of the MLA pool}
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import prepare_server_args

from nsa_backend_plugin.engine import hooks, ledger

load_plugins()
ROWS = {row.name: row for row in ledger.LEDGER}


def our_hooks() -> list[str]:
    return [
        t for t, entries in HookRegistry._hooks.items() if any("nsa_backend" in h.__module__ for _, h, _ in entries)
    ]


def patch_point(name: str) -> list[Any]:
    module, point = ROWS[name].patch_point.rsplit(".", 1)
    return getattr(importlib.import_module(module), point)


def with_handler(name: str, handler: Any, call: Any) -> dict[str, Any]:
    """Install a row, then see what the patched function does under a handler of the test's."""
    before = len(patch_point(name))
    hooks._install(ROWS[name])
    gained = len(patch_point(name)) - before
    patch_point(name)[:] = []
    stock = str(call()) if name == "rocm_pages" else None
    patch_point(name)[:] = [handler]
    return {"gained": gained, "stock": stock, "wrapped": call()}


def echo(original: Any, *args: Any, **kwargs: Any) -> list[Any]:
    return [original.__name__, args, kwargs]


def points() -> dict[str, Any]:
    from sglang.srt.layers.attention.dsa import utils
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.model_executor.model_runner_components import load_model_utils
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_mha import DeepseekMHAForwardMixin
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    calls = {
        "vocabulary": lambda: TokenizerManager._validate_one_request("manager", "request", [1]),
        "rocm_indexer": lambda: Indexer.forward_cuda("indexer", 1, layer_id=2),
        "draft_backends": lambda: DraftBackendFactory._create_backend("factory", "name", 1),
        "prefill_key": lambda: DeepseekMHAForwardMixin._concat_and_cast_mha_k("attn", "nope", "pe", forward_batch=3),
        "merged_weights": lambda: load_model_utils.load_model_with_memory_saver(device="cpu"),
        "weight_updates": lambda: SchedulerWeightUpdaterManager._observe_weight_load("manager", "disk"),
    }
    pages = with_handler("rocm_pages", lambda decide: not decide(), utils.aiter_can_use_preshuffle_paged_mqa)
    return {"rocm_pages": pages, **{name: with_handler(name, echo, call) for name, call in calls.items()}}


def prepared() -> dict[str, Any]:
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mla

    prepare = forward_mla.DeepseekMLAForwardMixin.forward_absorb_prepare
    forward_mla.get_attn_backend = lambda: SimpleNamespace(prepare_absorbed=lambda *args: args)
    taken = prepare("attn", 1, 2, 3, 4, prev_topk_indices=5)
    asked: list[Any] = []
    forward_mla.get_attn_backend = lambda: SimpleNamespace(prepare_absorbed=lambda *args: asked.extend(args))
    attn = SimpleNamespace()
    with contextlib.suppress(AttributeError):  # SGLang's own code begins, with an `attn` that has nothing
        prepare(attn, 1, 2, 3, 4)
    return {"taken": taken, "declined_then_stock": len(asked) == 7 and hasattr(attn, "_q8kv8_qprep_overlap_pending")}


def prepared_on_rocm() -> Any:
    try:
        from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mla_rocm
    except ImportError:
        return None
    forward_mla_rocm.get_attn_backend = lambda: SimpleNamespace(prepare_absorbed=lambda *args: args)
    prepare = forward_mla_rocm.DeepseekMLARocmForwardMixin.forward_absorb_rocm_prepare
    return prepare("attn", 1, 2, 3, 4, prev_topk_indices=5)


def refused() -> str | None:
    argv = [f"--model-path={sys.argv[1]}", "--attention-backend=nsa_plugin", "--device=cpu", "--page-size=32"]
    try:
        arguments = prepare_server_args(argv)
        if hasattr(arguments, "resolve_once"):
            arguments.resolve_once()
    except ValueError as error:
        return str(error)
    return None


def mla_pool() -> str | None:
    """The class that SGLang's builder makes when the platform names SGLang's own class, where there is a builder."""
    from sglang.srt.mem_cache import kv_cache_configurator as configurator
    from sglang.srt.platforms import current_platform

    build = getattr(configurator.KVCacheConfigurator, "_build_oot_mla_kv_pool", None)
    if build is None:
        return None
    configurator.get_exec = lambda: SimpleNamespace(features=SimpleNamespace(enable_memory_saver=False))
    itself = SimpleNamespace(
        pool_page_size=64,
        kv_cache_dtype=torch.float32,
        model_config=SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128),
        layer_info=SimpleNamespace(num_effective_layers=1, start_layer=0, end_layer=1),
        device="cpu",
    )
    assert current_platform.get_mla_kv_pool_cls() is not None
    return type(build(itself, max_total_num_tokens=64, is_dsa_model=False)).__name__


report = {
    "ours": our_hooks(),
    "down": hooks.standing_down(),
    "resolution": len(patch_point("resolution")),
    "refused": refused(),
    "points": points(),
    "prepared": prepared(),
    "rocm": prepared_on_rocm(),
    "pool": mla_pool(),
}
print("\n" + json.dumps(report))
