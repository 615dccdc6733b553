// The gradient of the slopes, in the pass of forward_sm90.cu that makes dq, with SLOPES=1. There q, k and v are do, v
// and k, and o is dq. As in backward.cuh
//
//   -dslope = sum of (i - j) scale decay^(i-j) (q_i k_j) (do_i v_j) over j <= i
//
// For two tokens of one chunk that is summed as it stands. For others, with n tokens in a chunk, p their positions in
// theirs, S the state in front of the chunk of i, and T the same sum with each term times its age there, less m' tokens:
//
//   sum of (i - j) P_ij (q_i k_j) + sum of (p_i + 1 - m) q_i (w S do_i) + <T + (m + m') S, sum of w q_i doT_i>
//   T = decay^n (T + n S) + sum of (n-1-p_j - m') decay^(n-1-p_j) k_j vT_j                      w = scale decay^(p_i+1)
//
// and <dS, T + m' S> behind the end. The first is summed by the scores warpgroup, the second by the group, from what it
// has of dq, the third by a warpgroup of its own, which has T in registers as the group has S. Weights count tokens of
// a chunk, and are never differences of large ones, in which heads that forget fast would lose all digits. Rounded to 16
// bits are S in the second sum, as it is for dq, and where head dims are large what is added to T. m and m', the means
// of p + 1 and n-1-p with the squares of their decays as weights, make the least of both. So bfloat16 has an error of
// up to 1e-3 of what such sums come to where signs are random, float16 of 1e-4.
#pragma once
#include "schedule_sm90.cuh"

// m above, where chunks are whole or there is one; m' is one less.
__device__ __forceinline__ float mean_position(double slope, int seqlen) {
  float s = 2 * fabsf(static_cast<float>(slope)), n = min(seqlen, kChunk);
  if (s < 1e-3f) return (n + 1) * 0.5f;
  float mean = 1 / (1 - expf(-s)) - n / (expf(n * s) - 1);
  return slope > 0 ? mean : n + 1 - mean;
}

// A sum of many floats, as exact as one in double, whose additions would wait for the tensor cores: they share a pipe.
struct LongSum {
  float sum = 0, rest = 0;

  __device__ __forceinline__ void add(float x) {
    float new_sum = sum + x, added = new_sum - sum;
    rest += (sum - (new_sum - added)) + (x - added);
    sum = new_sum;
  }
  __device__ __forceinline__ double value() const { return static_cast<double>(sum) + rest; }
};

// The scores warpgroup's part, of two tokens in one chunk: begin rows of q times rows of k.
__device__ __forceinline__ void multiply_rows(float (&products)[32], Tile& q, Tile& k) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) {
    wgmma_64x64x16<kBfloat16, false, false>(products, wgmma_descriptor_in_32_bits(q, step * 32),
                                            wgmma_descriptor_in_32_bits(k, step * 32), step > 0);
  }
  wgmma_commit();
}
// Their sum, times P and distances, of which only the first is not constant: or they would take 32 registers.
__device__ __forceinline__ float sum_aged(const float (&p)[32], const RowUnits& p_units, const float (&products)[32]) {
  float sums[2] = {}, weighed[2] = {};  // of the two rows
#pragma unroll
  for (int i = 0; i < 32; i++) {
    float x = p[i] * products[i];
    sums[i / 2 % 2] += x;
    weighed[i / 2 % 2] += (distance_of(i) - distance_of(0)) * x;
  }
  float sum = 0;
  for (int half = 0; half < 2; half++) sum += p_units.unit[half] * (weighed[half] + distance_of(0) * sums[half]);
  return sum;
}

// What a warp has summed of a row, for sum_partials: of the scores warpgroup, the group's, or the slopes warpgroup's.
// Numbers of members that the row's team does not have are 0.
constexpr int kSummingWarps = 12;
__device__ __forceinline__ void store_partial(const Schedule& schedule, const Pass& pass, int warp, double total) {
  const HopperArgs& args = schedule.args;
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
  if (threadIdx.x % 32 > 0) return;
  double* partials = args.partials + static_cast<int64_t>(pass.row) * args.max_members * kSummingWarps + warp;
  int member = kSplit ? schedule.team.member : 0, size = kSplit ? schedule.team.size : 1;
  partials[member * kSummingWarps] = total;
  if (member > 0) return;
  for (int idx = size; idx < args.max_members; idx++) partials[idx * kSummingWarps] = 0;
}

// The group's side: hands over S in front of a chunk, a part at a time.
struct Giver {
  Ring<kHandedOver> ring;

  template <class Part>
  __device__ __forceinline__ void give(Shared& shared, State& state, const RowUnits& units, uint32_t thread) {
    ForSlopes& to = for_slopes(shared);
    const float* x = Part::of(state);
    mbarrier_wait(to.empty[ring.stage], ring.parity() ^ 1);
#pragma unroll
    for (int quad = 0; quad < Part::kDim / 8; quad++) {
      to.states[ring.stage][quad][thread] =
          float4{x[quad * 4], x[quad * 4 + 1], x[quad * 4 + 2], x[quad * 4 + 3]};
    }
    if constexpr (!kBfloat16) to.units[ring.stage][thread] = units;
    arrive(to.full[ring.stage]);
    ring.advance();
  }
};

// <dS, state> behind the end of the sequence: this thread's part.
__device__ __forceinline__ double times_dstate(const State& state, const RowUnits& units, const HopperArgs& args,
                                               const Pass& pass) {
  const StateStrides& strides = args.dstate_strides;
  StateView<float> dstate = {args.dstate + pass.batch_idx * strides.batch + pass.head_idx * strides.head,
                             strides.qk_dim, strides.v_dim, args.qk_dim, args.v_dim};
  uint32_t thread = threadIdx.x % 128;
  forget_origin(thread);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kQkDim / 2; i++) {
    StateIndex idx(pass.v_block * 64, i, thread);
    float x = state[i] * units.unit[i / 2 % 2];
    if (x != 0) sum += static_cast<double>(x) * dstate(idx.k_idx, idx.v_idx);
  }
  return sum;
}

// Where products are many, what v is rounded by is left out of T, which would take a seventh of the time.
constexpr bool kRoundedV = kTwoParts;

// The slopes warpgroup.
struct Aging {
  Shared& shared;
  const HopperArgs& args;
  const uint32_t thread = kKeepsThread ? kept_thread() : threadIdx.x % 128;
  QRing q_ring;
  KvRing ring;
  Ring<kHandedOver> state_ring;
  LongSum total;
  float mean;
  State aged;
  RowUnits units;

  __device__ __forceinline__ void set_decay(int head_idx) {
    double slope = slope_of(args, head_idx);
    mean = mean_position(slope, args.seqlen);
    named_barrier(kSlopesBarrier, 128);
    if (thread < kChunk) {
      fill<kFromStart>(for_slopes(shared).decay_of_q, thread, slope, static_cast<float>(args.scale), args.seqlen);
      fill<kAgedToEnd>(for_slopes(shared).decay_of_v, thread, slope, 1 - mean, args.seqlen);
    }
    named_barrier(kSlopesBarrier, 128);
  }

  // T in front of a pass that takes none over: the terms of an initial state have no age.
  __device__ __forceinline__ void load_initial(const Pass& pass, bool exists) {
    load_initial_state(aged, args, pass.batch_idx, pass.head_idx, pass.v_block * 64, exists);
#pragma unroll
    for (int i = 0; i < kQkDim / 2; i++) aged[i] *= 1 - mean;
    units = {};
  }

  // v of the ring's chunk for T behind it.
  __device__ __forceinline__ void take_v(DecayedV& v, int num_tokens) {
    LoadedV loaded;
    mbarrier_wait(shared.v_full[ring.stage], ring.parity());
    load_v(loaded, shared.v[ring.stage][0], for_slopes(shared).decay_of_v, num_tokens < kChunk, thread);
    decay_v(v, units, loaded);
  }

  // For the next part of S.
  __device__ __forceinline__ void wait_for_part() const {
    mbarrier_wait(for_slopes(shared).full[state_ring.stage], state_ring.parity());
  }

  // What the rows of the next part are to be multiplied by to have the units of T.
  __device__ __forceinline__ RowUnits ratio_of_part() const {
    const ForSlopes& from = for_slopes(shared);
    RowUnits ratio;
    if constexpr (!kBfloat16) {
      for (int half = 0; half < 2; half++) {
        ratio.unit[half] = __fdividef(from.units[state_ring.stage][thread].unit[half], units.unit[half]);
      }
    }
    return ratio;
  }

  // A part of T becomes T + n S, which is there. The sum of its products with T + (m + m') S, if there are any.
  template <class Part, bool kSum = true>
  __device__ __forceinline__ float age(int num_tokens, const float (&products)[32] = {}, const RowUnits& q_units = {}) {
    const RowUnits ratio = ratio_of_part();
    const float4(&part)[8][128] = for_slopes(shared).states[state_ring.stage];
    const float means = kSum ? 2 * mean - 1 : 0;
    float* t = Part::of(aged);
    float sums[4] = {};
#pragma unroll
    for (int quad = 0; quad < Part::kDim / 8; quad++) {
      float4 state = part[quad][thread];
      const float s[4] = {state.x, state.y, state.z, state.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float& x = t[quad * 4 + i];
        if (kSum) {
          x += means * ratio.unit[i / 2] * s[i];
          forget_origin(x);  // in place, or ptxas keeps both
          sums[i] += products[quad * 4 + i] * x;
        }
        x += (num_tokens - means) * ratio.unit[i / 2] * s[i];
      }
    }
    give_back();
    return (sums[0] + sums[1]) * q_units.unit[0] * units.unit[0] + (sums[2] + sums[3]) * q_units.unit[1] * units.unit[1];
  }

  // The next part of S is done with.
  __device__ __forceinline__ void give_back() {
    arrive(for_slopes(shared).empty[state_ring.stage]);
    state_ring.advance();
  }

  __device__ __forceinline__ void skip_part() {
    wait_for_part();
    give_back();
  }

  // Begin T = decay^n T and what the chunk adds.
  __device__ __forceinline__ void add(const DecayedV& v) {
    scale_state(aged, v.state_factor);
    mbarrier_wait(shared.k_full[ring.stage], ring.parity());
    if constexpr (kTwoParts) update_state<Back, kRoundedV>(aged, v, shared.k[ring.stage]);
    update_state<Front, kRoundedV>(aged, v, shared.k[ring.stage]);
    units = v.units;
    ring.advance();
  }

  // Begin a part of decayed q doT.
  template <class Part>
  __device__ __forceinline__ void multiply(float (&products)[32], const DecayedV& q) {
    auto& of_part = reinterpret_cast<float (&)[Part::kDim / 2]>(products);
    add_products<Part::kFirstTile, kSet>(of_part, q, shared.q[q_ring.stage]);
  }

  __device__ __forceinline__ void take_q(LoadedV& loaded, const KvRing& ring) {
    mbarrier_wait(shared.v_full[ring.stage], ring.parity());
    load_v(loaded, shared.v[ring.stage][1], for_slopes(shared).decay_of_q, 0, thread);
  }

  // NOTE: as in compute_outputs, what ptxas wants to overlap products. q of the next chunk is loaded in front of
  // products with operands in registers, for which loads would wait.
  __device__ __forceinline__ void sum_outputs(const Pass& pass) {
    int num_tokens_left = pass.num_tokens, used_stage = -1;
    if (num_tokens_left == 0) return;
    add_zeros<Front>(aged, shared.zeros);
    if constexpr (kTwoParts) add_zeros<Back>(aged, shared.zeros);
    LoadedV loaded;
    take_q(loaded, ring);
    while (true) {
      DecayedV q;
      if constexpr (kQkDim < 128) wgmma_wait<0>();
      decay_v(q, {}, loaded);
      q.stay();
      if (num_tokens_left > 0) mbarrier_wait(shared.q_full[q_ring.stage], q_ring.parity());
      wgmma_wait<0>();
      if (used_stage >= 0) release(shared.kv_empty[used_stage]);
      used_stage = ring.stage;
      if (num_tokens_left <= 0) {
        if constexpr (kTwoParts) skip_part();  // compute_outputs has begun another chunk, for nothing
        break;
      }
      const int num_tokens = min(num_tokens_left, kChunk);
      float sum = 0, products[32];  // these for both parts, or ptxas does not find the registers
      if constexpr (kTwoParts) {
        multiply<Back>(products, q);
        wait_for_part();
        wgmma_wait<0>();
        sum += age<Back>(num_tokens, products, q.units);
      }
      multiply<Front>(products, q);
      wait_for_part();
      wgmma_wait<0>();
      release(shared.q_empty[q_ring.stage]);
      DecayedV v;
      if constexpr (!kTwoParts) take_v(v, num_tokens);  // early, where registers suffice
      sum += age<Front>(num_tokens, products, q.units);
      total.add(sum);
      // Behind the last chunk that one's again, for nothing.
      KvRing next = ring;
      num_tokens_left -= kChunk;
      if (num_tokens_left > 0) next.advance();
      take_q(loaded, next);
      if constexpr (kTwoParts) take_v(v, num_tokens);
      add(v);
      q_ring.advance();
    }
  }

  __device__ __forceinline__ void add_segment(const Pass& pass) {
    for (int num_tokens_left = pass.num_tokens; num_tokens_left > 0; num_tokens_left -= kChunk) {
      int stage = ring.stage;
      if constexpr (kTwoParts) {
        wait_for_part();
        age<Back, false>(kChunk);
      }
      wait_for_part();
      age<Front, false>(kChunk);
      DecayedV v;
      take_v(v, kChunk);
      add(v);
      wgmma_wait<0>();
      release(shared.kv_empty[stage]);
    }
  }
};

__device__ __forceinline__ void sum_slopes(Shared& shared, const HopperArgs& args, const Schedule& schedule) {
  Aging aging = {shared, args};
  const int& member = schedule.team.member;
  for (int idx = 0; idx < schedule.num_passes(); idx++) {
    Pass pass = schedule[idx];
    const bool is_pair = schedule.is_pair();
    if (!pass.outputs || !kSplit) aging.set_decay(pass.head_idx);
    if (!pass.outputs || member == 0 || !kSplit) {
      aging.load_initial(pass, args.initial_state != nullptr && schedule.begins_sequence(pass));
    }
    float* states = states_of(schedule, idx / 2) + (schedule.team.size - 1) * kStateSize;
    if (pass.outputs) {
      if (kSplit && !is_pair && member > 0) load_segment(aging.aged, aging.units, states + (member - 1) * kStateSize);
      aging.total = {};
      aging.sum_outputs(pass);
      double total = aging.total.value();
      if (args.dstate != nullptr && schedule.is_last()) total += times_dstate(aging.aged, aging.units, args, pass);
      store_partial(schedule, pass, 8 + aging.thread / 32, total);
    } else if constexpr (kSplit) {
      aging.add_segment(pass);
      if (is_pair) continue;
      if (!schedule.is_last()) store_segment(aging.aged, aging.units, states + member * kStateSize);
      // The group tells others, and hears from all.
      arrive(for_slopes(shared).stored);
      mbarrier_wait(for_slopes(shared).scanned, idx / 2 % 2);
    }
  }
}
