// What the forward kernels share: their arguments, and which work a block has.
//
// The sequence may be cut into segments, so that a few heads fill the chip:
//   forward, OUTPUTS=0   u_s = the state that segment s alone leaves behind          a block for each segment
//   scan                 state before s + 1 = decay^length (state before s) + u_s    a thread for each state element
//   forward, OUTPUTS=1   outputs of segment s from the state before it               a block for each segment
// With one segment the last is all there is. Without causality (CAUSAL=0) every output sees the final state.
//
// REVERSED=1 is what gradients are (lightning_cupy/backward.py): from the last token to the first. Segments and chunks
// are numbered from the end, tokens within a chunk are not. What a token hands on, to the one in front of it, is a
// state that has scale and its own decay in it already, so that gradients of states go in and come out as they are:
//
//   o_i = (sum of scale decay^(j-i) (q_i k_j) v_j over j >= i in the chunk) + decay^(n-1-i) q_i S
//   S   = decay^n S + kT (scale decay^(j+1) v)                 n tokens in the chunk
#pragma once
#include "tile.cuh"

constexpr bool kReversed = REVERSED;

struct StateStrides {
  int64_t batch, head, qk_dim, v_dim;
};

// forward.py packs this struct: the same fields in the same order.
template <class Accum>
struct Args {
  void* o;  // [batch, seqlen, num_heads, v_dim]
  const void *q, *k, *v;
  Accum* final_state;           // [batch, num_heads, qk_dim, v_dim] contiguous, or null
  const Accum* initial_state;   // [batch, num_heads, qk_dim, v_dim], or null for zeros
  Accum* segment_states;        // [batch, num_heads, num_segments, qk_dim, v_dim], or null when there is one segment
  const void* slopes;           // [num_heads] float or double, or null
  Strides o_strides, q_strides, k_strides, v_strides;
  StateStrides initial_strides;
  int64_t slopes_stride;
  int64_t batch, seqlen, segment_length;
  double scale, slope;          // slope of all heads where slopes is null
  int num_heads, qk_dim, v_dim, num_v_blocks, num_segments;
  int slopes_are_double;
  int o_vectorized, q_vectorized, k_vectorized, v_vectorized;
};

// The part of the problem that one block computes.
struct Work {
  int64_t batch_idx, head_idx, segment_idx, first_token, num_tokens;
  int first_v;
  bool exists;
};

// Columns of v run fastest, so that blocks sharing q and k run together and meet in the L2 cache.
template <int kVBlock, class Args>
__device__ __forceinline__ Work find_work(const Args& args) {
  int64_t idx = blockIdx.x + static_cast<int64_t>(gridDim.x) * blockIdx.y;
  Work work;
  work.first_v = idx % args.num_v_blocks * kVBlock;
  idx /= args.num_v_blocks;
  work.segment_idx = idx % args.num_segments;
  idx /= args.num_segments;
  work.head_idx = idx % args.num_heads;
  work.batch_idx = idx / args.num_heads;
  work.first_token = (kReversed ? args.num_segments - 1 - work.segment_idx : work.segment_idx) * args.segment_length;
  work.num_tokens = min(args.segment_length, args.seqlen - work.first_token);
  work.exists = work.batch_idx < args.batch;
  return work;
}

// The first token of a chunk of a segment.
__device__ __forceinline__ int64_t chunk_token(const Work& work, int64_t chunk_idx, int64_t num_chunks, int chunk) {
  return work.first_token + (kReversed ? num_chunks - 1 - chunk_idx : chunk_idx) * chunk;
}

template <class Args>
__device__ __forceinline__ double slope_of(const Args& args, int64_t head_idx) {
  if (args.slopes == nullptr) return args.slope;
  int64_t offset = head_idx * args.slopes_stride;
  return args.slopes_are_double ? static_cast<const double*>(args.slopes)[offset]
                                : static_cast<const float*>(args.slopes)[offset];
}

template <class Element>
__device__ __forceinline__ Element* at(Element* array, const Strides& strides, const Work& work, int64_t token_idx) {
  return array + work.batch_idx * strides.batch + token_idx * strides.token + work.head_idx * strides.head;
}

// A state in memory, or null for zeros.
template <class Accum>
struct StateView {
  const Accum* first;
  int64_t qk_stride, v_stride;
  int num_qk, num_v;

  __device__ __forceinline__ Accum operator()(int k_idx, int v_idx) const {
    bool exists = first != nullptr && k_idx < num_qk && v_idx < num_v;
    return exists ? first[k_idx * qk_stride + v_idx * v_stride] : Accum(0);
  }
};

// The state that a block starts from: in front of its segment, or for non-causal outputs behind all of them.
template <bool kCausal, class Accum>
__device__ __forceinline__ StateView<Accum> entry_state(const Args<Accum>& args, const Work& work) {
  int64_t head = work.batch_idx * args.num_heads + work.head_idx;
  int64_t state_size = static_cast<int64_t>(args.qk_dim) * args.v_dim;
  StateView<Accum> state = {nullptr, args.v_dim, 1, args.qk_dim, args.v_dim - work.first_v};
  if (!kCausal) {
    state.first = args.final_state + head * state_size + work.first_v;
  } else if (args.num_segments > 1) {
    state.first = args.segment_states + (head * args.num_segments + work.segment_idx) * state_size + work.first_v;
  } else if (args.initial_state != nullptr) {
    const StateStrides& strides = args.initial_strides;
    state.first = args.initial_state + work.batch_idx * strides.batch + work.head_idx * strides.head +
                  work.first_v * strides.v_dim;
    state.qk_stride = strides.qk_dim;
    state.v_stride = strides.v_dim;
  }
  return state;
}

// Where a block leaves its state: u_s for the scan, or the final state of the only segment.
template <bool kStatesOnly, class Accum>
__device__ __forceinline__ Accum* exit_state_of(const Args<Accum>& args, const Work& work) {
  int64_t head = work.batch_idx * args.num_heads + work.head_idx;
  int64_t state_size = static_cast<int64_t>(args.qk_dim) * args.v_dim;
  if (kStatesOnly) return args.segment_states + (head * args.num_segments + work.segment_idx) * state_size;
  if (args.num_segments > 1 || args.final_state == nullptr) return nullptr;
  return args.final_state + head * state_size;
}
