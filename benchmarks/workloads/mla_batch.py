"""One attention layer of MLA for any batch, projections included, through its two pipelines.

decode   absorb q into the latent space, attend over the latent cache, project the values up
prefill  gather the latent rows, project keys and values up, ordinary causal attention

Requests of at most `reorder_batch_threshold` new tokens take the decode pipeline, longer ones the prefill pipeline
(pipeline="auto"); "decode" and "prefill" send every request one way. Both compute the same output.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from benchmarks.batch_spec import BatchRequest, parse_batch_spec
from benchmarks.checked import BatchSpec, Count, Heads
from benchmarks.timing.clock import input_sets
from benchmarks.workloads import base
from benchmarks.workloads.base import Params, Problem, Workload
from nsa_backend_plugin.layouts import ROPE_DIM
from nsa_backend_plugin.ops import concat, dense_mla
from nsa_backend_plugin.ops.call import Step
from tools.calls import SOFTMAX_SCALE, block_table, int32, row_slots

NOPE, ROPE = 128, ROPE_DIM
#: Two bf16 projections lie between the attention and the output.
BAR = 5e-5


@dataclass(frozen=True)
class Layer:
    """Up-projections of one layer: keys [H, 128, 512], values [H, 512, 128], and both as prefill's [512, H*256]."""

    key: torch.Tensor
    value: torch.Tensor
    both: torch.Tensor

    @classmethod
    def random(cls, heads: int, device: torch.device) -> Layer:
        def matrix(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(heads, rows, columns, device=device) * 512**-0.5).to(torch.bfloat16)

        key, value = matrix(NOPE, base.VALUE_DIM), matrix(base.VALUE_DIM, NOPE)
        both = torch.cat([key.transpose(1, 2), value], dim=2).transpose(0, 1).reshape(base.VALUE_DIM, -1)
        return cls(key, value, both.contiguous())


@dataclass(frozen=True)
class Part:
    """The requests of a batch that take one pipeline, and their rows among the batch's query tokens."""

    requests: tuple[BatchRequest, ...]
    numbers: tuple[int, ...]
    rows: torch.Tensor

    @property
    def row_lengths(self) -> list[int]:
        """Tokens that each query token sees."""
        return [r.context_len + j + 1 for r in self.requests for j in range(r.q_len)]


def split(requests: Sequence[BatchRequest], pipeline: str, threshold: int, device: torch.device) -> tuple[Part, Part]:
    """(decode part, prefill part)."""
    starts = [sum(r.q_len for r in requests[:i]) for i in range(len(requests))]
    parts = []
    for wants_decode in (True, False):
        numbers = [
            i
            for i, r in enumerate(requests)
            if (pipeline == "decode" or (pipeline == "auto" and r.q_len <= threshold)) == wants_decode
        ]
        rows = [starts[i] + j for i in numbers for j in range(requests[i].q_len)]
        chosen = tuple(requests[i] for i in numbers)
        parts.append(Part(chosen, tuple(numbers), torch.tensor(rows, dtype=torch.long, device=device)))
    return parts[0], parts[1]


def build(params: Mapping[str, Any], device: torch.device) -> Problem:
    heads, page = params["heads"], params["page_size"]
    requests = parse_batch_spec(params["batch_spec"])
    decode, prefill = split(requests, params["pipeline"], params["reorder_batch_threshold"], device)
    tokens = sum(r.q_len for r in requests)
    contexts = [r.kv_len for r in requests]
    pages = max(params["pool_slots"] // page, sum(-(-n // page) for n in contexts))
    pool = base.latent_pool("bf16", pages * page, device)
    layer = Layer.random(heads, device)
    decode_lens = int32(decode.row_lengths, device)
    repeats = torch.tensor([r.q_len for r in decode.requests], dtype=torch.long, device=device)

    q_bytes = tokens * heads * (NOPE + ROPE) * 2
    kv_tokens = sum(r.kv_len for r in requests)
    touched = kv_tokens * base.HEAD_DIM * 2 + q_bytes + tokens * heads * NOPE * 2 + layer.both.numel() * 2
    sets = input_sets(touched, q_bytes + kv_tokens * 8, device, at_least=params["min_sets"])
    inputs = []
    for _ in range(sets):
        table, _ = block_table(contexts, page, device, pages)
        slots = [row_slots(table[i], requests[i].kv_len, page) for i in prefill.numbers]
        q = torch.randn(tokens, heads, NOPE + ROPE, device=device).to(torch.bfloat16)
        decode_table = table[list(decode.numbers)].repeat_interleave(repeats, dim=0)
        inputs.append((q, table, decode_table, torch.cat(slots) if slots else None))

    step = Step()

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        q, _, decode_table, prefill_slots = item
        out = torch.empty(tokens, heads, NOPE, dtype=q.dtype, device=device)
        if decode.requests:
            part = q if not prefill.requests else q[decode.rows]
            how = {"page_size": page, "num_kv_splits": params["num_kv_splits"], "step": step, "impl": impl}
            attended = _decode(part, pool, decode_table, decode_lens, layer, how)
            out[decode.rows] = attended
        if prefill.requests:
            part = q if not decode.requests else q[prefill.rows]
            out[prefill.rows] = _prefill(part, pool, prefill_slots, prefill.requests, layer)
        return out

    def check(out: torch.Tensor, item: Any) -> float:
        q, table, _, _ = item
        owners = [(i, r.context_len + j + 1) for i, r in enumerate(requests) for j in range(r.q_len)]
        rows = base.some_rows(tokens, device).tolist()
        expected = torch.stack(
            [_reference(q[t], pool, row_slots(table[i], n, page), layer) for t in rows for i, n in [owners[t]]]
        )
        return base.cosine_distance(out[rows].float(), expected)

    return Problem(
        inputs=inputs,
        run=run,
        check=check,
        bar=BAR,
        checked=base.rows_checked(tokens),
        bytes=touched,
        flops=_flops(decode, prefill, heads),
    )


def _decode(q, pool, table, lens, layer: Layer, how: dict[str, Any]) -> torch.Tensor:
    absorbed = torch.bmm(q[..., :NOPE].transpose(0, 1), layer.key).transpose(0, 1)
    whole = torch.cat([absorbed, q[..., NOPE:]], dim=-1)
    latent = dense_mla.decode(whole, pool, table, lens, SOFTMAX_SCALE, rows_have_keys=True, kv_is_finite=True, **how)
    assert isinstance(latent, torch.Tensor)
    return torch.bmm(latent.transpose(0, 1), layer.value).transpose(0, 1)


def _prefill(q, pool, slots, requests: Sequence[BatchRequest], layer: Layer) -> torch.Tensor:
    latent = pool[slots, 0]
    heads = q.shape[1]
    up = (latent[:, : base.VALUE_DIM] @ layer.both).view(-1, heads, 2 * NOPE)
    key = concat.mla_k(up[..., :NOPE], latent[:, None, base.VALUE_DIM :])
    value = up[..., NOPE:]
    if q.is_cuda and importlib.util.find_spec("sgl_kernel"):
        return _flash(q, key, value, requests)
    outputs, first_q, first_k = [], 0, 0
    for r in requests:
        last_q, last_k = first_q + r.q_len, first_k + r.kv_len
        outputs.append(_causal(q[first_q:last_q], key[first_k:last_k], value[first_k:last_k]))
        first_q, first_k = last_q, last_k
    return torch.cat(outputs)


def _flash(q, key, value, requests: Sequence[BatchRequest]) -> torch.Tensor:
    """FlashAttention-3 over all requests at once; its causal mask is aligned to the last token."""
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        key,
        value.contiguous(),
        cu_seqlens_q=_starts([r.q_len for r in requests], q.device),
        cu_seqlens_k=_starts([r.kv_len for r in requests], q.device),
        max_seqlen_q=max(r.q_len for r in requests),
        max_seqlen_k=max(r.kv_len for r in requests),
        softmax_scale=SOFTMAX_SCALE,
        causal=True,
    )


_START_CACHE: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}


def _starts(lengths: list[int], device: torch.device) -> torch.Tensor:
    """Cumulative lengths from 0; kept, because a copy from the host cannot be captured into a graph."""
    key = (tuple(lengths), device)
    if key not in _START_CACHE:
        total = [0]
        for n in lengths:
            total.append(total[-1] + n)
        _START_CACHE[key] = int32(total, device)
    return _START_CACHE[key]


def _causal(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """q [T, H, 192], key [S, H, 192], value [S, H, 128]; query t sees the first S - T + t + 1 tokens."""
    seen = torch.ones(q.shape[0], key.shape[0], dtype=torch.bool, device=q.device).tril(key.shape[0] - q.shape[0])
    q, key, value = (x.transpose(0, 1)[None] for x in (q, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=seen, scale=SOFTMAX_SCALE)
    return out[0].transpose(0, 1)


def _reference(q: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, layer: Layer) -> torch.Tensor:
    """One query token [H, 192] -> [H, 128], in float32 through the latent space."""
    latent = pool[slots, 0].float()
    absorbed = torch.einsum("hn,hnl->hl", q[:, :NOPE].float(), layer.key.float())
    scores = torch.cat([absorbed, q[:, NOPE:].float()], dim=-1) @ latent.T * SOFTMAX_SCALE
    attended = torch.softmax(scores, dim=-1) @ latent[:, : base.VALUE_DIM]
    return torch.einsum("hl,hln->hn", attended, layer.value.float())


def _flops(decode: Part, prefill: Part, heads: int) -> int:
    projections = 4 * len(decode.row_lengths) * heads * NOPE * base.VALUE_DIM
    latent = 2 * heads * sum(decode.row_lengths) * (base.HEAD_DIM + base.VALUE_DIM)
    up = 2 * sum(r.kv_len for r in prefill.requests) * base.VALUE_DIM * heads * 2 * NOPE
    ordinary = 2 * heads * sum(prefill.row_lengths) * (2 * NOPE + ROPE)
    return projections + latent + up + ordinary


class Batch(Params):
    batch_spec: BatchSpec = Field("2q2k_32q1s1k", description="requests, any mix")
    heads: Heads = Field(128, description="query heads")
    page_size: Count = Field(64, description="tokens per page")
    pipeline: Literal["auto", "decode", "prefill"] = Field("auto", description="auto: by reorder_batch_threshold")
    reorder_batch_threshold: Count = Field(1, description="most new tokens of a request that takes the decode pipeline")
    num_kv_splits: Count | None = Field(None, description="splits of each context (null: the kernel's choice)")
    pool_slots: Count = Field(1_200_000, description="slots of the latent cache, at least")


WORKLOAD = Workload(
    "mla_batch", ("dense_mla.decode",), build, Batch, batch=lambda params: len(parse_batch_spec(params["batch_spec"]))
)
