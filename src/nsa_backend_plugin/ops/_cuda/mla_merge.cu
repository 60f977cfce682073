// Combines the partial results of mla_decode.cu: per token and head the splits' outputs, weighted by their share of
// the softmax's sum.
//
// A block makes one head's values, or a part of them. Eight neighbouring values are made by `1 << lane_bits` lanes, each
// from up to four splits, so that all loads of a thread are in flight at once, with many splits as with few. Sums are
// taken in a fixed order: the same bits in every run.

#include "ptx.cuh"

constexpr int VALUE_DIM = 512;
constexpr int VALUES = 8;  // of a lane: 16 bytes
constexpr int THREADS = VALUE_DIM / VALUES;
constexpr int SPLITS_PER_LANE = 4;
constexpr int WARPFULS = 4;  // of splits: lane l knows the weights of splits l, l + 32 ...
constexpr float NO_LSE = -1e30f;  // finite, so that -inf - max is -inf
constexpr float LN2 = 0.6931471805599453f;

struct Arguments {
  const uint16* partial_out;  // [tokens, splits, heads, 512] bf16
  const float* partial_lse;   // [tokens, heads, splits], base 2
  uint16* out;                // [tokens, heads, 512] bf16
  float* lse;                 // [tokens, heads] or null, natural logarithm
  int splits;                 // at most 32 * WARPFULS
  int lane_bits;              // at least splits / 4 lanes
};

DEVICE float maximum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) mla_merge(const Arguments a) {
  const int heads = gridDim.y, head = blockIdx.y, token = blockIdx.z, row = token * heads + head;
  const int thread = blockIdx.x * THREADS + threadIdx.x, lane = threadIdx.x % 32;
  const int lanes = 1 << a.lane_bits, member = thread & lanes - 1, value = (thread >> a.lane_bits) * VALUES;
  const uint16* from = a.partial_out + ((int64(token) * a.splits + member) * heads + head) * VALUE_DIM + value;
  const int64 step = int64(lanes) * heads * VALUE_DIM;
  wait_for_previous_kernel();
  let_next_kernel_start();

  // The outputs first: their latency hides the weights.
  uint4 parts[SPLITS_PER_LANE];
#pragma unroll
  for (int i = 0; i < SPLITS_PER_LANE; i++)
    parts[i] = load_global_16(from + i * step, member + i * lanes < a.splits);
  __syncthreads();  // or the compiler moves loads behind the reductions, which wait for the one below
  float weights[WARPFULS], peak = NO_LSE, sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPFULS; w++) {
    const int split = 32 * w + lane;
    weights[w] = split < a.splits ? __ldcg(a.partial_lse + int64(row) * a.splits + split) : MINUS_INFINITY;
    peak = fmaxf(peak, weights[w]);
  }
  const float maximum = maximum_of_warp(peak);
#pragma unroll
  for (int w = 0; w < WARPFULS; w++) sum += weights[w] = exp2_approx(weights[w] - maximum);
  const float total = sum_of_warp(sum);
  if (a.lse && thread == 0) a.lse[row] = (maximum + log2f(total)) * LN2;

  float sums[VALUES] = {};
#pragma unroll
  for (int i = 0; i < SPLITS_PER_LANE; i++) {
    const int split = member + i * lanes;
    float share = __shfl_sync(~0u, weights[0], split);  // 0 past the last split
    if (a.splits > 32)
#pragma unroll
      for (int w = 1; w < WARPFULS; w++) {
        const float other = __shfl_sync(~0u, weights[w], split);
        if (split >= 32 * w) share = other;
      }
    const uint32 pairs[VALUES / 2] = {parts[i].x, parts[i].y, parts[i].z, parts[i].w};
#pragma unroll
    for (int pair = 0; pair < VALUES / 2; pair++) {
      sums[2 * pair] += share * bf16_low(pairs[pair]);
      sums[2 * pair + 1] += share * bf16_high(pairs[pair]);
    }
  }
  for (int distance = 1; distance < lanes; distance *= 2)
#pragma unroll
    for (int i = 0; i < VALUES; i++) sums[i] += __shfl_xor_sync(~0u, sums[i], distance);
  if (member > 0) return;
  const float inverse = total == 0.f ? 0.f : 1.f / total;
  uint32 packed[VALUES / 2];
#pragma unroll
  for (int pair = 0; pair < VALUES / 2; pair++)
    packed[pair] = pack_bf16x2(sums[2 * pair] * inverse, sums[2 * pair + 1] * inverse);
  *reinterpret_cast<uint4*>(a.out + int64(row) * VALUE_DIM + value) =
      make_uint4(packed[0], packed[1], packed[2], packed[3]);
}
