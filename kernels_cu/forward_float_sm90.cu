// Forward for float32 on Hopper's tensor cores, at the accuracy of float32. For each chunk of 64 tokens, transposed:
//
//   P  = scale (q kT) * decay^(i-j) below the diagonal             by the scores warpgroup, to shared memory
//   oT = scale decay^(i+1) (ST qT) + vT PT                         64 columns of v a warpgroup
//   ST = decay^64 ST + (decay^(63-j) vT) k
//
// Every operand is a sum of two float16 numbers, high + low: 22 bits. Of the four products three are taken,
// high low + low high + high high, in this order: tensor cores cut the bits off that a float accumulator cannot hold
// (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"), always towards zero, and cut little while a sum is
// small. For that reason no sum lives longer than a chunk: ST is in registers too, and what a chunk adds to it is a
// fresh sum, added with ordinary multiply-adds. (Left in the accumulators, 16384 tokens without decay would be
// wrong by 1e-5 to 1e-4.) The decay of a chunk is a sum of two numbers, as in forward_float.cu.
//
// float16 has little range, so that operands are in units, powers of two that put the largest number of a row
// between 2^14 and 2^15: rows of q and k (a token), of P (a token of q), of vT, decayed vT and ST (a column of v).
// Numbers below 2^-18 of the largest of their row begin to lose bits; below 2^-40 they are zeros.
//
// A block walks one (batch, head, 64 V_GROUPS columns of v), a row, from the first token to the last. It is a producer
// warpgroup (one warp's thread feeds q and k, one v, one for each group stores), the scores warpgroup, and V_GROUPS
// warpgroups for the state and outputs. They meet at mbarriers only. Floats of q and k are replaced in place: two boxes
// of 32 columns of floats are as large as high and low of 64. Those of v become left operands in registers; their
// place then takes the outputs on the way to memory. With REVERSED=1 from the last token to the first, as forward.cuh
// has it. All of this is one pipeline, and so in one file. Constants come as
// -D from lightning_cupy/forward_sm90.py.
#include "forward_sm90.cuh"

constexpr int kQkDim = QK_DIM, kGroups = V_GROUPS, kStages = STAGES, kPBuffers = P_BUFFERS;
constexpr int kChunk = 64, kQkBlocks = kQkDim / 64, kThreads = 128 * (2 + kGroups);
constexpr int kProducerRegisters = 24, kScoresRegisters = kGroups == 1 ? 160 : 88;
constexpr int kGroupRegisters = kGroups == 1 ? 256 : 200;
static_assert(kQkDim % 64 == 0 && 128 * (kScoresRegisters + kProducerRegisters + kGroups * kGroupRegisters) <= 65536,
              "one swizzled block is 64 columns; an SM has 65536 registers");

// What registers have room for: columns of ST, 16 a step, that become operands at once; blocks of 64 columns of what is
// added to ST; outputs of the chunk meanwhile, or they are parked in shared memory.
constexpr int kLengths = kReversed ? 2 : 1;  // of chunks, for outputs
constexpr int kOperandSteps = kQkDim <= 128 ? kQkDim / 16 : 4;
constexpr int kUpdatesAtOnce = kQkDim <= 64 * (3 - kGroups) ? 2 : 1;
constexpr bool kParksInter = kQkDim > 128;

struct Shared {
  // Boxes of 32 columns of floats; of q and k then the blocks of 64 columns of high, behind them those of low.
  alignas(1024) Tile q[kStages][2 * kQkBlocks], k[kStages][2 * kQkBlocks];
  Tile v[kStages][kGroups][2];  // then o
  Tile p[kPBuffers][2];         // high, low
  // Outputs of a chunk from the state, parked: four registers of a thread.
  float4 inter[kParksInter ? kGroups : 1][kParksInter ? 8 : 1][kParksInter ? 128 : 1];
  // Of the tokens of a stage: what one in q and k stands for; scale decay^(i+1) times that of q; the largest power of
  // two in k, times decay^(num_tokens-1-j).
  float q_unit[kStages][kChunk], k_unit[kStages][kChunk], o_weight[kStages][kChunk], v_weight[kStages][kChunk];
  float p_unit[kPBuffers][kChunk];
  float score_decay[2 * kChunk];    // [63 + i - j], scale decay^(i-j), or 0 above the diagonal
  float o_decay[kLengths][kChunk];  // scale decay^(i+1); REVERSED: decay^(num_tokens-1-i), and v's is scale decay^(j+1)
  float v_decay[2][kChunk];         // decay^(num_tokens-1-j) of a whole chunk, and of the last
  float2 state_decay[2];          // decay^num_tokens likewise, high and low
  // Of a stage: floats have arrived; q and k are in units; q and k have been used; v's place has o, or is free.
  uint64_t qk_full[kStages], v_full[kStages], qk_ready[kStages], qk_empty[kStages];
  uint64_t o_full[kStages][kGroups], v_empty[kStages];
  uint64_t p_full[kPBuffers], p_empty[kPBuffers];
};
static_assert(sizeof(Shared) + 1024 <= SMEM_BYTES, "forward_sm90.py: smem_bytes is smaller than Shared");

// Where TMA and wgmma put the 16 bytes `vector` of a row.
__device__ __forceinline__ unsigned char* swizzled(Tile& tile, int row, int vector) {
  return reinterpret_cast<unsigned char*>(&tile[row][(vector ^ row % 8) * 8]);
}

// What a block computes.
struct Row {
  int batch_idx, head_idx, first_v, num_chunks;

  __device__ __forceinline__ int token(int chunk) const {
    return (kReversed ? num_chunks - 1 - chunk : chunk) * kChunk;
  }
  // Whether a chunk has the end of the sequence, so may be shorter.
  __device__ __forceinline__ bool has_end(int chunk) const { return chunk == (kReversed ? 0 : num_chunks - 1); }

  __device__ __forceinline__ explicit Row(const HopperArgs& args) {
    int head = blockIdx.x / args.num_v_blocks;
    first_v = (blockIdx.x - head * args.num_v_blocks) * kGroups * 64;
    batch_idx = head / args.num_heads;
    head_idx = head - batch_idx * args.num_heads;
    num_chunks = (args.seqlen + kChunk - 1) / kChunk;
  }
};

// Stages or buffers in the order in which all warpgroups go through them, and the parity of the next wait for each.
template <int kSize>
struct Ring {
  int idx = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    idx = idx + 1 == kSize ? 0 : idx + 1;
    if (idx == 0) parity ^= 1;
  }
};

// Units of a row whose largest number has this biased exponent: it is put between 2^14 and 2^15. No smaller than
// 2^-112, so that one more operand's 2^-14 can be applied to them.
__device__ __forceinline__ int unit_exponent(float largest) { return max(__float_as_uint(largest) >> 23, 29u); }
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(exponent << 23); }
__device__ __forceinline__ float to_unit(int exponent) { return power_of_two(268 - exponent); }
__device__ __forceinline__ float from_unit(int exponent) { return power_of_two(exponent - 14); }

// The largest of kLanes neighbouring lanes, which hold one row.
template <int kLanes>
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// `high + low` is the pair to 22 bits.
__device__ __forceinline__ void split(uint32_t& high, uint32_t& low, float x, float y) {
  high = pack<false>(x, y);
  float2 rounded = unpack<false>(high);
  low = pack<false>(x - rounded.x, y - rounded.y);
}

__device__ __forceinline__ void load_qk(Shared& shared, const HopperArgs& args, const Row& row) {
  prefetch_tensor_map(args.q);
  prefetch_tensor_map(args.k);
  Ring<kStages> ring;
#pragma unroll 1
  for (int chunk = 0; chunk < row.num_chunks; chunk++, ring.advance()) {
    uint64_t& full = shared.qk_full[ring.idx];
    mbarrier_wait(shared.qk_empty[ring.idx], ring.parity ^ 1);
    mbarrier_arrive_expect_tx(full, 4 * kQkBlocks * kTileBytes);
#pragma unroll
    for (int box = 0; box < 2 * kQkBlocks; box++) {
      tma_load(shared.q[ring.idx][box], args.q, full, box * 32, row.token(chunk), row.head_idx, row.batch_idx);
      tma_load(shared.k[ring.idx][box], args.k, full, box * 32, row.token(chunk), row.head_idx, row.batch_idx);
    }
  }
}

__device__ __forceinline__ void load_v(Shared& shared, const HopperArgs& args, const Row& row) {
  prefetch_tensor_map(args.v);
  Ring<kStages> ring;
#pragma unroll 1
  for (int chunk = 0; chunk < row.num_chunks; chunk++, ring.advance()) {
    uint64_t& full = shared.v_full[ring.idx];
    mbarrier_wait(shared.v_empty[ring.idx], ring.parity ^ 1);
    mbarrier_arrive_expect_tx(full, 2 * kGroups * kTileBytes);
#pragma unroll
    for (int box = 0; box < 2 * kGroups; box++) {
      tma_load(shared.v[ring.idx][box / 2][box % 2], args.v, full, row.first_v + box * 32, row.token(chunk),
               row.head_idx, row.batch_idx);
    }
  }
}

// Stores the outputs of a group.
__device__ __forceinline__ void store(Shared& shared, const HopperArgs& args, const Row& row, int group) {
  prefetch_tensor_map(args.o);
  Ring<kStages> ring;
#pragma unroll 1
  for (int chunk = 0; chunk < row.num_chunks; chunk++, ring.advance()) {
    mbarrier_wait(shared.o_full[ring.idx][group], ring.parity);
#pragma unroll
    for (int box = 0; box < 2; box++) {
      tma_store(args.o, shared.v[ring.idx][group][box], row.first_v + (group * 2 + box) * 32, row.token(chunk),
                row.head_idx, row.batch_idx);
    }
    tma_store_commit();
    tma_store_wait_read<0>();
    mbarrier_arrive(shared.v_empty[ring.idx]);
  }
}

// By all threads, before they part.
__device__ __forceinline__ void set_decay(Shared& shared, const HopperArgs& args, double slope) {
  // NOTE: no infinity, which would make NaN of zeros: tokens behind the end, a state that is still empty.
  auto power = [&](double factor, int exponent) {
    constexpr double kLargest = 3.4028234663852886e38;
    double x = factor * exp(-slope * exponent);
    return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
  };
  int num_last = (args.seqlen - 1) % kChunk + 1;
  for (int idx = threadIdx.x; idx < 2 * kChunk; idx += kThreads) {
    int distance = (idx - (kChunk - 1)) * (kReversed ? -1 : 1), which = idx / kChunk, token = idx % kChunk;
    int num_tokens = which == 0 ? kChunk : num_last;
    shared.score_decay[idx] = distance >= 0 ? static_cast<float>(power(args.scale, distance)) : 0;
    double v_decay = kReversed ? power(args.scale, token + 1) : power(1, max(num_tokens - 1 - token, 0));
    double o_decay = kReversed ? power(1, max(num_tokens - 1 - token, 0)) : power(args.scale, token + 1);
    shared.v_decay[which][token] = static_cast<float>(v_decay);
    if (which < kLengths) shared.o_decay[which][token] = static_cast<float>(o_decay);
    if (token == 0) {
      double decay = power(1, num_tokens);
      float high = static_cast<float>(decay);
      shared.state_decay[which] = {high, static_cast<float>(decay - high)};
    }
  }
}

// What a lane has of four rows, eight lanes each: four columns of each box. Lanes 0-15 have rows r and r + 4, so that
// their 8 bytes of high or low, half a row each, lie in different banks.
struct RowPart {
  float x[2 * kQkBlocks][4];

  __device__ __forceinline__ RowPart(Tile (&boxes)[2 * kQkBlocks], int row, int column) {
#pragma unroll
    for (int box = 0; box < 2 * kQkBlocks; box++) {
      float4 four = *reinterpret_cast<const float4*>(swizzled(boxes[box], row, column));
      x[box][0] = four.x, x[box][1] = four.y, x[box][2] = four.z, x[box][3] = four.w;
    }
  }

  __device__ __forceinline__ int exponent() const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 8 * kQkBlocks; i++) largest = fmaxf(largest, fabsf(x[i / 4][i % 4]));
    return unit_exponent(row_max<8>(largest));
  }

  __device__ __forceinline__ void store(Tile (&blocks)[2 * kQkBlocks], int row, int column, float unit) const {
#pragma unroll
    for (int box = 0; box < 2 * kQkBlocks; box++) {
      uint2 high, low;
      split(high.x, low.x, x[box][0] * unit, x[box][1] * unit);
      split(high.y, low.y, x[box][2] * unit, x[box][3] * unit);
      int vector = box % 2 * 4 + column / 2, byte = column % 2 * 8;
      *reinterpret_cast<uint2*>(swizzled(blocks[box / 2], row, vector) + byte) = high;
      *reinterpret_cast<uint2*>(swizzled(blocks[kQkBlocks + box / 2], row, vector) + byte) = low;
    }
  }
};

// This warp's 16 rows of q and k, floats so far, are put in units.
__device__ __forceinline__ void convert(Shared& shared, int stage, int which) {
  int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, column = lane % 8;
  int first_row = warp * 16 + lane / 16 + lane / 8 % 2 * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = first_row + i % 2 * 2 + i / 2 * 8;
    RowPart q(shared.q[stage], row, column), k(shared.k[stage], row, column);
    int q_exponent = q.exponent(), k_exponent = k.exponent();
    __syncwarp();  // all lanes have read what any overwrites
    q.store(shared.q[stage], row, column, to_unit(q_exponent));
    k.store(shared.k[stage], row, column, to_unit(k_exponent));
    if (column == 0) {
      float q_unit = from_unit(q_exponent);
      shared.q_unit[stage][row] = q_unit;
      shared.o_weight[stage][row] = shared.o_decay[kReversed ? which : 0][row] * q_unit;
      shared.k_unit[stage][row] = from_unit(k_exponent);
      shared.v_weight[stage][row] = shared.v_decay[which][row] * power_of_two(k_exponent);
    }
  }
}

// p = q kT, in units.
__device__ __forceinline__ void multiply_qk(float (&p)[32], Tile (&q)[2 * kQkBlocks], Tile (&k)[2 * kQkBlocks]) {
  constexpr int kSteps = kQkDim / 16;
  wgmma_fence();
#pragma unroll
  for (int product = 0; product < 3; product++) {
    int q_part = product == 0 ? kQkBlocks : 0, k_part = product == 1 ? kQkBlocks : 0;
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      wgmma_64x64x16<false, false, false>(p, wgmma_descriptor(q[q_part + step / 4], step % 4 * 32),
                                          wgmma_descriptor(k[k_part + step / 4], step % 4 * 32), product + step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
}

// P from the products in units.
__device__ __forceinline__ void decay_scores(float (&p)[32], const Shared& shared, int stage) {
  int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const float* decay = &shared.score_decay[kChunk - 1 + warp * 16 + lane / 4 - lane % 4 * 2];
#pragma unroll
  for (int i = 0; i < 32; i++) {
    int half = i / 2 % 2, octet = i / 4;
    float q_unit = shared.q_unit[stage][warp * 16 + half * 8 + lane / 4];
    float k_unit = shared.k_unit[stage][octet * 8 + lane % 4 * 2 + i % 2];
    // NOTE: distances above the diagonal reach -63, as far as the table does.
    p[i] = p[i] * (q_unit * k_unit) * decay[(half - octet) * 8 - i % 2];
  }
}

// Rows of P, in units, to shared memory.
__device__ __forceinline__ void store_scores(Shared& shared, int buffer, const float (&p)[32]) {
  int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float unit[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) largest = fmaxf(largest, fabsf(p[i / 2 * 4 + half * 2 + i % 2]));
    int exponent = unit_exponent(row_max<4>(largest));
    unit[half] = to_unit(exponent);
    if (lane % 4 == 0) shared.p_unit[buffer][warp * 16 + half * 8 + lane / 4] = from_unit(exponent);
  }
  int row = warp * 16 + lane % 16;
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {  // of 8 columns
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      split(high[i], low[i], p[pair * 8 + i * 2] * unit[i % 2], p[pair * 8 + i * 2 + 1] * unit[i % 2]);
    }
    stmatrix_x4(swizzled(shared.p[buffer][0], row, pair * 2 + lane / 16), high);
    stmatrix_x4(swizzled(shared.p[buffer][1], row, pair * 2 + lane / 16), low);
  }
}

// The scores warpgroup: q and k in units, then P, of all chunks.
__device__ __forceinline__ void scores(Shared& shared, const Row& row) {
  int lane = threadIdx.x % 32;
  Ring<kStages> ring;
  Ring<kPBuffers> p_ring;
#pragma unroll 1
  for (int chunk = 0; chunk < row.num_chunks; chunk++, ring.advance(), p_ring.advance()) {
    int stage = ring.idx, buffer = p_ring.idx;
    mbarrier_wait(shared.qk_full[stage], ring.parity);
    convert(shared, stage, row.has_end(chunk));
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.qk_ready[stage]);
    mbarrier_wait(shared.qk_ready[stage], ring.parity);
    float p[32];
    multiply_qk(p, shared.q[stage], shared.k[stage]);
    decay_scores(p, shared, stage);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.qk_empty[stage]);

    mbarrier_wait(shared.p_empty[buffer], p_ring.parity ^ 1);
    store_scores(shared, buffer, p);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.p_full[buffer]);
  }
}

// A left operand of 64 columns as high and low, in units of its rows.
template <int kSteps>
struct Operand {
  uint32_t high[kSteps][4], low[kSteps][4];

  // `x` is in the order of accumulators.
  __device__ __forceinline__ void set(const float* x, const float (&unit)[2]) {
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* pair = x + step * 8 + i * 2;
        split(high[step][i], low[step][i], pair[0] * unit[i % 2], pair[1] * unit[i % 2]);
      }
    }
  }
};

// Exponents of the units of a thread's two rows.
template <int kSize>
__device__ __forceinline__ void row_exponents(int (&exponent)[2], const float (&x)[kSize]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kSize / 2; i++) largest = fmaxf(largest, fabsf(x[i / 2 * 4 + half * 2 + i % 2]));
    exponent[half] = unit_exponent(row_max<4>(largest));
  }
}

// What an array of floats, one a token, has for the columns of a thread in an accumulator.
struct TokenFactors {
  float2 octet[8];

  __device__ __forceinline__ explicit TokenFactors(const float (&factors)[kChunk]) {
    const float2* first = reinterpret_cast<const float2*>(&factors[threadIdx.x % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 8; i++) octet[i] = first[i * 4];
  }

  __device__ __forceinline__ float operator[](int i) const { return i % 2 == 0 ? octet[i / 4].x : octet[i / 4].y; }
};

// One warpgroup: state and outputs of 64 columns of v.
struct Group {
  Shared& shared;
  const int group, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float state[kQkDim / 2];

  // This thread's elements of v or o, in the order of accumulators; `access` takes one and its index. No conflicts:
  // eight columns of four rows that are two apart lie in different banks.
  template <class Access>
  __device__ __forceinline__ void for_elements(int stage, Access access) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int half = i / 2, row = lane % 4 * 2 + i % 2, vector = (warp % 2 * 4 + half * 2 + lane / 16) ^ row;
      float* element = reinterpret_cast<float*>(&shared.v[stage][group][warp / 2][row][0]) + vector * 4 + lane / 4 % 4;
#pragma unroll
      for (int octet = 0; octet < 8; octet++) access(element[octet * 8 * 32], octet * 4 + i);
    }
  }

  // Products of an operand in registers with `high` and `low` in shared memory; `multiply` is one of them.
  template <int kSteps, class Multiply>
  __device__ __forceinline__ void products(const Operand<kSteps>& left, Multiply multiply) {
#pragma unroll
    for (int step = 0; step < kSteps; step++) multiply(left.low[step], 0, step);
#pragma unroll
    for (int step = 0; step < kSteps; step++) multiply(left.high[step], 1, step);
#pragma unroll
    for (int step = 0; step < kSteps; step++) multiply(left.high[step], 0, step);
  }

  // o = ST qT, begun; complete where the operands come in turn.
  __device__ __forceinline__ void inter_block(float (&o)[32], float (&o_unit)[2], int stage, uint32_t parity) {
    int exponent[2];
    row_exponents(exponent, state);
    float unit[2] = {to_unit(exponent[0]), to_unit(exponent[1])};
    o_unit[0] = from_unit(exponent[0]), o_unit[1] = from_unit(exponent[1]);
#pragma unroll
    for (int first_step = 0; first_step < kQkDim / 16; first_step += kOperandSteps) {
      Operand<kOperandSteps> operand;
      operand.set(&state[first_step * 8], unit);
      if (first_step == 0) mbarrier_wait(shared.qk_ready[stage], parity);
      bool begun = first_step > 0;
      wgmma_fence();
      products(operand, [&](const uint32_t(&left)[4], int part, int step) {
        Tile& q = shared.q[stage][part * kQkBlocks + (first_step + step) / 4];
        wgmma_64x64x16<false>(o, left, wgmma_descriptor(q, step % 4 * 32), begun);
        begun = true;
      });
      wgmma_commit();
      wgmma_wait<0>();
    }
  }

  // decay^(num_tokens-1-j) vT as an operand, with the units of k.
  __device__ __forceinline__ void decay_v(Operand<4>& v, int (&exponent)[2], int stage) {
    TokenFactors weight(shared.v_weight[stage]);
    float x[32];
    for_elements(stage, [&](float& v, int i) { x[i] = v; });
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] *= weight[i];
    row_exponents(exponent, x);
    v.set(x, {to_unit(exponent[0]), to_unit(exponent[1])});
  }

  // added = vT k of one block of 64 columns of k, begun.
  __device__ __forceinline__ void begin_update(float (&added)[32], const Operand<4>& v, int stage, int block) {
#pragma unroll
    for (int i = 0; i < 32; i++) added[i] = 0;
    wgmma_fence();
    products(v, [&](const uint32_t(&left)[4], int part, int step) {
      wgmma_transposed<false>(added, left,
                              wgmma_descriptor(shared.k[stage][part * kQkBlocks + block], step * 2048));
    });
    wgmma_commit();
  }

  // This block of ST = decay ST + added
  __device__ __forceinline__ void end_update(const float (&added)[32], const float (&unit)[2], float2 decay,
                                             int block) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      float& x = state[block * 32 + i];
      x = fmaf(x, decay.x, fmaf(x, decay.y, added[i] * unit[i / 2 % 2]));
    }
  }

  __device__ __forceinline__ void update_state(int stage, int which) {
    Operand<4> v;
    int exponent[2];
    decay_v(v, exponent, stage);
    // One in k is 2^-14 of the power of two that v_weight has.
    float unit[2] = {from_unit(exponent[0] - 14), from_unit(exponent[1] - 14)};
    float2 decay = shared.state_decay[which];
    float added[kUpdatesAtOnce][32];
    begin_update(added[0], v, stage, 0);
#pragma unroll
    for (int block = 0; block < kQkBlocks; block++) {
      if (kUpdatesAtOnce > 1 && block + 1 < kQkBlocks) {
        begin_update(added[(block + 1) % kUpdatesAtOnce], v, stage, block + 1);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      end_update(added[block % kUpdatesAtOnce], unit, decay, block);
      if (kUpdatesAtOnce == 1 && block + 1 < kQkBlocks) begin_update(added[0], v, stage, block + 1);
    }
  }

  // o += vT PT
  __device__ __forceinline__ void add_intra_block(float (&o)[32], int stage, int buffer, uint32_t parity) {
    Operand<4> v;
    int exponent[2];
    float x[32], sum[32];
    for_elements(stage, [&](float& v, int i) { x[i] = v; });
    row_exponents(exponent, x);
    v.set(x, {to_unit(exponent[0]), to_unit(exponent[1])});
    mbarrier_wait(shared.p_full[buffer], parity);
    bool begun = false;
    wgmma_fence();
    products(v, [&](const uint32_t(&left)[4], int part, int step) {
      wgmma_64x64x16<false>(sum, left, wgmma_descriptor(shared.p[buffer][part], step * 32), begun);
      begun = true;
    });
    wgmma_commit();
    wgmma_wait<0>();
    TokenFactors p_unit(shared.p_unit[buffer]);
    if constexpr (kParksInter) {
#pragma unroll
      for (int octet = 0; octet < 8; octet++) {
        float4 four = shared.inter[group][octet][warp * 32 + lane];
        o[octet * 4] = four.x, o[octet * 4 + 1] = four.y, o[octet * 4 + 2] = four.z, o[octet * 4 + 3] = four.w;
      }
    }
#pragma unroll
    for (int i = 0; i < 32; i++) o[i] = fmaf(sum[i] * p_unit[i], from_unit(exponent[i / 2 % 2]), o[i]);
  }

  __device__ __forceinline__ void compute(const Row& row) {
    Ring<kStages> ring;
    Ring<kPBuffers> p_ring;
#pragma unroll 1
    for (int chunk = 0; chunk < row.num_chunks; chunk++, ring.advance(), p_ring.advance()) {
      int stage = ring.idx, buffer = p_ring.idx;
      float o[32], o_unit[2];
      inter_block(o, o_unit, stage, ring.parity);
      TokenFactors weight(shared.o_weight[stage]);
#pragma unroll
      for (int i = 0; i < 32; i++) o[i] = o[i] * weight[i] * o_unit[i / 2 % 2];
      if constexpr (kParksInter) {
#pragma unroll
        for (int octet = 0; octet < 8; octet++) {
          const float* four = &o[octet * 4];
          shared.inter[group][octet][warp * 32 + lane] = {four[0], four[1], four[2], four[3]};
        }
      }
      mbarrier_wait(shared.v_full[stage], ring.parity);
      update_state(stage, row.has_end(chunk));
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.qk_empty[stage]);

      add_intra_block(o, stage, buffer, p_ring.parity);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.p_empty[buffer]);
      // A warp's columns of v, which no other reads, are done with.
      for_elements(stage, [&](float& element, int i) { element = o[i]; });
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.o_full[stage][group]);
    }
  }
};

__device__ __forceinline__ void attend(Shared& shared, const HopperArgs& args, const Row& row, int group_idx) {
  Group group = {shared, group_idx};
  // NOTE: a thread's number is forgotten where it goes into indices: forward_sm90.cu says why.
  const int first_v = row.first_v + group_idx * 64;
  uint32_t thread = threadIdx.x % 128, same_thread = thread;
  forget_origin(thread);
#pragma unroll
  for (int i = 0; i < kQkDim / 2; i++) group.state[i] = 0;
  if (args.initial_state != nullptr) {
#pragma unroll
    for (int i = 0; i < kQkDim / 2; i++) {
      group.state[i] = initial(args, row.batch_idx, row.head_idx, StateIndex(first_v, i, thread));
    }
  }
  group.compute(row);
  if (args.final_state == nullptr) return;
  forget_origin(same_thread);
#pragma unroll
  for (int i = 0; i < kQkDim / 2; i++) {
    store_final(args, row.batch_idx, row.head_idx, StateIndex(first_v, i, same_thread), group.state[i]);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ HopperArgs args) {
  extern __shared__ unsigned char shared_bytes[];
  // Swizzled tiles start at multiples of 1024 bytes.
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes + (-shared_address(shared_bytes) & 1023));
  Row row(args);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      mbarrier_init(shared.qk_full[stage], 1);
      mbarrier_init(shared.v_full[stage], 1);
      mbarrier_init(shared.qk_ready[stage], 4);
      mbarrier_init(shared.qk_empty[stage], 4 * (kGroups + 1));
      mbarrier_init(shared.v_empty[stage], kGroups);
      for (int group = 0; group < kGroups; group++) mbarrier_init(shared.o_full[stage][group], 4);
    }
    for (int buffer = 0; buffer < kPBuffers; buffer++) {
      mbarrier_init(shared.p_full[buffer], 4);
      mbarrier_init(shared.p_empty[buffer], 4 * kGroups);
    }
    fence_mbarrier_init();
  }
  set_decay(shared, args, slope_of(args, row.head_idx));
  __syncthreads();
  int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    decrease_registers<kProducerRegisters>();
    int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) load_qk(shared, args, row);
    if (threadIdx.x == 32) load_v(shared, args, row);
    if (warp >= 2 && warp < 2 + kGroups && threadIdx.x % 32 == 0) store(shared, args, row, warp - 2);
  } else if (warpgroup == 1) {
    decrease_registers<kScoresRegisters>();
    scores(shared, row);
  } else {
    increase_registers<kGroupRegisters>();
    attend(shared, args, row, warpgroup - 2);
  }
}
