"""The source checkout, which has more than the installed package: patches, models, the benchmark suite."""

from __future__ import annotations

from pathlib import Path

#: The checkout when the package runs from one (editable install, PYTHONPATH=src); nothing of the kind otherwise.
_RUNS_FROM = Path(__file__).resolve().parents[3]


def find(folder: str) -> Path:
    """A folder of the checkout that the package runs from, else of the one that the user stands in.

    Raises FileNotFoundError that says what to do when there is neither.
    """
    here = Path.cwd()
    for root in (_RUNS_FROM, here, *here.parents):
        if (root / "src" / "nsa_backend_plugin").is_dir() and (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(
        f"{folder}/ is not part of the installed package, and {here} is not in a source checkout: run the command in a "
        "clone of the repository, or install the clone in place (python -m pip install --no-deps -e .)"
    )
