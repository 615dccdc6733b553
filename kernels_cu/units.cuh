// Powers of two that bring operands of float16, which has little range, into it: exactly.
#pragma once

constexpr float kFloatMax = 3.402823466e+38f;

// 2^14 to 2^15 is where the largest number of a float16 operand is put; `exponent` is a biased float exponent.
__device__ __forceinline__ float to_unit(int exponent) { return __uint_as_float((268 - exponent) << 23); }
__device__ __forceinline__ float from_unit(int exponent) { return __uint_as_float((exponent - 14) << 23); }
__device__ __forceinline__ int exponent_of(float x) { return __float_as_uint(x) >> 23 & 0xff; }
// Units stay above 2^-54, so that dividing by them overflows for numbers beyond 2^74 only; that of zeros is 1.
__device__ __forceinline__ int unit_exponent(float largest) {
  return largest == 0 ? 141 : max(exponent_of(largest), 87);
}
// An infinity or NaN is no reason to lose all else.
__device__ __forceinline__ float finite_size(float x) { return fabsf(x) <= kFloatMax ? fabsf(x) : 0; }

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}
