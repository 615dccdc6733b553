"""Plans, grid, shared memory and arguments of kernels_cu/forward_sm90.cu and forward_float_sm90.cu."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING

import numpy as np

from . import _compile, _tensor_map
from ._launch import UNIQUE, Arguments, Buffer, Launch, Steps

if TYPE_CHECKING:
    from .forward import Dtype, Problem

_COMPUTE_CAPABILITY = 90
_MAX_SMEM_BYTES = 227 * 1024
_CHUNK = 64  # tokens
_TILE_BYTES = 64 * 64 * 2
_QK_DIMS = (64, 96, 128, 192, 256)
_FLOAT_QK_DIMS = (64, 128, 192, 256)
_MAX_ROWS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class HopperPlan:
    """Tiling of kernels_cu/forward_sm90.cu; `constants` are its ``-D``."""

    dtype: Dtype
    qk_dim: int  # padded
    v_groups: int  # warpgroups of a block that have 64 columns of v each
    cluster: int  # blocks of a head, that share what they load
    split: bool  # whether teams of blocks share a row's sequence
    high: bool  # operands as sums of two numbers
    stages: int  # chunks in shared memory
    output_buffers: int
    smem_bytes: int

    file = "forward_sm90.cu"

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
            ("CLUSTER", self.cluster),
            ("STAGES", self.stages),
            ("OUTPUT_BUFFERS", self.output_buffers),
            ("BFLOAT16", int(self.dtype == "bfloat16")),
            ("SPLIT", int(self.split)),
            ("HIGH", int(self.high)),
            ("SMEM_BYTES", self.smem_bytes),
            ("AMPERE", 1),
        )


def _smem_bytes(qk_dim: int, v_groups: int, high: bool, stages: int, output_buffers: int) -> int:
    """Bytes of `Shared`, in its order, and what aligning it to 1024 bytes may take."""
    tiles = stages * (2 * -(-qk_dim // 64) + v_groups) + v_groups * output_buffers + 2 * (1 + high)
    tables = 2 * 1024 + v_groups * (64 * 4 + 2 * 32 * 8 + 5 * 4)
    barriers = 8 * (3 * stages + 4 + 2 * v_groups * output_buffers)
    shared = -(-(tiles * _TILE_BYTES + tables + barriers) // 1024) * 1024
    return shared + 1024


@functools.lru_cache(maxsize=1024)
def plan_for(
    dtype: Dtype, head_dim: int, v_groups: int, *, cluster: int = 1, split: bool = False, high: bool = False
) -> HopperPlan:
    """Return the tiling for a head_dim of q and k: as many stages as fit, up to six, with two output buffers."""
    qk_dim = next(padded for padded in _QK_DIMS if head_dim <= padded)
    for stages, output_buffers in ((6, 2), (5, 2), (4, 2), (3, 2), (2, 2), (2, 1)):
        smem_bytes = _smem_bytes(qk_dim, v_groups, high, stages, output_buffers)
        if smem_bytes <= _MAX_SMEM_BYTES:
            return HopperPlan(dtype, qk_dim, v_groups, cluster, split, high, stages, output_buffers, smem_bytes)
    raise AssertionError(f"no tiling fits {_MAX_SMEM_BYTES} bytes of shared memory")


@dataclasses.dataclass(frozen=True)
class HopperFloatPlan:
    """Tiling of kernels_cu/forward_float_sm90.cu; `constants` are its ``-D``."""

    qk_dim: int  # padded
    v_groups: int  # warpgroups of a block that have 64 columns of v each
    stages: int  # chunks in shared memory
    p_buffers: int
    smem_bytes: int

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
            ("SMEM_BYTES", self.smem_bytes),
            ("AMPERE", 1),
        )


def _float_smem_bytes(qk_dim: int, v_groups: int, stages: int, p_buffers: int) -> int:
    """Bytes of `Shared`, in its order, and what aligning it to 1024 bytes may take."""
    tiles = stages * (2 * qk_dim // 32 + 2 * v_groups) + 2 * p_buffers
    parked = v_groups * 8 * 128 * 16 if qk_dim > 128 else 16
    tables = 4 * 64 * (4 * stages + p_buffers + 2 + 1 + 2) + 2 * 8
    barriers = 8 * (stages * (5 + v_groups) + 2 * p_buffers)
    shared = -(-(tiles * _TILE_BYTES + parked + tables + barriers) // 1024) * 1024
    return shared + 1024


@functools.lru_cache(maxsize=1024)
def float_plan_for(head_dim: int, v_groups: int) -> HopperFloatPlan:
    """Return the tiling for a head_dim of q and k: as many stages as fit, up to three, then two buffers for scores."""
    qk_dim = next(padded for padded in _FLOAT_QK_DIMS if head_dim <= padded)
    for stages, p_buffers in itertools.product((3, 2, 1), (2, 1)):
        smem_bytes = _float_smem_bytes(qk_dim, v_groups, stages, p_buffers)
        if smem_bytes <= _MAX_SMEM_BYTES:
            return HopperFloatPlan(qk_dim, v_groups, stages, p_buffers, smem_bytes)
    raise AssertionError(f"no tiling fits {_MAX_SMEM_BYTES} bytes of shared memory")


# Microseconds of an H200, fitted to measured calls: only their ratios count.
# What a chunk takes a block that has all of the memory's rate, for its outputs and for its state alone, by qk_dim
# and v_groups; how many bytes come from memory meanwhile; and what a team's meetings take.
_OUTPUTS_US = {(64, 1): 0.75, (64, 2): 1.2, (96, 1): 0.9, (96, 2): 1.55, (128, 1): 1.0, (128, 2): 1.75}
_OUTPUTS_US |= {(192, 1): 1.35, (256, 1): 1.75}
_STATES_US = {(64, 1): 0.5, (64, 2): 0.7, (96, 1): 0.55, (96, 2): 0.85, (128, 1): 0.6, (128, 2): 0.95}
_STATES_US |= {(192, 1): 1.0, (256, 1): 1.3}
_BYTES_A_US = 4.3e6
_MEETINGS_US = 10.5
_SMS_OF_A_GPC = 16  # which a cluster does not leave


@functools.lru_cache(maxsize=1024)
def tiling_for(num_heads: int, seqlen: int, qk_dim: int, v_dim: int, num_sms: int) -> tuple[int, int]:
    """Return over how many blocks to spread the work.

    Parameters
    ----------
    num_heads
        Times batch.
    seqlen, qk_dim, v_dim
        Tokens, and head dims.
    num_sms
        Blocks that the GPU holds at a time.

    Returns
    -------
    v_groups
        A row is 64 times as many columns of v of one head.
    team_size
        Blocks that share the sequence of a row; 1 if it is not cut.

    Notes
    -----
    The least time of a simple model. The rule sees sizes only, so the same call on the same kind of GPU always gives
    the same bits.
    """
    qk_dim = next(padded for padded in _QK_DIMS if qk_dim <= padded)
    num_chunks = -(-seqlen // _CHUNK)
    best, best_us = (1, 1), float("inf")
    for v_groups in (2, 1) if v_dim > 64 and qk_dim <= 128 else (1,):
        num_v_blocks = -(-v_dim // (64 * v_groups))
        num_rows = num_heads * num_v_blocks
        # Blocks of one head read q and k from memory once, and from L2 again.
        key_bytes, value_bytes = _CHUNK * 2 * qk_dim / num_v_blocks, _CHUNK * 2 * 64 * v_groups

        def chunk_us(least: float, num_bytes: float, num_blocks: int) -> float:
            return max(least, num_bytes * num_blocks / _BYTES_A_US)

        waves, rest = divmod(num_rows, num_sms)
        outputs, outputs_bytes = _OUTPUTS_US[qk_dim, v_groups], 2 * (key_bytes + value_bytes)
        us = num_chunks * sum(
            count * chunk_us(outputs, outputs_bytes, blocks)
            for count, blocks in ((waves, num_sms), (int(rest > 0), rest))
        )
        if us < best_us:
            best, best_us = (v_groups, 1), us
        states, states_bytes = _STATES_US[qk_dim, v_groups], key_bytes + value_bytes
        for wanted_size in range(2, min(num_sms, num_chunks) + 1):
            segment = -(-num_chunks // wanted_size)
            team_size = -(-num_chunks // segment)
            num_teams = min(num_sms // wanted_size, num_rows)
            blocks = num_teams * team_size
            a_chunk = chunk_us(outputs, outputs_bytes, blocks) + chunk_us(states, states_bytes, blocks)
            us = -(-num_rows // num_teams) * (segment * a_chunk + _MEETINGS_US)
            if us < best_us:
                best, best_us = (v_groups, team_size), us
    return best


def cluster_for(num_heads: int, num_v_blocks: int, num_sms: int) -> int:
    """Return how many blocks are a cluster: those of a head, where the GPU holds all of them at once, or 1."""
    num_clusters = num_sms // _SMS_OF_A_GPC * (_SMS_OF_A_GPC // num_v_blocks)
    return num_v_blocks if num_heads <= num_clusters else 1


# struct HopperArgs of kernels_cu/forward_sm90.cuh: the same fields in the same order.
_ARGS = np.dtype(
    [
        *((name, f"V{_tensor_map.NUM_BYTES}") for name in ("q", "k", "v", "o")),
        *((name, np.uint64) for name in ("final_state", "initial_state", "workspace", "first_flag", "slopes")),
        ("initial_strides", np.int64, 4),
        ("slopes_stride", np.int64),
        *((name, np.float64) for name in ("scale", "slope")),
        *((name, np.int32) for name in ("num_rows", "seqlen", "segment_length", "team_size")),
        *((name, np.int32) for name in ("num_heads", "qk_dim", "v_dim", "num_v_blocks", "slopes_are_double")),
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


def steps(problem: Problem) -> Steps:
    """Return the one launch of a kernel, and the memory that its blocks meet in."""
    num_heads = problem.batch * problem.num_heads
    if problem.dtype == "float32":
        # Blocks of one group read q and k of a head from L2 again, but there are enough of them for more SMs.
        is_wide = problem.v_dim > 64 and num_heads * -(-problem.v_dim // 64) > problem.num_sms
        v_groups, team_size = 2 if is_wide and problem.qk_dim <= 128 else 1, 1
        plan: HopperPlan | HopperFloatPlan = float_plan_for(problem.qk_dim, v_groups)
    else:
        v_groups, team_size = tiling_for(num_heads, problem.seqlen, problem.qk_dim, problem.v_dim, problem.num_sms)
        cluster = 1
        if v_groups == team_size == 1:
            cluster = cluster_for(num_heads, -(-problem.v_dim // 64), problem.num_sms)
        plan = plan_for(
            problem.dtype, problem.qk_dim, v_groups, cluster=cluster, split=team_size > 1, high=problem.high
        )
    is_split = team_size > 1
    num_v_blocks = -(-problem.v_dim // (64 * v_groups))
    num_rows = num_heads * num_v_blocks
    num_teams = min(problem.num_sms // team_size, num_rows) if is_split else num_rows
    num_chunks = -(-problem.seqlen // _CHUNK)
    segment_length = -(-num_chunks // team_size) * _CHUNK

    pointers: dict[str, str] = {}
    buffers = []
    args = np.zeros(1, _ARGS)
    for name, (shape, strides, _) in _arrays_of(problem).items():
        args[name] = np.void(_tensor_map.encode(problem.dtype, shape, strides))
        pointers[name] = name
    if problem.return_state:
        pointers["final_state"] = "final_state"
    if problem.initial_strides is not None:
        pointers["initial_state"], args["initial_strides"] = "initial_state", problem.initial_strides
    if is_split:
        # Two of each state, which rows of a team take in turn, and two flags for each group, of 8 bytes.
        num_floats = num_teams * 2 * ((team_size - 1) * plan.qk_dim * 64 * v_groups + team_size * v_groups * 2)
        buffers.append(Buffer("workspace", (num_floats,), "float32"))
        pointers |= {"workspace": "workspace", "first_flag": UNIQUE}
    if problem.slopes is not None:
        slopes_dtype, args["slopes_stride"] = problem.slopes
        pointers["slopes"], args["slopes_are_double"] = "slopes", slopes_dtype == "float64"
    else:
        args["slope"] = problem.slope
    args["scale"], args["num_rows"], args["seqlen"] = problem.scale, num_rows, problem.seqlen
    args["segment_length"], args["team_size"] = segment_length, team_size
    args["num_heads"], args["qk_dim"], args["v_dim"] = problem.num_heads, problem.qk_dim, problem.v_dim
    args["num_v_blocks"] = num_v_blocks
    assert _ARGS.fields is not None
    slots = tuple(
        (_ARGS.fields[field][1] + (_tensor_map.address_offset() if field in "qkvo" else 0), array)
        for field, array in pointers.items()
    )
    launch = Launch(
        plan.file,
        "forward",
        plan.constants,
        grid=(num_teams * team_size, 1, 1),
        block=(plan.num_threads, 1, 1),
        smem_bytes=plan.smem_bytes,
        arguments=Arguments(args.tobytes().ljust(_ARGS_BYTES, b"\0"), slots),
        cooperative=is_split,
    )
    return Steps((launch,), tuple(buffers))
