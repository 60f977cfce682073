"""Default mode: the bytes of a live server's index-K pages equal the reference writer's.

tests/rocm/test_server.py shows it of the other layout. A second plugin, made here and put on the server's path, records
what the indexer stores and the pages that result.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsa_backend_plugin.ops.index_key_cache.reference import quantize_rows
from nsa_backend_plugin.ops.indexer_prep.reference import normalize, rotate
from tests import sglang_plugin
from tests.engine.prompts import body

pytestmark = pytest.mark.engine

PROBE = """
import os, torch
calls = 0
def record(original, call):
    global calls
    original(call)
    tensors = dict(call.tensors())
    cache = tensors.pop("cache")
    options = {name: getattr(call, name) for name in ("is_neox", "norm", "eps", "layout", "page_size", "scale_format")}
    stored = {"norm_bias": None, **tensors, "options": options, "pages_at": cache.data_ptr()}
    torch.save(stored, f"{os.environ['PROBE_OUT']}/{calls:05d}.call")
    torch.save(cache, f"{os.environ['PROBE_OUT']}/{cache.data_ptr()}.pages")
    calls += 1
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    HookRegistry.register("nsa_backend_plugin.ops.indexer_prep.reference.key_store", record, HookType.AROUND)
"""
PROMPTS = [list(range(start, start + n)) for start, n in ((10, 5), (100, 70), (200, 200))]  # no common prefix


def _install_probe(folder: Path) -> None:
    sglang_plugin.declare(folder, "probe", "probe:register")
    (folder / "probe.py").write_text(PROBE)


def _value_offset(layout: str, token: int, dim: int) -> int:
    """The formulas of the layouts' definition, for pages of 64 tokens of 128 values."""
    if layout == "row_major":
        return token * 128 + dim
    return (token >> 4) * 2048 + (dim >> 4) * 256 + (token & 15) * 16 + (dim & 15)


def _write(page: torch.Tensor, layout: str, token: int, value: torch.Tensor, scale: torch.Tensor) -> None:
    page[[_value_offset(layout, token, d) for d in range(128)]] = value.view(torch.uint8)
    page[8192 + 4 * token : 8192 + 4 * token + 4] = scale.reshape(1).view(torch.uint8)


def test_live_pages_equal_the_reference_writer(models, start_server, tmp_path):
    probe, out = tmp_path / "probe", tmp_path / "out"
    probe.mkdir()
    out.mkdir()
    _install_probe(probe)
    env = {"PYTHONPATH": str(probe), "PROBE_OUT": str(out)}
    with start_server(models["dsa"], ("--skip-server-warmup",), env) as server:
        for prompt in PROMPTS:
            server.post("/generate", body(prompt, 8))
    calls = [torch.load(path) for path in sorted(out.glob("*.call"))]
    pages = {int(path.stem): torch.load(path) for path in out.glob("*.pages")}
    assert len(pages) == 3
    expected = {address: torch.zeros_like(page) for address, page in pages.items()}
    stored = 0
    for call in calls:
        assert call["options"]["layout"] == "row_major"
        assert call["options"]["page_size"] == 64
        assert call["options"]["scale_format"] == "fp32", "as CUDA's prefill stores keys"
        options = call["options"]
        normed = normalize(call["key"], call["norm_weight"], call["norm_bias"], options["norm"], options["eps"])
        rotated = rotate(normed, call["positions"], call["cos_sin_cache"], options["is_neox"], hadamard=True)
        values, scales = quantize_rows(rotated, "fp32", torch.float8_e4m3fn)
        for slot, value, scale in zip(call["slots"].tolist(), values, scales, strict=True):
            _write(expected[call["pages_at"]][slot // 64], "row_major", slot % 64, value, scale)
            stored += 1
    assert stored >= 3 * sum(len(p) for p in PROMPTS)
    for address, page in pages.items():
        assert torch.equal(page, expected[address])
