"""A GPU made of host memory: arrays lie there, and launches are read as the driver does, and computed by NumPy."""

from __future__ import annotations

import ctypes
import types

import numpy as np

from lightning_cupy import _arrays, _calls, _compile, _environment, forward, reference


class FakeGpu:
    """What was loaded and launched, and how to make arrays; `install` puts it where CuPy's driver would be."""

    def __init__(self, cupy, monkeypatch, num_sms=1) -> None:
        self.cupy, self.kernels, self.launches, self.entered = cupy, {}, [], []
        self.context, self.before_launch = 1000, lambda: None
        self.num_views = 0
        runtime = types.SimpleNamespace(memsetAsync=self._memset, getDevice=lambda: 0, getDeviceCount=lambda: 2)
        driver = types.SimpleNamespace(
            launchKernel=self._launch, launchCooperativeKernel=self._launch, ctxGetCurrent=lambda: self.context
        )
        monkeypatch.setattr(cupy.cuda, "driver", driver)
        monkeypatch.setattr(cupy.cuda, "runtime", runtime)
        monkeypatch.setattr(cupy.cuda, "Device", lambda device_id: Device(self, device_id))
        monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device_id: types.SimpleNamespace(ptr=7))
        monkeypatch.setattr(_compile, "_kernels", {})
        monkeypatch.setattr(_compile, "_load", self._load)
        monkeypatch.setattr(_environment, "cuda_problem", lambda: None)
        monkeypatch.setattr(forward, "device_properties", lambda device_id: (80, num_sms))
        monkeypatch.setattr(_calls, "_calls", {})
        view = _arrays.view
        monkeypatch.setattr(_arrays, "view", lambda name, array: self._count(view(name, array)))

    def _count(self, view):
        self.num_views += 1
        return view

    def _load(self, file, name, constants, smem_bytes, device_id):
        handle = 100 + len(self.kernels)
        self.kernels[handle] = file, name, dict(constants)
        return types.SimpleNamespace(ptr=handle)

    def _memset(self, pointer, value, num_bytes, stream):
        ctypes.memset(pointer, value, num_bytes)

    def _launch(self, kernel, *arguments):
        *geometry, stream, parameters = arguments[:9]
        struct = ctypes.c_uint64.from_address(parameters).value
        self.before_launch()
        args = np.frombuffer(ctypes.string_at(struct, forward._ARGS.itemsize), forward._ARGS)[0]
        assert self.context >= 1000, "no context is current"
        self.launches.append((self.kernels[kernel], tuple(geometry), stream, args))
        _, name, constants = self.kernels[kernel]
        if name == "forward" and constants["OUTPUTS"] and constants["CAUSAL"] and args["num_segments"] == 1:
            attend(args)

    def array(self, array, device_id=0, offset=0):
        """Return a CuPy array of these elements, some bytes behind a multiple of 64, with the same strides."""
        memory = np.zeros(array.nbytes + 128 + offset, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        order = np.argsort([-stride for stride in array.strides], kind="stable")
        dense = memory[start : start + array.nbytes].view(array.dtype)
        dense = dense.reshape([array.shape[axis] for axis in order]).transpose(np.argsort(order))
        dense[...] = array
        owned = self.cupy.cuda.UnownedMemory(dense.ctypes.data, max(array.nbytes, 1), memory, device_id)
        pointer = self.cupy.cuda.MemoryPointer(owned, 0)
        return self.cupy.ndarray(array.shape, array.dtype, pointer, strides=dense.strides)

    def allocate(self, num_bytes):
        """Allocate as CuPy's pool does, filled with NaN."""
        memory = np.full(num_bytes + 64, 0xFF, np.uint8)
        start = memory.ctypes.data + -memory.ctypes.data % 64
        return self.cupy.cuda.MemoryPointer(self.cupy.cuda.UnownedMemory(start, num_bytes, memory, 0), 0)


class Device:
    """As CuPy's: entering one that is current already leaves a thread without context without one."""

    def __init__(self, gpu, device_id):
        self.gpu, self.id, self.outer = gpu, device_id, []

    def use(self):
        self.gpu.context = 1000 + self.id

    def __enter__(self):
        self.outer.append(self.gpu.context)
        self.gpu.entered.append(self.id)
        if self.gpu.context not in (0, 1000 + self.id):
            self.use()

    def __exit__(self, *_):
        self.gpu.context = self.outer.pop()


def at(pointer, shape, strides, dtype):
    """Elements in memory, by strides in elements."""
    itemsize = np.dtype(dtype).itemsize
    interface = {
        "version": 3,
        "typestr": np.dtype(dtype).str,
        "data": (int(pointer), False),
        "shape": tuple(int(size) for size in shape),
        "strides": tuple(int(stride) * itemsize for stride in strides),
    }
    return np.asarray(types.SimpleNamespace(__array_interface__=interface))


def to_numpy(array):
    """Return what is in a CuPy array."""
    strides = [stride // array.itemsize for stride in array.strides]
    return at(array.data.ptr, array.shape, strides, array.dtype).copy()


def attend(args):
    """Do what forward_float.cu does with float32 and one segment."""
    batch, seqlen, heads = (int(args[name]) for name in ("batch", "seqlen", "num_heads"))
    qk_dim, v_dim = int(args["qk_dim"]), int(args["v_dim"])
    widths = {"o": v_dim, "q": qk_dim, "k": qk_dim, "v": v_dim}
    o, q, k, v = (
        at(args[name], (batch, seqlen, heads, width), args[f"{name}_strides"], "float32")
        for name, width in widths.items()
    )
    slopes = float(args["slope"])
    if args["slopes"]:
        dtype = "float64" if args["slopes_are_double"] else "float32"
        slopes = at(args["slopes"], (heads,), (args["slopes_stride"],), dtype)
    shape = (batch, heads, qk_dim, v_dim)
    initial = at(args["initial_state"], shape, args["initial_strides"], "float32") if args["initial_state"] else None
    result, state = reference.chunked(q, k, v, slopes=slopes, scale=float(args["scale"]), initial_state=initial)
    o[...] = result
    if args["final_state"]:
        dense = np.cumprod([1, v_dim, qk_dim, heads])[::-1]
        at(args["final_state"], shape, dense, "float32")[...] = state
