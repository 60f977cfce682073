"""Every implementation of dense_mla that can run here, against the float32 reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops import dense_mla
from nsa_backend_plugin.ops._triton import mla_launch
from nsa_backend_plugin.ops.call import Step
from nsa_backend_plugin.ops.dense_mla import reference
from tests.conftest import HAS_GPU
from tests.ops import implementations
from tests.ops.common import assert_close
from tests.ops.implementations import bar, runnable
from tools.calls import Calls, poison

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
QUERY_DIM = 576
KINDS = ["bf16", "fp16", "fp8"]
PAGES = [*((size, "bf16") for size in dense_mla.PAGE_SIZES), (1, "fp8"), (64, "fp8")]
BAR = 5e-6
LSE_BAR = 1e-4
EDGE_LENGTHS = [0, 1, 63, 64, 65, 130]
LONG_LENGTHS = [2047, 2048, 2049, 0, 1, 8192, 63, 64, 65]


IMPLS = runnable(dense_mla.decode)
inputs = Calls(DEVICE).dense_mla_decode
#: What our own say when they decline a call of these tests: rows of another dtype.
NOT_THEIRS = ("only torch.float8_e4m3fn rows", "converts to")


def or_skip(impl: str, **arguments: Any) -> Any:
    return implementations.run(dense_mla.decode, impl, may_decline=NOT_THEIRS, **arguments)


@pytest.fixture(autouse=True)
def splits_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter too: a CPU counts as one core, which would never split."""
    if not HAS_GPU:
        monkeypatch.setattr(mla_launch, "core_count", lambda device: 132)


def expected(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the reference, both float32."""
    q = arguments["q"]
    call = dense_mla.decode.call(**arguments, return_lse=True)
    return reference.decode(dataclasses.replace(call, out=torch.empty(*q.shape[:2], 512, device=q.device)))


def run(impl: str, arguments: dict, num_kv_splits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The implementation's result in poisoned buffers; skips with the reason where it declines the call."""
    q = arguments["q"]
    batch, heads = q.shape[:2]
    size = dense_mla.workspace_bytes(max(batch, 1), heads, q.device, num_kv_splits=num_kv_splits)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=q.device)
    out = poison(batch, heads, 512, dtype=q.dtype, device=q.device)
    options = {"num_kv_splits": num_kv_splits, "out": out, "workspace": workspace}
    got, lse = or_skip(impl, **arguments, **options, return_lse=True)
    assert got is out
    return got, lse


def compare(actual: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor], most: float) -> None:
    assert_close(actual[0], want[0], most)
    assert_close(actual[1], want[1], 1e-6)
    finite = torch.isfinite(want[1])
    torch.testing.assert_close(actual[1][finite], want[1][finite], atol=LSE_BAR, rtol=LSE_BAR)


def limit(impl: str, arguments: dict) -> float:
    kind = "bf16" if arguments["kv"].dtype == torch.bfloat16 else "other"
    return bar(dense_mla.decode, impl, kind, BAR)


def check(impl: str, arguments: dict, num_kv_splits: int | None = None) -> None:
    compare(run(impl, arguments, num_kv_splits), expected(arguments), limit(impl, arguments))


@pytest.mark.parametrize(
    "heads, kind",
    [
        *((heads, kind) for heads in ((1, 8, 12, 16, 24, 32, 64, 128) if HAS_GPU else (1, 12)) for kind in KINDS),
        *([] if HAS_GPU else [(24, "fp16"), (24, "fp8"), (65, "bf16")]),  # ten seconds with 65 heads
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_heads(impl: str, heads: int, kind: str) -> None:
    check(impl, inputs(LONG_LENGTHS if HAS_GPU else [70], heads, kind=kind))


@pytest.mark.parametrize(
    "page_size, kind", [*((size, "bf16") for size in dense_mla.PAGE_SIZES), (1, "fp8"), (64, "fp8")]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_page_sizes_and_edge_lengths(impl: str, page_size: int, kind: str) -> None:
    out, lse = run(impl, arguments := inputs(EDGE_LENGTHS, 8, page_size, kind))
    compare((out, lse), expected(arguments), limit(impl, arguments))
    assert not out[0].any()
    assert torch.isneginf(lse[0]).all()


@pytest.mark.parametrize("num_kv_splits, kind", [*((n, "bf16") for n in (1, 2, 3, 17, 64)), (1, "fp8"), (17, "fp8")])
@pytest.mark.parametrize("impl", IMPLS)
def test_forced_splits(impl: str, num_kv_splits: int, kind: str) -> None:
    check(impl, inputs(LONG_LENGTHS if HAS_GPU else [130, 65], 16, kind=kind), num_kv_splits)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("batch", [1, 2, 7, 33, 64, 128, 300])
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("impl", IMPLS)
def test_batches(impl: str, heads: int, batch: int, kind: str) -> None:
    lengths = torch.randint(0, 1200, (batch,)).tolist()
    check(impl, inputs(lengths, heads, kind=kind))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("kv_size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("q_size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("impl", IMPLS)
def test_magnitudes(impl: str, q_size: float, kv_size: float, kind: str) -> None:
    check(impl, inputs([70], 8, kind=kind, q_size=q_size, kv_size=kv_size))


@pytest.mark.parametrize("impl", IMPLS)
def test_every_fp8_number(impl: str) -> None:
    """All bytes that are numbers, the subnormal ones too, as keys and as values."""
    arguments = inputs([300], 8, kind="fp8")
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    numbers = numbers[torch.isfinite(numbers.view(arguments["kv"].dtype).float())]
    rows = numbers[torch.randint(len(numbers), (arguments["kv"].shape[0], 1, QUERY_DIM), device=DEVICE)]
    check(impl, {**arguments, "kv": rows.view(arguments["kv"].dtype), "kv_scale": 0.02})


@pytest.mark.parametrize("impl", IMPLS)
def test_garbage_in_unused_table_entries(impl: str) -> None:
    """Entries past a length may name any page, also one that does not exist."""
    arguments = inputs([65, 3], 8)
    garbage = arguments["block_table"].clone()
    width = garbage.shape[1]
    wide = torch.full((2, width + 3), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    wide[0, :2] = garbage[0, :2]
    wide[1, :1] = garbage[1, :1]
    check(impl, {**arguments, "block_table": wide})


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch(impl: str) -> None:
    arguments = inputs([5], 8)
    none = {name: arguments[name][:0] for name in ("q", "block_table", "seq_lens")}
    check(impl, {**arguments, **none})


@pytest.mark.parametrize("page_size, kind", [(1, "bf16"), (64, "bf16"), (64, "fp8")])
@pytest.mark.parametrize("heads", [8, 64, 128] if HAS_GPU else [3])
@pytest.mark.parametrize("impl", IMPLS)
def test_promises_and_results_of_the_implementations_own(impl: str, heads: int, page_size: int, kind: str) -> None:
    """No length of 0, finite numbers past each length; nowhere to write given."""
    arguments = inputs([65, 1, *[700] * HAS_GPU], heads, page_size, kind)
    want = expected(arguments)
    kv = arguments["kv"]
    finite = {"kv": kv.float().nan_to_num(3.0).to(kv.dtype), "kv_is_finite": True}
    for promises in ({}, {"rows_have_keys": True}, finite, {**finite, "rows_have_keys": True}):
        compare(or_skip(impl, **{**arguments, **promises}, return_lse=True), want, limit(impl, arguments))
        compare(run(impl, {**arguments, **promises}), want, limit(impl, arguments))


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_and_tables_of_any_stride(impl: str) -> None:
    arguments = inputs([130, 3, 64], 8)
    lengths, table = arguments["seq_lens"], arguments["block_table"]
    spread = torch.stack([lengths, torch.full_like(lengths, 2**30)], dim=1)[:, 0]
    wide = torch.cat([table, torch.full_like(table, 2**30)], dim=1)[:, : table.shape[1]]
    check(impl, {**arguments, "seq_lens": spread, "block_table": wide})


@pytest.mark.parametrize("scale", [0.0, -0.05])
@pytest.mark.parametrize("impl", IMPLS)
def test_scales_that_are_not_positive(impl: str, scale: float) -> None:
    """Ours compute them; a kernel that masks before it scales must decline."""
    check(impl, {**inputs([70, 300 if HAS_GPU else 5], 16), "softmax_scale": scale})


@pytest.mark.parametrize("heads", [16, 64] if HAS_GPU else [3])
@pytest.mark.parametrize("impl", IMPLS)
def test_layers_of_one_step(impl: str, heads: int) -> None:
    """Other queries and caches, the same pages: what the first layer made serves the others."""
    step, first = Step(), inputs([130, 1, 64], heads)
    for _ in range(3):
        shared = {name: first[name] for name in ("block_table", "seq_lens")}
        layer = {**first, **shared, "q": torch.randn_like(first["q"]), "kv": first["kv"] + torch.randn(()).item()}
        compare(or_skip(impl, **layer, step=step, return_lse=True), expected(layer), limit(impl, layer))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("impl", IMPLS)
def test_graph_of_layers_that_share_a_step(impl: str, heads: int) -> None:
    """Schedules are made inside the graph: a replay makes them anew from the lengths that it finds."""
    first = inputs([4096] * 4, heads)
    layers = [{**first, "q": torch.randn_like(first["q"])} for _ in range(4)]
    or_skip(impl, **first)  # compiles, or skips
    step, graph = Step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [or_skip(impl, **layer, step=step, return_lse=True) for layer in layers]
    for lengths in ([4096, 1, 2048, 77], [64, 65, 0, 4095], [0, 0, 0, 0]):
        first["seq_lens"].copy_(torch.tensor(lengths))
        graph.replay()
        for layer, got in zip(layers, results, strict=True):
            compare(got, expected(layer), limit(impl, layer))


@pytest.mark.parametrize("kind", ["bf16", "fp8"] if HAS_GPU else ["fp8"])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_apart_from_each_other(impl: str, kind: str) -> None:
    arguments = inputs([130, 3], 8, kind=kind)
    raw = arguments["kv"].view(torch.uint8)
    wide = torch.cat([raw, torch.full_like(raw, 0xFF)], dim=-1).view(arguments["kv"].dtype)
    check(impl, {**arguments, "kv": wide[..., :QUERY_DIM]})


@pytest.mark.parametrize("flavour", FP8_DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_foreign_flavour_of_fp8_is_declined_or_read(impl: str, flavour: torch.dtype) -> None:
    """Bytes of the two are not interchangeable: never read as the other."""
    arguments = inputs([70], 8, kind="fp8")
    kv = arguments["kv"].float().clamp(-200, 200).to(flavour)
    check(impl, {**arguments, "kv": kv})


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("page_size", [1, 64])
def test_some_rows_of_a_call_are_a_call(page_size: int, kind: str) -> None:
    call = dense_mla.decode.call(**inputs([65, 0, 3, 130], 3, page_size, kind), return_lse=True)
    some = torch.tensor([2, 1, 3], device=DEVICE)
    assert call.row_count() == 4
    for got, whole in zip(reference.decode(call.of_rows(some)), reference.decode(call), strict=True):
        assert torch.equal(got, whole[some])


def test_triton_declines_too_many_splits() -> None:
    with pytest.raises(ValueError, match="num_kv_splits=257: at most 256"):
        dense_mla.decode(**inputs([5], 8), num_kv_splits=257, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("impl", IMPLS)
def test_cache_past_two_gigabytes_and_two_billion_elements(impl: str, kind: str) -> None:
    """The pages in use lie at the end of a cache whose element offsets do not fit 32 bits."""
    arguments = inputs([2049, 700], 16, kind=kind)
    small, want = arguments["kv"], expected(arguments)
    pages = (2**31 // QUERY_DIM + 2 * small.shape[0]) // 64
    big = torch.empty(pages * 64, 1, QUERY_DIM, dtype=small.dtype, device=DEVICE)
    assert big.numel() > 2**31
    big.view(torch.uint8)[-small.shape[0] :] = small.view(torch.uint8)
    table = arguments["block_table"] + (big.shape[0] - small.shape[0]) // 64
    compare(run(impl, {**arguments, "kv": big, "block_table": table}), want, limit(impl, arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("impl", IMPLS)
def test_reruns_are_bitwise_equal(impl: str, heads: int, kind: str) -> None:
    arguments = inputs(LONG_LENGTHS, heads, kind=kind)
    first = run(impl, arguments)
    for _ in range(20):
        again = run(impl, arguments)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("impl", IMPLS)
def test_graph_replay_with_other_lengths(impl: str, kind: str) -> None:
    arguments = inputs([4096] * 4, 16, kind=kind)
    run(impl, arguments)  # compiles, or skips
    size = dense_mla.workspace_bytes(4, 16, DEVICE)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(4, 16, 512, dtype=arguments["q"].dtype, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    buffers = {"out": out, "workspace": workspace, "return_lse": True}
    with torch.cuda.graph(graph):
        _, lse = or_skip(impl, **arguments, **buffers)
    for lengths in ([4096, 1, 2048, 77], [64, 65, 0, 4095], [0, 0, 0, 0]):
        arguments["seq_lens"].copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        graph.replay()
        compare((out, lse), expected(arguments), limit(impl, arguments))
