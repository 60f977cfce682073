"""The draft layer of tiny-dsa-2k: padding the hidden states does not change what model and layer compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "tiny_dsa"))
pytest.importorskip("safetensors")
import draft_layer
from config import Mode, ModelConfig
from model import TinyDSA, rope_table

NARROW, WIDE = 16, 64
CONFIG = ModelConfig(
    hidden_size=NARROW,
    num_layers=1,
    num_heads=2,
    q_lora_rank=8,
    intermediate_size=32,
    index_n_heads=2,
    index_topk=4,
    max_position_embeddings=64,
)


def test_padded_model_and_layer_compute_the_same() -> None:
    narrow, wide = TinyDSA(CONFIG), TinyDSA(replace(CONFIG, hidden_size=WIDE))
    state = {n: draft_layer.widened(n, w, NARROW, WIDE) for n, w in narrow.state_dict().items()}
    wide.load_state_dict(state)
    layers = draft_layer.DraftLayer(narrow.config), draft_layer.DraftLayer(wide.config)
    layers[1].load_state_dict(
        {n: draft_layer.widened(f"x.{n}", w, NARROW, WIDE) for n, w in layers[0].state_dict().items()}
    )
    ids = torch.randint(0, CONFIG.vocab_size, (2, 12))
    cos, sin = rope_table(12, CONFIG.qk_rope_head_dim, CONFIG.rope_theta, torch.device("cpu"))
    with torch.no_grad():
        for mode in (Mode.DENSE, Mode.SPARSE):
            torch.testing.assert_close(wide(ids, mode).logits, narrow(ids, mode).logits, atol=1e-3, rtol=1e-3)
        hidden = [draft_layer.hidden_states(model, ids, cos, sin) for model in (narrow, wide)]
        assert not hidden[1][..., NARROW:].any()
        drafted = [
            layer(model.model.embed_tokens(ids), h, cos, sin)
            for layer, model, h in zip(layers, (narrow, wide), hidden, strict=True)
        ]
        torch.testing.assert_close(drafted[1][..., :NARROW], drafted[0], atol=1e-3, rtol=1e-3)
        assert not drafted[1][..., NARROW:].any()


def test_checkpoint_has_the_names_of_a_next_token_layer() -> None:
    model = TinyDSA(replace(CONFIG, intermediate_size=draft_layer.EXPERT_WIDTH))
    named = draft_layer.named_weights(draft_layer.DraftLayer(model.config), model)
    assert all(name.startswith("model.layers.1.") for name in named)
    short = {name.removeprefix("model.layers.1.") for name in named}
    assert {"eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight", "mlp.gate.weight"} <= short
    assert {"self_attn.indexer.wk.weight", "mlp.shared_experts.up_proj.weight", "mlp.experts.7.up_proj.weight"} <= short
    assert not any(name.startswith("block") for name in short)
