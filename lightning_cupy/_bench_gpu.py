"""What the bench needs of the GPU: inputs, times on the device alone, and the calls of other packages.

More than 500 lines, as all that only a GPU can show to be right is kept apart here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from . import __version__, _arrays, _compile, forward
from ._launch import Program
from .api import lightning_attention, lightning_attention_backward

Array = np.ndarray[Any, Any]
Call = Callable[[], Any]

_CHUNK = 64  # tokens of the intra-block part, as the FLOP are counted
_MIN_FLUSH_BYTES = 128 * 2**20
_COPY_BYTES = 512 * 2**20
_NUM_HOST_CALLS = 1000
_CYCLES_PER_S = 2e9  # of a fast GPU: on a slower one a delay is longer, which does no harm
_NUM_THREADS, _VECTOR_BYTES = 128, 16  # of kernels_cu/bench.cu
_CONSTANTS: _compile.Constants = (("NUM_THREADS", _NUM_THREADS),)
_NUM_AT_A_TIME = 2**26  # elements of an array: bounds the memory of what is computed for them
_MAX_SCORE_BYTES = 4e9  # of the O(n^2) form
_MAX_SCORE_FLOP = 1e15  # of softmax attention: about two seconds of an H200


class Shape(NamedTuple):
    """Sizes of q, k ``[batch, seqlen, num_heads, head_dim]`` and v, o ``[batch, seqlen, num_heads, v_dim]``."""

    batch: int
    num_heads: int
    seqlen: int
    head_dim: int
    v_dim: int

    @classmethod
    def of(cls, *sizes: int) -> Shape:
        """Make one of batch, num_heads, seqlen, head_dim and, where it differs, v_dim."""
        if len(sizes) not in (4, 5) or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ValueError(
                f"shapes must be batch, heads, tokens, head_dim[, v_dim], whole numbers from 1, but got {sizes}"
            )
        batch, num_heads, seqlen, head_dim = sizes[:4]
        return cls(batch, num_heads, seqlen, head_dim, v_dim=sizes[-1])

    def __str__(self) -> str:
        return ", ".join(map(str, self[:4] if self.v_dim == self.head_dim else self))

    def num_bytes(self, dtype: str, op: str = "forward") -> int:
        """Bytes that an op must move: q, k and v, and of the backward do, read once, and results written once."""
        of_qk, of_v = {"forward": (2, 2), "backward": (4, 3), "train": (6, 5)}[op]  # q, k, dq, dk; v, o, do, dv
        of_token = (of_qk * self.head_dim + of_v * self.v_dim) * _arrays.ITEMSIZES[dtype]
        return self.batch * self.num_heads * self.seqlen * of_token

    def flop(self, op: str = "forward") -> int:
        """Useful operations, whatever a kernel does in fact: of a token and head

        - forward: ``4 K V + 64 (K + V)``. 2 K V for q S and for k v^T; in chunks of 64, q k^T takes 2 * 64 K and its
          product with v 2 * 64 V, of which the half that lies in the future does not count.
        - backward: ``10 K V + 64 (3 K + 2 V)``. Likewise k v^T, q do^T, S do, G v and G^T k; and in chunks q k^T,
          do v^T, and the products of these with k, q and do.
        """
        k_dim, v_dim = self.head_dim, self.v_dim
        forward = 4 * k_dim * v_dim + _CHUNK * (k_dim + v_dim)
        backward = 10 * k_dim * v_dim + _CHUNK * (3 * k_dim + 2 * v_dim)
        of_token = {"forward": forward, "backward": backward, "train": forward + backward}[op]
        return self.batch * self.num_heads * self.seqlen * of_token


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds on the device of repeated calls, each with none of its arrays in the L2 cache."""

    median: float
    min: float
    p90: float
    num_repeats: int


def _timing_of(times: Sequence[float]) -> Timing:
    return Timing(float(np.median(times)), min(times), float(np.percentile(times, 90)), len(times))


class Inputs:
    """Random q, k, v on the GPU, and an o: in CuPy's memory, but torch tensors where torch is here."""

    def __init__(self, gpu: Gpu, shape: Shape, dtype: str, slopes: Array, heads_first: bool) -> None:
        import cupy

        self.gpu, self.shape, self.dtype, self.torch = gpu, shape, dtype, gpu.torch
        self.scale = shape.head_dim**-0.5
        rng = cupy.random.default_rng(0)
        dims = {"q": shape.head_dim, "k": shape.head_dim, "v": shape.v_dim, "o": shape.v_dim}
        sizes = (shape.num_heads, shape.seqlen) if heads_first else (shape.seqlen, shape.num_heads)
        integers = f"i{_arrays.ITEMSIZES[dtype]}"  # which every library knows
        # Contiguous, as they lie in memory.
        self.bits = {name: cupy.empty((shape.batch, *sizes, dim), integers) for name, dim in dims.items()}
        for name in "qkv":
            _fill_with_normal(self.bits[name], dtype, rng)
        floats = (self._as_floats(bits, dtype) for bits in self.bits.values())
        self.q, self.k, self.v, self.o = (array.swapaxes(1, 2) if heads_first else array for array in floats)
        self.slopes = self._as_floats(cupy.asarray(slopes.view("i8")), "float64")
        # (batch, head): the fastest decay and the slowest, for most presets.
        self.sampled = sorted({(0, 0), (shape.batch - 1, shape.num_heads - 1)})

    def _as_floats(self, bits: Any, dtype: str) -> Any:
        if self.torch is None:
            return bits.view(_arrays.dtype_of(dtype))
        return self.torch.from_dlpack(bits).view(getattr(self.torch, dtype))

    def attend(self) -> None:
        """Make the call that is measured."""
        lightning_attention(self.q, self.k, self.v, self.o, slopes=self.slopes)

    def stream(self) -> None:
        """Only read q, k, v and write o, whose contents are lost."""
        num_qk, num_o = (self.bits[name].nbytes // _VECTOR_BYTES for name in "qo")
        arrays = (self.bits[name] for name in "oqkv")
        self.gpu.launch("stream", _num_blocks(max(num_qk, num_o)), *arrays, np.int64(num_qk), np.int64(num_o))

    def poison(self) -> None:
        """Make every element of o a NaN all of whose bits are 1."""
        self.bits["o"].data.memset_async(0xFF, self.bits["o"].nbytes)

    def is_unwritten(self) -> bool:
        """Whether an element of o is still what `poison` wrote: the NaN that arithmetic makes has other bits."""
        return any(bool((part == -1).any()) for part in _parts(self.bits["o"]))

    def sample(self, array: Any) -> Array:
        """Return the sampled heads as ``[seqlen, samples, head_dim]`` in float64 on the host."""
        rows = [array[batch_idx, :, head_idx] for batch_idx, head_idx in self.sampled]
        if self.torch is not None:
            return np.stack([row.cpu().double().numpy() for row in rows], 1)
        import cupy

        on_host = [cupy.asnumpy(row.view(f"i{row.itemsize}")).view(row.dtype) for row in rows]
        return np.stack(on_host, 1).astype(np.float64)


_STATES = ("initial_state", "dstate")


class GradientInputs(Inputs):
    """The same, with a gradient of o, random too, and memory for those of q, k and v, for the floor alone."""

    def __init__(self, gpu: Gpu, shape: Shape, dtype: str, slopes: Array) -> None:
        import cupy

        super().__init__(gpu, shape, dtype, slopes, heads_first=False)
        rng = cupy.random.default_rng(1)
        _fill_with_normal(self.bits["o"], dtype, rng)
        self.do = self.o
        self._written = [cupy.empty_like(self.bits[name]) for name in "qkv"]
        state = (shape.batch, shape.num_heads, shape.head_dim, shape.v_dim)
        bits = (rng.standard_normal(state, np.float64 if dtype == "float64" else np.float32) for _ in _STATES)
        self.states = dict(
            zip(_STATES, (self._as_floats(x.view(f"i{x.itemsize}"), x.dtype.name) for x in bits), strict=True)
        )

    def gradients(self, *more: str) -> Any:
        """Make the call that is measured: dq, dk and dv, and more that is asked for."""
        states = self.states if "dinitial_state" in more else {}
        wanted = ("dq", "dk", "dv", *more)
        return lightning_attention_backward(
            self.do, self.q, self.k, self.v, slopes=self.slopes, wanted=wanted, **states
        )

    def stream_backward(self) -> None:
        """Only read do, q, k and v, and write as much as dq, dk and dv are."""
        num_qk, num_v = (self.bits[name].nbytes // _VECTOR_BYTES for name in "qv")
        arrays = (*self._written, *(self.bits[name] for name in "oqkv"))
        self.gpu.launch("stream_backward", _num_blocks(max(num_qk, num_v)), *arrays, np.int64(num_qk), np.int64(num_v))

    def stream_training(self) -> None:
        """Both floors, one behind the other."""
        num_qk, num_v = (self.bits[name].nbytes // _VECTOR_BYTES for name in "qv")
        arrays = (self._written[2], *(self.bits[name] for name in "qkv"))
        self.gpu.launch("stream", _num_blocks(max(num_qk, num_v)), *arrays, np.int64(num_qk), np.int64(num_v))
        self.stream_backward()

    def _leaves(self) -> list[Any]:
        return [tensor.detach().requires_grad_() for tensor in (self.q, self.k, self.v)]

    def step_of(self, function: Callable[..., Any]) -> Call:
        """Return a training step through torch: a function of q, k and v, and its backward."""
        torch, leaves = self.torch, self._leaves()

        def step() -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(function(*leaves), leaves, self.do)

        return step

    def backward_of(self, function: Callable[..., Any]) -> Call:
        """Return its backward alone, of a forward that is made now."""
        torch, leaves = self.torch, self._leaves()
        with torch.enable_grad():
            o = function(*leaves)
        return lambda: torch.autograd.grad(o, leaves, self.do, retain_graph=True)

    def train(self) -> Call:
        """Return a step of ours."""
        return self.step_of(lambda q, k, v: lightning_attention(q, k, v, slopes=self.slopes))

    def extra_memory(self, call: Call) -> float:
        """Bytes that a call takes for a while beyond its results, over those of q, k, v and do."""
        torch = self.torch
        call()
        self.gpu.device.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        peak = torch.cuda.max_memory_allocated() - before
        results = sum(tensor.nbytes for tensor in results if tensor is not None)
        return float((peak - results) / sum(self.bits[name].nbytes for name in "oqkv"))


def _num_blocks(num_vectors: int) -> int:
    """Return how many blocks have a thread for each vector; one at least, since a launch of none is refused."""
    return max(1, -(-num_vectors // _NUM_THREADS))


def _parts(array: Any) -> Iterator[Any]:
    """Cut a contiguous array into flat views of some elements each."""
    flat = array.reshape(-1)
    return (flat[start : start + _NUM_AT_A_TIME] for start in range(0, flat.size, _NUM_AT_A_TIME))


def _fill_with_normal(bits: Any, dtype: str, rng: Any) -> None:
    """Fill a contiguous array of integers with the bits of floats."""
    drawn_as = np.dtype("float64" if dtype == "float64" else "float32")
    for part in _parts(bits):
        values = rng.standard_normal(part.size, drawn_as)
        if dtype == "bfloat16":  # the upper half of a float32, rounded towards 0: CuPy need not know the dtype
            part[...] = (values.view("i4") >> 16).astype("i2")
        else:
            part[...] = values.astype(dtype).view(part.dtype)


class Gpu:
    """The current GPU, and how to time on it."""

    def __init__(self, torch: Any) -> None:
        import cupy

        self.torch, self.device = torch, cupy.cuda.Device()
        self._zeros = cupy.zeros(max(_MIN_FLUSH_BYTES, 2 * self.device.attributes["L2CacheSize"]), "u1")

    def environment(self) -> dict[str, str]:
        """Names and versions of what the numbers depend on."""
        import cupy

        runtime = cupy.cuda.runtime
        major, minor = divmod(runtime.runtimeGetVersion() // 10, 100)
        found = {
            "GPU": runtime.getDeviceProperties(self.device.id)["name"].decode(),
            "driver": _driver_version(),
            "CUDA": f"{major}.{minor}",
            "lightning_cupy": __version__,
            "CuPy": cupy.__version__,
            "Python": platform.python_version(),
        }
        for name in ("torch", "triton", "flash-linear-attention", "lightning-attn", "thunderkittens"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found

    def inputs(self, shape: Shape, dtype: str, slopes: Array, heads_first: bool = False) -> Inputs:
        """Make arrays to measure with; those with heads first are views of [batch, num_heads, seqlen, head_dim]."""
        self._free()
        return Inputs(self, shape, dtype, slopes, heads_first)

    def _free(self) -> None:
        import cupy

        # Two pools: what one keeps of earlier arrays, the other may need.
        cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    def gradient_inputs(self, shape: Shape, dtype: str, slopes: Array) -> GradientInputs:
        """Make arrays to measure gradients with."""
        self._free()
        return GradientInputs(self, shape, dtype, slopes)

    def launch(self, name: str, num_blocks: int, *args: Any, num_threads: int = _NUM_THREADS) -> None:
        """Launch a kernel of kernels_cu/bench.cu on CuPy's current stream."""
        kernel = _compile.kernel("bench.cu", name, _CONSTANTS, 0, self.device.id)
        kernel((num_blocks, 1, 1), (num_threads, 1, 1), args)

    def flush(self) -> None:
        """Leave nothing in the L2 cache but what need not be written back."""
        num_vectors = self._zeros.nbytes // _VECTOR_BYTES
        self.launch("flush", _num_blocks(num_vectors), self._zeros, np.int64(num_vectors))

    def time(self, call: Call, seconds: float) -> Timing:
        """Time a call on the device alone, repeating it for about some seconds.

        Before each repeat L2 is flushed, and the device delayed until the whole call is queued; a repeat that began
        before is left out.

        Raises
        ------
        RuntimeError
            When no delay is long enough, since the call waits for the device.
        """
        return self.time_in_turn([call], seconds)[0]

    def time_in_turn(self, calls: Sequence[Call], seconds: float) -> list[Timing]:
        """Time calls as `time` does, for as many seconds each, but in turn: at clocks that are the same for all.

        Raises
        ------
        RuntimeError
            When no delay is long enough, since the call waits for the device.
        """
        import cupy

        for call in calls:
            call()  # compiled, tuned
        self.device.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        queued = time.perf_counter()
        self.device.synchronize()
        num_repeats = max(7, min(51, int(len(calls) * seconds / (time.perf_counter() - start))))
        delay = 2 * (queued - start) + 2e-5
        repeats: list[list[tuple[Any, Any]]] = [[] for _ in calls]
        for _ in range(2 * num_repeats + 20):
            for call, of_call in zip(calls, repeats, strict=True):
                self.flush()
                self.launch("wait", 1, np.int64(delay * _CYCLES_PER_S), num_threads=1)
                before, after = cupy.cuda.Event(), cupy.cuda.Event()
                before.record()
                call()
                has_begun = before.done
                after.record()
                if has_begun:
                    delay = min(2 * delay, 0.1)
                else:
                    of_call.append((before, after))
            if min(map(len, repeats)) >= num_repeats:
                break
        self.device.synchronize()
        if min(map(len, repeats)) < num_repeats:
            raise RuntimeError("the call waits for the device, so its time there alone cannot be told")
        return [_timing_of([float(cupy.cuda.get_elapsed_time(*events)) for events in of_call]) for of_call in repeats]

    def host_us(self, call: Call) -> float:
        """Wall time per call, back to back, without waiting for the device."""
        for _ in range(100):
            call()
        self.device.synchronize()
        start = time.perf_counter()
        for _ in range(_NUM_HOST_CALLS):
            call()
        elapsed = time.perf_counter() - start
        self.device.synchronize()
        return 1e6 * elapsed / _NUM_HOST_CALLS

    def host_us_of_launch(self) -> float:
        """Wall time per launch of an empty kernel through CuPy."""
        kernel = _compile.kernel("bench.cu", "nothing", _CONSTANTS, 0, self.device.id)
        return self.host_us(lambda: kernel((1, 1, 1), (1, 1, 1), ()))

    def copy_gb_per_s(self) -> float:
        """Rate of a copy on the device, bytes read and written."""
        import cupy

        source, target = cupy.empty(_COPY_BYTES, "u1"), cupy.empty(_COPY_BYTES, "u1")
        timing = self.time(lambda: target.data.copy_from_device_async(source.data, _COPY_BYTES), 0.1)
        return 2 * _COPY_BYTES / timing.median / 1e6


@contextlib.contextmanager
def current_gpu() -> Iterator[Gpu]:
    """Use CuPy's current device; torch, where it is here, works there too, and CuPy on torch's current stream."""
    import cupy

    torch = None if why_missing("sdpa") else importlib.import_module("torch")
    with contextlib.ExitStack() as stack:
        if torch is not None:
            stack.enter_context(torch.cuda.device(cupy.cuda.Device().id))
            stack.enter_context(torch.no_grad())
            stream = _arrays.StreamHandle(torch.cuda.current_stream().cuda_stream)
            stack.enter_context(cupy.cuda.Stream.from_external(stream))
        yield Gpu(torch)


def _driver_version() -> str:
    """Ask NVML, which comes with the driver."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        version = ctypes.create_string_buffer(80)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(version, 80) == 0:
            return version.value.decode()
    except (OSError, AttributeError):
        pass
    return "unknown"


_MODULES = {"fla": "fla.ops.simple_gla", "tk": "thunderkittens", "lightning_attn": "lightning_attn.ops"}


def why_missing(peer: str) -> str | None:
    """Say why a peer cannot be called here; None where it can."""
    if peer == "portable":
        return None
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return "needs torch"
    if not torch.cuda.is_available():
        return "needs a torch with CUDA"
    if peer not in _MODULES:
        return None
    name = _MODULES[peer]
    try:
        module = importlib.import_module(name)
    except Exception as error:  # other packages raise what they like when imported
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        return "not installed" if is_absent else f"not importable ({in_a_line(error)})"
    return "has no linear attention" if peer == "tk" and not hasattr(module, "linear_attention") else None


def in_a_line(error: Exception) -> str:
    """Return the kind of an exception and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _heads_first(x: Inputs) -> list[Any]:
    """Views of q, k and v as [batch, num_heads, seqlen, head_dim]."""
    return [tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v)]


def _without_scale(x: Inputs, function: Callable[..., Any]) -> Call:
    """Call a function of contiguous [batch, num_heads, seqlen, head_dim] that knows no scale."""
    q, k, v = (tensor.contiguous() for tensor in _heads_first(x))
    q, slopes = q * x.scale, x.slopes.float()
    return lambda: function(q, k, v, slopes).transpose(1, 2)


def _fla(x: Inputs) -> dict[str, Call]:
    ops = importlib.import_module(_MODULES["fla"])
    options = {"g_gamma": -x.slopes.float(), "scale": x.scale}
    return {
        "fla chunk": lambda: ops.chunk_simple_gla(x.q, x.k, x.v, **options)[0],
        "fla fused_chunk": lambda: ops.fused_chunk_simple_gla(x.q, x.k, x.v, **options)[0],
    }


def _tk(x: Inputs) -> dict[str, Call]:
    return {"tk": _without_scale(x, importlib.import_module(_MODULES["tk"]).linear_attention)}


def _lightning_attn(x: Inputs) -> dict[str, Call]:
    function = importlib.import_module(_MODULES["lightning_attn"]).lightning_attn_func
    return {"lightning_attn": _without_scale(x, function)}


def _sdpa(x: Inputs) -> dict[str, Call]:
    """Softmax attention by cuDNN: another function, the one that many come from."""
    flop = x.shape.batch * x.shape.num_heads * x.shape.seqlen**2 * (x.shape.head_dim + x.shape.v_dim)
    if flop > _MAX_SCORE_FLOP:
        raise ValueError(f"its scores would take {flop / 1e15:.0f} PFLOP")
    attention = importlib.import_module("torch.nn.attention")
    attend, (q, k, v) = x.torch.nn.functional.scaled_dot_product_attention, _heads_first(x)

    def call() -> Any:
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v, is_causal=True, scale=x.scale).transpose(1, 2)

    return {"sdpa": call}


def _naive(x: Inputs) -> dict[str, Call]:
    """The O(n^2) form, ``((q k^T) * mask) v``."""
    num_bytes = x.shape.batch * x.shape.num_heads * x.shape.seqlen**2 * _arrays.ITEMSIZES[x.dtype]
    if num_bytes > _MAX_SCORE_BYTES:
        raise ValueError(f"its scores would take {num_bytes / 1e9:.0f} GB")
    q, k, v = _heads_first(x)
    position = x.torch.arange(x.shape.seqlen, device=q.device, dtype=x.slopes.dtype)
    distance = (position[:, None] - position).clamp(min=0)
    mask = x.torch.stack([(x.scale * x.torch.exp(-slope * distance)).tril().to(q.dtype) for slope in x.slopes])
    return {"naive": lambda: ((q @ k.mT * mask) @ v).transpose(1, 2)}


def _portable(x: Inputs) -> dict[str, Call]:
    """Our own kernels for any GPU, where others are chosen."""
    views = {name: _arrays.view(name, getattr(x, name)) for name in ("o", "q", "k", "v", "slopes")}
    shape, dtype = x.shape, cast(forward.Dtype, x.dtype)
    sizes = (shape.batch, shape.seqlen, shape.num_heads, shape.head_dim, shape.v_dim)
    problem = forward.contiguous_problem(
        x.gpu.device.id, dtype, *sizes, scale=x.scale, slopes=(views["slopes"].dtype, views["slopes"].strides[0])
    )
    o, q, k, v = (forward.Layout(views[name].strides, aligned=True) for name in "oqkv")
    problem = dataclasses.replace(problem, o=o, q=q, k=k, v=v)
    steps = forward.portable_steps(problem)
    if forward.steps_for(problem) == steps:
        raise ValueError("lightning_cupy runs the same kernels")
    program = Program(steps, forward.ARRAYS, (), views["q"])
    pointers = [views[name].pointer if name in views else 0 for name in forward.ARRAYS]

    def call() -> Any:
        program.run([*pointers], x.q)
        return x.o

    return {"portable": call}


def _differentiable_fla(x: GradientInputs) -> dict[str, Callable[..., Any]]:
    ops = importlib.import_module(_MODULES["fla"])
    options = {"g_gamma": -x.slopes.float(), "scale": x.scale}
    return {
        "fla chunk": lambda q, k, v: ops.chunk_simple_gla(q, k, v, **options)[0],
        "fla fused_chunk": lambda q, k, v: ops.fused_chunk_simple_gla(q, k, v, **options)[0],
    }


def _differentiable_sdpa(x: GradientInputs) -> dict[str, Callable[..., Any]]:
    flop = 3 * x.shape.batch * x.shape.num_heads * x.shape.seqlen**2 * (x.shape.head_dim + x.shape.v_dim)
    if flop > _MAX_SCORE_FLOP:
        raise ValueError(f"its scores would take {flop / 1e15:.0f} PFLOP")
    attention = importlib.import_module("torch.nn.attention")
    attend = x.torch.nn.functional.scaled_dot_product_attention

    def call(*tensors: Any) -> Any:
        q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v, is_causal=True, scale=x.scale).transpose(1, 2)

    return {"sdpa": call}


# From inputs to functions of q, k and v, by variant, that torch can differentiate.
DIFFERENTIABLE_PEERS: dict[str, Callable[[GradientInputs], dict[str, Callable[..., Any]]]] = {
    "fla": _differentiable_fla,
    "sdpa": _differentiable_sdpa,
}

# From inputs to calls, by variant, that return o as [batch, seqlen, num_heads, V].
PEER_CALLS: dict[str, Callable[[Inputs], dict[str, Call]]] = {
    "fla": _fla,
    "tk": _tk,
    "lightning_attn": _lightning_attn,
    "sdpa": _sdpa,
    "naive": _naive,
    "portable": _portable,
}
