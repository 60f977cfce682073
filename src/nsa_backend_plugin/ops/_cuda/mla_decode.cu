// MLA decode over fp8 rows for few heads: one gather of every row per 16 heads.
//
//   packed row  656 bytes: 512 e4m3 values | 4 fp32 scales, one per 128 values | 64 bf16 RoPE values. Selected by slot.
//   PLAIN row   576 bytes: 512 e4m3 values | 64 e4m3 RoPE values, one scale for all rows. Found by a page table.
//   block       16 heads of one token over one split of its rows: four warps
//   warp        owns 128 of the 512 values (of a packed row, one scale) for both products, and 16 of the 64 RoPE values
//
// Stages of a step, over a tile of 32 rows in shared memory:
//   gather_tile        rows by 16-byte asynchronous copies, STAGES tiles in flight
//   score_tile         the warp's share of q.k: e4m3 -> f16 in registers, f32 sums; store_scores puts it in shared memory
//   accumulate_values  the PREVIOUS tile's p.v, so that its matrix products overlap this tile's scores
//   softmax_tile       adds up the four warps' shares, online softmax, probabilities back to shared memory
// then write_result: the answer of an unsplit token, else a partial result that mla_merge.cu combines.
//
// Range: nothing overflows f16. q is scaled by a power of two per (head, 128 values), probabilities by a constant and
// the rows' scales by a running power of two per 128 values; the factors come back in f32.
//
// Compile-time parameters: STAGES, BLOCKS_PER_SM, SHARED_BYTES, ROW_BYTES, PITCH, PLAIN.

#include "ptx.cuh"

constexpr int VALUE_DIM = 512, ROPE_DIM = 64, QUERY_DIM = VALUE_DIM + ROPE_DIM;
constexpr int SCALE_OFFSET = VALUE_DIM, ROPE_OFFSET = PLAIN ? VALUE_DIM : VALUE_DIM + 16;
static_assert(ROW_BYTES == ROPE_OFFSET + (PLAIN ? 1 : 2) * ROPE_DIM, "rows of another layout");
// PITCH of rows in shared memory: an odd number of 16 bytes puts eight consecutive rows on distinct banks for ldmatrix.
static_assert(PITCH >= ROW_BYTES && PITCH % 32 == 16, "a pitch with bank conflicts");

constexpr int TILE = 32;
constexpr int HEADS = 16;  // of a block: M of the matrix instruction
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int WARP_DIM = VALUE_DIM / WARPS;

constexpr int SCORE_PITCH = 40, PROBABILITY_PITCH = 40;  // 32 and 8 padding elements: no bank conflicts

constexpr float QUERY_SCALE = 0x1p14f;         // f16 q lies below 2^15
constexpr float PROBABILITY_SCALE = 0x1p8f;    // f16 p lies below 2^8, ...
constexpr float ROW_SCALE = 0x1p6f;            // ... f16 row scales below 2^7: their product below 2^15
constexpr float NO_SCORE = -1e30f;             // start of the running maximum: finite, so that -inf - max is -inf

struct Shared {
  uint8 tiles[STAGES][TILE][PITCH];
  float scores[WARPS][HEADS][SCORE_PITCH];
  uint16 probabilities[HEADS][PROBABILITY_PITCH];
  float rescale[HEADS];  // of the accumulators, per step; at the end 1 / sum
  uint64 full[STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for another size");

struct Arguments {
  const uint16* __restrict__ q;     // [tokens, heads, 576] bf16
  const uint8* __restrict__ kv;     // [slots, row_stride]
  const int* __restrict__ table;    // [tokens, table_stride]: slots, -1 = none; with PLAIN pages
  const int* __restrict__ lengths;  // [tokens] rows of each token, with PLAIN
  uint16* __restrict__ out;         // [tokens, splits, heads, 512] bf16
  float* __restrict__ lse;          // [tokens, heads, splits] or null
  int64 row_stride, table_stride;
  float scale_log2;   // softmax scale * log2(e), times the scale of plain rows
  float value_scale;  // of plain rows, else 1
  float lse_unit;     // `lse` is a base-2 logarithm times this: 1 to be merged, ln(2) for the caller
  int heads, topk, splits;
  int page_bits;    // a page has 1 << page_bits tokens
  int merge_waits;  // whether the merge is launched at once, and waits
  int leading;      // whether a token's rows lead: behind a tile without one there is none
};

// Where a thread stands: its warp (and thereby its chunk of the values), its row and column in a matrix fragment.
struct Position {
  int lane, warp, row, column;
  DEVICE Position() {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    row = lane / 4, column = lane % 4;
  }
};

// The warp's part of q as matrix fragments, heads `row` and `row + 8` of the block.
struct Queries {
  uint32 values[WARP_DIM / 16][4];
  uint32 rope[4];
  float unscale[2];
};

// What accumulate_values needs of a tile whose scores are done.
struct Pending {
  uint32 tile;                  // shared-memory address
  uint32 row_scales[TILE / 8];  // f16x2: rows 8n + 2*column and the next
  float growth;                 // of the accumulators' unit: old peak / new peak
};

// The tile's slots, one per lane; -1 past the split's last tile and past the token's `count` rows.
DEVICE int load_slots(const Arguments& a, const int* table, int tile, int tile_end, int count, int lane) {
  const int position = tile * TILE + lane;
  if (tile >= tile_end || position >= count) return -1;
  if (!PLAIN) return table[position];
  return table[position >> a.page_bits] << a.page_bits | position & (1 << a.page_bits) - 1;
}

// Every warp copies its rows. Missing rows become zeros: their scores are masked, and 0 * 0 stays 0 in p.v.
DEVICE void gather_tile(const Arguments& a, int slots, uint32 tile, uint32 full, const Position& at) {
  constexpr int ROWS = TILE / WARPS, TAIL = ROW_BYTES / 16 - 32;  // 16-byte pieces after the first 512 bytes
  const int first = at.warp * ROWS;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int slot = __shfl_sync(~0u, slots, first + r);
    const uint8* row = a.kv + max(slot, 0) * a.row_stride;
    copy_async_16(tile + (first + r) * PITCH + at.lane * 16, row + at.lane * 16, slot >= 0);
  }
#pragma unroll
  for (int start = 0; start < ROWS * TAIL; start += 32) {
    const int piece = start + at.lane, r = first + piece / TAIL, offset = (32 + piece % TAIL) * 16;
    const int slot = __shfl_sync(~0u, slots, min(r, TILE - 1));
    const uint8* row = a.kv + max(slot, 0) * a.row_stride;
    if (piece < ROWS * TAIL) copy_async_16(tile + r * PITCH + offset, row + offset, slot >= 0);
  }
  barrier_arrive_after_copies(full);
}

DEVICE float row_scale(uint32 tile, int row, int warp) {
  return load_shared(tile + row * PITCH + SCALE_OFFSET + 4 * warp);
}

// q to f16, scaled so that the warp's largest value per head lies in [2^14, 2^15). The order of the 16 values of a
// fragment follows score_tile's: a lane holds values 4*column .. 4*column + 3, in pairs. The RoPE part of PLAIN rows is
// like 16 more of them; of packed rows it stays bf16, in the order of the matrix instruction.
DEVICE void load_queries(const Arguments& a, int token, int first_head, const Position& at, Queries& q) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int head = first_head + at.row + 8 * half;
    const bool present = head < a.heads;
    const uint16* source = a.q + (int64(token) * a.heads + (present ? head : 0)) * QUERY_DIM;
    constexpr int STEPS = WARP_DIM / 16 + PLAIN;
    uint2 raw[STEPS];
    float peak = 0.f;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const int first = s < WARP_DIM / 16 ? at.warp * WARP_DIM + 16 * s : VALUE_DIM + at.warp * 16;
      const uint2* at_values = reinterpret_cast<const uint2*>(source + first + 4 * at.column);
      raw[s] = present ? *at_values : make_uint2(0, 0);
      peak = fmaxf(peak, fmaxf(fabsf(bf16_low(raw[s].x)), fabsf(bf16_high(raw[s].x))));
      peak = fmaxf(peak, fmaxf(fabsf(bf16_low(raw[s].y)), fabsf(bf16_high(raw[s].y))));
    }
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
    const float unit = power_of_two_below(peak), factor = inverse_power_of_two(unit) * QUERY_SCALE;
    q.unscale[half] = unit * (1.f / QUERY_SCALE);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      uint32(&fragment)[4] = s < WARP_DIM / 16 ? q.values[s] : q.rope;
      fragment[half] = pack_f16x2(bf16_low(raw[s].x) * factor, bf16_high(raw[s].x) * factor);
      fragment[2 + half] = pack_f16x2(bf16_low(raw[s].y) * factor, bf16_high(raw[s].y) * factor);
    }
    if (PLAIN) continue;
    const uint32* at_rope = reinterpret_cast<const uint32*>(source + VALUE_DIM + at.warp * 16 + 2 * at.column);
    q.rope[half] = present ? at_rope[0] : 0;
    q.rope[2 + half] = present ? at_rope[4] : 0;
  }
}

// The warp's share of the scores [16 heads, 32 rows]: rows `row` and `row + 8`, columns 8n + 2*column and the next.
// ldmatrix moves 16-bit elements, here pairs of e4m3: a lane gets values 4*column .. 4*column + 3 of row `row`.
DEVICE void score_tile(uint32 tile, const Position& at, const Queries& q, float (&scores)[TILE / 8][4]) {
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
#pragma unroll
  for (int block = 0; block < WARP_DIM / 64; block++) {
    uint32 keys[TILE / 8][4];
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
      load_matrices(keys[n], tile + (8 * n + at.lane % 8) * PITCH + at.warp * WARP_DIM + block * 64 + at.lane / 8 * 16);
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) {
        uint32 low, high;
        e4m3x4_to_f16(keys[n][s], low, high);
        mma_f16(scores[n], q.values[4 * block + s], low, high);
      }
  }

  if (PLAIN) {  // the RoPE part: 16 values of each of the 32 rows in one load
    uint32 keys[TILE / 8];
    load_matrices(keys, tile + at.lane * PITCH + ROPE_OFFSET + at.warp * 16);
#pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
      uint32 low, high;
      e4m3x4_to_f16(keys[n], low, high);
      mma_f16(scores[n], q.rope, low, high);
    }
  }

#pragma unroll
  for (int n = 0; n < TILE / 8; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float scale = PLAIN ? 1.f : row_scale(tile, 8 * n + 2 * at.column + e, at.warp);
      scores[n][e] *= scale * q.unscale[0];
      scores[n][2 + e] *= scale * q.unscale[1];
    }

  if (PLAIN) return;
  // RoPE part: bf16 on both sides, unscaled, hence after the row scales.
#pragma unroll
  for (int pair = 0; pair < TILE / 16; pair++) {
    uint32 keys[4];
    const int row = 16 * pair + at.lane % 8 + at.lane / 16 * 8;
    load_matrices(keys, tile + row * PITCH + ROPE_OFFSET + at.warp * 32 + at.lane / 8 % 2 * 16);
    mma_bf16(scores[2 * pair], q.rope, keys[0], keys[1]);
    mma_bf16(scores[2 * pair + 1], q.rope, keys[2], keys[3]);
  }
}

DEVICE void store_scores(Shared& shared, const Position& at, const float (&scores)[TILE / 8][4]) {
#pragma unroll
  for (int n = 0; n < TILE / 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float* to = &shared.scores[at.warp][at.row + 8 * half][8 * n + 2 * at.column];
      *reinterpret_cast<float2*>(to) = make_float2(scores[n][2 * half], scores[n][2 * half + 1]);
    }
}

// The unit of the value accumulators only grows: the largest row scale so far, rounded down to a power of two.
// Called between the barriers of a step, where its latency hides behind the softmax.
DEVICE Pending scale_values(uint32 tile, const Position& at, float& value_peak) {
  if (PLAIN) return {tile, {}, 1.f};
  const uint32 peak = __reduce_max_sync(~0u, __float_as_uint(fmaxf(row_scale(tile, at.lane, at.warp), 0.f)));
  const float new_peak = fmaxf(value_peak, power_of_two_below(__uint_as_float(peak)));
  const float inverse = inverse_power_of_two(new_peak), factor = inverse * ROW_SCALE;
  Pending pending = {tile, {}, value_peak * inverse};
  value_peak = new_peak;
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) {
    const int row = 8 * n + 2 * at.column;
    pending.row_scales[n] =
        pack_f16x2(row_scale(tile, row, at.warp) * factor, row_scale(tile, row + 1, at.warp) * factor);
  }
  return pending;
}

// sums[16 heads, 128 values] = sums * rescale + p.v of the pending tile. The transposing ldmatrix gives a lane a pair
// of neighbouring values of two neighbouring rows; a byte permutation sorts them into two fragments, of even and of
// odd values: sums[4b + 2e] holds the even and sums[4b + 2e + 1] the odd ones of values 32b + 16e .. + 15.
DEVICE void accumulate_values(Shared& shared, const Position& at, const Pending& pending, float (&sums)[WARP_DIM / 8][4]) {
  const float rescale_low = shared.rescale[at.row] * pending.growth;
  const float rescale_high = shared.rescale[at.row + 8] * pending.growth;
#pragma unroll
  for (int n = 0; n < WARP_DIM / 8; n++) {
    sums[n][0] *= rescale_low, sums[n][1] *= rescale_low;
    sums[n][2] *= rescale_high, sums[n][3] *= rescale_high;
  }
#pragma unroll
  for (int step = 0; step < TILE / 16; step++) {
    uint32 p[4];
    load_matrices(p, shared_address(&shared.probabilities[at.lane % 16][16 * step + at.lane / 16 * 8]));
    if (!PLAIN) {
      p[0] = multiply_f16x2(p[0], pending.row_scales[2 * step]);
      p[1] = multiply_f16x2(p[1], pending.row_scales[2 * step]);
      p[2] = multiply_f16x2(p[2], pending.row_scales[2 * step + 1]);
      p[3] = multiply_f16x2(p[3], pending.row_scales[2 * step + 1]);
    }
    const uint32 rows = pending.tile + (16 * step + at.lane % 16) * PITCH + at.warp * WARP_DIM + at.lane / 16 * 16;
#pragma unroll
    for (int b = 0; b < WARP_DIM / 32; b++) {
      uint32 pairs[4];
      load_matrices_transposed(pairs, rows + 32 * b);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        uint32 even_low, even_high, odd_low, odd_high;
        e4m3x4_to_f16(__byte_perm(pairs[2 * e], 0, 0x3120), even_low, odd_low);
        e4m3x4_to_f16(__byte_perm(pairs[2 * e + 1], 0, 0x3120), even_high, odd_high);
        mma_f16(sums[4 * b + 2 * e], p, even_low, even_high);
        mma_f16(sums[4 * b + 2 * e + 1], p, odd_low, odd_high);
      }
    }
  }
}

// A thread's row of the softmax: one head, four rows of a tile; eight lanes share a head.
struct SoftmaxRow {
  int head, first;
  float maximum = NO_SCORE, sum = 0.f;
  DEVICE explicit SoftmaxRow(const Position& at) : head(at.warp * 4 + at.lane / 8), first(at.lane % 8 * 4) {}
};

DEVICE float maximum_of_head(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 4));
}

DEVICE float sum_of_head(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  x += __shfl_xor_sync(~0u, x, 2);
  return x + __shfl_xor_sync(~0u, x, 4);
}

DEVICE void softmax_tile(Shared& shared, const Position& at, uint32 present, float scale_log2, SoftmaxRow& row) {
  float p[4] = {};
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) {
    const float4 share = *reinterpret_cast<const float4*>(&shared.scores[warp][row.head][row.first]);
    p[0] += share.x, p[1] += share.y, p[2] += share.z, p[3] += share.w;
  }
  float maximum = row.maximum;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    p[e] = present >> (row.first + e) & 1 ? p[e] * scale_log2 : MINUS_INFINITY;
    maximum = fmaxf(maximum, p[e]);
  }
  maximum = maximum_of_head(maximum);
  const float rescale = exp2_approx(row.maximum - maximum);
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    p[e] = exp2_approx(p[e] - maximum);
    sum += p[e];
    p[e] *= PROBABILITY_SCALE;
  }
  row.sum = row.sum * rescale + sum;
  row.maximum = maximum;
  *reinterpret_cast<uint2*>(&shared.probabilities[row.head][row.first]) =
      make_uint2(pack_f16x2(p[0], p[1]), pack_f16x2(p[2], p[3]));
  if (at.lane % 8 == 0) shared.rescale[row.head] = rescale;
}

// The block's heads, normalized by their own sums.
DEVICE void write_result(Shared& shared, const Arguments& a, int token, int split, int first_head, const Position& at,
                         const SoftmaxRow& row, float value_peak, const float (&sums)[WARP_DIM / 8][4]) {
  const float sum = sum_of_head(row.sum);
  __syncthreads();  // the last accumulate_values has read `rescale`
  if (at.lane % 8 == 0) {
    const int head = first_head + row.head;
    shared.rescale[row.head] = sum == 0.f ? 0.f : 1.f / sum;
    if (a.lse && head < a.heads)
      a.lse[(int64(token) * a.heads + head) * a.splits + split] = (row.maximum + log2f(sum)) * a.lse_unit;
  }
  __syncthreads();
  const float unit = PLAIN ? a.value_scale * (1.f / PROBABILITY_SCALE) : value_peak * (1.f / (PROBABILITY_SCALE * ROW_SCALE));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int head = first_head + at.row + 8 * half;
    const float factor = shared.rescale[at.row + 8 * half] * unit;
    if (head >= a.heads) continue;
    const int64 result = (int64(token) * a.splits + split) * a.heads + head;
    uint16* to = a.out + result * VALUE_DIM + at.warp * WARP_DIM + 4 * at.column;
#pragma unroll
    for (int n = 0; n < WARP_DIM / 8; n += 2) {  // even and odd values interleave to four neighbours
      const float *even = &sums[n][2 * half], *odd = &sums[n + 1][2 * half];
      *reinterpret_cast<uint2*>(to + 8 * n) = make_uint2(pack_bf16x2(even[0] * factor, odd[0] * factor),
                                                         pack_bf16x2(even[1] * factor, odd[1] * factor));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) mla_decode(const Arguments a) {
  extern __shared__ __align__(128) uint8 shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const Position at;
  // In launch order the heads come first: the blocks that gather the same rows run together, and all but one of them
  // find the rows in L2.
  const int first_head = blockIdx.x * HEADS, split = blockIdx.y, token = blockIdx.z;
  const int* table = a.table + token * a.table_stride;
  const uint32 full = shared_address(shared.full), tile_base = shared_address(shared.tiles);

  if (threadIdx.x == 0)
    for (int stage = 0; stage < STAGES; stage++) barrier_init(full + 8 * stage, THREADS);
  wait_for_previous_kernel();
  const int count = PLAIN ? a.lengths[token] : a.topk;
  const int tiles = (count + TILE - 1) / TILE;
  const int begin = int(int64(tiles) * split / a.splits), end = int(int64(tiles) * (split + 1) / a.splits);
  int steps = end - begin;  // less once the slots of a short context have ended
  int first_slots[STAGES];  // loaded together, before the barriers are ready
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++)
    first_slots[stage] = load_slots(a, table, begin + stage, end, count, at.lane);
  int refill_slots = load_slots(a, table, begin + STAGES, end, count, at.lane);
  __syncthreads();
  uint32 present[STAGES];  // which rows exist, a bit each, of the tiles in flight from the current one on
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) {
    present[stage] = __ballot_sync(~0u, first_slots[stage] >= 0);
    if (a.leading && !present[stage]) steps = min(steps, stage);
    if (stage < steps) gather_tile(a, first_slots[stage], tile_base + stage * TILE * PITCH, full + 8 * stage, at);
  }

  if (a.merge_waits) let_next_kernel_start();
  Queries q;
  load_queries(a, token, first_head, at, q);
  SoftmaxRow row(at);
  Pending pending;
  float scores[TILE / 8][4];
  float sums[WARP_DIM / 8][4] = {};
  float value_peak = 0x1p-100f;

  // Waits for the next tile of the split and scores it.
  uint32 stage = 0, parity = 0, scored = 0;
  auto score_next = [&]() {
    barrier_wait(full + 8 * stage, parity);
    scored = tile_base + stage * TILE * PITCH;
    score_tile(scored, at, q, scores);
    store_scores(shared, at, scores);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };
  auto softmax_next = [&]() {
    pending = scale_values(scored, at, value_peak);
    softmax_tile(shared, at, present[0], a.scale_log2, row);
#pragma unroll
    for (int next = 1; next < STAGES; next++) present[next - 1] = present[next];
    __syncthreads();
  };

  if (steps > 0) {
    score_next();
    __syncthreads();
    softmax_next();
#pragma unroll 1
    for (int step = 1; step < steps; step++) {
      score_next();
      accumulate_values(shared, at, pending, sums);
      __syncthreads();  // scores are complete; the previous tile and its probabilities have been read
      const int freed = (step - 1) % STAGES;
      present[STAGES - 1] = __ballot_sync(~0u, refill_slots >= 0);
      if (a.leading && !present[STAGES - 1]) steps = min(steps, step - 1 + STAGES);
      if (step - 1 + STAGES < steps) gather_tile(a, refill_slots, pending.tile, full + 8 * freed, at);
      refill_slots = load_slots(a, table, begin + step + STAGES, end, count, at.lane);
      softmax_next();
    }
    accumulate_values(shared, at, pending, sums);
  }
  let_next_kernel_start();
  write_result(shared, a, token, split, first_head, at, row, value_peak, sums);
}
