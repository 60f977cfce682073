"""The choice among the implementations of an operation's function.

An implementation is one file in the operation's folder. It defines

    available(arch) -> Reason                can it run on this architecture, with the libraries installed here?
    <function>(call) -> result               the call's result, which the public function returns
    declines_<function>(call) -> Reason      optional: why not this call? Shapes, dtypes, strides; no device sync
    workspace_bytes_<function>(...) -> int   optional: scratch that suffices for every call of the given sizes

and nothing else needs to know about it: the file's name is the implementation's name (`reference.py` is `torch`).
`preferences.py` holds the order of preference, measured per architecture.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import pkgutil
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from nsa_backend_plugin import settings
from nsa_backend_plugin.ops import preferences, witness
from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Call, Declined, Reason, capturing

logger = logging.getLogger(__name__)

_PACKAGE = "nsa_backend_plugin.ops"
_REFERENCE = "reference"
#: Names of the implementations whose kernels are compiled here, and prepared by a call with `meta` tensors.
OWN = ("triton", "cuda", "wgmma", "union")
_external: dict[tuple[str, str], str] = {}  # (op, implementation) -> dotted path of a module outside ops/
P = ParamSpec("P")
R = TypeVar("R")


def register_external(op: str, name: str, module: str) -> None:
    """Add an implementation whose file may not live under ops/, because it imports the engine.

    module: its dotted path, imported when first asked for. Same contract as a file of the operation's folder.
    Raises ValueError for an unknown operation and for a name that is taken; the same call again changes nothing.
    """
    if op not in settings.OPERATIONS:
        raise ValueError(f"op={op!r}: expected one of {', '.join(settings.OPERATIONS)}")
    if _external.get((op, name)) == module:
        return
    if name in implementation_names(op):
        raise ValueError(f"name={name!r}: expected a name that {op} does not have yet")
    _external[op, name] = module
    forget()


@functools.cache
def implementation_names(op: str) -> tuple[str, ...]:
    """Names of all implementations of an operation: its folder's file names, and the registered external ones."""
    package = importlib.import_module(f"{_PACKAGE}.{op}")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    external = [name for owner, name in _external if owner == op]
    return (*("torch" if n == _REFERENCE else n for n in names), *external)


def module_path(op: str, name: str) -> str:
    """Dotted path of an implementation's module."""
    return _external.get((op, name), f"{_PACKAGE}.{op}.{_REFERENCE if name == 'torch' else name}")


@functools.cache
def _load(op: str, name: str) -> ModuleType | str:
    """The implementation's module, or why it cannot be imported."""
    path = module_path(op, name)
    try:
        return importlib.import_module(path)
    except Exception as error:  # a broken file or library must not take the other implementations with it
        return f"cannot import {path}: {type(error).__name__}: {error}"


@functools.cache
def _unavailable(op: str, name: str, arch: str) -> Reason:
    """Why an implementation cannot run on an architecture. Never raises."""
    module = _load(op, name)
    if isinstance(module, str):
        return module
    try:
        return module.available(arch)
    except Exception as error:  # as above: a launch that never uses this implementation must not end here
        return f"{module.__name__}.available raised {type(error).__name__}: {error}"


class _Candidate(NamedTuple):
    name: str
    run: Callable[[Any], Any]
    declines: Callable[[Any], Reason] | None


@dataclass(frozen=True)
class _Plan:
    """Who is asked, in order. why: what decided the order. reasons: who cannot run here at all."""

    candidates: tuple[_Candidate, ...]
    reasons: dict[str, str]
    why: str
    forced: bool


@dataclass(frozen=True)
class Verdict:
    """What the dispatcher makes of one implementation for one call."""

    name: str
    reason: Reason
    chosen: bool


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs a call, and why not each other one."""

    operation: str
    facts: str
    why: str
    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> str | None:
        return next((v.name for v in self.verdicts if v.chosen), None)

    def __str__(self) -> str:
        others = "; ".join(f"{v.name} {v.reason or 'comes later'}" for v in self.verdicts if not v.chosen)
        line = f"{self.operation}: {self.chosen or 'none'} for {self.facts} ({self.why})"
        return f"{line}; {others}" if others else line


class Operation(Generic[P, R]):
    """A public function: it builds a call from its arguments, and the implementation that wins runs it."""

    def __init__(self, build: Callable[P, Call[R]]):
        functools.update_wrapper(self, build)
        self.op = build.__module__.rpartition(".")[2]
        self.function = build.__name__
        self.name = f"{self.op}.{self.function}"
        #: The checked arguments as an object, without running it.
        self.call = build
        #: Its class.
        self.call_type: type[Call[R]] = typing.get_type_hints(build)["return"]
        self._variable = settings.impl_variable(self.op)
        self._forced: str | None = None  # the variable's value; read once, because a look-up costs a microsecond
        self._witness: witness.Witness | None = None
        self._plans: dict[tuple[str | None, str, int], _Plan] = {}
        self._heard: set[tuple[str, str]] = set()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.run(self.call(*args, **kwargs))

    def run(self, call: Call[R]) -> R:
        """Run the first implementation, in the order for this call, that takes it.

        Raises Declined where none does. On a GPU that includes torch inside a captured graph: it reads values on the
        host. Its first use on a GPU is a warning.
        """
        plan = self._plan(call)
        reasons = None
        for name, run, declines in plan.candidates:
            reason = declines(call) if declines else None
            if reason is None and name == "torch" and not plan.forced and capturing(call.device):
                reason = "it reads values on the host, which a CUDA graph cannot capture"
            if reason is None:
                if (name, "runs") not in self._heard:
                    self._say_first_use(name, call, plan)
                result = run(call)
                if self._witness is not None:
                    self._witness.look(name, call, result)
                return result
            reasons = reasons or {}
            reasons[name] = reason
            if (name, "declines") not in self._heard:
                self._heard.add((name, "declines"))
                logger.info("nsa_plugin op %s: %s declines %s: %s", self.name, name, _described(call), reason)
        how = "forced implementation cannot run" if plan.forced else "no implementation can run"
        raise Declined(f"{self.name}: {how}", {**plan.reasons, **(reasons or {})})

    def explain(self, call: Call[R]) -> Explanation:
        """What `run` would do with a call, for reports. Runs nothing; tensors on `meta` suffice (`arch.pretended`)."""
        plan = self._plan(call)
        verdicts, chosen = [], False
        for name, _, declines in plan.candidates:
            reason = declines(call) if declines else None
            verdicts.append(Verdict(name, reason, reason is None and not chosen))
            chosen = chosen or reason is None
        verdicts += [Verdict(name, reason, False) for name, reason in plan.reasons.items()]
        known = {v.name for v in verdicts}
        for name in () if plan.forced else self.implementations():
            if name not in known:
                reason = _unavailable(self.op, name, call.arch) or "available, not preferred"
                verdicts.append(Verdict(name, reason, False))
        return Explanation(self.name, _described(call), plan.why, tuple(verdicts))

    def prepare(self, call: Call[R]) -> None:
        """Compile and load what `run` would launch for a call with `meta` tensors, where the implementation is ours."""
        chosen = self.explain(call).chosen
        if chosen in OWN:
            getattr(_load(self.op, chosen), self.function)(call)

    def workspace_bytes(self, device: torch.device | str, **sizes: Any) -> int:
        """Largest scratch that any implementation available on the device asks for."""
        device = torch.device(device)
        needs = [0]
        for name in self.available(device):
            size = getattr(_load(self.op, name), f"workspace_bytes_{self.function}", None)
            needs.append(size(device=device, **sizes) if size else 0)
        return max(needs)

    def implementations(self) -> list[str]:
        """Names of the implementations that define this function, or cannot be imported to find out."""
        return [n for n in implementation_names(self.op) if self._defines(n)]

    def unavailable(self, name: str, device: torch.device | str) -> Reason:
        """Why an implementation cannot run on a device, whatever it is called with."""
        return _unavailable(self.op, name, device_arch(device))

    def available(self, device: torch.device | str) -> list[str]:
        """Names of the implementations that can run on a device, whatever is preferred or forced."""
        return [n for n in self.implementations() if self.unavailable(n, device) is None]

    def _defines(self, name: str) -> bool:
        module = _load(self.op, name)
        return isinstance(module, str) or hasattr(module, self.function)

    def _plan(self, call: Call[R]) -> _Plan:
        """The order for a call: cached, because a layer asks ten times."""
        if self._forced is None:
            self._read_settings()
        free = call.impl is None and not self._forced
        row = preferences.applying(self.name, call.arch, call.facts) if free else -1
        key = (call.impl, call.arch, row)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan(*key)
        return plan

    def _read_settings(self) -> None:
        self._forced = os.environ.get(self._variable, "").strip()
        if self.name in witness.watched():
            reference = _load(self.op, "torch")
            self._witness = witness.Witness(self.name, getattr(reference, self.function))

    def _make_plan(self, impl: str | None, arch: str, row: int) -> _Plan:
        names, why, forced = self._order(impl, arch, row)
        reasons, candidates = {}, []
        for name in names:
            reason = _unavailable(self.op, name, arch)
            module = _load(self.op, name)
            run = getattr(module, self.function, None)
            if reason is None and run is None:
                reason = f"has no {self.function}"
            if reason is not None:
                reasons[name] = reason
            elif run is not None:
                candidates.append(_Candidate(name, run, getattr(module, f"declines_{self.function}", None)))
        return _Plan(tuple(candidates), reasons, why, forced)

    def _order(self, impl: str | None, arch: str, row: int) -> tuple[list[str], str, bool]:
        """(names in order of preference, what decided it, whether nothing else may run)."""
        if impl is not None:
            return check_names(self.op, [impl], "impl"), "forced by impl", True
        if self._forced:
            return _forced_names(self.op), f"forced by {self._variable}", True
        if arch == "cpu":
            return ["torch"], "rule: torch on a CPU", False
        preferred = preferences.TABLE[row] if row >= 0 else None
        names = [*(preferred.order if preferred else ()), "triton", "torch"]
        defined = self.implementations()
        return (
            [n for n in dict.fromkeys(names) if n in defined],
            preferred.source if preferred else "rule: Triton, then torch",
            False,
        )

    def _say_first_use(self, name: str, call: Call[R], plan: _Plan) -> None:
        self._heard.add((name, "runs"))
        slow = name == "torch" and call.arch != "cpu" and not plan.forced
        logger.log(
            logging.WARNING if slow else logging.INFO,
            "nsa_plugin op %s: %s runs %s (%s)%s",
            *(self.name, name, _described(call), plan.why),
            ", the slow reference: no faster implementation can run this call" if slow else "",
        )


def operation(build: Callable[P, Call[R]]) -> Operation[P, R]:
    """Decorator of a function that checks arguments and returns their Call: makes it the operation's public function.

    The function takes `step` and `impl` among its arguments and hands them to the Call.
    """
    return Operation(build)


def _described(call: Call) -> str:
    return " ".join(f"{name}={value}" for name, value in call.facts().items())


def check_names(op: str, names: Iterable[str], argument: str) -> list[str]:
    """Refuse implementation names that the operation does not have, listing the valid ones."""
    valid = implementation_names(op)
    for name in names:
        if name not in valid:
            raise ValueError(f"{argument}={name!r}: expected one of {', '.join(valid)}")
    return list(names)


def operations() -> list[Operation]:
    """Every public function of every operation, in the order of `settings.OPERATIONS`."""
    modules = [importlib.import_module(f"{_PACKAGE}.{op}") for op in settings.OPERATIONS]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Operation)]


def _forced_names(op: str) -> list[str]:
    variable = settings.impl_variable(op)
    wanted = settings.get(variable)
    assert isinstance(wanted, tuple)
    return check_names(op, wanted, variable)


def validate_forced() -> None:
    """Check the names in all NSA_PLUGIN_<OP>_IMPL variables, and in NSA_PLUGIN_WITNESS."""
    for op in settings.OPERATIONS:
        _forced_names(op)
    valid = [operation.name for operation in operations()]
    for name in witness.watched():
        if name not in valid:
            raise ValueError(f"NSA_PLUGIN_WITNESS={name!r}: expected some of {', '.join(valid)}")


def require_forced(device: torch.device | str) -> None:
    """Raise ValueError when a forced implementation can run no function of its operation on this device."""
    arch = device_arch(device)
    for op in settings.OPERATIONS:
        verdicts = {name: _unavailable(op, name, arch) for name in _forced_names(op)}
        if verdicts and None not in verdicts.values():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in verdicts.items())
            raise ValueError(f"{settings.impl_variable(op)}={','.join(verdicts)}: cannot run on {arch} ({reasons})")


def forget() -> None:
    """Drop what is cached about implementations, preferences and forced names: files or the environment changed."""
    caches = (implementation_names, _load, _unavailable, preferences.rows, probe.missing, probe.missing_parameters)
    for cached in caches:
        cached.cache_clear()
    forget_plans()


def forget_plans() -> None:
    """Drop the choices alone."""
    for op in operations():
        op._forced = op._witness = None
        op._plans.clear()
        op._heard.clear()
