"""Deliberate faults inside a running server, for `test_ladder.py` only.

`install` becomes an entry point of SGLang's plugin group in that test's server. It wraps our torch implementations;
every wrapped call reads the fault in force from the file named by LADDER_FAULT_FILE, so that one server climbs the
whole ladder. With any other word in the file than a fault's name the originals run.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PAGE = 64
DROPPED = 0.1
SCALE_ERROR = 1.7
STALE_EVERY = 3  # one page of three is never written
ROPE_THETA = 10000.0  # of the model under test


def install() -> None:
    from nsa_backend_plugin.engine.cpu.backend import NsaPluginCpuBackend
    from nsa_backend_plugin.ops.indexer_prep import reference as indexer_prep
    from nsa_backend_plugin.ops.latent_cache import reference as latent_cache
    from nsa_backend_plugin.ops.sparse_mla import reference as sparse_mla
    from nsa_backend_plugin.ops.topk import reference as topk

    _wrap(topk, "select", _select)
    _wrap(sparse_mla, "attend", _attend)
    _wrap(indexer_prep, "rotate", _rotate)
    _wrap(latent_cache, "store", _store_latent)
    _wrap(indexer_prep, "write", _write_index_keys)
    _wrap(NsaPluginCpuBackend, "forward_decode", _forward)
    _wrap(NsaPluginCpuBackend, "forward_extend", _forward)


def _wrap(owner: Any, name: str, faulty: Callable[..., Any]) -> None:
    """`faulty(fault, original, *args, **kwargs)` stands in for `owner.name`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        fault = Path(os.environ["LADDER_FAULT_FILE"]).read_text().strip()
        return faulty(fault, original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _select(fault: str, original: Any, call: Any) -> torch.Tensor:
    logits = call.logits
    if fault == "random":
        logits = torch.rand_like(logits)
    elif fault == "bottom_k":
        logits = -logits
    elif fault == "shifted_by_one_page":  # every token stands where the one a page later belongs
        logits = torch.roll(logits, -PAGE, dims=1)
    elif fault == "last_window":
        logits = torch.arange(logits.shape[1], dtype=torch.float32).expand_as(logits)
    out = original(dataclasses.replace(call, logits=logits))
    if fault == "dropped":
        out[torch.rand(out.shape) < DROPPED] = -1
    return out


def _attend(fault: str, original: Any, call: Any) -> Any:
    scale = call.softmax_scale * (SCALE_ERROR if fault == "softmax_scale" else 1.0)
    return original(dataclasses.replace(call, softmax_scale=scale))


def _rotate(fault: str, original: Any, x: torch.Tensor, positions: Any, cos_sin: torch.Tensor, *args: Any) -> Any:
    is_key = x.dim() == 2  # queries have a head dimension
    if fault == "index_key_without_rope" and is_key:
        cosines, sines = cos_sin.chunk(2, dim=-1)
        cos_sin = torch.cat([torch.ones_like(cosines), torch.zeros_like(sines)], dim=-1)
    return original(x, positions, cos_sin, *args)


def _store_latent(fault: str, original: Any, call: Any) -> None:
    original(call)
    if fault == "stale_latent_page":
        _forget(call.cache, call.slots, rows_per_page=PAGE)


def _write_index_keys(
    fault: str, original: Any, value: Any, scale: Any, cache: Any, slots: torch.Tensor, **kwargs: Any
) -> None:
    original(value, scale, cache, slots, **kwargs)
    if fault == "stale_index_page":
        _forget(cache, slots, rows_per_page=1)


def _forget(cache: torch.Tensor, slots: torch.Tensor, rows_per_page: int) -> None:
    """One page of three is as the server allocated it. What an earlier rung left there could be right by chance."""
    pages = slots[slots >= 0].div(PAGE, rounding_mode="floor").unique()
    for page in pages[pages % STALE_EVERY == 1].tolist():
        cache[page * rows_per_page : (page + 1) * rows_per_page].zero_()


def _forward(fault: str, original: Any, *args: Any, k_rope: torch.Tensor, **kwargs: Any) -> Any:
    """The model hands k over rotated: turning it back by the same angles is what forgetting RoPE leaves."""
    if fault == "latent_key_without_rope":
        from nsa_backend_plugin.ops._torch.rotary import apply_rope

        width = k_rope.shape[-1]
        frequency = ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angle = args[5].positions[:, None] * frequency
        back = torch.cat([angle.cos(), -angle.sin()], dim=-1)
        k_rope = apply_rope(k_rope.reshape(-1, width), back, is_neox=False).to(k_rope.dtype).reshape(k_rope.shape)
    return original(*args, k_rope=k_rope, **kwargs)
