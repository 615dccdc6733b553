// The scan over segments: see forward.cuh. Constants come as -D from lightning_cupy/forward.py.
#include "forward.cuh"

using Accum = ACCUM;

// In place, segment_states[s] becomes the state before segment s; the state behind all goes to final_state.
// The running state is double: a decay rounded to float would drift over the segments.
extern "C" __global__ void __launch_bounds__(NUM_THREADS) scan(const __grid_constant__ Args<Accum> args) {
  int64_t state_size = static_cast<int64_t>(args.qk_dim) * args.v_dim;
  int64_t idx = (blockIdx.x + static_cast<int64_t>(gridDim.x) * blockIdx.y) * blockDim.x + threadIdx.x;
  int64_t head = idx / state_size, element = idx % state_size;
  if (head >= args.batch * args.num_heads) return;
  int64_t batch_idx = head / args.num_heads, head_idx = head % args.num_heads;
  double slope = slope_of(args, head_idx);
  double decay = exp(-slope * args.segment_length);
  double state = 0;
  if (args.initial_state != nullptr) {
    const StateStrides& strides = args.initial_strides;
    state = args.initial_state[batch_idx * strides.batch + head_idx * strides.head +
                               element / args.v_dim * strides.qk_dim + element % args.v_dim * strides.v_dim];
  }
  constexpr int kAhead = 8;  // loads in flight; the store to the same array would keep the compiler from it
  Accum* states = args.segment_states + head * args.num_segments * state_size + element;
  for (int first = 0; first < args.num_segments; first += kAhead) {
    Accum ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (first + i < args.num_segments) ahead[i] = states[(first + i) * state_size];
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (first + i < args.num_segments) {
        states[(first + i) * state_size] = static_cast<Accum>(state);
        bool has_end = first + i == (kReversed ? 0 : args.num_segments - 1);  // of the sequence, so may be shorter
        int64_t length = args.seqlen - (args.num_segments - 1) * args.segment_length;
        // NOTE: no 0 * inf when a negative slope overflows the decay of a state that is still empty.
        state = (state == 0 ? 0 : (has_end ? exp(-slope * length) : decay) * state) + ahead[i];
      }
    }
  }
  if (args.final_state != nullptr) args.final_state[head * state_size + element] = static_cast<Accum>(state);
}
