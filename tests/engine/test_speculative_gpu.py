"""Speculative decoding through real servers on a GPU: the same tokens as without it, as many of them a step as stock's.

Greedy verification keeps a draft only where the model itself would have chosen it, so a wrong row of a batch with
several queries for each request shows as other tokens, and a draft layer whose guesses are partly right
(`examples/tiny_dsa/draft_layer.py`) exercises every row. NSA_TEST_DRAFT_MODEL names such a model; else one is trained.
Only the servers of the selected tests are started: `-k glm` has four.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.engine import drafting
from tests.engine.drafting import ACCEPTANCE_BARS, Arm, Outcome, result, same_share

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

ARMS = {
    "plain": Arm(0),
    "1 step": Arm(1),
    "3 steps": Arm(3),
    "5 steps": Arm(5),
    "2 steps, eager": Arm(2, args=("--disable-cuda-graph",)),
    "1 step, stock": Arm(1, backend="dsa"),
    "3 steps, stock": Arm(3, backend="dsa"),
    "5 steps, stock": Arm(5, backend="dsa"),
    "plain bf16": Arm(0, kv="bfloat16"),
    "3 steps bf16": Arm(3, kv="bfloat16"),
    "plain mla": Arm(0, kv="auto", kind="mla"),
    "3 steps mla": Arm(3, kv="auto", kind="mla"),
    "plain glm": Arm(0, kind="glm"),
    "5 steps glm": Arm(5, kind="glm"),
    "2 steps glm, eager": Arm(2, kind="glm", args=("--disable-cuda-graph",)),
    "5 steps glm, stock": Arm(5, kind="glm", backend="dsa"),
}
PLAIN = {(arm.kind, arm.kv): name for name, arm in ARMS.items() if not arm.steps}
BESIDE_STOCK = [name for name in ARMS if f"{name}, stock" in ARMS]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcome or error of the selected tests' arms; nothing here is timed."""
    items = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["name"] for item in items}  # type: ignore[attr-defined]
    asked |= {PLAIN[ARMS[name].kind, ARMS[name].kv] for name in asked} | {f"{name}, stock" for name in asked}
    arms = {name: arm for name, arm in ARMS.items() if name in asked}
    folder = tmp_path_factory.mktemp("drafts")
    found = drafting.serve_all(drafting.write_models(folder), folder, arms, drafting.prompts(folder))
    for name, one in found.items():
        said = f"{one.per_step():.2f} tokens a step" if isinstance(one, Outcome) else "failed"
        print(f"{name:20} {said}", file=sys.stderr)
    return found


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.steps])
def test_tokens_are_those_of_plain_decoding(outcomes: dict[str, Any], name: str) -> None:
    plain, drafted = result(outcomes, PLAIN[ARMS[name].kind, ARMS[name].kv]), result(outcomes, name)
    assert drafted.per_step() > 1.3, "the draft layer's guesses are hardly ever right: this shows nothing"
    # Batches of other widths round differently, and a greedy choice that is nearly a tie then differs, as with stock.
    assert same_share(plain, drafted) >= 0.9


@pytest.mark.parametrize("name", BESIDE_STOCK)
def test_as_many_drafts_are_accepted_as_by_stock(outcomes: dict[str, Any], name: str) -> None:
    ours, stock = result(outcomes, name), result(outcomes, f"{name}, stock")
    assert same_share(stock, ours) >= 0.9
    for part, bar in ACCEPTANCE_BARS:
        print(name, "tokens a step", ours.per_step(part), "stock", stock.per_step(part))
        assert ours.per_step(part) == pytest.approx(stock.per_step(part), rel=bar)
