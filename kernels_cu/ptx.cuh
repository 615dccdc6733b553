// One named function for each PTX instruction, and the conversions between float and 16-bit bits.
// AMPERE=0 (sm_75) has no cp.async, no bfloat16 on tensor cores and half the depth in one mma: the functions
// below hide the depth; what calls them decides about bfloat16.
#pragma once

using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;

constexpr bool kAmpere = AMPERE;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// PTX 9.7.9.25: 16 bytes to shared memory without registers; zeros instead when !valid, and nothing is read then.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
#if AMPERE
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  uint4 bytes = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(bytes.x), "r"(bytes.y), "r"(bytes.z),
               "r"(bytes.w)
               : "memory");
#endif
}

// All that this thread has asked for has arrived; other threads see it after a barrier.
__device__ __forceinline__ void cp_async_wait_all() {
#if AMPERE
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// PTX 9.7.14.5: four 8x8 matrices of 16-bit elements; lane l holds elements (l/4, 2(l%4) + {0, 1}) of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed: lane l holds elements (2(l%4) + {0, 1}, l/4).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// PTX 9.7.14.4: c[16, 8] += a[16, 16] b[16, 8] with float accumulators; operands bfloat16 or float16.
template <bool kBfloat16>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if AMPERE
  if constexpr (kBfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  static_assert(!kBfloat16, "sm_75 has no bfloat16 mma");
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// PTX 9.7.9.22: two floats rounded to the nearest 16-bit ones, the first in the low half.
template <bool kBfloat16>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
#if AMPERE
  if constexpr (kBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
#else
  if constexpr (kBfloat16) {
    auto round = [](float x) -> uint32_t {
      uint32_t bits = __float_as_uint(x);
      if (x != x) return 0x7fff;
      return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    };
    packed = round(low) | round(high) << 16;
  } else {
    asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
        : "=r"(packed)
        : "f"(low), "f"(high));
  }
#endif
  return packed;
}

template <bool kBfloat16>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  float2 pair;
  if constexpr (kBfloat16) {
    pair.x = __uint_as_float(packed << 16);
    pair.y = __uint_as_float(packed & 0xffff0000u);
  } else {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(packed));
  }
  return pair;
}

// No instruction: hides where a value came from, so that nothing computed from it is moved ahead, or itself behind.
__device__ __forceinline__ void forget_origin(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void forget_origin(uint32_t& x) { asm volatile("" : "+r"(x)); }
