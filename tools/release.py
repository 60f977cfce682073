"""What the next release of SGLang asks of the plugin, from its wheel: nothing of it is installed or imported.

    python -m tools.release 0.5.24

carries the patches over into `patches/0.5.24`, writes what changed in the code that the plugin reaches into to
`.build/release-0.5.24.diff`, to be read, and prints the places that a person must edit. Running it again after an edit
says what is left.
"""

from __future__ import annotations

import ast
import difflib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nsa_backend_plugin import patching
from nsa_backend_plugin.engine import inspection, ledger
from nsa_backend_plugin.engine import release as sglang_release
from tools import index_patches, wheels

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "src/nsa_backend_plugin/engine"


def places(release: str, package: Path, patches: Path) -> dict[str, list[str]]:
    """File -> what a person must write there, for the release to be supported. Writes what can be written without one.

    patches: the folder with a folder of patches for each release.
    """
    edits: dict[str, list[str]] = {}
    if release not in sglang_release.RELEASES:
        edits[f"{ENGINE}/release.py"] = [f'add "{release}" to RELEASES']
    for finding in inspection.findings(package):
        edits.setdefault(f"{ENGINE}/{finding.place}", []).append(finding.what)
    edits.update(carry_over(release, package, patches))
    return edits


def carry_over(release: str, package: Path, patches: Path) -> dict[str, list[str]]:
    """Write the patches that the release has none of yet, from another release's; file -> why it could not be written.

    Rows of the ledger that the release does not need are left out.
    """
    folder, failed = patches / release, {}
    base = nearest(release, patches)
    folder.mkdir(exist_ok=True)
    for name in base.index:
        path = folder / f"{name}.patch"
        [row] = [row for row in ledger.LEDGER if row.name == name]
        if path.exists() or not row.in_release(package):
            continue
        try:
            path.write_text(rebased(base, name, wheels.package(base.name), package))
        except patching.PatchError as error:
            failed[str(path)] = [f"{error}; {base.folder / path.name} is what it was"]
    text = json.dumps(index_patches.make_index(folder, package), indent=1) + "\n"
    (folder / "index.json").write_text(text)
    return failed


def nearest(release: str, patches: Path) -> patching.Release:
    """The newest older release with patches, or the oldest newer one where there is none."""
    known = sorted(patching.releases(patches), key=lambda r: sglang_release.numbers(r.name))
    older = [r for r in known if sglang_release.numbers(r.name) < sglang_release.numbers(release)]
    return (older[-1:] or [r for r in known if r.name != release])[0]


def rebased(base: patching.Release, name: str, base_package: Path, package: Path) -> str:
    """The text of a patch against another release. Raises PatchError where it must be made by hand."""
    file = base.folder / f"{name}.patch"
    text = file.read_text(encoding="utf-8")
    parts = [text[: text.index("--- a/")]]
    with tempfile.TemporaryDirectory() as folder:
        for path in patching.parse(text):
            if not (package / path).is_file():
                raise patching.PatchError(f"{path} is not there")
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / path, Path(folder) / path)
        # Context that moved or changed is let pass: what came of it is checked below.
        command = ["patch", "--silent", "--strip=1", "--fuzz=3", "--no-backup-if-mismatch", "--reject-file=-"]
        done = subprocess.run([*command, f"--directory={folder}", f"--input={file}"], capture_output=True, check=False)
        for path, hunks in patching.parse(text).items():
            before, now = ((p / path).read_text(encoding="utf-8") for p in (base_package, package))
            merged = (Path(folder) / path).read_text(encoding="utf-8")
            if done.returncode or changed(before, patching.apply_hunks(before, hunks)) != changed(now, merged):
                raise patching.PatchError(f"{path}: the lines that the patch changes are others now")
            lines = difflib.unified_diff(now.split("\n"), merged.split("\n"), f"a/{path}", f"b/{path}", lineterm="")
            parts += [f"{line}\n" for line in lines]
    return "".join(parts)


def changed(old: str, new: str) -> set[str]:
    """What two sources of a module have not in common: names of functions, with their classes, and statements."""
    try:
        before, after = (dict(_definitions(ast.parse(text).body)) for text in (old, new))
    except SyntaxError as error:
        return {str(error)}
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def _definitions(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, str]]:
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from _definitions(statement.body, f"{inside}{statement.name}.")
        else:
            code = ast.unparse(statement)
            yield inside + getattr(statement, "name", code), code


def changes(release: str, package: Path) -> Iterator[tuple[str, str]]:
    """(row of the ledger, diff) of each target whose code is not what it was in the release before."""
    earlier = [r for r in sglang_release.RELEASES if sglang_release.numbers(r) < sglang_release.numbers(release)]
    previous = wheels.package(earlier[-1])
    for row in ledger.LEDGER:
        old, new = (sglang_release.source(row.path_in(folder), folder) for folder in (previous, package))
        if old != new and old and new:
            lines = (text.splitlines(keepends=True) for text in (old + "\n", new + "\n"))
            yield row.name, "".join(difflib.unified_diff(*lines, f"{earlier[-1]} {row.name}", f"{release} {row.name}"))


def main(release: str) -> int:
    package = wheels.package(release)
    edits = places(release, package, ROOT / "patches")
    diffs = dict(changes(release, package))
    report = ROOT / ".build" / f"release-{release}.diff"
    report.write_text("".join(diffs.values()))
    for file, what in edits.items():
        print(f"{file}:", *what, sep="\n  ")
    print(f"{len(edits)} places to edit. To read: {report.relative_to(ROOT)}, what changed in {', '.join(diffs)}.")
    print(f"Then `make test`, and `python -m tools.try_releases {release}`.")
    return 1 if edits else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
