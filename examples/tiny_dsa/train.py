"""Train a tiny DSA model: `python examples/tiny_dsa/train.py --config tiny-dsa-2k --out DIR --minutes 9`.

Needs torch only. Phases (config.py) go from short dense context to long sparse context; each ends after its number
of steps or its share of the minutes. DIR receives `model.pt` (bf16 weights, rewritten while training) and `train.log`.
`--smoke` runs a few steps of every phase and prints step time, data wait and peak memory instead of training.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from config import RECIPES, Mode, Phase, Recipe
from data import RECALL, Mix, example, test_prompt
from model import TinyDSA
from muon import Muon
from tokenizer import Encoder
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CONTEXT_WEIGHT = 0.1  # loss weight of tokens outside answers
WARMUP_STEPS = 50
CLIP = 1.0


class Log:
    """Prints lines, prefixed with the seconds since the start, to stdout and a file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, text: str) -> None:
        line = f"[{self.seconds:6.1f}s] {text}"
        print(line, flush=True)
        print(line, file=self.file, flush=True)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Training batch `step` of a phase: ids and answer numbers [B, T + 1] int16, a function of seed and step."""

    def __init__(self, phase: Phase, steps: int, seed: int) -> None:
        self.phase, self.steps, self.seed, self.encode = phase, steps, seed, Encoder()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self.seed}/{self.phase.name}/{step}")
        rows = [
            example(rng, False, self.phase.mix, self.phase.length + 1, self.encode) for _ in range(self.phase.batch)
        ]
        ids = torch.tensor([row.ids for row in rows], dtype=torch.int16)
        return ids, torch.tensor([row.answer for row in rows], dtype=torch.int16)


def autocast(device: torch.device) -> Any:
    """bf16 on a GPU; fp32 on a CPU, where bf16 matrix products may be slower."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def answer_loss(logits: Tensor, ids: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Training loss (answers count fully, the rest by CONTEXT_WEIGHT) and the mean loss of answer tokens."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    is_answer = answer[:, 1:].flatten() != 0
    weight = torch.where(is_answer, 1.0, CONTEXT_WEIGHT)
    return (losses * weight).sum() / weight.sum(), (losses.detach() * is_answer).sum() / is_answer.sum().clamp(min=1)


class Optimizer:
    """Muon for the matrices of the backbone, AdamW for the rest and for the indexer; one schedule for all."""

    def __init__(self, model: TinyDSA, phase: Phase) -> None:
        self.decay_to = phase.decay_to
        named = list(model.named_parameters())
        self.index = [p for name, p in named if "indexer" in name]
        self.main = [p for name, p in named if "indexer" not in name]
        for parameters, rate in ((self.index, phase.index_lr), (self.main, phase.main_lr)):
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
        self.optimizers: list[torch.optim.Optimizer] = []
        if phase.main_lr > 0:
            matrices = [p for name, p in named if "proj" in name and "indexer" not in name]
            matrix_ids = {id(p) for p in matrices}
            rest = [p for p in self.main if id(p) not in matrix_ids]
            self.optimizers += [
                Muon(matrices, lr=phase.main_lr),
                torch.optim.AdamW(rest, lr=phase.main_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
            ]
        if phase.index_lr > 0:
            self.optimizers.append(
                torch.optim.AdamW(self.index, lr=phase.index_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
            )
        self.base = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def step(self, step: int, progress: float) -> None:
        """Apply the gradients at `progress` (0 to 1) of the phase, and clear them."""
        scale = min(1.0, (step + 1) / WARMUP_STEPS) * (1.0 - (1.0 - self.decay_to) * progress)
        for parameters in (self.main, self.index):
            torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], CLIP)
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            optimizer.param_groups[0]["lr"] = base * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def teacher_forced(
    model: TinyDSA, mode: Mode, length: int, device: torch.device, sequences: int, mix: Mix
) -> dict[str, float]:
    """Share of held-out answers whose every token is the argmax, by arithmetic and recall."""
    rng, encode = random.Random(f"check/{length}"), Encoder()
    right: dict[str, list[bool]] = defaultdict(list)
    for _ in range(sequences):
        row = example(rng, True, mix, length + 1, encode)
        ids, answer = torch.tensor([row.ids], device=device), torch.tensor(row.answer[1:])
        with autocast(device):
            hit = (model(ids[:, :-1], mode).logits.argmax(-1) == ids[:, 1:])[0].cpu()
        for number in range(1, int(answer.max()) + 1):
            kind = RECALL if row.kinds[number - 1] == RECALL else "arithmetic"
            right[kind].append(bool(hit[answer == number].all()))
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}


@torch.no_grad()
def held_out_accuracy(
    model: TinyDSA, mode: Mode, kind: str, tokens: tuple[int, int], device: torch.device, count: int
) -> float:
    """Share of few-shot prompts of tokens[0] to tokens[1] tokens that greedy decoding answers word for word.

    Greedy decoding writes the reference answer exactly when each of its tokens is the argmax after the ones before,
    so one forward pass per prompt decides.
    """
    rng, encode, right = random.Random(f"final/{kind}"), Encoder(), 0
    for _ in range(count):
        prompt, problem = test_prompt(rng, kind, rng.randint(*tokens), encode)
        answer = torch.tensor(encode(problem.completion), device=device)
        ids = torch.tensor(encode(prompt), device=device)
        with autocast(device):
            logits = model(torch.cat([ids, answer[:-1]])[None], mode).logits
        right += bool((logits[0, len(ids) - 1 :].argmax(-1) == answer).all())
    return right / count


def round_mantissa(values: Tensor, bits: int) -> Tensor:
    """The nearest values with `bits` bits behind the leading one (bf16: 7), in fp32, without negative zeros."""
    mantissa, exponent = torch.frexp(values.float())
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent) + 0.0


def save(model: TinyDSA, path: Path, mantissa_bits: int) -> None:
    """Write the weights in bf16, matrices rounded to `mantissa_bits`.

    The file is replaced in one step, so that an interruption leaves the old one.
    """
    rounded = {n: round_mantissa(t, mantissa_bits) if t.dim() == 2 else t for n, t in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    torch.save({name: tensor.to("cpu", torch.bfloat16) for name, tensor in rounded.items()}, partial)
    partial.replace(path)


def run_phase(
    model: TinyDSA, phase: Phase, args: argparse.Namespace, device: torch.device, log: Log, seconds: float
) -> None:
    """Train for the steps of a phase or until `seconds` have passed."""
    steps = args.smoke_steps if args.smoke else phase.steps
    loader = DataLoader(
        Batches(phase, steps, args.seed),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
    )
    optimizer = Optimizer(model, phase)
    log(
        f"phase {phase.name}: {phase.mode.value}, {phase.batch} x {phase.length} tokens, {steps} steps, {seconds:.0f} s"
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin, last_save, waited, times = time.monotonic(), time.monotonic(), 0.0, []
    reports: list[tuple[Tensor, Tensor]] = []
    batches, done = iter(loader), 0
    while done < steps and (args.smoke or time.monotonic() - begin < seconds):
        started = time.monotonic()
        ids, answer = (tensor.to(device, torch.int64) for tensor in next(batches))
        waited += time.monotonic() - started
        with autocast(device):
            logits, kl = model(ids[:, :-1], phase.mode)
        loss, answers = answer_loss(logits, ids, answer)
        ((loss if phase.main_lr > 0 else 0.0) + (kl if phase.index_lr > 0 else 0.0)).backward()
        optimizer.step(done, max(done / steps, (time.monotonic() - begin) / seconds))
        reports.append((answers, kl.detach()))
        done += 1
        if args.smoke and device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
        if done % args.report == 0 or done == steps:
            answer_mean, kl_mean = torch.tensor([[float(a), float(k)] for a, k in reports]).mean(0).tolist()
            reports.clear()
            step_ms = (time.monotonic() - begin) / done * 1e3
            losses = f"answer_loss {answer_mean:.4f} kl {kl_mean:.4f}"
            log(f"{phase.name} {done}/{steps} {losses} {step_ms:.0f} ms/step")
        if not args.smoke and done % (5 * args.report) == 0:
            check = teacher_forced(model, phase.mode, phase.length, device, 8, phase.mix)
            log("  held-out " + " ".join(f"{kind} {share:.3f}" for kind, share in check.items()))
        if time.monotonic() - last_save > 60:
            save(model, args.out / "model.pt", args.mantissa_bits)
            last_save = time.monotonic()
    step_ms = statistics.median(times[len(times) // 2 :]) * 1e3
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    log(
        f"phase {phase.name} ended after {done} of {steps} steps, {time.monotonic() - begin:.1f} s: median step "
        f"{step_ms:.1f} ms, data wait {waited / done * 1e3:.1f} ms/step, peak {peak:.1f} GiB; "
        f"all {phase.steps} steps would take {phase.steps * step_ms / 1e3:.0f} s of {seconds:.0f} s"
    )


def final_table(model: TinyDSA, recipe: Recipe, device: torch.device, log: Log, count: int) -> None:
    """Print held-out accuracy by prompt length and attention mode."""
    low, high = recipe.prompt_tokens
    lengths = (("5-shot", (400, 450)), (f"{low}-{high} tokens", (low, high)))
    if high <= 512:
        lengths = lengths[1:]
    log(f"held-out exact answers, {count} prompts each, weights as saved")
    log(f"{'prompts':<18}{'attention':<10}{'arithmetic':>11}{'recall':>8}")
    for label, tokens in lengths:
        for mode in (Mode.DENSE, Mode.SPARSE, Mode.WINDOW):
            arithmetic = held_out_accuracy(model, mode, "arithmetic", tokens, device, count)
            recall = held_out_accuracy(model, mode, RECALL, tokens, device, count)
            log(f"{label:<18}{mode.value:<10}{arithmetic:>11.3f}{recall:>8.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, help="default: OUT/train.log")
    parser.add_argument("--minutes", type=float, default=9.0, help="total time, evaluation included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that write training text")
    parser.add_argument("--report", type=int, default=50, help="steps between loss lines")
    parser.add_argument("--eval-count", type=int, default=100, help="prompts per cell of the final table")
    parser.add_argument("--mantissa-bits", type=int, help="of the saved matrices, up to 7; default: the config's")
    parser.add_argument("--init", type=Path, help="continue from this model.pt")
    parser.add_argument("--from-phase", help="skip the phases before this one")
    parser.add_argument("--only-table", action="store_true", help="print the final table of --init, train nothing")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every phase, timed")
    parser.add_argument("--smoke-steps", type=int, default=12)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    recipe, device = RECIPES[args.config], torch.device(args.device)
    if args.mantissa_bits is None:
        args.mantissa_bits = recipe.mantissa_bits
    if not 1 <= args.mantissa_bits <= 7:
        raise ValueError(f"--mantissa-bits: expected 1 to 7, got {args.mantissa_bits}")
    names = [phase.name for phase in recipe.phases]
    if args.from_phase is not None and args.from_phase not in names:
        raise ValueError(f"--from-phase: expected one of {names}, got {args.from_phase!r}")
    phases = recipe.phases[names.index(args.from_phase) if args.from_phase else 0 :]
    if args.only_table:
        if args.init is None:
            raise ValueError("--only-table: expected --init with the weights to judge")
        phases = ()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = TinyDSA(recipe.model)
    model.start_as_previous_token_heads()
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True))
    model.to(device)
    with open(args.log or args.out / "train.log", "w", encoding="utf-8") as file:
        log = Log(file)
        parameters = sum(p.numel() for p in model.parameters())
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        log(f"{args.config}: {parameters / 1e6:.2f} M parameters, seed {args.seed}")
        log(f"torch {torch.__version__}, {machine}; matrices saved with {args.mantissa_bits} mantissa bits")
        shares = sum(phase.share for phase in phases)
        training = args.minutes * 60 * sum(phase.share for phase in recipe.phases)
        for phase in phases:
            run_phase(model, phase, args, device, log, training * phase.share / shares)
            save(model, args.out / "model.pt", args.mantissa_bits)
        if phases:  # judge the weights as they ship: rounded
            model.load_state_dict(torch.load(args.out / "model.pt", weights_only=True))
        final_table(model, recipe, device, log, 4 if args.smoke else args.eval_count)
        log("done")


if __name__ == "__main__":
    main()
