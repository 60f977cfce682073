"""Greedy continuations by transformers in float32: `python greedy_reference.py MODEL JOBS.json OUT.json`.

A program of its own, because the tests' process must not hold a model, and the two SGLang environments have
different transformers. JOBS: list of {"prompt": tokens, "guess": tokens}. OUT: list of {"tokens", "logprobs"}, one
entry per token of the guess. The guess decides the speed only: it is scored in one forward pass, kept up to its first
token that is not the greedy one, corrected there, and scored again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def continue_greedily(model: torch.nn.Module, prompt: list[int], guess: list[int]) -> dict[str, list]:
    """No KV cache, whose errors could hide ours."""
    tokens = list(guess)
    while True:
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        greedy = logprobs.argmax(-1).tolist()
        wrong = next((i for i, token in enumerate(tokens) if token != greedy[i]), None)
        if wrong is None:
            return {"tokens": tokens, "logprobs": logprobs.max(-1).values.tolist()}
        tokens[wrong] = greedy[wrong]


def main() -> None:
    folder, jobs, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        results = [continue_greedily(model, j["prompt"], j["guess"]) for j in json.loads(Path(jobs).read_text())]
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
