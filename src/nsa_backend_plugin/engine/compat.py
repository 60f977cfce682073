"""The differences between supported SGLang releases, found by looking at what is there, not at version numbers."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

OLDEST = (0, 5, 17)
NEWEST = (0, 5, 23)


def version() -> str:
    """Version of the installed SGLang."""
    return importlib.metadata.version("sglang")


def supported(release: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", release)
    return numbers is not None and OLDEST <= tuple(int(n) for n in numbers.groups()) <= NEWEST


def require_supported() -> None:
    """Raise ValueError when the installed SGLang is outside the range the hooks were written for."""
    if not supported(version()):
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ValueError(
            f"SGLang {version()} is not supported by nsa_plugin: install sglang {oldest} to {newest}, or choose "
            "another --attention-backend"
        )


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of resolved arguments: a method, in newer releases a function."""
    if hasattr(server_args, "get_model_config"):
        return server_args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(server_args)


def platform_declares_triton() -> bool:
    """Whether SGLang asks the platform if Triton can run (`capabilities.supports_triton`); older ones look at names."""
    from sglang.srt.platforms.interface import SRTPlatform

    return hasattr(SRTPlatform, "capabilities")
