"""Grid, shared memory and arguments of kernels_cu/forward*.cu and scan.cu."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import numpy as np

from . import _arrays, _compile
from ._arrays import View
from ._environment import MIN_COMPUTE_CAPABILITY

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
_MAX_GRID_X = 2**31 - 1


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
    num_threads: int = 256
    file: str = "scan.cu"

    @property
    def constants(self) -> _compile.Constants:
        """Compile-time constants."""
        ampere = int(self.compute_capability >= 80)
        return (("ACCUM", self.accum), ("NUM_THREADS", self.num_threads), ("AMPERE", ampere))


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
    dtype: Dtype, head_dim: int, compute_capability: int, *, outputs: bool = True, causal: bool = True
) -> ForwardPlan:
    """Return the tiling for a head_dim of q and k on an architecture.

    A readable rule, no measuring: the largest tiles whose shared memory fits; two stages where as many blocks an SM
    as the registers allow still fit with them, or where even one stage would leave only one block.
    """
    qk_dim = next(padded for padded in _QK_DIMS if head_dim <= padded)
    limit, per_sm = (kib * _KIB for kib in _SMEM_KIB.get(compute_capability, _SMEM_KIB_ELSE))
    plan = functools.partial(ForwardPlan, dtype, compute_capability, outputs, causal, qk_dim)
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
    _, per_sm_kib = _SMEM_KIB.get(plan.compute_capability, _SMEM_KIB_ELSE)
    return max(1, min(per_sm_kib * _KIB // (plan.smem_bytes + _KIB), plan.min_blocks))


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


def is_vectorizable(array: View) -> bool:
    """Whether every row along the last axis starts at a multiple of 16 bytes and is whole vectors of 16 bytes."""
    *strides, last = array.strides
    *sizes, width = array.shape
    aligned = all(stride * array.itemsize % 16 == 0 for stride, size in zip(strides, sizes, strict=True) if size > 1)
    return aligned and last == 1 and width * array.itemsize % 16 == 0 and array.pointer % 16 == 0


def _launch(
    plan: ForwardPlan | ScanPlan,
    name: str,
    num_blocks: int,
    args: np.ndarray[Any, Any],
    device_id: int,
    stream: int,
) -> None:
    smem_bytes = plan.smem_bytes if isinstance(plan, ForwardPlan) else 0
    kernel = _compile.kernel(plan.file, name, plan.constants, smem_bytes, device_id)
    grid_x = min(num_blocks, _MAX_GRID_X)
    kernel(
        (grid_x, -(-num_blocks // grid_x), 1),
        (plan.num_threads, 1, 1),
        (args.view(f"V{_ARGS.itemsize}"),),
        smem_bytes,
        _arrays.StreamHandle(stream),
    )


@functools.cache
def _device_properties(device_id: int) -> tuple[int, int]:
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


def forward(
    o: View,
    q: View,
    k: View,
    v: View,
    *,
    slopes: float | View,
    scale: float,
    causal: bool,
    initial_state: View | None,
    final_state: View | None,
    stream: int,
) -> None:
    """Launch the kernels that write `o` and, unless None, `final_state`.

    Parameters
    ----------
    o, q, k, v
        ``[batch, seqlen, num_heads, head_dim]`` on one device, any strides.
    slopes
        One for all heads, or ``[num_heads]`` float32 or float64 on the device.
    scale
        Factor of q k^T.
    causal
        Without it every token attends to all.
    initial_state, final_state
        ``[batch, num_heads, K, V]``; the latter contiguous.
    stream
        Where to launch.
    """
    import cupy

    batch, seqlen, num_heads, qk_dim = q.shape
    v_dim = v.shape[-1]
    if batch * num_heads == 0 or (seqlen == 0 and final_state is None):
        return
    device_id = o.device
    assert device_id is not None
    with cupy.cuda.Device(device_id):
        compute_capability, num_sms = _device_properties(device_id)
        plan = plan_for(q.dtype, qk_dim, compute_capability, causal=causal)
        states_plan = plan_for(q.dtype, qk_dim, compute_capability, outputs=False)
        scan_plan = ScanPlan(plan.accum, compute_capability)
        num_v_blocks = -(-v_dim // plan.v_block)
        num_chunks = -(-seqlen // plan.chunk)
        num_rows = batch * num_heads * num_v_blocks
        num_segments = num_segments_for(num_rows, num_chunks, num_sms * blocks_per_sm(plan)) if seqlen else 0
        segment_length = -(-num_chunks // max(num_segments, 1)) * plan.chunk

        state_dtype = "float64" if plan.accum == "double" else "float32"
        segment_states = None
        if num_segments > 1 or (seqlen and not causal):
            shape = (batch, num_heads, num_segments, qk_dim, v_dim)
            segment_states = _arrays.empty(o, shape, state_dtype)
            if final_state is None and not causal:
                final_state = _arrays.empty(o, (batch, num_heads, qk_dim, v_dim), state_dtype)

        args = np.zeros(1, _ARGS)
        for name, array in (("o", o), ("q", q), ("k", k), ("v", v)):
            args[name] = array.pointer
            args[f"{name}_strides"] = array.strides
            args[f"{name}_vectorized"] = is_vectorizable(array)
        if final_state is not None:
            args["final_state"] = final_state.pointer
        if initial_state is not None:
            args["initial_state"], args["initial_strides"] = initial_state.pointer, initial_state.strides
        if segment_states is not None:
            args["segment_states"] = segment_states.pointer
        if isinstance(slopes, View):
            args["slopes"], args["slopes_stride"] = slopes.pointer, slopes.strides[0]
            args["slopes_are_double"] = slopes.dtype == "float64"
        else:
            args["slope"] = slopes
        args["batch"], args["seqlen"], args["segment_length"] = batch, seqlen, segment_length
        args["scale"], args["num_heads"], args["qk_dim"], args["v_dim"] = scale, num_heads, qk_dim, v_dim
        args["num_v_blocks"], args["num_segments"] = num_v_blocks, num_segments

        num_blocks = num_rows * num_segments
        if segment_states is not None:
            _launch(states_plan, "forward", num_blocks, args, device_id, stream)
        if segment_states is not None or seqlen == 0:
            num_elements = batch * num_heads * qk_dim * v_dim
            _launch(scan_plan, "scan", -(-num_elements // scan_plan.num_threads), args, device_id, stream)
        if seqlen:
            _launch(plan, "forward", num_blocks, args, device_id, stream)
