"""What to measure: one schema for YAML files and the command line, expanded into cases.

description: ...           what question the file answers
mode: sweep                or decode_vs_prefill
workload: sparse_decode    a name of workloads.WORKLOADS
backends: [all]            or names
params: {tokens: [1, 8], heads: 16}      lists make all combinations, the last one varying fastest
batch_specs: [8q1s1k, {template: ...}]   becomes the parameter batch_spec
targets: [{when: {heads: [8, 16]}, by: tokens, us: {1: 7, 8: 10.5}, vs_peer: 1.15, note: ...}]
unit: us                   or GB/s, what large tables of RESULTS.md and pictures show
plot: {x: q_len, lines: [pipeline], where: {heads: 16}}     what --plot draws, see Picture
repeats, warmup_iters, budget_s, baseline
runs: [...]                several of the above in one file; each inherits the top level
quick: {...}               what --quick replaces (top level, or inside a run)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from benchmarks.batch_spec import expand_batch_specs
from benchmarks.checked import Model, Positive, check
from benchmarks.common import BenchmarkResult
from benchmarks.workloads import workload


class Settings(Model):
    """How to measure. budget_s: about how long the samples of one row may take."""

    repeats: Annotated[int, Field(ge=1, le=100_000)] = 9
    warmup_iters: Annotated[int, Field(ge=0, le=100_000)] = 3
    budget_s: Annotated[float, Field(ge=0)] = 0.6
    profile_memory: bool = False


class Target(Model):
    """A goal of the cases whose parameters are among `when`: us[params[by]], and a time over the best peer's."""

    when: dict[str, Any] = Field(default_factory=dict)
    by: str | None = None
    us: dict[int | str, Positive] = Field(default_factory=dict)
    vs_peer: Positive | None = None
    note: str = ""

    @model_validator(mode="after")
    def _says_what(self) -> Target:
        if bool(self.us) != (self.by is not None):
            raise ValueError("'by' names the parameter whose values are the keys of 'us': expected both or none")
        if not self.us and self.vs_peer is None:
            raise ValueError("expected 'us' or 'vs_peer'")
        return self

    def goal(self, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """Fields of a Case, or None when this target has nothing to say about it."""
        allowed = {k: v if isinstance(v, list) else [v] for k, v in self.when.items()}
        us = self.us.get(params.get(self.by)) if self.by else None  # type: ignore[arg-type]
        if any(params.get(k) not in v for k, v in allowed.items()) or (us is None and self.vs_peer is None):
            return None
        return {"target_us": us, "target_vs_peer": self.vs_peer, "note": self.note}


class Picture(Model):
    """What --plot draws. x: the parameter (or batch, q_len, context of a batch spec) of the horizontal axis. lines:
    parameters that make lines of one panel beside the backends; all others make panels. where: which cases."""

    x: str | None = None
    lines: list[str] = Field(default_factory=list)
    where: dict[str, Any] = Field(default_factory=dict)


class Part(Model):
    """What a run may set, and what `quick` may replace."""

    workload: str | None = None
    backends: list[str] = Field(default_factory=lambda: ["all"])
    params: dict[str, Any] = Field(default_factory=dict)
    batch_specs: list[Any] | None = None
    targets: list[Target] = Field(default_factory=list)

    @field_validator("batch_specs")
    @classmethod
    def _expanded(cls, entries: list[Any] | None) -> list[str] | None:
        return entries and expand_batch_specs(entries)

    @field_validator("params")
    @classmethod
    def _not_empty(cls, params: dict[str, Any]) -> dict[str, Any]:
        for name, value in params.items():
            if value == []:
                raise ValueError(f"{name}=[]: expected at least one value")
        return params

    def over(self, below: Part) -> dict[str, Any]:
        """What is set here, else what is set below; parameters one by one."""
        given = {k: getattr(part, k) for part in (below, self) for k in part.model_fields_set if k in Part.model_fields}
        return {**given, "params": {**below.params, **self.params}}


class Run(Part):
    quick: Part | None = None

    def sized(self, quick: bool) -> Part:
        return Part.model_construct(**self.quick.over(self)) if quick and self.quick else self


class File(Run, Settings):
    """A whole file, or what a command line asks for."""

    name: str = "custom"
    description: str = ""
    mode: Literal["sweep", "decode_vs_prefill"] = "sweep"
    unit: Literal["us", "GB/s"] = "us"
    baseline: str = ""
    plot: Picture = Field(default_factory=Picture)
    runs: list[Run] = Field(default_factory=list)


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
    baseline: str = ""
    unit: str = "us"
    plot: Picture = field(default_factory=Picture)
    settings: Settings = field(default_factory=Settings)


def load(path: str | Path, quick: bool = False) -> Config:
    """Read a YAML file. Raises ValueError that names the file and the key."""
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name}: expected keys at the top level")
    try:
        return from_mapping({"name": path.stem, **content}, quick)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def from_mapping(content: Mapping[str, Any], quick: bool = False, names: Mapping[str, str] | None = None) -> Config:
    """A configuration from parsed YAML or from the command line. names: see `checked.check`."""
    file = check(File, content, names)
    top = file.sized(quick)
    cases = [case for run in file.runs or [Run()] for case in _cases(run.sized(quick).over(top), names)]
    settings = Settings(**{name: getattr(file, name) for name in Settings.model_fields})
    return Config(file.name, cases, file.description, file.mode, file.baseline, file.unit, file.plot, settings)


def unmeasured(config: Config, results: Iterable[BenchmarkResult]) -> list[Case]:
    """The cases of a configuration of which a results file has no row: the configuration grew since."""
    have = {_case_key(r.workload, r.params) for r in results}
    return [case for case in config.cases if _case_key(case.workload, case.params) not in have]


def _case_key(name: str, params: Mapping[str, Any]) -> str:
    return f"{name} {sorted(workload(name).complete(params).items())}"


def _cases(run: Mapping[str, Any], names: Mapping[str, str] | None) -> list[Case]:
    if run.get("workload") is None:
        raise ValueError("key 'workload' is missing")
    kind = workload(run["workload"])
    choices = {k: v if isinstance(v, list) else [v] for k, v in run["params"].items()}
    if run.get("batch_specs"):
        choices = {"batch_spec": run["batch_specs"], **choices}
    cases = []
    for values in itertools.product(*choices.values()):
        params = dict(zip(choices, values, strict=True))
        kind.checked(params, names)
        goals = filter(None, (target.goal(params) for target in run.get("targets", ())))
        goal: dict[str, Any] = next(goals, {})
        cases.append(Case(kind.name, params, tuple(run.get("backends", ("all",))), **goal))
    return cases


def check_device(device: str) -> None:
    """Raise ValueError unless torch has the device."""
    import torch

    if device != "cpu" and not re.fullmatch(r"cuda(:[0-9]+)?", device):
        raise ValueError(f"--device={device}: expected cpu, cuda or cuda:N")
    index = int(device.partition(":")[2] or 0)
    if device != "cpu" and index >= torch.cuda.device_count():
        raise ValueError(f"--device={device}: torch sees {torch.cuda.device_count()} GPUs here")
