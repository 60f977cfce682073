"""What a running server says of itself."""

from __future__ import annotations

from nsa_backend_plugin import serving


def test_server_facts(server):
    server.info |= {"tp_size": 8, "dsa_decode_backend": "fa3", "secret": 1}
    known = {"version": "0.5.17", "device": "cpu", "attention_backend": "nsa_plugin", "tp_size": 8}
    assert serving.server_facts(server.url) == known
    server.info["attention_backend"] = "dsa"
    stock = known | {"attention_backend": "dsa", "dsa_decode_backend": "fa3"}
    assert serving.server_facts(server.url) == stock


def test_a_server_that_does_not_say_has_no_facts(server):
    server.http.shutdown()
    server.http.server_close()
    assert serving.server_facts(server.url) == {}
