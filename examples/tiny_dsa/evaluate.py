"""Accuracy on held-out few-shot prompts, generated greedily by transformers or by a running server.

    python examples/tiny_dsa/evaluate.py --model examples/models/tiny-dsa --tokens 300 500
    python examples/tiny_dsa/evaluate.py --base-url http://127.0.0.1:30000 --tokens 3000 6000 --concurrency 32

An answer is right when the last number before the next "Question" is the reference's. The prompts depend on `--seed`
only. `--require 0.95` makes the exit code 1 when either accuracy is lower. Never call the result GSM8K accuracy.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from data import RECALL, Problem, test_prompt
from tokenizer import Encoder

STOP = "Question"
MAX_NEW_TOKENS = 96
Generate = Callable[[str], str]


def last_number(text: str) -> str | None:
    """The last integer in the text before the next question, or None."""
    numbers = re.findall(r"-?\d+", text.split(STOP)[0])
    return numbers[-1] if numbers else None


def is_right(problem: Problem, output: str) -> bool:
    return last_number(output) == last_number(problem.answer)


def prompts(kind: str, count: int, tokens: tuple[int, int], seed: int) -> list[tuple[str, Problem]]:
    """`count` prompts of kind "arithmetic" or "recall" with lengths drawn from tokens[0] to tokens[1]."""
    rng, encode = random.Random(f"{seed}/{kind}"), Encoder()
    return [test_prompt(rng, kind, rng.randint(*tokens), encode) for _ in range(count)]


def transformers_generate(folder: Path, dtype: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def generate(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        with torch.no_grad():
            out = model.generate(
                ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, stop_strings=[STOP], tokenizer=tokenizer
            )
        return tokenizer.decode(out[0, ids.shape[1] :])

    return generate


def _request(url: str, body: dict[str, Any] | None, timeout: float) -> Any:
    reply = requests.request("GET" if body is None else "POST", url, json=body, timeout=timeout)
    reply.raise_for_status()
    return reply.json()


def server_generate(base_url: str, api: str, timeout: float = 600.0) -> Generate:
    """`api` "completions" is OpenAI's /v1/completions, "generate" is SGLang's own /generate."""
    base_url = base_url.rstrip("/").removesuffix("/v1")
    if api == "generate":
        sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, "stop": [STOP]}
        url = f"{base_url}/generate"
        return lambda prompt: _request(url, {"text": prompt, "sampling_params": sampling}, timeout)["text"]
    model = _request(f"{base_url}/v1/models", None, timeout)["data"][0]["id"]
    options = {"model": model, "temperature": 0, "max_tokens": MAX_NEW_TOKENS, "stop": [STOP]}
    url = f"{base_url}/v1/completions"
    return lambda prompt: _request(url, {**options, "prompt": prompt}, timeout)["choices"][0]["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--model", type=Path, help="exported folder, run by transformers")
    target.add_argument("--base-url", help="a running server")
    parser.add_argument("--api", choices=("completions", "generate"), default="completions")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="transformers only")
    parser.add_argument("--tokens", type=int, nargs=2, default=(300, 500), metavar=("LOW", "HIGH"))
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--concurrency", type=int, default=8, help="server only")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--require", type=float, default=0.0, help="lowest accuracy that counts as success")
    args = parser.parse_args()
    generate = (
        server_generate(args.base_url, args.api) if args.base_url else transformers_generate(args.model, args.dtype)
    )
    workers = args.concurrency if args.base_url else 1
    good = True
    for kind in ("arithmetic", RECALL):
        cases = prompts(kind, args.count, tuple(args.tokens), args.seed)
        begin = time.monotonic()
        with ThreadPoolExecutor(workers) as pool:
            outputs = list(pool.map(generate, [prompt for prompt, _ in cases]))
        hits = sum(is_right(problem, output) for (_, problem), output in zip(cases, outputs, strict=True))
        accuracy = hits / len(cases)
        good &= accuracy >= args.require
        print(f"{kind}: {hits} of {len(cases)} right ({accuracy:.1%}), {time.monotonic() - begin:.1f} s")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
