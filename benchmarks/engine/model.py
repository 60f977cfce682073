"""Model folders with the real attention dimensions of DeepSeek-V3.2, GLM-5 and DeepSeek-V3, few layers, random weights.

config.json, generation_config.json, a word-level tokenizer ("t17" is token 17) and model.safetensors: fp8 blocks with
the variance of a trained model's, so that scores spread and attention matters. (`--load-format dummy` draws from
+-0.001, of which fp8 keeps one value in forty: every layer hardly changes what it gets.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB = 32768
_BLOCK = 128
FAMILIES = ("v32", "glm", "v3")
_INDEXER = {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}


def config(family: str, heads: int, layers: int, quantized: bool = True) -> dict[str, Any]:
    """config.json of a family with `heads` query heads (16 is one rank of eight) and `layers` dense layers.

    quantized: fp8 blocks, as DeepSeek's own checkpoints; else bf16.
    """
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
    }
    if quantized:
        base["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [_BLOCK, _BLOCK],
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


#: Of o_proj, by model type since YaRN sharpens the softmax: by estimate attention adds 3% to the residual stream. A
#: wrong output is seen in the logits (cosine about 0.995), the few tokens at the edge of the top-k that rounding
#: exchanges are not, although in a random model they weigh as much as any other.
_OUTPUT_GAIN = {"deepseek_v32": 0.25, "deepseek_v3": 0.25, "glm_moe_dsa": 0.9}


def weights(c: dict[str, Any], device: str | torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random checkpoint of `config`, on `device`: bf16, or fp8 blocks with scales where DeepSeek's are quantized."""
    generator = torch.Generator(device).manual_seed(seed)
    out: dict[str, torch.Tensor] = {}

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16).mul_(std)

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        std = gain / math.sqrt(columns)
        if "quantization_config" not in c:
            out[f"{name}.weight"] = normal(rows, columns, std)
            return
        out[f"{name}.weight"] = normal(rows, columns, 1.0).to(torch.float8_e4m3fn)
        blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
        out[f"{name}.weight_scale_inv"] = torch.full(blocks, std, device=device)

    def norm(name: str, width: int, bias: bool = False) -> None:
        out[f"{name}.weight"] = torch.ones(width, device=device, dtype=torch.bfloat16)
        if bias:
            out[f"{name}.bias"] = torch.zeros(width, device=device, dtype=torch.bfloat16)

    hidden = c["hidden_size"]
    out["model.embed_tokens.weight"] = normal(c["vocab_size"], hidden, 1.0)
    out["lm_head.weight"] = normal(c["vocab_size"], hidden, hidden**-0.5)
    norm("model.norm", hidden)
    for layer in range(c["num_hidden_layers"]):
        _layer(c, f"model.layers.{layer}", linear, norm)
        if "index_topk" in c:
            gates = normal(c["index_n_heads"], hidden, hidden**-0.5)
            out[f"model.layers.{layer}.self_attn.indexer.weights_proj.weight"] = gates
    return out


def _layer(c: dict[str, Any], prefix: str, linear: Callable[..., None], norm: Callable[..., None]) -> None:
    hidden, heads, inner = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"]
    q_lora, kv_lora, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, value = c["qk_nope_head_dim"], c["v_head_dim"]
    attention = f"{prefix}.self_attn"
    norm(f"{prefix}.input_layernorm", hidden)
    norm(f"{prefix}.post_attention_layernorm", hidden)
    norm(f"{attention}.q_a_layernorm", q_lora)
    norm(f"{attention}.kv_a_layernorm", kv_lora)
    linear(f"{attention}.q_a_proj", q_lora, hidden)
    linear(f"{attention}.kv_a_proj_with_mqa", kv_lora + rope, hidden)
    linear(f"{attention}.q_b_proj", heads * (nope + rope), q_lora)
    linear(f"{attention}.kv_b_proj", heads * (nope + value), kv_lora)
    linear(f"{attention}.o_proj", hidden, heads * value, gain=_OUTPUT_GAIN[c["model_type"]])
    for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        linear(f"{prefix}.mlp.{name}_proj", rows, columns)
    if "index_topk" in c:
        linear(f"{attention}.indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], q_lora)
        linear(f"{attention}.indexer.wk", c["index_head_dim"], hidden)
        norm(f"{attention}.indexer.k_norm", c["index_head_dim"], bias=True)


def write_model(
    folder: Path, family: str, heads: int = 16, layers: int = 8, quantized: bool = True, seed: int = 0
) -> Path:
    """Write the folder, weights included (drawn on the GPU if there is one), and return it."""
    from safetensors.torch import save_file

    write_config(folder, family, heads, layers, quantized)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = weights(config(family, heads, layers, quantized), device, seed)
    save_file({name: t.cpu() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    if device == "cuda":  # a model is loaded by other processes, which need the memory
        del tensors
        torch.cuda.empty_cache()
    return folder


def write_config(folder: Path, family: str, heads: int, layers: int, quantized: bool = True) -> Path:
    """Everything but the weights."""
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
        "config.json": config(family, heads, layers, quantized),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
