"""The calls that serving a model makes, with tensors on `meta`: for reports, and for compiling kernels before they run.

Shapes, strides and dtypes are those of the engine's own calls, so that a report names what will run and a kernel is
compiled with the specialization that will be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ParamSpec

import torch

from nsa_backend_plugin.layouts import INDEX_DIM, LATENT_DIM, ROPE_DIM, index_page_bytes, packed_latent_bytes
from nsa_backend_plugin.ops import (
    concat,
    dense_mla,
    index_key_cache,
    indexer_prep,
    latent_cache,
    mqa_logits,
    norm_quant,
    projection,
    sparse_mla,
    topk,
)
from nsa_backend_plugin.ops.arch import arch_fp8_dtype, is_cuda, is_rocm, pretended
from nsa_backend_plugin.ops.call import Call
from nsa_backend_plugin.ops.dispatch import Explanation, Operation

NOPE_DIM = 128  # of a query head, before it is absorbed
_PAGES = 1 << 12


@dataclass(frozen=True)
class Indexer:
    """What decides the calls of a model's indexer, as `indexer_prep` takes it; the defaults are DeepSeek-V3.2's.

    key_dtype, gate_dtype: of what the projections yield, float32 where they are merged.
    """

    heads: int
    topk: int = 2048
    is_neox: bool = True
    hadamard: bool = True
    norm: str = "layer"
    scale_format: str = "ue8m0"
    key_dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Projection:
    """A product of a layer's tokens with weights [rows, depth], by `projection.linear` for at most so many tokens."""

    rows: int
    depth: int
    most_tokens: int
    fp8: bool
    norm: bool = False
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """What decides the shapes of a model's calls on one GPU.

    heads: query heads. kv: "bf16", "packed" (with an indexer), or "fp8" (without one, and on ROCm).
    quantized_q_lora: width of q_lora where one call normalizes and quantizes it (merged fp8 projections), else 0.
    projections: of a layer, those that read few tokens. absorbs, values: the most tokens that `projection.per_head`
    multiplies with W_UK and with W_UV. group: GPUs that split each context: attention is over a part of it, with the
    query heads of all of them, and SGLang prepares its input.
    """

    heads: int
    indexer: Indexer | None = None
    kv: str = "bf16"
    layout: str = "row_major"
    page_size: int = 64
    quantized_q_lora: int = 0
    projections: tuple[Projection, ...] = ()
    absorbs: int = 0
    values: int = 0
    group: int = 1


@dataclass(frozen=True)
class Step:
    """One forward: `requests` of `queries` tokens each, with `context` tokens in the cache, as decode or prefill."""

    requests: int
    context: int
    queries: int = 1
    prefill: bool = False

    def __str__(self) -> str:
        kind = "prefill" if self.prefill else "decode"
        return f"{kind} {self.requests} x {self.queries} over {self.context}"


#: For a report without a model at hand: what people serve, and how.
TYPICAL = (Step(1, 8192), Step(64, 8192), Step(1, 8192, 4096, prefill=True))


def examples(arch: str) -> dict[str, Model]:
    """Models of a report without one at hand, by a name that says what they are."""
    kv, layout = ("packed", "row_major") if is_cuda(arch) else ("bf16", "preshuffled" if is_rocm(arch) else "row_major")

    def v32(heads: int) -> Model:
        model = Model(heads, Indexer(64), kv=kv, layout=layout, quantized_q_lora=1536 if is_cuda(arch) else 0)
        if arch != "sm_90":
            return model
        q_b = Projection(heads * (NOPE_DIM + ROPE_DIM) + 64 * INDEX_DIM, 1536, 32, fp8=True, norm=True)
        per_head = 32 if heads <= 64 else 0  # W_UK and W_UV of more are cuBLAS's
        q_a = Projection(2112, 7168, 32, fp8=True)
        return replace(model, projections=(q_a, q_b), absorbs=per_head, values=per_head)

    return {
        "DeepSeek-V3.2, 16 heads": v32(16),
        "DeepSeek-V3.2, 128 heads": v32(128),
        "DeepSeek-V3, 16 heads": Model(16),
        "DeepSeek-V3, 128 heads": Model(128),
    }


_Made = tuple[Operation, Call]
_Make = Callable[..., torch.Tensor]
P = ParamSpec("P")


def _made(operation: Operation[P, Any], *args: P.args, **kwargs: P.kwargs) -> _Made:
    return operation, operation.call(*args, **kwargs)


def calls(model: Model, step: Step, arch: str) -> Iterator[_Made]:
    """(operation, call) of one layer in one step, in the order of the engine's calls."""
    with pretended(arch) as device:

        def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        yield from _projections(model, step, make)
        if model.indexer is None:
            yield from _dense(model, step, arch, make)
        else:
            yield from _sparse(model, model.indexer, step, arch, make)


def explanations(model: Model, steps: Iterable[Step], arch: str) -> Iterator[tuple[Step, Explanation]]:
    """What runs each call, for each step."""
    for step in steps:
        for operation, call in calls(model, step, arch):
            yield step, operation.explain(call)


def report(model: Model, steps: Iterable[Step], arch: str) -> list[str]:
    """A line for every function: what runs it, apart by step where that differs, and why each other one does not."""
    found: dict[str, list[tuple[Step, Explanation]]] = {}
    for step, explained in explanations(model, steps, arch):
        found.setdefault(explained.operation, []).append((step, explained))
    lines = []
    for rows in found.values():
        if len({explained.chosen for _, explained in rows}) == 1:
            lines.append(str(rows[0][1]))
        else:
            lines += [f"{explained} [{step}]" for step, explained in rows]
    return lines


def _sparse(model: Model, indexer: Indexer, step: Step, arch: str, make: _Make) -> Iterator[_Made]:
    """A prefill on a GPU writes its latent rows by SGLang, and on CUDA it is indexed by SGLang, up to its top-k."""
    tokens, whole, decodes = step.requests * step.queries, model.group == 1, not step.prefill
    heads = model.heads * model.group
    cache = _latent_cache(model, arch, make)
    kv_scale = 1.0 if model.kv == "fp8" else None
    q_all = make(tokens, heads, LATENT_DIM + ROPE_DIM)
    normalizes = any(p.norm and tokens <= p.most_tokens for p in model.projections)
    if whole and decodes and not normalizes and (width := model.quantized_q_lora):
        q_lora = make(tokens, width + LATENT_DIM + ROPE_DIM)[:, :width]
        yield _made(norm_quant.rms, q_lora, make(width))
    if whole and (decodes or not is_cuda(arch)):
        yield from _indexer(model, indexer, step, arch, make)
    if whole:
        yield _top_k(model, indexer, step, make)
    if whole and (decodes or arch == "cpu"):
        latent = make(tokens, LATENT_DIM + ROPE_DIM)
        query = make(tokens, heads, NOPE_DIM + ROPE_DIM)
        yield _made(
            latent_cache.store,
            latent[:, :LATENT_DIM],
            latent[:, LATENT_DIM:],
            cache,
            make(tokens, dtype=torch.int64),
            positions=make(tokens, dtype=torch.int64),
            cos_sin_cache=make(1 << 16, ROPE_DIM, dtype=torch.float32),
            is_neox=False,
            kv_scale=kv_scale,
            q_rope=query[..., NOPE_DIM:] if decodes else None,
            q_all=q_all if decodes else None,
            norm_weight=make(LATENT_DIM) if decodes else None,
        )
    context = step.requests * -(-step.context // model.page_size) * model.page_size
    yield _made(
        sparse_mla.attend,
        q_all,
        cache,
        make(tokens, indexer.topk, dtype=torch.int32),
        1.0,
        kv_scale=kv_scale,
        lengths=make(tokens, dtype=torch.int32),
        context=None if decodes else make(context, dtype=torch.int32),
        rows_have_keys=whole,
        return_lse=not whole,
    )


def _projections(model: Model, step: Step, make: _Make) -> Iterator[_Made]:
    tokens = step.requests * step.queries
    for p in model.projections:
        if tokens <= p.most_tokens:
            blocks = (-(-p.rows // projection.GROUP), p.depth // projection.GROUP)
            yield _made(
                projection.linear,
                make(tokens, p.depth),
                make(p.rows, p.depth, dtype=torch.float8_e4m3fn if p.fp8 else torch.bfloat16),
                make(*blocks, dtype=torch.float32) if p.fp8 else None,
                norm_weight=make(p.depth) if p.norm else None,
                dtype=p.dtype,
            )
    if tokens <= model.absorbs and not step.prefill:
        queries = make(tokens, model.heads, NOPE_DIM + ROPE_DIM)[..., :NOPE_DIM]
        yield _made(projection.per_head, queries, make(model.heads, LATENT_DIM, NOPE_DIM))
    if tokens <= model.values:
        attended = make(tokens, model.heads, LATENT_DIM)
        yield _made(projection.per_head, attended, make(model.heads, NOPE_DIM, LATENT_DIM))


def _indexer(model: Model, indexer: Indexer, step: Step, arch: str, make: _Make) -> Iterator[_Made]:
    fp8 = arch_fp8_dtype(arch)
    tokens, index_heads = step.requests * step.queries, indexer.heads
    pages = -(-step.context // model.page_size)
    position = make(tokens, dtype=torch.int64)
    rope = make(1 << 16, ROPE_DIM, dtype=torch.float32)
    index_cache = make(_PAGES, index_page_bytes(model.page_size), dtype=torch.uint8)
    cache_kind: dict[str, Any] = {"layout": model.layout, "page_size": model.page_size}
    key, gate = (make(tokens, INDEX_DIM + index_heads, dtype=t) for t in (indexer.key_dtype, indexer.gate_dtype))
    yield _made(
        indexer_prep.key_store,
        key[:, :INDEX_DIM],
        make(INDEX_DIM, dtype=torch.float32),
        make(INDEX_DIM, dtype=torch.float32) if indexer.norm == "layer" else None,
        position,
        rope,
        index_cache,
        make(tokens, dtype=torch.int64),
        is_neox=indexer.is_neox,
        norm=indexer.norm,
        hadamard=indexer.hadamard,
        **cache_kind,
    )
    yield _made(
        indexer_prep.query,
        make(tokens, index_heads, INDEX_DIM),
        gate[:, INDEX_DIM:],
        position,
        rope,
        weight_scale=1.0,
        is_neox=indexer.is_neox,
        hadamard=indexer.hadamard,
        scale_format=indexer.scale_format,
    )
    weights = make(tokens, index_heads, dtype=torch.float32)
    if step.prefill:
        columns = step.requests * step.context
        starts = make(tokens, dtype=torch.int32)
        yield _made(
            index_key_cache.gather,
            index_cache,
            make(step.requests, pages, dtype=torch.int32),
            make(step.requests, dtype=torch.int32),
            total_tokens=columns,
            **cache_kind,
        )
        yield _made(
            mqa_logits.ragged,
            make(tokens, index_heads, INDEX_DIM, dtype=fp8),
            make(columns, INDEX_DIM, dtype=fp8),
            make(columns, dtype=torch.float32),
            weights,
            starts,
            starts,
        )
    else:
        yield _made(
            mqa_logits.paged,
            make(step.requests, step.queries, index_heads, INDEX_DIM, dtype=fp8),
            index_cache,
            weights,
            make(step.requests, *(() if step.queries == 1 else (step.queries,)), dtype=torch.int32),
            make(tokens, pages, dtype=torch.int32)[:: step.queries],
            pages * model.page_size,
            **cache_kind,
        )


def _top_k(model: Model, indexer: Indexer, step: Step, make: _Make) -> _Made:
    """A prefill's logits are of the keys of all requests, one request's behind the other's."""
    tokens, pages = step.requests * step.queries, -(-step.context // model.page_size)
    columns = step.requests * step.context if step.prefill else pages * model.page_size
    return _made(
        topk.select,
        make(tokens, columns, dtype=torch.float32),
        make(tokens, dtype=torch.int32),
        indexer.topk,
        row_starts=make(tokens, dtype=torch.int32) if step.prefill else None,
        page_table=make(step.requests if step.prefill else tokens, pages, dtype=torch.int32),
        page_rows=make(tokens, dtype=torch.int32) if step.prefill else None,
        page_size=model.page_size,
    )


def _dense(model: Model, step: Step, arch: str, make: _Make) -> Iterator[_Made]:
    tokens = step.requests * step.queries
    if step.prefill:
        k_nope = make(tokens, model.heads, 2 * NOPE_DIM)[..., :NOPE_DIM]
        yield _made(concat.mla_k, k_nope, make(tokens, 1, ROPE_DIM))
        return
    yield _made(
        dense_mla.decode,
        make(tokens, model.heads * model.group, LATENT_DIM + ROPE_DIM),
        _latent_cache(model, arch, make),
        make(tokens, -(-step.context // model.page_size), dtype=torch.int32),
        make(tokens, dtype=torch.int32),
        1.0,
        page_size=model.page_size,
        kv_scale=1.0 if model.kv == "fp8" else None,
        return_lse=model.group > 1,
    )


def _latent_cache(model: Model, arch: str, make: _Make) -> torch.Tensor:
    slots = _PAGES * model.page_size
    if model.kv == "packed":
        return make(slots, 1, packed_latent_bytes(LATENT_DIM + ROPE_DIM), dtype=torch.uint8)
    return make(slots, 1, LATENT_DIM + ROPE_DIM, dtype=arch_fp8_dtype(arch) if model.kv == "fp8" else torch.bfloat16)
