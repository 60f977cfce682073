"""The out-of-tree CPU platform.

With it SGLang's `is_cpu()` and `is_cuda()` are both false, so that the native (torch) paths run and neither
`sgl_kernel` nor a GPU is needed. Activated by `plugin.activate_cpu_platform`. Nothing else of ours is imported with
this module: SGLang would report a failure here as its own, before `plugin.register` could say what it is.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from nsa_backend_plugin import BACKEND_NAME

logger = logging.getLogger(__name__)
#: Tokens in the cache when the user says nothing about memory: SGLang would take most of the machine's.
DEFAULT_TOKENS = 65536


class NsaPluginCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Every method that its base class leaves to a platform is here; `tests/engine/test_platform.py` lists them."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: Any) -> None:
        from nsa_backend_plugin.engine import launch

        if launch.selected(server_args) and (server_args.max_total_tokens, server_args.mem_fraction_static) == (
            None,
            None,
        ):
            server_args.max_total_tokens = DEFAULT_TOKENS
            logger.info("nsa_plugin keeps %d tokens on a CPU; --max-total-tokens changes that", DEFAULT_TOKENS)

    def get_device(self, device_id: int = 0) -> str:
        """SGLang takes it for --device, which is text, where the user gave none."""
        return self.device_type

    def get_default_attention_backend(self) -> str:
        return BACKEND_NAME

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        raise ValueError(f"--speculative-algorithm {algorithm}: nsa_plugin's CPU platform has none. Start without it")

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        from nsa_backend_plugin.engine import hooks
        from nsa_backend_plugin.engine.cpu import pools

        mla = MLATokenToKVPool if "mla_pool" in hooks.standing_down() else pools.CpuMLATokenToKVPool
        return {"mla": mla, "dsa": pools.CpuDSATokenToKVPool}.get(kind)

    def get_mla_kv_pool_cls(self) -> type | None:
        """Older releases ask for each pool by a method of its own."""
        return self.get_kv_pool_cls(kind="mla")

    def get_dsa_kv_pool_cls(self) -> type | None:
        return self.get_kv_pool_cls(kind="dsa")

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> Any:
        """None where SGLang's own allocator runs without Triton when the platform declares that it cannot."""
        from nsa_backend_plugin.engine import release

        if release.platform_declares_triton():
            return None
        from nsa_backend_plugin.engine.cpu import allocator

        return allocator.create

    def get_graph_runner_cls(self) -> type:
        raise ValueError("nsa_plugin's CPU platform captures no graphs: start without --enable-torch-compile")

    def get_piecewise_backend_cls(self) -> type:
        raise ValueError("nsa_plugin's CPU platform captures no graphs: start with --disable-cuda-graph")

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        """A name of our own: under "CPU" SGLang has that activity already, and would start its profiler twice."""
        return self.device_name

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False


def active() -> bool:
    """Whether SGLang runs on this platform."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, NsaPluginCpuPlatform)
