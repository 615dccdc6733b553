"""Public functions: docstring, checks, choice of GPU or CPU."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np

from . import _arrays, _calls, _environment, forward, reference
from ._arrays import View
from ._launch import Buffer

Array = TypeVar("Array")
Backend = Literal["auto", "cuda", "cpu"]
Precision = Literal["default", "high"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class _Options:
    """The checked arguments that are not arrays in q's memory."""

    slopes: float | np.ndarray[Any, Any] | View  # one for all heads, float64 on the host, or on the device
    scale: float
    causal: bool
    return_state: bool
    high: bool


@overload
def lightning_attention(
    q: Array,
    k: Array,
    v: Array,
    out: Array | None = None,
    *,
    slopes: float | Sequence[float] | Any | None = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    return_state: Literal[False] = False,
    precision: Precision = "default",
    backend: Backend = "auto",
) -> Array: ...
@overload
def lightning_attention(
    q: Array,
    k: Array,
    v: Array,
    out: Array | None = None,
    *,
    slopes: float | Sequence[float] | Any | None = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    return_state: Literal[True],
    precision: Precision = "default",
    backend: Backend = "auto",
) -> tuple[Array, Array]: ...
@overload
def lightning_attention(
    q: Array,
    k: Array,
    v: Array,
    out: Array | None = None,
    *,
    slopes: float | Sequence[float] | Any | None = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    return_state: bool,
    precision: Precision = "default",
    backend: Backend = "auto",
) -> Array | tuple[Array, Array]: ...
def lightning_attention(
    q: Any,
    k: Any,
    v: Any,
    out: Any = None,
    *,
    slopes: float | Sequence[float] | Any | None = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Any = None,
    return_state: bool = False,
    precision: Precision = "default",
    backend: Backend = "auto",
) -> Any:
    """Causal linear attention with optional decay, blockwise (Lightning Attention).

    For each batch and head, with state ``S`` of shape ``[K, V]``::

        S_t = exp(-slope) S_{t-1} + k_t v_t^T
        o_t = scale * q_t^T S_t

    computed a chunk at a time as ``[(Q K^T) * M] V`` within the chunk plus ``Q S`` from the chunks before it, in
    O(n d^2 + n C d) for chunks of C tokens: Lightning Attention-2 (arXiv 2401.04658, equations 7 to 10) with the
    decay of arXiv 2307.14995.

    Parameters
    ----------
    q, k : array, ``[seqlen, K]``, ``[seqlen, num_heads, K]`` or ``[batch, seqlen, num_heads, K]``
        Queries and keys: NumPy, CuPy or torch arrays, or any that export DLPack, on the CPU or one CUDA device;
        float16, bfloat16, float32 or float64; K from 1 to 256; any strides.
    v : array, as k but with its own last axis V, 1 to 256
        Values.
    out : array of q's kind, dtype and device, shape of v, optional
        Where to write the result, in place; it may have any strides, but must not overlap an input. On CUDA, of
        CuPy or torch only: other DLPack producers do not say whether their arrays may be written.
    slopes : float, or ``[num_heads]`` array or sequence of floats (on a GPU float32 or float64), optional
        Decay rates per token, natural: history is multiplied by ``exp(-slope)`` once a token. None is no decay;
        negative slopes grow. Host values must be finite, and an array of them is copied to the GPU once and kept
        there (slopes that change from call to call belong on the GPU); values on a GPU are not looked at, which
        would make the host wait. See :func:`lightning_cupy.slopes` for those of published models.
    scale : float, optional
        Factor of ``q k^T``; ``1 / sqrt(K)`` by default.
    causal : bool, default True
        Without it every token attends to all: ``scale * Q (initial_state + K^T V)``, and slopes are not allowed.
    initial_state : array, ``[batch, num_heads, K, V]`` without the leading axes that q lacks, optional
        State before the first token, in float32 (float64 for float64 inputs); zeros by default. Not modified.
    return_state : bool, default False
        Whether to return the state behind the last token too.
    precision : {"default", "high"}, default "default"
        "high" leaves only the rounding of the result in float16 and bfloat16, at up to 1.4 times the time; causal, on
        GPUs of compute capability 9.0, for arrays whose last axis is contiguous and whose pointers and other strides
        are multiples of 16 bytes. Everything else, but causal float16 and bfloat16 on GPUs, is as exact anyway.
    backend : {"auto", "cuda", "cpu"}, default "auto"
        Where arrays in host memory are computed: "auto" takes the GPU where there is one, and copies in and out; it
        warns, and takes the CPU, where there is one that cannot be used. CUDA arrays are computed where they are,
        and refuse "cpu".

    Returns
    -------
    o : array of q's kind, dtype and device, shape of v
        The outputs; `out` itself where it was given. Its memory is from the allocator of q's library (CuPy's for
        other DLPack producers), and work is queued on that library's current stream, without waiting for it.
        Host arrays are complete on return.
    state : array, ``[batch, num_heads, K, V]`` without the leading axes that q lacks
        With ``return_state=True``: the state behind the last token, float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong kind or value: the message names the argument, what is wanted and what it got.
    RuntimeError
        When a GPU is asked for, by ``backend="cuda"`` or by CUDA arrays, and CuPy, NVRTC, the driver or the device
        is missing or too old; the message says what mends it.

    Notes
    -----
    Sums and states are in float32 (float64 for float64 inputs). On GPUs of compute capability 9.0 products of float32
    with many heads are on tensor cores, of numbers split in two of float16, 22 bits together: as exact as float32 for
    numbers above 2^-18 of the largest of their token (for v, of their column in a chunk).

    The same call on the same kind of GPU gives the same bits. NaN in one batch row or head stays there; like infinity,
    it reaches the tokens before it in its chunk of at most 64, and everything after it. Slopes so negative that a chunk
    overflows float32, below -1.38 or so, give infinity or NaN from the first chunk on.

    In a CUDA graph, capture a call that has been made once before, with the same slopes if they are host values.

    Examples
    --------
    >>> import numpy as np, lightning_cupy
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1000, 8, 64), dtype=np.float32)
    >>> o, state = lightning_cupy.lightning_attention(q, k, v, slopes=0.1, return_state=True)
    >>> o.shape, state.shape
    ((1000, 8, 64), (8, 64, 64))
    """
    signature, pointers, call = _calls.look_up(
        q, k, v, out, slopes, scale, causal, initial_state, return_state, precision, backend
    )
    if call is not None:
        return call(q, out, pointers)

    if backend not in ("auto", "cuda", "cpu"):
        raise ValueError(f"backend must be 'auto', 'cuda' or 'cpu', but got {backend!r}")
    if precision not in ("default", "high"):
        raise ValueError(f"precision must be 'default' or 'high', but got {precision!r}")
    arrays = {"q": q, "k": k, "v": v, "out": out, "initial_state": initial_state}
    optional = ("out", "initial_state")
    views = {
        name: _arrays.view(name, array) for name, array in arrays.items() if array is not None or name not in optional
    }
    _check_arrays(views)
    decay = _check_slopes(slopes, views["q"], causal)
    _check_out(views | ({"slopes": decay} if isinstance(decay, View) else {}))
    scale = _check_scale(scale, views["q"].shape[-1])

    on_host = views["q"].device is None
    if not on_host and backend == "cpu":
        raise ValueError(f"backend='cpu' is for arrays on the CPU, but q is on {views['q'].place}")
    if not on_host or backend == "cuda":
        _environment.require_cuda("backend='cuda'" if on_host else f"q is on {views['q'].place}")
    if signature is not None and not isinstance(decay, View) and _arrays.kind_of(slopes) == views["q"].kind:
        signature = None  # of slopes in host memory it has no values
    options = _Options(decay, scale, bool(causal), bool(return_state), precision == "high")
    if not on_host:
        o, state = _on_device(views, options, signature)
    elif backend == "cuda" or (backend == "auto" and _environment.prefers_gpu()):
        o, state = _through_device(views, options)
    else:
        o, state = _on_host(views, options)
    if out is None:
        result = _arrays.give_back(o, views["q"])
    else:
        _arrays.note_write(views["out"])
        result = out
    return (result, _arrays.give_back(state, views["q"])) if state is not None else result


def _check_arrays(views: dict[str, View]) -> None:
    q, k, v = views["q"], views["k"], views["v"]
    if len(q.shape) not in (2, 3, 4):
        raise ValueError(
            "q must have shape [seqlen, head_dim], [seqlen, num_heads, head_dim] or "
            f"[batch, seqlen, num_heads, head_dim], but got {q.shape}"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be one of {', '.join(DTYPES)}, but got {q.dtype}")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {k.shape}, but q has {q.shape}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"v has shape {v.shape}, but {(*q.shape[:-1], 'V')} is wanted to go with q's {q.shape}")
    for name in ("q", "v"):
        head_dim = views[name].shape[-1]
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head_dim from 1 to {MAX_HEAD_DIM}, but got {head_dim}")
    state_dtype = "float64" if q.dtype == "float64" else "float32"
    wanted = {"k": q.dtype, "v": q.dtype, "out": q.dtype, "initial_state": state_dtype}
    for name, array in views.items():
        if array.dtype != wanted.get(name, q.dtype):
            raise TypeError(f"{name} must be {wanted[name]} to go with q's {q.dtype}, but got {array.dtype}")
        if array.device != q.device:
            raise ValueError(f"{name} is on {array.place}, but q is on {q.place}")
    if "initial_state" in views:
        shape = _state_shape(q, v)
        if views["initial_state"].shape != shape:
            raise ValueError(f"initial_state must have shape {shape}, but got {views['initial_state'].shape}")


def _check_out(views: dict[str, View]) -> None:
    if "out" not in views:
        return
    out = views["out"]
    if out.shape != views["v"].shape:
        raise ValueError(f"out must have v's shape {views['v'].shape}, but got {out.shape}")
    if out.kind != views["q"].kind:
        raise TypeError(f"out must be of q's kind, {views['q'].kind}, but got {out.kind}")
    if not out.writable:
        unknown = out.kind == "dlpack" and out.device is not None
        got = "one whose library does not say whether it is" if unknown else "a read-only array"
        raise ValueError(f"out must be writable, but got {got}")
    if _arrays.overlaps_itself(out):
        raise ValueError(f"out must have an address for each element, but got strides {out.strides} for {out.shape}")
    for name, array in views.items():
        if name != "out" and _arrays.overlap(out, array):
            raise ValueError(f"out must not overlap an input, but it shares memory with {name}")


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a real number, but got {type(scale).__name__}")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, but got {value}")
    return value


def _check_slopes(slopes: Any, q: View, causal: bool) -> float | np.ndarray[Any, Any] | View:
    """Return one slope for all heads, a float64 host array, or a view of a device array."""
    if slopes is None:
        return 0.0
    if isinstance(slopes, str):
        raise TypeError(
            f"slopes must be real numbers, but got {slopes!r}; lightning_cupy.slopes makes those of presets"
        )
    if not causal:
        raise ValueError("slopes must be None with causal=False: decay needs an order of tokens")
    num_heads = q.shape[-2] if len(q.shape) > 2 else 1
    if _arrays.kind_of(slopes) is not None:
        borrowed = _arrays.view("slopes", slopes)
        if borrowed.device is not None:
            if borrowed.device != q.device:
                raise ValueError(f"slopes are on {borrowed.place}, but q is on {q.place}")
            if borrowed.dtype not in ("float32", "float64"):
                raise TypeError(f"slopes on a GPU must be float32 or float64, but got {borrowed.dtype}")
            if borrowed.shape != (num_heads,):
                raise ValueError(f"slopes must have shape {(num_heads,)}, but got {borrowed.shape}")
            return borrowed
        slopes = _arrays.as_numpy(borrowed)
    try:
        values = np.asarray(slopes)
    except ValueError as error:
        raise ValueError(f"slopes must be one number or have shape {(num_heads,)}, but got {slopes!r}") from error
    if values.dtype.kind not in "fiu" and values.dtype.name != "bfloat16":
        raise TypeError(f"slopes must be real numbers, but got {values.dtype}")
    values = values.astype(np.float64)
    if values.shape not in ((), (num_heads,)):
        raise ValueError(f"slopes must be one number or have shape {(num_heads,)}, but got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"slopes must be finite, but got {values}")
    return float(values) if values.ndim == 0 else values


def _state_shape(q: View, v: View) -> tuple[int, ...]:
    # The leading axes are those of q without the tokens, [batch] and [num_heads].
    return (*q.shape[:-3], *q.shape[-2:-1][: len(q.shape) - 2], q.shape[-1], v.shape[-1])


def _four_axes(array: View) -> View:
    """``[batch, seqlen, num_heads, head_dim]`` of q, k, v or o."""
    if len(array.shape) == 2:
        (n, d), (token, dim) = array.shape, array.strides
        return array.with_axes((1, n, 1, d), (0, token, 0, dim))
    if len(array.shape) == 3:
        return array.with_axes((1, *array.shape), (0, *array.strides))
    return array


def _four_axes_of_state(state: View) -> View:
    missing = 4 - len(state.shape)
    return state.with_axes((1,) * missing + state.shape, (0,) * missing + state.strides)


def _on_device(views: dict[str, View], options: _Options, signature: _calls.Signature | None) -> tuple[Any, Any]:
    """Return o, which is None where `out` is given, and the state, which is None where it is not returned."""
    q, slopes = views["q"], options.slopes
    assert q.device is not None
    stream = _arrays.stream_of(q)
    if isinstance(slopes, View):
        views = views | {"slopes": slopes}
    # Arrays of other libraries than q's are lent to q's stream.
    views = views | {name: _arrays.lend(name, array, stream) for name, array in views.items() if array.kind != q.kind}
    borrowed = [array for array in views.values() if array.kind != q.kind or array.kind == "dlpack"]
    if isinstance(slopes, np.ndarray):
        views = views | {"slopes": _uploaded_slopes(slopes.tobytes(), q.device)}

    call = _resolve(views, options)
    pointers = {"o" if name == "out" else name: array.pointer for name, array in views.items()}
    with call.program.device():
        results = call.program.run([pointers.get(name, 0) for name in forward.ARRAYS], q.owner)
    if signature is not None:
        _calls.keep(signature, call)
    for array in borrowed:
        _arrays.end_loan(array, stream)
    o = results.pop(0) if "out" not in views else None
    return o, results.pop() if results else None


def _resolve(views: dict[str, View], options: _Options) -> _calls.Call:
    """Compile and load what the call needs, and note what later calls like it must know."""
    from cupy.cuda import driver

    q, v, slopes = views["q"], views["v"], options.slopes
    results = [] if "out" in views else [Buffer("o", v.shape, q.dtype)]
    if options.return_state:
        state_dtype = "float64" if q.dtype == "float64" else "float32"
        results.append(Buffer("final_state", _state_shape(q, v), state_dtype))
    program = forward.forward(
        _four_axes(views["out"]) if "out" in views else None,
        _four_axes(q),
        _four_axes(views["k"]),
        _four_axes(v),
        slopes=slopes if isinstance(slopes, float) else views["slopes"],
        scale=options.scale,
        causal=options.causal,
        initial_state=_four_axes_of_state(views["initial_state"]) if "initial_state" in views else None,
        results=results,
        high=options.high,
    )
    inputs = [(idx, views[name]) for idx, name in enumerate(forward.ARRAYS) if name in views] if "out" in views else []
    return _calls.Call(
        program,
        options.return_state,
        slopes=views["slopes"].pointer if isinstance(slopes, np.ndarray) else 0,
        reach_of_out=views["out"].reach if "out" in views else None,
        reaches=tuple((idx, *array.reach) for idx, array in inputs),
        note_write=_arrays.library_of(q).note_write,
        current_context=driver.ctxGetCurrent,
    )


@functools.cache
def _uploaded_slopes(values: bytes, device_id: int) -> View:
    """Slopes on the device, float64. Kept for good: captured graphs and other streams may still read them."""
    import cupy

    # A stream of its own: the copy waits for none of the caller's work, and is complete for every stream.
    with cupy.cuda.Device(device_id), cupy.cuda.Stream(non_blocking=True) as stream:
        slopes = cupy.asarray(np.frombuffer(values, np.float64))
        stream.synchronize()
    return _arrays.view("slopes", slopes)


def _through_device(views: dict[str, View], options: _Options) -> tuple[Any, Any]:
    """Copy host arrays to the current CUDA device, compute, and copy the results back."""
    import cupy

    def upload(array: View) -> View:
        # Bytes travel as they are, so no dtype of NumPy's is unknown to CuPy.
        contiguous = np.ascontiguousarray(_arrays.as_numpy(array), _arrays.dtype_of(array.dtype))
        return _arrays.view("array", cupy.asarray(contiguous.view(f"u{array.itemsize}")).view(contiguous.dtype))

    def download(result: Any, target: View) -> Any:
        _arrays.as_numpy(target)[...] = cupy.asnumpy(result)
        return target.owner

    inputs = {name: upload(array) for name, array in views.items() if name != "out"}
    o, state = _on_device(inputs, options, signature=None)
    q = views["q"]
    o = download(o, views["out"] if "out" in views else _arrays.empty(q, o.shape, q.dtype))
    return o, download(state, _arrays.empty(q, state.shape, state.dtype.name)) if state is not None else None


def _on_host(views: dict[str, View], options: _Options) -> tuple[Any, Any]:
    q, k, v = views["q"], views["k"], views["v"]
    assert not isinstance(options.slopes, View)
    o = views["out"] if "out" in views else _arrays.empty(q, v.shape, q.dtype)
    _, final_state = reference.chunked(
        _arrays.as_numpy(q),
        _arrays.as_numpy(k),
        _arrays.as_numpy(v),
        _arrays.as_numpy(o),
        slopes=options.slopes,
        scale=options.scale,
        causal=options.causal,
        initial_state=_arrays.as_numpy(views["initial_state"]) if "initial_state" in views else None,
    )
    if not options.return_state:
        return o.owner, None
    state = _arrays.empty(q, final_state.shape, final_state.dtype.name)
    _arrays.as_numpy(state)[...] = final_state
    return o.owner, state.owner
