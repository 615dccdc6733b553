"""torch tensors: how they are read, their gradients, autocast, torch.compile, and a layer.

The only module that needs torch. ``lightning_cupy.lightning_attention`` hands calls on tensors over to `attend` here,
and in torch.compile to `trace`; what is left to compute comes back to `api.attend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

from . import _arrays, api
from ._arrays import View
from ._layer import LightningAttention
from .reference import Gradients

__all__ = ["LightningAttention"]

_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def view(name: str, tensor: torch.Tensor) -> View:
    """Borrow a dense tensor on the CPU or a CUDA device.

    Raises
    ------
    TypeError
        When it is sparse, or on another kind of device.
    ValueError
        When it requires grad while gradients are being recorded.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but no gradient would be recorded: "
            f"pass {name}.detach(), or call it under torch.no_grad()"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, but a dense tensor (torch.strided) is wanted")
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} is on device {tensor.device}, but the CPU or a CUDA device is wanted")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazily negated view: pass {name}.resolve_neg()")
    return View(
        tensor.detach() if tensor.requires_grad else tensor,
        "torch",
        tuple(tensor.shape),
        tensor.stride(),
        _NAMES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch."),
        tensor.device.index if tensor.is_cuda else None,
        tensor.data_ptr(),
    )


def _read(tensor: torch.Tensor) -> tuple[tuple[Any, ...], int]:
    address = tensor.data_ptr()  # raises a RuntimeError where the layout is not strided
    facts = (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        address % 16,
        tensor.requires_grad and torch.is_grad_enabled(),
        tensor.is_neg(),
    )
    return facts, address


def _allocator(like: torch.Tensor, shape: tuple[int, ...], dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    torch_dtype, device = _DTYPES[dtype], like.device
    if like.shape == shape and like.dtype is torch_dtype and like.is_contiguous():
        return torch.empty_like  # takes half of the time
    return lambda _: torch.empty(shape, dtype=torch_dtype, device=device)


def _current_stream(device_id: int) -> int:
    return int(torch.cuda.current_stream(device_id).cuda_stream)


def note_write(tensor: torch.Tensor) -> None:
    """Tell autograd, which refuses to use a saved tensor that was written since."""
    torch.autograd.graph.increment_version(tensor)


@functools.cache
def library() -> _arrays.Library:
    """Return what a call on CUDA tensors asks of torch."""
    # What Triton launches with: a tenth of the time that the public way takes, which makes a Stream.
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
    return _arrays.Library(_read, torch.Tensor.data_ptr, _allocator, stream, note_write)


def empty(like: View, shape: tuple[int, ...], dtype: str) -> View:
    """Allocate a tensor on the device of `like`."""
    return view("out", _allocator(like.owner, shape, dtype)(like.owner))


def as_numpy(borrowed: View) -> np.ndarray[Any, Any]:
    """Return a CPU tensor as a NumPy array that shares its memory."""
    tensor = borrowed.owner
    if tensor.dtype == torch.bfloat16:
        bits: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array


# Triton asks the same. The public ways take a microsecond.
_any_autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_functorch_is_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_grad_enabled = torch.is_grad_enabled


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
    precision: api.Precision,
    backend: api.Backend,
) -> Any:
    """`lightning_cupy.lightning_attention` on a tensor q: casts and records gradients where torch does."""
    if _any_autocast_enabled():
        q, k, v = _cast(q, k, v)
    if _is_grad_enabled() and (
        q.requires_grad
        or getattr(k, "requires_grad", False)
        or getattr(v, "requires_grad", False)
        or (slopes is not None and getattr(slopes, "requires_grad", False))
        or (initial_state is not None and getattr(initial_state, "requires_grad", False))
    ):
        if out is not None:
            raise ValueError(f"out must be None where an input requires grad, but got a {type(out).__name__}")
        function = _TransformedAttention if _functorch_is_active() else _Attention
        options = (scale, causal, return_state, precision, backend)
        return function.apply(q, k, v, slopes, initial_state, options)  # type: ignore[no-untyped-call]
    return api.attend(q, k, v, out, slopes, scale, causal, initial_state, return_state, precision, backend)


def trace(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    slopes: Any,
    scale: float | None,
    causal: bool,
    initial_state: Any,
    return_state: bool,
    precision: api.Precision,
    backend: api.Backend,
) -> Any:
    """`lightning_cupy.lightning_attention` on a tensor q in torch.compile and torch.export: one op."""
    if out is not None:
        raise ValueError(f"out must be None where torch.compile traces the call, but got a {type(out).__name__}")
    q, k, v = _cast(q, k, v)
    on_host: list[Any] | None = None
    if isinstance(slopes, np.ndarray):
        slopes = torch.as_tensor(slopes)
    elif isinstance(slopes, Sequence) and len(slopes) == 1:  # one number in a list is not that of all heads
        slopes = torch.tensor(slopes, dtype=torch.float64)
    elif slopes is not None and not isinstance(slopes, torch.Tensor):
        slopes, on_host = None, list(slopes) if isinstance(slopes, Sequence) else [slopes]
    o, state = _attention_op(q, k, v, slopes, on_host, initial_state, scale, causal, return_state, precision, backend)
    return (o, state) if return_state else o


def _cast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Cast what autocast would cast for a matmul: floats, but those of 64 bits."""
    device_type = q.device.type
    # Of other devices, some of which autocast does not know, the checks of arguments have to say that they are wrong.
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return q, k, v
    dtype = torch.get_autocast_dtype(device_type)
    q, k, v = (
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (q, k, v)
    )
    return q, k, v


class _Attention(torch.autograd.Function):
    """Gradients of eager calls, at less cost than those of an op."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, slopes: Any, initial_state: Any, options: tuple[Any, ...]) -> Any:
        scale, causal, return_state, precision, backend = options
        result = api.attend(q, k, v, None, slopes, scale, causal, initial_state, return_state, precision, backend)
        _save(ctx, (q, k, v, slopes, initial_state), (scale, causal, backend))
        return result

    @staticmethod
    def backward(ctx: Any, do: Any, dstate: Any = None) -> Any:
        # With create_graph=True, and always in torch.func, somebody may ask for gradients of these.
        backward = _backward_once if _is_grad_enabled() else api.attend_backward
        return *_gradients(ctx, ctx.needs_input_grad[:5], do, dstate, backward), None


class _TransformedAttention(_Attention):
    """The same for torch.func, which wants the context apart. That takes a signature to be inspected at each call."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, slopes: Any, initial_state: Any, options: tuple[Any, ...]) -> Any:  # type: ignore[override]
        scale, causal, return_state, precision, backend = options
        return api.attend(q, k, v, None, slopes, scale, causal, initial_state, return_state, precision, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *arrays, (scale, causal, _, _, backend) = inputs
        _save(ctx, arrays, (scale, causal, backend))


class _Backward(torch.autograd.Function):
    """`api.attend_backward`, which has no gradients itself, where there may be tensors that want them.

    NOTE: once_differentiable would return gradients that depend on nothing, hence second derivatives without that part.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return tuple(api.attend_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("lightning_attention can be differentiated once, but a gradient of a gradient is asked for")


def _backward_once(*arguments: Any) -> Gradients:
    return Gradients(*_Backward.apply(*arguments))  # type: ignore[no-untyped-call]


# Inputs of both functions that may want a gradient, as fields of Gradients.
_FIELDS = ("dq", "dk", "dv", "dslopes", "dinitial_state")


def _save(ctx: Any, arrays: Sequence[Any], options: tuple[Any, ...]) -> None:
    """Keep q, k, v, slopes and initial_state, of which one at least is a tensor; and scale, causal and backend."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*[x if isinstance(x, torch.Tensor) else None for x in arrays])
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in arrays]
    ctx.options = options


def _gradients(
    ctx: Any, needed: Sequence[bool], do: Any, dstate: Any, backward: Callable[..., Gradients]
) -> tuple[Any, ...]:
    """Return those of q, k, v, slopes and initial_state that are needed, and None for others."""
    if do is None and dstate is None:
        return (None,) * len(_FIELDS)
    q, k, v, slopes, initial_state = (
        other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)
    )
    if do is None:
        do = q.new_zeros(()).expand(v.shape)
    wanted = tuple([name for name, is_needed in zip(_FIELDS, needed, strict=True) if is_needed])
    scale, causal, backend = ctx.options
    found = backward(do, q, k, v, slopes, scale, causal, initial_state, dstate, wanted, backend)
    dslopes = found.dslopes
    if dslopes is not None:  # one slope of all heads has the sum
        dslopes = (dslopes if slopes.dim() else dslopes.sum()).to(slopes)
    return found.dq, found.dk, found.dv, dslopes, found.dinitial_state


@torch.library.custom_op(
    "lightning_cupy::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? slopes, float[]? slopes_on_host, Tensor? initial_state, "
    "float? scale, bool causal, bool return_state, str precision, str backend) -> (Tensor, Tensor)",
)
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor | None,
    slopes_on_host: Sequence[float] | None,
    initial_state: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    return_state: bool,
    precision: Any,
    backend: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One op for torch.compile; without `return_state` the state is empty."""
    decay = _decay(slopes, slopes_on_host)
    with torch.no_grad():
        result = api.attend(q, k, v, None, decay, scale, causal, initial_state, return_state, precision, backend)
    return result if return_state else (result, q.new_empty(0))


@_attention_op.register_fake
def _(q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return_state = rest[5]
    state = q.new_empty(_state_shape(q, v), dtype=_state_dtype(q)) if return_state else q.new_empty(0)
    return q.new_empty(v.shape), state


@torch.library.custom_op(
    "lightning_cupy::attention_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? slopes, float[]? slopes_on_host, Tensor? initial_state, "
    "Tensor? dstate, float? scale, bool causal, str[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward_op(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor | None,
    slopes_on_host: Sequence[float] | None,
    initial_state: torch.Tensor | None,
    dstate: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    wanted: Sequence[str],
    backend: Any,
) -> tuple[torch.Tensor, ...]:
    """Its gradients; those that are not wanted are empty."""
    decay = _decay(slopes, slopes_on_host)
    with torch.no_grad():
        found = api.attend_backward(do, q, k, v, decay, scale, causal, initial_state, dstate, tuple(wanted), backend)
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in found)


@_attention_backward_op.register_fake
def _(do: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    wanted, num_heads = rest[6], q.shape[-2] if q.dim() > 2 else 1
    facts: dict[str, tuple[Any, torch.dtype]] = {
        "dq": (q.shape, q.dtype),
        "dk": (k.shape, q.dtype),
        "dv": (v.shape, q.dtype),
        "dinitial_state": (_state_shape(q, v), _state_dtype(q)),
        "dslopes": ((num_heads,), _state_dtype(q)),
    }
    return tuple(
        q.new_empty(shape, dtype=dtype) if name in wanted else q.new_empty(0) for name, (shape, dtype) in facts.items()
    )


def _decay(slopes: torch.Tensor | None, on_host: Sequence[float] | None) -> Any:
    if on_host is None:
        return slopes
    return on_host[0] if len(on_host) == 1 else on_host


def _state_shape(q: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    return (*q.shape[:-3], *q.shape[-2:-1][: q.dim() - 2], q.shape[-1], v.shape[-1])


def _state_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, slopes, slopes_on_host, initial_state, scale, causal, ctx.return_state, _, backend = inputs
    _save(ctx, (q, k, v, slopes_on_host if slopes is None else slopes, initial_state), (scale, causal, backend))


def _backward_of_op(ctx: Any, do: Any, dstate: Any) -> tuple[Any, ...]:
    dstate = dstate if ctx.return_state else None
    q, k, v, slopes, _, initial_state, *rest = ctx.needs_input_grad
    *gradients, dinitial_state = _gradients(ctx, (q, k, v, slopes, initial_state), do, dstate, _backward_by_op)
    return *gradients, None, dinitial_state, *(None for _ in rest)


def _backward_by_op(do: Any, q: Any, k: Any, v: Any, decay: Any, scale: Any, causal: Any, *rest: Any) -> Gradients:
    initial_state, dstate, wanted, backend = rest
    slopes, on_host = (decay, None) if isinstance(decay, torch.Tensor) else (None, decay)
    found = _attention_backward_op(
        do, q, k, v, slopes, on_host, initial_state, dstate, scale, causal, list(wanted), backend
    )
    names = Gradients._fields
    return Gradients(*(x if name in wanted else None for name, x in zip(names, found, strict=True)))


_attention_op.register_autograd(_backward_of_op, setup_context=_setup_context)
