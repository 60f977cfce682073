"""The ledger against the installed SGLang, and what loading the plugin does to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from nsa_backend_plugin.engine import ledger, release
from tests.sglang_copies import RELEASES

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("row", ledger.LEDGER, ids=lambda row: row.name)
def test_target_of_every_hook_exists_in_the_installed_sglang(row):
    assert release.exists("sglang.srt.server_args.ServerArgs"), "SGLang is not installed"
    assert row.target_exists or not row.needed()


def test_every_hook_that_the_installed_release_needs_has_a_patch():
    """What a release has solved is neither hooked nor patched, whatever its comments say of it."""
    needed = {row.name for row in ledger.LEDGER if row.kind == "hook" and row.needed()}
    assert needed <= set(RELEASES[release.version()].index)


def test_targets_tell_what_is_missing():
    for missing in ("sglang.srt.server_args.ServerArgs.nothing", "sglang.srt.nothing.f", "sglang.nothing", "nothing.x"):
        assert not release.exists(missing)


PROGRAM = """
import json, sys
for name in {barred!r}:
    sys.modules[name] = None
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt import server_args
from sglang.srt.plugins.hook_registry import HookRegistry
errors = []
factory = ATTENTION_BACKENDS.get("nsa_plugin")
if factory:
    try:
        factory(None)
    except Exception as error:
        errors.append(f"{{type(error).__name__}}: {{error}}")
ours = [t for t, hooks in HookRegistry._hooks.items() if any("nsa_backend" in h.__module__ for _, h, _ in hooks)]
choices = server_args.ATTENTION_BACKEND_CHOICES
print("\\n" + json.dumps(dict(choice="nsa_plugin" in choices, factory=bool(factory), errors=errors, hooks=ours)))
"""


def _load_plugins(barred: tuple[str, ...] = (), **env: str) -> dict:
    """Outcome of loading SGLang's plugins in a fresh process in which some modules cannot be imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NSA_PLUGIN_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(barred=barred)],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_disable_removes_even_the_name():
    assert _load_plugins(NSA_PLUGIN_DISABLE="1") == {"choice": False, "factory": False, "errors": [], "hooks": []}


def test_a_broken_part_keeps_the_name_and_the_reason():
    """Here what only the factory needs is broken; test_refusals breaks what registration needs."""
    outcome = _load_plugins(("nsa_backend_plugin.engine.factory",), NSA_PLUGIN_CPU="0")
    assert outcome["choice"]
    [error] = outcome["errors"]
    assert error.startswith("RuntimeError: nsa_plugin could not be loaded: ModuleNotFoundError: import of")
    assert "nsa_backend_plugin.engine.factory" in error
    assert "nsa-plugin doctor" in error
    # Without our CPU platform only the checks of the launch and of requests are hooked, and on a GPU the loading of
    # weights.
    loading = [target for target in outcome["hooks"] if target.endswith(".load_model_with_memory_saver")]
    assert len(loading) == torch.cuda.is_available()
    check, launch = sorted(set(outcome["hooks"]) - set(loading))
    assert check.startswith("sglang.srt.managers.tokenizer_manager.TokenizerManager.")
    assert launch.startswith("sglang.srt.server_args.ServerArgs.")
