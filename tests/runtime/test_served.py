"""The calls that serving makes: they are reported as they run, and their kernels are compiled before."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from nsa_backend_plugin.ops import dispatch
from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops._triton import launch
from nsa_backend_plugin.ops.arch import device_arch, is_cuda
from nsa_backend_plugin.ops.call import Call
from nsa_backend_plugin.ops.topk import cuda as topk_cuda
from nsa_backend_plugin.runtime import prepare, served

STEPS = (
    *served.TYPICAL,
    served.Step(3, 1000, 2),
    served.Step(128, 4096),
    served.Step(1, 300, 300, prefill=True),
)
#: RoPE of interleaved pairs, which SGLang's CUDA path projects by one bf16 layer and does not rotate.
GLM = served.Indexer(
    32, is_neox=False, hadamard=False, scale_format="fp32", key_dtype=torch.bfloat16, gate_dtype=torch.bfloat16
)
MODELS = {
    "V3.2 packed": served.Model(16, served.Indexer(64), kv="packed", quantized_q_lora=1536),
    "V3.2 bf16, 128 heads": served.Model(128, served.Indexer(64)),
    "GLM": served.Model(8, GLM, kv="packed"),
    "V3": served.Model(128),
    "V3, pages of one token": served.Model(16, page_size=1),
    "V3, fp8 rows": served.Model(16, kv="fp8"),
    "V3, fp8 rows, 128 heads": served.Model(128, kv="fp8"),
    "V3, a cache over two GPUs": served.Model(64, group=2),
    "V3.2 packed, a cache over two GPUs": served.Model(16, served.Indexer(64), kv="packed", group=2),
}


@pytest.mark.parametrize("arch", ["cpu", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
@pytest.mark.parametrize("name", MODELS)
def test_every_served_call_has_an_implementation(arch: str, name: str) -> None:
    model = MODELS[name]
    if not is_cuda(arch) or arch == "sm_80":  # without e4m3 conversion, or with a cache of another kind
        model = replace(model, kv="bf16", layout="preshuffled" if arch.startswith("gfx") else "row_major")
    explained = [e for _, e in served.explanations(model, STEPS, arch)]
    assert {e.operation for e in explained} >= {"sparse_mla.attend" if model.indexer else "dense_mla.decode"}
    for e in explained:
        assert e.chosen is not None, str(e)
        assert all(v.reason != "" for v in e.verdicts)
    slow = {e.operation.split(".")[0] for e in explained if e.chosen == "torch" and arch != "cpu"}
    assert slow <= ({"mqa_logits", "indexer_prep", "norm_quant"} if arch == "sm_80" else set()), "sm_80 has no e4m3"


def test_a_report_names_each_function_once_unless_steps_differ() -> None:
    lines = served.report(MODELS["V3.2 packed"], served.TYPICAL, "sm_90")
    names = [line.split(":")[0] for line in lines]
    assert len(names) == len(set(names))
    many = served.report(
        served.Model(128, served.Indexer(64), kv="packed", quantized_q_lora=1536), served.TYPICAL, "sm_90"
    )
    assert {line.split(":")[0] for line in many} == set(names)


def test_a_prefill_names_what_the_plugin_serves_of_it() -> None:
    """As `engine.gpu` and `engine.indexer` do: latent rows are SGLang's there, and on CUDA the indexer's logits too."""
    prefill = served.Step(1, 8192, 4096, prefill=True)

    def names(arch: str, **kind: str) -> set[str]:
        model = replace(MODELS["V3.2 bf16, 128 heads"], **kind)
        return {e.operation for _, e in served.explanations(model, [prefill], arch)}

    indexer = {"indexer_prep.key_store", "indexer_prep.query", "index_key_cache.gather", "mqa_logits.ragged"}
    assert names("sm_90", kv="packed") == {"topk.select", "sparse_mla.attend"}
    assert names("gfx942", layout="preshuffled") == {*indexer, "topk.select", "sparse_mla.attend"}
    assert names("cpu") == {*indexer, "topk.select", "latent_cache.store", "sparse_mla.attend"}


def test_a_prefill_over_packed_rows_says_which_slots_it_may_select() -> None:
    """Without them the report would say that the kernel which unpacks a context once declines every prefill."""
    model = MODELS["V3.2 packed"]
    for step in (served.Step(1, 8192), served.Step(2, 8100, 4096, prefill=True)):
        (call,) = (c for o, c in served.calls(model, step, "sm_90") if o.name == "sparse_mla.attend")
        assert call.rows_have_keys
        assert call.lengths.shape == call.q.shape[:1]
        assert (call.context is not None) == step.prefill
        assert call.context is None or call.context.shape == (2 * 8128,)


def test_over_a_part_of_each_context_attention_is_what_the_plugin_serves() -> None:
    """With every GPU's heads, rows that may have no keys, and an lse; the keys of a dense prefill are the GPU's own."""
    packed, dense = MODELS["V3.2 packed, a cache over two GPUs"], MODELS["V3, a cache over two GPUs"]
    for model, heads in ((packed, 32), (dense, 128)):
        ((operation, call),) = served.calls(model, served.Step(4, 8192), "sm_90")
        assert operation.name == ("sparse_mla.attend" if model.indexer else "dense_mla.decode")
        assert (call.q.shape[1], call.return_lse, call.rows_have_keys) == (heads, True, False)
    ((operation, call),) = served.calls(dense, served.Step(1, 300, 300, prefill=True), "sm_90")
    assert (operation.name, call.k_nope.shape[1]) == ("concat.mla_k", 64)


def real(call: Call, device: torch.device) -> Call:
    """The call with memory behind it, all zeros, and the strides it had."""
    tensors = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).zero_()
        for name, t in call.tensors()
    }
    return replace(call, **tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_what_is_reported_runs_and_was_compiled_before(name: str, caplog, monkeypatch) -> None:
    import triton

    device = torch.device("cuda", 0)
    arch = device_arch(device)
    made = [pair for step in STEPS for pair in served.calls(MODELS[name], step, arch)]
    prepare.compile_kernels(made)
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **hook: compiled.append(hook["repr"]) and None
    )
    for operation, call in made:
        dispatch.forget_plans()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            operation.run(real(call, device))
        ran = [r.getMessage() for r in caplog.records if " runs " in r.getMessage()]
        assert len(ran) == 1
        assert f"{operation.name}: {operation.explain(call).chosen} runs" in ran[0]
    torch.cuda.synchronize()
    assert compiled == []


def test_preparing_compiles_and_launches_nothing(monkeypatch) -> None:
    """Of our kernels, those that the calls would launch; of other libraries none."""
    warmed: list[str] = []

    class Kernel:
        def __init__(self, name: str):
            self.name = name

        def warmup(self, *args, grid, **options) -> None:
            assert args[0].is_meta
            warmed.append(self.name)

    def recording(kernel, grid, *args, **options) -> None:
        launch.launch(Kernel(kernel.__name__), grid, *args, **options)

    for op in ("topk", "mqa_logits", "indexer_prep", "index_key_cache", "latent_cache", "norm_quant", "concat"):
        monkeypatch.setattr(f"nsa_backend_plugin.ops.{op}.triton.launch", recording)
    monkeypatch.setattr("nsa_backend_plugin.ops._triton.mla_launch.launch", recording)
    topk_cuda._kernels.cache_clear()
    monkeypatch.setattr(jit, "load", lambda source, name, *rest: warmed.append(name) or jit.Kernel(name, None))
    for operation, call in served.calls(
        served.Model(16, served.Indexer(64), quantized_q_lora=1536), served.Step(8, 8192), "sm_90"
    ):
        operation.prepare(call)
    topk_cuda._kernels.cache_clear()
    assert {"topk", "_rms_kernel", "_key_kernel", "_query_kernel", "attend_kernel", "_store_kernel"} <= set(warmed)
