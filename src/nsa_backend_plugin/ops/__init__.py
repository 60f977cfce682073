"""Pure tensor operations of DSA and MLA attention.

One folder per operation: `__init__.py` holds the public functions, `reference.py` the torch reference
(implementation name `torch`), every other file one implementation. Nothing here imports sglang.

`ops.sparse_mla` and its siblings import on first use, because importing the package must stay free of torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from nsa_backend_plugin.settings import OPERATIONS


def __getattr__(name: str) -> ModuleType:
    if name not in OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *OPERATIONS})
