// Forward for float32 and float64 with ordinary multiply-adds, at the accuracy of the type, one chunk at a time:
//
//   P = scale (q kT) * decay^(i-j) on and below the diagonal
//   o = scale decay^(i+1) (q S) + P v
//   S = decay^C S + kT (decay^(C-1-j) v)
//
// All operands stand in shared memory, S too; every product is a small tile of outputs a thread. S is updated once
// a chunk from a fresh sum, and its decay is a sum of two numbers: rounded to one float, a decay of 1 - 1e-6 would
// be wrong by 1e-5 after a few hundred chunks. With REVERSED=1 from the last token to the first, as forward.cuh has it.
// Constants come as -D from lightning_cupy/forward.py.
#include "forward.cuh"

using Real = ACCUM;
constexpr bool kOutputs = OUTPUTS, kCausal = CAUSAL;
constexpr int kQkDim = QK_DIM, kVBlock = V_BLOCK, kChunk = CHUNK, kThreads = NUM_THREADS;
constexpr Real kLargest = sizeof(Real) == 8 ? Real(1.7976931348623157e308) : Real(3.402823466e+38f);
constexpr int kVector = 16 / sizeof(Real);  // what one load from shared memory brings
// Threads stand in a grid: along x columns of v, a vector each; along y rows.
constexpr int kThreadsX = kVBlock / kVector, kThreadsY = kThreads / kThreadsX;
constexpr int kRows = kChunk / kThreadsY, kScoreCols = kChunk / kThreadsX, kStateRows = kQkDim / kThreadsY;
// A vector more a row puts the rows that neighbouring threads read in different banks.
constexpr int kQkPitch = kQkDim + kVector, kPPitch = kChunk + kVector;
static_assert(kThreadsX * kThreadsY == kThreads && kRows * kThreadsY == kChunk && kScoreCols * kThreadsX == kChunk &&
                  kStateRows * kThreadsY == kQkDim && kQkDim % kVector == 0 && kChunk % kVector == 0,
              "forward.py: the tiles do not divide");

struct Shared {
  alignas(16) Real q[kChunk][kQkPitch];
  Real k[kChunk][kQkPitch];
  Real v[kChunk][kVBlock];
  Real p[kChunk][kPPitch];
  Real state[kQkDim][kVBlock];
  Real decay[kChunk + kVector];  // decay^i
};
static_assert(sizeof(Shared) <= SMEM_BYTES, "forward.py: smem_bytes is smaller than Shared");

struct alignas(16) Vector {
  Real element[kVector];
};

__device__ __forceinline__ Vector load(const Real* address) { return *reinterpret_cast<const Vector*>(address); }

// P into shared memory; each thread has rows y, y + kThreadsY, ... and columns x, x + kThreadsX, ...
__device__ __forceinline__ void scores(Shared& shared, int x, int y, Real scale) {
  Real p[kRows][kScoreCols] = {};
#pragma unroll 2
  for (int k_idx = 0; k_idx < kQkDim; k_idx += kVector) {
    Vector q[kRows], k[kScoreCols];
#pragma unroll
    for (int i = 0; i < kRows; i++) q[i] = load(&shared.q[y + i * kThreadsY][k_idx]);
#pragma unroll
    for (int j = 0; j < kScoreCols; j++) k[j] = load(&shared.k[x + j * kThreadsX][k_idx]);
#pragma unroll
    for (int i = 0; i < kRows; i++) {
#pragma unroll
      for (int j = 0; j < kScoreCols; j++) {
#pragma unroll
        for (int e = 0; e < kVector; e++) p[i][j] += q[i].element[e] * k[j].element[e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; i++) {
#pragma unroll
    for (int j = 0; j < kScoreCols; j++) {
      int row = y + i * kThreadsY, col = x + j * kThreadsX;
      int distance = kReversed ? col - row : row - col;
      shared.p[row][col] = distance >= 0 ? p[i][j] * scale * shared.decay[distance] : Real(0);
    }
  }
}

// sums[i] += left[y + i kThreadsY][:kDepth] right[:kDepth][kVector x ...]
template <int kDepth, int kLeftPitch>
__device__ __forceinline__ void multiply(Vector (&sums)[kRows], const Real* left, const Real (*right)[kVBlock],
                                         int x, int y) {
#pragma unroll 2
  for (int depth = 0; depth < kDepth; depth += kVector) {
    Vector l[kRows];
#pragma unroll
    for (int i = 0; i < kRows; i++) l[i] = load(left + (y + i * kThreadsY) * kLeftPitch + depth);
#pragma unroll
    for (int d = 0; d < kVector; d++) {
      Vector r = load(&right[depth + d][x * kVector]);
#pragma unroll
      for (int i = 0; i < kRows; i++) {
#pragma unroll
        for (int e = 0; e < kVector; e++) sums[i].element[e] += l[i].element[d] * r.element[e];
      }
    }
  }
}

// As many of a thread's rows of S as one load brings keys for.
constexpr int kKeys = kStateRows % kVector == 0 ? kVector : 2;
struct alignas(kKeys * sizeof(Real)) Keys {
  Real element[kKeys];
};
static_assert(kStateRows % kKeys == 0, "forward.py: the rows of the state do not divide");

// S = decay^n S + kT (decay^(n-1-j) v): each thread has kStateRows rows, a vector of columns.
__device__ __forceinline__ void update_state(Shared& shared, int x, int y, int num_tokens, Real scale, Real decay,
                                             Real decay_low) {
  Real sums[kStateRows][kVector] = {};
  for (int token = 0; token < num_tokens; token++) {
    Vector v = load(&shared.v[token][x * kVector]);
    Real weight = kReversed ? scale * shared.decay[token + 1] : shared.decay[num_tokens - 1 - token];
#pragma unroll
    for (int e = 0; e < kVector; e++) v.element[e] *= weight;
#pragma unroll
    for (int first = 0; first < kStateRows; first += kKeys) {
      Keys k = *reinterpret_cast<const Keys*>(&shared.k[token][y * kStateRows + first]);
#pragma unroll
      for (int i = 0; i < kKeys; i++) {
#pragma unroll
        for (int e = 0; e < kVector; e++) sums[first + i][e] += k.element[i] * v.element[e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kStateRows; i++) {
    Vector& state = *reinterpret_cast<Vector*>(&shared.state[y * kStateRows + i][x * kVector]);
#pragma unroll
    for (int e = 0; e < kVector; e++) {
      Real old = state.element[e];
      // NOTE: no 0 * inf when a negative slope overflows the decay of a state that is still empty.
      state.element[e] = old == 0 ? sums[i][e] : fma(old, decay, fma(old, decay_low, sums[i][e]));
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) forward(const __grid_constant__ Args<Real> args) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  Work work = find_work<kVBlock>(args);
  if (!work.exists) return;
  int x = threadIdx.x % kThreadsX, y = threadIdx.x / kThreadsX;
  int num_v = args.v_dim - work.first_v;

  double slope = slope_of(args, work.head_idx);
  for (int i = threadIdx.x; i <= kChunk; i += kThreads) {
    Real decay = sizeof(Real) == 8 ? exp(-slope * i) : expf(static_cast<float>(-slope * i));
    shared.decay[i] = kReversed ? min(decay, kLargest) : decay;  // no 0 * inf of keys behind the end
  }
  StateView<Real> entry = entry_state<kCausal>(args, work);
  for (int idx = threadIdx.x; idx < kQkDim * kVBlock; idx += kThreads) {
    int k_idx = idx / kVBlock, v_idx = idx % kVBlock;
    shared.state[k_idx][v_idx] = kOutputs ? entry(k_idx, v_idx) : Real(0);
  }

  double decay = exp(-slope * kChunk);
  int64_t num_chunks = (work.num_tokens + kChunk - 1) / kChunk;
  for (int64_t chunk_idx = 0; chunk_idx < num_chunks; chunk_idx++) {
    int64_t token_idx = chunk_token(work, chunk_idx, num_chunks, kChunk);
    int num_tokens = min(static_cast<int64_t>(kChunk), work.first_token + work.num_tokens - token_idx);
    if constexpr (kOutputs) {
      load_tile<kChunk, kQkDim, kQkPitch, kThreads>(
          &shared.q[0][0], at(static_cast<const Real*>(args.q), args.q_strides, work, token_idx), args.q_strides.token,
          args.q_strides.dim, num_tokens, args.qk_dim, args.q_vectorized);
    }
    if constexpr (kCausal) {
      load_tile<kChunk, kQkDim, kQkPitch, kThreads>(
          &shared.k[0][0], at(static_cast<const Real*>(args.k), args.k_strides, work, token_idx), args.k_strides.token,
          args.k_strides.dim, num_tokens, args.qk_dim, args.k_vectorized);
      load_tile<kChunk, kVBlock, kVBlock, kThreads>(
          &shared.v[0][0],
          at(static_cast<const Real*>(args.v), args.v_strides, work, token_idx) + work.first_v * args.v_strides.dim,
          args.v_strides.token, args.v_strides.dim, num_tokens, num_v, args.v_vectorized);
    }
    cp_async_wait_all();
    __syncthreads();

    Real scale = static_cast<Real>(args.scale);
    if constexpr (kOutputs) {
      if constexpr (kCausal) {
        scores(shared, x, y, scale);
        __syncthreads();
      }
      Vector o[kRows] = {};
      multiply<kQkDim, kQkPitch>(o, &shared.q[0][0], shared.state, x, y);
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        int row = y + i * kThreadsY;
        Real factor = kReversed ? Real(1) : scale;
        if (kCausal) factor *= shared.decay[kReversed ? max(num_tokens - 1 - row, 0) : row + 1];
        // NOTE: no 0 * inf, as in update_state.
        for (int e = 0; e < kVector; e++) o[i].element[e] = o[i].element[e] == 0 ? Real(0) : o[i].element[e] * factor;
      }
      if constexpr (kCausal) multiply<kChunk, kPPitch>(o, &shared.p[0][0], shared.v, x, y);
      Real* o_chunk = at(static_cast<Real*>(args.o), args.o_strides, work, token_idx) +
                      work.first_v * args.o_strides.dim;
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        int row = y + i * kThreadsY, col = x * kVector;
        Real* o_row = o_chunk + row * args.o_strides.token;
        if (row < num_tokens && args.o_vectorized && col < num_v) {
          *reinterpret_cast<Vector*>(o_row + col) = o[i];
        } else if (row < num_tokens) {
#pragma unroll
          for (int e = 0; e < kVector; e++) {
            if (col + e < num_v) o_row[(col + e) * args.o_strides.dim] = o[i].element[e];
          }
        }
      }
    }
    if constexpr (kCausal) {
      if constexpr (kOutputs) __syncthreads();  // without outputs no other thread reads this one's rows of S
      double chunk_decay = num_tokens < kChunk ? exp(-slope * num_tokens) : decay;
      update_state(shared, x, y, num_tokens, scale, static_cast<Real>(chunk_decay),
                   static_cast<Real>(isinf(chunk_decay) ? 0 : chunk_decay - static_cast<Real>(chunk_decay)));
    }
    __syncthreads();
  }

  Real* exit_state = kCausal ? exit_state_of<!kOutputs>(args, work) : nullptr;
  if (exit_state != nullptr) {
    for (int idx = threadIdx.x; idx < kQkDim * kVBlock; idx += kThreads) {
      int k_idx = idx / kVBlock, v_idx = idx % kVBlock;
      if (k_idx < args.qk_dim && v_idx < num_v) {
        exit_state[static_cast<int64_t>(k_idx) * args.v_dim + work.first_v + v_idx] = shared.state[k_idx][v_idx];
      }
    }
  }
}
