"""The backends of a workload: the library's implementations, its own choice among them, and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import peers, registry
from benchmarks.workloads import Problem, workload

#: The dispatcher decides, as in the engine.
DEFAULT = "default"
#: The reference; timed only where asked for, or where nothing else can run.
REFERENCE = "torch"
ALL = "all"
#: Names that people know from other suites.
ALIASES = {
    "flashmla": "flash_mla",
    "flashattn_mla": "fa3",
    "flashinfer_mla": "flashinfer",
    "cutlass_mla": "cutlass",
    "deepgemm": "deep_gemm",
}


@dataclass(frozen=True)
class Backend:
    """run(inputs, poison) does the work once."""

    name: str
    run: Callable[[Any, bool], Any]


def is_own(name: str, kind: str) -> bool:
    """Whether the kernels of a workload's backend live in this repository; of "a+b", of both. A workload without an
    operation of the library has only peers, whatever their names."""
    pairs = _implementation_of(name, kind)
    return name not in (DEFAULT, REFERENCE) and bool(pairs) and all(registry.is_own(*pair) for pair in pairs)


def is_peer(name: str, kind: str) -> bool:
    return name not in (DEFAULT, REFERENCE) and not is_own(name, kind)


def names(kind: str) -> list[str]:
    """All backends of a workload, whether or not they can run here."""
    found = _implementations(kind)
    mixed = workload(kind).mixed
    return [*([DEFAULT] if found else []), *found, *mixed, *(n for n in peers.names(kind) if n not in found)]


def own_names(kind: str) -> list[str]:
    return [name for name in names(kind) if is_own(name, kind)]


def _implementations(kind: str) -> list[str]:
    """Names that implement every operation of a workload."""
    lists = [registry.implementations(operation) for operation in workload(kind).operations]
    return [n for n in lists[0] if all(n in other for other in lists[1:])] if lists else []


def _implementation_of(name: str, kind: str) -> list[tuple[str, str]]:
    """(operation, implementation) of each operation of a workload, for a backend "a" or "a+b"."""
    operations = workload(kind).operations
    parts = name.split("+") if name in workload(kind).mixed else [name] * len(operations)
    return list(zip(operations, parts, strict=True))


def choose(wanted: Sequence[str], kind: str, device: str) -> list[str]:
    """Those of the wanted backends that the workload has. "all" is every one; the reference is left out of it on a
    GPU."""
    everything = names(kind)
    chosen: list[str] = []
    for backend in wanted:
        if backend == ALL:
            chosen += [n for n in everything if n != REFERENCE or not device.startswith("cuda")]
        else:
            name = backend if backend in everything else ALIASES.get(backend, backend)
            chosen += [name] if name in everything else []
    return list(dict.fromkeys(chosen))


def check_names(wanted: Sequence[str], kinds: Sequence[str], what: str = "backends") -> None:
    """Raise ValueError for a name that none of the workloads has, with those that they have."""
    for name in wanted:
        if name != ALL and not any(choose([name], kind, "cpu") for kind in kinds):
            has = "; ".join(f"{kind} has {', '.join(names(kind))}" for kind in dict.fromkeys(kinds))
            raise ValueError(f"{what}={name!r}: expected {ALL} or a name that a workload has: {has}")


def unavailable(backend: str, kind: str, params: Mapping[str, Any], device: torch.device) -> str:
    """Why a backend cannot run a case here, as far as that can be said without its inputs; "" when it can.

    Raises ValueError for a name that the workload does not have.
    """
    check_names([backend], [kind], "backend")
    if _is_peer_function(backend, kind):
        return peers.unavailable(kind, backend, params, device)
    pairs = [] if backend == DEFAULT else _implementation_of(backend, kind)
    return next(filter(None, (registry.unavailable(*pair, str(device)) for pair in pairs)), "")


def _is_peer_function(backend: str, kind: str) -> bool:
    return backend in peers.names(kind) and backend not in _implementations(kind)


def resolve(backend: str, kind: str, problem: Problem) -> Backend:
    """The callable of a workload's backend, which can run here."""
    if _is_peer_function(backend, kind):
        call = peers.prepare(kind, backend, problem)
        return Backend(backend, lambda item, poison: call(item))
    impl = None if backend == DEFAULT else backend
    return Backend(backend, lambda item, poison: problem.run(impl, item, poison))
