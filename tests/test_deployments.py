"""docs/deployments.md says what the checks of a launch do, and names files that exist."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from nsa_backend_plugin.engine import arguments

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "deployments.md").read_text()
#: The refusals by what the page calls them.
REFUSALS = {
    "refused": arguments.REFUSED,
    "refused on a CPU": arguments.ON_DEVICE["cpu"],
    "refused on AMD": arguments.ON_DEVICE["rocm"],
    "refused between prefill and decode": arguments.IN_PAIRS,
    "refused with a split prefill": arguments.WITH_PREFILL_CP,
    "refused with a split cache": arguments.WITH_DECODE_CP,
}


def _table(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


CONFIGURATIONS, ARCHITECTURES = _table("Configurations"), _table("Architectures")


@pytest.mark.parametrize("state", REFUSALS)
def test_the_page_has_every_refused_argument_with_its_reason(state: str) -> None:
    page = {
        flag: reason
        for reason, flags, row_state, *_ in CONFIGURATIONS
        if row_state == state
        for flag in re.findall("`(--[a-z0-9-]+)`", flags)
    }
    rules: Mapping[str, arguments.Refused] = REFUSALS[state]
    assert page == {"--" + name.replace("_", "-"): rule.why for name, rule in rules.items()}


def test_the_page_has_every_architecture_with_its_reason() -> None:
    assert {name: reason if state == "refused" else "" for name, state, reason, _ in ARCHITECTURES} == dict(
        arguments.ARCHITECTURES
    )


def test_what_is_served_was_shown_by_something_that_exists() -> None:
    states = [row[2] for row in CONFIGURATIONS] + [row[1] for row in ARCHITECTURES]
    assert set(states) <= {"served", "lifted", *REFUSALS}
    shown = [row[2:] for row in CONFIGURATIONS] + [row[1:] for row in ARCHITECTURES]
    for state, evidence, *where in shown:
        if state not in ("served", "lifted"):
            continue
        files = re.findall(r"[\w/]+\.(?:py|md)\b", evidence)
        assert files
        assert all((ROOT / file).is_file() for file in files), evidence
        assert all(map(bool, where)) if state == "served" else not any(where), evidence
