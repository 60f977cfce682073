"""What the command line, YAML files and workloads' parameters have in common: checked values, errors in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.batch_spec import parse_batch_spec


def _batch_spec(spec: str) -> str:
    parse_batch_spec(spec)
    return spec


Count = Annotated[int, Field(ge=1, le=1 << 31)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Percent = Annotated[int, Field(ge=0, le=100)]
Positive = Annotated[float, Field(gt=0)]
BatchSpec = Annotated[str, AfterValidator(_batch_spec)]

M = TypeVar("M", bound="Model")


class Model(BaseModel):
    """Values of exactly the declared types. A key that is not declared is an error that lists those that are."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(f"key {key!r}: expected one of {', '.join(cls.model_fields)}")
        return values


def check(model: type[M], values: Any, names: Mapping[str, str] | None = None) -> M:
    """The model of the values. Raises ValueError that names every bad value, what it is and what was expected.

    names: what to call a field in the error, where the user knows it by another name (an option).
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ValueError(words(error, names or {})) from None


def words(error: ValidationError, names: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(_problem(e, names) for e in error.errors()))


def _problem(error: Any, names: Mapping[str, str]) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    place = names.get(place, place)
    message = re.sub(r"^(Value error, |Input should be )", "", error["msg"]).replace("a valid list", "a list")
    if error["type"] == "value_error":
        return f"{place}: {message}" if place else message
    return f"{place or 'the content'}={error['input']!r}: expected {message}"
