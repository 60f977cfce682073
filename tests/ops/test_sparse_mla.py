"""Every implementation of sparse_mla that can run here, against the float32 reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nsa_backend_plugin.ops import sparse_mla
from nsa_backend_plugin.ops._triton import mla_launch
from nsa_backend_plugin.ops.call import Step
from nsa_backend_plugin.ops.sparse_mla import reference
from nsa_backend_plugin.ops.sparse_mla import triton as sparse_triton
from tests.conftest import HAS_GPU
from tests.ops.common import assert_close
from tests.ops.implementations import bar, runnable
from tests.ops.implementations import run as or_skip
from tools.calls import Calls, poison

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
QUERY_DIM = 576
KINDS = ["bf16", "fp16", "fp8", "packed"]
BARS = {"bf16": 5e-6, "fp16": 5e-6, "fp8": 2e-4, "packed": 2e-4}
LSE_BAR = 1e-4


IMPLS = runnable(sparse_mla.attend)
inputs = Calls(DEVICE).sparse_mla_attend
#: Whose log-sum-exp is not exact enough to be given: their output alone is compared.
NO_LSE = (("flash_mla", "packed"),)
Result = tuple[torch.Tensor, torch.Tensor | None]
#: What our own say when they decline a call of these tests: a cache of another kind, queries of another type.
NOT_THEIRS = {
    "cuda": ("only packed fp8 rows",),
    "union": ("only bf16 rows", "those of four queries do not fit"),
    "tilelang": ("only bfloat16", "top-k 0", "no tokens"),
}


@pytest.fixture(autouse=True)
def splits_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter too: a CPU counts as one core, which would never split."""
    if not HAS_GPU:
        monkeypatch.setattr(mla_launch, "core_count", lambda device: 132)


def expected(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the reference, both float32."""
    q = arguments["q"]
    call = sparse_mla.attend.call(**arguments, return_lse=True)
    return reference.attend(dataclasses.replace(call, out=torch.empty(*q.shape[:2], 512, device=q.device)))


def attend(impl: str, arguments: dict, **buffers: torch.Tensor) -> Result:
    """(out, lse, which is None of those that give none); skips with the reason where the implementation declines."""
    lse = (impl, "packed" if arguments["kv"].dtype == torch.uint8 else "") not in NO_LSE
    options = {**arguments, **buffers, "return_lse": lse}
    got = or_skip(sparse_mla.attend, impl, may_decline=NOT_THEIRS.get(impl, ()), **options)
    return got if lse else (got, None)


def run(impl: str, arguments: dict) -> Result:
    """The implementation's result in poisoned buffers."""
    q = arguments["q"]
    tokens, heads = q.shape[:2]
    size = sparse_mla.workspace_bytes(max(tokens, 1), heads, arguments["indices"].shape[1], q.device)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=q.device)
    out = poison(tokens, heads, 512, dtype=q.dtype, device=q.device)
    got, lse = attend(impl, arguments, out=out, workspace=workspace)
    assert got is out
    return got, lse


def compare(actual: Result, want: tuple[torch.Tensor, torch.Tensor], most: float) -> None:
    assert_close(actual[0], want[0], most)
    if actual[1] is None:
        return
    assert_close(actual[1], want[1], 1e-6)
    finite = torch.isfinite(want[1])
    torch.testing.assert_close(actual[1][finite], want[1][finite], atol=LSE_BAR, rtol=LSE_BAR)


def limit(impl: str, kind: str) -> float:
    return bar(sparse_mla.attend, impl, kind, BARS[kind])


def check(impl: str, arguments: dict, most: float) -> None:
    compare(run(impl, arguments), expected(arguments), most)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 8, 12, 16, 24, 32, 64, 128] if HAS_GPU else [1, 12, 24, 65])
@pytest.mark.parametrize("impl", IMPLS)
def test_heads(impl: str, heads: int, kind: str) -> None:
    check(impl, inputs(3 if HAS_GPU else 1, heads, 2048 if HAS_GPU else 40, kind), limit(impl, kind))


@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("topk", [1, 31, 64, 100, 1023, 2048, 2049] if HAS_GPU else [1, 31, 64, 100])
@pytest.mark.parametrize("impl", IMPLS)
def test_topk_of_any_size(impl: str, topk: int, kind: str) -> None:
    check(impl, inputs(2, 16, topk, kind), limit(impl, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 64, 128, 150, 300, 1500])
@pytest.mark.parametrize("impl", IMPLS)
def test_token_counts(impl: str, tokens: int, kind: str) -> None:
    check(impl, inputs(tokens, 16, 512, kind), limit(impl, kind))


@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_missing_indices(impl: str, kind: str) -> None:
    """All missing, all but the last missing, whole tiles missing in the middle, and repeated slots."""
    arguments = inputs(5, 8, 256, kind, missing=0.0)
    indices = arguments["indices"]
    indices[0] = -1
    indices[1, :-1] = -1
    indices[2, 30:200] = -1
    indices[3, 1:] = -1
    indices[4, 128:] = indices[4, :1]
    out, lse = run(impl, arguments)
    compare((out, lse), expected(arguments), limit(impl, kind))
    assert not out[0].any()
    assert lse is None or torch.isneginf(lse[0]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_and_no_indices(impl: str) -> None:
    arguments = inputs(2, 8, 32)
    check(impl, {**arguments, "q": arguments["q"][:0], "indices": arguments["indices"][:0]}, limit(impl, "bf16"))
    check(impl, {**arguments, "indices": arguments["indices"][:, :0].contiguous()}, limit(impl, "bf16"))


@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("kv_size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("q_size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("impl", IMPLS)
def test_magnitudes(impl: str, q_size: float, kv_size: float, kind: str) -> None:
    arguments = inputs(1, 8, 80 if HAS_GPU else 33, kind, q_size=q_size, kv_size=kv_size)
    check(impl, arguments, limit(impl, kind))


@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_all_zero_rows(impl: str, kind: str) -> None:
    arguments = inputs(2, 8, 40, kind, kv_size=0.0)
    out, lse = run(impl, arguments)
    assert not out.any()
    compare((out, lse), expected(arguments), limit(impl, kind))


ALL_TILES = sorted(
    {
        (kind, mla_launch.tile(arch, kind, heads))
        for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950")
        for kind in ("bf16", "fp8", "packed")
        for heads in (16, 32, 64)
    },
    key=str,
)


@pytest.mark.parametrize("kind, config", ALL_TILES, ids=str)
@pytest.mark.skipif(HAS_GPU, reason="tiles of other architectures run in the interpreter only")
def test_tiles_of_every_architecture(kind: str, config: mla_launch.Tile, monkeypatch) -> None:
    """The configurations that a call selects elsewhere, operand swap included, compute the same."""
    heads = config.heads + 1
    arguments = inputs(1, heads, 70, kind)
    q = arguments["q"]
    out = poison(1, heads, 512, dtype=q.dtype, device=q.device)
    call = sparse_mla.attend.call(**arguments, out=out, return_lse=True)
    lengths = torch.full((1,), 70, dtype=torch.int32)
    monkeypatch.setattr(mla_launch, "tile", lambda *_: config)
    result = mla_launch.attend(call, arguments["indices"], lengths, 70, kind=kind, splits=2)
    compare(result, expected(arguments), BARS[kind])


@pytest.mark.parametrize("kind", ["bf16", "packed"])
def test_triton_ends_at_a_rows_length(kind: str) -> None:
    """A short context costs what it has: behind the promised lengths there is a row of NaN here, not -1."""
    arguments = inputs(3, 8, 300, kind, missing=0.0)
    indices, lengths = arguments["indices"], torch.tensor([1, 137, 0], dtype=torch.int32, device=DEVICE)
    behind = torch.arange(300, device=DEVICE) >= lengths[:, None]
    unused = min(set(range(arguments["kv"].shape[0])) - set(indices.flatten().tolist()))
    arguments |= {"indices": indices.where(~behind, -1), "lengths": lengths}
    call = sparse_mla.attend.call(**arguments, return_lse=True)
    broken = dataclasses.replace(call, indices=indices.where(~behind, unused))
    compare(sparse_triton.attend(broken), expected(arguments), BARS[kind])


def test_triton_refuses_a_small_workspace() -> None:
    arguments = inputs(1, 8, 256)
    workspace = torch.empty(1024, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match=r"workspace.numel\(\)=1024: expected at least \d+ bytes"):
        sparse_mla.attend(**arguments, workspace=workspace, impl="triton")


def test_triton_declines_with_a_reason() -> None:
    arguments = inputs(1, 8, 8)
    with pytest.raises(ValueError, match="q is float32"):
        sparse_mla.attend(**{**arguments, "q": arguments["q"].float()}, impl="triton")
    with pytest.raises(ValueError, match=r"kv is torch.bfloat16 but q is torch.float16"):
        sparse_mla.attend(**{**arguments, "q": arguments["q"].half()}, impl="triton")


@pytest.mark.parametrize(
    "arch, cores", [("sm_80", 108), ("sm_90", 132), ("sm_90", 78), ("gfx942", 304), ("sm_120", 188)]
)
def test_workspace_suffices_for_every_smaller_call(arch: str, cores: int, monkeypatch) -> None:
    monkeypatch.setattr(mla_launch, "core_count", lambda device: cores)
    limit = mla_launch.workspace_bytes(DEVICE, 200, 48, 512)
    config = mla_launch.tile(arch, "bf16", 48)
    for rows in range(1, 201):
        splits = mla_launch.split_count(cores, rows, 48, 1 << 20, config)
        assert splits == 1 or mla_launch.scratch_bytes(rows * splits, 48, 512) <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_cache_past_two_gigabytes_and_two_billion_elements(impl: str, kind: str) -> None:
    """The selected slots lie at the end of a cache whose element offsets do not fit 32 bits."""
    arguments = inputs(2, 16, 2048, kind)
    small = arguments["kv"]
    slots = 2**31 // small.shape[-1] + 2 * small.shape[0]
    big = torch.empty(slots, 1, small.shape[-1], dtype=small.dtype, device=DEVICE)
    assert big.numel() > 2**31
    want = expected(arguments)
    big[-small.shape[0] :] = small
    indices = arguments["indices"]
    moved = torch.where(indices >= 0, indices + (slots - small.shape[0]), indices)
    compare(run(impl, {**arguments, "kv": big, "indices": moved}), want, limit(impl, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("impl", IMPLS)
def test_reruns_are_bitwise_equal(impl: str, tokens: int, kind: str) -> None:
    arguments = inputs(tokens, 16, 2048, kind)
    first = run(impl, arguments)
    for _ in range(20):
        again = run(impl, arguments)
        assert torch.equal(first[0], again[0])
        assert first[1] is None or torch.equal(first[1], again[1])


@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("heads", [8, 64] if HAS_GPU else [3])
@pytest.mark.parametrize("impl", IMPLS)
def test_promises_and_results_of_the_implementations_own(impl: str, heads: int, kind: str) -> None:
    """Leading slots only, with and without their lengths; no row without a key; nowhere to write given."""
    topk = 2048 if HAS_GPU else 40
    arguments = inputs(3, heads, topk, kind, missing=0.0)
    lengths = torch.tensor([1, topk // 2 - 3, topk], dtype=torch.int32, device=DEVICE)
    for row, length in enumerate(lengths.tolist()):
        arguments["indices"][row, length:] = -1
    want = expected(arguments)
    wide = torch.stack([lengths, lengths], dim=1)[:, 0]  # every other element
    for promises in ({}, {"rows_have_keys": True}, {"lengths": lengths}, {"lengths": wide, "rows_have_keys": True}):
        for compute in (attend, run):
            compare(compute(impl, {**arguments, **promises}), want, limit(impl, kind))


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_of_nothing(impl: str) -> None:
    topk = 128 if HAS_GPU else 33
    arguments = inputs(3, 8, topk, missing=0.0)
    arguments["indices"][1] = -1
    lengths = torch.tensor([topk, 0, topk], dtype=torch.int32, device=DEVICE)
    out, lse = run(impl, {**arguments, "lengths": lengths})
    compare((out, lse), expected(arguments), limit(impl, "bf16"))
    assert not out[1].any()
    assert lse is None or torch.isneginf(lse[1]).all()


@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("scale", [0.0, -0.05])
@pytest.mark.parametrize("impl", IMPLS)
def test_scales_that_are_not_positive(impl: str, scale: float, kind: str) -> None:
    """Ours compute them; a kernel that masks before it scales must decline."""
    check(impl, {**inputs(2, 16, 300 if HAS_GPU else 60, kind), "softmax_scale": scale}, limit(impl, kind))


@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("heads", [16, 64] if HAS_GPU else [3])
@pytest.mark.parametrize("impl", IMPLS)
def test_layers_of_one_step(impl: str, heads: int, kind: str) -> None:
    """Other queries, indices and caches, the same lengths: what the first layer made serves the others."""
    step, topk = Step(), 128 if HAS_GPU else 33
    lengths = torch.tensor([topk, 7], dtype=torch.int32, device=DEVICE)
    for _ in range(3):
        arguments = inputs(2, heads, topk, kind, missing=0.0)
        arguments["indices"][1, 7:] = -1
        for given in (None, lengths):
            got = attend(impl, {**arguments, "step": step, "lengths": given})
            compare(got, expected(arguments), limit(impl, kind))


@pytest.mark.parametrize("impl", IMPLS)
def test_flash_mla_own_test_data(impl: str) -> None:
    """Small values, nearly equal weights, the last two of the indices missing; FlashMLA's bar."""
    tokens, heads, topk = (4, 16, 2048) if HAS_GPU else (1, 3, 256)
    arguments = inputs(tokens, heads, topk, "packed", q_size=0.1, kv_size=0.1, missing=0.0)
    arguments["indices"][:, -2:] = -1
    check(impl, arguments, bar(sparse_mla.attend, impl, "packed", 5e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_graph_of_layers_that_share_a_step(impl: str, kind: str) -> None:
    """Schedules are made inside the graph: a replay makes them anew from the lengths that it finds."""
    layers = [inputs(4, 64, 2048, kind, missing=0.0) for _ in range(4)]
    lengths = torch.full((4,), 2048, dtype=torch.int32, device=DEVICE)
    attend(impl, {**layers[0], "lengths": lengths})  # compiles, or skips
    originals = [layer["indices"].clone() for layer in layers]
    step, graph = Step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [attend(impl, {**layer, "lengths": lengths, "step": step}) for layer in layers]
    for kept in ([2048, 1, 700, 64], [5, 2048, 0, 2047], [0, 0, 0, 0]):
        lengths.copy_(torch.tensor(kept))
        for layer, original in zip(layers, originals, strict=True):
            layer["indices"].copy_(original.roll(1, 0))
            for row, length in enumerate(kept):
                layer["indices"][row, length:] = -1
        graph.replay()
        for layer, got in zip(layers, results, strict=True):
            compare(got, expected(layer), limit(impl, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "packed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_graph_replay_with_other_indices(impl: str, kind: str) -> None:
    arguments = inputs(4, 16, 2048, kind)
    run(impl, arguments)  # compiles, or skips
    size = sparse_mla.workspace_bytes(4, 16, 2048, DEVICE)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(4, 16, 512, dtype=arguments["q"].dtype, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = attend(impl, arguments, out=out, workspace=workspace)
    for keep in (2048, 700, 1, 0):
        arguments["indices"].copy_(arguments["indices"].roll(1, 0))
        arguments["indices"][:, keep:] = -1
        out.fill_(float("nan"))
        graph.replay()
        compare((out, lse), expected(arguments), limit(impl, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_of_a_call_are_a_call(kind: str) -> None:
    arguments = inputs(5, 3, 40, kind)
    call = sparse_mla.attend.call(**arguments, return_lse=True)
    some = torch.tensor([4, 1], device=DEVICE)
    assert call.row_count() == 5
    assert call.of_rows(some).kv.shape[0] < arguments["kv"].shape[0] + 64
    for got, whole in zip(reference.attend(call.of_rows(some)), reference.attend(call), strict=True):
        assert torch.equal(got, whole[some])


def test_kinds_are_recognised() -> None:
    for kind in KINDS:
        arguments = inputs(1, 1, 1, kind)
        assert sparse_mla.kv_kind(arguments["kv"], QUERY_DIM, 512) == ("bf16" if kind == "fp16" else kind)
