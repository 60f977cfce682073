"""Speculative decoding on a CPU: SGLang's own metadata into our calls, the draft model's backends, what is refused."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from nsa_backend_plugin.engine import launch
from nsa_backend_plugin.ops import indexer_prep, mqa_logits, topk
from nsa_backend_plugin.ops.mqa_logits import aiter as aiter_logits
from tests.engine import bare

pytest.importorskip("sglang", reason="needs SGLang")
dsa_backend = pytest.importorskip("nsa_backend_plugin.engine.gpu.dsa_backend")
drafts = pytest.importorskip("nsa_backend_plugin.engine.gpu.drafts")
indexer_path = pytest.importorskip("nsa_backend_plugin.engine.indexer")
scratch = pytest.importorskip("nsa_backend_plugin.engine.gpu.scratch")
stock = pytest.importorskip("sglang.srt.layers.attention.dsa_backend")
batch_info = pytest.importorskip("sglang.srt.model_executor.forward_batch_info")

HEADS, TOPK, DRAFTS, PAGES, WIDTH = 4, 8, 3, 8, 192
COMMITTED = [70, 1, 125]  # tokens of each request before the step


def expand_on_cpu(queries: torch.Tensor, lengths: torch.Tensor, total: int, widest: int) -> torch.Tensor:
    """What SGLang's kernel of that name does: lengths that end at each request's, one for each query."""
    rows = [torch.arange(n - q + 1, n + 1) for q, n in zip(queries.tolist(), lengths.tolist(), strict=True)]
    return torch.cat(rows).int()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend with just enough of a pool for SGLang's metadata of an eager batch."""
    order = torch.randperm(PAGES - 1).int() + 1
    table = torch.zeros(4, WIDTH, dtype=torch.int32)
    for request, pages in enumerate((order[:3], order[3:4].repeat(3), order[[4, 5, 6]])):
        table[request] = (pages[:, None] * 64 + torch.arange(64)).flatten()
    made = bare.backend(dsa_backend.NsaPluginDSABackend, table, bare.index_pages(PAGES), TOPK)
    made.speculative_num_draft_tokens = DRAFTS
    made.num_q_heads, made.kv_lora_rank = HEADS, 512
    made._memory_saver_adapter = SimpleNamespace(region=lambda tag: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(stock, "seqlens_expand_triton", expand_on_cpu)
    monkeypatch.setattr(stock, "pad_dsa_cache_seqlens", lambda batch, lengths: lengths)
    return made


def forward_batch(mode: str, committed: list[int]) -> SimpleNamespace:
    before = torch.tensor(committed)
    extend = mode == "DRAFT_EXTEND_V2"
    lengths = before + DRAFTS if extend else before  # as SGLang passes them: with the drafts in draft-extend only
    return bare.batch(batch_info.ForwardMode[mode], committed, [DRAFTS] * len(committed), lengths)


def check_selection(backend: Any, visible: list[int], per_request: int) -> None:
    """select_slots of random queries against the metadata in force, row by row against its own request and length."""
    tokens = len(visible)
    query, gate = torch.randn(tokens, HEADS, 128), torch.rand(tokens, HEADS)
    positions, cos_sin = torch.tensor(visible) - 1, torch.randn(WIDTH, 64)
    rows, pool = backend.decode_rows(per_request), backend.token_to_kv_pool
    slots = indexer_path.select_slots(bare.indexer(cos_sin, HEADS, TOPK), query, gate, positions, pool, rows)
    quantized, weights = indexer_prep.query(query, gate, positions, cos_sin, weight_scale=HEADS**-0.5, is_neox=True)
    for row, length in enumerate(visible):
        table = backend.req_to_token[row // per_request]
        length_tensor = torch.tensor([length], dtype=torch.int32)
        logits = mqa_logits.paged(
            quantized[row : row + 1, None],
            pool.get_index_k_with_scale_buffer(0),
            weights[row : row + 1],
            length_tensor,
            (table[::64] // 64)[None],
            WIDTH,
        )
        want = topk.select(logits, length_tensor, TOPK)[0]
        want = sorted(table[want[want >= 0].long()].tolist())
        assert sorted(slot for slot in slots[row].tolist() if slot >= 0) == want
        assert len(want) == min(length, TOPK)


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2"])
def test_every_draft_selects_among_the_tokens_before_it(backend: Any, mode: str) -> None:
    batch = forward_batch(mode, COMMITTED)
    backend.init_forward_metadata(batch)
    assert backend.queries_per_request(batch.forward_mode) == DRAFTS
    check_selection(backend, [n + j + 1 for n in COMMITTED for j in range(DRAFTS)], DRAFTS)


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2", "DECODE"])
def test_replays_with_other_lengths_reuse_the_captured_buffers(
    backend: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capture, then steps with shorter and with longer contexts, on SGLang's static buffers and our scratch."""
    monkeypatch.setattr(scratch, "_pieces", {})
    per_request = 1 if mode == "DECODE" else DRAFTS
    requests = len(COMMITTED)
    backend.init_cuda_graph_state(requests, requests * per_request)
    assert backend.logits_buffer.shape == (requests * per_request, WIDTH)
    backend.init_forward_metadata_out_graph(forward_batch(mode, [1] * requests), in_capture=True)
    captured = backend.forward_metadata.real_page_table.data_ptr()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for committed in (COMMITTED, [3, 2, 40], [100, 60, 189 - DRAFTS]):
        batch = forward_batch(mode, committed)
        backend.init_forward_metadata_out_graph(batch)
        assert backend.forward_metadata.real_page_table.data_ptr() == captured
        first = 0 if mode == "DECODE" else 1  # a decode step's lengths count its token already
        backend.logits_buffer.fill_(float("nan"))
        check_selection(backend, [n + j + first for n in committed for j in range(per_request)], per_request)


@pytest.mark.parametrize("on_rocm", [False, True])
def test_rows_of_captured_logits_keep_apart_on_rocm(
    backend: Any, on_rocm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where AITER's logits kernel may store past a row's end."""
    monkeypatch.setattr(scratch, "_pieces", {})
    monkeypatch.setattr(dsa_backend.rocm, "on_rocm", lambda: on_rocm)
    backend.init_cuda_graph_state(3, 3)
    assert backend.logits_buffer.shape == (3, WIDTH)
    assert aiter_logits._guarded(backend.logits_buffer) is on_rocm


class Recorder:
    """Stands for a backend: remembers what it was made with."""

    def __init__(self, runner: Any, **options: Any):
        self.runner, self.options = runner, options


class Factory:
    """Of SGLang's factory what the hook sees."""

    topk, speculative_num_steps, seed_dsa_topk_from_draft_extend = 1, 4, False

    def __init__(self, attn_backend: Any):
        self.draft_model_runner = SimpleNamespace(attn_backend=attn_backend, kv_index_translator=None)

    def _create_dsa_decode_backend(self) -> None: ...

    def _create_dsa_prefill_backend(self) -> None: ...


def create(factory: Factory, per_step: bool) -> Any:
    table = {"dsa": factory._create_dsa_decode_backend if per_step else factory._create_dsa_prefill_backend}
    return drafts.create_backend(lambda *args, **kwargs: "stock", factory, "decode_attention_backend", table, "no {x}")


def test_the_draft_model_gets_a_backend_per_step_and_one_to_extend(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = object.__new__(dsa_backend.NsaPluginDSABackend)
    monkeypatch.setattr(dsa_backend, "NsaPluginDSABackend", Recorder)
    monkeypatch.setattr(stock, "DeepseekSparseAttnBackend", None)  # none of stock's may be made
    factory = Factory(ours)
    steps = create(factory, per_step=True)
    assert isinstance(steps, stock.DeepseekSparseAttnMultiStepBackend)
    assert steps.speculative_num_steps == 4
    assert [one.options["speculative_step_id"] for one in steps.attn_backends] == [0, 1, 2]
    assert all(one.runner is factory.draft_model_runner for one in steps.attn_backends)
    assert all(one.options["speculative_num_steps"] == 4 for one in steps.attn_backends)
    extend = create(factory, per_step=False)
    assert isinstance(extend, Recorder)
    for each in (steps, extend, *steps.attn_backends):
        assert each.prefill_attention_backend_str == each.decode_attention_backend_str == "nsa_plugin"


def test_other_backends_get_their_own_draft_backends() -> None:
    assert create(Factory(object()), per_step=True) == "stock"
    assert create(Factory(object()), per_step=False) == "stock"


ARGUMENTS = {
    "device": "cuda",
    "attention_backend": "nsa_plugin",
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "speculative_algorithm": "NEXTN",
    "speculative_eagle_topk": 1,
}


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN"])
@pytest.mark.parametrize("width", [None, 1])
@pytest.mark.parametrize("role", ["null", "prefill", "decode"])
def test_chains_of_drafts_are_served_on_cuda(algorithm: str, width: int | None, role: str) -> None:
    served = {**ARGUMENTS, "speculative_algorithm": algorithm, "speculative_eagle_topk": width}
    served["disaggregation_mode"] = role
    launch.check_arguments(SimpleNamespace(**served))
    with pytest.raises(ValueError, match=f"--speculative-algorithm {algorithm} on cpu.*NVIDIA GPUs"):
        launch.check_arguments(SimpleNamespace(**{**served, "device": "cpu"}))


@pytest.mark.parametrize(
    "name, value",
    [
        ("speculative_algorithm", "NGRAM"),
        ("speculative_algorithm", "EAGLE3"),
        ("speculative_eagle_topk", 4),
        ("speculative_adaptive", True),
        ("speculative_draft_attention_backend", "fa3"),
        ("enable_multi_layer_eagle", True),
    ],
)
def test_other_drafts_are_refused_by_name(name: str, value: Any) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{flag} is set \({value!r}\).*does not support"):
        launch.check_arguments(SimpleNamespace(**{**ARGUMENTS, name: value}))


def test_drafts_of_models_that_were_not_run_with_them_are_refused() -> None:
    def model(architecture: str) -> Any:
        return SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))

    for architecture in ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"):
        launch.check_drafts(model(architecture), "NEXTN")
    launch.check_drafts(model("Glm4MoeLiteForCausalLM"), None)
    with pytest.raises(ValueError, match=r"--speculative-algorithm NEXTN with Glm4MoeLiteForCausalLM: .*drafts"):
        launch.check_drafts(model("Glm4MoeLiteForCausalLM"), "NEXTN")


def indexed_model(architecture: str, **entries: Any) -> Any:
    config = PretrainedConfig(architectures=[architecture], index_topk=8, num_hidden_layers=2, **entries)
    return SimpleNamespace(hf_config=config, hf_text_config=config)


@pytest.mark.parametrize("role", ["null", "prefill", "decode"])
@pytest.mark.parametrize("share", [False, True])
def test_drafts_whose_slots_sglang_would_not_ask_for_are_refused(
    role: str, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own choice for the backends of a draft, on CUDA: our constructor takes no other than the fused top-k."""
    utils = importlib.import_module("sglang.srt.layers.attention.dsa.utils")
    arguments = SimpleNamespace(disaggregation_mode=role, enable_hisparse=False, dcp_enabled=False)
    if hasattr(utils, "should_remap_pd_dsa_seed_to_local_slots"):
        monkeypatch.setattr(utils, "is_cuda", lambda: True)
        for part in ("get_disagg", "get_memory", "get_parallel"):
            monkeypatch.setattr(utils, part, lambda: arguments)
        slots = utils.should_use_dsa_fused_topk(share)
    else:  # an older release
        slots = utils.should_use_dsa_fused_topk(arguments, share)
    model = indexed_model("DeepseekV32ForCausalLM", index_share_for_mtp_iteration=share)
    if not share or role == "null":
        assert slots
        launch.check_drafts(model, "NEXTN", role)
        return
    # Newer releases select slots in a decode server, from positions that its prefill server selected.
    assert not slots or role == "decode"
    launch.check_drafts(model, None, role)
    with pytest.raises(ValueError, match=f"NEXTN with --disaggregation-mode {role} and index_share_for_mtp_iteration"):
        launch.check_drafts(model, "NEXTN", role)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_drafts_between_servers_of_models_whose_layers_share_their_topk_are_refused(role: str) -> None:
    model = indexed_model("GlmMoeDsaForCausalLM", index_topk_pattern="FS")
    launch.check_drafts(model, "NEXTN")
    with pytest.raises(ValueError, match=f"NEXTN with --disaggregation-mode {role} with Glm.*share their top-k"):
        launch.check_drafts(model, "NEXTN", role)


@pytest.mark.parametrize("fault", [None, "loses them"])
def test_drafts_over_a_hierarchical_cache_that_spoils_them_are_refused(
    fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which releases that is so, tests/test_arguments.py says."""
    monkeypatch.setattr(launch.release, "hicache_draft_fault", lambda: fault)

    def check(algorithm: str | None, hierarchical: bool) -> None:
        launch.check_hierarchical_cache(
            SimpleNamespace(speculative_algorithm=algorithm, enable_hierarchical_cache=hierarchical)
        )

    check(None, True)
    check("EAGLE", False)
    refused = pytest.raises(
        ValueError, match=r"--enable-hierarchical-cache with --speculative-algorithm EAGLE: SGLang \S+ loses them"
    )
    with refused if fault else contextlib.nullcontext():
        check("EAGLE", True)


def test_speculation_is_refused_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match=r"--speculative-algorithm NEXTN on rocm.*NVIDIA GPUs"):
        launch.check_arguments(SimpleNamespace(**ARGUMENTS))
