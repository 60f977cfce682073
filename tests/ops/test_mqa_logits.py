"""Every implementation of mqa_logits that can run here, against the float32 reference."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_LAYOUTS
from nsa_backend_plugin.ops import mqa_logits
from nsa_backend_plugin.ops._torch import index_pages
from nsa_backend_plugin.ops._torch.logits import weighted_logits
from nsa_backend_plugin.ops._torch.quant import quantize_rows
from nsa_backend_plugin.ops.arch import fp8_dtype, pretended
from nsa_backend_plugin.ops.call import Step
from nsa_backend_plugin.ops.mqa_logits import deep_gemm
from nsa_backend_plugin.ops.mqa_logits import triton as triton_logits
from tests.ops.common import assert_close
from tests.ops.implementations import run, runnable
from tools.calls import Calls, poison, row_slots

BAR = 2e-4
PAGED, RAGGED = runnable(mqa_logits.paged), runnable(mqa_logits.ragged)
EDGE_LENGTHS = [0, 1, 63, 64, 65, 127, 130]


def check_paged(impl: str, arguments: dict) -> None:
    expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
    rows, columns = expected.shape
    buffer = poison(rows, -(-columns // 4) * 4 + 8, dtype=torch.float32, device=expected.device)
    actual = run(mqa_logits.paged, impl, **arguments, clean=True, out=buffer)
    assert actual.data_ptr() == buffer.data_ptr()
    assert torch.isnan(buffer[:, columns:]).all(), "wrote past max_context_len"
    assert_close(actual, expected, BAR)

    # Without clean, only the columns below each row's length count.
    out = poison(rows, columns, dtype=torch.float32, device=expected.device)
    actual = run(mqa_logits.paged, impl, **arguments, out=out)
    assert_close(torch.where(expected == float("-inf"), expected, actual), expected, BAR)


@pytest.mark.parametrize("impl", PAGED)
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("heads, next_n", [(64, 1), (32, 2), (12, 3), (1, 4), (128, 4), (64, 6)])
def test_paged(device, impl, layout, heads, next_n):
    arguments = Calls(device).mqa_logits_paged(EDGE_LENGTHS, heads, next_n, layout)
    check_paged(impl, arguments)


@pytest.mark.parametrize("impl", PAGED)
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
def test_paged_lengths_of_each_query(device, impl, layout):
    arguments = Calls(device).mqa_logits_paged([130, 64, 5], 32, 2, layout)
    arguments["context_lens"] = torch.tensor([[130, 7], [0, 64], [5, 5]], dtype=torch.int32, device=device)
    check_paged(impl, arguments)


@pytest.mark.parametrize("impl", PAGED)
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_paged_page_sizes(device, impl, page_size):
    for layout in INDEX_LAYOUTS:
        arguments = Calls(device).mqa_logits_paged([0, 15, 17, 150], 16, 1, layout, page_size)
        check_paged(impl, arguments)


def test_paged_gathered_preshuffled_tiles(device, monkeypatch):
    """What architectures do that do not load a tile in memory order."""
    monkeypatch.setattr(triton_logits, "_loads_in_memory_order", lambda arch: False)
    check_paged("triton", Calls(device).mqa_logits_paged(EDGE_LENGTHS, 32, 2, "preshuffled"))


@pytest.mark.parametrize("impl", PAGED)
def test_paged_all_lengths_zero(device, impl):
    arguments = Calls(device).mqa_logits_paged([0, 0, 0], 64, 1, "row_major")
    arguments["max_context_len"] = 64
    assert torch.isneginf(run(mqa_logits.paged, impl, **arguments, clean=True)).all()


@pytest.mark.parametrize("impl", PAGED)
def test_paged_garbage_table_entries(device, impl):
    """Entries past a request's pages may name pages that do not exist."""
    arguments = Calls(device).mqa_logits_paged([1, 130, 0], 64, 1, "row_major")
    expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
    for row, pages in enumerate((1, 3, 0)):
        arguments["block_table"][row, pages:] = 2**31 - 1
    assert_close(run(mqa_logits.paged, impl, **arguments, clean=True), expected, BAR)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", PAGED)
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("batch, next_n", [(1, 1), (7, 2), (64, 4), (300, 1), (300, 3)])
def test_paged_long(device, impl, layout, batch, next_n):
    lengths = torch.randint(0, 3000, (batch,)).tolist()
    for row, length in enumerate((2049, 0, 1, 2047, 2048)):
        lengths[row % batch] = length
    arguments = Calls(device).mqa_logits_paged(lengths, 64, next_n, layout)
    check_paged(impl, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", PAGED)
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
def test_paged_cache_past_4_gib(device, impl, layout):
    """Page offsets past 2^31 bytes, and past 2^32."""
    arguments = Calls(device).mqa_logits_paged([300, 65], 64, 1, layout)
    small, table = arguments["cache"], arguments["block_table"]
    pages = 2**32 // small.shape[1] + 1000
    if torch.cuda.mem_get_info()[0] < pages * small.shape[1] * 1.1:
        pytest.skip("needs 5 GiB of GPU memory")
    big = torch.empty(pages, small.shape[1], dtype=torch.uint8, device=device)
    big[-small.shape[0] :] = small
    expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
    arguments |= {"cache": big, "block_table": table + pages - small.shape[0]}
    assert_close(run(mqa_logits.paged, impl, **arguments, clean=True), expected, BAR)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", PAGED)
def test_paged_reruns_are_bitwise_equal(device, impl):
    arguments = Calls(device).mqa_logits_paged(torch.randint(1, 5000, (33,)).tolist(), 64, 2, "row_major")
    first = run(mqa_logits.paged, impl, **arguments, clean=True)
    for _ in range(20):
        assert torch.equal(run(mqa_logits.paged, impl, **arguments, clean=True), first)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", PAGED)
def test_paged_graph_replays_with_other_lengths(device, impl):
    arguments = Calls(device).mqa_logits_paged([2000, 700, 64, 1], 64, 1, "row_major")
    out = torch.empty(4, 2000, device=device)
    run(mqa_logits.paged, impl, **arguments, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(mqa_logits.paged, impl, **arguments, out=out)
    for lengths in ([2000, 700, 64, 1], [65, 0, 63, 1], [0, 0, 0, 0], [1999, 1, 1, 0]):
        arguments["context_lens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
        assert_close(torch.where(expected == float("-inf"), expected, out), expected, BAR)


def check_ragged(impl: str, arguments: dict) -> None:
    expected = mqa_logits.ragged(**arguments, clean=True, impl="torch")
    actual = run(mqa_logits.ragged, impl, **arguments, clean=True, out=torch.full_like(expected, float("nan")))
    assert_close(actual, expected, BAR)
    actual = run(mqa_logits.ragged, impl, **arguments, out=torch.full_like(expected, float("nan")))
    assert_close(torch.where(expected == float("-inf"), expected, actual), expected, BAR)


@pytest.mark.parametrize("impl", RAGGED)
@pytest.mark.parametrize("tokens, keys, heads", [(1, 1, 64), (5, 65, 64), (9, 300, 12), (3, 129, 1), (6, 64, 128)])
def test_ragged(device, impl, tokens, keys, heads):
    arguments = Calls(device).mqa_logits_ragged(tokens, keys, heads)
    check_ragged(impl, arguments)


@pytest.mark.parametrize("impl", RAGGED)
def test_ragged_ignores_nan_keys_outside_its_range(device, impl):
    arguments = Calls(device).mqa_logits_ragged(6, 200, 32)
    arguments["row_start"][:] = 10
    arguments["row_end"][:] = 150
    expected = mqa_logits.ragged(**arguments, clean=True, impl="torch")
    for outside in (slice(0, 10), slice(150, 200)):
        arguments["k"].view(torch.uint8)[outside] = 0x7F
        arguments["k_scale"][outside] = float("nan")
    assert_close(run(mqa_logits.ragged, impl, **arguments, clean=True), expected, BAR)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", RAGGED)
@pytest.mark.parametrize("tokens, keys", [(1, 40000), (257, 2049), (1000, 8191), (64, 2**25 + 100)])
def test_ragged_long(device, impl, tokens, keys):
    if keys > 2**25:  # logits past 2^31 elements: compare a few rows
        free = torch.cuda.mem_get_info()[0]
        if free < 24 * 2**30:
            pytest.skip("needs 24 GiB of GPU memory")
        arguments = Calls(device).mqa_logits_ragged(tokens, keys, 64)
        arguments["row_start"][:] = keys - 5000
        arguments["row_end"][:] = keys
        actual = run(mqa_logits.ragged, impl, **arguments)[:, -5000:]
        k, scale = arguments["k"][-5000:], arguments["k_scale"][-5000:]
        assert_close(actual, weighted_logits(arguments["q"], k, scale, arguments["weights"]), BAR)
        return
    arguments = Calls(device).mqa_logits_ragged(tokens, keys, 64)
    check_ragged(impl, arguments)


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each 2 elements apart in its last dimension, with garbage between."""
    wide = torch.full((*tensor.shape, 2), 2**30, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


@pytest.mark.parametrize("impl", PAGED)
@pytest.mark.parametrize("per_query", [False, True])
def test_paged_with_any_strides(device, impl, per_query):
    """Weights and lengths whose values lie apart, rows of the table that do."""
    arguments = Calls(device).mqa_logits_paged([130, 64 if per_query else 0, 65], 32, 2, "row_major")
    if per_query:
        arguments["context_lens"] = torch.tensor([[130, 7], [0, 64], [5, 5]], dtype=torch.int32, device=device)
        arguments["max_context_len"] = 130
    expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
    table = torch.full((3, 40), 2**30, dtype=torch.int32, device=device)
    table[:, :3] = arguments["block_table"]
    changed = {name: apart(arguments[name]) for name in ("weights", "context_lens")} | {"block_table": table[:, :3]}
    assert_close(run(mqa_logits.paged, impl, **(arguments | changed), clean=True), expected, BAR)


@pytest.mark.parametrize("impl", RAGGED)
def test_ragged_with_any_strides(device, impl):
    arguments = Calls(device).mqa_logits_ragged(6, 200, 32)
    expected = mqa_logits.ragged(**arguments, clean=True, impl="torch")
    changed = {name: apart(arguments[name]) for name in ("k_scale", "weights", "row_start", "row_end")}
    assert_close(run(mqa_logits.ragged, impl, **(arguments | changed), clean=True), expected, BAR)


@pytest.mark.parametrize("impl", ["torch", *RAGGED])
@pytest.mark.parametrize("tokens, keys", [(0, 5), (3, 0), (0, 0)])
def test_ragged_without_rows_or_keys(device, impl, tokens, keys):
    fp8 = fp8_dtype(device)
    q, k = torch.zeros(tokens, 32, INDEX_DIM, device=device), torch.zeros(keys, INDEX_DIM, device=device)
    nothing = torch.zeros(tokens, dtype=torch.int32, device=device)
    scales, weights = torch.ones(keys, device=device), torch.zeros(tokens, 32, device=device)
    logits = run(mqa_logits.ragged, impl, q.to(fp8), k.to(fp8), scales, weights, nothing, nothing, clean=True)
    assert logits.shape == (tokens, keys)
    assert torch.isneginf(logits).all()


@pytest.mark.parametrize("impl", ["torch", *PAGED])
def test_paged_without_requests_or_pages(device, impl):
    arguments = Calls(device).mqa_logits_paged([0, 0], 32, 1, "row_major")
    nothing = {name: arguments[name][:0] for name in ("q", "weights", "context_lens", "block_table")}
    assert run(mqa_logits.paged, impl, **(arguments | nothing)).shape == (0, 1)
    no_pages = {"cache": arguments["cache"][:0], "block_table": arguments["block_table"][:, :0]}
    assert torch.isneginf(run(mqa_logits.paged, impl, **(arguments | no_pages), clean=True)).all()


def with_outliers(*shape: int, device: torch.device) -> torch.Tensor:
    """Rows of 128 values of which one, anywhere, is about 100 times the rest."""
    values = torch.randn(*shape, INDEX_DIM, device=device)
    place = torch.randint(0, INDEX_DIM, (*shape, 1), device=device)
    return values.scatter(-1, place, 100 * values.gather(-1, place).sign())


@pytest.mark.gpu
@pytest.mark.parametrize("impl", sorted({*PAGED, *RAGGED}))
@pytest.mark.parametrize("outliers", ["queries", "keys", "both", "none"])
@pytest.mark.parametrize("paged", [False, True])
def test_outliers(device, impl, outliers, paged, record_property):
    """The bound of the module's docstring: fp8 products are summed with about 13 bits below the largest.

    Records the largest error of a logit, relative to its row's largest term (the largest product of each head, times
    the head's weight and the key's scale, summed over heads), and its distance to our Triton kernel.
    """
    rows, heads, keys = 32, 64, 4096
    fp8 = fp8_dtype(device)
    make = {name: with_outliers if outliers in (name, "both") else plain for name in ("queries", "keys")}
    q = quantize_rows(make["queries"](rows, heads, device=device), "fp32", fp8)[0]
    k, k_scale = quantize_rows(make["keys"](keys, device=device), "fp32", fp8)
    weights = torch.randn(rows, heads, device=device)
    if paged:
        table = torch.randperm(keys // 64, device=device).int()
        cache = torch.zeros(keys // 64, 8448, dtype=torch.uint8, device=device)
        slots = row_slots(table, keys, 64)
        index_pages.write(k, k_scale, cache, slots, layout="row_major", page_size=64)
        lengths = torch.full((rows,), keys, dtype=torch.int32, device=device)
        arguments = (q[:, None], cache, weights, lengths, table.expand(rows, -1).contiguous(), keys)
    else:
        start = torch.zeros(rows, dtype=torch.int32, device=device)
        arguments = (q, k, k_scale, weights, start, torch.full_like(start, keys))
    function = mqa_logits.paged if paged else mqa_logits.ragged
    actual = run(function, impl, *arguments).double()
    ours = run(function, "triton", *arguments).double()

    exact, terms = torch.zeros_like(actual), torch.zeros_like(actual)
    for h in range(heads):
        dots = q[:, h].double() @ k.double().T
        exact += weights[:, h, None].double() * dots.relu()
        largest = torch.stack([(row.abs() * k.double().abs()).amax(-1) for row in q[:, h].double()])
        terms += weights[:, h, None].double().abs() * torch.maximum(largest, dots.abs())
    scale = k_scale.double()
    row_terms = (terms * scale).amax(-1, keepdim=True)
    error = float(((actual - exact * scale).abs() / row_terms).max())
    record_property("error_of_largest_term", error)
    record_property("distance_to_triton", float(((actual - ours).abs() / row_terms).max()))
    print(f"{function.name} {impl} outliers in {outliers}: error {error:.2%} of the row's largest term")
    assert ((actual - exact * scale).abs() <= (INDEX_DIM + 4) * 2**-13 * terms * scale).all(), "past the bound"


def plain(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, INDEX_DIM, device=device)


class FakeDeepGemm(types.ModuleType):
    """Checks every argument as the library does, and computes the right answer in torch, in a row-padded result."""

    def __init__(self):
        super().__init__("deep_gemm")
        self.schedules = []

    def get_num_sms(self):
        return 7

    def get_paged_mqa_logits_metadata(self, context_lens, block_kv, num_sms):
        assert context_lens.dim() == 2, "one-dimensional lengths can deadlock"
        assert context_lens.dtype == torch.int32
        assert context_lens.is_contiguous()
        assert (block_kv, num_sms) == (64, 7)
        self.schedules.append(context_lens.clone())
        return torch.full((num_sms + 1, 2), len(self.schedules), dtype=torch.int32)

    def fp8_paged_mqa_logits(self, q, cache, weights, lengths, table, schedule, max_context_len, clean_logits):
        batch, next_n, heads, _ = q.shape
        assert q.is_contiguous()
        assert cache.shape[1:] == (64, 1, 132)
        assert cache.is_contiguous()
        assert weights.shape == (batch * next_n, heads)
        assert weights.is_contiguous()
        assert torch.equal(lengths, self.schedules[int(schedule[0, 0]) - 1]), "a schedule of other lengths"
        assert lengths.shape == (batch, next_n)
        assert table.stride(1) == 1
        assert not clean_logits
        pages, out = cache.view(cache.shape[0], -1), torch.full((batch * next_n, 1024), float("nan"))
        return mqa_logits.paged(q, pages, weights, lengths, table, max_context_len, out=out, impl="torch")

    def fp8_mqa_logits(self, q, keys, weights, start, end, clean_logits):
        k, k_scale = keys
        assert all(t.is_contiguous() for t in (q, k, k_scale, weights, start, end))
        assert not clean_logits
        out = torch.full((q.shape[0], 1024), float("nan"))
        return mqa_logits.ragged(q, k, k_scale, weights, start, end, out=out, impl="torch")


@pytest.fixture
def library(monkeypatch):
    module = FakeDeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    return module


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_deep_gemm_is_called_as_it_wants(library, clean, given):
    cpu = torch.device("cpu")
    arguments = Calls(cpu).mqa_logits_paged([130, 0, 65], 32, 2, "row_major")
    arguments |= {name: apart(arguments[name]) for name in ("weights", "context_lens")}
    ragged = Calls(cpu).mqa_logits_ragged(6, 200, 32)
    ragged |= {name: apart(ragged[name]) for name in ("k_scale", "weights", "row_start", "row_end")}
    for function, run_adapter, inputs in (
        (mqa_logits.paged, deep_gemm.paged, arguments),
        (mqa_logits.ragged, deep_gemm.ragged, ragged),
    ):
        expected = function(**inputs, clean=True, impl="torch")
        out = torch.full_like(expected, float("nan")) if given else None
        actual = run_adapter(function.call(**inputs, clean=clean, out=out))
        assert out is None or actual.data_ptr() == out.data_ptr()
        assert actual.shape == expected.shape
        outside = torch.isneginf(expected)
        assert torch.isneginf(actual[outside]).all() if clean else torch.isnan(actual[outside]).all()
        assert_close(actual.where(~outside, 0.0), expected.where(~outside, 0.0), 1e-6)


def test_deep_gemm_makes_its_schedule_once_per_step(library):
    arguments = Calls(torch.device("cpu")).mqa_logits_paged([130, 0, 65], 32, 1, "row_major")
    for layer, step in enumerate([Step()] * 3 + [Step()] * 2):
        q = torch.randn(3, 1, 32, INDEX_DIM).to(arguments["q"].dtype)
        deep_gemm.paged(mqa_logits.paged.call(**(arguments | {"q": q}), step=step))
        assert len(library.schedules) == 1 + (layer > 2)
    arguments["context_lens"] = torch.tensor([1, 2, 3], dtype=torch.int32)
    deep_gemm.paged(mqa_logits.paged.call(**arguments, step=step))
    assert len(library.schedules) == 3, "other lengths in the same step have a schedule of their own"


def on_sm_90(function, arguments: dict):
    with pretended("sm_90") as meta:
        moved = {k: v.to(meta) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        return function.call(**moved)


def test_what_deep_gemm_cannot_do_is_declined():
    cpu = torch.device("cpu")
    arguments = Calls(cpu).mqa_logits_paged([130, 0, 65], 32, 1, "row_major")
    assert deep_gemm.declines_paged(on_sm_90(mqa_logits.paged, arguments)) is None
    queries = ("q", "weights", "context_lens", "block_table")
    for changed, why in (
        ({"layout": "preshuffled"}, "layout preshuffled: reads row_major only"),
        ({"cache": arguments["cache"][:0]}, "cache is empty"),
        ({"block_table": arguments["block_table"][:, :0]}, "block_table without pages"),
        ({name: arguments[name][:0] for name in queries}, "q is empty"),
        (Calls(cpu).mqa_logits_paged([5], 12, 1, "row_major"), "12 heads: 32 or 64 only"),
        (Calls(cpu).mqa_logits_paged([5], 32, 3, "row_major"), "next_n 3: 1 or 2 only"),
        (Calls(cpu).mqa_logits_paged([5], 32, 1, "row_major", 16), "page size 16: 64 only"),
    ):
        assert deep_gemm.declines_paged(on_sm_90(mqa_logits.paged, arguments | changed)) == why
    per_query = Calls(cpu).mqa_logits_paged([5], 32, 2, "row_major")
    per_query["context_lens"] = torch.tensor([[5, 3]], dtype=torch.int32)
    assert "context_lens of each query" in deep_gemm.declines_paged(mqa_logits.paged.call(**per_query))

    ragged = Calls(cpu).mqa_logits_ragged(6, 200, 32)
    assert deep_gemm.declines_ragged(on_sm_90(mqa_logits.ragged, ragged)) is None
    no_keys = {"k": ragged["k"][:0], "k_scale": ragged["k_scale"][:0]}
    assert deep_gemm.declines_ragged(on_sm_90(mqa_logits.ragged, ragged | no_keys)) == "k is empty"
    no_rows = {name: ragged[name][:0] for name in ("q", "weights", "row_start", "row_end")}
    assert deep_gemm.declines_ragged(on_sm_90(mqa_logits.ragged, ragged | no_rows)) == "q is empty"
    for name in ("q", "k", "k_scale", "weights"):
        tensor = ragged[name]
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        moved = {"row_start": ragged["row_start"] * 0, name: storage[1:].view(tensor.shape)}
        reason = deep_gemm.declines_ragged(mqa_logits.ragged.call(**(ragged | moved)))
        assert reason == f"{name} does not start at a 16-byte boundary"


def test_declines_where_fp8_is_missing():
    assert "e4m3" in triton_logits.available("sm_80")


@pytest.mark.parametrize("arch, largest", [("sm_90", 4096), ("gfx950", 4096), ("gfx1201", 2048)])
def test_batches_whose_lengths_do_not_fit_registers_are_declined(arch, largest):
    arguments = Calls(torch.device("cpu")).mqa_logits_paged([1], 32, 1, "row_major")
    for batch, why in ((largest, None), (largest + 1, f"batch {largest + 1}: at most {largest}")):
        rows = {name: arguments[name].expand(batch, *arguments[name].shape[1:]) for name in ("weights", "context_lens")}
        rows |= {"q": arguments["q"].repeat(batch, 1, 1, 1), "block_table": arguments["block_table"].repeat(batch, 1)}
        with pretended(arch) as meta:
            moved = {k: v.to(meta) if isinstance(v, torch.Tensor) else v for k, v in (arguments | rows).items()}
            assert triton_logits.declines_paged(mqa_logits.paged.call(**moved)) == why
