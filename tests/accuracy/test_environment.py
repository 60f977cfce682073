"""What a report says about where it was made."""

from __future__ import annotations

import re

from nsa_backend_plugin.accuracy import environment


def test_server_facts(server):
    server.info |= {"tp_size": 8, "dsa_decode_backend": "fa3", "secret": 1}
    known = {"version": "0.5.17", "device": "cpu", "attention_backend": "nsa_plugin", "tp_size": 8}
    assert environment.server_facts(server.url) == known
    server.info["attention_backend"] = "dsa"
    stock = known | {"attention_backend": "dsa", "dsa_decode_backend": "fa3"}
    assert environment.server_facts(server.url) == stock


def test_a_server_that_does_not_say_has_no_facts(server):
    server.http.shutdown()
    server.http.server_close()
    assert environment.server_facts(server.url) == {}


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
