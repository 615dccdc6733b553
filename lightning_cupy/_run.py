"""Where a call is computed: on its arrays' device, through one and back, or on the host; arguments are checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from . import _arrays, _calls, backward, forward, reference
from ._arrays import View
from ._launch import Buffer, current_device
from .reference import Gradients

STATES = ("initial_state", "dstate")


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked arguments that are not arrays in q's memory."""

    slopes: float | np.ndarray[Any, Any] | View  # one for all heads, float64 on the host, or on the device
    scale: float
    causal: bool
    return_state: bool
    high: bool


@dataclasses.dataclass(frozen=True)
class BackwardOptions:
    """Likewise of the backward pass."""

    slopes: float | np.ndarray[Any, Any] | View
    scale: float
    causal: bool
    wanted: tuple[str, ...]


_AnyOptions = TypeVar("_AnyOptions", Options, BackwardOptions)
_AnyCall = TypeVar("_AnyCall", _calls.Call, _calls.BackwardCall)


def state_shape(q: View, v: View) -> tuple[int, ...]:
    # The leading axes are those of q without the tokens, [batch] and [num_heads].
    return (*q.shape[:-3], *q.shape[-2:-1][: len(q.shape) - 2], q.shape[-1], v.shape[-1])


def state_dtype(q: View) -> str:
    return "float64" if q.dtype == "float64" else "float32"


def num_heads_of(q: View) -> int:
    return q.shape[-2] if len(q.shape) > 2 else 1


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


def on_device(views: dict[str, View], options: Options, signature: _calls.Signature | None) -> tuple[Any, Any]:
    """Return o, which is None where `out` is given, and the state, which is None where it is not returned."""
    results = _queue(views, options, _resolve, signature)
    o = results.pop(0) if "out" not in views else None
    return o, results.pop() if results else None


def backward_on_device(
    views: dict[str, View], options: BackwardOptions, signature: _calls.Signature | None
) -> list[Any]:
    """Return the fields of the result."""
    results = iter(_queue(views, options, _resolve_backward, signature))
    return [next(results) if name in options.wanted else None for name in Gradients._fields]


def _queue(
    views: dict[str, View],
    options: _AnyOptions,
    resolve: Callable[[dict[str, View], _AnyOptions], _AnyCall],
    signature: _calls.Signature | None,
) -> list[Any]:
    """Resolve a call on CUDA arrays, queue it, and keep it for later ones; return what it allocated."""
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

    pointers = {"o" if name == "out" else name: array.pointer for name, array in views.items()}
    with current_device(q.device):
        call = resolve(views, options)
        results = call.program.run([pointers.get(name, 0) for name in call.program.arrays], q.owner)
    if signature is not None:
        _calls.keep(signature, call)
    for array in borrowed:
        _arrays.end_loan(array, stream)
    return results


def _resolve(views: dict[str, View], options: Options) -> _calls.Call:
    """Compile and load what the call needs, and note what later calls like it must know."""
    from cupy.cuda import driver

    q, v, slopes = views["q"], views["v"], options.slopes
    results = [] if "out" in views else [Buffer("o", v.shape, q.dtype)]
    if options.return_state:
        results.append(Buffer("final_state", state_shape(q, v), state_dtype(q)))
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


def _resolve_backward(views: dict[str, View], options: BackwardOptions) -> _calls.BackwardCall:
    """Likewise for the backward pass."""
    from cupy.cuda import driver

    q, v, slopes = views["q"], views["v"], options.slopes
    facts = {
        "dq": (q.shape, q.dtype),
        "dk": (q.shape, q.dtype),
        "dv": (v.shape, q.dtype),
        "dinitial_state": (state_shape(q, v), state_dtype(q)),
        "dslopes": ((num_heads_of(q),), state_dtype(q)),
    }
    initial_state, dstate = (_four_axes_of_state(views[name]) if name in views else None for name in STATES)
    program = backward.backward(
        _four_axes(views["do"]),
        _four_axes(q),
        _four_axes(views["k"]),
        _four_axes(v),
        slopes=slopes if isinstance(slopes, float) else views["slopes"],
        scale=options.scale,
        causal=options.causal,
        initial_state=initial_state,
        dstate=dstate,
        results=[Buffer(name, *facts[name]) for name in options.wanted],
    )
    return _calls.BackwardCall(
        program,
        wanted=tuple(name in options.wanted for name in Gradients._fields),
        slopes=views["slopes"].pointer if isinstance(slopes, np.ndarray) else 0,
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


def through_device(views: dict[str, View], options: Options) -> tuple[Any, Any]:
    """Copy host arrays to the current CUDA device, compute, and copy the results back."""
    inputs = {name: _uploaded(array) for name, array in views.items() if name != "out"}
    o, state = on_device(inputs, options, signature=None)
    return _downloaded(o, views["q"], views.get("out")), _downloaded(state, views["q"])


def backward_through_device(views: dict[str, View], options: BackwardOptions) -> list[Any]:
    inputs = {name: _uploaded(array) for name, array in views.items()}
    return [_downloaded(x, views["q"]) for x in backward_on_device(inputs, options, signature=None)]


def _uploaded(array: View) -> View:
    import cupy

    # Bytes travel as they are, so no dtype of NumPy's is unknown to CuPy.
    contiguous = np.ascontiguousarray(_arrays.as_numpy(array), _arrays.dtype_of(array.dtype))
    return _arrays.view("array", cupy.asarray(contiguous.view(f"u{array.itemsize}")).view(contiguous.dtype))


def _downloaded(result: Any, like: View, target: View | None = None) -> Any:
    """Copy a result, if it is one, to host memory of the library of `like`."""
    import cupy

    return None if result is None else _copied(cupy.asnumpy(result), like, target)


def _copied(result: np.ndarray[Any, Any], like: View, target: View | None = None) -> Any:
    target = target or _arrays.empty(like, result.shape, result.dtype.name)
    _arrays.as_numpy(target)[...] = result
    return target.owner


def on_host(views: dict[str, View], options: Options) -> tuple[Any, Any]:
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
    return o.owner, _copied(final_state, q) if options.return_state else None


def backward_on_host(views: dict[str, View], options: BackwardOptions) -> list[Any]:
    assert not isinstance(options.slopes, View)
    arrays = {name: _arrays.as_numpy(array) for name, array in views.items()}
    gradients = reference.chunked_backward(
        *(arrays[name] for name in ("do", "q", "k", "v")),
        initial_state=arrays.get("initial_state"),
        dstate=arrays.get("dstate"),
        slopes=options.slopes,
        scale=options.scale,
        causal=options.causal,
        wanted=options.wanted,
    )
    return [None if x is None else _copied(x, views["q"]) for x in gradients]
