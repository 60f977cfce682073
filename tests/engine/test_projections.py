"""Which products of a layer ours takes, and that they are the layer's own."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang")
projections = pytest.importorskip("nsa_backend_plugin.engine.gpu.projections")
from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mla  # noqa: E402

from nsa_backend_plugin import BACKEND_NAME  # noqa: E402
from nsa_backend_plugin.engine import indexer as indexer_path  # noqa: E402
from nsa_backend_plugin.engine import merging, shapes  # noqa: E402
from nsa_backend_plugin.engine.gpu import query_projection  # noqa: E402
from nsa_backend_plugin.ops import projection  # noqa: E402
from nsa_backend_plugin.runtime import served  # noqa: E402
from tests.engine.test_fused_decode import forward_mode, linear  # noqa: E402
from tests.engine.test_merged_weights import APART, Attention, block_fp8, dequantized, lora  # noqa: E402
from tests.ops.common import assert_close  # noqa: E402

BAR = 5e-6
FP8_BAR = 2e-3  # ours quantizes tokens, the layer's stand-in does not
CALLED = ("fused_qkv_a_proj_with_mqa", "o_proj")


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device counts as measured; the torch reference runs."""
    monkeypatch.setattr(projections, "measured", lambda device: True)


def attention(make: Any) -> Any:
    attn = Attention()
    for name in CALLED:
        setattr(attn, name, make())
    return attn


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, 256).to(torch.bfloat16)


@pytest.mark.parametrize("make", [lambda: linear(192, 256), block_fp8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", CALLED)
def test_few_tokens_are_multiplied_by_ours_and_more_by_the_layer(on_h200, make: Any, name: str) -> None:
    attn = attention(make)
    layer, most = getattr(attn, name), projections.MOST_TOKENS
    called = []
    own = layer.quant_method.apply
    layer.quant_method.apply = lambda *args, **kwargs: called.append(args) or own(*args, **kwargs)
    for _ in range(2):  # the draft's loader may come by again
        projections.install(attn)
    for count in (1, most, most + 1):
        x = tokens(count)
        out = layer(x)[0]
        weight = layer.weight.float() if make is not block_fp8 else dequantized(layer.weight, layer.weight_scale_inv)
        assert_close(out.float(), (x.float() @ weight.t()), BAR if make is not block_fp8 else FP8_BAR)
        assert len(called) == (count > most)


def test_an_update_of_the_weights_is_seen(on_h200) -> None:
    attn = attention(lambda: linear(192, 256))
    projections.install(attn)
    x = tokens(3)
    before = attn.o_proj(x)[0]
    attn.o_proj.weight.data.mul_(2)
    assert torch.equal(attn.o_proj(x)[0], 2 * before)


@pytest.mark.parametrize("inputs", [32, 96, 112, 200, 16384])
def test_depths_that_ours_does_not_read_are_left_to_the_layer(on_h200, inputs: int) -> None:
    """Of every projection: one more dimension in a test's model once ended a launch."""
    attn = attention(lambda: linear(64, inputs))
    attn.w_kc = torch.zeros(4, inputs, 64, dtype=torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    projections.install(attn)
    x = torch.randn(2, inputs).to(torch.bfloat16)
    assert torch.equal(attn.o_proj(x)[0], torch.nn.functional.linear(x, attn.o_proj.weight))
    assert projections.called_by_sglang(attn).keys() == {"q_b_proj"}
    assert not projections.takes(x, attn.o_proj.weight)
    assert not projections.most_tokens_of_heads(attn.w_kc, torch.bfloat16)
    merged = Attention(linear(256, inputs), linear(256, inputs))
    query_projection.merge(merged)
    assert not [p for p in shapes._projections(torch.nn.Sequential(attention_of(merged))) if p.depth == inputs]


def attention_of(attn: Any) -> Any:
    attn.fused_qkv_a_proj_with_mqa = linear(192, 256)
    return attn


def test_rounded_scales_of_tokens_are_left_to_the_layer(on_h200) -> None:
    attn = attention(lambda: block_fp8(256, "ue8m0"))
    projections.install(attn)
    assert projections.obstacle(attn.o_proj) == "it rounds the scales of its tokens"
    both = Attention(block_fp8(256, "ue8m0"), block_fp8(256, "ue8m0"))
    both.q_a_layernorm.to(torch.bfloat16)
    query_projection.merge(both)
    query_projection.project(both, torch.randn(3, 256).to(torch.bfloat16))  # its stand-in checks the scales


@pytest.mark.parametrize("kind", APART)
def test_layers_of_another_kind_keep_their_own(on_h200, kind: str) -> None:
    attn = attention(lambda: APART[kind](256))
    projections.install(attn)
    layer = attn.o_proj.base_layer if "LoRA" in kind else attn.o_proj
    assert getattr(layer.quant_method.apply, "func", None) is not projections._apply
    assert projections.obstacle(attn.o_proj)


def test_an_adapter_that_comes_later_is_added(on_h200) -> None:
    """SGLang wraps layers for LoRA once they are loaded; the wrapper calls the layer's method."""
    attn = attention(lambda: linear(256, 256))
    projections.install(attn)
    layer = attn.o_proj
    wrapped = lora(layer)
    x = tokens(4)
    assert not torch.equal(wrapped(x)[0], layer(x)[0])


@pytest.mark.parametrize("make", [lambda: linear(256, 256), block_fp8], ids=["bf16", "fp8"])
def test_merged_projections_by_ours_are_those_of_the_layers(on_h200, monkeypatch, make: Any) -> None:
    attn = Attention(make(), make())
    attn.q_a_layernorm.to(torch.bfloat16)
    merging.merge(attn, "cpu")
    q_lora = torch.randn(5, 300).to(torch.bfloat16)[:, :256]
    index_query, project_q = query_projection.project(attn, q_lora)
    key, gate = indexer_path.project(attn.indexer, q_lora)
    assert key.dtype == gate.dtype == torch.float32
    with monkeypatch.context() as patched:
        patched.setattr(projections, "measured", lambda device: False)
        expected_query, expected_q = query_projection.project(attn, q_lora)
        expected_key, expected_gate = indexer_path.project(attn.indexer, q_lora)
    bar = 2e-3 if make is block_fp8 else 2e-5  # SGLang's product quantizes its tokens; both round the norm
    assert_close(index_query.float(), expected_query.float(), bar, row_dims=2)
    assert_close(project_q().float(), expected_q().float(), bar, row_dims=2)
    assert_close(key, expected_key, 1e-9)
    assert_close(gate, expected_gate, 1e-9)


class Absorbed(torch.nn.Module, forward_mla.DeepseekMLAForwardMixin):
    """What SGLang's own `forward_absorb_core` reads of a layer; attention yields some values."""

    num_local_heads, kv_lora_rank, v_head_dim = 3, 128, 64
    current_attention_backend = BACKEND_NAME
    use_deep_gemm_bmm, rotary_emb, next_skip_topk, kv_b_proj = False, None, None, None

    def __init__(self) -> None:
        super().__init__()
        heads, rank, values = self.num_local_heads, self.kv_lora_rank, self.v_head_dim
        self.w_vc = torch.randn(heads, values, rank).to(torch.bfloat16).transpose(1, 2)
        self.o_proj = linear(96, heads * values)
        self.asked: list[tuple[Any, ...]] = []

    def attn_mqa(self, q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.asked.append((q, *args, *sorted(options.items())))
        return q.flatten(1)

    def is_dcp_mla_decode_phase(self, forward_batch: Any) -> bool:
        return False

    def _no(self, *args: Any) -> bool:
        return False

    _fuse_rope_for_trtllm_mla = _skip_rope_for_dsa_tilelang_fused = _no


@pytest.fixture
def absorbed(on_h200, monkeypatch: pytest.MonkeyPatch) -> Absorbed:
    parallel = SimpleNamespace(dcp_enabled=False)
    for module in (projections, forward_mla):
        monkeypatch.setattr(module, "get_parallel", lambda: parallel)
    monkeypatch.setattr(forward_mla, "FORWARD_ABSORB_CORE_ATTENTION_BACKENDS", [BACKEND_NAME])
    return Absorbed()


def inner_state(count: int, slots: torch.Tensor | None = None, scaling: torch.Tensor | None = None) -> tuple[Any, ...]:
    """What the model passes from `forward_absorb_prepare` to `forward_absorb_core`."""
    rope, nope = torch.randn(count, 3, 64), torch.randn(count, 3, 128).to(torch.bfloat16)
    batch = SimpleNamespace(forward_mode=forward_mode("decode"))
    return rope, None, nope, None, batch, None, torch.arange(count), slots, scaling, None


@pytest.mark.parametrize("next_skip_topk", [None, False, True])
@pytest.mark.parametrize("slots", [None, torch.zeros(1, 4, dtype=torch.int32)])
def test_values_of_few_tokens_are_those_of_sglangs_own_core(
    absorbed: Absorbed, monkeypatch, next_skip_topk: bool | None, slots: torch.Tensor | None
) -> None:
    absorbed.next_skip_topk = next_skip_topk
    called: list[int] = []
    per_head = projection.per_head
    monkeypatch.setattr(projection, "per_head", lambda x, w: called.append(len(x)) or per_head(x, w))
    most = projections.MOST_TOKENS
    states = [inner_state(count, slots) for count in (1, most, most + 1)]
    stock = [absorbed.forward_absorb_core(*state) for state in states]
    asked, absorbed.asked = absorbed.asked, []
    for _ in range(2):
        projections.install(absorbed)
    ours = [absorbed.forward_absorb_core(*state) for state in states]
    assert called == [1, most]
    for mine, theirs in zip(ours, stock, strict=True):
        assert type(mine) is type(theirs)
        (mine, *rest), (theirs, *expected) = ((mine,), (theirs,)) if next_skip_topk is None else (mine, theirs)
        assert_close(mine.float(), theirs.float(), 2e-5)
        assert all(a is b for a, b in zip(rest, expected, strict=True))
    for mine, theirs in zip(absorbed.asked, asked, strict=True):
        assert len(mine) == len(theirs)
        assert all(a is b or (a[0] == b[0] and a[1] is b[1]) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("reason", ["scaled queries", "a sink", "LoRA", "another backend", "a kind of layer", "fp16"])
def test_values_of_another_kind_are_left_to_sglang(absorbed: Absorbed, monkeypatch, reason: str) -> None:
    monkeypatch.setattr(projection, "per_head", lambda *args: pytest.fail("ours"))
    calls: list[Any] = []
    own = Absorbed.forward_absorb_core
    if reason == "a kind of layer":
        monkeypatch.setattr(Absorbed, "forward_absorb_core", lambda self, *state: calls.append(state))
    elif reason == "fp16":
        absorbed.w_vc = absorbed.w_vc.half()
    projections.install(absorbed)
    if reason == "a sink":
        absorbed.learnable_sink_param = torch.zeros(3)
    elif reason == "LoRA":
        monkeypatch.setattr(projections, "is_kv_b_lora_active", lambda attn: True)
    elif reason == "another backend":
        absorbed.current_attention_backend = "fa3"
    if getattr(absorbed.forward_absorb_core, "func", None) is projections._absorb_core:
        original, *rest = absorbed.forward_absorb_core.args
        assert original.__func__ is own
        absorbed.forward_absorb_core = functools.partial(
            projections._absorb_core, lambda *state: calls.append(state), *rest
        )
    elif reason != "a kind of layer":
        assert reason == "fp16"
        return
    absorbed.forward_absorb_core(*inner_state(2, scaling=torch.ones(1) if reason == "scaled queries" else None))
    assert len(calls) == 1
    assert len(calls[0]) == 10


def test_w_uk_of_many_heads_or_of_another_form_is_left_to_torch(on_h200) -> None:
    for weight, most in [
        (torch.zeros(16, 512, 128, dtype=torch.bfloat16).transpose(1, 2), 32),
        (torch.zeros(128, 512, 128, dtype=torch.bfloat16).transpose(1, 2), 0),
        (torch.zeros(16, 128, 512, dtype=torch.bfloat16), 0),
        (torch.zeros(16, 512, 128, dtype=torch.float16).transpose(1, 2), 0),
    ]:
        assert projections.most_tokens_of_heads(weight, torch.bfloat16) == most
        assert projections.takes_heads(torch.zeros(1, *weight.shape[:2], dtype=torch.bfloat16), weight) == (most > 0)
        assert not projections.takes_heads(torch.zeros(33, *weight.shape[:2], dtype=torch.bfloat16), weight)


def test_the_report_has_the_products_that_run(on_h200) -> None:
    attn = attention(lambda: block_fp8())
    merging.merge(attn, "cpu")
    found = shapes._projections(torch.nn.Sequential(attn))
    assert [(p.rows, p.depth, p.fp8, p.norm) for p in found] == [(256, 256, True, False)] * 2 + [
        (512, 256, False, True),
        (130, 256, False, False),
    ]
    model = served.Model(4, projections=found, values=32)
    for requests in (1, 16, 17, 33):
        made = [call for op, call in served.calls(model, served.Step(requests, 64), "sm_90") if op.op == "projection"]
        assert len(made) == sum(p.most_tokens >= requests for p in found) + (requests <= 32)


def test_a_device_that_was_not_measured_keeps_its_own() -> None:
    attn = attention(lambda: linear(192, 256))
    projections.install(attn)
    x = tokens(2)
    assert torch.equal(attn.o_proj(x)[0], torch.nn.functional.linear(x, attn.o_proj.weight))
    assert shapes._projections(torch.nn.Sequential(attn)) == ()
