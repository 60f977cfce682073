"""What a server guesses over a hierarchical cache, for tests alone: a plugin of SGLang that writes it down.

While a file names a part of the draft's cache, that part does not come back with the rest, as the index keys of SGLang
0.5.17: zeros are in its place, because what lies there on the device may be the same prompt's by chance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsa_backend_plugin.layouts import INDEX_PAGE_SIZE
from tests import sglang_plugin

#: What a draft layer has of a token: SGLang's class of its place on the host, its place on the device, tokens of a row.
PARTS = {
    "latent rows": ("MLATokenToKVPoolHost", "kv_buffer", 1),
    "index keys": ("DSAIndexerPoolHost", "index_k_with_scale_buffer", INDEX_PAGE_SIZE),
}


class Recorder:
    """Of one server, in a folder of its own."""

    def __init__(self, folder: Path):
        sglang_plugin.declare(folder, "reloaded_drafts", "tests.engine.reloaded_drafts:register")
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self._drafts, self._left_out = folder / "drafts", folder / "left_out"
        self.environment = {"PYTHONPATH": path, "CHAINS": str(self._drafts), "LEFT_OUT": str(self._left_out)}

    def leave_out(self, part: str) -> None:
        """From now on; "" is nothing."""
        self._left_out.write_text(part)

    def lines(self) -> list[str]:
        return self._drafts.read_text().splitlines() if self._drafts.exists() else []


def chains(lines: list[str], tokens: list[int]) -> dict[int, list[int]]:
    """The drafts of an answer's verifications by the place of the token that they follow.

    Raises ValueError when the lines are another answer's.
    """
    found, place = {}, 0
    for line in lines:
        right, (known, *drafts) = json.loads(line)
        if known != tokens[place]:
            raise ValueError(f"drafts after token {known}, and the answer has {tokens[place]} at {place}")
        found[place] = drafts
        place += right + 1
    return found


def write(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One line for each request that is verified: how many of its drafts were right, the known token, the drafts."""
    result = original(*args, **kwargs)
    with Path(os.environ["CHAINS"]).open("a") as file:
        for right, row in zip(result[2].tolist(), kwargs["candidates"].tolist(), strict=True):
            file.write(json.dumps([right, row]) + "\n")
    return result


def load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The copies from the host to the device, without those that are left out."""
    file, copies = Path(os.environ["LEFT_OUT"]), original(*args, **kwargs)
    left_out = file.read_text() if file.exists() else ""
    if not left_out:
        return copies
    host, device, tokens = PARTS[left_out]
    spoilt = [one for one in copies if one.is_draft and type(one.host_pool).__name__ == host]
    for one in spoilt:
        rows = one.device_indices[::tokens] // tokens
        getattr(one.device_pool, device)[0].view(torch.uint8)[rows] = 0
    return [one for one in copies if all(one is not other for other in spoilt)]


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    controller = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
    HookRegistry.register(f"{controller}._l2_load_transfers", load, HookType.AROUND)
    HookRegistry.register("sglang.srt.speculative.eagle_utils.verify_tree_greedy_func", write, HookType.AROUND)
