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
// float16 has little range: rows of P are scaled by powers of two, as those of ST and of decayed vT, which is exact.
#include "state_sm90.cuh"

constexpr int kAttentions = ATTENTIONS, kGroups = V_GROUPS;
constexpr int kCluster = CLUSTER, kNeighbours = NEIGHBOURS, kBlocks = kCluster * kNeighbours;
constexpr int kThreads = 128 * (2 + kGroups), kPBuffers = 2;
constexpr bool kSplit = SPLIT, kHigh = HIGH;
constexpr int kProducerRegisters = kGroups == 1 ? 72 : 40, kScoresRegisters = kGroups == 1 ? 128 : 72;
constexpr int kGroupRegisters = kGroups == 1 ? 256 : 200;
static_assert(128 * (kScoresRegisters + kProducerRegisters + kGroups * kGroupRegisters) <= 65536,
              "an SM has 65536 registers");
static_assert(kCluster == 1 || (!kSplit && kGroups == 1), "a cluster is the blocks of a head, of one group each");
static_assert(kNeighbours == 1 || (!kSplit && kCluster == 1), "a cluster of neighbours is one block of each row");

constexpr int kScoresBarrier = 3, kPTiles = kHigh ? 2 : 1;
constexpr int kLengths = kReversed ? 2 : 1;  // of chunks, for outputs

// float16: what one in a row of P stands for, and its inverse.
struct ScoresUnits {
  float unit[kChunk], to_unit[kChunk];
};

// SPLIT: the team that this block is a member of, the rows that it takes in turn, and how it shares out a sequence.
struct Team {
  int idx, num_teams, num_rows, size, member;
  int first_member;  // how many members the teams before it have
  int first_length, segment_length;
};

struct Shared {
  alignas(1024) Tile q[kQStages][kQkBlocks], k[kStages][kQkBlocks], v[kStages][kGroups];
  Tile o[kGroups][kOutputBuffers];
  uint16_t zeros[8][64];  // read over and over; compute-sanitizer counts 4 KiB from here on, so not at the end
  Tile p[kPBuffers][kPTiles];
  ScoresUnits p_units[kPBuffers];
  float o_decay[kGroups][kLengths][kChunk];  // scale decay^(i+1); REVERSED: decay^(num_tokens-1-i)
  Decay decay[kGroups];
  float segment_decay[kGroups];  // decay^segment_length
  Team team;
  // Of a stage: q, k or v have arrived; all blocks of the cluster have used theirs. q is done with long before k and v.
  // Of p likewise: it is in this block; the next that this block makes may go to the same buffer of all.
  uint64_t q_full[kQStages], q_empty[kQStages], k_full[kStages], v_full[kStages], kv_empty[kStages];
  uint64_t p_full[kPBuffers], p_empty[kPBuffers];
  uint64_t o_full[kGroups][kOutputBuffers], o_empty[kGroups][kOutputBuffers];
  uint64_t in_step;  // all neighbours are about to load
};
static_assert(sizeof(Shared) <= SMEM_BYTES, "forward_sm90.py: smem_bytes is smaller than Shared");

// One warp has used a stage: the first lanes tell the blocks of the cluster.
__device__ __forceinline__ void release(uint64_t& empty) {
  int lane = threadIdx.x % 32;
  if constexpr (kCluster == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else {
    __syncwarp();
    if (lane < kCluster) mbarrier_arrive_at(lane, empty);
  }
}

// Of each attention: all but arrays is the same.
struct Attentions {
  HopperArgs of[kAttentions];
};

// What a block does next: a pass over a segment of a row, for its state or for its outputs.
struct Pass {
  int row, attention, batch_idx, head_idx, v_block, first_token, num_tokens;
  bool outputs;

  __device__ __forceinline__ int num_chunks() const { return (num_tokens + kChunk - 1) / kChunk; }

  // Where in the sequence the tokens of a chunk begin.
  __device__ __forceinline__ int token(int chunk, int seqlen) const {
    int token = first_token + chunk * kChunk;
    return kReversed ? (seqlen - 1) / kChunk * kChunk - token : token;
  }
};

// How many tokens it takes until the decay of a float is 0. Without decay, more than there are.
__device__ __forceinline__ int memory(double slope) {
  return 1 + static_cast<int>(fminf(__fdividef(104.0f, fmaxf(static_cast<float>(slope), 1e-8f)), 1e9f));
}

// Teams of one row each, with more members for rows that remember longer: by one warp, a lane for each row. Time is
// counted in chunks of outputs; a chunk of states takes states_time of it, those that a segment forgets no time. All
// blocks find the same least time in which as many members suffice as there are.
__device__ __forceinline__ void balance(Team& team, const HopperArgs& args) {
  auto divide = [](int x, int by) { return static_cast<int>(__fdividef(x + 0.5f, by)); };  // right below 2^20
  const int lane = threadIdx.x % 32, block = blockIdx.x, num_blocks = gridDim.x;
  const int num_chunks = (args.seqlen + kChunk - 1) / kChunk;
  const int head = divide(lane, args.num_v_blocks * kAttentions);
  const double slope = slope_of(args, lane < args.num_rows ? head - divide(head, args.num_heads) * args.num_heads : 0);
  const float remembered = memory(slope) / kChunk + 1;
  float too_little = __fdividef(num_chunks * args.num_rows, num_blocks);
  float enough = (1 + args.states_time) * (divide(num_chunks - 1, divide(num_blocks, args.num_rows)) + 1.01f);
  int chunks, size;
#pragma unroll 1
  for (int num_left = 6; num_left >= 0; num_left--) {
    float time = num_left > 0 ? (enough + too_little) / 2 : enough;
    float with_all_states = __fdividef(time, 1 + args.states_time);
    chunks = max(1, static_cast<int>(fmaxf(with_all_states, time - args.states_time * remembered)));
    size = lane < args.num_rows ? divide(num_chunks + chunks - 1, chunks) : 0;
    (__reduce_add_sync(~0u, size) <= num_blocks ? enough : too_little) = time;
  }
  int behind = size;  // members of this lane's team and of those before it
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    int more = __shfl_up_sync(~0u, behind, distance);
    if (lane >= distance) behind += more;
  }
  if (lane == 31 && behind <= block) team.num_rows = 0;  // a block too many
  if (behind - size <= block && block < behind) {
    team = {lane, args.num_rows, 1, size, block - (behind - size), behind - size,
            (num_chunks - (size - 1) * chunks) * kChunk, chunks * kChunk};
  }
}

// By one warp.
__device__ __forceinline__ void join_team(Team& team, const HopperArgs& args) {
  if (args.states_time > 0) return balance(team, args);
  int idx = blockIdx.x, num_teams = gridDim.x, num_rows = (args.num_rows - idx + num_teams - 1) / num_teams;
  team = {idx, num_teams, num_rows, args.team_size, static_cast<int>(blockIdx.y), idx * args.team_size,
          args.first_length, args.segment_length};
}

// A team takes rows in turn; each of its blocks, a member, has a segment of all of them.
struct Schedule {
  const HopperArgs& args;
  const Team& team;
  const int rank = blockIdx.x % kCluster;

  // Arrays of one attention; all else is the same for both.
  __device__ __forceinline__ const HopperArgs& args_of(const Pass& pass) const {
    return (&args)[kAttentions > 1 ? pass.attention : 0];
  }

  // With SPLIT, two for each row: its state, its outputs.
  __device__ __forceinline__ int num_passes() const { return kSplit ? 2 * team.num_rows : 1; }

  // Two members need no exchange.
  __device__ __forceinline__ bool is_pair() const { return kSplit && args.team_size == 2; }
  __device__ __forceinline__ bool is_last() const { return !kSplit || team.member == team.size - 1; }

  __device__ __forceinline__ Pass operator[](int idx) const {
    Pass pass;
    pass.outputs = !kSplit || idx % 2 == 1;
    pass.row = kSplit ? team.idx + idx / 2 * team.num_teams : blockIdx.x;
    int head = pass.row / args.num_v_blocks;
    pass.v_block = pass.row - head * args.num_v_blocks;
    pass.attention = head % kAttentions;
    head /= kAttentions;
    pass.batch_idx = head / args.num_heads;
    pass.head_idx = head - pass.batch_idx * args.num_heads;
    pass.first_token = 0;
    const int seqlen = kReversed ? (args.seqlen + kChunk - 1) / kChunk * kChunk : args.seqlen;
    pass.num_tokens = seqlen;
    if (kSplit) {
      // Of two members, the second makes the state that it needs itself, and has fewer outputs; of more, each makes
      // what its segment adds, and they exchange it.
      int segment = pass.outputs || !is_pair() ? team.member : team.member - 1;
      if (segment > 0) pass.first_token = team.first_length + (segment - 1) * team.segment_length;
      pass.num_tokens = min(segment == 0 ? team.first_length : team.segment_length, seqlen - pass.first_token);
      if (!pass.outputs) {
        if (segment < 0 || segment == team.size - 1) {
          pass.num_tokens = 0;  // nothing is in front of it, or behind it
        } else {  // what is forgotten at its end, with the initial state if there is any
          int num_forgotten = max(pass.num_tokens - memory(slope_of(args, pass.head_idx)), 0) / kChunk * kChunk;
          pass.first_token += num_forgotten;
          pass.num_tokens -= num_forgotten;
        }
      }
    }
    return pass;
  }
};

// Stages in the order in which all warpgroups go through them, and the parity of the next wait for each.
template <int kNumStages>
struct Ring {
  int stage = 0;
  uint32_t parities = 0;

  __device__ __forceinline__ uint32_t parity() const { return parities >> stage & 1; }
  __device__ __forceinline__ void advance() {
    parities ^= 1u << stage;
    stage = stage + 1 == kNumStages ? 0 : stage + 1;
  }
  // Chunks that others have.
  __device__ __forceinline__ void skip(int count) {
    for (int i = 0; i < count; i++) advance();
  }
};
using QRing = Ring<kQStages>;
using KvRing = Ring<kStages>;

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
      mbarrier_arrive_expect_tx(shared.v_full[stage], kGroups * kTileBytes);
#pragma unroll
      for (int group = 0; group < kGroups; group++) {
        tma_load(shared.v[stage][group], args.v, shared.v_full[stage], first_v + group * 64, token, head, batch);
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

constexpr int kStateSize = kGroups * kQkDim * 64;  // of a row, padded
constexpr int kGroupBarrier = 1;                   // and the next

// States behind the team's segments but the last, [size - 1, kStateSize]: first what each segment adds, then what there
// is. Rows take turns between two, since a block may be at the next row while another still reads.
__device__ __forceinline__ float* states_of(const Schedule& schedule, int row_idx) {
  const Team& team = schedule.team;
  int64_t first_state = (team.first_member - team.idx) * 2 + row_idx % 2 * (team.size - 1);
  return schedule.args.workspace + first_state * kStateSize;
}

// A group's flag at one of the two meetings of its team, or another's.
enum Meeting { kAdded, kScanned };
__device__ __forceinline__ uint64_t* flag(const Schedule& schedule, Meeting meeting, int idx) {
  const Team& team = schedule.team;
  const int num_members = gridDim.x * gridDim.y;
  int64_t num_states = 2 * (num_members - team.num_teams);
  uint64_t* flags = reinterpret_cast<uint64_t*>(schedule.args.workspace + num_states * kStateSize);
  return flags + (meeting * num_members + team.first_member) * kGroups + idx;
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
// time. What counts is how many loads are under way.
__device__ __forceinline__ void scan(const Schedule& schedule, float* states, int group, float decay) {
  // One where registers have no room for more.
  constexpr int kAhead = 16, kWidth = kQkDim <= 64 || (kGroups == 2 && kBfloat16) ? 2 : 1;
  const int num_states = schedule.team.size - 1;
  const int per_member = (kStateSize / kWidth + num_states) / (num_states + 1);
  const int end = min(kStateSize / kWidth, (schedule.team.member + 1) * per_member);
  uint32_t thread = group * 128 + threadIdx.x % 128;
  forget_origin(thread);
#pragma unroll 1
  for (int idx = schedule.team.member * per_member + thread; idx < end; idx += 128 * kGroups) {
    float* state = states + idx * kWidth;
    float x[kWidth] = {};
#pragma unroll 1
    for (int num_left = num_states; num_left > 0; num_left -= kAhead) {
      float added[kAhead][kWidth];
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        if (i < num_left) load_l2(added[i], state + i * kStateSize);
      }
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        if (i < num_left) {
          // NOTE: no 0 * inf when a negative slope overflows the decay of a state that is still empty.
#pragma unroll
          for (int j = 0; j < kWidth; j++) x[j] = (x[j] == 0 ? 0 : decay * x[j]) + added[i][j];
          store_l2(state + i * kStateSize, x);
        }
      }
      state += kAhead * kStateSize;
    }
  }
}

// P number `use` may be made: where it goes, all blocks have used the one before. Of each buffer's, this block makes
// every kPeriod-th, the first of them in a buffer that nobody has used if use < kPBuffers.
__device__ __forceinline__ void wait_for_p_empty(Shared& shared, int use, int rank) {
  constexpr int kPeriod = kCluster % kPBuffers == 0 ? kCluster : kCluster * kPBuffers;
  int first = use % kPeriod, parity = use / kPeriod % 2;
  if (first < kPBuffers) parity ^= 1;
  mbarrier_wait(shared.p_empty[use % kPBuffers], parity);
}

// P of all chunks of a pass; blocks of a cluster take turns, each making it for all of them.
__device__ __forceinline__ void make_scores(Shared& shared, const Pass& pass, int rank, QRing& q_ring, KvRing& ring,
                                            int& p_uses, const float (&factor)[32]) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  for (int chunk = 0; chunk < pass.num_chunks(); chunk++, q_ring.advance(), ring.advance(), p_uses++) {
    int q_stage = q_ring.stage, stage = ring.stage;
    mbarrier_wait(shared.q_full[q_stage], q_ring.parity());
    mbarrier_wait(shared.k_full[stage], ring.parity());
    if (kCluster > 1 && p_uses % kCluster != rank) {
      release(shared.q_empty[q_stage]);
      release(shared.kv_empty[stage]);
      continue;
    }
    float p[32];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kQkDim / 16; step++) {
      int offset = step / 4 * kTileBytes + step % 4 * 32;
      wgmma_64x64x16<kBfloat16, false, false>(p, wgmma_descriptor_in_32_bits(shared.q[q_stage], offset),
                                              wgmma_descriptor_in_32_bits(shared.k[stage], offset), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    release(shared.q_empty[q_stage]);
    release(shared.kv_empty[stage]);
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] *= factor[i];

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
    if constexpr (kCluster == 1) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.p_full[buffer]);
    } else {
      named_barrier(kScoresBarrier, 128);
      if (thread == rank) mbarrier_arrive(shared.p_full[buffer]);
      if (thread != rank && thread < kCluster) {
        constexpr int kUnitsBytes = kBfloat16 ? 0 : sizeof(ScoresUnits);
        mbarrier_arrive_expect_tx_at(thread, shared.p_full[buffer], kPTiles * kTileBytes + kUnitsBytes);
        copy_to(thread, shared.p[buffer], kPTiles * kTileBytes, shared.p_full[buffer]);
        if constexpr (kUnitsBytes > 0) copy_to(thread, &shared.p_units[buffer], kUnitsBytes, shared.p_full[buffer]);
      }
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
      float factor[32];
      double slope = slope_of(args, pass.head_idx);
      float scale = static_cast<float>(args.scale);
#pragma unroll
      for (int i = 0; i < 32; i++) {
        int row = first_row + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        int distance = kReversed ? column - row : row - column;
        float decay = expf(static_cast<float>(-slope * max(distance, 0)));
        factor[i] = distance >= 0 ? scale * decay : 0;
        if (kReversed) factor[i] = fminf(fmaxf(factor[i], -kLargest), kLargest);  // no 0 * inf behind the end
      }
      make_scores(shared, pass, schedule.rank, q_ring, ring, p_uses, factor);
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

__device__ __forceinline__ void store_outputs(Tile& tile, const float (&o)[32]) {
  int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
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
constexpr bool kEarly = kTwoParts && kGroups == 1 && kQkDim <= 128;

// One warpgroup: state and outputs of 64 columns of v.
struct Group {
  Shared& shared;
  const HopperArgs& args;
  const int group, thread = threadIdx.x % 128, lane = threadIdx.x % 32, barrier = kGroupBarrier + group;
  QRing q_ring;
  KvRing ring;
  int num_outputs = 0;  // chunks
  int last_left;        // how many tokens of the pass are left, with those of the chunk that has the sequence's end
  State state;
  RowUnits units;

  __device__ __forceinline__ void set_decay(double slope) {
    auto power = [&](int exponent) { return expf(static_cast<float>(-slope * exponent)); };
    named_barrier(barrier, 128);
    if (thread < kChunk) {
      const float scale = static_cast<float>(args.scale);
      if constexpr (kReversed) {
        shared.o_decay[group][0][thread] = power(kChunk - 1 - thread);
        shared.o_decay[group][1][thread] = power(max((args.seqlen - 1) % kChunk - thread, 0));
      } else {
        shared.o_decay[group][0][thread] = scale * power(thread + 1);
      }
      fill(shared.decay[group], thread, slope, scale, args.seqlen);
    }
    if (kSplit && thread == kChunk) shared.segment_decay[group] = power(shared.team.segment_length);
    named_barrier(barrier, 128);
  }

  __device__ __forceinline__ int first_v(const Pass& pass) const { return (pass.v_block * kGroups + group) * 64; }

  __device__ __forceinline__ void load_segment_state(const float* from) {
    from += group * (kQkDim * 64);
#pragma unroll
    for (int quad = 0; quad < kQkDim / 8; quad++) {
      float x[4];
      load_l2(x, from + (quad * 128 + thread) * 4);
#pragma unroll
      for (int i = 0; i < 4; i++) state[quad * 4 + i] = x[i];
    }
    units = {};
  }

  __device__ __forceinline__ void store_segment_state(float* to) {
    to += group * (kQkDim * 64);
#pragma unroll
    for (int quad = 0; quad < kQkDim / 8; quad++) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = state[quad * 4 + i] * units.unit[i / 2];
      store_l2(to + (quad * 128 + thread) * 4, x);
    }
  }

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
    load_v(v, shared.v[ring.stage][group], shared.decay[group], has_end(num_tokens_left));
  }

  // v of the chunk behind the ring's. Behind the last that chunk's again, for nothing: ptxas gives up overlapping
  // products where a branch is among them.
  __device__ __forceinline__ void take_next_v(LoadedV& v, int num_tokens_left) {
    KvRing next_ring = ring;
    if (num_tokens_left > kChunk) next_ring.advance();
    take_v(v, next_ring, num_tokens_left - kChunk);
  }

  // The state of a segment alone. While products of a chunk are under way, v of the next is made.
  __device__ __forceinline__ void add_segment(const Pass& pass) {
    if (pass.num_tokens == 0) return;
    begin_pass(pass);
    int num_tokens_left = pass.num_tokens;
    auto step = [&](const DecayedV& v, DecayedV& next) {
      int stage = ring.stage;
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
      decay[pair] = *reinterpret_cast<const float2*>(&first[pair * 8 + lane % 4 * 2]);
    }
  }

  // o = scale decay^(i+1) o + vT PT, begun.
  __device__ __forceinline__ void add_intra_block(float (&o)[32], const RowUnits& o_units, const float2 (&decay)[8]) {
    int buffer = num_outputs % 2;
    mbarrier_wait(shared.p_full[buffer], num_outputs / 2 % 2);
#pragma unroll
    for (int pair = 0; pair < 8; pair++) {
      int token = pair * 8 + lane % 4 * 2;
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
        float2 unit = *reinterpret_cast<const float2*>(&shared.p_units[buffer].unit[pair * 8 + lane % 4 * 2]);
        o[pair * 4] *= unit.x;
        o[pair * 4 + 1] *= unit.y;
        o[pair * 4 + 2] *= unit.x;
        o[pair * 4 + 3] *= unit.y;
      }
    }
    __syncwarp();
    if (lane == 0) {
      if constexpr (kCluster == 1) {
        mbarrier_arrive(shared.p_empty[buffer]);
      } else {
        mbarrier_arrive_at((num_outputs + kPBuffers) % kCluster, shared.p_empty[buffer]);
      }
    }
    int o_buffer = num_outputs % kOutputBuffers;
    mbarrier_wait(shared.o_empty[group][o_buffer], num_outputs / kOutputBuffers % 2 ^ 1);
    num_outputs++;
    store_outputs(shared.o[group][o_buffer], o);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.o_full[group][o_buffer]);
  }

  // Begin a chunk: o = ST qT of the back part, while products of the chunk before, if any, are under way.
  __device__ __forceinline__ void begin(float (&o)[32], float (&range_factor)[2], RowUnits& o_units) {
    if constexpr (!kTwoParts || !kBfloat16) wgmma_wait<0>();  // float16 needs to know the largest of all ST
    o_units = units;
    put_in_range(range_factor, o_units, state);
    if constexpr (kTwoParts) inter_block<Back, true>(o, range_factor);
  }

  // The rest of it. In the order of the tensor cores, which are to have products to do all the time: ST qT of the front
  // part; the back part of the next state; vT PT; the front part, during which the next chunk begins and outputs are
  // stored. With kEarly these are stored before it, `loaded` and `o_decay` are there, and `loaded` becomes that of the
  // next chunk.
  __device__ __forceinline__ void complete(float (&o)[32], const float (&range_factor)[2], const RowUnits& o_units,
                                           LoadedV& loaded, float2 (&o_decay)[8], int num_tokens_left) {
    DecayedV v;
    inter_block<Front, !kTwoParts>(o, range_factor);
    if constexpr (!kEarly) {
      take_v(loaded, ring, num_tokens_left);
      load_o_decay(o_decay, num_tokens_left);
    }
    if constexpr (kTwoParts) {
      decay_v(v, units, loaded);
      scale_state(Back::of(state), v.state_factor);
      mbarrier_wait(shared.k_full[ring.stage], ring.parity());
      update_state<Back>(state, v, shared.k[ring.stage]);
    }
    wgmma_wait<(kTwoParts ? 1 : 0)>();
    release(shared.q_empty[q_ring.stage]);
    add_intra_block(o, o_units, o_decay);
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
    wgmma_fence();
    wgmma_transposed<kBfloat16>(Front::of(state), {0, 0, 0, 0}, wgmma_descriptor_of_rows(shared.zeros));
    wgmma_commit();
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
  for (int idx = 0; idx < schedule.num_passes(); idx++) {
    Pass pass = schedule[idx];
    const bool is_pair = schedule.is_pair(), has_state = kSplit && pass.outputs && member > 0;
    if (!pass.outputs || !kSplit) group.set_decay(slope_of(args, pass.head_idx));
    if (has_state && !is_pair) {
      group.load_segment_state(states_of(schedule, idx / 2) + (member - 1) * kStateSize);
    } else if (!has_state) {
      const HopperArgs& arrays = schedule.args_of(pass);
      bool is_first = !kSplit || (member == (is_pair && !pass.outputs ? 1 : 0) && pass.first_token == 0);
      bool exists = arrays.initial_state != nullptr && is_first;
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
    } else if constexpr (kSplit) {
      group.add_segment(pass);
      if (is_pair) continue;
      float* states = states_of(schedule, idx / 2);
      if (!schedule.is_last()) group.store_segment_state(states + member * kStateSize);
      // A graph that is launched again finds the flags that it left, with the same values. So they are cleared:
      // kScanned before anybody looks for it, kAdded when all have seen it.
      if (idx == 0) clear_flag(schedule, kScanned, group_idx);
      meet_team(schedule, kAdded, idx, group_idx);
      scan(schedule, states, group_idx, shared.segment_decay[group_idx]);
      meet_team(schedule, kScanned, idx, group_idx);
      if (idx + 2 == schedule.num_passes()) clear_flag(schedule, kAdded, group_idx);
    }
  }
}

// By one thread: the fence takes as long for each that calls it.
__device__ __forceinline__ void init_barriers(Shared& shared) {
  constexpr int kUsers = 4 * (kGroups + 1) * kCluster;  // warps
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
    mbarrier_init(shared.p_full[buffer], kCluster == 1 ? 4 : 1);
    mbarrier_init(shared.p_empty[buffer], 4 * kGroups * kCluster);
  }
  for (int group = 0; group < kGroups; group++) {
    for (int buffer = 0; buffer < kOutputBuffers; buffer++) {
      mbarrier_init(shared.o_full[group][buffer], 4);
      mbarrier_init(shared.o_empty[group][buffer], 1);
    }
  }
  mbarrier_init(shared.in_step, kNeighbours);
  fence_mbarrier_init();
}

extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    forward(const __grid_constant__ Attentions attentions) {
  const HopperArgs& args = attentions.of[0];
  extern __shared__ __align__(1024) unsigned char shared_bytes[];  // as swizzled tiles are
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Different warps, since fences wait for what their warp has begun.
  if (warp == 0) {
    if (lane == 0) init_barriers(shared);
  } else if (warp == 1) {
    for (int i = 0; i < 2; i++) reinterpret_cast<uint4*>(shared.zeros)[i * 32 + lane] = uint4{0, 0, 0, 0};
    fence_proxy_async();
  } else if (warp == 2 && lane < 4 * kAttentions) {
    prefetch_tensor_map((&attentions.of[lane / 4].q)[lane % 4]);
  } else if (kSplit && warp == 3) {
    join_team(shared.team, args);
  }
  Schedule schedule = {args, shared.team};
  Pass first_pass = kSplit ? Pass{} : schedule[0];
  __syncthreads();
  if constexpr (kBlocks > 1) cluster_barrier();
  int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    decrease_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(shared, schedule, first_pass);
    if (warp >= 1 && warp <= kGroups && lane == 0) store(shared, schedule, warp - 1);
  } else if (warpgroup == 1) {
    decrease_registers<kScoresRegisters>();
    score_passes(shared, args, schedule);
  } else {
    increase_registers<kGroupRegisters>();
    attend(shared, args, schedule, warpgroup - 2);
  }
  if constexpr (kBlocks > 1) {
    __syncwarp();
    cluster_barrier();  // others may still write into this block's shared memory
  }
}
