"""The report of a comparison: everything as JSON, the essentials as a short table."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from nsa_backend_plugin import environment
from nsa_backend_plugin.accuracy.compare import Paired, accuracy, compare, paired
from nsa_backend_plugin.accuracy.runs import Run


def build(runs: Sequence[Run], command: Sequence[str], data: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON: how it was made, an entry per arm, an entry per pair of arms."""
    return {
        "command": shlex.join(command),
        "versions": environment.versions(),
        "data": data,
        "arms": [_arm(run) for run in runs],
        "pairs": [_pair(a, b) for a, b in combinations(runs, 2)],
    }


def failures(report: dict[str, Any], min_accuracy: float) -> list[str]:
    """Why the exit code is 1: arms below the accuracy asked for, and pairs that differ by more than chance."""
    low = [
        f"{arm['arm']}: accuracy {arm['accuracy']['value']:.4f} is below {min_accuracy}"
        for arm in report["arms"]
        if arm["accuracy"]["value"] < min_accuracy
    ]
    return low + [
        f"{pair['first']} and {pair['second']} differ by more than chance ({form})"
        for pair in report["pairs"]
        for form in ("completion", "sgl_eval")
        if form in pair and pair[form]["differs"]
    ]


def table(report: dict[str, Any]) -> str:
    """A line per arm and form; the last four columns compare with the first arm."""
    head = f"{'arm':40} {'form':10} {'accuracy':>8} {'95% interval':>16} {'tok/s':>8}"
    lines = ["", f"{head} {'agree':>7} {'McNemar p':>10} {'dlogprob':>9}"]
    first = report["arms"][0]["arm"]
    for arm in report["arms"]:
        versus: dict[str, Any] = next(
            (p for p in report["pairs"] if (p["first"], p["second"]) == (first, arm["arm"])), {}
        )
        for form, score in (("completion", arm["accuracy"]), ("sgl_eval", arm.get("sgl_eval"))):
            if score is None:
                continue
            interval = f"{score['low']:.4f}-{score['high']:.4f}"
            rate = f"{arm['tokens_per_second']:.1f}" if form == "completion" else "-"
            line = f"{arm['arm'][:40]:40} {form:10} {score['value']:8.4f} {interval:>16} {rate:>8}"
            if form in versus:
                gap = versus[form].get("logprob_difference")
                line += f" {versus[form]['agreement']:7.4f} {versus[form]['p_value']:10.4f}"
                line += f" {'-' if gap is None else f'{gap:.6f}':>9}"
            lines.append(line)
    for pair in report["pairs"]:
        differs = any(pair[form]["differs"] for form in ("completion", "sgl_eval") if form in pair)
        verb = "differ" if differs else "do not differ"
        lines.append(f"{pair['first']} and {pair['second']} {verb} by more than chance")
    for arm in report["arms"]:
        server = " ".join(f"{name}={value}" for name, value in arm["server"].items())
        lines += [f"{arm['arm']}: {arm['device']}; {_kernels(arm['kernels'])}", f"  {server}"]
    lines.append(" ".join(f"{name} {value}" for name, value in report["versions"].items() if value))
    return "\n".join([*lines, f"command: {report['command']}"])


def _arm(run: Run) -> dict[str, Any]:
    entry = {
        "arm": run.arm.text,
        "accuracy": _accuracy([a.correct for a in run.answers]),
        "prompt_tokens": sum(a.prompt_tokens for a in run.answers),
        **run.facts,
    }
    if run.chat:
        truncated = sum(a.truncated for a in run.chat)
        entry["sgl_eval"] = {**_accuracy([a.correct for a in run.chat]), "truncated": truncated}
    return entry


def _accuracy(correct: list[bool]) -> dict[str, Any]:
    score = accuracy(correct)
    return {"value": score.value, **asdict(score)}


def _pair(a: Run, b: Run) -> dict[str, Any]:
    pair: dict[str, Any] = {
        "first": a.arm.text,
        "second": b.arm.text,
        "completion": _compared(compare(a.answers, b.answers)),
    }
    if a.chat:
        pair["sgl_eval"] = _compared(paired(a.chat, b.chat))
    return pair


def _compared(found: Paired) -> dict[str, Any]:
    return {**asdict(found), "differs": found.differs}


def _kernels(lines: list[str]) -> str:
    """The implementations that ran each operation."""
    groups = defaultdict(list)
    for line in lines:
        operation, _, choice = line.partition(": ")
        groups[operation].append(choice.split(" ")[0])
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in groups.items()) or "kernels not in the log"
