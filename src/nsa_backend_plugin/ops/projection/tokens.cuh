// What both projections do to a lane's share of a token before it is multiplied. Defines: NORM.
#pragma once

#include "ptx.cuh"

// With a norm the scales are those of tokens before it, which may be small; its result is not.
constexpr float FP8_MAX = 448.0f, MIN_AMAX = NORM ? 1e-30f : 1e-4f;

DEVICE uint32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A pair of values times the norm's weights; squares: of the values before, added up.
DEVICE uint32 weighted(uint32 pair, uint32 gain, float& squares) {
  const float low = bf16_low(pair), high = bf16_high(pair);
  squares += low * low + high * high;
  return pack_bf16x2(low * bf16_low(gain), high * bf16_high(gain));
}

// The largest magnitude of the 128 values that 8 lanes have, 8 pairs each, or the least that a scale is made of.
DEVICE float amax_of_lanes(const uint32* pairs) {
  uint32 largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = larger_magnitude_bf16x2(largest, pairs[i]);
#pragma unroll
  for (int apart = 1; apart < 8; apart *= 2)
    largest = larger_magnitude_bf16x2(largest, __shfl_xor_sync(~0u, largest, apart));
  return fmaxf(fmaxf(bf16_low(largest), bf16_high(largest)), MIN_AMAX);
}

// Four values to e4m3.
DEVICE uint32 quantized(uint32 low, uint32 high, float factor) {
  return pack_e4m3x4(bf16_low(low) * factor, bf16_high(low) * factor, bf16_low(high) * factor, bf16_high(high) * factor);
}
