// Products of few tokens with a weight matrix, the weights read once at the memory's speed.
//
//   warp     16 rows of the weights, all tokens, and a share of the depth: BLOCKS blocks of 128 bytes of a
//            row at a time, straight from global memory into the registers that the matrix instruction takes them from.
//            A launch asks for most of a matrix at once: a GPU has more registers than a layer has weights.
//   block    WARPS_OF_ROWS groups of WARPS_OF_DEPTH warps, which share the depth: their sums meet in shared memory. The
//            block's part of the tokens lies there too, in the order of the matrix instruction, and serves all its rows.
//   cluster  CLUSTER blocks that share the depth, where there are too few rows to fill the GPU
//
// Weights belong to no earlier kernel, so the first of them are asked for before the wait for it. Sums are taken in one
// order: the result does not depend on timing.
//
// The order of the depth within a matrix product is free. Lane (g, t) takes 16 consecutive bytes of row g, the t-th of
// 64: their values are its places in one instruction after the other, of weights and tokens alike.
//
// FP8: weights are e4m3 with one scale for 128 rows x 128 values, and tokens are quantized here, 128 values to a scale.
// Hopper's tensor cores take fp8 from shared memory alone, so both become f16, exactly.
// NORM: a token's inverse RMS is a factor of its scales, so only the norm's weights are multiplied before.
//
// Defines: FP8, NORM, OUT_F32 (else bf16), TOKEN_TILES (of 8 tokens), WARPS_OF_DEPTH, WARPS_OF_ROWS, BLOCKS,
// CLUSTER, SHARE (blocks of the depth for each block of a cluster), RESIDENT (blocks on a multiprocessor).

#include "tokens.cuh"

constexpr int ROWS = 16, TOKENS = 8 * TOKEN_TILES;
constexpr int WARPS = WARPS_OF_DEPTH * WARPS_OF_ROWS, THREADS = 32 * WARPS;
constexpr int BLOCK_BYTES = 128, BLOCK_DEPTH = FP8 ? 128 : 64, CHUNKS = BLOCK_BYTES / 16;
constexpr int PASSES = (SHARE + WARPS_OF_DEPTH * BLOCKS - 1) / (WARPS_OF_DEPTH * BLOCKS);
constexpr int SUMS = TOKEN_TILES * 4;  // of a lane
constexpr int ELEMENTS = 32 * SUMS;                // of a warp's result
constexpr int VECTORS = FP8 ? 2 : 1;               // of tokens, for one of weights

struct Shared {
  uint4 tokens[SHARE][TOKEN_TILES][2][VECTORS][32];  // [block of the depth][tile][half of its 128 bytes][vector][lane]
  float scale[SHARE][TOKENS];
  float squares[NORM ? SHARE : 1][TOKENS];
  float inverse_rms[TOKENS];
  float sums[WARPS_OF_DEPTH][WARPS_OF_ROWS][ELEMENTS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for another size");

struct Arguments {
  const uint8* weight;         // [heads, rows, depth], rows contiguous
  const float* weight_scale;   // [ceil(rows / 128), depth / 128]
  const uint16* x;             // [tokens, heads, depth] bf16
  const uint16* norm_weight;   // [depth] bf16
  void* out;                   // [tokens, heads, rows]
  int64 weight_head;           // bytes
  int64 x_token, x_head;       // elements
  int64 out_token, out_head;   // elements
  int tokens, rows, depth;
  float eps;
};

struct Weights {
  uint4 words[BLOCKS][2][2];  // [block][half of its 128 bytes][row g, row g + 8]
  float scale[BLOCKS];
};

// What a warp works at. Blocks of the depth are counted from the first of its block's share.
struct Place {
  int lane, g, t;
  int share_start, share_end;  // of the depth, in blocks
  int first_block;             // of the warp's first pass
};

DEVICE void load_weights(Weights& w, const Arguments& a, const Place& p, int first_row, int pass) {
  const int start = p.share_start + p.first_block + pass * WARPS_OF_DEPTH * BLOCKS;
  const int64 row_bytes = static_cast<int64>(a.depth / BLOCK_DEPTH) * BLOCK_BYTES;
  const uint8* head = a.weight + blockIdx.y * a.weight_head + start * BLOCK_BYTES + 16 * p.t;
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    const bool inside = start + b < p.share_end;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int row = first_row + 8 * upper + p.g;
        w.words[b][half][upper] =
            load_global_16(head + row * row_bytes + b * BLOCK_BYTES + 64 * half, inside && row < a.rows);
      }
    if constexpr (FP8)
      w.scale[b] = inside && first_row < a.rows
                       ? __ldg(a.weight_scale + (first_row / 128) * (a.depth / BLOCK_DEPTH) + start + b)
                       : 0.0f;
  }
}

// 8 values of a token as pairs of bf16, times the norm's weights with NORM; zeros of tokens that are not there.
DEVICE void take(uint32* pairs, float& squares, const uint16* token, const uint16* norm_weight, bool present) {
  const uint4 x = load_global_16(token, present);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = word(x, i);
  if constexpr (NORM) {
    const uint4 weight = load_global_16(norm_weight, present);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = weighted(pairs[i], word(weight, i), squares);
  }
}

// Tokens to shared memory. 8 lanes take a token's block, what is multiplied with 16 bytes of weights each. Of tokens that
// are not there nothing is stored: they have columns of their own in every product, which nobody reads.
DEVICE void store_tokens(Shared& s, const Arguments& a, const Place& p) {
  const int items = SHARE * a.tokens;
  const uint16* x = a.x + blockIdx.y * a.x_head;
  const int chunk = threadIdx.x % CHUNKS;
#pragma unroll 4
  for (int item = threadIdx.x / CHUNKS; item < (items + 3) / 4 * 4; item += THREADS / CHUNKS) {  // whole warps
    const int token = item / SHARE, block = item % SHARE;
    const bool exists = item < items, present = exists && p.share_start + block < p.share_end;
    const int at = (p.share_start + block) * BLOCK_DEPTH + chunk * (BLOCK_DEPTH / CHUNKS);
    uint32 pairs[4 * VECTORS];
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      take(pairs + 4 * v, squares, x + token * a.x_token + at + 8 * v, a.norm_weight + at + 8 * v, present);
    if constexpr (FP8) {
      const float scale = __fdiv_rn(amax_of_lanes(pairs), FP8_MAX), inverse = __fdiv_rn(1.0f, scale);
#pragma unroll
      for (int i = 0; i < 8; i += 2) e4m3x4_to_f16(quantized(pairs[i], pairs[i + 1], inverse), pairs[i], pairs[i + 1]);
      if (chunk == 0 && exists) s.scale[block][token] = scale;
    }
    if constexpr (NORM) {
#pragma unroll
      for (int apart = 1; apart < CHUNKS; apart *= 2) squares += __shfl_xor_sync(~0u, squares, apart);
      if (chunk == 0 && exists) s.squares[block][token] = squares;
    }
    if (exists)
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        s.tokens[block][token / 8][chunk / 4][v][token % 8 * 4 + chunk % 4] =
            make_uint4(pairs[4 * v], pairs[4 * v + 1], pairs[4 * v + 2], pairs[4 * v + 3]);
  }
  __syncthreads();
  if constexpr (NORM)
    if (threadIdx.x < TOKENS) {
      float sum = 0.0f;
#pragma unroll 4
      for (int block = 0; block < SHARE; ++block) sum += s.squares[block][threadIdx.x];
      s.inverse_rms[threadIdx.x] = rsqrtf(sum / a.depth + a.eps);
    }
}

// What a lane has of 64 bytes of 16 rows, as the matrix instruction takes it: 16 values of a row are 8 words of f16,
// 8 values are 4 of bf16.
struct Fragment {
  uint32 lower[4 * VECTORS], upper[4 * VECTORS];
  DEVICE void take(const uint4 (&rows)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (FP8) {
        e4m3x4_to_f16(word(rows[0], i), lower[2 * i], lower[2 * i + 1]);
        e4m3x4_to_f16(word(rows[1], i), upper[2 * i], upper[2 * i + 1]);
      } else {
        lower[i] = word(rows[0], i);
        upper[i] = word(rows[1], i);
      }
    }
  }
};

DEVICE void multiply(float (&sum)[4], const Fragment& rows, const uint4 (&token)[VECTORS][32], int lane) {
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const uint4 words = token[v][lane];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int at = 4 * v + 2 * step;
      const uint32 fragment[4] = {rows.lower[at], rows.upper[at], rows.lower[at + 1], rows.upper[at + 1]};
      if constexpr (FP8)
        mma_f16(sum, fragment, word(words, 2 * step), word(words, 2 * step + 1));
      else
        mma_bf16(sum, fragment, word(words, 2 * step), word(words, 2 * step + 1));
    }
  }
}

DEVICE void accumulate(float (&sums)[TOKEN_TILES][4], const Weights& w, const Shared& s, const Place& p, int pass) {
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    const int block = p.first_block + pass * WARPS_OF_DEPTH * BLOCKS + b;
    if (block >= SHARE) break;
    float products[TOKEN_TILES][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Fragment rows;
      rows.take(w.words[b][half]);
#pragma unroll
      for (int tile = 0; tile < TOKEN_TILES; ++tile)
        multiply(FP8 ? products[tile] : sums[tile], rows, s.tokens[block][tile][half], p.lane);
    }
    if constexpr (FP8)
#pragma unroll
      for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        // A lane's sums are of tokens 2t and 2t + 1.
        const float even = s.scale[block][8 * tile + 2 * p.t] * w.scale[b];
        const float odd = s.scale[block][8 * tile + 2 * p.t + 1] * w.scale[b];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][i] += products[tile][i] * (i & 1 ? odd : even);
      }
  }
}

DEVICE void store(const Shared& s, const Arguments& a, int first_row, int element, float value) {
  const int tile = element / 128, i = element / 32 % 4, lane = element % 32;
  const int row = first_row + lane / 4 + (i & 2) * 4, token = 8 * tile + lane % 4 * 2 + (i & 1);
  if (row >= a.rows || token >= a.tokens) return;
  if constexpr (NORM) value *= s.inverse_rms[token];
  const int64 at = token * a.out_token + blockIdx.y * a.out_head + row;
  if constexpr (OUT_F32)
    static_cast<float*>(a.out)[at] = value;
  else
    static_cast<uint16*>(a.out)[at] = static_cast<uint16>(pack_bf16x2(value, 0.0f));
}

// Adds up what the warps and blocks of a row's depth have, and stores it. first_row: of the block.
DEVICE void finish(Shared& s, const Arguments& a, int rank, int first_row) {
  __syncthreads();
  float* sums = &s.sums[0][0][0];
  constexpr int ALL = WARPS_OF_ROWS * ELEMENTS;
#pragma unroll 1
  for (int element = threadIdx.x; element < ALL; element += THREADS) {
    float sum = sums[element];
#pragma unroll
    for (int other = 1; other < WARPS_OF_DEPTH; ++other) sum += sums[other * ALL + element];
    if constexpr (CLUSTER > 1)
      sums[element] = sum;
    else
      store(s, a, first_row + element / ELEMENTS * ROWS, element % ELEMENTS, sum);
  }
  if constexpr (CLUSTER > 1) {
    cluster_barrier();
    constexpr int PART = ALL / CLUSTER;
#pragma unroll 1
    for (int element = rank * PART + threadIdx.x; element < (rank + 1) * PART; element += THREADS) {
      float sum = 0.0f;
#pragma unroll
      for (int other = 0; other < CLUSTER; ++other) sum += *in_block(&sums[element], other);
      store(s, a, first_row + element / ELEMENTS * ROWS, element % ELEMENTS, sum);
    }
    cluster_barrier();  // the sums have been read
  } else {
    __syncthreads();
  }
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS, RESIDENT) projection(const Arguments a) {
  extern __shared__ __align__(16) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_of_depth = warp % WARPS_OF_DEPTH, warp_of_rows = warp / WARPS_OF_DEPTH;
  int rank = 0;
  if constexpr (CLUSTER > 1) rank = static_cast<int>(block_of_cluster());
  const int blocks = a.depth / BLOCK_DEPTH;
  const Place p{lane, lane / 4, lane % 4, rank * SHARE, min((rank + 1) * SHARE, blocks), warp_of_depth * BLOCKS};

  constexpr int BLOCK_ROWS = WARPS_OF_ROWS * ROWS;
  const int stride = static_cast<int>(gridDim.x / CLUSTER) * BLOCK_ROWS;
  int block_row = static_cast<int>(blockIdx.x / CLUSTER) * BLOCK_ROWS;

  Weights w;
  load_weights(w, a, p, block_row + warp_of_rows * ROWS, 0);
  let_next_kernel_start();
  wait_for_previous_kernel();
  store_tokens(s, a, p);

#pragma unroll 1
  for (; block_row < a.rows; block_row += stride) {
    float sums[TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
      accumulate(sums, w, s, p, pass);
      const bool last = pass + 1 == PASSES;
      load_weights(w, a, p, block_row + warp_of_rows * ROWS + (last ? stride : 0), last ? 0 : pass + 1);
    }
#pragma unroll
    for (int i = 0; i < SUMS; ++i)
      s.sums[warp_of_depth][warp_of_rows][32 * i + lane] = sums[i / 4][i % 4];
    finish(s, a, rank, block_row);
  }
}
