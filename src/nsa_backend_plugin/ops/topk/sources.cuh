// Where the keys of a radix select come from.
//
// A source hands out tiles of kSlots keys per thread, as a bit mask of the keys that exist, and their positions.
// Few slots where few keys are expected: a slot costs its instructions, filled or not.

#pragma once

#include "block.cuh"

// Logits in global memory. Loads are 16 bytes wide and aligned: the first may begin up to 3 logits before the row, in
// the same allocation. What is left of the row behind the last whole vector may end it, and is loaded one by one.
// With kBlocks > 1 every tile is divided among the blocks of the cluster, and this is one block's share.
template <int kVectorsPerThread, int kBlocks = 1>
struct Row {
  static constexpr int kVectors = kVectorsPerThread;
  static constexpr int kSlots = 4 * kVectors;
  static constexpr bool kIsShare = kBlocks > 1;
  static constexpr u32 kCommonKey = kZeroKey;  // many keys may be this one
  const float4* vectors;
  int lead;    // logits of the first vector that precede the row
  int length;
  int tile_count;

  __device__ Row(const float* begin, int length) : length(length) {
    lead = static_cast<int>(reinterpret_cast<unsigned long long>(begin) % 16 / sizeof(float));
    vectors = reinterpret_cast<const float4*>(begin - lead);
    constexpr int kTileLogits = kSlots * THREADS * kBlocks;
    tile_count = (length + lead + kTileLogits - 1) / kTileLogits;
  }
  __device__ __forceinline__ int tiles() const { return tile_count; }
  __device__ __forceinline__ int vector_count() const { return (length + lead + 3) / 4; }
  __device__ __forceinline__ int left_from(int vector) const { return length + lead - 4 * vector; }

  __device__ __forceinline__ u32 load_vectors(const int (&at)[kVectors], u32 (&keys)[kSlots]) const {
    float4 values[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      values[v] = left_from(at[v]) >= 4 ? __ldg(vectors + at[v]) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {  // of one thread, after the loads of all
      const int left = left_from(at[v]);
      const float* rest = reinterpret_cast<const float*>(vectors + at[v]);
      if (left > 0 && left < 4)
        values[v] = make_float4(rest[0], left > 1 ? rest[1] : 0.f, left > 2 ? rest[2] : 0.f, 0.f);
    }
    u32 exists = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float lanes[4] = {values[v].x, values[v].y, values[v].z, values[v].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = at[v] * 4 + e - lead;
        keys[v * 4 + e] = ordered_key(lanes[e]);
        exists |= static_cast<u32>(i >= 0 && i < length) << (v * 4 + e);
      }
    }
    return exists;
  }
  __device__ __forceinline__ int vector_at(int tile, int v) const {
    const int block = kBlocks == 1 ? 0 : static_cast<int>(cluster_rank());
    return ((tile * kVectors + v) * kBlocks + block) * THREADS + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ u32 load(int tile, u32 (&keys)[kSlots]) const {
    int at[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) at[v] = vector_at(tile, v);
    return load_vectors(at, keys);
  }
  // One tile of vectors spread evenly over the row.
  __device__ __forceinline__ u32 load_sample(u32 (&keys)[kSlots]) const {
    static_assert(!kIsShare, "every block of a cluster takes the whole sample");
    int at[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      at[v] = static_cast<int>(static_cast<i64>(vector_at(0, v)) * vector_count() / (THREADS * kVectors));
    }
    return load_vectors(at, keys);
  }
  __device__ __forceinline__ int index(int tile, int slot) const {
    return vector_at(tile, slot / 4) * 4 + slot % 4 - lead;
  }
};

// Keys of one tile, held in registers. `Origin` knows the logit's index of each.
template <class Origin>
struct Resident {
  static constexpr int kSlots = Origin::kSlots;
  static constexpr bool kIsShare = Origin::kIsShare;
  static constexpr u32 kCommonKey = Origin::kCommonKey;
  const Origin& origin;
  u32 keys[kSlots];
  u32 exists;

  __device__ __forceinline__ explicit Resident(const Origin& origin) : origin(origin) { exists = origin.load(0, keys); }
  __device__ __forceinline__ int tiles() const { return 1; }
  __device__ __forceinline__ u32 load(int, u32 (&out)[kSlots]) const {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) out[i] = keys[i];
    return exists;
  }
  __device__ __forceinline__ int index(int tile, int slot) const { return origin.index(tile, slot); }
};

// A sample of a row: its indices have no meaning.
template <int kVectors>
struct Sample {
  static constexpr int kSlots = 4 * kVectors;
  static constexpr bool kIsShare = false;
  static constexpr u32 kCommonKey = kZeroKey;
  const Row<kVectors>& row;
  __device__ __forceinline__ u32 load(int, u32 (&keys)[kSlots]) const { return row.load_sample(keys); }
  __device__ __forceinline__ int index(int, int) const { return 0; }
};

// The candidates that the filter pass left in shared memory. Their keys count from its threshold.
template <int kSlotsPerThread>
struct Candidates {
  static constexpr int kSlots = kSlotsPerThread;
  static constexpr bool kIsShare = false;
  static constexpr u32 kCommonKey = 0;
  int count;
  __device__ __forceinline__ int slot_at(int slot) const {
    return slot * THREADS + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ u32 load(int, u32 (&keys)[kSlots]) const {
    u32 exists = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool inside = slot_at(i) < count;
      keys[i] = inside ? shared().candidate.key[slot_at(i)] : 0u;
      exists |= static_cast<u32>(inside) << i;
    }
    return exists;
  }
  __device__ __forceinline__ int index(int, int slot) const { return shared().candidate.index[slot_at(slot)]; }
};
