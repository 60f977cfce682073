"""Speculative decoding on a CPU, for tests alone: stand-ins for what SGLang's chains of drafts launch on a GPU.

`register` is a plugin of SGLang for the servers of a test. It lifts our refusal, and does in torch what SGLang does in
Triton and CUDA, for drafts that do not branch. The rest is SGLang's own: its workers, its scheduler, and what a prefill
server sends of a draft. The attention backend is ours of the CPU, with the rows of verification and of drafts.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from examples import make_random_model as tiny
from tests import sglang_plugin

LAYERS = 3
#: What SGLang appends to the caches of the layers, for the draft's own layer.
PARTS = ("latent rows", "index keys")


def write_model(kind: str, folder: Path) -> Path:
    """A random model of `tiny.write_model` whose last layer became its next-token layer, without a word to say."""
    tiny.write_model(kind, folder, overrides={"num_hidden_layers": LAYERS + 1})
    weights, width = load_file(folder / "model.safetensors"), tiny.COMMON["hidden_size"]
    generator = torch.Generator().manual_seed(7)
    added = {f"{norm}.weight": torch.ones(width) for norm in ("enorm", "hnorm", "shared_head.norm")}
    added["eh_proj.weight"] = torch.randn(width, 2 * width, generator=generator) * (2 * width) ** -0.5
    added["shared_head.head.weight"] = weights["lm_head.weight"].clone()
    added["embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights |= {f"model.layers.{LAYERS}.{name}": weight.bfloat16() for name, weight in added.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    of_each_layer = {name: value[:LAYERS] for name, value in config.items() if name.endswith("_types")}
    path.write_text(json.dumps(config | of_each_layer))
    return folder


def environment(folder: Path, name: str) -> dict[str, str]:
    """Of a server with the plugin, which writes its drafts into folder / name, and reads folder / "spoilt"."""
    if not (folder / "cpu_drafts-0.dist-info").exists():
        sglang_plugin.declare(folder, "cpu_drafts", "tests.engine.cpu_drafts:register")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "DRAFTS": str(folder / name), "SPOILT": str(folder / "spoilt")}


class Launched:
    """Stands for a Triton kernel: `kernel[grid](...)` calls a function."""

    def __init__(self, function: Callable[..., None]):
        self._function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._function


def _slots(table: torch.Tensor, requests: torch.Tensor, starts: torch.Tensor, count: int) -> torch.Tensor:
    columns = starts.long()[:, None] + torch.arange(count)
    return table[requests.long()[:, None], columns].flatten().long()


def draft_slots(
    requests: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, out: torch.Tensor, *_: Any, **unused: Any
) -> None:
    out.copy_(_slots(table, requests, starts, len(out) // len(starts)))


def verified_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    draft_token_num: int,
    **unused: Any,
) -> torch.Tensor:
    return _slots(req_to_token, req_pool_indices, start_offset, draft_token_num)


def reserve(
    requests: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, slots: torch.Tensor, *_: Any
) -> None:
    first = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[request, start:end] = slots[first : first + end - start].to(table.dtype)
        first += end - start


def bonus_tokens(accepted: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, width: int) -> None:
    out.copy_(accepted.view(-1, width).gather(1, counts.long()[:, None] - 1)[:, 0])


def chain(
    parents: torch.Tensor,
    selected: torch.Tensor,
    seq_lens: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
    *_: Any,
) -> None:
    """A tree of drafts that does not branch. Our backend reads no mask."""
    requests, width = index.shape
    positions.copy_((seq_lens[:, None] + torch.arange(width)).flatten())
    index.copy_(torch.arange(requests * width).view(requests, width))
    next_token.copy_(torch.tensor([*range(1, width), -1]).expand(requests, width))
    next_sibling.fill_(-1)


def verify(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    target_predict: torch.Tensor,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the drafts before the first that the model would not have chosen, and write all of them down."""
    width = candidates.shape[1]
    for request, (drafts, chosen) in enumerate(zip(candidates.tolist(), target_predict.tolist(), strict=True)):
        right = next((n for n in range(width - 1) if drafts[n + 1] != chosen[n]), width - 1)
        rows = torch.arange(right + 1) + request * width
        predicts[rows] = target_predict[request, : right + 1].to(predicts.dtype)
        accept_index[request, : right + 1] = rows.to(accept_index.dtype)
        accept_token_num[request] = right
        with Path(os.environ["DRAFTS"]).open("a") as file:
            file.write(json.dumps(drafts) + "\n")
    return predicts, accept_index, accept_token_num


def send(original: Callable[..., Any], sender: Any, *args: Any, **kwargs: Any) -> Any:
    """While a file names a part of the draft's cache, send the first layer's in its place."""
    file, caches = Path(os.environ["SPOILT"]), sender.kv_mgr.kv_args
    spoilt = file.read_text() if file.exists() else ""
    for part, pointers in zip(PARTS, (caches.kv_data_ptrs, *caches.state_data_ptrs), strict=False):
        own = _OWN.setdefault(part, pointers[-1])
        pointers[-1] = pointers[0] if part == spoilt else own
    return original(sender, *args, **kwargs)


_OWN: dict[str, int] = {}


def _rows(backend: Any, batch: Any, step: int) -> Any:
    """Of a batch of any mode. step: of the draft; its batch is the first step's."""
    from nsa_backend_plugin.engine.cpu import metadata

    mode = batch.forward_mode
    written = batch.spec_info.draft_token_num if mode.is_target_verify() else step
    shown = SimpleNamespace(
        seq_lens=batch.seq_lens + written,  # SGLang counts the tokens that draft-extend writes, but not those
        req_pool_indices=batch.req_pool_indices,
        forward_mode=mode,
        positions=batch.positions + (step - 1 if step else 0),
        extend_seq_lens=torch.full_like(batch.seq_lens, written) if mode.is_target_verify() else batch.extend_seq_lens,
    )
    return metadata.token_rows(shown, backend.req_to_token_pool.req_to_token, backend.page_size)


def _draft_backends() -> None:
    """Give the backend of the CPU the rows of every mode, and a draft its backends."""
    from nsa_backend_plugin.engine.cpu.backend import NsaPluginCpuBackend

    class Steps:
        """One backend for each step of the draft but the last, which only chooses."""

        def __init__(self, runner: Any, steps: int):
            self.attn_backends = [NsaPluginCpuBackend(runner) for _ in range(steps - 1)]

        def init_forward_metadata(self, forward_batch: Any) -> None:
            for number, backend in enumerate(self.attn_backends):
                backend._rows = _rows(backend, forward_batch, number + 1)

    def prepare(backend: Any, forward_batch: Any, in_capture: bool = False) -> None:
        backend._rows = _rows(backend, forward_batch, 0)

    def draft_backend(backend: Any, factory: Any, per_step: bool) -> Any:
        runner = factory.draft_model_runner
        return Steps(runner, factory.speculative_num_steps) if per_step else NsaPluginCpuBackend(runner)

    changes: dict[str, Any] = {"init_forward_metadata_out_graph": prepare, "draft_backend": draft_backend}
    for name, function in changes.items():
        setattr(NsaPluginCpuBackend, name, function)


def _replace(module: str, name: str, stand_in: Any) -> None:
    """In its module, and wherever it was imported from there."""
    home = importlib.import_module(module)
    original = getattr(home, name, home)
    setattr(home, name, stand_in)
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get(name) is original:
            setattr(other, name, stand_in)


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from nsa_backend_plugin.engine import arguments
    from nsa_backend_plugin.engine.cpu.platform import NsaPluginCpuPlatform
    from nsa_backend_plugin.engine.gpu import drafts

    on_cpu: Any = arguments.ON_DEVICE["cpu"]
    on_cpu.pop("speculative_algorithm", None)
    for question in ("supports_speculative_algorithm", "supports_speculative_draft_attention_backend"):
        setattr(NsaPluginCpuPlatform, question, lambda *args, **kwargs: True)
    _draft_backends()
    factory = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"
    HookRegistry.register(factory, drafts.create_backend, HookType.AROUND)
    HookRegistry.register("sglang.srt.disaggregation.mooncake.conn.MooncakeKVSender.send", send, HookType.AROUND)
    torch.cuda.synchronize = lambda device=None: None
    allocation, kernels = "sglang.srt.mem_cache.allocation", "sglang.kernels.ops.speculative"
    _replace(allocation, "get_last_loc", importlib.import_module(allocation).get_last_loc_torch)
    _replace(allocation, "assign_req_to_token_pool", Launched(reserve))
    _replace(f"{kernels}.cache_locs", "assign_draft_cache_locs_contiguous", Launched(draft_slots))
    _replace(f"{kernels}.cache_locs", "assign_extend_cache_locs_func", verified_slots)
    _replace(f"{kernels}.eagle", "fill_bonus_tokens", Launched(bonus_tokens))
    tree = f"{kernels}.spec_tree"
    if not hasattr(importlib.import_module(tree), "verify_tree_greedy_func"):  # an older release
        tree = "sglang.srt.speculative.eagle_utils"
    _replace(tree, "sgl_build_tree_kernel_efficient", chain)
    _replace(tree, "reject_out_of_tree_path", lambda *args, **kwargs: None)
    _replace(tree, "verify_tree_greedy_func", verify)
