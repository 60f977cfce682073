"""The `nsa-plugin` command. Every file in `commands/` is one subcommand.

A command module defines `add_arguments(parser)` and `run(options) -> int` (the exit code); the first line of its
docstring is its help line. Its imports at module level stay light, so that `nsa-plugin --help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from nsa_backend_plugin import __version__, commands


def command_names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_"))


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{commands.__name__}.{name}")


def build_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """Parser of the given subcommands; imports their modules."""
    parser = argparse.ArgumentParser(prog="nsa-plugin", description="DSA and MLA attention backend for SGLang.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in names:
        module = _load(name)
        text = (module.__doc__ or "").strip()
        child = subparsers.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(child)
        child.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = command_names()
    only = [arguments[0]] if arguments and arguments[0] in names else names
    parser = build_parser(only)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return options.run(options)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("nsa_backend_plugin"):
            raise
        print(
            f"nsa-plugin {options.command}: {missing} (of {sys.executable}); run the command with the Python that has "
            "SGLang, which brings what it needs, or install the module",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output is gone (`nsa-plugin doctor | head`)
        return 141
    except OSError as error:  # a full disk, a folder that may not be read
        print(f"nsa-plugin {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
