"""Adapters to vendors' MLA kernels, against fakes that check the arguments and compute the answer in torch.

The real libraries run in test_sparse_mla.py and test_dense_mla.py, which take every implementation that is available.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import math
import sys
import types
from typing import Any

import pytest
import torch

from nsa_backend_plugin.ops import dense_mla, sparse_mla
from nsa_backend_plugin.ops._vendor import mla
from nsa_backend_plugin.ops.latent_cache import reference as latent_cache
from nsa_backend_plugin.ops.sparse_mla.reference import rows, softmax_attention
from tests.ops import fake_aiter_attention
from tests.ops.common import assert_close, permuted_block_table, poison
from tests.ops.fake_aiter import as_declared

SCALE = 192**-0.5
DIM, VALUE = 576, 512


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
    tokens, slots = 4, 256
    q = torch.randn(tokens, heads, DIM).bfloat16()
    kv = torch.randn(slots, DIM).bfloat16()
    if kind == "packed":
        kv = latent_cache.pack(kv, VALUE)
    indices = torch.stack([torch.randperm(slots)[:topk] for _ in range(tokens)]).int()
    indices[0, ::3] = -1
    indices[1] = -1
    indices[2, 1:] = -1
    kv = kv.unsqueeze(1)
    used = torch.zeros(slots, dtype=torch.bool)
    used[indices[indices >= 0].long()] = True
    kv[~used] = 0x7F if kind == "packed" else float("nan")
    return q, kv, indices


def check_sparse(name: str, kind: str, heads: int, kv: torch.Tensor | None = None, *, want_lse: bool = True) -> None:
    q, made, indices = sparse_inputs(kind, heads)
    kv = made if kv is None else kv
    latents = [rows(kv, i[i >= 0], "packed" if kind == "packed" else "bf16", None, VALUE) for i in indices]
    expected, expected_lse = attend_rows(q, latents)
    out = poison(q.shape[0], heads, VALUE, dtype=torch.bfloat16, device=q.device)
    lse = poison(q.shape[0], heads, dtype=torch.float32, device=q.device) if want_lse else None
    options = dict(kind=kind, kv_scale=None, value_dim=VALUE, out=out, lse=lse, workspace=None)
    module = adapter("sparse_mla", name)
    support = module.accepts_attend(q, kv, indices, SCALE, **options)
    assert support.ok, support.reason
    module.attend(q, kv, indices, SCALE, **options)
    assert_close(out, expected, 5e-6)
    if lse is not None:
        assert_close(lse, expected_lse, 1e-8)


def check_dense(name: str, heads: int, page_size: int, *, want_lse: bool = True) -> None:
    lengths = [130, 0, 1, 128]
    q = torch.randn(len(lengths), heads, DIM).bfloat16()
    table, pages = permuted_block_table(lengths, page_size, q.device)
    width = -(-table.shape[1] * page_size // 128) * 128 // page_size
    table = torch.nn.functional.pad(table, (0, width - table.shape[1]))
    kv = poison(pages * page_size, 1, DIM, dtype=torch.bfloat16, device=q.device)
    latents = []
    for b, length in enumerate(lengths):
        position = torch.arange(length)
        slots = table[b, position // page_size].long() * page_size + position % page_size
        kv[slots] = torch.randn(length, 1, DIM).bfloat16()
        latents.append(kv[slots, 0].float())
    expected, expected_lse = attend_rows(q, latents)
    out = poison(len(lengths), heads, VALUE, dtype=torch.bfloat16, device=q.device)
    lse = poison(len(lengths), heads, dtype=torch.float32, device=q.device) if want_lse else None
    options = dict(page_size=page_size, value_dim=VALUE, num_kv_splits=None, out=out, lse=lse, workspace=None)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    module = adapter("dense_mla", name)
    support = module.accepts_decode(q, kv, table, seq_lens, SCALE, **options)
    assert support.ok, support.reason
    module.decode(q, kv, table, seq_lens, SCALE, **options)
    assert_close(out, expected, 5e-6)
    if lse is not None:
        assert_close(lse, expected_lse, 1e-8)


def paged_latents(pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Rows [length, D] per request of pages [P, page_size, D]."""
    size = pages.shape[1]
    found = []
    for b, length in enumerate(lengths.tolist()):
        position = torch.arange(length)
        found.append(pages[table[b, position // size].long(), position % size].float())
    return found


# ---- FlashMLA ----


def fake_flash_mla(package: str) -> dict[str, Any]:
    """FlashMLA as `sgl_kernel` (explicit metadata) or as `flash_mla` (empty metadata object, legacy flag)."""
    plans: list[tuple] = []

    def get_mla_metadata(*args, **kwargs):
        plans.append((args, kwargs))
        return ("metadata", "splits") if package == "sgl_kernel" else ("metadata", None)

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
        **legacy,
    ):
        batch, one, heads, dim = q.shape
        assert (one, dim, head_dim_v, causal) == (1, DIM, VALUE, False)
        assert softmax_scale == SCALE
        assert k_cache.shape[1:3] == (64, 1)
        assert k_cache.is_contiguous()
        if indices is not None:
            assert heads in (64, 128)
            assert is_fp8_kvcache
            assert indices.shape[:2] == (batch, 1)
            flat = k_cache.view(-1, 1, k_cache.shape[-1])
            latents = [rows(flat, i[i >= 0], "packed", None, VALUE) for i in indices[:, 0]]
        else:
            assert not is_fp8_kvcache
            latents = paged_latents(k_cache[:, :, 0], block_table, cache_seqlens)
        if package == "sgl_kernel":
            assert (tile_scheduler_metadata, num_splits, legacy) == ("metadata", "splits", {})
            args, kwargs = plans[-1]
            assert args[1:3] == (heads, 1)
            if indices is not None:
                assert args[3:] == (heads, True, indices.shape[-1])
                assert bool((args[0] == indices.shape[-1]).all())
                assert block_table.shape == (batch, 0)
            else:
                assert args[0] is cache_seqlens
                assert kwargs == {"is_fp8_kvcache": False}
        else:
            assert (tile_scheduler_metadata, num_splits) == ("metadata", None)
            assert legacy["use_legacy"]
        out, lse = vendor_answer(q[:, 0], latents)
        return out.unsqueeze(1), lse.unsqueeze(2)

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, **legacy):
        assert q.shape[1] in (64, 128)
        assert (d_v, sm_scale) == (VALUE, SCALE)
        assert legacy == ({} if package == "sgl_kernel" else {"use_legacy": True})
        out, lse = vendor_answer(q, [kv[i[i >= 0].long(), 0].float() for i in indices[:, 0]])
        unit = math.log2(math.e) if package == "sgl_kernel" else 1.0
        return out, torch.zeros_like(lse), lse * unit

    return {
        "get_mla_metadata": get_mla_metadata,
        "flash_mla_with_kvcache": flash_mla_with_kvcache,
        "flash_mla_sparse_fwd": flash_mla_sparse_fwd,
    }


@pytest.fixture(params=["sgl_kernel", "flash_mla"])
def flash_mla(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sgl_kernel", "sgl_kernel.flash_mla", "flash_mla"):
        monkeypatch.setitem(sys.modules, name, None)
    name = "sgl_kernel.flash_mla" if request.param == "sgl_kernel" else "flash_mla"
    if request.param == "sgl_kernel":
        monkeypatch.delitem(sys.modules, "sgl_kernel")
        install(monkeypatch, "sgl_kernel")
    install(monkeypatch, name, **fake_flash_mla(request.param))
    monkeypatch.setattr(adapter("sparse_mla", "flash_mla"), "device_arch", lambda device: "sm_90")


@pytest.mark.parametrize("kind", ["packed", "bf16"])
@pytest.mark.parametrize("heads", [8, 64, 80])
@pytest.mark.usefixtures("flash_mla")
def test_flash_mla_sparse(kind: str, heads: int) -> None:
    assert adapter("sparse_mla", "flash_mla").available("sm_90").ok
    check_sparse("flash_mla", kind, heads)


@pytest.mark.parametrize("heads", [12, 16])
@pytest.mark.usefixtures("flash_mla")
def test_flash_mla_dense(heads: int) -> None:
    assert adapter("dense_mla", "flash_mla").available("sm_90").ok
    check_dense("flash_mla", heads, 64)


# ---- FlashAttention 3 ----


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
    num_splits=0,
    return_softmax_lse=False,
):
    count = q.shape[0]
    assert (q.shape[-1], qv.shape[-1], k_cache.shape[-1], v_cache.shape[-1]) == (64, VALUE, 64, VALUE)
    assert (max_seqlen_q, softmax_scale, causal) == (1, SCALE, True)
    assert torch.equal(cu_seqlens_q, torch.arange(count + 1, dtype=torch.int32))
    assert page_table.dtype == cache_seqlens.dtype == torch.int32
    assert int(page_table.min()) >= 0
    assert all(t.stride(-1) == 1 for t in (q, qv, k_cache, v_cache, page_table))
    pages = torch.cat([v_cache, k_cache], dim=-1)[:, :, 0]
    out, lse = vendor_answer(torch.cat([qv, q], dim=-1), paged_latents(pages, page_table, cache_seqlens))
    return (out, lse.T) if return_softmax_lse else out


@pytest.mark.parametrize("want_lse", [False, True])
def test_fa3(monkeypatch: pytest.MonkeyPatch, want_lse: bool) -> None:
    install(monkeypatch, "sgl_kernel")
    install(monkeypatch, "sgl_kernel.flash_attn", flash_attn_with_kvcache=fake_fa3)
    assert adapter("sparse_mla", "fa3").available("sm_90").ok
    check_sparse("fa3", "bf16", 12, want_lse=want_lse)
    check_dense("fa3", 12, 64, want_lse=want_lse)
    check_dense("fa3", 16, 1, want_lse=want_lse)


# ---- FlashInfer, CUTLASS ----


class FakeFlashInfer:
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
    module = adapter("dense_mla", "flashinfer")
    module._wrapper.cache_clear()
    try:
        assert module.available("sm_90").ok
        check_dense("flashinfer", 12, page_size, want_lse=want_lse)
    finally:
        module._wrapper.cache_clear()


def test_flashinfer_declines_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "capturing", lambda tensor: True)
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
    assert module.available("sm_100").ok
    assert not module.available("sm_90").ok
    check_dense("cutlass", 16, 64, want_lse=False)
    with pytest.raises(AssertionError, match="log-sum-exp"):
        check_dense("cutlass", 16, 64)


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
    assert adapter("sparse_mla", "aiter").available("gfx942").ok
    check_sparse("aiter", "bf16", heads, want_lse=False)
    check_dense("aiter", heads, 1, want_lse=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.usefixtures("aiter")
def test_aiter_fp8(dtype: torch.dtype) -> None:
    q, kv, indices = sparse_inputs("bf16", 12)
    kv8, kv_scale = kv.nan_to_num().to(dtype), 0.25
    latents = [rows(kv8, i[i >= 0], "fp8", kv_scale, VALUE) for i in indices]
    expected, _ = attend_rows(q, latents)
    out = poison(4, 12, VALUE, dtype=torch.bfloat16, device=q.device)
    options = dict(kind="fp8", kv_scale=kv_scale, value_dim=VALUE, out=out, lse=None, workspace=None)
    module = adapter("sparse_mla", "aiter")
    assert module.accepts_attend(q, kv8, indices, SCALE, **options).ok
    module.attend(q, kv8, indices, SCALE, **options)
    assert_close(out, expected, 5e-6)


@pytest.mark.parametrize("dtype, rows", [(torch.bfloat16, 3728270), (torch.float8_e4m3fnuz, 7456540)])
@pytest.mark.usefixtures("aiter")
def test_aiter_is_kept_off_caches_whose_offsets_wrap(dtype: torch.dtype, rows: int) -> None:
    """Behind 4 GiB it reads other rows without a word (aiter 2768, 5765)."""
    kind = "bf16" if dtype == torch.bfloat16 else "fp8"
    q, _, indices = sparse_inputs("bf16", 16)
    out = torch.empty(4, 16, VALUE)
    for count, ok in ((rows, True), (rows + 1, False)):
        kv = torch.empty(count, 1, DIM, dtype=dtype, device="meta")
        options = dict(value_dim=VALUE, out=out, lse=None, workspace=None)
        sparse = adapter("sparse_mla", "aiter").accepts_attend(
            q, kv, indices, SCALE, kind=kind, kv_scale=None, **options
        )
        dense = adapter("dense_mla", "aiter").accepts_decode(
            q, kv, indices, torch.ones(4), SCALE, page_size=1, num_kv_splits=None, **options
        )
        assert sparse.ok is dense.ok is ok
        assert ok or "at most 4 GiB" in sparse.reason


# ---- Reasons ----


@pytest.mark.parametrize(
    "op, name, arch, reason",
    [
        ("sparse_mla", "flash_mla", "sm_80", "not sm_80"),
        ("sparse_mla", "fa3", "sm_100", "not sm_100"),
        ("sparse_mla", "cuda", "sm_80", "not sm_80"),
        ("sparse_mla", "cuda", "gfx942", "not gfx942"),
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
    support = adapter(op, name).available(arch)
    assert not support.ok
    assert reason in support.reason


def test_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "sgl_kernel", cutlass_mla_decode=fake_cutlass)
    assert "has no cutlass_mla_get_workspace_size" in adapter("dense_mla", "cutlass").available("sm_100").reason
    assert "is not installed" in mla.can_import("no_such_package").reason


def test_common_limits() -> None:
    q, kv = torch.zeros(2, 8, DIM, dtype=torch.bfloat16), torch.zeros(64, 1, DIM, dtype=torch.bfloat16)
    assert mla.fits(q, kv, VALUE, 64).ok
    assert "float16" in mla.fits(q.half(), kv, VALUE).reason
    assert "value_dim 256" in mla.fits(q, kv, 256).reason
    assert "no tokens" in mla.fits(q[:0], kv, VALUE).reason
    assert "strides" in mla.fits(q, torch.zeros(64, 1, 2 * DIM)[..., :DIM], VALUE).reason
    assert "whole pages of 64" in mla.fits(q, kv[:63], VALUE, 64).reason


def test_public_functions_reach_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced adapter that cannot run here says why, through both public functions."""
    q, kv, indices = sparse_inputs("bf16", 8)
    with pytest.raises(ValueError, match=r"fa3.*needs sm_90, not cpu"):
        sparse_mla.attend(q, kv, indices, SCALE, impl="fa3")
    table, lengths = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cutlass.*not cpu"):
        dense_mla.decode(q, kv, table, lengths, SCALE, page_size=64, impl="cutlass")
