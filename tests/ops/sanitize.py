"""One small call of each kernel of this package, to run under compute-sanitizer on a GPU host.

    compute-sanitizer --report-api-errors no --tool memcheck  python -m tests.ops.sanitize
    compute-sanitizer --report-api-errors no --tool racecheck python -m tests.ops.sanitize [part of a call's name ...]

API errors are not reported because torch probes the driver with calls that may fail. Exits 1 when a Triton kernel of
the compile matrix was not launched (with names given, that is not checked). Lengths end inside tiles, slots are missing
and pages are shuffled, so that every mask is at work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # every tensor its own allocation, with its own bounds

import torch
import triton

from nsa_backend_plugin import settings
from nsa_backend_plugin.layouts import INDEX_LAYOUTS
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
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Declined
from tools.calls import Arguments, Calls, block_table
from tools.compile_matrix import all_cases, kernel_modules

#: Whose kernels are ours: beside our implementations a vendor's that reads what ours unpacked.
OURS = (*dispatch.OWN, "flash_mla_unpacked")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAKE = Calls(DEVICE)
Case = tuple[dispatch.Operation, Arguments]


def index_calls() -> Iterator[Case]:
    lengths = [130, 0, 65]
    for layout in INDEX_LAYOUTS:
        for tokens in (33, 1100):  # either configuration of the store
            yield index_key_cache.store, MAKE.index_key_cache_store(tokens, layout)
        yield index_key_cache.gather, MAKE.index_key_cache_gather(lengths, layout)
        for next_n in (1, 2):
            yield mqa_logits.paged, {**MAKE.mqa_logits_paged(lengths, 64, next_n, layout), "clean": True}
        for neox in (False, True):
            yield indexer_prep.key_store, {**MAKE.indexer_prep_key_store(33, layout), "is_neox": neox}
    yield mqa_logits.ragged, {**MAKE.mqa_logits_ragged(5, 150, 64), "clean": True}
    for tokens in (3, 40, 70):
        yield indexer_prep.query, {**MAKE.indexer_prep_query(tokens, 64), "is_neox": True}


def topk_calls() -> Iterator[Case]:
    # Eight, four and two blocks to a row, with shares that exceed registers too; more rows than multiprocessors; one
    # block. Of logits that are alike in their leading digit, the cluster takes several radix steps.
    for rows, columns in ((3, 40_000), (3, 150_000), (20, 100_000), (30, 20_000), (140, 2500), (5, 9001)):
        lengths = [columns - 3, 0, 70, *[columns - 3] * (rows - 3)]
        arguments = MAKE.topk_select(lengths, columns, 2048, "narrow" if columns == 40_000 else "plateau")
        arguments |= {"page_table": block_table([columns] * rows, 64, DEVICE)[0], "page_size": 64}
        for deterministic in (False, True):
            yield topk.select, {**arguments, "deterministic": deterministic}


def latent_calls() -> Iterator[Case]:
    yield latent_cache.quantize, MAKE.latent_cache_quantize(40)
    yield latent_cache.dequantize, MAKE.latent_cache_dequantize(40)
    for kind in ("bf16", "fp8", "packed"):
        for tokens in (33, 600):
            yield latent_cache.store, {**MAKE.latent_cache_store(tokens, kind, 20), "norm_weight": MAKE.rows(512)}
    yield norm_quant.rms, MAKE.norm_quant_rms(33, 1536)
    for tokens in (1, 13, 32, 50):
        for outputs, depth, norm in ((2112, 7168, False), (200, 384, False), (200, 384, True)):
            yield projection.linear, MAKE.projection_linear(tokens, outputs, depth, norm=norm)
        bf16 = MAKE.projection_linear(tokens, 192, 7168, fp8=False)
        yield projection.linear, {**bf16, "dtype": torch.float32}
        yield projection.per_head, MAKE.projection_per_head(tokens, 16, 512, 128)
    yield concat.q_all, MAKE.concat_q_all(5, 12)
    yield concat.mla_k, MAKE.concat_mla_k(5, 128)


def attention_calls() -> Iterator[Case]:
    for kind in ("bf16", "packed", "fp8"):
        for heads in (12, 24, 128):
            for tokens, keys in ((2, 150), (2, 1100), (300, 33)):  # in few parts, in many, whole
                some = MAKE.sparse_mla_attend(tokens, heads, keys, kind)
                some["indices"][1] = -1
                leading = MAKE.sparse_mla_attend(tokens, heads, keys, kind, missing=0.0)
                lengths = torch.randint(0, keys + 1, (tokens,), device=DEVICE).int()
                behind = torch.arange(keys, device=DEVICE) >= lengths[:, None]
                leading |= {"indices": leading["indices"].masked_fill(behind, -1), "lengths": lengths}
                yield from ((sparse_mla.attend, {**given, "return_lse": True}) for given in (some, leading))
    for kind in ("bf16", "packed"):
        for heads in (1, 12, 32):  # in groups of eight, four and two
            shared = MAKE.sparse_mla_attend(21, heads, 150, kind, missing=0.0)
            indices = shared["indices"]
            indices[:2], indices[4:] = indices[0].clone(), indices[0].clone()  # all but two select the same rows
            yield sparse_mla.attend, {**shared, "context": indices.unique(), "return_lse": True}
    for heads in (12, 128):
        unpacked = MAKE.sparse_mla_attend(21, heads, 128, "packed")  # FlashMLA takes multiples of 128
        context = unpacked["indices"].unique()
        yield sparse_mla.attend, {**unpacked, "context": context[context >= 0], "return_lse": True}
    for heads in (12, 128):
        for kind in ("bf16", "fp8"):
            yield dense_mla.decode, MAKE.dense_mla_decode([170, 0], heads, kind=kind)


def launch(function: dispatch.Operation, arguments: Arguments, wanted: list[str]) -> None:
    """A call by each implementation with kernels of ours that can run here."""
    facts = " ".join(f"{name}={value}" for name, value in function.call(**arguments).facts().items())
    for impl in (name for name in function.available(DEVICE) if name in OURS):
        name = f"{function.name} {impl} {facts}"
        if wanted and not any(part in name for part in wanted):
            continue
        print(name, flush=True)
        try:
            function(**arguments, impl=impl)
        except Declined as declined:
            print(f"  {declined}")
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()


def main(wanted: list[str]) -> int:
    launched: set[str] = set()
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: launched.add(metadata.get()["name"]))
    for calls in (index_calls, topk_calls, latent_calls, attention_calls):
        for function, arguments in calls():
            launch(function, arguments, wanted)
    missing: set[str] = set()
    if not wanted and DEVICE.type != "cpu":  # an interpreter has nothing to compile
        cases = all_cases([device_arch(DEVICE)], kernel_modules(settings.OPERATIONS))
        missing = {case.kernel.__name__ for _, _, case in cases} - launched
    print(f"launched {', '.join(sorted(launched))}; missing: {', '.join(sorted(missing)) or 'none'}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
