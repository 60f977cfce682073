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
from collections.abc import Callable, Iterator
from functools import partial

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # every tensor its own allocation, with its own bounds

import torch
import triton

from nsa_backend_plugin import settings
from nsa_backend_plugin.layouts import INDEX_LAYOUTS, index_page_bytes
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
from nsa_backend_plugin.ops.arch import device_arch, fp8_dtype
from nsa_backend_plugin.ops.call import Declined
from tools.compile_matrix import kernel_modules

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 192**-0.5
Call = tuple[str, Callable[[], object]]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def runs_here(op: str, *names: str) -> list[str]:
    return [n for n in names if n in dispatch.implementation_names(op) and dispatch._unavailable(op, n, ARCH) is None]


ARCH = device_arch(DEVICE)


def index_calls() -> Iterator[Call]:
    lengths, table = ints(130, 0, 65), ints(4, 1, 5, 0, 0, 0, 2, 3, 0).view(3, 3)
    angles = randn(200, 64, dtype=torch.float32)
    for layout in INDEX_LAYOUTS:
        cache = torch.zeros(20, index_page_bytes(64), dtype=torch.uint8, device=DEVICE)
        options = {"layout": layout, "impl": "triton"}
        for tokens in (33, 1100):  # either configuration of the store
            slots = torch.randperm(1280, device=DEVICE)[:tokens] - 100
            yield (
                f"store {layout} {tokens}",
                partial(index_key_cache.store, randn(tokens, 128), cache, slots, **options),
            )
        yield f"gather {layout}", partial(index_key_cache.gather, cache, table, lengths, **options)
        for next_n in (1, 2):
            q = randn(3, next_n, 64, 128).to(fp8_dtype(DEVICE))
            weights = randn(3 * next_n, 64, dtype=torch.float32)
            call = partial(mqa_logits.paged, q, cache, weights, lengths, table, 130, clean=True, **options)
            yield f"logits paged {layout} next_n {next_n}", call
        for neox in (False, True):
            key = partial(
                indexer_prep.key_store,
                *(randn(33, 128), randn(128), randn(128), torch.arange(33, device=DEVICE), angles, cache),
                torch.arange(33, device=DEVICE) * 11 - 3,
                is_neox=neox,
                **options,
            )
            yield f"prep key {layout} neox {neox}", key
    fp8 = fp8_dtype(DEVICE)
    q, k, scale = randn(5, 64, 128).to(fp8), randn(150, 128).to(fp8), randn(150, dtype=torch.float32)
    ranges = ints(0, 10, 20, 70, 149), ints(150, 11, 20, 140, 150)
    weights = randn(5, 64, dtype=torch.float32)
    yield "logits ragged", partial(mqa_logits.ragged, q, k, scale, weights, *ranges, clean=True, impl="triton")
    for tokens in (3, 40, 70):
        query = randn(tokens, 64, 128), randn(tokens, 64), torch.arange(tokens, device=DEVICE), angles
        yield (
            f"prep query {tokens}",
            partial(indexer_prep.query, *query, weight_scale=0.1, is_neox=True, impl="triton"),
        )


def topk_calls() -> Iterator[Call]:
    for impl in runs_here("topk", "triton", "cuda"):
        # Eight, four and two blocks to a row, with shares that exceed registers too; more rows than multiprocessors;
        # one block.
        for rows, columns in ((3, 40_000), (3, 150_000), (20, 100_000), (30, 20_000), (140, 2500), (5, 9001)):
            logits = randn(rows, columns, dtype=torch.float32).relu()
            if columns == 40_000:  # alike in their leading digit: the cluster takes several radix steps
                logits += 100
            lengths = torch.full((rows,), columns - 3, dtype=torch.int32, device=DEVICE)
            lengths[1:3] = ints(0, 70)
            table = torch.randperm(columns // 64 + 1, device=DEVICE).int().repeat(rows, 1)
            for deterministic in (False, True):
                call = partial(topk.select, logits, lengths, 2048, page_table=table, page_size=64, impl=impl)
                name = f"topk {impl} {rows} x {columns} deterministic {deterministic}"
                yield name, partial(call, deterministic=deterministic)


def latent_calls() -> Iterator[Call]:
    kv = randn(40, 576)
    packed = latent_cache.quantize(kv, impl="torch")
    yield "quantize", partial(latent_cache.quantize, kv, impl="triton")
    yield "dequantize", partial(latent_cache.dequantize, packed, impl="triton")
    angles, slots = randn(600, 64, dtype=torch.float32), torch.randperm(700, device=DEVICE)[:600] - 20
    caches = {
        "bf16": randn(700, 1, 576),
        "fp8": randn(700, 1, 576).to(fp8_dtype(DEVICE)),
        "packed": torch.zeros(700, 1, 656, dtype=torch.uint8, device=DEVICE),
    }
    for kind, cache in caches.items():
        for tokens in (33, 600):
            q = randn(tokens, 20, 576)
            call = partial(
                latent_cache.store,
                *(randn(tokens, 512), randn(tokens, 64), cache, slots[:tokens]),
                positions=torch.arange(tokens, device=DEVICE),
                cos_sin_cache=angles,
                kv_scale=0.5 if kind == "fp8" else None,
                k_rope_out=randn(tokens, 64),
                q_rope=q[..., 512:],
                q_all=q,
                norm_weight=randn(512),
                impl="triton",
            )
            yield f"latent store {kind} {tokens}", call
    yield "norm", partial(norm_quant.rms, randn(33, 2112)[:, :1536], randn(1536), impl="triton")
    for impl in runs_here("projection", "triton", "cuda"):
        for tokens in (1, 13, 32):
            for rows, depth in ((2112, 7168), (200, 384)):
                weight, scale = (
                    randn(rows, depth).to(torch.float8_e4m3fn),
                    torch.rand(-(-rows // 128), depth // 128, device=DEVICE),
                )
                x, gain = randn(tokens, depth + 64)[:, :depth], randn(depth)
                for norm in (None, gain) if depth < 7168 else (None,):
                    call = partial(projection.linear, x, weight, scale, norm_weight=norm, impl=impl)
                    yield f"projection {impl} fp8 {tokens} {rows} {depth}", call
            call = partial(projection.linear, randn(tokens, 7168), randn(192, 7168), dtype=torch.float32, impl=impl)
            yield f"projection {impl} bf16 {tokens}", call
            queries, w_uk = randn(tokens, 16, 192)[..., :128], randn(16, 512, 128)
            yield f"projection {impl} heads {tokens}", partial(projection.per_head, queries, w_uk, impl=impl)
    yield "concat q", partial(concat.q_all, randn(5, 12, 512), randn(5, 12, 64), impl="triton")
    yield "concat k", partial(concat.mla_k, randn(5, 128, 128), randn(5, 1, 64), impl="triton")


def attention_calls() -> Iterator[Call]:
    kv = randn(300, 1, 576)
    caches = {"bf16": kv, "packed": latent_cache.quantize(kv, impl="torch"), "fp8": kv.to(fp8_dtype(DEVICE))}
    for impl in runs_here("sparse_mla", "triton", "cuda"):
        for kind, cache in caches.items():
            for heads in (12, 24, 128):
                for tokens, keys in ((2, 150), (2, 1100), (300, 33)):  # in few parts, in many, whole
                    indices = torch.randint(-30, 300, (tokens, keys), device=DEVICE).int().clamp_min(-1)
                    indices[1] = -1
                    lengths = torch.randint(0, keys + 1, (tokens,), device=DEVICE).int()
                    led = torch.arange(keys, device=DEVICE) < lengths[:, None]
                    leading = {"indices": indices.clamp_min(0).where(led, -1), "lengths": lengths}
                    for slots in ({"indices": indices}, leading):
                        call = partial(
                            sparse_mla.attend,
                            *(randn(tokens, heads, 576), cache),
                            softmax_scale=SCALE,
                            kv_scale=0.5 if kind == "fp8" else None,
                            return_lse=True,
                            impl=impl,
                            **slots,
                        )
                        given = " ".join(slots)
                        yield f"sparse {impl} {kind} {heads} heads {tokens} x {keys} {given}", call
    for impl in runs_here("sparse_mla", "union"):
        for kind in ("bf16", "packed"):
            for heads in (1, 12, 32):  # in groups of eight, four and two
                indices = torch.arange(150, device=DEVICE).int().repeat(21, 1)
                indices[2:4] += 150  # a group of two that shares among eight that do not, or the reverse
                options = {"context": torch.arange(300, device=DEVICE).int()} if kind == "packed" else {}
                call = partial(sparse_mla.attend, randn(21, heads, 576), caches[kind], indices, SCALE, **options)
                yield f"sparse {impl} {kind} {heads} heads", partial(call, return_lse=True, impl=impl)
    table, lengths = ints(2, 0, 1, 3, 1, 2).view(2, 3), ints(170, 0)
    plain = {"kv_scale": None}, kv
    fp8_rows = {"kv_scale": 0.5}, caches["fp8"]
    for heads in (12, 128):
        for impl, (scale, rows) in (("triton", plain), ("triton", fp8_rows), ("cuda", fp8_rows)):
            queries = randn(2, heads, 576)
            call = partial(dense_mla.decode, queries, rows, table, lengths, SCALE, page_size=64, impl=impl, **scale)
            yield f"dense {impl} {rows.dtype} {heads} heads", call


def main(wanted: list[str]) -> int:
    launched: set[str] = set()
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: launched.add(metadata.get()["name"]))
    for calls in (index_calls, topk_calls, latent_calls, attention_calls):
        for name, call in calls():
            if wanted and not any(part in name for part in wanted):
                continue
            print(name, flush=True)
            try:
                call()
            except Declined as declined:
                print(f"  {declined}")
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
    modules = kernel_modules(settings.OPERATIONS).values()
    kernels = {case.kernel.__name__ for module in modules for case in module.compile_cases(ARCH)}
    missing = set() if wanted or DEVICE.type == "cpu" else kernels - launched
    print(f"launched {', '.join(sorted(launched))}; missing: {', '.join(sorted(missing)) or 'none'}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
