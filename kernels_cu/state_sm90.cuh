// The state of 64 columns of v for float16 and bfloat16, in registers of one warpgroup, and how a chunk is added to it.
// ST, transposed, is an accumulator of wgmma:
//
//   ST = decay^64 ST + (decay^(63-j) vT) k
//
// Decayed v is the sum of two 16-bit numbers, so that states are exact to about 2^-17. float16 has little range: rows
// of ST and of decayed vT are scaled by powers of two, which is exact.
#pragma once
#include "forward_sm90.cuh"

constexpr int kQkDim = QK_DIM, kQStages = Q_STAGES, kStages = STAGES, kOutputBuffers = OUTPUT_BUFFERS;
constexpr bool kBfloat16 = BFLOAT16;
constexpr float kLargest = 3.402823466e+38f, kLeastScale = 0x1p-60f;
constexpr int kChunk = 64, kQkBlocks = (kQkDim + 63) / 64;

// Where TMA and wgmma put the 16 bytes `vector` of a row.
__device__ __forceinline__ void* swizzled(Tile& tile, int row, int vector) {
  return &tile[row][(vector ^ row % 8) * 8];
}

// 2^14 to 2^15 is where the largest number of a float16 operand is put; `exponent` is a biased float exponent.
__device__ __forceinline__ float to_unit(int exponent) { return __uint_as_float((268 - exponent) << 23); }
__device__ __forceinline__ float from_unit(int exponent) { return __uint_as_float((exponent - 14) << 23); }
// Units stay between 2^-54 and 2^112; that of zeros is 1.
__device__ __forceinline__ int unit_exponent(float largest) {
  int exponent = __float_as_uint(largest) >> 23 & 0xff;
  return largest == 0 ? 141 : min(max(exponent, 87), 253);
}
// The largest of four neighbouring lanes, which hold one row of an accumulator.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// `high + low` is the pair to about 16 bits (float16: 22).
__device__ __forceinline__ void split(uint32_t& high, uint32_t& low, float x, float y) {
  high = pack<kBfloat16>(x, y);
  float2 rounded = unpack<kBfloat16>(high);
  low = pack<kBfloat16>(x - rounded.x, y - rounded.y);
}

// Decays that a warpgroup reads at each chunk; [1] is for that with the end of a sequence, which may be shorter.
struct Decay {
  uint2 v[2][kChunk / 2];       // of pairs of tokens as high - low, relative to v_growth
  float state[2], v_growth[2];  // decay^num_tokens; float16: the largest of v, at least about 1
};

// What v is decayed by: decay^(num_tokens-1-j); scale decay^(j+1); and, as the slopes' gradient has it
// (slopes_sm90.cuh), the first times num_tokens-1-j + age.
enum Kind { kToEnd, kFromStart, kAgedToEnd };

// By the first 64 threads of a warpgroup.
template <Kind kKind>
__device__ __forceinline__ void fill(Decay& decay, int thread, double slope, float scale_or_age, int seqlen) {
  auto power = [&](int exponent) { return expf(static_cast<float>(-slope * exponent)); };
  int which = thread / 32, pair = thread % 32, num_tokens = which == 0 ? kChunk : (seqlen - 1) % kChunk + 1;
  float growth = kBfloat16 ? 1 : fmaxf(power(kKind == kFromStart ? num_tokens : num_tokens - 1), 1.0f);
  if (kKind == kFromStart && !kBfloat16) growth *= fmaxf(fabsf(scale_or_age), kLeastScale);
  if (kKind == kAgedToEnd && !kBfloat16) growth *= kChunk;
  float factor[2];
  // Behind the end there are zeros, which no decay may make NaN.
  for (int i = 0; i < 2; i++) {
    int token = 2 * pair + i, behind = max(num_tokens - 1 - token, 0);
    factor[i] = kKind == kFromStart ? scale_or_age * power(min(token + 1, num_tokens)) : power(behind);
    if (kKind == kAgedToEnd) factor[i] *= behind + scale_or_age;
    factor[i] /= growth;
  }
  uint2& packed = decay.v[which][pair];
  split(packed.x, packed.y, factor[0], factor[1]);
  packed.y = negate_pairs(packed.y);
  if (pair == 0) {
    decay.state[which] = power(num_tokens);
    decay.v_growth[which] = growth;
  }
}

using State = float[kQkDim / 2];

// Columns of q and k, and what a thread has of a state's. There are two parts: while products are added to one, the
// other, complete, is read. First those behind kFrontDim, if any, then those in front: a part begins with a tile.
template <int kFirstColumn, int kNumColumns>
struct Part {
  static constexpr int kFirst = kFirstColumn, kDim = kNumColumns, kFirstTile = kFirst / 64;
  static_assert(kFirst % 64 == 0, "products start with a tile of k");

  static __device__ __forceinline__ float (&of(State& state))[kDim / 2] {
    return *reinterpret_cast<float (*)[kDim / 2]>(&state[kFirst / 2]);
  }
};
constexpr bool kTwoParts = kQkDim > 64;
constexpr int kFrontDim = (kQkDim + 127) / 128 * 64;
using Front = Part<0, kFrontDim>;
using Back = Part<kTwoParts ? kFrontDim : 0, kTwoParts ? kQkDim - kFrontDim : kFrontDim>;

// What one in the two rows of a thread stands for; always 1 in bfloat16.
struct RowUnits {
  float unit[2] = {1, 1};
};

// A chunk of this warp's 16 columns of v, transposed, 16 tokens at a time as left operands; and its decays.
struct LoadedV {
  uint32_t v[4][4];
  uint2 decay[4][2];
  float state_decay, growth;
};

// A warp's 16 columns of a tile, transposed, as an accumulator and a left operand have them; `thread` is the
// warpgroup's.
__device__ __forceinline__ void load_columns(uint32_t (&columns)[4][4], Tile& tile, uint32_t thread) {
  int warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int step = 0; step < 4; step++) {  // of 16 tokens
    ldmatrix_x4_trans(columns[step], swizzled(tile, step * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
  }
}

// `which` is 1 for the chunk with the end of a sequence.
__device__ __forceinline__ void load_v(LoadedV& result, Tile& tile, const Decay& decay, int which, uint32_t thread) {
  load_columns(result.v, tile, thread);
#pragma unroll
  for (int step = 0; step < 4; step++) {
    for (int i = 0; i < 2; i++) result.decay[step][i] = decay.v[which][step * 8 + i * 4 + thread % 4];
  }
  result.state_decay = decay.state[which];
  result.growth = decay.v_growth[which];
}

// decay^(num_tokens-1-j) v of a chunk as high - low, left operands; and what the state is to be multiplied by in front
// of them, for the chunk's decay, and to have their units.
struct DecayedV {
  uint32_t high[4][4], low[4][4];
  float state_factor[2];
  RowUnits units;

  // They are made here, and not behind what comes next.
  __device__ __forceinline__ void stay() {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      forget_origin(high[i / 4][i % 4]);
      forget_origin(low[i / 4][i % 4]);
    }
  }
};

// For a state that has other units.
__device__ __forceinline__ void decay_v(DecayedV& result, const RowUnits& units, const LoadedV& loaded) {
  result.state_factor[0] = result.state_factor[1] = loaded.state_decay;
  result.units = units;
  uint32_t up_factor[2];
  if constexpr (!kBfloat16) {
    // Rows of v are brought near 2^14, as far as a float16 factor goes: decayed, their low part has less to lose.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        largest = largest_of_half_pairs(largest, loaded.v[i / 2][i % 2 * 2 + half] & 0x7fff7fff);
      }
      float2 pair = unpack<false>(largest);
      int exponent = __float_as_uint(row_max(fmaxf(pair.x, pair.y))) >> 23;
      int up = min(max(141 - exponent, -14), 15);
      up_factor[half] = (up + 15) * 0x04000400;
      float unit = loaded.growth * __uint_as_float((127 - up) << 23);
      result.state_factor[half] *= units.unit[half] / unit;
      result.units.unit[half] = unit;
    }
  }
#pragma unroll
  for (int step = 0; step < 4; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint2 factor = loaded.decay[step][i / 2];
      uint32_t v = loaded.v[step][i];
      if constexpr (!kBfloat16) v = multiply_pairs<false>(v, up_factor[i % 2]);
      uint32_t high = multiply_pairs<kBfloat16>(v, factor.x);
      // What rounding added to the product is exact; then what it added to the decay.
      uint32_t low = multiply_add_pairs<kBfloat16>(v, negate_pairs(factor.x), high);
      result.high[step][i] = high;
      result.low[step][i] = multiply_add_pairs<kBfloat16>(v, factor.y, low);
    }
  }
}

template <int kNum>
__device__ __forceinline__ void scale_state(float (&state)[kNum], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kNum; i++) {
    state[i] *= factor[i / 2 % 2];
    forget_origin(state[i]);  // now: behind the next product ptxas would wait for it first
  }
}

// Begin sums += decayed vT k, or kSet, of the columns of k from a tile on. kRounded: without what v was rounded by.
template <int kFirstTile, Sum kSum = kAdd, bool kRounded = false, int kSize>
__device__ __forceinline__ void add_products(float (&sums)[kSize], const DecayedV& v, Tile (&k)[kQkBlocks]) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) {
    uint64_t k_step = wgmma_descriptor_in_32_bits(k, kFirstTile * kTileBytes + step * 2048);
    if (kSum == kSet && step == 0) {
      wgmma_transposed<kBfloat16, kSet>(sums, v.high[step], k_step);
    } else {
      wgmma_transposed<kBfloat16>(sums, v.high[step], k_step);
    }
    if constexpr (!kRounded) wgmma_transposed<kBfloat16, kSubtract>(sums, v.low[step], k_step);
  }
  wgmma_commit();
}

// Begin state += decayed vT k, a part.
template <class Part, bool kRounded = false>
__device__ __forceinline__ void update_state(State& state, const DecayedV& v, Tile (&k)[kQkBlocks]) {
  add_products<Part::kFirstTile, kAdd, kRounded>(Part::of(state), v, k);
}

// Begin state += 0, a part: so that products have made it.
template <class Part>
__device__ __forceinline__ void add_zeros(State& state, const uint16_t (&zeros)[8][64]) {
  wgmma_fence();
  wgmma_transposed<kBfloat16>(Part::of(state), {0, 0, 0, 0}, wgmma_descriptor_of_rows(zeros));
  wgmma_commit();
}

// What to multiply the state by so that its rows, as operands, stay in range; `units` become those of the products.
__device__ __forceinline__ void put_in_range(float (&factor)[2], RowUnits& units, const State& state) {
  factor[0] = factor[1] = 1;
  if constexpr (!kBfloat16) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kQkDim / 4; i++) largest = fmaxf(largest, fabsf(state[i / 2 * 4 + half * 2 + i % 2]));
      int exponent = unit_exponent(row_max(largest));
      factor[half] = to_unit(exponent);
      units.unit[half] *= from_unit(exponent);
    }
  }
}

// NOTE: where the thread's number goes into indices of states its origin is forgotten, or the compiler would make the
// indices of all states once, in front of everything, and keep a hundred registers for them all the while.
__device__ __forceinline__ void load_initial_state(State& state, const HopperArgs& args, int batch_idx, int head_idx,
                                                   int first_v, bool exists) {
#pragma unroll
  for (int i = 0; i < kQkDim / 2; i++) state[i] = 0;
  if (!exists) return;  // once: a branch for each element costs microseconds of fetching instructions
  uint32_t thread = threadIdx.x % 128;
  forget_origin(thread);
#pragma unroll
  for (int i = 0; i < kQkDim / 2; i++) state[i] = initial(args, batch_idx, head_idx, StateIndex(first_v, i, thread));
}

__device__ __forceinline__ void store_final_state(const State& state, const RowUnits& units, const HopperArgs& args,
                                                  int batch_idx, int head_idx, int first_v) {
  uint32_t thread = threadIdx.x % 128;
  forget_origin(thread);
#pragma unroll
  for (int i = 0; i < kQkDim / 2; i++) {
    store_final(args, batch_idx, head_idx, StateIndex(first_v, i, thread), state[i] * units.unit[i / 2 % 2]);
  }
}
