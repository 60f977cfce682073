"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter and `gpu` tests are skipped."""

from __future__ import annotations

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: set before ops are imported

for _name in [n for n in os.environ if n.startswith("NSA_PLUGIN_") and n.endswith("_IMPL")]:
    del os.environ[_name]  # a forced implementation would narrow what the tests run

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, else the CPU (Triton through its interpreter)."""
    return torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Fresh random inputs in every run; a failing test shows the seed, NSA_TEST_SEED repeats it."""
    value = int(os.environ.get("NSA_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"NSA_TEST_SEED={value}")
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs a GPU: run `make test-gpu` on a GPU host")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
