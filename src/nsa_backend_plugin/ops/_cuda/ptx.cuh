// The PTX instructions of this package's kernels, one function each. No toolkit header: NVRTC ships none.
#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

#define DEVICE __device__ __forceinline__
#define MINUS_INFINITY __int_as_float(0xFF800000)

DEVICE uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// What the compiler knows of a value.
DEVICE void forget(int& value) { asm volatile("" : "+r"(value)); }

// ---- Copies and barriers ----

// Without a branch, which the compiler would put around an atomic.
DEVICE void increment_if(bool condition, uint32* shared_counter) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; @p red.shared.add.u32 [%0], 1;}" ::"r"(
                   shared_address(shared_counter)), "r"(static_cast<uint32>(condition)) : "memory");
}

DEVICE float load_shared(uint32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// 16 bytes from global to shared memory, asynchronously; zeros, and no read, where `present` is false.
DEVICE void copy_async_16(uint32 to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0)
               : "memory");
}

// 16 bytes that are read once; zeros, and no read, where `present` is false. Stays where it stands among its like.
DEVICE uint4 load_global_16(const void* from, bool present) {
  uint4 value = make_uint4(0, 0, 0, 0);
  if (present)
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from) : "memory");
  return value;
}

DEVICE void barrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// This thread arrives once all its earlier copy_async_16 have landed.
DEVICE void barrier_arrive_after_copies(uint32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

DEVICE void barrier_wait(uint32 barrier, uint32 parity) {
  uint32 done = 0;
  while (!done) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#else
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#endif
  }
}

// ---- Order of kernels ----

// Programmatic dependent launch; without it both do nothing. Nothing of an earlier kernel may be read before the wait.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Thread-block clusters, from sm_90 on ----

// Of a kernel whose source is compiled with CLUSTER, the blocks of a cluster.
#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif

DEVICE uint32 block_of_cluster() {
  uint32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// The same place in the shared memory of another block of the cluster.
template <class T>
DEVICE T* in_block(T* local, uint32 rank) {
  T* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
  return remote;
}

// As in_block; the block's own where there is no cluster.
template <class T>
DEVICE T* of_rank(T* local, uint32 rank) {
#if CLUSTER > 1
  return in_block(local, rank);
#else
  return local;
#endif
}

// ---- Matrix fragments ----

// Four 8x8 matrices of 16-bit elements; lanes 8m..8m+7 give the row addresses of matrix m.
DEVICE void load_matrices(uint32 (&fragment)[4], uint32 row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(row_address) : "memory");
}

DEVICE void load_matrices_transposed(uint32 (&fragment)[4], uint32 row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(row_address) : "memory");
}

// c[16x8] += a[16x16] b[16x8], f32 accumulators.
DEVICE void mma_f16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_bf16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Number formats; "x2" packs the lower-indexed value into the lower half ----

// Four e4m3 bytes to two f16x2, exactly: bytes 0 and 1, bytes 2 and 3.
DEVICE void e4m3x4_to_f16(uint32 bytes, uint32& low, uint32& high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}"
      : "=r"(low), "=r"(high) : "r"(bytes));
}

// Four floats to e4m3 bytes, saturated, rounded to nearest even. From sm_89 on.
DEVICE uint32 pack_e4m3x4(float x0, float x1, float x2, float x3) {
  uint32 packed;
  asm("{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1; cvt.rn.satfinite.e4m3x2.f32 h, %4, %3; mov.b32 %0, {l, h};}"
      : "=r"(packed) : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return packed;
}

DEVICE uint32 pack_f16x2(float low, float high) {
  uint32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE uint32 pack_bf16x2(float low, float high) {
  uint32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE uint32 multiply_f16x2(uint32 a, uint32 b) {
  uint32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

DEVICE float bf16_low(uint32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(uint32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// The larger magnitude of each half; a NaN only where both are.
DEVICE uint32 larger_magnitude_bf16x2(uint32 a, uint32 b) {
  uint32 larger;
  asm("{.reg .b32 x, y; abs.bf16x2 x, %1; abs.bf16x2 y, %2; max.bf16x2 %0, x, y;}" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Largest power of two not above x, for x in [2^-100, 2^120]; values outside are clamped into that range.
DEVICE float power_of_two_below(float x) {
  x = fminf(fmaxf(x, 0x1p-100f), 0x1p120f);
  return __uint_as_float(__float_as_uint(x) & 0x7F800000u);
}

// 1 / p, exactly, for a power of two p of that range.
DEVICE float inverse_power_of_two(float p) { return __uint_as_float((254u << 23) - __float_as_uint(p)); }
