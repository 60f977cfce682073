"""What the installed SGLang has, from its source: nothing is imported.

Importing a target takes half a minute and fails for modules that need a GPU library, also where the target is there.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Assigned, to the patch's name, in the module that a patch of patches/ changes.
PATCH_MARKER = "_NSA_PLUGIN_PATCH"


def exists(target: str) -> bool:
    """Whether `package.module.name` or `package.module.Class.attribute` is defined, assigned or imported there."""
    file, rest = _locate(target)
    if file is None:
        return False
    body: Iterable[ast.stmt] = _body(file)
    for name in rest:
        found = next((s for s in _statements(body) if name in _names(s)), None)
        if found is None:
            return False
        body = found.body if isinstance(found, ast.ClassDef) else ()
    return True


def patched(target: str, patch: str) -> bool:
    """Whether the patch is applied to the module of the target."""
    file, _ = _locate(target)
    return file is not None and f'{PATCH_MARKER} = "{patch}"' in _text(file).splitlines()


def _locate(target: str) -> tuple[Path | None, list[str]]:
    """(file of the target's module or None, names inside the module)."""
    package, *rest = target.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None, rest
    folder = Path(spec.submodule_search_locations[0])
    while rest and (folder / rest[0]).is_dir():
        folder /= rest.pop(0)
    file = folder / f"{rest.pop(0)}.py" if rest else folder / "__init__.py"
    return (file if file.exists() else None), rest


@functools.cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.cache
def _body(file: Path) -> tuple[ast.stmt, ...]:
    return tuple(ast.parse(_text(file)).body)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those of its conditional blocks."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for block in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, block, ()))


def _names(statement: ast.stmt) -> set[str]:
    """Names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {t.id for t in targets if isinstance(t, ast.Name)}
