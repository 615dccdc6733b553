// Gradient of the slopes for float16 and bfloat16 on tensor cores: backward.cuh has the mathematics. Each of four
// warps keeps 16 columns of v of S and T in float registers, transposed, as forward.cu does. Decayed operands are sums
// of two, high + low: the gradient of one head is one number, often a small sum of large ones. Those of float16 are
// brought into range by powers of two, which is exact. Constants come as -D from lightning_cupy/backward.py.
#include "backward.cuh"
#include "units.cuh"

constexpr int kStages = STAGES;
constexpr bool kBfloat16 = BFLOAT16;
constexpr int kWarps = kThreads / 32, kSlab = kVBlock / kWarps, kRowTiles = kChunk / 16, kQkTiles = kQkBlock / 16;
constexpr int kQkPitch = kQkBlock + 8, kVPitch = kVBlock + 8;  // as in forward.cu
constexpr int kTilesAtOnce = kBfloat16 && kQkTiles % 4 == 0 ? 4 : 2;  // of qT do: what registers have room for
static_assert(kSlab == 16 && kRowTiles <= kWarps && kQkTiles % kTilesAtOnce == 0, "one row tile and one slab a warp");

struct Shared {
  alignas(16) uint16_t q[kStages][kChunk][kQkPitch], k[kStages][kChunk][kQkPitch];
  uint16_t v[kStages][kChunk][kVPitch], dout[kStages][kChunk][kVPitch];
  float decay[kChunk + 4], aged_decay[kChunk + 4];  // decay^i, i decay^i
};
static_assert(sizeof(Shared) <= SMEM_BYTES, "backward.py: smem_bytes is smaller than Shared");

// ST or TT of a warp: lane l has (v columns l/4 and l/4 + 8) x (columns of k 8 tile + 2(l%4) + {0, 1}) of each tile.
using State = float[2 * kQkTiles][4];

// 16 tokens of this warp's columns of v or do, as a left operand: two columns of two tokens each.
template <int kPitch>
__device__ __forceinline__ void load_columns(uint32_t (&x)[4], const uint16_t (&tile)[kChunk][kPitch], int row_tile) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t loaded[4];
  ldmatrix_x4_trans(loaded, &tile[row_tile * 16 + lane % 16][warp * kSlab + lane / 16 * 8]);
  x[0] = loaded[0], x[1] = loaded[2], x[2] = loaded[1], x[3] = loaded[3];
}

// Operands times a factor for each token, high and low.
struct Weighted {
  uint32_t part[2][4];

  // `weight` of a token.
  template <class Weight>
  __device__ __forceinline__ Weighted(const uint32_t (&x)[4], int row_tile, Weight weight) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int token = row_tile * 16 + i / 2 * 8 + lane % 4 * 2;
      float2 pair = unpack<kBfloat16>(x[i]);
      pair.x *= weight(token), pair.y *= weight(token + 1);
      part[0][i] = pack<kBfloat16>(pair.x, pair.y);
      float2 rounded = unpack<kBfloat16>(part[0][i]);
      part[1][i] = pack<kBfloat16>(pair.x - rounded.x, pair.y - rounded.y);
    }
  }
};

// Two tiles of a state += this times 16 columns of k or q.
__device__ __forceinline__ void multiply(float (&low)[4], float (&high)[4], const Weighted& left,
                                         const uint32_t (&right)[4]) {
#pragma unroll
  for (int part = 0; part < 2; part++) {
    mma_16x8x16<kBfloat16>(low, left.part[part], right[0], right[1]);
    mma_16x8x16<kBfloat16>(high, left.part[part], right[2], right[3]);
  }
}

// 16 tokens of 16 columns of q or k, as a right operand.
__device__ __forceinline__ void load_right(uint32_t (&x)[4], const uint16_t (&tile)[kChunk][kQkPitch], int row_tile,
                                           int tile_idx) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(x, &tile[row_tile * 16 + lane % 16][tile_idx * 16 + lane / 16 * 8]);
}

// float16: what one in a warp's columns of a chunk stands for, and its inverse; 1 in bfloat16.
struct Unit {
  float unit = 1, to_unit = 1;

  template <int kPitch>
  __device__ __forceinline__ explicit Unit(const uint16_t (&tile)[kChunk][kPitch]) {
    if constexpr (!kBfloat16) {
      float largest = 0;
#pragma unroll 1
      for (int row_tile = 0; row_tile < kRowTiles; row_tile++) {
        uint32_t x[4];
        load_columns(x, tile, row_tile);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float2 pair = unpack<false>(x[i]);
          largest = fmaxf(largest, fmaxf(finite_size(pair.x), finite_size(pair.y)));
        }
      }
      int exponent = unit_exponent(__uint_as_float(warp_max(__float_as_uint(largest))));
      unit = from_unit(exponent);
      to_unit = ::to_unit(exponent);
    }
  }
};

// This warp's 16 rows of left rightT, also above the diagonal, as in forward.cu.
using Scores = float[2 * kRowTiles][4];
template <int kDepth, int kPitch>
__device__ __forceinline__ void scores(Scores& sums, const uint16_t (&left)[kChunk][kPitch],
                                       const uint16_t (&right)[kChunk][kPitch]) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += 16) {
    uint32_t l[4], r[4];
    ldmatrix_x4(l, &left[warp * 16 + lane % 16][depth + lane / 16 * 8]);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; tile++) {
      ldmatrix_x4(r, &right[tile * 16 + lane % 8 + lane / 16 * 8][depth + lane / 8 % 2 * 8]);
      mma_16x8x16<kBfloat16>(sums[2 * tile], l, r[0], r[1]);
      mma_16x8x16<kBfloat16>(sums[2 * tile + 1], l, r[2], r[3]);
    }
  }
}

// Pairs of tokens of a chunk: all of them with this warp's 16.
__device__ __forceinline__ float pairs_in_chunk(const Shared& shared, int stage) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= kRowTiles) return 0;
  Scores p = {}, dp = {};
  scores<kQkBlock>(p, shared.q[stage], shared.k[stage]);
  scores<kVBlock>(dp, shared.dout[stage], shared.v[stage]);
  float sum = 0;
#pragma unroll
  for (int tile = 0; tile < 2 * kRowTiles; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int distance = warp * 16 + lane / 4 + i / 2 * 8 - (tile * 8 + lane % 4 * 2 + i % 2);
      if (distance > 0) sum += shared.aged_decay[distance] * (p[tile][i] * dp[tile][i]);
    }
  }
  return sum;
}

// With kPairs, pairs of the chunk's tokens with those in front of it. Else T += decay_before qT (w do).
template <bool kPairs>
__device__ __forceinline__ float pairs_with_state(const State& state, State& aged, const Shared& shared, int stage,
                                                  float scale, float decay_before) {
  float sum = 0;
  const Unit unit(shared.dout[stage]);
#pragma unroll
  for (int first = 0; first < kQkTiles; first += kTilesAtOnce) {
    float sums[2 * kTilesAtOnce][4] = {}, aged_sums[2 * kTilesAtOnce][4] = {};
#pragma unroll 1
    for (int row_tile = 0; row_tile < kRowTiles; row_tile++) {
      uint32_t dout[4];
      load_columns(dout, shared.dout[stage], row_tile);
      const Weighted decayed(dout, row_tile, [&](int token) { return unit.to_unit * shared.decay[token + 1]; });
      // Positions over kChunk, since float16 has little range.
      const Weighted weighted(dout, row_tile,
                              [&](int token) { return unit.to_unit / kChunk * shared.aged_decay[token + 1]; });
#pragma unroll
      for (int i = 0; i < kTilesAtOnce; i++) {
        uint32_t q[4];
        load_right(q, shared.q[stage], row_tile, first + i);
        multiply(sums[2 * i], sums[2 * i + 1], decayed, q);
        if constexpr (kPairs) multiply(aged_sums[2 * i], aged_sums[2 * i + 1], weighted, q);
      }
    }
#pragma unroll
    for (int i = 0; i < 8 * kTilesAtOnce; i++) {
      const float s = state[2 * first + i / 4][i % 4];
      float& t = aged[2 * first + i / 4][i % 4];
      if constexpr (kPairs) {
        // NOTE: no 0 * inf when a negative slope overflows decays of a state that is still empty.
        if (s != 0) sum += s * (aged_sums[i / 4][i % 4] * kChunk);
        if (t != 0) sum += t * sums[i / 4][i % 4];
      } else {
        t += decay_before * scale * unit.unit * sums[i / 4][i % 4];
      }
    }
  }
  return scale * unit.unit * sum;
}

// S and T behind the chunk; without kPairs S alone.
template <bool kPairs>
__device__ __forceinline__ void update_states(State& state, State& aged, const Shared& shared, int stage,
                                              int num_tokens, bool has_state) {
  const Unit unit(shared.v[stage]);
  // float16: growing decays would take operands out of range.
  const float growth = kBfloat16 ? 1 : fmaxf(shared.decay[num_tokens - 1], 1.0f);
  const float factor = has_state ? shared.decay[num_tokens] / (growth * unit.unit) : 0;  // NOTE: no 0 * inf
#pragma unroll
  for (int i = 0; i < 8 * kQkTiles; i++) {
    float& s = state[i / 4][i % 4];
    float& t = aged[i / 4][i % 4];
    if constexpr (kPairs) t = factor * (1.0f / kChunk) * (t + num_tokens * s);
    s *= factor;
  }
#pragma unroll 1
  for (int row_tile = 0; row_tile < kRowTiles; row_tile++) {
    uint32_t v[4];
    load_columns(v, shared.v[stage], row_tile);
    auto weight = [&](int token) {
      return unit.to_unit / growth * shared.decay[max(num_tokens - 1 - token, 0)];
    };
    const Weighted decayed(v, row_tile, weight);
    const Weighted weighted(v, row_tile, [&](int token) {
      return max(num_tokens - 1 - token, 0) * (1.0f / kChunk) * weight(token);  // T over kChunk, as positions
    });
#pragma unroll
    for (int tile = 0; tile < kQkTiles; tile++) {
      uint32_t k[4];
      load_right(k, shared.k[stage], row_tile, tile);
      multiply(state[2 * tile], state[2 * tile + 1], decayed, k);
      if constexpr (kPairs) multiply(aged[2 * tile], aged[2 * tile + 1], weighted, k);
    }
  }
#pragma unroll
  for (int i = 0; i < 8 * kQkTiles; i++) {
    state[i / 4][i % 4] *= growth * unit.unit;
    if constexpr (kPairs) aged[i / 4][i % 4] *= growth * unit.unit * kChunk;
  }
}

// A pass over a segment, for pairs of its tokens with those in front of them, or only for what it adds to states.
template <bool kPairs>
__device__ __forceinline__ double walk(State& state, State& aged, Shared& shared, const SlopeArgs& args,
                                       const TileWork& work, bool has_state) {
  double slope = slope_of(args, work.head_idx), total = 0;
  for (int i = threadIdx.x; i <= kChunk; i += kThreads) {
    float decay = expf(static_cast<float>(-slope * i));
    shared.decay[i] = decay;
    shared.aged_decay[i] = i * decay;
  }
  const float scale = static_cast<float>(args.scale);
  auto load = [&](int64_t first, int stage) {
    int64_t token_idx = work.first_token + first;
    int num_tokens = min(static_cast<int64_t>(kChunk), work.num_tokens - first);
    auto of = [&](const void* array, const Strides& strides, int first_column) {
      return at(static_cast<const uint16_t*>(array), strides, work, token_idx) + first_column * strides.dim;
    };
    auto load_k = [&](uint16_t* tile, const void* array, const Strides& strides, bool vectorized) {
      load_tile<kChunk, kQkBlock, kQkPitch, kThreads>(tile, of(array, strides, work.first_k), strides.token,
                                                      strides.dim, num_tokens, work.num_k(args), vectorized);
    };
    auto load_v = [&](uint16_t* tile, const void* array, const Strides& strides, bool vectorized) {
      load_tile<kChunk, kVBlock, kVPitch, kThreads>(tile, of(array, strides, work.first_v), strides.token,
                                                    strides.dim, num_tokens, work.num_v(args), vectorized);
    };
    load_k(&shared.q[stage][0][0], args.q, args.q_strides, args.q_vectorized);
    load_k(&shared.k[stage][0][0], args.k, args.k_strides, args.k_vectorized);
    load_v(&shared.v[stage][0][0], args.v, args.v_strides, args.v_vectorized);
    load_v(&shared.dout[stage][0][0], args.dout, args.dout_strides, args.dout_vectorized);
  };
  if constexpr (kStages == 2) load(0, 0);
  for (int64_t first = 0; first < work.num_tokens; first += kChunk) {
    int stage = kStages == 2 ? first / kChunk % 2 : 0;
    if constexpr (kStages == 1) {
      __syncthreads();
      load(first, 0);
    }
    cp_async_wait_all();
    __syncthreads();
    if (kStages == 2 && first + kChunk < work.num_tokens) load(first + kChunk, 1 - stage);
    int num_tokens = min(static_cast<int64_t>(kChunk), work.num_tokens - first);
    if constexpr (kPairs) {
      total += static_cast<double>(scale * pairs_in_chunk(shared, stage));
      if (has_state) total += static_cast<double>(pairs_with_state<true>(state, aged, shared, stage, scale, 0));
    } else {
      pairs_with_state<false>(state, aged, shared, stage, scale, expf(static_cast<float>(-slope * first)));
    }
    update_states<kPairs>(state, aged, shared, stage, num_tokens, has_state);
    has_state = true;
  }
  return total;
}

// Where an element of a state that a thread has is in the tile.
__device__ __forceinline__ int k_index(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }
__device__ __forceinline__ int v_index(int i) {
  return threadIdx.x / 32 * kSlab + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
}

// What segments add to states and to their gradients, for scan.
extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
    slope_states(const __grid_constant__ SlopeArgs args) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  TileWork work(args);
  if (!work.exists) return;
  State state = {}, dstate = {};
  walk<false>(state, dstate, shared, args, work, false);
  Added added(args, work);
#pragma unroll
  for (int i = 0; i < 8 * kQkTiles; i++) added.set(k_index(i), v_index(i), state[i / 4][i % 4], dstate[i / 4][i % 4]);
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
    slope_partials(const __grid_constant__ SlopeArgs args) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  TileWork work(args);
  if (!work.exists) return;
  State state, aged = {};
  StateView<float> entry = entry_state(args, work);
#pragma unroll
  for (int i = 0; i < 8 * kQkTiles; i++) state[i / 4][i % 4] = entry(k_index(i), v_index(i));
  double total = walk<true>(state, aged, shared, args, work, entry.first != nullptr);
  StateView<float> dstate = exit_dstate(args, work);
#pragma unroll
  for (int i = 0; i < 8 * kQkTiles; i++) {
    float t = aged[i / 4][i % 4];
    if (t != 0) total += static_cast<double>(t) * dstate(k_index(i), v_index(i));
  }
  store_partial(args, work, total);
}
