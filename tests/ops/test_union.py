"""Queries that share one gather: lists of their rows, and attention over these, per row against float64.

What every implementation must do is in test_sparse_mla.py.
"""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.ops import sparse_mla
from nsa_backend_plugin.ops.arch import device_arch, pretended
from nsa_backend_plugin.ops.sparse_mla import _union_kernel, _union_lists, reference, union
from tests.conftest import HAS_GPU
from tests.ops.common import assert_close
from tests.ops.test_sparse_mla import BARS
from tools.calls import SOFTMAX_SCALE, latent_cache, poison, stored

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
#: Of the few rows that a CPU is given one may be most of a result, and the weights' rounding does not average out.
UNION_BARS = {**BARS, "bf16": BARS["bf16"] if HAS_GPU else 2e-5}
TOPK, TOKENS = (2048, 133) if HAS_GPU else (16, 5)

pytestmark = pytest.mark.skipif(
    union.available(device_arch(DEVICE)) is not None, reason=str(union.available(device_arch(DEVICE)))
)


def neighbours(tokens: int, topk: int, overlap: float, slots: torch.Tensor) -> torch.Tensor:
    """[tokens, topk] int32: each query keeps a share of its predecessor's slots; the rest the last 8 did not have."""
    rows = [slots[torch.randperm(len(slots), device=slots.device)[:topk]]]
    for _ in range(tokens - 1):
        kept = rows[-1][torch.randperm(topk, device=slots.device)[: round(topk * overlap)]]
        others = slots[~torch.isin(slots, torch.cat(rows[-8:]))]
        fresh = others[torch.randperm(len(others), device=slots.device)[: topk - len(kept)]]
        row = torch.cat([kept, fresh])
        rows.append(row[torch.randperm(topk, device=slots.device)])
    return torch.stack(rows).int()


def inputs(tokens: int, heads: int, kind: str, overlap: float, topk: int = TOPK) -> dict:
    return inputs_and_slots(tokens, heads, kind, overlap, topk)[0]


def inputs_and_slots(tokens: int, heads: int, kind: str, overlap: float, topk: int = TOPK) -> tuple[dict, torch.Tensor]:
    """Arguments of `attend`, and the slots that may be selected; the others are NaN."""
    used = 9 * topk + 3
    slots = torch.randperm(2 * used, device=DEVICE)[:used].int()
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    indices = neighbours(tokens, topk, overlap, slots)
    arguments = {
        "q": torch.randn(tokens, heads, 576, device=DEVICE).to(dtype),
        "kv": latent_cache(stored(torch.randn(used, 576, device=DEVICE), kind), slots.long(), 2 * used),
        "indices": indices,
        "softmax_scale": SOFTMAX_SCALE,
    }
    return arguments, slots


def exact(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float64, one query at a time; a slot that a query names twice counts twice."""
    kind = sparse_mla.kv_kind(arguments["kv"], 576, 512)
    outs, lses = [], []
    for query, selected in zip(arguments["q"].double(), arguments["indices"], strict=True):
        rows = reference.rows(arguments["kv"], selected[selected >= 0], kind, None, 512).double()
        score = query @ rows.T * arguments["softmax_scale"]
        outs.append(score.softmax(-1) @ rows[:, :512] if len(rows) else score.new_zeros(len(query), 512))
        lses.append(score.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


def check(arguments: dict, kind: str) -> None:
    q = arguments["q"]
    want, want_lse = exact(arguments)
    for out in (None, poison(*q.shape[:2], 512, dtype=q.dtype, device=DEVICE)):
        got, lse = sparse_mla.attend(**arguments, out=out, return_lse=True, impl="union")
        assert_close(got, want, UNION_BARS[kind])
        assert_close(lse, want_lse.float(), 1e-6)
        if not HAS_GPU:
            break


def shared(arguments: dict) -> list[bool]:
    """Which groups of the call share their rows."""
    heads = arguments["q"].shape[1]
    tile = _union_kernel.TILES[device_arch(DEVICE)]
    group = _union_kernel.group_size(heads, tile)
    lists = _union_lists.build(
        device_arch(DEVICE),
        arguments["indices"],
        arguments.get("lengths"),
        group=group,
        tile=tile.keys,
        most_percent=union.MOST_PERCENT[group],
    )
    return (lists.counts > 0).tolist()


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_overlaps(overlap: float, kind: str) -> None:
    arguments = inputs(TOKENS, 16, kind, overlap)
    if overlap in (0.0, 1.0):  # the last group has one query, which has nothing to share
        assert shared(arguments) == [overlap == 1.0] * (TOKENS // 4) + [False]
    check(arguments, kind)


@pytest.mark.parametrize("heads", [1, 3, 8, 12] if HAS_GPU else [3, 12])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64] if HAS_GPU else [7])
def test_heads_and_tokens(tokens: int, heads: int) -> None:
    """Groups of every size, the last one not full; rows of padding in the tile."""
    check(inputs(tokens, heads, "bf16", 0.9), "bf16")


def test_rows_of_other_lengths() -> None:
    """Each row ends elsewhere, one is empty; with the promise and without, where -1 may also stand between."""
    arguments = inputs(8, 16, "bf16", 1.0)
    indices = arguments["indices"].sort(dim=1).values
    lengths = torch.randint(TOPK - TOPK // 8, TOPK + 1, (8,), dtype=torch.int32, device=DEVICE)
    lengths[5] = 0
    arguments["indices"] = indices.where(torch.arange(TOPK, device=DEVICE) < lengths[:, None], -1)
    assert shared(arguments) == [True, True]
    check({**arguments, "lengths": lengths}, "bf16")
    arguments["indices"] = arguments["indices"].where(torch.rand(8, TOPK, device=DEVICE) > 0.1, -1)
    check(arguments, "bf16")


def test_nothing_is_read_behind_a_promised_length() -> None:
    arguments = inputs(4, 16, "bf16", 1.0)
    lengths = torch.tensor([TOPK, 3, TOPK - 1, 0], dtype=torch.int32, device=DEVICE)
    behind = torch.arange(TOPK, device=DEVICE) >= lengths[:, None]
    unused = min(set(range(arguments["kv"].shape[0])) - set(arguments["indices"].flatten().tolist()))
    arguments |= {"indices": arguments["indices"].where(~behind, -1), "lengths": lengths}
    want, want_lse = exact(arguments)
    call = sparse_mla.attend.call(**arguments, return_lse=True)
    call.indices = call.indices.where(~behind, unused)  # whose row is NaN
    got, lse = union.attend(call)
    assert_close(got, want, UNION_BARS["bf16"])
    assert_close(lse, want_lse.float(), 1e-6)


def test_a_slot_named_twice_counts_twice() -> None:
    """Its group is computed alone; the other one shares."""
    arguments = inputs(8, 16, "bf16", 1.0)
    arguments["indices"][2, 5:9] = arguments["indices"][2, 4]
    assert shared(arguments) == [False, True]
    check(arguments, "bf16")


def test_groups_of_empty_rows() -> None:
    arguments = inputs(8, 16, "bf16", 1.0)
    arguments["indices"][:5] = -1
    check(arguments, "bf16")


def test_one_row_dominates_where_it_is_not_owned() -> None:
    """A neighbour's row with a huge score must not move a query's running maximum."""
    arguments = inputs(4, 16, "bf16", 1.0)
    q, kv, indices = arguments["q"], arguments["kv"], arguments["indices"]
    q[:, :, 0] = 30.0
    loud = min(set(range(kv.shape[0])) - set(indices.flatten().tolist()))
    kv[loud] = 0.0
    kv[loud, 0, 0] = 3e4
    indices[1, 7] = loud
    assert shared(arguments) == [True]
    check(arguments, "bf16")


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("topk", [1, 31, 100, 2048] if HAS_GPU else [1, 31])
def test_lists(topk: int, group: int) -> None:
    """Every row once, in the order of the queries' lists, with its owners; whole tiles, of rows that exist."""
    tile = 32
    slots = torch.randperm(12 * topk + 10, device=DEVICE)[: 9 * topk + 5].int()
    indices = torch.cat([neighbours(group, topk, share, slots) for share in (1.0, 0.9, 0.7, 0.0)])[: 4 * group - 1]
    indices[torch.rand_like(indices, dtype=torch.float) < 0.1] = -1
    lengths = torch.randint(0, topk + 1, indices.shape[:1], device=DEVICE).int()
    for led in (None, lengths):
        options = {"group": group, "tile": tile, "most_percent": 75}
        lists = _union_lists.build(device_arch(DEVICE), indices, led, **options)
        for number, count in enumerate(lists.counts.tolist()):
            first = number * group
            members = [row.tolist() for row in indices[first : first + group]]
            if led is not None:
                members = [m[:n] for m, n in zip(members, led[first : first + group].tolist(), strict=True)]
            kept = [dict.fromkeys(slot for slot in m if slot >= 0) for m in members]
            union_rows = list(dict.fromkeys(slot for m in kept for slot in m))
            pays = 0 < 100 * len(union_rows) <= min(75 * sum(map(len, kept)), 100 * _union_lists.MOST_ROWS)
            assert count == (len(union_rows) if pays else 0)
            whole = [topk] * len(members) if led is None else led[first : first + group].tolist()
            assert lists.alone[first : first + group].tolist() == ([-1] * len(members) if pays else whole)
            if pays:
                owners = [sum(1 << j for j, m in enumerate(kept) if slot in m) for slot in union_rows]
                padding = [union_rows[0] << group] * (-count % tile)
                want = [row << group | bits for row, bits in zip(union_rows, owners, strict=True)] + padding
                assert lists.entries[number, : len(want)].tolist() == want


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [2048, 4096])
def test_a_union_larger_than_half_the_table(topk: int) -> None:
    """Eight queries that share nothing: the table would be full, so the search ends before."""
    indices = torch.randperm(8 * topk, device=DEVICE).int().view(8, topk)
    lists = _union_lists.build("sm_90", indices, None, group=8, tile=32, most_percent=100)
    assert lists.counts.tolist() == [0]
    assert lists.alone.tolist() == [topk] * 8


@pytest.mark.gpu
def test_reruns_are_bitwise_equal() -> None:
    arguments = inputs(64, 16, "bf16", 0.9)
    first = sparse_mla.attend(**arguments, impl="union")
    for _ in range(20):
        assert torch.equal(first, sparse_mla.attend(**arguments, impl="union"))


@pytest.mark.gpu
def test_a_graph_decides_anew_at_every_replay() -> None:
    arguments, slots = inputs_and_slots(64, 16, "bf16", 1.0)
    indices = arguments["indices"]
    lengths = torch.full((64,), TOPK, dtype=torch.int32, device=DEVICE)
    sparse_mla.attend(**arguments, lengths=lengths, return_lse=True, impl="union")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = sparse_mla.attend(**arguments, lengths=lengths, return_lse=True, impl="union")
    for share, kept in ((1.0, TOPK), (0.9, 700), (0.0, 64), (0.5, 0)):
        indices.copy_(neighbours(64, TOPK, share, slots))
        indices[:, kept:] = -1
        lengths.fill_(kept)
        out.fill_(float("nan"))
        graph.replay()
        want, want_lse = exact(arguments)
        assert_close(out, want, UNION_BARS["bf16"])
        assert_close(lse, want_lse.float(), 1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kv": "fp8"}, "only bf16 rows"),
        ({"kv": "packed"}, "only bf16 rows"),
        ({"heads": 17}, "17 heads: those of four queries do not fit a tile"),
        ({"heads": 65}, "65 heads: those of four queries do not fit a tile"),
        ({"topk": 8192}, "top-k 8192: at most 8191"),
        ({"slots": (1 << 27) + 1}, "at most 134217728 beside the owners' bits"),
        ({}, None),
    ],
)
def test_declines_with_a_reason(changes: dict, words: str | None) -> None:
    asked = {"kv": "bf16", "heads": 16, "topk": 2048, "slots": 1000} | changes
    with pretended("sm_90") as device:
        dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "packed": torch.uint8}[asked["kv"]]
        call = sparse_mla.attend.call(
            torch.empty(16, asked["heads"], 576, dtype=torch.bfloat16, device=device),
            torch.empty(asked["slots"], 1, 656 if asked["kv"] == "packed" else 576, dtype=dtype, device=device),
            torch.empty(16, asked["topk"], dtype=torch.int32, device=device),
            SOFTMAX_SCALE,
            kv_scale=1.0 if asked["kv"] == "fp8" else None,
        )
        reason = union.declines_attend(call)
    assert reason is None if words is None else words in str(reason)


def test_where_it_is_available() -> None:
    assert "not gfx942" in str(union.available("gfx942"))
    assert "not sm_120" in str(union.available("sm_120"))


@pytest.mark.parametrize("group", [4, 8])
def test_the_lists_are_smaller_than_the_indices(group: int) -> None:
    for topk in (1, 100, 512, 2048, 4096):
        percent = union.MOST_PERCENT[group]
        rows, entries = _union_lists.size(group, topk, 32, percent)
        assert rows + 31 <= entries <= rows + 63 + 32
        assert entries % 16 == 0
        assert rows <= group * topk * percent / 100
