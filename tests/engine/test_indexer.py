"""The one indexer: what the CPU's forward writes and selects is what the CUDA decode path writes and selects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_backend_plugin.engine import index_cache
from nsa_backend_plugin.layouts import index_page_bytes
from nsa_backend_plugin.ops import index_key_cache, indexer_prep
from nsa_backend_plugin.ops._torch.rotary import rotate

pytest.importorskip("sglang", reason="needs SGLang")
indexer_path = pytest.importorskip("nsa_backend_plugin.engine.indexer")
from tests.engine.test_fused_decode import INDEX_HEADS, Q_LORA, Case, Norm  # noqa: E402
from tests.engine.test_merged_weights import lora  # noqa: E402


def cpu_forward(case: Case, **keywords: Any) -> torch.Tensor | None:
    """The registered forward, on the case's batch of decode."""
    case.batch.seq_lens = case.lengths
    q_lora = case.attn.q_a_layernorm(case.qkv[:, :Q_LORA])
    return indexer_path.forward(case.indexer, case.hidden, q_lora, case.positions, case.batch, 0, **keywords)


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    made = Case(monkeypatch, packed=False, is_neox=True, merged=False)
    delattr(made.indexer, indexer_path._MERGED)  # the CPU serves its layers as they are
    columns = made.page_table.shape[1] * 64
    rows = indexer_path.Rows(made.page_table, torch.arange(made.tokens, dtype=torch.int32), made.lengths, columns)
    backend = SimpleNamespace(token_to_kv_pool=made.backend.token_to_kv_pool, indexer_rows=lambda batch: rows)
    monkeypatch.setattr(indexer_path, "get_attn_backend", lambda: backend)
    return made


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0", "another"])
def test_cpu_and_cuda_write_and_select_alike(case: Case, scale_fmt: str | None) -> None:
    case.indexer.scale_fmt = scale_fmt
    before = case.index_pages.clone()
    slots = case.prepare()[7]
    pages = case.index_pages.clone()
    assert not torch.equal(pages, before)
    case.index_pages.copy_(before)
    assert torch.equal(cpu_forward(case), slots)
    assert torch.equal(case.index_pages, pages)


@pytest.mark.parametrize("which", ["wk", "weights_proj", "wq_b"])
def test_an_adapter_reaches_both_paths(case: Case, which: str) -> None:
    """SGLang wraps a layer by LoRA after its weight was merged."""
    before = case.index_pages.clone()
    bare = case.prepare()[7], case.index_pages.clone()
    if which != "wq_b":  # which would leave the merged key, not rounded to bf16
        indexer_path.merge_projection(case.indexer)
    setattr(case.indexer, which, lora(getattr(case.indexer, which)))
    case.index_pages.copy_(before)
    slots, pages = case.prepare()[7], case.index_pages.clone()
    case.index_pages.copy_(before)
    assert torch.equal(cpu_forward(case), slots)
    assert torch.equal(case.index_pages, pages)
    assert torch.equal(pages, bare[1]) == (which != "wk")
    assert which == "wk" or not torch.equal(slots, bare[0])


def test_writing_only_and_unknown_keywords(case: Case) -> None:
    before = case.index_pages.clone()
    assert cpu_forward(case, return_indices=False) is None
    assert not torch.equal(case.index_pages, before)
    assert cpu_forward(case, later=None) is not None
    with pytest.raises(ValueError, match="SGLang passes later to the indexer"):
        cpu_forward(case, later=0)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0", "another"])
def test_scale_formats(scale_fmt: str | None, table_dtype: torch.dtype) -> None:
    """A key has fp32 scales, as stock's prefill on CUDA stores it; a query's are rounded where the model says any."""
    tokens, norm = 70, Norm(128, bias=True)
    table = torch.randn(256, 64).to(table_dtype)  # on a CPU SGLang keeps it in the model's dtype
    indexer = SimpleNamespace(
        layer_id=0,
        use_dsa_indexer_fusion=False,
        scale_fmt=scale_fmt,
        n_heads=INDEX_HEADS,
        softmax_scale=128**-0.5,
        k_norm=norm,
        rotary_emb=SimpleNamespace(cos_sin_cache=table, is_neox_style=True),
    )
    pages = torch.zeros(2, index_page_bytes(), dtype=torch.uint8)
    pool = SimpleNamespace(page_size=64, get_index_k_with_scale_buffer=lambda layer_id: pages)
    index_cache.declare_layout(pool, "row_major")
    key, positions, slots = (
        torch.randn(tokens, 128).to(torch.bfloat16),
        torch.randperm(256)[:tokens],
        torch.arange(tokens),
    )
    indexer_path.store_key(indexer, key, positions, slots, pool)

    x = key.float() - key.float().mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight + norm.bias
    rotated = rotate(x, positions, table.float(), is_neox=True, hadamard=True)
    want = torch.zeros_like(pages)
    index_key_cache.store(rotated, want, slots, scale_format="fp32")
    assert torch.equal(pages, want)
    _, scales = index_key_cache.gather(pages, torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([tokens]))
    assert (scales.log2() % 1 != 0).any()

    query, gate = torch.randn(tokens, INDEX_HEADS, 128), torch.rand(tokens, INDEX_HEADS)
    got = indexer_path.quantize_query(indexer, query, gate, positions)
    expected = indexer_prep.query(
        query,
        gate,
        positions,
        table.float(),
        weight_scale=128**-0.5 * INDEX_HEADS**-0.5,
        is_neox=True,
        scale_format="fp32" if scale_fmt is None else "ue8m0",
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_the_other_backends_refuse_unknown_keywords() -> None:
    from nsa_backend_plugin.engine.cpu.backend import NsaPluginCpuBackend

    backend = object.__new__(NsaPluginCpuBackend)
    with pytest.raises(ValueError, match="SGLang passes attn_sink to the attention backend"):
        backend.forward_decode(None, None, None, None, None, attn_sink=torch.zeros(1))


def test_servers_of_a_pair_know_one_another_by_the_layout_too() -> None:
    runner = SimpleNamespace(token_to_kv_pool=SimpleNamespace(), kv_cache_dtype_str="bfloat16")
    index_cache.name_layout(runner)  # without an indexer
    index_cache.declare_layout(runner.token_to_kv_pool, "row_major")  # stock's
    index_cache.name_layout(runner)
    assert runner.kv_cache_dtype_str == "bfloat16"
    runner.token_to_kv_pool = SimpleNamespace()
    index_cache.declare_layout(runner.token_to_kv_pool, "preshuffled")
    for _ in range(2):  # a model may have several backends
        index_cache.name_layout(runner)
    assert runner.kv_cache_dtype_str == "bfloat16 with preshuffled index keys"
