"""Entry points: the only code that runs when SGLang starts.

SGLang logs and swallows every exception of a plugin, after which the user only sees "invalid choice:
'nsa_plugin'". So the name is registered first, with nothing that can fail, and whatever fails afterwards is kept and
raised at launch, when nsa_plugin is selected: in the process that reads the command line, and again in the factory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from typing import Any

from nsa_backend_plugin import BACKEND_NAME, settings

_failure: Exception | None = None


def register() -> None:
    """Entry point of group `sglang.srt.plugins`."""
    if _disabled():
        return
    _register_name()
    global _failure
    try:
        from nsa_backend_plugin.engine import hooks

        hooks.install("start")
    except Exception as error:
        _failure = error
        _register_failing_launch()


def activate_cpu_platform() -> str | None:
    """Entry point of group `sglang.srt.platforms`: the CPU platform's class, or None to stay out.

    Runs while SGLang is still importing itself, so nothing of SGLang may be imported here. `auto` needs a command
    line that names nsa_plugin, because an out-of-tree platform changes SGLang for every other backend too.
    """
    if _disabled():
        return None
    choice = settings.get("NSA_PLUGIN_CPU")
    if choice == "0" or (choice == "auto" and not (_command_line_wants_cpu() and _no_accelerator())):
        return None
    return "nsa_backend_plugin.engine.cpu.platform.NsaPluginCpuPlatform"


def _disabled() -> bool:
    try:
        return settings.enabled("NSA_PLUGIN_DISABLE")
    except ValueError:
        return False  # reported at launch, by name and value, when nsa_plugin is selected


def _register_name() -> None:
    """The command-line choice and the backend factory; rows of `engine.ledger.LEDGER`."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    add_attention_backend_choices([BACKEND_NAME])
    register_attention_backend(BACKEND_NAME)(_create_backend)


def _create_backend(runner: Any) -> Any:
    if _failure is not None:
        raise _explained(_failure) from _failure
    try:
        from nsa_backend_plugin.engine.factory import create_backend

        return create_backend(runner)
    except ImportError as error:
        raise _explained(error) from error


def _register_failing_launch() -> None:
    """Without our hooks a launch can die of something else before the factory: fail where arguments are resolved."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import ServerArgs

    def fail(server_args: Any, *args: Any, **kwargs: Any) -> None:
        names = (
            server_args.attention_backend,
            server_args.prefill_attention_backend,
            server_args.decode_attention_backend,
        )
        if BACKEND_NAME in names:
            assert _failure is not None
            raise _explained(_failure) from _failure

    resolver = "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"
    HookRegistry.register(f"sglang.srt.server_args.ServerArgs.{resolver}", fail, HookType.BEFORE)


def _explained(error: Exception) -> RuntimeError:
    return RuntimeError(
        f"nsa_plugin could not be loaded: {type(error).__name__}: {error}. Run `nsa-plugin doctor` for details, repair "
        "or reinstall the package it names, or choose another --attention-backend (NSA_PLUGIN_DISABLE=1 removes "
        "nsa_plugin altogether)"
    )


def _command_line_wants_cpu() -> bool:
    """Whether the command line names nsa_plugin and no device but the CPU. Spawned processes inherit the launcher's."""
    pairs = (word.split("=", 1) if word.startswith("--") else [word] for word in sys.argv[1:])
    words = list(itertools.chain(*pairs))
    words = [*_words_of_config(words), *words]  # the command line wins, as in SGLang
    devices = [device for flag, device in itertools.pairwise(words) if flag == "--device"]
    return BACKEND_NAME in words and devices[-1:] in ([], ["cpu"])


def _words_of_config(words: list[str]) -> list[str]:
    """The options in the file of `--config` as words; none from a file that SGLang will refuse."""
    for flag, path in itertools.pairwise(words):
        if flag == "--config" and os.path.isfile(path):
            import yaml  # SGLang's own dependency for these files

            with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError), open(path, encoding="utf-8") as file:
                options = yaml.safe_load(file)
                if isinstance(options, dict):
                    return [w for name, v in options.items() for w in (f"--{str(name).replace('_', '-')}", str(v))]
    return []


def _no_accelerator() -> bool:
    import torch

    return os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "1" and not torch.accelerator.is_available()
