"""Write a Hugging Face folder: from training weights, or from an exported folder to change its architecture.

    python examples/tiny_dsa/export.py --config tiny-dsa-2k --weights OUT/model.pt --log OUT/train.log --out DIR
    python examples/tiny_dsa/export.py --folder examples/models/tiny-dsa --arch glm --out DIR

`deepseek` is DeepseekV32ForCausalLM. `glm` is GlmMoeDsaForCausalLM with `indexer_rope_interleave: true`: the same
function of the input, with the indexer's rotary dimensions reordered (RoPE pairs (i, i + 32) become (2i, 2i + 1)).
Needs `safetensors`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from config import RECIPES, ModelConfig
from safetensors.torch import load_file, save_file
from tokenizer import TOKENIZER_FILE
from torch import Tensor

MAX_BYTES = 9_200_000  # both shipped checkpoints together stay below 15 MB
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deepseek": {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"},
    "glm": {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "indexer_rope_interleave": True,
        "rope_interleave": True,
        "index_topk_freq": 1,
    },
}
CARD = """# {name}

A {millions:.1f} M parameter language model with DeepSeek Sparse Attention (`{architecture}`), trained from scratch by
`examples/tiny_dsa/train.py` to test attention backends. Attention has DeepSeek-V3.2's dimensions (latent 512, rotary
64, head 128, index head 128) with {heads} query heads, {index_heads} index heads and index_topk {topk}.

What it can do: continue few-shot prompts of synthetic one- and two-step word problems in GSM8K's text format
(`Question: ...\\nAnswer:`), and recall a code from a memo block at the start of a prompt of {low} to {high} tokens,
which a window over the last {topk} tokens does not reach. It knows no other language.

What it is not: **not a GSM8K model.** On the real GSM8K questions its score is near zero. Its accuracy on its own
held-out problems says whether a backend computes attention correctly; it is not a benchmark result.

Training and test problems are disjoint by construction (`examples/tiny_dsa/data.py`). Licence: that of the repository.
"""


def model_config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json of a DeepSeek-V3.2 model whose layers are all dense. The expert fields are unused but required."""
    return {
        **ARCHITECTURES["deepseek"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "index_n_heads": config.index_n_heads,
        "index_head_dim": config.index_head_dim,
        "index_topk": config.index_topk,
        "first_k_dense_replace": config.num_layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def interleave_indexer_rope(weights: dict[str, Tensor], rope_dim: int, head_dim: int) -> dict[str, Tensor]:
    """Reorder the indexer's rotary dimensions from half-split to interleaved pairs."""
    half = torch.arange(rope_dim // 2)
    order = torch.cat([torch.stack([half, half + rope_dim // 2], 1).flatten(), torch.arange(rope_dim, head_dim)])
    reordered = {}
    for name, weight in weights.items():
        if ".indexer.wq_b." in name:
            weight = weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
        elif ".indexer.wk." in name or ".indexer.k_norm." in name:
            weight = weight[order]
        reordered[name] = weight
    return reordered


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config.json of an exported DeepSeek folder.

    Raises:
        ValueError: the folder holds another architecture.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "deepseek_v32":
        raise ValueError(f"folder: expected model_type 'deepseek_v32', got {config['model_type']!r} in {folder}")
    return load_file(folder / "model.safetensors"), config


def result_table(log: Path) -> str:
    """The last table of a training log, without the time stamps."""
    lines = [line.split("] ", 1)[-1] for line in log.read_text(encoding="utf-8").splitlines()]
    start = max(i for i, line in enumerate(lines) if line.startswith("held-out exact answers"))
    return "\n".join(lines[start : lines.index("done", start)])


def write_folder(
    out: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    *,
    arch: str,
    name: str,
    prompt_tokens: tuple[int, int],
    log: Path | None = None,
) -> None:
    """Write everything a server needs to `out`.

    Args:
        weights: parameters under their published names, half-split indexer; stored as bf16.
        config: config.json of the DeepSeek form; changed here for `arch`.
        log: training log to ship beside the weights and to quote in the model card.

    Raises:
        ValueError: unknown `arch`, or the weights file is larger than MAX_BYTES.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {sorted(ARCHITECTURES)}, got {arch!r}")
    if arch == "glm":
        weights = interleave_indexer_rope(weights, config["qk_rope_head_dim"], config["index_head_dim"])
    weights = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in weights.items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    if size > MAX_BYTES:
        raise ValueError(f"weights: expected at most {MAX_BYTES} bytes in bf16, got {size}")
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(TOKENIZER_FILE, out / "tokenizer.json")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    generation_config = {"do_sample": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = config | ARCHITECTURES[arch]
    for file, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (out / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    card = CARD.format(
        name=name,
        millions=sum(tensor.numel() for tensor in weights.values()) / 1e6,
        architecture=config["architectures"][0],
        heads=config["num_attention_heads"],
        index_heads=config["index_n_heads"],
        topk=config["index_topk"],
        low=prompt_tokens[0],
        high=prompt_tokens[1],
    )
    if log is not None:
        shutil.copyfile(log, out / "train.log")
        card += f"\nAt the end of training (`train.log`):\n\n```\n{result_table(log)}\n```\n"
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, help="model.pt written by train.py")
    source.add_argument("--folder", type=Path, help="an exported DeepSeek folder")
    parser.add_argument("--config", choices=sorted(RECIPES), default="tiny-dsa-2k")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="deepseek")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    recipe = RECIPES[args.config]
    if args.folder:
        weights, config = read_folder(args.folder)
    else:
        weights, config = torch.load(args.weights, weights_only=True), model_config_json(recipe.model)
    write_folder(
        args.out,
        weights,
        config,
        arch=args.arch,
        name=args.out.name,
        prompt_tokens=recipe.prompt_tokens,
        log=args.log,
    )
    print(f"{args.out}: {(args.out / 'model.safetensors').stat().st_size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
