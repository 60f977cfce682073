"""What the tool for the next release asks of a person, with the newest supported one as if it were new."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from nsa_backend_plugin import patching
from nsa_backend_plugin.engine import arguments
from nsa_backend_plugin.engine import release as sglang_release
from tests.sglang_copies import PATCHES, RELEASES, ROOT
from tools import release, try_releases, wheels

*SUPPORTED, BEFORE, NEW = sglang_release.RELEASES


@pytest.fixture
def as_if_new(tmp_path, monkeypatch):
    """Patches for the release before NEW and none for NEW; NEW, and what only it has, is not classified."""
    shutil.copytree(PATCHES / NEW, tmp_path / NEW)
    assert release.carry_over(BEFORE, wheels.package(BEFORE), tmp_path) == {}
    shutil.rmtree(tmp_path / NEW)
    known, new = (sglang_release.server_arguments(wheels.package(r)) for r in (BEFORE, NEW))
    monkeypatch.setattr(sglang_release, "RELEASES", (*SUPPORTED, BEFORE))
    monkeypatch.setattr(arguments, "classified", lambda name: name in known)
    return tmp_path, new.keys() - known.keys()


def test_the_next_release_asks_for_few_edits(as_if_new):
    """Two for the newest release: its place in the list, and a class for each of its new arguments."""
    patches, unclassified = as_if_new
    assert release.places(NEW, wheels.package(NEW), patches) == {
        f"{release.ENGINE}/release.py": [f'add "{NEW}" to RELEASES'],
        f"{release.ENGINE}/arguments.py": [f"argument {name} is not classified" for name in sorted(unclassified)],
    }
    [written] = [r for r in patching.releases(patches) if r.name == NEW]
    assert set(written.index) == set(RELEASES[NEW].index)
    package = wheels.package(NEW)
    for name in written.index:  # they change what the ones made by hand change
        for file, hunks in written.hunks(name).items():
            source = (package / file).read_text()
            ours, theirs = (patching.apply_hunks(source, h) for h in (hunks, RELEASES[NEW].hunks(name)[file]))
            assert release.changed(source, ours) == release.changed(source, theirs)
    (patches / NEW / "rope_cpu.patch").unlink()
    assert release.carry_over(NEW, package, patches) == {}, "one that is missing is made again"


def test_a_patch_whose_place_changed_is_left_to_a_person(tmp_path):
    """0.5.20 resolves its arguments elsewhere: the patch still applies with little context, and to something else."""
    base = RELEASES["0.5.17"]
    old, new = (wheels.package(r) for r in (base.name, NEW))
    for name in ("resolution", "rope_cpu"):
        with pytest.raises(patching.PatchError, match=r"\.py: the lines that the patch changes are others now"):
            release.rebased(base, name, old, new)
    with pytest.raises(patching.PatchError, match=r"factory\.py is not there"):
        release.rebased(base, "rope_cpu", old, tmp_path)


def test_what_changed_in_a_target_is_shown():
    changes = dict(release.changes(NEW, wheels.package(NEW)))
    assert "+" in changes["rocm_indexer"]
    assert "use_cuda_graph" in changes["rocm_indexer"]
    assert "rocm_pages" not in changes


def test_readme_says_what_was_run_on_a_cpu():
    """`make test` has two releases; the others are what the record of `make test-releases` says."""
    makefile = set(re.findall(r"install\.py \S+ (\S+) --dev", (ROOT / "Makefile").read_text()))
    record = {entry["release"]: entry for entry in json.loads(try_releases.RECORD.read_text())}
    passed = {name for name, entry in record.items() if entry["passed"] and not entry["failed"]}
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == [
        (name, "tested" if name in makefile else "wiring tested" if name in passed else "untested")
        for name in sglang_release.RELEASES
    ]


def test_a_release_is_installed_with_the_versions_that_its_wheel_asks_for():
    lines = try_releases.requirements("0.5.22").split()
    assert {"torch==2.13.0", "numpy<2.4", "transformers==5.19.0", "xgrammar==0.2.7"} <= set(lines)
    base = re.findall(r"^[\w-]+", (ROOT / "requirements" / "sglang-0.5.17-cpu.txt").read_text(), re.MULTILINE)
    assert [re.split(r"[^\w-]", line)[0] for line in lines] == base
