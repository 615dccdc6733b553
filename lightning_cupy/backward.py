"""Launches of the backward pass: kernels_cu/forward*.cu and scan.cu, and backward*.cu for the slopes.

With ``G_t = scale q_t do_t^T + exp(-slope) G_(t+1)``, the gradient of the state S_t, and that of the final state in
place of what is behind the last token::

    dq_t = scale S_t do_t          attention over (do, v, k), with the initial state transposed
    dk_t = G_t v_t                 the same over (v, do, q), from the last token to the first
    dv_t = G_t^T k_t               the same over (k, q, do), from the last token to the first
    dinitial_state                 the state that is left in front of the first token

So each is as fast, and as exact, as a forward pass, and needs no memory beside it: states are made anew. The gradient
of the slopes has kernels of its own, or is summed by the launch for dq where that is Hopper's, of float16 or bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from . import _arrays, _compile, forward, forward_sm90
from ._arrays import View
from ._launch import Arguments, Buffer, Launch, Program, Steps, launch
from .forward import Dtype, Layout

# Arrays of a call, by the names that pointers in arguments have; `Program.run` takes them in this order.
RESULTS = ("dq", "dk", "dv", "dinitial_state", "dslopes")
ARRAYS = (*RESULTS, "do", "q", "k", "v", "initial_state", "dstate", "slopes")


class _Attention(NamedTuple):
    """A gradient as the attention that it is."""

    q: str
    k: str
    v: str
    state: str  # what it begins with
    state_is_transposed: bool = False
    in_reverse: bool = False

    @property
    def names(self) -> dict[str, str]:
        """Whose places the arrays of the forward pass have."""
        return {"q": self.q, "k": self.k, "v": self.v, "initial_state": self.state}


_ATTENTIONS = {
    "dq": _Attention("do", "v", "k", "initial_state", state_is_transposed=True),
    "dk": _Attention("v", "do", "q", "dstate", state_is_transposed=True, in_reverse=True),
    "dv": _Attention("k", "q", "do", "dstate", in_reverse=True),
}
# Those whose states at the cuts of a sequence dslopes want.
_STATES = {"segment_states": _Attention("q", "k", "v", "initial_state"), "segment_dstates": _ATTENTIONS["dv"]}


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that a call's launches depend on: everything but pointers and stream."""

    of: forward.Problem  # of which these are gradients, with do in the place of o
    dstate_strides: tuple[int, ...] | None = None  # of [batch, num_heads, qk_dim, v_dim]; None is zeros
    wanted: tuple[str, ...] = ("dq", "dk", "dv")

    def layout(self, name: str) -> Layout:
        """Return where the elements of do, q, k or v are."""
        found: Layout = getattr(self.of, "o" if name == "do" else name)
        return found

    def width(self, name: str) -> int:
        """Return the last axis of one of them."""
        return self.of.qk_dim if name in ("q", "k") else self.of.v_dim

    def attention(self, this: _Attention, *, return_state: bool = False) -> forward.Problem:
        """Return the problem of an attention over some of the arrays."""
        strides = self.of.initial_strides if this.state == "initial_state" else self.dstate_strides
        if this.state_is_transposed:
            strides = _transposed(strides)
        v_dim = self.width(this.v)
        return dataclasses.replace(
            self.of,
            qk_dim=self.width(this.q),
            v_dim=v_dim,
            o=forward.contiguous(self.of.batch, self.of.seqlen, self.of.num_heads, v_dim),
            q=self.layout(this.q),
            k=self.layout(this.k),
            v=self.layout(this.v),
            initial_strides=strides,
            return_state=return_state,
            in_reverse=this.in_reverse,
        )


def _transposed(strides: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return strides if strides is None else (*strides[:-2], strides[-1], strides[-2])


def steps_for(problem: Problem) -> Steps:
    """Return the launches of a call."""
    of = problem.of
    attentions = {}
    for gradient, this in _ATTENTIONS.items():
        return_state = gradient == "dv" and "dinitial_state" in problem.wanted
        if gradient in problem.wanted or return_state:
            attentions[gradient] = problem.attention(this, return_state=return_state)
    has_heads = of.batch * of.num_heads > 0
    parts = []
    if has_heads and {"dk", "dv"} <= attentions.keys() and forward_sm90.is_pair(attentions["dk"], attentions["dv"]):
        # Both read q and do, at the same time.
        names = _names("dk") | {f"second_{name}": array for name, array in _names("dv").items()}
        steps = forward_sm90.steps(attentions.pop("dk"), attentions.pop("dv"))
        parts.append(_renamed(steps, names, "dk and dv"))
    if "dslopes" in problem.wanted and of.num_heads > 0:
        if _is_summed_with_dq(problem):
            attentions.pop("dq", None)
            parts.append(_dq_and_slopes_steps(problem))
        else:
            parts.append(_slope_steps(problem))
    for gradient, attention in attentions.items():
        parts.append(_renamed(forward.steps_for(attention), _names(gradient), gradient))
    if "dv" not in problem.wanted and "dinitial_state" in problem.wanted:
        parts.append(Steps((), (Buffer("dv", (of.batch, of.seqlen, of.num_heads, of.v_dim), of.dtype),)))
    return _in_turn(parts)


def _names(gradient: str) -> dict[str, str]:
    return _ATTENTIONS[gradient].names | {"o": gradient, "final_state": "dinitial_state"}


def _in_turn(parts: Sequence[Steps]) -> Steps:
    return Steps(sum((part.launches for part in parts), ()), sum((part.buffers for part in parts), ()))


def _renamed(steps: Steps, names: Mapping[str, str], label: str) -> Steps:
    """Give arrays the names that they have here, and buffers, of which parts do not share any, names of their own."""
    names = dict(names) | {buffer.name: f"{buffer.name} of {label}" for buffer in steps.buffers}

    def renamed(launch: Launch) -> Launch:
        pointers = tuple((offset, names.get(name, name)) for offset, name in launch.arguments.pointers)
        return dataclasses.replace(launch, arguments=dataclasses.replace(launch.arguments, pointers=pointers))

    buffers = (dataclasses.replace(buffer, name=names[buffer.name]) for buffer in steps.buffers)
    return Steps(tuple(map(renamed, steps.launches)), tuple(buffers))


@dataclasses.dataclass(frozen=True)
class SlopesPlan:
    """Tiling of kernels_cu/backward.cu and backward_float.cu; `constants` are their ``-D``."""

    dtype: Dtype
    compute_capability: int
    qk_block: int  # columns of q and k a block
    v_block: int  # columns of v a block
    chunk: int  # tokens
    stages: int  # chunks in shared memory: one in use, the rest under way
    num_threads: int
    smem_bytes: int

    @property
    def file(self) -> str:
        """Name in kernels_cu."""
        return "backward.cu" if _has_tensor_cores(self.dtype, self.compute_capability) else "backward_float.cu"

    @property
    def constants(self) -> _compile.Constants:
        """Compile-time constants."""
        constants: dict[str, str | int] = {
            "ACCUM": "double" if self.dtype == "float64" else "float",
            "BFLOAT16": int(self.dtype == "bfloat16"),
            "QK_BLOCK": self.qk_block,
            "V_BLOCK": self.v_block,
            "CHUNK": self.chunk,
            "NUM_THREADS": self.num_threads,
            "SMEM_BYTES": self.smem_bytes,
            "AMPERE": int(self.compute_capability >= 80),
            "REVERSED": 0,
        }
        if self.file == "backward.cu":
            constants |= {"STAGES": self.stages, "MIN_BLOCKS": _MIN_BLOCKS}
        else:
            constants |= {"ELEMENT": {"float32": "float", "float64": "double"}.get(self.dtype, "uint16_t")}
        return tuple(constants.items())


_MIN_BLOCKS = 2  # blocks of backward.cu that an SM should hold: bounds the registers


def _has_tensor_cores(dtype: Dtype, compute_capability: int) -> bool:
    return dtype == "float16" or (dtype == "bfloat16" and compute_capability >= 80)


@functools.lru_cache(maxsize=1024)
def slopes_plan_for(dtype: Dtype, head_dim: int, compute_capability: int) -> SlopesPlan:
    """Return the tiling for a head_dim of q and k on an architecture: the largest tiles whose shared memory fits."""
    qk_dim = forward.padded_qk_dim(head_dim)
    qk_block = qk_dim if qk_dim <= 128 else qk_dim // 2
    limit, per_sm = forward.smem_limits(compute_capability)
    plan = functools.partial(SlopesPlan, dtype, compute_capability, qk_block)
    if _has_tensor_cores(dtype, compute_capability):
        v_block, chunk = 64, 64

        def smem_of(stages: int) -> int:
            return 2 * stages * chunk * 2 * (qk_block + v_block + 16) + 4 * 2 * (chunk + 4)

        stages = 2 if compute_capability >= 80 and _MIN_BLOCKS * (smem_of(2) + 1024) <= per_sm else 1
        return plan(v_block, chunk, stages, 32 * v_block // 16, smem_of(stages))
    itemsize = 8 if dtype == "float64" else 4
    vector = 16 // itemsize
    for chunk, v_block in ((32, 64), (16, 32), (16, 16), (8, 16), (8, 8)):
        num_threads = (16 if chunk >= 16 else 8) * (v_block // vector)
        elements = 2 * chunk * (qk_block + v_block + 2 * vector) + 2 * qk_block * v_block + chunk + vector
        smem_bytes = -(-itemsize * elements // 16) * 16
        if smem_bytes + 1024 <= limit and num_threads <= 256:
            return plan(v_block, chunk, 1, num_threads, smem_bytes)
    raise AssertionError(f"no tiling fits {limit} bytes of shared memory")


# struct SlopeArgs of kernels_cu/backward.cu: the same fields in the same order.
_ARGS = np.dtype(
    [
        *((name, np.uint64) for name in ("dslopes", "partials", "dout", "q", "k", "v", "initial_state", "dstate")),
        *((name, np.uint64) for name in ("segment_states", "segment_dstates", "slopes")),
        *((f"{name}_strides", np.int64, 4) for name in ("dout", "q", "k", "v", "initial", "dstate")),
        *((name, np.int64) for name in ("slopes_stride", "batch", "seqlen", "segment_length")),
        *((name, np.float64) for name in ("scale", "slope")),
        *((name, np.int32) for name in ("num_heads", "qk_dim", "v_dim", "num_v_blocks", "num_segments")),
        *(
            (name, np.int32)
            for name in ("slopes_are_double", "dout_vectorized", "q_vectorized", "k_vectorized", "v_vectorized")
        ),
    ],
    align=True,
)


# Tokens, and heads times tokens, from which dslopes is summed by the launch that makes dq. For fewer it takes
# microseconds anyway, by backward.cu, which rounds less: sums of few numbers may be small beside these.
_MIN_SEQLEN_WITH_DQ, _MIN_TOKENS_WITH_DQ = 2**9, 2**15


def _is_summed_with_dq(problem: Problem) -> bool:
    """Whether the launch for dq, on Hopper, sums dslopes too."""
    of = problem.of
    dq = problem.attention(_ATTENTIONS["dq"])
    return (
        of.dtype in ("float16", "bfloat16")
        and dq.qk_dim <= forward_sm90.MAX_SLOPES_QK_DIM
        and of.seqlen >= _MIN_SEQLEN_WITH_DQ
        and of.batch * of.num_heads * of.seqlen >= _MIN_TOKENS_WITH_DQ
        and forward_sm90.fits(dq)
        and forward_sm90.fits(dataclasses.replace(dq, o=problem.layout("q")))  # which it reads beside the others
    )


def _dq_and_slopes_steps(problem: Problem) -> Steps:
    """Return the launches that make dq, wanted or not, and with it dslopes."""
    dq = problem.attention(_ATTENTIONS["dq"])
    of = problem.of
    slopes = forward_sm90.SlopesGradient(problem.layout("q"), _transposed(problem.dstate_strides))
    steps = forward_sm90.steps(dq, slopes=slopes)
    names = _names("dq") | {"primal": "q", "partials": "partials", "dstate": "dstate"}

    plan = slopes_plan_for(of.dtype, of.qk_dim, of.compute_capability)
    args = np.zeros(1, _ARGS)
    args["batch"], args["num_heads"], args["num_segments"] = of.batch, of.num_heads, 1
    args["num_v_blocks"] = num_partials = forward_sm90.num_partials(dq)
    buffers = [Buffer("partials", (of.batch * of.num_heads * num_partials,), "float64")]
    if "dq" not in problem.wanted:
        buffers.append(Buffer("dq", (of.batch, of.seqlen, of.num_heads, of.qk_dim), of.dtype))
    sum_steps = Steps((_sum(plan, args, {"dslopes": "dslopes", "partials": "partials"}),), tuple(buffers))
    return _in_turn([_renamed(steps, names, "dq"), sum_steps])


def _arguments(args: np.ndarray, pointers: Mapping[str, str]) -> Arguments:
    assert _ARGS.fields is not None
    return Arguments(args.tobytes(), tuple((_ARGS.fields[field][1], array) for field, array in pointers.items()))


def _sum(plan: SlopesPlan, args: np.ndarray, pointers: Mapping[str, str]) -> Launch:
    num_blocks = -(-int(args["num_heads"][0]) * 32 // plan.num_threads)
    return launch(plan, "sum_partials", num_blocks, _arguments(args, pointers))


def _slope_steps(problem: Problem) -> Steps:
    """Return the launches for dslopes; where the sequence is cut, behind those for states at the cuts."""
    of = problem.of
    plan = slopes_plan_for(of.dtype, of.qk_dim, of.compute_capability)
    states_plan = forward.plan_for(of.dtype, of.qk_dim, of.compute_capability, outputs=False)
    num_chunks = -(-of.seqlen // states_plan.chunk)
    num_tiles = -(-of.qk_dim // plan.qk_block) * -(-of.v_dim // plan.v_block)
    num_rows = of.batch * of.num_heads * num_tiles
    # A cut costs another pass. Where each SM has a block already, a second for each does not make up for that.
    num_slots = of.num_sms if num_rows > of.num_sms // 2 else 2 * of.num_sms
    num_segments = forward.num_segments_for(num_rows, num_chunks, num_slots) if num_rows and num_chunks else 1

    scans = []
    inputs = {"dout": "do", "q": "q", "k": "k", "v": "v"}  # `do` is no name in CUDA
    pointers = {"dslopes": "dslopes", "partials": "partials"} | inputs
    if num_segments > 1:
        for label, this in _STATES.items():
            scans.append(_renamed(forward.portable_steps(problem.attention(this), num_segments), this.names, label))
            pointers[label] = f"segment_states of {label}"
    partials = Buffer("partials", (num_rows * num_segments,), "float64")

    args = np.zeros(1, _ARGS)
    for field, name in inputs.items():
        layout, sizes = problem.layout(name), (of.batch, of.seqlen, of.num_heads, problem.width(name))
        args[f"{field}_strides"] = layout.strides
        args[f"{field}_vectorized"] = forward.is_vectorizable(layout, sizes, _arrays.ITEMSIZES[of.dtype])
    for name, field, strides in (
        ("initial_state", "initial_strides", of.initial_strides),
        ("dstate", "dstate_strides", problem.dstate_strides),
    ):
        if strides is not None:
            pointers[name], args[field] = name, strides
    if of.slopes is not None:
        slopes_dtype, args["slopes_stride"] = of.slopes
        pointers["slopes"], args["slopes_are_double"] = "slopes", slopes_dtype == "float64"
    else:
        args["slope"] = of.slope
    args["batch"], args["seqlen"], args["num_heads"] = of.batch, of.seqlen, of.num_heads
    args["segment_length"] = -(-num_chunks // num_segments) * states_plan.chunk
    args["scale"], args["qk_dim"], args["v_dim"] = of.scale, of.qk_dim, of.v_dim
    args["num_v_blocks"], args["num_segments"] = num_tiles, num_segments
    arguments = _arguments(args, pointers)

    def launched(name: str) -> Steps:
        return Steps((launch(plan, name, num_rows * num_segments, arguments),))

    parts = []
    if num_segments > 1:
        parts += [launched("slope_states"), *scans]
    if num_rows:
        parts.append(launched("slope_partials"))
    return _in_turn([Steps((), (partials,)), *parts, Steps((_sum(plan, args, pointers),))])


def kernels_for(dtype: Dtype, qk_dim: int, v_dim: int, *, causal: bool, device_id: int) -> list[_compile.Wanted]:
    """Return the kernels of gradients of calls on contiguous arrays, where dk and dv are both wanted."""
    _, num_sms = forward.device_properties(device_id)
    found: dict[_compile.Wanted, None] = {}
    wanted = ("dq", "dk", "dv", "dinitial_state") + ("dslopes",) * causal
    for seqlen, num_heads in forward.sample_sizes(num_sms):
        of = forward.contiguous_problem(device_id, dtype, 1, seqlen, num_heads, qk_dim, v_dim, causal=causal)
        found |= {launch.kernel: None for launch in steps_for(Problem(of, wanted=wanted)).launches}
    return list(found)


def backward(
    do: View,
    q: View,
    k: View,
    v: View,
    *,
    slopes: float | View,
    scale: float,
    causal: bool,
    initial_state: View | None,
    dstate: View | None,
    results: Sequence[Buffer],
) -> Program:
    """Return the backward pass over such arrays, compiled and loaded; it takes the pointers of `ARRAYS`.

    Parameters
    ----------
    do, q, k, v
        ``[batch, seqlen, num_heads, head_dim]`` on one device, any strides.
    slopes
        One for all heads, or ``[num_heads]`` float32 or float64 on the device.
    scale
        Factor of q k^T.
    causal
        Without it every token attends to all.
    initial_state, dstate
        ``[batch, num_heads, K, V]``.
    results
        What the program is to allocate and give back, contiguous: those of `RESULTS` that are wanted, in that order.
        Leading axes of one may be left out.
    """
    of = forward.problem_of(do, q, k, v, slopes, scale, causal, initial_state)
    dstate_strides = dstate.strides if dstate is not None else None
    problem = Problem(of, dstate_strides, wanted=tuple(result.name for result in results))
    return Program(steps_for(problem), ARRAYS, results, q)
