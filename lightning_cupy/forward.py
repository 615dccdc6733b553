"""Grid, shared memory and arguments of kernels_cu/forward*.cu and scan.cu."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from . import _arrays, _compile, forward_sm90
from ._arrays import View
from ._environment import MIN_COMPUTE_CAPABILITY
from ._launch import Arguments, Buffer, Program, Steps, launch

_KIB = 1024
# Shared memory, in KiB, that a block may have and that an SM has, by compute capability (CUDA C++ Programming
# Guide, table of technical specifications). One that is not listed is treated as the consumer chips are.
_SMEM_KIB = {
    75: (64, 64),
    80: (163, 164),
    87: (163, 164),
    90: (227, 228),
    100: (227, 228),
    103: (227, 228),
    110: (227, 228),
}
_SMEM_KIB_ELSE = (99, 100)

Dtype = Literal["float16", "bfloat16", "float32", "float64"]

_QK_DIMS = (32, 64, 96, 128, 192, 256)


@dataclasses.dataclass(frozen=True)
class ForwardPlan:
    """Tiling of kernels_cu/forward.cu and forward_float.cu; `constants` are their ``-D``."""

    dtype: Dtype
    compute_capability: int
    outputs: bool  # False leaves only the state of each segment
    causal: bool
    qk_dim: int  # padded
    v_block: int  # columns of v a block
    chunk: int  # tokens
    stages: int  # chunks in shared memory: one in use, the rest under way
    num_threads: int
    smem_bytes: int
    min_blocks: int = 1  # blocks an SM should hold: bounds the registers
    in_reverse: bool = False  # from the last token to the first

    @property
    def file(self) -> str:
        """Name in kernels_cu."""
        return "forward.cu" if self.dtype in ("float16", "bfloat16") else "forward_float.cu"

    @property
    def accum(self) -> Literal["float", "double"]:
        """CUDA's name of the type of sums and states."""
        return "double" if self.dtype == "float64" else "float"

    @property
    def constants(self) -> _compile.Constants:
        """Compile-time constants."""
        constants: dict[str, str | int] = {
            "OUTPUTS": int(self.outputs),
            "CAUSAL": int(self.causal),
            "REVERSED": int(self.in_reverse),
            "QK_DIM": self.qk_dim,
            "V_BLOCK": self.v_block,
            "CHUNK": self.chunk,
            "NUM_THREADS": self.num_threads,
            "SMEM_BYTES": self.smem_bytes,
            "AMPERE": int(self.compute_capability >= 80),
            "MIN_BLOCKS": self.min_blocks,
        }
        if self.file == "forward.cu":
            constants |= {"STAGES": self.stages, "BFLOAT16": int(self.dtype == "bfloat16")}
        else:
            constants |= {"ACCUM": self.accum}
        return tuple(constants.items())


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """Of kernels_cu/scan.cu."""

    accum: Literal["float", "double"]
    compute_capability: int
    in_reverse: bool = False
    num_threads: int = 256
    smem_bytes: int = 0
    file: str = "scan.cu"

    @property
    def constants(self) -> _compile.Constants:
        """Compile-time constants."""
        ampere, in_reverse = int(self.compute_capability >= 80), int(self.in_reverse)
        return ("ACCUM", self.accum), ("NUM_THREADS", self.num_threads), ("AMPERE", ampere), ("REVERSED", in_reverse)


def padded_qk_dim(head_dim: int) -> int:
    """Return the next larger head_dim of q and k that there are kernels for."""
    return next(padded for padded in _QK_DIMS if head_dim <= padded)


def smem_limits(compute_capability: int) -> tuple[int, int]:
    """Return how many bytes of shared memory a block may have, and an SM has."""
    of_block, of_sm = _SMEM_KIB.get(compute_capability, _SMEM_KIB_ELSE)
    return of_block * _KIB, of_sm * _KIB


def _tensor_core_smem(qk_dim: int, v_block: int, chunk: int, stages: int) -> int:
    """Bytes of `Shared` in forward.cu, in its order."""
    tiles = stages * chunk * (2 * (qk_dim + 8) + v_block + 8) + chunk * (chunk + 8)
    return -(-(2 * tiles + 4 * (2 * chunk + 4 + 3 * 4)) // 16) * 16


def _float_smem(itemsize: int, qk_dim: int, v_block: int, chunk: int) -> int:
    """Bytes of `Shared` in forward_float.cu, in its order."""
    vector = 16 // itemsize
    elements = chunk * (2 * (qk_dim + vector) + v_block + chunk + vector + 1) + qk_dim * v_block + vector
    return -(-itemsize * elements // 16) * 16


@functools.lru_cache(maxsize=1024)
def plan_for(
    dtype: Dtype,
    head_dim: int,
    compute_capability: int,
    *,
    outputs: bool = True,
    causal: bool = True,
    in_reverse: bool = False,
) -> ForwardPlan:
    """Return the tiling for a head_dim of q and k on an architecture.

    A readable rule, no measuring: the largest tiles whose shared memory fits; two stages where as many blocks an SM
    as the registers allow still fit with them, or where even one stage would leave only one block.
    """
    qk_dim = padded_qk_dim(head_dim)
    limit, per_sm = smem_limits(compute_capability)
    plan = functools.partial(ForwardPlan, dtype, compute_capability, outputs, causal, qk_dim, in_reverse=in_reverse)
    if dtype in ("float16", "bfloat16"):
        has_cp_async = compute_capability >= 80
        # A thread holds qk_dim / 2 floats of state and chunk / 2 of outputs: three blocks' registers fit up to 64.
        min_blocks = 3 if qk_dim <= 64 else 2
        for chunk, stages in ((64, 2), (64, 1), (32, 1)):
            smem_bytes = _tensor_core_smem(qk_dim, 64, chunk, stages)
            wanted_blocks = 1 if stages == 1 or per_sm <= 100 * _KIB else min_blocks
            if smem_bytes <= limit and wanted_blocks * (smem_bytes + _KIB) <= per_sm and stages <= 1 + has_cp_async:
                break
        else:
            raise AssertionError(f"no tiling fits {limit} bytes of shared memory")
        return plan(64, chunk, stages, num_threads=128, smem_bytes=smem_bytes, min_blocks=min_blocks)
    itemsize = _arrays.ITEMSIZES[dtype]
    for chunk, v_block in ((32, 64), (16, 32), (16, 16), (8, 16), (8, 8)):
        smem_bytes = _float_smem(itemsize, qk_dim, v_block, chunk)
        num_threads = min(chunk, 16) * (v_block * itemsize // 16)  # a vector of columns each
        if smem_bytes <= limit and num_threads <= 256:
            break
    else:
        raise AssertionError(f"no tiling fits {limit} bytes of shared memory")
    # float32 does with 80 registers for each of 256 threads, with 128 where a thread has more rows of state.
    min_blocks = max(1, min(per_sm // (smem_bytes + _KIB), 3 if qk_dim <= 64 else 2)) if dtype == "float32" else 1
    return plan(v_block, chunk, 1, num_threads=num_threads, smem_bytes=smem_bytes, min_blocks=min_blocks)


def blocks_per_sm(plan: ForwardPlan) -> int:
    """Estimate how many blocks of a plan one SM holds: by its shared memory, and by registers as planned."""
    _, per_sm = smem_limits(plan.compute_capability)
    return max(1, min(per_sm // (plan.smem_bytes + _KIB), plan.min_blocks))


@functools.lru_cache(maxsize=1024)
def num_segments_for(num_blocks: int, num_chunks: int, num_slots: int) -> int:
    """Return in how many segments to cut the sequence.

    Parameters
    ----------
    num_blocks
        Blocks of one segment: batch times heads times blocks of v's columns.
    num_chunks
        Chunks in the sequence.
    num_slots
        Blocks that the GPU holds at a time.

    Notes
    -----
    Time in chunks: waves of blocks times chunks a block; cutting adds the pass over k and v for the states, about
    half of the work, and the scan, about as long as eight chunks. The rule sees sizes only, so the same call on
    the same kind of GPU always gives the same bits.
    """
    best, best_time = 1, float(-(-num_blocks // num_slots) * num_chunks)
    for count in range(2, min(num_chunks // 2, -(-4 * num_slots // num_blocks)) + 1):
        length = -(-num_chunks // count)
        time = 1.5 * -(-num_blocks * count // num_slots) * length + 8
        if time < best_time:
            best, best_time = -(-num_chunks // length), time
    return best


class Layout(NamedTuple):
    """Where the elements of q, k, v or o are, from its pointer on."""

    strides: tuple[int, ...]  # of [batch, seqlen, num_heads, head_dim], in elements
    aligned: bool  # the pointer is a multiple of 16 bytes

    @classmethod
    def of(cls, array: View) -> Layout:
        """Return that of an array."""
        return cls(array.strides, array.pointer % 16 == 0)


def contiguous(batch: int, seqlen: int, num_heads: int, head_dim: int) -> Layout:
    """Of memory as allocators give it."""
    return Layout((seqlen * num_heads * head_dim, num_heads * head_dim, head_dim, 1), aligned=True)


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that a call's launches depend on: everything but pointers and stream."""

    compute_capability: int
    num_sms: int
    dtype: Dtype
    batch: int
    seqlen: int
    num_heads: int
    qk_dim: int
    v_dim: int
    o: Layout
    q: Layout
    k: Layout
    v: Layout
    scale: float
    causal: bool = True
    slope: float = 0.0  # of all heads, where `slopes` is None
    slopes: tuple[str, int] | None = None  # dtype and stride of [num_heads] on the device
    initial_strides: tuple[int, ...] | None = None  # of [batch, num_heads, qk_dim, v_dim]; None is no initial state
    return_state: bool = False
    high: bool = False  # precision="high"
    in_reverse: bool = False  # from the last token to the first, with states as forward.cuh has them then

    @property
    def state_dtype(self) -> Literal["float32", "float64"]:
        """Of states and sums."""
        return "float64" if self.dtype == "float64" else "float32"


# Arrays of a call, by the names that pointers in arguments have; `Program.run` takes them in this order.
ARRAYS = ("o", "q", "k", "v", "final_state", "initial_state", "slopes")


def steps_for(problem: Problem) -> Steps:
    """Return the launches of a call, by the family of kernels that is the fastest for it."""
    if problem.batch * problem.num_heads == 0 or (problem.seqlen == 0 and not problem.return_state):
        return Steps()
    if forward_sm90.fits(problem):
        return forward_sm90.steps(problem)
    if problem.high and problem.causal and problem.seqlen > 0 and problem.dtype in ("float16", "bfloat16"):
        layouts = {name: getattr(problem, name) for name in ("q", "k", "v", "o")}
        raise ValueError(
            f"precision='high' of {problem.dtype} wants a GPU of compute capability 9.0, and arrays whose last axis is "
            "contiguous and whose pointers and other strides are multiples of 16 bytes, but got compute capability "
            f"{problem.compute_capability / 10} and {layouts}"
        )
    return portable_steps(problem)


# struct Args of kernels_cu/forward.cuh: the same fields in the same order.
_ARGS = np.dtype(
    [
        *((name, np.uint64) for name in ("o", "q", "k", "v")),
        *((name, np.uint64) for name in ("final_state", "initial_state", "segment_states", "slopes")),
        *((f"{name}_strides", np.int64, 4) for name in ("o", "q", "k", "v", "initial")),
        *((name, np.int64) for name in ("slopes_stride", "batch", "seqlen", "segment_length")),
        *((name, np.float64) for name in ("scale", "slope")),
        *((name, np.int32) for name in ("num_heads", "qk_dim", "v_dim", "num_v_blocks", "num_segments")),
        *(
            (name, np.int32)
            for name in ("slopes_are_double", "o_vectorized", "q_vectorized", "k_vectorized", "v_vectorized")
        ),
    ],
    align=True,
)


def is_vectorizable(layout: Layout, sizes: tuple[int, ...], itemsize: int) -> bool:
    """Whether every row along the last axis starts at a multiple of 16 bytes and is whole vectors of 16 bytes."""
    *strides, last = layout.strides
    *sizes_before, width = sizes
    rows = zip(strides, sizes_before, strict=True)
    aligned = layout.aligned and all(stride * itemsize % 16 == 0 for stride, size in rows if size > 1)
    return aligned and last == 1 and width * itemsize % 16 == 0


def portable_steps(problem: Problem, num_segments: int | None = None) -> Steps:
    """Return the launches of forward.cu or forward_float.cu: for any GPU, any strides.

    With `num_segments`, only the scan that makes states in front of so many segments out of what these add, in the
    buffer "segment_states".
    """
    dtype, arch = problem.dtype, problem.compute_capability
    in_reverse = problem.in_reverse
    plan = plan_for(dtype, problem.qk_dim, arch, causal=problem.causal, in_reverse=in_reverse)
    states_plan = plan_for(dtype, problem.qk_dim, arch, outputs=False, in_reverse=in_reverse)
    scan_plan = ScanPlan(plan.accum, arch, in_reverse)

    num_heads = problem.batch * problem.num_heads
    num_v_blocks = -(-problem.v_dim // plan.v_block)
    num_chunks = -(-problem.seqlen // plan.chunk)
    num_rows = num_heads * num_v_blocks
    num_slots = problem.num_sms * blocks_per_sm(plan)
    scan_only = num_segments is not None
    if num_segments is None:
        num_segments = num_segments_for(num_rows, num_chunks, num_slots) if problem.seqlen else 0
    segment_length = -(-num_chunks // max(num_segments, 1)) * plan.chunk
    has_segment_states = num_segments > 1 or (problem.seqlen > 0 and not problem.causal)

    state_shape = (problem.batch, problem.num_heads, problem.qk_dim, problem.v_dim)
    pointers = {name: name for name in ("" if scan_only else "oqkv")}
    buffers = []
    if has_segment_states:
        shape = (*state_shape[:2], num_segments, *state_shape[2:])
        buffers.append(Buffer("segment_states", shape, problem.state_dtype))
        pointers["segment_states"] = "segment_states"
    if problem.return_state:
        pointers["final_state"] = "final_state"
    elif has_segment_states and not problem.causal:
        buffers.append(Buffer("state_of_all", state_shape, problem.state_dtype))
        pointers["final_state"] = "state_of_all"

    args = np.zeros(1, _ARGS)
    for name, width in (("o", problem.v_dim), ("q", problem.qk_dim), ("k", problem.qk_dim), ("v", problem.v_dim)):
        layout: Layout = getattr(problem, name)
        sizes = (problem.batch, problem.seqlen, problem.num_heads, width)
        args[f"{name}_strides"] = layout.strides
        args[f"{name}_vectorized"] = is_vectorizable(layout, sizes, _arrays.ITEMSIZES[dtype])
    if problem.initial_strides is not None:
        pointers["initial_state"], args["initial_strides"] = "initial_state", problem.initial_strides
    if problem.slopes is not None:
        slopes_dtype, args["slopes_stride"] = problem.slopes
        pointers["slopes"], args["slopes_are_double"] = "slopes", slopes_dtype == "float64"
    else:
        args["slope"] = problem.slope
    args["batch"], args["seqlen"], args["segment_length"] = problem.batch, problem.seqlen, segment_length
    args["scale"], args["num_heads"], args["qk_dim"] = problem.scale, problem.num_heads, problem.qk_dim
    args["v_dim"], args["num_v_blocks"], args["num_segments"] = problem.v_dim, num_v_blocks, num_segments
    assert _ARGS.fields is not None
    slots = tuple((_ARGS.fields[field][1], array) for field, array in pointers.items())
    arguments = Arguments(args.tobytes(), slots)

    num_blocks = num_rows * num_segments
    launches = []
    if has_segment_states and not scan_only:
        launches.append(launch(states_plan, "forward", num_blocks, arguments))
    if has_segment_states or problem.seqlen == 0:
        num_elements = num_heads * problem.qk_dim * problem.v_dim
        launches.append(launch(scan_plan, "scan", -(-num_elements // scan_plan.num_threads), arguments))
    if problem.seqlen and not scan_only:
        launches.append(launch(plan, "forward", num_blocks, arguments))
    return Steps(tuple(launches), tuple(buffers))


@functools.cache
def device_properties(device_id: int) -> tuple[int, int]:
    """Compute capability, and number of SMs."""
    import cupy

    device = cupy.cuda.Device(device_id)
    compute_capability = int(device.compute_capability)
    if compute_capability < MIN_COMPUTE_CAPABILITY:
        raise RuntimeError(
            f"compute capability {MIN_COMPUTE_CAPABILITY / 10} or later wanted, but CUDA device {device_id} "
            f"has {compute_capability / 10}"
        )
    return compute_capability, device.attributes["MultiProcessorCount"]


def contiguous_problem(
    device_id: int, dtype: Dtype, batch: int, seqlen: int, num_heads: int, qk_dim: int, v_dim: int, **options: Any
) -> Problem:
    """Return the problem of arrays as allocators give them; `options` are other fields of it."""
    q, v = (contiguous(batch, seqlen, num_heads, dim) for dim in (qk_dim, v_dim))
    sizes = (batch, seqlen, num_heads, qk_dim, v_dim)
    return Problem(*device_properties(device_id), dtype, *sizes, v, q, q, v, **{"scale": 1.0, **options})


def sample_sizes(num_sms: int) -> Iterable[tuple[int, int]]:
    """Return lengths and numbers of heads, of calls that launch whatever kernels calls on contiguous arrays do."""
    # Few tokens are not worth a cut. Heads from one to those that fill the GPU, and many times as many.
    heads = {2**i for i in range(8)} | {-(-num_sms * part // 16) for part in range(1, 17)} | {64 * num_sms}
    heads |= {max(1, forward_sm90.num_clusters(size, num_sms)) for size in (2, 3, 4)}
    return itertools.product((1, 2**8, 2**10, 2**12, 2**14, 2**17), sorted(heads))


def kernels_for(dtype: Dtype, qk_dim: int, v_dim: int, *, causal: bool, device_id: int) -> list[_compile.Wanted]:
    """Return the kernels that calls on contiguous arrays launch, whatever their length and number of heads."""
    _, num_sms = device_properties(device_id)
    found: dict[_compile.Wanted, None] = {}
    for (seqlen, num_heads), return_state in itertools.product(sample_sizes(num_sms), (False, True)):
        sizes = (1, seqlen, num_heads, qk_dim, v_dim)
        problem = contiguous_problem(device_id, dtype, *sizes, causal=causal, return_state=return_state)
        found |= {launch.kernel: None for launch in steps_for(problem).launches}
    return list(found)


def problem_of(
    o: View | None,
    q: View,
    k: View,
    v: View,
    slopes: float | View,
    scale: float,
    causal: bool,
    initial_state: View | None,
    **options: Any,
) -> Problem:
    """Return the problem of such arrays; arguments as of `forward`, `options` are other fields of it."""
    assert q.device is not None
    compute_capability, num_sms = device_properties(q.device)
    batch, seqlen, num_heads, qk_dim = q.shape
    v_dim = v.shape[-1]
    return Problem(
        compute_capability,
        num_sms,
        cast(Dtype, q.dtype),
        batch,
        seqlen,
        num_heads,
        qk_dim,
        v_dim,
        o=Layout.of(o) if o is not None else contiguous(batch, seqlen, num_heads, v_dim),
        q=Layout.of(q),
        k=Layout.of(k),
        v=Layout.of(v),
        scale=scale,
        causal=causal,
        slope=0.0 if isinstance(slopes, View) else slopes,
        slopes=(slopes.dtype, slopes.strides[0]) if isinstance(slopes, View) else None,
        initial_strides=initial_state.strides if initial_state is not None else None,
        **options,
    )


def forward(
    o: View | None,
    q: View,
    k: View,
    v: View,
    *,
    slopes: float | View,
    scale: float,
    causal: bool,
    initial_state: View | None,
    results: Sequence[Buffer],
    high: bool = False,
) -> Program:
    """Return the forward pass over such arrays, compiled and loaded; it takes the pointers of `ARRAYS`.

    Parameters
    ----------
    o, q, k, v
        ``[batch, seqlen, num_heads, head_dim]`` on one device, any strides. None as `o` is contiguous, and aligned
        to 16 bytes as what allocators give.
    slopes
        One for all heads, or ``[num_heads]`` float32 or float64 on the device.
    scale
        Factor of q k^T.
    causal
        Without it every token attends to all.
    initial_state
        ``[batch, num_heads, K, V]``.
    results
        What the program is to allocate and give back: "o" unless `out` is given, and "final_state", contiguous
        ``[batch, num_heads, K, V]``, if that is wanted; leading axes of one may be left out.
    high
        Whether only the rounding of the result is left in 16 bits.

    Raises
    ------
    ValueError
        When no kernel does that for such arrays.
    """
    return_state = any(result.name == "final_state" for result in results)
    problem = problem_of(o, q, k, v, slopes, scale, causal, initial_state, return_state=return_state, high=high)
    return Program(steps_for(problem), ARRAYS, results, q)
