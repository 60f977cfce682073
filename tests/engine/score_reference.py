"""Log-probabilities of given texts by transformers in float32: `python score_reference.py MODEL TEXTS.json OUT.json`.

TEXTS: list of token lists. OUT: for each, the log-probability of every token after the first, given those before it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, texts, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    results = []
    with torch.inference_mode():
        for tokens in json.loads(Path(texts).read_text()):
            ids = torch.tensor(tokens)
            logprobs = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            results.append(logprobs.gather(1, ids[1:, None])[:, 0].tolist())
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
