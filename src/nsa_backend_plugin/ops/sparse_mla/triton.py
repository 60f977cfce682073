"""Sparse MLA in Triton: decode with split-K, prefill with one program per token and block of heads."""

from __future__ import annotations

import functools

import torch

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._triton import mla_launch, support
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

available = support.available_for_large_tiles


def declines_attend(call: Attend) -> Reason:
    return mla_launch.declines(call, call.kind)


def workspace_bytes_attend(device: torch.device, max_tokens: int, heads: int, topk: int, value_dim: int) -> int:
    return mla_launch.workspace_bytes(device, max_tokens, heads, value_dim)


def attend(call: Attend) -> Result:
    lengths = call.lengths if call.lengths is not None else _whole_rows(call)
    return mla_launch.attend(call, call.indices, lengths, call.indices.shape[1], kind=call.kind)


def _whole_rows(call: Attend) -> torch.Tensor:
    """[T] int32, what `lengths` is where slots may be missing anywhere in a row."""
    tokens, topk = call.indices.shape
    make = functools.partial(torch.full, (tokens,), topk, dtype=torch.int32, device=call.q.device)
    return call.step.once(("whole rows", tokens, topk), make, device=call.q.device)
