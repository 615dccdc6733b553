"""Plans, grid, shared memory and arguments of kernels_cu/forward_sm90.cu and forward_float_sm90.cu.

More than 500 lines, as a launch is decided in one place: which kernel, over how many blocks, and what they are handed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import _compile, _tensor_map
from ._launch import UNIQUE, Arguments, Buffer, Launch, Steps

if TYPE_CHECKING:
    from .forward import Dtype, Layout, Problem

_COMPUTE_CAPABILITY = 90
_MAX_SMEM_BYTES = 227 * 1024
_CHUNK = 64  # tokens
_TILE_BYTES = 64 * 64 * 2
_QK_DIMS = (64, 96, 128, 192, 256)
_FLOAT_QK_DIMS = (64, 128, 192, 256)
_MAX_ROWS = 2**31 - 1
_SLOPES_QK_DIMS = (64, 128)  # two states of more do not fit registers
MAX_SLOPES_QK_DIM = _SLOPES_QK_DIMS[-1]
_SUMMING_WARPS = 12  # of a block, for the gradient of the slopes


@dataclasses.dataclass(frozen=True)
class HopperPlan:
    """Tiling of kernels_cu/forward_sm90.cu; `constants` are its ``-D``."""

    dtype: Dtype
    qk_dim: int  # padded
    v_groups: int  # warpgroups of a block that have 64 columns of v each
    cluster: int  # blocks of a head, that share what they load
    neighbours: int  # rows whose blocks are a cluster, only to load in step
    split: bool  # whether teams of blocks share a row's sequence
    high: bool  # operands as sums of two numbers
    in_reverse: bool  # from the last token to the first
    attentions: int  # how many a launch has, of the same sizes
    slopes: bool  # whether it sums its part of the gradient of the slopes
    q_stages: int  # chunks of q in shared memory
    stages: int  # chunks of k and v
    output_buffers: int
    smem_bytes: int

    file = "forward_sm90.cu"

    @property
    def num_threads(self) -> int:
        """A producer warpgroup, one for scores, those of v, and one for slopes."""
        return 128 * (2 + self.v_groups + self.slopes)

    @property
    def constants(self) -> _compile.Constants:
        """Compile-time constants."""
        return (
            ("QK_DIM", self.qk_dim),
            ("V_GROUPS", self.v_groups),
            ("CLUSTER", self.cluster),
            ("NEIGHBOURS", self.neighbours),
            ("Q_STAGES", self.q_stages),
            ("STAGES", self.stages),
            ("OUTPUT_BUFFERS", self.output_buffers),
            ("BFLOAT16", int(self.dtype == "bfloat16")),
            ("SPLIT", int(self.split)),
            ("HIGH", int(self.high)),
            ("REVERSED", int(self.in_reverse)),
            ("ATTENTIONS", self.attentions),
            ("SLOPES", int(self.slopes)),
            ("SMEM_BYTES", self.smem_bytes),
            ("AMPERE", 1),
        )


def _smem_bytes(
    qk_dim: int,
    v_groups: int,
    high: bool,
    in_reverse: bool,
    slopes: bool,
    q_stages: int,
    stages: int,
    output_buffers: int,
) -> int:
    """Bytes of `Shared`, in its order."""
    decay = 2 * 32 * 8 + 4 * 4
    buffers = 3 if qk_dim > 64 else 2
    for_slopes = slopes * (buffers * (64 * 64 * 4 + 128 * 8 + 2 * 8) + 2 * decay + 2 * 64 * 4 + 2 * 8)
    for_slopes = -(-for_slopes // 1024) * 1024
    blocks = -(-qk_dim // 64)
    tiles = q_stages * blocks + stages * (blocks + v_groups * (1 + slopes))
    tiles += v_groups * output_buffers + 2 * (1 + high)
    tables = 2 * 1024 + v_groups * ((1 + in_reverse) * 64 * 4 + decay + 4) + 8 * 4
    barriers = 8 * (2 * q_stages + 3 * stages + 4 + 2 * v_groups * output_buffers + 1)
    return for_slopes + -(-(tiles * _TILE_BYTES + tables + barriers) // 1024) * 1024


def padded_qk_dim(head_dim: int, *, slopes: bool = False) -> int:
    """Return the next larger head_dim of q and k that there are kernels for, of 16 bits."""
    return next(padded for padded in (_SLOPES_QK_DIMS if slopes else _QK_DIMS) if head_dim <= padded)


@functools.lru_cache(maxsize=1024)
def plan_for(
    dtype: Dtype,
    head_dim: int,
    v_groups: int,
    *,
    cluster: int = 1,
    neighbours: int = 1,
    split: bool = False,
    high: bool = False,
    in_reverse: bool = False,
    attentions: int = 1,
    slopes: bool = False,
) -> HopperPlan:
    """Return the tiling for a head_dim of q and k: as many stages as fit, up to six of q, with two output buffers.

    k and v, of which there are three at least, may have one more: q is done with first.
    """
    qk_dim = padded_qk_dim(head_dim, slopes=slopes)
    least_q_stages = 3 if slopes and not split else 2
    for output_buffers, q_stages, more in itertools.product((2, 1), (6, 5, 4, 3, 2), (1, 0)):
        stages = q_stages + more
        if q_stages < least_q_stages:
            continue
        smem_bytes = _smem_bytes(qk_dim, v_groups, high, in_reverse, slopes, q_stages, stages, output_buffers)
        if stages >= 3 and smem_bytes <= _MAX_SMEM_BYTES:
            tiling = (q_stages, stages, output_buffers, smem_bytes)
            return HopperPlan(
                dtype, qk_dim, v_groups, cluster, neighbours, split, high, in_reverse, attentions, slopes, *tiling
            )
    raise AssertionError(f"no tiling fits {_MAX_SMEM_BYTES} bytes of shared memory")


@dataclasses.dataclass(frozen=True)
class HopperFloatPlan:
    """Tiling of kernels_cu/forward_float_sm90.cu; `constants` are its ``-D``."""

    qk_dim: int  # padded
    v_groups: int  # warpgroups of a block that have 64 columns of v each
    stages: int  # chunks in shared memory
    p_buffers: int
    smem_bytes: int
    in_reverse: bool = False  # from the last token to the first

    dtype = "float32"
    file = "forward_float_sm90.cu"

    @property
    def num_threads(self) -> int:
        """A producer warpgroup, one for scores, and those of v."""
        return 128 * (2 + self.v_groups)

    @property
    def constants(self) -> _compile.Constants:
        """Compile-time constants."""
        return (
            ("QK_DIM", self.qk_dim),
            ("V_GROUPS", self.v_groups),
            ("STAGES", self.stages),
            ("P_BUFFERS", self.p_buffers),
            ("REVERSED", int(self.in_reverse)),
            ("SMEM_BYTES", self.smem_bytes),
            ("AMPERE", 1),
        )


def _float_smem_bytes(qk_dim: int, v_groups: int, stages: int, p_buffers: int) -> int:
    """Bytes of `Shared`, in its order, and what aligning it to 1024 bytes may take."""
    tiles = stages * (2 * qk_dim // 32 + 2 * v_groups) + 2 * p_buffers
    parked = v_groups * 8 * 128 * 16 if qk_dim > 128 else 16
    tables = 4 * 64 * (4 * stages + p_buffers + 2 + 2 + 2) + 2 * 8
    barriers = 8 * (stages * (5 + v_groups) + 2 * p_buffers)
    shared = -(-(tiles * _TILE_BYTES + parked + tables + barriers) // 1024) * 1024
    return shared + 1024


@functools.lru_cache(maxsize=1024)
def float_plan_for(head_dim: int, v_groups: int, *, in_reverse: bool = False) -> HopperFloatPlan:
    """Return the tiling for a head_dim of q and k: as many stages as fit, up to three, then two buffers for scores."""
    qk_dim = next(padded for padded in _FLOAT_QK_DIMS if head_dim <= padded)
    for stages, p_buffers in itertools.product((3, 2, 1), (2, 1)):
        smem_bytes = _float_smem_bytes(qk_dim, v_groups, stages, p_buffers)
        if smem_bytes <= _MAX_SMEM_BYTES:
            return HopperFloatPlan(qk_dim, v_groups, stages, p_buffers, smem_bytes, in_reverse)
    raise AssertionError(f"no tiling fits {_MAX_SMEM_BYTES} bytes of shared memory")


class Tiling(NamedTuple):
    """Over how many blocks the work of a call is spread."""

    v_groups: int  # a row is 64 times as many columns of v of one head
    cluster: int = 1  # blocks of a head, or of a segment of one, that share what they load
    team_size: int = 1  # blocks that share the sequence of a row; 1 if it is not cut
    first_chunks: int = 0  # in the segment of the first of them, which makes no state
    chunks: int = 0  # in those of the others; the last may have fewer


# Microseconds of an H200, fitted to measured calls: only their ratios count.
# What a chunk takes a block that has all of the memory's rate, for its outputs and for its state alone, by qk_dim
# and v_groups; and how many bytes come from memory meanwhile.
_OUTPUTS_US = {(64, 1): 0.74, (64, 2): 1.2, (96, 1): 0.87, (96, 2): 1.55, (128, 1): 0.95, (128, 2): 1.75}
_OUTPUTS_US |= {(192, 1): 1.2, (256, 1): 1.48}
_STATES_US = {(64, 1): 0.42, (64, 2): 0.7, (96, 1): 0.52, (96, 2): 0.85, (128, 1): 0.57, (128, 2): 0.95}
_STATES_US |= {(192, 1): 0.72, (256, 1): 0.9}
_BYTES_A_US = 4.3e6
# Beside its chunks: what clusters take; a team of two, of which the second, once it comes to its outputs, saves some,
# since others have had the same instructions before; a larger team, for each of it, and each KiB of a block's state.
_CLUSTER_US, _PAIR_US, _SECOND_US = 1.0, 3.0, -2.0
_MEETINGS_US, _MEMBER_US, _STATE_US = 5.0, 0.06, 0.07
_ALONE = 1.05  # as many times as long for a block that makes scores which three or four might share
# A cluster does not leave its GPC, of which there are as many as that, of 16 SMs or, some of them, fewer.
_SMS_OF_A_GPC, _LEAST_SMS_OF_A_GPC = 16, 14
_MIN_CHUNKS_IN_STEP = 16
# What outputs of a segment take at least, to be worth the microseconds in which the kernel makes teams of different
# sizes; and what a chunk of states takes, of outputs, where all blocks are busy, by v_groups.
_MIN_US_TO_BALANCE = 50
_STATES_TIME = {1: 0.4, 2: 0.55}


def cut(num_chunks: int, wanted_size: int, chunks: int) -> tuple[int, int, int]:
    """Cut a sequence for a team of the wanted size, or a smaller one: its size, first_chunks, and chunks."""
    team_size = min(wanted_size, 1 + (num_chunks - 1) // chunks)
    return team_size, num_chunks - (team_size - 1) * chunks, chunks


def num_clusters(cluster: int, num_sms: int) -> int:
    """Return how many clusters of so many blocks the GPU holds at a time, at least."""
    if cluster <= 2:  # SMs come in pairs
        return num_sms // cluster
    return num_sms // _SMS_OF_A_GPC * (_LEAST_SMS_OF_A_GPC // cluster)


@functools.lru_cache(maxsize=1024)
def tiling_for(num_heads: int, seqlen: int, qk_dim: int, v_dim: int, num_sms: int, with_slopes: bool = False) -> Tiling:
    """Return over how many blocks to spread the work.

    Parameters
    ----------
    num_heads
        Times batch.
    seqlen, qk_dim, v_dim
        Tokens, and head dims.
    num_sms
        Blocks that the GPU holds at a time.
    with_slopes
        Whether blocks sum the slopes' gradient too, and so have no registers for two groups.

    Notes
    -----
    The least time of a simple model. The rule sees sizes only, so the same call on the same kind of GPU always gives
    the same bits.
    """
    qk_dim = padded_qk_dim(qk_dim, slopes=with_slopes)
    num_chunks = max(1, -(-seqlen // _CHUNK))
    widths = (2, 1) if v_dim > 64 and qk_dim <= 128 and not with_slopes else (1,)
    times = (_times(num_heads, num_chunks, qk_dim, v_dim, v_groups, num_sms, with_slopes) for v_groups in widths)
    return min(itertools.chain(*times), key=operator.itemgetter(0))[1]


def _times(
    num_heads: int, num_chunks: int, qk_dim: int, v_dim: int, v_groups: int, num_sms: int, in_waves: bool
) -> Iterator[tuple[float, Tiling]]:
    """Estimate the microseconds that each tiling takes; `qk_dim` is padded. Clusters may come `in_waves`."""
    num_v_blocks = -(-v_dim // (64 * v_groups))

    def chunk_us(least: float, num_bytes: float, num_blocks: int) -> float:
        return max(least, num_bytes * num_blocks / _BYTES_A_US)

    outputs, states = _OUTPUTS_US[qk_dim, v_groups], _STATES_US[qk_dim, v_groups]
    # k and v of a block's chunk, as many as q and o. Blocks of one head read q and k from memory once if they are a
    # cluster; else, as they drift apart, more often.
    at_a_time = num_clusters(num_v_blocks, num_sms) if v_groups == 1 < num_v_blocks else 0
    if at_a_time > 0 and (in_waves or num_heads <= at_a_time):
        num_bytes = _CHUNK * 2 * (qk_dim / num_v_blocks + 64)
        num_waves = max(1, -(-num_heads // at_a_time))
        us = num_chunks * num_waves * chunk_us(outputs, 2 * num_bytes, min(num_heads, at_a_time) * num_v_blocks)
        yield us + _CLUSTER_US, Tiling(v_groups, num_v_blocks)
    num_bytes = _CHUNK * 2 * (qk_dim * (1 + 1 / num_v_blocks) / 2 + 64 * v_groups)
    if num_v_blocks > 2:
        outputs *= _ALONE
    waves, rest = divmod(num_heads * num_v_blocks, num_sms)
    us = waves * chunk_us(outputs, 2 * num_bytes, num_sms) + (rest and chunk_us(outputs, 2 * num_bytes, rest))
    yield num_chunks * us, Tiling(v_groups)

    num_slots = num_sms // num_v_blocks
    for wanted_size in range(2, min(num_slots, num_chunks) + 1):
        num_teams = min(num_slots // wanted_size, num_heads)
        num_blocks = num_teams * wanted_size * num_v_blocks
        outputs_us = chunk_us(outputs, 2 * num_bytes, num_blocks)
        states_us = chunk_us(states, num_bytes, num_blocks)
        chunks = -(-num_chunks // wanted_size)
        if wanted_size == 2:
            # Both are to end at the same time.
            first_chunks = round((num_chunks + _SECOND_US / outputs_us) / (2 - states_us / outputs_us))
            chunks = num_chunks - max(1, min(first_chunks, num_chunks - 1))
        team_size, first_chunks, chunks = cut(num_chunks, wanted_size, chunks)
        if team_size == 2:
            second_us = _SECOND_US + first_chunks * states_us + chunks * outputs_us
            us = _PAIR_US + max(first_chunks * outputs_us, second_us)
        else:
            us = _MEETINGS_US + _MEMBER_US * team_size + _STATE_US * v_groups * qk_dim / 4
            us += chunks * (outputs_us + states_us)
        yield -(-num_heads // num_teams) * us, Tiling(v_groups, 1, team_size, first_chunks, chunks)


def is_balanced(tiling: Tiling, num_rows: int, qk_dim: int, num_sms: int) -> bool:
    """Whether each row gets a team of its own size; `qk_dim` is padded.

    The states of heads that forget fast take less time, so such a row needs fewer blocks. Slopes are known on the GPU
    alone: the kernel shares its blocks out, by a warp that has a lane for each row.
    """
    if not (1 < num_rows <= 32 and 2 < tiling.team_size <= num_sms // num_rows and tiling.chunks < 2**12):
        return False
    return tiling.chunks * _OUTPUTS_US[qk_dim, tiling.v_groups] >= _MIN_US_TO_BALANCE


# struct HopperArgs of kernels_cu/forward_sm90.cuh: the same fields in the same order.
_ARGS = np.dtype(
    [
        *((name, f"V{_tensor_map.NUM_BYTES}") for name in ("q", "k", "v", "o", "primal")),
        *((name, np.uint64) for name in ("final_state", "initial_state", "workspace", "first_flag", "slopes")),
        *((name, np.uint64) for name in ("partials", "dstate")),
        *((f"{name}_strides", np.int64, 4) for name in ("initial", "dstate")),
        ("slopes_stride", np.int64),
        *((name, np.float64) for name in ("scale", "slope")),
        *((name, np.int32) for name in ("num_rows", "seqlen", "first_length", "segment_length", "team_size")),
        *((name, np.int32) for name in ("num_heads", "qk_dim", "v_dim", "num_v_blocks", "slopes_are_double")),
        ("max_members", np.int32),
        ("states_time", np.float32),
    ]
)
_ARGS_BYTES = -(-_ARGS.itemsize // 64) * 64  # tensor maps are aligned to 64 bytes


def _arrays_of(problem: Problem) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]]:
    """Shape, strides in elements, and whether the pointer is aligned, of q, k, v and o."""
    sizes = (problem.batch, problem.seqlen, problem.num_heads)
    widths = {"q": problem.qk_dim, "k": problem.qk_dim, "v": problem.v_dim, "o": problem.v_dim}
    return {name: ((*sizes, width), *getattr(problem, name)) for name, width in widths.items()}


def fits(problem: Problem) -> bool:
    """Whether the kernels take a call: causal, on Hopper, and arrays that TMA can describe.

    float32 is for many heads: its kernel does not cut the sequence, and for few heads leaves most of the GPU idle.
    """
    num_heads = problem.batch * problem.num_heads
    num_rows = num_heads * -(-problem.v_dim // 64)
    # By measured rates of both on an H200, 132 SMs, forward_float.cu is as fast at 17 to 32 such rows.
    is_wide = num_rows >= problem.num_sms // 5
    return (
        problem.compute_capability == _COMPUTE_CAPABILITY
        and (problem.dtype in ("float16", "bfloat16") or (problem.dtype == "float32" and is_wide))
        and problem.causal
        and 0 < problem.seqlen <= _tensor_map.MAX_SIZE - _CHUNK
        and num_rows <= _MAX_ROWS
        and all(
            aligned and _tensor_map.can_describe(problem.dtype, shape, strides)
            for shape, strides, aligned in _arrays_of(problem).values()
        )
    )


def neighbours_for(tiling: Tiling, num_rows: int, num_chunks: int, qk_dim: int) -> int:
    """Return how many neighbouring rows have blocks that load in step, as a cluster.

    A token of a small head is a piece of less than 256 bytes of memory, beside that of the next head. On an H200 memory
    is read 13 % faster where both are asked for at about the same time. A cluster costs about a microsecond.
    """
    is_worth_it = qk_dim <= 96 and num_chunks >= _MIN_CHUNKS_IN_STEP
    return 2 if is_worth_it and tiling.cluster == tiling.team_size == 1 and num_rows % 2 == 0 else 1


def is_pair(first: Problem, second: Problem) -> bool:
    """Whether one launch can do two attentions, over the same arrays in different roles."""

    def sizes(problem: Problem) -> tuple[int, int]:
        return padded_qk_dim(problem.qk_dim), -(-problem.v_dim // 64)

    return fits(first) and fits(second) and first.dtype != "float32" and sizes(first) == sizes(second)


class SlopesGradient(NamedTuple):
    """What a launch needs beside its arrays to sum the gradient of the slopes, where `o` is that of q."""

    q: Layout
    dstate_strides: tuple[int, ...] | None  # of the gradient of the final state, as the problem's initial_strides


class _Spread(NamedTuple):
    """How a launch is spread over blocks."""

    tiling: Tiling
    num_rows: int
    num_v_blocks: int
    is_unequal: bool  # each row has a team of its own size
    grid: tuple[int, int, int]

    @property
    def num_teams(self) -> int:
        return self.num_rows if self.is_unequal else self.grid[0]

    @property
    def max_members(self) -> int:
        """Of one team."""
        return self.grid[0] - self.num_rows + 1 if self.is_unequal else self.tiling.team_size


def _spread(problem: Problem, num_attentions: int, with_slopes: bool) -> _Spread:
    num_heads = problem.batch * problem.num_heads * num_attentions
    if problem.dtype == "float32":
        # Blocks of one group read q and k of a head from L2 again, but there are enough of them for more SMs.
        is_wide = problem.v_dim > 64 and num_heads * -(-problem.v_dim // 64) > problem.num_sms
        tiling = Tiling(2 if is_wide and problem.qk_dim <= 128 else 1)
    else:
        sizes = (num_heads, problem.seqlen, problem.qk_dim, problem.v_dim, problem.num_sms)
        tiling = tiling_for(*sizes, with_slopes)
    num_v_blocks = -(-problem.v_dim // (64 * tiling.v_groups))
    num_rows = num_heads * num_v_blocks
    num_teams = min(problem.num_sms // tiling.team_size, num_rows) if tiling.team_size > 1 else num_rows
    grid = (num_teams, tiling.team_size, 1)
    qk_dim = padded_qk_dim(problem.qk_dim, slopes=with_slopes)
    is_unequal = problem.slopes is not None and is_balanced(tiling, num_rows, qk_dim, problem.num_sms)
    return _Spread(tiling, num_rows, num_v_blocks, is_unequal, (problem.num_sms, 1, 1) if is_unequal else grid)


def num_partials(problem: Problem) -> int:
    """Return how many numbers a launch leaves for each head, whose sum is the gradient of its slope."""
    spread = _spread(problem, 1, with_slopes=True)
    return spread.num_v_blocks * spread.max_members * _SUMMING_WARPS


def steps(problem: Problem, second: Problem | None = None, slopes: SlopesGradient | None = None) -> Steps:
    """Return the one launch of a kernel, and the memory that its blocks meet in.

    The arrays of a second problem, such that `is_pair`, have names with "second_" in front. For the gradient of the
    slopes, if the head_dim of q and k is at most `MAX_SLOPES_QK_DIM`, there are arrays "primal", which is q, "dstate",
    and "partials", float64.
    """
    problems = (problem,) if second is None else (problem, second)
    spread = _spread(problem, len(problems), with_slopes=slopes is not None)
    tiling, grid = spread.tiling, spread.grid
    v_groups, team_size = tiling.v_groups, tiling.team_size
    num_chunks, qk_dim = -(-problem.seqlen // _CHUNK), padded_qk_dim(problem.qk_dim, slopes=slopes is not None)
    if problem.dtype == "float32":
        plan: HopperPlan | HopperFloatPlan = float_plan_for(problem.qk_dim, v_groups, in_reverse=problem.in_reverse)
    else:
        plan = plan_for(
            problem.dtype,
            problem.qk_dim,
            v_groups,
            cluster=tiling.cluster,
            neighbours=neighbours_for(tiling, spread.num_rows, num_chunks, qk_dim),
            split=team_size > 1,
            high=problem.high,
            in_reverse=problem.in_reverse,
            attentions=len(problems),
            slopes=slopes is not None,
        )
    buffers: list[Buffer] = []
    if team_size > 2:
        # Two of each state, which rows of a team take in turn, and two flags for each group, of 8 bytes.
        num_members = grid[0] * grid[1]
        num_states = (num_members - spread.num_teams) * (2 if slopes is not None else 1)
        num_floats = 2 * (num_states * plan.qk_dim * 64 * v_groups + num_members * v_groups * 2)
        buffers.append(Buffer("workspace", (num_floats,), "float32"))

    template, slots = b"", []
    for each, prefix in zip(problems, ("", "second_"), strict=False):
        args = np.zeros(1, _ARGS)
        pointers: dict[str, str] = {}
        arrays = {name: (prefix + name, *array) for name, array in _arrays_of(each).items()}
        if slopes is not None:
            _, like_q, *_ = arrays["o"]
            arrays["primal"] = ("primal", like_q, *slopes.q)
            pointers["partials"], args["max_members"] = "partials", spread.max_members
            if slopes.dstate_strides is not None:
                pointers["dstate"], args["dstate_strides"] = "dstate", slopes.dstate_strides
        for field, (name, shape, strides, _) in arrays.items():
            args[field] = np.void(_tensor_map.encode(each.dtype, shape, strides))
            pointers[field] = name
        if each.return_state:
            pointers["final_state"] = f"{prefix}final_state"
        if each.initial_strides is not None:
            pointers["initial_state"], args["initial_strides"] = f"{prefix}initial_state", each.initial_strides
        if team_size > 2:
            pointers |= {"workspace": "workspace", "first_flag": UNIQUE}
        if each.slopes is not None:
            slopes_dtype, args["slopes_stride"] = each.slopes
            pointers["slopes"], args["slopes_are_double"] = "slopes", slopes_dtype == "float64"
        else:
            args["slope"] = each.slope
        args["scale"], args["num_rows"], args["seqlen"] = each.scale, spread.num_rows, each.seqlen
        args["first_length"], args["segment_length"] = tiling.first_chunks * _CHUNK, tiling.chunks * _CHUNK
        args["team_size"], args["states_time"] = team_size, _STATES_TIME[v_groups] if spread.is_unequal else 0
        args["num_heads"], args["qk_dim"], args["v_dim"] = each.num_heads, each.qk_dim, each.v_dim
        args["num_v_blocks"] = spread.num_v_blocks
        assert _ARGS.fields is not None
        for field, array in pointers.items():
            offset = _ARGS.fields[field][1] + (_tensor_map.address_offset() if field in arrays else 0)
            slots.append((len(template) + offset, array))
        template += args.tobytes().ljust(_ARGS_BYTES, b"\0")
    launch = Launch(
        plan.file,
        "forward",
        plan.constants,
        grid=grid,
        block=(plan.num_threads, 1, 1),
        smem_bytes=plan.smem_bytes,
        arguments=Arguments(template, tuple(slots)),
        cooperative=team_size > 2,
    )
    return Steps((launch,), tuple(buffers))
