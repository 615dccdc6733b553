"""Descriptors of arrays for Hopper's copy engine (TMA), made by the driver."""

from __future__ import annotations

import ctypes
import functools
import sys

from ._arrays import ITEMSIZES

NUM_BYTES = 128
MAX_SIZE = 2**31 - 1  # coordinates are int
_TOKENS, _ROW_BYTES = 64, 128  # of a box; the swizzle wants rows of 128 bytes
_MAX_STRIDE_BYTES = 2**40

# CUtensorMapDataType and others of cuda.h.
_DATA_TYPES = {"float16": 6, "bfloat16": 9, "float32": 7}
_NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_TO_256_BYTES, _ZEROS_OUTSIDE = 0, 3, 3, 0


def can_describe(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether TMA reaches ``[batch, seqlen, num_heads, head_dim]`` from a pointer aligned to 16 bytes.

    The last axis must be contiguous, and the other strides positive multiples of 16 bytes, where there is more than
    one index to go by (CUDA driver API, cuTensorMapEncodeTiled).
    """
    itemsize = ITEMSIZES[dtype]
    return (
        (strides[-1] == 1 or shape[-1] == 1)
        and max(shape) <= MAX_SIZE
        and all(
            size == 1 or (stride > 0 and stride * itemsize % 16 == 0 and stride * itemsize < _MAX_STRIDE_BYTES)
            for stride, size in zip(strides[:-1], shape[:-1], strict=True)
        )
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def encode(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], pointer: int = 1 << 20) -> bytes:
    """Return the descriptor of ``[batch, seqlen, num_heads, head_dim]``: boxes of 64 tokens, 128 bytes each, of a head.

    Raises
    ------
    RuntimeError
        When the driver refuses.
    """
    batch, seqlen, num_heads, head_dim = shape
    # An axis of one index has no stride to speak of, but the driver wants a multiple of 16 bytes.
    itemsize = ITEMSIZES[dtype]
    stride_bytes = [itemsize * stride if size > 1 else 16 for stride, size in zip(strides[:3], shape[:3], strict=True)]
    memory = (ctypes.c_uint8 * (NUM_BYTES + 64))()
    start = -ctypes.addressof(memory) % 64  # the driver wants it aligned
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + start),
        ctypes.c_int(_DATA_TYPES[dtype]),
        ctypes.c_uint32(4),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 4)(head_dim, seqlen, num_heads, batch),
        (ctypes.c_uint64 * 3)(stride_bytes[1], stride_bytes[2], stride_bytes[0]),
        (ctypes.c_uint32 * 4)(_ROW_BYTES // itemsize, _TOKENS, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        *map(ctypes.c_int, (_NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_TO_256_BYTES, _ZEROS_OUTSIDE)),
    )
    if status != 0:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled refuses {dtype} {shape} with strides {strides}: CUDA error {status}"
        )
    return bytes(memory[start : start + NUM_BYTES])


@functools.cache
def address_offset() -> int:
    """Return where in a descriptor its array's address is: 8 bytes that may be written over.

    The format is the driver's own, so it is asked: two descriptors that differ in nothing else.

    Raises
    ------
    RuntimeError
        When the address is not there in plain bytes.
    """
    pointers = (0x0000_7A3B_5C6D_7E80, 0x0000_1122_3344_5560)
    first, second = (encode("float16", (1, 64, 1, 64), (4096, 64, 64, 1), pointer) for pointer in pointers)
    for offset in range(0, NUM_BYTES, 8):
        patched = first[:offset] + pointers[1].to_bytes(8, "little") + first[offset + 8 :]
        if first[offset : offset + 8] == pointers[0].to_bytes(8, "little") and patched == second:
            return offset
    raise RuntimeError(f"the driver's TMA descriptors have changed: {first.hex()} and {second.hex()} for {pointers}")
