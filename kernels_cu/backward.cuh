// What the kernels for the gradient of the slopes share. Those of q, k and v are attentions themselves
// (lightning_cupy/backward.py). A pair of tokens j <= i has decay^(i-j) in its product, so that
//
//   -dslope = sum of (i - j) scale decay^(i-j) (q_i k_j) (do_i v_j), and likewise for states from and to outside
//
// Every weight counts tokens in between, and is never the difference of large ones, in which heads that forget fast
// would lose all digits. A chunk of n tokens, from position p = 0 on, with the state S in front of it and T, the same
// sum with each term multiplied by its age (0 for the last token):
//
//   -dslope += sum over i >= j in the chunk + <S, qT ((p+1) w do)> + <T, qT (w do)>     w = scale decay^(p+1)
//   T = decay^n (T + n S) + kT ((n-1-p) u v),  S = decay^n S + kT (u v)                  u = decay^(n-1-p)
//
// and behind the last chunk <dS, T>, with dS the gradient of the state there. All of it is a sum over columns of k and
// columns of v, so that a block has a tile of both, of one (batch, head, segment). The sequence may be cut into
// segments: T starts at 0 in each, and S and dS at the cuts come from slope_states and scan. A block leaves one number
// for sum_partials, which adds them in order.
#pragma once
#include "forward.cuh"

using Real = ACCUM;
constexpr int kQkBlock = QK_BLOCK, kVBlock = V_BLOCK, kChunk = CHUNK, kThreads = NUM_THREADS;

// backward.py packs this struct: the same fields in the same order.
struct SlopeArgs {
  Real* dslopes;                // [num_heads]
  double* partials;             // [batch, num_heads, num_segments, tiles of a state]
  const void *dout, *q, *k, *v;
  const Real* initial_state;    // [batch, num_heads, qk_dim, v_dim], or null for zeros
  const Real* dstate;           // likewise
  Real* segment_states;         // [batch, num_heads, num_segments, qk_dim, v_dim], or null when there is one segment
  Real* segment_dstates;        // likewise, but the last segment comes first
  const void* slopes;           // [num_heads] float or double, or null
  Strides dout_strides, q_strides, k_strides, v_strides;
  StateStrides initial_strides, dstate_strides;
  int64_t slopes_stride;
  int64_t batch, seqlen, segment_length;
  double scale, slope;          // slope of all heads where slopes is null
  int num_heads, qk_dim, v_dim;
  int num_v_blocks;             // tiles of a state: blocks of k's times blocks of v's columns
  int num_segments;
  int slopes_are_double;
  int dout_vectorized, q_vectorized, k_vectorized, v_vectorized;
};

// The part of the problem that one block computes, and where its tile of states begins.
struct TileWork : Work {
  int first_k;

  __device__ __forceinline__ explicit TileWork(const SlopeArgs& args) : Work(find_work<kVBlock>(args)) {
    int tile = first_v / kVBlock, num_v_blocks = (args.v_dim + kVBlock - 1) / kVBlock;
    first_k = tile / num_v_blocks * kQkBlock;
    first_v = tile % num_v_blocks * kVBlock;
  }

  __device__ __forceinline__ int64_t head(const SlopeArgs& args) const { return batch_idx * args.num_heads + head_idx; }
  __device__ __forceinline__ int num_k(const SlopeArgs& args) const { return args.qk_dim - first_k; }
  __device__ __forceinline__ int num_v(const SlopeArgs& args) const { return args.v_dim - first_v; }
};

// The tile of a state at one end of a segment: of the sequence's end from outside, or of a cut.
__device__ __forceinline__ StateView<Real> state_at(const SlopeArgs& args, const TileWork& work, const Real* outer,
                                                    const StateStrides& strides, const Real* segments, int64_t idx) {
  StateView<Real> state = {nullptr, args.v_dim, 1, work.num_k(args), work.num_v(args)};
  if (args.num_segments > 1) {
    state.first = segments + (work.head(args) * args.num_segments + idx) * args.qk_dim * args.v_dim;
  } else if (outer != nullptr) {
    state.first = outer + work.batch_idx * strides.batch + work.head_idx * strides.head;
    state.qk_stride = strides.qk_dim;
    state.v_stride = strides.v_dim;
  }
  if (state.first != nullptr) state.first += work.first_k * state.qk_stride + work.first_v * state.v_stride;
  return state;
}
__device__ __forceinline__ StateView<Real> entry_state(const SlopeArgs& args, const TileWork& work) {
  return state_at(args, work, args.initial_state, args.initial_strides, args.segment_states, work.segment_idx);
}
__device__ __forceinline__ StateView<Real> exit_dstate(const SlopeArgs& args, const TileWork& work) {
  return state_at(args, work, args.dstate, args.dstate_strides, args.segment_dstates,
                  args.num_segments - 1 - work.segment_idx);
}

// Stores what a segment adds to the state behind it, or to the gradient of that in front of it.
struct Added {
  Real *state, *dstate;
  int num_k, num_v;
  int64_t pitch;

  __device__ __forceinline__ Added(const SlopeArgs& args, const TileWork& work)
      : num_k(work.num_k(args)), num_v(work.num_v(args)), pitch(args.v_dim) {
    int64_t first = work.head(args) * args.num_segments, size = static_cast<int64_t>(args.qk_dim) * args.v_dim;
    int64_t element = work.first_k * pitch + work.first_v;
    state = args.segment_states + (first + work.segment_idx) * size + element;
    dstate = args.segment_dstates + (first + args.num_segments - 1 - work.segment_idx) * size + element;
  }

  __device__ __forceinline__ void set(int k_idx, int v_idx, Real of_state, Real of_dstate) const {
    if (k_idx >= num_k || v_idx >= num_v) return;
    state[k_idx * pitch + v_idx] = of_state;
    dstate[k_idx * pitch + v_idx] = of_dstate;
  }
};

// Adds up what the threads of a block have.
__device__ __forceinline__ void store_partial(const SlopeArgs& args, const TileWork& work, double total) {
  __shared__ double sums[kThreads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / 32; warp++) total += sums[warp];
  int tile = work.first_k / kQkBlock * ((args.v_dim + kVBlock - 1) / kVBlock) + work.first_v / kVBlock;
  args.partials[(work.head(args) * args.num_segments + work.segment_idx) * args.num_v_blocks + tile] = total;
}

// A warp for each head.
extern "C" __global__ void __launch_bounds__(kThreads) sum_partials(const __grid_constant__ SlopeArgs args) {
  int64_t head_idx = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / 32;
  if (head_idx >= args.num_heads) return;
  constexpr int kAhead = 8;  // loads under way
  int num_of_head = args.num_segments * args.num_v_blocks;
  double sum = 0;
  for (int64_t batch_idx = 0; batch_idx < args.batch; batch_idx++) {
    const double* partials = args.partials + (batch_idx * args.num_heads + head_idx) * num_of_head;
    for (int idx = threadIdx.x % 32; idx < num_of_head; idx += 32 * kAhead) {
      double x[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++) x[i] = idx + i * 32 < num_of_head ? partials[idx + i * 32] : 0;
#pragma unroll
      for (int i = 0; i < kAhead; i++) sum += x[i];
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) args.dslopes[head_idx] = static_cast<Real>(0 - sum);
}
