"""Implementations of an operation: which exist, whether each can run here and why not, which one wins.

An implementation is one file in the operation's folder. It defines

    available(arch) -> Support           can it run on this architecture, with the libraries installed here?
    <function>(...)                      the public function's arguments, without `impl`
    accepts_<function>(...) -> Support   optional: does it take this call? Shapes and dtypes only, no device sync

and nothing else needs to know about it: the file's name is the implementation's name (`reference.py` is `torch`).
`preferences.py` holds the order of preference, measured per architecture.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch

from nsa_backend_plugin import settings
from nsa_backend_plugin.ops import preferences
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.support import Support

logger = logging.getLogger(__name__)

_PACKAGE = "nsa_backend_plugin.ops"
_REFERENCE = "reference"
_external: dict[tuple[str, str], str] = {}  # (op, implementation) -> dotted path of a module outside ops/


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
    implementation_names.cache_clear()


@functools.cache
def implementation_names(op: str) -> tuple[str, ...]:
    """Names of all implementations of an operation: its folder's file names, and the registered external ones."""
    package = importlib.import_module(f"{_PACKAGE}.{op}")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    external = [name for owner, name in _external if owner == op]
    return (*("torch" if n == _REFERENCE else n for n in names), *external)


@functools.cache
def _load(op: str, name: str) -> ModuleType | Support:
    """The implementation's module, or why it cannot be imported."""
    file = _REFERENCE if name == "torch" else name
    try:
        return importlib.import_module(_external.get((op, name), f"{_PACKAGE}.{op}.{file}"))
    except ImportError as error:
        return Support(False, f"cannot import {error.name or file}: {error}")


@functools.cache
def _available(op: str, name: str, arch: str) -> Support:
    module = _load(op, name)
    return module if isinstance(module, Support) else module.available(arch)


@dataclass(frozen=True)
class Candidate:
    """One implementation as the registry sees it for a device and a shape."""

    name: str
    support: Support
    chosen: bool


class Operation:
    """One public function of an operation and the choice among its implementations."""

    all: ClassVar[dict[str, Operation]] = {}

    def __init__(self, op: str, function: str):
        self.op = op
        self.function = function
        self.name = f"{op}.{function}"
        Operation.all[self.name] = self

    def __call__(
        self, impl: str | None, device: torch.device, shape: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run the implementation that wins for this device, shape and argument list."""
        names, forced = self._order(impl, device_arch(device), shape)
        declined = []
        for name in names:
            support = self._support(name, device_arch(device), args, kwargs)
            if support.ok:
                return getattr(_load(self.op, name), self.function)(*args, **kwargs)
            declined.append(f"{name}: {support.reason}")
        how = "forced implementation cannot run" if forced else "no implementation can run"
        raise ValueError(f"{self.name}: {how} ({'; '.join(declined)})")

    def candidates(self, device: torch.device | str, shape: Mapping[str, Any] | None = None) -> list[Candidate]:
        """Every implementation with its verdict, in order of preference, for reports.

        Without arguments at hand only `available` is asked; the winner of a single call may differ by shape.
        """
        arch = device_arch(device)
        order, forced = self._order(None, arch, shape or {})
        rest = [] if forced else [n for n in self.implementations() if n not in order]
        rows, won = [], False
        for name in [*order, *rest]:
            support = self._support(name, arch)
            chosen = support.ok and not won and name in order
            won = won or chosen
            rows.append(Candidate(name, support, chosen))
        return rows

    def workspace_bytes(self, device: torch.device | str, **sizes: Any) -> int:
        """Largest scratch that any implementation available on the device asks for.

        An implementation with scratch defines `workspace_bytes_<function>(device=..., **sizes) -> int`.
        """
        device = torch.device(device)
        needs = [0]
        for name in self.implementations():
            if _available(self.op, name, device_arch(device)).ok:
                size = getattr(_load(self.op, name), f"workspace_bytes_{self.function}", None)
                needs.append(size(device=device, **sizes) if size else 0)
        return max(needs)

    def implementations(self) -> list[str]:
        """Names of the implementations that define this function."""
        return [n for n in implementation_names(self.op) if self._defines(n)]

    def _defines(self, name: str) -> bool:
        module = _load(self.op, name)
        return isinstance(module, Support) or hasattr(module, self.function)

    def _support(self, name: str, arch: str, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Support:
        support = _available(self.op, name, arch)
        if not support.ok:
            return support
        module = _load(self.op, name)
        if not hasattr(module, self.function):
            return Support(False, f"has no {self.function}")
        accepts = getattr(module, f"accepts_{self.function}", None)
        if accepts is not None and args:
            return accepts(*args, **(kwargs or {}))
        return support

    def _order(self, impl: str | None, arch: str, shape: Mapping[str, Any]) -> tuple[list[str], bool]:
        if impl is not None:
            return check_names(self.op, [impl], "impl"), True
        variable = settings.impl_variable(self.op)
        wanted = settings.get(variable)
        if wanted:
            assert isinstance(wanted, tuple)
            return check_names(self.op, wanted, variable), True
        order = list(preferences.order(self.name, arch, shape))
        order += [n for n in ("triton", "torch") if n not in order]
        return [n for n in order if n in self.implementations()], False


def check_names(op: str, names: Iterable[str], argument: str) -> list[str]:
    """Refuse implementation names that the operation does not have, listing the valid ones."""
    valid = implementation_names(op)
    for name in names:
        if name not in valid:
            raise ValueError(f"{argument}={name!r}: expected one of {', '.join(valid)}")
    return list(names)


def operations() -> list[Operation]:
    """Every public function of every operation, in the order of `settings.OPERATIONS`."""
    for op in settings.OPERATIONS:
        importlib.import_module(f"{_PACKAGE}.{op}")
    return sorted(Operation.all.values(), key=lambda o: settings.OPERATIONS.index(o.op))


def validate_forced() -> None:
    """Check the names in all NSA_PLUGIN_<OP>_IMPL variables."""
    for op in settings.OPERATIONS:
        variable = settings.impl_variable(op)
        wanted = settings.get(variable)
        assert isinstance(wanted, tuple)
        check_names(op, wanted, variable)


def require_forced(device: torch.device | str) -> None:
    """Raise ValueError when a forced implementation can run no function of its operation on this device."""
    for op in settings.OPERATIONS:
        variable = settings.impl_variable(op)
        wanted = settings.get(variable)
        assert isinstance(wanted, tuple)
        verdicts = {name: _available(op, name, device_arch(device)) for name in check_names(op, wanted, variable)}
        if verdicts and not any(v.ok for v in verdicts.values()):
            reasons = "; ".join(f"{name}: {v.reason}" for name, v in verdicts.items())
            raise ValueError(f"{variable}={','.join(wanted)}: cannot run on {device_arch(device)} ({reasons})")


def report(device: torch.device | str) -> list[str]:
    """One line per operation: the winner, and why each other implementation declined."""
    lines = []
    for operation in operations():
        rows = operation.candidates(device)
        winner = next((r.name for r in rows if r.chosen), "none")
        others = "; ".join(
            f"{r.name} {'available' if r.support.ok else r.support.reason}" for r in rows if not r.chosen
        )
        lines.append(f"{operation.name}: {winner}" + (f" ({others})" if others else ""))
    return lines
