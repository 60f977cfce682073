"""Installation of the ledger's rows, and what has run of them in this process."""

from __future__ import annotations

import functools
import importlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine.ledger import LEDGER, Hook

logger = logging.getLogger(__name__)

#: How often each hook, or what its patch calls instead, has served in this process, by row name.
FIRED: Counter[str] = Counter()
#: Names of the rows that were installed: a draft model's backend comes after the model's own.
_installed: set[str] = set()


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


def fired(name: str) -> None:
    """Count that a hook, or the patch in its place, served a model of ours, and log the first time.

    A handler says so when it has decided to serve: what it hands back to SGLang does not count.
    """
    FIRED[name] += 1
    if FIRED[name] == 1:
        logger.info("nsa_plugin %s in use: %s", "patch" if name in standing_down() else "hook", name)


def _install(row: Hook) -> None:
    if row.patched:
        if row.patch_point:
            module, name = row.patch_point.rsplit(".", 1)
            getattr(importlib.import_module(module), name).append(_late(row.handler))
        return
    if row.kind == "op":
        from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

        Indexer.register_oot_forward(Indexer, _late(row.handler), "native")
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(row.path, _late(row.handler), HookType.AROUND)


def _late(handler: str) -> Callable[..., Any]:
    """The handler "module:function", imported when it first runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return _imported(handler)(*args, **kwargs)

    return run


@functools.cache
def _imported(handler: str) -> Callable[..., Any]:
    module, function = handler.split(":")
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
