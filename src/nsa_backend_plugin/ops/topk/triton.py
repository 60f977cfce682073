"""Top-k in Triton, for CUDA and ROCm (compile-checked, not run): one program per row, always deterministic.

A row that fits in one block is read once and kept in registers. Of a longer row, a sample gives a threshold that
somewhat more than k logits pass; one pass collects the indices of those, in order, and the selection runs on them.
Where the sample misleads (ties, or an order that fools it), the threshold is found on the whole row instead, in 32
passes. The k-th largest is found by bisection on an order-preserving integer key: cheaper than Triton's
histogram, and it needs no shared memory.

Sources: threshold from a sample, Floyd and Rivest 1975.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.ops._triton import support
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops.arch import core_count, is_cuda
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.topk import Select

MAX_K = 4096
_MIN_BLOCK = 8192
_PROGRAMS_PER_CORE = 1  # their registers leave no room for two


available = support.available_for_large_tiles


def declines_select(call: Select) -> Reason:
    return None if call.k <= MAX_K else f"k {call.k}: at most {MAX_K}"


@triton.jit
def _load_keys(logits, index, exists):
    """Order-preserving unsigned keys of logits; 0, below every logit, where there is none. -0 and +0 are equal."""
    value = tl.load(logits + index, mask=exists, other=0.0)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(exists, key, 0)


@triton.jit
def _kth_largest(key, rank):
    """Largest t with at least `rank` keys >= t; 0 if there are fewer keys."""
    threshold = tl.zeros((), tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    while bit > 0:
        higher = threshold | bit
        count = tl.sum((key >= higher).to(tl.int32), 0)
        threshold = tl.where(count >= rank, higher, threshold)
        bit = tl.where(count == rank, 0, bit >> 1)  # exactly the wanted keys: a finer threshold selects the same
    return threshold


@triton.jit
def _emit(key, index, threshold, ties_wanted, taken, out):
    """Write the block's share of the result: keys above the threshold, and the first `ties_wanted` that equal it.

    Returns the ties still wanted and the number of indices written so far.
    """
    above = (key > threshold).to(tl.int32)
    tie = (key == threshold).to(tl.int32)
    both = above + (tie << 16)  # two counts, each at most the block, in one scan
    before = tl.cumsum(both, 0) - both
    ties_before = before >> 16
    take = (above == 1) | ((tie == 1) & (ties_before < ties_wanted))
    position = taken + (before & 0xFFFF) + tl.minimum(ties_before, ties_wanted)
    tl.store(out + position, index, mask=take)
    ties_taken = tl.minimum(tl.sum(tie, 0), ties_wanted)
    return ties_wanted - ties_taken, taken + tl.sum(above, 0) + ties_taken


@triton.jit
def _select_block(logits, index, exists, k, out):
    """Top-k of one block of candidates, which are in index order."""
    key = _load_keys(logits, index, exists)
    threshold = _kth_largest(key, k)
    wanted = k - tl.sum((key > threshold).to(tl.int32), 0)
    _emit(key, index, threshold, wanted, 0, out)


@triton.jit
def _sample_threshold(logits, length, k, SAMPLE: tl.constexpr):
    """A key that a few more than k of the row's logits reach, most likely; 0 if the sample cannot tell.

    Sampled are groups of 4 neighbours, evenly spread. The rank is k's expected rank in the sample and 4 standard
    deviations more; neighbours may all be alike, which doubles the deviation.
    """
    i = tl.arange(0, SAMPLE)
    index = (i // 4) * 4 * (length // SAMPLE) + i % 4
    expected = SAMPLE / length.to(tl.float32) * k  # k, when 1, is a compile-time int
    rank = (expected + 8 * tl.sqrt(expected)).to(tl.int32) + 8
    return _kth_largest(_load_keys(logits, index, index < length), rank)


@triton.jit
def _collect(logits, length, threshold, candidates, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Indices of the keys that reach the threshold, in order; returns their number, of which BLOCK are stored."""
    i = tl.arange(0, CHUNK)
    count = 0
    for begin in range(0, length, CHUNK):
        key = _load_keys(logits, begin + i, begin + i < length)
        take = (key >= threshold) & (begin + i < length)
        position = count + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(candidates + position, begin + i, mask=take & (position < BLOCK))
        count += tl.sum(take.to(tl.int32), 0)
    return count


@triton.jit
def _select_streaming(logits, length, k, out, CHUNK: tl.constexpr):
    """Top-k of a row of any length and content: bisection on the whole row, one bit a pass."""
    i = tl.arange(0, CHUNK)
    threshold = tl.zeros((), tl.uint32)
    above = 0  # keys at or past the last threshold that too few keys reach: those above the final one
    bit = tl.full((), 1 << 31, tl.uint32)
    while bit > 0:
        higher = threshold | bit
        count = 0
        for begin in range(0, length, CHUNK):
            key = _load_keys(logits, begin + i, begin + i < length)
            count += tl.sum((key >= higher).to(tl.int32), 0)
        threshold = tl.where(count >= k, higher, threshold)
        above = tl.where(count >= k, above, count)
        bit = bit >> 1
    ties_wanted = k - above
    taken = 0
    for begin in range(0, length, CHUNK):
        key = _load_keys(logits, begin + i, begin + i < length)
        ties_wanted, taken = _emit(key, begin + i, threshold, ties_wanted, taken, out)


@triton.jit
def _select_kernel(
    logits,
    lengths,
    row_starts,
    page_table,
    page_rows,
    out,
    candidates,
    rows,
    k,
    logits_stride,
    table_stride,
    HAS_STARTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: no page table
    HAS_PAGE_ROWS: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SAMPLE: tl.constexpr = BLOCK // 2
    CHUNK: tl.constexpr = BLOCK // 4  # of the passes over a long row, which hold more in registers
    own_candidates = candidates + tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK // 2)  # covers k
    row = tl.program_id(0)
    while row < rows:
        length = tl.load(lengths + row)
        row_logits = logits + row.to(tl.int64) * logits_stride
        if HAS_STARTS:
            row_logits += tl.load(row_starts + row)
        row_out = out + row.to(tl.int64) * k

        if length <= k:
            tl.store(row_out + i, tl.where(i < length, i, -1), mask=i < k)
        elif length <= BLOCK:
            _select_block(row_logits, i, i < length, k, row_out)
        elif LONG:
            threshold = _sample_threshold(row_logits, length, k, SAMPLE)
            count = _collect(row_logits, length, threshold, own_candidates, CHUNK, BLOCK)
            if (count >= k) & (count <= BLOCK):
                tl.debug_barrier()  # other threads of this program stored what this one loads
                index = tl.load(own_candidates + i, mask=i < count, other=0)
                _select_block(row_logits, index, i < count, k, row_out)
                tl.debug_barrier()  # before the next row's candidates overwrite these
            else:
                _select_streaming(row_logits, length, k, row_out, CHUNK)

        if PAGE_SIZE:
            tl.debug_barrier()  # the row's indices are stored by other threads
            table_row = row
            if HAS_PAGE_ROWS:
                table_row = tl.load(page_rows + row)
            table = page_table + table_row.to(tl.int64) * table_stride
            index = tl.load(row_out + j, mask=j < k, other=-1)
            page = tl.load(table + index // PAGE_SIZE, mask=index >= 0, other=0)
            tl.store(row_out + j, page * PAGE_SIZE + index % PAGE_SIZE, mask=index >= 0)
        row += tl.num_programs(0)


def select(call: Select) -> torch.Tensor:
    logits, k = call.logits, call.k
    rows, columns = logits.shape
    if rows == 0:
        return call.out
    # Logits that a program holds: room for k and as many candidates more as a sample's threshold lets through.
    block = max(_MIN_BLOCK, triton.next_power_of_2(2 * k))
    programs = min(rows, core_count(logits.device) * _PROGRAMS_PER_CORE)
    long = columns > block
    candidates = torch.empty(programs * block if long else 0, dtype=torch.int32, device=logits.device)
    launch(
        _select_kernel,
        (programs,),
        logits,
        call.lengths,
        call.row_starts,
        call.page_table,
        call.page_rows,
        call.out,
        candidates,
        rows,
        k,
        logits.stride(0),
        0 if call.page_table is None else call.page_table.stride(0),
        HAS_STARTS=call.row_starts is not None,
        PAGE_SIZE=call.page_size if call.page_table is not None else 0,
        HAS_PAGE_ROWS=call.page_rows is not None,
        LONG=long,
        BLOCK=block,
        num_warps=16 if is_cuda(call.arch) else 8,  # 512 threads: 16 logits each
        resident=_PROGRAMS_PER_CORE,
    )
    return call.out
