// What a block of topk.cu has: sizes, shared memory, its place in a cluster, block-wide sums. Defines: see topk.cu.
#pragma once

#include "ptx.cuh"

using u32 = uint32;
using i64 = int64;

constexpr int kWarps = THREADS / 32;
constexpr int kVectors = 4;                       // 16-byte loads that each thread has in flight over a long row
constexpr int kTile = 4 * kVectors * THREADS;     // logits per tile of a long row
constexpr int kSampleVectors = 2;                 // of rows up to 32 tiles; beyond, the sample is twice as large
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerThread = kBins / THREADS;
constexpr int kMaxCandidates = kTile < 8192 ? kTile : 8192;  // at most 64 KB of key and index
constexpr int kBitmapWords = 2 * kMaxCandidates;
constexpr u32 kFull = 0xffffffffu;
constexpr u32 kZeroKey = 0x80000000u;
static_assert(kBins % THREADS == 0, "every thread owns the same number of bins");

struct Shared {
  u32 histogram[kBins];
  u32 warp_sums[kWarps];
  u32 bin, above, bin_count;  // result of one radix step
  u32 taken, taken_equal;     // append positions
  u32 handed_over;            // where this block's candidates begin in the first block's list
  u32 largest;                // key among the candidates
  union {
    struct {
      u32 key[kMaxCandidates];
      int index[kMaxCandidates];
    } candidate;
    u32 bitmap[kBitmapWords];  // of the chosen positions, for sorting them; the candidates are dead by then
  };
  int chosen[MAX_K];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch reserves too little shared memory");

__device__ __forceinline__ Shared& shared() {
  extern __shared__ __align__(16) unsigned char raw[];
  return *reinterpret_cast<Shared*>(raw);
}

// Larger float, larger key. -0 and +0 are equal logits, so they get one key.
__device__ __forceinline__ u32 ordered_key(float logit) {
  const u32 bits = __float_as_uint(logit + 0.0f);  // -0 + 0 is +0
  return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

// ---------------------------------------------------------------- thread-block cluster

__device__ __forceinline__ u32 cluster_rank() {
  if constexpr (CLUSTER > 1) return block_of_cluster();
  return 0;
}

// ---------------------------------------------------------------- block-wide sums

// Exclusive prefix sum over the block of one value per thread; `total` is the sum over all threads.
__device__ __forceinline__ u32 exclusive_sum(u32 value, u32& total) {
  Shared& s = shared();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 inclusive = value;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const u32 other = __shfl_up_sync(kFull, inclusive, d);
    if (lane >= d) inclusive += other;
  }
  if (lane == 31) s.warp_sums[warp] = inclusive;
  __syncthreads();
  const u32 sum = lane < kWarps ? s.warp_sums[lane] : 0;
  total = __reduce_add_sync(kFull, sum);
  return __reduce_add_sync(kFull, lane < warp ? sum : 0u) + inclusive - value;
}
