"""MLA attention over selected tokens: absorbed queries against rows of the latent cache."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import LATENT_DIM
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.checks import kv_kind as kv_kind
from nsa_backend_plugin.ops.registry import Operation

_attend = Operation("sparse_mla", "attend")


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kv_scale: float | None = None,
    value_dim: int = LATENT_DIM,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out[t, h] = softmax over j of (q[t, h] . kv[indices[t, j]] * softmax_scale), times the rows' value part.

    q: [T, H, 576] bf16, fp16 or fp32, contiguous. kv: [slots, 1, 576] bf16/fp16/fp32; or fp8 with one scalar kv_scale
    (ROCm: value = byte * kv_scale); or [slots, 1, 656] packed fp8 (`latent_cache.quantize`).
    indices: [T, K] int32 slots, -1 = none, any order. The first value_dim values of a row are its value.
    out: [T, H, value_dim] in q's dtype to write into. workspace: uint8 scratch of at least `workspace_bytes(...)`
    (None allocates; pass one inside CUDA graphs, one per stream).
    Returns out, and lse [T, H] fp32 (natural log of the sum of exponentials) with return_lse. A row whose indices are
    all -1 gives out 0 and lse -inf.
    Raises ValueError for bad shapes, dtypes, devices, and on CPU for slots out of range.
    Source: DeepSeek-V3.2 sparse attention; FlashMLA sparse decode for the packed layout.
    """
    checks.tensor("q", q, (None, None, None), checks.FLOAT_DTYPES)
    checks.contiguous("q", q)
    tokens, heads, query_dim = q.shape
    checks.positive("value_dim", value_dim)
    checks.require(value_dim <= query_dim, "value_dim", value_dim, f"at most q's last dimension {query_dim}")
    checks.require(1 <= heads <= 128, "q.shape[1]", heads, "1 to 128 heads")
    checks.require(isinstance(kv, torch.Tensor) and kv.dim() == 3 and kv.shape[1] == 1, "kv", kv, "[slots, 1, bytes]")
    kind = kv_kind(kv, query_dim, value_dim)
    checks.require(kv.device == q.device, "kv.device", str(kv.device), str(q.device))
    checks.inner_contiguous("kv", kv)
    checks.require(
        (kv_scale is not None) == (kind == "fp8"),
        "kv_scale",
        kv_scale,
        "a float with plain fp8 kv, else None",
    )
    checks.tensor("indices", indices, (tokens, None), torch.int32, q.device)
    checks.contiguous("indices", indices)
    checks.index_range("indices", indices, -1, kv.shape[0])
    if out is None:
        out = torch.empty(tokens, heads, value_dim, dtype=q.dtype, device=q.device)
    else:
        checks.tensor("out", out, (tokens, heads, value_dim), q.dtype, q.device)
        checks.contiguous("out", out)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device) if return_lse else None
    shape = {"tokens": tokens, "heads": heads, "topk": indices.shape[1], "kv": kind}
    _attend(
        impl,
        q.device,
        shape,
        q,
        kv,
        indices,
        softmax_scale,
        kind=kind,
        kv_scale=kv_scale,
        value_dim=value_dim,
        out=out,
        lse=lse,
        workspace=workspace,
    )
    return out if lse is None else (out, lse)


def workspace_bytes(
    max_tokens: int, heads: int, topk: int, device: torch.device | str, value_dim: int = LATENT_DIM
) -> int:
    """Scratch bytes that suffice for every implementation on this device and every call of up to max_tokens."""
    return _attend.workspace_bytes(device, max_tokens=max_tokens, heads=heads, topk=topk, value_dim=value_dim)
