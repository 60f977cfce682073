// Products of up to 32 tokens with a weight matrix by Hopper's warpgroup matrix instruction.
//
//   warpgroup  64 rows of the weights, all tokens, and every WARPGROUPS-th block of 128 bytes of the depth. STAGES blocks of
//              its weights are on their way to shared memory at any time, AHEAD blocks of tokens to registers.
//   block      WARPGROUPS warpgroups, whose sums meet in shared memory
//   cluster    CLUSTER blocks that share the depth
//
// Weights belong to no earlier kernel, so the first of them are asked for before the wait for it. Sums are taken in one
// order: the result does not depend on timing.
//
// FP8: weights are e4m3 with one scale for 128 rows x 128 values, and tokens are quantized here, 128 values to a scale. Each
// block of the depth is summed by the tensor cores, and added with its scales in float32. Else both are bf16.
// NORM: a token's inverse RMS is a factor of its sums, so only the norm's weights are multiplied before.
//
// Defines: FP8, NORM (with FP8 alone), OUT_F32 (else bf16), TOKENS (16 or 32), WARPGROUPS, STAGES, CLUSTER, SHARE (blocks of
// the depth for each block of a cluster).

#include "tokens.cuh"
#include "wgmma.cuh"

constexpr int ROWS = 64, BLOCK_BYTES = 128, GROUP = 128, THREADS = 128 * WARPGROUPS;
constexpr int PASSES = (SHARE + WARPGROUPS - 1) / WARPGROUPS;
constexpr int RESIDENT = WARPGROUPS == 1 ? 3 : 4 / WARPGROUPS;  // blocks on a multiprocessor
constexpr int SUMS = TOKENS / 2;         // of a thread: 2 of its rows x a quarter of the tokens
constexpr int SUMS_STRIDE = ROWS + 4;    // the lanes of a warp then store to different banks
constexpr int ITEMS = TOKENS / 16;       // of a thread: 16 bytes of a block of so many tokens
constexpr int VECTORS = FP8 ? 2 : 1;     // of 8 values of a token, for 16 bytes
constexpr int MOST_AHEAD = TOKENS == 16 ? 4 : 3;  // what registers hold: a pass takes less than half of a load's time
constexpr int AHEAD = PASSES < MOST_AHEAD ? PASSES : MOST_AHEAD;
static_assert(STAGES > 1 || PASSES == 1, "a stage is asked for again one pass later");

struct Shared {
  union {
    struct {
      uint8 weights[WARPGROUPS][STAGES][ROWS * BLOCK_BYTES];
      uint8 tokens[WARPGROUPS][2][TOKENS * BLOCK_BYTES];
    };
    float sums[WARPGROUPS][TOKENS][SUMS_STRIDE];  // when all products are done
  };
  uint16 norm_weight[NORM ? SHARE * GROUP : 8];
  float scale[WARPGROUPS][2][TOKENS];
  float squares[WARPGROUPS][TOKENS];
  uint64 arrived[WARPGROUPS][STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for another size");

struct Arguments {
  const uint8* weight;         // [rows, depth]
  const float* weight_scale;   // [ceil(rows / 128), depth / 128]
  const uint16* x;             // [tokens, depth] bf16
  const uint16* norm_weight;   // [depth] bf16
  void* out;                   // [tokens, rows]
  int64 x_token, out_token;    // elements
  int tokens, rows, blocks;    // of the depth, 128 bytes each
  float eps;
};

// What a thread works at.
struct Place {
  int warpgroup, thread;  // of the warpgroup
  int first_row;
  // Of the depth: the block's share begins at share_start, the warpgroup's are first_block + pass * WARPGROUPS.
  int share_start, first_block, passes;

  DEVICE int block(int pass) const { return first_block + pass * WARPGROUPS; }
  DEVICE int token(int item) const { return thread / 8 + 16 * item; }
  DEVICE int chunk() const { return thread % 8; }
};

// 16 bytes of a row's block lie at their place in the swizzle that the instruction reads.
DEVICE uint32 swizzled(int row, int chunk) { return row * BLOCK_BYTES + (chunk ^ row % 8) * 16; }

DEVICE void ask_for_weights(Shared& s, const Arguments& a, const Place& p, int pass) {
  const int stage = pass % STAGES;
  const int64 row_bytes = static_cast<int64>(a.blocks) * BLOCK_BYTES;
  const uint8* from = a.weight + p.first_row * row_bytes + p.block(pass) * BLOCK_BYTES + 16 * p.chunk();
  const uint32 to = shared_address(s.weights[p.warpgroup][stage]);
  if constexpr (NORM) {
    const int at = p.block(pass) * GROUP + 8 * p.thread;
    if (p.thread < GROUP / 8)
      copy_async_16(shared_address(s.norm_weight + at - p.share_start * GROUP), a.norm_weight + at, true);
  }
#pragma unroll
  for (int i = 0; i < ROWS / 16; ++i) {
    const int row = p.token(i);
    copy_async_16(to + swizzled(row, p.chunk()), from + row * row_bytes, p.first_row + row < a.rows);
  }
  barrier_arrive_after_copies(shared_address(&s.arrived[p.warpgroup][stage]));
}

DEVICE void wait_for_weights(Shared& s, const Place& p, int pass) {
  barrier_wait(shared_address(&s.arrived[p.warpgroup][pass % STAGES]), pass / STAGES % 2);
}

// What a thread has of a block: 16 bytes of ITEMS tokens after quantization, and the scale of the weights.
struct Part {
  uint4 words[ITEMS][VECTORS];
  float weight_scale;

  DEVICE void load(const Arguments& a, const Place& p, int pass) {
    const bool present = pass < p.passes;
    const int at = (p.block(pass) * (BLOCK_BYTES / 16) + p.chunk()) * 8 * VECTORS;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item)
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        words[item][v] =
            load_global_16(a.x + p.token(item) * a.x_token + at + 8 * v, present && p.token(item) < a.tokens);
    if constexpr (FP8)
      weight_scale = present ? __ldg(a.weight_scale + p.first_row / GROUP * a.blocks + p.block(pass)) : 0.0f;
  }

  // To shared memory, as the instruction reads them. With a norm the weights of the pass have arrived, its own with them.
  // squares: of each token, added up.
  DEVICE void put(Shared& s, const Place& p, int pass, float (&squares)[ITEMS]) const {
    const int buffer = pass % 2;
    const uint16* norm = s.norm_weight + (p.block(pass) - p.share_start) * GROUP + 16 * p.chunk();
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      uint4 bytes = words[item][0];
      if constexpr (FP8) {
        float scale;
        bytes = bytes_of(item, norm, scale, squares[item]);
        if (p.chunk() == 0) s.scale[p.warpgroup][buffer][p.token(item)] = scale;
      }
      *reinterpret_cast<uint4*>(s.tokens[p.warpgroup][buffer] + swizzled(p.token(item), p.chunk())) = bytes;
    }
  }

 private:
  DEVICE uint4 bytes_of(int item, const uint16* norm, float& scale, float& squares) const {
    uint32 pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      pairs[i] = word(words[item][i / 4 % VECTORS], i % 4);
      if constexpr (NORM) pairs[i] = weighted(pairs[i], reinterpret_cast<const uint32*>(norm)[i], squares);
    }
    scale = amax_of_lanes(pairs) * (1.0f / FP8_MAX);
    const float factor = reciprocal_approx(scale);
    return make_uint4(quantized(pairs[0], pairs[1], factor), quantized(pairs[2], pairs[3], factor),
                      quantized(pairs[4], pairs[5], factor), quantized(pairs[6], pairs[7], factor));
  }
};

// Begins products (+)= one block of the depth.
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

DEVICE float inverse_rms(const Shared& s, const Arguments& a, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int rank = 0; rank < CLUSTER; ++rank)
#pragma unroll
    for (int group = 0; group < WARPGROUPS; ++group) sum += *of_rank(&s.squares[group][token], rank);
  return rsqrtf(sum / (a.blocks * GROUP) + a.eps);
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS, RESIDENT) multiply_tokens(const Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  int rank = 0;
  if constexpr (CLUSTER > 1) rank = static_cast<int>(block_of_cluster());
  Place p;
  p.warpgroup = threadIdx.x / 128, p.thread = threadIdx.x % 128;
  p.first_row = static_cast<int>(blockIdx.x / CLUSTER) * ROWS;
  p.share_start = rank * SHARE, p.first_block = p.share_start + p.warpgroup;
  p.passes = (min(p.share_start + SHARE, a.blocks) - p.first_block + WARPGROUPS - 1) / WARPGROUPS;

  if (threadIdx.x < WARPGROUPS * STAGES) barrier_init(shared_address(&s.arrived[0][threadIdx.x]), 128);
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < STAGES; ++pass)
    if (pass < p.passes) ask_for_weights(s, a, p, pass);
  let_next_kernel_start();
  wait_for_previous_kernel();

  Part parts[AHEAD];
#pragma unroll
  for (int pass = 0; pass < AHEAD; ++pass) parts[pass].load(a, p, pass);
  const int warp = p.thread / 32, g = p.thread % 32 / 4, t = p.thread % 4;
  float sums[SUMS] = {}, squares[ITEMS] = {};
  auto put = [&](int pass) {
    if (NORM) wait_for_weights(s, p, pass);
    parts[pass % AHEAD].put(s, p, pass, squares);
  };
  if (p.passes > 0) put(0);
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    if (pass >= p.passes) break;
    const int stage = pass % STAGES, buffer = pass % 2;
    const float weight_scale = parts[pass % AHEAD].weight_scale;
    parts[pass % AHEAD].load(a, p, pass + AHEAD);
    wait_for_weights(s, p, pass);
    async_proxy_fence();
    warpgroup_barrier(p.warpgroup);
    float products[SUMS];
    multiply(FP8 ? products : sums, s.weights[p.warpgroup][stage], s.tokens[p.warpgroup][buffer], !FP8);
    // Meanwhile: all have read what the pass before multiplied.
    if (pass > 0 && pass - 1 + STAGES < p.passes) ask_for_weights(s, a, p, pass - 1 + STAGES);
    if (pass + 1 < p.passes) put(pass + 1);
    warpgroup_wait(FP8 ? products : sums);
    if constexpr (FP8)
#pragma unroll
      for (int i = 0; i < SUMS; i += 4) {
        // A thread's sums are of tokens 2t and 2t + 1 of each 8, of rows g and g + 8.
        const float2 scale = *reinterpret_cast<const float2*>(&s.scale[p.warpgroup][buffer][2 * i + 2 * t]);
        const float even = scale.x * weight_scale, odd = scale.y * weight_scale;
        sums[i] += products[i] * even, sums[i + 1] += products[i + 1] * odd;
        sums[i + 2] += products[i + 2] * even, sums[i + 3] += products[i + 3] * odd;
      }
  }

  __syncthreads();  // the sums take the place of weights and tokens
#pragma unroll
  for (int i = 0; i < SUMS; ++i)
    s.sums[p.warpgroup][i / 4 * 8 + 2 * t + i % 2][16 * warp + g + i / 2 % 2 * 8] = sums[i];
  if constexpr (NORM)
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
#pragma unroll
      for (int apart = 1; apart < 8; apart *= 2) squares[item] += __shfl_xor_sync(~0u, squares[item], apart);
      if (p.chunk() == 0) s.squares[p.warpgroup][p.token(item)] = squares[item];
    }
  if constexpr (CLUSTER > 1)
    cluster_barrier();
  else
    __syncthreads();
#pragma unroll 1
  for (int item = rank * THREADS + threadIdx.x; item < a.tokens * (ROWS / 4); item += CLUSTER * THREADS) {
    const int token = item / (ROWS / 4), row = item % (ROWS / 4) * 4;
    const float4 sum = sum_of(s, token, row);
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    const float factor = NORM ? inverse_rms(s, a, token) : 1.0f;
    const int64 at = token * a.out_token + p.first_row + row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.first_row + row + i >= a.rows) break;
      if constexpr (OUT_F32)
        static_cast<float*>(a.out)[at + i] = values[i] * factor;
      else
        static_cast<uint16*>(a.out)[at + i] = static_cast<uint16>(pack_bf16x2(values[i] * factor, 0.0f));
    }
  }
  if constexpr (CLUSTER > 1) cluster_barrier();  // the sums have been read
}
