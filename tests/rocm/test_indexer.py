"""The ROCm indexer's forward, with the reference operations: prefill against decode, chunks, pages, inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang")
indexer_path = pytest.importorskip("nsa_backend_plugin.engine.indexer")
from nsa_backend_plugin.engine.gpu import rocm  # noqa: E402
from tests.engine.test_fused_decode import LENGTHS, Q_LORA, Case  # noqa: E402


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(rocm, "on_rocm", lambda: True)
    made = Case(monkeypatch, packed=False, is_neox=True)
    monkeypatch.setattr(indexer_path, "get_attn_backend", lambda: made.backend)
    made.indexer._mask_init_and_local_tokens = lambda logits, lengths, row_starts=None: logits
    metadata = made.backend.forward_metadata
    metadata.dsa_seqlens_expanded = metadata.indexer_seq_lens_cpu = metadata.cache_seqlens_int32
    metadata.token_to_batch_idx = torch.arange(made.tokens, dtype=torch.int32)
    made.batch.seq_lens = torch.tensor(LENGTHS)
    return made


def run(case: Case, decode: bool, x: Any = None, **options: Any) -> torch.Tensor | None:
    case.batch.forward_mode = SimpleNamespace(is_decode_or_idle=lambda: decode)
    x = case.hidden if x is None else x
    q_lora = case.qkv[:, :Q_LORA].contiguous()
    return indexer_path.forward_rocm(
        lambda *args: pytest.fail("stock"), case.indexer, x, q_lora, case.positions, case.batch, 0, **options
    )


def selected(slots: torch.Tensor | None) -> list[set[int]]:
    assert slots is not None
    return [set(row.tolist()) - {-1} for row in slots]


@pytest.mark.parametrize("logits_bytes", [1 << 20, 1])
def test_prefill_selects_what_decode_selects(case: Case, monkeypatch: pytest.MonkeyPatch, logits_bytes: int) -> None:
    """One new token per request: both are the same question, by paged and by ragged logits, in chunks of 3 or 1."""
    monkeypatch.setattr(indexer_path, "LOGITS_BYTES", logits_bytes)
    decoded, pages = selected(run(case, decode=True)), case.index_pages.clone()
    assert selected(run(case, decode=False)) == decoded
    assert torch.equal(case.index_pages, pages), "both modes write the same bytes"
    assert [len(row) for row in decoded] == [min(n, case.indexer.index_topk) for n in LENGTHS]


def test_fused_norm_output_feeds_key_and_gate(case: Case) -> None:
    """SGLang's (fp8, scale, bf16): the projection of the key takes the tuple, the gate the bf16 part."""
    plain = run(case, decode=True)
    wk, seen = case.indexer.wk, []
    case.indexer.wk = lambda x: (seen.append(x), wk(case.hidden))[1]
    fused = (case.hidden.to(torch.float8_e4m3fn), torch.ones(case.tokens, 1), case.hidden)
    assert selected(run(case, decode=True, x=fused)) == selected(plain)
    assert seen == [fused]
    with pytest.raises(ValueError, match="tuple of 2: expected"):
        run(case, decode=True, x=fused[:2])


def test_writing_only_and_idle(case: Case) -> None:
    pages = case.index_pages.clone()
    assert run(case, decode=False, return_indices=False) is None
    assert not torch.equal(case.index_pages, pages)
    case.batch.seq_lens = torch.empty(0)
    idle = run(case, decode=True)
    assert idle is not None
    assert (idle == -1).all()


def test_another_backend_keeps_the_stock_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_path, "get_attn_backend", lambda: object())
    assert indexer_path.forward_rocm(lambda *args, **kwargs: (args, kwargs), "indexer", 1, layer_id=2) == (
        ("indexer", 1),
        {"layer_id": 2},
    )


def test_unknown_keywords_are_refused(case: Case) -> None:
    assert run(case, decode=True, use_cuda_graph=None) is not None
    with pytest.raises(ValueError, match="SGLang passes use_cuda_graph to the indexer"):
        run(case, decode=True, use_cuda_graph=True)
