"""The arguments of a call of each public function, made in one place for tests, sanitizer and benchmarks.

`Calls(device).sparse_mla_attend(2, 16, 512)` has keyword arguments of `sparse_mla.attend`. It is a hard call: pages and
slots in random order, slots missing, rows that lie in wider ones and whose sizes are far apart, and NaN in all that
must not be read. A plain call has what a server has, for who times it. Who has a cache already, as benchmarks do, whose
input sets share one as large as a server's, gives it and gets other pages of it each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, INDEX_DIM, INDEX_PAGE_SIZE, LATENT_DIM, ROPE_DIM, index_page_bytes
from nsa_backend_plugin.ops._torch import index_pages
from nsa_backend_plugin.ops._torch.packed_rows import pack
from nsa_backend_plugin.ops._torch.quant import quantize_rows
from nsa_backend_plugin.ops.arch import fp8_dtype

Arguments = dict[str, Any]
#: 1 / sqrt(128 + 64): MLA's scale before absorption.
SOFTMAX_SCALE = 192**-0.5
HEAD_DIM = LATENT_DIM + ROPE_DIM
#: Logits of a kind, from normal ones [rows, columns].
LOGITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda noise: noise,
    "narrow": lambda noise: 100 + noise,  # few leading key bits differ
    "plateau": lambda noise: (noise - 1.5).relu(),  # what ReLU makes: most logits are exactly 0
    "equal": lambda noise: torch.full_like(noise, 7.0),
    "zeros": lambda noise: torch.where(noise > 0, 0.0, -0.0),  # -0 and +0 are ties
    "inf": lambda noise: torch.where(noise > -1, noise, float("-inf")),
    # An order that would fool a threshold taken from a prefix.
    "ascending": lambda noise: torch.arange(noise.shape[1], device=noise.device).float().expand_as(noise),
}


def poison(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor no correct result contains: NaN for floats, -7 for ints, 0x7F bytes (fp8 NaN) for uint8."""
    if dtype == torch.uint8:
        return torch.full(shape, 0x7F, dtype=dtype, device=device)
    value = float("nan") if dtype.is_floating_point else -7
    return torch.full(shape, value, dtype=dtype, device=device)


def int32(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def block_table(
    lengths: Sequence[int], page_size: int, device: torch.device, pages: int | None = None
) -> tuple[torch.Tensor, int]:
    """(table [B, max_pages] int32, pages): every sequence has its own pages of the cache, in random order.

    pages: of the cache, any of which may be taken. None: there are three more than needed, and page 0, which entries
    past a sequence's pages name, is nobody's.
    """
    counts = torch.tensor([-(-n // page_size) for n in lengths])
    total = int(counts.sum())
    order = torch.randperm(total + 2, device=device) + 1 if pages is None else torch.randperm(pages, device=device)
    own = torch.arange(max(int(counts.max()), 1)) < counts[:, None]
    table = torch.zeros(own.shape, dtype=torch.int32, device=device)
    table.masked_scatter_(own.to(device), order[:total].int())
    return table, total + 3 if pages is None else pages


def row_slots(pages: torch.Tensor, length: int, page_size: int) -> torch.Tensor:
    """[length] int64 physical slots of a sequence's tokens, in position order; pages: its row of a table."""
    position = torch.arange(length, device=pages.device)
    return pages[position // page_size].long() * page_size + position % page_size


def slots_of(table: torch.Tensor, lengths: Sequence[int], page_size: int) -> torch.Tensor:
    """`row_slots` of all sequences, one after the other."""
    return torch.cat([row_slots(row, length, page_size) for row, length in zip(table, lengths, strict=True)])


def stored(values: torch.Tensor, kind: str, kv_scale: float = 1.0) -> torch.Tensor:
    """Latent rows [N, 576] as a cache of a kind has them: "bf16", "fp16", "fp8" or "packed"."""
    if kind == "packed":
        return pack(values.bfloat16(), LATENT_DIM)
    if kind == "fp8":
        return (values / kv_scale).to(fp8_dtype(values.device))
    return values.to(torch.float16 if kind == "fp16" else torch.bfloat16)


def latent_cache(values: torch.Tensor, slots: torch.Tensor, total: int) -> torch.Tensor:
    """A latent cache [total, 1, width] that holds stored rows [N, width] at slots [N], and NaN everywhere else."""
    nan = 0x80 if values.dtype == FP8_DTYPES[1] else 0xFF
    raw = torch.full((total, values.shape[1] * values.itemsize), nan, dtype=torch.uint8, device=values.device)
    raw[slots] = values.view(torch.uint8)
    return raw.view(values.dtype)[:, None]


@dataclass(frozen=True)
class Calls:
    """dtype: of what is not quantized. plain: values of one size, in tensors as a server's, and nothing missing."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    plain: bool = False

    def rows(self, *shape: int, dtype: torch.dtype | None = None, decades: float = 0.0, pad: int = 0) -> torch.Tensor:
        """Random rows: parts of rows `pad` values wider; if hard, of sizes within `decades` powers of ten around 1."""
        wide = torch.empty(*shape[:-1], shape[-1] + pad, dtype=dtype or self.dtype, device=self.device)
        for chunk in wide.split(8192):  # the largest has no room for its float32 beside it
            values = torch.randn(chunk.shape, device=self.device)
            if decades and not self.plain:
                values *= 10 ** (decades * (torch.rand(*chunk.shape[:-1], 1, device=self.device) - 0.5))
            chunk.copy_(values)
        return wide[..., : shape[-1]]

    def tokens(self, *shape: int) -> torch.Tensor:
        """What is to be quantized. Hard rows lie inside wider ones, of sizes from 1e-4 to 1e4; 128 values are zero."""
        if self.plain:
            return self.rows(*shape)
        values = self.rows(*shape[:-1], 32 + shape[-1], decades=8, pad=32)[..., 32:]
        middle, head = shape[0] // 2, values if values.dim() == 3 else values[:, None]
        head[middle : middle + 1, 0, :128] = 0
        return values

    def _places(self, tokens: int, slots: int) -> torch.Tensor:
        """[tokens] int64 slots to write to; every fifth token of a hard call has none."""
        places = torch.randperm(slots, device=self.device)[:tokens]
        if not self.plain:
            places[::5] = -1
        return places

    def rotation(self, tokens: int, rope_dim: int = ROPE_DIM, table: torch.Tensor | None = None) -> Arguments:
        """table: of rotary angles, used instead of random ones."""
        if table is None:
            angle = 100 * torch.rand(300, rope_dim // 2, device=self.device)
            table = torch.cat([angle.cos(), angle.sin()], dim=1)
        return {
            "positions": torch.randint(len(table), (tokens,), device=self.device),
            "cos_sin_cache": table,
        }

    def _queries(self, count: int, heads: int, kind: str, size: float) -> torch.Tensor:
        q = torch.randn(count, heads, HEAD_DIM, device=self.device) * size
        return q.to(torch.float16 if kind == "fp16" else torch.bfloat16)

    def sparse_mla_attend(
        self,
        tokens: int,
        heads: int,
        topk: int,
        kind: str = "bf16",
        q_size: float = 1.0,
        kv_size: float = 1.0,
        kv_scale: float = 0.5,
        missing: float = 0.1,
        kv: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
    ) -> Arguments:
        """Random slots in random order, a share of them missing; slots that nobody selects are NaN.

        kind: of the rows, see `stored`; kv_scale: of fp8 rows of size 1. kv and indices: a cache and slots that are
        used instead.
        """
        if kv is None:
            used = max(topk, 24) + 5
            total = -(-2 * used // 64) * 64  # whole pages: of others FlashMLA reads no packed rows
            slots = torch.randperm(total, device=self.device)[:used]
            values = torch.randn(used, HEAD_DIM, device=self.device) * kv_size
            kv = latent_cache(stored(values, kind, kv_scale * kv_size), slots, total)
            indices = slots[torch.rand(tokens, used, device=self.device).argsort(dim=1)[:, :topk]].int()
            indices[torch.rand(tokens, topk, device=self.device) < missing] = -1
        return {
            "q": self._queries(tokens, heads, kind, q_size),
            "kv": kv,
            "kv_scale": kv_scale * kv_size if kind == "fp8" else None,
            "indices": indices,
            "softmax_scale": SOFTMAX_SCALE,
        }

    def dense_mla_decode(
        self,
        lengths: Sequence[int],
        heads: int,
        page_size: int = INDEX_PAGE_SIZE,
        kind: str = "bf16",
        q_size: float = 1.0,
        kv_size: float = 1.0,
        kv_scale: float = 0.03,
        new_tokens: Sequence[int] | None = None,
        kv: torch.Tensor | None = None,
    ) -> Arguments:
        """Contexts of these lengths in random pages; slots that no request owns are NaN.

        kind, kv_scale: as above. new_tokens: of each request; each is a row, which sees one token more than the one
        before. kv: a cache whose pages are used instead.
        """
        counts = new_tokens or [1] * len(lengths)
        seen = [length - count + 1 + j for length, count in zip(lengths, counts, strict=True) for j in range(count)]
        table, pages = block_table(lengths, page_size, self.device, None if kv is None else kv.shape[0] // page_size)
        if kv is None:
            slots = slots_of(table, lengths, page_size)
            values = torch.randn(len(slots), HEAD_DIM, device=self.device) * kv_size
            kv = latent_cache(stored(values, kind, kv_scale * kv_size), slots, pages * page_size)
        return {
            "q": self._queries(len(seen), heads, kind, q_size),
            "kv": kv,
            "kv_scale": kv_scale * kv_size if kind == "fp8" else None,
            "block_table": table.repeat_interleave(
                torch.tensor(counts, device=self.device), dim=0, output_size=len(seen)
            ),
            "seq_lens": int32(seen, self.device),
            "softmax_scale": SOFTMAX_SCALE,
            "page_size": page_size,
        }

    def mqa_logits_paged(
        self,
        lengths: Sequence[int],
        heads: int,
        next_n: int = 1,
        layout: str = "row_major",
        page_size: int = INDEX_PAGE_SIZE,
        cache: torch.Tensor | None = None,
    ) -> Arguments:
        """Contexts of these lengths in random pages; every byte that no request owns is NaN, scales too.

        cache: one whose pages are used instead.
        """
        table, pages = block_table(lengths, page_size, self.device, None if cache is None else cache.shape[0])
        if cache is None:
            cache = poison(pages, index_page_bytes(page_size), dtype=torch.uint8, device=self.device)
            slots = slots_of(table, lengths, page_size)
            keys = torch.randn(len(slots), INDEX_DIM, device=self.device)
            quantized = quantize_rows(keys, "fp32", fp8_dtype(self.device))
            index_pages.write(*quantized, cache, slots, layout=layout, page_size=page_size)
        return {
            "q": self._index_queries(len(lengths), next_n, heads),
            "cache": cache,
            "weights": torch.randn(len(lengths) * next_n, heads, device=self.device),
            "context_lens": int32(lengths, self.device),
            "block_table": table,
            "max_context_len": max(*lengths, 1),
            "layout": layout,
            "page_size": page_size,
        }

    def _index_queries(self, *shape: int) -> torch.Tensor:
        q = torch.randn(*shape, INDEX_DIM, device=self.device)
        return (q if self.plain else 8 * q).to(fp8_dtype(self.device))

    def mqa_logits_ragged(self, tokens: int, keys: int, heads: int) -> Arguments:
        """Rows of any range of the keys, the first of all and the last of none. Plain rows are a prefill's last."""
        key = torch.randn(keys, INDEX_DIM, device=self.device)
        if self.plain:
            k, k_scale = key.to(fp8_dtype(self.device)), torch.rand(keys, device=self.device) * 0.02 + 0.005
            start = torch.zeros(tokens, dtype=torch.int32, device=self.device)
            end = torch.arange(keys - tokens + 1, keys + 1, dtype=torch.int32, device=self.device)
        else:
            k, k_scale = quantize_rows(key, "fp32", fp8_dtype(self.device))
            start = torch.randint(0, keys + 1, (tokens,), device=self.device).int()
            end = (start + torch.randint(0, keys, (tokens,), device=self.device).int()).clamp_max(keys)
            start[0], end[0] = 0, keys
            start[-1], end[-1] = keys, keys
        return {
            "q": self._index_queries(tokens, heads),
            "k": k,
            "k_scale": k_scale,
            "weights": torch.randn(tokens, heads, device=self.device),
            "row_start": start,
            "row_end": end,
        }

    def topk_select(
        self,
        lengths: Sequence[int],
        columns: int,
        k: int,
        kind: str = "normal",
        starts: Sequence[int] | None = None,
        pad: int = 8,
    ) -> Arguments:
        """Rows of logits of a kind, parts of rows `pad` values wider; what is no candidate is NaN.

        starts: where the candidates of each row begin.
        """
        first, count = int32(starts or [0] * len(lengths), self.device), int32(lengths, self.device)
        column = torch.arange(columns, device=self.device)
        inside = (column >= first[:, None]) & (column < (first + count)[:, None])
        logits = poison(len(lengths), columns + pad, dtype=torch.float32, device=self.device)[:, :columns]
        noise = torch.randn(len(lengths), columns, device=self.device)
        logits.copy_(LOGITS[kind](noise).where(inside, float("nan")))
        return {"logits": logits, "lengths": count, "k": k, "row_starts": None if starts is None else first}

    def index_key_cache_store(
        self,
        tokens: int,
        layout: str = "row_major",
        page_size: int = INDEX_PAGE_SIZE,
        cache: torch.Tensor | None = None,
    ) -> Arguments:
        """Keys in any order of slots; the cache is NaN before, if none is given."""
        if cache is None:
            pages = -(-tokens // page_size) + 2
            cache = poison(pages, index_page_bytes(page_size), dtype=torch.uint8, device=self.device)
        return {
            "key": self.tokens(tokens, INDEX_DIM),
            "cache": cache,
            "slots": self._places(tokens, cache.shape[0] * page_size),
            "layout": layout,
            "page_size": page_size,
        }

    def index_key_cache_gather(
        self,
        lengths: Sequence[int],
        layout: str = "row_major",
        page_size: int = INDEX_PAGE_SIZE,
        cache: torch.Tensor | None = None,
    ) -> Arguments:
        """Contexts of these lengths in random pages of random bytes. Other entries of the table name no page, unless a
        cache is given."""
        table, pages = block_table(lengths, page_size, self.device, None if cache is None else cache.shape[0])
        if cache is None:
            table[table == 0] = -(2**30)
            cache = torch.randint(256, (pages, index_page_bytes(page_size)), dtype=torch.uint8, device=self.device)
        return {
            "cache": cache,
            "block_table": table,
            "seq_lens": int32(lengths, self.device),
            "layout": layout,
            "page_size": page_size,
        }

    def indexer_prep_query(
        self, tokens: int, heads: int, rope_dim: int = ROPE_DIM, angles: torch.Tensor | None = None
    ) -> Arguments:
        """angles: see `rotation`."""
        return {
            "q": self.tokens(tokens, heads, INDEX_DIM),
            "head_gate": self.rows(tokens, heads, pad=0 if self.plain else INDEX_DIM),
            **self.rotation(tokens, rope_dim, angles),
            "weight_scale": (INDEX_DIM * heads) ** -0.5,
        }

    def indexer_prep_key_store(
        self,
        tokens: int,
        layout: str = "row_major",
        page_size: int = INDEX_PAGE_SIZE,
        norm: str = "layer",
        angles: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
    ) -> Arguments:
        return {
            **self.index_key_cache_store(tokens, layout, page_size, cache),
            **self.rotation(tokens, table=angles),
            "norm_weight": self.rows(INDEX_DIM),
            "norm_bias": self.rows(INDEX_DIM, dtype=torch.float32) if norm == "layer" else None,
            "norm": norm,
        }

    def latent_cache_quantize(self, tokens: int, dim: int = HEAD_DIM) -> Arguments:
        return {"kv": self.tokens(tokens, dim)}

    def latent_cache_dequantize(self, tokens: int) -> Arguments:
        return {"packed": stored(self.tokens(tokens, HEAD_DIM), "packed")}

    def latent_cache_store(
        self,
        tokens: int,
        kind: str,
        heads: int = 0,
        rotated: bool = True,
        angles: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
    ) -> Arguments:
        """Rows in any order of slots, and queries beside them if there are heads; all that is written is NaN before.

        kind: of the cache, see `stored`. A plain call has whole rows, and writes the cache alone.
        """
        if cache is None:
            one = stored(torch.zeros(1, HEAD_DIM, dtype=torch.float32, device=self.device), kind)
            raw = poison(tokens + 20, 1, one.shape[1] * one.itemsize, dtype=torch.uint8, device=self.device)
            cache = raw.view(one.dtype)
        key = self.tokens(tokens, HEAD_DIM)
        nope, rope = key[:, :LATENT_DIM], key[:, LATENT_DIM:]
        arguments = {
            "k_nope": nope.contiguous() if self.plain else nope,
            "k_rope": rope.contiguous() if self.plain else rope,
            "cache": cache,
            "slots": self._places(tokens, cache.shape[0]),
            "kv_scale": 37.5 if kind == "fp8" else None,
            **(self.rotation(tokens, table=angles) if rotated else {}),
        }
        if not self.plain:
            arguments["k_rope_out"] = torch.full_like(rope, float("nan"))
        if heads:
            q = self.rows(tokens, heads, HEAD_DIM)
            arguments["q_rope"] = q[..., LATENT_DIM:].clone()
            q[..., LATENT_DIM:] = float("nan")
            arguments["q_all"] = q
        return arguments

    def norm_quant_rms(self, tokens: int, width: int) -> Arguments:
        """The part of a projection's rows before MLA's latent ones."""
        return {
            "x": self.rows(tokens, width, decades=6, pad=HEAD_DIM),
            "weight": (torch.rand(width, device=self.device) + 0.5).to(self.dtype),
        }

    def projection_linear(
        self, tokens: int, outputs: int, depth: int, fp8: bool = True, norm: bool = False
    ) -> Arguments:
        """fp8 weights with scales of blocks of 128 x 128, or bf16 ones."""
        scale = 0.5 + torch.rand(-(-outputs // 128), depth // 128, device=self.device)
        gain = (torch.rand(depth, device=self.device) + 0.5).to(self.dtype)
        return {
            "x": self.rows(tokens, depth, decades=4, pad=0 if self.plain else 64),
            "weight": self.rows(outputs, depth, dtype=torch.float8_e4m3fn if fp8 else None),
            "weight_scale": scale if fp8 else None,
            "norm_weight": gain if norm else None,
        }

    def projection_per_head(self, tokens: int, heads: int, outputs: int, depth: int) -> Arguments:
        """Tokens are parts of wider rows, as queries are."""
        return {
            "x": self.rows(tokens, heads, depth, decades=4, pad=64),
            "weight": self.rows(heads, outputs, depth),
        }

    def concat_q_all(self, tokens: int, heads: int) -> Arguments:
        parts = {"q_nope": LATENT_DIM, "q_rope": ROPE_DIM}
        return {name: self.rows(tokens, heads, width, decades=8, pad=64) for name, width in parts.items()}

    def concat_mla_k(self, tokens: int, heads: int, nope: int = 128, rope: int = ROPE_DIM) -> Arguments:
        """Plain keys are a part of kv_b_proj's output [T, H, 128 + 128], as in DeepSeek's prefill."""
        return {
            "k_nope": self.rows(tokens, heads, nope, decades=8, pad=nope if self.plain else 64),
            "k_rope": self.rows(tokens, 1, rope, decades=8, pad=0 if self.plain else 64),
        }
