// Forward for float16 and bfloat16 on Hopper, at the speed of memory. For each chunk of 64 tokens, transposed:
//
//   P  = scale (q kT) * decay^(i-j) below the diagonal             by the scores warpgroup, to shared memory
//   oT = scale decay^(i+1) (ST qT) + vT PT                         64 columns of v a warpgroup
//   ST = decay^64 ST + (decay^(63-j) vT) k
//
// ST stays in float registers: as an accumulator its layout is, register for register, that of a left operand of
// wgmma, so ST qT needs no trip through shared memory. Roundings to 16 bits: P, ST (as an operand only) and the
// result; decayed v is the sum of two 16-bit numbers, so that states are exact to about 2^-17. HIGH=1 splits P and ST
// too, and leaves the rounding of the result.
//
// A block is a producer warpgroup, of which one thread feeds TMA and one for each group stores, the scores warpgroup,
// and V_GROUPS warpgroups for the state and outputs: stages of one pipeline, and so in one file. They hand tiles on
// through mbarriers. Without SPLIT a block walks one (batch, head, 64 V_GROUPS columns of v), a row, from the first
// token to the last; the CLUSTER blocks of a head may be a cluster, in which each loads a part of q and k for all, and
// they take turns in making P for all. Or the blocks of NEIGHBOURS rows are one, only to load at the same time: a token
// of a small head is a piece of memory that is read at its full rate together with the piece beside it.
//
// With SPLIT a team of blocks walks a row, a segment of the sequence each: first for states (k and v), then for
// outputs. In a team of two, the second makes the state that it needs, of the segment in front of its own, which is
// the longer for it. In a larger team each makes what its segment adds; then they exchange through memory, each a slice
// of the elements, the states in front of the segments. Those blocks wait for each other, so all must be resident:
// forward_sm90.py launches cooperatively. Teams have the same size or, where each row has its own, more members for the
// rows that remember longer, since their states take more time.
//
// With REVERSED=1 from the last token to the first, as forward.cuh has it. Tokens of a row are then counted from the
// end, from that of its last whole chunk. With ATTENTIONS=2 there are two over the same arrays in different roles, as
// gradients are. Rows of the two for one head are neighbours, so that what both read comes from memory once.
//
// SLOPES=1, in the pass that makes dq, leaves the gradient of the slopes too: slopes_sm90.cuh. That takes one more
// warpgroup, so there is one group, and blocks of a cluster make P each for itself.
//
// float16 has little range: rows of P are scaled by powers of two, as those of ST and of decayed vT, which is exact.
#include "slopes_sm90.cuh"

// The blocks of a cluster share the tiles of q and k out, neighbours to one block, which loads them for all.
__device__ __forceinline__ void load_for_all(Tile (&tiles)[kQkBlocks], const TensorMap& map, uint64_t& full, int rank,
                                             bool is_k, int token, int head, int batch) {
  mbarrier_arrive_expect_tx(full, kQkBlocks * kTileBytes);
#pragma unroll
  for (int block = 0; block < kQkBlocks; block++) {
    if ((is_k * kQkBlocks + block) * kCluster / (2 * kQkBlocks) == rank) {
      tma_load_to_cluster<kCluster>(tiles[block], map, full, block * 64, token, head, batch);
    }
  }
}

__device__ __forceinline__ void produce(Shared& shared, const Schedule& schedule, Pass pass) {
  QRing q_ring;
  KvRing ring;
  for (int idx = 0; idx < schedule.num_passes(); idx++) {
    if (kSplit || idx > 0) pass = schedule[idx];
    const HopperArgs& args = schedule.args_of(pass);
    int head = pass.head_idx, batch = pass.batch_idx, first_v = pass.v_block * kGroups * 64;
    for (int chunk = 0; chunk < pass.num_chunks(); chunk++) {
      int token = pass.token(chunk, args.seqlen), stage = ring.stage;
      mbarrier_wait(shared.kv_empty[stage], ring.parity() ^ 1);
      if constexpr (kNeighbours > 1) {
        mbarrier_wait(shared.q_empty[q_ring.stage], q_ring.parity() ^ 1);
        for (int rank = 0; rank < kNeighbours; rank++) mbarrier_arrive_at(rank, shared.in_step);
        mbarrier_wait(shared.in_step, chunk % 2);
      }
      load_for_all(shared.k[stage], args.k, shared.k_full[stage], schedule.rank, true, token, head, batch);
      const bool has_primal = kSlopes && pass.outputs;
      mbarrier_arrive_expect_tx(shared.v_full[stage], kGroups * (1 + has_primal) * kTileBytes);
#pragma unroll
      for (int group = 0; group < kGroups; group++) {
        auto load = [&](int tile, const TensorMap& map) {
          tma_load(shared.v[stage][tile], map, shared.v_full[stage], first_v + group * 64, token, head, batch);
        };
        load(group, args.v);
        if (has_primal) load(kGroups + group, args.primal);
      }
      ring.advance();
      if (pass.outputs) {
        int stage = q_ring.stage;
        mbarrier_wait(shared.q_empty[stage], q_ring.parity() ^ 1);
        load_for_all(shared.q[stage], args.q, shared.q_full[stage], schedule.rank, false, token, head, batch);
        q_ring.advance();
      }
    }
  }
}

// Stores the outputs of a group.
__device__ __forceinline__ void store(Shared& shared, const Schedule& schedule, int group) {
  int num_stores = 0;
  for (int idx = 0; idx < schedule.num_passes(); idx++) {
    Pass pass = schedule[idx];
    if (!pass.outputs) continue;
    const HopperArgs& args = schedule.args_of(pass);
    for (int chunk = 0; chunk < pass.num_chunks(); chunk++, num_stores++) {
      int buffer = num_stores % kOutputBuffers;
      mbarrier_wait(shared.o_full[group][buffer], num_stores / kOutputBuffers % 2);
      tma_store(args.o, shared.o[group][buffer], (pass.v_block * kGroups + group) * 64,
                pass.token(chunk, args.seqlen), pass.head_idx, pass.batch_idx);
      tma_store_commit();
      tma_store_wait_read<kOutputBuffers - 1>();
      if (num_stores >= kOutputBuffers - 1) {
        mbarrier_arrive(shared.o_empty[group][(num_stores + 1) % kOutputBuffers]);
      }
    }
  }
  tma_store_wait_read<0>();
}

// The groups of all blocks of a team come to a point: each sets its flag to a value that no flag has had.
__device__ __forceinline__ void meet_team(const Schedule& schedule, Meeting meeting, int pass_idx, int group) {
  int thread = threadIdx.x % 128, barrier = kGroupBarrier + group;
  uint64_t value = schedule.args.first_flag + pass_idx;
  named_barrier(barrier, 128);  // what is released are the writes of all its threads
  if (thread == 0) store_release(flag(schedule, meeting, schedule.team.member * kGroups + group), value);
  for (int idx = thread; idx < schedule.team.size * kGroups; idx += 128) {
    while (load_acquire(flag(schedule, meeting, idx)) != value) __nanosleep(20);
  }
  named_barrier(barrier, 128);
}

__device__ __forceinline__ void clear_flag(const Schedule& schedule, Meeting meeting, int group) {
  if (threadIdx.x % 128 == 0) *flag(schedule, meeting, schedule.team.member * kGroups + group) = 0;
}

// In place, what segments add becomes the states behind them: this block's slice of the elements, kWidth a thread at a
// time. What counts is how many loads are under way. Aged states likewise: those in front become older by a segment.
__device__ __forceinline__ void scan(const Schedule& schedule, float* states, int group, float decay) {
  // One where registers have no room for more.
  constexpr int kAhead = 16 / kNumKinds, kWidth = kQkDim <= 64 || (kGroups == 2 && kBfloat16) ? 2 : 1;
  const int num_states = schedule.team.size - 1;
  const float length = schedule.team.segment_length;
  const int per_member = (kStateSize / kWidth + num_states) / (num_states + 1);
  const int end = min(kStateSize / kWidth, (schedule.team.member + 1) * per_member);
  uint32_t thread = group * 128 + threadIdx.x % 128;
  forget_origin(thread);
#pragma unroll 1
  for (int idx = schedule.team.member * per_member + thread; idx < end; idx += 128 * kGroups) {
    float* state = states + idx * kWidth;
    float x[kNumKinds][kWidth] = {};
#pragma unroll 1
    for (int num_left = num_states; num_left > 0; num_left -= kAhead) {
      float added[kAhead][kNumKinds][kWidth];
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        if (i < num_left) load_l2(added[i][0], state + i * kStateSize);
        if constexpr (kSlopes) {
          if (i < num_left) load_l2(added[i][1], state + (num_states + i) * kStateSize);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        if (i < num_left) {
          // NOTE: no 0 * inf when a negative slope overflows the decay of a state that is still empty.
#pragma unroll
          for (int j = 0; j < kWidth; j++) {
            if constexpr (kSlopes) {
              float older = x[1][j] + length * x[0][j];
              x[1][j] = (older == 0 ? 0 : decay * older) + added[i][1][j];
            }
            x[0][j] = (x[0][j] == 0 ? 0 : decay * x[0][j]) + added[i][0][j];
          }
          store_l2(state + i * kStateSize, x[0]);
          if constexpr (kSlopes) store_l2(state + (num_states + i) * kStateSize, x[1]);
        }
      }
      state += kAhead * kStateSize;
    }
  }
}

// P number `use` may be made: where it goes, all blocks have used the one before. Of each buffer's, this block makes
// every kPeriod-th, the first of them in a buffer that nobody has used if use < kPBuffers.
__device__ __forceinline__ void wait_for_p_empty(Shared& shared, int use, int rank) {
  constexpr int kPeriod = kPCluster % kPBuffers == 0 ? kPCluster : kPCluster * kPBuffers;
  int first = use % kPeriod, parity = use / kPeriod % 2;
  if (first < kPBuffers) parity ^= 1;
  mbarrier_wait(shared.p_empty[use % kPBuffers], parity);
}

// Decays of scores that stay in registers.
constexpr int kScoresFactors = kSlopes ? 1 : 32;

// P of all chunks of a pass; blocks of a cluster take turns, each making it for all of them. With SLOPES each makes it
// for itself, and sums this block's part of two tokens' products; decays are read again each time.
__device__ __forceinline__ void make_scores(Shared& shared, const Pass& pass, int rank, QRing& q_ring, KvRing& ring,
                                            int& p_uses, const float (&factor)[kScoresFactors], LongSum& slopes_sum) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  for (int chunk = 0; chunk < pass.num_chunks(); chunk++, q_ring.advance(), ring.advance(), p_uses++) {
    int q_stage = q_ring.stage, stage = ring.stage;
    mbarrier_wait(shared.q_full[q_stage], q_ring.parity());
    mbarrier_wait(shared.k_full[stage], ring.parity());
    if (kPCluster > 1 && p_uses % kPCluster != rank) {
      release(shared.q_empty[q_stage]);
      release(shared.kv_empty[stage]);
      continue;
    }
    float p[32], products[32];  // the latter with SLOPES
    RowUnits p_units;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kQkDim / 16; step++) {
      int offset = step / 4 * kTileBytes + step % 4 * 32;
      wgmma_64x64x16<kBfloat16, false, false>(p, wgmma_descriptor_in_32_bits(shared.q[q_stage], offset),
                                              wgmma_descriptor_in_32_bits(shared.k[stage], offset), step > 0);
    }
    wgmma_commit();
    if constexpr (kSlopes) {
      mbarrier_wait(shared.v_full[stage], ring.parity());
      multiply_rows(products, shared.v[stage][1], shared.v[stage][0]);
      wgmma_wait<1>();
      release(shared.q_empty[q_stage]);
#pragma unroll
      for (int i = 0; i < 32; i++) p[i] *= for_slopes(shared).decay_of_p[kChunk - 1 - distance_of(i)];
    } else {
      wgmma_wait<0>();
      release(shared.q_empty[q_stage]);
      release(shared.kv_empty[stage]);
#pragma unroll
      for (int i = 0; i < 32; i++) p[i] *= factor[i];
    }

    int buffer = p_uses % kPBuffers;
    wait_for_p_empty(shared, p_uses, rank);
    if constexpr (!kBfloat16) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float largest = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) largest = fmaxf(largest, fabsf(p[i / 2 * 4 + half * 2 + i % 2]));
        int exponent = unit_exponent(row_max(largest));
#pragma unroll
        for (int i = 0; i < 16; i++) p[i / 2 * 4 + half * 2 + i % 2] *= to_unit(exponent);
        p_units.unit[half] = from_unit(exponent);
        if (lane % 4 == 0) {
          shared.p_units[buffer].unit[warp * 16 + half * 8 + lane / 4] = from_unit(exponent);
          shared.p_units[buffer].to_unit[warp * 16 + half * 8 + lane / 4] = to_unit(exponent);
        }
      }
    }
    int row = warp * 16 + lane % 16;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {  // of 8 columns
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x = p[pair * 8 + i * 2], y = p[pair * 8 + i * 2 + 1];
        if constexpr (kHigh) {
          split(high[i], low[i], x, y);
        } else {
          high[i] = pack<kBfloat16>(x, y);
        }
      }
      stmatrix_x4(swizzled(shared.p[buffer][0], row, pair * 2 + lane / 16), high);
      if constexpr (kHigh) stmatrix_x4(swizzled(shared.p[buffer][1], row, pair * 2 + lane / 16), low);
    }
    fence_proxy_async();
    if constexpr (kPCluster == 1) {
      arrive(shared.p_full[buffer]);
    } else {
      named_barrier(kScoresBarrier, 128);
      if (thread == rank) mbarrier_arrive(shared.p_full[buffer]);
      if (thread != rank && thread < kPCluster) {
        constexpr int kUnitsBytes = kBfloat16 ? 0 : sizeof(ScoresUnits);
        mbarrier_arrive_expect_tx_at(thread, shared.p_full[buffer], kPTiles * kTileBytes + kUnitsBytes);
        copy_to(thread, shared.p[buffer], kPTiles * kTileBytes, shared.p_full[buffer]);
        if constexpr (kUnitsBytes > 0) copy_to(thread, &shared.p_units[buffer], kUnitsBytes, shared.p_full[buffer]);
      }
    }
    if constexpr (kSlopes) {
      wgmma_wait<0>();
      release(shared.kv_empty[stage]);
      slopes_sum.add(sum_aged(p, p_units, products));
    }
  }
}

__device__ __forceinline__ void score_passes(Shared& shared, const HopperArgs& args, const Schedule& schedule) {
  int thread = threadIdx.x % 128, lane = thread % 32, first_row = thread / 32 * 16 + lane / 4;
  QRing q_ring;
  KvRing ring;
  int p_uses = 0;
  for (int idx = 0; idx < schedule.num_passes(); idx++) {
    Pass pass = schedule[idx];
    if (pass.outputs) {
      float factor[kScoresFactors];
      double slope = slope_of(args, pass.head_idx);
      LongSum slopes_sum;
      float scale = static_cast<float>(args.scale);
      if constexpr (kSlopes) {
        int distance = kChunk - 1 - thread;
        float decay = expf(static_cast<float>(-slope * max(distance, 0)));
        named_barrier(kScoresBarrier, 128);
        for_slopes(shared).decay_of_p[thread] = distance >= 0 ? scale * decay : 0;
        named_barrier(kScoresBarrier, 128);
      } else {
#pragma unroll
        for (int i = 0; i < 32; i++) {
          int row = first_row + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
          int distance = kReversed ? column - row : row - column;
          float decay = expf(static_cast<float>(-slope * max(distance, 0)));
          factor[i] = distance >= 0 ? scale * decay : 0;
          if (kReversed) factor[i] = fminf(fmaxf(factor[i], -kLargest), kLargest);  // no 0 * inf behind the end
        }
      }
      make_scores(shared, pass, schedule.rank, q_ring, ring, p_uses, factor, slopes_sum);
      if constexpr (kSlopes) store_partial(schedule, pass, 4 + thread / 32, slopes_sum.value());
    } else {
      ring.skip(pass.num_chunks());
    }
  }
}

// ST as left operands of `kSteps` products, 16 columns of q and k each.
template <int kSteps>
struct StateOperands {
  uint32_t high[kSteps][4], low[kHigh ? kSteps : 1][4];

  __device__ __forceinline__ StateOperands(const float* state, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kSteps * 4; i++) {
      float x = state[i * 2] * factor[i % 2], y = state[i * 2 + 1] * factor[i % 2];
      if constexpr (kHigh) {
        split(high[i / 4][i % 4], low[i / 4][i % 4], x, y);
      } else {
        high[i / 4][i % 4] = pack<kBfloat16>(x, y);
      }
    }
  }
};

__device__ __forceinline__ void store_outputs(Tile& tile, const float (&o)[32], uint32_t thread) {
  int warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {  // of 8 tokens
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) packed[i] = pack<kBfloat16>(o[pair * 8 + i * 2], o[pair * 8 + i * 2 + 1]);
    stmatrix_x4_trans(swizzled(tile, pair * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), packed);
  }
}

// Whether registers suffice to go on while products of a chunk are under way.
constexpr bool kOverlap = !(kSplit && (kGroups == 2 || kQkDim == 256));
// Whether they suffice for v of two chunks, and for decays that need not be loaded again.
constexpr bool kEarly = kTwoParts && kGroups == 1 && !kSlopes && kQkDim <= 128;

// One warpgroup: state and outputs of 64 columns of v.
struct Group {
  Shared& shared;
  const HopperArgs& args;
  const int group, barrier = kGroupBarrier + group;
  const uint32_t thread = kKeepsThread ? kept_thread() : threadIdx.x % 128;
  QRing q_ring;
  KvRing ring;
  int num_outputs = 0;  // chunks
  int last_left;        // how many tokens of the pass are left, with those of the chunk that has the sequence's end
  State state;
  RowUnits units;
  Giver giver;            // to the slopes warpgroup
  uint32_t primal[4][4];  // of a chunk, columns of the array that o is the gradient of
  float mean;             // of slopes_sm90.cuh
  LongSum slopes_sum;     // of its products with what comes from the chunks in front, times tokens

  __device__ __forceinline__ void set_decay(double slope) {
    if constexpr (kSlopes) mean = mean_position(slope, args.seqlen);
    auto power = [&](int exponent) { return expf(static_cast<float>(-slope * exponent)); };
    named_barrier(barrier, 128);
    if (thread < kChunk) {
      const float scale = static_cast<float>(args.scale);
      const int token = thread;
      if constexpr (kReversed) {
        shared.o_decay[group][0][token] = power(kChunk - 1 - token);
        shared.o_decay[group][1][token] = power(max((args.seqlen - 1) % kChunk - token, 0));
      } else {
        shared.o_decay[group][0][token] = scale * power(token + 1);
      }
      fill<kReversed ? kFromStart : kToEnd>(shared.decay[group], thread, slope, scale, args.seqlen);
    }
    if (kSplit && thread == kChunk) shared.segment_decay[group] = power(shared.team.segment_length);
    named_barrier(barrier, 128);
  }

  __device__ __forceinline__ int first_v(const Pass& pass) const { return (pass.v_block * kGroups + group) * 64; }

  __device__ __forceinline__ void begin_pass(const Pass& pass) {
    last_left = pass.first_token == 0 ? pass.num_tokens : 0;
  }

  // Whether a chunk has the end of the sequence; so many tokens of the pass are left from there on.
  __device__ __forceinline__ bool has_end(int num_tokens_left) const {
    return kReversed ? num_tokens_left == last_left : num_tokens_left < kChunk;
  }

  // v of the ring's chunk.
  __device__ __forceinline__ void take_v(LoadedV& v, const KvRing& ring, int num_tokens_left) {
    mbarrier_wait(shared.v_full[ring.stage], ring.parity());
    load_v(v, shared.v[ring.stage][group], shared.decay[group], has_end(num_tokens_left), thread);
  }

  // v of the chunk behind the ring's. Behind the last that chunk's again, for nothing: ptxas gives up overlapping
  // products where a branch is among them.
  __device__ __forceinline__ void take_next_v(LoadedV& v, int num_tokens_left) {
    KvRing next_ring = ring;
    if (num_tokens_left > kChunk) next_ring.advance();
    take_v(v, next_ring, num_tokens_left - kChunk);
  }

  // The whole state in front of a chunk, to the slopes warpgroup.
  __device__ __forceinline__ void give_state() {
    if constexpr (kTwoParts) giver.give<Back>(shared, state, units, thread);
    giver.give<Front>(shared, state, units, thread);
  }

  // The state of a segment alone. While products of a chunk are under way, v of the next is made.
  __device__ __forceinline__ void add_segment(const Pass& pass) {
    if (pass.num_tokens == 0) return;
    begin_pass(pass);
    int num_tokens_left = pass.num_tokens;
    auto step = [&](const DecayedV& v, DecayedV& next) {
      int stage = ring.stage;
      if constexpr (kSlopes) give_state();
      mbarrier_wait(shared.k_full[stage], ring.parity());
      scale_state(state, v.state_factor);
      if constexpr (kTwoParts) update_state<Back>(state, v, shared.k[stage]);
      update_state<Front>(state, v, shared.k[stage]);
      LoadedV loaded;
      take_next_v(loaded, num_tokens_left);
      decay_v(next, v.units, loaded);
      wgmma_wait<0>();
      release(shared.kv_empty[stage]);
      if (group == 0) release(shared.kv_empty[stage]);  // for the scores warpgroup, which has no part in this
      units = v.units;
      ring.advance();
      num_tokens_left -= kChunk;
    };
    LoadedV loaded;
    take_v(loaded, ring, num_tokens_left);
    DecayedV v[2];
    decay_v(v[0], units, loaded);
    while (true) {
      step(v[0], v[1]);
      if (num_tokens_left <= 0) break;
      step(v[1], v[0]);
      if (num_tokens_left <= 0) break;
    }
  }

  // Begin o (+)= ST qT over a part of the columns, some of them at a time, since registers are scarce.
  template <class Part, bool kIsFirst>
  __device__ __forceinline__ void inter_block(float (&o)[32], const float (&range_factor)[2]) {
    constexpr int kSteps = Part::kDim < 64 || kHigh ? 2 : 4;
#pragma unroll
    for (int first_step = 0; first_step < Part::kDim / 16; first_step += kSteps) {
      StateOperands<kSteps> operands(&Part::of(state)[first_step * 8], range_factor);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; i++) {
        int step = Part::kFirst / 16 + first_step + i;
        uint64_t q_step = wgmma_descriptor_in_32_bits(shared.q[q_ring.stage], step / 4 * kTileBytes + step % 4 * 32);
        wgmma_64x64x16<kBfloat16>(o, operands.high[i], q_step, !kIsFirst || first_step + i > 0);
        if constexpr (kHigh) wgmma_64x64x16<kBfloat16>(o, operands.low[i], q_step, 1);
      }
      wgmma_commit();
      wgmma_wait<1>();
    }
  }

  __device__ __forceinline__ void load_o_decay(float2 (&decay)[8], int num_tokens_left) const {
    const float* first = shared.o_decay[group][kReversed && has_end(num_tokens_left)];
#pragma unroll
    for (int pair = 0; pair < 8; pair++) {
      decay[pair] = *reinterpret_cast<const float2*>(&first[pair * 8 + thread % 4 * 2]);
    }
  }

  // What comes from the chunks in front, times primal and the tokens from them on, less their mean.
  __device__ __forceinline__ void weigh(const float (&o)[32]) {
    float sums[2] = {}, weighed[2] = {};  // of all tokens' numbers, and of them times the first weights
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float2 x = unpack<kBfloat16>(primal[i / 2][i % 2 * 2]), y = unpack<kBfloat16>(primal[i / 2][i % 2 * 2 + 1]);
      float number[2] = {x.x * o[i * 4] + y.x * o[i * 4 + 2], x.y * o[i * 4 + 1] + y.y * o[i * 4 + 3]};
      if constexpr (!kBfloat16) {
        const float* units = shared.p_units[num_outputs % 2].unit + i * 8 + thread % 4 * 2;
        for (int j = 0; j < 2; j++) number[j] *= units[j];
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
        sums[j] += number[j];
        weighed[j] += (i * 8 + j + 1) * number[j];
      }
    }
    float sum = weighed[0] + weighed[1] + (thread % 4 * 2 - mean) * (sums[0] + sums[1]);
    slopes_sum.add(sum);
  }

  // o = scale decay^(i+1) o, when P is there, whose units it gets.
  __device__ __forceinline__ void decay_outputs(float (&o)[32], const RowUnits& o_units, const float2 (&decay)[8]) {
    int buffer = num_outputs % 2;
    mbarrier_wait(shared.p_full[buffer], num_outputs / 2 % 2);
#pragma unroll
    for (int pair = 0; pair < 8; pair++) {
      int token = pair * 8 + thread % 4 * 2;
      float2 factor = decay[pair];
      if constexpr (!kBfloat16) {
        float2 to_unit = *reinterpret_cast<const float2*>(&shared.p_units[buffer].to_unit[token]);
        factor.x *= to_unit.x;
        factor.y *= to_unit.y;
      }
      o[pair * 4] *= factor.x * o_units.unit[0];
      o[pair * 4 + 1] *= factor.y * o_units.unit[0];
      o[pair * 4 + 2] *= factor.x * o_units.unit[1];
      o[pair * 4 + 3] *= factor.y * o_units.unit[1];
    }
  }

  // Begin o += vT PT.
  __device__ __forceinline__ void add_intra_block(float (&o)[32]) {
    int buffer = num_outputs % 2;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) {
      uint64_t v_step = wgmma_descriptor_in_32_bits(shared.v[ring.stage][group], step * 2048);
#pragma unroll
      for (int part = 0; part < kPTiles; part++) {
        uint64_t p_step = wgmma_descriptor_in_32_bits(shared.p[buffer][part], step * 32);
        wgmma_64x64x16<kBfloat16, true, false>(o, v_step, p_step, 1);
      }
    }
    wgmma_commit();
  }

  // Store the outputs of a chunk, now complete.
  __device__ __forceinline__ void finish(float (&o)[32]) {
    int buffer = num_outputs % 2;
    if constexpr (!kBfloat16) {
#pragma unroll
      for (int pair = 0; pair < 8; pair++) {
        float2 unit = *reinterpret_cast<const float2*>(&shared.p_units[buffer].unit[pair * 8 + thread % 4 * 2]);
        o[pair * 4] *= unit.x;
        o[pair * 4 + 1] *= unit.y;
        o[pair * 4 + 2] *= unit.x;
        o[pair * 4 + 3] *= unit.y;
      }
    }
    __syncwarp();
    if (is_first()) {
      if constexpr (kPCluster == 1) {
        mbarrier_arrive(shared.p_empty[buffer]);
      } else {
        mbarrier_arrive_at((num_outputs + kPBuffers) % kPCluster, shared.p_empty[buffer]);
      }
    }
    int o_buffer = num_outputs % kOutputBuffers;
    mbarrier_wait(shared.o_empty[group][o_buffer], num_outputs / kOutputBuffers % 2 ^ 1);
    num_outputs++;
    store_outputs(shared.o[group][o_buffer], o, thread);
    fence_proxy_async();
    arrive(shared.o_full[group][o_buffer]);
  }

  // Begin a chunk: o = ST qT of the back part, while products of the chunk before, if any, are under way.
  __device__ __forceinline__ void begin(float (&o)[32], float (&range_factor)[2], RowUnits& o_units) {
    if constexpr (!kTwoParts || !kBfloat16) wgmma_wait<0>();  // float16 needs to know the largest of all ST
    o_units = units;
    put_in_range(range_factor, o_units, state);
    if constexpr (kSlopes && kTwoParts) giver.give<Back>(shared, state, units, thread);
    if constexpr (kTwoParts) inter_block<Back, true>(o, range_factor);
  }

  // The rest of it. In the order of the tensor cores, which are to have products to do all the time: ST qT of the front
  // part; the back part of the next state; vT PT; the front part, during which the next chunk begins and outputs are
  // stored. With kEarly these are stored before it, `loaded` and `o_decay` are there, and `loaded` becomes that of the
  // next chunk.
  __device__ __forceinline__ void complete(float (&o)[32], const float (&range_factor)[2], const RowUnits& o_units,
                                           LoadedV& loaded, float2 (&o_decay)[8], int num_tokens_left) {
    DecayedV v;
    if constexpr (kSlopes) giver.give<Front>(shared, state, units, thread);
    inter_block<Front, !kTwoParts>(o, range_factor);
    if constexpr (!kEarly) {
      take_v(loaded, ring, num_tokens_left);
      load_o_decay(o_decay, num_tokens_left);
    }
    if constexpr (kSlopes) load_columns(primal, shared.v[ring.stage][kGroups + group], thread);
    if constexpr (kTwoParts) {
      decay_v(v, units, loaded);
      scale_state(Back::of(state), v.state_factor);
      mbarrier_wait(shared.k_full[ring.stage], ring.parity());
      update_state<Back>(state, v, shared.k[ring.stage]);
    }
    wgmma_wait<(kTwoParts ? 1 : 0)>();
    release(shared.q_empty[q_ring.stage]);
    decay_outputs(o, o_units, o_decay);
    if constexpr (kSlopes) weigh(o);
    add_intra_block(o);
    if constexpr (!kTwoParts) {
      decay_v(v, units, loaded);
      mbarrier_wait(shared.k_full[ring.stage], ring.parity());
    }
    scale_state(Front::of(state), v.state_factor);
    if constexpr (kEarly) {
      // What goes to and from shared memory waits for products with operands in registers that were queued before it.
      // Where these are few, it is quicker to store the outputs first.
      take_next_v(loaded, num_tokens_left);
      if constexpr (kReversed) load_o_decay(o_decay, num_tokens_left - kChunk);
      wgmma_wait<0>();
      finish(o);
      update_state<Front>(state, v, shared.k[ring.stage]);
      units = v.units;
    } else {
      update_state<Front>(state, v, shared.k[ring.stage]);
      units = v.units;
      wgmma_wait<(kOverlap ? 1 : 0)>();
      finish(o);
    }
    q_ring.advance();
    ring.advance();
  }

  // NOTE: two things that ptxas wants, or it gives up overlapping products: a loop that some of them go around in is
  // entered with accumulators that products have made, here by adding zeros, and left when all of these are complete.
  __device__ __forceinline__ void compute_outputs(const Pass& pass) {
    int num_tokens_left = pass.num_tokens;
    if (num_tokens_left == 0) return;
    begin_pass(pass);
    add_zeros<Front>(state, shared.zeros);
    wgmma_wait<0>();
    LoadedV v;
    float2 o_decay[8];
    if constexpr (kEarly) {
      take_v(v, ring, num_tokens_left);
      load_o_decay(o_decay, num_tokens_left);
    }
    int used_stage = -1;
    while (true) {
      // Behind the last chunk there is no q to wait for, and one product with whatever is there, for nothing.
      if (num_tokens_left > 0) mbarrier_wait(shared.q_full[q_ring.stage], q_ring.parity());
      float o[32], range_factor[2];
      RowUnits o_units;
      begin(o, range_factor, o_units);
      if (used_stage >= 0) release(shared.kv_empty[used_stage]);
      used_stage = ring.stage;
      if (num_tokens_left <= 0) break;
      complete(o, range_factor, o_units, v, o_decay, num_tokens_left);
      num_tokens_left -= kChunk;
    }
    wgmma_wait<0>();
  }
};

__device__ __forceinline__ void attend(Shared& shared, const HopperArgs& args, const Schedule& schedule,
                                       int group_idx) {
  Group group = {shared, args, group_idx};
  const int& member = schedule.team.member;
  auto of_group = [&](float* states) { return states + group_idx * (kQkDim * 64); };
  for (int idx = 0; idx < schedule.num_passes(); idx++) {
    Pass pass = schedule[idx];
    const bool is_pair = schedule.is_pair(), has_state = kSplit && pass.outputs && member > 0;
    if (!pass.outputs || !kSplit) group.set_decay(slope_of(args, pass.head_idx));
    if (has_state && !is_pair) {
      load_segment(group.state, group.units, of_group(states_of(schedule, idx / 2)) + (member - 1) * kStateSize);
    } else if (!has_state) {
      const HopperArgs& arrays = schedule.args_of(pass);
      bool exists = arrays.initial_state != nullptr && schedule.begins_sequence(pass);
      load_initial_state(group.state, arrays, pass.batch_idx, pass.head_idx, group.first_v(pass), exists);
      group.units = {};
    }
    if (pass.outputs) {
      group.compute_outputs(pass);
      uint32_t same_idx = idx;
      forget_origin(same_idx);  // or all of `pass` would be kept in registers
      pass = schedule[same_idx];
      const HopperArgs& arrays = schedule.args_of(pass);
      if (arrays.final_state != nullptr && schedule.is_last()) {
        store_final_state(group.state, group.units, arrays, pass.batch_idx, pass.head_idx, group.first_v(pass));
      }
      if constexpr (kSlopes) {
        double sum = group.slopes_sum.value();
        if (args.dstate != nullptr && schedule.is_last()) {
          sum += (group.mean - 1) * times_dstate(group.state, group.units, args, pass);
        }
        store_partial(schedule, pass, threadIdx.x % 128 / 32, sum);
        group.slopes_sum = {};
      }
    } else if constexpr (kSplit) {
      group.add_segment(pass);
      if (is_pair) continue;
      float* states = states_of(schedule, idx / 2);
      if (!schedule.is_last()) store_segment(group.state, group.units, of_group(states) + member * kStateSize);
      // A graph that is launched again finds the flags that it left, with the same values. So they are cleared:
      // kScanned before anybody looks for it, kAdded when all have seen it.
      if (idx == 0) clear_flag(schedule, kScanned, group_idx);
      if constexpr (kSlopes) mbarrier_wait(for_slopes(shared).stored, idx / 2 % 2);
      meet_team(schedule, kAdded, idx, group_idx);
      scan(schedule, states, group_idx, shared.segment_decay[group_idx]);
      meet_team(schedule, kScanned, idx, group_idx);
      if constexpr (kSlopes) arrive(for_slopes(shared).scanned);
      if (idx + 2 == schedule.num_passes()) clear_flag(schedule, kAdded, group_idx);
    }
  }
}

// By one thread: the fence takes as long for each that calls it.
__device__ __forceinline__ void init_barriers(Shared& shared) {
  constexpr int kUsers = 4 * (kGroups + 1 + kSlopes) * kCluster;  // warps
  for (int stage = 0; stage < kQStages; stage++) {
    mbarrier_init(shared.q_full[stage], 1);
    mbarrier_init(shared.q_empty[stage], kUsers);
  }
  for (int stage = 0; stage < kStages; stage++) {
    mbarrier_init(shared.k_full[stage], 1);
    mbarrier_init(shared.v_full[stage], 1);
    mbarrier_init(shared.kv_empty[stage], kUsers);
  }
  for (int buffer = 0; buffer < kPBuffers; buffer++) {
    mbarrier_init(shared.p_full[buffer], kPCluster == 1 ? 4 : 1);
    mbarrier_init(shared.p_empty[buffer], 4 * kGroups * kPCluster);
  }
  for (int group = 0; group < kGroups; group++) {
    for (int buffer = 0; buffer < kOutputBuffers; buffer++) {
      mbarrier_init(shared.o_full[group][buffer], 4);
      mbarrier_init(shared.o_empty[group][buffer], 1);
    }
  }
  mbarrier_init(shared.in_step, kNeighbours);
  if constexpr (kSlopes) {
    for (int buffer = 0; buffer < kHandedOver; buffer++) {
      mbarrier_init(for_slopes(shared).full[buffer], 4);
      mbarrier_init(for_slopes(shared).empty[buffer], 4);
    }
    mbarrier_init(for_slopes(shared).stored, 4);
    mbarrier_init(for_slopes(shared).scanned, 4);
  }
  fence_mbarrier_init();
}

extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    forward(const __grid_constant__ Attentions attentions) {
  const HopperArgs& args = attentions.of[0];
  constexpr int kMaps = 4 + kSlopes;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];  // as swizzled tiles are
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Different warps, since fences wait for what their warp has begun.
  if (warp == 0) {
    if (lane == 0) init_barriers(shared);
  } else if (warp == 1) {
    for (int i = 0; i < 2; i++) reinterpret_cast<uint4*>(shared.zeros)[i * 32 + lane] = uint4{0, 0, 0, 0};
    fence_proxy_async();
  } else if (warp == 2 && lane < kMaps * kAttentions) {
    prefetch_tensor_map((&attentions.of[lane / kMaps].q)[lane % kMaps]);
  } else if (kSplit && warp == 3) {
    join_team(shared.team, args);
  }
  Schedule schedule = {args, shared.team};
  Pass first_pass = kSplit ? Pass{} : schedule[0];
  __syncthreads();
  if constexpr (kBlocks > 1) cluster_barrier();
  int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    decrease_registers<kRegisters.producer>();
    if (threadIdx.x == 0) produce(shared, schedule, first_pass);
    if (warp >= 1 && warp <= kGroups && lane == 0) store(shared, schedule, warp - 1);
  } else if (warpgroup == 1) {
    decrease_registers<kRegisters.scores>();
    score_passes(shared, args, schedule);
  } else if (kSlopes && warpgroup == 2 + kGroups) {
    increase_registers<kSlopes ? kRegisters.slopes : kRegisters.group>();
    if constexpr (kSlopes) sum_slopes(shared, args, schedule);
  } else {
    increase_registers<kRegisters.group>();
    constexpr bool kIsOnlyOne = kGroups == 1 && (kKeepsThread || kSplit || !kSlopes);  // else ptxas would spill more
    attend(shared, args, schedule, kIsOnlyOne ? 0 : warpgroup - 2);
  }
  if constexpr (kBlocks > 1) {
    __syncwarp();
    cluster_barrier();  // others may still write into this block's shared memory
  }
}
