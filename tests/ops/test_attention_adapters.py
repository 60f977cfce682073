"""Adapters to vendors' MLA kernels, against fakes that check the arguments and compute the answer in torch.

The real libraries run in test_sparse_mla.py and test_dense_mla.py, which take every implementation that is available.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nsa_backend_plugin.ops import dense_mla, sparse_mla
from nsa_backend_plugin.ops._torch.mla import softmax_attention
from nsa_backend_plugin.ops._vendor import flash_mla as vendor_flash_mla
from nsa_backend_plugin.ops._vendor import flashinfer as vendor_flashinfer
from nsa_backend_plugin.ops._vendor import mla, probe
from nsa_backend_plugin.ops.call import Step
from nsa_backend_plugin.ops.sparse_mla.reference import rows
from tests.ops import fake_aiter_attention
from tests.ops.common import assert_close
from tests.ops.fake_aiter import as_declared
from tests.ops.implementations import DEVICE
from tools.calls import SOFTMAX_SCALE as SCALE
from tools.calls import Calls, poison, row_slots

DIM, VALUE = 576, 512


@pytest.fixture(autouse=True)
def forget_libraries() -> Iterator[None]:
    """What is installed is asked once in a process; here it changes from test to test."""

    def forget() -> None:
        for cached in (probe.missing, probe.missing_parameters, vendor_flash_mla._library):
            cached.cache_clear()

    forget()
    yield
    forget()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Put a module with these members, and its parents, where `import` finds it."""
    parent, _, child = name.rpartition(".")
    if parent and parent not in sys.modules:
        install(monkeypatch, parent)
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


def adapter(op: str, name: str) -> Any:
    return importlib.import_module(f"nsa_backend_plugin.ops.{op}.{name}")


def attend_rows(q: torch.Tensor, latents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    results = [softmax_attention(q[t], latents[t], SCALE, VALUE) for t in range(q.shape[0])]
    return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])


def vendor_answer(q: torch.Tensor, latents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 out and lse as vendors leave them for an empty row: anything in out, +inf in lse."""
    out, lse = attend_rows(q, latents)
    empty = torch.tensor([len(latent) == 0 for latent in latents])
    out[empty], lse[empty] = float("nan"), float("inf")
    return out.to(torch.bfloat16), lse


def sparse_inputs(kind: str, heads: int, topk: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = Calls(torch.device("cpu")).sparse_mla_attend(4, heads, topk, kind, missing=0.0)
    q, kv, indices = call["q"], call["kv"], call["indices"]
    indices[0, ::3] = -1
    indices[1] = -1
    indices[2, 1:] = -1
    used = torch.zeros(len(kv), dtype=torch.bool)
    used[indices[indices >= 0].long()] = True
    kv[~used] = 0x7F if kind == "packed" else float("nan")
    return q, kv, indices


def compact_inputs(kind: str, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, kv, indices whose slots lead each row, and their numbers."""
    q, kv, indices = sparse_inputs(kind, heads)
    indices = indices.sort(dim=1, descending=True).values
    return q, kv, indices, (indices >= 0).sum(dim=1, dtype=torch.int32)


def run_adapter(op: str, name: str, arch: str, arguments: dict[str, Any], *, want_lse: bool) -> list[torch.Tensor]:
    """[out, lse if wanted] of an adapter, into a caller's out and, which must agree, into its own."""
    public = {"sparse_mla": sparse_mla.attend, "dense_mla": dense_mla.decode}[op]
    module, q = adapter(op, name), arguments["q"]
    given = poison(*q.shape[:2], VALUE, dtype=torch.bfloat16, device=q.device)
    results = []
    for out in (given, None):
        call = public.call(**arguments, out=out, return_lse=want_lse)
        call.arch = arch
        reason = getattr(module, f"declines_{public.function}")(call)
        assert reason is None, reason
        result = getattr(module, public.function)(call)
        results.append(list(result) if want_lse else [result])
    assert results[0][0] is given
    for into, own in zip(*results, strict=True):
        assert torch.equal(into, own)
    return results[0]


def check_sparse(
    name: str,
    kind: str,
    heads: int,
    *,
    arch: str = "sm_90",
    want_lse: bool = True,
    step: Step | None = None,
    lengths: bool = False,
    rows_have_keys: bool = False,
    context: bool = False,
    bar: float = 5e-6,
    device: torch.device | str = "cpu",
) -> None:
    if lengths:
        q, kv, indices, counts = compact_inputs(kind, heads)
    else:
        q, kv, indices = sparse_inputs(kind, heads)
        counts = None
    if rows_have_keys:
        indices[1, :1] = indices[0].max()
        counts = None if counts is None else counts.clamp_min(1)
    q, kv, indices = q.to(device), kv.to(device), indices.to(device)
    counts = None if counts is None else counts.to(device)
    latents = [rows(kv, i[i >= 0], "packed" if kind == "packed" else "bf16", None, VALUE) for i in indices]
    expected = attend_rows(q, latents)
    arguments = dict(q=q, kv=kv, indices=indices, softmax_scale=SCALE, step=step)
    arguments |= dict(lengths=counts, rows_have_keys=rows_have_keys)
    if context:  # in any order, with slots that nobody selects
        used = indices[indices >= 0].unique()
        arguments["context"] = used[torch.randperm(len(used), device=device)]
    actual = run_adapter("sparse_mla", name, arch, arguments, want_lse=want_lse)
    for got, want, most in zip(actual, expected, (bar, 1e-8 if bar == 5e-6 else bar), strict=False):
        assert_close(got, want, most)


def check_dense(
    name: str,
    heads: int,
    page_size: int,
    *,
    arch: str = "sm_90",
    want_lse: bool = True,
    step: Step | None = None,
    rows_have_keys: bool = False,
    kv_is_finite: bool = False,
    num_kv_splits: int | None = None,
) -> None:
    lengths = [130, 5 if rows_have_keys else 0, 1, 128]
    arguments = Calls(torch.device("cpu")).dense_mla_decode(lengths, heads, page_size)
    kv, table = arguments["kv"], arguments["block_table"]
    width = -(-table.shape[1] * page_size // 128) * 128 // page_size
    table = torch.nn.functional.pad(table, (0, width - table.shape[1]))
    latents = [kv[row_slots(row, n, page_size), 0].float() for row, n in zip(table, lengths, strict=True)]
    expected = attend_rows(arguments["q"], latents)
    if kv_is_finite:
        kv.nan_to_num_()
    arguments |= dict(block_table=table, rows_have_keys=rows_have_keys, kv_is_finite=kv_is_finite)
    arguments |= dict(num_kv_splits=num_kv_splits, step=step)
    actual = run_adapter("dense_mla", name, arch, arguments, want_lse=want_lse)
    for got, want, bar in zip(actual, expected, (5e-6, 1e-8), strict=False):
        assert_close(got, want, bar)


def paged_latents(pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Rows [length, D] per request of pages [P, page_size, D]."""
    size = pages.shape[1]
    found = []
    for b, length in enumerate(lengths.tolist()):
        position = torch.arange(length)
        found.append(pages[table[b, position // size].long(), position % size].float())
    return found


# ---- FlashMLA ----


class Schedule:
    """An empty one, which the first call fills for its shapes and lengths."""

    def __init__(self) -> None:
        self.filled_for: tuple[Any, ...] | None = None

    def use(self, *shapes_and_lengths: Any) -> None:
        told = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in shapes_and_lengths)
        self.filled_for = self.filled_for or told
        for known, now in zip(self.filled_for, told, strict=True):
            assert torch.equal(known, now) if isinstance(known, torch.Tensor) else known == now, "another's schedule"


SCHEDULES: list[Schedule] = []


def fake_flash_mla(package: str) -> dict[str, Any]:
    """FlashMLA of `sgl_kernel`, or of the `flash_mla` wheel, which has these kernels on its legacy side."""
    legacy_side = {"use_legacy": True} if package == "flash_mla" else {}

    def get_mla_metadata():
        SCHEDULES.append(Schedule())
        return SCHEDULES[-1], None

    def flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits=None,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=False,
        indices=None,
        topk_length=None,
        **legacy,
    ):
        batch, one, heads, dim = q.shape
        assert (one, dim, head_dim_v, causal, num_splits) == (1, DIM, VALUE, False, None)
        assert softmax_scale == SCALE
        assert k_cache.shape[1:3] == (64, 1)
        assert k_cache.is_contiguous()
        assert legacy == legacy_side
        if indices is not None:
            assert heads in (64, 128)
            assert is_fp8_kvcache
            assert indices.shape[:2] == (batch, 1)
            assert block_table is None
            assert cache_seqlens is None
            flat = k_cache.view(-1, 1, k_cache.shape[-1])
            assert topk_length is None, "Hopper's kernel asserts it"
            latents = [rows(flat, i[i >= 0], "packed", None, VALUE) for i in indices[:, 0]]
            tile_scheduler_metadata.use(batch, heads, indices.shape[-1])
        else:
            assert not is_fp8_kvcache
            latents = paged_latents(k_cache[:, :, 0], block_table, cache_seqlens)
            tile_scheduler_metadata.use(batch, heads, cache_seqlens)
        out, lse = vendor_answer(q[:, 0], latents)
        return out.unsqueeze(1), lse.unsqueeze(2)

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, **legacy):
        assert q.shape[1] in (64, 128)
        assert (d_v, sm_scale, attn_sink) == (VALUE, SCALE, None)
        assert legacy == ({**legacy_side, "return_log2_lse": True} if legacy_side else {})
        lists = leading(indices[:, 0], topk_length)
        out, lse = vendor_answer(q, [kv[i[i >= 0].long(), 0].float() for i in lists])
        return out, torch.zeros_like(lse), lse * math.log2(math.e)

    return {
        "get_mla_metadata": get_mla_metadata,
        "flash_mla_with_kvcache": flash_mla_with_kvcache,
        "flash_mla_sparse_fwd": flash_mla_sparse_fwd,
    }


def leading(indices: torch.Tensor, lengths: torch.Tensor | None) -> list[torch.Tensor]:
    """Of each row of indices what a kernel reads."""
    counts = [indices.shape[1]] * len(indices) if lengths is None else lengths.tolist()
    return [row[:count] for row, count in zip(indices, counts, strict=True)]


@pytest.fixture(params=["sgl_kernel", "flash_mla", "both", "without_legacy"])
def flash_mla(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which libraries are there; the wheel comes first, but not where it lacks its legacy side."""
    SCHEDULES.clear()
    for name in ("sgl_kernel", "sgl_kernel.flash_mla", "flash_mla"):
        monkeypatch.setitem(sys.modules, name, None)
    if request.param != "flash_mla":
        monkeypatch.delitem(sys.modules, "sgl_kernel")
        install(monkeypatch, "sgl_kernel")
        install(monkeypatch, "sgl_kernel.flashmla_ops")
        functions = {name: None for name in fake_flash_mla("sgl_kernel")}
        if request.param != "both":
            functions = fake_flash_mla("sgl_kernel")
        install(monkeypatch, "sgl_kernel.flash_mla", **functions, FlashMLASchedMeta=Schedule)
    if request.param != "sgl_kernel":
        legacy = request.param != "without_legacy"
        functions = fake_flash_mla("flash_mla") if legacy else {name: None for name in fake_flash_mla("flash_mla")}
        install(monkeypatch, "flash_mla", **functions, has_legacy=lambda: legacy)


@pytest.mark.parametrize("kind", ["packed", "bf16"])
@pytest.mark.parametrize("heads", [8, 64, 80])
@pytest.mark.parametrize(
    "promises", [{}, {"lengths": True}, {"rows_have_keys": True}, {"lengths": True} | {"rows_have_keys": True}]
)
@pytest.mark.usefixtures("flash_mla")
def test_flash_mla_sparse(kind: str, heads: int, promises: dict[str, bool]) -> None:
    module = adapter("sparse_mla", "flash_mla")
    assert module.available("sm_90") is None
    check_sparse("flash_mla", kind, heads, want_lse=kind == "bf16", **promises)
    if kind == "packed":
        call = sparse_mla.attend.call(*sparse_inputs(kind, heads), SCALE, return_lse=True)
        assert "log-sum-exp" in module.declines_attend(call)


@pytest.mark.parametrize("heads", [8, 128])
@pytest.mark.parametrize("promises", [{}, {"lengths": True, "rows_have_keys": True}])
@pytest.mark.parametrize("flash_mla", ["both"], indirect=True)  # behind its own kernels it is the adapter above
@pytest.mark.usefixtures("flash_mla")
def test_flash_mla_over_unpacked_rows(heads: int, promises: dict[str, bool]) -> None:
    """Its bar is its own: rows are rounded to bf16."""
    check_sparse("flash_mla_unpacked", "packed", heads, context=True, bar=5e-5, device=DEVICE, **promises)


def test_flash_mla_over_unpacked_rows_says_what_it_needs() -> None:
    module = adapter("sparse_mla", "flash_mla_unpacked")
    q, kv, indices = sparse_inputs("packed", 64)
    call = sparse_mla.attend.call(q, kv, indices, SCALE)
    assert "does not say which slots" in module.declines_attend(call)
    call.context = torch.arange(module.MOST_ROWS + 1, dtype=torch.int32)
    assert f"a context of {module.MOST_ROWS + 1} slots" in module.declines_attend(call)
    q, kv, indices = sparse_inputs("bf16", 64)
    assert "only packed rows" in module.declines_attend(sparse_mla.attend.call(q, kv, indices, SCALE))


@pytest.mark.parametrize("flash_mla", ["both"], indirect=True)
@pytest.mark.usefixtures("flash_mla")
def test_the_places_of_slots_are_made_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module, step, made = adapter("sparse_mla", "flash_mla_unpacked"), Step(), []
    slots, once = len(sparse_inputs("packed", 64)[1]), Step.once
    context = torch.arange(slots, dtype=torch.int32, device=DEVICE)

    def counting(self: Step, key: Any, make: Any, *of: torch.Tensor, **where: Any) -> Any:
        return once(self, key, lambda: made.append(key) or make(), *of, **where)

    monkeypatch.setattr(Step, "once", counting)
    for _ in range(2):
        q, kv, indices = (t.to(DEVICE) for t in sparse_inputs("packed", 64))
        module.attend(sparse_mla.attend.call(q, kv, indices, SCALE, context=context, step=step))
    assert [key for key in made if "places" in str(key)] == [("places of slots", slots)]


@pytest.mark.parametrize("heads", [12, 16])
@pytest.mark.parametrize("rows_have_keys", [False, True])
@pytest.mark.usefixtures("flash_mla")
def test_flash_mla_dense(heads: int, rows_have_keys: bool) -> None:
    assert adapter("dense_mla", "flash_mla").available("sm_90") is None
    check_dense("flash_mla", heads, 64, rows_have_keys=rows_have_keys)


@pytest.mark.usefixtures("flash_mla")
def test_flash_mla_schedules_once_per_step() -> None:
    """One for all layers of the same shapes; of dense decode another for other lengths, which the fake would notice."""
    step = Step()
    for heads in (64, 64, 128):
        check_sparse("flash_mla", "packed", heads, step=step, want_lse=False)
    assert len(SCHEDULES) == 2, "one for 64 heads, one for 128"
    check_sparse("flash_mla", "packed", 64, step=step, want_lse=False, lengths=True)
    check_dense("flash_mla", 64, 64, step=step)
    check_dense("flash_mla", 64, 64, step=step)  # other tensors: the lengths are compared by place
    assert len(SCHEDULES) == 4


@pytest.mark.usefixtures("flash_mla")
def test_flash_mla_copies_nothing_where_the_callers_promise_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 heads, no empty rows, nowhere to write: the vendor's own tensor is the result."""
    q, kv, indices, _ = compact_inputs("packed", 64)
    indices[1, 0] = indices[0, 0]
    call = sparse_mla.attend.call(q, kv, indices, SCALE, rows_have_keys=True)
    vendors_own = []
    answer = vendor_answer

    def remembering(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        vendors_own.append(answer(*arguments))
        return vendors_own[-1]

    monkeypatch.setattr(sys.modules[__name__], "vendor_answer", remembering)
    out = adapter("sparse_mla", "flash_mla").attend(call)
    assert out.data_ptr() == vendors_own[0][0].data_ptr()


def test_flash_mla_says_why_neither_library_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sgl_kernel", "sgl_kernel.flash_mla", "flash_mla"):
        monkeypatch.setitem(sys.modules, name, None)
    install(monkeypatch, "flash_mla", **fake_flash_mla("flash_mla"), has_legacy=lambda: False)
    reason = adapter("sparse_mla", "flash_mla").available("sm_90")
    assert "flash_mla has no legacy kernels" in reason
    assert "sgl_kernel" in reason


# ---- FlashAttention 3 ----

FA3_SCHEDULES: list[dict[str, Any]] = []


def fake_scheduler_metadata(**arguments: Any) -> dict[str, Any]:
    FA3_SCHEDULES.append({**arguments, "cache_seqlens": arguments["cache_seqlens"].clone()})
    return FA3_SCHEDULES[-1]


def fake_fa3(
    q,
    k_cache,
    v_cache,
    qv=None,
    cache_seqlens=None,
    page_table=None,
    cu_seqlens_q=None,
    max_seqlen_q=None,
    softmax_scale=None,
    causal=False,
    scheduler_metadata=None,
    num_splits=0,
    return_softmax_lse=False,
    out=None,
):
    count, heads, _ = q.shape
    page_size = k_cache.shape[1]
    assert (q.shape[-1], qv.shape[-1], k_cache.shape[-1], v_cache.shape[-1]) == (64, VALUE, 64, VALUE)
    assert (max_seqlen_q, softmax_scale, causal) == (1, SCALE, True)
    assert torch.equal(cu_seqlens_q, torch.arange(count + 1, dtype=torch.int32))
    assert page_table.dtype == cache_seqlens.dtype == torch.int32
    assert all(t.stride(-1) == 1 for t in (q, qv, k_cache, v_cache, page_table))
    if scheduler_metadata is not None:
        made_for = {**scheduler_metadata}
        assert torch.equal(made_for.pop("cache_seqlens"), cache_seqlens), "another's schedule"
        assert torch.equal(made_for.pop("cu_seqlens_q"), cu_seqlens_q)
        assert made_for == {
            "batch_size": count,
            "max_seqlen_q": 1,
            "max_seqlen_k": page_table.shape[1] * page_size,
            "num_heads": heads,
            "num_heads_k": 1,
            "headdim": 64,
            "headdim_v": VALUE,
            "qkv_dtype": torch.bfloat16,
            "page_size": page_size,
            "causal": True,
            "num_splits": num_splits,
        }
    pages = torch.cat([v_cache, k_cache], dim=-1)[:, :, 0]
    answer, lse = vendor_answer(torch.cat([qv, q], dim=-1), paged_latents(pages, page_table, cache_seqlens))
    if heads > 64 and page_size > 1:  # whole pages, with the weight 0 behind a length
        for row, length in enumerate(cache_seqlens.tolist()):
            last = pages[page_table[row, (length - 1) // page_size].long()] if length else pages[:0]
            answer[row] += 0 * last.float().sum()
    result = answer if out is None else out.copy_(answer)
    return (result, lse.T) if return_softmax_lse else result


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch) -> None:
    FA3_SCHEDULES.clear()
    functions = {"flash_attn_with_kvcache": fake_fa3, "get_scheduler_metadata": fake_scheduler_metadata}
    install(monkeypatch, "sgl_kernel")
    install(monkeypatch, "sgl_kernel.flash_attn", **functions)


@pytest.mark.parametrize("want_lse", [False, True])
@pytest.mark.parametrize("rows_have_keys", [False, True])
@pytest.mark.usefixtures("fa3")
def test_fa3(want_lse: bool, rows_have_keys: bool) -> None:
    options = {"want_lse": want_lse, "rows_have_keys": rows_have_keys}
    assert adapter("sparse_mla", "fa3").available("sm_90") is None
    check_sparse("fa3", "bf16", 12, **options)
    check_sparse("fa3", "bf16", 128, lengths=True, **options)
    for heads, page_size in ((12, 64), (16, 1), (64, 16), (8, 128)):
        check_dense("fa3", heads, page_size, **options)
    check_dense("fa3", 16, 64, num_kv_splits=3, **options)
    check_dense("fa3", 128, 64, kv_is_finite=True, **options)


@pytest.mark.usefixtures("fa3")
def test_fa3_schedules_once_per_step_by_the_callers_lengths() -> None:
    q, kv, indices, lengths = compact_inputs("bf16", 8)
    step, module = Step(), adapter("sparse_mla", "fa3")
    for given in (lengths, lengths, lengths.clone()):
        module.attend(sparse_mla.attend.call(q, kv, indices, SCALE, lengths=given, step=step))
    assert len(FA3_SCHEDULES) == 2
    module.attend(sparse_mla.attend.call(q, kv, indices, SCALE, step=step))
    assert len(FA3_SCHEDULES) == 2, "counted indices are one layer's: FA3 schedules for itself"


@pytest.mark.usefixtures("fa3")
def test_fa3_needs_finite_rows_for_more_than_64_heads() -> None:
    with pytest.raises(AssertionError, match=r"128 heads: .* see kv_is_finite"):
        check_dense("fa3", 128, 64)


def test_fa3_of_an_older_sgl_kernel_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(q, k_cache, v_cache, scheduler_metadata=None):
        raise AssertionError

    install(monkeypatch, "sgl_kernel")
    functions = {"flash_attn_with_kvcache": older, "get_scheduler_metadata": None}
    install(monkeypatch, "sgl_kernel.flash_attn", **functions)
    assert "does not take out" in adapter("dense_mla", "fa3").available("sm_90")


# ---- FlashInfer, CUTLASS ----


class FakeFlashInfer:
    plans = 0

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str):
        assert float_workspace_buffer.numel() >= 128 << 20

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        heads,
        ckv,
        kpe,
        page_size,
        causal,
        sm_scale,
        q_dtype,
        kv_dtype,
    ):
        assert (ckv, kpe, causal, sm_scale) == (VALUE, 64, True, SCALE)
        assert q_dtype == kv_dtype == torch.bfloat16
        assert qo_indptr.dtype == kv_indptr.dtype == kv_indices.dtype == kv_len_arr.dtype == torch.int32
        assert kv_indices.numel() == int(kv_indptr[-1])
        FakeFlashInfer.plans += 1
        self.starts, self.pages, self.lengths, self.heads = kv_indptr, kv_indices, kv_len_arr, heads

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, return_lse=False):
        assert q_nope.is_contiguous()
        assert q_pe.is_contiguous()
        assert q_nope.shape[1] == self.heads
        pages = torch.cat([ckv_cache, kpe_cache], dim=-1)
        counts = self.starts.diff().tolist()
        table = torch.nn.utils.rnn.pad_sequence(self.pages.split(counts), batch_first=True)
        out, lse = vendor_answer(torch.cat([q_nope, q_pe], dim=-1), paged_latents(pages, table, self.lengths))
        return (out, lse * math.log2(math.e)) if return_lse else out


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("want_lse", [False, True])
def test_flashinfer(monkeypatch: pytest.MonkeyPatch, page_size: int, want_lse: bool) -> None:
    install(monkeypatch, "flashinfer")
    install(monkeypatch, "flashinfer.mla", BatchMLAPagedAttentionWrapper=FakeFlashInfer)
    monkeypatch.setattr(vendor_flashinfer.shutil, "which", lambda name: None)
    assert "nvcc" in adapter("dense_mla", "flashinfer").available("sm_90")
    install(monkeypatch, "flashinfer_jit_cache")
    assert adapter("dense_mla", "flashinfer").available("sm_90") is None
    check_dense("flashinfer", 12, page_size, want_lse=want_lse)
    plans, step = FakeFlashInfer.plans, Step()
    q, kv, lengths = torch.randn(2, 8, DIM).bfloat16(), torch.randn(64, 1, DIM).bfloat16(), torch.tensor([5, 64]).int()
    table = torch.zeros(2, 64 // page_size, dtype=torch.int32)
    for _ in range(3):
        call = dense_mla.decode.call(q, kv, table, lengths, SCALE, page_size=page_size, step=step)
        adapter("dense_mla", "flashinfer").decode(call)
    assert FakeFlashInfer.plans == plans + 1, "a plan serves its step"


def test_flashinfer_declines_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter("dense_mla", "flashinfer"), "capturing", lambda device: True)
    with pytest.raises(AssertionError, match="CUDA graph"):
        check_dense("flashinfer", 16, 64)


def fake_cutlass(q_nope, q_pe, kv_c_and_k_pe_cache, seq_lens, page_table, workspace, sm_scale, num_kv_splits=1):
    assert workspace.numel() == 1234
    assert (sm_scale, num_kv_splits) == (SCALE, 1)
    assert page_table.shape[1] * kv_c_and_k_pe_cache.shape[1] % 128 == 0
    latents = paged_latents(kv_c_and_k_pe_cache, page_table, seq_lens)
    return vendor_answer(torch.cat([q_nope, q_pe], dim=-1), latents)[0]


def test_cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(max_seq_len, num_batches, sm_count=0, num_kv_splits=1):
        assert (max_seq_len % 128, num_batches, num_kv_splits) == (0, 4, 1)
        return 1234

    install(monkeypatch, "sgl_kernel", cutlass_mla_decode=fake_cutlass, cutlass_mla_get_workspace_size=size)
    module = adapter("dense_mla", "cutlass")
    assert module.available("sm_100") is None
    assert module.available("sm_90")
    check_dense("cutlass", 16, 64, arch="sm_100", want_lse=False)
    with pytest.raises(AssertionError, match="log-sum-exp"):
        check_dense("cutlass", 16, 64, arch="sm_100")


# ---- AITER ----


@pytest.fixture
def aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("get_mla_metadata_info_v1", "get_mla_metadata_v1", "mla_decode_fwd")
    info, plan, decode = (as_declared(getattr(fake_aiter_attention, name)) for name in names)
    install(monkeypatch, "aiter", get_mla_metadata_info_v1=info, get_mla_metadata_v1=plan)
    install(monkeypatch, "aiter.mla", mla_decode_fwd=decode)


@pytest.mark.parametrize("heads", [8, 16, 24])
@pytest.mark.usefixtures("aiter")
def test_aiter_bf16(heads: int) -> None:
    assert adapter("sparse_mla", "aiter").available("gfx942") is None
    for promises in ({}, {"lengths": True}, {"rows_have_keys": True}):
        check_sparse("aiter", "bf16", heads, arch="gfx942", want_lse=False, **promises)
    check_dense("aiter", heads, 1, arch="gfx942", want_lse=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.usefixtures("aiter")
def test_aiter_fp8(dtype: torch.dtype) -> None:
    q, kv, indices, lengths = compact_inputs("bf16", 12)
    kv8, kv_scale, step = kv.nan_to_num().to(dtype), 0.25, Step()
    latents = [rows(kv8, i[i >= 0], "fp8", kv_scale, VALUE) for i in indices]
    expected, _ = attend_rows(q, latents)
    arguments = dict(q=q, kv=kv8, indices=indices, softmax_scale=SCALE, kv_scale=kv_scale, step=step)
    for given in (None, lengths, lengths):
        [out] = run_adapter("sparse_mla", "aiter", "gfx942", {**arguments, "lengths": given}, want_lse=False)
        assert_close(out, expected, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.usefixtures("aiter")
def test_aiter_dense_fp8(dtype: torch.dtype) -> None:
    q, kv, _ = sparse_inputs("bf16", 12)
    kv8, kv_scale, step = kv.nan_to_num().to(dtype), 0.25, Step()
    table = torch.stack([torch.randperm(len(kv8))[:128] for _ in q]).int()
    lengths = torch.tensor([128, 0, 1, 70], dtype=torch.int32)
    latents = [kv8.float()[row[:n].long(), 0] * kv_scale for row, n in zip(table, lengths.tolist(), strict=True)]
    expected, _ = attend_rows(q, latents)
    arguments = dict(q=q, kv=kv8, block_table=table, seq_lens=lengths, softmax_scale=SCALE, page_size=1)
    [out] = run_adapter(
        "dense_mla", "aiter", "gfx942", {**arguments, "kv_scale": kv_scale, "step": step}, want_lse=False
    )
    assert_close(out, expected, 5e-6)


@pytest.mark.parametrize("dtype, rows", [(torch.bfloat16, 3728270), (torch.float8_e4m3fnuz, 7456540)])
@pytest.mark.usefixtures("aiter")
def test_aiter_is_kept_off_caches_whose_offsets_wrap(dtype: torch.dtype, rows: int) -> None:
    """Behind 4 GiB it reads other rows without a word (aiter 2768, 5765)."""
    q, kv, indices = sparse_inputs("bf16", 16)
    kv_scale = None if dtype == torch.bfloat16 else 1.0
    sparse = sparse_mla.attend.call(q, kv.to(dtype), indices, SCALE, kv_scale=kv_scale)
    dense = dense_mla.decode.call(q, kv, indices.clamp_min(0), torch.ones(4).int(), SCALE, page_size=1)
    for count, ok in ((rows, True), (rows + 1, False)):
        sparse.kv = dense.kv = torch.empty(count, 1, DIM, dtype=dtype, device="meta")
        reasons = (
            adapter("sparse_mla", "aiter").declines_attend(sparse),
            adapter("dense_mla", "aiter").declines_decode(dense),
        )
        assert reasons == (None, None) if ok else all("at most 4 GiB" in reason for reason in reasons)


# ---- Reasons ----


@pytest.mark.parametrize(
    "op, name, arch, reason",
    [
        ("sparse_mla", "flash_mla", "sm_80", "not sm_80"),
        ("sparse_mla", "fa3", "sm_100", "not sm_100"),
        ("sparse_mla", "cuda", "sm_80", "not sm_80"),
        ("sparse_mla", "cuda", "gfx942", "not gfx942"),
        ("dense_mla", "cuda", "sm_80", "not sm_80"),
        ("sparse_mla", "tilelang", "gfx1201", "not gfx1201"),
        ("sparse_mla", "aiter", "sm_90", "not sm_90"),
        ("dense_mla", "flash_mla", "sm_100", "not sm_100"),
        ("dense_mla", "fa3", "gfx942", "not gfx942"),
        ("dense_mla", "flashinfer", "sm_75", "not sm_75"),
        ("dense_mla", "cutlass", "sm_90", "not sm_90"),
        ("dense_mla", "aiter", "sm_90", "not sm_90"),
    ],
)
def test_declines_other_architectures(op: str, name: str, arch: str, reason: str) -> None:
    assert reason in adapter(op, name).available(arch)


def test_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "sgl_kernel", cutlass_mla_decode=fake_cutlass)
    assert "has no cutlass_mla_get_workspace_size" in adapter("dense_mla", "cutlass").available("sm_100")
    assert "is not installed" in probe.missing("no_such_package")


def test_common_limits() -> None:
    q, kv = torch.zeros(2, 8, DIM, dtype=torch.bfloat16), torch.zeros(64, 1, DIM, dtype=torch.bfloat16)

    def reason(page_size: int = 1, **changes: Any) -> str:
        indices = torch.zeros(2, 4, dtype=torch.int32)
        call = sparse_mla.attend.call(q, kv, indices, SCALE)
        for name, value in changes.items():
            setattr(call, name, value)
        return mla.limits(call, page_size) or ""

    assert reason(64) == ""
    assert "float16" in reason(q=q.half())
    assert "value_dim 256" in reason(value_dim=256)
    assert "no tokens" in reason(q=q[:0])
    assert "strides" in reason(kv=torch.zeros(64, 1, 2 * DIM, dtype=torch.bfloat16)[..., :DIM])
    assert "whole pages of 64" in reason(64, kv=kv[:63])
    assert "16 bytes" in reason(q=torch.zeros(2 * 8 * DIM + 1).bfloat16()[1:].view(2, 8, DIM))
    assert "16 bytes" in reason(out=torch.zeros(2 * 8 * VALUE + 1).bfloat16()[1:].view(2, 8, VALUE))
    for scale in (0.0, -1.0):
        assert f"softmax_scale {scale}: only above 0" in reason(softmax_scale=scale)


VENDORS = ["sparse_mla.flash_mla", "sparse_mla.fa3", "sparse_mla.aiter", "dense_mla.flash_mla", "dense_mla.fa3"]
VENDORS += ["dense_mla.cutlass", "dense_mla.flashinfer", "dense_mla.aiter"]


@pytest.mark.parametrize("name", VENDORS)
def test_every_vendor_declines_a_scale_that_is_not_positive(name: str) -> None:
    op, _, impl = name.partition(".")
    kv = torch.zeros(128, 1, DIM, dtype=torch.bfloat16)
    q, table = torch.zeros(2, 16, DIM, dtype=torch.bfloat16), torch.zeros(2, 128, dtype=torch.int32)
    for scale, ok in ((0.0, False), (SCALE, True)):
        if op == "sparse_mla":
            reason = adapter(op, impl).declines_attend(sparse_mla.attend.call(q, kv, table, scale))
        else:
            page_size = 1 if impl == "aiter" else 64
            lengths = torch.ones(2, dtype=torch.int32)
            call = dense_mla.decode.call(q, kv, table, lengths, scale, page_size=page_size)
            reason = adapter(op, impl).declines_decode(call)
        assert reason is None if ok else "softmax_scale 0.0" in reason


@pytest.mark.parametrize("impl", ["flash_mla", "fa3", "cutlass", "flashinfer"])
def test_vendors_decline_fp8_rows_of_whole_contexts(impl: str) -> None:
    """Theirs want an fp8 query beside them."""
    kv = torch.zeros(128, 1, DIM).to(torch.float8_e4m3fn)
    q, table = torch.zeros(2, 16, DIM, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int32)
    call = dense_mla.decode.call(
        q, kv, table, torch.ones(2).int(), SCALE, page_size=64, kv_scale=1.0, kv_is_finite=True
    )
    assert "float8_e4m3fn but q is torch.bfloat16" in adapter("dense_mla", impl).declines_decode(call)


def test_public_functions_reach_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced adapter that cannot run here says why, through both public functions."""
    q, kv, indices = sparse_inputs("bf16", 8)
    with pytest.raises(ValueError, match=r"fa3.*needs sm_90, not cpu"):
        sparse_mla.attend(q, kv, indices, SCALE, impl="fa3")
    table, lengths = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cutlass.*not cpu"):
        dense_mla.decode(q, kv, table, lengths, SCALE, page_size=64, impl="cutlass")
