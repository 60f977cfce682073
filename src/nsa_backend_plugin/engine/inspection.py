"""What the plugin needs of a release of SGLang, or does not know of it, from its source: nothing is imported.

Three ask: the tests for every supported release, `tools/release.py` for the next one, and a launch on a release that
is newer than every supported one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nsa_backend_plugin.engine import arguments, contract, ledger, release


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
    for kind, names in (
        ("argument", {name for name in release.server_arguments(package) if not arguments.classified(name)}),
        (
            "variable",
            release.dsa_variables(package) - set(arguments.REFUSED_VARIABLES) - set(arguments.OTHER_VARIABLES),
        ),
        ("architecture", release.mla_architectures(package) - set(arguments.ARCHITECTURES)),
    ):
        yield from (Finding("arguments.py", f"{kind} {name} is not classified", False) for name in sorted(names))
