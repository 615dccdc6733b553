"""What the bench needs of the GPU: inputs, times on the device alone, and the calls of other packages."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np

from . import __version__, _arrays, _compile, forward
from ._launch import Program
from .api import lightning_attention, lightning_attention_backward

Array = np.ndarray[Any, Any]
Call = Callable[[], Any]
Attention = Callable[[Any, Any, Any], Any]  # from q, k and v to o, all [batch, seqlen, num_heads, head_dim]

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


class Inputs:
    """Random q, k, v on the GPU, and an o: in CuPy's memory, but torch tensors where torch is here."""

    def __init__(self, gpu: Gpu, shape: Shape, dtype: str, slopes: Array, heads_first: bool) -> None:
        import cupy

        self.gpu, self.shape, self.dtype, self.torch = gpu, shape, dtype, gpu.torch
        self.scale = shape.head_dim**-0.5
        rng = cupy.random.default_rng(0)
        dims = {"q": shape.head_dim, "k": shape.head_dim, "v": shape.v_dim, "o": shape.v_dim}
        sizes = (shape.num_heads, shape.seqlen) if heads_first else (shape.seqlen, shape.num_heads)
        self._integers = f"i{_arrays.ITEMSIZES[dtype]}"  # which every library knows
        # Contiguous, as they lie in memory.
        self.bits = {name: cupy.empty((shape.batch, *sizes, dim), self._integers) for name, dim in dims.items()}
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

    def _stream(self, name: str, *arrays: Any) -> None:
        """Launch a kernel that only reads and writes; the contents of what it writes are lost."""
        num_qk, num_v = (self.bits[name].nbytes // _VECTOR_BYTES for name in "qv")
        self.gpu.launch(name, _num_blocks(max(num_qk, num_v)), *arrays, np.int64(num_qk), np.int64(num_v))

    def sample(self, array: Any) -> Array:
        """Return the sampled heads as ``[seqlen, samples, head_dim]`` in float64 on the host."""
        rows = [array[batch_idx, :, head_idx] for batch_idx, head_idx in self.sampled]
        if self.torch is not None:
            return np.stack([row.cpu().double().numpy() for row in rows], 1)
        import cupy

        on_host = [cupy.asnumpy(row.view(f"i{row.itemsize}")).view(row.dtype) for row in rows]
        return np.stack(on_host, 1).astype(np.float64)

    def tensors(self, names: Iterable[str], *, heads_first: bool = False) -> list[Any]:
        """Return arrays as they are, or copied to memory where [batch, num_heads, seqlen, head_dim] is contiguous."""
        found = [getattr(self, name) for name in names]
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in found] if heads_first else found


class Forward(Inputs):
    """The forward of q, k and v."""

    num_passes = 1.0  # of softmax attention: FLOP in those of a forward

    def call(self) -> None:
        """Make the call that is measured."""
        lightning_attention(self.q, self.k, self.v, self.o, slopes=self.slopes)

    def floor(self) -> None:
        """Only read q, k, v and write o, whose contents are lost."""
        self._stream("stream", *(self.bits[name] for name in "oqkv"))

    def checked(self) -> Any:
        """Return o of a call, as `results` takes it; None where an element is left unwritten."""
        _poison(self.bits["o"])
        self.call()
        return None if self.is_unwritten() else self.o

    def is_unwritten(self) -> bool:
        """Whether an element of o is still what `_poison` wrote: the NaN that arithmetic makes has other bits."""
        return any(bool((part == -1).any()) for part in _parts(self.bits["o"]))

    def results(self, found: Any) -> tuple[Any, ...]:
        """Return what is compared of what a call of ours, or of a peer's, gave."""
        return (found,)

    def call_of(self, function: Attention, *, heads_first: bool = False, factor: float = 1.0) -> Call:
        """Return a call of a peer's function of q, k and v, in memory as it wants them.

        Its outputs lack a factor, which goes into q.
        """
        q, k, v = self.tensors("qkv", heads_first=heads_first)
        q = q if factor == 1 else q * factor
        return lambda: function(q, k, v)


class Backward(Inputs):
    """The backward alone, of a random do."""

    num_passes = 2.5
    makes_o_again = False  # at each call of a peer's

    def __init__(self, gpu: Gpu, shape: Shape, dtype: str, slopes: Array, heads_first: bool) -> None:
        import cupy

        super().__init__(gpu, shape, dtype, slopes, heads_first)
        rng = cupy.random.default_rng(1)
        _fill_with_normal(self.bits["o"], dtype, rng)
        self.do = self.o
        self._written = [cupy.empty_like(self.bits[name]) for name in "qkv"]  # by the floor
        self._states = {}
        of_state = "float64" if dtype == "float64" else "float32"
        for name in ("initial_state", "dstate"):
            sizes = (shape.batch, shape.num_heads, shape.head_dim, shape.v_dim)
            bits = cupy.empty(sizes, f"i{_arrays.ITEMSIZES[of_state]}")
            _fill_with_normal(bits, of_state, rng)
            self._states[name] = self._as_floats(bits, of_state)

    def call(self, *more: str) -> Any:
        """Make the call that is measured: dq, dk and dv, and more that is asked for."""
        states = self._states if "dinitial_state" in more else {}
        return lightning_attention_backward(
            self.do, self.q, self.k, self.v, slopes=self.slopes, wanted=("dq", "dk", "dv", *more), **states
        )

    def floor(self) -> None:
        """Only read do, q, k and v, and write as much as dq, dk and dv are."""
        self._stream("stream_backward", *self._written, *(self.bits[name] for name in "oqkv"))

    def checked(self) -> Any:
        """Return the gradients of a call; None where one has NaN, in any head.

        Those of a call before are made NaN: the next is likely to get their memory, where what it leaves out is seen.
        """
        self._poison_results(self.call())
        found = self.call()
        return None if any(map(self._has_nan, self.results(found))) else found

    def _poison_results(self, found: Any) -> None:
        for array in self.results(found):
            _poison(self._as_bits(array))

    def _as_bits(self, array: Any) -> Any:
        if self.torch is None:
            return array.view(self._integers)
        import cupy

        return cupy.from_dlpack(array.view(getattr(self.torch, f"int{8 * array.itemsize}")))

    def _has_nan(self, array: Any) -> bool:
        infinity = np.array(np.inf, _arrays.dtype_of(self.dtype)).view(self._integers)[()]
        all_but_sign = np.iinfo(infinity.dtype).max
        return any(bool(((part & all_but_sign) > infinity).any()) for part in _parts(self._as_bits(array)))

    def results(self, found: Any) -> tuple[Any, ...]:
        """Return dq, dk and dv of what a call of ours, or of a peer's, gave."""
        return tuple(found[:3])

    def call_of(self, function: Attention, *, heads_first: bool = False, factor: float = 1.0) -> Call:
        """Return a call for the gradients, by torch, of a peer's function of q, k and v, in memory as it wants them.

        Its outputs lack a factor, which goes into do.
        """
        torch = self.torch
        *leaves, do = self.tensors(("q", "k", "v", "do"), heads_first=heads_first)
        leaves = [tensor.detach().requires_grad_() for tensor in leaves]
        do = do if factor == 1 else do * factor

        def attend() -> Any:
            with torch.enable_grad():
                return function(*leaves)

        make_o = attend if self.makes_o_again else functools.cache(attend)
        return lambda: torch.autograd.grad(make_o(), leaves, do, retain_graph=not self.makes_o_again)

    def extra_memory(self) -> float | None:
        """Return the peak of what a call takes beyond inputs and gradients, over the bytes of q, k, v and do.

        Of torch's allocator, which our calls on its tensors use too; None without torch.
        """
        if self.torch is None:
            return None
        self.call()
        before = self.torch.cuda.memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        gradients = self.results(self.call())
        taken = self.torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients)
        return float(taken / sum(bits.nbytes for bits in self.bits.values()))


class Train(Backward):
    """A forward and a backward, through torch."""

    num_passes = 3.5
    makes_o_again = True

    def __init__(self, gpu: Gpu, shape: Shape, dtype: str, slopes: Array, heads_first: bool) -> None:
        super().__init__(gpu, shape, dtype, slopes, heads_first)
        self._step = self.call_of(lambda q, k, v: lightning_attention(q, k, v, slopes=self.slopes))

    def call(self, *more: str) -> Any:
        """Make the step that is measured."""
        assert not more
        return self._step()

    def floor(self) -> None:
        """Do what both ops must, one behind the other."""
        self._stream("stream", self._written[2], *(self.bits[name] for name in "qkv"))
        super().floor()


INPUTS: dict[str, type[Forward] | type[Backward]] = {"forward": Forward, "backward": Backward, "train": Train}


def _poison(bits: Any) -> None:
    """Make every element a NaN all of whose bits are 1."""
    bits.data.memset_async(0xFF, bits.nbytes)


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

    def inputs(self, op: str, shape: Shape, dtype: str, slopes: Array, heads_first: bool) -> Forward | Backward:
        """Make arrays to measure with; those with heads first are views of [batch, num_heads, seqlen, head_dim]."""
        import cupy

        # Two pools: what one keeps of earlier arrays, the other may need.
        cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()
        return INPUTS[op](self, shape, dtype, slopes, heads_first)

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
        import cupy

        call()  # compiled, tuned
        self.device.synchronize()
        start = time.perf_counter()
        call()
        queued = time.perf_counter()
        self.device.synchronize()
        num_repeats = max(7, min(51, int(seconds / (time.perf_counter() - start))))
        delay = 2 * (queued - start) + 2e-5
        repeats: list[tuple[Any, Any]] = []
        for _ in range(2 * num_repeats + 20):
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
                repeats.append((before, after))
            if len(repeats) == num_repeats:
                break
        self.device.synchronize()
        if len(repeats) < num_repeats:
            raise RuntimeError("the call waits for the device, so its time there alone cannot be told")
        times = [float(cupy.cuda.get_elapsed_time(before, after)) for before, after in repeats]
        return Timing(float(np.median(times)), min(times), float(np.percentile(times, 90)), num_repeats)

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


def _of_heads_first(function: Callable[..., Any]) -> Attention:
    """Let a function of [batch, num_heads, seqlen, head_dim] take views, and return one."""
    return lambda q, k, v: function(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)


def _without_scale(x: Forward | Backward, function: Callable[..., Any]) -> Call:
    """Call a function of contiguous [batch, num_heads, seqlen, head_dim] that knows no scale."""
    slopes = x.slopes.float()
    attend = _of_heads_first(lambda q, k, v: function(q, k, v, slopes))
    return x.call_of(attend, heads_first=True, factor=x.scale)


def _fla(x: Forward | Backward) -> dict[str, Call]:
    ops = importlib.import_module(_MODULES["fla"])
    options = {"g_gamma": -x.slopes.float(), "scale": x.scale}
    return {
        "fla chunk": x.call_of(lambda q, k, v: ops.chunk_simple_gla(q, k, v, **options)[0]),
        "fla fused_chunk": x.call_of(lambda q, k, v: ops.fused_chunk_simple_gla(q, k, v, **options)[0]),
    }


def _tk(x: Forward) -> dict[str, Call]:
    return {"tk": _without_scale(x, importlib.import_module(_MODULES["tk"]).linear_attention)}


def _lightning_attn(x: Forward | Backward) -> dict[str, Call]:
    function = importlib.import_module(_MODULES["lightning_attn"]).lightning_attn_func
    return {"lightning_attn": _without_scale(x, function)}


def _sdpa(x: Forward | Backward) -> dict[str, Call]:
    """Softmax attention by cuDNN: another function, the one that many come from."""
    num_scores = x.shape.batch * x.shape.num_heads * x.shape.seqlen**2
    flop = x.num_passes * num_scores * (x.shape.head_dim + x.shape.v_dim)
    if flop > _MAX_SCORE_FLOP:
        raise ValueError(f"its scores would take {flop / 1e15:.0f} PFLOP")
    attention = importlib.import_module("torch.nn.attention")
    softmax_attention = x.torch.nn.functional.scaled_dot_product_attention

    def attend(q: Any, k: Any, v: Any) -> Any:
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            return softmax_attention(q, k, v, is_causal=True, scale=x.scale)

    return {"sdpa": x.call_of(_of_heads_first(attend))}


def _naive(x: Forward) -> dict[str, Call]:
    """The O(n^2) form, ``((q k^T) * mask) v``."""
    num_bytes = x.shape.batch * x.shape.num_heads * x.shape.seqlen**2 * _arrays.ITEMSIZES[x.dtype]
    if num_bytes > _MAX_SCORE_BYTES:
        raise ValueError(f"its scores would take {num_bytes / 1e9:.0f} GB")
    position = x.torch.arange(x.shape.seqlen, device=x.q.device, dtype=x.slopes.dtype)
    distance = (position[:, None] - position).clamp(min=0)
    mask = x.torch.stack([(x.scale * x.torch.exp(-slope * distance)).tril().to(x.q.dtype) for slope in x.slopes])
    return {"naive": x.call_of(_of_heads_first(lambda q, k, v: (q @ k.mT * mask) @ v))}


def _portable(x: Forward) -> dict[str, Call]:
    """Our own kernels for any GPU, where others are chosen: of the forward alone."""
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


# From inputs to calls, by variant, that return o as [batch, seqlen, num_heads, V], or gradients of q, k and v.
PEER_CALLS: dict[str, Callable[[Any], dict[str, Call]]] = {
    "fla": _fla,
    "tk": _tk,
    "lightning_attn": _lightning_attn,
    "sdpa": _sdpa,
    "naive": _naive,
    "portable": _portable,
}
DIFFERENTIABLE_PEERS = ("fla", "lightning_attn", "sdpa")
