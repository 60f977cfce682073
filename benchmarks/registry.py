"""What the suite asks of the library's dispatcher: the only module of the suite that knows it."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

from nsa_backend_plugin.engine import kernels
from nsa_backend_plugin.ops import dispatch
from nsa_backend_plugin.ops.call import Declined

kernels.register()

_OURS = Path(dispatch.__file__).parents[1]
#: What kernels are written in. An implementation that imports anything else calls a kernel that lives there.
_LANGUAGES = {"torch", "triton", "tilelang", "cuda", "cutlass", "numpy"}


@functools.cache
def _operations() -> dict[str, dispatch.Operation]:
    return {operation.name: operation for operation in dispatch.operations()}


def operations() -> list[str]:
    """Names, such as "sparse_mla.attend"."""
    return list(_operations())


def implementations(operation: str) -> list[str]:
    return _operations()[operation].implementations()


def unavailable(operation: str, name: str, device: str) -> str:
    """Why an implementation cannot run on a device, whatever it is called with; "" when it can."""
    return _operations()[operation].unavailable(name, device) or ""


def declined(error: Exception) -> str:
    """Why the implementations that were asked did not take a call, when that is what the error says; else ""."""
    if not isinstance(error, Declined):
        return ""
    alone = len(error.reasons) == 1
    return "; ".join(reason if alone else f"{name}: {reason}" for name, reason in error.reasons.items())


@functools.cache
def is_own(operation: str, name: str) -> bool:
    """Whether an implementation's kernel lives in this repository, not in a library that its file calls."""
    if name not in implementations(operation):
        return False
    path = dispatch.module_path(_operations()[operation].op, name)
    return not _libraries(_OURS.joinpath(*path.split(".")[1:]).with_suffix(".py"))


def _libraries(file: Path, names: frozenset[str] | None = None) -> set[str]:
    """Packages with kernels that a file imports or probes for, or only its functions `names` and what they use of the
    same file. What it uses of our own shared modules is looked into."""
    tops = ast.parse(file.read_text()).body
    body = {getattr(top, "name", str(i)): top for i, top in enumerate(tops)}
    nodes: list[ast.AST] = []
    waiting = set(body if names is None else names & body.keys())
    while waiting:
        inside = list(ast.walk(body.pop(waiting.pop())))
        nodes += inside
        waiting |= {n.id for n in inside if isinstance(n, ast.Name)} & body.keys()
    if names is not None:  # of the file's own imports those that the functions use
        spoken = {n.id for n in nodes if isinstance(n, ast.Name)}
        imports = [top for top in tops if isinstance(top, ast.Import | ast.ImportFrom)]
        nodes += [top for top in imports if spoken & {alias.asname or alias.name for alias in top.names}]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("probe.missing", "importlib.import_module"):
            found |= {str(a.value).partition(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(_OURS.name):
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module:
            home = _OURS.joinpath(*node.module.split(".")[1:])
            for alias in node.names:
                whole = (home / alias.name).with_suffix(".py")
                used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == alias.name}
                source, wanted = (whole, used) if whole.exists() else (home.with_suffix(".py"), {alias.name})
                found |= _libraries(source, frozenset(wanted)) if source.exists() else set()
    return found - _LANGUAGES - set(sys.stdlib_module_names)
