"""What the suite asks of the library's dispatcher: the only module of the suite that knows it."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

from nsa_backend_plugin.engine import kernels
from nsa_backend_plugin.ops import registry

kernels.register()

_OURS = "nsa_backend_plugin"
#: What kernels are written in. An implementation that imports anything else calls a kernel that lives there.
_LANGUAGES = {"torch", "triton", "tilelang", "cuda", "cutlass", "numpy"}
_DECLINED = "forced implementation cannot run ("


@functools.cache
def _operations() -> dict[str, registry.Operation]:
    return {operation.name: operation for operation in registry.operations()}


def operations() -> list[str]:
    """Names, such as "sparse_mla.attend"."""
    return list(_operations())


def implementations(operation: str) -> list[str]:
    return _operations()[operation].implementations()


def unavailable(operation: str, name: str, device: str) -> str:
    """Why an implementation cannot run on a device, whatever it is called with; "" when it can."""
    row = next(c for c in _operations()[operation].candidates(device) if c.name == name)
    return row.support.reason


def declined(error: Exception) -> str:
    """Why a forced implementation did not take a call, when that is what the error says; else ""."""
    if not isinstance(error, ValueError) or _DECLINED not in str(error):
        return ""
    return str(error).partition(_DECLINED)[2].removesuffix(")").partition(": ")[2]


@functools.cache
def is_own(operation: str, name: str) -> bool:
    """Whether an implementation's kernel lives in this repository, not in a library that its file calls."""
    module = registry._load(operation.partition(".")[0], name)
    path = getattr(module, "__file__", None)
    return path is not None and not _libraries(Path(path))


def _libraries(path: Path, names: frozenset[str] | None = None) -> set[str]:
    """Packages with kernels that a file imports, or only its functions `names`; what it takes from our own shared
    modules is looked into."""
    found: set[str] = set()
    body = ast.parse(path.read_text()).body
    for top in body if names is None else [n for n in body if getattr(n, "name", None) in names]:
        for node in ast.walk(top):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                if node.module.partition(".")[0] != _OURS:
                    found.add(node.module.partition(".")[0])
                    continue
                for alias in node.names:
                    whole = _source(f"{node.module}.{alias.name}")
                    found |= _libraries(whole) if whole else _part(node.module, alias.name)
    return found - _LANGUAGES - set(sys.stdlib_module_names)


def _part(module: str, name: str) -> set[str]:
    source = _source(module)
    return _libraries(source, frozenset({name})) if source else set()


@functools.cache
def _source(module: str) -> Path | None:
    """The file of a module of ours; None when there is no such module, or it is a package."""
    path = Path(registry.__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None
