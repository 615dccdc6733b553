"""Public functions: docstring, checks, choice of GPU or CPU."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np

from . import _arrays, _calls, _environment, _run
from ._arrays import View
from .reference import Gradients

Array = TypeVar("Array")
Backend = Literal["auto", "cuda", "cpu"]
Precision = Literal["default", "high"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_HEAD_DIM = 256


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

    Tensors of torch that require grad have gradients, once, and under ``torch.autocast`` q, k and v are cast as for a
    matmul. NumPy and CuPy arrays have them by :func:`lightning_attention_backward`.

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
    way: Callable[..., Any] = attend
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        if torch.compiler.is_compiling():
            from .torch import trace as way  # NOTE: Dynamo would guard on what sys.modules lacks until the import
        else:
            adapter: Any = sys.modules.get("lightning_cupy.torch")  # the statement below takes a microsecond
            if adapter is None:
                from . import torch as adapter
            way = adapter.attend
    return way(q, k, v, out, slopes, scale, causal, initial_state, return_state, precision, backend)


def attend(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    slopes: Any,
    scale: float | None,
    causal: bool,
    initial_state: Any,
    return_state: bool,
    precision: Precision,
    backend: Backend,
) -> Any:
    """`lightning_attention` without gradients."""
    signature, pointers, call = _calls.look_up(
        q, k, v, out, slopes, scale, causal, initial_state, return_state, precision, backend
    )
    if call is not None:
        return call(q, out, pointers)

    _check_backend(backend)
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

    if signature is not None and not isinstance(decay, View) and _arrays.kind_of(slopes) == views["q"].kind:
        signature = None  # of slopes in host memory it has no values
    options = _run.Options(decay, scale, bool(causal), bool(return_state), precision == "high")
    place = _place(views["q"], backend)
    if place == "device":
        o, state = _run.on_device(views, options, signature)
    elif place == "through device":
        o, state = _run.through_device(views, options)
    else:
        o, state = _run.on_host(views, options)
    if out is None:
        result = _arrays.give_back(o, views["q"])
    else:
        _arrays.note_write(views["out"])
        result = out
    return (result, _arrays.give_back(state, views["q"])) if state is not None else result


def lightning_attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    slopes: float | Sequence[float] | Any | None = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    dstate: Array | None = None,
    wanted: Collection[str] | None = None,
    backend: Backend = "auto",
) -> Gradients:
    """Gradients of :func:`lightning_attention` with respect to all that goes into it.

    With ``G_t``, the gradient of the state ``S_t``, counted from the last token, where `dstate` stands for all that is
    behind it::

        G_t  = scale * q_t do_t^T + exp(-slope) G_(t+1)
        dq_t = scale * S_t do_t        dk_t = G_t v_t        dv_t = G_t^T k_t
        dinitial_state = exp(-slope) G_1
        dslope = - sum over t of exp(-slope) <G_t, S_(t-1)>

    which is the backward pass of Lightning Attention-2 (arXiv 2401.04658, algorithm 2), and the derivative of the
    recurrence with respect to its decay. Nothing of the forward pass is wanted but what went into it: states are
    computed again.

    Parameters
    ----------
    do : array of q's kind, dtype and device, shape of v
        Gradient of the outputs, with any strides: it may be broadcast.
    q, k, v, slopes, scale, causal, initial_state, backend
        As of the forward pass.
    dstate : array, shape of the state, optional
        Gradient of the state behind the last token, in float32 (float64 for float64 inputs); zeros by default.
    wanted : collection of names of fields of the result, optional
        What to compute; the rest is None, and costs nothing, but that a GPU may make dv for "dinitial_state" and dq for
        "dslopes", for itself. By default "dq", "dk" and "dv", with "dinitial_state" if there is an `initial_state`,
        and "dslopes" if there are `slopes`.

    Returns
    -------
    gradients : named tuple ``(dq, dk, dv, dinitial_state, dslopes)`` of arrays of q's kind
        dq, dk and dv in their inputs' shapes and dtype. ``dinitial_state`` in the shape of the state, and ``dslopes``,
        ``[num_heads]`` and summed over the batch (one slope of all heads has their sum), in float32 (float64 for
        float64 inputs). Contiguous, and like results of the forward pass else.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`lightning_attention` does.

    Examples
    --------
    >>> import numpy as np, lightning_cupy
    >>> q, k, v, do = np.random.default_rng(0).standard_normal((4, 1000, 8, 64), dtype=np.float32)
    >>> gradients = lightning_cupy.lightning_attention_backward(do, q, k, v, slopes=0.1)
    >>> gradients.dq.shape, gradients.dslopes.shape
    ((1000, 8, 64), (8,))
    """
    return attend_backward(do, q, k, v, slopes, scale, causal, initial_state, dstate, wanted, backend)


def attend_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    slopes: Any,
    scale: float | None,
    causal: bool,
    initial_state: Any,
    dstate: Any,
    wanted: Collection[str] | None,
    backend: Backend,
) -> Gradients:
    """`lightning_attention_backward`, with arguments by position."""
    signature, pointers, call = _calls.look_up_backward(
        do, q, k, v, slopes, scale, causal, initial_state, dstate, wanted, backend
    )
    if call is not None:
        return call(q, pointers)

    _check_backend(backend)
    arrays = {"q": q, "k": k, "v": v, "do": do, "initial_state": initial_state, "dstate": dstate}
    views = {
        name: _arrays.view(name, array)
        for name, array in arrays.items()
        if array is not None or name not in _run.STATES
    }
    _check_arrays(views)
    decay = _check_slopes(slopes, views["q"], causal)
    scale = _check_scale(scale, views["q"].shape[-1])
    names = _check_wanted(wanted, initial_state is not None, slopes is not None, bool(causal))
    if signature is not None and not isinstance(decay, View) and _arrays.kind_of(slopes) == views["q"].kind:
        signature = None  # of slopes in host memory it has no values
    options = _run.BackwardOptions(decay, scale, bool(causal), names)
    place = _place(views["q"], backend)
    if place == "device":
        gradients = _run.backward_on_device(views, options, signature)
    elif place == "through device":
        gradients = _run.backward_through_device(views, options)
    else:
        gradients = _run.backward_on_host(views, options)
    return Gradients(*(None if x is None else _arrays.give_back(x, views["q"]) for x in gradients))


def _check_wanted(
    wanted: Collection[str] | None, has_initial_state: bool, has_slopes: bool, causal: bool
) -> tuple[str, ...]:
    """Return names in the order of the result."""
    if wanted is None:
        wanted = ("dq", "dk", "dv") + ("dinitial_state",) * has_initial_state + ("dslopes",) * has_slopes
    elif isinstance(wanted, str):
        raise TypeError(f"wanted must be a collection of names, but got {wanted!r}")
    unknown = [name for name in wanted if name not in Gradients._fields]
    if unknown:
        raise ValueError(f"wanted must be names out of {', '.join(Gradients._fields)}, but got {unknown[0]!r}")
    if "dslopes" in wanted and not causal:
        raise ValueError("wanted must not have 'dslopes' with causal=False: decay needs an order of tokens")
    return tuple(name for name in Gradients._fields if name in wanted)


def _check_backend(backend: str) -> None:
    if backend not in ("auto", "cuda", "cpu"):
        raise ValueError(f"backend must be 'auto', 'cuda' or 'cpu', but got {backend!r}")


def _place(q: View, backend: str) -> Literal["device", "through device", "host"]:
    """Where to compute."""
    if q.device is not None and backend == "cpu":
        raise ValueError(f"backend='cpu' is for arrays on the CPU, but q is on {q.place}")
    if q.device is not None or backend == "cuda":
        _environment.require_cuda("backend='cuda'" if q.device is None else f"q is on {q.place}")
    if q.device is not None:
        return "device"
    return "through device" if backend == "cuda" or (backend == "auto" and _environment.prefers_gpu()) else "host"


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
    state_dtype = _run.state_dtype(q)
    for name, array in views.items():
        wanted = state_dtype if name in _run.STATES else q.dtype
        if array.dtype != wanted:
            raise TypeError(f"{name} must be {wanted} to go with q's {q.dtype}, but got {array.dtype}")
        if array.device != q.device:
            raise ValueError(f"{name} is on {array.place}, but q is on {q.place}")
    shape = _run.state_shape(q, v)
    for name in _run.STATES:
        if name in views and views[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, but got {views[name].shape}")
    if "do" in views and views["do"].shape != v.shape:
        raise ValueError(f"do has shape {views['do'].shape}, but v has {v.shape}")


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
    num_heads = _run.num_heads_of(q)
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
