"""Resolve many command lines in one process, as `sglang.launch_server` does: `python resolve_cases.py CASES.json`.

CASES: list of {"argv": [...], "env": {...}, "sglang": version or null}. Prints one JSON line of
[{"error": "Type: message" or null, "hooks": names of our hooks that ran, "taught": whether the model code knows us}].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402

from nsa_backend_plugin import BACKEND_NAME  # noqa: E402
from nsa_backend_plugin.engine import hooks, release  # noqa: E402


def resolve(case: dict) -> dict:
    hooks.FIRED.clear()
    error = None
    version = case.get("sglang") or release.version()
    with mock.patch.dict(os.environ, case.get("env", {})), mock.patch.object(release, "version", return_value=version):
        try:
            arguments = prepare_server_args(case["argv"])
            if hasattr(arguments, "resolve_once"):
                arguments.resolve_once()
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    return {
        "error": error,
        "hooks": sorted(hooks.FIRED),
        "taught": BACKEND_NAME in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS,
    }


print("\n" + json.dumps([resolve(case) for case in json.loads(Path(sys.argv[1]).read_text())]))
