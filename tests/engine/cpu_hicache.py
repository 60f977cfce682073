"""A hierarchical cache with drafts on a CPU, for tests alone: stand-ins for copies to pinned memory and back.

`register` is a plugin of SGLang for the servers of a test. The rest is SGLang's own: which pages leave and come back,
where a draft's lie behind the model's, and files.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch

from tests.engine import cpu_drafts

#: The copies that `copy_rows` stands in for.
ARGS = ("--enable-hierarchical-cache", "--hicache-io-backend=direct", "--hicache-mem-layout=layer_first")


def copy_rows(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices.long()] = source[src_indices.long()].view(target.dtype)


def register() -> None:
    from nsa_backend_plugin.engine import arguments

    cpu_drafts.register()
    on_cpu: Any = arguments.ON_DEVICE["cpu"]
    on_cpu.pop("enable_hierarchical_cache", None)
    for module, name in (("mla", "MLATokenToKVPoolHost"), ("dsa", "DSAIndexerPoolHost")):
        places: Any = importlib.import_module(f"sglang.srt.mem_cache.pool_host.{module}")
        places.transfer_kv_direct = copy_rows
        place = getattr(places, name)
        place.__init__ = functools.partialmethod(place.__init__, pin_memory=False)
