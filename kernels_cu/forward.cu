// Forward for float16 and bfloat16 on tensor cores, sm_75 and up, one chunk of C tokens at a time:
//
//   P = scale (q kT) * decay^(i-j) below the diagonal          intra-block scores, float -> 16 bits
//   o = scale decay^(i+1) (q S) + P v                          inter-block part, then intra-block part
//   S = decay^C S + kT (decay^(C-1-j) v)                       state for the next chunk
//
// A block has one (batch, head, segment) and kVBlock columns of v; each of its four warps keeps 16 columns of S in
// float registers for the whole segment, transposed, because the accumulators of ST are, register for register, the
// right operands of q S. There S goes in as the sum of two 16-bit numbers, which leaves two roundings in either
// part of an output: that of P or of decayed v, and that of the result. Decays scale accumulators wherever the
// algebra allows it.
//
// With REVERSED=1 from the last token to the first, as forward.cuh has it.
//
// float16 has little range: rows of P, and each warp's S and decayed v, are scaled by powers of two, which is exact.
// On sm_75 bfloat16 tiles become float16 tiles times a power of two. Constants come as -D from
// lightning_cupy/forward.py.
#include "forward.cuh"
#include "units.cuh"

constexpr int kQkDim = QK_DIM, kVBlock = V_BLOCK, kChunk = CHUNK, kStages = STAGES, kThreads = NUM_THREADS;
constexpr bool kOutputs = OUTPUTS, kCausal = CAUSAL;
constexpr bool kBfloat16 = BFLOAT16;                       // in memory
constexpr bool kBfloat16Operands = kBfloat16 && kAmpere;   // in the mma
constexpr bool kConvert = kBfloat16 && !kAmpere;
constexpr int kWarps = kThreads / 32, kSlab = kVBlock / kWarps;
constexpr int kRowTiles = kChunk / 16, kQkTiles = kQkDim / 16;
// 16 bytes more a row put the eight rows of an ldmatrix in different banks, for every multiple of 16 columns.
constexpr int kQkPitch = kQkDim + 8, kVPitch = kVBlock + 8, kPPitch = kChunk + 8;
static_assert(kSlab == 16 && kRowTiles <= kWarps && kQkDim % 16 == 0, "one row tile and one slab a warp");

struct Shared {
  alignas(16) uint16_t q[kStages][kChunk][kQkPitch], k[kStages][kChunk][kQkPitch];
  uint16_t v[kStages][kChunk][kVPitch];
  uint16_t p[kChunk][kPPitch];
  float p_unit[kChunk];       // what one in a row of p stands for
  float decay[kChunk + 4];    // decay^i
  uint32_t tile_max[3][kWarps];
};
static_assert(sizeof(Shared) <= SMEM_BYTES, "forward.py: smem_bytes is smaller than Shared");

constexpr float kLeastScale = 0x1p-60f;

// What one in a tile stands for: 1, but for tiles that were converted to float16.
struct Units {
  float q = 1, k = 1, v = 1;
};

template <int kCols, int kPitch>
__device__ __forceinline__ uint32_t largest_bits(const uint16_t (&tile)[kChunk][kPitch]) {
  uint32_t largest = 0;
#pragma unroll 1
  for (int idx = threadIdx.x; idx < kChunk * kCols; idx += kThreads) {
    uint32_t bits = tile[idx / kCols][idx % kCols] & 0x7fffu;
    largest = max(largest, bits < 0x7f80u ? bits : 0);  // an infinity or NaN is no reason to lose all else
  }
  return warp_max(largest);
}

template <int kCols, int kPitch>
__device__ __forceinline__ void to_float16(uint16_t (&tile)[kChunk][kPitch], float factor) {
#pragma unroll 1
  for (int idx = threadIdx.x; idx < kChunk * kCols / 2; idx += kThreads) {
    uint32_t& packed = *reinterpret_cast<uint32_t*>(&tile[2 * idx / kCols][2 * idx % kCols]);
    float2 pair = unpack<true>(packed);
    packed = pack<false>(pair.x * factor, pair.y * factor);
  }
}

// bfloat16 tiles to float16 ones in place, with a power of two for each tile: exact for all elements that are at
// least 2^-30 of the tile's largest, and 2^-54.
__device__ __forceinline__ Units convert_tiles(Shared& shared) {
  // 2^-26: keeps the product of two units, by which the state is divided, above 2^-80. Zeros have unit 1.
  constexpr int kLeast = 101;
  int warp = threadIdx.x / 32;
  uint32_t largest[3] = {kOutputs ? largest_bits<kQkDim>(shared.q[0]) : 0,
                         kCausal ? largest_bits<kQkDim>(shared.k[0]) : 0,
                         kCausal ? largest_bits<kVBlock>(shared.v[0]) : 0};
  int exponents[3];
  for (int i = 0; i < 3; i++) shared.tile_max[i][warp] = largest[i];
  __syncthreads();
  for (int i = 0; i < 3; i++) {
    uint32_t bits = 0;
    for (int other = 0; other < kWarps; other++) bits = max(bits, shared.tile_max[i][other]);
    exponents[i] = bits == 0 ? 141 : max(static_cast<int>(bits >> 7), kLeast);
  }
  if (kOutputs) to_float16<kQkDim>(shared.q[0], to_unit(exponents[0]));
  if (kCausal) to_float16<kQkDim>(shared.k[0], to_unit(exponents[1]));
  if (kCausal) to_float16<kVBlock>(shared.v[0], to_unit(exponents[2]));
  __syncthreads();
  return {from_unit(exponents[0]), from_unit(exponents[1]), from_unit(exponents[2])};
}

// Whether a tile of P has more than zeros; that on the diagonal has some.
__device__ __forceinline__ bool has_scores(int row_tile, int tile) {
  return kReversed ? tile >= row_tile : tile <= row_tile;
}

// Rows [16 warp, 16 warp + 16) of P into shared memory, up to the diagonal.
__device__ __forceinline__ void scores(Shared& shared, int stage, float scale, int num_tokens) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= kRowTiles) return;
  float p[2 * kRowTiles][4] = {};
#pragma unroll
  for (int qk_tile = 0; qk_tile < kQkTiles; qk_tile++) {
    uint32_t q[4], k[4];
    ldmatrix_x4(q, &shared.q[stage][warp * 16 + lane % 16][qk_tile * 16 + lane / 16 * 8]);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; tile++) {
      // NOTE: also above the diagonal. Branches here cost more than the products they save.
      ldmatrix_x4(k, &shared.k[stage][tile * 16 + lane % 8 + lane / 16 * 8][qk_tile * 16 + lane / 8 % 2 * 8]);
      mma_16x8x16<kBfloat16Operands>(p[2 * tile], q, k[0], k[1]);
      mma_16x8x16<kBfloat16Operands>(p[2 * tile + 1], q, k[2], k[3]);
    }
  }
  // decay^(i-j) = decay^(i-i0) decay^(i0-j) in front of the diagonal tile, with i0 its first row, or reversed its last:
  // neither exponent is negative, so a decay never grows; slopes below -88 / kChunk may make it infinite.
  float row_decay[2] = {scale * shared.decay[kReversed ? 15 - lane / 4 : lane / 4],
                        scale * shared.decay[kReversed ? 7 - lane / 4 : lane / 4 + 8]};
#pragma unroll
  for (int tile = 0; tile < kRowTiles; tile++) {
    if (tile != warp && has_scores(warp, tile)) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float& element = p[2 * tile + i / 4][i % 4];
        if constexpr (kReversed) {
          bool exists = tile * 16 + column < num_tokens;  // no 0 * inf behind the end
          element = exists ? element * (row_decay[i / 2 % 2] * shared.decay[(tile - warp) * 16 + column - 15]) : 0;
        } else {
          element *= row_decay[i / 2 % 2] * shared.decay[(warp - tile) * 16 - column];
        }
      }
    } else if (tile == warp) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        int distance = kReversed ? column - row : row - column;
        bool counts = distance >= 0 && (!kReversed || tile * 16 + column < num_tokens);
        float& element = p[2 * tile + i / 4][i % 4];
        element = counts ? element * scale * shared.decay[max(distance, 0)] : 0;
      }
    }
  }
  float factor[2] = {1, 1};
  if constexpr (!kBfloat16Operands) {
    float largest[2] = {0, 0};
#pragma unroll
    for (int tile = 0; tile < 2 * kRowTiles; tile++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (has_scores(warp, tile / 2)) largest[i / 2] = fmaxf(largest[i / 2], fabsf(p[tile][i]));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], 1));
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], 2));
      factor[i] = to_unit(unit_exponent(largest[i]));
      if (lane % 4 == 0) shared.p_unit[warp * 16 + lane / 4 + i * 8] = from_unit(unit_exponent(largest[i]));
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2 * kRowTiles; tile++) {
    if (has_scores(warp, tile / 2)) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        *reinterpret_cast<uint32_t*>(&shared.p[warp * 16 + lane / 4 + i * 8][tile * 8 + lane % 4 * 2]) =
            pack<kBfloat16Operands>(p[tile][2 * i] * factor[i], p[tile][2 * i + 1] * factor[i]);
      }
    }
  }
}

// ST of a warp: state[tile] holds (v columns l/4 and l/4 + 8) x (qk columns 8 tile + 2(l%4) + {0, 1}) of lane l.
using State = float[2 * kQkTiles][4];
using Outputs = float[kRowTiles][2][4];

// o = q S, S as high + low; the result is to be multiplied by the return value.
__device__ __forceinline__ float inter_block(Outputs& o, const Shared& shared, int stage, const State& state) {
  int lane = threadIdx.x % 32;
  float factor = 1, unit = 1;
  if constexpr (!kBfloat16Operands) {
    float largest = 0;
#pragma unroll
    for (int tile = 0; tile < 2 * kQkTiles; tile++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        largest = fmaxf(largest, finite_size(state[tile][i]));
      }
    }
    int exponent = unit_exponent(__uint_as_float(warp_max(__float_as_uint(largest))));
    factor = to_unit(exponent);
    unit = from_unit(exponent);
  }
#pragma unroll
  for (int tile = 0; tile < kQkTiles; tile++) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* pair = &state[2 * tile + i % 2][i / 2 * 2];
      float2 exact = {pair[0] * factor, pair[1] * factor};
      if constexpr (!kCausal) {  // S stays the same, but high and low kept beside it would take twice its registers
        forget_origin(exact.x);
        forget_origin(exact.y);
      }
      high[i] = pack<kBfloat16Operands>(exact.x, exact.y);
      float2 rounded = unpack<kBfloat16Operands>(high[i]);
      low[i] = pack<kBfloat16Operands>(exact.x - rounded.x, exact.y - rounded.y);
    }
    // Two row tiles at a time: four products pass between one and the next into the same accumulator.
#pragma unroll
    for (int first = 0; first < kRowTiles; first += 2) {
      uint32_t q[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        ldmatrix_x4(q[i], &shared.q[stage][(first + i) * 16 + lane % 16][tile * 16 + lane / 16 * 8]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma_16x8x16<kBfloat16Operands>(o[first + i][0], q[i], high[0], high[1]);
        mma_16x8x16<kBfloat16Operands>(o[first + i][1], q[i], high[2], high[3]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma_16x8x16<kBfloat16Operands>(o[first + i][0], q[i], low[0], low[1]);
        mma_16x8x16<kBfloat16Operands>(o[first + i][1], q[i], low[2], low[3]);
      }
    }
  }
  return unit;
}

// 16 tokens of this warp's columns of v: as a right operand, or with the middle two exchanged as a left one.
__device__ __forceinline__ void load_v(uint32_t (&v)[4], const Shared& shared, int stage, int tile) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ldmatrix_x4_trans(v, &shared.v[stage][tile * 16 + lane % 16][warp * kSlab + lane / 16 * 8]);
}

// o += P v in units of p and v, on and below the diagonal.
__device__ __forceinline__ void intra_block(Outputs& o, const Shared& shared, int stage) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; tile++) {
    uint32_t v[4];
    load_v(v, shared, stage, tile);
#pragma unroll
    for (int row_tile = kReversed ? 0 : tile; row_tile < (kReversed ? tile + 1 : kRowTiles); row_tile++) {
      uint32_t p[4];
      ldmatrix_x4(p, &shared.p[row_tile * 16 + lane % 16][tile * 16 + lane / 16 * 8]);
      mma_16x8x16<kBfloat16Operands>(o[row_tile][0], p, v[0], v[1]);
      mma_16x8x16<kBfloat16Operands>(o[row_tile][1], p, v[2], v[3]);
    }
  }
}

// The largest finite number of this warp's columns of v.
__device__ __forceinline__ float largest_of_v(const Shared& shared, int stage) {
  float largest = 0;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; tile++) {
    uint32_t v[4];
    load_v(v, shared, stage, tile);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 pair = unpack<kBfloat16Operands>(v[i]);
      largest = fmaxf(largest, fmaxf(finite_size(pair.x), finite_size(pair.y)));
    }
  }
  return __uint_as_float(warp_max(__float_as_uint(largest)));
}

// S = decay^C S + kT (decay^(C-1-j) v) over `num_tokens` tokens.
__device__ __forceinline__ void update_state(State& state, const Shared& shared, int stage, int num_tokens,
                                             Units units, float scale, bool has_state) {
  int lane = threadIdx.x % 32;
  // Decayed v is a float16 operand anew: growing decays would take it out of range, and small ones into numbers of
  // few bits. Both are put on the accumulators instead.
  float unit = units.k * units.v, v_factor = kReversed ? scale : 1;
  if constexpr (!kBfloat16Operands) {
    float growth = fmaxf(shared.decay[kReversed ? num_tokens : num_tokens - 1], 1.0f);
    if (kReversed) growth *= fmaxf(fabsf(scale), kLeastScale);
    int exponent = kConvert ? 141 : unit_exponent(largest_of_v(shared, stage));
    unit *= growth * from_unit(exponent);
    v_factor *= to_unit(exponent) / growth;
  }
  float state_factor = has_state ? shared.decay[num_tokens] / unit : 0;  // no 0 * inf from a decay that overflows
#pragma unroll
  for (int tile = 0; tile < 2 * kQkTiles; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) state[tile][i] *= state_factor;
  }
#pragma unroll kQkDim > 128 ? 1 : kRowTiles  // a large state leaves no registers for loads ahead
  for (int row_tile = 0; row_tile < kRowTiles; row_tile++) {
    uint32_t v[4], decayed_v[4];
    load_v(v, shared, stage, row_tile);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int token = row_tile * 16 + i * 8 + lane % 4 * 2;
      float factors[2];
      for (int j = 0; j < 2; j++) {
        int distance = kReversed ? min(token + j + 1, num_tokens) : max(num_tokens - 1 - token - j, 0);
        factors[j] = v_factor * shared.decay[distance];
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float2 pair = unpack<kBfloat16Operands>(v[2 * half + i]);
        decayed_v[2 * i + half] = pack<kBfloat16Operands>(pair.x * factors[0], pair.y * factors[1]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kQkTiles; tile++) {
      uint32_t k[4];
      ldmatrix_x4_trans(k, &shared.k[stage][row_tile * 16 + lane % 16][tile * 16 + lane / 16 * 8]);
      mma_16x8x16<kBfloat16Operands>(state[2 * tile], decayed_v, k[0], k[1]);
      mma_16x8x16<kBfloat16Operands>(state[2 * tile + 1], decayed_v, k[2], k[3]);
    }
  }
  if (!kBfloat16Operands && unit != 1) {
#pragma unroll
    for (int tile = 0; tile < 2 * kQkTiles; tile++) {
#pragma unroll
      for (int i = 0; i < 4; i++) state[tile][i] *= unit;
    }
  }
}

// `o` is where the tile begins; num_tokens and num_cols are what there is of it.
__device__ __forceinline__ void store_outputs(const Args<float>& args, uint16_t* o, const Outputs& outputs,
                                              int num_tokens, int num_cols) {
  int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
  int64_t row_stride = args.o_strides.token, col_stride = args.o_strides.dim;
  o += row * row_stride + col * col_stride;
  auto packed = [&](int rows, int tile) {
    const float* pair = &outputs[rows / 2][tile][rows % 2 * 2];
    return pack<kBfloat16>(pair[0], pair[1]);
  };
  if (args.o_vectorized && num_tokens == kChunk && num_cols >= kSlab) {
#pragma unroll
    for (int rows = 0; rows < 2 * kRowTiles; rows++) {
      *reinterpret_cast<uint32_t*>(o) = packed(rows, 0);
      *reinterpret_cast<uint32_t*>(o + 8) = packed(rows, 1);
      o += 8 * row_stride;
    }
  } else {
#pragma unroll
    for (int rows = 0; rows < 2 * kRowTiles; rows++) {
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        int cols_left = row + rows * 8 < num_tokens ? num_cols - tile * 8 - col : 0;
        if (cols_left > 0) o[tile * 8 * col_stride] = packed(rows, tile) & 0xffff;
        if (cols_left > 1) o[(tile * 8 + 1) * col_stride] = packed(rows, tile) >> 16;
      }
      o += 8 * row_stride;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) forward(const __grid_constant__ Args<float> args) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  Work work = find_work<kVBlock>(args);
  if (!work.exists) return;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first_v = work.first_v + warp * kSlab, num_v = args.v_dim - first_v;  // of this warp; none when <= 0

  double slope = slope_of(args, work.head_idx);
  for (int i = threadIdx.x; i <= kChunk; i += kThreads) shared.decay[i] = expf(static_cast<float>(-slope * i));

  bool has_state = kOutputs && (!kCausal || work.segment_idx > 0 || args.initial_state != nullptr);
  State state = {};
  if (has_state) {
    StateView<float> entry = entry_state<kCausal>(args, work);
#pragma unroll
    for (int tile = 0; tile < 2 * kQkTiles; tile++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        state[tile][i] = entry(tile * 8 + lane % 4 * 2 + i % 2, warp * kSlab + lane / 4 + i / 2 * 8);
      }
    }
  }

  int64_t num_chunks = (work.num_tokens + kChunk - 1) / kChunk;
  auto num_tokens_from = [&](int64_t token_idx) {
    return static_cast<int>(min(static_cast<int64_t>(kChunk), work.first_token + work.num_tokens - token_idx));
  };
  auto load = [&](int64_t chunk_idx, int stage) {
    int64_t token_idx = chunk_token(work, chunk_idx, num_chunks, kChunk);
    int num_tokens = num_tokens_from(token_idx);
    if constexpr (kOutputs) {
      load_tile<kChunk, kQkDim, kQkPitch, kThreads>(
          &shared.q[stage][0][0], at(static_cast<const uint16_t*>(args.q), args.q_strides, work, token_idx),
          args.q_strides.token, args.q_strides.dim, num_tokens, args.qk_dim, args.q_vectorized);
    }
    if constexpr (kCausal) {
      load_tile<kChunk, kQkDim, kQkPitch, kThreads>(
          &shared.k[stage][0][0], at(static_cast<const uint16_t*>(args.k), args.k_strides, work, token_idx),
          args.k_strides.token, args.k_strides.dim, num_tokens, args.qk_dim, args.k_vectorized);
      load_tile<kChunk, kVBlock, kVPitch, kThreads>(
          &shared.v[stage][0][0],
          at(static_cast<const uint16_t*>(args.v), args.v_strides, work, token_idx) + work.first_v * args.v_strides.dim,
          args.v_strides.token, args.v_strides.dim, num_tokens, args.v_dim - work.first_v, args.v_vectorized);
    }
  };

  float* exit_state = kCausal ? exit_state_of<!kOutputs>(args, work) : nullptr;
  if constexpr (kStages == 2) load(0, 0);
  for (int64_t chunk_idx = 0; chunk_idx < num_chunks; chunk_idx++) {
    int stage = kStages == 2 ? chunk_idx % 2 : 0;
    if constexpr (kStages == 1) {
      __syncthreads();
      load(chunk_idx, 0);
    }
    cp_async_wait_all();
    __syncthreads();
    if (kStages == 2 && chunk_idx + 1 < num_chunks) load(chunk_idx + 1, 1 - stage);

    Units units;
    if constexpr (kConvert) units = convert_tiles(shared);
    int64_t token_idx = chunk_token(work, chunk_idx, num_chunks, kChunk);
    int num_tokens = num_tokens_from(token_idx);
    float scale = static_cast<float>(args.scale) * units.q;
    Outputs o = {};

    if constexpr (kOutputs) {
      if constexpr (kCausal) scores(shared, stage, scale * units.k, num_tokens);
      float inter_scale = 0;
      if (has_state && num_v > 0) inter_scale = (kReversed ? units.q : scale) * inter_block(o, shared, stage, state);
      if constexpr (kCausal) __syncthreads();  // p is complete
      if (num_v > 0) {
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; row_tile++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            int row = row_tile * 16 + lane / 4 + i / 2 * 8;
            float unit = kCausal && !kBfloat16Operands ? shared.p_unit[row] * units.v : 1;
            int distance = kReversed ? max(num_tokens - 1 - row, 0) : row + 1;
            float factor = has_state ? inter_scale * (kCausal ? shared.decay[distance] : 1) / unit : 0;
            for (int tile = 0; tile < 2; tile++) o[row_tile][tile][i] *= factor;
          }
        }
      }
    }
    if (kOutputs && num_v > 0) {
      if constexpr (kCausal) {
        intra_block(o, shared, stage);
        if constexpr (!kBfloat16Operands) {
#pragma unroll
          for (int row_tile = 0; row_tile < kRowTiles; row_tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              float unit = shared.p_unit[row_tile * 16 + lane / 4 + i / 2 * 8] * units.v;
              for (int tile = 0; tile < 2; tile++) o[row_tile][tile][i] *= unit;
            }
          }
        }
      }
      uint16_t* o_chunk =
          at(static_cast<uint16_t*>(args.o), args.o_strides, work, token_idx) + first_v * args.o_strides.dim;
      store_outputs(args, o_chunk, o, num_tokens, num_v);
    }
    bool is_needed = exit_state != nullptr || chunk_idx + 1 < num_chunks;
    if (kCausal && is_needed && num_v > 0) {
      update_state(state, shared, stage, num_tokens, units, static_cast<float>(args.scale), has_state);
    }
    has_state = true;
  }

  if (exit_state != nullptr) {
#pragma unroll
    for (int tile = 0; tile < 2 * kQkTiles; tile++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int k_idx = tile * 8 + lane % 4 * 2 + i % 2, v_idx = lane / 4 + i / 2 * 8;
        if (k_idx < args.qk_dim && v_idx < num_v) exit_state[k_idx * args.v_dim + first_v + v_idx] = state[tile][i];
      }
    }
  }
}
