"""Our CUDA C++ on a CPU beside the references: addresses, waits and sums of the variants that a GPU runs.

What it cannot show is said in `emulator`. On a GPU host the kernels themselves run (the tests of each operation).
"""

from __future__ import annotations

import dataclasses
import random
from types import ModuleType
from typing import Any

import pytest
import torch

from nsa_backend_plugin.ops import dense_mla, projection, sparse_mla, topk
from nsa_backend_plugin.ops._cuda import mla
from nsa_backend_plugin.ops.dense_mla import cuda as dense_cuda
from nsa_backend_plugin.ops.dispatch import Operation
from nsa_backend_plugin.ops.projection import cuda as projection_cuda
from nsa_backend_plugin.ops.projection import wgmma
from nsa_backend_plugin.ops.sparse_mla import _union_lists
from nsa_backend_plugin.ops.sparse_mla import cuda as sparse_cuda
from nsa_backend_plugin.ops.topk import cuda as topk_cuda
from tests.conftest import HAS_GPU
from tests.ops.common import assert_close
from tests.ops.emulator import ARCH, emulated
from tools.calls import Calls, poison

__all__ = ["emulated"]
pytestmark = [pytest.mark.skipif(HAS_GPU, reason="the kernels run"), pytest.mark.usefixtures("emulated")]
MAKE = Calls(torch.device("cpu"))
FP8_BAR, BF16_BAR, PACKED_BAR = 1e-3, 5e-6, 1e-5


def on_gpu(operation: Operation, arguments: dict[str, Any], **more: Any) -> Any:
    """The call as of the emulated GPU."""
    return dataclasses.replace(operation.call(**arguments, **more), arch=ARCH)


def with_cores(monkeypatch: pytest.MonkeyPatch, module: ModuleType, cores: int) -> None:
    monkeypatch.setattr(module, "core_count", lambda device: cores)


def wgmma_variants(sizes: wgmma._Sizes, cores: int) -> tuple[wgmma._Variant, ...]:
    """One at random among those that can be served: any division of the depth, any number of stages."""
    kind, _, _, blocks = sizes
    cluster = random.choice([n for n in (1, 2, 3, 8) if n <= blocks])
    share = -(-blocks // cluster)
    cluster = -(-blocks // share)
    warpgroups = random.choice([1, 2, 4])
    passes = -(-share // warpgroups)
    stages = random.randint(min(2, passes), min(4, passes))
    return tuple(wgmma._Variant(kind, tokens, warpgroups, stages, cluster, share) for tokens in wgmma._TOKENS)


@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 32])
@pytest.mark.parametrize("fp8, norm", [(True, False), (True, True), (False, False)])
def test_projection_by_wgmma(tokens: int, fp8: bool, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wgmma, "_variants", wgmma_variants)
    rows, depth = random.choice([(64, 128), (200, 640), (72, 1664)])
    check_projection(wgmma, tokens, rows, depth, fp8, norm)


@pytest.mark.parametrize("tokens", [1, 8, 13, 32])
@pytest.mark.parametrize("fp8, norm", [(True, False), (True, True), (False, False)])
def test_projection(tokens: int, fp8: bool, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, projection_cuda, random.choice([2, 8, 132]))
    rows, depth = random.choice([(64, 128), (200, 640), (72, 2560)])
    check_projection(projection_cuda, tokens, rows, depth, fp8, norm)


def check_projection(module: ModuleType, tokens: int, rows: int, depth: int, fp8: bool, norm: bool) -> None:
    arguments = MAKE.projection_linear(tokens, rows, depth, fp8, norm)
    dtype = torch.bfloat16 if fp8 else torch.float32
    out = poison(tokens, rows + 16, dtype=dtype, device="cpu")[:, :rows]
    call = on_gpu(projection.linear, arguments, dtype=dtype, out=out)
    assert module.declines_linear(call) is None
    module.linear(call)
    assert_close(out, projection.linear(**arguments, dtype=torch.float32, impl="torch"), FP8_BAR if fp8 else BF16_BAR)


@pytest.mark.parametrize("tokens", [1, 11, 32])
def test_per_head(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, projection_cuda, 8)
    arguments = MAKE.projection_per_head(tokens, 3, 40, 128)
    q_all = poison(tokens, 3, 40 + 64, dtype=torch.bfloat16, device="cpu")
    projection_cuda.per_head(on_gpu(projection.per_head, arguments, out=q_all[..., :40]))
    assert_close(
        q_all[..., :40], torch.einsum("thk,hnk->thn", *(arguments[n].double() for n in ("x", "weight"))), BF16_BAR
    )
    assert q_all[..., 40:].isnan().all()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["normal", "plateau", "narrow"])
@pytest.mark.parametrize("columns, cores", [(700, 132), (5000, 1), (17_000, 132), (3000, 132)])
def test_topk(columns: int, cores: int, kind: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In registers, streamed, and shared by a cluster; with a page table that shared memory holds, and without."""
    with_cores(monkeypatch, topk_cuda, cores)
    lengths = [columns, 40, columns - 3]
    arguments = MAKE.topk_select(lengths, columns, 512, kind)
    page_size = 1 if columns == 3000 else 64
    pages = torch.stack([torch.randperm(-(-columns // page_size)) for _ in lengths]).int()
    call = on_gpu(topk.select, arguments, page_table=pages, page_size=page_size, deterministic=deterministic)
    slots = topk_cuda.select(call).long()
    want = topk.select(**arguments, deterministic=True, impl="torch").long()
    for row, table, found, expected in zip(arguments["logits"], pages.argsort(), slots, want, strict=True):
        picked = found[found >= 0]
        picked = table[picked // page_size] * page_size + picked % page_size
        expected = expected[expected >= 0]
        assert len(picked.unique()) == len(picked) == len(expected)
        assert torch.equal(row[picked].sort().values, row[expected].sort().values)
        if deterministic:
            assert torch.equal(picked, expected)


@pytest.mark.parametrize("heads, keys, cores", [(12, 300, 132), (33, 300, 1), (16, 40, 132)])
def test_packed_rows(heads: int, keys: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many splits with a merge, and in one."""
    with_cores(monkeypatch, mla, cores)
    arguments = MAKE.sparse_mla_attend(3, heads, keys, "packed")
    arguments["indices"][1] = -1
    check_attention(sparse_mla.attend, sparse_cuda.attend, arguments)


@pytest.mark.parametrize("heads, cores", [(12, 132), (20, 1)])
def test_plain_rows(heads: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, mla, cores)
    check_attention(dense_mla.decode, dense_cuda.decode, MAKE.dense_mla_decode([170, 0, 65], heads, kind="fp8"))


def check_attention(operation: Operation, run: Any, arguments: dict[str, Any]) -> None:
    tokens, heads, _ = arguments["q"].shape
    out = poison(tokens, heads, 512, dtype=torch.bfloat16, device="cpu")
    got, lse = run(on_gpu(operation, arguments, return_lse=True, out=out))
    want, want_lse = operation(**arguments, return_lse=True, impl="torch")
    assert got.data_ptr() == out.data_ptr()
    assert_close(got, want, PACKED_BAR)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_union_lists(group: int) -> None:
    """As the loop in torch makes them; the order of a list is free."""
    rows = torch.randperm(400)[:120]
    indices = torch.stack([rows[torch.randperm(120)[:90]] for _ in range(11)]).int()
    indices[3, 20:] = -1
    lists = [_union_lists.build(arch, indices, None, group=group, tile=32, most_percent=90) for arch in ("cpu", ARCH)]
    want, got = lists
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.alone, want.alone)
    for mine, theirs, count in zip(got.entries, want.entries, want.counts.tolist(), strict=True):
        assert torch.equal(mine[:count].sort().values, theirs[:count].sort().values)
