// Sparse MLA decode over packed fp8 rows for few heads: one gather of every selected row, whatever the head count.
//
//   row    656 bytes: 512 e4m3 values | 4 fp32 scales, one per 128 values | 64 bf16 RoPE values
//   block  one token and one split of its selected rows; 16 heads per group of four warps, HEAD_GROUPS groups
//   warp   owns 128 of the 512 values (one scale per row) for both products, and 16 of the 64 RoPE values
//
// Stages of a step, over a tile of 32 rows in shared memory:
//   gather_tile        rows by 16-byte asynchronous copies, STAGES tiles in flight
//   score_tile         the warp's share of q.k: e4m3 -> f16 in registers, f32 sums; store_scores puts it in shared memory
//   accumulate_values  the PREVIOUS tile's p.v, so that its matrix products overlap this tile's scores
//   softmax_tile       adds up the four warps' shares, online softmax, probabilities back to shared memory
// then write_result: straight to `out`, or as a partial result that merge_splits combines in the same launch.
//
// Range: nothing overflows f16. q is scaled by a power of two per (head, 128 values), probabilities by a constant and
// the rows' scales by a running power of two per 128 values; the factors come back in f32.
//
// Compile-time parameters: HEAD_GROUPS (1 or 2), STAGES, BLOCKS_PER_SM, SHARED_BYTES.

#include "ptx.cuh"

#define MINUS_INFINITY __int_as_float(0xFF800000)

constexpr int VALUE_DIM = 512, ROPE_DIM = 64, QUERY_DIM = VALUE_DIM + ROPE_DIM;
constexpr int SCALE_OFFSET = VALUE_DIM, ROPE_OFFSET = VALUE_DIM + 16;
// Also the pitch in shared memory: 656 bytes put eight consecutive rows on distinct banks for ldmatrix.
constexpr int ROW_BYTES = 656;

constexpr int TILE = 32;
constexpr int HEADS_PER_GROUP = 16;  // M of the matrix instruction
constexpr int WARPS_PER_GROUP = 4, GROUP_THREADS = 32 * WARPS_PER_GROUP;
constexpr int WARP_DIM = VALUE_DIM / WARPS_PER_GROUP;
constexpr int HEADS_PER_BLOCK = HEADS_PER_GROUP * HEAD_GROUPS;
constexpr int WARPS = WARPS_PER_GROUP * HEAD_GROUPS, THREADS = 32 * WARPS;
// A tile is refilled this many steps after its scores. With one group the group's own barrier shows that its readers
// are done; two groups drift apart by up to a step, so the refill comes one step later and rarely has to wait.
constexpr int REFILL_LAG = HEAD_GROUPS;

constexpr int SCORE_PITCH = 40, PROBABILITY_PITCH = 40;  // 32 and 8 padding elements: no bank conflicts
constexpr int MAX_SPLITS = 32;  // one per lane of a warp

constexpr float QUERY_SCALE = 0x1p14f;         // f16 q lies below 2^15
constexpr float PROBABILITY_SCALE = 0x1p8f;    // f16 p lies below 2^8, ...
constexpr float ROW_SCALE = 0x1p6f;            // ... f16 row scales below 2^7: their product below 2^15
constexpr float NO_SCORE = -1e30f;             // start of the running maximum: finite, so that -inf - max is -inf
constexpr float LN2 = 0.6931471805599453f;
// No result holds this bit pattern (two bf16 or one f32 of NaNs that the hardware does not produce).
constexpr uint64 READY = 0x7FA5C3E17FB69D2Bull;

struct Shared {
  uint8 tiles[STAGES][TILE][ROW_BYTES];
  float scores[HEAD_GROUPS][WARPS_PER_GROUP][HEADS_PER_GROUP][SCORE_PITCH];
  uint16 probabilities[HEAD_GROUPS][HEADS_PER_GROUP][PROBABILITY_PITCH];
  float rescale[HEAD_GROUPS][HEADS_PER_GROUP];  // of the accumulators, per step; at the end 1 / sum
  uint64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for another size");
static_assert(sizeof(Shared::scores) >= sizeof(float) * HEADS_PER_BLOCK * MAX_SPLITS, "merge weights overlay scores");

struct Arguments {
  const uint16* __restrict__ q;     // [tokens, heads, 576] bf16
  const uint8* __restrict__ kv;     // [slots, row_stride]
  const int* __restrict__ indices;  // [tokens, topk], -1 = none
  uint16* __restrict__ out;         // [tokens, heads, 512] bf16
  float* __restrict__ lse;          // [tokens, heads] or null
  uint64* flags;                    // [tokens, splits, splits]: consumer, producer
  float* partial_lse;               // [tokens, splits, heads], base 2
  uint16* partial_out;              // [tokens, splits, heads, 512] bf16
  int64 row_stride;
  float scale_log2;  // softmax scale * log2(e)
  int heads, topk, splits;
};

// Where a thread stands: its warp's head group and chunk of values, its row and column in a matrix fragment.
struct Position {
  int lane, warp, group, chunk, row, column;
  DEVICE Position() {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    group = warp / WARPS_PER_GROUP, chunk = warp % WARPS_PER_GROUP;
    row = lane / 4, column = lane % 4;
  }
};

// The warp's part of q as matrix fragments, rows `row` and `row + 8` of the group.
struct Queries {
  uint32 values[WARP_DIM / 16][4];
  uint32 rope[4];
  float unscale[2];
};

// What accumulate_values needs of a tile whose scores are done.
struct Pending {
  uint32 tile;                     // shared-memory address
  uint32 row_scales[TILE / 8];  // f16x2: rows 8n + 2*column and the next
  float growth;                    // of the accumulators' unit: old peak / new peak
};

DEVICE void sync_group(const Position& at) { sync_threads_of(1 + at.group, GROUP_THREADS); }

// The tile's slots, one per lane; -1 past the split's last tile and past the top-k.
DEVICE int load_slots(const int* indices, int tile, int tile_end, int topk, int lane) {
  const int position = tile * TILE + lane;
  return tile < tile_end && position < topk ? indices[position] : -1;
}

// Every warp copies its rows. Missing rows become zeros: their scores are masked, and 0 * 0 stays 0 in p.v.
DEVICE void gather_tile(const Arguments& a, int slots, uint32 tile, uint32 full, const Position& at) {
  constexpr int ROWS = TILE / WARPS, TAIL = ROW_BYTES / 16 - 32;  // 16-byte pieces after the first 512 bytes
  const int first = at.warp * ROWS;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int slot = __shfl_sync(~0u, slots, first + r);
    const uint8* row = a.kv + max(slot, 0) * a.row_stride;
    copy_async_16(tile + (first + r) * ROW_BYTES + at.lane * 16, row + at.lane * 16, slot >= 0);
  }
#pragma unroll
  for (int start = 0; start < ROWS * TAIL; start += 32) {
    const int piece = start + at.lane, r = first + piece / TAIL, offset = (32 + piece % TAIL) * 16;
    const int slot = __shfl_sync(~0u, slots, min(r, TILE - 1));
    const uint8* row = a.kv + max(slot, 0) * a.row_stride;
    if (piece < ROWS * TAIL) copy_async_16(tile + r * ROW_BYTES + offset, row + offset, slot >= 0);
  }
  barrier_arrive_after_copies(full);
}

DEVICE float row_scale(uint32 tile, int row, int chunk) {
  return load_shared(tile + row * ROW_BYTES + SCALE_OFFSET + 4 * chunk);
}

// q to f16, scaled so that the warp's largest value per head lies in [2^14, 2^15). The order of the 16 values of a
// fragment follows score_tile's: a lane holds values 4*column .. 4*column + 3, in pairs.
DEVICE void load_queries(const Arguments& a, int token, const Position& at, Queries& q) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int head = at.group * HEADS_PER_GROUP + at.row + 8 * half;
    const bool present = head < a.heads;
    const uint16* source = a.q + (int64(token) * a.heads + (present ? head : 0)) * QUERY_DIM;
    uint2 raw[WARP_DIM / 16];
    float peak = 0.f;
#pragma unroll
    for (int s = 0; s < WARP_DIM / 16; s++) {
      const uint2* at_values = reinterpret_cast<const uint2*>(source + at.chunk * WARP_DIM + 16 * s + 4 * at.column);
      raw[s] = present ? *at_values : make_uint2(0, 0);
      peak = fmaxf(peak, fmaxf(fabsf(bf16_low(raw[s].x)), fabsf(bf16_high(raw[s].x))));
      peak = fmaxf(peak, fmaxf(fabsf(bf16_low(raw[s].y)), fabsf(bf16_high(raw[s].y))));
    }
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
    const float unit = power_of_two_below(peak), factor = inverse_power_of_two(unit) * QUERY_SCALE;
    q.unscale[half] = unit * (1.f / QUERY_SCALE);
#pragma unroll
    for (int s = 0; s < WARP_DIM / 16; s++) {
      q.values[s][half] = pack_f16x2(bf16_low(raw[s].x) * factor, bf16_high(raw[s].x) * factor);
      q.values[s][2 + half] = pack_f16x2(bf16_low(raw[s].y) * factor, bf16_high(raw[s].y) * factor);
    }
    const uint32* at_rope = reinterpret_cast<const uint32*>(source + VALUE_DIM + at.chunk * 16 + 2 * at.column);
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
      load_matrices(keys[n], tile + (8 * n + at.lane % 8) * ROW_BYTES + at.chunk * WARP_DIM + block * 64 + at.lane / 8 * 16);
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) {
        uint32 low, high;
        e4m3x4_to_f16(keys[n][s], low, high);
        mma_f16(scores[n], q.values[4 * block + s], low, high);
      }
  }

#pragma unroll
  for (int n = 0; n < TILE / 8; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float scale = row_scale(tile, 8 * n + 2 * at.column + e, at.chunk);
      scores[n][e] *= scale * q.unscale[0];
      scores[n][2 + e] *= scale * q.unscale[1];
    }

  // RoPE part: bf16 on both sides, unscaled, hence after the row scales.
#pragma unroll
  for (int pair = 0; pair < TILE / 16; pair++) {
    uint32 keys[4];
    const int row = 16 * pair + at.lane % 8 + at.lane / 16 * 8;
    load_matrices(keys, tile + row * ROW_BYTES + ROPE_OFFSET + at.chunk * 32 + at.lane / 8 % 2 * 16);
    mma_bf16(scores[2 * pair], q.rope, keys[0], keys[1]);
    mma_bf16(scores[2 * pair + 1], q.rope, keys[2], keys[3]);
  }
}

DEVICE void store_scores(Shared& shared, const Position& at, const float (&scores)[TILE / 8][4]) {
#pragma unroll
  for (int n = 0; n < TILE / 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float* to = &shared.scores[at.group][at.chunk][at.row + 8 * half][8 * n + 2 * at.column];
      *reinterpret_cast<float2*>(to) = make_float2(scores[n][2 * half], scores[n][2 * half + 1]);
    }
}

// The unit of the value accumulators only grows: the largest row scale so far, rounded down to a power of two.
// Called between the barriers of a step, where its latency hides behind the softmax.
DEVICE Pending scale_values(uint32 tile, const Position& at, float& value_peak) {
  const uint32 peak = __reduce_max_sync(~0u, __float_as_uint(fmaxf(row_scale(tile, at.lane, at.chunk), 0.f)));
  const float new_peak = fmaxf(value_peak, power_of_two_below(__uint_as_float(peak)));
  const float inverse = inverse_power_of_two(new_peak), factor = inverse * ROW_SCALE;
  Pending pending = {tile, {}, value_peak * inverse};
  value_peak = new_peak;
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) {
    const int row = 8 * n + 2 * at.column;
    pending.row_scales[n] =
        pack_f16x2(row_scale(tile, row, at.chunk) * factor, row_scale(tile, row + 1, at.chunk) * factor);
  }
  return pending;
}

// sums[16 heads, 128 values] = sums * rescale + p.v of the pending tile. The transposing ldmatrix gives a lane a pair
// of neighbouring values of two neighbouring rows; a byte permutation sorts them into two fragments, of even and of
// odd values: sums[4b + 2e] holds the even and sums[4b + 2e + 1] the odd ones of values 32b + 16e .. + 15.
DEVICE void accumulate_values(Shared& shared, const Position& at, const Pending& pending, float (&sums)[WARP_DIM / 8][4]) {
  const float rescale_low = shared.rescale[at.group][at.row] * pending.growth;
  const float rescale_high = shared.rescale[at.group][at.row + 8] * pending.growth;
#pragma unroll
  for (int n = 0; n < WARP_DIM / 8; n++) {
    sums[n][0] *= rescale_low, sums[n][1] *= rescale_low;
    sums[n][2] *= rescale_high, sums[n][3] *= rescale_high;
  }
#pragma unroll
  for (int step = 0; step < TILE / 16; step++) {
    uint32 p[4];
    load_matrices(p, shared_address(&shared.probabilities[at.group][at.lane % 16][16 * step + at.lane / 16 * 8]));
    p[0] = multiply_f16x2(p[0], pending.row_scales[2 * step]);
    p[1] = multiply_f16x2(p[1], pending.row_scales[2 * step]);
    p[2] = multiply_f16x2(p[2], pending.row_scales[2 * step + 1]);
    p[3] = multiply_f16x2(p[3], pending.row_scales[2 * step + 1]);
    const uint32 rows = pending.tile + (16 * step + at.lane % 16) * ROW_BYTES + at.chunk * WARP_DIM + at.lane / 16 * 16;
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

// A thread's row of the softmax: one head of its group, four rows of a tile; eight lanes share a head.
struct SoftmaxRow {
  int head, first;
  float maximum = NO_SCORE, sum = 0.f;
  DEVICE explicit SoftmaxRow(const Position& at) : head(at.chunk * 4 + at.lane / 8), first(at.lane % 8 * 4) {}
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
  for (int chunk = 0; chunk < WARPS_PER_GROUP; chunk++) {
    const float4 share = *reinterpret_cast<const float4*>(&shared.scores[at.group][chunk][row.head][row.first]);
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
  *reinterpret_cast<uint2*>(&shared.probabilities[at.group][row.head][row.first]) =
      make_uint2(pack_f16x2(p[0], p[1]), pack_f16x2(p[2], p[3]));
  if (at.lane % 8 == 0) shared.rescale[at.group][row.head] = rescale;
}

// The block's heads, normalized by its own sum, to `out` [heads, 512] and, in base 2, to `lse_log2` [heads].
DEVICE void write_result(Shared& shared, const Arguments& a, const Position& at, const SoftmaxRow& row, float value_peak,
                         const float (&sums)[WARP_DIM / 8][4], uint16* out, float* lse, float lse_unit) {
  const float sum = sum_of_head(row.sum);
  sync_group(at);  // the last accumulate_values has read `rescale`
  if (at.lane % 8 == 0) {
    const int head = at.group * HEADS_PER_GROUP + row.head;
    shared.rescale[at.group][row.head] = sum == 0.f ? 0.f : 1.f / sum;
    if (lse && head < a.heads) lse[head] = (row.maximum + log2f(sum)) * lse_unit;
  }
  sync_group(at);
  const float unit = value_peak * (1.f / (PROBABILITY_SCALE * ROW_SCALE));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int head = at.group * HEADS_PER_GROUP + at.row + 8 * half;
    const float factor = shared.rescale[at.group][at.row + 8 * half] * unit;
    if (head >= a.heads) continue;
    uint16* to = out + head * VALUE_DIM + at.chunk * WARP_DIM + 4 * at.column;
#pragma unroll
    for (int n = 0; n < WARP_DIM / 8; n += 2) {  // even and odd values interleave to four neighbours
      const float *even = &sums[n][2 * half], *odd = &sums[n + 1][2 * half];
      *reinterpret_cast<uint2*>(to + 8 * n) = make_uint2(pack_bf16x2(even[0] * factor, odd[0] * factor),
                                                         pack_bf16x2(even[1] * factor, odd[1] * factor));
    }
  }
}

// Tells every block of the token that this split is written, and waits for theirs. The launcher keeps the grid within
// what the GPU holds at once, and blocks start in order, so that a waiting block never keeps another from starting.
// A flag is any value but READY until its producer writes it, so workspace needs no initialization; its one consumer
// clears it, so the next launch (or graph replay) finds none set.
// One fence on each side orders all of a block's data: a releasing store per flag would cost one fence per flag.
DEVICE void exchange_splits(const Arguments& a, int token, int split) {
  __syncthreads();
  if (const int other = threadIdx.x; other < a.splits) {
    uint64 *flags = a.flags + int64(token) * a.splits * a.splits, *flag = flags + split * a.splits + other;
    fence_gpu();
    store_relaxed(flags + other * a.splits + split, READY);
    while (load_relaxed(flag) != READY) {}
    store_relaxed(flag, 0);
    fence_gpu();
  }
  __syncthreads();
}

// Each block of the token combines its share of the outputs, in split order: the same bits in every run.
DEVICE void merge_splits(Shared& shared, const Arguments& a, int token, int split, const Position& at) {
  auto weights = reinterpret_cast<float(*)[MAX_SPLITS]>(&shared.scores);
  const float* partial_lse = a.partial_lse + int64(token) * a.splits * a.heads;
  for (int head = at.warp; head < a.heads; head += WARPS) {
    const float lse = at.lane < a.splits ? __ldcg(partial_lse + at.lane * a.heads + head) : MINUS_INFINITY;
    float maximum = lse;
    for (int d = 16; d; d /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, d));
    const float weight = lse == MINUS_INFINITY ? 0.f : exp2_approx(lse - maximum);
    float sum = weight;
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    weights[head][at.lane] = sum == 0.f ? 0.f : weight / sum;
    if (a.lse && split == 0 && at.lane == 0) a.lse[int64(token) * a.heads + head] = (maximum + log2f(sum)) * LN2;
  }
  __syncthreads();

  // Four lanes share eight neighbouring values (16 bytes) and take every fourth split.
  constexpr int PIECES = VALUE_DIM / 8;
  const int pieces = a.heads * PIECES, first = pieces * split / a.splits, end = pieces * (split + 1) / a.splits;
  const int64 split_pitch = int64(a.heads) * VALUE_DIM;
  const uint16* partial = a.partial_out + token * a.splits * split_pitch;
  for (int start = first; start < end; start += THREADS / 4) {
    const int piece = start + int(threadIdx.x) / 4, head = min(piece, end - 1) / PIECES;
    float sums[8] = {};
#pragma unroll 4
    for (int other = threadIdx.x % 4; other < a.splits; other += 4) {
      if (piece >= end) break;
      const uint4 part = __ldcg(reinterpret_cast<const uint4*>(partial + other * split_pitch + piece * 8));
      const float weight = weights[head][other];
      const uint32 pairs[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        sums[2 * e] += weight * bf16_low(pairs[e]);
        sums[2 * e + 1] += weight * bf16_high(pairs[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
      sums[e] += __shfl_xor_sync(~0u, sums[e], 1);
      sums[e] += __shfl_xor_sync(~0u, sums[e], 2);
    }
    if (threadIdx.x % 4 == 0 && piece < end)
      *reinterpret_cast<uint4*>(a.out + token * split_pitch + piece * 8) =
          make_uint4(pack_bf16x2(sums[0], sums[1]), pack_bf16x2(sums[2], sums[3]), pack_bf16x2(sums[4], sums[5]),
                     pack_bf16x2(sums[6], sums[7]));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) packed_decode(const Arguments a) {
  extern __shared__ __align__(128) uint8 shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const Position at;
  const int token = blockIdx.y, split = blockIdx.x;  // the splits of a token are neighbours in launch order
  const int tiles = (a.topk + TILE - 1) / TILE;
  const int begin = int(int64(tiles) * split / a.splits), end = int(int64(tiles) * (split + 1) / a.splits);
  const int* indices = a.indices + int64(token) * a.topk;
  const uint32 full = shared_address(shared.full), empty = shared_address(shared.empty);
  const uint32 tile_base = shared_address(shared.tiles);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(full + 8 * stage, THREADS);
      barrier_init(empty + 8 * stage, WARPS);
    }
  }
  wait_for_previous_kernel();
  int first_slots[STAGES];  // loaded together, before the barriers are ready
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++)
    first_slots[stage] = load_slots(indices, begin + stage, end, a.topk, at.lane);
  int refill_slots = load_slots(indices, begin + STAGES, end, a.topk, at.lane);
  __syncthreads();
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++)
    if (begin + stage < end) gather_tile(a, first_slots[stage], tile_base + stage * TILE * ROW_BYTES, full + 8 * stage, at);

  Queries q;
  load_queries(a, token, at, q);
  SoftmaxRow row(at);
  Pending pending;
  float scores[TILE / 8][4];
  float sums[WARP_DIM / 8][4] = {};
  float value_peak = 0x1p-100f;
  int slots = load_slots(indices, begin, end, a.topk, at.lane);

  // Waits for the next tile of the split and scores it.
  uint32 stage = 0, parity = 0, scored = 0;
  auto score_next = [&]() {
    barrier_wait(full + 8 * stage, parity);
    scored = tile_base + stage * TILE * ROW_BYTES;
    score_tile(scored, at, q, scores);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };
  auto softmax_next = [&](int step) {
    const uint32 present = __ballot_sync(~0u, slots >= 0);
    slots = load_slots(indices, begin + step + 1, end, a.topk, at.lane);
    pending = scale_values(scored, at, value_peak);
    softmax_tile(shared, at, present, a.scale_log2, row);
    sync_group(at);
  };

  const int steps = end - begin;
  if (steps > 0) {
    score_next();
    store_scores(shared, at, scores);
    sync_group(at);
    softmax_next(0);
#pragma unroll 1
    for (int step = 1; step < steps; step++) {
      score_next();
      store_scores(shared, at, scores);
      accumulate_values(shared, at, pending, sums);
      if (HEAD_GROUPS > 1) {
        __syncwarp();
        if (at.lane == 0) barrier_arrive(empty + 8 * ((step - 1) % STAGES));
      }
      sync_group(at);  // scores are complete; the probabilities of the previous tile have been read
      const int refill = step - REFILL_LAG + STAGES;
      if (step >= REFILL_LAG && refill < steps) {
        const int to = refill % STAGES;
        if (HEAD_GROUPS > 1) barrier_wait(empty + 8 * to, refill / STAGES - 1 & 1);
        gather_tile(a, refill_slots, tile_base + to * TILE * ROW_BYTES, full + 8 * to, at);
        refill_slots = load_slots(indices, begin + refill + 1, end, a.topk, at.lane);
      }
      softmax_next(step);
    }
    accumulate_values(shared, at, pending, sums);
  }

  let_next_kernel_start();
  if (a.splits == 1) {
    const int64 first_head = int64(token) * a.heads;
    write_result(shared, a, at, row, value_peak, sums, a.out + first_head * VALUE_DIM,
                 a.lse ? a.lse + first_head : nullptr, LN2);
    return;
  }
  const int64 first_head = (int64(token) * a.splits + split) * a.heads;
  write_result(shared, a, at, row, value_peak, sums, a.partial_out + first_head * VALUE_DIM,
               a.partial_lse + first_head, 1.f);
  exchange_splits(a, token, split);
  merge_splits(shared, a, token, split, at);
}
