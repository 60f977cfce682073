"""AITER's logits adapters against fakes: arguments, answers in both fp8 flavours, and what is declined."""

from __future__ import annotations

import pytest
import torch
import triton

from nsa_backend_plugin.ops.index_key_cache import reference as index_reference
from nsa_backend_plugin.ops.mqa_logits import ROW_GUARD, aiter, reference
from tests.ops.common import assert_close, permuted_block_table, poison, slots_of
from tests.rocm.simulated_host import install_fakes

FLAVOURS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
LENGTHS = [192, 1, 64, 0, 192]  # as wide as the table: a store past a row's end meets the next row
HEADS = 32
OPTIONS = {"layout": "preshuffled", "page_size": 64, "clean": False, "out": None}


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    install_fakes(lambda name, module: monkeypatch.setitem(__import__("sys").modules, name, module))
    monkeypatch.setattr(aiter, "fp8_dtype", lambda device: FLAVOURS[0])


def _paged(dtype):
    table, pages = permuted_block_table(LENGTHS, 64, torch.device("cpu"))
    cache = poison(pages, 64 * 132, dtype=torch.uint8, device=torch.device("cpu"))
    slots = torch.cat([slots_of(table, n, row, 64) for row, n in enumerate(LENGTHS)])
    index_reference.store(
        torch.randn(len(slots), 128).bfloat16(),
        cache,
        slots,
        layout="preshuffled",
        scale_format="fp32",
        page_size=64,
        fp8_dtype=dtype,
    )
    query = torch.randn(len(LENGTHS), 1, HEADS, 128).to(dtype)
    return query, cache, torch.randn(len(LENGTHS), HEADS), torch.tensor(LENGTHS, dtype=torch.int32), table, 192


@pytest.mark.parametrize("out", ["allocated", "guarded", "last row not guarded", "packed"])
@pytest.mark.parametrize("dtype", FLAVOURS, ids=str)
def test_paged_through_the_adapter(dtype, out, monkeypatch):
    monkeypatch.setattr(aiter, "fp8_dtype", lambda device: dtype)
    call = _paged(dtype)
    rows, columns = len(LENGTHS), call[-1]
    buffer = torch.full((rows * (columns + ROW_GUARD),), float("nan"))
    given = {
        "allocated": None,
        "guarded": buffer.view(rows, -1)[:, :columns],
        "last row not guarded": torch.empty((rows - 1) * (columns + ROW_GUARD) + columns).as_strided(
            (rows, columns), (columns + ROW_GUARD, 1)
        ),
        "packed": buffer[: rows * columns].view(rows, columns),
    }[out]
    assert aiter.accepts_paged(*call, **OPTIONS).ok
    actual, expected = aiter.paged(*call, **{**OPTIONS, "out": given}), reference.paged(*call, **OPTIONS)
    assert given is None or actual.data_ptr() == given.data_ptr()
    for row, length in enumerate(LENGTHS):
        assert_close(actual[row, :length], expected[row, :length], 1e-6)
    cleaned = aiter.paged(*call, **{**OPTIONS, "out": given, "clean": True})
    assert torch.equal(cleaned.isneginf(), torch.arange(columns) >= call[3][:, None])


@pytest.mark.parametrize("dtype", FLAVOURS, ids=str)
def test_ragged_through_the_adapter(dtype, monkeypatch):
    monkeypatch.setattr(aiter, "fp8_dtype", lambda device: dtype)
    query, key = torch.randn(7, HEADS, 128).to(dtype), torch.randn(90, 128).to(dtype)
    starts = torch.tensor([0, 0, 5, 40, 40, 89, 90], dtype=torch.int32)
    ends = torch.tensor([1, 90, 39, 40, 77, 90, 90], dtype=torch.int32)
    call = (query, key, torch.rand(90) + 0.5, torch.randn(7, HEADS), starts, ends)
    assert_close(aiter.ragged(*call, clean=True, out=None), reference.ragged(*call, clean=True, out=None), 1e-6)
    assert aiter.accepts_ragged(*call).ok
    assert "power of two" in aiter.accepts_ragged(query[:, :24], key).reason
    key = torch.empty(1 << 20, 128, dtype=dtype, device="meta")
    assert aiter.accepts_ragged(query[:1].expand(511, -1, -1), key).ok
    assert "less than 2 GiB" in aiter.accepts_ragged(query[:1].expand(512, -1, -1), key).reason


def test_what_the_kernels_would_misread_is_declined():
    """fp8 of another GPU, and index pages behind its 32-bit offsets."""
    call = _paged(FLAVOURS[1])
    assert "reads torch.float8_e4m3fn, not" in aiter.accepts_paged(*call, **OPTIONS).reason
    assert "reads torch.float8_e4m3fn, not" in aiter.accepts_ragged(call[0][:, 0], call[0][:, 0, 0]).reason
    call = _paged(FLAVOURS[0])
    for pages, ok in ((254200, True), (254201, False)):
        cache = torch.empty(pages, 64 * 132, dtype=torch.uint8, device="meta")
        verdict = aiter.accepts_paged(call[0], cache, *call[2:], **OPTIONS)
        assert verdict.ok is ok
        assert ok or "less than 2 GiB" in verdict.reason


@pytest.mark.parametrize(
    "version, aot, ok",
    [
        ("3.6.0", "0", True),
        ("3.5.0", "0", True),
        ("3.5.0", "1", True),
        ("3.4.1", "0", False),
        ("3.4.1", "1", False),
        ("3.3.1", "0", False),
        ("3.3.1", "1", True),
    ],
)
def test_old_triton_is_declined_unless_compiled_ahead_of_time(monkeypatch, version, aot, ok):
    call = _paged(FLAVOURS[0])
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setenv("AITER_ENABLE_AOT_GLUON_PA_MQA_LOGITS", aot)
    verdict = aiter.accepts_paged(*call, **OPTIONS)
    assert verdict.ok is ok
    assert ok or "needs 3.5" in verdict.reason


def test_row_major_pages_are_declined():
    verdict = aiter.accepts_paged(*_paged(FLAVOURS[0]), **{**OPTIONS, "layout": "row_major"})
    assert "preshuffled pages of 64 only" in verdict.reason
