"""Report versions, device, entry points, kernels, settings and hooks; say what is wrong and what to do.

Exit code 0 when `--attention-backend nsa_plugin` can work here, 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import metadata, util
from typing import Any, TypeVar

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.environment import installed_version

T = TypeVar("T")

PLUGINS_GROUP = "sglang.srt.plugins"
PLATFORMS_GROUP = "sglang.srt.platforms"
PLUGIN, PLATFORM = BACKEND_NAME, "nsa_plugin_cpu"
_DISTRIBUTION = "nsa-backend-plugin"
_SUPPORTED_RELEASE = "install a supported SGLang release, see the table in README.md"
_KERNEL_LIBRARIES = ("sgl_kernel", "deep_gemm", "flash_mla", "flashinfer", "tilelang", "aiter")


class Problems(list[dict[str, str]]):
    """What is wrong, each with what to do."""

    def add(self, problem: str, todo: str) -> None:
        self.append({"problem": problem, "todo": todo})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable report")


def run(options: argparse.Namespace) -> int:
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # SGLang's modules warn and print when imported
        warnings.simplefilter("ignore")
        report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 1 if report["problems"] else 0


def collect() -> dict[str, Any]:
    """The whole report as plain data; `problems` is empty when everything is right. Never raises: what a broken
    installation raises is a problem."""
    problems = Problems()
    report: dict[str, Any] = {"python": f"{sys.version.split()[0]} ({sys.executable})", "versions": versions()}
    found = report["versions"]
    server = start_import() if found["torch"] and found["sglang"] else None
    attempt("versions", problems, check_versions, found, problems)
    report["device"] = on = attempt("torch", problems, device) if found["torch"] else None
    on_cpu = on is not None and on["arch"] == "cpu"
    report["entry_points"] = entry_points(os.environ, on_cpu, problems)
    report["settings"] = settings_in_force(problems)
    report["operations"] = (on and attempt("operations", problems, operations, on["device"], problems)) or []
    report["hooks"] = (server and attempt("hooks", problems, hooks, on_cpu, problems)) or []
    report["aiter"] = attempt("AITER", problems, aiter_contract, found, on, problems)
    if server:
        check_import(server, problems)
    report["problems"] = list(problems)
    return report


def attempt(what: str, problems: Problems, check: Callable[..., T], *arguments: Any) -> T | None:
    """The result of a check. What it raises becomes a problem: the doctor is asked where things are broken."""
    try:
        return check(*arguments)
    except Exception as error:
        problems.add(f"{what}: {type(error).__name__}: {error}", f"repair what it names, for {sys.executable}")
        return None


def start_import() -> subprocess.Popen[str]:
    """A process that imports what a server with our backend imports, while the rest is checked."""
    code = "import sglang.launch_server, sglang.srt.managers.scheduler"
    return subprocess.Popen(
        [sys.executable, "-c", code, f"--attention-backend={BACKEND_NAME}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_import(server: subprocess.Popen[str], problems: Problems) -> None:
    """No server starts without what SGLang imports: transformers and some thirty more."""
    words = server.communicate()[1].strip().splitlines() or ["no message"]
    if server.returncode:
        problems.add(
            f"SGLang's server does not import (exit code {server.returncode}): {words[-1]}",
            f"install what it names for {sys.executable}",
        )


def versions() -> dict[str, str | None]:
    """Installed version by module name; None when not installed."""
    distributions = metadata.packages_distributions()
    found: dict[str, str | None] = {_DISTRIBUTION: installed_version(_DISTRIBUTION)}
    for module in ("sglang", "torch", "triton", "transformers", *_KERNEL_LIBRARIES):
        installed = util.find_spec(module) is not None
        names = distributions.get(module, [module])
        found[module] = next(filter(None, map(installed_version, names)), "unknown version") if installed else None
    return found


def check_versions(found: Mapping[str, str | None], problems: Problems) -> None:
    python = sys.executable
    if not found["torch"]:
        problems.add("torch is not installed", f"install the torch build of your device for {python}")
    if not found["sglang"]:
        problems.add("sglang is not installed", f"install SGLang for {python}, or run doctor with SGLang's Python")
    else:
        from nsa_backend_plugin.engine import release

        try:
            release.require_supported()
        except ValueError as error:
            problems.add(str(error), _SUPPORTED_RELEASE)


def device() -> dict[str, str | int]:
    """The device that SGLang would use first."""
    import torch

    from nsa_backend_plugin.ops.arch import device_arch, fp8_dtype

    name = "cuda:0" if torch.cuda.is_available() else "cpu"
    return {
        "device": name,
        "name": torch.cuda.get_device_name(0) if name != "cpu" else "CPU",
        "count": torch.cuda.device_count(),
        "arch": device_arch(name),
        "fp8": str(fp8_dtype(name)).removeprefix("torch."),
    }


def entry_points(environment: Mapping[str, str], on_cpu: bool, problems: Problems) -> list[dict[str, Any]]:
    """Whether SGLang's loader will load our two entry points.

    Its rules: a non-empty SGLANG_PLUGINS lists the only names loaded, in both groups; SGLANG_PLATFORM selects one
    platform by name (SGLANG_PLUGINS is then not asked for it) and skips the plugins of every other package that
    provides a platform, which this one does.
    """
    listed = environment.get("SGLANG_PLUGINS", "")
    allowed = {name.strip() for name in listed.split(",")}
    selected = environment.get("SGLANG_PLATFORM", "")
    rows = []
    for group, name in ((PLUGINS_GROUP, PLUGIN), (PLATFORMS_GROUP, PLATFORM)):
        wanted = group == PLUGINS_GROUP or on_cpu
        reason, todo = "", ""
        points = [p for p in metadata.entry_points(group=group) if p.name == name]
        if not points:
            reason, todo = (
                "the package's metadata is missing",
                f"from a clone: {sys.executable} -m pip install --no-deps .",
            )
        elif selected and selected != PLATFORM:
            reason = f"SGLANG_PLATFORM={selected} skips packages with another platform"
            todo = f"unset SGLANG_PLATFORM, or set it to {PLATFORM} on a machine without a GPU"
        elif listed and name not in allowed and not (selected and group == PLATFORMS_GROUP):
            reason = f"SGLANG_PLUGINS={listed} does not list it"
            todo = f"add {name} to SGLANG_PLUGINS, or unset it"
        else:
            try:
                points[0].load()
            except Exception as error:
                reason = f"loading {points[0].value} failed: {type(error).__name__}: {error}"
                todo = f"reinstall {_DISTRIBUTION}; SGLang logs this error and goes on without the plugin"
        if reason and wanted:
            problems.add(f"SGLang will not load the entry point {name} of {group}: {reason}", todo)
        rows.append({"group": group, "name": name, "loaded": not reason, "needed": wanted, "reason": reason})
    if selected == PLATFORM and not on_cpu:
        problems.add(f"SGLANG_PLATFORM={PLATFORM} on a machine with a GPU stops SGLang", "unset SGLANG_PLATFORM")
    return rows


def settings_in_force(problems: Problems) -> list[dict[str, str]]:
    """Every setting with its raw value and where that comes from; bad values and unknown names are problems."""
    from nsa_backend_plugin import settings

    rows, values = [], {}
    for name, setting in settings.SETTINGS.items():
        raw = os.environ.get(name, "").strip()
        source = "environment" if raw else "default"
        rows.append({"name": name, "value": raw or setting.default, "source": source})
        try:
            values[name] = settings.get(name)
        except ValueError as error:
            problems.add(str(error), f"correct or unset {name}; ENVS.md lists the values")
    for name in settings.unknown():
        problems.add(f"unknown setting {name}={os.environ[name]!r}", f"unset {name}; ENVS.md lists the valid names")
    if values.get("NSA_PLUGIN_DISABLE") is True:
        problems.add("NSA_PLUGIN_DISABLE is on: the backend name is not registered", "unset NSA_PLUGIN_DISABLE")
    return rows


def operations(arch: str, problems: Problems) -> list[dict[str, Any]]:
    """What runs each function for the calls that typical models make: chosen or declined, and why."""
    from nsa_backend_plugin.engine import kernels
    from nsa_backend_plugin.runtime import served

    kernels.register()
    rows: list[dict[str, Any]] = []
    for model_name, model in served.examples(arch).items():
        try:
            explained = list(served.explanations(model, served.TYPICAL, arch))
        except ValueError as error:  # a forced name that does not exist, or a setting reported above
            problems.add(str(error), "correct or unset the variable")
            continue
        for step, e in explained:
            row = {
                "operation": e.operation,
                "chosen": e.chosen,
                "why": e.why,
                "declined": {v.name: v.reason for v in e.verdicts if v.reason is not None},
            }
            same = next((r for r in rows if all(r[key] == value for key, value in row.items())), None)
            if same is None:
                rows.append(same := {**row, "served": []})
                if e.chosen is None:
                    problems.add(f"no implementation runs {e}", "force none, or one that can run")
            same["served"].append(f"{model_name}, {step}")
    return rows


def aiter_contract(
    found: Mapping[str, str | None], device: Mapping[str, Any] | None, problems: Problems
) -> list[str] | None:
    """On a ROCm host with AITER: where its functions do not take what our adapters pass. None elsewhere."""
    if device is None or not device["arch"].startswith("gfx") or not found["aiter"]:
        return None
    from nsa_backend_plugin.ops._vendor import aiter_contract

    mismatches = aiter_contract.check_installed()
    for mismatch in mismatches:
        problems.add(
            f"AITER {found['aiter']} differs from {aiter_contract.TARGET}: {mismatch}",
            "install an AITER that fits, or keep off it: NSA_PLUGIN_<OPERATION>_IMPL=triton",
        )
    return mismatches


def hooks(on_cpu: bool, problems: Problems) -> list[dict[str, Any]]:
    """Every hook into SGLang and whether the installed release has its target; a missing one is a problem only where
    the hook is used. GPU modules of SGLang do not import without GPU libraries."""
    from nsa_backend_plugin.engine import contract
    from nsa_backend_plugin.engine.ledger import LEDGER

    for name in contract.missing():
        problems.add(f"the installed SGLang has no attribute {name}, which the plugin reads", _SUPPORTED_RELEASE)

    rows = []
    for row in LEDGER:
        needed = row.needed() and not row.stage.startswith("gpu" if on_cpu else "cpu")
        exists = row.target_exists
        rows.append(
            {
                "name": row.name,
                "kind": row.kind,
                "target": row.path,
                "stage": row.stage,
                "needed": needed,
                "exists": exists,
                "patched": row.patched,
            }
        )
        if needed and not exists:
            problems.add(f"hook {row.name}: the installed SGLang has no {row.path}", _SUPPORTED_RELEASE)
    return rows


def render(report: Mapping[str, Any]) -> str:
    """The report as text."""
    lines = [f"python      {report['python']}"]
    lines += [f"{name:<20} {version or 'not installed'}" for name, version in report["versions"].items()]
    if report["device"]:
        d = report["device"]
        lines += ["", f"device      {d['device']}: {d['name']}, arch {d['arch']}, fp8 {d['fp8']}, {d['count']} GPU(s)"]
    lines += ["", "entry points"]
    for e in report["entry_points"]:
        verdict = "loaded by SGLang" if e["loaded"] else f"not loaded: {e['reason']}"
        lines.append(f"  {e['group']}: {e['name']}: {verdict}")
    lines += ["", "operations"]
    for o in report["operations"]:
        lines.append(f"  {o['operation']}: {o['chosen'] or 'none'} ({o['why']})")
        lines.append(f"    for {'; '.join(o['served'])}")
        lines += [f"    {name}: {reason}" for name, reason in o["declined"].items()]
    lines += ["", "settings"]
    lines += [f"  {s['name']}={s['value']} ({s['source']})" for s in report["settings"]]
    lines += ["", "hooks"]
    for h in report["hooks"]:
        verdict = "ok" if h["exists"] else "missing" if h["needed"] else "missing, not needed here"
        if h["patched"]:
            verdict = "stands down: its patch is applied"
        lines.append(f"  {h['name']} ({h['kind']}, {h['stage']}): {h['target']}: {verdict}")
    if report["aiter"] is not None:
        lines += ["", f"aiter       {len(report['aiter'])} of its functions' parameters differ from what we pass"]
    lines += ["", f"{len(report['problems'])} problem(s)"]
    for p in report["problems"]:
        lines += [f"  {p['problem']}", f"    -> {p['todo']}"]
    return "\n".join(lines)
