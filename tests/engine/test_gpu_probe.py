"""The probe of the GPU tests, on a CPU: its batches, and that its variants reach the code they mean to vary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa_backend_plugin.engine import query
from nsa_backend_plugin.engine.gpu import dual_stream
from nsa_backend_plugin.ops import topk
from nsa_backend_plugin.serving import CPU_ARGS
from tests.engine import gpu_probe
from tests.engine.conftest import ROOT, run_python
from tests.engine.tiny_tasks import MODEL

pytest.importorskip("sglang", reason="needs SGLang")
indexer_path = pytest.importorskip("nsa_backend_plugin.engine.indexer")

HEADS = 2


def test_prompts_get_shorter_and_all_are_used() -> None:
    prompts = gpu_probe.prompts_of(64, 1024, 12288, 512, seed=3)
    lengths = [len(prompt) for prompt in prompts]
    assert lengths == sorted(lengths, reverse=True)
    assert min(lengths) >= 1024
    assert max(lengths) <= 12288
    turns = gpu_probe.turns(64, gpu_probe.BATCHES)
    assert [len(turn) for turn in turns] == list(gpu_probe.BATCHES)
    assert [number for turn in turns for number in turn] == [*range(64), 0, 1]


def test_variants_change_what_they_name_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that selects slots and joins a query, as the fused path and the backend do, through the same modules."""
    probe = object.__new__(gpu_probe.Probe)
    probe.runner = SimpleNamespace(decode_cuda_graph_runner="captured")
    layer = SimpleNamespace(tp_q_head_num=HEADS, head_dim=576, v_head_dim=512)
    whole = torch.randn(3, HEADS, 576)
    monkeypatch.setattr(topk, "select", lambda *_, deterministic=False: deterministic)
    monkeypatch.setattr(dual_stream.torch.version, "hip", None)
    seen = []

    def forward(batch: object) -> torch.Tensor:
        ties_decided = indexer_path.topk.select(batch)
        q_all = query.absorbed(whole[..., :512], whole[..., 512:], layer)
        seen.append(
            (
                ties_decided,
                dual_stream.enabled(3),
                q_all.data_ptr() == whole.data_ptr(),
                probe.runner.decode_cuda_graph_runner,
            )
        )
        return q_all.clone()

    monkeypatch.setattr(probe, "forward", forward, raising=False)
    out = probe.variants(object())
    assert seen == [
        (True, False, True, None),
        (True, False, True, None),
        (True, True, True, None),
        (True, False, False, None),
    ]
    assert out["views"].tolist() == [True, True, True]
    assert all(torch.equal(out[name], whole) for name in ("plain", "again", "dual_stream", "concatenated"))
    assert probe.runner.decode_cuda_graph_runner == "captured"


@pytest.mark.engine
def test_prompts_decode_together_as_each_alone(tmp_path: Path) -> None:
    """The probe itself, with a real model, through the plugin's CPU platform."""
    output = tmp_path / "out.pt"
    args = [f"--output={output}", "--prompts=2", "--shortest=90", "--longest=130", "--batches", "2", "1", "1", "--"]
    args += [f"--model-path={MODEL}", "--dtype=float32", *CPU_ARGS]
    env = {"NSA_PLUGIN_CPU": "1", "NSA_PLUGIN_EXACT": "1", "PYTHONPATH": str(ROOT)}
    run_python(Path(gpu_probe.__file__), *args, env=env)
    together, *alone = torch.load(output)
    assert [batch["idle"] for batch in (together, *alone)] == [None] * 3
    assert [batch["prompts"] for batch in (together, *alone)] == [[0, 1], [0], [1]]
    torch.testing.assert_close(together["prefill"], torch.cat([batch["prefill"] for batch in alone]))
    for step in range(gpu_probe.STEPS):
        single = torch.cat([batch["steps"][step]["logits"] for batch in alone])
        torch.testing.assert_close(together["steps"][step]["logits"], single, rtol=1e-4, atol=1e-4)
