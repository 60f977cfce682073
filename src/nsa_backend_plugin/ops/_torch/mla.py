"""What the two MLA attention operations share: the common part of their calls, and attention over rows in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.call import Call

#: out, or (out, lse) where the caller asked for both.
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True, eq=False, kw_only=True)
class MlaCall(Call[Result]):
    """Absorbed queries q [rows, H, D] over latent rows of kv [slots, 1, D or bytes].

    kv_scale: of plain fp8 rows; None of others. out: where the result must be; None leaves the place to the
    implementation. workspace: has its form, not its size.
    """

    q: torch.Tensor
    kv: torch.Tensor
    softmax_scale: float
    kv_scale: float | None
    value_dim: int
    rows_have_keys: bool
    return_lse: bool
    out: torch.Tensor | None
    workspace: torch.Tensor | None

    def row_count(self) -> int:
        return self.q.shape[0]

    @property
    def kv_unit(self) -> float:
        """What a 1 in plain rows stands for."""
        return 1.0 if self.kv_scale is None else float(self.kv_scale)

    def output(self) -> torch.Tensor:
        """The caller's out, or a new one."""
        return self.q.new_empty(*self.q.shape[:2], self.value_dim) if self.out is None else self.out

    def new_lse(self) -> torch.Tensor | None:
        """[rows, H] fp32, if the caller wants it."""
        return self.q.new_empty(self.q.shape[:2], dtype=torch.float32) if self.return_lse else None


def result(out: torch.Tensor, lse: torch.Tensor | None) -> Result:
    return out if lse is None else (out, lse)


def check(
    q: torch.Tensor, value_dim: int, softmax_scale: float, out: torch.Tensor | None, workspace: torch.Tensor | None
) -> tuple[int, int, int]:
    """The arguments that both operations check alike. Returns q's shape."""
    checks.tensor("q", q, (None, None, None), checks.FLOAT_DTYPES)
    checks.contiguous("q", q)
    rows, heads, query_dim = q.shape
    checks.finite("softmax_scale", softmax_scale)
    checks.positive("value_dim", value_dim)
    checks.require(value_dim <= query_dim, "value_dim", value_dim, f"at most q's last dimension {query_dim}")
    checks.require(1 <= heads <= 128, "q.shape[1]", heads, "1 to 128 heads")
    if out is not None:
        checks.tensor("out", out, (rows, heads, value_dim), q.dtype, q.device)
        checks.contiguous("out", out)
    checks.scratch(workspace, q.device)
    return rows, heads, query_dim


def softmax_attention(
    q: torch.Tensor, latent: torch.Tensor, softmax_scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [H, D], latent [K, D] -> (out [H, value_dim], lse [H]), float32; no rows give 0 and -inf."""
    scores = q.float() @ latent.T * softmax_scale
    lse = torch.logsumexp(scores, dim=-1)
    if latent.shape[0] == 0:
        return torch.zeros(q.shape[0], value_dim, device=q.device), torch.full_like(lse, float("-inf"))
    return torch.softmax(scores, dim=-1) @ latent[:, :value_dim], lse
