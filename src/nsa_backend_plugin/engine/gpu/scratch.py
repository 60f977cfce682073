"""Scratch of captured graphs: allocated before capture, and one piece for all backends of a process.

A server with speculative decoding has several backends (target, one per draft step, draft-extend). Their graphs are
replayed one after the other on one stream, so they share; a piece that a later backend finds too small is replaced
for that backend only, because captured graphs keep the address they have seen.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

_pieces: dict[tuple[str, torch.device], torch.Tensor] = {}


def reserve(name: str, size: int, device: torch.device | str) -> torch.Tensor:
    """At least `size` bytes [>= size] uint8 under a name, zeroed when new; what is allocated is logged."""
    key = name, torch.device(device)
    piece = _pieces.get(key)
    if piece is None or piece.numel() < size:
        piece = torch.zeros(size, dtype=torch.uint8, device=device)
        _pieces[key] = piece
        logger.info("nsa_plugin scratch of captured graphs: %s %.1f MiB", name, size / 2**20)
    return piece
