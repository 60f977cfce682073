"""Log-probabilities of given texts by transformers in float32.

    python score_reference.py MODEL TEXTS.json OUT.json [fp8]

TEXTS: list of token lists. OUT: for each, the log-probability of every token after the first, given those before it.
With "fp8" a list of two of these: in the second attention sees the latent rows and the rotated keys as an e4m3 cache
keeps them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def round_rows(model: torch.nn.Module) -> None:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)

    def rounding(rotate: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            query, key = rotate(*args, **kwargs)
            return query, rounded(key)

        return run

    code = sys.modules[type(model).__module__]
    for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"):
        setattr(code, name, rounding(getattr(code, name)))
    norms = [module for name, module in model.named_modules() if name.endswith("kv_a_layernorm")]
    assert len(norms) == model.config.num_hidden_layers
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: rounded(output))


@torch.inference_mode()
def scores(model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    logprobs = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[1:, None])[:, 0].tolist()


def main() -> None:
    folder, texts, out, *rows = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = [torch.tensor(text) for text in json.loads(Path(texts).read_text())]
    results: list[Any] = [scores(model, ids) for ids in tokens]
    if rows == ["fp8"]:
        round_rows(model)
        results = [results, [scores(model, ids) for ids in tokens]]
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
