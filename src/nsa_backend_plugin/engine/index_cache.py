"""The byte layout of the index-K pages as a property of the pool: declared once, asked by every reader and writer."""

from __future__ import annotations

from typing import Any

import torch

from nsa_backend_plugin import settings
from nsa_backend_plugin.ops.arch import device_arch, is_rocm

_TAG = "nsa_plugin_index_layout"


def chosen_layout(device: torch.device | str) -> str:
    """Layout that NSA_PLUGIN_INDEX_LAYOUT asks for on a device; auto = what its usual readers need."""
    choice = settings.get("NSA_PLUGIN_INDEX_LAYOUT")
    if choice != "auto":
        return str(choice)
    return "preshuffled" if is_rocm(device_arch(device)) else "row_major"


def declare_layout(pool: Any, layout: str) -> None:
    """Tag a pool with its writers' layout. Raises ValueError when it has another one already."""
    declared = getattr(pool, _TAG, layout)
    if declared != layout:
        raise ValueError(f"index-K pages are {declared}: cannot declare them {layout}")
    setattr(pool, _TAG, layout)


def layout_of(pool: Any) -> str:
    """Layout of a pool's pages. Raises ValueError for a pool that nobody has declared."""
    layout = getattr(pool, _TAG, None)
    if layout is None:
        raise ValueError(f"{type(pool).__name__} has no declared index-K layout: call declare_layout first")
    return layout


def pages(pool: Any, layer_id: int) -> tuple[torch.Tensor, str]:
    """([pages, page_size*132] uint8 of a layer, their layout). Raises ValueError as `layout_of`."""
    layout = layout_of(pool)
    return pool.get_index_k_with_scale_buffer(layer_id=layer_id), layout


def name_layout(runner: Any) -> None:
    """Name a layout that is not stock's in the KV dtype by which prefill and decode servers know one another.

    SGLang's decode server compares the name with its own when the two meet, and refuses another: pages travel as bytes.
    """
    layout = getattr(runner.token_to_kv_pool, _TAG, "row_major")
    if layout != "row_major" and layout not in runner.kv_cache_dtype_str:
        runner.kv_cache_dtype_str += f" with {layout} index keys"
