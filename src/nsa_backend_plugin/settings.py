"""Every environment variable of the plugin: name, type, default, meaning, in one table.

`ENVS.md` is generated from this table (`nsa-plugin envs`), and a test keeps the two equal. Values are read
from the environment on every access, so that tests and server launchers can set them late.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: The operations: folders below `ops/`; one with an underscore holds what several of them share.
OPERATIONS = tuple(
    sorted(p.parent.name for p in (Path(__file__).parent / "ops").glob("*/__init__.py") if p.parent.name[0] != "_")
)

#: The words for on and off, the same in every setting that can be either.
_WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), "1"), **dict.fromkeys(("0", "false", "no", "off"), "0")}


@dataclass(frozen=True)
class Setting:
    """One variable.

    kind: "bool", "choice" (one of `choices`), "path", or "names" (comma-separated names of implementations, first that
    can run wins, or of functions; the dispatcher checks them, which knows the files).
    """

    name: str
    kind: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()

    def parse(self, raw: str) -> bool | str | tuple[str, ...]:
        """Value of the variable's text; an empty one is an unset one. Raises ValueError for a bad one."""
        text = raw.strip() or self.default
        if self.kind == "names":
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if self.kind == "path":
            return text
        choices = self.choices or ("0", "1")
        value = _WORDS.get(text.lower(), text)
        if value not in choices:
            words = f" (or {', '.join(w for w in _WORDS if w not in choices)})" if "1" in choices else ""
            raise ValueError(f"{self.name}={raw!r}: expected one of {', '.join(choices)}{words}")
        return value == "1" if self.kind == "bool" else value


def impl_variable(operation: str) -> str:
    """Name of the variable that forces the implementation of an operation."""
    return f"NSA_PLUGIN_{operation.upper()}_IMPL"


_TABLE = (
    Setting(
        "NSA_PLUGIN_DISABLE",
        "bool",
        "0",
        "1 leaves SGLang untouched: not even the backend name is registered.",
    ),
    Setting(
        "NSA_PLUGIN_ALLOW_UNTESTED_SGLANG",
        "bool",
        "0",
        "1 lets an SGLang launch that is newer than every supported release, at your own risk: what the "
        "plugin reaches into, the arguments, variables and architectures are looked at first, and the log says what "
        "was found.",
    ),
    Setting(
        "NSA_PLUGIN_CPU",
        "choice",
        "auto",
        "The out-of-tree CPU platform. `auto` uses it where torch sees no accelerator and the command line, or its "
        "`--config` file, names nsa_plugin; `1` forces it (needed for `sgl.Engine` on a CPU); `0` never uses it.",
        ("auto", "0", "1"),
    ),
    Setting(
        "NSA_PLUGIN_EXACT",
        "bool",
        "0",
        "CPU only: keep latent KV and index-K in float32, unquantized, for parity tests. Run with `--dtype float32`.",
    ),
    Setting(
        "NSA_PLUGIN_INDEX_LAYOUT",
        "choice",
        "auto",
        "Byte layout of the index-K pages. `auto` takes what the selected readers need: row_major on CUDA and CPU, "
        "preshuffled on ROCm.",
        ("auto", "row_major", "preshuffled"),
    ),
    Setting(
        "NSA_PLUGIN_DUAL_STREAM",
        "choice",
        "auto",
        "Run the indexer on a second stream beside the query and latent projections. `auto` follows the "
        "measurement of the architecture.",
        ("auto", "0", "1"),
    ),
    Setting(
        "NSA_PLUGIN_WITNESS",
        "names",
        "",
        "Functions to watch, such as `sparse_mla.attend`: the torch reference runs beside every 64th call on a few "
        "rows, and a call that differs is logged and saved. Start with `--disable-cuda-graph`.",
    ),
    Setting(
        "NSA_PLUGIN_WITNESS_DIR",
        "path",
        "nsa_plugin_witness",
        "Folder for the calls that the witness saves; `nsa-plugin replay FILE` repeats one.",
    ),
    *(
        Setting(
            impl_variable(op),
            "names",
            "",
            f"Implementation(s) of `ops.{op}`, comma-separated, first that can run wins; the launch fails if none can. "
            "Empty: the dispatcher decides.",
        )
        for op in OPERATIONS
    ),
)

SETTINGS: Mapping[str, Setting] = {s.name: s for s in _TABLE}


def get(name: str) -> bool | str | tuple[str, ...]:
    """Parsed value of a setting in force now. Raises ValueError for a bad value, KeyError for an unknown name."""
    setting = SETTINGS[name]
    return setting.parse(os.environ.get(name, ""))


def enabled(name: str) -> bool:
    """Value of a bool setting."""
    return get(name) is True


def validate() -> None:
    """Parse every setting, and refuse unknown NSA_PLUGIN_* names: a typing error must not be ignored."""
    for name in SETTINGS:
        get(name)
    if names := unknown():
        raise ValueError(f"unknown setting {names[0]}={os.environ[names[0]]!r}: valid names are {', '.join(SETTINGS)}")


def unknown() -> list[str]:
    """NSA_PLUGIN_* variables of the environment that are no settings."""
    return sorted(name for name in os.environ if name.startswith("NSA_PLUGIN_") and name not in SETTINGS)


def markdown() -> str:
    """The text of ENVS.md."""
    lines = [
        "# Environment variables",
        "",
        "Generated by `nsa-plugin envs` from `src/nsa_backend_plugin/settings.py`; do not edit.",
        "",
        "0 may be written as false, no or off, and 1 as true, yes or on. An empty variable is an unset one.",
        "",
        "| name | values | default | meaning |",
        "|---|---|---|---|",
    ]
    kinds = {"bool": "0, 1", "names": "names", "path": "a folder"}
    for s in _TABLE:
        values = kinds.get(s.kind) or ", ".join(s.choices)
        lines.append(f"| `{s.name}` | {values} | {s.default or 'empty'} | {s.meaning} |")
    return "\n".join(lines) + "\n"
