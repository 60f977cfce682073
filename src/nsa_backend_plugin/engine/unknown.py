"""Keywords that SGLang passes and we do not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse(where: str, keywords: Mapping[str, Any]) -> None:
    """Raise ValueError for a keyword that has a value: what it asks for would be ignored. None asks for nothing."""
    given = sorted(name for name, value in keywords.items() if value is not None)
    if given:
        raise ValueError(
            f"SGLang passes {', '.join(given)} to {where}: nsa_plugin does not know what it asks for. Choose another "
            "--attention-backend for this model"
        )
