"""Speed of the ops on the GPU, beside the floor that memory sets and beside other packages, in one run.

From a shell ``python -m lightning_cupy bench``, from a notebook ``lightning_cupy.bench.forward()``.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import _arrays, _bench_gpu, _environment, conventions, reference
from ._bench_gpu import Shape, Timing
from ._progress import progress
from .api import lightning_attention
from .demo import BOUNDS

__all__ = [
    "DEFAULT_SHAPES",
    "GRADIENT_BOUNDS",
    "GRADIENT_PEERS",
    "GRADIENT_SHAPES",
    "OPS",
    "PEERS",
    "QUICK_SHAPES",
    "Result",
    "Row",
    "Shape",
    "Timing",
    "backward",
    "forward",
    "pyplot",
    "train",
]

Array = np.ndarray[Any, Any]

Expected = list[tuple[slice, tuple[Array, ...]]]  # windows of the sequence, and results there

PEERS = tuple(_bench_gpu.PEER_CALLS)
DEFAULT_SHAPES = (
    *(Shape.of(4, 32, seqlen, 128) for seqlen in (512, 2048, 8192, 32_768)),
    *(Shape.of(8, 16, seqlen, 64) for seqlen in (2048, 8192)),
    *(Shape.of(1, 64, seqlen, 128) for seqlen in (1024, 4096, 65_536)),
    Shape.of(1, 8, 1024, 64),
    *(Shape.of(1, 8, seqlen, 128) for seqlen in (32_768, 131_072)),
    Shape.of(1, 1, 131_072, 128),
    *(Shape.of(2, 12, 2048, head_dim) for head_dim in (96, 192, 256)),
    Shape.of(33, 4, 4096, 128),  # as many heads as an H200 has SMs
)
QUICK_SHAPES = (Shape.of(4, 32, 2048, 128), Shape.of(1, 64, 4096, 128), Shape.of(1, 8, 32_768, 128))
GRADIENT_PEERS = _bench_gpu.DIFFERENTIABLE_PEERS
GRADIENT_SHAPES = (
    *(Shape.of(4, 32, seqlen, 128) for seqlen in (2048, 8192)),
    Shape.of(8, 16, 8192, 64),
    Shape.of(1, 64, 16_384, 128),
    *(Shape.of(1, 8, seqlen, 128) for seqlen in (32_768, 131_072)),
    *(Shape.of(2, 12, 2048, head_dim) for head_dim in (96, 192, 256)),
)
GRADIENT_BOUNDS = {"float64": 1e-11, "float32": 4e-6, "float16": 6e-4, "bfloat16": 2.7e-3}  # beside BOUNDS of outputs

_QUICK_PEERS = ("sdpa", "naive")  # the others compile first, and one of them tunes itself for a minute
_SECONDS, _QUICK_SECONDS = 0.3, 0.1  # of repeats for each time
_PEER_BOUND = 2e-2  # relative RMS: another function is further off, the least exact peer is not (1.55e-2)
_MANY_TOKENS = 64  # from which on errors average out
_WINDOW = 16_384  # tokens that are checked at the start, the middle and the end of a longer sequence


@dataclasses.dataclass(frozen=True)
class Op:
    """What is measured of an op, and how it is shown; its arrays and calls are in `_bench_gpu.INPUTS`."""

    traffic: str  # of the floor
    inputs: tuple[str, ...]
    expected: Callable[..., Expected]  # from inputs of the sampled heads, and their slopes
    bounds: Mapping[str, float]
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]
    peers: tuple[str, ...]
    quick_peers: tuple[str, ...]
    more: tuple[str, ...] = ()  # gradients that other calls ask for in addition
    memory: bool = False  # whether what it takes for a while is measured
    needs_torch: bool = False
    legend: str = ""

    @property
    def columns(self) -> list[str]:
        """Return headings of what only this op has."""
        return [*self.more, *(["memory"] if self.memory else [])]


@dataclasses.dataclass
class Row:
    """What was measured for one shape and dtype; without a speed where the output is wrong."""

    shape: Shape
    dtype: str
    op: str = "forward"
    error: float | None = None  # relative RMS, the worst of all results; None where one has NaN, or there is none
    ours: Timing | None = None
    floor: Timing | None = None  # of kernels that only read and write what the op must
    more: dict[str, Timing] = dataclasses.field(default_factory=dict)  # ours, where more gradients are asked for
    memory: float | None = None  # peak beyond inputs and gradients, over the bytes of q, k, v and do
    peers: dict[str, Timing] = dataclasses.field(default_factory=dict)  # by name and by variant
    peer_errors: dict[str, float | None] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)  # by name or variant, why it has no time

    @property
    def bound(self) -> float:
        """Of the error: half as much again for fewer than 64 tokens, where one rounded score may be all of it."""
        return OPS[self.op].bounds[self.dtype] * (1.5 if self.shape.seqlen < _MANY_TOKENS else 1)

    @property
    def passed(self) -> bool:
        """Whether the output is right, or nothing was computed for want of memory."""
        return "memory" in self.problems or _at_most(self.error, self.bound)

    def numbers(self) -> dict[str, Any]:
        """Return what follows from the times.

        TFLOP/s, GB/s, the floor's time over ours, what more gradients add to ours, and the peers' times over ours.
        """
        if self.ours is None or self.floor is None:
            return {}
        return {
            "tflops": self.shape.flop(self.op) / self.ours.median / 1e9,
            "gb_per_s": self.shape.num_bytes(self.dtype, self.op) / self.ours.median / 1e6,
            "share": self.floor.median / self.ours.median,
            "added": {name: timing.median / self.ours.median - 1 for name, timing in self.more.items()},
            "ratios": {name: timing.median / self.ours.median for name, timing in self.peers.items()},
        }

    def cells(self, peers: Sequence[str]) -> list[str]:
        """Return the words of the row in the table."""

        def percent(share: float | None, sign: str = "") -> str:
            return "-" if share is None else f"{100 * share:{sign}.0f} %"

        cells, numbers = [str(self.shape), self.dtype], self.numbers()
        if self.ours and numbers:
            cells += [f"{self.ours.median:.3f}", f"{numbers['tflops']:.3g}", f"{numbers['gb_per_s']:,.0f}"]
            cells += [percent(numbers["share"])]
        else:
            cells += ["-"] * 4
        cells += [percent(numbers.get("added", {}).get(name), "+") for name in OPS[self.op].more]
        cells += [percent(self.memory)] if OPS[self.op].memory else []
        for name in peers:
            ratio = numbers.get("ratios", {}).get(name)
            differs = name != "sdpa" and not _at_most(self.peer_errors.get(name), _PEER_BOUND)
            cells.append("-" if ratio is None else f"{ratio:.2f}x" + (", differs" if differs else ""))
        error = "NaN" if self.error is None else f"{self.error:.1e}"
        verdict = error if self.passed else f"{error} FAILED, bound {self.bound:g}"
        return [*cells, self.problems.get("memory", verdict)]


@dataclasses.dataclass(repr=False)
class Result:
    """Rows and where they were measured; shown as a Markdown table."""

    op: str
    heads_first: bool  # q, k, v and o are views of [batch, num_heads, seqlen, head_dim]
    command: str
    date: str
    environment: dict[str, str]
    copy_gb_per_s: float  # bytes read and written
    peers: list[str]
    missing: dict[str, str]  # peers asked for, and why they are not here
    host_us: dict[str, float] = dataclasses.field(default_factory=dict)  # of a call by dtype, and of an empty kernel
    rows: list[Row] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every output is right."""
        return all(row.passed for row in self.rows)

    @property
    def subject(self) -> str:
        """The op, and of which arrays, where they are not contiguous."""
        return f"{self.op} of heads-first arrays" if self.heads_first else self.op

    def __str__(self) -> str:
        where = ", ".join(words if name == "GPU" else f"{name} {words}" for name, words in self.environment.items())
        host = ", ".join(f"{us:.1f} us ({name})" for name, us in self.host_us.items())
        lines = [
            f"{self.subject} on {where}, {self.date}: `{self.command}`",
            "",
            f"Copy: {self.copy_gb_per_s:,.0f} GB/s. Host time of a call: {host}. ms: on the device, median. "
            f"share: time to only {OPS[self.op].traffic}, over ours.{OPS[self.op].legend} Peers: their time over ours. "
            "error: relative RMS against float64.",
            "",
        ]
        if self.missing:
            lines += [f"Not here: {', '.join(f'{name} ({why})' for name, why in self.missing.items())}.", ""]
        head = ["batch, heads, tokens, head_dim", "dtype", "ms", "TFLOP/s", "GB/s", "share"]
        head += [*OPS[self.op].columns, *self.peers, "error"]
        table = [head, *(row.cells(self.peers) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * (width - (idx > 1)) + ":" * (idx > 1) for idx, width in enumerate(widths)])
        for cells in table:
            padded = [f"{cell:{'>' if idx > 1 else '<'}{widths[idx]}}" for idx, cell in enumerate(cells)]
            lines.append(f"| {' | '.join(padded)} |")
        return "\n".join(lines)

    __repr__ = _repr_markdown_ = __str__

    def save(self, path: Path | str) -> None:
        """Write everything as JSON."""
        content = dataclasses.asdict(self)
        op = OPS[self.op]
        for row, fields in zip(self.rows, content["rows"], strict=True):
            fields.update(shape=row.shape._asdict(), **row.numbers())
            for name in ("op", *(() if op.more else ("more", "added")), *(() if op.memory else ("memory",))):
                fields.pop(name, None)  # what is the result's, or what this op does not have
        Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def plot(self, axes: Any = None) -> Any:
        """Plot bytes of q, k, v and o per second, ours and the peers' beside the floor, and return the axes.

        Raises
        ------
        RuntimeError
            Where matplotlib is not installed; the message has the command that mends it.
        """
        rows = [row for row in self.rows if row.ours]
        if axes is None:
            _, axes = pyplot().subplots(figsize=(10, 1.6 + 0.36 * len(rows)), layout="constrained")

        def mark(label: str, timings: Sequence[Timing | None], marker: str, **style: Any) -> None:
            rates = [
                row.shape.num_bytes(row.dtype, row.op) / timing.median / 1e6 if timing else np.nan
                for row, timing in zip(rows, timings, strict=True)
            ]
            axes.plot(rates, range(len(rows)), marker, label=label, **style)

        floors = [row.floor for row in rows]
        mark(f"only {OPS[self.op].traffic}", floors, "|", color="black", markersize=18, markeredgewidth=2)
        mark("lightning_cupy", [row.ours for row in rows], "D", markersize=8)
        for name in self.peers:
            mark(name, [row.peers.get(name) for row in rows], "o", markersize=6)
        axes.axvline(self.copy_gb_per_s, color="gray", linestyle=":", label="copy")
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [f"{row.shape}, {row.dtype}" for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="x", which="both", alpha=0.25)
        axes.set_xlabel("GB/s of inputs and results")
        axes.set_title(f"{self.subject} on {self.environment['GPU']}: batch, heads, tokens, head_dim", fontsize=10)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return axes


def pyplot() -> Any:
    """Import matplotlib.pyplot, or say what mends that."""
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise RuntimeError(f"plot: matplotlib wanted, got {error!r}; run: pip install matplotlib") from error


def forward(
    shapes: Sequence[Sequence[int]] | None = None,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    against: Sequence[str] | None = None,
    slopes: str | float = "lightning2",
    heads_first: bool = False,
    quick: bool = False,
    command: str = "lightning_cupy.bench.forward()",
) -> Result:
    """Measure the forward on the current GPU; an output that is wrong gets no speed.

    Parameters
    ----------
    shapes
        Each ``(batch, heads, tokens, head_dim)``, with v's own head_dim as a fifth where it differs; by default
        `DEFAULT_SHAPES`, or `QUICK_SHAPES`.
    dtypes
        Of float16, bfloat16, float32 and float64.
    against
        Names of `PEERS`; by default all, or with `quick` those that are ready at once. Those that are not installed
        are named in the result. "portable" is our own kernels for any GPU, where others are chosen.
    slopes
        A preset of `lightning_cupy.slopes`, or one number for all heads.
    heads_first
        Whether q, k, v and o are views, with axes 1 and 2 swapped, of contiguous ``[batch, heads, tokens, head_dim]``,
        as torch's ``x.transpose(1, 2)``. The floor stays that of contiguous arrays. Peers get the same views, and
        copies that they make of them are in their time.
    quick
        Fewer shapes, peers and repeats.
    command
        What the result says it came from.

    Raises
    ------
    TypeError, ValueError
        For arguments that the op refuses, before anything is measured.
    RuntimeError
        Where kernels cannot run; the message says what mends it.
    """
    return _bench("forward", shapes, dtypes, against, slopes, heads_first, quick, command)


def backward(
    shapes: Sequence[Sequence[int]] | None = None,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    against: Sequence[str] | None = None,
    slopes: str | float = "lightning2",
    heads_first: bool = False,
    quick: bool = False,
    command: str = "lightning_cupy.bench.backward()",
) -> Result:
    """Measure the backward on the current GPU: dq, dk and dv, and what more gradients add to their time.

    Parameters
    ----------
    shapes, dtypes, slopes, quick, command
        As of `forward`; by default `GRADIENT_SHAPES`, or three of them.
    against
        Names of `GRADIENT_PEERS`, by default all, or with `quick` "sdpa"; of these too it is the backward alone.
    heads_first
        As of `forward`, of do, q, k and v; gradients are contiguous as ever.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `forward` does.
    """
    return _bench("backward", shapes, dtypes, against, slopes, heads_first, quick, command)


def train(
    shapes: Sequence[Sequence[int]] | None = None,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    against: Sequence[str] | None = None,
    slopes: str | float = "lightning2",
    heads_first: bool = False,
    quick: bool = False,
    command: str = "lightning_cupy.bench.train()",
) -> Result:
    """Measure a forward and a backward through torch on the current GPU.

    Of the memory that a step takes for a while o is a part, a quarter of the inputs' bytes where v is as wide as q.

    Parameters
    ----------
    shapes, dtypes, against, slopes, heads_first, quick, command
        As of `backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `forward` does, and where torch, or its CUDA, is not installed.
    """
    return _bench("train", shapes, dtypes, against, slopes, heads_first, quick, command)


def _bench(
    name: str,
    shapes: Sequence[Sequence[int]] | None,
    dtypes: Sequence[str],
    against: Sequence[str] | None,
    slopes: str | float,
    heads_first: bool,
    quick: bool,
    command: str,
) -> Result:
    op = OPS[name]
    cases = [Shape.of(*shape) for shape in shapes or (op.quick_shapes if quick else op.shapes)]
    wanted = list(against if against is not None else op.quick_peers if quick else op.peers)
    for peer in wanted:
        if peer not in op.peers:
            raise ValueError(f"against must be of {', '.join(op.peers)}, but got {peer!r}")
    for dtype in dtypes:
        for shape in cases:  # the library refuses what is wrong, shown here without any token
            q, v = (np.empty((0, shape.num_heads, dim), _arrays.dtype_of(dtype)) for dim in shape[3:])
            lightning_attention(q, q, v, slopes=_slopes_of(slopes, shape.num_heads), backend="cpu")
    _environment.require_cuda("bench")
    if op.needs_torch and (problem := _bench_gpu.why_missing("sdpa")):
        raise RuntimeError(f"bench {name} {problem}; run: pip install torch")

    missing = {peer: why for peer in wanted if (why := _bench_gpu.why_missing(peer))}
    peers = [peer for peer in wanted if peer not in missing]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "minutes")
    with _bench_gpu.current_gpu() as gpu, progress(len(dtypes) * len(cases), "rows") as bar:
        result = Result(name, heads_first, command, date, gpu.environment(), gpu.copy_gb_per_s(), peers, missing)
        result.host_us["empty kernel"] = gpu.host_us_of_launch()
        for dtype in dtypes:
            for shape in cases:
                row = Row(shape, dtype, name)
                _measure(gpu, row, slopes, heads_first, peers, quick, bar)
                result.rows.append(row)
                bar.update(1)
            tiny = gpu.inputs(name, Shape(1, 1, 64, cases[0].head_dim, cases[0].v_dim), dtype, np.zeros(1), False)
            result.host_us[dtype] = gpu.host_us(tiny.call)
    return result


def _at_most(error: float | None, bound: float) -> bool:
    return error is not None and error <= bound


def _slopes_of(slopes: str | float, num_heads: int) -> Array:
    return conventions.slopes(num_heads, slopes) if isinstance(slopes, str) else np.full(num_heads, float(slopes))


def _measure(
    gpu: Any, row: Row, slopes: str | float, heads_first: bool, peers: Sequence[str], quick: bool, bar: Any
) -> None:
    """Check the op; where it is right, time it, the floor and the peers."""
    op, seconds, case = OPS[row.op], _QUICK_SECONDS if quick else _SECONDS, f"{row.shape} {row.dtype}"
    bar.set_postfix_str(f"{case}: check")
    try:
        decay = _slopes_of(slopes, row.shape.num_heads)
        x = gpu.inputs(row.op, row.shape, row.dtype, decay, heads_first)
        sampled = (x.sample(getattr(x, name)) for name in op.inputs)
        expected = op.expected(*sampled, decay[[head_idx for _, head_idx in x.sampled]])
        found = x.checked()
        row.error = None if found is None else _error_of(x, found, expected)
        del found  # its memory
        if not row.passed:
            return
        row.ours, row.floor = gpu.time(x.call, seconds), gpu.time(x.floor, seconds)
        row.more = {name: gpu.time(functools.partial(x.call, name), seconds) for name in op.more}
        row.memory = x.extra_memory() if op.memory else None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error):  # torch's is a RuntimeError
            raise
        row.error, row.ours, row.floor, row.more = None, None, None, {}
        row.problems["memory"] = "does not fit in memory"
        return
    for name in peers:
        tunes = ", which tunes itself for up to a minute" if name == "fla" else ""
        bar.set_postfix_str(f"{case}: {name}{tunes}")
        _measure_peer(gpu, name, x, expected, seconds, row)


def _measure_peer(gpu: Any, name: str, x: Any, expected: Expected, seconds: float, row: Row) -> None:
    """Add the times of a peer's variants to the row, and that of the best as the peer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why there is no time is in an exception
        try:
            calls = _bench_gpu.PEER_CALLS[name](x)
        except Exception as error:  # other packages raise what they like
            row.problems[name] = _bench_gpu.in_a_line(error)
            return
        for variant, call in calls.items():
            try:
                row.peer_errors[variant] = _error_of(x, call(), expected)
                row.peers[variant] = gpu.time(call, seconds)
            except Exception as error:
                row.problems[variant] = _bench_gpu.in_a_line(error)
    timed = [variant for variant in calls if variant in row.peers]
    agreeing = [variant for variant in timed if _at_most(row.peer_errors[variant], _PEER_BOUND)]
    if timed:
        best = min(agreeing or timed, key=lambda variant: row.peers[variant].median)
        row.peers[name], row.peer_errors[name] = row.peers[best], row.peer_errors[best]


def _windows(seqlen: int) -> list[slice]:
    """Return what is checked of a sequence: all of it, or where that is much, its start, middle and end."""
    if seqlen < 4 * _WINDOW:  # or they might overlap
        return [slice(0, seqlen)]
    return [slice(start, start + _WINDOW) for start in (0, seqlen // 2, seqlen - _WINDOW)]


def _carried(state: Array, k: Array, v: Array, slopes: Array, num_decays: Array) -> Array:
    """Carry a state over tokens in closed form, one product; ``k v^T`` of a token has decayed so many times then."""
    decay = np.exp(-np.multiply.outer(num_decays, slopes))[..., None]
    update: Array = (decay * k).transpose(1, 2, 0) @ v.swapaxes(0, 1)
    update += np.exp(-slopes * len(k))[:, None, None] * state
    return update


def _expected_output(q: Array, k: Array, v: Array, slopes: Array) -> Expected:
    """Return outputs in float64, ``[tokens, heads, V]``."""
    expected: Expected = []
    state, position = np.zeros((*q.shape[1:], v.shape[2])), 0
    for window in _windows(len(q)):
        between = slice(position, window.start)
        state = _carried(state, k[between], v[between], slopes, np.arange(window.start - position)[::-1])
        o, state = reference.chunked(
            q[window], k[window], v[window], slopes=slopes, initial_state=state, dtype=np.float64
        )
        position = window.stop
        expected.append((window, (o,)))
    return expected


def _expected_gradients(do: Array, q: Array, k: Array, v: Array, slopes: Array) -> Expected:
    """Return dq, dk and dv likewise: the first follows from the state in front of a window, the others from behind."""
    expected: Expected = []
    windows, scale = _windows(len(q)), q.shape[2] ** -0.5
    state, position, states = np.zeros((*q.shape[1:], v.shape[2])), 0, []
    for window in windows:
        between = slice(position, window.start)
        state = _carried(state, k[between], v[between], slopes, np.arange(window.start - position)[::-1])
        states.append(state)
        position = window.start
    dstate, position = np.zeros_like(state), len(q)
    for window, state in zip(windows[::-1], states[::-1], strict=True):
        between = slice(window.stop, position)
        num_decays = 1 + np.arange(position - window.stop)
        dstate = _carried(dstate, scale * q[between], do[between], slopes, num_decays)
        gradients = reference.chunked_backward(
            *(array[window] for array in (do, q, k, v)),
            slopes=slopes,
            initial_state=state,
            dstate=dstate,
            wanted=("dq", "dk", "dv", "dinitial_state"),
            dtype=np.float64,
        )
        dstate, position = gradients.dinitial_state, window.start
        expected.append((window, gradients[:3]))
    return expected


def _error_of(x: Any, found: Any, expected: Expected) -> float | None:
    """Relative RMS error of what a call gave."""
    return _error([x.sample(result) for result in x.results(found)], expected)


def _error(results: Sequence[Array], expected: Expected) -> float | None:
    """Relative RMS error over the windows, of the worst result; None where one has NaN."""
    errors = []
    for idx, result in enumerate(results):
        squared_error = sum(float(np.sum((result[window] - exact[idx]) ** 2)) for window, exact in expected)
        squared_norm = sum(float(np.sum(exact[idx] ** 2)) for _, exact in expected)
        errors.append((squared_error / squared_norm) ** 0.5)
    return max(errors) if np.isfinite(errors).all() else None


_FORWARD = Op(
    traffic="read q, k, v and write o",
    inputs=("q", "k", "v"),
    expected=_expected_output,
    bounds=BOUNDS,
    shapes=DEFAULT_SHAPES,
    quick_shapes=QUICK_SHAPES,
    peers=PEERS,
    quick_peers=_QUICK_PEERS,
)
_MEMORY = " memory: peak beyond inputs and gradients, over q, k, v and do."
_BACKWARD = Op(
    traffic="read do, q, k, v and write dq, dk, dv",
    inputs=("do", "q", "k", "v"),
    expected=_expected_gradients,
    bounds=GRADIENT_BOUNDS,
    shapes=GRADIENT_SHAPES,
    quick_shapes=GRADIENT_SHAPES[:5:2],
    peers=GRADIENT_PEERS,
    quick_peers=("sdpa",),
    more=("dinitial_state", "dslopes"),
    memory=True,
    legend=f" dinitial_state (and states given), dslopes: what asking for them adds.{_MEMORY}",
)
_TRAIN = dataclasses.replace(
    _BACKWARD,
    traffic="read and write what forward and backward must",
    more=(),
    needs_torch=True,
    legend=f" A call: forward and backward through torch.{_MEMORY}",
)
OPS = {"forward": _FORWARD, "backward": _BACKWARD, "train": _TRAIN}
