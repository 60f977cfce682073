"""Torch reference of the projections."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.norm import normalize
from nsa_backend_plugin.ops._torch.quant import quantize_rows
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.projection import GROUP, Linear, PerHead


def available(arch: str) -> Reason:
    return None


def linear(call: Linear) -> torch.Tensor:
    x, weight = call.x, call.weight.float()
    if call.norm_weight is not None:
        x = normalize(x, call.norm_weight, None, "rms", call.eps).to(x.dtype)
    x = x.float()
    if call.weight_scale is not None:
        values, scale = quantize_rows(x.unflatten(1, (-1, GROUP)), "fp32", call.weight.dtype)
        x = (values.float() * scale[..., None]).flatten(1)
        of_rows = call.weight_scale.repeat_interleave(GROUP, 0)[: weight.shape[0]]
        weight = weight * of_rows.repeat_interleave(GROUP, 1)
    return call.out.copy_(x @ weight.t())


def per_head(call: PerHead) -> torch.Tensor:
    return call.out.copy_(torch.einsum("thk,hnk->thn", call.x.float(), call.weight.float()))
