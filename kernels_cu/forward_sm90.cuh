// What the kernels for Hopper share: arguments, and where elements of states belong.
#pragma once
#include "forward.cuh"
#include "ptx_sm90.cuh"

using Tile = uint16_t[64][64];  // 64 rows of 128 bytes, swizzled by 128 bytes: vectors of 16 are at vector ^ row % 8
constexpr int kTileBytes = sizeof(Tile);

// forward_sm90.py packs this struct: the same fields in the same order.
struct HopperArgs {
  TensorMap q, k, v, o;
  TensorMap primal;            // SLOPES: what o is the gradient of
  float* final_state;          // [batch, num_heads, qk_dim, v_dim] contiguous, or null
  const float* initial_state;  // [batch, num_heads, qk_dim, v_dim], or null for zeros
  float* workspace;            // forward_sm90.cu, SPLIT: of each team [2, size - 1, kStateSize], then flags of 8 bytes,
                               // [2, members of all teams, V_GROUPS]
  uint64_t first_flag;         // SPLIT: no other launch sets a flag to this value or the next 2^32
  const void* slopes;          // [num_heads] float or double, or null
  double* partials;            // SLOPES: [batch, num_heads, num_v_blocks, max_members, warps that sum]
  const float* dstate;         // SLOPES: the gradient of the final state, or null for zeros
  StateStrides initial_strides, dstate_strides;
  int64_t slopes_stride;
  double scale, slope;         // slope of all heads where slopes is null
  int num_rows;                // batch times heads times blocks of v's columns
  int seqlen, first_length, segment_length, team_size;  // lengths of the first member's segment, and of others
  int num_heads, qk_dim, v_dim, num_v_blocks, slopes_are_double;
  int max_members;             // of a team
  float states_time;           // SPLIT: 0 if all teams are of team_size, else a chunk's time for states over outputs
};

// Which element of a state a thread of a warpgroup has in a register of its 64 transposed columns of v.
struct StateIndex {
  int k_idx, v_idx;

  __device__ __forceinline__ StateIndex(int first_v, int register_idx, int thread) {
    int lane = thread % 32;
    k_idx = register_idx / 4 * 8 + lane % 4 * 2 + register_idx % 2;
    v_idx = first_v + thread / 32 * 16 + lane / 4 + register_idx / 2 % 2 * 8;
  }
};

__device__ __forceinline__ float initial(const HopperArgs& args, int batch_idx, int head_idx, StateIndex idx) {
  if (idx.k_idx >= args.qk_dim || idx.v_idx >= args.v_dim) return 0;
  const StateStrides& strides = args.initial_strides;
  return args.initial_state[batch_idx * strides.batch + head_idx * strides.head + idx.k_idx * strides.qk_dim +
                            idx.v_idx * strides.v_dim];
}

__device__ __forceinline__ void store_final(const HopperArgs& args, int batch_idx, int head_idx, StateIndex idx,
                                            float value) {
  if (idx.k_idx >= args.qk_dim || idx.v_idx >= args.v_dim) return;
  int64_t head = static_cast<int64_t>(batch_idx) * args.num_heads + head_idx;
  args.final_state[(head * args.qk_dim + idx.k_idx) * args.v_dim + idx.v_idx] = value;
}
