"""Triton kernels of absorbed MLA attention, shared by `sparse_mla` and `dense_mla`.

One program attends a tile of heads of one query row to a part of that row's keys ("split-K"). Every key is one latent
row that serves as key (all of it) and as value (its first part), so a tile is read once and feeds two products. The
value part is handled in chunks of 128, each with its own accumulator: that is the packed layout's scale tile, and
it keeps every operand at a size that the compiler pipelines without spilling. With more than one split, `combine`
merges the parts.

The two operations differ only in how a program finds its slots: a list of slots (sparse), or a page table (dense).
Sources: FlashDecoding (split-K with log-sum-exp merge), DeepSeek-V2 (absorbed MLA).
"""
# mypy: disable-error-code="assignment"
# Tuples of tensors grow chunk by chunk, which mypy cannot type.

from __future__ import annotations

import triton
import triton.language as tl

#: Below every score: the running maximum starts here, not at -inf, so that -inf - -inf never happens.
_LOWEST = tl.constexpr(-1.0e30)
_LN2 = tl.constexpr(0.6931471805599453)
_SCALE_BYTES = tl.constexpr(4)


@triton.jit
def _tile_slots(table_row, position, end, PAGE_SIZE: tl.constexpr):
    """Slot of each key position, -1 or below where there is none. PAGE_SIZE 0: the table lists slots itself."""
    inside = position < end
    if PAGE_SIZE == 0:
        return tl.load(table_row + position, mask=inside, other=-1).to(tl.int64)
    page = tl.load(table_row + position // PAGE_SIZE, mask=inside, other=-1).to(tl.int64)
    return page * PAGE_SIZE + position % PAGE_SIZE


@triton.jit
def _load_tile(
    kv, slot, kv_stride, PACKED: tl.constexpr, VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, CHUNK: tl.constexpr
):
    """Latent rows: (value chunks, RoPE part, scale of each chunk or nothing). Rows without a slot are zero."""
    CHUNKS: tl.constexpr = VALUE_DIM // CHUNK
    exists = slot >= 0
    row = kv + slot * kv_stride
    value_row = row
    rope_row = row + VALUE_DIM
    if PACKED:
        value_row = row.to(tl.pointer_type(tl.float8e4nv))
        rope_row = (row + VALUE_DIM + CHUNKS * _SCALE_BYTES).to(tl.pointer_type(tl.bfloat16))
    dim = tl.arange(0, CHUNK)
    values = ()
    scales = ()
    for c in tl.static_range(CHUNKS):
        pointer = value_row[:, None] + (c * CHUNK + dim)[None, :]
        values += (tl.load(pointer, mask=exists[:, None], other=0.0),)
        if PACKED:
            scale = (row + VALUE_DIM + c * _SCALE_BYTES).to(tl.pointer_type(tl.float32))
            scales += (tl.load(scale, mask=exists, other=0.0),)
    rope = tl.load(rope_row[:, None] + tl.arange(0, ROPE_DIM)[None, :], mask=exists[:, None], other=0.0)
    return values, rope, scales


@triton.jit
def _widen(value, dtype: tl.constexpr):
    """fp8 to the compute type, exactly; to bf16 by way of fp32 because sm_89 has no direct conversion."""
    if value.dtype == dtype or dtype == tl.float16:
        return value.to(dtype)
    else:
        return value.to(tl.float32).to(dtype)


@triton.jit
def _peak(values):
    """Largest magnitude of each row, in fp32."""
    return tl.max(tl.abs(values.to(tl.float32)), 1)


@triton.jit
def _zeros(HEADS: tl.constexpr, DIMS: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros([DIMS, HEADS], tl.float32)
    else:
        return tl.zeros([HEADS, DIMS], tl.float32)


@triton.jit
def _score_dot(query, key, SWAP: tl.constexpr):
    """query [heads, d] x key [keys, d] -> [heads, keys], or [keys, heads] with SWAP."""
    if SWAP:
        return tl.dot(key, tl.trans(query))
    else:
        return tl.dot(query, tl.trans(key))


@triton.jit
def _value_dot(weight, value, accumulator, SWAP: tl.constexpr):
    """Add weight [heads, keys] x value [keys, d] to [heads, d]; with SWAP all three are transposed."""
    if SWAP:
        return tl.dot(tl.trans(value), weight, accumulator)
    else:
        return tl.dot(weight, value, accumulator)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["lengths"])
def attend_kernel(
    q,  # [rows, HEADS, VALUE_DIM + ROPE_DIM]
    kv,  # [slots, row] rows of kv_stride elements (bytes when PACKED)
    table,  # int32 [rows, table_stride]: slots, or pages when PAGE_SIZE > 0
    lengths,  # int32 [rows] keys of each row
    out,  # [rows, HEADS, VALUE_DIM], written when not SPLIT
    lse,  # fp32 [rows, HEADS], written when not SPLIT and WRITE_LSE
    partial_out,  # fp32 [rows, splits, HEADS, VALUE_DIM], written when SPLIT
    partial_lse,  # fp32 [rows, splits, HEADS], written when SPLIT; -inf marks a part without keys
    score_scale,  # softmax scale * log2(e), times the scale of plain fp8 rows
    value_scale,  # scale of plain fp8 rows, else 1
    kv_stride,
    table_stride,
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    EARLY: tl.constexpr,  # see early_launch.py: this kernel, and with SPLIT the combine kernel, start early
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    CHUNKS: tl.constexpr = VALUE_DIM // CHUNK
    HEAD_BLOCKS: tl.constexpr = (HEADS + HEAD_TILE - 1) // HEAD_TILE
    KEY_AXIS: tl.constexpr = 0 if SWAP else 1
    HEAD_AXIS: tl.constexpr = 1 - KEY_AXIS
    # Plain fp8 rows are multiplied in fp16: it holds every fp8 number, hardware converts to it in half of a step, and
    # probabilities keep three bits more than in bf16. Rows with scales of their own need bf16's range.
    FP8: tl.constexpr = (not PACKED) and kv.dtype.element_ty.primitive_bitwidth == 8
    compute: tl.constexpr = tl.float16 if FP8 else q.dtype.element_ty

    # Head blocks of the same keys run next to each other and share them through L2.
    program = tl.program_id(0)
    head = program % HEAD_BLOCKS * HEAD_TILE + tl.arange(0, HEAD_TILE)
    part = (program // HEAD_BLOCKS).to(tl.int64)  # row * splits + split
    row = part // splits
    split = (part % splits).to(tl.int32)
    head_exists = head < HEADS

    context = tl.load(lengths + row)
    tiles_per_split = tl.cdiv(tl.cdiv(context, KEY_TILE), splits)
    first = split * tiles_per_split * KEY_TILE
    last = tl.minimum(first + tiles_per_split * KEY_TILE, context)
    if SPLIT:  # noqa: SIM102 (SPLIT is decided when compiling, the rest when running)
        if first >= last:
            tl.store(partial_lse + part * HEADS + head, float("-inf"), mask=head_exists)
            return

    q_row = q + row * (HEADS * (VALUE_DIM + ROPE_DIM)) + head[:, None] * (VALUE_DIM + ROPE_DIM)
    dim = tl.arange(0, CHUNK)
    rope_dim = tl.arange(0, ROPE_DIM)
    queries = ()
    accumulators = ()
    for c in tl.static_range(CHUNKS):
        queries += (tl.load(q_row + (c * CHUNK + dim)[None, :], mask=head_exists[:, None], other=0.0),)
        accumulators += (_zeros(HEAD_TILE, CHUNK, SWAP),)
    query_rope = tl.load(q_row + VALUE_DIM + rope_dim[None, :], mask=head_exists[:, None], other=0.0)
    if FP8:  # each head's query divided by a power of two, which leaves values below 2
        peak = _peak(query_rope)
        for c in tl.static_range(CHUNKS):
            peak = tl.maximum(peak, _peak(queries[c]))
        unit = (tl.maximum(peak, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        inverse_unit = (1.0 / unit)[:, None]
        scaled = ()
        for c in tl.static_range(CHUNKS):
            scaled += ((queries[c].to(tl.float32) * inverse_unit).to(compute),)
        queries = scaled
        query_rope = (query_rope.to(tl.float32) * inverse_unit).to(compute)
        score_scale = tl.expand_dims(unit * score_scale, KEY_AXIS)

    # Running softmax in base 2.
    highest = tl.full([HEAD_TILE], _LOWEST, tl.float32)
    total = tl.zeros([HEAD_TILE], tl.float32)
    table_row = table + row * table_stride
    for start in tl.range(first, last, KEY_TILE, num_stages=STAGES):
        slot = _tile_slots(table_row, start + tl.arange(0, KEY_TILE), last, PAGE_SIZE)
        values, key_rope, scales = _load_tile(kv, slot, kv_stride, PACKED, VALUE_DIM, ROPE_DIM, CHUNK)

        score = _score_dot(query_rope, _widen(key_rope, compute), SWAP)
        for c in tl.static_range(CHUNKS):
            chunk_score = _score_dot(queries[c], _widen(values[c], compute), SWAP)
            if PACKED:
                chunk_score *= tl.expand_dims(scales[c], HEAD_AXIS)
            score += chunk_score
        score = tl.where(tl.expand_dims(slot >= 0, HEAD_AXIS), score * score_scale, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(score, KEY_AXIS))
        decay = tl.exp2(highest - new_highest)
        weight = tl.exp2(score - tl.expand_dims(new_highest, KEY_AXIS))
        highest = new_highest
        total = total * decay + tl.sum(weight, KEY_AXIS)
        decay = tl.expand_dims(decay, KEY_AXIS)
        updated = ()
        for c in tl.static_range(CHUNKS):
            chunk_weight = weight
            if PACKED:
                chunk_weight = weight * tl.expand_dims(scales[c], HEAD_AXIS)
            updated += (
                _value_dot(chunk_weight.to(compute), _widen(values[c], compute), accumulators[c] * decay, SWAP),
            )
        accumulators = updated

    if EARLY and SPLIT:
        tl.extra.cuda.gdc_launch_dependents()
    # No key at all: total is 0 and every accumulator is 0.
    inverse = tl.expand_dims(value_scale / tl.maximum(total, 1e-30), KEY_AXIS)
    row_lse = tl.where(total > 0, highest * _LN2 + tl.log(total), float("-inf"))
    if SPLIT:
        target = partial_out + part * (HEADS * VALUE_DIM)
        tl.store(partial_lse + part * HEADS + head, row_lse, mask=head_exists)
    else:
        target = out + row * (HEADS * VALUE_DIM)
        if WRITE_LSE:
            tl.store(lse + row * HEADS + head, row_lse, mask=head_exists)
    target = target + tl.expand_dims(head * VALUE_DIM, KEY_AXIS) + tl.expand_dims(dim, HEAD_AXIS)
    for c in tl.static_range(CHUNKS):
        result = (accumulators[c] * inverse).to(target.dtype.element_ty)
        tl.store(target + c * CHUNK, result, mask=tl.expand_dims(head_exists, KEY_AXIS))


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial_out,  # fp32 [rows, splits, HEADS, VALUE_DIM]
    partial_lse,  # fp32 [rows, splits, HEADS]
    out,  # [rows, HEADS, VALUE_DIM]
    lse,  # fp32 [rows, HEADS], written when WRITE_LSE
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Merge the parts of one row and head, weighted by their share of the softmax's sum."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.program_id(2) * DIM_TILE + tl.arange(0, DIM_TILE)
    split = tl.arange(0, SPLIT_TILE)
    part = (row * splits + split) * HEADS + head
    if EARLY:
        tl.extra.cuda.gdc_wait()  # until the parts are written

    part_lse = tl.load(partial_lse + part, mask=split < splits, other=float("-inf"))
    highest = tl.maximum(tl.max(part_lse, 0), _LOWEST)
    share = tl.exp(part_lse - highest)
    total = tl.sum(share, 0)
    # A part without keys was never written: it must not be read.
    pointer = partial_out + part[:, None] * VALUE_DIM + dim[None, :]
    part_out = tl.load(pointer, mask=(part_lse > float("-inf"))[:, None], other=0.0)
    merged = tl.sum(part_out * share[:, None], 0) / tl.maximum(total, 1e-30)
    tl.store(out + (row * HEADS + head) * VALUE_DIM + dim, merged.to(out.dtype.element_ty))
    if WRITE_LSE and tl.program_id(2) == 0:
        tl.store(lse + row * HEADS + head, tl.where(total > 0, highest + tl.log(total), float("-inf")))
