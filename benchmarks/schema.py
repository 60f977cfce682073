"""YAML configurations: what to measure, expanded into cases.

description: ...           what question the file answers
mode: sweep                or decode_vs_prefill
workload: sparse_decode    a name of workloads.WORKLOADS
backends: [all]            or names
params: {tokens: [1, 8], heads: 16}      lists make all combinations, the last one varying fastest
batch_specs: [8q1s1k, {template: ...}]   becomes the parameter batch_spec
targets: [{when: {heads: [8, 16]}, by: tokens, us: {1: 7, 8: 10.5}, vs_peer: 1.15, note: ...}]
unit: us                   or GB/s, what large tables of RESULTS.md show
repeats, warmup_iters, budget_s, baseline
runs: [...]                several of the above in one file; each inherits the top level
quick: {...}               what --quick replaces (top level, or inside a run)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.batch_spec import expand_batch_specs
from benchmarks.common import BenchmarkResult
from benchmarks.workloads import workload

_KEYS = {
    "name",
    "description",
    "mode",
    "workload",
    "backends",
    "params",
    "batch_specs",
    "targets",
    "repeats",
    "warmup_iters",
    "budget_s",
    "baseline",
    "unit",
    "runs",
    "quick",
}
MODES = ("sweep", "decode_vs_prefill")
UNITS = ("us", "GB/s")


@dataclass(frozen=True)
class Case:
    """One shape of one workload, and the backends to measure on it.

    Goals for our own fastest implementation: microseconds, and time over the best peer's.
    """

    workload: str
    params: Mapping[str, Any]
    backends: tuple[str, ...]
    target_us: float | None = None
    target_vs_peer: float | None = None
    note: str = ""


@dataclass
class Config:
    name: str
    cases: list[Case]
    description: str = ""
    mode: str = "sweep"
    repeats: int = 9
    warmup_iters: int = 3
    budget_s: float = 0.6
    baseline: str = ""
    unit: str = "us"
    overrides: dict[str, Any] = field(default_factory=dict)


def load(path: str | Path, quick: bool = False) -> Config:
    """Read a YAML file. Raises ValueError that names the file and the key."""
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: not a YAML file: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name}: expected keys at the top level")
    try:
        return from_mapping({"name": path.stem, **content}, quick)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def from_mapping(content: Mapping[str, Any], quick: bool = False) -> Config:
    """A configuration from parsed YAML or from the command line."""
    top = _quickened(content, quick)
    runs = top.pop("runs", None) or [{}]
    cases: list[Case] = []
    for run in runs:
        run = _quickened(run, quick)
        params = {**top.get("params", {}), **run.get("params", {})}
        cases += _cases({**top, **run, "params": params})
    mode = top.get("mode", "sweep")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if top.get("unit", "us") not in UNITS:
        raise ValueError(f"unit={top['unit']!r}: expected one of {', '.join(UNITS)}")
    plain = {k: top[k] for k in ("description", "repeats", "warmup_iters", "budget_s", "baseline", "unit") if k in top}
    return Config(name=str(top.get("name", "custom")), cases=cases, mode=mode, **plain)


def unmeasured(config: Config, results: Iterable[BenchmarkResult]) -> list[Case]:
    """The cases of a configuration of which a results file has no row: the configuration grew since."""
    have = {_case_key(r.workload, r.params) for r in results}
    return [case for case in config.cases if _case_key(case.workload, case.params) not in have]


def _case_key(name: str, params: Mapping[str, Any]) -> str:
    return f"{name} {sorted(workload(name).complete(params).items())}"


def _quickened(content: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        raise ValueError(f"key {unknown[0]!r}: expected one of {', '.join(sorted(_KEYS))}")
    result = {k: v for k, v in content.items() if k != "quick"}
    if quick:
        small = dict(content.get("quick", {}))
        result["params"] = {**result.get("params", {}), **small.pop("params", {})}
        result.update(small)
    return result


def _cases(run: Mapping[str, Any]) -> list[Case]:
    if "workload" not in run:
        raise ValueError("key 'workload' is missing")
    for key in ("backends", "batch_specs"):
        if not isinstance(run.get(key, []), (list, tuple)):
            raise ValueError(f"{key}={run[key]!r}: expected a list")
    kind = workload(run["workload"])
    choices = {k: v if isinstance(v, list) else [v] for k, v in run["params"].items()}
    if "batch_specs" in run:
        choices = {"batch_spec": expand_batch_specs(run["batch_specs"]), **choices}
    empty = [k for k, v in choices.items() if not v]
    if empty:
        raise ValueError(f"{empty[0]}=[]: expected at least one value")
    cases = []
    for values in itertools.product(*choices.values()):
        params = dict(zip(choices, values, strict=True))
        kind.complete(params)  # refuses unknown parameters
        goal = _target(run.get("targets", ()), params)
        cases.append(Case(kind.name, params, tuple(run.get("backends", ("all",))), **goal))
    return cases


def _target(targets: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> dict[str, Any]:
    """The first target whose `when` matches the case; one with `us` must also have a time for it."""
    for target in targets:
        when = {k: v if isinstance(v, list) else [v] for k, v in target.get("when", {}).items()}
        if not all(params.get(k) in allowed for k, allowed in when.items()):
            continue
        goal = {"target_us": None, "target_vs_peer": target.get("vs_peer"), "note": str(target.get("note", ""))}
        if "us" in target:
            goal["target_us"] = target["us"].get(params.get(target["by"]))
        if goal["target_us"] is not None or goal["target_vs_peer"] is not None:
            return goal
    return {}
