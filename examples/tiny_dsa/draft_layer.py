"""Add a next-token (MTP) layer to an exported tiny-dsa-2k, so that it can be served with speculative decoding.

    python examples/tiny_dsa/draft_layer.py --folder examples/models/tiny-dsa-2k --out runs/2k-mtp

The layer learns, in a few minutes on a CPU, to guess the model's own greedy choice two tokens ahead. Guesses need not
be good: wrong ones are refused, right ones exercise what reads several tokens at once. The model computes what it did,
but its hidden states are padded with zeros to `--hidden`, because SGLang's kernel at the entrance of such a layer takes
multiples of 256 from 512 on. Needs torch and `safetensors`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from config import RECIPES, Mode, ModelConfig
from data import Mix, example
from model import Block, RMSNorm, TinyDSA, rope_table
from safetensors.torch import load_file, save_file
from tokenizer import Encoder
from torch import Tensor, nn

EXPERTS, EXPERT_WIDTH = 8, 128  # of `export.model_config_json`: SGLang runs the layer as a mixture of experts


class DraftLayer(nn.Module):
    """Hidden state [B, T, hidden] of the token before each, and the token's embedding, to a next hidden state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embedding: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], -1))
        return self.norm(self.block(x, cos, sin, Mode.DENSE)[0])


@torch.no_grad()
def hidden_states(model: TinyDSA, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, hidden] after the last norm, where SGLang takes them."""
    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        x, _ = layer(x, cos, sin, Mode.DENSE)
    return model.model.norm(x)


def train(model: TinyDSA, steps: int, batch: int, length: int, seed: int) -> DraftLayer:
    torch.manual_seed(seed)
    rng, encode = random.Random(seed), Encoder()
    layer = DraftLayer(model.config)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    cos, sin = rope_table(length, model.config.qk_rope_head_dim, model.config.rope_theta, torch.device("cpu"))
    for step in range(steps):
        ids = torch.tensor([example(rng, False, Mix(memo=0.7), length, encode).ids for _ in range(batch)])
        hidden = hidden_states(model, ids, cos, sin)
        with torch.no_grad():
            choice = model.lm_head(hidden).argmax(-1)  # [B, T]: the model's next token
        # Position t holds token t + 1 and the hidden state of token t; it guesses what the model chooses after t + 1.
        drafted = layer(model.model.embed_tokens(ids[:, 1:]).detach(), hidden[:, :-1], cos[:-1], sin[:-1])
        logits = F.linear(drafted, model.lm_head.weight.detach())
        loss = F.cross_entropy(logits.flatten(0, 1), choice[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == choice[:, 1:]).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, {right:.0%} of the guesses right", flush=True)
    return layer


def named_weights(layer: DraftLayer, model: TinyDSA) -> dict[str, Tensor]:
    """Names of a DeepSeek checkpoint. The dense MLP becomes the shared expert; the routed ones add nothing."""
    prefix = f"model.layers.{model.config.num_layers}."
    weights = {
        "embed_tokens.weight": model.model.embed_tokens.weight,
        "shared_head.head.weight": model.lm_head.weight,
        "shared_head.norm.weight": layer.norm.weight,
        "enorm.weight": layer.enorm.weight,
        "hnorm.weight": layer.hnorm.weight,
        "eh_proj.weight": layer.eh_proj.weight,
        "mlp.gate.weight": torch.zeros(EXPERTS, model.config.hidden_size),
    }
    for name, weight in layer.block.state_dict().items():
        weights[name.replace("mlp.", "mlp.shared_experts.")] = weight
    for expert in range(EXPERTS):
        for name, weight in layer.block.mlp.state_dict().items():
            weights[f"mlp.experts.{expert}.{name}"] = torch.zeros_like(weight)
    named = {prefix + name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    named[prefix + "mlp.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
    return named


def widened(name: str, weight: Tensor, narrow: int, wide: int) -> Tensor:
    """A weight of the same function on hidden states that are padded with zeros from `narrow` to `wide`.

    The mean square of a padded state is smaller by narrow / wide, which the weights of its norms undo.
    """
    module = name.split(".")[-2]
    more = wide - narrow
    if module in ("input_layernorm", "post_attention_layernorm", "norm", "enorm", "hnorm"):
        return F.pad((weight.float() * (narrow / wide) ** 0.5).to(weight.dtype), (0, more))
    if module in ("o_proj", "down_proj"):
        return F.pad(weight, (0, 0, 0, more))
    if module == "eh_proj":
        halves = weight.unflatten(1, (2, narrow))
        return F.pad(halves, (0, more, 0, 0, 0, more)).flatten(1)
    reads_hidden = ("q_a_proj", "kv_a_proj_with_mqa", "wk", "weights_proj", "gate_proj", "up_proj", "gate")
    if module in (*reads_hidden, "embed_tokens", "lm_head", "head") and weight.dim() == 2:
        return F.pad(weight, (0, more))
    return weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the result")
    arguments = parser.parse_args()
    config = RECIPES["tiny-dsa-2k"].model
    assert config.intermediate_size == EXPERT_WIDTH
    model = TinyDSA(config)
    weights = load_file(arguments.folder / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    layer = train(model.eval(), arguments.steps, arguments.batch, arguments.length, arguments.seed)
    weights |= named_weights(layer, model)
    weights = {name: widened(name, w, config.hidden_size, arguments.hidden) for name, w in weights.items()}
    shutil.copytree(arguments.folder, arguments.out)
    save_file(
        {name: w.contiguous() for name, w in weights.items()}, arguments.out / "model.safetensors", {"format": "pt"}
    )
    path = arguments.out / "config.json"
    changes = {"num_nextn_predict_layers": 1, "hidden_size": arguments.hidden}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1) + "\n")


if __name__ == "__main__":
    main()
