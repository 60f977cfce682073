"""Page size and layout on ROCm: what SGLang would do alone, and what the hooks make of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import index_cache
from nsa_backend_plugin.engine.gpu import rocm
from nsa_backend_plugin.layouts import index_page_bytes
from nsa_backend_plugin.ops import index_key_cache, mqa_logits

pytest.importorskip("sglang", reason="needs SGLang")


def _arguments(backend: str) -> SimpleNamespace:
    return SimpleNamespace(attention_backend=backend, prefill_attention_backend=None, decode_attention_backend=None)


def test_stock_would_fall_to_page_size_1(monkeypatch):
    """The decision that the hook replaces, in the installed release: no AITER, then Triton 3.4."""
    from sglang.srt.layers.attention.dsa import utils

    decide = utils.aiter_can_use_preshuffle_paged_mqa.__wrapped__
    monkeypatch.setattr(utils, "is_hip", lambda: True)
    monkeypatch.setenv("SGLANG_USE_AITER", "0")
    assert decide() is False
    monkeypatch.setenv("SGLANG_USE_AITER", "1")
    assert decide() is True
    monkeypatch.setattr(utils, "triton", SimpleNamespace(__version__="3.4.0"))
    assert decide() is False


@pytest.mark.parametrize("backend, expected", [(BACKEND_NAME, True), ("dsa", False)])
def test_our_backend_has_pages_of_64_whatever_stock_finds(monkeypatch, backend, expected):
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context, "get_server_args", lambda: _arguments(backend))
    assert rocm.preshuffled_pages(lambda: False) is expected
    assert rocm.preshuffled_pages(lambda: True) is True
    with rocm.resolution():
        assert rocm.preshuffled_pages(lambda: False) is True
    assert rocm.preshuffled_pages(lambda: False) is expected


def test_stock_answers_before_there_are_arguments(monkeypatch):
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context.get_context(), "_server_args", None)
    assert rocm.preshuffled_pages(lambda: False) is False
    with rocm.resolution():
        assert rocm.preshuffled_pages(lambda: False) is True


@pytest.mark.parametrize("arch, layout", [("gfx942", "preshuffled"), ("gfx950", "preshuffled"), ("sm_90", "row_major")])
def test_layout_follows_the_device_unless_set(monkeypatch, arch, layout):
    monkeypatch.setattr(index_cache, "device_arch", lambda device: arch)
    assert index_cache.chosen_layout("cpu") == layout
    monkeypatch.setenv("NSA_PLUGIN_INDEX_LAYOUT", "row_major")
    assert index_cache.chosen_layout("cpu") == "row_major"


def test_packed_rows_are_refused_on_rocm():
    rocm.check_latent_cache(SimpleNamespace(kv_cache_dim=576))
    with pytest.raises(ValueError, match="latent rows of 656 bytes: on ROCm nsa_plugin reads 576"):
        rocm.check_latent_cache(SimpleNamespace(kv_cache_dim=656))


@pytest.mark.parametrize("layout", ["row_major", "preshuffled"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e4m3fn], ids=str)
def test_the_kernels_that_replace_aiter_read_both_layouts(dtype, layout, device):
    """Triton (its interpreter on a CPU) writes and reads pages of 64 in the flavour of either GPU."""
    if device.type == "cuda" and dtype == torch.float8_e4m3fnuz:
        pytest.skip("e4m3fnuz exists on gfx942 only")
    cache = torch.zeros(4, index_page_bytes(), dtype=torch.uint8, device=device)
    key = torch.randn(70, 128, device=device).bfloat16()
    table = torch.tensor([[2, 1]], dtype=torch.int32, device=device)
    position = torch.arange(70, device=device)
    slots = table[0, position // 64].long() * 64 + position % 64
    index_key_cache.store(key, cache, slots, layout=layout, fp8_dtype=dtype, impl="triton")
    query = torch.randn(1, 1, 32, 128, device=device).to(dtype)
    weights, lengths = torch.randn(1, 32, device=device), torch.tensor([70], dtype=torch.int32, device=device)
    call = (query, cache, weights, lengths, table, 128)
    actual = mqa_logits.paged(*call, layout=layout, impl="triton")
    expected = mqa_logits.paged(*call, layout=layout, impl="torch")
    torch.testing.assert_close(actual[:, :70], expected[:, :70], rtol=1e-3, atol=1e-2)
    assert float(key.float().abs().max()) > 0
