"""The fakes of AITER as judges: every argument that an adapter passes, changed in one way, is refused or shows."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nsa_backend_plugin.ops import index_key_cache, latent_cache, mqa_logits, sparse_mla
from nsa_backend_plugin.ops._vendor import aiter_contract
from nsa_backend_plugin.ops.index_key_cache import aiter as index_aiter
from nsa_backend_plugin.ops.latent_cache import aiter as latent_aiter
from nsa_backend_plugin.ops.mqa_logits import aiter as logits_aiter
from nsa_backend_plugin.ops.sparse_mla import aiter as attention_aiter
from tests.rocm.simulated_host import install_fakes

FP8 = torch.float8_e4m3fnuz
PAGE: dict[str, Any] = {"layout": "preshuffled", "page_size": 64}
OTHER_DTYPE = {torch.int32: torch.int64, torch.int64: torch.int32, torch.float32: torch.float64, FP8: torch.uint8}
#: Arguments whose memory the kernels walk without asking for strides.
DENSE = {"k", "kv_cache", "block_table", "q_fp8", "Q", "KV", "q", "kv_buffer", "qo_indptr", "kv_indptr", "slot_mapping"}
#: (function, argument, change) that asks for the same.
HARMLESS = {
    ("fp8_mqa_logits", "clean_logits", "other"),  # every row's range is all of the keys here
    ("mla_decode_fwd", "kv_indices", "shape"),  # the last one is behind the last row's end
    ("fused_qk_rope_cat_and_cache_mla", "pos", "dtype"),  # the kernel takes any integers
    ("fused_qk_rope_cat_and_cache_mla", "slot_mapping", "dtype"),
    ("fused_qk_rope_cat_and_cache_mla", "cos", "dtype"),  # and any cosines: they become fp32
    ("fused_qk_rope_cat_and_cache_mla", "sin", "dtype"),
}


def use_adapters() -> None:
    """At least one call of each of AITER's functions."""
    cache = torch.zeros(2, 8448, dtype=torch.uint8)
    table, lengths = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32), torch.tensor([128, 100], dtype=torch.int32)
    index_key_cache.store(torch.randn(128, 128), cache, torch.arange(128), fp8_dtype=FP8, impl="torch", **PAGE)
    key, slots = torch.randn(5, 128).bfloat16(), torch.tensor([3, -1, 127, 64, 0])
    stored = index_key_cache.store.call(key, cache.clone(), slots, scale_format="ue8m0", fp8_dtype=FP8, **PAGE)
    index_aiter.store(stored)
    index_aiter.gather(index_key_cache.gather.call(cache, table, lengths, fp8_dtype=FP8, **PAGE))
    query, weights = torch.randn(2, 1, 32, 128).to(FP8), torch.rand(2, 32) + 0.5
    logits_aiter.paged(mqa_logits.paged.call(query, cache, weights, lengths, table, 128, clean=True, **PAGE))
    starts, ends = torch.zeros(2, dtype=torch.int32), torch.full((2,), 9, dtype=torch.int32)
    keys, scales = torch.randn(9, 128).to(FP8), torch.rand(9) + 0.5
    logits_aiter.ragged(mqa_logits.ragged.call(query[:, 0], keys, scales, weights, starts, ends, clean=True))
    latent = torch.randn(6, 1, 576).to(FP8)
    indices = torch.tensor([[5, -1, 0, 2], [1, 3, 4, 5]], dtype=torch.int32)
    q = torch.randn(2, 16, 576).bfloat16()
    attention_aiter.attend(sparse_mla.attend.call(q, latent, indices, 0.1, kv_scale=0.5))
    rows, angles = torch.randn(2, 576).bfloat16(), torch.rand(8, 32)
    stored = latent_cache.store.call(
        rows[:, :512],
        rows[:, 512:],
        latent.clone(),
        torch.tensor([4, 5]),
        positions=torch.tensor([7, 2]),
        cos_sin_cache=torch.cat([angles.cos(), angles.sin()], dim=1),
        is_neox=True,
        kv_scale=0.5,
        q_rope=torch.randn(2, 3, 64).bfloat16(),
        q_all=torch.randn(2, 3, 576).bfloat16(),
    )
    latent_aiter.store(stored)


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Function -> (the fake, the arguments of its first call by name, as they were)."""
    seen: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}

    def recorded(fake: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(fake).bind(*args, **kwargs)
            seen.setdefault(fake.__name__, (inspect.unwrap(fake), copy.deepcopy(bound.arguments)))
            return fake(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        install_fakes(lambda name, module: patch.setitem(sys.modules, name, module))
        for call in aiter_contract.CALLS:
            module = sys.modules[call.module]
            patch.setattr(module, call.function, recorded(getattr(module, call.function)))
        use_adapters()
    return seen


def changes(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(what is changed, another value) for an argument."""
    if isinstance(value, torch.Tensor):
        yield "dtype", value.to(OTHER_DTYPE.get(value.dtype, torch.float32))
        if value.dim():
            yield "shape", value[:-1]
        if name in DENSE:
            yield "strides", value.repeat_interleave(2, dim=-1)[..., ::2]
    elif isinstance(value, bool):
        yield "other", not value
    elif isinstance(value, int | float):
        yield "other", value + 1
    elif isinstance(value, str):
        yield "other", "" if value else "ue8m0"
    elif isinstance(value, torch.dtype):
        yield "other", torch.float16


def outcome(fake: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What a call returns, by place, and what it leaves in its arguments, by name."""
    result = fake(**arguments)
    returned = enumerate(result if isinstance(result, tuple) else (result,))
    both = {**{f"result {place}": value for place, value in returned}, **arguments}
    return {k: v.to(torch.float32).nan_to_num() if isinstance(v, torch.Tensor) else v for k, v in both.items()}


def equal(one: dict[str, Any], other: dict[str, Any], changed: str = "") -> bool:
    """Whether two outcomes are, but for the changed argument."""
    pairs = [(one[name], other[name]) for name in one if name != changed]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", [call.function for call in aiter_contract.CALLS])
def test_any_change_of_an_argument_is_noticed(name: str, calls: dict[str, Any]) -> None:
    fake, arguments = calls[name]
    expected = outcome(fake, copy.deepcopy(arguments))
    assert equal(outcome(fake, copy.deepcopy(arguments)), expected), "by chance"
    missed = []
    for argument in arguments:
        for change, value in changes(argument, arguments[argument]):
            try:
                noticed = not equal(outcome(fake, {**copy.deepcopy(arguments), argument: value}), expected, argument)
            except Exception:
                noticed = True
            if not noticed and (name, argument, change) not in HARMLESS:
                missed.append(f"{argument}: {change}")
    assert missed == []
