"""The workloads of the suite by name."""

from __future__ import annotations

from benchmarks.workloads import caches, concat, dense_mla, indexer, mla_batch, projection, sparse_mla, standard
from benchmarks.workloads.base import Problem, Workload

WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        dense_mla.WORKLOAD,
        mla_batch.WORKLOAD,
        standard.WORKLOAD,
        sparse_mla.DECODE,
        sparse_mla.PREFILL,
        indexer.PAGED,
        indexer.RAGGED,
        indexer.TOPK,
        indexer.CHAIN,
        caches.PREP,
        caches.INDEX_STORE,
        caches.INDEX_GATHER,
        caches.LATENT_STORE,
        caches.NORM_QUANT,
        caches.QUANTIZE,
        caches.DEQUANTIZE,
        projection.LINEAR,
        projection.PER_HEAD,
        concat.MLA_K,
        concat.Q_ALL,
    )
}


def workload(name: str) -> Workload:
    if name not in WORKLOADS:
        raise ValueError(f"workload={name!r}: expected one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


__all__ = ["WORKLOADS", "Problem", "Workload", "workload"]
