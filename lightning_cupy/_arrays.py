"""Adapters: whose array, where its elements are, on which device and stream; results in the caller's kind.

NumPy, CuPy and torch arrays are read directly; anything else comes through DLPack. Nothing is copied.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from . import _environment

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# DLPack device types whose memory the host can read, and those that kernels can.
_DLPACK_HOST, _DLPACK_CUDA = (1, 3), (2, 13)


@dataclasses.dataclass(frozen=True)
class View:
    """Where the elements of somebody's array are."""

    owner: Any  # the array; keeps the memory alive
    kind: str  # "numpy", "cupy", "torch" or "dlpack"
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str
    device: int | None  # CUDA ordinal; None is the host
    pointer: int
    writable: bool = True

    @property
    def place(self) -> str:
        """The device in words, for messages."""
        return "the CPU" if self.device is None else f"CUDA device {self.device}"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZES[self.dtype]

    @property
    def reach(self) -> tuple[int, int]:
        """The first byte, and that behind the last, counted from the pointer."""
        if 0 in self.shape:
            return 0, 0
        steps = [stride * (size - 1) for stride, size in zip(self.strides, self.shape, strict=True)]
        first, last = sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps)
        return first * self.itemsize, (last + 1) * self.itemsize

    def with_axes(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> View:
        """Return the same elements under other axes."""
        return dataclasses.replace(self, shape=shape, strides=strides)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def kind_of(array: Any) -> str | None:
    """Return "numpy", "cupy", "torch", "dlpack", or None for what is no array. Imports nothing."""
    if isinstance(array, np.ndarray):
        return None if isinstance(array, np.ma.MaskedArray) else "numpy"
    for library, type_name in (("torch", "Tensor"), ("cupy", "ndarray")):
        module = sys.modules.get(library)
        if module is not None and isinstance(array, getattr(module, type_name, ())):
            return library
    return "dlpack" if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__") else None


def view(name: str, array: Any) -> View:
    """Borrow an array.

    Parameters
    ----------
    name
        The argument's name, for messages.
    array
        What the caller passed.

    Raises
    ------
    TypeError
        When it is no array, or one whose elements cannot be reached.
    ValueError
        When it is a torch tensor that requires grad while gradients are being recorded.
    """
    kind = kind_of(array)
    if kind == "numpy":
        return _view_numpy(np.asarray(array))
    if kind == "cupy":
        return _view_cupy(name, array)
    if kind == "torch":
        from . import torch

        return torch.view(name, array)
    if kind == "dlpack":
        return _view_dlpack(name, array)
    raise TypeError(f"{name} must be a NumPy, CuPy or torch array, or export DLPack, but got {type(array).__name__}")


def _view_numpy(array: np.ndarray[Any, Any]) -> View:
    # NOTE: byte strides need not be multiples of the itemsize; host arrays are read by NumPy, never by stride here.
    strides = tuple(stride // max(array.itemsize, 1) for stride in array.strides)
    return View(array, "numpy", array.shape, strides, array.dtype.name, None, array.ctypes.data, array.flags.writeable)


def _view_cupy(name: str, array: Any) -> View:
    if any(stride % array.itemsize for stride in array.strides) or array.data.ptr % array.itemsize:
        raise TypeError(f"{name} has byte strides {array.strides}, but whole elements of {array.itemsize} are wanted")
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return View(array, "cupy", array.shape, strides, array.dtype.name, array.device.id, array.data.ptr)


def _namespace(array: Any) -> ModuleType | Any | None:
    """The library of a DLPack producer, if it can take arrays back."""
    if hasattr(array, "__array_namespace__"):
        namespace = array.__array_namespace__()
    else:
        namespace = sys.modules.get(type(array).__module__.partition(".")[0])
    return namespace if hasattr(namespace, "from_dlpack") else None


def _view_dlpack(name: str, array: Any) -> View:
    if _namespace(array) is None:
        raise TypeError(f"{name} is a {type(array).__name__}, whose library has no from_dlpack to give results back")
    device_type, device_id = array.__dlpack_device__()
    if device_type in _DLPACK_HOST:
        try:
            borrowed = _view_numpy(np.from_dlpack(array))
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name} is a {type(array).__name__} that NumPy cannot borrow: {error}") from error
    elif device_type in _DLPACK_CUDA:
        _environment.require_cuda(f"{name} is on CUDA device {device_id}")
        import cupy

        with cupy.cuda.Device(device_id):
            # NOTE: CuPy does not tell whether the producer calls its array read-only, as JAX does.
            borrowed = dataclasses.replace(_view_cupy(name, cupy.from_dlpack(array)), writable=False)
    else:
        raise TypeError(f"{name} is on DLPack device type {device_type}, but the CPU (1) or CUDA (2) is wanted")
    return dataclasses.replace(borrowed, owner=(array, borrowed.owner), kind="dlpack")


class StreamHandle:
    """A stream that somebody else owns, as launches (`ptr`) and the CUDA stream protocol ask for it."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr


def _let_wait(device_id: int, waiting: int, awaited: int) -> Any:
    """Make one stream wait for what is queued on another; return the event behind that."""
    import cupy

    with cupy.cuda.Device(device_id):
        event = cupy.cuda.Event(disable_timing=True)
        event.record(cupy.cuda.Stream.from_external(StreamHandle(awaited)))
        cupy.cuda.Stream.from_external(StreamHandle(waiting)).wait_event(event)
    return event


def lend(name: str, borrowed: View, stream: int) -> View:
    """Return a CUDA view for work on `stream`, which waits for what its library has queued on its own stream."""
    import cupy

    assert borrowed.device is not None
    if borrowed.kind != "dlpack":
        _let_wait(borrowed.device, stream, stream_of(borrowed))
        return borrowed
    owner = borrowed.owner[0]
    with cupy.cuda.Device(borrowed.device), cupy.cuda.Stream.from_external(StreamHandle(stream)):
        array = cupy.from_dlpack(owner)
    return dataclasses.replace(_view_cupy(name, array), owner=(owner, array), kind="dlpack")


# Arrays of libraries whose streams are unknown, each with the event behind the work that reads it.
_in_use: list[tuple[Any, Any]] = []
_in_use_lock = threading.Lock()


def end_loan(borrowed: View, stream: int) -> None:
    """Keep the memory of a CUDA view from being used anew before the work queued on `stream` is done.

    The streams of CuPy and torch are made to wait. Of another library only the array can be held, until a later
    call finds the work done.
    """
    import cupy

    assert borrowed.device is not None
    if borrowed.kind != "dlpack":
        _let_wait(borrowed.device, stream_of(borrowed), stream)
    elif not cupy.cuda.Stream.from_external(StreamHandle(stream)).is_capturing():  # a graph's owner keeps its arrays
        event = _let_wait(borrowed.device, stream, stream)
        with _in_use_lock:
            _in_use[:] = [loan for loan in _in_use if not loan[0].done]
            _in_use.append((event, borrowed.owner))


class Library(NamedTuple):
    """What a call asks of CuPy or torch, about arrays on a CUDA device; as cheap as can be."""

    # All of an array that the checks and launches depend on, but where it is; and its pointer.
    read: Callable[[Any], tuple[tuple[Any, ...], int]]
    pointer: Callable[[Any], int]
    # For arrays like one, a shape and a dtype: what makes contiguous ones on their device, which must be current.
    allocator: Callable[[Any, tuple[int, ...], str], Callable[[Any], Any]]
    stream: Callable[[int], int]  # the current one on a device
    note_write: Callable[[Any], None]  # elements have changed


_libraries: dict[type, Library] = {}


def library_of_type(array_type: type) -> Library | None:
    """Return the library whose arrays are just of this type, if it is CuPy or torch. Imports neither."""
    found = _libraries.get(array_type)
    if found is None:
        if array_type is getattr(sys.modules.get("cupy"), "ndarray", None):
            found = _libraries[array_type] = _cupy_library()
        elif array_type is getattr(sys.modules.get("torch"), "Tensor", None):
            from . import torch

            found = _libraries[array_type] = torch.library()
    return found


def library_of(borrowed: View) -> Library:
    """Return the library for a CUDA array: its own, or CuPy for that of other DLPack producers."""
    if borrowed.kind == "torch":
        from . import torch

        return torch.library()
    return _cupy_library()


@functools.cache
def _cupy_library() -> Library:
    import cupy

    ndarray, current_stream = cupy.ndarray, cupy.cuda.get_current_stream

    def read(array: Any) -> tuple[tuple[Any, ...], int]:
        data = array.data
        address = data.ptr
        return (array.shape, array.strides, array.dtype, data.device_id, address % 16), address

    def pointer(array: Any) -> int:
        return array.data.ptr  # type: ignore[no-any-return]

    def allocator(_: Any, shape: tuple[int, ...], dtype: str) -> Callable[[Any], Any]:
        numpy_dtype = dtype_of(dtype)
        return lambda _: ndarray(shape, numpy_dtype)

    def stream(device_id: int) -> int:
        return current_stream(device_id).ptr  # type: ignore[no-any-return]

    return Library(read, pointer, allocator, stream, note_write=lambda _: None)


def stream_of(borrowed: View) -> int:
    """Return the current stream, as a number, of the library that owns a CUDA array, on the array's device."""
    assert borrowed.device is not None
    return library_of(borrowed).stream(borrowed.device)


def empty(like: View, shape: tuple[int, ...], dtype: str) -> View:
    """Allocate a contiguous array of `like`'s kind in host memory."""
    if like.kind == "torch":
        from . import torch

        return torch.empty(like, shape, dtype)
    return _view_numpy(np.empty(shape, dtype_of(dtype)))


def as_numpy(borrowed: View) -> np.ndarray[Any, Any]:
    """Return a host array as NumPy's, sharing its memory; bfloat16 is ml_dtypes'."""
    if borrowed.kind == "torch":
        from . import torch

        return torch.as_numpy(borrowed)
    array = borrowed.owner[1] if borrowed.kind == "dlpack" else borrowed.owner
    return array  # type: ignore[no-any-return]


def give_back(result: Any, like: View) -> Any:
    """Return an array that was made for `like`'s library, NumPy's or CuPy's for DLPack producers, as one of its own."""
    if like.kind == "dlpack":
        owner = like.owner[0]
        if like.device is None:
            return _namespace(owner).from_dlpack(result)  # type: ignore[union-attr]
        import cupy

        with cupy.cuda.Device(like.device):
            return _namespace(owner).from_dlpack(result)  # type: ignore[union-attr]
    return result


def note_write(written: View) -> None:
    """Tell the library that elements of its array have changed, where it wants to know."""
    if written.kind == "torch":
        from . import torch

        torch.note_write(written.owner)


class _AddressRange:
    """Shape and strides without memory, for `numpy.shares_memory`, which only looks at addresses."""

    def __init__(self, borrowed: View) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{borrowed.itemsize}",
            "data": (borrowed.pointer, True),
            "shape": borrowed.shape,
            "strides": tuple(stride * borrowed.itemsize for stride in borrowed.strides),
        }


def overlap(a: View, b: View) -> bool:
    """Whether two arrays share an element; yes where that would take long to find out."""
    if 0 in a.shape or 0 in b.shape:
        return False
    first, second = (as_numpy(x) if x.device is None else np.asarray(_AddressRange(x)) for x in (a, b))
    try:
        return bool(np.shares_memory(first, second, max_work=cast(Any, 100_000)))
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(a: View) -> bool:
    """Whether two indices may mean the same element, as in a broadcast view."""
    if 0 in a.shape:
        return False
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(a.strides, a.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
