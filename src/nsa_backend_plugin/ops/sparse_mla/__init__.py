"""MLA attention over selected tokens: absorbed queries against rows of the latent cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from nsa_backend_plugin.layouts import LATENT_DIM
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch import mla
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Fact, Step
from nsa_backend_plugin.ops.checks import kv_kind as kv_kind
from nsa_backend_plugin.ops.dispatch import operation


@dataclass(slots=True, eq=False, kw_only=True)
class Attend(mla.MlaCall):
    """The arguments of `attend`; kind is that of kv (`checks.kv_kind`)."""

    indices: torch.Tensor
    lengths: torch.Tensor | None
    context: torch.Tensor | None
    kind: str

    def facts(self) -> Mapping[str, Fact]:
        tokens, heads, _ = self.q.shape
        return {
            "tokens": tokens,
            "heads": heads,
            "topk": self.indices.shape[1],
            "kv": self.kind,
            "dtype": str(self.kv.dtype),
            "rows_have_keys": self.rows_have_keys,
            "lengths": self.lengths is not None,
            "context": 0 if self.context is None else self.context.shape[0],
            "lse": self.return_lse,
        }

    def of_rows(self, rows: torch.Tensor) -> Attend:
        """With a cache of only the selected slots, in whole pages as vendors' kernels want them."""
        indices = self.indices[rows]
        slots, places = indices[indices >= 0].long().unique(return_inverse=True)
        renumbered = torch.full_like(indices, -1)
        renumbered[indices >= 0] = places.to(torch.int32)
        kv = self.kv.view(torch.uint8)  # of bytes: not every operator of torch takes fp8
        picked = kv.new_zeros(max(-(-len(slots) // 64), 1) * 64, 1, kv.shape[-1])
        picked[: len(slots)] = kv[slots]
        return replace(
            self,
            q=self.q[rows],
            kv=picked.view(self.kv.dtype),
            indices=renumbered,
            lengths=None if self.lengths is None else self.lengths[rows],
            context=None if self.context is None else torch.arange(len(slots), device=kv.device),
            out=None,
            workspace=None,
            step=Step(),
        )


@operation
def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kv_scale: float | None = None,
    value_dim: int = LATENT_DIM,
    lengths: torch.Tensor | None = None,
    context: torch.Tensor | None = None,
    rows_have_keys: bool = False,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> Attend:
    """out[t, h] = softmax over j of (q[t, h] . kv[indices[t, j]] * softmax_scale), times the rows' value part.

    q: [T, H, 576] bf16, fp16 or fp32, contiguous. kv: [slots, 1, 576] bf16/fp16/fp32; or fp8 with one scalar kv_scale
    (ROCm: value = byte * kv_scale); or [slots, 1, 656] packed fp8 (`latent_cache.quantize`).
    indices: [T, K] int32 slots, contiguous, -1 = none, any order. The first value_dim values of a row are its value.
    lengths: [T] int32, the caller's promise that of each row exactly the first lengths[t] indices are slots and all
    behind are -1. `topk.select` leaves its result so. Kernels then end where a row ends: a short context costs what it
    has; and vendors' neither sort nor count indices.
    context: [S] int32 or int64 slots, the caller's promise that indices name no others: many queries over one context
    can share what is done for each of its rows.
    rows_have_keys: the caller's promise that no row is all -1 (and no length 0). Vendors' results then need no pass
    that looks for such rows and clears them. A broken promise gives undefined results, on a CPU ValueError.
    out: [T, H, value_dim] in q's dtype to write into. workspace: uint8 scratch of at least `workspace_bytes(...)`
    (None allocates; pass one inside CUDA graphs, one per stream).
    Returns out, and lse [T, H] fp32 (natural log of the sum of exponentials) with return_lse. Without `out` given, the
    result may be a vendor's own whose rows lie further apart (padded heads); its last dimension is contiguous. A row
    whose indices are all -1 gives out 0 and lse -inf.
    Raises ValueError for bad shapes, dtypes, devices, strides, and on CPU for slots or lengths out of range.
    Source: DeepSeek-V3.2 sparse attention; FlashMLA sparse decode for the packed layout.
    """
    tokens, _, query_dim = mla.check(q, value_dim, softmax_scale, out, workspace)
    checks.tensor("kv", kv, (None, 1, None), checks.KV_DTYPES, q.device)
    kind = kv_kind(kv, query_dim, value_dim)
    checks.inner_contiguous("kv", kv)
    checks.scale_of_fp8("kv_scale", kv_scale, kind == "fp8")
    checks.tensor("indices", indices, (tokens, None), torch.int32, q.device)
    checks.contiguous("indices", indices)
    checks.index_range("indices", indices, -1, kv.shape[0])
    if lengths is not None:
        checks.tensor("lengths", lengths, (tokens,), torch.int32, q.device)
        checks.index_range("lengths", lengths, 0, indices.shape[1] + 1)
        lengths = lengths.contiguous()
    if context is not None:
        checks.tensor("context", context, (None,), checks.INT_DTYPES, q.device)
        checks.index_range("context", context, 0, kv.shape[0])
        context = context.contiguous()
    if q.device.type == "cpu":
        _check_promises(indices, lengths, context, rows_have_keys)
    return Attend(
        arch=device_arch(q.device),
        step=step or Step(),
        impl=impl,
        q=q,
        kv=kv,
        indices=indices,
        softmax_scale=softmax_scale,
        kind=kind,
        kv_scale=kv_scale,
        value_dim=value_dim,
        lengths=lengths,
        context=context,
        rows_have_keys=rows_have_keys,
        return_lse=return_lse,
        out=out,
        workspace=workspace,
    )


def _check_promises(
    indices: torch.Tensor, lengths: torch.Tensor | None, context: torch.Tensor | None, rows_have_keys: bool
) -> None:
    exists = indices >= 0
    if context is not None:
        strangers = indices[exists & ~torch.isin(indices, context.to(indices.dtype))].unique().tolist()
        checks.require(not strangers, "context", f"without {strangers}", "every slot that indices name")
    if lengths is not None:
        expected = torch.arange(indices.shape[1], device=indices.device) < lengths[:, None]
        kept = bool((exists == expected).all())
        checks.require(kept, "lengths", lengths.tolist(), "the number of slots that lead each row of indices, then -1")
    if rows_have_keys:
        checks.require(bool(exists.any(dim=1).all()), "rows_have_keys", True, "False: a row of indices is all -1")


def workspace_bytes(
    max_tokens: int, heads: int, topk: int, device: torch.device | str, value_dim: int = LATENT_DIM
) -> int:
    """Scratch bytes that suffice for every implementation on this device and every call of up to max_tokens."""
    return attend.workspace_bytes(device, max_tokens=max_tokens, heads=heads, topk=topk, value_dim=value_dim)
