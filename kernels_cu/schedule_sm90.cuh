// Who does what in forward_sm90.cu: its sizes, what its warpgroups hand on to each other, teams, and passes.
#pragma once
#include "state_sm90.cuh"

constexpr int kAttentions = ATTENTIONS, kGroups = V_GROUPS;
constexpr int kCluster = CLUSTER, kNeighbours = NEIGHBOURS, kBlocks = kCluster * kNeighbours;
constexpr bool kSplit = SPLIT, kHigh = HIGH;
constexpr bool kSlopes = SLOPES;
constexpr int kPCluster = kSlopes ? 1 : kCluster;  // blocks that make P for each other
constexpr int kThreads = 128 * (2 + kGroups + kSlopes), kPBuffers = 2;
// Of a thread of each warpgroup, tried out: so that hardly any spills.
struct Registers {
  int producer, scores, group, slopes;
};
constexpr Registers kOfOnePart = kSplit ? Registers{32, 112, 208, 160} : Registers{40, 112, 200, 160};
constexpr Registers kOfTwoParts = kSplit ? Registers{24, 96, 208, 184}
                                  : kBfloat16 ? Registers{32, 96, 200, 184} : Registers{24, 96, 200, 192};
constexpr Registers kWithSlopes = kTwoParts ? kOfTwoParts : kOfOnePart;
constexpr Registers kRegisters = kSlopes ? kWithSlopes
                                 : kGroups == 2 ? Registers{40, 72, 200, 0} : Registers{72, 128, 256, 0};
static_assert(128 * (kRegisters.producer + kRegisters.scores + kGroups * kRegisters.group + kRegisters.slopes) <= 65536,
              "an SM has 65536 registers");
static_assert(!kSlopes || (kGroups == 1 && kQkDim <= 128), "so many registers do not fit");
static_assert(!kSlopes || (!kHigh && !kReversed && kAttentions == 1), "slopes_sm90.cuh is for the pass that makes dq");
static_assert(kCluster == 1 || (!kSplit && kGroups == 1), "a cluster is the blocks of a head, of one group each");
static_assert(kNeighbours == 1 || (!kSplit && kCluster == 1), "a cluster of neighbours is one block of each row");

// Numbers of barriers; groups have kGroupBarrier and the next.
constexpr int kGroupBarrier = 1, kScoresBarrier = 3, kSlopesBarrier = 4;
constexpr int kPTiles = kHigh ? 2 : 1, kHandedOver = kTwoParts ? 3 : 2;
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

// SLOPES: parts of states in front of chunks, from the group to the slopes warpgroup, each thread's to that with the
// same number; and decays.
struct ForSlopes {
  float4 states[kHandedOver][8][128];
  RowUnits units[kHandedOver][128];
  Decay decay_of_q, decay_of_v;
  float decay_of_p[2 * kChunk];  // scale decay^(i-j), 0 above the diagonal, at j - i + kChunk - 1
  uint64_t full[kHandedOver], empty[kHandedOver];
  uint64_t stored, scanned;  // SPLIT: what a row's segment adds to aged states; all of its states are there
};
template <bool kExists>
struct InFront : ForSlopes {};
template <>
struct InFront<false> {};

struct Shared : InFront<kSlopes> {
  // Behind v, with kSlopes, the same columns of the array that o is the gradient of.
  alignas(1024) Tile q[kQStages][kQkBlocks], k[kStages][kQkBlocks], v[kStages][kGroups * (1 + kSlopes)];
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
__device__ __forceinline__ ForSlopes& for_slopes(Shared& shared) { return reinterpret_cast<ForSlopes&>(shared); }

// To ask for threadIdx takes as long as a product or two, and ptxas does so again wherever it is used, to save a
// register. So one lane is elected, and a thread's number is kept; but not where that would make ptxas spill.
constexpr bool kElects = kSlopes || (!kSplit && kQkDim < 256);
constexpr bool kKeepsThread = kElects && !(kSlopes && kTwoParts && !kBfloat16);

// One lane of a warp, by all of it.
__device__ __forceinline__ bool is_first() {
  if constexpr (kElects) return elect_lane();
  return threadIdx.x % 32 == 0;
}

// The number of this thread in its warpgroup, by all of a warp: as from another lane, so that ptxas does not know it.
__device__ __forceinline__ uint32_t kept_thread() {
  return __shfl_sync(0xffffffffu, threadIdx.x % 128, threadIdx.x % 32);
}

// All lanes of a warp have done what others wait for.
__device__ __forceinline__ void arrive(uint64_t& barrier) {
  __syncwarp();
  if (is_first()) mbarrier_arrive(barrier);
}

// One warp has used a stage: it tells the blocks of the cluster.
__device__ __forceinline__ void release(uint64_t& empty) {
  if constexpr (kCluster == 1) {
    if (is_first()) mbarrier_arrive(empty);
  } else {
    __syncwarp();
    if (!is_first()) return;
    for (int rank = 0; rank < kCluster; rank++) mbarrier_arrive_at(rank, empty);
  }
}

// How many tokens the row of an element of an accumulator of 64 columns is behind its column.
__device__ __forceinline__ int distance_of(int i) {
  int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  return warp * 16 + lane / 4 - lane % 4 * 2 + (i / 2 % 2 * 8 - i / 4 * 8 - i % 2);
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

  // Whether a pass starts from the initial state, of those that take no state over.
  __device__ __forceinline__ bool begins_sequence(const Pass& pass) const {
    return !kSplit || (team.member == (is_pair() && !pass.outputs ? 1 : 0) && pass.first_token == 0);
  }

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

constexpr int kStateSize = kGroups * kQkDim * 64;  // of a row, padded
constexpr int kNumKinds = kSlopes ? 2 : 1;           // of states: aged ones too
// States behind the team's segments but the last, [kNumKinds, size - 1, kStateSize]: first what each segment adds, then
// what there is. Rows take turns between two, since a block may be at the next row while another still reads.
__device__ __forceinline__ float* states_of(const Schedule& schedule, int row_idx) {
  const Team& team = schedule.team;
  int64_t first_state = (team.first_member - team.idx) * 2 + row_idx % 2 * (team.size - 1);
  return schedule.args.workspace + first_state * (kNumKinds * kStateSize);
}

// A group's flag at one of the two meetings of its team, or another's.
enum Meeting { kAdded, kScanned };
__device__ __forceinline__ uint64_t* flag(const Schedule& schedule, Meeting meeting, int idx) {
  const Team& team = schedule.team;
  const int num_members = gridDim.x * gridDim.y;
  int64_t num_states = 2 * kNumKinds * (num_members - team.num_teams);
  uint64_t* flags = reinterpret_cast<uint64_t*>(schedule.args.workspace + num_states * kStateSize);
  return flags + (meeting * num_members + team.first_member) * kGroups + idx;
}

// A group's part of such a state, to its registers and from there.
__device__ __forceinline__ void load_segment(State& state, RowUnits& units, const float* from) {
#pragma unroll
  for (int quad = 0; quad < kQkDim / 8; quad++) {
    float x[4];
    load_l2(x, from + (quad * 128 + threadIdx.x % 128) * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) state[quad * 4 + i] = x[i];
  }
  units = {};
}

__device__ __forceinline__ void store_segment(const State& state, const RowUnits& units, float* to) {
#pragma unroll
  for (int quad = 0; quad < kQkDim / 8; quad++) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = state[quad * 4 + i] * units.unit[i / 2];
    store_l2(to + (quad * 128 + threadIdx.x % 128) * 4, x);
  }
}
