"""What a report says about where it was made."""

from __future__ import annotations

import re

from nsa_backend_plugin import environment


def test_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_BENCH_COMMIT", "ba9876543210")  # for a source tree without its history
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", environment.commit() or "")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))  # an installed package
    monkeypatch.delenv("NSA_BENCH_COMMIT", raising=False)
    assert environment.commit() is None
    monkeypatch.setenv("NSA_BENCH_COMMIT", "0123456789ab")
    assert environment.commit() == "0123456789ab"


def test_device():
    assert environment.device("cpu").startswith("cpu (")
    assert environment.device("a device nobody has")
