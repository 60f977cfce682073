"""Write index.json of a folder of patches, after one was edited.

python tools/index_patches.py patches/0.5.17 FOLDER_OF_PRISTINE_SGLANG
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nsa_backend_plugin import patching


def make_index(folder: Path, sglang: Path) -> dict[str, dict[str, dict[str, str]]]:
    """The content of index.json for the patches of a folder and a pristine package. Raises PatchError."""
    index: dict[str, dict[str, dict[str, str]]] = {}
    seen: set[str] = set()
    for patch in sorted(folder.glob("*.patch")):
        index[patch.stem] = {}
        for file, hunks in patching.parse(patch.read_text(encoding="utf-8")).items():
            if file in seen:
                raise patching.PatchError(f"{patch}: {file} is touched by another patch of this release")
            seen.add(file)
            old = (sglang / file).read_bytes()
            new = patching.apply_hunks(old.decode(), hunks).encode()
            index[patch.stem][file] = {patching.BEFORE: patching.sha256(old), patching.AFTER: patching.sha256(new)}
    return index


if __name__ == "__main__":
    release_folder, package = map(Path, sys.argv[1:])
    text = json.dumps(make_index(release_folder, package), indent=1) + "\n"
    (release_folder / "index.json").write_text(text)
