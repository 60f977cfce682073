"""An SGLang with every patch applied: no hook of ours is left in it. What it serves is in test_parity.py.

The patched SGLang is a tree of links to the installed one with real copies of the files that the patches change.
"""

from __future__ import annotations

import json

import pytest
import torch

from nsa_backend_plugin.engine import hooks
from tests.engine.conftest import HERE, ROOT, run_python
from tests.engine.test_fused_decode import Case, case  # noqa: F401
from tests.sglang_copies import RELEASES, patched_overlay

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """(release, the environment in which `import sglang` finds it patched)."""
    folder = tmp_path_factory.mktemp("patched")
    return patched_overlay(folder), {"PYTHONPATH": str(folder)}


def test_every_hook_that_has_a_patch_stands_down(patched) -> None:
    release, env = patched
    model = ROOT / "examples" / "models" / "tiny-dsa"
    output = run_python(HERE / "patched_probe.py", model, env={**env, "NSA_PLUGIN_CPU": "1"})
    report = json.loads(output.splitlines()[-1])
    assert report["ours"] == []
    assert set(report["down"]) == set(RELEASES[release].index)
    assert report["resolution"] == 1
    echoed = {
        "vocabulary": ["_validate_one_request", ["manager", "request", [1]], {}],
        "rocm_indexer": ["forward_cuda", ["indexer", 1], {"layer_id": 2}],
        "draft_backends": ["_create_backend", ["factory", "name", 1], {}],
        "prefill_key": ["_concat_and_cast_mha_k", ["attn", "nope", "pe"], {"forward_batch": 3}],
        "merged_weights": ["load_model_with_memory_saver", [], {"device": "cpu"}],
        "weight_updates": ["_observe_weight_load", ["manager", "disk"], {}],
    }
    assert report["points"] == {
        "rocm_pages": {"gained": 1, "stock": "False", "wrapped": True},
        **{name: {"gained": 1, "stock": None, "wrapped": call} for name, call in echoed.items()},
    }
    assert report["prepared"] == {"taken": ["attn", 1, 2, 3, 4, None, 5], "declined_then_stock": True}
    with_own_method = "fused_decode_rocm" in RELEASES[release].index
    assert report["rocm"] == (["attn", 1, 2, 3, 4, None, 5] if with_own_method else None)
    assert "--page-size 32" in report["refused"]
    assert "page size 64" in report["refused"]
    assert report["pool"] == ("MLATokenToKVPool" if "mla_pool" in RELEASES[release].index else None)


def test_the_patch_of_the_decode_path_calls_what_the_hook_calls(case: Case) -> None:  # noqa: F811
    latent, pages = case.latent.clone(), case.index_pages.clone()
    hooked = case.prepare()
    written = case.latent.clone(), case.index_pages.clone()
    case.latent.copy_(latent)
    case.index_pages.copy_(pages)
    before = hooks.FIRED["fused_decode"]
    patched = case.backend.prepare_absorbed(case.attn, case.positions, case.hidden, case.batch, None, None, None)
    assert hooks.FIRED["fused_decode"] == before + 1
    for ours, theirs in zip(patched, hooked, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours is theirs
    assert torch.equal(case.latent.view(torch.uint8), written[0].view(torch.uint8))
    assert torch.equal(case.index_pages, written[1])
    declined = case.backend.prepare_absorbed(
        case.attn, case.positions, case.hidden, case.batch, None, torch.ones(1), None
    )
    assert declined is None
