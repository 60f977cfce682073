"""The source patches against copies of the releases they are for, and the strictness of what applies them."""

from __future__ import annotations

import collections
import json
import os
import py_compile
import shutil
from pathlib import Path

import pytest

from nsa_backend_plugin import cli, patching
from nsa_backend_plugin.commands import _checkout, doctor
from nsa_backend_plugin.engine import ledger
from nsa_backend_plugin.engine import release as sglang_release
from tests.sglang_copies import PATCHES, RELEASES, copy_files, touched
from tools import index_patches, wheels

CASES = [(release, name) for release in RELEASES for name in RELEASES[release].index]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=sorted(RELEASES))
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Fresh copies of every file that the patches of a release change; the folder's name is the release."""
    return copy_files(wheels.package(request.param), tmp_path / request.param, touched(request.param))


def test_the_oldest_and_the_newest_release_have_patches():
    assert {sglang_release.RELEASES[0], sglang_release.RELEASES[-1]} <= set(RELEASES) <= set(sglang_release.RELEASES)


@pytest.mark.parametrize("release, name", CASES)
def test_a_patch_applies_to_its_release_compiles_and_reverts(release, name, tmp_path):
    copy = copy_files(wheels.package(release), tmp_path, touched(release))
    before = contents(copy)
    arguments = [name, "--sglang", str(copy)]
    assert cli.main(["patch", "--apply", *arguments]) == 0
    after = contents(copy)
    files = set(RELEASES[release].index[name])
    assert {file for file in after if after[file] != before[file]} == files
    for file in files:
        py_compile.compile(str(copy / file), cfile=str(tmp_path / "compiled.pyc"), doraise=True)
        assert f'\n{sglang_release.PATCH_MARKER} = "{name}"\n'.encode() in after[file]
    assert cli.main(["patch", "--apply", *arguments]) == 0
    assert contents(copy) == after | {"compiled.pyc": (tmp_path / "compiled.pyc").read_bytes()}
    assert cli.main(["patch", "--revert", *arguments]) == 0
    assert {file: (copy / file).read_bytes() for file in before} == before


@pytest.mark.parametrize("release, name", CASES)
def test_every_patch_is_a_hooks_and_changes_the_hooks_module(release, name):
    """The marker is looked for in the module of the row's target."""
    [row] = [row for row in ledger.LEDGER if row.name == name]
    [file] = RELEASES[release].index[name]
    module = "sglang." + file.removesuffix(".py").replace("/", ".")
    assert row.target.startswith(module + ".")


@pytest.mark.parametrize("release", sorted(RELEASES))
def test_every_hook_that_wraps_sglang_code_has_a_patch(release):
    package = wheels.package(release)
    wrapping = {row.name for row in ledger.LEDGER if row.kind == "hook" and row.in_release(package)}
    assert wrapping <= set(RELEASES[release].index)


@pytest.mark.parametrize("release", sorted(RELEASES))
def test_patches_are_short_and_in_the_ledger(release):
    ledger = (PATCHES / "README.md").read_text()
    for name in RELEASES[release].index:
        text = (RELEASES[release].folder / f"{name}.patch").read_text()
        assert len(text.splitlines()) <= 80
        assert not text.startswith("---"), "a patch says what it is for"
        assert f"### {name}\n" in ledger


def test_committed_index_is_that_of_the_patches(copy):
    assert index_patches.make_index(PATCHES / copy.name, copy) == RELEASES[copy.name].index


def test_all_patches_together_and_idempotent(copy, capsys):
    before = contents(copy)
    names = sorted(RELEASES[copy.name].index)
    assert cli.main(["patch", "--check", "--sglang", str(copy)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"  {name}: not applied" for name in names]
    assert contents(copy) == before
    assert cli.main(["patch", "--apply", names[1], "--sglang", str(copy)]) == 0
    assert cli.main(["patch", "--apply", "--sglang", str(copy)]) == 0
    capsys.readouterr()
    after = contents(copy)
    assert after.keys() == before.keys()
    assert all(after[file] != before[file] for file in before)
    inodes = {file: (copy / file).stat().st_ino for file in before}
    assert cli.main(["patch", "--apply", "--sglang", str(copy)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"  {name}: applied" for name in names]
    assert {file: (copy / file).stat().st_ino for file in before} == inodes, "a second run writes nothing"
    assert cli.main(["patch", "--revert", "--sglang", str(copy)]) == 0
    assert contents(copy) == before
    assert f"SGLang {copy.name} in" in capsys.readouterr().out


def test_permissions_stay_and_hard_links_keep_the_old_content(copy, tmp_path):
    """Package managers link files from a cache, which must not change."""
    file = touched(copy.name)[0]
    (copy / file).chmod(0o640)
    old = (copy / file).read_bytes()
    os.link(copy / file, tmp_path / "cached")
    assert cli.main(["patch", "--apply", "--sglang", str(copy)]) == 0
    assert (copy / file).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "cached").read_bytes() == old


@pytest.mark.parametrize("action", ["--check", "--apply", "--revert"])
def test_another_source_is_refused(copy, action, capsys):
    changed = copy / touched(copy.name)[-1]
    changed.write_bytes(changed.read_bytes() + b"\n")
    before = contents(copy)
    assert cli.main(["patch", action, "--sglang", str(copy)]) == 1
    assert contents(copy) == before
    error = capsys.readouterr().err
    assert "refused, nothing was changed" in error
    assert f"{changed} has sha256 {patching.sha256(changed.read_bytes())[:12]}, expected" in error
    changed.unlink()
    assert cli.main(["patch", action, "--sglang", str(copy)]) == 1
    assert f"{changed} does not exist" in capsys.readouterr().err


def test_a_release_without_patches_is_refused(copy, capsys):
    for file in touched(copy.name):
        (copy / file).write_text("x = 1\n")
    assert cli.main(["patch", "--apply", "--sglang", str(copy)]) == 1
    assert f"is not a release that the patches were made for ({', '.join(RELEASES)})" in capsys.readouterr().err


@pytest.mark.parametrize("failing", range(3))
def test_a_failure_half_way_brings_every_file_back(copy, monkeypatch, failing, capsys):
    before = contents(copy)
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == failing + 1:
            raise OSError("disk on fire")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    assert cli.main(["patch", "--apply", "--sglang", str(copy)]) == 1
    assert contents(copy) == before, "no file changed and no temporary file left"
    assert len(calls) == 2 * failing + 2, "as many files restored as were touched"
    assert "disk on fire" in capsys.readouterr().err


def test_an_interrupt_right_after_a_file_was_replaced_brings_it_back(copy, monkeypatch):
    before = contents(copy)
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        replace(source, target)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    assert cli.main(["patch", "--apply", "--sglang", str(copy)]) == 130
    assert contents(copy) == before


def test_a_patch_that_does_not_give_the_recorded_file_is_refused(copy, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(PATCHES, tmp_path / "patches")
    name = sorted(RELEASES[copy.name].index)[0]
    broken = folder / copy.name / f"{name}.patch"
    broken.write_text(
        broken.read_text().replace(f'+{sglang_release.PATCH_MARKER} = "', f'+{sglang_release.PATCH_MARKER} = "x')
    )
    monkeypatch.setattr(_checkout, "find", lambda name: folder)
    before = contents(copy)
    assert cli.main(["patch", "--apply", "--sglang", str(copy)]) == 1
    assert contents(copy) == before
    assert "than index.json says" in capsys.readouterr().err


def test_usage_errors(tmp_path, monkeypatch, capsys):
    assert cli.main(["patch", "--check", "no_such", "--sglang", str(tmp_path)]) == 2
    assert "expected the folder of the package `sglang`" in capsys.readouterr().err
    (tmp_path / "srt").mkdir()
    assert cli.main(["patch", "--check", "no_such", "--sglang", str(tmp_path)]) == 2
    assert "unknown patch no_such: expected draft_backends" in capsys.readouterr().err
    monkeypatch.setattr(_checkout, "_RUNS_FROM", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["patch", "--check"]) == 2
    assert "source checkout" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["patch", "--check", "--apply"])
    assert caught.value.code == 2


DIFF = "Why.\n\n--- a/f.py\n+++ b/f.py\n@@ -1,3 +1,4 @@\n a\n-b\n+B\n+C\n c\n@@ -7 +8,0 @@\n-g\n"


def test_hunks_apply_and_revert_exactly():
    [hunks] = patching.parse(DIFF).values()
    old, new = "a\nb\nc\nd\ne\nf\ng\n", "a\nB\nC\nc\nd\ne\nf\n"
    assert patching.apply_hunks(old, hunks) == new
    for wrong in ("\n" + old, old.replace("c", "x"), old.replace("b", "b "), "a\n"):
        with pytest.raises(patching.PatchError, match="not the ones that the patch changes"):
            patching.apply_hunks(wrong, hunks)
    with pytest.raises(patching.PatchError):
        patching.apply_hunks(new, hunks)


def test_reverting_is_the_inverse():
    [hunks] = patching.parse(DIFF.replace("@@ -7 +8,0 @@\n-g\n", "@@ -5,2 +6,1 @@\n-e\n f\n")).values()
    old = "a\nb\nc\nd\ne\nf\ng\n"
    new = patching.apply_hunks(old, hunks)
    assert new == "a\nB\nC\nc\nd\nf\ng\n"
    assert patching.apply_hunks(new, hunks, reverse=True) == old


@pytest.mark.parametrize("text", [
    "",
    "only words\n",
    "--- /dev/null\n+++ b/f.py\n@@ -0,0 +1 @@\n+a\n",
    "--- a/f.py\n+++ b/g.py\n@@ -1 +1 @@\n-a\n+b\n",
    "--- a/f.py\n+++ b/f.py\n@@ -1,2 +1,2 @@\n-a\n+b\n",
    "--- a/f.py\n+++ b/f.py\n@@ broken @@\n-a\n+b\n",
    "--- a/f.py",
])  # fmt: skip
def test_what_is_not_a_change_of_files_is_refused(text):
    with pytest.raises(patching.PatchError):
        patching.parse(text)


def test_a_patch_of_two_files_that_stopped_half_way_is_finished(tmp_path):
    """As after a process killed between two files."""
    (tmp_path / "0").mkdir()
    text = "".join(f"--- a/{name}.py\n+++ b/{name}.py\n@@ -1 +1 @@\n-a\n+b\n" for name in "fg")
    (tmp_path / "0/p.patch").write_text(text)
    package = tmp_path / "package"
    package.mkdir()
    for name in "fg":
        (package / f"{name}.py").write_text("a\n")
    index = index_patches.make_index(tmp_path / "0", package)
    release = patching.Release(tmp_path / "0", index)
    (package / "f.py").write_text("b\n")
    assert patching.state(release, "p", package) == "partly applied"
    patching.write(patching.plan(release, ["p"], package, patching.AFTER))
    assert patching.state(release, "p", package) == "applied"
    (package / "g.py").write_text("a\n")
    patching.write(patching.plan(release, ["p"], package, patching.BEFORE))
    assert (package / "f.py").read_text() == (package / "g.py").read_text() == "a\n"


def test_doctor_names_the_hooks_that_stand_down(monkeypatch):
    monkeypatch.setattr(sglang_release, "patched", lambda target, name: name == "rope_cpu")
    rows = doctor.hooks(True, doctor.Problems())
    assert [row["name"] for row in rows if row["patched"]] == ["rope_cpu"]
    empty: dict = collections.defaultdict(list, python="3", versions={}, device=None)
    lines = doctor.render(empty | {"hooks": rows}).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("stands down: its patch is applied")] == ["rope_cpu"]


def test_two_patches_may_not_share_a_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.patch").write_text("--- a/f.py\n+++ b/f.py\n@@ -1 +1 @@\n-a\n+b\n")
    (tmp_path / "f.py").write_text("a\n")
    with pytest.raises(patching.PatchError, match="another patch"):
        index_patches.make_index(tmp_path, tmp_path)


def test_index_files_are_sorted_json():
    for release in RELEASES.values():
        text = (release.folder / "index.json").read_text()
        assert text == json.dumps(dict(sorted(release.index.items())), indent=1) + "\n"
