"""A prefill and a decode server, without a router: shared by the tests on a CPU and on a GPU."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nsa_backend_plugin.serving import HOST, Server
from tests import sglang_plugin

#: A plugin of SGLang for the negative control: no index keys are sent while a file is there.
LEAVES_OUT = """
import os
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def send(original, sender, kv_indices, state_indices=None, **rest):
    return original(sender, kv_indices, None if os.path.exists(os.environ["LEAVE_OUT"]) else state_indices, **rest)

def register():
    HookRegistry.register("sglang.srt.disaggregation.mooncake.conn.MooncakeKVSender.send", send, HookType.AROUND)
"""


def arguments(mode: str, bootstrap: int) -> list[str]:
    return [f"--disaggregation-mode={mode}", f"--disaggregation-bootstrap-port={bootstrap}"]


def control_plugin(folder: Path) -> tuple[dict[str, str], Path]:
    """Environment of a prefill server with the plugin of the negative control, and the file that it looks for."""
    (folder / "leaves_out.py").write_text(LEAVES_OUT)
    sglang_plugin.declare(folder, "leaves_out", "leaves_out:register")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "LEAVE_OUT": str(folder / "now")}, folder / "now"


def room(bootstrap: int) -> dict[str, Any]:
    """What the router adds to a request, so that the two servers find one another."""
    return {"bootstrap_host": HOST, "bootstrap_port": bootstrap, "bootstrap_room": random.getrandbits(48)}


def ask(prefill: Server, decode: Server, bootstrap: int, body: Mapping[str, Any], timeout: float) -> Any:
    """Parsed answer of the decode server. Raises requests.RequestException of either."""
    body = {**body, **room(bootstrap)}
    with ThreadPoolExecutor() as pool:
        prefilled = pool.submit(prefill.post, "/generate", body, timeout)
        answer = decode.post("/generate", body, timeout)
        prefilled.result()
    return answer


def kill(server: Server) -> None:
    """End it at once: an orderly end takes SGLang six seconds."""
    if server.running():
        os.killpg(server._process.pid, signal.SIGKILL)
    server.stop()
