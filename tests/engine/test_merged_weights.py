"""Which projections are merged, what the merged ones compute, and that they live and change as their sources do.

The layers are SGLang's own; where a kernel needs a GPU, the layer's call is replaced, not its class.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_backend_plugin.ops import norm_quant

pytest.importorskip("sglang", reason="needs SGLang")
indexer_path = pytest.importorskip("nsa_backend_plugin.engine.indexer")
linear_rule = pytest.importorskip("nsa_backend_plugin.engine.linear")
merging = pytest.importorskip("nsa_backend_plugin.engine.merging")
query_projection = pytest.importorskip("nsa_backend_plugin.engine.gpu.query_projection")
from nsa_backend_plugin.runtime import merged_weights  # noqa: E402
from tests.engine.test_fused_decode import Norm, linear  # noqa: E402

HEADS, INDEX_HEADS = 4, 2


def block_fp8(rows: int = 256, activation: str = "fp32") -> Any:
    """A layer that SGLang runs as block-fp8 DeepGEMM, told by its function's name; bound as in later releases."""
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

    def deepgemm_w8a8_block_fp8_linear_with_fallback(
        input: torch.Tensor,
        weight: torch.Tensor,
        block_size: list[int],
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor,
        act_scale_ue8m0: bool = False,
    ) -> torch.Tensor:
        assert not act_scale_ue8m0 or (input_scale.log2() % 1 == 0).all()
        assert block_size == [128, 128]
        x = input.float() * input_scale.repeat_interleave(128, 1)
        return x @ dequantized(weight, weight_scale).t()

    run: Any = deepgemm_w8a8_block_fp8_linear_with_fallback
    if activation == "ue8m0":
        run = functools.partial(run, act_scale_ue8m0=True)
    layer = linear(rows, 256)
    method = layer.quant_method = object.__new__(Fp8LinearMethod)
    method.weight_block_size, method.w8a8_block_fp8_linear = [128, 128], run
    method.apply = lambda layer, x, bias=None: x.float() @ dequantized(layer.weight, layer.weight_scale_inv).t()
    layer.weight = torch.nn.Parameter(torch.randn(rows, 256).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(torch.rand(-(-rows // 128), 2) + 0.5, requires_grad=False)
    layer.orig_dtype = torch.bfloat16
    return layer


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.float() * blocks[: weight.shape[0]]


def quantized(config: Callable[[], Any], rows: int = 256) -> Any:
    """SGLang's layer of a quantization, its kernel replaced."""
    from sglang.srt.layers.linear import ReplicatedLinear

    layer = ReplicatedLinear(256, rows, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="wk")
    weight = torch.randn(rows, 256)
    layer.quant_method.apply = lambda layer, x, bias=None: x.float() @ weight.t()
    return layer


class ForeignTensor(torch.Tensor):
    """A weight of a class of its own, as torchao's are."""


def with_foreign_weight(rows: int = 256) -> Any:
    layer = linear(rows, 256)
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(ForeignTensor), requires_grad=False)
    return layer


def with_other_scales(change: Callable[[torch.Tensor], torch.Tensor], rows: int = 256) -> Any:
    layer = block_fp8(rows)
    layer.weight_scale_inv = torch.nn.Parameter(change(layer.weight_scale_inv.data), requires_grad=False)
    layer.weight_scale_inv.format_ue8m0 = True
    layer.quant_method.apply = lambda layer, x, bias=None: x.float() @ layer.weight.float().t()
    return layer


def with_bias(rows: int = 256) -> Any:
    layer = linear(rows, 256)
    layer.bias = torch.nn.Parameter(torch.randn(rows).to(torch.bfloat16), requires_grad=False)
    return layer


def lora(layer: Any) -> Any:
    """SGLang's wrapper with an adapter in force; the backend's kernels replaced."""
    from sglang.srt.lora.layers import ReplicatedLinearWithLoRA

    def with_base(wrapper: Any, x: torch.Tensor, base: Callable[[], torch.Tensor], a: Any, b: Any, *_: Any) -> Any:
        return base() + x @ a[0].t() @ b[0].t()

    batch = SimpleNamespace(has_active_lora=True)
    backend = SimpleNamespace(
        batch_info=batch,
        get_batch_info=lambda: batch,
        skip_inactive_lora_batches=False,
        skip_inactive_dense_lora=False,
        run_lora_a_sgemm=lambda x, a: x @ a[0].t(),
        run_lora_b_sgemm=lambda x, weights, output_offset, base_output: base_output + x @ weights[0].t(),
        forward_with_base=with_base,
    )
    wrapper = ReplicatedLinearWithLoRA(layer, backend)
    a, b = torch.randn(1, 8, layer.input_size), torch.randn(1, layer.output_size, 8)
    wrapper.set_lora_info(a.to(torch.bfloat16), b.to(torch.bfloat16))
    assert wrapper.lora_active
    return wrapper


def packed_integers(method: str, rows: int = 256) -> Any:
    """What AWQ and GPTQ leave: no `weight`. Their layers cannot be made without a GPU in every release."""
    module, name = f"sglang.srt.layers.quantization.{method}.{method}", f"{method.upper()}LinearMethod"
    layer = linear(rows, 256)
    layer.quant_method = object.__new__(getattr(importlib.import_module(module), name))
    layer.qweight = torch.nn.Parameter(torch.zeros(32, rows, dtype=torch.int32), requires_grad=False)
    own = layer.weight.data
    del layer.weight
    layer.quant_method.apply = lambda layer, x, bias=None: x @ own.t()
    return layer


def fp8(**options: Any) -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return Fp8Config(**options)


def w8a8_fp8() -> Any:
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config

    return W8A8Fp8Config(True)


def w8a8_int8() -> Any:
    from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config

    return W8A8Int8Config({})


APART: dict[str, Callable[[int], Any]] = {
    "fp8 per tensor": functools.partial(
        quantized, lambda: fp8(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic")
    ),
    "fp8 quantized when loaded": functools.partial(quantized, fp8),
    "w8a8_fp8": functools.partial(quantized, w8a8_fp8),
    "w8a8_int8": functools.partial(quantized, w8a8_int8),
    "AWQ": functools.partial(packed_integers, "awq"),
    "GPTQ": functools.partial(packed_integers, "gptq"),
    "packed scales": functools.partial(with_other_scales, lambda scale: scale.new_zeros(256, 1, dtype=torch.int32)),
    "integer scales": functools.partial(with_other_scales, lambda scale: scale.int()),
    "ue8m0 scales": functools.partial(with_other_scales, lambda scale: scale),
    "torchao": with_foreign_weight,
    "bias": with_bias,
    "LoRA": lambda rows: lora(linear(rows, 256)),
    "LoRA on fp8 blocks": lambda rows: lora(block_fp8(rows)),
}


class Indexer(torch.nn.Module):
    use_dsa_indexer_fusion, n_heads, head_dim, index_topk, scale_fmt = False, INDEX_HEADS, 128, 64, "ue8m0"
    rotary_emb, k_norm = SimpleNamespace(is_neox_style=True), SimpleNamespace(bias=None)

    def __init__(self, wk: Any, weights_proj: Any = None, wq_b: Any = None):
        super().__init__()
        self.wk, self.weights_proj = wk, weights_proj or linear(INDEX_HEADS, 256)
        self.wq_b = wq_b or linear(INDEX_HEADS * 128, 256)


class Attention(torch.nn.Module):
    num_local_heads, qk_head_dim, q_lora_rank, w_kc = HEADS, 64, 256, None

    def __init__(self, q_b_proj: Any = None, wq_b: Any = None, wk: Any = None, weights_proj: Any = None):
        super().__init__()
        self.q_b_proj, self.q_a_layernorm = q_b_proj or linear(256, 256), Norm(256)
        self.indexer = Indexer(wk or linear(128, 256), weights_proj, wq_b)

    def q_b_proj_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_b_proj(x)[0].view(-1, HEADS, 64)


def inputs(tokens: int = 5) -> torch.Tensor:
    return torch.randn(tokens, 300).to(torch.bfloat16)[:, :256]  # a slice, as it comes


def written(parameter: torch.nn.Parameter) -> None:
    """An update as SGLang's loaders make it."""
    parameter.data.copy_(torch.rand(parameter.shape) + 0.5)


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("which", ["wk", "weights_proj"])
def test_what_is_not_plain_serves_itself_in_the_indexer(kind: str, which: str) -> None:
    layer = APART[kind](128 if which == "wk" else 256)
    indexer = Indexer(**{"wk": linear(128, 256), which: layer})
    indexer_path.merge_projection(indexer)
    assert indexer_path.obstacle(indexer).startswith(f"indexer.{which} serves itself")
    x = inputs()
    key, gate = indexer_path.project(indexer, x)
    own = {"wk": key, "weights_proj": gate}[which]
    assert torch.equal(own, layer(x)[0].to(own.dtype))
    if which == "wk":
        torch.testing.assert_close(gate, x.float() @ indexer.weights_proj.weight.float().t())
    assert not any(isinstance(module, merged_weights.MergedWeights) for module in indexer.modules())


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("which", ["q_b_proj", "wq_b"])
def test_what_is_not_plain_serves_itself_in_the_query(kind: str, which: str) -> None:
    attn = Attention(**{which: APART[kind](256)})
    query_projection.merge(attn)
    assert query_projection.obstacle(attn).startswith(("q_b_proj serves itself", "indexer.wq_b serves itself"))
    assert query_projection.merged(attn) is None
    q_lora = inputs()
    normalized = attn.q_a_layernorm(q_lora)
    index_query, project_q = query_projection.project(attn, q_lora)
    assert torch.equal(project_q(), attn.q_b_proj(normalized)[0].view(5, 4, 64))
    assert torch.equal(index_query, attn.indexer.wq_b(normalized)[0].view(5, 2, 128))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("which", ["wk", "weights_proj", "q_b_proj", "wq_b"])
def test_lora_is_not_bypassed(which: str, when: str) -> None:
    """SGLang wraps layers when weights are loaded, and so merged, but before the backend is created."""
    attn = Attention()
    owner = attn if which == "q_b_proj" else attn.indexer
    if when == "after":
        merging.merge(attn, "cpu")
        assert query_projection.merged(attn) is not None
    setattr(owner, which, lora(getattr(owner, which)))
    merging.merge(attn, "cpu")
    merging.settle(attn, "cpu")
    x = inputs()
    key, gate = indexer_path.project(attn.indexer, x)
    normalized = attn.q_a_layernorm(x)
    index_query, project_q = query_projection.project(attn, x)
    exact = {"rtol": 0, "atol": 0} if which in ("wk", "weights_proj") else {}
    torch.testing.assert_close(key, attn.indexer.wk(x)[0].to(key.dtype), **(exact or {"rtol": 1e-2, "atol": 1e-2}))
    if which == "weights_proj":
        assert torch.equal(gate, attn.indexer.weights_proj(x)[0].float())
    if which in ("q_b_proj", "wq_b"):
        assert torch.equal(project_q(), attn.q_b_proj(normalized)[0].view(5, 4, 64))
        assert torch.equal(index_query, attn.indexer.wq_b(normalized)[0].view(5, 2, 128))


def test_weights_that_were_replaced_after_merging_are_forgotten() -> None:
    """torchao quantizes a model after it was loaded."""
    attn = Attention()
    merging.merge(attn, "cpu")
    for layer in (attn.indexer.wk, attn.indexer.wq_b):
        layer.weight = torch.nn.Parameter(torch.randn(layer.weight.shape).to(torch.bfloat16), requires_grad=False)
    x = inputs()
    for settled in (False, True):
        if settled:
            merging.settle(attn, "cpu")
            assert not any(isinstance(module, merged_weights.MergedWeights) for module in attn.modules())
        assert torch.equal(indexer_path.project(attn.indexer, x)[0], attn.indexer.wk(x)[0])
        index_query, _ = query_projection.project(attn, x)
        assert torch.equal(index_query, attn.indexer.wq_b(attn.q_a_layernorm(x))[0].view(5, 2, 128))


def test_query_projections_stay_apart_where_one_gemm_cannot_take_both() -> None:
    half, other_kernel = block_fp8(), block_fp8()
    half.orig_dtype = torch.float16
    other_kernel.quant_method.w8a8_block_fp8_linear = print
    for other in (half, other_kernel, linear(256, 256), block_fp8(192)):
        for layers in ((other, block_fp8()), (block_fp8(), other)):
            attn = Attention(*layers)
            query_projection.merge(attn)
            assert query_projection.merged(attn) is None
            assert "need one kind of GEMM" in query_projection.obstacle(attn)


@pytest.mark.parametrize("kind", ["bf16", "fp32", "ue8m0"])
def test_query_projections_merge_and_follow_an_update(kind: str) -> None:
    """kind: bf16 weights, or fp8 ones with this format of the activation's scales."""
    layers = [linear(256, 256) if kind == "bf16" else block_fp8(activation=kind) for _ in range(2)]
    attn = Attention(*layers)
    q_lora, norm = inputs(), attn.q_a_layernorm

    def expected(layer: Any) -> torch.Tensor:
        if kind == "bf16":
            return layer(norm(q_lora))[0]
        values, scales = norm_quant.rms(q_lora, norm.weight, eps=norm.variance_epsilon, scale_format=kind, impl="torch")
        x = values.float() * scales.repeat_interleave(128, 1)
        return x @ dequantized(layer.weight, layer.weight_scale_inv).t()

    for update in (False, True):
        if update:
            for parameter in (p for layer in layers for p in layer.parameters()):
                written(parameter)
        before = [layer.weight.float() for layer in layers]
        query_projection.merge(attn)  # again by another backend of the same model: graphs keep the first matrix
        assert all(torch.equal(layer.weight.float(), weight) for layer, weight in zip(layers, before, strict=True))
        assert query_projection.merged(attn) is not None
        assert query_projection.quantizes(attn) == (kind != "bf16")
        index_query, project_q = query_projection.project(attn, q_lora)
        torch.testing.assert_close(project_q(), expected(layers[0]).view(5, 4, 64))
        torch.testing.assert_close(index_query, expected(layers[1]).view(5, 2, 128))


@pytest.mark.parametrize("make", [lambda: linear(128, 256), lambda: block_fp8(128)], ids=["bf16", "fp8 blocks"])
def test_indexer_projections_merge_and_follow_an_update(make: Callable[[], Any]) -> None:
    indexer = Indexer(make())
    before = indexer.wk.weight.float(), indexer.weights_proj.weight.float()
    indexer_path.merge_projection(indexer)
    assert torch.equal(indexer.wk.weight.float(), before[0])
    assert torch.equal(indexer.weights_proj.weight.float(), before[1])
    x = inputs()

    def check() -> None:
        key, gate = indexer_path.project(indexer, x)
        wk = linear_rule.bf16_weight(indexer.wk).float()
        if hasattr(indexer.wk, "weight_scale_inv"):
            blocks = dequantized(indexer.wk.weight, indexer.wk.weight_scale_inv)
            assert torch.equal(wk, blocks.to(torch.bfloat16).float())
        torch.testing.assert_close(key, x.float() @ wk.t())
        torch.testing.assert_close(key, indexer.wk(x)[0].float(), rtol=2e-2, atol=2e-1)
        torch.testing.assert_close(gate, x.float() @ indexer.weights_proj.weight.float().t())

    check()
    for parameter in (*indexer.wk.parameters(), indexer.weights_proj.weight):
        written(parameter)
    merged_weights.rebuild_all(indexer)
    check()


class Manager:
    """SGLang's own, without the parts that an update of weights does not use."""

    def __new__(cls) -> Any:
        from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

        manager = object.__new__(SchedulerWeightUpdaterManager)
        manager.metrics_collector = None
        return manager


def test_sglang_updates_weights_inside_what_is_hooked() -> None:
    manager = type(Manager())
    updates = {name: f for name, f in vars(manager).items() if name.startswith("update_weights_from_")}
    assert {"disk", "distributed", "tensor", "ipc"} <= {name.removeprefix("update_weights_from_") for name in updates}
    for name, update in updates.items():
        assert "with self._observe_weight_load(" in inspect.getsource(update), name


@pytest.mark.parametrize("inference", [False, True])
def test_an_update_of_fp8_weights_rebuilds_their_copies(inference: bool) -> None:
    """Several layers of a model, in place: captured graphs keep the addresses."""
    model = torch.nn.ModuleList([Attention(block_fp8(), block_fp8(), block_fp8(128)) for _ in range(2)])
    merging.merge(model, "cpu")
    merged = [m for m in model.modules() if isinstance(m, merged_weights.MergedWeights)]
    assert len(merged) == 4
    addresses = [p.data_ptr() for m in merged for p in m.parameters()]
    observe = type(Manager())._observe_weight_load
    with torch.inference_mode(inference), merging.updating(observe, Manager(), "disk"):
        for attn in model:
            for layer in (attn.q_b_proj, attn.indexer.wq_b, attn.indexer.wk, attn.indexer.weights_proj):
                for parameter in layer.parameters():
                    written(parameter)
            attn.indexer.wk.weight.data = attn.indexer.wk.weight.data.clone()  # as quantization methods put new ones
            attn.q_b_proj.weight.data = attn.q_b_proj.weight.data.clone()
            written(attn.q_b_proj.weight)
    assert [p.data_ptr() for m in merged for p in m.parameters()] == addresses
    x = inputs()
    for attn in model:
        wk = dequantized(attn.indexer.wk.weight, attn.indexer.wk.weight_scale_inv).to(torch.bfloat16)
        torch.testing.assert_close(indexer_path.project(attn.indexer, x)[0], x.float() @ wk.float().t())
        both = query_projection.merged(attn)
        assert torch.equal(both.weight.float()[:256], attn.q_b_proj.weight.float())
        assert torch.equal(both.weight.float()[256:], attn.indexer.wq_b.weight.float())
        assert torch.equal(both.scale[:2], attn.q_b_proj.weight_scale_inv)
        written(attn.q_b_proj.weight)  # a view again
        assert torch.equal(both.weight.float()[:256], attn.q_b_proj.weight.float())


def test_an_update_to_another_quantization_is_an_error() -> None:
    attn = Attention(wk=block_fp8(128))
    merging.merge(attn, "cpu")
    packed = torch.zeros(128, 1, dtype=torch.int32)
    with (
        pytest.raises(RuntimeError, match=r"cannot rebuild a merged weight.*float8_e4m3fn, of Fp8LinearMethod"),
        merging.updating(lambda *_: contextlib.nullcontext()),
    ):
        attn.indexer.wk.weight_scale_inv = torch.nn.Parameter(packed, requires_grad=False)


def test_merged_weights_are_parameters_that_checkpoints_do_not_have() -> None:
    """Buffers would be cloned by SGLang's sleep mode, which keeps their memory; parameters move and are freed."""
    attn = Attention(wk=block_fp8(128))
    before = set(attn.state_dict()), set(dict(attn.named_buffers()))
    names = set(dict(attn.named_parameters()))
    merging.merge(attn, "cpu")
    assert (set(attn.state_dict()), set(dict(attn.named_buffers()))) == before
    ours = set(dict(attn.named_parameters())) - names
    assert ours == {"nsa_plugin_q_b_wq_b.weight", "indexer.nsa_plugin_wk_weights_proj.weight"}
    attn.to("meta")
    assert all(dict(attn.named_parameters())[name].device.type == "meta" for name in ours)


def test_weights_that_moved_are_rebuilt_in_place() -> None:
    attn = Attention(block_fp8(), block_fp8(), block_fp8(128))
    merging.merge(attn, "cpu")
    for parameter in attn.parameters():
        parameter.data = parameter.data.clone()  # as a move to another device and back leaves them
    written(attn.q_b_proj.weight)
    merged_weights.rebuild_all(attn)
    assert torch.equal(query_projection.merged(attn).weight.float()[:256], attn.q_b_proj.weight.float())


def test_offloaded_layers_are_not_merged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    attn = Attention()
    merging.merge(attn, "cuda")
    assert not any(isinstance(module, merged_weights.MergedWeights) for module in attn.modules())
    merging._log_once.cache_clear()
    with caplog.at_level("INFO"):
        merging.settle(torch.nn.ModuleList([attn, Attention()]), "cuda")
    assert caplog.text.count("offloaded to the CPU") == 1


def test_what_serves_itself_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    merging._log_once.cache_clear()
    model = torch.nn.ModuleList([Attention(wk=lora(linear(128, 256))) for _ in range(3)])
    with caplog.at_level("INFO"):
        merging.settle(model, "cpu")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.endswith("indexer.wk serves itself: it is a ReplicatedLinearWithLoRA")


@pytest.mark.parametrize("backup, draft, cache", [(False, False, "off"), (True, True, "off"), (True, False, "on")])
def test_weights_are_merged_at_load_in_the_weights_memory(
    monkeypatch: pytest.MonkeyPatch, backup: bool, draft: bool, cache: str
) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS

    regions: list[tuple[str, bool]] = []
    inside: list[bool] = []
    current: list[str] = []

    @contextlib.contextmanager
    def region(tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
        regions.append((tag, enable_cpu_backup))
        current.append(tag)
        yield
        current.pop()

    class Watched(merged_weights.MergedWeights):
        def __init__(self, *args: Any):
            super().__init__(*args)
            inside.append(bool(current))

    arguments = SimpleNamespace(
        attention_backend="nsa_plugin",
        prefill_attention_backend=None,
        decode_attention_backend=None,
        enable_weights_cpu_backup=backup and not draft,
        enable_draft_weights_cpu_backup=backup and draft,
        weight_cache_mode=cache,
    )
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: arguments)
    monkeypatch.setattr(linear_rule, "MergedWeights", Watched)
    model = Attention(wk=block_fp8(128))
    adapter = SimpleNamespace(region=region)

    def load(**options: Any) -> Any:
        assert set(options) == {"device", "memory_saver_adapter", "is_draft_worker", "model_config"}
        return SimpleNamespace(model=model)

    def run() -> Any:
        return merging.load_model(
            load, device="cpu", memory_saver_adapter=adapter, is_draft_worker=draft, model_config=None
        )

    assert run().model is model
    assert inside == [True, True]
    assert regions == [(GPU_MEMORY_TYPE_WEIGHTS, backup and cache == "off")]
    arguments.attention_backend, model = "fa3", Attention()
    assert run().model is model
    assert len(regions) == len(inside) - 1 == 1, "another backend: nothing is done"
