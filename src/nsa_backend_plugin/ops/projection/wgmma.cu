// Products of up to 64 tokens with a weight matrix by Hopper's warpgroup matrix instruction: one kernel quantizes the tokens
// for fp8 weights, the other streams the weights through shared memory.
//
//   warpgroup  64 rows of the weights, all tokens, and every WARPGROUPS-th block of 128 bytes of the depth. STAGES of its
//              blocks are on their way at any time, weights and tokens.
//   block      WARPGROUPS warpgroups, whose sums meet in shared memory
//   cluster    CLUSTER blocks that share the depth
//
// Weights belong to no earlier kernel, so the first of them are asked for before the wait for it. Sums are taken in one
// order: the result does not depend on timing.
//
// FP8: weights are e4m3 with one scale for 128 rows x 128 values, tokens are e4m3 with a scale for 128 values. Each block of
// the depth is summed by the tensor cores, and added with its scales in float32. Else both are bf16.
//
// Defines: FP8, NORM (of the tokens, before they are quantized), OUT_F32 (else bf16), TOKENS (16, 32 or 64), WARPGROUPS,
// STAGES, CLUSTER, SHARE (blocks of the depth for each block of a cluster).

#include "wgmma.cuh"

constexpr int ROWS = 64, BLOCK_BYTES = 128, GROUP = 128, THREADS = 128 * WARPGROUPS;
constexpr int SUMS = TOKENS / 2;         // of a thread: 2 of its rows x a quarter of the tokens
constexpr int SUMS_STRIDE = ROWS + 4;    // the lanes of a warp then store to different banks
constexpr float FP8_MAX = 448.0f, MIN_AMAX = 1e-4f;

struct Shared {
  union {
    struct {
      uint8 weights[WARPGROUPS][STAGES][ROWS * BLOCK_BYTES];
      uint8 tokens[WARPGROUPS][STAGES][TOKENS * BLOCK_BYTES];
    };
    float sums[WARPGROUPS][TOKENS][SUMS_STRIDE];  // when all products are done
  };
  float token_scale[WARPGROUPS][STAGES][TOKENS];
  float weight_scale[WARPGROUPS][STAGES];
  uint64 arrived[WARPGROUPS][STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for another size");

struct Arguments {
  const uint8* weight;         // [rows, depth]
  const float* weight_scale;   // [ceil(rows / 128), depth / 128]
  const uint8* x;              // [tokens, depth], fp8 or bf16
  const float* x_scale;        // [depth / 128, tokens]
  void* out;                   // [tokens, rows]
  int64 x_token;               // bytes
  int64 out_token;             // elements
  int tokens, rows, blocks;    // of the depth, 128 bytes each
};

// What a thread works at.
struct Place {
  int warpgroup, thread;  // of the warpgroup
  int first_row;
  int first_block, passes;  // of the depth: the warpgroup's are first_block + pass * WARPGROUPS
};

// 16 bytes of each row, swizzled as the instruction reads them: 8 threads take a row's block.
template <int COUNT>
DEVICE void copy_rows(uint8* to, const uint8* from, int64 row_bytes, int present, int thread) {
#pragma unroll
  for (int i = 0; i < COUNT / 16; ++i) {
    const int row = thread / 8 + 16 * i, chunk = thread % 8;
    copy_async_16(shared_address(to + row * BLOCK_BYTES + (chunk ^ row % 8) * 16), from + row * row_bytes + 16 * chunk,
                  row < present);
  }
}

DEVICE void ask_for_weights(Shared& s, const Arguments& a, const Place& p, int pass) {
  const int stage = pass % STAGES, block = p.first_block + pass * WARPGROUPS;
  const int64 row_bytes = static_cast<int64>(a.blocks) * BLOCK_BYTES;
  copy_rows<ROWS>(s.weights[p.warpgroup][stage], a.weight + p.first_row * row_bytes + block * BLOCK_BYTES, row_bytes,
                  a.rows - p.first_row, p.thread);
  if constexpr (FP8)
    if (p.thread == 0)
      copy_async_4(shared_address(&s.weight_scale[p.warpgroup][stage]),
                   a.weight_scale + p.first_row / GROUP * a.blocks + block);
  barrier_arrive_after_copies(shared_address(&s.arrived[p.warpgroup][stage]));
}

DEVICE void ask_for_tokens(Shared& s, const Arguments& a, const Place& p, int pass) {
  const int stage = pass % STAGES, block = p.first_block + pass * WARPGROUPS;
  copy_rows<TOKENS>(s.tokens[p.warpgroup][stage], a.x + block * BLOCK_BYTES, a.x_token, a.tokens, p.thread);
  if constexpr (FP8)
    if (p.thread < a.tokens)
      copy_async_4(shared_address(&s.token_scale[p.warpgroup][stage][p.thread]), a.x_scale + block * a.tokens + p.thread);
  barrier_arrive_after_copies(shared_address(&s.arrived[p.warpgroup][stage]));
}

// products (+)= one block of the depth.
DEVICE void multiply(float (&products)[SUMS], const uint8* weights, const uint8* tokens, bool accumulate) {
  const uint64 a = swizzled_matrix(shared_address(weights)), b = swizzled_matrix(shared_address(tokens));
  warpgroup_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if constexpr (FP8)
      warpgroup_mma_e4m3(products, a + 2 * step, b + 2 * step, accumulate || step > 0);
    else
      warpgroup_mma_bf16(products, a + 2 * step, b + 2 * step, accumulate || step > 0);
  }
  warpgroup_commit();
  warpgroup_wait();
}

// Of 4 rows.
DEVICE float4 sum_of(const Shared& s, int token, int row) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int rank = 0; rank < CLUSTER; ++rank)
#pragma unroll
    for (int group = 0; group < WARPGROUPS; ++group) {
      const float4 part = *of_rank(reinterpret_cast<const float4*>(&s.sums[group][token][row]), rank);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
  return sum;
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS) multiply_tokens(const Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  int rank = 0;
  if constexpr (CLUSTER > 1) rank = static_cast<int>(block_of_cluster());
  Place p;
  p.warpgroup = threadIdx.x / 128, p.thread = threadIdx.x % 128;
  p.first_row = static_cast<int>(blockIdx.x / CLUSTER) * ROWS;
  p.first_block = rank * SHARE + p.warpgroup;
  p.passes = (min((rank + 1) * SHARE, a.blocks) - p.first_block + WARPGROUPS - 1) / WARPGROUPS;

  if (threadIdx.x < WARPGROUPS * STAGES)
    barrier_init(shared_address(&s.arrived[0][threadIdx.x]), 2 * 128);
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < STAGES; ++pass)
    if (pass < p.passes) ask_for_weights(s, a, p, pass);
  let_next_kernel_start();
  wait_for_previous_kernel();
#pragma unroll
  for (int pass = 0; pass < STAGES; ++pass)
    if (pass < p.passes) ask_for_tokens(s, a, p, pass);

  const int warp = p.thread / 32, g = p.thread % 32 / 4, t = p.thread % 4;
  float sums[SUMS] = {};
#pragma unroll 1
  for (int pass = 0; pass < p.passes; ++pass) {
    const int stage = pass % STAGES;
    barrier_wait(shared_address(&s.arrived[p.warpgroup][stage]), pass / STAGES & 1);
    async_proxy_fence();
    if constexpr (FP8) {
      float products[SUMS];
      multiply(products, s.weights[p.warpgroup][stage], s.tokens[p.warpgroup][stage], false);
      const float weight_scale = s.weight_scale[p.warpgroup][stage];
#pragma unroll
      for (int i = 0; i < SUMS; i += 4) {
        // A thread's sums are of tokens 2t and 2t + 1 of each 8, of rows g and g + 8.
        const float2 scale = *reinterpret_cast<const float2*>(&s.token_scale[p.warpgroup][stage][2 * i + 2 * t]);
        const float even = scale.x * weight_scale, odd = scale.y * weight_scale;
        sums[i] += products[i] * even, sums[i + 1] += products[i + 1] * odd;
        sums[i + 2] += products[i + 2] * even, sums[i + 3] += products[i + 3] * odd;
      }
    } else {
      multiply(sums, s.weights[p.warpgroup][stage], s.tokens[p.warpgroup][stage], true);
    }
    if (pass + STAGES < p.passes) {
      warpgroup_barrier(p.warpgroup);  // all have read the stage
      ask_for_weights(s, a, p, pass + STAGES);
      ask_for_tokens(s, a, p, pass + STAGES);
    }
  }

  __syncthreads();  // the sums take the place of weights and tokens
#pragma unroll
  for (int i = 0; i < SUMS; ++i)
    s.sums[p.warpgroup][i / 4 * 8 + 2 * t + i % 2][16 * warp + g + i / 2 % 2 * 8] = sums[i];
  if constexpr (CLUSTER > 1)
    cluster_barrier();
  else
    __syncthreads();
#pragma unroll 1
  for (int item = rank * THREADS + threadIdx.x; item < a.tokens * (ROWS / 4); item += CLUSTER * THREADS) {
    const int token = item / (ROWS / 4), row = item % (ROWS / 4) * 4;
    const float4 sum = sum_of(s, token, row);
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    const int64 at = token * a.out_token + p.first_row + row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.first_row + row + i >= a.rows) break;
      if constexpr (OUT_F32)
        static_cast<float*>(a.out)[at + i] = values[i];
      else
        static_cast<uint16*>(a.out)[at + i] = static_cast<uint16>(pack_bf16x2(values[i], 0.0f));
    }
  }
  if constexpr (CLUSTER > 1) cluster_barrier();  // the sums have been read
}

struct Tokens {
  const uint16* x;            // [tokens, depth] bf16
  const uint16* norm_weight;  // [depth] bf16
  uint8* values;              // [tokens, depth] e4m3
  float* scale;               // [depth / 128, tokens]
  int64 x_token;              // elements
  int depth;
  float eps;
};

// 1 / RMS of a block's token.
DEVICE float inverse_rms(const uint16* x, int depth, float eps) {
  float squares = 0.0f;
  for (int at = 8 * threadIdx.x; at < depth; at += 8 * blockDim.x) {
    const uint4 words = load_global_16(x + at, true);
    const uint32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) squares += bf16_low(pairs[i]) * bf16_low(pairs[i]) + bf16_high(pairs[i]) * bf16_high(pairs[i]);
  }
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) squares += __shfl_xor_sync(~0u, squares, apart);
  __shared__ float of_warp[32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) squares += __shfl_xor_sync(~0u, squares, apart);
  return rsqrtf(squares / depth + eps);
}

// A token a block; 16 threads take a group of 128 values.
extern "C" __global__ void quantize_tokens(const Tokens a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int token = blockIdx.x;
  const uint16* x = a.x + token * a.x_token;
  float inverse = 1.0f;
  if constexpr (NORM) inverse = inverse_rms(x, a.depth, a.eps);
  for (int at = 8 * threadIdx.x; at < a.depth; at += 8 * blockDim.x) {
    const uint4 words = load_global_16(x + at, true);
    uint32 pairs[4] = {words.x, words.y, words.z, words.w};
    if constexpr (NORM) {
      const uint4 gains = load_global_16(a.norm_weight + at, true);
      const uint32 gain[4] = {gains.x, gains.y, gains.z, gains.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = pack_bf16x2(bf16_low(pairs[i]) * inverse * bf16_low(gain[i]),
                               bf16_high(pairs[i]) * inverse * bf16_high(gain[i]));
    }
    uint32 largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = larger_magnitude_bf16x2(largest, pairs[i]);
#pragma unroll
    for (int apart = 1; apart < 16; apart *= 2)
      largest = larger_magnitude_bf16x2(largest, __shfl_xor_sync(~0u, largest, apart));
    const float scale = __fdiv_rn(fmaxf(fmaxf(bf16_low(largest), bf16_high(largest)), MIN_AMAX), FP8_MAX);
    const float factor = __fdiv_rn(1.0f, scale);
    uint2 bytes;
    bytes.x = pack_e4m3x4(bf16_low(pairs[0]) * factor, bf16_high(pairs[0]) * factor, bf16_low(pairs[1]) * factor,
                          bf16_high(pairs[1]) * factor);
    bytes.y = pack_e4m3x4(bf16_low(pairs[2]) * factor, bf16_high(pairs[2]) * factor, bf16_low(pairs[3]) * factor,
                          bf16_high(pairs[3]) * factor);
    *reinterpret_cast<uint2*>(a.values + static_cast<int64>(token) * a.depth + at) = bytes;
    if (threadIdx.x % 16 == 0) a.scale[at / GROUP * gridDim.x + token] = scale;
  }
}
