"""Every tensor argument of every public function, generated: wrong in each way it is refused, strided it is honoured.

An argument that is new and in neither `cases.VALID` nor `cases.OPTIONAL` fails the first test. On a GPU the kernels run
there, and under compute-sanitizer by `make test-memcheck`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nsa_backend_plugin.ops import (
    concat,
    dense_mla,
    dispatch,
    index_key_cache,
    indexer_prep,
    latent_cache,
    mqa_logits,
    norm_quant,
    projection,
    sparse_mla,
    topk,
)
from nsa_backend_plugin.ops.call import Declined
from tests.conftest import HAS_GPU
from tests.ops.cases import VARIANTS, filled, valid
from tests.ops.implementations import DEVICE, run
from tools.calls import Calls

#: Arguments that are no tensors: their values are walked in test_bad_input.
PLAIN = {
    concat.mla_k: {"dtype"},
    dense_mla.decode: {"kv_scale", "value_dim", "num_kv_splits", "rows_have_keys", "kv_is_finite", "return_lse"},
    index_key_cache.store: {"layout", "scale_format", "page_size", "fp8_dtype"},
    index_key_cache.gather: {"layout", "page_size", "total_tokens", "fp8_dtype"},
    indexer_prep.query: {"hadamard", "scale_format", "fp8_dtype"},
    indexer_prep.key_store: {"norm", "eps", "hadamard", "layout", "scale_format", "page_size", "fp8_dtype"},
    latent_cache.quantize: {"value_dim", "tile_size"},
    latent_cache.dequantize: {"value_dim", "tile_size", "dtype"},
    latent_cache.store: {"is_neox", "kv_scale", "norm_eps"},
    mqa_logits.paged: {"layout", "page_size", "clean"},
    mqa_logits.ragged: {"clean"},
    norm_quant.rms: {"eps", "scale_format"},
    projection.linear: {"eps", "dtype"},
    sparse_mla.attend: {"kv_scale", "value_dim", "rows_have_keys", "return_lse"},
    topk.select: {"page_size", "deterministic"},
}
#: What our own say when they decline a plain call: rows or weights of another kind.
NOT_THEIRS = (
    "only before fp8 ones",
    "only packed fp8 rows",
    "only bf16 rows",
    "only torch.float8_e4m3fn rows",
    "only bfloat16",
)
OUTPUTS = {"out", "k_rope_out", "cache", "q_all"}  # written in place
SCRATCH = {"workspace"}


def tensor_arguments() -> Iterator[tuple[Any, str]]:
    for function in dispatch.operations():
        for name, value in valid(function).items():
            if isinstance(value, torch.Tensor):
                yield function, name


def _ids(value: Any) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize("function", dispatch.operations(), ids=_ids)
def test_every_argument_is_walked(function: Any) -> None:
    known = {*valid(function), *PLAIN.get(function, ()), "step", "impl"}
    assert set(inspect.signature(function).parameters) == known
    assert hasattr(Calls, function.name.replace(".", "_"))
    function(**valid(function))


@pytest.mark.parametrize("function, name", list(tensor_arguments()), ids=_ids)
def test_wrong_kinds_are_refused(function: Any, name: str) -> None:
    """What is no tensor, another dtype, rank, size or device: an error before anything is written."""
    good = valid(function)
    value = good[name]
    wrong = [
        [1.0],
        value.to(torch.complex64),
        value[..., None],
        torch.cat([value.reshape(-1), value.reshape(-1)]) if value.dim() == 1 else value[..., :0],
        value.to("meta"),
    ]
    if name in ("context", "workspace"):
        del wrong[3]  # of any length
    if function in (latent_cache.quantize, latent_cache.dequantize):
        wrong = wrong[:2]  # of any rank; on any device
    if function is norm_quant.rms and name == "x":
        del wrong[3:]  # of any number of tokens; the weight is then on the other device
        wrong.append(value.to("meta"))
    if (function, name) == (topk.select, "logits") or function is concat.q_all:
        wrong[3] = value[:1]  # of any width
    if (function, name) == (mqa_logits.paged, "context_lens"):
        del wrong[2]  # [B, 1] is another form of [B]
    for bad in wrong:
        before = {key: item.clone() for key, item in good.items() if isinstance(item, torch.Tensor) and key != name}
        with pytest.raises(ValueError, match=r"expected|has|is on|contains"):
            function(**{**good, name: bad})
        assert all(torch.equal(good[key].view(torch.uint8), item.view(torch.uint8)) for key, item in before.items())


def strided(value: torch.Tensor) -> torch.Tensor:
    """The same values, each two places from the next, with other bytes between."""
    fill = 1 if value.dtype.itemsize == 1 else 113
    wide = torch.full((*value.shape, 2), fill, dtype=torch.float32, device=value.device).to(value.dtype)
    wide[..., 0] = value
    return wide[..., 0]


def apart(value: torch.Tensor) -> torch.Tensor:
    """The same values, rows further from each other than they are long."""
    if value.dim() < 2:
        return strided(value)
    wide = torch.zeros(*value.shape[:-1], value.shape[-1] + 16, device=value.device).to(value.dtype)
    wide[..., : value.shape[-1]] = value
    return wide[..., : value.shape[-1]]


def shifted(value: torch.Tensor) -> torch.Tensor:
    """The same values, one element behind where an allocation starts."""
    whole = torch.zeros(value.numel() + 1, device=value.device).to(value.dtype)
    whole[1:] = value.flatten()
    return whole[1:].view(value.shape)


def observed(function: Any, arguments: dict[str, Any], impl: str) -> list[torch.Tensor]:
    """What a call returns and what it wrote."""
    result = function(**arguments, impl=impl)
    returned = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    return [t.contiguous() for t in (*returned, *(arguments[name] for name in OUTPUTS & set(arguments)))]


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: item.clone() if isinstance(item, torch.Tensor) else item for name, item in arguments.items()}


@functools.cache
def computed(function: Any, variant: str, impl: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """A call in plain layout, which every implementation of ours must take, and what came of it."""
    arguments = filled(function, variant)
    call = functools.partial(observed, function, copies(arguments))
    return arguments, run(call, impl, may_decline=NOT_THEIRS)


def runs() -> Iterator[tuple[Any, str, str, str]]:
    """(function, variant of its call, tensor argument, implementation that can run here)."""
    for function, name in tensor_arguments():
        if name in SCRATCH:
            continue
        for variant in ("", *VARIANTS.get(function, ())):
            if isinstance(valid(function, variant)[name], torch.Tensor):
                # On a GPU torch itself adds up misaligned rows in another order.
                kernels = (impl for impl in function.available(DEVICE) if impl != "torch" or not HAS_GPU)
                yield from ((function, variant, name, impl) for impl in kernels)


@pytest.mark.parametrize("layout", [strided, apart, shifted])
@pytest.mark.parametrize("function, variant, name, impl", list(runs()), ids=_ids)
def test_any_layout_is_honoured_or_refused(function: Any, variant: str, name: str, impl: str, layout: Any) -> None:
    plain, want = computed(function, variant, impl)
    arguments = {**copies(plain), name: layout(plain[name])}
    refused = None
    try:
        got = observed(function, arguments, impl)
    except Declined:
        return  # this implementation takes no such layout; others do
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert name in refused
        assert any(word in refused for word in ("stride", "contiguous", "align"))
        return
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.contiguous().view(torch.uint8), w.contiguous().view(torch.uint8)), name
