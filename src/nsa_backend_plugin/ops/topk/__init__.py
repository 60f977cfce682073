"""Selection of the k largest logits of every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Call, Fact, Step
from nsa_backend_plugin.ops.dispatch import operation


@dataclass(slots=True, eq=False, kw_only=True)
class Select(Call[torch.Tensor]):
    """The arguments of `select`; out [R, k] int32 is there always."""

    logits: torch.Tensor
    lengths: torch.Tensor
    k: int
    row_starts: torch.Tensor | None
    page_table: torch.Tensor | None
    page_rows: torch.Tensor | None
    page_size: int
    deterministic: bool
    out: torch.Tensor

    def facts(self) -> Mapping[str, Fact]:
        rows, columns = self.logits.shape
        return {
            "rows": rows,
            "columns": columns,
            "k": self.k,
            "deterministic": self.deterministic,
            "paged": self.page_table is not None,
        }

    def row_count(self) -> int:
        return self.logits.shape[0]

    def of_rows(self, rows: torch.Tensor) -> Select:
        table = self.page_table
        if table is not None:
            table = table[rows if self.page_rows is None else self.page_rows[rows].long()]
        return replace(
            self,
            logits=self.logits[rows],
            lengths=self.lengths[rows],
            row_starts=None if self.row_starts is None else self.row_starts[rows],
            page_table=table,
            page_rows=None,
            out=torch.empty_like(self.out[rows]),
            step=Step(),
        )

    def comparable(self, result: torch.Tensor) -> torch.Tensor:
        """The selected logits, largest first: which of several equal ones were taken is free."""
        index = result
        if self.page_table is not None:
            position = torch.arange(self.page_table.shape[1] * self.page_size, device=result.device)
            slots = self.page_table[:, position // self.page_size] * self.page_size + position % self.page_size
            order = slots.long().argsort(1)
            places = torch.searchsorted(slots.long().gather(1, order), result.clamp_min(0).long())
            index = order.gather(1, places.clamp_max(order.shape[1] - 1)).where(result >= 0, -1)
        start = 0 if self.row_starts is None else self.row_starts[:, None]
        columns = (index.long() + start).clamp(0, self.logits.shape[1] - 1)
        chosen = self.logits.gather(1, columns).where(result >= 0, float("-inf"))
        return chosen.sort(1, descending=True).values


@operation
def select(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    row_starts: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    page_rows: torch.Tensor | None = None,
    page_size: int = 1,
    deterministic: bool = False,
    out: torch.Tensor | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> Select:
    """Indices of the k largest logits of each row, among its own candidates, -1 padded.

    logits: [R, N] fp32, row stride free; only candidate columns are read. lengths: [R] int32 candidates per row.
    row_starts: [R] int32 first candidate column of each row (None = 0). Returned indices count from it.
    page_table: int32 [R, pages] or, with page_rows, [B, pages]; then the result is physical slots,
    page_table[row, i // page_size] * page_size + i % page_size.
    page_rows: [R] int32, the page_table row of each logits row (None = the row itself).
    deterministic: ties at the threshold go to the lowest index and every row is sorted by index; otherwise the
    order within a row, and which of several equal logits are taken, is free.
    out: [R, k] int32 to write into. Returns int32 [R, k]; a row with fewer than k candidates has all of them,
    then -1. Raises ValueError for bad shapes, dtypes, devices, k or page_size, and on CPU for lengths out of range.
    Source: DeepSeek-V3.2 token selection; SGLang fast_topk_transform for the fused slot mapping.
    """
    checks.tensor("logits", logits, (None, None), torch.float32)
    checks.inner_contiguous("logits", logits)
    rows, columns = logits.shape
    checks.tensor("lengths", lengths, (rows,), torch.int32, logits.device)
    checks.positive("k", k)
    checks.positive("page_size", page_size)
    checks.index_range("lengths", lengths, 0, columns + 1)
    if row_starts is not None:
        checks.tensor("row_starts", row_starts, (rows,), torch.int32, logits.device)
        checks.index_range("row_starts", row_starts, 0, columns + 1)
        checks.index_range("row_starts + lengths", row_starts + lengths if rows else lengths, 0, columns + 1)
    if page_table is None:
        checks.require(page_rows is None, "page_rows", "tensor", "None without page_table")
    else:
        table_rows = rows if page_rows is None else None
        checks.tensor("page_table", page_table, (table_rows, None), torch.int32, logits.device)
        checks.inner_contiguous("page_table", page_table)
        checks.index_range("lengths", lengths, 0, page_table.shape[1] * page_size + 1)
        if page_rows is not None:
            checks.tensor("page_rows", page_rows, (rows,), torch.int32, logits.device)
            checks.index_range("page_rows", page_rows, 0, page_table.shape[0])
    if out is None:
        out = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    else:
        checks.tensor("out", out, (rows, k), torch.int32, logits.device)
        checks.contiguous("out", out)
    return Select(
        arch=device_arch(logits.device),
        step=step or Step(),
        impl=impl,
        logits=logits,
        lengths=lengths.contiguous(),
        k=k,
        row_starts=None if row_starts is None else row_starts.contiguous(),
        page_table=page_table,
        page_rows=None if page_rows is None else page_rows.contiguous(),
        page_size=page_size,
        deterministic=deterministic,
        out=out,
    )
