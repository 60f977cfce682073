"""Apply and revert the source patches of `patches/` on an SGLang package: strict, and all files or none.

Standard library only. `patches/<release>/<name>.patch` is a unified diff with paths relative to the package folder;
`patches/<release>/index.json` holds {name: {file: {"before": sha256, "after": sha256}}}. No two patches of a release
touch the same file, so the hash of a file says which state it is in.
`tools/index_patches.py` writes index.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BEFORE, AFTER = "before", "after"
#: Before and after of the files of one patch: {file: {"before": sha256, "after": sha256}}.
Hashes = Mapping[str, Mapping[str, str]]
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(ValueError):
    """A source or a patch that is not what was expected; nothing was changed."""


@dataclass(frozen=True)
class Hunk:
    """Lines `old` at line `old_start` (from 1) become `new` at `new_start`."""

    old_start: int
    new_start: int
    old: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    path: Path
    old: bytes
    new: bytes


@dataclass(frozen=True)
class Release:
    """One folder of patches."""

    folder: Path
    index: Mapping[str, Hashes]

    @property
    def name(self) -> str:
        return self.folder.name

    def hunks(self, patch: str) -> dict[str, list[Hunk]]:
        return parse((self.folder / f"{patch}.patch").read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, list[Hunk]]:
    """The hunks of a unified diff by file, `a/` and `b/` removed. Text before a file's header is its description.

    Raises PatchError for anything but changes to the content of existing files.
    """
    lines = text.split("\n")
    files: dict[str, list[Hunk]] = {}
    hunks: list[Hunk] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("--- "):
            old, new = line[4:], "".join(lines[at : at + 1])[4:]
            at += 1
            if (old[:2], new[:2]) != ("a/", "b/") or old[2:] != new[2:]:
                raise PatchError(f"headers {old!r} and {new!r}: expected a/FILE and b/FILE")
            hunks = files.setdefault(new[2:], [])
        elif line.startswith("@@"):
            match = _HUNK.match(line)
            if match is None:
                raise PatchError(f"hunk header {line!r}: expected @@ -LINE,COUNT +LINE,COUNT @@")
            old_start, old_count, new_start, new_count = (int(n or 1) for n in match.groups())
            before: list[str] = []
            after: list[str] = []
            while len(before) < old_count or len(after) < new_count:
                mark, content = (lines[at][:1], lines[at][1:]) if at < len(lines) else ("", "the end")
                at += 1
                if mark not in ("-", "+", " "):
                    raise PatchError(f"hunk {line!r}: {mark + content!r} does not start with -, + or space")
                if mark != "+":
                    before.append(content)
                if mark != "-":
                    after.append(content)
            hunks.append(Hunk(old_start, new_start, tuple(before), tuple(after)))
    if not files:
        raise PatchError("no file header in the patch")
    return files


def apply_hunks(text: str, hunks: Sequence[Hunk], reverse: bool = False) -> str:
    """The text with every hunk applied, or taken back. Raises PatchError unless every line is exactly as expected."""
    lines = text.split("\n")
    shift = 0
    for hunk in hunks:
        old, new = (hunk.new, hunk.old) if reverse else (hunk.old, hunk.new)
        start = (hunk.new_start if reverse else hunk.old_start) - 1 + shift
        if tuple(lines[start : start + len(old)]) != old:
            raise PatchError(f"the lines from {start + 1} on are not the ones that the patch changes")
        lines[start : start + len(old)] = new
        shift += len(new) - len(old)
    return "\n".join(lines)


def releases(root: Path) -> list[Release]:
    """Every release below the folder `patches`."""
    return [Release(f.parent, json.loads(f.read_text())) for f in sorted(root.glob("*/index.json"))]


def find_release(root: Path, sglang: Path, names: Sequence[str] = ()) -> Release:
    """The release whose named patches (default: all) know every file they touch in the package folder `sglang`.

    Raises PatchError naming the files that are not as expected in the release that comes closest.
    """
    wrong: dict[str, list[str]] = {}
    for release in releases(root):
        if not set(names) <= set(release.index):
            continue
        wrong[release.name] = problems = []
        for name in names or release.index:
            for file, hashes in release.index[name].items():
                try:
                    _state(sglang / file, hashes)
                except PatchError as error:
                    problems.append(str(error))
        if not problems:
            return release
    if not wrong:
        known = sorted({name for release in releases(root) for name in release.index})
        raise PatchError(f"patches {', '.join(names)}: no release has them all; there are {', '.join(known)}")
    closest = min(wrong, key=lambda name: len(wrong[name]))
    raise PatchError(
        f"{sglang} is not a release that the patches were made for ({', '.join(wrong)}), or was changed by something "
        f"else. Compared with {closest}:\n  " + "\n  ".join(wrong[closest])
    )


def state(release: Release, patch: str, sglang: Path) -> str:
    """ "applied", "not applied" or "partly applied". Raises PatchError for a file in neither state."""
    found = {_state(sglang / file, hashes) for file, hashes in release.index[patch].items()}
    return {frozenset({AFTER}): "applied", frozenset({BEFORE}): "not applied"}.get(frozenset(found), "partly applied")


def plan(release: Release, names: Sequence[str], sglang: Path, wanted: str) -> list[Change]:
    """What to write to bring every file of the patches to the state `wanted`; files already there are left out."""
    changes = []
    for name in names:
        hunks = release.hunks(name)
        if set(hunks) != set(release.index[name]):
            raise PatchError(f"{release.folder / name}.patch touches other files than index.json says")
        for file, hashes in release.index[name].items():
            path = sglang / file
            if _state(path, hashes) == wanted:
                continue
            old = path.read_bytes()
            new = apply_hunks(old.decode(), hunks[file], reverse=wanted == BEFORE).encode()
            if sha256(new) != hashes[wanted]:
                raise PatchError(f"{release.folder / name}.patch gives another {file} than index.json says")
            changes.append(Change(path, old, new))
    return changes


def write(changes: Sequence[Change]) -> None:
    """Write all changes or, when anything fails, none: the error is raised after the old files are back.

    A file is replaced by renaming, so no reader ever sees half of one and hard links to it keep the old content.
    """
    staged: list[Path] = []
    try:
        for change in changes:
            staged.append(_stage(change.path, change.new))
            staged.append(_stage(change.path, change.old))  # staged too: rolling back must not need disk space
        touched = 0
        try:
            for change, new in zip(changes, staged[::2], strict=True):
                touched += 1
                os.replace(new, change.path)
        except BaseException:
            for change, old in zip(changes[:touched], staged[1::2], strict=False):
                os.replace(old, change.path)
            raise
        for folder in {change.path.parent for change in changes}:
            _sync_folder(folder)
    finally:
        for path in staged:
            path.unlink(missing_ok=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _state(path: Path, hashes: Mapping[str, str]) -> str:
    if not path.is_file():
        raise PatchError(f"{path} does not exist")
    found = sha256(path.read_bytes())
    for name, expected in hashes.items():
        if found == expected:
            return name
    before, after = (hashes[name][:12] for name in (BEFORE, AFTER))
    raise PatchError(f"{path} has sha256 {found[:12]}, expected {before} or, patched, {after}")


def _stage(path: Path, data: bytes) -> Path:
    """A synced temporary file beside `path` with its permissions."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), path.stat().st_mode)
    return Path(name)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
