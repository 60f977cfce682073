"""The fused decode path with the reference operations: order of issue, buffer aliasing, what lands in the caches."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_backend_plugin.engine import index_cache
from nsa_backend_plugin.engine.gpu import shards
from nsa_backend_plugin.layouts import index_page_bytes, packed_latent_bytes
from nsa_backend_plugin.ops import concat, indexer_prep, latent_cache, mqa_logits, projection, sparse_mla, topk
from nsa_backend_plugin.ops._torch.rotary import apply_rope
from nsa_backend_plugin.ops.call import Call, Step
from nsa_backend_plugin.ops.dispatch import Operation
from nsa_backend_plugin.runtime import served
from tests.engine.lane_races import LaneRaces
from tests.ops.common import assert_close

pytest.importorskip("sglang", reason="needs SGLang")
absorb = pytest.importorskip("nsa_backend_plugin.engine.gpu.absorb")
dsa_backend = pytest.importorskip("nsa_backend_plugin.engine.gpu.dsa_backend")
indexer_path = pytest.importorskip("nsa_backend_plugin.engine.indexer")
projections = pytest.importorskip("nsa_backend_plugin.engine.gpu.projections")
query_projection = pytest.importorskip("nsa_backend_plugin.engine.gpu.query_projection")
prefill = pytest.importorskip("nsa_backend_plugin.engine.gpu.prefill")
scratch = pytest.importorskip("nsa_backend_plugin.engine.gpu.scratch")

HIDDEN, Q_LORA, HEADS, NOPE, INDEX_HEADS, TOPK, PAGES = 48, 32, 3, 16, 4, 20, 6
#: Tokens of each request, those of the step included.
LENGTHS = [70, 5, 130]
LAYER = SimpleNamespace(tp_q_head_num=HEADS, v_head_dim=512, head_dim=576, layer_id=0, scaling=0.05)
#: Arguments that change with a step, or that no kernel is compiled for.
NUMBERS = {"step", "out", "eps", "norm_eps", "weight_scale", "softmax_scale", "max_context", "k"}
#: Mode of a batch and its queries for each request.
MODES = [("decode", 1), ("target_verify", 2), ("target_verify", 5), ("draft_extend_v2", 3)]


def forward_mode(name: str) -> SimpleNamespace:
    """Answers SGLang's questions about a batch's mode."""
    return SimpleNamespace(
        is_decode=lambda: name == "decode",
        is_target_verify=lambda: name == "target_verify",
        is_draft_extend_v2=lambda: name == "draft_extend_v2",
    )


class Norm(torch.nn.Module):
    variance_epsilon = 1e-3  # nobody's default

    def __init__(self, width: int, bias: bool = False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width) + 0.5, requires_grad=False)
        if bias:
            self.bias = torch.nn.Parameter(torch.randn(width), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
        ).to(x.dtype)


def linear(outputs: int, inputs: int) -> Any:
    """SGLang's own plain layer, in bf16."""
    from sglang.srt.layers.linear import ReplicatedLinear

    layer = ReplicatedLinear(inputs, outputs, bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.normal_(std=inputs**-0.5)
    return layer


class Case:
    """A layer, a backend and a batch, all made of CPU tensors; `log` records the order of issue."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        packed: bool,
        is_neox: bool,
        mode: str = "decode",
        per_request: int = 1,
        merged: bool = True,
    ):
        self.log: list[str] = []
        self.tokens = len(LENGTHS) * per_request
        rope = SimpleNamespace(cos_sin_cache=torch.randn(256, 64), is_neox_style=is_neox)
        self.indexer = SimpleNamespace(
            use_dsa_indexer_fusion=not is_neox,
            layer_id=0,
            n_heads=INDEX_HEADS,
            head_dim=128,
            index_topk=TOPK,
            softmax_scale=128**-0.5,
            scale_fmt="ue8m0",
            rotary_emb=rope,
            k_norm=Norm(128, bias=True),
            wk=linear(128, HIDDEN),
            weights_proj=linear(INDEX_HEADS, HIDDEN),
            wk_weights_proj=linear(128 + INDEX_HEADS, HIDDEN),
            wq_b=linear(INDEX_HEADS * 128, Q_LORA),
            _mask_init_and_local_tokens=lambda logits, lengths: logits,
        )
        indexer_path.merge_projection(self.indexer)
        q_b = linear(HEADS * (NOPE + 64), Q_LORA)

        def q_b_proj(x: torch.Tensor) -> torch.Tensor:
            self.log.append("q_b_proj")
            return q_b(x)[0].view(-1, HEADS, NOPE + 64)

        self.attn = SimpleNamespace(
            use_dsa=True,
            q_lora_rank=Q_LORA,
            kv_lora_rank=512,
            qk_nope_head_dim=NOPE,
            qk_rope_head_dim=64,
            rotary_emb=rope,
            use_deep_gemm_bmm=False,
            layer_id=0,
            alt_stream=None,
            indexer=self.indexer,
            q_a_layernorm=Norm(Q_LORA),
            kv_a_layernorm=Norm(512),
            q_b_proj=q_b,
            num_local_heads=HEADS,
            qk_head_dim=NOPE + 64,
            q_b_proj_forward=q_b_proj,
            w_kc=torch.randn(HEADS, NOPE, 512).to(torch.bfloat16),
            should_run_indexer=lambda previous: True,
        )
        if merged:
            query_projection.merge(self.attn)
        width, dtype = (packed_latent_bytes(576), torch.uint8) if packed else (576, torch.bfloat16)
        self.latent = torch.zeros(PAGES * 64, 1, width, dtype=dtype)
        self.index_pages = torch.randint(0, 120, (PAGES, index_page_bytes()), dtype=torch.uint8)
        for page in self.index_pages:  # finite fp32 scales of a live page
            page[64 * 128 :] = (torch.rand(64) * 0.02 + 0.005).view(torch.uint8)
        pool = SimpleNamespace(
            page_size=64,
            get_key_buffer=lambda layer_id: self.latent,
            get_index_k_with_scale_buffer=lambda layer_id: self.index_pages,
        )
        index_cache.declare_layout(pool, "row_major")
        order = torch.randperm(PAGES).int()
        pages = torch.stack([order[:3], order[[3, 3, 3]], order[[4, 5, 0]]])
        self.page_table = pages.repeat_interleave(per_request, dim=0)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        earlier = torch.arange(per_request - 1, -1, -1, dtype=torch.int32)
        #: Tokens that each query of the step sees: a draft sees those before it.
        self.lengths = (lengths[:, None] - earlier).flatten()
        self.positions = self.lengths.long() - 1
        self.slots = self.page_table.long().gather(1, self.positions[:, None] // 64)[:, 0] * 64 + self.positions % 64
        self.backend = object.__new__(dsa_backend.NsaPluginDSABackend)
        self.backend.token_to_kv_pool = pool
        self.backend.forward_metadata = SimpleNamespace(
            real_page_table=self.page_table,
            cache_seqlens_int32=lengths,
            dsa_seqlens_expanded=self.lengths,
            dsa_cache_seqlens_int32=self.lengths.clamp_max(TOPK),
        )
        self.backend.step = Step()
        self.backend.speculative_num_draft_tokens = per_request
        self.backend.attention_workspace = self.backend.logits_buffer = None
        self.backend.use_mha, self.backend.share = False, shards.Share(1, 0)
        self.hidden = torch.randn(self.tokens, HIDDEN).to(torch.bfloat16)
        self.qkv = torch.randn(self.tokens, Q_LORA + 576).to(torch.bfloat16)
        self.batch = SimpleNamespace(
            forward_mode=forward_mode(mode),
            batch_size=len(LENGTHS),
            out_cache_loc=self.slots,
            reuse_dsa_topk_indices=False,
        )
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(absorb, "get_attn_backend", lambda: self.backend)

        def fetch_qkv_latent() -> torch.Tensor:
            self.log.append("q_a")
            return self.qkv

        context = SimpleNamespace(fetch_qkv_latent=fetch_qkv_latent)
        monkeypatch.setattr(absorb, "get_attn_tp_context", lambda: context)
        monkeypatch.setattr(absorb, "get_parallel", lambda: SimpleNamespace(dcp_enabled=False))
        monkeypatch.setattr(absorb, "is_kv_b_lora_active", lambda attn: False)
        monkeypatch.setattr(absorb, "maybe_capture_indexer_topk", lambda layer_id, slots: slots)

    def prepare(self, **changes: Any) -> tuple[Any, ...]:
        def original(*args: Any) -> str:
            return "stock"

        return absorb.forward_absorb_prepare(
            original, self.attn, self.positions, self.hidden, self.batch, None, **changes
        )

    def attend(self, q_nope: torch.Tensor, q_rope: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        forward = self.backend.forward_decode if self.batch.forward_mode.is_decode() else self.backend.forward_extend
        return forward(q_nope, None, None, LAYER, self.batch, q_rope=q_rope, topk_indices=slots)


@pytest.fixture(
    params=[(packed, neox, *mode, True) for packed in (False, True) for neox in (False, True) for mode in MODES]
    + [(True, True, "decode", 1, False), (False, False, "target_verify", 2, False)]
)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(monkeypatch, *request.param)


def expected(case: Case) -> dict[str, torch.Tensor]:
    """The same step from unfused pieces, each on its own buffers."""
    attn, indexer = case.attn, case.indexer
    cos_sin = attn.rotary_emb.cos_sin_cache[case.positions]
    neox = attn.rotary_emb.is_neox_style
    q_lora = attn.q_a_layernorm(case.qkv[:, :Q_LORA])
    q = attn.q_b_proj_forward(q_lora)
    q_rope = apply_rope(q[..., NOPE:], cos_sin, neox).to(torch.bfloat16)
    q_nope = torch.bmm(q[..., :NOPE].transpose(0, 1), attn.w_kc).transpose(0, 1)
    latent, pages = case.latent.clone(), case.index_pages.clone()
    k_nope = attn.kv_a_layernorm(case.qkv[:, Q_LORA : Q_LORA + 512])
    k_rope = apply_rope(case.qkv[:, Q_LORA + 512 :], cos_sin, neox).to(torch.bfloat16)
    latent_cache.store(k_nope, k_rope, latent, case.slots)
    if indexer.use_dsa_indexer_fusion:
        both = indexer.wk_weights_proj(case.hidden)[0]
        key, gate = both[:, :128], both[:, 128:]
    else:
        key = case.hidden.float() @ indexer.wk.weight.float().t()
        gate = case.hidden.float() @ indexer.weights_proj.weight.float().t()
    rope = {"is_neox": neox, "hadamard": neox}
    eps = indexer.k_norm.variance_epsilon
    cos_sin_cache = attn.rotary_emb.cos_sin_cache
    norm = indexer.k_norm
    indexer_prep.key_store(
        key, norm.weight, norm.bias, case.positions, cos_sin_cache, pages, case.slots, eps=eps, **rope
    )
    query = indexer.wq_b(q_lora)[0].view(case.tokens, INDEX_HEADS, 128)
    q_fp8, weights = indexer_prep.query(
        query,
        gate,
        case.positions,
        cos_sin_cache,
        weight_scale=128**-0.5 * INDEX_HEADS**-0.5,
        scale_format="ue8m0" if neox else "fp32",
        **rope,
    )
    logits = mqa_logits.paged(q_fp8[:, None], pages, weights, case.lengths, case.page_table, 192)
    slots = topk.select(logits, case.lengths, TOPK, page_table=case.page_table, page_size=64)
    return {"q_all": torch.cat([q_nope, q_rope], -1), "latent": latent, "pages": pages, "slots": slots}


def test_one_step_equals_the_unfused_pieces(case: Case) -> None:
    want = expected(case)
    q_rope, k_rope, q_nope, k_nope, batch, _, positions, slots, _, plan = case.prepare()
    assert k_rope is None
    assert k_nope is None
    assert plan is None
    assert batch is case.batch
    assert positions is case.positions
    assert torch.equal(torch.cat([q_nope, q_rope], -1), want["q_all"])
    assert torch.equal(case.latent.view(torch.uint8), want["latent"].view(torch.uint8))
    assert torch.equal(case.index_pages, want["pages"])
    assert torch.equal(slots, want["slots"])


def spied(called: list[str], name: str, run: Any, *args: Any, **options: Any) -> Any:
    called.append(name)
    return run(*args, **options)


def test_few_tokens_are_projected_by_ours_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dimensions that it reads, and W_UK as it lies in memory: both projections here are called, and agree."""
    for name in ("HIDDEN", "Q_LORA", "NOPE"):
        monkeypatch.setitem(globals(), name, 64)
    case = Case(monkeypatch, packed=True, is_neox=True)
    case.attn.w_kc = case.attn.w_kc.transpose(1, 2).contiguous().transpose(1, 2)
    want = expected(case)
    monkeypatch.setattr(projections, "measured", lambda device: True)
    called: list[str] = []
    for name in ("linear", "per_head"):
        monkeypatch.setattr(projection, name, functools.partial(spied, called, name, getattr(projection, name)))
    q_rope, _, q_nope, *_, slots, _, _ = case.prepare()
    assert sorted(called) == ["linear", "per_head"]
    assert_close(torch.cat([q_nope, q_rope], -1).float(), want["q_all"].float(), 5e-6)
    assert torch.equal(case.latent.view(torch.uint8), want["latent"].view(torch.uint8))
    assert torch.equal(case.index_pages, want["pages"])
    assert torch.equal(slots, want["slots"])


def pad(case: Case, rows: int) -> None:
    """Rows behind the batch's own, as SGLang appends them for data parallelism, which write to a slot of nobody's."""
    unused = int(case.page_table[1 * case.tokens // len(LENGTHS), 0]) * 64 + 63  # past the second request's end
    case.hidden, case.qkv = (torch.cat([t, torch.randn(rows, t.shape[1]).to(t.dtype)]) for t in (case.hidden, case.qkv))
    case.positions = torch.cat([case.positions, case.positions.new_zeros(rows)])
    case.batch.out_cache_loc = torch.cat([case.slots, case.slots.new_full((rows,), unused)])


def test_a_batch_padded_for_data_parallelism_keeps_the_fused_path(case: Case) -> None:
    want = expected(case)
    pad(case, 2)
    q_rope, _, q_nope, *_, slots, _, _ = case.prepare()
    assert torch.equal(torch.cat([q_nope, q_rope], -1)[: case.tokens], want["q_all"])
    own = case.slots
    assert torch.equal(case.latent[own].view(torch.uint8), want["latent"][own].view(torch.uint8))
    assert torch.equal(slots[: case.tokens], want["slots"])
    assert slots[case.tokens :].eq(-1).all()
    out = case.attend(q_nope, q_rope, slots)
    assert torch.isfinite(out).all()
    assert out[case.tokens :].eq(0).all()


def test_rows_that_pad_a_batch_have_length_zero(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that kernels end where a row's slots end, in a padded batch too; made once for all layers."""
    pad(case, 2)
    q_rope, _, q_nope, *_, slots, _, _ = case.prepare()
    asked: list[dict[str, Any]] = []
    attend = sparse_mla.attend
    monkeypatch.setattr(
        dsa_backend.sparse_mla, "attend", lambda *args, **more: asked.append(more) or attend(*args, **more)
    )
    for _layer in range(2):
        case.attend(q_nope, q_rope, slots)
    first, second = (more["lengths"] for more in asked)
    if case.batch.forward_mode.is_draft_extend_v2():  # whose graph pads between the tokens
        assert first is None
        return
    assert first.tolist() == [*case.lengths.clamp_max(TOPK).tolist(), 0, 0]
    assert first is second
    assert not asked[0]["rows_have_keys"]


@pytest.mark.parametrize("mode, fewer", [("extend", True), ("decode", False), ("target_verify", False)])
def test_a_prefill_that_is_run_to_capture_a_graph_sees_one_key_a_row(
    monkeypatch: pytest.MonkeyPatch, mode: str, fewer: bool
) -> None:
    """Its tokens are in one page, whose few rows every multiprocessor would read; decode's graph keeps its calls."""
    case = Case(monkeypatch, packed=True, is_neox=True)
    q_rope, _, q_nope, *_, slots, _, _ = case.prepare()
    real = case.attend(q_nope, q_rope, slots)
    case.batch.forward_mode = forward_mode(mode)
    case.backend.forward_metadata.indexer_seq_lens_cpu = None
    asked: list[dict[str, Any]] = []
    attend = sparse_mla.attend
    monkeypatch.setattr(
        dsa_backend.sparse_mla, "attend", lambda *args, **more: asked.append(more) or attend(*args, **more)
    )
    with dsa_backend.capture_mode.model_capture_mode():
        out = case.attend(q_nope, q_rope, slots)
    assert torch.isfinite(out).all()
    assert torch.equal(out, real) != fewer
    assert torch.equal(case.attend(q_nope, q_rope, slots), real)
    assert asked[0]["rows_have_keys"] is asked[1]["rows_have_keys"] is True
    assert asked[0]["lengths"].tolist() == ([1, 1, 1] if fewer else asked[1]["lengths"].tolist())


def test_slots_of_an_earlier_draft_step_lead_no_row(case: Case) -> None:
    """IndexShare: a draft step attends to what was selected for a shorter context, or before the first to nothing."""
    case.batch.reuse_dsa_topk_indices = True
    case.attn.should_run_indexer = lambda previous: False
    earlier = expected(case)["slots"]
    for row, length in zip(earlier, case.lengths.clamp_max(TOPK).tolist(), strict=True):
        row[length - 1 :] = -1
    q_rope, _, q_nope, *_, slots, _, _ = case.prepare(prev_topk_indices=earlier)
    assert slots is earlier
    out = case.attend(q_nope, q_rope, slots)  # on a CPU a length that counts more than the slots is an error
    assert torch.isfinite(out).all()
    assert out[(earlier < 0).all(1)].eq(0).all()


def test_a_batch_with_rows_that_have_no_slot_is_left_to_sglang(case: Case) -> None:
    pad(case, 2)
    case.batch.out_cache_loc = case.slots
    assert case.prepare() == "stock"


def test_cat_skip_is_a_view_and_bitwise_equal(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    q_rope, _, q_nope, _, _, _, _, slots, _, _ = case.prepare()
    assert concat.joined(q_nope, q_rope) is not None
    seen: list[torch.Tensor] = []
    attend = sparse_mla.attend

    def recording(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(q)
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(dsa_backend.sparse_mla, "attend", recording)
    before = case.latent.clone()
    fused = case.attend(q_nope, q_rope, slots)
    plain = case.attend(q_nope.clone().contiguous(), q_rope.contiguous(), slots)
    assert seen[0].data_ptr() == q_nope.data_ptr()
    assert seen[1].data_ptr() != q_nope.data_ptr()
    assert torch.equal(fused, plain)
    assert torch.equal(case.latent, before), "k None must not write the cache again"
    assert torch.isfinite(fused).all()


def form(call: Call) -> dict[str, Any]:
    """What a kernel is compiled for: which tensors there are, of which dtype and rank, and the options."""
    values = {name: getattr(call, name) for name in (f.name for f in dataclasses.fields(call))}
    tensors = {name: (value.dtype, value.dim()) for name, value in call.tensors()}
    return {name: tensors.get(name, value) for name, value in values.items() if name not in NUMBERS}


def test_the_calls_are_those_that_are_reported_and_compiled_ahead(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Call] = {}
    run = Operation.run
    case.attn.kv_a_layernorm.weight.data = case.attn.kv_a_layernorm.weight.data.to(torch.bfloat16)
    monkeypatch.setattr(Operation, "run", lambda self, call: (made.update({self.name: call}), run(self, call))[1])
    q_rope, _, q_nope, *_, slots, _, _ = case.prepare()
    case.attend(q_nope, q_rope, slots)
    model = served.Model(
        HEADS, indexer_path.described(case.indexer), kv="packed" if case.latent.dtype == torch.uint8 else "bf16"
    )
    step = served.Step(len(LENGTHS), 192, case.tokens // len(LENGTHS))
    said = {operation.name: call for operation, call in served.calls(model, step, "cpu")}
    if case.batch.forward_mode.is_draft_extend_v2():  # its rows may see nothing, which no report shows
        del made["sparse_mla.attend"], said["sparse_mla.attend"]
    said["latent_cache.store"].is_neox = case.attn.rotary_emb.is_neox_style  # no served model's latent key has this one
    assert made.keys() == said.keys()
    for name, call in said.items():
        assert form(call) == form(made[name]), name


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_main_lane_is_issued_first_and_joined_last(monkeypatch: pytest.MonkeyPatch, merged: bool, early: bool) -> None:
    case = Case(monkeypatch, packed=True, is_neox=True, merged=merged)
    monkeypatch.setattr(projections, "shares_the_gpu", lambda positions: early)
    log = case.log

    class Lane:
        def fork(self) -> None:
            log.append("fork")

        def __enter__(self) -> None:
            log.append("side")

        def __exit__(self, *exception: object) -> None:
            log.append("main")

        def join(self) -> None:
            log.append("join")

    def logged(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(absorb, "side_lane", lambda stream, tokens: Lane())
    for module, name in ((indexer_prep, "key_store"), (topk, "select"), (latent_cache, "store"), (torch, "bmm")):
        monkeypatch.setattr(module, name, logged(name, getattr(module, name)))
    monkeypatch.setattr(query_projection, "project", logged("project", query_projection.project))
    case.prepare()
    separate = [] if merged else ["q_b_proj"]
    start = ["fork", "q_a"] if early else ["q_a", "fork"]
    first, second = (
        [*start, "project", "side", "key_store", "main"],
        [*separate, "bmm", "store", "side", "select", "main"],
    )
    assert log == [*first, "fork", *second, "join"]


@pytest.mark.parametrize("early", [False, True])
def test_lanes_touch_nothing_unordered(case: Case, monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    watch = LaneRaces()
    monkeypatch.setattr(projections, "shares_the_gpu", lambda positions: early)
    monkeypatch.setattr(absorb, "side_lane", lambda stream, tokens: watch.side())
    with watch:
        case.hidden = case.hidden.clone()  # written on the main lane
        q_rope, _, q_nope, *_, slots, _, _ = case.prepare()
        assert {lane for lane, _, _ in watch.writes.values()} == {"main", "side"}
        torch.cat([q_nope.flatten(), q_rope.flatten(), slots.flatten()])  # what attention reads, after the join


@pytest.mark.parametrize("forgotten", ["first fork", "second fork", "join"])
def test_forgotten_waits_are_found(case: Case, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    watch = LaneRaces()
    lane = watch.side()
    waits = {"first fork": lane.fork, "second fork": lane.fork, "join": lane.join}
    waits[forgotten] = lambda: None
    forks = iter((waits["first fork"], waits["second fork"]))
    lane.fork, lane.join = lambda: next(forks)(), waits["join"]
    monkeypatch.setattr(absorb, "side_lane", lambda stream, tokens: lane)

    def step() -> None:
        case.hidden = case.hidden.clone()
        *_, slots, _, _ = case.prepare()
        slots.clone()

    with watch, pytest.raises(AssertionError, match="unordered"):
        step()


def test_capture_uses_the_buffers_allocated_before_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    want = expected(case)["slots"]
    case.capturing = True
    case.backend.logits_buffer = torch.full((case.tokens + 2, 192), float("nan"))
    assert torch.equal(case.prepare()[7], want)
    for row, length in enumerate(case.lengths.tolist()):
        assert torch.isfinite(case.backend.logits_buffer[row, :length]).all()
    assert torch.isnan(case.backend.logits_buffer[case.tokens :]).all()


@pytest.mark.parametrize("rows", [None, 1])
def test_a_captured_step_without_room_allocates(case: Case, rows: int | None) -> None:
    """As wide prefill graphs do: each piece of scratch is asked for its own size."""
    want = expected(case)["slots"]
    case.capturing = True
    case.backend.logits_buffer = None if rows is None else torch.empty(rows, 192)
    assert torch.equal(case.prepare()[7], want)


def test_each_scratch_is_measured_by_its_own_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = case.backend
    monkeypatch.setattr(dsa_backend.sparse_mla, "workspace_bytes", lambda tokens, *args, **options: 10 * tokens)
    backend.num_q_heads, backend.dsa_index_topk, backend.device, backend.kv_lora_rank = HEADS, TOPK, "cpu", 512
    backend.attention_workspace = torch.empty(40, dtype=torch.uint8)
    backend.logits_buffer = torch.empty(2, 192)
    assert backend._workspace(4) is None, "an eager step"
    case.capturing = True
    assert backend._workspace(4) is backend.attention_workspace, "whatever rows the logits have"
    assert backend._workspace(5) is None
    assert backend.captured_logits(2) is backend.logits_buffer
    assert backend.captured_logits(3) is None
    backend.attention_workspace = backend.logits_buffer = None
    assert backend._workspace(1) is None
    assert backend.captured_logits(1) is None


def test_unknown_keywords_are_refused(case: Case) -> None:
    """Newer releases pass `attn_sink`, the learnable sink of some models; what is None asks for nothing."""
    q_rope, _, q_nope, *_, slots, _, _ = case.prepare()
    for forward in (case.backend.forward_decode, case.backend.forward_extend):
        call = functools.partial(
            forward, q_nope, None, None, LAYER, case.batch, q_rope=q_rope, topk_indices=slots, attn_sink=None
        )
        assert torch.isfinite(call()).all()
        with pytest.raises(ValueError, match="SGLang passes attn_sink to the attention backend"):
            call(attn_sink=torch.zeros(HEADS))


def test_rare_cases_keep_the_stock_path_and_say_why(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(absorb, "_log_once", reasons.append)
    before = case.latent.clone()
    assert case.prepare(llama_4_scaling=torch.ones(1)) == "stock"
    case.batch.out_cache_loc = case.slots[:-1]  # rows without a slot
    assert case.prepare() == "stock"
    case.batch.out_cache_loc = case.slots
    table = case.backend.forward_metadata.real_page_table
    case.backend.forward_metadata.real_page_table = torch.cat([table, table[:1]])  # metadata of more rows
    assert case.prepare() == "stock"
    case.backend.forward_metadata.real_page_table = table
    case.attn.w_kc = case.attn.w_kc.float()
    assert case.prepare() == "stock"
    assert [reason.split()[0] for reason in reasons] == ["queries", "the", "the", "W_UK"]
    reasons.clear()
    mode, case.batch.forward_mode = case.batch.forward_mode, forward_mode("extend")  # prefill is not ours to prepare
    assert case.prepare() == "stock"
    case.batch.forward_mode = mode
    monkeypatch.setattr(absorb, "get_attn_backend", lambda: object())  # another backend is selected
    assert case.prepare() == "stock"
    assert not reasons
    assert torch.equal(case.latent, before)


def test_layers_that_reuse_top_k_run_no_indexer(case: Case) -> None:
    case.attn.should_run_indexer = lambda previous: False
    pages, previous = case.index_pages.clone(), torch.zeros(case.tokens, TOPK, dtype=torch.int32)
    slots = case.prepare(prev_topk_indices=previous)[7]
    assert slots is previous
    assert torch.equal(case.index_pages, pages)


def test_scratch_is_shared_and_grows_for_later_backends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_pieces", {})
    first = scratch.reserve("a", 100, "cpu")
    assert scratch.reserve("a", 40, "cpu") is first
    assert scratch.reserve("b", 40, "cpu") is not first
    larger = scratch.reserve("a", 200, "cpu")
    assert (first.numel(), larger.numel()) == (100, 200)


def test_prefill_keys_are_joined_for_our_backends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, rope = torch.randn(5, 3, 256), torch.randn(5, 1, 64)
    k_nope = kv[..., :128]  # a slice, as kv_b_proj's output is split
    want = torch.cat([k_nope, rope.expand(-1, 3, -1)], -1)
    monkeypatch.setattr(prefill, "get_attn_backend", lambda: object.__new__(dsa_backend.NsaPluginDSABackend))
    got = prefill.concat_key(lambda *args: pytest.fail("stock"), None, k_nope, rope, None)
    assert torch.equal(got, want)
    assert got.is_contiguous()
    key, value = prefill.pack_chunk(k_nope, rope, kv[..., 128:])
    assert torch.equal(key, want)
    assert value.data_ptr() == kv[..., 128:].data_ptr()
    monkeypatch.setattr(prefill, "get_attn_backend", object)
    assert prefill.concat_key(lambda *args: args, "attn", k_nope, rope, "batch") == ("attn", k_nope, rope, "batch")
