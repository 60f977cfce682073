// What TileLang's CUDA of `sparse_mla` uses, on emulated threads.
#pragma once
#include "ptx.h"

#define CUDART_INF_F INFINITY
enum { __NV_E4M3 };

using uchar = unsigned char;
using __nv_fp8x2_storage_t = uint16;
struct bfloat16_t {
  uint16 bits;
  bfloat16_t() {}
  explicit bfloat16_t(float value) : bits(to_bf16(value)) {}
  operator float() const { return bf16(bits); }
};
struct __nv_bfloat162 { bfloat16_t x, y; };
struct fp8_e4_t { uint8 bits; };
struct fp8_e4_4_t { uint8 bits[4]; };
struct fp8_e4_8_t { uint8 bits[8]; };
struct uint1 { unsigned x; };
inline float2 __tl_cvt_fp8x2_to_float2(uint16 pair, int) { return {e4m3(uint8(pair)), e4m3(uint8(pair >> 8))}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {bfloat16_t(v.x), bfloat16_t(v.y)}; }

inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

namespace tl {
enum class DataType { kBFloat16, kFloat32 };
struct MaxOp { float operator()(float a, float b) { return max(a, b); } };
struct SumOp { float operator()(float a, float b) { return a + b; } };
template <int> struct NamedBarrier {};

template <int N> void cp_async_gs_conditional(const void* to, const void* from, bool exists) {
  add_copy(gpu::self->awaited, __cvta_generic_to_shared(to), from, N, exists);
}
inline void cp_async_commit() {}
template <int N> void cp_async_wait() {
  static_assert(N == 0, "for all");
  gpu::land(gpu::self->awaited);
}

inline void load(int matrices, const void* row, void* out, bool transposed) {
  load_rows(static_cast<uint32*>(out), matrices, __cvta_generic_to_shared(row), transposed);
}
inline void ptx_ldmatrix_x2(const void* row, void* out) { load(2, row, out, false); }
inline void ptx_ldmatrix_x4(const void* row, void* out) { load(4, row, out, false); }
inline void ptx_ldmatrix_x4_trans(const void* row, void* out) { load(4, row, out, true); }

template <DataType A, DataType B, DataType, int M, int N, int K, bool, bool>
void mma_sync(float* c, const unsigned* a, const unsigned* b) {
  static_assert(A == DataType::kBFloat16 && B == A && M == 16 && N == 8 && K == 16);
  mma_bf16(*reinterpret_cast<float(*)[4]>(c), *reinterpret_cast<const uint32(*)[4]>(a), b[0], b[1]);
}

template <class Op, int threads, int scale, int = 0, class = void, int batch = 1, int stride = 0> struct AllReduce {
  static float run(float x, float* buffer = nullptr) { reduce(&x, buffer, 1); return x; }
  static void run_batch(float* x, float* buffer = nullptr) { reduce(x, buffer, batch); }
  static void reduce(float* x, float* buffer, int count) {
    for (int offset = threads / 2; offset >= scale; offset /= 2) {
      if (offset < 32) {
        for (int i = 0; i < count; i++) x[i] = Op()(x[i], __shfl_xor_sync(~0u, x[i], offset));
        continue;
      }
      __syncthreads();
      for (int i = 0; i < count; i++) buffer[threadIdx.x + i * stride] = x[i];
      __syncthreads();
      for (int i = 0; i < count; i++) x[i] = Op()(x[i], buffer[(threadIdx.x ^ offset) + i * stride]);
    }
  }
};

using GmmaDescriptor = uint64;
template <uint64 layout, uint64 leading, uint64 stride, class T> void initialize_wgmma_descriptor(uint64& to, T* start) {
  to = layout << 62 | stride << 32 | leading << 16 | __cvta_generic_to_shared(start) >> 4;
}
inline void warpgroup_fence_operand(float*, int) {}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() {}
inline void fence_proxy_async() {}
template <int N> void warpgroup_wait() {
  static_assert(N == 0, "for all");
  finish_products();
}
template <DataType A, DataType B, DataType, int M, int N, int K, bool a_transposed, bool b_transposed, int, int>
void wgmma_ss(uint64 a, uint64 b, uint32_t* d, int accumulate) {
  static_assert(A == DataType::kBFloat16 && B == A && M == 64 && K == 16 && !a_transposed);
  begin_product({a, b, N, false, b_transposed, accumulate != 0, reinterpret_cast<float*>(d), 0});
}
}  // namespace tl
