"""What the plugin needs of a release of SGLang, or does not know of it, from its source: nothing is imported.

Three ask: the tests for every supported release, `tools/release.py` for the next one, and a launch on a release that
is newer than every supported one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nsa_backend_plugin.engine import arguments, contract, ledger, release

_ENGINE = Path(__file__).parent
#: What our code imports where a release has it, and only there.
_WHERE_THERE = frozenset(
    {
        "sglang.srt.arg_groups.model_override_base.model_config_of",
        "sglang.kernels.ops.attention.dsa.transform_index.transform_index_page_table_dcp",
    }
)


@dataclass(frozen=True)
class Finding:
    """What does not fit a release. place: the module of `engine` that says otherwise. breaks: nothing can be served."""

    place: str
    what: str
    breaks: bool


def findings(package: Path) -> Iterator[Finding]:
    """All that does not fit the release whose package `sglang` lies in the folder."""
    for row in ledger.LEDGER:
        if problem := row.problem(package):
            yield Finding("ledger.py", problem, True)
    for name in contract.missing(package):
        yield Finding("contract.py", f"{name} is not set", True)
    for place, target in sorted(_imports()):
        if target not in _WHERE_THERE and not release.exists(target, package):
            yield Finding(place, f"{target} is not there to be imported", True)
    for kind, names in (
        ("argument", {name for name in release.server_arguments(package) if not arguments.classified(name)}),
        (
            "variable",
            release.dsa_variables(package) - set(arguments.REFUSED_VARIABLES) - set(arguments.OTHER_VARIABLES),
        ),
        ("architecture", release.mla_architectures(package) - set(arguments.ARCHITECTURES)),
    ):
        yield from (Finding("arguments.py", f"{kind} {name} is not classified", False) for name in sorted(names))


def _imports() -> Iterator[tuple[str, str]]:
    """(file of `engine`, dotted name) of all that its code imports from SGLang, wherever it does."""
    for file in _ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (module := node.module or "").split(".")[0] == "sglang":
                yield from ((str(file.relative_to(_ENGINE)), f"{module}.{name.name}") for name in node.names)
            elif isinstance(node, ast.Import):
                names = (name.name for name in node.names)
                yield from ((str(file.relative_to(_ENGINE)), name) for name in names if name.split(".")[0] == "sglang")
