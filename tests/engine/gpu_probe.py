"""Prefill and decode random prompts in process, batch by batch, and save logits and selected slots.

    python -m tests.engine.gpu_probe --output X.pt --prompts 64 --longest 12288 --variants -- --model-path M ...

Two runs with the same model and seed see the same prompts, the same decoded tokens and the same slots, whatever the
backend: their logits and top-k sets can be compared one by one. With --variants the last decode step of every batch is
repeated eagerly: as it is, on one stream, on two, and with q_all concatenated by a kernel.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nsa_backend_plugin.engine.layer_profile import load

#: Sizes of the batches in turn: captured, padded, beyond the captured range, captured, captured, captured again with
#: shorter prompts. Prompts are sorted, longest first, so that every replay meets what a longer one left behind. These
#: are 64; after them the first two again, each alone.
CAPTURED = (1, 4, 8, 16)
BATCHES = (16, 3, 20, 8, 1, 16, 1, 1)
STEPS = 3

#: (captured, tokens, layer) of the last such decode call -> its selected slots. A captured copy replays with its graph.
selected: dict[tuple[bool, int, int], torch.Tensor] = {}


def record_selected(backend_class: type) -> None:
    """Keep a copy of the `topk_indices` of every decode call of a backend class."""
    original = backend_class.forward_decode

    def forward_decode(self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        slots = kwargs.get("topk_indices")
        if slots is not None:
            selected[torch.cuda.is_current_stream_capturing(), slots.shape[0], layer.layer_id] = slots.clone()
        return original(self, q, k, v, layer, *args, **kwargs)

    backend_class.forward_decode = forward_decode


def prompts_of(count: int, shortest: int, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """`count` random prompts of `shortest` to `longest` tokens, longest first."""
    rng = random.Random(seed)
    lengths = sorted((rng.randint(shortest, longest) for _ in range(count)), reverse=True)
    return [[rng.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def turns(count: int, sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of the prompts of every batch: `count` prompts in turn, from the first again when all were used."""
    numbers = itertools.cycle(range(count))
    return [list(itertools.islice(numbers, size)) for size in sizes]


class Probe:
    def __init__(self, server_args: list[str]):
        from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

        record_selected(DeepseekSparseAttnBackend)
        if "--attention-backend=nsa_plugin" in server_args:
            from nsa_backend_plugin.engine.gpu.dsa_backend import NsaPluginDSABackend

            record_selected(NsaPluginDSABackend)
        self.one_batch, self.model, self.args = load(server_args)
        self.runner = self.model.torch_runner
        self.layers = self.runner.model_config.num_hidden_layers
        self.vocabulary = self.runner.model_config.vocab_size

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> tuple[Any, torch.Tensor]:
        """(batch of all prompts, logits of their last tokens); each prompt is a forward of its own."""
        self.model.clear()
        parts = []
        for prompt in prompts:
            requests = self.one_batch.prepare_synthetic_inputs_for_latency_test(1, len(prompt), [prompt])
            _, logits, batch = self.model.extend(requests)
            parts.append((batch, logits.float().cpu()))
        whole = parts[0][0]
        for batch, _ in parts[1:]:
            whole.merge_batch(batch)
        return whole, torch.cat([logits for _, logits in parts])

    def forward(self, batch: Any) -> torch.Tensor:
        """Logits of the batch's step; may be called again, since it writes the same rows."""
        forward_batch = self.one_batch.ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)
        return self.runner.forward(forward_batch).logits_output.next_token_logits.float().cpu()

    @torch.no_grad()
    def decode(self, batch: Any, tokens: torch.Tensor) -> dict[str, Any]:
        batch.input_ids = tokens.to(self.runner.device)
        batch.prepare_for_decode()
        result = {"logits": self.forward(batch)}
        size = len(tokens)
        captured = size <= max(CAPTURED) and not self.args.disable_cuda_graph
        rows = min(c for c in CAPTURED if c >= size) if captured else size
        if selected:  # the model has an indexer
            slots = [selected[captured, rows, layer][:size].sort(-1).values.cpu() for layer in range(self.layers)]
            result["slots"] = torch.stack(slots)
        return result

    @torch.no_grad()
    def idle(self, batch: Any) -> None:
        """A step without requests, as data-parallel ranks run it."""
        empty = self.one_batch.ScheduleBatch.init_new(
            [],
            batch.req_to_token_pool,
            batch.token_to_kv_pool_allocator,
            batch.tree_cache,
            batch.model_config,
            batch.enable_overlap,
            batch.spec_algorithm,
        )
        empty.prepare_for_idle()
        self.forward(empty)

    @torch.no_grad()
    def variants(self, batch: Any) -> dict[str, torch.Tensor]:
        """Logits of the same step again, eagerly; of equal index scores the lowest position is taken, in every run.

        "views" says for every layer of every run whether q_all was a view, before "concatenated" made copies.
        """
        from nsa_backend_plugin.ops import concat, topk

        join, select = concat.q_all, partial(topk.select, deterministic=True)
        views = []

        def as_is(q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
            out = join(q_nope, q_rope)
            views.append(out.data_ptr() == q_nope.data_ptr())
            return out

        def apart(q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
            return join(q_nope.clone(), q_rope.clone())

        def run(q_all: Callable[..., torch.Tensor], dual: str) -> torch.Tensor:
            with (
                mock.patch.object(topk, "select", select),
                mock.patch.object(concat, "q_all", q_all),
                mock.patch.dict(os.environ, {"NSA_PLUGIN_DUAL_STREAM": dual}),
                mock.patch.object(self.runner, "decode_cuda_graph_runner", None),
            ):
                return self.forward(batch)

        logits = {"plain": run(as_is, "0"), "again": run(as_is, "0"), "dual_stream": run(as_is, "1")}
        logits["concatenated"] = run(apart, "0")
        return {**logits, "views": torch.tensor(views)}


def attempt(what: Callable[[], Any]) -> Any:
    """What the call returns, or the text of its error: one failure must not cost the other results."""
    try:
        return what()
    except Exception:
        return traceback.format_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: save nothing")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=12288)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="sizes of the batches in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", action="store_true", help="nsa_plugin only")
    parser.add_argument("server_args", nargs="*")
    options = parser.parse_args()
    probe = Probe(options.server_args)
    prompts = prompts_of(options.prompts, options.shortest, options.longest, probe.vocabulary, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    tokens = torch.randint(3, probe.vocabulary, (STEPS, len(prompts)), generator=generator)
    out = []
    for numbers in turns(len(prompts), options.batches):
        batch, first = probe.prefill([prompts[n] for n in numbers])
        steps = [probe.decode(batch, row) for row in tokens[:, numbers]]
        result = {"prompts": numbers, "lengths": [len(prompts[n]) for n in numbers], "prefill": first, "steps": steps}
        if options.variants:
            result["variants"] = attempt(partial(probe.variants, batch))
        result["idle"] = attempt(partial(probe.idle, batch))
        out.append(result)
    if options.output:
        torch.save(out, options.output)
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    # SGLang's distributed teardown can hang a process whose work is done.
    os._exit(0)


if __name__ == "__main__":
    main()
