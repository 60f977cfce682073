"""What tests ask servers of random models: prompts of tokens, and how an answer compares with the one expected."""

from __future__ import annotations

import random
from typing import Any

NEW_TOKENS = 16
LOGPROB_BAR = 1e-3
#: Around pages of 64 and chunks of 128, and around the 32 that the indexer selects.
LENGTHS = (5, 17, 64, 65, 129, 200, 333, 700)
INDEX_TOPK = 32


def tokens(count: int, seed: int) -> list[int]:
    """Fixed prompts, so that no run meets a tie of two tokens that the others did not."""
    generator = random.Random(seed)
    return [generator.randrange(5, 500) for _ in range(count)]


def body(prompt: list[int], new_tokens: int = NEW_TOKENS, **extra: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, **extra}


def answer(reply: dict[str, Any]) -> dict[str, list]:
    """{"tokens", "logprobs"} of a reply."""
    return {
        "tokens": reply["output_ids"],
        "logprobs": [row[0] for row in reply["meta_info"]["output_token_logprobs"]],
    }


def compare(reply: dict[str, Any], expected: dict[str, list], bar: float = LOGPROB_BAR) -> None:
    """Raise AssertionError unless a reply has the expected tokens, with log-probabilities like theirs."""
    got = answer(reply)
    assert got["tokens"] == expected["tokens"]
    assert max(abs(a - b) for a, b in zip(got["logprobs"], expected["logprobs"], strict=True)) < bar
