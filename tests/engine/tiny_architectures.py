"""Tiny random checkpoints of what SGLang calls MLA models, and transformers' models of the same weights.

A model that wraps a language model (Kimi-K2.5, Pixtral ...) is written as one: the language model's weights under the
names of its own checkpoints, and a vision tower whose weights are missing, since only text is compared.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from examples import make_random_model as tiny

Config = dict[str, Any]
#: A small vision tower, in the words of the different configurations.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_channels": 3,
    "patch_size": 14,
}
#: A context that is stretched from 64 tokens, so that both parts of it are asked for.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
DEEPSEEK_YARN = {**YARN, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}
#: Mistral's scale of queries grows at every 64th position here, at every 8192nd in Mistral-Large-3.
MISTRAL_YARN = {**YARN, "attention_factor": 1.0, "llama_4_scaling_beta": 0.1, "max_position_embeddings": 4096}
LONGCAT_ROPE = {"rope_type": "default", "rope_theta": 1e7}
#: From DeepSeek's names of weights to Mistral's, applied in turn.
MISTRAL_NAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "tok_embeddings."),
    (r"^lm_head\.", "output."),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.(q|kv)_a_layernorm", r"attention.\1_a_norm"),
    (r"self_attn\.(\w+)_proj_with_mqa", r"attention.w\1_with_mqa"),
    (r"self_attn\.(\w+)_proj\.", r"attention.w\1."),
    (r"mlp\.(shared_experts|experts\.\d+|gate\.)", r"\1"),
    (r"mlp\.", "feed_forward."),
    (r"gate_proj", "w1"),
    (r"down_proj", "w2"),
    (r"up_proj", "w3"),
)


def same(value: Any) -> Any:
    return value


def mistral_name(name: str) -> str:
    for pattern, new in MISTRAL_NAMES:
        name = re.sub(pattern, new, name)
    return name


def language_model_name(name: str) -> str:
    return f"language_model.{name}"


def mistral_config(config: Config) -> Config:
    """params.json of Mistral's own format."""
    rope = config["rope_parameters"]
    start = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
    return {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "yarn": {
            **start,
            "factor": rope["factor"],
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
            "apply_scale": False,
        },
        "llama_4_scaling": {**start, "beta": rope["llama_4_scaling_beta"]},
        "moe": {
            "route_every_n": 1,
            "first_k_dense_replace": config["first_k_dense_replace"],
            "num_experts": config["n_routed_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "num_shared_experts": config["n_shared_experts"],
            "expert_hidden_dim": config["moe_intermediate_size"],
            "num_expert_groups": 1,
            "num_expert_groups_per_tok": 1,
            "routed_scale": config["routed_scaling_factor"],
        },
        **{k: config[k] for k in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
        **{k: config[k] for k in ("vocab_size", "max_position_embeddings")},
    }


def pixtral_config(config: Config) -> Config:
    vision = {**VISION, "image_size": 28, "rope_theta": 10000.0, "image_token_id": 10}
    return {**mistral_config(config), "vision_encoder": vision}


def kimi_k25_config(config: Config) -> Config:
    vision = {f"vt_{name}": value for name, value in VISION.items()}
    vision |= {"mm_hidden_size": 32, "text_hidden_size": config["hidden_size"], "init_pos_emb_height": 4}
    return {"model_type": "kimi_k25", "text_config": config, "vision_config": {**VISION, **vision}}


def kimi_vl_config(config: Config) -> Config:
    return {"model_type": "kimi_vl", "text_config": config, "vision_config": VISION}


def dots_config(config: Config) -> Config:
    vision = {**VISION, "embed_dim": 32, "hidden_size": config["hidden_size"]}
    return {**config, "model_type": "dots_vlm", "im_span_id": 3, "video_span_id": 4, "vision_config": vision}


def longcat_config(config: Config) -> Config:
    """Without experts that return their input: SGLang computes those in Triton, which no CPU runs."""
    ours = ("num_hidden_layers", "rope_parameters")
    kept = {name: value for name, value in config.items() if name not in ours}
    scales = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True}
    return {**kept, **scales, "rope_scaling": LONGCAT_ROPE, "zero_expert_type": None}


def without_indexer_types(config: Config) -> Config:
    """transformers writes down what the other entries mean."""
    return {name: value for name, value in config.items() if name != "indexer_types"}


def rotate_pairs_in_the_indexer(modeling: Any) -> None:
    """transformers 5.12 rotates halves in GLM's indexer, whatever `indexer_rope_interleave` says; newer ones do not."""
    modeling.apply_rotary_pos_emb = modeling.apply_rotary_pos_emb_interleave


def one_by_one(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every expert's own weights, where transformers saves those of all experts as one."""
    for name, weight in weights.items():
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(weight):
                for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{number}.{part}.weight"), half.contiguous()
        elif name.endswith("experts.down_proj"):
            for number, expert in enumerate(weight):
                yield name.replace("down_proj", f"{number}.down_proj.weight"), expert.contiguous()
        else:
            yield name, weight


@dataclass(frozen=True)
class Case:
    """One checkpoint: SGLang's architecture, and transformers' model of the same weights."""

    architecture: str
    #: transformers' folder, and what its classes begin with.
    module: str = "deepseek_v3"
    model: str = "DeepseekV3"
    #: Entries of transformers' configuration.
    changes: Mapping[str, Any] = field(default_factory=dict)
    #: From transformers' configuration and name of a weight to the checkpoint's.
    config: Callable[[Config], Config] = same
    name: Callable[[str], str] = same
    prepare: Callable[[Any], None] | None = None
    #: Mistral's own format, which SGLang looks for by the folder's name.
    native: bool = False

    def write(self, folder: Path) -> tuple[Path, torch.nn.Module]:
        """Write the checkpoint below `folder`; returns (its folder, transformers' model)."""
        model = self._reference()
        plain = folder / "transformers"
        model.save_pretrained(plain)
        out = folder / ("mistral-large-3" if self.native else "model")
        out.mkdir()
        weights = {self.name(name): weight for name, weight in one_by_one(load_file(plain / "model.safetensors"))}
        save_file(weights, out / ("consolidated.safetensors" if self.native else "model.safetensors"))
        config = {**tiny.SGLANG_KEYS, **json.loads((plain / "config.json").read_text()), **self.changes}
        named = {} if self.native else {"architectures": [self.architecture]}
        file = "params.json" if self.native else "config.json"
        (out / file).write_text(json.dumps({**self.config(config), **named}))
        tiny.write_tokenizer(out)
        return out, model

    def _reference(self) -> torch.nn.Module:
        package = f"transformers.models.{self.module}"
        if self.prepare is not None:
            self.prepare(importlib.import_module(f"{package}.modeling_{self.module}"))
        classes = importlib.import_module(package)
        config = getattr(classes, f"{self.model}Config")(**{**tiny.COMMON, **self.changes})
        config._attn_implementation = "eager"
        model: torch.nn.Module = getattr(classes, f"{self.model}ForCausalLM")(config).eval()
        tiny.randomize(model, seed=0)
        for weight in model.parameters():  # SGLang keeps some of an indexer's in bfloat16
            weight.data = weight.data.bfloat16().float()
        return model


def glm_5_2(config: Callable[[Config], Config], **share: Any) -> Case:
    """IndexShare: some layers take the top-k of the one before."""
    changes = {**tiny.INDEXER, "num_hidden_layers": 5, "indexer_rope_interleave": True, **share}
    names = ("GlmMoeDsaForCausalLM", "glm_moe_dsa", "GlmMoeDsa")
    return Case(*names, changes, config, prepare=rotate_pairs_in_the_indexer)


MISTRAL_4 = ("mistral4", "Mistral4", {"rope_parameters": MISTRAL_YARN})
CASES: Mapping[str, Case] = {
    "DeepSeek-V2": Case(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        "DeepseekV2",
        {
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
        },
    ),
    "Kimi-K2": Case(
        "DeepseekV3ForCausalLM",
        changes={"rope_parameters": DEEPSEEK_YARN, "n_routed_experts": 6, "num_experts": 6},
        config=lambda config: {**config, "model_type": "kimi_k2"},
    ),
    "Kimi-K2.5": Case(
        "KimiK25ForConditionalGeneration",
        changes={"rope_parameters": DEEPSEEK_YARN},
        config=kimi_k25_config,
        name=language_model_name,
    ),
    "Kimi-VL": Case(
        "KimiVLForConditionalGeneration",
        changes={"q_lora_rank": None},
        config=kimi_vl_config,
        name=language_model_name,
    ),
    "dots.vlm": Case("DotsVLMForCausalLM", config=dots_config),
    "GLM-4.7-Flash": Case(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        "Glm4MoeLite",
        {"qk_nope_head_dim": 192, "v_head_dim": 256, "routed_scaling_factor": 1.8},
    ),
    "GLM-5.2 by frequency": glm_5_2(without_indexer_types, index_topk_freq=2),
    "GLM-5.2 by pattern": glm_5_2(without_indexer_types, index_topk_pattern="FSSFS"),
    "GLM-5.2 by types": glm_5_2(same, indexer_types=["full", "shared", "full", "shared", "shared"]),
    "LongCat-Flash": Case(
        "LongcatFlashForCausalLM",
        "longcat_flash",
        "LongcatFlash",
        {
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 256,
            "expert_ffn_hidden_size": 64,
            "moe_topk": 2,
            "zero_expert_num": 0,
            "routed_scaling_factor": 2.0,
            "rope_parameters": LONGCAT_ROPE,
        },
        longcat_config,
    ),
    "Mistral-Large-3, its language model": Case(
        "MistralLarge3ForCausalLM", *MISTRAL_4, mistral_config, mistral_name, native=True
    ),
    "Mistral-Large-3": Case("PixtralForConditionalGeneration", *MISTRAL_4, pixtral_config, mistral_name, native=True),
}
