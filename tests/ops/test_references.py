"""The torch references against independent loops (`naive.py`), with poisoned outputs and unused memory.

The references are the oracle of every other implementation, so nothing of the package computes an expectation here.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nsa_backend_plugin.ops import concat, dense_mla, index_key_cache, indexer_prep, latent_cache, mqa_logits, topk
from nsa_backend_plugin.ops import sparse_mla as sparse
from tests.ops import naive
from tests.ops.naive import FN, FNUZ
from tools.calls import block_table, poison, row_slots, slots_of

CPU = torch.device("cpu")
LAYOUTS = ("row_major", "preshuffled")
FLAVOURS = pytest.mark.parametrize("flavour", [FN, FNUZ], ids=["e4m3fn", "e4m3fnuz"])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def f64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cos_sin_table(positions: int, rope_dim: int) -> torch.Tensor:
    angle = torch.rand(positions, rope_dim // 2) * 6.3
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def filled_cache(pages: int, page_size: int, slots: list[int], layout: str, flavour: torch.dtype) -> torch.Tensor:
    """A cache that is NaN everywhere but in the given slots."""
    cache = np.full((pages, page_size * 132), 0x7F if flavour == FN else 0x80, dtype=np.uint8)
    for slot in slots:
        row = [naive.fp8_byte(v, flavour) for v in (torch.randn(128) * 50).tolist()]
        naive.write_key(cache, slot, row, np.float32(torch.rand(()).item() + 0.01), layout, page_size)
    return torch.from_numpy(cache)


def close(actual: torch.Tensor, expected: np.ndarray, relative: float, absolute: float) -> None:
    np.testing.assert_allclose(f64(actual), expected, rtol=relative, atol=absolute)


@FLAVOURS
def test_naive_fp8_agrees_with_torch_on_every_byte(flavour):
    """The one place where the loops themselves are checked: all 256 bytes, and rounding of random values."""
    decoded = torch.arange(256, dtype=torch.uint8).view(flavour).double().tolist()
    np.testing.assert_equal([naive.fp8_value(b, flavour) for b in range(256)], decoded)
    values = (torch.randn(500) * 60).clamp(-naive.LIMIT[flavour], naive.LIMIT[flavour])
    assert [naive.fp8_byte(v, flavour) for v in values.tolist()] == values.to(flavour).view(torch.uint8).tolist()


@FLAVOURS
@LAYOUT
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("page_size, dtype", [(64, torch.bfloat16), (16, torch.float32)])
def test_index_key_store(layout, scale_format, flavour, page_size, dtype):
    key = torch.randn(6, 128, dtype=dtype) * torch.tensor([1e-6, 1, 1, 300, 2, 1])[:, None].to(dtype)
    key[1] = 0
    key[4] *= 448 / key[4].abs().max()  # a scale that is exactly 1 with e4m3fn: ue8m0 must not double it
    slots = torch.randperm(3 * page_size)[:6]
    slots[2] = -1
    cache = poison(3, page_size * 132, dtype=torch.uint8, device=CPU)
    expected = cache.numpy().copy()
    for row, slot in zip(key.float().tolist(), slots.tolist(), strict=True):
        if slot >= 0:
            naive.write_key(expected, slot, *naive.quantize(row, flavour, scale_format), layout, page_size)
    index_key_cache.store(
        key,
        cache,
        slots,
        layout=layout,
        scale_format=scale_format,
        page_size=page_size,
        fp8_dtype=flavour,
        impl="torch",
    )
    assert np.array_equal(cache.numpy(), expected)
    values, scale = index_key_cache.gather(
        cache,
        (slots[1:2] // page_size).int()[:, None],
        ints(int(slots[1]) % page_size + 1),
        layout=layout,
        page_size=page_size,
        fp8_dtype=flavour,
        impl="torch",
    )
    assert not values[-1].float().any(), "an all-zero key must read back as zeros, not NaN"
    assert 0 < scale[-1] < 1e-4


@FLAVOURS
@LAYOUT
@pytest.mark.parametrize("page_size", [16, 64])
def test_index_key_gather(layout, flavour, page_size):
    lengths = [page_size + 3, 0, 5]
    table, pages = block_table(lengths, page_size, CPU)
    slots = slots_of(table, lengths, page_size).tolist()
    cache = filled_cache(pages, page_size, slots, layout, flavour)
    table[1] = 10**6  # garbage past the length
    values, scale = index_key_cache.gather(
        cache, table, ints(*lengths), layout=layout, page_size=page_size, fp8_dtype=flavour, impl="torch"
    )
    expected = [naive.read_key(cache.numpy(), slot, layout, page_size, flavour) for slot in slots]
    assert values.dtype == flavour
    assert values.double().tolist() == [row for row, _ in expected]
    assert scale.double().tolist() == [s for _, s in expected]


@FLAVOURS
@LAYOUT
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_mqa_logits_paged(layout, flavour, clean, per_row):
    page_size, heads, next_n, width = 16, 3, 2, 40
    lengths = [[20, 21], [0, 1], [37, 38]]
    if per_row:
        lengths = [[20, 3], [0, 1], [37, 11]]
    table, pages = block_table([max(pair) for pair in lengths], page_size, CPU)
    used = [row_slots(row, max(pair), page_size).tolist() for row, pair in zip(table, lengths, strict=True)]
    cache = filled_cache(pages, page_size, [slot for slots in used for slot in slots], layout, flavour)
    table[1, 1:] = -9
    q = torch.randn(3, next_n, heads, 128).to(flavour)
    weights = torch.randn(6, heads)
    context_lens = ints(*(n for pair in lengths for n in pair)).view(3, 2)
    out = poison(6, width + 8, dtype=torch.float32, device=CPU)
    logits = mqa_logits.paged(
        q,
        cache,
        weights,
        context_lens if per_row else context_lens[:, 1].contiguous(),
        table,
        width,
        layout=layout,
        page_size=page_size,
        clean=clean,
        out=out,
        impl="torch",
    )
    assert logits.shape == (6, width)
    assert out[:, width:].isnan().all(), "wrote past max_context_len"
    for b in range(3):
        keys = [naive.read_key(cache.numpy(), slot, layout, page_size, flavour) for slot in used[b]]
        for j in range(next_n):
            n, row = lengths[b][j], b * next_n + j
            expected = np.array([naive.logit(f64(q[b, j]), *key, f64(weights[row])) for key in keys[:n]])
            close(logits[row, :n], expected, 1e-5, 1e-3)
            assert (logits[row, n:] == -math.inf if clean else logits[row, n:].isnan()).all()


@FLAVOURS
@pytest.mark.parametrize("clean", [False, True])
def test_mqa_logits_ragged(flavour, clean):
    q, k = torch.randn(4, 2, 128).to(flavour), (torch.randn(9, 128) * 20).to(flavour)
    k.view(torch.uint8)[8] = 0x7F if flavour == FN else 0x80  # no row sees it
    k_scale, weights = torch.rand(9), torch.randn(4, 2)
    start, end = ints(0, 3, 5, 8), ints(8, 4, 5, 8)
    out = poison(4, 9, dtype=torch.float32, device=CPU)
    logits = mqa_logits.ragged(q, k, k_scale, weights, start, end, clean=clean, out=out, impl="torch")
    for t in range(4):
        for s in range(9):
            if start[t] <= s < end[t]:
                expected = naive.logit(f64(q[t]), k[s].double().tolist(), float(k_scale[s]), f64(weights[t]))
                close(logits[t, s], np.array(expected), 1e-5, 1e-3)
            else:
                assert logits[t, s] == -math.inf if clean else logits[t, s].isnan()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("k", [1, 7, 32])
def test_topk(k, deterministic):
    logits = torch.randint(-3, 3, (5, 24)).float()  # many ties
    logits[2, :10] = -math.inf
    lengths, starts = ints(24, 0, 10, 5, 1), ints(0, 7, 0, 19, 23)
    for row in range(5):
        inside = torch.zeros(24, dtype=torch.bool)
        inside[starts[row] : starts[row] + lengths[row]] = True
        logits[row, ~inside] = math.nan
    out = poison(5, k, dtype=torch.int32, device=CPU)
    topk.select(logits, lengths, k, row_starts=starts, deterministic=deterministic, out=out, impl="torch")
    for row in range(5):
        first = int(starts[row])
        expected = naive.top_indices(f64(logits[row, first : first + int(lengths[row])]), k)
        assert out[row].tolist() == expected + [-1] * (k - len(expected))


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_topk_to_slots(page_size, shared):
    logits, lengths = torch.randn(4, 33), ints(33, 17, 0, 2)
    page_rows = ints(1, 0, 1, 1) if shared else None
    table = torch.randint(0, 10**6, (2 if shared else 4, -(-33 // page_size)), dtype=torch.int32)
    result = topk.select(logits, lengths, 6, page_table=table, page_rows=page_rows, page_size=page_size, impl="torch")
    for row, n in enumerate(lengths.tolist()):
        pages = table[int(page_rows[row]) if shared else row].tolist()
        index = naive.top_indices(f64(logits[row, :n]), 6)
        slots = [pages[i // page_size] * page_size + i % page_size for i in index]
        assert result[row].tolist() == slots + [-1] * (6 - len(slots))


def latent_rows(kind: str, slots: int, used: list[int]) -> tuple[torch.Tensor, float | None, np.ndarray]:
    """(cache, kv_scale, float64 rows [slots, 576]): NaN in every slot that is not used."""
    values = torch.randn(slots, 576)
    values[[s for s in range(slots) if s not in used]] = math.nan
    if kind in ("fn", "fnuz"):
        kv = values.to(FN if kind == "fn" else FNUZ)
        return kv[:, None], 0.37, f64(kv) * 0.37
    if kind != "packed":
        kv = values.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind])
        return kv[:, None], None, f64(kv)
    packed = np.full((slots, 656), 0x7F, dtype=np.uint8)
    rows = np.full((slots, 576), math.nan)
    for slot in used:
        packed[slot], rows[slot] = packed_row(values[slot].bfloat16())
    return torch.from_numpy(packed)[:, None], None, rows


def packed_row(row: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(656 bytes, the 576 values they mean) of one bf16 latent row."""
    data, scales, meaning = [], [], []
    for tile in range(4):
        chunk, scale = naive.quantize(row[tile * 128 : tile * 128 + 128].float().tolist(), FN)
        data += chunk
        scales.append(scale)
        meaning += [naive.fp8_value(b, FN) * float(scale) for b in chunk]
    tail = row[512:].contiguous()
    parts = [np.array(data, dtype=np.uint8), np.array(scales, dtype=np.float32).view(np.uint8)]
    return np.concatenate([*parts, tail.view(torch.uint8).numpy()]), np.concatenate([meaning, f64(tail)])


QUERY = {"bf16": torch.bfloat16, "fp16": torch.float16, "packed": torch.bfloat16}
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32", "fn", "fnuz", "packed"])
@pytest.mark.parametrize("value_dim", [512])
def test_sparse_mla(kind, value_dim):
    used = [3, 4, 9, 11]
    kv, kv_scale, rows = latent_rows(kind, 12, used)
    dtype = QUERY.get(kind, torch.float32)
    q = torch.randn(4, 3, 576, dtype=dtype)
    indices = torch.tensor([[9, -1, 3, 4, 11], [-1] * 5, [-1, -1, -1, -1, 4], [11, 3, 3, -1, 9]], dtype=torch.int32)
    out = poison(4, 3, value_dim, dtype=dtype, device=CPU)
    result, lse = sparse.attend(q, kv, indices, 0.11, kv_scale=kv_scale, return_lse=True, out=out, impl="torch")
    assert result is out
    for t in range(4):
        expected, expected_lse = naive.attention(
            f64(q[t]), [rows[i] for i in indices[t].tolist() if i >= 0], 0.11, value_dim
        )
        close(out[t], expected, TOLERANCE[dtype], TOLERANCE[dtype])
        close(lse[t], expected_lse, 1e-5, 1e-5)
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()


@pytest.mark.parametrize("page_size", dense_mla.PAGE_SIZES)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_dense_mla(page_size, kind):
    lengths = [0, page_size + 1, 1, 7]
    table, pages = block_table(lengths, page_size, CPU)
    used = slots_of(table, lengths, page_size).tolist()
    kv, _, rows = latent_rows(kind, pages * page_size, used)
    table[0] = -3  # garbage past the length
    q = torch.randn(4, 2, 576, dtype=kv.dtype)
    out = poison(4, 2, 512, dtype=kv.dtype, device=CPU)
    _, lse = dense_mla.decode(
        q, kv, table, ints(*lengths), 0.2, page_size=page_size, return_lse=True, out=out, impl="torch"
    )
    for b, n in enumerate(lengths):
        keys = [rows[int(table[b, p // page_size]) * page_size + p % page_size] for p in range(n)]
        expected, expected_lse = naive.attention(f64(q[b]), keys, 0.2, 512)
        close(out[b], expected, TOLERANCE[kv.dtype], TOLERANCE[kv.dtype])
        close(lse[b], expected_lse, 1e-5, 1e-5)


def test_latent_quantize_bytes_and_dequantize_values():
    kv = torch.randn(2, 3, 576).bfloat16() * 20
    kv[0, 1, 128:256] = 0
    packed = latent_cache.quantize(kv, impl="torch")
    values = latent_cache.dequantize(packed, impl="torch")
    assert packed.shape == (2, 3, 656)
    for i in range(2):
        for j in range(3):
            data, meaning = packed_row(kv[i, j])
            assert packed[i, j].tolist() == data.tolist()
            close(values[i, j], meaning, 2**-8, 0)
    assert not values[0, 1, 128:256].any()


def test_latent_quantize_other_tiles_and_fp16():
    kv = torch.randn(3, 40).half()
    packed = latent_cache.quantize(kv, value_dim=32, tile_size=16, impl="torch")
    assert packed.shape == (3, 32 + 8 + 16)
    for row, line in zip(kv, packed, strict=True):
        tiles = [naive.quantize(row[start : start + 16].float().tolist(), FN) for start in (0, 16)]
        expected = tiles[0][0] + tiles[1][0] + np.array([s for _, s in tiles], dtype=np.float32).view(np.uint8).tolist()
        assert line.tolist() == expected + row[32:].contiguous().view(torch.uint8).tolist()
    values = latent_cache.dequantize(packed, value_dim=32, tile_size=16, dtype=torch.float16, impl="torch")
    assert torch.equal(values[:, 32:], kv[:, 32:])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "fn", "fnuz", "packed"])
def test_latent_store(kind, is_neox, rotated):
    dtype = QUERY.get(kind, torch.float32)
    k_nope, k_rope = torch.randn(3, 512, dtype=dtype), torch.randn(3, 64, dtype=dtype)
    q_rope, cos_sin = torch.randn(3, 2, 64, dtype=dtype), cos_sin_table(10, 64)
    positions = torch.tensor([9, 0, 4])
    flavour = {"fn": FN, "fnuz": FNUZ}.get(kind)
    width, store_dtype = (656, torch.uint8) if kind == "packed" else (576, dtype)
    cache = poison(5, 1, width, dtype=torch.uint8 if flavour else store_dtype, device=CPU)
    cache = cache.view(flavour) if flavour else cache
    before = cache.view(torch.uint8).clone()
    k_out = poison(3, 64, dtype=dtype, device=CPU)
    q_all = poison(3, 2, 576, dtype=dtype, device=CPU)
    extra = dict(positions=positions, cos_sin_cache=cos_sin, q_rope=q_rope, q_all=q_all)
    slots = torch.tensor([2, -1, 4])
    latent_cache.store(
        k_nope,
        k_rope,
        cache,
        slots,
        is_neox=is_neox,
        kv_scale=0.05 if flavour else None,
        k_rope_out=k_out,
        impl="torch",
        **(extra if rotated else {}),
    )
    tolerance = TOLERANCE[dtype]
    for t in range(3):
        if rotated:
            close(k_out[t], naive.rope(f64(k_rope[t]), int(positions[t]), cos_sin.numpy(), is_neox), tolerance, 1e-6)
            for h in range(2):
                expected = naive.rope(f64(q_rope[t, h]), int(positions[t]), cos_sin.numpy(), is_neox)
                close(q_all[t, h, 512:], expected, tolerance, 1e-6)
        else:
            assert torch.equal(k_out[t], k_rope[t])
        if slots[t] < 0:
            continue
        row = torch.cat([k_nope[t], k_out[t]])
        written = cache[slots[t], 0].view(torch.uint8)
        if flavour:
            scaled = [float(np.float32(v) / np.float32(0.05)) for v in row.float().tolist()]
            assert written.tolist() == [naive.fp8_byte(v, flavour) for v in scaled]
        elif kind == "packed":
            assert written.tolist() == packed_row(row)[0].tolist()
        else:
            assert torch.equal(written, row.view(torch.uint8))
    assert q_all[..., :512].isnan().all()
    untouched = [0, 1, 3]
    assert torch.equal(cache.view(torch.uint8)[untouched], before[untouched])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_concat(dtype):
    q_nope, q_rope = torch.randn(3, 2, 512, dtype=dtype), torch.randn(3, 2, 64, dtype=dtype)
    joined = concat.q_all(q_nope, q_rope, impl="torch")
    assert joined.is_contiguous()
    expected = [[q_nope[t, h].tolist() + q_rope[t, h].tolist() for h in range(2)] for t in range(3)]
    assert joined.tolist() == expected
    buffer = joined.clone()
    view = concat.q_all(buffer[..., :512], buffer[..., 512:], impl="torch")
    assert view.data_ptr() == buffer.data_ptr(), "parts of one buffer must not be copied"
    assert torch.equal(view, buffer)
    swapped = concat.q_all(buffer[..., 64:], buffer[..., :64], impl="torch")
    assert swapped[0, 0].tolist() == buffer[0, 0, 64:].tolist() + buffer[0, 0, :64].tolist()
    k_nope, k_rope = torch.randn(3, 2, 256, dtype=dtype)[..., :128], torch.randn(3, 1, 64, dtype=dtype)
    out = poison(3, 2, 192, dtype=dtype, device=CPU)
    assert concat.mla_k(k_nope, k_rope, out=out, impl="torch") is out
    assert out.tolist() == [[k_nope[t, h].tolist() + k_rope[t, 0].tolist() for h in range(2)] for t in range(3)]
    assert torch.equal(concat.mla_k(k_nope, k_rope, dtype=FN, impl="torch").float(), out.to(FN).float())


def check_quantized(values: list[float], scale: float, exact: np.ndarray, flavour: torch.dtype, fmt: str) -> None:
    """fp8 values and their scale against the exact row: right scale, and every value within half a step of fp8."""
    ideal = max(float(np.abs(exact).max()), 1e-4) / naive.LIMIT[flavour]
    if fmt == "ue8m0":
        assert math.frexp(scale)[0] == 0.5
        assert ideal * (1 - 1e-5) <= scale < 2 * ideal * (1 + 1e-5)
    else:
        assert scale == pytest.approx(ideal, rel=1e-4)
    smallest = 2.0**-10 if flavour == FN else 2.0**-11  # half of the smallest subnormal
    error = np.abs(np.array(values) * scale - exact)
    assert (error <= np.maximum(np.abs(exact) * 2.0**-4, smallest * scale) * 1.001 + 1e-5 * np.abs(exact).max()).all()


@FLAVOURS
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_indexer_query(flavour, is_neox, hadamard, scale_format):
    q, gate = torch.randn(2, 3, 128), torch.randn(2, 3)
    positions, cos_sin = torch.tensor([5, 0]), cos_sin_table(6, 64)
    q_fp8, weights = indexer_prep.query(
        q,
        gate,
        positions,
        cos_sin,
        weight_scale=0.3,
        is_neox=is_neox,
        hadamard=hadamard,
        scale_format=scale_format,
        fp8_dtype=flavour,
        impl="torch",
    )
    for t in range(2):
        for h in range(3):
            exact = naive.rope(f64(q[t, h]), int(positions[t]), cos_sin.numpy(), is_neox)
            exact = naive.hadamard(exact) if hadamard else exact
            scale = float(weights[t, h]) / (float(gate[t, h]) * 0.3)
            if scale_format == "ue8m0":
                rounded = 2.0 ** round(math.log2(scale))
                assert scale == pytest.approx(rounded, rel=1e-5)
                scale = rounded
            check_quantized(q_fp8[t, h].double().tolist(), scale, exact, flavour, scale_format)


@FLAVOURS
@LAYOUT
@pytest.mark.parametrize(
    "norm, is_neox, hadamard, scale_format", [("layer", True, True, "fp32"), ("rms", False, False, "ue8m0")]
)
def test_indexer_key_store(flavour, layout, norm, is_neox, hadamard, scale_format):
    key, weight = torch.randn(4, 128) * 3 + 1, torch.rand(128) + 0.5
    bias = torch.randn(128) if norm == "layer" else None
    positions, cos_sin = torch.tensor([5, 0, 2, 2]), cos_sin_table(6, 64)
    slots = torch.tensor([40, 3, -1, 17])
    cache = poison(3, 16 * 132, dtype=torch.uint8, device=CPU)
    before = cache.clone()
    indexer_prep.key_store(
        key,
        weight,
        bias,
        positions,
        cos_sin,
        cache,
        slots,
        is_neox=is_neox,
        norm=norm,
        eps=1e-5,
        hadamard=hadamard,
        layout=layout,
        scale_format=scale_format,
        page_size=16,
        fp8_dtype=flavour,
        impl="torch",
    )
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        exact = naive.normalize(f64(key[t]), f64(weight), None if bias is None else f64(bias), norm, 1e-5)
        exact = naive.rope(exact, int(positions[t]), cos_sin.numpy(), is_neox)
        exact = naive.hadamard(exact) if hadamard else exact
        check_quantized(*naive.read_key(cache.numpy(), slot, layout, 16, flavour), exact, flavour, scale_format)
    assert (cache != before).sum() <= 3 * 132, "bytes outside the written slots changed"


def test_empty_batches():
    cache = torch.zeros(1, 64 * 132, dtype=torch.uint8)
    index_key_cache.store(torch.empty(0, 128), cache, torch.empty(0, dtype=torch.long), impl="torch")
    values, scale = index_key_cache.gather(cache, torch.empty(0, 1, dtype=torch.int32), ints(), impl="torch")
    assert values.shape == (0, 128)
    assert scale.shape == (0,)
    assert topk.select(torch.empty(0, 5), ints(), 3, impl="torch").shape == (0, 3)
    q, kv = torch.empty(0, 2, 576), torch.randn(4, 1, 576)
    assert sparse.attend(q, kv, torch.empty(0, 3, dtype=torch.int32), 1.0, impl="torch").shape == (0, 2, 512)
    table = torch.empty(0, 1, dtype=torch.int32)
    assert dense_mla.decode(q, kv, table, ints(), 1.0, page_size=1, impl="torch").shape == (0, 2, 512)
    assert (
        sparse.attend(torch.randn(2, 2, 576), kv, torch.empty(2, 0, dtype=torch.int32), 1.0, impl="torch").eq(0).all()
    ), "no candidates at all"
