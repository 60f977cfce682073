"""A server of our own making that answers `#### N` with N counted from the question."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class FakeServer:
    """fail_after: answers before connections are closed. refuse: part of the prompts that get status 500.
    open: no answer before it is set (or a while later). reply: sent in place of answers. wrong: numbers that are
    answered wrongly. info: what /server_info says."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.fail_after: int | None = None
        self.refuse: str | None = None
        self.open = threading.Event()
        self.open.set()
        self.reply: str | None = None
        self.wrong: set[str] = set()
        self.info: dict[str, Any] = {"version": "0.5.17", "device": "cpu", "attention_backend": "nsa_plugin"}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send(200, json.dumps(owner.info) if self.path == "/server_info" else "{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.prompts.append(body["text"])
                if owner.fail_after is not None and len(owner.prompts) > owner.fail_after:
                    self.connection.close()
                    return
                question = body["text"].rsplit("Question: item ", 1)[1]
                if owner.refuse is not None and owner.refuse in f"item {question}":
                    self.send(500, "out of memory")
                    return
                owner.open.wait(20)
                self.send(200, owner.reply or json.dumps(owner.answer(question.split("\n")[0])))

            def send(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, number: str) -> dict[str, Any]:
        said = "-1" if number in self.wrong else number
        meta = {"output_token_logprobs": [[-0.5, int(number), None]], "prompt_tokens": 7}
        return {"text": f" so #### {said}", "meta_info": meta}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"question": f"item {i}", "answer": f"it is {i}\n#### {i}"} for i in range(12)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
