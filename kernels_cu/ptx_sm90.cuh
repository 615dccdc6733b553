// One named function for each PTX instruction of Hopper (sm_90a) that forward_sm90.cu uses.
#pragma once
#include "ptx.cuh"

// A TMA descriptor, made on the host: lightning_cupy/_tensor_map.py.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// PTX 9.7.13.15: barriers in shared memory that count arrivals and bytes of bulk copies.
__device__ __forceinline__ void mbarrier_init(uint64_t& barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(num_arrivals) : "memory");
}

// Initialised barriers become visible to the copy engine; threads still need a barrier of their own.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t& barrier, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(num_bytes)
               : "memory");
}

// Until the phase of that parity is over.
__device__ __forceinline__ void mbarrier_wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// PTX 9.7.13.4, 9.7.13.15.13: the blocks of a cluster, and barriers of one by its rank.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ uint32_t shared_address_of(uint32_t rank, const void* pointer) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t rank, uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(shared_address_of(rank, &barrier))
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx_at(uint32_t rank, uint64_t& barrier, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(shared_address_of(rank, &barrier)),
               "r"(num_bytes)
               : "memory");
}

// PTX 9.7.9.25.5.1: bytes to the same place in another block, whose `barrier` counts them.
__device__ __forceinline__ void copy_to(uint32_t rank, const void* shared, uint32_t num_bytes, uint64_t& barrier) {
  uint32_t target = shared_address_of(rank, shared), full = shared_address_of(rank, &barrier);
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   target),
               "r"(shared_address(shared)), "r"(num_bytes), "r"(full)
               : "memory");
}

// PTX 9.7.13.14: true for one lane of the warp, all of which wait for each other here; which is quicker than to ask for
// the thread's number.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred is_elected;\n"
      "elect.sync _|is_elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, is_elected;\n"
      "}"
      : "=r"(elected)
      :
      : "memory");
  return elected != 0;
}

// PTX 9.7.13.1: a barrier of some warps; ids from 1, since 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// PTX 9.7.19.5: registers of this warpgroup.
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// PTX 9.7.9.27.1.2: a box to shared memory, whose bytes `barrier` counts; zeros where it leaves the tensor.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, uint64_t& barrier, int dim, int token,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(dim), "r"(token), "r"(head), "r"(batch), "r"(shared_address(&barrier))
      : "memory");
}

// The same to as many blocks of a cluster, the first of it, at the same place in each; each has its own barrier there.
template <int kNumBlocks>
__device__ __forceinline__ void tma_load_to_cluster(void* shared, const TensorMap& map, uint64_t& barrier, int dim,
                                                    int token, int head, int batch) {
  if constexpr (kNumBlocks == 1) return tma_load(shared, map, barrier, dim, token, head, batch);
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(dim), "r"(token), "r"(head), "r"(batch), "r"(shared_address(&barrier)),
      "h"(static_cast<unsigned short>((1 << kNumBlocks) - 1))
      : "memory");
}

// The other way; what leaves the tensor is not written.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int dim, int token, int head,
                                          int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(dim), "r"(token), "r"(head), "r"(batch)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last kPending groups of stores have read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// This thread's ordinary writes to shared memory become visible to the tensor cores and the copy engine.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// PTX 9.7.14.5.16: four 8x8 matrices of 16-bit elements, lane l gives elements (l/4, 2(l%4) + {0, 1}) of each.
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}
// The same, transposed: lane l gives elements (2(l%4) + {0, 1}, l/4).
__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// PTX 9.7.15.5.1: describes tiles of 64 rows of 128 bytes, swizzled by 128 bytes, as TMA writes them; one behind the
// other for transposed operands wider than 64. To the next 16 columns it is 32 bytes, to the next 16 rows 2048.
constexpr uint32_t kSwizzle128 = 1u << 30, kEightRows = 1024 >> 4, kNextTile = 8192 >> 4;
__device__ __forceinline__ uint32_t lower_half_of_descriptor(const void* tile) {
  // In a cluster the upper bits of an address are the block's rank.
  return (shared_address(tile) >> 4 & 0x3fff) | kNextTile << 16;
}
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile, int offset_bytes) {
  return uint64_t(kSwizzle128 | kEightRows) << 32 | (lower_half_of_descriptor(tile) + (offset_bytes >> 4));
}

// The same, for several offsets of a tile: fewer instructions, but more registers.
__device__ __forceinline__ uint64_t wgmma_descriptor_in_32_bits(const void* tile, int offset_bytes) {
  uint32_t first = lower_half_of_descriptor(tile);
  asm("" : "+r"(first));  // or what follows would be done in 64
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(first + (offset_bytes >> 4)), "r"(kSwizzle128 | kEightRows));
  return descriptor;
}

// Of a tile that is the same 8 rows over and over.
__device__ __forceinline__ uint64_t wgmma_descriptor_of_rows(const void* rows) {
  return uint64_t(kSwizzle128) << 32 | (shared_address(rows) >> 4 & 0x3fff);
}

// PTX 9.7.15.7: before the first wgmma, and after registers of one have been touched otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// PTX 9.7.15.5.2: d[64, N] = accumulate * d + a[64, 16] b[16, N], float accumulators. An operand in shared memory is
// K-major when the 16 is contiguous, transposed when the 64 or N is. One in registers: of warp w, lane l holds
// (16 w + l/4 + {0, 8}, 2(l%4) + {0, 1} + {0, 8}).
#define WGMMA_NAMES_0                                                                                                 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"            \
  "%28,%29,%30,%31"
#define WGMMA_OPERANDS_0                                                                                              \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),                     \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),               \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),             \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WGMMA_NAMES_1                                                                                                 \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"          \
  "%58,%59,%60,%61,%62,%63"
#define WGMMA_OPERANDS_1                                                                                              \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),             \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),             \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),             \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
template <bool kBfloat16, bool kTransA, bool kTransB>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (kBfloat16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_NAMES_0
                 "}, %32, %33, p, 1, 1, %35, %36;}"
                 : WGMMA_OPERANDS_0
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(kTransA)), "n"(int(kTransB)));
  } else {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" WGMMA_NAMES_0 "}, %32, %33, p, 1, 1, %35, %36;}"
                 : WGMMA_OPERANDS_0
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(kTransA)), "n"(int(kTransB)));
  }
}

template <bool kBfloat16>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  if constexpr (kBfloat16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_NAMES_0
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
                 : WGMMA_OPERANDS_0
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  } else {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" WGMMA_NAMES_0
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
                 : WGMMA_OPERANDS_0
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
}

// d += a b, d -= a b, or d = a b; b transposed, N from the size of d.
enum Sum { kAdd, kSubtract, kSet };
#define WGMMA_TRANSPOSED(kSize, kN, kA, kB, kD, kSign, ...)                                                           \
  template <bool kBfloat16, Sum kSum = kAdd>                                                                          \
  __device__ __forceinline__ void wgmma_transposed(float (&d)[kSize], const uint32_t (&a)[4], uint64_t b) {           \
    if constexpr (kBfloat16) {                                                                                        \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" kN "k16.f32.bf16.bf16 {" WGMMA_NAMES_##kSize "}, " kA ", " kB  \
                   ", " kD ", " kSign ", 1, 1;"                                                                       \
                   : __VA_ARGS__                                                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kSum != kSet),                           \
                     "n"(kSum == kSubtract ? -1 : 1));                                                                \
    } else {                                                                                                          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" kN "k16.f32.f16.f16 {" WGMMA_NAMES_##kSize "}, " kA ", " kB    \
                   ", " kD ", " kSign ", 1, 1;"                                                                       \
                   : __VA_ARGS__                                                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kSum != kSet),                           \
                     "n"(kSum == kSubtract ? -1 : 1));                                                                \
    }                                                                                                                 \
  }
#define WGMMA_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_OPERANDS_16                                                                                             \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),                     \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WGMMA_NAMES_32 WGMMA_NAMES_0
#define WGMMA_NAMES_64 WGMMA_NAMES_0 "," WGMMA_NAMES_1
WGMMA_TRANSPOSED(16, "32", "{%16, %17, %18, %19}", "%20", "%21", "%22", WGMMA_OPERANDS_16)
WGMMA_TRANSPOSED(32, "64", "{%32, %33, %34, %35}", "%36", "%37", "%38", WGMMA_OPERANDS_0)
WGMMA_TRANSPOSED(64, "128", "{%64, %65, %66, %67}", "%68", "%69", "%70", WGMMA_OPERANDS_0, WGMMA_OPERANDS_1)

// PTX 9.7.4: pairs of 16-bit numbers, rounded to nearest.
template <bool kBfloat16>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t x, uint32_t y) {
  uint32_t product;
  if constexpr (kBfloat16) {
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
  }
  return product;
}
// x y + z, rounded once.
template <bool kBfloat16>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t sum;
  if constexpr (kBfloat16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
  }
  return sum;
}
__device__ __forceinline__ uint32_t negate_pairs(uint32_t x) { return x ^ 0x80008000u; }
__device__ __forceinline__ uint32_t largest_of_half_pairs(uint32_t x, uint32_t y) {
  uint32_t largest;
  asm("max.f16x2 %0, %1, %2;" : "=r"(largest) : "r"(x), "r"(y));
  return largest;
}

// PTX 9.7.13.4: flags in global memory that blocks tell each other their progress by.
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// PTX 9.7.9.8: past the L1 cache, which does not see what other blocks write; a float, two, or four.
__device__ __forceinline__ void load_l2(float (&x)[1], const float* pointer) {
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x[0]) : "l"(pointer) : "memory");
}
__device__ __forceinline__ void load_l2(float (&x)[2], const float* pointer) {
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "l"(pointer) : "memory");
}
__device__ __forceinline__ void load_l2(float (&x)[4], const float* pointer) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "l"(pointer)
               : "memory");
}
__device__ __forceinline__ void store_l2(float* pointer, const float (&x)[1]) {
  asm volatile("st.global.cg.f32 [%0], %1;" ::"l"(pointer), "f"(x[0]) : "memory");
}
__device__ __forceinline__ void store_l2(float* pointer, const float (&x)[2]) {
  asm volatile("st.global.cg.v2.f32 [%0], {%1, %2};" ::"l"(pointer), "f"(x[0]), "f"(x[1]) : "memory");
}
__device__ __forceinline__ void store_l2(float* pointer, const float (&x)[4]) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
