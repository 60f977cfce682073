"""A server on a simulated ROCm host: preshuffled pages of 64 tokens, AITER or not, right answers, right bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nsa_backend_plugin import serving
from nsa_backend_plugin.commands import demo
from nsa_backend_plugin.ops.index_key_cache.reference import quantize_rows
from nsa_backend_plugin.ops.indexer_prep.reference import normalize, rotate
from tests import sglang_plugin
from tests.engine.conftest import SERVER_ENV
from tests.engine.test_index_pages import _write
from tests.processes import HANGS_AFTER
from tests.rocm import simulated_host

pytestmark = pytest.mark.engine
EXAMPLES = simulated_host.ROOT / "examples"
#: name -> (architecture, fp8 flavour, its largest value, simulated Triton, AITER installed)
HOSTS = {
    "gfx942 with AITER": ("gfx942", torch.float8_e4m3fnuz, 240.0, "3.6.0", "1"),
    "gfx950, Triton 3.4, no AITER": ("gfx950", torch.float8_e4m3fn, 448.0, "3.4.0", "0"),
}


@dataclass
class Served:
    name: str
    log: str
    questions: int
    right: int
    calls: list[dict]
    pages: dict[int, torch.Tensor]


@pytest.fixture(scope="module", params=HOSTS)
def served(request, tmp_path_factory) -> Served:
    arch, _, _, triton, aiter = HOSTS[request.param]
    site, out = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("out")
    sglang_plugin.declare(site, "forks", "tests.sglang_plugin:fork")
    env = {
        **SERVER_ENV,
        **simulated_host.write_site(site),
        simulated_host.ARCH_VARIABLE: arch,
        simulated_host.TRITON_VARIABLE: triton,
        simulated_host.AITER_VARIABLE: aiter,
        simulated_host.PROBE_VARIABLE: str(out),
    }
    log = site / "server.log"
    questions = demo.load_questions(EXAMPLES / "demo" / "problems.jsonl")[:3]
    model: Path = EXAMPLES / "models" / "tiny-dsa"
    args = [*serving.CPU_ARGS, "--skip-server-warmup"]
    with serving.Server(model, args, env, log_path=log, timeout=HANGS_AFTER) as server:
        right = demo.ask_all(server, questions)
    calls = [torch.load(path) for path in sorted(out.glob("*.call"))]
    pages = {int(path.stem): torch.load(path) for path in out.glob("*.pages")}
    return Served(request.param, log.read_text(), len(questions), right, calls, pages)


def test_answers_are_right(served):
    assert served.right == served.questions


def test_pages_of_64_by_our_decision(served):
    """Without our hook this host gets page size 1: see test_pages.py."""
    assert "nsa_plugin hook in use: rocm_pages" in served.log
    assert "Setting page size to 64 for DeepSeek DSA." in served.log
    assert "page size to 1 " not in served.log


def test_registry_picks_aiter_only_where_it_is(served):
    with_aiter = HOSTS[served.name][-1] == "1"
    for function in ("fp8_mqa_logits", "mla_decode_fwd"):
        assert (f"fake aiter in use: {function}" in served.log) is with_aiter
    # The model has fewer index heads than AITER's paged kernel is compiled for.
    declined = re.search(r"mqa_logits\.paged: aiter declines .*: 4 heads: a power of two from 16 on only", served.log)
    assert (declined is not None) is with_aiter
    assert "fake aiter in use: deepgemm_fp8_paged_mqa_logits" not in served.log
    assert ("aiter is not installed" in served.log) is not with_aiter


def test_live_pages_equal_the_reference_writer(served):
    _, dtype, largest, _, _ = HOSTS[served.name]
    expected = {address: torch.zeros_like(page) for address, page in served.pages.items()}
    reached = 0.0
    for call in served.calls:
        options = call["options"]
        assert (options["layout"], options["page_size"]) == ("preshuffled", 64)
        normed = normalize(call["key"], call["norm_weight"], call["norm_bias"], options["norm"], options["eps"])
        cos_sin = call["cos_sin_cache"]
        rotated = rotate(normed, call["positions"], cos_sin, options["is_neox"], hadamard=options["hadamard"])
        values, scales = quantize_rows(rotated, options["scale_format"], dtype)
        reached = max(reached, float(values.detach().float().abs().max()))
        for slot, value, scale in zip(call["slots"].tolist(), values, scales, strict=True):
            _write(expected[call["pages_at"]][slot // 64], "preshuffled", slot % 64, value, scale)
    assert reached == largest
    assert len(served.pages) == 3
    for address, page in served.pages.items():
        assert torch.equal(page, expected[address])
        values = page[:, : 64 * 128].contiguous().view(dtype)
        assert not torch.isnan(values.float()).any(), "0x80 is NaN in e4m3fnuz, 0x7F and 0xFF are in e4m3fn"
