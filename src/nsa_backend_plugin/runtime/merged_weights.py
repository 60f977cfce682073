"""Weights of several layers as one matrix, so that one GEMM reads their common input once.

A merged matrix is a parameter of the model, as its sources are: it moves with them and lies in their memory region.
`rebuild` brings it up to date after an update of theirs. Which layers may be merged is for the engine to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Rows = Callable[[], torch.Tensor]


class MergedWeights(torch.nn.Module):
    """One parameter for each of `matrices`: the rows that its functions give, one below the other.

    Rows that are a parameter themselves become a view of the matrix, so that what is written to them lands there. Other
    rows (a dequantized weight) are copied, and only `rebuild` copies them again.
    layers: those whose weights are merged, if they are called in place of the matrix where it does not serve them.
    obstacle: why the sources cannot be merged (any more), None if they can.
    """

    weight: torch.Tensor

    def __init__(
        self,
        matrices: Mapping[str, Sequence[Rows]],
        layers: Sequence[Any] = (),
        obstacle: Callable[[], str | None] = lambda: None,
    ):
        super().__init__()
        self._rows, self._layers, self._obstacle = dict(matrices), tuple(layers), obstacle
        for name, functions in matrices.items():
            first, *others = (rows() for rows in functions)
            size = (len(first) + sum(map(len, others)), *first.shape[1:])
            whole = first.new_empty(size) if others else torch.empty_like(first)  # a single one keeps its strides
            self.register_parameter(name, torch.nn.Parameter(whole, requires_grad=False))
        self.rebuild()

    def rebuild(self) -> None:
        """Take over the sources as they are now, in place: captured graphs keep the matrix's address.

        Raises RuntimeError when they cannot be merged any more, because graphs may have captured the matrix.
        """
        if reason := self._obstacle():
            raise RuntimeError(f"nsa_plugin cannot rebuild a merged weight after an update of its sources: {reason}")
        for name, functions in self._rows.items():
            parts = [rows() for rows in functions]
            views = getattr(self, name).data.split([len(part) for part in parts])
            for part, view in zip(parts, views, strict=True):
                if part.data_ptr() == view.data_ptr():
                    continue
                view.copy_(part)
                if isinstance(part, torch.nn.Parameter):
                    part.data = view
        self._weights = tuple(layer.weight for layer in self._layers)

    @property
    def in_force(self) -> bool:
        """Whether the layers still have the weights that were merged (torchao and others replace them)."""
        return all(layer.weight is merged for layer, merged in zip(self._layers, self._weights, strict=True))

    def serves(self, *layers: Any) -> bool:
        """Whether these are the merged layers themselves, not wrappers of them (LoRA), with the merged weights."""
        return layers == self._layers and self.in_force

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints have the sources only."""


def rebuild_all(model: torch.nn.Module) -> None:
    """Rebuild every merged weight of a model."""
    for module in model.modules():
        if isinstance(module, MergedWeights):
            module.rebuild()


def drop_replaced(model: torch.nn.Module) -> None:
    """Remove, and so free, the merged weights whose layers have other weights by now."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MergedWeights) and not child.in_force:
                delattr(module, name)
