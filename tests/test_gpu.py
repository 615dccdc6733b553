"""The kernels against the float64 reference, and what a call promises about devices, streams and memory.

One file of more than 500 lines, so that all that a GPU must show is run, and read, in one place.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import BOUNDS, HIGH_BOUNDS, LENGTHS, STATE_BOUNDS, relative_rms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightning_cupy
from lightning_cupy import _arrays, _calls, _compile, forward, forward_sm90, lightning_attention, reference

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

DTYPES = tuple(BOUNDS)
SLOPES = {
    "none": None,
    "zero": 0.0,
    "tiny": 3.9e-8,
    "half": 0.917,
    "three": 3.0,
    "seven": 7.0,
    "large": 100.0,
    "growing": -0.01,
}


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def state_dtype(name: str) -> str:
    return "float64" if name == "float64" else "float32"


def normal(rng, shape, dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype_of(dtype))


def to_gpu(array: np.ndarray):
    """Copy to a CuPy array of the same dtype."""
    return cupy.asarray(np.ascontiguousarray(array).view(f"u{array.itemsize}")).view(array.dtype)


def nan_out(v):
    """An output in which an element that nobody writes stays NaN."""
    out = cupy.empty(v.shape, v.dtype)
    out.view(f"u{v.dtype.itemsize}")[...] = 2 ** (8 * v.dtype.itemsize) - 1
    return out


def check(q, k, v, dtype, *, factor=1.0, out=None, arrays=None, precision="default", **options):
    """Compare a call on the GPU with the reference; `arrays` are q, k, v there when they are not plain copies."""
    arrays = arrays or [to_gpu(x) for x in (q, k, v)]
    out = nan_out(arrays[2]) if out is None else out
    on_gpu = dict(options)
    if options.get("initial_state") is not None:
        on_gpu["initial_state"] = cupy.asarray(options["initial_state"])
    o, state = lightning_attention(*arrays, out, return_state=True, precision=precision, **on_gpu)
    assert o is out
    expected, expected_state = reference.chunked(q, k, v, dtype=np.float64, **options)
    assert state.dtype == state_dtype(dtype)
    bounds = HIGH_BOUNDS if precision == "high" else BOUNDS
    assert relative_rms(cupy.asnumpy(o), expected) <= factor * bounds[dtype]
    assert relative_rms(cupy.asnumpy(state), expected_state) <= factor * STATE_BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_lengths(rng, dtype, seqlen):
    slopes = lightning_cupy.slopes(6)
    q, k, v = (normal(rng, (2, seqlen, 6, 64), dtype) for _ in range(3))
    state = rng.standard_normal((2, 6, 64, 64)).astype(state_dtype(dtype))
    check(q, k, v, dtype, slopes=slopes, initial_state=state)
    check(q, k, v, dtype)
    check(q, k, v, dtype, causal=False, initial_state=state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("qk_dim", "v_dim"), [(17, 40), (32, 32), (64, 100), (96, 96), (128, 128), (128, 8), (192, 192), (256, 256)]
)
def test_head_dims(rng, dtype, qk_dim, v_dim):
    q, k = (normal(rng, (2, 200, 3, qk_dim), dtype) for _ in range(2))
    v = normal(rng, (2, 200, 3, v_dim), dtype)
    check(q, k, v, dtype, slopes=[0.2, 0.01, 0.0])
    check(q, k, v, dtype, causal=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(1, 1), (1, 7), (5, 1)])
def test_smallest_head_dims(rng, dtype, qk_dim, v_dim):
    # Sums of so few products cancel: errors are relative to what is left, so the bound is that of many heads.
    q, k = (normal(rng, (1, 130, 64, qk_dim), dtype) for _ in range(2))
    check(q, k, normal(rng, (1, 130, 64, v_dim), dtype), dtype, slopes=0.05, factor=1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slopes", SLOPES.values(), ids=SLOPES)
def test_slopes(rng, dtype, slopes):
    q, k, v = (normal(rng, (500, 4, 64), dtype) for _ in range(3))
    state = rng.standard_normal((4, 64, 64)).astype(state_dtype(dtype))
    check(q, k, v, dtype, slopes=slopes, initial_state=state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slopes", [None, 0.002], ids=["undecayed", "decayed"])
def test_long_sequence_of_few_heads(rng, dtype, slopes):
    q, k, v = (normal(rng, (16384, 2, 128), dtype) for _ in range(3))
    check(q, k, v, dtype, slopes=slopes)


@pytest.mark.parametrize("slopes", [4.6e-10, 1e-9, 1e-6, 1e-4])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "whole"])
def test_float32_decay_does_not_drift(rng, slopes, cut, monkeypatch):
    # The decay of a chunk is so near to 1 that it rounds the same way each time: the errors add up.
    if not cut:
        monkeypatch.setattr(forward, "num_segments_for", lambda *_: 1)
        monkeypatch.setattr(_calls, "_calls", {})
    q, k, v = (normal(rng, (16384, 2, 64), "float32") for _ in range(3))
    check(q, k, v, "float32", slopes=slopes)


def test_few_heads_are_cut_into_segments():
    plan = forward.plan_for("bfloat16", 128, 90)
    slots = 132 * forward.blocks_per_sm(plan)
    assert 2 * forward.num_segments_for(2, 131072 // plan.chunk, slots) >= 0.9 * 132
    assert forward.num_segments_for(4 * 32 * 2, 2048 // plan.chunk, slots) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(rng, dtype):
    q, k, v = (normal(rng, (150, 32), dtype) for _ in range(3))
    check(q, k, v, dtype, slopes=0.1, initial_state=rng.standard_normal((32, 32)).astype(state_dtype(dtype)))
    q, k, v = (x[:, None] for x in (q, k, v))
    check(q, k, v, dtype, slopes=[0.1])


def strided(array, how):
    """The same elements on the GPU, with other strides."""
    x = to_gpu(array)
    if how == "heads first":
        return cupy.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if how == "tokens last":
        return cupy.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if how == "sliced":
        wide = cupy.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "part of wider":
        wide = cupy.zeros((*x.shape[:-1], x.shape[-1] + 16), x.dtype)
        wide[..., 8:-8] = x
        return wide[..., 8:-8]
    if how == "reversed":
        return cupy.ascontiguousarray(x[:, ::-1, :, ::-1])[:, ::-1, :, ::-1]
    if how == "unaligned":
        flat = cupy.zeros(x.size + 1, x.dtype)
        flat[1:] = x.ravel()
        return flat[1:].reshape(x.shape)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["heads first", "tokens last", "sliced", "reversed", "unaligned"])
def test_strides(rng, dtype, how):
    q, k, v = (normal(rng, (2, 130, 3, 64), dtype) for _ in range(3))
    arrays = [strided(x, how) for x in (q, k, v)]
    check(q, k, v, dtype, slopes=0.05, arrays=arrays, out=strided(cupy.asnumpy(nan_out(arrays[2])), how))


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_inputs(rng, dtype):
    q, k, v = (normal(rng, (1, 130, 1, 64), dtype) for _ in range(3))
    shape = (2, 130, 3, 64)
    arrays = [cupy.broadcast_to(to_gpu(x), shape) for x in (q, k, v)]
    check(*(np.broadcast_to(x, shape) for x in (q, k, v)), dtype, slopes=0.05, arrays=arrays, out=nan_out(arrays[2]))


def test_strided_initial_state(rng):
    q, k, v = (normal(rng, (2, 130, 3, 64), "float32") for _ in range(3))
    state = rng.standard_normal((2, 3, 64, 64)).astype(np.float32)
    transposed = cupy.ascontiguousarray(cupy.asarray(state).transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    before = transposed.copy()
    o = lightning_attention(*map(to_gpu, (q, k, v)), initial_state=transposed)
    expected, _ = reference.chunked(q, k, v, initial_state=state, dtype=np.float64)
    assert relative_rms(o.get(), expected) <= BOUNDS["float32"]
    assert (transposed == before).all()


@pytest.fixture
def plans_of(monkeypatch):
    """A function that makes this GPU run the plans of an older or smaller one: their instructions all exist here."""
    real, cubin_path = forward.device_properties, _compile.cubin_path

    def pretend(compute_capability: int) -> None:
        if compute_capability > real(0)[0]:
            pytest.skip("this GPU is older")
        monkeypatch.setattr(forward, "device_properties", lambda device_id: (compute_capability, real(device_id)[1]))
        monkeypatch.setattr(_compile, "cubin_path", lambda file, constants, _: cubin_path(file, constants, real(0)[0]))
        monkeypatch.setattr(_compile, "_kernels", {})
        monkeypatch.setattr(_calls, "_calls", {})

    return pretend


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("arch", [75, 90])
def test_large_and_small_magnitudes(rng, dtype, arch, plans_of):
    plans_of(arch)
    shape = (2000, 2, 64)
    for factors, scale in (((1e-3, 300, 2000), 1e-4), ((0.01, 0.01, 0.1), 1.0), ((1.0, 1.0, 1e-5), 100.0)):
        q, k, v = (rng.standard_normal(shape) * factor for factor in factors)
        check(*(x.astype(dtype_of(dtype)) for x in (q, k, v)), dtype, scale=scale)
        check(*(x.astype(dtype_of(dtype)) for x in (q, k, v)), dtype, slopes=0.3, scale=scale)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("arch", [75, 90])
def test_infinity_and_nan_leave_other_columns_alone(rng, dtype, arch, plans_of):
    plans_of(arch)
    q, k, v = (normal(rng, (200, 2, 64), dtype) for _ in range(3))
    clean = cupy.asnumpy(lightning_attention(*map(to_gpu, (q, k, v)), slopes=0.01)).astype(np.float64)
    v[5, 0, 3], v[70, 0, 20] = np.inf, np.nan
    o = cupy.asnumpy(lightning_attention(*map(to_gpu, (q, k, v)), slopes=0.01)).astype(np.float64)
    others = np.ones((2, 64), bool)
    others[0, [3, 20]] = False
    assert not np.isfinite(o[128:, 0, [3, 20]]).any()
    assert relative_rms(o[:, others], clean[:, others]) <= 2 * BOUNDS[dtype]
    q[50, 1, 7] = np.nan
    o = cupy.asnumpy(lightning_attention(*map(to_gpu, (q, k, v)), slopes=0.01)).astype(np.float64)
    assert np.isnan(o[50, 1]).all()
    rows = np.arange(200) != 50
    assert relative_rms(o[rows, 1], clean[rows, 1]) <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize("arch", [75, 90])
def test_zeros_after_a_large_state(rng, arch, plans_of):
    plans_of(arch)
    q = normal(rng, (130, 1, 64), "bfloat16")
    zeros = np.zeros_like(q)
    state = 1e15 * rng.standard_normal((1, 64, 64)).astype(np.float32)
    check(q, zeros, zeros, "bfloat16", slopes=0.01, initial_state=state)


@pytest.mark.parametrize(
    ("arch", "dtype", "qk_dim"),
    [
        *((75, dtype, qk_dim) for dtype in DTYPES for qk_dim in (64, 192, 256)),
        *((86, dtype, qk_dim) for dtype in DTYPES for qk_dim in (64, 128, 256)),
        *((80, dtype, 128) for dtype in DTYPES),
    ],
)
def test_plans_of_other_gpus(rng, arch, dtype, qk_dim, plans_of):
    plans_of(arch)
    q, k = (normal(rng, (2, 300, 3, qk_dim), dtype) for _ in range(2))
    v = normal(rng, (2, 300, 3, 72), dtype)
    check(q, k, v, dtype, slopes=[0.2, 0.0, -0.01])
    check(q, k, v, dtype, causal=False)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 5)),
    dims=st.tuples(st.integers(16, 128), st.integers(16, 128)),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations(range(4)),
    slope=st.one_of(st.none(), st.floats(-0.01, 10)),
    causal=st.booleans(),
    with_state=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_strides_dtype_and_slope(shape, dims, dtype, order, slope, causal, with_state, seed):
    rng = np.random.default_rng(seed)
    q, k = (normal(rng, (*shape, dims[0]), dtype) for _ in range(2))
    v = normal(rng, (*shape, dims[1]), dtype)
    inverse = np.argsort(order)
    arrays = [cupy.ascontiguousarray(to_gpu(x).transpose(order)).transpose(*inverse) for x in (q, k, v)]
    state = rng.standard_normal((shape[0], shape[2], *dims)).astype(state_dtype(dtype)) if with_state else None
    # A few numbers may cancel: the bounds are those of many.
    check(
        q, k, v, dtype, factor=1.3, arrays=arrays, slopes=slope if causal else None, causal=causal, initial_state=state
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(rng, dtype):
    arrays = [to_gpu(normal(rng, (3000, 2, 64), dtype)) for _ in range(3)]
    runs = [lightning_attention(*arrays, slopes=0.01, return_state=True) for _ in range(5)]
    for o, state in runs[1:]:
        assert (o.view("u1") == runs[0][0].view("u1")).all()
        assert (state.view("u1") == runs[0][1].view("u1")).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_head_and_row(rng, dtype):
    q, k, v = (normal(rng, (3, 200, 4, 64), dtype) for _ in range(3))
    clean = cupy.asnumpy(lightning_attention(*map(to_gpu, (q, k, v)), slopes=0.1))
    for array in (q, k, v):
        array[1, 50, 2] = np.nan
    o = cupy.asnumpy(lightning_attention(*map(to_gpu, (q, k, v)), slopes=0.1)).astype(np.float64)
    hit = np.zeros((3, 4), bool)
    hit[1, 2] = True
    assert np.isnan(o[1, -1, 2]).all()
    assert (o.transpose(0, 2, 1, 3)[~hit] == clean.astype(np.float64).transpose(0, 2, 1, 3)[~hit]).all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_empty(rng, shape, causal):
    q = cupy.zeros(shape, "float32")
    state = cupy.asarray(rng.standard_normal((shape[0], shape[2], 16, 16)).astype(np.float32))
    o, last = lightning_attention(q, q, q, initial_state=state, return_state=True, causal=causal)
    assert o.shape == shape
    assert last.data.ptr != state.data.ptr or state.size == 0
    if shape[1] == 0:
        assert (last == state).all()
    _, zeros = lightning_attention(q, q, q, return_state=True, causal=causal)
    assert not zeros.any() or shape[1]


def test_split_call_continues(rng):
    q, k, v = (to_gpu(normal(rng, (1000, 2, 64), "float32")) for _ in range(3))
    whole, last = lightning_attention(q, k, v, slopes=0.05, return_state=True)
    state, parts = None, []
    for part in (slice(0, 1), slice(1, 64), slice(64, 517), slice(517, 1000)):
        o, state = lightning_attention(q[part], k[part], v[part], slopes=0.05, initial_state=state, return_state=True)
        parts.append(o)
    assert relative_rms(cupy.concatenate(parts).get(), whole.get()) <= BOUNDS["float32"]
    assert relative_rms(state.get(), last.get()) <= STATE_BOUNDS["float32"]


def test_more_than_65535_heads(rng):
    q, k, v = (normal(rng, (2100, 3, 32, 16), "float32") for _ in range(3))
    check(q, k, v, "float32", slopes=0.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_more_than_2_31_elements(rng, dtype):
    block, heads, dim = 4096, 4, 128
    count = 2**31 // (block * heads * dim) + 2
    if cupy.cuda.Device().mem_info[0] < 4.5 * count * block * heads * dim * dtype_of(dtype).itemsize:
        pytest.skip("the GPU has too little free memory for four arrays of 2^31 elements")
    cells = [normal(rng, (block, heads, dim), dtype) for _ in range(3)]
    arrays = []
    for cell in cells:
        array = cupy.empty((count * block, heads, dim), cell.dtype)
        bits = f"u{cell.itemsize}"
        array.view(bits).reshape(count, block, heads, dim)[...] = to_gpu(cell).view(bits)
        arrays.append(array)
    assert arrays[0].size > 2**31
    # After a whole block of decay nothing is left of what came before: the last block repeats the second.
    out = nan_out(arrays[2])
    lightning_attention(*arrays, out, slopes=0.05)
    twice = [np.concatenate([cell, cell]) for cell in cells]
    expected, _ = reference.chunked(*twice, slopes=0.05, dtype=np.float64)
    assert relative_rms(cupy.asnumpy(out[-block:]), expected[block:]) <= BOUNDS[dtype]
    middle = 2**31 // (heads * dim) // block * block
    assert relative_rms(cupy.asnumpy(out[middle : middle + block]), expected[block:]) <= BOUNDS[dtype]
    del arrays, out
    cupy.get_default_memory_pool().free_all_blocks()


# --- The Hopper kernels ---


@pytest.fixture
def hopper(monkeypatch):
    """A function that forces a tiling of forward_sm90.cu, and returns a list where launches planned since are seen."""
    if forward.device_properties(0)[0] != 90:
        pytest.skip("forward_sm90.cu is for compute capability 9.0")
    steps_for = forward.steps_for

    def force(v_groups: int | None = None, wanted_size: int = 1, cluster: bool = True) -> list:
        launches = []

        def tiling(num_heads, seqlen, qk_dim, v_dim, num_sms, with_slopes=False):
            # As many blocks as wanted, but none without tokens.
            num_chunks = -(-seqlen // 64)
            size = -(-v_dim // 64) if cluster and v_groups == wanted_size == 1 else 1
            if num_heads > forward_sm90.num_clusters(size, num_sms):
                size = 1
            count = min(wanted_size, num_chunks)
            chunks = max(1, num_chunks // 3) if count == 2 else -(-num_chunks // count)
            return forward_sm90.Tiling(v_groups, size, *forward_sm90.cut(num_chunks, count, chunks))

        def watch(problem):
            steps = steps_for(problem)
            launches.extend(steps.launches)
            return steps

        if v_groups is not None:
            monkeypatch.setattr(forward_sm90, "tiling_for", tiling)
        monkeypatch.setattr(forward, "steps_for", watch)
        monkeypatch.setattr(_calls, "_calls", {})
        return launches

    return force


@pytest.fixture
def poisoned():
    """What CuPy allocates is NaN: results, and the memory in which blocks meet."""
    pool = cupy.get_default_memory_pool()

    def allocate(num_bytes):
        memory = pool.malloc(num_bytes)
        if num_bytes:
            memory.memset_async(0xFF, num_bytes)
        return memory

    with cupy.cuda.using_allocator(allocate):
        yield


# V_GROUPS, blocks of a team, and whether those of a head are a cluster.
TILINGS = [(1, 1), (1, 1, False), *itertools.product((1, 2), (2, 3, 7, 64)), (2, 1)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlen", [*LENGTHS, 4500])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_hopper_tilings(rng, hopper, poisoned, dtype, seqlen, tiling):
    launches = hopper(*tiling)
    q, k = (normal(rng, (2, seqlen, 3, 72), dtype) for _ in range(2))
    v = normal(rng, (2, seqlen, 3, 104), dtype)
    state = rng.standard_normal((2, 3, 72, 104)).astype(np.float32)
    # One rounded score may be the whole error of a few tokens.
    factor = 1.5 if seqlen < 64 else 1.0
    check(q, k, v, dtype, factor=factor, slopes=[0.2, 0.01, 0.0], initial_state=state)
    check(q, k, v, dtype, factor=factor)
    arrays = [to_gpu(x) for x in (q, k, v)]
    with_state, _ = lightning_attention(*arrays, return_state=True)
    assert (lightning_attention(*arrays).view("u2") == with_state.view("u2")).all()
    assert {launch.file for launch in launches} == {"forward_sm90.cu"}
    assert {dict(launch.constants)["V_GROUPS"] for launch in launches} == {tiling[0]}
    assert {launch.cooperative for launch in launches} == {min(tiling[1], -(-seqlen // 64)) > 2}
    assert {dict(launch.constants)["SPLIT"] for launch in launches} == {min(tiling[1], -(-seqlen // 64)) > 1}
    cluster = 2 if tiling == (1, 1) else 1
    assert {dict(launch.constants)["CLUSTER"] for launch in launches} == {cluster}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlen", [1, 64, 200, 1500])
@pytest.mark.parametrize("num_heads", [3, 30, 100])
@pytest.mark.parametrize(
    ("head_dim", "v_dim"), [(64, 128), (96, 96), (128, 128), (128, 256), (192, 192), (256, 256), (256, 136)]
)
def test_hopper_clusters(rng, hopper, poisoned, dtype, seqlen, num_heads, head_dim, v_dim):
    launches = hopper(1)
    q, k = (normal(rng, (seqlen, num_heads, head_dim), dtype) for _ in range(2))
    v = normal(rng, (seqlen, num_heads, v_dim), dtype)
    state = rng.standard_normal((num_heads, head_dim, v_dim)).astype(np.float32)
    factor = 1.5 if seqlen < 64 else 1.0
    check(q, k, v, dtype, factor=factor, slopes=rng.uniform(0, 0.1, num_heads), initial_state=state)
    cluster = -(-v_dim // 64)
    if num_heads > forward_sm90.num_clusters(cluster, forward.device_properties(0)[1]):
        cluster = 1
    assert {dict(launch.constants)["CLUSTER"] for launch in launches} == {cluster}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("precision", ["default", "high"])
@pytest.mark.parametrize("seqlen", [961, 1024, 1500])
@pytest.mark.parametrize(
    ("batch", "num_heads", "head_dim", "v_dim"),
    [(2, 67, 64, 64), (1, 300, 40, 56), (3, 44, 96, 96), (2, 64, 64, 128), (1, 66, 96, 200)],
)
def test_hopper_neighbours(rng, hopper, poisoned, dtype, precision, seqlen, batch, num_heads, head_dim, v_dim):
    launches = hopper()
    q, k = (normal(rng, (batch, seqlen, num_heads, head_dim), dtype) for _ in range(2))
    v = normal(rng, (batch, seqlen, num_heads, v_dim), dtype)
    state = rng.standard_normal((batch, num_heads, head_dim, v_dim)).astype(np.float32)
    slopes = rng.uniform(0, 0.1, num_heads)
    check(q, k, v, dtype, slopes=slopes, initial_state=state, precision=precision)
    assert {dict(launch.constants)["NEIGHBOURS"] for launch in launches} == {2}


@pytest.mark.parametrize("slope", [0.02, 0.3, 8.0, 1e300])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("tiling", [(2, 8), (1, 8), (1, 2)])
def test_hopper_teams_forget_only_what_has_decayed(rng, hopper, poisoned, slope, initial, tiling):
    hopper(*tiling)
    q, k, v = (normal(rng, (8 * 512, 2, 128), "bfloat16") for _ in range(3))
    # A thousand times as much where segments end, and far in front of that.
    for first in (0, 200, 480):
        v.reshape(8, 512, 2, 128)[:, first : first + 2] *= np.float32(1000).astype(v.dtype)
    state = 10 * rng.standard_normal((2, 128, 128)).astype(np.float32) if initial else None
    check(q, k, v, "bfloat16", slopes=[slope, 0.001], initial_state=state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("team_size", [2, 3])
@pytest.mark.parametrize(
    ("head_dim", "v_dim", "v_groups"),
    [
        *((64, 64, 1), (96, 64, 1), (128, 64, 1), (192, 64, 1), (256, 64, 1)),
        *((64, 128, 1), (96, 96, 1), (128, 128, 1), (192, 192, 1), (256, 256, 1)),
        *((64, 128, 2), (96, 96, 2), (128, 128, 2)),
    ],
)
def test_hopper_teams_take_rows_in_turn(rng, hopper, poisoned, dtype, head_dim, v_dim, v_groups, team_size):
    launches = hopper(v_groups, team_size)
    num_heads = 300
    q, k = (normal(rng, (400, num_heads, head_dim), dtype) for _ in range(2))
    v = normal(rng, (400, num_heads, v_dim), dtype)
    state = rng.standard_normal((num_heads, head_dim, v_dim)).astype(np.float32)
    check(q, k, v, dtype, slopes=rng.uniform(0, 0.1, num_heads), initial_state=state)
    (launch,) = launches
    num_rows = num_heads * -(-v_dim // (64 * v_groups))
    assert launch.grid[0] * 4 <= num_rows, "a team has fewer than four rows"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlen", [129, 640, 3000, 9001])
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "v_dim", "v_groups"),
    [(2, 64, 64, 1), (7, 128, 128, 2), (16, 96, 128, 1), (5, 256, 192, 1), (32, 64, 128, 2), (3, 192, 8, 1)],
)
def test_hopper_teams_of_different_sizes(
    rng, hopper, poisoned, monkeypatch, dtype, seqlen, num_heads, head_dim, v_dim, v_groups
):
    num_rows = num_heads * -(-v_dim // (64 * v_groups))
    num_sms = forward.device_properties(0)[1]
    monkeypatch.setattr(forward_sm90, "_MIN_US_TO_BALANCE", 0)
    launches = hopper(v_groups, num_sms // num_rows)
    q, k = (normal(rng, (seqlen, num_heads, head_dim), dtype) for _ in range(2))
    v = normal(rng, (seqlen, num_heads, v_dim), dtype)
    state = rng.standard_normal((num_heads, head_dim, v_dim)).astype(np.float32)
    # From heads that forget within a chunk to one that never does, and one that grows a little.
    slopes = 10.0 ** rng.uniform(-4, 1, num_heads)
    slopes[0] = 0
    for last_slope in (-2 / seqlen, 100.0):
        slopes[-1] = last_slope
        check(q, k, v, dtype, slopes=slopes, initial_state=state)
        check(q, k, v, dtype, slopes=slopes)
    assert {launch.grid for launch in launches} == {(num_sms, 1, 1)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("team_size", [1, 2, 4])
@pytest.mark.parametrize(("head_dim", "v_groups"), [(64, 1), (96, 1), (96, 2), (128, 1), (128, 2), (192, 1), (256, 1)])
def test_hopper_high_precision(rng, hopper, poisoned, dtype, decayed, team_size, head_dim, v_groups):
    launches = hopper(v_groups, team_size)
    q, k, v = (normal(rng, (2, 1000, 4, head_dim), dtype) for _ in range(3))
    slopes = lightning_cupy.slopes(4) if decayed else None
    # The same arrays: one call must not be taken for the other.
    for precision in ("default", "high", "default"):
        check(q, k, v, dtype, slopes=slopes, precision=precision)
    assert {dict(launch.constants)["HIGH"] for launch in launches} == {0, 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_high_precision_of_other_kernels(rng, dtype):
    q, k, v = (normal(rng, (2, 300, 4, 64), dtype) for _ in range(3))
    check(q, k, v, dtype, causal=False, precision="high")
    arrays = [to_gpu(q)[:, ::-1], to_gpu(k), to_gpu(v)]
    if dtype in ("float32", "float64"):
        check(q[:, ::-1], k, v, dtype, arrays=arrays, slopes=0.1, precision="high")
    else:
        with pytest.raises(ValueError, match=f"^precision='high' of {dtype} wants a GPU of compute capability 9"):
            lightning_attention(*arrays, precision="high")


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize(
    ("qk_dim", "v_dim", "v_groups"), [(64, 64, 1), (72, 104, 2), (128, 128, 2), (192, 192, 1), (256, 64, 1)]
)
def test_hopper_float32(rng, hopper, poisoned, seqlen, qk_dim, v_dim, v_groups):
    launches = hopper()
    num_sms = forward.device_properties(0)[1]
    heads = num_sms // 2 + 1  # as many as make two groups of a wide v worth while
    q, k = (normal(rng, (seqlen, heads, qk_dim), "float32") for _ in range(2))
    v = normal(rng, (seqlen, heads, v_dim), "float32")
    state = rng.standard_normal((heads, qk_dim, v_dim)).astype(np.float32)
    check(q, k, v, "float32", slopes=rng.uniform(0, 0.1, heads), initial_state=state)
    check(q, k, v, "float32")
    assert {launch.file for launch in launches} == {"forward_float_sm90.cu"}
    assert {dict(launch.constants)["V_GROUPS"] for launch in launches} == {v_groups}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("how", "described"),
    [
        *((how, True) for how in ("contiguous", "heads first", "part of wider")),
        *((how, False) for how in ("tokens last", "sliced", "reversed", "unaligned")),
    ],
)
def test_strides_for_hopper(rng, hopper, dtype, how, described):
    launches = hopper()
    # float32 goes there where there are many heads.
    q, k, v = (normal(rng, (2, 500, 20, 64), dtype) for _ in range(3))
    plain, odd = [to_gpu(x) for x in (q, k, v)], [strided(x, how) for x in (q, k, v)]
    nan = cupy.asnumpy(nan_out(plain[2]))
    check(q, k, v, dtype, slopes=0.05, arrays=odd, out=strided(nan, how))
    # One array is enough.
    check(q, k, v, dtype, slopes=0.05, arrays=plain, out=strided(nan, how))
    for idx in range(3):
        check(q, k, v, dtype, slopes=0.05, arrays=[*plain[:idx], odd[idx], *plain[idx + 1 :]])
    file = f"forward{'_float' * (dtype == 'float32')}{'_sm90' * described}.cu"
    assert {launch.file for launch in launches} - {"scan.cu"} == {file}


def test_hopper_writes_nothing_beside_out(rng, hopper):
    launches = hopper()
    q, k, v = (normal(rng, (2, 130, 3, 72), "bfloat16") for _ in range(3))
    memory = cupy.full((2, 132, 3, 96), 7, "u2")
    lightning_attention(*map(to_gpu, (q, k, v)), memory.view(dtype_of("bfloat16"))[:, 1:-1, :, 8:80])
    assert launches[0].file == "forward_sm90.cu"
    assert (memory[:, 1:-1, :, 8:80] != 7).any()
    memory[:, 1:-1, :, 8:80] = 7
    assert (memory == 7).all()


def test_hopper_teams_on_two_streams(rng, hopper):
    # 4 teams of 32 blocks, each alone on its SM: those of two launches are never all resident together.
    launches = hopper(1, 32)
    sets = [[to_gpu(normal(rng, (1, 4096, 4, 64), "bfloat16")) for _ in range(3)] for _ in range(2)]
    expected = [lightning_attention(*arrays, slopes=0.01) for arrays in sets]
    assert launches[0].grid == (4, 32, 1)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    results = []
    for _ in range(100):
        for stream, arrays in zip(streams, sets, strict=True):
            with stream:
                results.append(lightning_attention(*arrays, slopes=0.01))
    deadline = time.monotonic() + 60
    while not all(stream.done for stream in streams):
        assert time.monotonic() < deadline, "blocks wait for others that never come"
        time.sleep(0.01)
    for idx, o in enumerate(results):
        assert (o.view("u2") == expected[idx % 2].view("u2")).all()


def test_a_million_tokens_without_decay(rng):
    seqlen, last = 2**20, 1000
    q, k, v = (rng.standard_normal((seqlen, 64), np.float32).astype(dtype_of("bfloat16")) for _ in range(3))
    state = np.zeros((64, 64))
    for start in range(0, seqlen - last, 2**16):
        part = slice(start, min(start + 2**16, seqlen - last))
        state += k[part].astype(np.float64).T @ v[part].astype(np.float64)
    expected, expected_state = reference.chunked(q[-last:], k[-last:], v[-last:], initial_state=state, dtype=np.float64)
    out = nan_out(to_gpu(v))
    _, final_state = lightning_attention(*map(to_gpu, (q, k, v)), out, return_state=True)
    assert relative_rms(cupy.asnumpy(out[-last:]), expected) <= BOUNDS["bfloat16"]
    assert relative_rms(cupy.asnumpy(final_state), expected_state) <= STATE_BOUNDS["bfloat16"]
    assert np.isfinite(cupy.asnumpy(out).astype(np.float32)).all()


# --- Streams, graphs, threads, devices ---


@functools.cache
def spin_kernel():
    code = (
        'extern "C" __global__ void spin(long long ticks) { long long t = clock64(); while (clock64() - t < ticks); }'
    )
    return cupy.RawKernel(code, "spin")


def keep_busy(milliseconds: int) -> None:
    """Queue work of about that long on CuPy's current stream."""
    spin_kernel()((1,), (1,), (np.int64(milliseconds * 1_500_000),))


def test_runs_on_the_current_stream_without_waiting(rng):
    q, k, v = (normal(rng, (300, 2, 64), "float32") for _ in range(3))
    expected, _ = reference.chunked(q, k, v, slopes=0.1, dtype=np.float64)
    late = [to_gpu(x) for x in (q, k, v)]
    arrays = [cupy.zeros_like(x) for x in late]
    lightning_attention(*arrays, slopes=[0.1, 0.1])  # compiled, and slopes uploaded
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        keep_busy(200)
        for array, x in zip(arrays, late, strict=True):
            array[...] = x
        o = lightning_attention(*arrays, slopes=[0.1, 0.1])
        assert not stream.done, "the call waited for the stream"
    stream.synchronize()
    assert relative_rms(o.get(), expected) <= BOUNDS["float32"]


def test_cuda_graph(rng):
    arrays = [to_gpu(normal(rng, (1, 4096, 2, 64), "bfloat16")) for _ in range(3)]
    fresh = [to_gpu(normal(rng, (1, 4096, 2, 64), "bfloat16")) for _ in range(3)]
    out = nan_out(arrays[2])
    options = {"slopes": [0.1, 0.02]}
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        lightning_attention(*arrays, out, **options)  # the first call compiles
        stream.begin_capture()
        lightning_attention(*arrays, out, **options)
        graph = stream.end_capture()
    # Again and again: blocks that share a sequence meet in memory as the last launch left it.
    for _ in range(20):
        fresh = fresh[1:] + fresh[:1]
        with stream:
            for array, x in zip(arrays, fresh, strict=True):
                array[...] = x
            out.view("u2")[...] = 0xFFFF
            graph.launch(stream)
        stream.synchronize()
        expected = lightning_attention(*fresh, **options)
        assert (out.view("u2") == expected.view("u2")).all()


@pytest.fixture
def no_checks(monkeypatch):
    """A function after which every call must be like one that was made before."""

    def fail(name, array):
        raise AssertionError(f"{name} is looked at in full: the call was not made before")

    return lambda: monkeypatch.setattr(_arrays, "view", fail)


@pytest.mark.parametrize("seqlen", [300, 4096], ids=["whole", "cut"])
@pytest.mark.parametrize("slopes", [None, 0.1, [0.1, 0.02], "device"])
def test_cuda_graph_of_the_second_call(rng, no_checks, slopes, seqlen):
    arrays = [to_gpu(normal(rng, (1, seqlen, 2, 64), "bfloat16")) for _ in range(3)]
    slopes = cupy.asarray([0.1, 0.02]) if slopes == "device" else slopes
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        expected = lightning_attention(*arrays, slopes=slopes, return_state=True)
        no_checks()
        stream.begin_capture()
        results = lightning_attention(*arrays, slopes=slopes, return_state=True)
        graph = stream.end_capture()
        for result in results:
            result.view("u1")[...] = 0xFF
        graph.launch(stream)
    stream.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert (result.view("u1") == wanted.view("u1")).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"slopes": 0.1}, {"slopes": [0.1, 0.2, 0.3]}, {"causal": False}])
def test_later_calls_are_as_right_as_the_first(rng, no_checks, dtype, options):
    def problem():
        arrays = [normal(rng, (2, 700, 3, 64), dtype) for _ in range(3)]
        return arrays, rng.standard_normal((2, 3, 64, 64)).astype(state_dtype(dtype))

    for turn in range(3):
        (q, k, v), state = problem()
        arrays = [to_gpu(x) for x in (q, k, v)]
        on_gpu, out = cupy.asarray(state), nan_out(arrays[2])
        if turn == 1:
            no_checks()
        o, last = lightning_attention(*arrays, out, initial_state=on_gpu, return_state=True, **options)
        expected, expected_last = reference.chunked(q, k, v, initial_state=state, dtype=np.float64, **options)
        assert o is out
        assert relative_rms(cupy.asnumpy(o), expected) <= BOUNDS[dtype]
        assert relative_rms(cupy.asnumpy(last), expected_last) <= STATE_BOUNDS[dtype]


@pytest.mark.parametrize(("library", "limit"), [("cupy", 12), ("torch", 15)])
def test_host_time(request, library, limit):
    if library == "torch":
        request.getfixturevalue("torch")
    tests = Path(__file__).parent
    runs = []
    for _ in range(5):
        finished = subprocess.run(
            [sys.executable, str(tests / "host_time.py"), library],
            env=os.environ | {"PYTHONPATH": str(tests.parent)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr
        times = json.loads(finished.stdout)
        print(f"\nhost us a call, {library}: {', '.join(f'{name} {us:.1f}' for name, us in times.items())}")
        runs.append(times)
    # By the core that a process happens to get, all in it takes up to 1.8 times as long: an empty kernel tells which.
    quickest = min(runs, key=lambda times: times["empty kernel"])
    assert max(us for name, us in quickest.items() if name != "empty kernel") <= limit


def test_eight_threads_at_once(rng):
    sets = [[to_gpu(normal(rng, (700, 3, 48), "float16")) for _ in range(3)] for _ in range(8)]
    expected = [lightning_attention(*arrays, slopes=0.1) for arrays in sets]
    _compile._kernels.clear()
    _calls._calls.clear()
    cupy.cuda.Device().synchronize()

    def work(arrays):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            results = [lightning_attention(*arrays, slopes=0.1) for _ in range(20)]
            stream.synchronize()
        return results

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for results, wanted in zip(pool.map(work, sets), expected, strict=True):
            assert all((o.view("u2") == wanted.view("u2")).all() for o in results)


def two_devices() -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is only one CUDA device")


def test_second_device(rng):
    two_devices()
    q, k, v = (normal(rng, (2000, 2, 64), "bfloat16") for _ in range(3))
    expected, _ = reference.chunked(q, k, v, slopes=[0.1, 0.01], dtype=np.float64)
    with cupy.cuda.Device(1):
        arrays = [to_gpu(x) for x in (q, k, v)]
    assert cupy.cuda.Device().id == 0
    o, state = lightning_attention(*arrays, slopes=[0.1, 0.01], return_state=True)
    assert o.device.id == state.device.id == 1
    assert cupy.cuda.Device().id == 0
    assert relative_rms(cupy.asnumpy(o), expected) <= BOUNDS["bfloat16"]


def test_arrays_on_two_devices(rng):
    two_devices()
    q = cupy.zeros((4, 16), "float32")
    with cupy.cuda.Device(1):
        other = cupy.zeros((4, 16), "float32")
    with pytest.raises(ValueError, match="k is on CUDA device 1, but q is on CUDA device 0"):
        lightning_attention(q, other, q)
    with pytest.raises(ValueError, match="out is on CUDA device 1, but q is on CUDA device 0"):
        lightning_attention(q, q, q, other)


# --- Kinds of arrays ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_go_through_the_gpu(rng, dtype):
    q, k, v = (normal(rng, (2, 300, 3, 64), dtype) for _ in range(3))
    state = rng.standard_normal((2, 3, 64, 64)).astype(state_dtype(dtype))
    options = {"slopes": [0.1, 0.0, 0.5], "initial_state": state, "return_state": True}
    o, last = lightning_attention(q, k, v, backend="cuda", **options)
    assert type(o) is type(last) is np.ndarray
    assert (o.dtype, last.dtype) == (q.dtype, state.dtype)
    on_gpu = lightning_attention(
        *map(to_gpu, (q, k, v)), slopes=[0.1, 0.0, 0.5], initial_state=cupy.asarray(state), return_state=True
    )
    assert (o.view("u1") == cupy.asnumpy(on_gpu[0]).view("u1")).all(), "not the kernel's bits"
    assert (last == cupy.asnumpy(on_gpu[1])).all()
    out = np.full((2, 3, 64, 300), np.nan).astype(q.dtype).transpose(0, 3, 1, 2)
    assert lightning_attention(q[:, ::-1], k, v, out, backend="cuda") is out
    expected, _ = reference.chunked(q[:, ::-1], k, v, dtype=np.float64)
    assert relative_rms(out, expected) <= BOUNDS[dtype]


def test_numpy_arrays_of_the_other_byte_order(rng):
    q, k, v = (rng.standard_normal((100, 2, 32)).astype(">f4") for _ in range(3))
    expected, _ = reference.chunked(q, k, v, dtype=np.float64)
    assert relative_rms(lightning_attention(q, k, v, backend="cuda"), expected) <= BOUNDS["float32"]


class Producer:
    """An array of a library that we do not know, in CUDA memory."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self, api_version=None):
        return Producer

    @staticmethod
    def from_dlpack(array):
        return Producer(cupy.from_dlpack(array))


def test_any_dlpack_producer(rng):
    q, k, v = (normal(rng, (100, 2, 32), "float32") for _ in range(3))
    o, state = lightning_attention(*(Producer(to_gpu(x)) for x in (q, k, v)), slopes=0.1, return_state=True)
    assert type(o) is type(state) is Producer
    expected, expected_state = reference.chunked(q, k, v, slopes=0.1, dtype=np.float64)
    assert relative_rms(o.array.get(), expected) <= BOUNDS["float32"]
    assert relative_rms(state.array.get(), expected_state) <= STATE_BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_slopes_on_the_gpu(rng, dtype):
    q, k, v = (normal(rng, (300, 4, 64), "bfloat16") for _ in range(3))
    slopes = np.array([0.5, 0.1, 0.01, 0.0], dtype)
    expected, _ = reference.chunked(q, k, v, slopes=slopes, dtype=np.float64)
    for on_gpu in (cupy.asarray(slopes), cupy.asarray(np.repeat(slopes, 3))[::3], cupy.asarray(slopes[::-1])[::-1]):
        o = lightning_attention(*map(to_gpu, (q, k, v)), slopes=on_gpu)
        assert relative_rms(cupy.asnumpy(o), expected) <= BOUNDS["bfloat16"]


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA")
    return torch


def to_torch(torch, array, device="cuda"):
    bits = torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}"))
    return bits.view(getattr(torch, array.dtype.name)).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(rng, torch, dtype):
    q, k, v = (normal(rng, (2, 300, 3, 64), dtype) for _ in range(3))
    expected, expected_state = reference.chunked(q, k, v, slopes=0.1, dtype=np.float64)
    tensors = [to_torch(torch, x) for x in (q, k, v)]
    o, state = lightning_attention(
        *tensors, slopes=torch.full((3,), 0.1, dtype=torch.float64, device="cuda"), return_state=True
    )
    assert o.dtype == tensors[0].dtype
    assert o.device == state.device == tensors[0].device
    assert relative_rms(o.double().cpu(), expected) <= BOUNDS[dtype]
    assert relative_rms(state.double().cpu(), expected_state) <= STATE_BOUNDS[dtype]


def test_torch_cpu_tensors_go_through_the_gpu(rng, torch):
    q, k, v = (torch.from_numpy(normal(rng, (300, 64), "float32")) for _ in range(3))
    output = torch.full_like(v, torch.nan)
    assert lightning_attention(q, k, v, output, backend="cuda") is output
    expected, _ = reference.chunked(q.numpy(), k.numpy(), v.numpy(), dtype=np.float64)
    assert relative_rms(output, expected) <= BOUNDS["float32"]


def test_torch_allocator_and_stream(rng, torch):
    tensors = [to_torch(torch, normal(rng, (2, 3000, 2, 64), "bfloat16")) for _ in range(3)]
    expected = lightning_attention(*tensors)
    pool = cupy.get_default_memory_pool().used_bytes()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(300_000_000)
        late = [x.clone() for x in tensors]
        o = lightning_attention(*late)
        assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    assert torch.equal(o, expected)
    assert cupy.get_default_memory_pool().used_bytes() == pool, "results and workspace are torch's"


def test_torch_graph(rng, torch):
    tensors = [to_torch(torch, normal(rng, (1, 4096, 2, 64), "float16")) for _ in range(3)]
    expected = lightning_attention(*tensors, slopes=[0.1, 0.02])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = lightning_attention(*tensors, slopes=[0.1, 0.02])
    o.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, expected)


@pytest.mark.parametrize("with_out", [True, False])
def test_torch_graph_of_the_second_call(rng, torch, no_checks, with_out):
    tensors = [to_torch(torch, normal(rng, (1, 4096, 2, 64), "bfloat16")) for _ in range(3)]
    slopes = torch.tensor([0.1, 0.02], device="cuda")
    out = torch.full_like(tensors[2], torch.nan) if with_out else None
    expected = lightning_attention(*tensors, out, slopes=slopes).clone()
    torch.cuda.synchronize()
    no_checks()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = lightning_attention(*tensors, out, slopes=slopes)
    o.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, expected)


def test_new_thread_has_the_context_made_current(rng):
    arrays = [to_gpu(normal(rng, (100, 2, 64), "float32")) for _ in range(3)]
    out = cupy.empty_like(arrays[2])
    expected = lightning_attention(*arrays)
    lightning_attention(*arrays, out)
    out.fill(cupy.nan)
    cupy.cuda.Device().synchronize()
    # Nothing of this thread has touched CUDA before the call, and with `out` nothing is allocated.
    thread = threading.Thread(target=lightning_attention, args=(*arrays, out))
    thread.start()
    thread.join()
    cupy.cuda.Device().synchronize()
    assert (out == expected).all()


def test_warmup(monkeypatch, tmp_path, rng):
    monkeypatch.setenv("LIGHTNING_CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_compile, "_kernels", {})
    monkeypatch.setattr(_calls, "_calls", {})
    for causal in (True, False):
        lightning_cupy.warmup(["bfloat16", "float32"], [(64, 48)], causal=causal, show_progress=False)
    monkeypatch.setattr(_compile, "_load", lambda *args: pytest.fail(f"{args[0]} was not warmed up"))
    for dtype in ("bfloat16", "float32"):
        for shape in ((1, 1, 1), (1, 5000, 1), (3, 700, 40)):
            q, k = (to_gpu(normal(rng, (*shape, 64), dtype)) for _ in range(2))
            v = to_gpu(normal(rng, (*shape, 48), dtype))
            lightning_attention(q, k, v, slopes=0.1, return_state=True)
            lightning_attention(q, k, v, causal=False)


def test_torch_and_cupy_in_one_call(rng, torch):
    q, k, v = (normal(rng, (500, 2, 64), "float32") for _ in range(3))
    expected, _ = reference.chunked(q, k, v, slopes=0.1, dtype=np.float64)
    stream = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = to_torch(torch, k)
        with torch.cuda.stream(stream):
            o = lightning_attention(to_gpu(q), late, to_gpu(v), slopes=0.1)
            del late
            torch.full((500, 2, 64), torch.nan, device="cuda")  # may get the memory of `late`
        assert type(o) is cupy.ndarray
        assert relative_rms(o.get(), expected) <= BOUNDS["float32"]


def test_torch_waits_for_cupy(rng, torch):
    q, k, v = (normal(rng, (500, 2, 64), "float32") for _ in range(3))
    expected, _ = reference.chunked(q, k, v, slopes=0.1, dtype=np.float64)
    tensors, source, late = [to_torch(torch, x) for x in (q, v)], to_gpu(k), cupy.zeros_like(to_gpu(k))
    lightning_attention(tensors[0], late, tensors[1], slopes=0.1)
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        keep_busy(100)
        late[...] = source
        o = lightning_attention(tensors[0], late, tensors[1], slopes=0.1)
        late[...] = cupy.nan  # only after the kernel has read it
    torch.cuda.synchronize()
    assert relative_rms(o.cpu(), expected) <= BOUNDS["float32"]


def test_torch_out_counts_as_written(rng, torch):
    q, k, v = (to_torch(torch, normal(rng, (20, 2, 16), "float32")) for _ in range(3))
    out = torch.ones_like(v)
    weight = torch.ones_like(v, requires_grad=True)
    product = weight * out
    lightning_attention(q, k, v, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_torch_on_second_device(rng, torch):
    two_devices()
    q, k, v = (normal(rng, (500, 2, 64), "float32") for _ in range(3))
    expected, _ = reference.chunked(q, k, v, slopes=[0.1, 0.2], dtype=np.float64)
    o = lightning_attention(*(to_torch(torch, x, "cuda:1") for x in (q, k, v)), slopes=[0.1, 0.2])
    assert o.device == torch.device("cuda:1")
    assert relative_rms(o.cpu(), expected) <= BOUNDS["float32"]


# --- Bad input that only a GPU can show ---


def test_cpu_mixed_with_cuda(rng):
    on_gpu, on_cpu = cupy.zeros((4, 16), "float32"), np.zeros((4, 16), "float32")
    with pytest.raises(ValueError, match="k is on the CPU, but q is on CUDA device 0"):
        lightning_attention(on_gpu, on_cpu, on_gpu)
    with pytest.raises(ValueError, match="v is on CUDA device 0, but q is on the CPU"):
        lightning_attention(on_cpu, on_cpu, on_gpu)
    with pytest.raises(ValueError, match="out is on the CPU, but q is on CUDA device 0"):
        lightning_attention(on_gpu, on_gpu, on_gpu, on_cpu)
    with pytest.raises(ValueError, match="slopes are on CUDA device 0, but q is on the CPU"):
        lightning_attention(on_cpu, on_cpu, on_cpu, slopes=cupy.zeros(1))


def test_cuda_arrays_are_never_computed_on_the_cpu():
    q = cupy.zeros((4, 16), "float32")
    with pytest.raises(ValueError, match="backend='cpu' is for arrays on the CPU, but q is on CUDA device 0"):
        lightning_attention(q, q, q, backend="cpu")


def test_out_must_not_overlap():
    memory = cupy.zeros((10, 2, 16), "float32")
    q = memory[:8]
    with pytest.raises(ValueError, match="out must not overlap an input, but it shares memory with q"):
        lightning_attention(q, q.copy(), q.copy(), memory[2:])
    packed = cupy.zeros((8, 2, 4, 16), "float32")
    o = lightning_attention(*(packed[:, :, i] for i in range(4)))  # side by side is not overlapping
    assert o.base is packed
    with pytest.raises(ValueError, match="out must have an address for each element"):
        lightning_attention(q, q, q, cupy.broadcast_to(memory[:1], q.shape))


def test_slopes_on_the_gpu_are_checked():
    q = cupy.zeros((4, 3, 16), "float32")
    with pytest.raises(ValueError, match=r"slopes must have shape \(3,\), but got \(2,\)"):
        lightning_attention(q, q, q, slopes=cupy.zeros(2))
    with pytest.raises(TypeError, match="slopes on a GPU must be float32 or float64, but got int64"):
        lightning_attention(q, q, q, slopes=cupy.zeros(3, "int64"))
