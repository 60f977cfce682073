"""The backends of a workload: the registry's implementations, the registry's own choice, and peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import peers
from benchmarks.workloads import Problem, workload
from nsa_backend_plugin.engine import kernels
from nsa_backend_plugin.ops.registry import operations

kernels.register()

#: The registry decides, as in the engine.
DEFAULT = "default"
#: The reference; timed only where asked for, or where nothing else can run.
REFERENCE = "torch"
#: Implementations written in this repository; everything else (but the two above) is a peer.
OWN = ("triton", "cuda", "tilelang")
#: Names that people know from other suites.
ALIASES = {
    "flashmla": "flash_mla",
    "flashattn_mla": "fa3",
    "flashinfer_mla": "flashinfer",
    "cutlass_mla": "cutlass",
    "deepgemm": "deep_gemm",
}


class Unavailable(Exception):
    """A backend cannot run this case; the message is the reason."""


@dataclass(frozen=True)
class Backend:
    """run(inputs, poison) does the work once."""

    name: str
    run: Callable[[Any, bool], Any]


def is_own(name: str, kind: str) -> bool:
    """Whether a backend of a workload is written in this repository; "a+b" is if both are. A workload without an
    operation of the library has only peers, whatever their names."""
    return bool(workload(kind).operations) and all(part in OWN for part in name.split("+"))


def is_peer(name: str, kind: str) -> bool:
    return name not in (DEFAULT, REFERENCE) and not is_own(name, kind)


def names(name: str) -> list[str]:
    """All backends of a workload, whether or not they can run here."""
    found = _implementations(name)
    mixed = workload(name).mixed
    return [*([DEFAULT] if found else []), *found, *mixed, *(n for n in peers.names(name) if n not in found)]


def _implementations(name: str) -> list[str]:
    """Names that implement every operation of a workload."""
    table = {o.name: o.implementations() for o in operations()}
    lists = [table[operation] for operation in workload(name).operations]
    return [n for n in lists[0] if all(n in other for other in lists[1:])] if lists else []


def choose(wanted: Sequence[str], name: str, device: str) -> list[str]:
    """Backends to run. "all" is every one; the reference is left out on a GPU unless it is named."""
    everything = names(name)
    chosen: list[str] = []
    for backend in wanted:
        if backend == "all":
            chosen += [n for n in everything if n != REFERENCE or not device.startswith("cuda")]
        else:
            chosen.append(backend if backend in everything else ALIASES.get(backend, backend))
    return list(dict.fromkeys(chosen))


def resolve(backend: str, name: str, problem: Problem, device: torch.device) -> Backend:
    """The callable of a workload's backend. Raises Unavailable with the reason when it cannot run here."""
    if backend == DEFAULT:
        return Backend(backend, lambda item, poison: problem.run(None, item, poison))
    found = _implementations(name)
    if backend in peers.names(name) and backend not in found:
        reason = peers.unavailable(name, backend, problem, device)
        if reason:
            raise Unavailable(reason)
        call = peers.prepare(name, backend, problem)
        return Backend(backend, lambda item, poison: call(item))
    wanted = workload(name).operations
    mixed = backend in workload(name).mixed
    if backend not in found and not mixed:
        raise Unavailable(
            f"{' and '.join(wanted) or name}: no implementation {backend!r}; there are {', '.join(names(name))}"
        )
    parts = backend.split("+") if mixed else [backend] * len(wanted)
    for operation in operations():
        if operation.name in wanted:
            part = parts[wanted.index(operation.name)]
            row = next(c for c in operation.candidates(device) if c.name == part)
            if not row.support.ok:
                raise Unavailable(row.support.reason)
    return Backend(backend, lambda item, poison: problem.run(backend, item, poison))
