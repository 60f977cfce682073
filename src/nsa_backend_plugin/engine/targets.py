"""Whether a dotted path exists in the installed SGLang, from its source: nothing is imported.

Importing a target takes half a minute and fails for modules that need a GPU library, also where the target is there.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path


def exists(target: str) -> bool:
    """Whether `package.module.name` or `package.module.Class.attribute` is defined, assigned or imported there."""
    package, *rest = target.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(spec.submodule_search_locations[0])
    while rest and (folder / rest[0]).is_dir():
        folder /= rest.pop(0)
    file = folder / f"{rest.pop(0)}.py" if rest else folder / "__init__.py"
    if not file.exists():
        return False
    body: Iterable[ast.stmt] = _body(file)
    for name in rest:
        found = next((s for s in _statements(body) if name in _names(s)), None)
        if found is None:
            return False
        body = found.body if isinstance(found, ast.ClassDef) else ()
    return True


@functools.cache
def _body(file: Path) -> tuple[ast.stmt, ...]:
    return tuple(ast.parse(file.read_text()).body)


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
