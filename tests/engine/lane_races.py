"""A side lane that runs on a CPU and finds unordered accesses: what a race between two streams would be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LaneRaces(TorchDispatchMode):
    """Both modes at once: the lane that the schedule issues to, and a watch over every torch operation.

    Raises AssertionError where an operation touches what an operation of the other lane wrote, or writes what it read,
    without a fork or join between them. Storage is never reused here, so races over reused storage are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lane, self.clock = "main", 0
        #: Until when each lane has waited for the other.
        self.waited = {"main": 0, "side": 0}
        #: Storage -> (lane, time, operation) of its last write, and of its last read by each lane.
        self.writes: dict[int, tuple[str, int, str]] = {}
        self.reads: dict[tuple[int, str], tuple[str, int, str]] = {}
        self._alive: list[torch.Tensor] = []  # so that no storage gets the address of another

    def fork(self) -> None:
        self.waited["side"] = self.clock

    def join(self) -> None:
        self.waited["main"] = self.clock

    def side(self) -> LaneRaces._Side:
        return self._Side(self)

    class _Side:
        """What `side_lane` returns."""

        def __init__(self, watch: LaneRaces):
            self.fork, self.join, self._watch = watch.fork, watch.join, watch

        def __enter__(self) -> None:
            self._watch.lane = "side"

        def __exit__(self, *exception: object) -> None:
            self._watch.lane = "main"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.clock += 1
        other = "side" if self.lane == "main" else "main"
        arguments = [*zip(func._schema.arguments, args, strict=False)]
        arguments += [(a, kwargs[a.name]) for a in func._schema.arguments if kwargs and a.name in kwargs]
        for argument, value in arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for storage in _storages(value):
                self._require_order(func, self.writes.get(storage), "wrote")
                if written:
                    self._require_order(func, self.reads.get((storage, other)), "read")
                    self.writes[storage] = (self.lane, self.clock, str(func))
                else:
                    self.reads[storage, self.lane] = (self.lane, self.clock, str(func))
        result = func(*args, **(kwargs or {}))
        known = {storage for _, value in arguments for storage in _storages(value)}
        for storage in set(_storages(result)) - known:
            self.writes[storage] = (self.lane, self.clock, str(func))
        self._alive += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result

    def _require_order(self, func: Any, earlier: tuple[str, int, str] | None, what: str) -> None:
        if earlier is None or earlier[0] == self.lane or earlier[1] <= self.waited[self.lane]:
            return
        raise AssertionError(f"{func} of the {self.lane} lane touches what {earlier[2]} of the other {what} unordered")


def _storages(value: Any) -> Iterator[int]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage().data_ptr()
