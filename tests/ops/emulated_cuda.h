// What TileLang's CUDA of `sparse_mla` uses, for a CPU: a block's threads are fibers that run in random order, some far
// behind, and yield at barriers; asynchronous copies arrive when they are waited for, and until then their places hold NaN.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define CUDART_INF_F INFINITY

namespace emulator {
constexpr size_t kShared = 227 * 1024, kStack = 1 << 17;
constexpr int kThreads = 1024;
struct Range { const char *first, *last; };
struct Copy { char *to; const char *from; int bytes; };
struct Barrier { int arrived = 0; long passed = 0; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool done; };
static std::vector<Fiber> fibers;
static std::vector<Range> readable;
static std::vector<Copy> copies[kThreads];
static ucontext_t scheduler;
static Barrier block_barrier, warp_barriers[kThreads / 32];
static char lanes[kThreads / 32][32][32];
static char *shared = static_cast<char *>(aligned_alloc(1024, kShared + 1024));
static int current, threads;
static unsigned random_state;
static void (*body)();

static void fail(const char *what) { fprintf(stderr, "%s\n", what); abort(); }
static void arrive(Barrier &barrier, int expected) {
  long present = barrier.passed;
  if (++barrier.arrived == expected) { barrier.arrived = 0; barrier.passed++; }
  else while (barrier.passed == present) swapcontext(&fibers[current].context, &scheduler);
}
static void sync_warp() { arrive(warp_barriers[current / 32], 32); }
static void start() { body(); fibers[current].done = true; swapcontext(&fibers[current].context, &scheduler); }
static void run_block() {
  memset(shared, 0xff, kShared);
  fibers.resize(threads);
  for (auto &fiber : fibers) {
    getcontext(&fiber.context);
    fiber.stack.resize(kStack);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.done = false;
    makecontext(&fiber.context, start, 0);
  }
  // For a while one warp lags behind, as far as barriers let the others go.
  int late = 0;
  for (int left = threads, round = 0; left; round++) {
    random_state = random_state * 1664525 + 1013904223;
    int first = (random_state >> 8) % threads, step = (random_state >> 20) & 1 ? 1 : threads - 1;
    if (round % 256 == 0) late = (random_state >> 12) % (threads / 32);
    for (int n = 0; n < threads; n++) {
      current = (first + n * step) % threads;
      if (fibers[current].done || (current / 32 == late && round % 256 < 224)) continue;
      swapcontext(&scheduler, &fibers[current].context);
      left -= fibers[current].done;
    }
  }
}
static void check_shared(const void *at, int bytes) {
  const char *p = static_cast<const char *>(at);
  if (p < shared || p + bytes > shared + kShared || (uintptr_t)p % bytes) fail("bad address in shared memory");
}
static void check_global(const void *at, int bytes) {
  const char *p = static_cast<const char *>(at);
  for (auto &range : readable) if (p >= range.first && p + bytes <= range.last && (uintptr_t)p % bytes == 0) return;
  fail("bad address in global memory");
}
}  // namespace emulator

typedef unsigned char uchar;
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() {}
  explicit bfloat16_t(float value) {
    uint32_t all;
    memcpy(&all, &value, 4);
    bits = std::isnan(value) ? 0x7fff : (all + 0x7fff + ((all >> 16) & 1)) >> 16;
  }
  operator float() const { uint32_t all = (uint32_t)bits << 16; float value; memcpy(&value, &all, 4); return value; }
};
struct fp8_e4_t { uint8_t bits; };
struct fp8_e4_4_t { uint8_t bits[4]; };
struct fp8_e4_8_t { uint8_t bits[8]; };
struct fp8_pair { uint8_t x, y; };
struct uint1 { unsigned x; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct __nv_bfloat162 { bfloat16_t x, y; };
enum { __NV_E4M3 };
static float e4m3(uint8_t bits) {
  int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float value = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return (bits & 127) == 127 ? NAN : bits >> 7 ? -value : value;
}
static float2 __tl_cvt_fp8x2_to_float2(fp8_pair pair, int) { return {e4m3(pair.x), e4m3(pair.y)}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {bfloat16_t(v.x), bfloat16_t(v.y)}; }
static float max(float a, float b) { return a > b ? a : b; }

static struct { int x, y, z; } blockIdx;
static struct { struct { operator int() const { return emulator::current; } } x; } threadIdx;
static void __syncthreads() { emulator::arrive(emulator::block_barrier, emulator::threads); }
static void cudaGridDependencySynchronize() {}
static void cudaTriggerProgrammaticLaunchCompletion() {}

namespace tl {
using emulator::current;
enum class DataType { kBFloat16, kFloat32 };
struct MaxOp { float operator()(float a, float b) { return a > b ? a : b; } };
struct SumOp { float operator()(float a, float b) { return a + b; } };
template <int> struct NamedBarrier {};

template <int N> void cp_async_gs_conditional(const void *to, const void *from, bool exists) {
  emulator::check_shared(to, N);
  if (exists) emulator::check_global(from, N);
  memset((void *)to, 0xff, N);
  emulator::copies[current].push_back({(char *)to, exists ? (const char *)from : nullptr, N});
}
static void cp_async_commit() {}
template <int N> void cp_async_wait() {
  static_assert(N == 0);
  for (auto &copy : emulator::copies[current]) {
    if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
    else memset(copy.to, 0, copy.bytes);
  }
  emulator::copies[current].clear();
}

// Lane 8 i + r gives the address of row r of matrix i.
static void load_matrices(const void *row, int count, bool transposed, void *out) {
  auto &lanes = emulator::lanes[current / 32];
  int lane = current % 32;
  memcpy(lanes[lane], &row, 8);
  emulator::sync_warp();
  for (int i = 0; i < count; i++)
    for (int e = 0; e < 2; e++) {
      int pair = lane % 4 * 2 + e, line = transposed ? pair : lane / 4, column = transposed ? lane / 4 : pair;
      char *address;
      memcpy(&address, lanes[i * 8 + line], 8);
      emulator::check_shared(address, 16);
      memcpy((char *)out + i * 4 + e * 2, address + column * 2, 2);
    }
  emulator::sync_warp();
}
static void ptx_ldmatrix_x2(const void *row, void *out) { load_matrices(row, 2, false, out); }
static void ptx_ldmatrix_x4(const void *row, void *out) { load_matrices(row, 4, false, out); }
static void ptx_ldmatrix_x4_trans(const void *row, void *out) { load_matrices(row, 4, true, out); }

template <DataType, DataType, DataType, int M, int N, int K, bool, bool>
void mma_sync(float *c, const unsigned *a, const unsigned *b) {
  static_assert(M == 16 && N == 8 && K == 16);
  auto &lanes = emulator::lanes[current / 32];
  int lane = current % 32;
  memcpy(lanes[lane], a, 16);
  memcpy(lanes[lane] + 16, b, 8);
  emulator::sync_warp();
  auto value = [&](int of, int word, int half) { bfloat16_t v; memcpy(&v, lanes[of] + word * 4 + half * 2, 2); return (float)v; };
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++)
      c[i] += value(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2) * value(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
  }
  emulator::sync_warp();
}

template <class Op, int threads, int scale, int = 0, class = void, int batch = 1, int stride = 0> struct AllReduce {
  static float run(float x, float *buffer = nullptr) { reduce(&x, buffer, 1); return x; }
  static void run_batch(float *x, float *buffer = nullptr) { reduce(x, buffer, batch); }
  static void reduce(float *x, float *buffer, int count) {
    for (int offset = threads / 2; offset >= scale; offset /= 2) {
      if (offset >= 32) {
        __syncthreads();
        for (int i = 0; i < count; i++) buffer[current + i * stride] = x[i];
        __syncthreads();
        for (int i = 0; i < count; i++) x[i] = Op()(x[i], buffer[(current ^ offset) + i * stride]);
        continue;
      }
      for (int i = 0; i < count; i++) {
        auto &lanes = emulator::lanes[current / 32];
        float other;
        memcpy(lanes[current % 32], &x[i], 4);
        emulator::sync_warp();
        memcpy(&other, lanes[current % 32 ^ offset], 4);
        emulator::sync_warp();
        x[i] = Op()(x[i], other);
      }
    }
  }
};

struct GmmaDescriptor {
  char *start;
  int swizzle, leading, stride;
  GmmaDescriptor operator+(int units) const { auto moved = *this; moved.start += units * 16; return moved; }
};
template <int layout, int leading, int stride, class T> void initialize_wgmma_descriptor(GmmaDescriptor &to, T *start) {
  static_assert(layout == 1);  // 128 bytes
  to = {(char *)start, 7, leading * 16, stride * 16};
}
static void warpgroup_fence_operand(float *, int) {}
static void warpgroup_arrive() {}
static void warpgroup_commit_batch() {}
static void fence_proxy_async() {}
template <int> void warpgroup_wait() {}
static float element(const GmmaDescriptor &of, bool transposed, int row, int k) {
  size_t offset = transposed ? (size_t)row / 64 * of.leading + k / 8 * of.stride + k % 8 * 128 + row % 64 * 2
                             : (size_t)row / 8 * of.stride + row % 8 * 128 + k * 2;
  offset += of.start - emulator::shared;
  offset ^= (offset >> 7 & of.swizzle) << 4;
  emulator::check_shared(emulator::shared + offset, 2);
  bfloat16_t value;
  memcpy(&value, emulator::shared + offset, 2);
  return value;
}
template <DataType, DataType, DataType, int M, int N, int K, bool a_transposed, bool b_transposed, int, int>
void wgmma_ss(GmmaDescriptor a, GmmaDescriptor b, uint32_t *out, int) {
  static_assert(M == 64 && K == 16);
  float *c = (float *)out;
  for (int i = 0; i < N / 2; i++) {
    int row = current % 128 / 32 * 16 + current % 32 / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + current % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) c[i] += element(a, a_transposed, row, k) * element(b, b_transposed, column, k);
  }
}
}  // namespace tl
