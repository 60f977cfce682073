"""Compile every kernel with the Tritons that SGLang's newer releases bring, and record what happened.

    python -m tools.try_tritons [3.7.1 ...] [-- arguments of tools.compile_matrix]

SGLang 0.5.18 to 0.5.21 bring 3.7.1, 0.5.22 and 0.5.23 bring 3.8; the table docs/compile_table.csv and `make test` have
3.6.0. The bar is the same for all: nothing spills or needs more shared memory than the target has, but for `KNOWN`. The
record is docs/tritons.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools import record

RECORD = record.ROOT / "docs" / "tritons.json"
_MLA_FP8 = "Tile(heads=64, keys=32, num_warps=8, num_stages=3"
_MLA_BF16 = "Tile(heads=64, keys=64, num_warps=8, num_stages=2"
#: What spills, by Triton, and stays, beside what `compile_cases.MAY_SPILL` allows with any. The tiles of 64 heads were
#: tuned with 3.6.0; with 3.8.0 that of bf16 rows spills 72 to 88 bytes and that of fp8 rows 24, and what would be
#: fastest there was not measured. Paged logits on targets that are tuned nowhere are 8 to 68 bytes short, for some of
#: more requests than servers batch; on sm_90 over preshuffled pages, which are AMD's, 72.
KNOWN = {
    "3.7.1": {
        "sm_89 mqa_logits.paged row_major 128 heads next_n 1",
        "sm_100 mqa_logits.paged 64 heads next_n 1 batch 4096",
    },
    "3.8.0": {
        "sm_89 mqa_logits.paged row_major 32 heads next_n 2",
        "sm_90 mqa_logits.paged preshuffled 128 heads next_n 1",
        "sm_100 mqa_logits.paged row_major 8 heads next_n 4",
        "sm_100 mqa_logits.paged 64 heads next_n 2 batch 4096",
        "gfx1201 mqa_logits.paged 64 heads next_n 2 batch 2048",
        *(
            f"sm_90 {op}.{kind} heads={heads} page={page} split={split} {tile}, swap=False)"
            for op, page in (("dense_mla", 1), ("sparse_mla", 0))
            for kind, heads, tile in (("bf16", 128, _MLA_BF16), ("fp8", 32, _MLA_FP8), ("fp8", 128, _MLA_FP8))
            for split in (True, False)
        ),
    },
}


def install(version: str) -> Path:
    """A folder that has nothing but this Triton, to go before the environment's own."""
    folder = record.ROOT / ".build" / "tritons" / version
    if not folder.exists():
        staged = folder.with_name(f"{version}.part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", f"--target={staged}"]
        subprocess.run([*command, f"triton=={version}"], check=True)
        staged.rename(folder)
    return folder


def run(version: str, arguments: list[str]) -> dict[str, Any]:
    """The record's entry of a Triton."""
    report = record.ROOT / ".build" / "tritons" / f"{version}.json"
    report.unlink(missing_ok=True)
    command = ["-m", "tools.compile_matrix", *(arguments or ["--targets", "all"])]
    path = os.pathsep.join((str(install(version)), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command_line = [sys.executable, *command, "--json", str(report)]
    subprocess.run(command_line, cwd=record.ROOT, env=environment, check=False)
    results = json.loads(report.read_text())
    return {
        "triton": version,
        "command": " ".join(("python", *command)),
        "compiled": len(results),
        "problems": {f"{r['target']} {r['op']}.{r['case']}": r["problem"] for r in results if r["problem"]},
    }


def main(words: list[str]) -> int:
    versions, arguments = record.versions_and_rest(words)
    unknown = 0
    for version in versions or KNOWN:
        entry = run(version, arguments)
        record.write(RECORD, ("triton", "command"), entry)
        unknown += len(entry["problems"].keys() - KNOWN[version])
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
