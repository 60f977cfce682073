// What the functions of ptx.cuh and wgmma.cuh do that are one PTX instruction each, on emulated threads.
#pragma once
#include "gpu.h"

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

// ---- Copies and barriers ----

inline uint32 __cvta_generic_to_shared(const void* pointer) {
  const auto* p = static_cast<const char*>(pointer);
  const long offset = p - gpu::self->block->shared;
  if (offset < 0 || offset > gpu::kShared) gpu::fail("not an address of the block's shared memory");
  return uint32(offset);
}
inline void increment_if(bool condition, uint32* counter) { *counter += condition; }
inline void forget(int&) {}
inline float load_shared(uint32 address) { return *reinterpret_cast<float*>(gpu::shared_at(address, 4)); }
inline std::deque<gpu::Copy>& open_group() {
  if (gpu::self->groups.empty()) gpu::self->groups.emplace_back();
  return gpu::self->groups.back();
}
inline void add_copy(std::deque<gpu::Copy>& group, uint32 to, const void* from, int bytes, bool present) {
  char* place = gpu::shared_at(to, bytes);
  if (present) gpu::check_global(from, bytes);
  memset(place, 0xff, bytes);
  group.push_back({place, present ? from : nullptr, bytes, nullptr});
}
inline void copy_async_16(uint32 to, const void* from, bool present) { add_copy(open_group(), to, from, 16, present); }
inline uint4 load_global_16(const void* from, bool present) {
  if (present) gpu::check_global(from, 16);
  return present ? *static_cast<const uint4*>(from) : uint4{};
}
inline void barrier_init(uint32 barrier, int arrivals) {
  auto* halves = reinterpret_cast<uint16_t*>(gpu::shared_at(barrier, 8));
  halves[0] = halves[1] = uint16_t(arrivals), halves[2] = halves[3] = 0;
}
inline void barrier_arrive_after_copies(uint32 barrier) {
  auto* at = reinterpret_cast<uint64_t*>(gpu::shared_at(barrier, 8));
  open_group().push_back({nullptr, nullptr, 0, at});
  gpu::self->groups.emplace_back();
}
inline void barrier_wait(uint32 barrier, uint32 parity) {
  auto* words = reinterpret_cast<uint32_t*>(gpu::shared_at(barrier, 8));
  while ((words[1] & 1) == parity) gpu::yield();
}

// ---- Order of kernels ----

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

// ---- Thread-block clusters ----

inline uint32 block_of_cluster() { return gpu::self->block->rank; }
inline void cluster_arrive() {
  if (gpu::self->in_cluster_barrier) gpu::fail("two arrivals at a cluster's barrier");
  gpu::self->in_cluster_barrier = true;
  gpu::self->cluster_barrier = gpu::cluster_barrier.passed;
  if (++gpu::cluster_barrier.arrived == int(CLUSTER * gpu::block_size.x))
    gpu::cluster_barrier.arrived = 0, gpu::cluster_barrier.passed++;
}
inline void cluster_wait() {
  while (gpu::cluster_barrier.passed == gpu::self->cluster_barrier) gpu::yield();
  gpu::self->in_cluster_barrier = false;
}
template <class T>
T* in_block(T* local, uint32 rank) {
  if (rank >= CLUSTER) gpu::fail("no such block in the cluster");
  return reinterpret_cast<T*>(gpu::blocks[rank].shared + __cvta_generic_to_shared(local));
}

// ---- Numbers ----

inline float f16(uint16 bits) { return float(bits_as<_Float16>(bits)); }
inline uint16 to_f16(float x) { return bits_as<uint16>(_Float16(x)); }
inline float bf16(uint16 bits) { return __uint_as_float(uint32(bits) << 16); }
inline uint16 to_bf16(float x) {
  const uint32 bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7FFF : uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float e4m3(uint8 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float value = exponent ? ldexpf(float(8 + mantissa), exponent - 10) : ldexpf(float(mantissa), -9);
  return (bits & 127) == 127 ? NAN : bits >> 7 ? -value : value;
}
inline uint8 to_e4m3(float x) {
  if (std::isnan(x)) return 127;
  const float size = std::min(fabsf(x), 448.0f);
  uint8 low = 0, high = 126;  // neighbours among the positive numbers, which are in order
  while (low < high) {
    const uint8 middle = (low + high) / 2;
    if (e4m3(middle) < size) low = middle + 1; else high = middle;
  }
  if (low > 0) {
    const float above = e4m3(low) - size, below = size - e4m3(low - 1);
    if (below < above || (below == above && low % 2)) low--;
  }
  return low | (std::signbit(x) ? 128 : 0);
}
inline void e4m3x4_to_f16(uint32 bytes, uint32& low, uint32& high) {
  auto pair = [&](int at) { return uint32(to_f16(e4m3(bytes >> 8 * at))) | uint32(to_f16(e4m3(bytes >> 8 * (at + 1)))) << 16; };
  low = pair(0), high = pair(2);
}
inline uint32 pack_e4m3x4(float x0, float x1, float x2, float x3) {
  return to_e4m3(x0) | to_e4m3(x1) << 8 | to_e4m3(x2) << 16 | uint32(to_e4m3(x3)) << 24;
}
inline uint32 pack_f16x2(float low, float high) { return to_f16(low) | uint32(to_f16(high)) << 16; }
inline uint32 pack_bf16x2(float low, float high) { return to_bf16(low) | uint32(to_bf16(high)) << 16; }
inline uint32 multiply_f16x2(uint32 a, uint32 b) { return pack_f16x2(f16(a) * f16(b), f16(a >> 16) * f16(b >> 16)); }
inline uint32 larger_magnitude_bf16x2(uint32 a, uint32 b) {
  auto larger = [](uint16 x, uint16 y) -> uint32 {
    x &= 0x7FFF, y &= 0x7FFF;
    return std::isnan(bf16(x)) ? y : std::isnan(bf16(y)) ? x : std::max(x, y);
  };
  return larger(a, b) | larger(a >> 16, b >> 16) << 16;
}
inline float exp2_approx(float x) { return exp2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

// ---- Matrix fragments ----

// Lane 8 i + r gives the address of row r of matrix i.
inline void load_rows(uint32* fragment, int matrices, uint32 address, bool transposed) {
  memcpy(gpu::lane_buffer(gpu::lane()), &address, 4);
  gpu::sync_warp();
  for (int i = 0; i < matrices; i++)
    for (int half = 0; half < 2; half++) {
      const int lane = gpu::lane(), pair = lane % 4 * 2 + half;
      const int line = transposed ? pair : lane / 4, column = transposed ? lane / 4 : pair;
      uint32 row;
      memcpy(&row, gpu::lane_buffer(8 * i + line), 4);
      memcpy(reinterpret_cast<char*>(&fragment[i]) + 2 * half, gpu::shared_at(row, 16) + 2 * column, 2);
    }
  gpu::sync_warp();
}
inline void load_matrices(uint32 (&fragment)[4], uint32 address) { load_rows(fragment, 4, address, false); }
inline void load_matrices_transposed(uint32 (&fragment)[4], uint32 address) { load_rows(fragment, 4, address, true); }

template <class Value>
void mma(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, Value value) {
  const uint32 words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  memcpy(gpu::lane_buffer(gpu::lane()), words, 24);
  gpu::sync_warp();
  auto at = [&](int lane, int word, int half) {
    uint16 bits;
    memcpy(&bits, gpu::lane_buffer(lane) + 4 * word + 2 * half, 2);
    return value(bits);
  };
  for (int i = 0; i < 4; i++) {
    const int row = gpu::lane() / 4 + 8 * (i / 2), column = gpu::lane() % 4 * 2 + i % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; k++)
      sum += at(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2) * at(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    c[i] += sum;
  }
  gpu::sync_warp();
}
inline void mma_f16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) { mma(c, a, b0, b1, f16); }
inline void mma_bf16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) { mma(c, a, b0, b1, bf16); }

// ---- Hopper's warpgroup matrix instruction ----

// A byte of a matrix that swizzled_matrix describes. In a transposed one 64 rows lie along 128 bytes.
inline const char* matrix_byte(uint64 descriptor, int row, int byte, bool transposed = false) {
  if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3FFF) != 1024 >> 4) gpu::fail("another layout than 128-byte swizzle");
  uint32 offset = (descriptor & 0x3FFF) * 16;
  if (transposed) offset += row / 64 * (descriptor >> 16 & 0x3FFF) * 16 + byte / 2 * 128 + row % 64 * 2 + byte % 2;
  else offset += row / 8 * 1024 + row % 8 * 128 + byte;
  offset ^= (offset >> 7 & 7) << 4;
  return gpu::shared_at(offset, 1);
}
inline uint64 digest(const gpu::Product& p) {
  uint64 sum = 0;
  for (int row = 0; row < std::max(64, p.columns); row++)
    for (int byte = 0; byte < 32; byte++) {
      if (row < 64) sum = sum * 31 + uint8(*matrix_byte(p.a, row, byte));
      if (row < p.columns) sum = sum * 31 + uint8(*matrix_byte(p.b, row, byte, p.transposed));
    }
  return sum;
}
// What the instruction reads may not change until it is waited for: one thread in 32 looks.
inline void begin_product(gpu::Product p) {
  p.seen = gpu::lane() == 0 ? digest(p) : 0;
  gpu::self->products.push_back(p);
}
template <int COUNT>
void warpgroup_mma_e4m3(float (&d)[COUNT], uint64 a, uint64 b, bool accumulate) {
  begin_product({a, b, 2 * COUNT, true, false, accumulate, d, 0});
}
template <int COUNT>
void warpgroup_mma_bf16(float (&d)[COUNT], uint64 a, uint64 b, bool accumulate) {
  begin_product({a, b, 2 * COUNT, false, false, accumulate, d, 0});
}
inline void finish(const gpu::Product& p) {
  if (gpu::lane() == 0 && digest(p) != p.seen) gpu::fail("shared memory changed under a warpgroup's product");
  const int warp = gpu::self->index.x / 32 % 4, g = gpu::lane() / 4, t = gpu::lane() % 4;
  auto value = [&](uint64 descriptor, int row, int k, bool transposed) {
    if (p.fp8) return e4m3(uint8(*matrix_byte(descriptor, row, k)));
    uint16 bits;
    memcpy(&bits, matrix_byte(descriptor, row, 2 * k, transposed), 2);
    return bf16(bits);
  };
  for (int i = 0; i < p.columns / 2; i++) {
    const int row = 16 * warp + g + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
    float sum = p.accumulate ? p.d[i] : 0.0f;
    for (int k = 0; k < (p.fp8 ? 32 : 16); k++) sum += value(p.a, row, k, false) * value(p.b, column, k, p.transposed);
    p.d[i] = sum;
  }
}
inline void finish_products() {
  gpu::yield();
  for (auto& p : gpu::self->products) finish(p);
  gpu::self->products.clear();
}
template <int COUNT>
void warpgroup_wait(float (&)[COUNT]) { finish_products(); }
inline void warpgroup_fence() {}
inline void warpgroup_commit() {}
inline void async_proxy_fence() {}
inline void warpgroup_barrier(int warpgroup) { gpu::arrive_and_wait(gpu::self->block->named[warpgroup + 1], 128); }
