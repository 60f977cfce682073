"""Decode context parallelism on a CPU, for tests alone: what our backends of a GPU do with their share, in torch.

`register` is a plugin of SGLang for the servers of a test, in Triton's interpreter. It lifts our refusal and gives our
backend of the CPU the share of `engine.gpu.shards`. The rest is SGLang's own: allocation, what is written and gathered,
and the merge of the answers, between two processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nsa_backend_plugin.engine.gpu import shards
from nsa_backend_plugin.ops import dense_mla, sparse_mla
from tests import sglang_plugin


def environment(folder: Path) -> dict[str, str]:
    """Of a server with the plugin."""
    if not (folder / "cpu_dcp-0.dist-info").exists():
        sglang_plugin.declare(folder, "cpu_dcp", "tests.engine.cpu_dcp:register")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}


def attend(
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
    topk_indices: torch.Tensor | None = None,
) -> Any:
    """`forward_decode` and `forward_extend` of a batch of any mode."""
    from sglang.srt.runtime_context import get_parallel

    from nsa_backend_plugin.engine import query

    share, pool, rows = shards.Share.of(get_parallel()), backend.token_to_kv_pool, backend._rows
    pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, k_rope)
    q_all = query.absorbed(q, q_rope, layer)
    kv = pool.get_key_buffer(layer.layer_id)
    if topk_indices is not None:
        selected, lengths = share.selected(topk_indices)
        return shards.answer(*sparse_mla.attend(q_all, kv, selected, layer.scaling, lengths=lengths, return_lse=True))
    if forward_batch.forward_mode.is_decode():
        table, lengths = share.page_table(rows.block_table()), share.lengths(rows.lengths)
        found = dense_mla.decode(q_all, kv, table, lengths, layer.scaling, page_size=backend.page_size, return_lse=True)
        return shards.answer(*found)
    gathered = forward_batch.attn_dcp_metadata
    places = gathered.dcp_kv_indices.split(forward_batch.seq_lens.tolist())
    table = torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True)[rows.request.long()]
    out = dense_mla.decode(q_all, gathered.dcp_kv_buffer, table, rows.lengths, layer.scaling, page_size=1)
    return out.flatten(1)


def on_any_device(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """SGLang makes groups of GPUs only that split contexts."""
    from sglang.srt.distributed import parallel_state

    with mock.patch.object(parallel_state, "is_cuda", return_value=True):
        return original(*args, **kwargs)


def allocator_of_the_group(original: Callable[..., Any], platform: Any) -> Any:
    """Before 0.5.22 SGLang forgets, of a platform's own allocator, that it hands out the slots of all GPUs."""
    create = original(platform)

    def made(size: int, *, page_size: int, **rest: Any) -> Any:
        from sglang.srt.runtime_context import get_parallel, get_schedule

        factor = get_parallel().dcp_size if page_size == get_schedule().page_size else 1
        return create(size * factor, page_size=page_size * factor, **rest)

    return create and made


def register() -> None:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from nsa_backend_plugin.engine import arguments
    from nsa_backend_plugin.engine.cpu.backend import NsaPluginCpuBackend

    for name in ("all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor"):
        # SGLang registers them as operators of a GPU.
        setattr(GroupCoordinator, name, getattr(GroupCoordinator, f"_{name}"))
    on_cpu: Any = arguments.ON_DEVICE["cpu"]
    on_cpu.pop("dcp_size", None)
    for name in ("forward_decode", "forward_extend"):
        setattr(NsaPluginCpuBackend, name, attend)
    for target, handler in (
        ("sglang.srt.distributed.parallel_state.initialize_model_parallel", on_any_device),
        ("nsa_backend_plugin.engine.cpu.platform.NsaPluginCpuPlatform.get_paged_allocator_cls", allocator_of_the_group),
    ):
        HookRegistry.register(target, handler, HookType.AROUND)
