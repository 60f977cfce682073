// CUDA C++ for a CPU. The threads of a cluster are fibers that run in random order, one warp far behind the others as long as
// barriers allow it, and yield where they wait. Shared memory begins as NaN, and so does what an asynchronous copy will write,
// until it arrives: at a time of its own, or where its thread waits for it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __CUDA_ARCH__ 900
#ifndef CLUSTER
#define CLUSTER 1
#endif

namespace gpu {
constexpr int kShared = 227 * 1024, kStack = 1 << 16;
struct Index { unsigned x, y, z; };
struct Range { const char *first, *last; };
struct Copy { char* to; const void* from; int bytes; uint64_t* arrival; };  // an arrival where there is nothing to copy
struct Barrier { int arrived = 0; long passed = 0; };
struct Block {
  char* shared;
  Index index;
  unsigned rank;  // in its cluster
  Barrier all, named[16];
  std::vector<Barrier> warps;
  std::vector<char> lanes;  // 32 bytes for each thread, by which a warp exchanges values
};
// Of a warpgroup, begun. transposed: b.
struct Product { uint64_t a, b; int columns; bool fp8, transposed, accumulate; float* d; uint64_t seen; };
struct Fiber {
  void* stack_pointer;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Block* block;
  Index index;
  bool done;
  std::deque<std::deque<Copy>> groups;  // the last is not closed yet
  std::deque<Copy> awaited;  // these arrive no sooner than the thread waits for them
  std::vector<Product> products;
  bool in_cluster_barrier;
  long cluster_barrier;  // that it waits for
};
static std::vector<Block> blocks;
static std::vector<Fiber> fibers;
static std::vector<Range> readable;  // of global memory; empty where that is not known
static Fiber* self;
static void* scheduler;
static Barrier cluster_barrier;
static Index block_size, grid_size;
static unsigned random_state;
static void (*body)();

static const char* failure;
static unsigned random_bits() { return (random_state = random_state * 1664525 + 1013904223) >> 8; }

extern "C" void gpu_switch(void** from, void* to);
asm(R"(
.text
gpu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

// Ends the kernel; its threads are left where they are.
static void fail(const char* what) {
  failure = what;
  gpu_switch(&self->stack_pointer, scheduler);
}
static void land(std::deque<Copy>& group) {
  for (auto& copy : group) {
    if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
    else if (copy.to) memset(copy.to, 0, copy.bytes);
    // Expected, still missing and completed phases are 16, 16 and 32 bits.
    if (!copy.arrival) continue;
    auto* halves = reinterpret_cast<uint16_t*>(copy.arrival);
    if (--halves[1] == 0) halves[1] = halves[0], reinterpret_cast<uint32_t*>(copy.arrival)[1]++;
  }
  group.clear();
}
static void yield() {
  // Copies land in order, at any time.
  if (!self->groups.empty() && random_bits() % 4 == 0) {
    land(self->groups.front());
    if (self->groups.size() > 1) self->groups.pop_front();
  }
  gpu_switch(&self->stack_pointer, scheduler);
}
static void arrive_and_wait(Barrier& barrier, int expected) {
  const long present = barrier.passed;
  if (++barrier.arrived == expected) barrier.arrived = 0, barrier.passed++;
  else while (barrier.passed == present) yield();
}
static void sync_warp() {
  const int warp = self->index.x / 32;
  arrive_and_wait(self->block->warps[warp], std::min(32, int(block_size.x) - 32 * warp));
}
static void start() {
  body();
  for (auto& group : self->groups) land(group);
  self->done = true;
  gpu_switch(&self->stack_pointer, scheduler);
}

// One cluster of `count` blocks along x, from block `first`.
static void run_cluster(Index first, int count) {
  const int size = block_size.x;
  cluster_barrier = {};
  for (int b = 0; b < count; b++) {
    Block& block = blocks[b];
    memset(block.shared, 0xff, kShared);
    block.index = {first.x + b, first.y, first.z};
    block.rank = b;
    block.all = {};
    std::fill(block.named, block.named + 16, Barrier{});
    block.warps.assign((size + 31) / 32, {});
    block.lanes.assign(32 * size, 0);
    for (int t = 0; t < size; t++) {
      Fiber& fiber = fibers[b * size + t];
      fiber.block = &block;
      fiber.index = {unsigned(t), 0, 0};
      fiber.done = fiber.in_cluster_barrier = false;
      fiber.groups.clear(), fiber.awaited.clear(), fiber.products.clear();
      // As gpu_switch leaves a stack: six registers, then where to return; there aligned as behind a call.
      auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t(15)) - 1;
      *--top = reinterpret_cast<void*>(start);
      fiber.stack_pointer = top - 6;
    }
  }
  const int threads = count * size;
  int late = 0;
  for (int left = threads, round = 0; left && !failure; round++) {
    const int begin = random_bits() % threads, step = random_bits() % 2 ? 1 : threads - 1;
    if (round % 256 == 0) late = random_bits() % ((threads + 31) / 32);
    if (round > 1000000) failure = "its threads wait for ever";
    for (int n = 0; n < threads; n++) {
      const int at = (begin + long(n) * step) % threads;
      self = &fibers[at];
      if (self->done || (at / 32 == late && round % 256 < 224)) continue;
      gpu_switch(&scheduler, self->stack_pointer);
      left -= self->done;
      if (failure) return;
    }
  }
}
// What went wrong, or null.
static const char* run(Index grid, Index block, unsigned seed, void (*what)()) {
  if (grid.x % CLUSTER) return "the grid is not whole clusters";
  failure = nullptr;
  grid_size = grid, block_size = block, random_state = seed, body = what;
  blocks.resize(CLUSTER);
  for (auto& b : blocks)
    if (!b.shared) b.shared = static_cast<char*>(aligned_alloc(1024, kShared + 1024));
  if (fibers.size() < CLUSTER * block.x) fibers = std::vector<Fiber>(CLUSTER * block.x);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x && !failure; x += CLUSTER) run_cluster({x, y, z}, CLUSTER);
  return failure;
}

// A place in the shared memory of the thread's block.
static char* shared_at(uint32_t address, int bytes) {
  if (address % bytes || address + bytes > kShared) fail("a bad address in shared memory");
  return self->block->shared + address;
}
// An array of the block's: at the end of its shared memory where the size is fixed, else at the beginning.
template <class T>
static T* shared_array(int count = 0) {
  return reinterpret_cast<T*>(self->block->shared + (count ? kShared - count * sizeof(T) : 0));
}
static void check_global(const void* from, int bytes) {
  const auto* p = static_cast<const char*>(from);
  bool inside = readable.empty();
  for (auto& range : readable) inside |= p >= range.first && p + bytes <= range.last;
  if (!inside || reinterpret_cast<uintptr_t>(p) % bytes) fail("a bad address in global memory");
}
static char* lane_buffer(int lane) { return &self->block->lanes[(self->index.x / 32 * 32 + lane) * 32]; }
static int lane() { return self->index.x % 32; }

// The value of another lane. Every lane of the warp calls.
template <class T>
static T exchange(T value, int from) {
  memcpy(lane_buffer(lane()), &value, sizeof value);
  sync_warp();
  memcpy(&value, lane_buffer(from), sizeof value);
  sync_warp();
  return value;
}
template <class T, class Combine>
static T reduce(T value, Combine combine) {
  memcpy(lane_buffer(lane()), &value, sizeof value);
  sync_warp();
  T result, other;
  memcpy(&result, lane_buffer(0), sizeof result);
  for (int i = 1; i < 32; i++) memcpy(&other, lane_buffer(i), sizeof other), result = combine(result, other);
  sync_warp();
  return result;
}
}  // namespace gpu

#define threadIdx (gpu::self->index)
#define blockIdx (gpu::self->block->index)
#define blockDim (gpu::block_size)
#define gridDim (gpu::grid_size)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <class To, class From>
To bits_as(From value) { To bits; static_assert(sizeof bits == sizeof value); memcpy(&bits, &value, sizeof bits); return bits; }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }

inline void __syncthreads() { gpu::arrive_and_wait(gpu::self->block->all, gpu::block_size.x); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return gpu::exchange(value, gpu::lane() ^ mask); }
template <class T> T __shfl_sync(unsigned, T value, int from) { return gpu::exchange(value, from & 31); }
template <class T> T __shfl_up_sync(unsigned, T value, int by) {
  return gpu::exchange(value, gpu::lane() < by ? gpu::lane() : gpu::lane() - by);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return gpu::reduce(value ? 1u << gpu::lane() : 0u, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline unsigned __reduce_add_sync(unsigned, unsigned value) { return gpu::reduce(value, [](unsigned a, unsigned b) { return a + b; }); }
inline unsigned __reduce_max_sync(unsigned, unsigned value) { return gpu::reduce(value, [](unsigned a, unsigned b) { return std::max(a, b); }); }

template <class T> T atomicAdd(T* at, T value) { const T old = *at; *at += value; return old; }
template <class T> T atomicMax(T* at, T value) { const T old = *at; *at = std::max(old, value); return old; }
template <class T> T atomicOr(T* at, T value) { const T old = *at; *at |= value; return old; }
template <class T> T atomicCAS(T* at, T compare, T value) { const T old = *at; if (old == compare) *at = value; return old; }
