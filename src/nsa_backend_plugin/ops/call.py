"""The two nouns of this package: a call, the checked arguments of one public function, and a step, what the calls of
one forward share.

A public function checks its arguments and builds a `Call`. Implementations, their reasons for declining, preferences,
the log, reports, tests, benchmarks and the replay of a wrong result all take that object.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch

#: Why something cannot be done; None where it can.
Reason = str | None
Fact = int | str | bool
R = TypeVar("R")
T = TypeVar("T")


class Declined(ValueError):
    """No implementation that may run takes the call. reasons: implementation -> why."""

    def __init__(self, message: str, reasons: Mapping[str, str]):
        super().__init__(f"{message} ({'; '.join(f'{name}: {reason}' for name, reason in reasons.items())})")
        self.reasons = dict(reasons)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on a device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Step:
    """What the calls of one forward step share and no layer's data changes: schedules, split counts, lengths.

    An engine makes one per forward and one per captured graph, and passes it to every call; the first layer fills it.
    It belongs to tensors of one shape on one device. What is made eagerly is not used in a capture, nor the reverse:
    a replay must compute what it uses.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T], *of: torch.Tensor, device: torch.device | None = None) -> T:
        """The value of a key, from `make` at its first use.

        of: the tensors whose contents the value depends on; others' values do not serve them. They must not change
        within the step. device: where the value lives; needed where no tensor says so.
        """
        where = of[0].device if of else device
        assert where is not None, "expected a tensor or a device"
        full = (key, where, capturing(where), *((t.data_ptr(), t.shape, t.stride()) for t in of))
        if full not in self._kept:
            self._kept[full] = (make(), of)  # the tensors too: nothing else may come to lie where they lie
        return self._kept[full][0]


@dataclass(slots=True, eq=False, kw_only=True)
class Call(Generic[R]):
    """The checked arguments of one public function; every operation has a subclass for each of its functions.

    arch: of the device that the tensors are on. impl: the implementation that the caller insists on.
    R: what the public function returns.
    """

    arch: str
    step: Step = field(default_factory=Step)
    impl: str | None = None

    def facts(self) -> Mapping[str, Fact]:
        """Everything that a preference may ask, and what the log says of the call."""
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of the tensor arguments."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                yield item.name, value

    #: Distance (`witness.row_distance`) up to which a row counts as equal to the reference's.
    bar: ClassVar[float] = 1e-3

    def row_count(self) -> int:
        """Rows that can be computed apart, along the result's first dimension; with `of_rows`, for the witness."""
        raise NotImplementedError(f"{type(self).__name__} cannot be cut into rows")

    def of_rows(self, rows: torch.Tensor) -> Call[R]:
        """The same call for some of its rows [n] int64, with only what these read: small enough to be saved."""
        raise NotImplementedError(f"{type(self).__name__} cannot be cut into rows")

    def comparable(self, result: Any) -> torch.Tensor:
        """[rows, ...] of a result, in a form in which equal rows are close: its first tensor unless told."""
        return result[0] if isinstance(result, tuple) else result

    @property
    def device(self) -> torch.device:
        return next(value for _, value in self.tensors()).device
