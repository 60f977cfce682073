"""How much adjacent queries of a prompt select in common: what a kernel gains that gathers their rows once.

    python examples/tiny_dsa/overlap.py --model examples/models/tiny-dsa-2k --tokens 6000 --prompts 2

Runs the exported weights in this folder's torch model, on a CPU too, and reads every layer's selections. Only queries
with more earlier tokens than index_topk count: before, neighbours select all there is. Needs `safetensors`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import model as tiny
import torch
from config import RECIPES, Mode
from data import RECALL, test_prompt
from safetensors.torch import load_file
from tokenizer import Encoder
from torch import Tensor

GROUPS = (2, 4, 8)


def selections(network: tiny.TinyDSA, ids: Tensor) -> list[Tensor]:
    """[T - topk, T] bool of every layer: which tokens each of the later queries selects."""
    topk, length = network.config.index_topk, ids.shape[1]
    found: list[Tensor] = []

    def read(indexer: torch.nn.Module, arguments: object, index: tiny.IndexInputs) -> None:
        chosen = torch.zeros(length - topk, length, dtype=torch.bool)
        for row in range(topk, length):
            query, weight = index.query[:, row : row + 1], index.weight[:, row : row + 1]
            scores = tiny.index_scores(query, index.key[:, : row + 1], weight)
            chosen[row - topk, scores[0, 0].topk(topk).indices] = True
        found.append(chosen)

    hooks = [layer.self_attn.indexer.register_forward_hook(read) for layer in network.model.layers]
    with torch.no_grad():
        network(ids, Mode.SPARSE)
    for hook in hooks:
        hook.remove()
    return found


def union_share(chosen: Tensor, group: int) -> float:
    """Mean rows in the union of `group` adjacent queries' selections, in units of one query's."""
    whole = chosen[: len(chosen) // group * group].view(-1, group, chosen.shape[1])
    return float(whole.any(1).sum(1).float().mean() / whole[0, 0].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="exported folder")
    parser.add_argument("--tokens", type=int, default=6000, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=2)
    options = parser.parse_args()
    shape = json.loads((options.model / "config.json").read_text())
    config = next(r.model for r in RECIPES.values() if r.model.index_topk == shape["index_topk"])
    network = tiny.TinyDSA(config)
    network.load_state_dict({k: v.float() for k, v in load_file(options.model / "model.safetensors").items()})
    tiny.ROWS = 256  # the scores of 32 index heads of 1024 rows take a GB
    encode, rng = Encoder(), random.Random(0)
    print(f"union of G adjacent queries / {config.index_topk}, {options.prompts} prompts of {options.tokens} tokens")
    print("layer", *(f"G={group}" for group in GROUPS), "in common with the one before", sep="\t")
    rows: list[list[float]] = [[] for _ in network.model.layers]
    for _ in range(options.prompts):
        prompt, _ = test_prompt(rng, RECALL, options.tokens, encode)
        for layer, chosen in enumerate(selections(network, torch.tensor([encode(prompt)]))):
            common = float((chosen[1:] & chosen[:-1]).sum(1).float().mean() / config.index_topk)
            rows[layer].append([*(union_share(chosen, group) for group in GROUPS), common])
    for layer, of_prompts in enumerate(rows):
        means = torch.tensor(of_prompts).mean(0).tolist()
        print(layer, *(f"{mean:.3f}" for mean in means), sep="\t")


if __name__ == "__main__":
    main()
