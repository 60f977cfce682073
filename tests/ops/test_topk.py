"""Every implementation of topk.select that can run here, against the stable sort of the reference."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.engine import kernels
from nsa_backend_plugin.ops import dispatch, preferences, topk
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.topk import cuda
from tests.ops.implementations import run, runnable
from tools.calls import LOGITS, Calls, poison

kernels.register()
IMPLEMENTATIONS = runnable(topk.select)


def skip_known_limit(impl: str, kind: str, columns: int) -> None:
    """sgl_kernel returns wrong sets where thousands of logits share their leading bits; its file says more."""
    if impl == "sgl_kernel" and (kind in ("narrow", "plateau", "ascending") or columns > 100_000):
        pytest.skip("known limit of sgl_kernel's fast_topk")


def check(actual: torch.Tensor, logits: torch.Tensor, lengths: torch.Tensor, k: int, row_starts=None, **_) -> None:
    """The right number of distinct, valid indices; the same multiset of logits as a full sort; then -1."""
    assert actual.shape == (logits.shape[0], k)
    for row, length in enumerate(lengths.tolist()):
        found = min(length, k)
        index = actual[row, :found].long()
        assert (actual[row, found:] == -1).all(), f"row {row}: no -1 padding"
        assert ((index >= 0) & (index < length)).all(), f"row {row}: index out of range"
        assert index.unique().numel() == found, f"row {row}: an index twice"
        start = 0 if row_starts is None else int(row_starts[row])
        candidates = logits[row, start : start + length]
        expected = candidates.sort(descending=True).values[:found]
        assert torch.equal(candidates[index].sort(descending=True).values, expected), f"row {row}: not the top {k}"


def select(impl: str, arguments: dict, **options) -> torch.Tensor:
    """The call, into a poisoned output; skips what declines."""
    out = poison(len(arguments["logits"]), arguments["k"], dtype=torch.int32, device=arguments["logits"].device)
    return run(topk.select, impl, out=out, **arguments, **options)


def equals_reference(impl: str, arguments: dict) -> bool:
    want = topk.select(**arguments, deterministic=True, impl="torch")
    return torch.equal(select(impl, arguments, deterministic=True), want)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("columns, k", [(300, 48), (9001, 512), (9001, 1)])
def test_select(device, impl, kind, columns, k):
    arguments = Calls(device).topk_select([0, 1, max(k - 1, 1), k, k + 1, columns], columns, k, kind)
    check(select(impl, arguments), **arguments)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LOGITS)
def test_deterministic_equals_reference(device, impl, kind):
    assert equals_reference(impl, Calls(device).topk_select([9001, 8500, 32, 200], 9001, 128, kind))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("shared_table", [False, True])
def test_row_starts_and_page_table(device, impl, page_size, shared_table):
    rows, lengths = 7, [0, 1, 31, 32, 33, 290, 300]
    arguments = Calls(device).topk_select(lengths, 500, 32, starts=torch.randint(0, 200, (rows,)).tolist())
    tables = 3 if shared_table else rows
    pages = -(-300 // page_size)
    table = torch.randperm(tables * pages, device=device).int().view(tables, pages)
    page_rows = torch.randint(0, tables, (rows,), device=device).int() if shared_table else None
    arguments |= {"page_table": table, "page_rows": page_rows, "page_size": page_size}
    assert equals_reference(impl, arguments)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_unaligned_rows(device, impl, offset):
    arguments = Calls(device).topk_select([398, 50, 397], 401, 48, starts=[offset] * 3)
    check(select(impl, arguments), **arguments)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_rows(device, impl):
    assert select(impl, Calls(device).topk_select([], 100, 16)).shape == (0, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(
    "rows, columns", [(1, 8192), (8, 131_072), (20, 65_536), (64, 32768), (133, 20000), (300, 3000), (3, 1_000_000)]
)
def test_select_2048(device, impl, kind, rows, columns):
    skip_known_limit(impl, kind, columns)
    lengths = torch.randint(0, columns + 1, (rows,)).tolist()
    for row, length in enumerate((columns, 0, 1, 2047, 2048, 2049)):
        lengths[row % rows] = length
    lengths[0] = columns
    arguments = Calls(device).topk_select(lengths, columns, 2048, kind)
    check(select(impl, arguments), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [2, 4, 8])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("rows, columns", [(3, 30_000), (3, 40_000), (2, 163_840), (20, 70_001), (2, 600_000)])
def test_rows_shared_by_a_cluster(device, monkeypatch, blocks, kind, rows, columns):
    """Shares of every size in registers, and larger; more clusters than fit at once."""
    if not cuda._clusters(device_arch(device)):
        pytest.skip("no clusters on this GPU")
    monkeypatch.setattr(cuda, "_cluster", lambda *shape: blocks)
    lengths = [columns, *torch.randint(2048, columns + 1, (rows - 1,)).tolist()]
    arguments = Calls(device).topk_select(lengths, columns, 2048, kind)
    page_table = torch.randperm(-(-columns // 64), device=device).int().repeat(rows, 1)
    check(select("cuda", arguments), **arguments)
    for paged in ({}, {"page_table": page_table, "page_size": 64}):
        assert equals_reference("cuda", arguments | paged)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["plateau", "equal", "normal"])
@pytest.mark.parametrize("rows, columns", [(4, 100_000), (140, 12_000)])
def test_deterministic_reruns(device, impl, kind, rows, columns):
    arguments = Calls(device).topk_select([columns] * rows, columns, 2048, kind)
    for _ in range(20):
        assert equals_reference(impl, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_past_2_31_elements(device, impl):
    rows, columns = 17, 2**27
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    logits = torch.empty(rows, columns, device=device)
    logits[:, :5000].normal_()
    lengths = torch.full((rows,), 5000, dtype=torch.int32, device=device)
    actual = run(topk.select, impl, logits, lengths, 2048)
    check(actual, logits[:, :5000], lengths, 2048)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_graph_replays_with_other_lengths(device, impl):
    arguments = Calls(device).topk_select([40_000] * 4, 40_000, 2048)
    logits, lengths = arguments["logits"], arguments["lengths"]
    out = torch.empty(4, 2048, dtype=torch.int32, device=device)
    select(impl, arguments)
    topk.select(logits, lengths, 2048, out=out, impl=impl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk.select(logits, lengths, 2048, out=out, impl=impl)
    for replay in ([40_000, 9000, 2049, 1], [0, 0, 0, 0], [2048, 8193, 33_000, 0]):
        lengths.copy_(torch.tensor(replay, dtype=torch.int32))
        out.fill_(-7)
        graph.replay()
        check(out, logits, lengths, 2048)


def test_an_implementation_with_wrong_sets_is_never_preferred():
    rows = [row for row in preferences.TABLE if row.operation == "topk.select"]
    assert rows
    assert all("sgl_kernel" not in row.order for row in rows)


def test_external_implementation(monkeypatch, device):
    """An implementation that lives outside ops/ is found by name, and an unknown operation is refused."""
    monkeypatch.setattr(dispatch, "_external", {})
    dispatch.register_external("topk", "elsewhere", "nsa_backend_plugin.ops.topk.reference")
    logits, lengths = torch.randn(2, 10, device=device), torch.tensor([3, 10], dtype=torch.int32, device=device)
    check(topk.select(logits, lengths, 4, impl="elsewhere"), logits, lengths, 4)
    dispatch.register_external("topk", "elsewhere", "nsa_backend_plugin.ops.topk.reference")  # again: no change
    with pytest.raises(ValueError, match="op='nothing'"):
        dispatch.register_external("nothing", "elsewhere", "x")
    with pytest.raises(ValueError, match="name='torch'"):
        dispatch.register_external("topk", "torch", "x")
    dispatch._external.clear()
    dispatch.forget()
