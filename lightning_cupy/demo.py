"""The attention on real text, checked, and timed beside its O(n^2) form: python -m lightning_cupy demo."""

from __future__ import annotations

import os
import platform
import statistics
import sysconfig
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import _arrays, _compile, _environment, conventions, forward, reference
from .api import Backend, lightning_attention

Array = np.ndarray[Any, Any]

# Relative RMS against float64: what the tests demand of the library.
BOUNDS = {"float64": 1e-12, "float32": 2e-6, "float16": 4e-4, "bfloat16": 2.5e-3}
_DEFAULT_NUM_TOKENS = 65_536
_LENGTHS = (2_048, 8_192, 32_768)  # timed besides the whole text
_QUADRATIC_LENGTH = 2_048  # the O(n^2) form takes a fraction of a second there on two cores
_NUM_CHECKED_TOKENS, _MAX_CHECKED_HEADS = 32, 8


def demo(
    file: Path | None = None,
    *,
    num_heads: int = 8,
    head_dim: int = 64,
    dtype: forward.Dtype | None = None,
    backend: Backend = "auto",
    num_tokens: int | None = None,
) -> bool:
    """Run the attention on a text, print what it did, and return whether the error is within the bound.

    Parameters
    ----------
    file
        The text; Python's own library by default.
    num_heads, head_dim
        Of q, k and v.
    dtype
        By default bfloat16 on a GPU and float32 on the CPU.
    backend
        As of :func:`lightning_cupy.lightning_attention`.
    num_tokens
        Bytes of the text to take at most; 65,536 by default.

    Raises
    ------
    OSError
        When the file cannot be read.
    ValueError
        When it is empty, or when the attention refuses the head_dim.
    RuntimeError
        When ``backend="cuda"`` cannot run here.
    """
    if backend == "cuda":
        _environment.require_cuda("backend='cuda'")
    device = _Gpu() if backend == "cuda" or (backend == "auto" and _environment.prefers_gpu()) else _Cpu()
    dtype = dtype or device.default_dtype
    text, source = _read_text(file, num_tokens or _DEFAULT_NUM_TOKENS)
    slopes = conventions.slopes(num_heads)
    half_lives = np.log(2) / np.asarray(slopes)
    _print_lines(
        "Lightning Attention on real text",
        ("text", source),
        ("tokens", f"{len(text):,}, one a byte; {num_heads} heads of {head_dim} in {dtype}"),
        ("q, k, v", "for each byte value and head a random vector (seed 0); q and k turned by position (rotary)"),
        ("decay", f"the heads forget half in {min(half_lives):.1f} to {max(half_lives):.1f} tokens"),
    )
    _print_lines("Device", *device.in_words(dtype, len(text), num_heads, head_dim))

    inputs = embed(text, num_heads, head_dim, dtype)
    arrays = [device.upload(array) for array in inputs]

    def attend(seqlen: int) -> Any:
        q, k, v = (array[:seqlen] for array in arrays)
        return lightning_attention(q, k, v, slopes=slopes, backend=device.backend)

    num_cached = len(_compile.cached_files())
    o, cold, temporary_bytes = device.first_call(lambda: attend(len(text)))
    num_compiled = len(_compile.cached_files()) - num_cached
    lengths = [length for length in _LENGTHS if length < len(text)] + [len(text)]
    warm = {length: device.seconds(attend, length) for length in lengths}
    qkvo_bytes = sum(array.nbytes for array in (*inputs, o))
    state_bytes = num_heads * head_dim**2 * (8 if dtype == "float64" else 4)
    _print_lines(
        "Time and memory",
        ("first call", in_time(cold) + (f", {num_compiled} kernels compiled in it and kept" if num_compiled else "")),
        ("warm", f"{in_time(warm[len(text)])}, {device.how_timed}"),
        ("speed", f"{len(text) / warm[len(text)]:,.0f} tokens/s"),
        ("memory", f"{in_bytes(qkvo_bytes)} for q, k, v and o; {in_bytes(temporary_bytes)} beside them"),
        ("state", f"{in_bytes(state_bytes)} hold all that a next token needs of those before it"),
    )
    error, num_rows = error_of_rows(o, *inputs, slopes)
    passed = error <= BOUNDS[dtype]
    _print_lines(
        "Checked against the O(n^2) definition in float64",
        ("outputs", f"{num_rows} vectors of {head_dim}, from the first token to the last"),
        ("error", f"{error:.2g} relative RMS"),
        ("bound", f"{BOUNDS[dtype]:g} for {dtype}: {'passed' if passed else 'FAILED'}"),
    )
    _print_table(warm, *_quadratic_seconds(inputs, slopes), num_heads, device.backend)
    return passed


def embed(text: Array, num_heads: int, head_dim: int, dtype: str) -> tuple[Array, Array, Array]:
    """Turn bytes ``[seqlen]`` into q, k and v ``[seqlen, num_heads, head_dim]``.

    Each byte value has normal random vectors, always the same, for q, k and v of each head. Then q and k are turned
    by their position, as rotary embedding does it (arXiv 2104.09864, equation 34).
    """
    tables = np.random.default_rng(0).standard_normal((3, 256, num_heads, head_dim), dtype=np.float32)
    half = head_dim // 2
    angles = np.arange(len(text))[:, None, None] * 10_000.0 ** (-np.arange(half) / max(half, 1))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    q, k, v = (table[text] for table in tables)
    for x in (q, k):
        first, second = x[..., :half].copy(), x[..., half : 2 * half].copy()
        x[..., :half] = first * cos - second * sin
        x[..., half : 2 * half] = second * cos + first * sin
    wanted = _arrays.dtype_of(dtype)
    return q.astype(wanted, copy=False), k.astype(wanted, copy=False), v.astype(wanted, copy=False)


def error_of_rows(o: Array, q: Array, k: Array, v: Array, slopes: Sequence[float] | Array) -> tuple[float, int]:
    """Return the relative RMS error of some rows of `o` against the closed form in float64, and their number.

    The row of token t is ``scale * sum_j exp(-slope (t - j)) (q_t k_j) v_j`` over j from 0 to t: alone it needs
    t + 1 weights, where all rows together need n^2.
    """
    seqlen, num_heads, head_dim = q.shape
    tokens = np.unique(np.linspace(0, seqlen - 1, _NUM_CHECKED_TOKENS).astype(int))
    heads = np.unique(np.linspace(0, num_heads - 1, _MAX_CHECKED_HEADS).astype(int))
    squared_error = squared_norm = 0.0
    for head in heads:
        q_head, k_head, v_head = (array[:, head].astype(np.float64) for array in (q, k, v))
        for token in tokens:
            decay = np.exp(-float(slopes[head]) * np.arange(token, -1, -1))
            expected = head_dim**-0.5 * (decay * (k_head[: token + 1] @ q_head[token])) @ v_head[: token + 1]
            squared_error += np.sum((o[token, head].astype(np.float64) - expected) ** 2)
            squared_norm += np.sum(expected**2)
    return float(np.sqrt(squared_error / squared_norm)), len(tokens) * len(heads)


def in_bytes(num_bytes: float) -> str:
    """1234567 -> "1.2 MB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes, units = num_bytes / 1000, units[1:]
    return f"{num_bytes:.1f} {units[0]}" if num_bytes < 100 and units[0] != "bytes" else f"{num_bytes:.0f} {units[0]}"


def in_time(seconds: float) -> str:
    """0.0123 -> "12.3 ms", 400 -> "6.7 min"."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= (2 if size > 1 else 1) * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


class _Cpu:
    """How the demo runs and times host arrays."""

    backend: Backend = "cpu"
    default_dtype: forward.Dtype = "float32"
    how_timed = "median of up to 3 calls"

    def in_words(self, *_: Any) -> list[tuple[str, str]]:
        return [
            ("device", f"CPU, {platform.machine()}, {os.cpu_count()} cores"),
            ("kernel", "none: the chunked form in NumPy; on a CUDA GPU, those in kernels_cu"),
        ]

    def upload(self, array: Array) -> Array:
        return array

    def first_call(self, call: Callable[[], Array]) -> tuple[Array, float, int]:
        """Return the output, the time, and the bytes held at most besides inputs and output."""
        tracemalloc.start()
        start = time.perf_counter()
        o = call()
        seconds = time.perf_counter() - start
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return o, seconds, max(peak_bytes - o.nbytes, 0)

    def seconds(self, call: Callable[[int], Any], seqlen: int) -> float:
        times: list[float] = []
        while len(times) < 3 and sum(times) < 1:
            start = time.perf_counter()
            call(seqlen)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class _Gpu:
    """How the demo runs and times arrays on the current CUDA device."""

    backend: Backend = "cuda"
    default_dtype: forward.Dtype = "bfloat16"
    num_calls = 20
    how_timed = f"mean of {num_calls} calls, by events on the device"

    def in_words(self, dtype: forward.Dtype, seqlen: int, num_heads: int, head_dim: int) -> list[tuple[str, str]]:
        import cupy

        device = cupy.cuda.Device()
        name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        num_sms = device.attributes["MultiProcessorCount"]
        problem = forward.contiguous_problem(device.id, dtype, 1, seqlen, num_heads, head_dim, head_dim)
        return [
            ("device", f"{name}, sm_{_compile.arch_name(problem.compute_capability)}, {num_sms} SMs"),
            *(
                (
                    "launch",
                    f"kernels_cu/{launch.file}, {launch.grid[0] * launch.grid[1]:,} blocks of {launch.block[0]} "
                    f"threads with {launch.smem_bytes / 1024:.0f} KiB of shared memory",
                )
                for launch in forward.steps_for(problem).launches
            ),
        ]

    def upload(self, array: Array) -> Any:
        import cupy

        # As plain bytes, so that no dtype is unknown to CuPy.
        return cupy.asarray(array.view(f"u{array.itemsize}")).view(array.dtype)

    def first_call(self, call: Callable[[], Any]) -> tuple[Array, float, int]:
        """Return the output on the host, the time without that copy, and the bytes taken besides the output."""
        import cupy

        pool = cupy.get_default_memory_pool()
        bytes_before = pool.total_bytes()
        start = time.perf_counter()
        o = call()
        cupy.cuda.get_current_stream().synchronize()
        seconds = time.perf_counter() - start
        return cupy.asnumpy(o), seconds, max(pool.total_bytes() - bytes_before - o.nbytes, 0)

    def seconds(self, call: Callable[[int], Any], seqlen: int) -> float:
        import cupy

        call(seqlen)  # another length may be cut in another number of segments, which takes other kernels
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        for _ in range(self.num_calls):
            call(seqlen)
        stop.record()
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop)) / 1e3 / self.num_calls


def _read_text(file: Path | None, num_tokens: int) -> tuple[Array, str]:
    """Return the first bytes of the file, or of the library that comes with Python, and what they are."""
    if file is not None:
        files, name = [file], str(file)
    else:
        # A Python may come without its sources, the kernels do not.
        folder = Path(sysconfig.get_path("stdlib"))
        files = sorted(folder.glob("*.py")) or sorted(_compile.kernels_dir().glob("*.cu*"))
        name = f"{files[0].parent}, {len(files)} files"
    content = b""
    for path in files:
        with path.open("rb") as stream:
            content += stream.read(num_tokens - len(content))
    if not content:
        raise ValueError(f"the text must have a byte at least, but {name} is empty")
    total = sum(path.stat().st_size for path in files)
    part = f"the first {len(content):,} of {total:,} bytes" if len(content) < total else f"all {total:,} bytes"
    return np.frombuffer(content, np.uint8), f"{name}, {part}"


def _quadratic_seconds(inputs: Sequence[Array], slopes: Array) -> tuple[int, float]:
    """Return a length, at most that of the inputs, and the time that the O(n^2) form takes on it, on the CPU."""
    q, k, v = (array[:_QUADRATIC_LENGTH] for array in inputs)
    return len(q), _Cpu().seconds(lambda n: reference.quadratic(q[:n], k[:n], v[:n], slopes=slopes), len(q))


def _print_lines(title: str, *lines: tuple[str, str]) -> None:
    print(title)
    for label, words in lines:
        print(f"  {label:<12}{words}")
    print(flush=True)


def _print_table(
    warm: dict[int, float], quadratic_length: int, quadratic_seconds: float, num_heads: int, backend: Backend
) -> None:
    """Print times against the length; those of the O(n^2) form grow with its square from the one measured."""
    print(f"Time, beside the O(n^2) form{' (that on the CPU)' if backend == 'cuda' else ''}")
    print(f"  {'tokens':>10}{'lightning':>12}{'O(n^2)':>12}  {'':<12}{'its matrices':>14}")
    for length, seconds in warm.items():
        growth = (length / quadratic_length) ** 2
        how = "measured" if length == quadratic_length else "extrapolated"
        quadratic, matrices = in_time(quadratic_seconds * growth), in_bytes(4 * num_heads * length**2)
        print(f"  {length:>10,}{in_time(seconds):>12}{quadratic:>12}  {how:<12}{matrices:>14}")
