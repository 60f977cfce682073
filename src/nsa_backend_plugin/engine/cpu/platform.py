"""The out-of-tree CPU platform.

With it SGLang's `is_cpu()` and `is_cuda()` are both false, so that the native (torch) paths run and neither
`sgl_kernel` nor a GPU is needed. Activated by `plugin.activate_cpu_platform`.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import release


class NsaPluginCpuPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return BACKEND_NAME

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

    def get_paged_allocator_cls(self) -> Any:
        """None where SGLang's own allocator runs without Triton when the platform declares that it cannot."""
        if release.platform_declares_triton():
            return None
        from nsa_backend_plugin.engine.cpu import allocator

        return allocator.create

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False


def active() -> bool:
    """Whether SGLang runs on this platform."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, NsaPluginCpuPlatform)
