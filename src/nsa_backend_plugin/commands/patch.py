"""Check, apply or revert the source patches that replace hooks, on an installed SGLang.

For people who build images from source. A patch is applied only to the exact file of the release it was made for; a
run changes all its files or none, and running it again changes nothing. patches/README.md says what each one does.

Exit code 0 when every patch is, or (--check) could be, as asked; 1 when the source is not the expected one or cannot be
written, with nothing changed; 2 when there is nothing to work on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nsa_backend_plugin.commands import _checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="say which patches are applied; change nothing")
    action.add_argument("--apply", action="store_true", help="apply the named patches (default: all of the release)")
    action.add_argument("--revert", action="store_true", help="bring the release's own files back")
    parser.add_argument("names", nargs="*", metavar="NAME", help="patches, as named in patches/README.md")
    parser.add_argument("--sglang", type=Path, metavar="DIR", help="the `sglang` package folder (default: installed)")


def run(options: argparse.Namespace) -> int:
    from nsa_backend_plugin import patching
    from nsa_backend_plugin.engine.release import installed_package

    sglang = options.sglang or installed_package()
    try:
        patches = _checkout.find("patches")
        known = sorted({name for release in patching.releases(patches) for name in release.index})
        if sglang is None:
            raise ValueError(f"sglang is not installed for {sys.executable}: pass --sglang DIR")
        if not (sglang / "srt").is_dir():
            raise ValueError(f"--sglang {sglang}: expected the folder of the package `sglang`, with `srt` in it")
        if unknown := sorted(set(options.names) - set(known)):
            raise ValueError(f"unknown patch {', '.join(unknown)}: expected {', '.join(known)}")
    except (ValueError, OSError) as error:
        print(f"nsa-plugin patch: {error}", file=sys.stderr)
        return 2
    try:
        lines = _work(options, patches, sglang)
    except (patching.PatchError, OSError) as error:
        print(f"nsa-plugin patch: refused, nothing was changed: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def _work(options: argparse.Namespace, patches: Path, sglang: Path) -> list[str]:
    """Do what was asked; returns the lines to print. Raises PatchError or OSError with nothing changed."""
    from nsa_backend_plugin import patching

    release = patching.find_release(patches, sglang, options.names)
    names = list(dict.fromkeys(options.names)) or sorted(release.index)
    before = {name: patching.state(release, name, sglang) for name in names}
    if not options.check:
        wanted = patching.AFTER if options.apply else patching.BEFORE
        patching.write(patching.plan(release, names, sglang, wanted))
    lines = [f"SGLang {release.name} in {sglang}"]
    for name in names:
        after = patching.state(release, name, sglang)
        lines.append(f"  {name}: {after}" + ("" if after == before[name] else f" (was {before[name]})"))
    return lines
