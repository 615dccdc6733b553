"""Speed of the ops on the GPU, beside the floor that memory sets and beside other packages, in one run.

From a shell ``python -m lightning_cupy bench``, from a notebook ``lightning_cupy.bench.forward()``.

More than 500 lines, as the three ops go through the same steps: check, time, show, save, draw.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import _arrays, _bench_gpu, _environment, conventions, reference
from ._bench_gpu import Shape, Timing
from ._progress import progress
from .api import lightning_attention
from .demo import BOUNDS

GRADIENT_BOUNDS = {"float64": 1e-11, "float32": 4e-6, "float16": 6e-4, "bfloat16": 2.7e-3}

__all__ = [
    "DEFAULT_SHAPES",
    "GRADIENT_PEERS",
    "GRADIENT_SHAPES",
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
GRADIENT_PEERS = tuple(_bench_gpu.DIFFERENTIABLE_PEERS)
GRADIENT_SHAPES = (
    *(Shape.of(4, 32, seqlen, 128) for seqlen in (2048, 8192)),
    Shape.of(8, 16, 8192, 64),
    Shape.of(1, 64, 16_384, 128),
    *(Shape.of(1, 8, seqlen, 128) for seqlen in (32_768, 131_072)),
    *(Shape.of(2, 12, 2048, head_dim) for head_dim in (96, 192, 256)),
)
_QUICK_PEERS = ("sdpa", "naive")  # the others compile first, and one of them tunes itself for minutes
_SECONDS, _QUICK_SECONDS = 0.3, 0.1  # of repeats for each time

_MORE = ("dinitial_state", "dslopes")
_FLOORS = {
    "forward": "read q, k, v and write o",
    "backward": "read do, q, k, v and write dq, dk, dv",
    "train": "read and write what both must",
}
_MEMORY = " memory: beyond results, over that of q, k, v and do."
_LEGENDS = {
    "forward": "",
    "backward": f" dinitial_state and dslopes: what asking for them adds.{_MEMORY}",
    "train": _MEMORY,
}
_PEER_BOUND = 2e-2  # relative RMS: another function is further off, the least exact peer is not (1.55e-2)
_MANY_TOKENS = 64  # from which on errors average out
_WINDOW = 16_384  # tokens that are checked at the start, the middle and the end of a longer sequence


@dataclasses.dataclass
class Row:
    """What was measured for one shape and dtype; without a speed where the output is wrong."""

    shape: Shape
    dtype: str
    op: str = "forward"
    error: float | None = None  # relative RMS, the worst of all results; None where one has NaN, or there is none
    ours: Timing | None = None
    floor: Timing | None = None  # of the kernel that only reads q, k, v and writes o, and of the backward likewise
    more: dict[str, float] = dataclasses.field(default_factory=dict)  # what more gradients add to the time, of it
    memory: float | None = None  # beyond results, over the inputs' bytes
    peers: dict[str, Timing] = dataclasses.field(default_factory=dict)  # by name and by variant
    peer_errors: dict[str, float | None] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)  # by name or variant, why it has no time

    @property
    def bound(self) -> float:
        """Of the error: half as much again for fewer than 64 tokens, where one rounded score may be all of it."""
        bounds = BOUNDS if self.op == "forward" else GRADIENT_BOUNDS
        return bounds[self.dtype] * (1.5 if self.shape.seqlen < _MANY_TOKENS else 1)

    @property
    def passed(self) -> bool:
        """Whether the output is right, or nothing was computed for want of memory."""
        return "memory" in self.problems or _at_most(self.error, self.bound)

    def numbers(self) -> dict[str, Any]:
        """Return what follows from the times: TFLOP/s, GB/s, share of the floor, and the peers' times over ours."""
        if self.ours is None or self.floor is None:
            return {}
        return {
            "tflops": self.shape.flop(self.op) / self.ours.median / 1e9,
            "gb_per_s": self.shape.num_bytes(self.dtype, self.op) / self.ours.median / 1e6,
            "share": self.floor.median / self.ours.median,
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
        if self.op == "backward":
            cells += [percent(self.more.get(name), "+") for name in _MORE]
        if self.op != "forward":
            cells += [percent(self.memory)]
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
            f"share: time to only {_FLOORS[self.op]}, over ours.{_LEGENDS[self.op]} Peers: their time over ours. "
            "error: relative RMS against float64.",
            "",
        ]
        if self.missing:
            lines += [f"Not here: {', '.join(f'{name} ({why})' for name, why in self.missing.items())}.", ""]
        head = ["batch, heads, tokens, head_dim", "dtype", "ms", "TFLOP/s", "GB/s", "share"]
        head += [*_MORE, "memory"] if self.op == "backward" else ["memory"] if self.op == "train" else []
        head += [*self.peers, "error"]
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
        for row, fields in zip(self.rows, content["rows"], strict=True):
            fields.update(shape=row.shape._asdict(), **row.numbers())
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
        mark(f"only {_FLOORS[self.op]}", floors, "|", color="black", markersize=18, markeredgewidth=2)
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
    cases = shapes or (QUICK_SHAPES if quick else DEFAULT_SHAPES)
    names = against if against is not None else _QUICK_PEERS if quick else PEERS
    return _bench("forward", cases, dtypes, names, PEERS, slopes, heads_first, quick, command)


def backward(
    shapes: Sequence[Sequence[int]] | None = None,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    against: Sequence[str] | None = None,
    slopes: str | float = "lightning2",
    quick: bool = False,
    command: str = "lightning_cupy.bench.backward()",
) -> Result:
    """Measure the backward on the current GPU: dq, dk and dv, and what more gradients add to their time.

    Parameters
    ----------
    shapes, dtypes, slopes, quick, command
        As of `forward`; by default `GRADIENT_SHAPES`.
    against
        Names of `GRADIENT_PEERS`: of these it is the backward alone.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `forward` does.
    """
    return _bench_gradients("backward", shapes, dtypes, against, slopes, quick, command)


def train(
    shapes: Sequence[Sequence[int]] | None = None,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    against: Sequence[str] | None = None,
    slopes: str | float = "lightning2",
    quick: bool = False,
    command: str = "lightning_cupy.bench.train()",
) -> Result:
    """Measure a forward and a backward through torch on the current GPU.

    Parameters
    ----------
    shapes, dtypes, against, slopes, quick, command
        As of `backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `forward` does, and where torch is not installed.
    """
    _environment.require_cuda("bench train")
    problem = _bench_gpu.why_missing("sdpa")
    if problem is not None:
        raise RuntimeError(f"bench train {problem}; run: pip install torch")
    return _bench_gradients("train", shapes, dtypes, against, slopes, quick, command)


def _bench_gradients(
    op: str,
    shapes: Sequence[Sequence[int]] | None,
    dtypes: Sequence[str],
    against: Sequence[str] | None,
    slopes: str | float,
    quick: bool,
    command: str,
) -> Result:
    cases = shapes or (GRADIENT_SHAPES[::2][:3] if quick else GRADIENT_SHAPES)
    names = against if against is not None else ("sdpa",) if quick else GRADIENT_PEERS
    return _bench(op, cases, dtypes, names, GRADIENT_PEERS, slopes, False, quick, command)


def _bench(
    op: str,
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[str],
    against: Sequence[str],
    known: Sequence[str],
    slopes: str | float,
    heads_first: bool,
    quick: bool,
    command: str,
) -> Result:
    cases = [Shape.of(*shape) for shape in shapes]
    for name in against:
        if name not in known:
            raise ValueError(f"against must be of {', '.join(known)}, but got {name!r}")
    for dtype in dtypes:
        for shape in cases:  # the library refuses what is wrong, shown here without any token
            q, v = (np.empty((0, shape.num_heads, dim), _arrays.dtype_of(dtype)) for dim in shape[3:])
            lightning_attention(q, q, v, slopes=_slopes_of(slopes, shape.num_heads), backend="cpu")
    _environment.require_cuda("bench")

    missing = {name: why for name in against if (why := _bench_gpu.why_missing(name))}
    peers = [name for name in against if name not in missing]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "minutes")
    with _bench_gpu.current_gpu() as gpu, progress(len(dtypes) * len(cases), "rows") as bar:
        result = Result(op, heads_first, command, date, gpu.environment(), gpu.copy_gb_per_s(), peers, missing)
        result.host_us["empty kernel"] = gpu.host_us_of_launch()
        for dtype in dtypes:
            for shape in cases:
                result.rows.append(_measure(gpu, op, shape, dtype, slopes, heads_first, peers, quick, bar))
                bar.update(1)
            tiny = Shape(1, 1, 64, cases[0].head_dim, cases[0].v_dim)
            result.host_us[dtype] = gpu.host_us(_Case(gpu, op, tiny, dtype, np.zeros(1), False).call)
    return result


class _Case:
    """The arrays and the calls of a row."""

    def __init__(self, gpu: Any, op: str, shape: Shape, dtype: str, decay: Array, heads_first: bool) -> None:
        self.op, self.decay = op, decay
        if op == "forward":
            self.x = gpu.inputs(shape, dtype, decay, heads_first)
            self.call, self.floor = self.x.attend, self.x.stream
            return
        self.x = gpu.gradient_inputs(shape, dtype, decay)
        self.call, self.floor = self.x.gradients, self.x.stream_backward
        if op == "train":
            self.call, self.floor = self.x.train(), self.x.stream_training

    def expected(self) -> Any:
        """Return outputs of windows of the sampled heads, or their gradients, in float64."""
        x, decay = self.x, self.decay[[head_idx for _, head_idx in self.x.sampled]]
        q, k, v = (x.sample(array) for array in (x.q, x.k, x.v))
        if self.op == "forward":
            return _expected(q, k, v, decay)
        wanted = ("dq", "dk", "dv")
        return reference.chunked_backward(x.sample(x.do), q, k, v, slopes=decay, wanted=wanted, dtype=np.float64)[:3]

    def error(self, expected: Any) -> float | None:
        """Make the call, and return the relative RMS error of its results; None where one has NaN."""
        if self.op != "forward":
            return self.error_of(self.call(), expected)
        self.x.poison()
        self.call()
        return None if self.x.is_unwritten() else self.error_of(self.x.o, expected)

    def error_of(self, found: Any, expected: Any) -> float | None:
        """Return that of a result, or the worst of gradients."""
        if self.op == "forward":
            return _error(self.x.sample(found), expected)
        everything = slice(None)
        pairs = zip(found[:3], expected, strict=True)
        errors = [_error(self.x.sample(array), [(everything, exact)]) for array, exact in pairs]
        return None if None in errors else max(errors)  # type: ignore[type-var]

    def more(self) -> dict[str, Any]:
        """Return calls that ask for more gradients, by their names."""
        return {name: (lambda name=name: self.x.gradients(name)) for name in _MORE} if self.op == "backward" else {}

    def calls_of(self, peer: str) -> dict[str, Any]:
        """Return what makes the calls of a peer, by variant: one of them may raise even then."""
        if self.op == "forward":
            return {name: (lambda call=call: call) for name, call in _bench_gpu.PEER_CALLS[peer](self.x).items()}
        make = self.x.backward_of if self.op == "backward" else self.x.step_of
        functions = _bench_gpu.DIFFERENTIABLE_PEERS[peer](self.x)
        return {name: functools.partial(make, function) for name, function in functions.items()}


def _at_most(error: float | None, bound: float) -> bool:
    return error is not None and error <= bound


def _slopes_of(slopes: str | float, num_heads: int) -> Array:
    return conventions.slopes(num_heads, slopes) if isinstance(slopes, str) else np.full(num_heads, float(slopes))


def _measure(
    gpu: Any,
    op: str,
    shape: Shape,
    dtype: str,
    slopes: str | float,
    heads_first: bool,
    peers: Sequence[str],
    quick: bool,
    bar: Any,
) -> Row:
    """Check the op; where it is right, time it, the floor and the peers."""
    row, seconds = Row(shape, dtype, op), _QUICK_SECONDS if quick else _SECONDS
    bar.set_postfix_str(f"{shape} {dtype}: check")
    try:
        case = _Case(gpu, op, shape, dtype, _slopes_of(slopes, shape.num_heads), heads_first)
        expected = case.expected()
        row.error = case.error(expected)
        if not row.passed:
            return row
        row.ours, row.floor = gpu.time(case.call, seconds), gpu.time(case.floor, seconds)
        for name, call in case.more().items():
            without, with_more = gpu.time_in_turn([case.call, call], seconds)
            row.more[name] = with_more.median / without.median - 1
        if op != "forward" and gpu.torch is not None:
            row.memory = case.x.extra_memory(case.call)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error):  # torch's is a RuntimeError
            raise
        return Row(shape, dtype, op, problems={"memory": "does not fit in memory"})
    for name in peers:
        tunes = ", which tunes itself for minutes" if name == "fla" else ""
        bar.set_postfix_str(f"{shape} {dtype}: {name}{tunes}")
        _measure_peer(gpu, name, case, expected, seconds, row)
    return row


def _measure_peer(gpu: Any, name: str, case: _Case, expected: Any, seconds: float, row: Row) -> None:
    """Add the times of a peer's variants to the row, and that of the best as the peer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why there is no time is in an exception
        try:
            calls = case.calls_of(name)
        except Exception as error:  # other packages raise what they like
            row.problems[name] = _bench_gpu.in_a_line(error)
            return
        for variant, make_call in calls.items():
            try:
                call = make_call()
                row.peer_errors[variant] = case.error_of(call(), expected)
                row.peers[variant] = gpu.time(call, seconds)
            except Exception as error:
                row.problems[variant] = _bench_gpu.in_a_line(error)
    timed = [variant for variant in calls if variant in row.peers]
    agreeing = [variant for variant in timed if _at_most(row.peer_errors[variant], _PEER_BOUND)]
    if timed:
        best = min(agreeing or timed, key=lambda variant: row.peers[variant].median)
        row.peers[name], row.peer_errors[name] = row.peers[best], row.peer_errors[best]


def _expected(q: Array, k: Array, v: Array, slopes: Array) -> list[tuple[slice, Array]]:
    """Return outputs in float64, ``[tokens, heads, V]``: of all tokens, or where they are many, of windows.

    From window to window the state is carried by its closed form, one product.
    """
    seqlen, num_heads, head_dim = q.shape
    windows = [slice(0, seqlen)]
    if seqlen >= 4 * _WINDOW:  # or they would overlap
        windows = [slice(start, start + _WINDOW) for start in (0, seqlen // 2, seqlen - _WINDOW)]
    state, position, expected = np.zeros((num_heads, head_dim, v.shape[-1])), 0, []
    for window in windows:
        between = slice(position, window.start)
        num_tokens = window.start - position
        decay = np.exp(-np.multiply.outer(np.arange(num_tokens)[::-1], slopes))[..., None]
        update = (decay * k[between]).transpose(1, 2, 0) @ v[between].swapaxes(0, 1)
        state = np.exp(-slopes * num_tokens)[:, None, None] * state + update
        o, state = reference.chunked(
            q[window], k[window], v[window], slopes=slopes, initial_state=state, dtype=np.float64
        )
        position = window.stop
        expected.append((window, o))
    return expected


def _error(o: Array, expected: list[tuple[slice, Array]]) -> float | None:
    """Relative RMS error over the windows; None where there is NaN."""
    squared_error = sum(float(np.sum((o[window] - wanted) ** 2)) for window, wanted in expected)
    squared_norm = sum(float(np.sum(wanted**2)) for _, wanted in expected)
    error = (squared_error / squared_norm) ** 0.5
    return error if np.isfinite(error) else None
