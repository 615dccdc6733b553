"""Gradients on the GPU against those of the float64 reference."""

from __future__ import annotations

import concurrent.futures
import itertools

import numpy as np
import pytest
from conftest import BOUNDS, GRADIENT_BOUNDS, LENGTHS, STATE_GRADIENT_BOUNDS, relative_rms
from test_gpu import SLOPES, normal, plans_of, poisoned, state_dtype, strided, to_gpu  # noqa: F401

import lightning_cupy
from lightning_cupy import _calls, backward, forward, forward_sm90, lightning_attention_backward, reference

# What is allocated is NaN: what nobody writes is seen.
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

DTYPES = tuple(BOUNDS)
ALL = lightning_cupy.reference.Gradients._fields


def inputs(rng, shape, v_dim, dtype, states=True):
    """Return do, q, k and v on the host, and the options initial_state and dstate."""
    *outer, seqlen, num_heads, head_dim = shape
    q, k = (normal(rng, shape, dtype) for _ in range(2))
    do, v = (normal(rng, (*outer, seqlen, num_heads, v_dim), dtype) for _ in range(2))
    state = (*outer, num_heads, head_dim, v_dim)
    options = {name: rng.standard_normal(state).astype(state_dtype(dtype)) for name in ("initial_state", "dstate")}
    return (do, q, k, v), options if states else {}


def check(arrays, dtype, *, on_gpu=None, factor=1.0, wanted=ALL, **options):
    """Compare gradients with the reference's; `on_gpu` are the arrays there when they are not plain copies."""
    if not options.get("causal", True):
        wanted = [name for name in wanted if name != "dslopes"]
    there = [to_gpu(x) for x in arrays] if on_gpu is None else on_gpu
    given = {name: cupy.asarray(x) if name in ("initial_state", "dstate") else x for name, x in options.items()}
    found = lightning_attention_backward(*there, wanted=wanted, **given)
    expected = reference.chunked_backward(*arrays, wanted=wanted, dtype=np.float64, **options)
    for name in wanted:
        actual, exact = getattr(found, name), getattr(expected, name)
        assert actual.dtype.name == (dtype if name in ("dq", "dk", "dv") else state_dtype(dtype)), name
        assert actual.flags.c_contiguous, name
        bounds = GRADIENT_BOUNDS if name in ("dq", "dk", "dv") else STATE_GRADIENT_BOUNDS
        assert relative_rms(cupy.asnumpy(actual), exact) <= factor * bounds[dtype], name
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_lengths(rng, dtype, seqlen):
    factor = 1.5 if seqlen < 64 else 1.0  # one rounded score may be the whole error of a few tokens
    arrays, states = inputs(rng, (2, seqlen, 6, 64), 64, dtype)
    check(arrays, dtype, factor=factor, slopes=lightning_cupy.slopes(6), **states)
    check(arrays, dtype, factor=factor, slopes=lightning_cupy.slopes(6))
    check(arrays, dtype, factor=factor, causal=False, **states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("qk_dim", "v_dim"), [(17, 40), (32, 32), (64, 100), (96, 96), (128, 128), (128, 8), (192, 192), (256, 256)]
)
def test_head_dims(rng, dtype, qk_dim, v_dim):
    arrays, states = inputs(rng, (2, 200, 3, qk_dim), v_dim, dtype)
    check(arrays, dtype, slopes=[0.2, 0.01, 0.0], **states)
    check(arrays, dtype, causal=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(1, 1), (1, 7), (5, 1)])
def test_smallest_head_dims(rng, dtype, qk_dim, v_dim):
    # Sums of so few products cancel: errors are relative to what is left.
    arrays, _ = inputs(rng, (1, 130, 64, qk_dim), v_dim, dtype)
    check(arrays, dtype, slopes=0.05, factor=1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slopes", SLOPES.values(), ids=SLOPES)
def test_slopes(rng, dtype, slopes):
    arrays, states = inputs(rng, (500, 4, 64), 64, dtype)
    # What has been decayed by slopes of 100 is 1e-44 or so: not a number that float32 has.
    wanted = ALL[:3] if slopes == 100 and dtype != "float64" else ALL
    check(arrays, dtype, wanted=wanted, slopes=slopes, **states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slopes", [None, 0.002], ids=["undecayed", "decayed"])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(2, 128), (40, 16)])
def test_long_sequence(rng, dtype, slopes, num_heads, head_dim):
    arrays, _ = inputs(rng, (16384, num_heads, head_dim), head_dim, dtype)
    check(arrays, dtype, slopes=slopes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3, 50.0])
def test_scales(rng, dtype, scale):
    arrays, states = inputs(rng, (130, 4, 64), 64, dtype)
    check(arrays, dtype, slopes=0.05, scale=scale, **states)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(rng, dtype):
    for shape in ((150, 32), (150, 1, 32)):
        do, q, k, v = (normal(rng, shape, dtype) for _ in range(4))
        check((do, q, k, v), dtype, slopes=[0.1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["heads first", "tokens last", "sliced", "reversed", "unaligned"])
def test_strides(rng, dtype, how):
    arrays, _ = inputs(rng, (2, 130, 3, 64), 64, dtype)
    check(arrays, dtype, slopes=0.05, on_gpu=[strided(x, how) for x in arrays])


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_inputs(rng, dtype):
    shape = (2, 130, 3, 64)
    arrays = [normal(rng, (1, 130, 1, 64), dtype) for _ in range(4)]
    on_gpu = [cupy.broadcast_to(to_gpu(x), shape) for x in arrays]
    check([np.broadcast_to(x, shape) for x in arrays], dtype, slopes=0.05, on_gpu=on_gpu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_sum(rng, dtype):
    arrays, _ = inputs(rng, (2, 130, 3, 64), 64, dtype)
    one = to_gpu(np.ones((1,), arrays[0].dtype))
    on_gpu = [cupy.broadcast_to(one, arrays[0].shape), *map(to_gpu, arrays[1:])]
    check([np.ones_like(arrays[0]), *arrays[1:]], dtype, slopes=0.05, on_gpu=on_gpu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_and_no_heads(rng, dtype):
    arrays, states = inputs(rng, (2, 0, 3, 64), 64, dtype)
    check(arrays, dtype, slopes=0.05, **states)
    for shape in ((0, 5, 3, 64), (2, 5, 0, 64)):
        arrays, states = inputs(rng, shape, 64, dtype)
        check(arrays, dtype, slopes=0.05, **states)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_is_not_wanted_changes_nothing(rng, dtype):
    arrays, states = inputs(rng, (2, 300, 3, 64), 64, dtype)
    arrays = [to_gpu(x) for x in arrays]
    options = {"slopes": 0.05} | {name: cupy.asarray(x) for name, x in states.items()}
    whole = lightning_attention_backward(*arrays, **options)
    for names in (*((name,) for name in ALL), ("dk", "dv"), ("dq", "dinitial_state"), ()):
        part = lightning_attention_backward(*arrays, wanted=names, **options)
        for name in ALL:
            if name in names:
                assert cupy.array_equal(getattr(part, name), getattr(whole, name)), name
            else:
                assert getattr(part, name) is None


def test_same_call_same_bits(rng):
    for shape in ((4, 1000, 32, 128), (1, 9000, 3, 128), (1, 3000, 40, 64)):
        arrays, states = inputs(rng, shape, shape[-1], "bfloat16")
        arrays = [to_gpu(x) for x in arrays]
        options = {"slopes": cupy.asarray(lightning_cupy.slopes(shape[2]))}
        options |= {name: cupy.asarray(x) for name, x in states.items()}
        first, second = (lightning_attention_backward(*arrays, **options) for _ in range(2))
        for name in ALL:
            a, b = (getattr(x, name) for x in (first, second))
            assert (a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")).all(), name


def test_inputs_are_not_modified(rng):
    arrays, states = inputs(rng, (1, 700, 3, 64), 64, "float32")
    before = [*arrays, *states.values()]
    there = [to_gpu(x) for x in before]
    lightning_attention_backward(*there[:4], slopes=0.1, initial_state=there[4], dstate=there[5])
    for x, y in zip(before, there, strict=True):
        assert np.array_equal(x, cupy.asnumpy(y))


def test_nan_stays_in_its_head(rng):
    for dtype, shape in itertools.product(("bfloat16", "float32"), ((2, 300, 4, 64), (1, 5000, 2, 64))):
        arrays, _ = inputs(rng, shape, 64, dtype)
        clean = lightning_attention_backward(*map(to_gpu, arrays), slopes=0.05)
        arrays[3][-1, shape[1] // 2, 1, 5] = np.nan
        found = lightning_attention_backward(*map(to_gpu, arrays), slopes=0.05)
        for name in ("dq", "dk", "dv"):
            a, b = (cupy.asnumpy(getattr(x, name)).astype(np.float64) for x in (clean, found))
            others = np.ones(shape[:1] + shape[2:3], bool)
            others[-1, 1] = False
            assert np.array_equal(a.swapaxes(1, 2)[others], b.swapaxes(1, 2)[others])
        assert np.isnan(cupy.asnumpy(found.dq)[-1, :, 1].astype(np.float64)).any()


@pytest.fixture
def tiled(monkeypatch):
    """A function that forces a tiling of forward_sm90.cu, and returns a list where later launches are seen."""
    if forward.device_properties(0)[0] != 90:
        pytest.skip("forward_sm90.cu is for compute capability 9.0")
    steps_for = backward.steps_for

    def force(v_groups: int, wanted_size: int) -> list:
        launches = []

        def tiling(num_heads, seqlen, qk_dim, v_dim, num_sms, with_slopes=False):
            num_chunks = -(-seqlen // 64)
            groups = 1 if with_slopes else v_groups
            cluster = -(-v_dim // 64) if groups == wanted_size == 1 else 1
            if num_heads > forward_sm90.num_clusters(cluster, num_sms):
                cluster = 1
            count = min(wanted_size, num_chunks)
            chunks = max(1, num_chunks // 3) if count == 2 else -(-num_chunks // count)
            return forward_sm90.Tiling(groups, cluster, *forward_sm90.cut(num_chunks, count, chunks))

        def watch(problem):
            steps = steps_for(problem)
            launches.extend(steps.launches)
            return steps

        monkeypatch.setattr(forward_sm90, "tiling_for", tiling)
        monkeypatch.setattr(backward, "steps_for", watch)
        monkeypatch.setattr(_calls, "_calls", {})
        return launches

    return force


# V_GROUPS and blocks of a team.
TILINGS = [(1, 1), *itertools.product((1, 2), (2, 3, 7, 64)), (2, 1)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlen", [*LENGTHS, 4500])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize(("head_dim", "v_dim", "attentions"), [(104, 120, {1, 2}), (72, 104, {1})])
def test_tilings(rng, tiled, dtype, seqlen, tiling, head_dim, v_dim, attentions):
    launches = tiled(*tiling)
    arrays, states = inputs(rng, (2, seqlen, 3, head_dim), v_dim, dtype)
    factor = 1.5 if seqlen < 64 else 1.0
    check(arrays, dtype, factor=factor, slopes=[0.2, 0.01, 0.0], **states)
    check(arrays, dtype, factor=factor)
    hopper = [dict(launch.constants) for launch in launches if launch.file == "forward_sm90.cu"]
    assert {constants["ATTENTIONS"] for constants in hopper} == attentions
    assert {constants["SPLIT"] for constants in hopper} == {min(tiling[1], -(-seqlen // 64)) > 1}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("num_heads", [1, 3, 8, 30, 67, 140])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_numbers_of_heads(rng, dtype, num_heads, head_dim):
    arrays, states = inputs(rng, (1100, num_heads, head_dim), head_dim, dtype)
    check(arrays, dtype, slopes=lightning_cupy.slopes(num_heads), **states)


@pytest.fixture
def summed_with_dq(monkeypatch):
    """Have the launch for dq sum dslopes, for few tokens too."""
    if forward.device_properties(0)[0] != 90:
        pytest.skip("forward_sm90.cu is for compute capability 9.0")
    monkeypatch.setattr(backward, "_MIN_SEQLEN_WITH_DQ", 0)
    monkeypatch.setattr(backward, "_MIN_TOKENS_WITH_DQ", 0)
    monkeypatch.setattr(_calls, "_calls", {})


# Heads of one slope weigh alike: the error of all is not that of one whose sum happens to be small.
@pytest.mark.parametrize(
    ("dtype", "seqlen"),
    [*itertools.product(["float16", "bfloat16"], [1, 600, 1000, 4500]), ("float16", 65), ("float16", 130)],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(("head_dim", "v_dim"), [(104, 120), (72, 40)])
def test_slopes_with_dq(rng, summed_with_dq, monkeypatch, tiled, dtype, seqlen, size, head_dim, v_dim):
    launches = tiled(1, size)
    arrays, states = inputs(rng, (1, seqlen, 48, head_dim), v_dim, dtype)
    arrays = [to_gpu(x) for x in arrays]
    states = {name: cupy.asarray(x) for name, x in states.items()}
    for slopes, options in ((np.full(48, 0.01), states), (0.3, {})):
        found = lightning_attention_backward(*arrays, slopes=slopes, wanted=("dq", "dslopes"), **options)
        taken = list(launches)
        # The kernels of dslopes alone, which the tests above hold to the reference.
        with monkeypatch.context() as patch:
            patch.setattr(backward, "_MIN_TOKENS_WITH_DQ", 2**62)
            patch.setattr(_calls, "_calls", {})
            apart = lightning_attention_backward(*arrays, slopes=slopes, wanted=("dq", "dslopes"), **options)
        bound = STATE_GRADIENT_BOUNDS[dtype]
        assert relative_rms(cupy.asnumpy(found.dslopes), cupy.asnumpy(apart.dslopes)) <= bound
        assert relative_rms(cupy.asnumpy(found.dq), cupy.asnumpy(apart.dq)) <= GRADIENT_BOUNDS[dtype]
    assert {launch.name for launch in taken[:2]} == {"forward", "sum_partials"}
    assert dict(taken[0].constants)["SPLIT"] == (min(size, -(-seqlen // 64)) > 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(16, 64), (33, 96), (70, 128), (140, 64), (20, 200)])
@pytest.mark.parametrize("slope", [-0.002, 1e-8, 0.05, 5.0])
def test_slopes_with_dq_of_many_heads(rng, summed_with_dq, dtype, num_heads, head_dim, slope):
    v_dim = min(head_dim, 128)
    arrays, states = inputs(rng, (1, 700, num_heads, head_dim), v_dim, dtype)
    on_gpu = [strided(x, "heads first") for x in arrays]
    check(arrays, dtype, slopes=np.full(num_heads, slope), on_gpu=on_gpu, **states)


def test_slopes_with_dq_alone_or_beside_others(rng, summed_with_dq):
    arrays, states = inputs(rng, (2, 1000, 8, 128), 128, "bfloat16")
    arrays = [to_gpu(x) for x in arrays]
    options = {"slopes": np.full(8, 0.02)} | {name: cupy.asarray(x) for name, x in states.items()}
    whole = lightning_attention_backward(*arrays, **options)
    for wanted in (("dslopes",), ("dk", "dslopes"), ("dq", "dslopes")):
        found = lightning_attention_backward(*arrays, wanted=wanted, **options)
        assert all((getattr(found, name) is not None) == (name in wanted) for name in ALL)
        assert all(cupy.array_equal(getattr(found, name), getattr(whole, name)) for name in wanted)


def test_slopes_with_dq_of_teams_of_different_sizes(rng):
    # Slopes on the device, long segments: as many members as a row gets leave numbers, the rest zeros.
    arrays, _ = inputs(rng, (1, 60_000, 8, 128), 128, "float16", states=False)
    slopes = cupy.asarray(lightning_cupy.slopes(8))
    arrays = [to_gpu(x) for x in arrays]
    found = lightning_attention_backward(*arrays, slopes=slopes, wanted=("dslopes",)).dslopes
    for head in range(8):
        alone = [x[:, :, head : head + 1] for x in arrays]
        expected = lightning_attention_backward(*alone, slopes=slopes[head : head + 1], wanted=("dslopes",)).dslopes
        assert abs(found[head] - expected[0]) <= STATE_GRADIENT_BOUNDS["float16"] * abs(expected[0])


@pytest.mark.parametrize("preset", ["lightning2", "retnet"])
def test_teams_of_different_sizes(rng, preset):
    # Long segments, and slopes on the device: each row of dk and dv has its own team.
    arrays, _ = inputs(rng, (1, 60_000, 8, 128), 128, "bfloat16", states=False)
    slopes = cupy.asarray(lightning_cupy.slopes(8, preset))
    found = lightning_attention_backward(*map(to_gpu, arrays), slopes=slopes, wanted=("dq", "dk", "dv"))
    expected = reference.chunked_backward(
        *arrays, slopes=cupy.asnumpy(slopes), wanted=("dq", "dk", "dv"), dtype=np.float32
    )
    for name in ("dq", "dk", "dv"):
        assert relative_rms(cupy.asnumpy(getattr(found, name)), getattr(expected, name)) <= GRADIENT_BOUNDS["bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [75, 86])
def test_plans_of_other_gpus(rng, dtype, arch, plans_of):  # noqa: F811
    plans_of(arch)
    for head_dim in (64, 128, 256):
        arrays, states = inputs(rng, (2, 200, 3, head_dim), head_dim, dtype)
        check(arrays, dtype, slopes=[0.2, 0.01, 0.0], **states)
    arrays, _ = inputs(rng, (1, 5000, 1, 64), 64, dtype)
    check(arrays, dtype, slopes=0.01)


def test_more_than_2_to_the_31_elements(rng):
    shape = (2, 70_000, 256, 64)
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 40e9:
        pytest.skip("wants 40 GB of memory")
    generator = cupy.random.default_rng(0)
    q, k, v, do = (generator.standard_normal(shape, np.float32).astype(np.float16) for _ in range(4))
    slopes = np.full(256, 0.01)
    found = lightning_attention_backward(do, q, k, v, slopes=slopes, wanted=("dq", "dk", "dv"))
    last = [cupy.asnumpy(x[-1, :, -1:]) for x in (do, q, k, v)]
    expected = reference.chunked_backward(*last, slopes=0.01, wanted=("dq", "dk", "dv"), dtype=np.float64)
    for name in ("dq", "dk", "dv"):
        actual = cupy.asnumpy(getattr(found, name)[-1, :, -1:])
        assert relative_rms(actual, getattr(expected, name)) <= GRADIENT_BOUNDS["float16"], name


def test_memory(rng):
    arrays = [cupy.zeros((4, 8192, 32, 128), np.float16) for _ in range(4)]
    slopes = cupy.asarray(lightning_cupy.slopes(32))
    pool = cupy.get_default_memory_pool()
    lightning_attention_backward(*arrays, slopes=slopes)
    pool.free_all_blocks()
    before = pool.total_bytes()
    gradients = lightning_attention_backward(*arrays, slopes=slopes)
    results = sum(x.nbytes for x in gradients if x is not None)
    assert pool.total_bytes() - before - results <= 0.15 * sum(x.nbytes for x in arrays)


def test_graph(rng):
    arrays, states = inputs(rng, (1, 3000, 8, 128), 128, "float16")
    there = [to_gpu(x) for x in arrays]
    given = {"slopes": cupy.asarray(lightning_cupy.slopes(8), np.float32)}
    given |= {name: cupy.asarray(x) for name, x in states.items()}
    with cupy.cuda.Stream(non_blocking=True) as stream:
        lightning_attention_backward(*there, **given)
        stream.synchronize()
        stream.begin_capture()
        captured = lightning_attention_backward(*there, **given)
        graph = stream.end_capture()
        for _ in range(2):
            fresh, _ = inputs(rng, (1, 3000, 8, 128), 128, "float16")
            for target, source in zip(there, fresh, strict=True):
                target.set(source)
            graph.launch()
            stream.synchronize()
            expected = reference.chunked_backward(*fresh, slopes=lightning_cupy.slopes(8), dtype=np.float64, **states)
            for name in ("dq", "dk", "dv"):
                actual = cupy.asnumpy(getattr(captured, name))
                assert relative_rms(actual, getattr(expected, name)) <= GRADIENT_BOUNDS["float16"], name


def test_threads_and_streams(rng):
    arrays, _ = inputs(rng, (1, 2000, 8, 64), 64, "float16")
    there = [to_gpu(x) for x in arrays]
    expected = lightning_attention_backward(*there, slopes=0.05)
    cupy.cuda.Device().synchronize()

    def run(_):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            found = lightning_attention_backward(*there, slopes=0.05)
            stream.synchronize()
            return all(bool((getattr(found, name) == getattr(expected, name)).all()) for name in ("dq", "dk", "dv"))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(64)))


def test_numpy_arrays_go_through_the_gpu(rng):
    arrays, states = inputs(rng, (300, 3, 64), 64, "bfloat16")
    found = lightning_attention_backward(*arrays, slopes=0.05, backend="cuda", **states)
    expected = reference.chunked_backward(*arrays, slopes=0.05, dtype=np.float64, **states)
    for name in ALL:
        assert isinstance(getattr(found, name), np.ndarray)
        bounds = GRADIENT_BOUNDS if name in ("dq", "dk", "dv") else STATE_GRADIENT_BOUNDS
        assert relative_rms(getattr(found, name), getattr(expected, name)) <= bounds["bfloat16"], name
