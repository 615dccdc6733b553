"""The adapter for torch tensors: the only module that needs torch; the bench borrows it where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

from . import _arrays
from ._arrays import View

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
            f"{name} requires grad, but lightning_attention computes no gradients yet: "
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
