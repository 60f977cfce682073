"""AITER's logits adapters against fakes: arguments, answers in both fp8 flavours, and what is declined."""

from __future__ import annotations

import pytest
import torch
import triton

from nsa_backend_plugin.ops import index_key_cache, mqa_logits
from nsa_backend_plugin.ops.arch import pretended
from nsa_backend_plugin.ops.mqa_logits import ROW_GUARD, aiter
from tests.ops.common import assert_close
from tests.rocm.simulated_host import install_fakes
from tools.calls import block_table, poison, slots_of

FN, FNUZ = FLAVOURS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
LENGTHS = [192, 1, 64, 0, 192]  # as wide as the table: a store past a row's end meets the next row
HEADS = 32
PRESHUFFLED = {"layout": "preshuffled"}


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    install_fakes(lambda name, module: monkeypatch.setitem(__import__("sys").modules, name, module))
    aiter._gluon.cache_clear()
    yield
    aiter._gluon.cache_clear()


def _paged(dtype):
    table, pages = block_table(LENGTHS, 64, torch.device("cpu"))
    cache = poison(pages, 64 * 132, dtype=torch.uint8, device=torch.device("cpu"))
    slots = slots_of(table, LENGTHS, 64)
    index_key_cache.store(torch.randn(len(slots), 128), cache, slots, fp8_dtype=dtype, impl="torch", **PRESHUFFLED)
    query = torch.randn(len(LENGTHS), 1, HEADS, 128).to(dtype)
    return query, cache, torch.randn(len(LENGTHS), HEADS), torch.tensor(LENGTHS, dtype=torch.int32), table, 192


def _ragged(dtype, heads=HEADS):
    starts = torch.tensor([0, 0, 5, 40, 40, 89, 90], dtype=torch.int32)
    ends = torch.tensor([1, 90, 39, 40, 77, 90, 90], dtype=torch.int32)
    query, key = torch.randn(7, heads, 128).to(dtype), torch.randn(90, 128).to(dtype)
    return query, key, torch.rand(90) + 0.5, torch.randn(7, heads), starts, ends


def _on(arch, function, *arguments, **options):
    """The call as on a GPU of an architecture."""
    with pretended(arch) as meta:
        return function.call(*(a.to(meta) if isinstance(a, torch.Tensor) else a for a in arguments), **options)


def _apart(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize("out", ["allocated", "guarded", "last row not guarded", "packed"])
@pytest.mark.parametrize("dtype", FLAVOURS, ids=str)
def test_paged_through_the_adapter(dtype, out):
    arguments = _paged(dtype)
    rows, columns = len(LENGTHS), arguments[-1]
    buffer = torch.full((rows * (columns + ROW_GUARD),), float("nan"))
    given = {
        "allocated": None,
        "guarded": buffer.view(rows, -1)[:, :columns],
        "last row not guarded": torch.empty((rows - 1) * (columns + ROW_GUARD) + columns).as_strided(
            (rows, columns), (columns + ROW_GUARD, 1)
        ),
        "packed": buffer[: rows * columns].view(rows, columns),
    }[out]
    expected = mqa_logits.paged(*arguments, **PRESHUFFLED, impl="torch")
    actual = aiter.paged(mqa_logits.paged.call(*arguments, **PRESHUFFLED, out=given))
    assert given is None or actual.data_ptr() == given.data_ptr()
    for row, length in enumerate(LENGTHS):
        assert_close(actual[row, :length], expected[row, :length], 1e-6)
    cleaned = aiter.paged(mqa_logits.paged.call(*arguments, **PRESHUFFLED, out=given, clean=True))
    assert torch.equal(cleaned.isneginf(), torch.arange(columns) >= arguments[3][:, None])


@pytest.mark.parametrize("dtype", FLAVOURS, ids=str)
def test_ragged_through_the_adapter(dtype):
    arguments = _ragged(dtype)
    actual = aiter.ragged(mqa_logits.ragged.call(*arguments, clean=True))
    assert_close(actual, mqa_logits.ragged(*arguments, clean=True, impl="torch"), 1e-6)


def test_any_strides():
    """The fakes refuse what the kernels would misread."""
    arguments = query, cache, weights, lengths, table, width = _paged(FN)
    wide = torch.cat([table, table], dim=1)[:, : table.shape[1]]
    expected = mqa_logits.paged(*arguments, **PRESHUFFLED, clean=True, impl="torch")
    for lens in (_apart(lengths), lengths[:, None]):
        call = mqa_logits.paged.call(query, cache, _apart(weights), lens, wide, width, **PRESHUFFLED, clean=True)
        expected = mqa_logits.paged(
            query, cache, weights, lengths, table, width, **PRESHUFFLED, clean=True, impl="torch"
        )
        assert_close(aiter.paged(call), expected, 1e-6)
    query, key, *small = _ragged(FN)
    expected = mqa_logits.ragged(query, key, *small, clean=True, impl="torch")
    assert_close(aiter.ragged(mqa_logits.ragged.call(query, key, *map(_apart, small), clean=True)), expected, 1e-6)


def test_what_the_kernels_would_misread_is_declined():
    """fp8 of another GPU, index pages behind its 32-bit offsets, logits of 2 GiB, heads that are no power of two."""
    for dtype, arch, why in (
        (FN, "gfx950", None),
        (FNUZ, "gfx942", None),
        (FNUZ, "gfx950", "reads torch.float8_e4m3fn, not torch.float8_e4m3fnuz"),
        (FN, "gfx942", "reads torch.float8_e4m3fnuz, not torch.float8_e4m3fn"),
    ):
        assert aiter.declines_paged(_on(arch, mqa_logits.paged, *_paged(dtype), **PRESHUFFLED)) == why
        assert aiter.declines_ragged(_on(arch, mqa_logits.ragged, *_ragged(dtype))) == why
    query, _, weights, *rest = _paged(FN)
    for pages, why in ((254200, None), (254201, "cache of 2147490048 bytes: less than 2 GiB only")):
        cache = torch.empty(pages, 64 * 132, dtype=torch.uint8, device="meta")
        assert aiter.declines_paged(_on("gfx950", mqa_logits.paged, query, cache, weights, *rest, **PRESHUFFLED)) == why
    for heads in (8, 24):
        few = query[:, :, :heads].contiguous(), torch.zeros(254, 8448, dtype=torch.uint8), weights[:, :heads], *rest
        assert "heads: a power of two" in aiter.declines_paged(_on("gfx950", mqa_logits.paged, *few, **PRESHUFFLED))
    assert "heads: a power of two" in aiter.declines_ragged(_on("gfx950", mqa_logits.ragged, *_ragged(FN, 24)))
    k, scale = torch.empty(1 << 20, 128, dtype=FN, device="meta"), torch.empty(1 << 20, device="meta")
    for tokens, why in ((511, None), (512, "logits [512, 1048576]: less than 2 GiB only")):
        q, gates, start = (torch.empty(tokens, *rest, device="meta") for rest in ((HEADS, 128), (HEADS,), ()))
        reason = aiter.declines_ragged(
            _on("gfx950", mqa_logits.ragged, q.to(FN), k, scale, gates, start.int(), start.int())
        )
        assert (reason or "").startswith(why or "")
        assert (reason is None) == (why is None)
    query, cache, weights, lengths, *rest = _paged(FNUZ)
    storage = torch.zeros(query.numel() + 1, dtype=FNUZ)
    moved = storage[1:].view(query.shape)
    call = mqa_logits.paged.call(moved, cache, weights, lengths, *rest, **PRESHUFFLED)
    assert "16-byte boundary" in aiter.declines_paged(call)


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
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setenv("AITER_ENABLE_AOT_GLUON_PA_MQA_LOGITS", aot)
    reason = aiter.declines_paged(_on("gfx950", mqa_logits.paged, *_paged(FN), **PRESHUFFLED))
    assert (reason is None) is ok
    assert ok or "needs 3.5" in reason


def test_row_major_pages_are_declined():
    reason = aiter.declines_paged(_on("gfx950", mqa_logits.paged, *_paged(FN), layout="row_major"))
    assert "preshuffled pages of 64 only" in reason
