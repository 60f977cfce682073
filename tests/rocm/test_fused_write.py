"""The fused decode path on ROCm: one call of AITER rotates the query and writes the latent row; without it, ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from nsa_backend_plugin.engine.gpu import rocm
from nsa_backend_plugin.ops import arch as archs
from nsa_backend_plugin.ops import dispatch
from tests.rocm import simulated_host

pytest.importorskip("sglang", reason="needs SGLang")
from tests.engine.test_fused_decode import HEADS, PAGES, Case

FUSED = "aiter.ops.triton.fused_kv_cache"
FLAVOURS = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """AITER's fake where the parameter says so; the list grows by the arguments that matter of each fused call."""
    seen: list[dict] = []
    dispatch.forget()
    if request.param:
        simulated_host.install_fakes(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
        fused = sys.modules[FUSED].fused_qk_rope_cat_and_cache_mla

        def record(*args: object, **kwargs: object) -> object:
            seen.append({"query": tuple(args[1].shape), "q_out": kwargs["q_out"]})
            return fused(*args, **kwargs)

        monkeypatch.setattr(sys.modules[FUSED], "fused_qk_rope_cat_and_cache_mla", record)
    yield seen
    dispatch.forget()


@pytest.mark.parametrize("calls", [True, False], indirect=True, ids=["AITER", "no AITER"])
@pytest.mark.parametrize("arch", FLAVOURS)
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_query_and_latent_row_of_one_step(calls: list, arch: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, packed=False, is_neox=False, merged=False)
    if kv == "fp8":
        case.latent = torch.zeros(PAGES * 64, 1, 576).to(FLAVOURS[arch])
    empty = case.latent.clone()
    q_rope, _, q_nope, *_ = case.prepare()
    want, case.latent = case.latent, empty

    monkeypatch.setattr(rocm, "on_rocm", lambda: True)
    monkeypatch.setitem(archs._KNOWN, torch.device("cpu"), arch)
    got_rope, _, got_nope, *_ = case.prepare()
    assert torch.equal(got_rope, q_rope)
    assert torch.equal(got_nope, q_nope)
    assert torch.equal(case.latent.view(torch.uint8), want.view(torch.uint8))
    assert case.latent[case.slots].view(torch.uint8).any(dim=-1).all(), "every token's row was written"
    if "aiter" in sys.modules:
        [call] = calls
        assert call["query"] == (case.tokens, HEADS, 64)
        assert call["q_out"].data_ptr() == got_nope.data_ptr()
    else:
        assert calls == []


@pytest.mark.parametrize("dtype", FLAVOURS.values(), ids=str)
def test_fp8_checkpoints_take_the_fused_path(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang keeps their W_UK in fp8 with one scale on ROCm, and its fused norms hand over (fp8, scale, bf16)."""
    case = Case(monkeypatch, packed=False, is_neox=True, merged=False)
    monkeypatch.setattr(rocm, "on_rocm", lambda: True)
    scale = torch.tensor(1 / 32)
    quantized = (case.attn.w_kc / scale).to(dtype)
    case.attn.w_kc = quantized.to(torch.bfloat16) * scale
    want = case.prepare()
    rocm.merge_key_weight(case.attn)
    assert rocm.key_weight(case.attn) is case.attn.w_kc, "bf16 needs no copy"

    case.attn.w_kc, case.attn.w_scale = quantized, scale
    assert case.prepare() == "stock", "the copy is made at load, not at the first call"
    rocm.merge_key_weight(case.attn)
    plain, wk = case.hidden, case.indexer.wk
    case.indexer.wk = lambda x: wk(x[2])
    case.hidden = (plain.to(dtype), torch.ones(case.tokens, 1), plain)
    got = case.prepare()
    for place in (0, 2, 7):  # both parts of the query, the slots
        assert torch.equal(got[place], want[place])
    case.attn.w_kc.copy_(quantized.flip(0))  # an update of weights
    copy = rocm.key_weight(case.attn)
    getattr(case.attn, rocm._KEY_WEIGHT).rebuild()
    assert rocm.key_weight(case.attn) is copy
    assert torch.equal(copy, case.attn.w_kc.to(torch.bfloat16) * scale)
    case.hidden = case.hidden[:2]  # no bf16 part for the head gate
    assert case.prepare() == "stock"
    monkeypatch.setattr(rocm, "on_rocm", lambda: False)
    delattr(case.attn, rocm._KEY_WEIGHT)
    rocm.merge_key_weight(case.attn)
    case.hidden = plain
    assert case.prepare() == "stock", "elsewhere SGLang has its own GEMM for fp8"
