"""Every implementation of mqa_logits that can run here, against the float32 reference."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_LAYOUTS, INDEX_PAGE_SIZE, index_page_bytes
from nsa_backend_plugin.ops import mqa_logits, registry
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.index_key_cache import reference as index_key_cache
from nsa_backend_plugin.ops.mqa_logits import reference
from nsa_backend_plugin.ops.mqa_logits import triton as triton_logits
from tests.conftest import HAS_GPU
from tests.ops.common import assert_close, permuted_block_table, poison, slots_of

BAR = 2e-4
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
EDGE_LENGTHS = [0, 1, 63, 64, 65, 127, 130]


def implementations(function: str) -> list[str]:
    candidates = registry.Operation.all[f"mqa_logits.{function}"].candidates(DEVICE)
    return [c.name for c in candidates if c.support.ok and c.name != "torch"]


def paged_inputs(
    device: torch.device,
    lengths: list[int],
    heads: int,
    next_n: int,
    layout: str,
    page_size: int = INDEX_PAGE_SIZE,
) -> dict:
    """Arguments of `paged`; every byte of the cache that no request owns is NaN, scales too."""
    table, pages = permuted_block_table(lengths, page_size, device)
    cache = poison(pages, index_page_bytes(page_size), dtype=torch.uint8, device=device)
    fp8 = fp8_dtype(device)
    for row, length in enumerate(lengths):
        if length:
            keys = torch.randn(length, INDEX_DIM, device=device)
            value, scale = index_key_cache.quantize_rows(keys, "fp32", fp8)
            slots = slots_of(table, length, row, page_size)
            index_key_cache.write(value, scale, cache, slots, layout=layout, page_size=page_size)
    batch = len(lengths)
    return {
        "q": (torch.randn(batch, next_n, heads, INDEX_DIM, device=device) * 8).to(fp8),
        "cache": cache,
        "weights": torch.randn(batch * next_n, heads, device=device),
        "context_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "block_table": table,
        "max_context_len": max(max(lengths), 1),
        "layout": layout,
        "page_size": page_size,
    }


def check_paged(impl: str, arguments: dict) -> None:
    expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
    rows, columns = expected.shape
    buffer = poison(rows, -(-columns // 4) * 4 + 8, dtype=torch.float32, device=expected.device)
    actual = mqa_logits.paged(**arguments, clean=True, out=buffer, impl=impl)
    assert actual.data_ptr() == buffer.data_ptr()
    assert torch.isnan(buffer[:, columns:]).all(), "wrote past max_context_len"
    assert_close(actual, expected, BAR)

    # Without clean, only the columns below each row's length count.
    actual = mqa_logits.paged(
        **arguments, out=poison(rows, columns, dtype=torch.float32, device=expected.device), impl=impl
    )
    assert_close(torch.where(expected == float("-inf"), expected, actual), expected, BAR)


@pytest.mark.parametrize("impl", implementations("paged"))
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("heads, next_n", [(64, 1), (32, 2), (12, 3), (1, 4), (128, 4)])
def test_paged(device, impl, layout, heads, next_n):
    arguments = paged_inputs(device, EDGE_LENGTHS, heads, next_n, layout)
    skip_unless_accepted(impl, arguments)
    check_paged(impl, arguments)


@pytest.mark.parametrize("impl", implementations("paged"))
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
def test_paged_lengths_of_each_query(device, impl, layout):
    arguments = paged_inputs(device, [130, 64, 5], 32, 2, layout)
    arguments["context_lens"] = torch.tensor([[130, 7], [0, 64], [5, 5]], dtype=torch.int32, device=device)
    skip_unless_accepted(impl, arguments)
    check_paged(impl, arguments)


@pytest.mark.parametrize("impl", implementations("paged"))
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_paged_page_sizes(device, impl, page_size):
    for layout in INDEX_LAYOUTS:
        arguments = paged_inputs(device, [0, 15, 17, 150], 16, 1, layout, page_size)
        skip_unless_accepted(impl, arguments)
        check_paged(impl, arguments)


def test_paged_gathered_preshuffled_tiles(device, monkeypatch):
    """What architectures do that do not load a tile in memory order."""
    monkeypatch.setattr(triton_logits, "_loads_in_memory_order", lambda arch: False)
    check_paged("triton", paged_inputs(device, EDGE_LENGTHS, 32, 2, "preshuffled"))


@pytest.mark.parametrize("impl", implementations("paged"))
def test_paged_all_lengths_zero(device, impl):
    arguments = paged_inputs(device, [0, 0, 0], 64, 1, "row_major")
    arguments["max_context_len"] = 64
    skip_unless_accepted(impl, arguments)
    assert torch.isneginf(mqa_logits.paged(**arguments, clean=True, impl=impl)).all()


@pytest.mark.parametrize("impl", implementations("paged"))
def test_paged_garbage_table_entries(device, impl):
    """Entries past a request's pages may name pages that do not exist."""
    arguments = paged_inputs(device, [1, 130, 0], 64, 1, "row_major")
    expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
    for row, pages in enumerate((1, 3, 0)):
        arguments["block_table"][row, pages:] = 2**31 - 1
    skip_unless_accepted(impl, arguments)
    assert_close(mqa_logits.paged(**arguments, clean=True, impl=impl), expected, BAR)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", implementations("paged"))
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("batch, next_n", [(1, 1), (7, 2), (64, 4), (300, 1), (300, 3)])
def test_paged_long(device, impl, layout, batch, next_n):
    lengths = torch.randint(0, 3000, (batch,)).tolist()
    for row, length in enumerate((2049, 0, 1, 2047, 2048)):
        lengths[row % batch] = length
    arguments = paged_inputs(device, lengths, 64, next_n, layout)
    skip_unless_accepted(impl, arguments)
    check_paged(impl, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", implementations("paged"))
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
def test_paged_cache_past_4_gib(device, impl, layout):
    """Page offsets past 2^31 bytes, and past 2^32."""
    arguments = paged_inputs(device, [300, 65], 64, 1, layout)
    small, table = arguments["cache"], arguments["block_table"]
    pages = 2**32 // small.shape[1] + 1000
    if torch.cuda.mem_get_info()[0] < pages * small.shape[1] * 1.1:
        pytest.skip("needs 5 GiB of GPU memory")
    big = torch.empty(pages, small.shape[1], dtype=torch.uint8, device=device)
    big[-small.shape[0] :] = small
    expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
    arguments |= {"cache": big, "block_table": table + pages - small.shape[0]}
    skip_unless_accepted(impl, arguments)
    assert_close(mqa_logits.paged(**arguments, clean=True, impl=impl), expected, BAR)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", implementations("paged"))
def test_paged_reruns_are_bitwise_equal(device, impl):
    arguments = paged_inputs(device, torch.randint(1, 5000, (33,)).tolist(), 64, 2, "row_major")
    skip_unless_accepted(impl, arguments)
    first = mqa_logits.paged(**arguments, clean=True, impl=impl)
    for _ in range(20):
        assert torch.equal(mqa_logits.paged(**arguments, clean=True, impl=impl), first)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", implementations("paged"))
def test_paged_graph_replays_with_other_lengths(device, impl):
    arguments = paged_inputs(device, [2000, 700, 64, 1], 64, 1, "row_major")
    skip_unless_accepted(impl, arguments)
    out = torch.empty(4, 2000, device=device)
    mqa_logits.paged(**arguments, out=out, impl=impl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mqa_logits.paged(**arguments, out=out, impl=impl)
    for lengths in ([2000, 700, 64, 1], [65, 0, 63, 1], [0, 0, 0, 0], [1999, 1, 1, 0]):
        arguments["context_lens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        expected = mqa_logits.paged(**arguments, clean=True, impl="torch")
        assert_close(torch.where(expected == float("-inf"), expected, out), expected, BAR)


def ragged_inputs(device: torch.device, tokens: int, keys: int, heads: int) -> dict:
    fp8 = fp8_dtype(device)
    value, scale = index_key_cache.quantize_rows(torch.randn(keys, INDEX_DIM, device=device), "fp32", fp8)
    start = torch.randint(0, keys + 1, (tokens,), device=device).int()
    end = torch.minimum(start + torch.randint(0, keys, (tokens,), device=device).int(), torch.full_like(start, keys))
    start[0], end[0] = 0, keys  # a full row
    start[-1], end[-1] = keys, keys  # an empty one
    return {
        "q": (torch.randn(tokens, heads, INDEX_DIM, device=device) * 8).to(fp8),
        "k": value,
        "k_scale": scale,
        "weights": torch.randn(tokens, heads, device=device),
        "row_start": start,
        "row_end": end,
    }


def check_ragged(impl: str, arguments: dict) -> None:
    expected = mqa_logits.ragged(**arguments, clean=True, impl="torch")
    actual = mqa_logits.ragged(**arguments, clean=True, out=torch.full_like(expected, float("nan")), impl=impl)
    assert_close(actual, expected, BAR)
    actual = mqa_logits.ragged(**arguments, out=torch.full_like(expected, float("nan")), impl=impl)
    assert_close(torch.where(expected == float("-inf"), expected, actual), expected, BAR)


@pytest.mark.parametrize("impl", implementations("ragged"))
@pytest.mark.parametrize("tokens, keys, heads", [(1, 1, 64), (5, 65, 64), (9, 300, 12), (3, 129, 1), (6, 64, 128)])
def test_ragged(device, impl, tokens, keys, heads):
    arguments = ragged_inputs(device, tokens, keys, heads)
    skip_unless_accepted(impl, arguments, "ragged")
    check_ragged(impl, arguments)


@pytest.mark.parametrize("impl", implementations("ragged"))
def test_ragged_ignores_nan_keys_outside_its_range(device, impl):
    arguments = ragged_inputs(device, 6, 200, 32)
    arguments["row_start"][:] = 10
    arguments["row_end"][:] = 150
    expected = mqa_logits.ragged(**arguments, clean=True, impl="torch")
    for outside in (slice(0, 10), slice(150, 200)):
        arguments["k"].view(torch.uint8)[outside] = 0x7F
        arguments["k_scale"][outside] = float("nan")
    skip_unless_accepted(impl, arguments, "ragged")
    assert_close(mqa_logits.ragged(**arguments, clean=True, impl=impl), expected, BAR)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", implementations("ragged"))
@pytest.mark.parametrize("tokens, keys", [(1, 40000), (257, 2049), (1000, 8191), (64, 2**25 + 100)])
def test_ragged_long(device, impl, tokens, keys):
    if keys > 2**25:  # logits past 2^31 elements: compare a few rows
        free = torch.cuda.mem_get_info()[0]
        if free < 24 * 2**30:
            pytest.skip("needs 24 GiB of GPU memory")
        arguments = ragged_inputs(device, tokens, keys, 64)
        arguments["row_start"][:] = keys - 5000
        arguments["row_end"][:] = keys
        skip_unless_accepted(impl, arguments, "ragged")
        actual = mqa_logits.ragged(**arguments, impl=impl)[:, -5000:]
        k, scale = arguments["k"][-5000:], arguments["k_scale"][-5000:]
        assert_close(actual, reference.weighted_logits(arguments["q"], k, scale, arguments["weights"]), BAR)
        return
    arguments = ragged_inputs(device, tokens, keys, 64)
    skip_unless_accepted(impl, arguments, "ragged")
    check_ragged(impl, arguments)


def skip_unless_accepted(impl: str, arguments: dict, function: str = "paged") -> None:
    """Skip where an implementation declines the call, with its reason."""
    module = registry._load("mqa_logits", impl)
    accepts = getattr(module, f"accepts_{function}", None)
    if accepts is None:
        return
    names = ("q", "cache", "weights", "context_lens", "block_table", "max_context_len")
    names = names if function == "paged" else ("q", "k", "k_scale", "weights", "row_start", "row_end")
    rest = {k: v for k, v in arguments.items() if k not in names}
    rows = arguments["q"].shape[0] * (arguments["q"].shape[1] if function == "paged" else 1)
    columns = arguments["max_context_len"] if function == "paged" else arguments["k"].shape[0]
    out = torch.empty(rows, columns, device=arguments["q"].device)
    support = accepts(*(arguments[n] for n in names), **rest, clean=True, out=out)
    if not support.ok:
        pytest.skip(f"{impl}: {support.reason}")


BAD_PAGED = {
    "heads": ({"weights": torch.zeros(2, 3)}, "weights"),
    "layout": ({"layout": "swizzled"}, "layout"),
    "lengths": ({"context_lens": torch.tensor([5, 6])}, "context_lens"),
    "too long": ({"context_lens": torch.tensor([500, 6], dtype=torch.int32)}, "context_lens"),
    "table": ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "block_table"),
    "width": ({"max_context_len": 0}, "max_context_len"),
    "page size": ({"page_size": 32}, "cache"),
}


@pytest.mark.parametrize("change, name", BAD_PAGED.values(), ids=BAD_PAGED.keys())
def test_paged_refuses(change, name):
    arguments = paged_inputs(torch.device("cpu"), [5, 6], 16, 1, "row_major")
    with pytest.raises(ValueError, match=name):
        mqa_logits.paged(**(arguments | change))


def test_declines_where_fp8_is_missing():
    from nsa_backend_plugin.ops.mqa_logits import triton as implementation

    assert not implementation.available("sm_80").ok
    assert "e4m3" in implementation.available("sm_80").reason
