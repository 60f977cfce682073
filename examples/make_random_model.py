"""Write a tiny model with random weights, and its tokenizer, for parity tests and set-up.

    python examples/make_random_model.py mla OUT     DeepseekV3ForCausalLM, dense MLA
    python examples/make_random_model.py dsa OUT     DeepseekV32ForCausalLM, MLA with the sparse indexer

Needs torch and transformers. The weights are large enough that greedy choices are decided by clear margins, and the
indexer has 16 heads: with few heads ReLU makes many logits exactly zero, and ties of the top-k follow.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 512
SPECIAL = ("<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ 'user' if m['role'] == 'user' else 'assistant' }}|>{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 4096,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
INDEXER = {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 32}
#: What SGLang reads from config.json and transformers does not save.
SGLANG_KEYS = {
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: every string can be encoded, whatever the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["sparse attention over a paged cache of latent keys"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2],
        "model_max_length": COMMON["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Normal matrices scaled by fan-in, unit norms, small router biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0 if "norm" in name and name.endswith(".weight") else 0.0)
                continue
            gain = 2.0 if "o_proj" in name or "lm_head" in name else 1.4
            scale = 1.0 if "embed" in name else gain * weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)


def write_model(kind: str, folder: Path, seed: int = 0, overrides: dict | None = None) -> None:
    """Write model and tokenizer of kind "mla" or "dsa" into folder. overrides: entries of config.json."""
    if kind == "mla":
        from transformers import DeepseekV3Config as Config
        from transformers import DeepseekV3ForCausalLM as Model

        config = {**COMMON, **(overrides or {})}
    elif kind == "dsa":
        from transformers.models.deepseek_v32 import DeepseekV32Config as Config
        from transformers.models.deepseek_v32 import DeepseekV32ForCausalLM as Model

        config = {**COMMON, **INDEXER, **(overrides or {})}
    else:
        raise ValueError(f"kind={kind!r}: expected mla or dsa")
    folder.mkdir(parents=True, exist_ok=True)
    model = Model(Config(**config))
    randomize(model, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(
        json.dumps({**saved, **SGLANG_KEYS, **(overrides or {}), "architectures": [Model.__name__]}, indent=1)
    )
    write_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("mla", "dsa"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_model(arguments.kind, arguments.folder, arguments.seed)
    print(f"{arguments.folder}: random {arguments.kind} model")


if __name__ == "__main__":
    main()
