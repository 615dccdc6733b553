"""Kernel launches worked out beforehand: all but pointers and stream, which are put in at each call."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from . import _arrays, _compile

_WORD_BYTES = 8
_MAX_GRID_X = 2**31 - 1

# In place of a pointer: a number that, with the 2^32 behind it, no other launch gets. Memory that was never written
# may hold anything, but hardly one of a range that starts at random.
UNIQUE = "unique"
_unique = itertools.count(secrets.randbits(32) << 32, 1 << 32)  # what is above 64 bits is cut off


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The struct that is the one parameter of a kernel."""

    template: bytes  # the struct; what stands where pointers go does not matter
    pointers: tuple[tuple[int, str], ...]  # byte offset, a multiple of 8, and the name of an array or buffer, or UNIQUE


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Memory that lives as long as a call."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    file: str
    name: str
    constants: _compile.Constants
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem_bytes: int
    arguments: Arguments
    cooperative: bool = False  # all blocks are resident at once, or the launch fails

    @property
    def kernel(self) -> _compile.Wanted:
        """What to compile and load."""
        return self.file, self.name, self.constants, self.smem_bytes


class Plan(Protocol):
    """What a launch takes from a plan."""

    @property
    def file(self) -> str:
        """Name in kernels_cu."""

    @property
    def constants(self) -> _compile.Constants:
        """Compile-time constants."""

    @property
    def num_threads(self) -> int:
        """Of a block."""

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory."""


def launch(plan: Plan, name: str, num_blocks: int, arguments: Arguments) -> Launch:
    """Return a launch of so many blocks, in one dimension as far as a grid goes, then in two."""
    grid_x = min(num_blocks, _MAX_GRID_X)
    return Launch(
        plan.file,
        name,
        plan.constants,
        grid=(grid_x, -(-num_blocks // grid_x), 1),
        block=(plan.num_threads, 1, 1),
        smem_bytes=plan.smem_bytes,
        arguments=arguments,
    )


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a call does on the device, in order: allocate, then launch."""

    launches: tuple[Launch, ...] = ()
    buffers: tuple[Buffer, ...] = ()


@contextlib.contextmanager
def current_device(device_id: int) -> Iterator[None]:
    """Make a device and its context current."""
    import cupy

    device = cupy.cuda.Device(device_id)
    with device:
        # NOTE: CuPy does nothing where the device is current already, but a new thread has no context yet.
        device.use()
        yield


class Program:
    """Steps with their kernels loaded on a device, which any number of threads may run at once.

    Parameters
    ----------
    steps
        What to run.
    arrays
        Names of the arrays whose pointers `run` takes, in its order.
    results
        Those of them that are allocated like the other buffers, but given back.
    like
        An array on the device, of the library that allocates.

    Attributes
    ----------
    arrays
        As given.
    context
        The CUDA context that must be current for `run`; `device` makes it so.
    """

    def __init__(self, steps: Steps, arrays: Sequence[str], results: Sequence[Buffer], like: _arrays.View) -> None:
        from cupy.cuda import driver

        assert like.device is not None
        self.arrays = tuple(arrays)
        self._device_id, self._library = like.device, _arrays.library_of(like)
        wanted = [step.kernel for step in steps.launches]
        with self.device():
            self._kernels = _compile.kernels(wanted, like.device)  # their handles are good as long as they live
            self.context: int = driver.ctxGetCurrent()
        names = [*arrays, *(buffer.name for buffer in steps.buffers), UNIQUE]
        self._buffers = [
            (names.index(buffer.name), self._library.allocator(like.owner, buffer.shape, buffer.dtype))
            for buffer in (*results, *steps.buffers)
        ]
        self._num_results, self._workspace = len(results), [0] * len(steps.buffers)
        arguments = list(dict.fromkeys(step.arguments for step in steps.launches))
        self._layouts = [(struct, names) for struct in arguments]
        self._pool: list[list[_Struct]] = []
        self._launches = [
            (
                _launch_cooperatively if step.cooperative else driver.launchKernel,
                (kernel.ptr, *step.grid, *step.block, step.smem_bytes),
                arguments.index(step.arguments),
            )
            for step, kernel in zip(steps.launches, self._kernels, strict=True)
        ]

    def device(self) -> contextlib.AbstractContextManager[None]:
        """Make the device and its context current."""
        return current_device(self._device_id)

    def run(self, pointers: list[int], like: Any) -> list[Any]:
        """Queue everything on the current stream of the library that allocates, and return the results.

        Parameters
        ----------
        pointers
            Of the arrays, in the order of their names; what stands for those that are allocated, or that no kernel
            takes, does not matter. Written to.
        like
            An array of the library, on the device.

        Notes
        -----
        The other buffers are let go on return, though work on them is only queued: as all memory of CuPy and torch,
        they go to later work on the same stream.
        """
        library = self._library
        stream = library.stream(self._device_id)
        pointers += self._workspace
        pointers.append(next(_unique))
        buffers = []
        for idx, allocate in self._buffers:
            buffer = allocate(like)
            buffers.append(buffer)
            pointers[idx] = library.pointer(buffer)
        # Nobody else has the structs while they are out of the pool: other threads run while the driver reads them.
        try:
            structs = self._pool.pop()
        except IndexError:
            structs = [_Struct(*layout) for layout in self._layouts]
        for struct in structs:
            words = struct.words
            for word, idx in struct.slots:
                words[word] = pointers[idx]
        for launch, geometry, struct_idx in self._launches:
            launch(*geometry, stream, structs[struct_idx].parameters, 0)
        self._pool.append(structs)
        return buffers[: self._num_results]


def _launch_cooperatively(*arguments: int) -> None:
    """Take the arguments of driver.launchKernel, of which the last, `extra`, is none."""
    from cupy.cuda import driver

    driver.launchCooperativeKernel(*arguments[:-1])


class _Struct:
    """The parameters of a kernel in memory of their own, for one launch at a time."""

    __slots__ = ("parameters", "slots", "words")

    def __init__(self, arguments: Arguments, names: Sequence[str]) -> None:
        num_words = -(-len(arguments.template) // _WORD_BYTES)
        # The word behind the struct is the list that the driver asks for: addresses of parameters, of which it is one.
        self.words = (ctypes.c_uint64 * (num_words + 1)).from_buffer_copy(
            arguments.template.ljust((num_words + 1) * _WORD_BYTES, b"\0")
        )
        address = ctypes.addressof(self.words)
        self.words[num_words] = address
        self.parameters = address + num_words * _WORD_BYTES
        self.slots = [(offset // _WORD_BYTES, names.index(name)) for offset, name in arguments.pointers]
