// Hopper's warpgroup matrix instruction (sm_90a).
#pragma once

#include "ptx.cuh"

// What a thread has written to shared memory, or seen written, is seen by the instruction.
DEVICE void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The 128 threads of a warpgroup of the block.
DEVICE void warpgroup_barrier(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// Rows of 128 bytes behind each other, at a multiple of 1024, the 16 bytes at c of row r stored at c ^ r % 8. 32 bytes
// further along the rows is 2 more.
DEVICE uint64 swizzled_matrix(uint32 address) {
  constexpr uint64 SWIZZLED_BY_128 = 1ull << 62, EIGHT_ROWS = 1024 >> 4;
  return SWIZZLED_BY_128 | EIGHT_ROWS << 32 | 1ull << 16 | (address & 0x3FFFF) >> 4;
}

DEVICE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until the products are in d.
template <int COUNT>
DEVICE void warpgroup_wait(float (&d)[COUNT]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d[64xN] (+)= a[64 x 32 bytes] b[N x 32 bytes]^T, f32 accumulators: a thread's element 4j + 2u + v is in row
// 16 warp + g + 8u and column 8j + 2t + v, with lane = 4g + t.
DEVICE void warpgroup_mma_e4m3(float (&d)[8], uint64 a, uint64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, "
      "%8, %9, p, 1, 1;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
DEVICE void warpgroup_mma_bf16(float (&d)[8], uint64 a, uint64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, "
      "%8, %9, p, 1, 1, 0, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
DEVICE void warpgroup_mma_e4m3(float (&d)[16], uint64 a, uint64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p, 1, 1;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
DEVICE void warpgroup_mma_bf16(float (&d)[16], uint64 a, uint64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p, 1, 1, 0, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
