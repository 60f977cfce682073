"""Peers that have no adapter under `ops/`, by workload and name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.batch_spec import parse_batch_spec
from benchmarks.peers import sglang, standard
from benchmarks.workloads import Problem, workload

Call = Callable[[Any], Any]
Params = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """prepare(problem) -> call(inputs). modules: packages it needs. gpu: whether it needs one. needs: a condition on
    the case's parameters, and the words for a case that does not meet it."""

    workload: str
    name: str
    prepare: Callable[[Problem], Call]
    modules: tuple[str, ...] = ()
    gpu: bool = True
    needs: tuple[Callable[[Params], bool], str] = (lambda params: True, "")


_ROW_MAJOR = (lambda p: p["layout"] == "row_major", "row_major only")
_TILELANG = (
    lambda p: p["kv"] == "bf16" and p["heads"] % 16 == 0 and p["topk"] == 2048,
    "takes bf16 rows, a multiple of 16 heads and top-k 2048",
)
_PACKS = (lambda p: p["kv"] == "packed" and not p["rope"], "packs to fp8, and rotates in a kernel of its own")
_TWO_BYTES = (lambda p: p["dtype"] == "bf16", "copies 2-byte values only")
_BF16 = (lambda p: p["kv"] == "bf16", "takes bf16 rows")
_ONE_QUERY = (lambda p: all(r.q_len == 1 for r in parse_batch_spec(p["batch_spec"])), "takes one query per request")

PEERS = {
    (p.workload, p.name): p
    for p in (
        Peer("sparse_decode", "sglang_tilelang", sglang.tilelang, ("sglang", "tilelang"), needs=_TILELANG),
        Peer("dense_decode", "sglang_triton", sglang.triton_decode, ("sglang",), needs=_BF16),
        Peer("indexer_prep", "sglang_kernels", sglang.prep, ("sglang",)),
        Peer("index_store", "sglang_fused_store", sglang.index_store, ("sglang",), needs=_ROW_MAJOR),
        Peer("latent_store", "sglang_two_kernels", sglang.latent_store, ("sglang",), needs=_PACKS),
        Peer("norm_quant", "sglang_two_kernels", sglang.norm_quant, ("sglang", "flashinfer")),
        Peer("projection", "sglang_gemm", sglang.projection, ("sglang", "flashinfer")),
        Peer("projection_per_head", "torch_bmm", sglang.torch_bmm, gpu=False),
        Peer("latent_quantize", "sglang_quantize", sglang.quantize, ("sglang",)),
        Peer("concat_k", "sglang_jit", sglang.concat, ("sglang",), needs=_TWO_BYTES),
        Peer("concat_k", "torch_cat", sglang.torch_cat, gpu=False),
        Peer("standard", "torch", standard.sdpa, gpu=False),
        Peer("standard", "flash", standard.flash, ("sgl_kernel",)),
        Peer("standard", "flashinfer", standard.flashinfer, ("flashinfer",)),
        Peer("standard", "triton", standard.triton, ("sglang",), needs=_ONE_QUERY),
    )
}


def names(kind: str) -> list[str]:
    return [name for owner, name in PEERS if owner == kind]


def unavailable(kind: str, name: str, params: Params, device: torch.device) -> str:
    """Why a peer cannot run a case, or "" when it can."""
    peer = PEERS[kind, name]
    if peer.gpu and device.type != "cuda":
        return "needs a GPU"
    missing = [m for m in peer.modules if importlib.util.find_spec(m) is None]
    if missing:
        return f"{missing[0]} is not installed"
    meets, why = peer.needs
    return "" if meets(workload(kind).complete(params)) else why


def prepare(kind: str, name: str, problem: Problem) -> Call:
    return PEERS[kind, name].prepare(problem)
