"""What a server is said to run is what its model and its cache are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang")
shapes = pytest.importorskip("nsa_backend_plugin.engine.shapes")
from nsa_backend_plugin.engine import index_cache  # noqa: E402
from nsa_backend_plugin.engine.gpu import query_projection  # noqa: E402
from nsa_backend_plugin.runtime import served  # noqa: E402
from tests.engine.test_fused_decode import linear  # noqa: E402
from tests.engine.test_merged_weights import Attention, block_fp8  # noqa: E402

STEPS = (served.Step(3, 500), served.Step(1, 500, 200, prefill=True))


def runner(monkeypatch: pytest.MonkeyPatch, attn: Attention, q_lora_rank: int | None) -> Any:
    """A ModelRunner of a tiny model: one layer, bf16 cache."""
    rows = torch.zeros(128, 1, 576, dtype=torch.bfloat16)
    pool = SimpleNamespace(page_size=64, start_layer=0, get_key_buffer=lambda layer_id: rows)
    index_cache.declare_layout(pool, "row_major")
    config = SimpleNamespace(index_n_heads=2, index_topk=64, q_lora_rank=q_lora_rank)
    monkeypatch.setattr(shapes, "is_deepseek_dsa", lambda config: True)
    monkeypatch.setattr(shapes, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2, attn_dcp_size=1))
    model_config = SimpleNamespace(hf_config=config, num_attention_heads=8)
    return SimpleNamespace(
        model_config=model_config, token_to_kv_pool=pool, model=torch.nn.Sequential(attn), dtype=torch.bfloat16
    )


@pytest.mark.parametrize("q_lora_rank", [None, 64, 256])
@pytest.mark.parametrize("make", [lambda: linear(256, 256), block_fp8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("merge", [False, True])
def test_q_lora_is_quantized_by_merged_fp8_projections_only(
    monkeypatch: pytest.MonkeyPatch, make: Any, merge: bool, q_lora_rank: int | None
) -> None:
    """Any rank: it need not be one that the quantization takes, where that does not run."""
    attn = Attention(make(), make())
    attn.q_lora_rank = q_lora_rank
    if merge:
        query_projection.merge(attn)
    model = shapes.model(runner(monkeypatch, attn, q_lora_rank))
    quantized = merge and make is block_fp8
    assert model.quantized_q_lora == (q_lora_rank if quantized else 0)
    assert model.heads == 4
    if q_lora_rank == 256 or not quantized:
        names = {explained.operation for _, explained in served.explanations(model, STEPS, "cpu")}
        assert ("norm_quant.rms" in names) == quantized


def test_steps_are_of_the_resolved_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang publishes them: the largest prefill graph is wider than a chunk here, or there are no graphs."""
    published = {
        "get_exec": SimpleNamespace(
            graph=SimpleNamespace(
                cuda_graph_config=SimpleNamespace(
                    decode=SimpleNamespace(bs=[4, 1]), prefill=SimpleNamespace(bs=[128, 512])
                )
            )
        ),
        "get_spec": SimpleNamespace(speculative_num_draft_tokens=3),
        "get_schedule": SimpleNamespace(chunked_prefill_size=256),
    }
    for name, value in published.items():
        monkeypatch.setattr(shapes, name, lambda value=value: value)
    found = shapes.steps(1000)
    assert [(s.requests, s.queries) for s in found if not s.prefill] == [(1, 3), (4, 3)]
    assert [s.queries for s in found if s.prefill] == [128, 256, 512]
    config = published["get_exec"].graph.cuda_graph_config
    config.decode.bs = config.prefill.bs = published["get_spec"].speculative_num_draft_tokens = None
    published["get_schedule"].chunked_prefill_size = -1
    assert shapes.steps(1000) == [served.Step(1, 1000), served.Step(1, 1000, 1, prefill=True)]


def test_sglang_publishes_what_is_asked_for() -> None:
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    bags = runtime_context._build_config_bags(ServerArgs(model_path="dummy", device="cpu"))
    assert hasattr(bags["exec"].graph, "cuda_graph_config")
    assert hasattr(bags["spec"], "speculative_num_draft_tokens")
    assert hasattr(bags["schedule"], "chunked_prefill_size")
