"""Model folders with the real attention dimensions of DeepSeek-V3.2, GLM-5 and DeepSeek-V3, few layers and no weights.

For `--load-format dummy`: config.json, generation_config.json and a word-level tokenizer ("t17" is token 17).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 32768
FAMILIES = ("v32", "glm", "v3")
_INDEXER = {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}


def config(family: str, heads: int, layers: int) -> dict[str, Any]:
    """config.json of a family with `heads` query heads (16 is one rank of eight) and `layers` dense layers."""
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}: expected one of {', '.join(FAMILIES)}")
    base: dict[str, Any] = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": layers,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 2304,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 256,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": VOCAB,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }
    if family == "v3":
        return {**base, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    base.update(_INDEXER)
    if family == "glm":
        base.update({"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"})
        base.update({"indexer_rope_interleave": True, "pad_token_id": 2})
        base.pop("rope_scaling")
        base["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000}
    return base


def write_model(folder: Path, family: str, heads: int = 16, layers: int = 8) -> Path:
    """Write the folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"t{i}": i for i in range(3, VOCAB)}}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": w, **special} for w, i in list(words.items())[:3]],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 163840}
    files = {
        "config.json": config(family, heads, layers),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
