// Gradient of the slopes with ordinary multiply-adds, at the accuracy of the type: backward.cuh has the mathematics.
// For float32 and float64, and for bfloat16 where tensor cores do not know it. Constants come as -D from
// lightning_cupy/backward.py.
#include "backward.cuh"

using Element = ELEMENT;
constexpr int kVector = 16 / sizeof(Real);
// Threads stand in a grid: along x columns of v, a vector each; along y tokens or rows of states.
constexpr int kThreadsX = kVBlock / kVector, kThreadsY = kThreads / kThreadsX;
constexpr int kRows = (kChunk + kThreadsY - 1) / kThreadsY, kScoreCols = kChunk / kThreadsX;
constexpr int kStateRows = kQkBlock / kThreadsY;
constexpr int kRowsAtOnce = kStateRows % 4 == 0 ? 4 : kStateRows % 2 == 0 ? 2 : 1;
constexpr int kQkPitch = kQkBlock + kVector, kVPitch = kVBlock + kVector;
static_assert(kThreadsX * kThreadsY == kThreads && kScoreCols * kThreadsX == kChunk &&
                  kStateRows * kThreadsY == kQkBlock && kQkBlock % kVector == 0 && kThreads % 32 == 0,
              "backward.py: the tiles do not divide");

struct Shared {
  alignas(16) Real q[kChunk][kQkPitch], k[kChunk][kQkPitch];
  Real v[kChunk][kVPitch], dout[kChunk][kVPitch];
  Real state[kQkBlock][kVBlock], aged[kQkBlock][kVBlock];  // S and T
  Real decay[kChunk + kVector];                        // decay^i
};
static_assert(sizeof(Shared) <= SMEM_BYTES, "backward.py: smem_bytes is smaller than Shared");

struct alignas(16) Vector {
  Real element[kVector];
};
__device__ __forceinline__ Vector load(const Real* address) { return *reinterpret_cast<const Vector*>(address); }

__device__ __forceinline__ Real to_real(Element x) {
  if constexpr (sizeof(Element) == 2) {
    return unpack<BFLOAT16>(static_cast<uint32_t>(x)).x;
  } else {
    return x;
  }
}

// tile = rows of `source`, zero beyond num_rows and num_cols.
template <int kCols, int kPitch>
__device__ __forceinline__ void load_reals(Real (&tile)[kChunk][kPitch], const Element* source, const Strides& strides,
                                           int num_rows, int num_cols) {
  bool along_rows = llabs(strides.token) < llabs(strides.dim);
#pragma unroll 4
  for (int idx = threadIdx.x; idx < kChunk * kCols; idx += kThreads) {
    int row = along_rows ? idx % kChunk : idx / kCols, col = along_rows ? idx / kChunk : idx % kCols;
    bool exists = row < num_rows && col < num_cols;
    tile[row][col] = exists ? to_real(source[row * strides.token + col * strides.dim]) : Real(0);
  }
}

// The pairs of tokens of a chunk; each thread has rows y, y + kThreadsY, ... and columns x, x + kThreadsX, ...
__device__ __forceinline__ Real pairs_in_chunk(const Shared& shared, int x, int y) {
  Real p[kRows][kScoreCols] = {}, dp[kRows][kScoreCols] = {};
  auto multiply = [&](Real (&sums)[kRows][kScoreCols], const Real* left, const Real* right, int depth, int pitch) {
#pragma unroll 2
    for (int first = 0; first < depth; first += kVector) {
      Vector l[kRows], r[kScoreCols];
#pragma unroll
      for (int i = 0; i < kRows; i++) l[i] = load(left + (y + i * kThreadsY) * pitch + first);
#pragma unroll
      for (int j = 0; j < kScoreCols; j++) r[j] = load(right + (x + j * kThreadsX) * pitch + first);
#pragma unroll
      for (int i = 0; i < kRows; i++) {
#pragma unroll
        for (int j = 0; j < kScoreCols; j++) {
#pragma unroll
          for (int e = 0; e < kVector; e++) sums[i][j] += l[i].element[e] * r[j].element[e];
        }
      }
    }
  };
  multiply(p, &shared.q[0][0], &shared.k[0][0], kQkBlock, kQkPitch);
  multiply(dp, &shared.dout[0][0], &shared.v[0][0], kVBlock, kVPitch);
  Real sum = 0;
#pragma unroll
  for (int i = 0; i < kRows; i++) {
#pragma unroll
    for (int j = 0; j < kScoreCols; j++) {
      int row = y + i * kThreadsY, distance = row - (x + j * kThreadsX);
      // NOTE: with more threads than rows, sums of rows that do not exist are of whatever is behind the tile.
      if (row < kChunk && distance > 0) sum += distance * shared.decay[distance] * p[i][j] * dp[i][j];
    }
  }
  return sum;
}

// Sums of a chunk over its tokens, for a thread's rows of states from `row` on, and a vector of columns: kT (u v) and
// qT (w do), and the same with each term multiplied by its age, or by its position.
struct Sums {
  Real state[kRowsAtOnce][kVector] = {}, aged_state[kRowsAtOnce][kVector] = {};
  Real dstate[kRowsAtOnce][kVector] = {}, aged_dstate[kRowsAtOnce][kVector] = {};

  __device__ __forceinline__ Sums(const Shared& shared, int row, int x, int num_tokens, Real scale) {
    for (int token = 0; token < num_tokens; token++) {
      Vector v = load(&shared.v[token][x * kVector]), dout = load(&shared.dout[token][x * kVector]);
      Real age = num_tokens - 1 - token, u = shared.decay[num_tokens - 1 - token];
      Real position = token + 1, w = scale * shared.decay[token + 1];
      Real k[kRowsAtOnce], q[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; i++) k[i] = shared.k[token][row + i], q[i] = shared.q[token][row + i];
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        Real uv = u * v.element[e], wdo = w * dout.element[e];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; i++) {
          state[i][e] += k[i] * uv;
          aged_state[i][e] += k[i] * (age * uv);
          dstate[i][e] += q[i] * wdo;
          aged_dstate[i][e] += q[i] * (position * wdo);
        }
      }
    }
  }
};

// x = decay x + added. A decay is a sum of two numbers, as in forward_float.cu.
struct Decay {
  Real high, low;

  __device__ __forceinline__ explicit Decay(double decay)
      : high(static_cast<Real>(decay)), low(static_cast<Real>(isinf(decay) ? 0 : decay - static_cast<Real>(decay))) {}
  __device__ __forceinline__ Real operator()(Real x, Real added) const {
    // NOTE: no 0 * inf when a negative slope overflows the decay of a state that is still empty.
    return x == 0 ? added : fma(x, high, fma(x, low, added));
  }
};

// What the tokens of a chunk add; a thread has kStateRows rows, a vector of columns. With kPairs, S and T move on, and
// pairs with tokens in front of the chunk are returned. Else S moves on, and T is qT (w do) since the segment's begin.
template <bool kPairs>
__device__ __forceinline__ Real add_chunk(Shared& shared, int x, int y, int num_tokens, Real scale, Decay decay,
                                          Real decay_before) {
  Real sum = 0;
#pragma unroll 1
  for (int row = y * kStateRows; row < (y + 1) * kStateRows; row += kRowsAtOnce) {
    Sums sums(shared, row, x, num_tokens, scale);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      Vector& state = *reinterpret_cast<Vector*>(&shared.state[row + i][x * kVector]);
      Vector& aged = *reinterpret_cast<Vector*>(&shared.aged[row + i][x * kVector]);
#pragma unroll
      for (int e = 0; e < kVector; e++) {
        Real s = state.element[e], t = aged.element[e];
        state.element[e] = decay(s, sums.state[i][e]);
        if constexpr (kPairs) {
          if (s != 0) sum += s * sums.aged_dstate[i][e];
          if (t != 0) sum += t * sums.dstate[i][e];
          aged.element[e] = decay(t + num_tokens * s, sums.aged_state[i][e]);
        } else {
          if (sums.dstate[i][e] != 0) aged.element[e] = fma(decay_before, sums.dstate[i][e], t);
        }
      }
    }
  }
  return sum;
}

// A pass over a segment, for pairs of its tokens with those in front of them, or only for what it adds to states.
template <bool kPairs>
__device__ __forceinline__ double walk(Shared& shared, const SlopeArgs& args, const TileWork& work) {
  int x = threadIdx.x % kThreadsX, y = threadIdx.x / kThreadsX;
  double slope = slope_of(args, work.head_idx), total = 0;
  for (int i = threadIdx.x; i <= kChunk; i += kThreads) {
    shared.decay[i] = sizeof(Real) == 8 ? exp(-slope * i) : expf(static_cast<float>(-slope * i));
  }
  const Real scale = static_cast<Real>(args.scale);
  const Decay whole_decay(exp(-slope * kChunk));
  for (int64_t first = 0; first < work.num_tokens; first += kChunk) {
    int64_t token_idx = work.first_token + first;
    int num_tokens = min(static_cast<int64_t>(kChunk), work.num_tokens - first);
    auto of = [&](const void* array, const Strides& strides, int first_column) {
      return at(static_cast<const Element*>(array), strides, work, token_idx) + first_column * strides.dim;
    };
    load_reals<kQkBlock>(shared.q, of(args.q, args.q_strides, work.first_k), args.q_strides, num_tokens,
                         work.num_k(args));
    load_reals<kQkBlock>(shared.k, of(args.k, args.k_strides, work.first_k), args.k_strides, num_tokens,
                         work.num_k(args));
    load_reals<kVBlock>(shared.v, of(args.v, args.v_strides, work.first_v), args.v_strides, num_tokens,
                        work.num_v(args));
    load_reals<kVBlock>(shared.dout, of(args.dout, args.dout_strides, work.first_v), args.dout_strides, num_tokens,
                        work.num_v(args));
    __syncthreads();
    const Decay decay = num_tokens < kChunk ? Decay(exp(-slope * num_tokens)) : whole_decay;
    if constexpr (kPairs) {
      total += static_cast<double>(scale * pairs_in_chunk(shared, x, y));
      total += static_cast<double>(add_chunk<true>(shared, x, y, num_tokens, scale, decay, 0));
    } else {
      add_chunk<false>(shared, x, y, num_tokens, scale, decay, static_cast<Real>(exp(-slope * first)));
    }
    __syncthreads();
  }
  return total;
}

// What segments add to states and to their gradients, for scan.
extern "C" __global__ void __launch_bounds__(kThreads) slope_states(const __grid_constant__ SlopeArgs args) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  TileWork work(args);
  if (!work.exists) return;
  for (int idx = threadIdx.x; idx < kQkBlock * kVBlock; idx += kThreads) {
    shared.state[idx / kVBlock][idx % kVBlock] = shared.aged[idx / kVBlock][idx % kVBlock] = 0;
  }
  walk<false>(shared, args, work);
  Added added(args, work);
  for (int idx = threadIdx.x; idx < kQkBlock * kVBlock; idx += kThreads) {
    int k_idx = idx / kVBlock, v_idx = idx % kVBlock;
    added.set(k_idx, v_idx, shared.state[k_idx][v_idx], shared.aged[k_idx][v_idx]);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) slope_partials(const __grid_constant__ SlopeArgs args) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  TileWork work(args);
  if (!work.exists) return;
  StateView<Real> entry = entry_state(args, work), dstate = exit_dstate(args, work);
  for (int idx = threadIdx.x; idx < kQkBlock * kVBlock; idx += kThreads) {
    shared.state[idx / kVBlock][idx % kVBlock] = entry(idx / kVBlock, idx % kVBlock);
    shared.aged[idx / kVBlock][idx % kVBlock] = 0;
  }
  double total = walk<true>(shared, args, work);
  for (int idx = threadIdx.x; idx < kQkBlock * kVBlock; idx += kThreads) {
    double t = shared.aged[idx / kVBlock][idx % kVBlock];
    if (t != 0) total += t * static_cast<double>(dstate(idx / kVBlock, idx % kVBlock));
  }
  store_partial(args, work, total);
}
