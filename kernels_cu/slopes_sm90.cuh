// The gradient of the slopes, in the pass of forward_sm90.cu that makes dq, with SLOPES=1. There q, k and v are do, v
// and k, and o is dq. As in backward.cuh
//
//   -dslope = sum of (i - j) scale decay^(i-j) (q_i k_j) (do_i v_j) over j <= i
//
// For two tokens of one chunk that is summed as it stands. For others, with n tokens in a chunk, p their positions in
// theirs, S the state in front of the chunk of i, and T the same sum with each term times its age there:
//
//   sum of (i - j) P_ij (q_i k_j) + sum of (p_i + 1 - m) q_i (w S do_i) + <T + m S, sum of w q_i doT_i>
//   T = decay^n (T + n S) + sum of (n-1-p_j) decay^(n-1-p_j) k_j vT_j                           w = scale decay^(p_i+1)
//
// and <dS, T> behind the end. The first is summed by the scores warpgroup, the second by the group, from what it has of
// dq, the third by a warpgroup of its own, which has T in registers as the group has S. Weights count tokens, and are
// never differences of large ones, in which heads that forget fast would lose all digits. Rounded to 16 bits are S in
// the second sum, as it is for dq, and where head dims are large what is added to T. m, the mean of p + 1 with the
// weights w^2, makes the least of the former. So bfloat16 has an error of up to 1e-3 of what such sums come to where
// signs are random, float16 of 1e-4.
#pragma once
#include "schedule_sm90.cuh"

// m above, where chunks are whole or there is one.
__device__ __forceinline__ float mean_position(double slope, int seqlen) {
  float s = 2 * fabsf(static_cast<float>(slope)), n = min(seqlen, kChunk);
  if (s < 1e-3f) return (n + 1) * 0.5f;
  float mean = 1 / (1 - expf(-s)) - n / (expf(n * s) - 1);
  return slope > 0 ? mean : n + 1 - mean;
}

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
__device__ __forceinline__ double sum_aged(const float (&p)[32], const RowUnits& p_units, const float (&products)[32]) {
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

// This warp's columns of a tile, transposed, in the places that an accumulator has them.
__device__ __forceinline__ void load_columns(uint32_t (&columns)[4][4], Tile& tile) {
  int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {  // of 8 tokens
    ldmatrix_x4_trans(columns[pair], swizzled(tile, pair * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
  }
}

// The group's side: hands over S in front of a chunk, a part at a time.
struct Giver {
  Ring<kHandedOver> ring;

  template <class Part>
  __device__ __forceinline__ void give(Shared& shared, State& state, const RowUnits& units) {
    ForSlopes& to = for_slopes(shared);
    const float* x = Part::of(state);
    mbarrier_wait(to.empty[ring.stage], ring.parity() ^ 1);
#pragma unroll
    for (int quad = 0; quad < Part::kDim / 8; quad++) {
      to.states[ring.stage][quad][threadIdx.x % 128] =
          float4{x[quad * 4], x[quad * 4 + 1], x[quad * 4 + 2], x[quad * 4 + 3]};
    }
    if constexpr (!kBfloat16) to.units[ring.stage][threadIdx.x % 128] = units;
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(to.full[ring.stage]);
    ring.advance();
  }
};

// Where products are many, what v is rounded by is left out of T, which would take a seventh of the time.
constexpr bool kRoundedV = kTwoParts;

// The slopes warpgroup.
struct Aging {
  Shared& shared;
  const HopperArgs& args;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  QRing q_ring;
  KvRing ring;
  Ring<kHandedOver> state_ring;
  double total;
  float mean;
  State aged;
  RowUnits units;

  __device__ __forceinline__ void set_decay(int head_idx) {
    double slope = slope_of(args, head_idx);
    mean = mean_position(slope, args.seqlen);
    named_barrier(kSlopesBarrier, 128);
    if (thread < kChunk) {
      fill<kFromStart>(for_slopes(shared).decay_of_q, thread, slope, static_cast<float>(args.scale), args.seqlen);
      fill<kAgedToEnd>(for_slopes(shared).decay_of_v, thread, slope, 1, args.seqlen);
    }
    named_barrier(kSlopesBarrier, 128);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kQkDim / 2; i++) aged[i] = 0;
    units = {};
  }

  // v of the ring's chunk for T behind it.
  __device__ __forceinline__ void take_v(DecayedV& v, int num_tokens) {
    LoadedV loaded;
    mbarrier_wait(shared.v_full[ring.stage], ring.parity());
    load_v(loaded, shared.v[ring.stage][0], for_slopes(shared).decay_of_v, num_tokens < kChunk);
    decay_v(v, units, loaded);
  }

  // What a factor of S is for rows in other units.
  __device__ __forceinline__ void to_units(float (&factor)[2], const RowUnits& to, int stage) const {
    if constexpr (!kBfloat16) {
      const RowUnits& from = for_slopes(shared).units[stage][thread];
      for (int half = 0; half < 2; half++) factor[half] *= from.unit[half] / to.unit[half];
    }
  }

  // A part of decay^n (T + n S), in units of v.
  template <class Part>
  __device__ __forceinline__ void age(const DecayedV& v, int num_tokens) {
    ForSlopes& from = for_slopes(shared);
    int stage = state_ring.stage;
    mbarrier_wait(from.full[stage], state_ring.parity());
    float decay = from.decay_of_v.state[num_tokens < kChunk], factor[2] = {num_tokens * decay, num_tokens * decay};
    to_units(factor, v.units, stage);
    float* t = Part::of(aged);
#pragma unroll
    for (int quad = 0; quad < Part::kDim / 8; quad++) {
      float4 state = from.states[stage][quad][thread];
      t[quad * 4] = v.state_factor[0] * t[quad * 4] + factor[0] * state.x;
      t[quad * 4 + 1] = v.state_factor[0] * t[quad * 4 + 1] + factor[0] * state.y;
      t[quad * 4 + 2] = v.state_factor[1] * t[quad * 4 + 2] + factor[1] * state.z;
      t[quad * 4 + 3] = v.state_factor[1] * t[quad * 4 + 3] + factor[1] * state.w;
    }
    give_back();
  }

  // The next part of S is done with.
  __device__ __forceinline__ void give_back() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(for_slopes(shared).empty[state_ring.stage]);
    state_ring.advance();
  }

  __device__ __forceinline__ void skip_part() {
    mbarrier_wait(for_slopes(shared).full[state_ring.stage], state_ring.parity());
    give_back();
  }

  // Begin T += what the chunk adds.
  __device__ __forceinline__ void add(const DecayedV& v) {
    mbarrier_wait(shared.k_full[ring.stage], ring.parity());
    if constexpr (kTwoParts) update_state<Back, kRoundedV>(aged, v, shared.k[ring.stage]);
    update_state<Front, kRoundedV>(aged, v, shared.k[ring.stage]);
    units = v.units;
    ring.advance();
  }

  // A part of <T + m S, decayed q doT>, of products that are complete; `ahead` parts of S are in front of it.
  template <class Part>
  __device__ __forceinline__ float sum_part(const float (&products)[32], const RowUnits& q_units, int ahead) {
    ForSlopes& from = for_slopes(shared);
    Ring<kHandedOver> ring = state_ring;
    ring.skip(ahead);
    mbarrier_wait(from.full[ring.stage], ring.parity());
    float factor[2] = {mean, mean}, sums[4] = {};
    to_units(factor, units, ring.stage);
    const float* t = Part::of(aged);
#pragma unroll
    for (int quad = 0; quad < Part::kDim / 8; quad++) {
      float4 state = from.states[ring.stage][quad][thread];
      sums[0] += products[quad * 4] * (t[quad * 4] + factor[0] * state.x);
      sums[1] += products[quad * 4 + 1] * (t[quad * 4 + 1] + factor[0] * state.y);
      sums[2] += products[quad * 4 + 2] * (t[quad * 4 + 2] + factor[1] * state.z);
      sums[3] += products[quad * 4 + 3] * (t[quad * 4 + 3] + factor[1] * state.w);
    }
    float sum[2] = {sums[0] + sums[1], sums[2] + sums[3]};
    if constexpr (!kBfloat16) {
      for (int half = 0; half < 2; half++) sum[half] *= q_units.unit[half] * units.unit[half];
    }
    return sum[0] + sum[1];
  }

  // Begin a part of decayed q doT.
  template <class Part>
  __device__ __forceinline__ void multiply(float (&products)[32], const DecayedV& q) {
    auto& of_part = reinterpret_cast<float (&)[Part::kDim / 2]>(products);
    add_products<Part::kFirstTile, kSet>(of_part, q, shared.q[q_ring.stage]);
  }

  __device__ __forceinline__ void take_q(LoadedV& loaded, const KvRing& ring) {
    mbarrier_wait(shared.v_full[ring.stage], ring.parity());
    load_v(loaded, shared.v[ring.stage][1], for_slopes(shared).decay_of_q, 0);
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
      DecayedV q, v;
      if constexpr (kQkDim < 128) wgmma_wait<0>();
      decay_v(q, {}, loaded);
      wgmma_wait<0>();
      if (used_stage >= 0) release(shared.kv_empty[used_stage]);
      used_stage = ring.stage;
      if (num_tokens_left <= 0) {
        if constexpr (kTwoParts) skip_part();  // compute_outputs has begun another chunk, for nothing
        break;
      }
      mbarrier_wait(shared.q_full[q_ring.stage], q_ring.parity());
      float sum = 0, products[32];  // these for both parts, or ptxas does not find the registers
      if constexpr (kTwoParts) {
        multiply<Back>(products, q);
        wgmma_wait<0>();
        sum += sum_part<Back>(products, q.units, 0);
      }
      multiply<Front>(products, q);
      wgmma_wait<0>();
      release(shared.q_empty[q_ring.stage]);
      sum += sum_part<Front>(products, q.units, kTwoParts);
      total += static_cast<double>(sum);
      const int num_tokens = min(num_tokens_left, kChunk);
      take_v(v, num_tokens);
      if constexpr (kTwoParts) age<Back>(v, num_tokens);
      age<Front>(v, num_tokens);
      // Behind the last chunk that one's again, for nothing.
      KvRing next = ring;
      num_tokens_left -= kChunk;
      if (num_tokens_left > 0) next.advance();
      take_q(loaded, next);
      add(v);
      q_ring.advance();
    }
  }

  __device__ __forceinline__ void add_segment(const Pass& pass) {
    for (int num_tokens_left = pass.num_tokens; num_tokens_left > 0; num_tokens_left -= kChunk) {
      DecayedV v;
      int stage = ring.stage;
      take_v(v, kChunk);
      if constexpr (kTwoParts) age<Back>(v, kChunk);
      age<Front>(v, kChunk);
      add(v);
      wgmma_wait<0>();
      release(shared.kv_empty[stage]);
    }
  }

  // <dS, T> behind the end of the sequence.
  __device__ __forceinline__ void sum_dstate(const Pass& pass) {
    const StateStrides& strides = args.dstate_strides;
    StateView<float> dstate = {args.dstate + pass.batch_idx * strides.batch + pass.head_idx * strides.head,
                               strides.qk_dim, strides.v_dim, args.qk_dim, args.v_dim};
    uint32_t origin = thread;
    forget_origin(origin);
#pragma unroll
    for (int i = 0; i < kQkDim / 2; i++) {
      StateIndex idx(pass.v_block * 64, i, origin);
      float t = aged[i] * units.unit[i / 2 % 2];
      if (t != 0) total += static_cast<double>(t) * dstate(idx.k_idx, idx.v_idx);
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
    if (!pass.outputs || member == 0 || !kSplit) aging.clear();
    float* states = states_of(schedule, idx / 2) + (schedule.team.size - 1) * kStateSize;
    if (pass.outputs) {
      if (kSplit && !is_pair && member > 0) load_segment(aging.aged, aging.units, states + (member - 1) * kStateSize);
      aging.total = 0;
      aging.sum_outputs(pass);
      if (args.dstate != nullptr && schedule.is_last()) aging.sum_dstate(pass);
      store_partial(schedule, pass, 8 + aging.warp, aging.total);
    } else if constexpr (kSplit) {
      aging.add_segment(pass);
      if (is_pair) continue;
      if (!schedule.is_last()) store_segment(aging.aged, aging.units, states + member * kStateSize);
      named_barrier(kBothBarrier, 256);  // the group tells others
      named_barrier(kBothBarrier, 256);  // and has heard from all
    }
  }
}
