"""The short way of a call that was made before: when it is taken, that it is right, and that it checks what may change.

No GPU is needed: see fake_gpu.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
import types

import numpy as np
import pytest
from conftest import BOUNDS, STATE_BOUNDS, relative_rms
from fake_gpu import FakeGpu, to_numpy

from lightning_cupy import _arrays, _bench_gpu, _calls, _launch, _run, forward, lightning_attention, reference

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

SHAPE, V_SHAPE, STATE_SHAPE = (2, 40, 3, 8), (2, 40, 3, 12), (2, 3, 8, 12)


@pytest.fixture
def gpu(monkeypatch):
    before = cupy.cuda.get_allocator()
    gpu = FakeGpu(cupy, monkeypatch)
    cupy.cuda.set_allocator(gpu.allocate)
    _arrays._cupy_library.cache_clear()
    uploaded = {}
    # Of the same values the same array, kept, as the real one does.
    monkeypatch.setattr(
        _run,
        "_uploaded_slopes",
        lambda values, _: _arrays.view("slopes", uploaded.setdefault(values, gpu.array(np.frombuffer(values)))),
    )
    yield gpu
    cupy.cuda.set_allocator(before)
    _arrays._cupy_library.cache_clear()
    _arrays._libraries.clear()


def normal(rng, *shapes):
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def expect(q, k, v, **options):
    return reference.chunked(q, k, v, dtype=np.float64, **options)


def check(result, q, k, v, **options):
    """The result is that of the reference, in CuPy arrays; a pair if there is a state."""
    o, state = result if isinstance(result, tuple) else (result, None)
    expected, expected_state = expect(q, k, v, **options)
    assert relative_rms(to_numpy(o), expected) <= BOUNDS["float32"]
    assert state is None or relative_rms(to_numpy(state), expected_state) <= STATE_BOUNDS["float32"]


@pytest.mark.parametrize("return_state", [True, False])
@pytest.mark.parametrize("with_out", [True, False])
@pytest.mark.parametrize("with_initial", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3, 2, np.float64(0.3), np.float32(-1.5)])
@pytest.mark.parametrize("slopes", ["none", "one", "int", "list", "host", "double", "single"])
def test_second_call_is_short_and_right(gpu, rng, slopes, scale, with_initial, with_out, return_state):
    for turn in range(3):
        q, k, v, initial = normal(rng, SHAPE, SHAPE, V_SHAPE, STATE_SHAPE)
        on_device = rng.uniform(0, 0.1, 3)
        passed, values = {
            "none": (None, None),
            "one": (0.05, 0.05),
            "int": (1, 1),
            "list": ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
            "host": (np.float32([0.1, 0.2, 0.3]), np.float32([0.1, 0.2, 0.3])),
            "double": (gpu.array(on_device), on_device),
            "single": (gpu.array(on_device.astype(np.float32)), on_device.astype(np.float32)),
        }[slopes]
        out = gpu.array(np.full(V_SHAPE, np.nan, np.float32)) if with_out else None
        before = gpu.num_views
        result = lightning_attention(
            *map(gpu.array, (q, k, v)),
            out,
            slopes=passed,
            scale=scale,
            initial_state=gpu.array(initial) if with_initial else None,
            return_state=return_state,
        )
        assert (gpu.num_views == before) == (turn > 0), "views are only made where arguments are checked"
        assert isinstance(result, tuple) == return_state
        assert out is None or (result[0] if return_state else result) is out
        check(result, q, k, v, slopes=values, scale=scale, initial_state=initial if with_initial else None)
        assert gpu.launches[-1][2] == 7, "not CuPy's current stream"


def test_short_way_launches_what_the_full_way_did(gpu, rng, monkeypatch):
    # Segments, and their memory; NumPy computes none of it, so the launches are compared.
    monkeypatch.setattr(forward, "num_segments_for", lambda *_: 2)
    arrays = [gpu.array(x) for x in normal(rng, (1, 500, 1, 8), (1, 500, 1, 8), (1, 500, 1, 8))]
    for options in ({}, {"causal": False}, {"return_state": True}):
        gpu.launches.clear()
        for _ in range(2):
            lightning_attention(*arrays, **options)
        first, second = gpu.launches[:3], gpu.launches[3:]
        assert [launch[0][1] for launch in first] == ["forward", "scan", "forward"]
        assert [launch[:3] for launch in first] == [launch[:3] for launch in second]
        for name in forward._ARGS.names:
            allocated = name in ("o", "final_state", "segment_states")
            for (*_, one), (*_, other) in zip(first, second, strict=True):
                assert allocated or (one[name] == other[name]).all(), name
                assert not allocated or bool(one[name]) == bool(other[name]), name
        assert first[0][3]["segment_states"]
        assert bool(first[0][3]["final_state"]) == bool(options)


def changed_calls(gpu, rng):
    """Pairs of what changed, and the arguments of a call that must not be taken for the plain one."""
    q, k, v = normal(rng, SHAPE, SHAPE, V_SHAPE)
    yield "strides", (q.swapaxes(1, 2).copy().swapaxes(1, 2), k, v), {}
    yield "shape", (q[:, :30], k[:, :30], v[:, :30]), {}
    yield "scale", (q, k, v), {"scale": 0.5}
    yield "another scale", (q, k, v), {"scale": 0.25}
    yield "zero", (q, k, v), {"scale": 0.0}
    yield "slopes", (q, k, v), {"slopes": 0.5}
    yield "other slopes", (q, k, v), {"slopes": 0.25}
    yield "slopes of heads", (q, k, v), {"slopes": [0.5, 0.5, 0.25]}
    yield "other slopes of heads", (q, k, v), {"slopes": [0.5, 0.25, 0.25]}
    yield "rank", (q[0], k[0], v[0]), {}


def test_changed_arguments_are_another_call(gpu, rng):
    q, k, v = normal(rng, SHAPE, SHAPE, V_SHAPE)
    check(lightning_attention(*map(gpu.array, (q, k, v))), q, k, v)
    for what, arrays, options in changed_calls(gpu, rng):
        before = gpu.num_views
        check(lightning_attention(*map(gpu.array, arrays), **options), *arrays, **options)
        assert gpu.num_views > before, what


def test_calls_that_take_turns_are_found_again(gpu, rng):
    q, k, v = normal(rng, SHAPE, SHAPE, V_SHAPE)
    arrays, shorter = [gpu.array(x) for x in (q, k, v)], [gpu.array(x[:, :30]) for x in (q, k, v)]
    seen = []
    for _ in range(3):
        check(lightning_attention(*arrays, slopes=0.5), q, k, v, slopes=0.5)
        check(lightning_attention(*shorter), q[:, :30], k[:, :30], v[:, :30])
        check(lightning_attention(*shorter), q[:, :30], k[:, :30], v[:, :30])
        seen.append(gpu.num_views)
    assert 0 < seen[0] == seen[1] == seen[2], "looked at only in the first round"


def test_sign_of_a_zero_scale(gpu, rng):
    arrays = [gpu.array(x) for x in normal(rng, SHAPE, SHAPE, V_SHAPE)]
    for scale in (0.0, -0.0, 0.0):
        lightning_attention(*arrays, scale=scale)
        assert np.signbit(gpu.launches[-1][3]["scale"]) == np.signbit(scale)


def test_alignment_is_part_of_the_call(gpu, rng):
    q, k, v = normal(rng, SHAPE, SHAPE, V_SHAPE)
    for offset, vectorized in ((0, 1), (4, 0), (16, 1), (8, 0)):
        result = lightning_attention(gpu.array(q, offset=offset), gpu.array(k), gpu.array(v))
        check(result, q, k, v)
        assert gpu.launches[-1][3]["q_vectorized"] == vectorized
        assert gpu.launches[-1][3]["k_vectorized"] == 1


def test_errors_come_again(gpu, rng):
    q, k, v = (gpu.array(x) for x in normal(rng, SHAPE, SHAPE, V_SHAPE))
    for _ in range(2):
        lightning_attention(q, k, v, scale=1.0, slopes=1.0)
        lightning_attention(q, k, v, slopes=[1.0, 1.0, 1.0])
        with pytest.raises(TypeError, match="scale must be a real number, but got bool"):
            lightning_attention(q, k, v, scale=True, slopes=1.0)
        with pytest.raises(ValueError, match="scale must be finite, but got inf"):
            lightning_attention(q, k, v, scale=10**400)
        with pytest.raises(TypeError, match="slopes must be real numbers, but got bool"):
            lightning_attention(q, k, v, scale=1.0, slopes=True)
        with pytest.raises(TypeError, match="slopes must be real numbers, but got bool"):
            lightning_attention(q, k, v, slopes=[True, True, True])
        with pytest.raises(ValueError, match="slopes must be finite"):
            lightning_attention(q, k, v, slopes=[1.0, 1.0, np.nan])
        with pytest.raises(ValueError, match="backend='cpu' is for arrays on the CPU"):
            lightning_attention(q, k, v, backend="cpu")
        with pytest.raises(ValueError, match="backend must be"):
            lightning_attention(q, k, v, backend=["cuda"])
        with pytest.raises(ValueError, match="k is on CUDA device 1, but q is on CUDA device 0"):
            lightning_attention(q, gpu.array(to_numpy(k), device_id=1), v)
        with pytest.raises(TypeError, match="k must be float32 to go with q's float32, but got float16"):
            lightning_attention(q, gpu.array(to_numpy(k).astype(np.float16)), v)
        with pytest.raises(TypeError, match="v must be a NumPy, CuPy or torch array"):
            lightning_attention(q, k, None)


def test_slopes_changed_in_place_are_seen(gpu, rng):
    q, k, v = normal(rng, SHAPE, SHAPE, V_SHAPE)
    arrays, slopes = [gpu.array(x) for x in (q, k, v)], np.array([0.1, 0.2, 0.3])
    for factor in (1.0, 0.5, 1.0):
        slopes[...] = factor * np.array([0.1, 0.2, 0.3])
        check(lightning_attention(*arrays, slopes=slopes), q, k, v, slopes=slopes)


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state", "slopes"])
def test_overlap_is_found_on_the_short_way(gpu, rng, name):
    arrays = dict(zip("qkv", (gpu.array(x) for x in normal(rng, (9, 4, 8), (9, 4, 8), (9, 4, 8))), strict=True))
    arrays["initial_state"] = gpu.array(*normal(rng, (4, 8, 8)))
    arrays["slopes"] = gpu.array(np.float32([0.1, 0.2, 0.3, 0.4]))
    memory = gpu.array(np.zeros(5000, np.float32))
    first, out = memory[:2000], memory[2000:2288].reshape(9, 4, 8)
    inside = first[: arrays[name].size].reshape(arrays[name].shape)
    for _ in range(2):
        lightning_attention(**arrays | {name: inside}, out=out)
    num_calls, num_views = len(_calls._calls), gpu.num_views
    # The last element of one is the first of the other, either way round; and a place just beside it.
    for start, clash in ((2000 - inside.size, False), (2004 - inside.size, True), (2284, True), (2288, False)):
        moved = memory[start : start + inside.size].reshape(inside.shape)
        before = len(gpu.launches)
        if clash:
            with pytest.raises(ValueError, match=f"out must not overlap an input, but it shares memory with {name}"):
                lightning_attention(**arrays | {name: moved}, out=out)
        else:
            lightning_attention(**arrays | {name: moved}, out=out)
        assert (len(gpu.launches) == before) == clash
    assert len(_calls._calls) == num_calls, "not the call that was made before"
    assert gpu.num_views > num_views


def test_side_by_side_is_not_overlapping(gpu, rng):
    packed = gpu.array(*normal(rng, (2, 40, 4, 3, 8)))
    for _ in range(2):
        q, k, v, out = (packed[:, :, i] for i in range(4))
        expected = [to_numpy(x) for x in (q, k, v)]
        assert lightning_attention(q, k, v, out) is out
        check(out, *expected)


def test_number_of_calls_kept_is_bounded(gpu, rng, monkeypatch):
    monkeypatch.setattr(_calls, "_MAX_CALLS", 8)
    q, k, v = normal(rng, SHAPE, SHAPE, V_SHAPE)
    arrays = [gpu.array(x) for x in (q, k, v)]
    for i in range(30):
        check(lightning_attention(*arrays, scale=0.1 + i), q, k, v, scale=0.1 + i)
        assert 1 <= len(_calls._calls) <= 8


def test_threads_do_not_share_arguments(gpu, rng):
    problems = [normal(rng, SHAPE, SHAPE, V_SHAPE) for _ in range(8)]
    arrays = [[gpu.array(x) for x in problem] for problem in problems]
    lightning_attention(*arrays[0])
    start = threading.Barrier(8)
    gpu.before_launch = lambda: time.sleep(0.001)  # as the driver, while it has let the GIL go

    def work(idx):
        start.wait()
        return [to_numpy(lightning_attention(*arrays[idx])) for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for problem, results in zip(problems, pool.map(work, range(8)), strict=True):
            expected, _ = expect(*problem)
            for o in results:
                assert relative_rms(o, expected) <= BOUNDS["float32"]


def test_context_of_the_arrays_is_entered_where_another_is_current(gpu, rng):
    q, k, v = normal(rng, SHAPE, SHAPE, V_SHAPE)
    on_first, on_second = ([gpu.array(x, device_id=device_id) for x in (q, k, v)] for device_id in (0, 1))
    lightning_attention(*on_first)
    lightning_attention(*on_first)
    assert set(gpu.entered) == {0}
    lightning_attention(*on_second)
    assert 1 in gpu.entered, "taken for the call on the first device"
    gpu.entered.clear()
    check(lightning_attention(*on_second), q, k, v)
    assert gpu.entered == [1]
    gpu.context = 0  # a new thread has none
    check(lightning_attention(*on_second), q, k, v)
    assert gpu.entered == [1, 1]
    gpu.context = 1001
    check(lightning_attention(*on_second), q, k, v)
    assert gpu.entered == [1, 1]


def test_calls_that_are_checked_each_time(gpu, rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v = (gpu.array(x) for x in normal(rng, SHAPE, SHAPE, V_SHAPE))
    lightning_attention(q, k, v)

    def signature(q, k, v, out=None, slopes=None, scale=None, causal=True, initial_state=None, precision="default"):
        return _calls.look_up(q, k, v, out, slopes, scale, causal, initial_state, False, precision, "auto")[0]

    tensor = torch.zeros(SHAPE)
    assert signature(q, k, v) is not None
    assert signature(tensor, k, v) is None
    assert signature(q, tensor, v) is None
    assert signature(q, k, v, out=np.zeros(V_SHAPE)) is None
    assert signature(q, k, v, slopes=tensor) is None
    assert signature(q, k, v, slopes="fla") is None
    assert signature(q, k, v, slopes=True) is None
    assert signature(q, k, v, initial_state=tensor) is None
    assert signature(q, k, v, scale=True) is None
    assert signature(q, k, v, causal=np.True_) is None
    assert signature(q, k, v, precision=None) is None
    assert signature(q, k, v, precision="high") not in (None, signature(q, k, v))
    assert signature(np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(V_SHAPE)) is None


# --- torch: CPU tensors that are said to be on CUDA ---


@pytest.fixture
def torch(gpu, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import lightning_cupy.torch as adapter

    view = adapter.view
    places = {}

    def view_on_cuda(name, tensor):
        return dataclasses.replace(view(name, tensor), device=places.get(id(tensor), 0))

    monkeypatch.setattr(adapter, "view", view_on_cuda)
    monkeypatch.setattr(adapter, "_current_stream", lambda device_id: 9)
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
    adapter.library.cache_clear()
    _arrays._libraries.clear()
    gpu.places = places
    yield torch
    adapter.library.cache_clear()


def check_torch(o, q, k, v, **options):
    assert relative_rms(o.numpy(), expect(*(x.numpy() for x in (q, k, v)), **options)[0]) <= BOUNDS["float32"]


def tensors(torch, rng):
    return [torch.from_numpy(x) for x in normal(rng, SHAPE, SHAPE, V_SHAPE)]


@pytest.mark.parametrize("with_out", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
def test_torch_second_call_is_short_and_right(gpu, torch, rng, permuted, with_out):
    for turn in range(3):
        q, k, v = tensors(torch, rng)
        if permuted:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        slopes = torch.rand(3)
        out = torch.full(V_SHAPE, torch.nan) if with_out else None
        version = out._version if with_out else 0
        before = gpu.num_views
        o, state = lightning_attention(q, k, v, out, slopes=slopes, return_state=True)
        assert (gpu.num_views == before) == (turn > 0)
        assert type(o) is type(state) is torch.Tensor
        assert o.is_contiguous()
        assert gpu.launches[-1][2] == 9, "not torch's current stream"
        assert out is None or (o is out and out._version > version)
        check_torch(o, q, k, v, slopes=slopes.numpy())


def test_torch_state_of_a_tensor_is_seen_each_time(gpu, torch, rng):
    q, k, v = tensors(torch, rng)
    for _ in range(2):
        check_torch(lightning_attention(q, k, v), q, k, v)
    for _ in range(2):
        o = lightning_attention(q, k.clone().requires_grad_(), v)
        assert o.requires_grad
        check_torch(o.detach(), q, k, v)
        with torch.no_grad():
            o = lightning_attention(q, k.clone().requires_grad_(), v)
        assert not o.requires_grad
        check_torch(o, q, k, v)
    with pytest.raises(TypeError, match="v is a lazily negated view"):
        lightning_attention(q, k, torch._neg_view(v))
    with pytest.raises(TypeError, match="q has layout"):
        lightning_attention(q.to_sparse(), k, v)
    with pytest.raises(TypeError, match="v must be float32 to go with q's float32, but got float64"):
        lightning_attention(q, k, v.double())
    before = gpu.num_views
    check_torch(lightning_attention(q, k, v), q, k, v)
    assert gpu.num_views == before


def test_torch_slopes_in_host_memory_are_values(gpu, torch, rng):
    q, k, v = tensors(torch, rng)
    slopes = torch.tensor([0.1, 0.2, 0.3])
    gpu.places[id(slopes)] = None
    for _ in range(3):
        slopes *= 0.5
        check_torch(lightning_attention(q, k, v, slopes=slopes), q, k, v, slopes=slopes.numpy())


# --- Programs ---


def test_bench_of_the_portable_kernels(gpu, rng, monkeypatch):
    q, k, v = normal(rng, SHAPE, SHAPE, V_SHAPE)
    slopes, shape = np.array([0.1, 0.2, 0.3]), _bench_gpu.Shape.of(2, 3, 40, 8, 12)
    on_gpu = {"o": gpu.array(np.full(V_SHAPE, np.nan, np.float32)), "slopes": gpu.array(slopes)}
    on_gpu |= {name: gpu.array(x) for name, x in zip("qkv", (q, k, v), strict=True)}
    machine = types.SimpleNamespace(device=types.SimpleNamespace(id=0))
    inputs = types.SimpleNamespace(gpu=machine, shape=shape, dtype="float32", scale=0.3, **on_gpu)
    with pytest.raises(ValueError, match="the same kernels"):
        _bench_gpu.PEER_CALLS["portable"](inputs)
    monkeypatch.setattr(forward, "steps_for", lambda _: _launch.Steps())
    (call,) = _bench_gpu.PEER_CALLS["portable"](inputs).values()
    check(call(), q, k, v, slopes=slopes, scale=0.3)


def test_program_of_several_structs_unique_numbers_and_a_cooperative_launch(gpu, monkeypatch):
    seen = []

    def launch(*arguments):
        address = int(np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint64 * 1).from_address(arguments[9]))[0])
        seen.append((arguments[:8], len(arguments), np.ctypeslib.ctypes.string_at(address, 32)))

    for name in ("launchKernel", "launchCooperativeKernel"):
        monkeypatch.setattr(cupy.cuda.driver, name, launch)
    template = bytes(range(32))
    one = _launch.Arguments(template, ((8, "q"), (16, _launch.UNIQUE), (24, "other")))
    other = _launch.Arguments(template, ((0, "o"),))
    step = _launch.Launch("a.cu", "f", (), (1, 2, 3), (4, 5, 6), 77, one)
    steps = _launch.Steps(
        (step, dataclasses.replace(step, name="g", arguments=other, cooperative=True), step),
        (_launch.Buffer("scratch", (2, 3), "float64"), _launch.Buffer("other", (4,), "float32")),
    )
    like = _arrays.view("q", gpu.array(np.zeros(4, np.float32)))
    program = _launch.Program(steps, ("o", "q"), (_launch.Buffer("o", (5,), "float32"),), like)
    (o,) = program.run([0, 0x1234], like.owner)
    assert (o.shape, o.dtype) == ((5,), np.float32)
    contents = [np.frombuffer(content, np.uint64) for *_, content in seen]
    words = np.frombuffer(template, np.uint64)
    unique, other = contents[0][2:]
    assert unique % 2**32 == 0
    assert other not in (0, words[3], 0x1234, o.data.ptr)
    assert (contents[0] == (words[0], 0x1234, unique, other)).all()
    assert (contents[1] == (o.data.ptr, *words[1:])).all()
    assert (contents[2] == contents[0]).all()
    assert [count for _, count, _ in seen] == [11, 10, 11]
    assert seen[0][0] == (seen[2][0][0], 1, 2, 3, 4, 5, 6, 77)
    assert len({geometry[0] for geometry, *_ in seen}) == 2
    program.run([0, 0x1234], like.owner)
    assert np.frombuffer(seen[3][2], np.uint64)[2] not in (unique, words[2]), "two calls have the same number"
