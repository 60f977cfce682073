"""docs/amd.md shows what the script prints, and says what it is."""

from __future__ import annotations

from nsa_backend_plugin import settings
from tests.rocm.simulated_host import ROOT
from tools import amd_estimates


def test_the_page_shows_the_scripts_table():
    table = amd_estimates.markdown()
    page = (ROOT / "docs" / "amd.md").read_text()
    assert table in page
    assert "compile-checked, not run" in page
    assert all(f"| {operation}." in table for operation in settings.OPERATIONS)
    assert table.count("us (memory)") > table.count("us (compute)") > 0
