"""Triton implementation of the latent cache: the kernels live in `_triton_pack.py` and `_triton_store.py`."""

from __future__ import annotations

from nsa_backend_plugin.ops._triton import support
from nsa_backend_plugin.ops.latent_cache import _triton_pack, _triton_store

available = support.available
declines_quantize = _triton_pack.declines_quantize
declines_dequantize = _triton_pack.declines_dequantize
declines_store = _triton_store.declines_store
quantize = _triton_pack.quantize
dequantize = _triton_pack.dequantize
store = _triton_store.store
