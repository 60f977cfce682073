"""KV pools of the CPU platform: SGLang's own, with the index-K layout declared and an exact mode."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MLATokenToKVPool

from nsa_backend_plugin import settings
from nsa_backend_plugin.engine import index_cache


class CpuMLATokenToKVPool(MLATokenToKVPool):
    def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any):
        """index_head_dim: passed to out-of-tree pools by 0.5.17 only, and refused by its own pool class."""
        super().__init__(*args, **kwargs)


class CpuDSATokenToKVPool(DSATokenToKVPool):
    """Latent rows and index-K pages. In exact mode both are float32 and the fp8 pages stay unused."""

    def __init__(self, *args: Any, **kwargs: Any):
        exact = settings.enabled("NSA_PLUGIN_EXACT")
        if exact:
            kwargs["dtype"] = torch.float32  # SGLang resolves the KV dtype of DSA models to bfloat16 or fp8 only
        super().__init__(*args, **kwargs)
        index_cache.declare_layout(self, index_cache.chosen_layout("cpu"))
        #: [slots, 128] float32 per layer, rotated keys; None outside exact mode.
        self.exact_index_keys: list[torch.Tensor] | None = None
        if exact:
            slots = self.size + self.page_size
            self.exact_index_keys = [torch.zeros(slots, self.index_head_dim) for _ in range(self.layer_num)]

    def get_cpu_copy(
        self, indices: torch.Tensor, mamba_indices: Any = None, req_pool_index: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Latent rows and index-K pages of the slots of a request that a decode server retracts.

        Stock's copy waits for CUDA. A layer that takes another one's top-k may have no pages.
        """
        pages = indices[:: self.page_size] // self.page_size
        both = zip(self.kv_buffer, self.index_k_with_scale_buffer, strict=True)
        return [(latent[indices], keys[pages] if len(keys) else keys) for latent, keys in both]

    def load_cpu_copy(
        self,
        kv_cache_cpu: list[tuple[torch.Tensor, torch.Tensor]],
        indices: torch.Tensor,
        mamba_indices: Any = None,
        req_pool_index: Any = None,
    ) -> None:
        """Write a copy to other slots."""
        pages = indices[:: self.page_size] // self.page_size
        buffers = zip(self.kv_buffer, self.index_k_with_scale_buffer, strict=True)
        for (latent, keys), (latent_copy, keys_copy) in zip(buffers, kv_cache_cpu, strict=True):
            latent[indices] = latent_copy
            if len(keys):
                keys[pages] = keys_copy
