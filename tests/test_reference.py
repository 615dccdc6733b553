"""The forms of lightning_cupy.reference and their gradients: against numbers found by hand, and against each other.

More than 500 lines, as everything else is tested against these.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest
from conftest import BOUNDS, GRADIENT_BOUNDS, LENGTHS, STATE_BOUNDS, STATE_GRADIENT_BOUNDS, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cupy import reference
from lightning_cupy.reference import Gradients, chunked, chunked_backward, quadratic, recurrent, recurrent_backward

FORMS = (recurrent, quadratic, chunked)
BACKWARDS = (recurrent_backward, chunked_backward)
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in BOUNDS}
# By head, for four of them. In float32 exp(-3.9e-8) is 1 - 2**-24, while exp(-100) and less are 0.
SLOPES = {
    "none": None,
    "zero": 0,
    "tiny": 3.9e-8,
    "steep alibi": 0.917,
    "3": 3.0,
    "7": 7,
    "100": 100.0,
    "growth": -0.01,
    "by head": np.array([0.0, 3.9e-8, 100.0, -0.01]),
}
WITHOUT_AXES = {2: (0, slice(None), 0), 3: (0,), 4: ()}


def make(rng, n, rank=4, key_dim=16, value_dim=24, dtype="float64", batch=2, heads=4):
    """Random q, k, v and initial state of the rank's shape."""
    shapes = [(batch, n, heads, dim) for dim in (key_dim, key_dim, value_dim)]
    arrays = [rng.standard_normal(shape)[WITHOUT_AXES[rank]].astype(DTYPES[dtype]) for shape in shapes]
    state = rng.standard_normal((batch, heads, key_dim, value_dim))[(0,) * (4 - rank)]
    return *arrays, state.astype(np.float64 if dtype == "float64" else np.float32)


def check(actual, expected, dtype="float64"):
    """Compare (o, state) pairs, each head on its own, within the bounds of the inputs' dtype."""
    for (o, state), (exact_o, exact_state) in zip(heads_of(*actual), heads_of(*expected), strict=True):
        assert relative_rms(o, exact_o) < BOUNDS[dtype]
        assert relative_rms(state, exact_state) < STATE_BOUNDS[dtype]


def heads_of(o, state):
    if o.ndim == 2:
        return [(o, state)]
    return [(o[..., head, :], state[..., head, :, :]) for head in range(o.shape[-2])]


def make_backward(rng, n, dtype="float64", **sizes):
    """Random arguments of a backward pass, by name."""
    *inputs, initial_state = make(rng, n, dtype=dtype, **sizes)
    do, dstate = (rng.standard_normal(like.shape).astype(like.dtype) for like in (inputs[2], initial_state))
    return dict(
        zip(("do", "q", "k", "v", "initial_state", "dstate"), (do, *inputs, initial_state, dstate), strict=True)
    )


def check_gradients(actual, expected):
    """Compare gradients in float64."""
    for name, found, exact in zip(Gradients._fields, actual, expected, strict=True):
        bounds = GRADIENT_BOUNDS if name in ("dq", "dk", "dv") else STATE_GRADIENT_BOUNDS
        assert (found is None) is (exact is None), name
        assert found is None or relative_rms(found, exact) < bounds["float64"], name


@pytest.mark.parametrize("form", FORMS)
def test_numbers_found_by_hand(form):
    # The history halves at each token. States: 5, 5/2 + 3 * 2, 8.5/2 + 1 * 4; initially 8 -> 4 at the first.
    q, k, v = (np.array(values, np.float64)[:, None] for values in ([1, 2, 3], [1, 3, 1], [1, 2, 4]))
    o, state = form(q, k, v, slopes=math.log(2), scale=10.0, initial_state=np.array([[8.0]]))
    np.testing.assert_allclose(o[:, 0], [50.0, 170.0, 247.5], rtol=1e-15)
    np.testing.assert_allclose(state, [[8.25]], rtol=1e-15)
    o, state = form(q, k, v, scale=10.0, causal=False, initial_state=np.array([[8.0]]))
    np.testing.assert_array_equal(o[:, 0], [190.0, 380.0, 570.0])
    np.testing.assert_array_equal(state, [[19.0]])


@pytest.mark.parametrize("form", FORMS)
def test_state_is_keys_by_values_and_scale_is_that_of_q(form):
    q, k, v = np.array([[1.0, 0.0, 0.0, 2.0]]), np.array([[2.0, 5.0, 7.0, 1.0]]), np.array([[3.0, 4.0]])
    o, state = form(q, k, v)
    np.testing.assert_array_equal(state, [[6.0, 8.0], [15.0, 20.0], [21.0, 28.0], [3.0, 4.0]])
    np.testing.assert_array_equal(o, [[6.0, 8.0]])  # (2 + 2) / sqrt(4) times v


@pytest.mark.parametrize("slopes", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("form", [quadratic, chunked])
def test_forms_agree(form, n, slopes, rng):
    *inputs, state = make(rng, n)
    check(form(*inputs, slopes=slopes, initial_state=state), recurrent(*inputs, slopes=slopes, initial_state=state))


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_ranks(form, rank, rng):
    """Each rank is the highest one with leading axes of length 1."""
    *inputs, state = make(rng, 65, batch=1, heads=1)
    o, final = form(*inputs, slopes=0.1, initial_state=state)
    fewer = [array[0, :, 0] if rank == 2 else array[0] if rank == 3 else array for array in inputs]
    leading = (0,) * (4 - rank)
    actual = form(*fewer, slopes=0.1, initial_state=state[leading])
    assert actual[0].shape == fewer[2].shape
    check(actual, (o.reshape(fewer[2].shape), final[leading]))


@pytest.mark.parametrize("form", FORMS)
def test_heads_and_batch_rows_are_separate(form, rng):
    slopes = SLOPES["by head"]
    q, k, v, state = make(rng, 70)
    o, final = form(q, k, v, slopes=slopes, initial_state=state)
    for b, h in itertools.product(range(2), range(4)):
        alone = (array[b, :, h] for array in (q, k, v))
        check((o[b, :, h], final[b, h]), recurrent(*alone, slopes=slopes[h], initial_state=state[b, h]))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("form", [quadratic, chunked])
def test_not_causal(form, n, rng):
    *inputs, state = make(rng, n)
    options = {"causal": False, "initial_state": state}
    check(form(*inputs, **options), recurrent(*inputs, **options))


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(1, 1), (1, 256), (3, 7), (64, 32), (100, 129), (128, 128), (256, 1), (256, 256)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_head_dims(key_dim, value_dim, causal, rng):
    *inputs, state = make(rng, 130, 3, key_dim, value_dim)
    options = {"slopes": 0.03 if causal else None, "causal": causal, "initial_state": state}
    expected = recurrent(*inputs, **options)
    check(quadratic(*inputs, **options), expected)
    check(chunked(*inputs, **options), expected)


@pytest.mark.parametrize("slopes", ["none", "steep alibi", "100", "growth", "by head"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", [quadratic, chunked])
def test_accuracy(form, dtype, slopes, rng):
    *inputs, state = make(rng, 1000, 3, 64, 64, dtype)
    # The scale keeps what grows within float16.
    options = {"slopes": SLOPES[slopes], "initial_state": state, "scale": 0.01}
    expected = recurrent(*inputs, **options, dtype=np.float64)
    actual = form(*inputs, **options)
    check(actual, expected, dtype)
    assert [array.dtype for array in actual] == [DTYPES[dtype], state.dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("causal", [True, False])
def test_recurrent_in_the_inputs_dtype(dtype, causal, rng):
    *inputs, state = make(rng, 200, dtype=dtype)
    options = {"slopes": 0.1 if causal else None, "causal": causal, "initial_state": state}
    actual = recurrent(*inputs, **options)
    check(actual, quadratic(*inputs, **options, dtype=np.float64), dtype)
    assert [array.dtype for array in actual] == [DTYPES[dtype], state.dtype]


def test_float32_of_a_long_sequence(rng):
    """No error of one direction adds up from chunk to chunk: exp(-64 slope) is close to 1, and not a float32."""
    slopes = [0.0, 4.6e-10, 1e-9, 3.9e-8, 1e-6, 1e-4]
    inputs = [rng.standard_normal((16384, len(slopes), 32), dtype=np.float32) for _ in range(3)]
    check(chunked(*inputs, slopes=slopes), recurrent(*inputs, slopes=slopes, dtype=np.float64), "float32")


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", FORMS)
def test_computed_in_the_dtype_asked_for(form, dtype, rng):
    *inputs, state = make(rng, 100, dtype=dtype)
    exact = [array.astype(np.float64) for array in inputs]
    actual = form(*inputs, slopes=0.1, initial_state=state, dtype=np.float64)
    assert [array.dtype for array in actual] == [np.float64] * 2
    check(actual, form(*exact, slopes=0.1, initial_state=state.astype(np.float64)))


@pytest.mark.parametrize("split", [0, 1, 37, 64, 65, 128, 149, 150])
@pytest.mark.parametrize("form", FORMS)
def test_split_with_the_state_passed_on_is_the_whole(form, split, rng):
    *inputs, state = make(rng, 150)
    options = {"slopes": SLOPES["by head"]}
    whole = form(*inputs, **options, initial_state=state)
    first, middle = form(*(array[:, :split] for array in inputs), **options, initial_state=state)
    second, final = form(*(array[:, split:] for array in inputs), **options, initial_state=middle)
    check((np.concatenate([first, second], axis=1), final), whole)


@pytest.mark.parametrize("chunk", [1, 7, 64, 65, 150, 10**6])
def test_chunk_changes_rounding_only(chunk, rng):
    *inputs, state = make(rng, 150)
    options = {"slopes": SLOPES["by head"], "initial_state": state}
    check(chunked(*inputs, **options, chunk=chunk), recurrent(*inputs, **options))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 40), (40, 1), (3, 7)])
@pytest.mark.parametrize("cores", [1, 3, 32])
@pytest.mark.parametrize("causal", [True, False])
def test_work_is_shared_by_any_number_of_cores(causal, cores, batch, heads, rng, monkeypatch):
    monkeypatch.setattr(reference, "_num_cores", lambda: cores)
    *inputs, state = make(rng, 130, batch=batch, heads=heads, key_dim=4, value_dim=4)
    slopes = np.linspace(0, 1, heads) if causal else None
    options = {"slopes": slopes, "causal": causal, "initial_state": state}
    check(chunked(*inputs, **options), recurrent(*inputs, **options))
    arguments = make_backward(rng, 130, batch=batch, heads=heads, key_dim=4, value_dim=4)
    options = {"slopes": slopes, "causal": causal}
    check_gradients(chunked_backward(**arguments, **options), recurrent_backward(**arguments, **options))


def heads_first(array):
    return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2)


def dims_before_tokens(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def reversed_everywhere(array):
    return np.ascontiguousarray(array[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1]


def every_other(array):
    wide = np.full([2 * length for length in array.shape], np.nan, array.dtype)
    wide[::2, 1::2, ::2, 1::2] = array
    return wide[::2, 1::2, ::2, 1::2]


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


LAYOUTS = (heads_first, dims_before_tokens, reversed_everywhere, every_other, unaligned)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_strides(form, causal, layout, rng):
    *inputs, state = make(rng, 150)
    options = {"slopes": 0.1 if causal else None, "causal": causal}
    actual = form(*map(layout, inputs), initial_state=layout(state), **options)
    check(actual, recurrent(*inputs, initial_state=state, **options))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_broadcast_inputs(form, axis, rng):
    *inputs, _ = make(rng, 70)
    broadcast = [np.broadcast_to(np.take(array, [0], axis), array.shape) for array in inputs]
    check(form(*broadcast, slopes=0.1), recurrent(*map(np.array, broadcast), slopes=0.1))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("layout", [np.copy, *LAYOUTS])
@pytest.mark.parametrize("causal", [True, False])
def test_out_is_written_and_returned(causal, layout, dtype, rng):
    *inputs, state = make(rng, 150, dtype=dtype)
    options = {"slopes": 0.1 if causal else None, "causal": causal, "initial_state": state}
    out = layout(np.full_like(inputs[2], np.nan))
    o, final = chunked(*inputs, out, **options)
    assert o is out
    check((out, final), recurrent(*inputs, **options, dtype=np.float64), dtype)


def test_out_of_a_slice_leaves_the_rest_alone(rng):
    *inputs, _ = make(rng, 70)
    whole = np.full((2, 80, 5, 30), 7.0)
    out = whole[:, 5:75, 1:, 3:27]
    expected = chunked(*inputs, slopes=0.1)[0]
    chunked(*inputs, out, slopes=0.1)
    np.testing.assert_array_equal(out, expected)
    out[...] = 7.0
    assert (whole == 7.0).all()


@pytest.mark.parametrize("n", [0, 1, 150])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", FORMS)
def test_inputs_and_initial_state_are_left_alone(form, dtype, causal, n, rng):
    """They are read-only, and neither result is a view of them."""
    arrays = make(rng, n, dtype=dtype)
    for array in arrays:
        array.setflags(write=False)
    *inputs, state = arrays
    results = form(*inputs, slopes=0.1 if causal else None, causal=causal, initial_state=state)
    for result, array in itertools.product(results, arrays):
        assert result.flags.writeable
        assert not np.shares_memory(result, array)


@pytest.mark.parametrize("shape", [(0, 16), (0, 3, 16), (5, 0, 16), (2, 0, 3, 16), (0, 5, 3, 16), (2, 5, 0, 16)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_empty(form, causal, shape, rng):
    q = np.empty(shape, np.float16)
    v = np.empty((*shape[:-1], 4), np.float16)
    leading = tuple(np.delete(shape[:-1], -2)) if len(shape) > 2 else ()
    initial = rng.standard_normal((*leading, 16, 4), dtype=np.float32)
    slopes = 0.1 if causal else None
    o, state = form(q, q, v, slopes=slopes, causal=causal, initial_state=initial)
    assert (o.shape, o.dtype) == (v.shape, np.float16)
    np.testing.assert_array_equal(state, initial)
    o, state = form(q, q, v, slopes=slopes, causal=causal)
    np.testing.assert_array_equal(state, np.zeros_like(initial))


@pytest.mark.parametrize("shape", [(0, 16), (0, 3, 16), (5, 0, 16), (2, 0, 3, 16), (0, 5, 3, 16), (2, 5, 0, 16)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_empty_backward(backward, causal, shape, rng):
    q = np.empty(shape, np.float16)
    v = np.empty((*shape[:-1], 4), np.float16)
    leading = tuple(np.delete(shape[:-1], -2)) if len(shape) > 2 else ()
    dstate = rng.standard_normal((*leading, 16, 4), dtype=np.float32)
    dq, dk, dv, dinitial_state, dslopes = backward(v, q, q, v, causal=causal, dstate=dstate)
    assert [(x.shape, x.dtype) for x in (dq, dk, dv)] == [(x.shape, np.float16) for x in (q, q, v)]
    np.testing.assert_array_equal(dinitial_state, dstate)
    assert not np.shares_memory(dinitial_state, dstate)
    if causal:
        np.testing.assert_array_equal(dslopes, np.zeros(shape[-2] if len(shape) > 2 else 1))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "initial_state"])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_stays_in_its_head_and_batch_row(causal, which, value, rng):
    """The other heads and rows, and the chunks before, are as without it to the bit, with no warning."""
    arrays = dict(zip(("q", "k", "v", "initial_state"), make(rng, 150, dtype="float32"), strict=True))
    attend = functools.partial(chunked, causal=causal, slopes=0.1 if causal else None)
    clean_o, clean_state = attend(**arrays)
    if which == "initial_state":
        arrays[which][1, 2, 3] = value
    else:
        arrays[which][1, 100, 2, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o, state = attend(**arrays)
    assert not np.isfinite(o[1, :, 2]).all()
    if causal and which != "initial_state":
        np.testing.assert_array_equal(o[:, :64], clean_o[:, :64])
    o[1, :, 2], state[1, 2] = clean_o[1, :, 2], clean_state[1, 2]
    np.testing.assert_array_equal(o, clean_o)
    np.testing.assert_array_equal(state, clean_state)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("which", ["do", "q", "k", "v", "initial_state", "dstate"])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_stays_in_its_head_and_batch_row_of_gradients(causal, which, value, rng):
    """But for the gradients of slopes, which are sums over the batch."""
    arguments = make_backward(rng, 150, "float32")
    backward = functools.partial(chunked_backward, causal=causal, slopes=0.1 if causal else None)
    clean = backward(**arguments)
    if which in ("initial_state", "dstate"):
        arguments[which][1, 2, 3] = value
    else:
        arguments[which][1, 100, 2, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = backward(**arguments)
    assert not all(np.isfinite(x[1, :, 2]).all() for x in found[:3])
    for x, clean_x in zip(found[:3], clean, strict=False):
        x[1, :, 2] = clean_x[1, :, 2]
    found.dinitial_state[1, 2] = clean.dinitial_state[1, 2]
    if causal:
        assert not np.isfinite(found.dslopes[2])
        found.dslopes[2] = clean.dslopes[2]
    for x, clean_x in zip(found, clean, strict=True):
        np.testing.assert_array_equal(x, clean_x)


@pytest.mark.parametrize("form", FORMS)
def test_steep_slopes_overflow_nowhere(form, rng):
    *inputs, state = make(rng, 150, dtype="float32")
    with np.errstate(all="raise", under="raise" if form is chunked else "ignore"):
        o, _ = form(*inputs, slopes=100.0, initial_state=state)
    assert np.isfinite(o).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"slopes": 0.1, "causal": False}, r"slopes must be None with causal=False, but got 0\.1"),
        ({"slopes": [0.1, 0.2]}, r"slopes must be one number or have shape \(4,\), but got \(2,\)"),
        ({"q": np.zeros(16)}, r"q, k and v must be .* but have shapes \(16,\), \(5, 4, 16\) and \(5, 4, 24\)"),
        ({"k": np.zeros((6, 4, 16))}, r"shapes \(5, 4, 16\), \(6, 4, 16\) and \(5, 4, 24\)"),
        ({"v": np.zeros((5, 1, 24))}, r"shapes \(5, 4, 16\), \(5, 4, 16\) and \(5, 1, 24\)"),
        ({"initial_state": np.zeros((16, 24))}, r"initial_state must have shape \(4, 16, 24\), but got \(16, 24\)"),
    ],
)
def test_errors(form, bad, message):
    arguments = {"q": np.zeros((5, 4, 16)), "k": np.zeros((5, 4, 16)), "v": np.zeros((5, 4, 24))}
    with pytest.raises(ValueError, match=message):
        form(**arguments | bad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.zeros((5, 4, 16), int), np.zeros((5, 4, 16), np.float32), [[[0.0]]]])
def test_inputs_of_one_floating_point_dtype(form, bad):
    with pytest.raises(TypeError, match="k must be a NumPy array in q's dtype, one of float16, bfloat16"):
        form(np.zeros((5, 4, 16)), bad, np.zeros((5, 4, 24)))


def test_chunk_and_out_are_checked():
    array = np.zeros((5, 4, 16))
    with pytest.raises(ValueError, match="chunk must be 1 or more, but got 0"):
        reference.chunked(array, array, array, chunk=0)
    with pytest.raises(ValueError, match=r"out must have v's shape \(5, 4, 16\), but got \(5, 4, 15\)"):
        reference.chunked(array, array, array, array[..., 1:])


@pytest.mark.parametrize("wanted", [("dq", "dx"), "dx"])
def test_wanted_is_checked(wanted):
    array = np.zeros((5, 4, 16))
    with pytest.raises(ValueError, match="wanted must be names out of dq, dk, dv, dinitial_state, dslopes, but got 'd"):
        chunked_backward(array, array, array, array, wanted=wanted)


@pytest.mark.parametrize("slopes", [-5, -100])
def test_growth_beyond_float32_spoils_only_what_it_reaches(slopes):
    q, k, v = np.ones((3, 100, 1, 4), np.float32)
    with np.errstate(over="ignore"):
        exact, _ = reference.recurrent(q, k, v, slopes=slopes, dtype=np.float64)
        o, _ = reference.chunked(q, k, v, slopes=slopes)
        by_token, _ = reference.recurrent(q, k, v, slopes=slopes)
    representable = np.abs(exact) < 1e37
    assert representable.any()
    assert np.isfinite(o[representable]).all()
    assert relative_rms(o[representable], exact[representable]) <= 1e-5  # one rounding of an exponent of 88
    assert np.isfinite(by_token[representable]).all()


# The decay of all n tokens overflows, while what there is to decay is zeros; a head beside it has begun or not.
not_begun = pytest.mark.parametrize(
    ("dtype", "slope", "n", "beside"),
    [
        (*case, beside)
        for case in (("float32", -100, 1), ("float32", -80, 2), ("float64", -100, 8))
        for beside in (0, 7)
    ],
)


@not_begun
@pytest.mark.parametrize("form", [recurrent, chunked])
def test_growth_of_a_state_that_has_not_begun(form, dtype, slope, n, beside):
    q, k, v = np.ones((3, n, 2, 4), dtype)
    initial = np.zeros((2, 4, 4))
    initial[1] = beside
    with np.errstate(over="ignore"):
        o, state = form(q, k, v, slopes=[slope, 0], scale=1, initial_state=initial)
    exact = np.cumsum(np.exp(-slope * np.arange(n)))
    np.testing.assert_allclose(o[:, 0], np.tile(4 * exact[:, None], 4), rtol=1e-5)
    np.testing.assert_allclose(state[0], np.full((4, 4), exact[-1]), rtol=1e-5)


@not_begun
@pytest.mark.parametrize("backward", BACKWARDS)
def test_growth_of_a_state_that_has_not_begun_in_gradients(backward, dtype, slope, n, beside):
    do, q, k, v = np.ones((4, n, 2, 4), dtype)
    state = np.zeros((2, 4, 4))
    state[1] = beside
    with np.errstate(over="ignore"):
        found = backward(do, q, k, v, slopes=[slope, 0], scale=1, initial_state=state, dstate=state)
    distance = np.arange(n)
    growth = np.exp(-slope * distance)
    exact = np.tile(4 * np.cumsum(growth)[:, None], 4)
    for gradient, expected in zip(found[:3], (exact, exact[::-1], exact[::-1]), strict=True):
        np.testing.assert_allclose(gradient[:, 0], expected, rtol=1e-5)
    pairs = n - distance  # of tokens at each distance; what the state adds is zeros
    np.testing.assert_allclose(found.dslopes[0], -16 * np.sum(pairs * distance * growth), rtol=1e-5)
    assert np.isposinf(found.dinitial_state[0]).all()
    assert np.isfinite(found.dinitial_state[1]).all()


def test_growth_before_any_gradient():
    do, q, k, v = np.ones((4, 2, 1, 4), np.float32)
    do[1] = 0
    with np.errstate(all="ignore"):
        found = recurrent_backward(do, q, k, v, slopes=-100, scale=1)
    for gradient in (found.dk, found.dv):
        np.testing.assert_array_equal(gradient[:, 0], np.tile([[4], [0]], 4))


@st.composite
def problems(draw):
    """Arguments of all forms: any rank, small shapes, any layout, dtype, slopes, scale and initial state."""
    rank = draw(st.sampled_from([2, 3, 4]))
    batch, heads = (draw(st.integers(1, 3)) if rank > lacking else 1 for lacking in (3, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dims = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from(list(BOUNDS)))
    *inputs, state = make(rng, draw(st.integers(1, 200)), 4, *dims, dtype, batch, heads)
    inputs = [draw(st.sampled_from([np.copy, *LAYOUTS]))(array)[WITHOUT_AXES[rank]] for array in inputs]
    causal = draw(st.booleans())
    slope = st.sampled_from([0.0, 1e-8, 3.9e-8, 100.0]) | st.floats(-0.02, 8)
    by_head = st.lists(slope, min_size=heads, max_size=heads)
    options = {
        "causal": causal,
        "slopes": draw(st.none() | slope | by_head) if causal else None,
        "scale": draw(st.none() | st.floats(0.01, 10)),
        "initial_state": state[(0,) * (4 - rank)] if draw(st.booleans()) else None,
    }
    return inputs, options, dtype


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 80))
def test_any_problem(problem, chunk):
    inputs, options, dtype = problem
    expected = recurrent(*inputs, **options, dtype=np.float64)
    check(quadratic(*inputs, **options, dtype=np.float64), expected)
    check(chunked(*inputs, **options, dtype=np.float64, chunk=chunk), expected)
    # A few numbers that nearly cancel have no accuracy of their own: judge against the size of what is summed.
    size = recurrent(*map(np.abs, inputs), **positive(options), dtype=np.float64)
    actual = chunked(*inputs, **options, chunk=chunk)
    for result, exact, sizes, bounds in zip(actual, expected, size, (BOUNDS, STATE_BOUNDS), strict=True):
        assert np.abs(result.astype(np.float64) - exact).max() < 10 * bounds[dtype] * sizes.max()


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 80), st.sets(st.sampled_from(Gradients._fields)))
def test_gradients_of_any_problem(problem, chunk, wanted):
    (q, k, v), options, _ = problem
    do = np.cos(v.astype(np.float64)).astype(v.dtype)[..., ::-1]
    state = options["initial_state"]
    options |= {"dstate": None if state is None else np.sin(state), "dtype": np.float64}
    expected = recurrent_backward(do, q, k, v, **options)
    actual = chunked_backward(do, q, k, v, **options, chunk=chunk, wanted=wanted)
    check_gradients(actual, expected._replace(**dict.fromkeys(set(Gradients._fields) - wanted)))


def positive(options):
    state = options["initial_state"]
    return options | {"initial_state": None if state is None else np.abs(state)}


def peak_bytes(function):
    """The most memory that a call of the function has at one time."""
    function()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layout", [np.copy, heads_first, every_other])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("causal", [True, False])
def test_memory_does_not_grow_with_the_length(causal, dtype, layout, rng, monkeypatch):
    monkeypatch.setattr(reference, "_num_cores", lambda: 1)  # several may or may not need theirs at one time

    def peak(n):
        *inputs, _ = make(rng, n, dtype=dtype, key_dim=32, value_dim=32)
        inputs, out = list(map(layout, inputs)), np.empty_like(inputs[2])
        return peak_bytes(lambda: chunked(*inputs, out, causal=causal))

    short = peak(2048)
    assert short > 0
    assert peak(16384) < short + 50_000  # objects of Python; one converted input has 8 MB


@pytest.mark.parametrize("wanted", ["dq", "dk", "dv", "dslopes"])
@pytest.mark.parametrize("causal", [True, False])
def test_memory_beyond_the_gradients_does_not_grow_with_the_length(causal, wanted, rng, monkeypatch):
    monkeypatch.setattr(reference, "_num_cores", lambda: 1)

    def peak(n):
        arguments = make_backward(rng, n, "float16", key_dim=32, value_dim=32)
        result_bytes = 0 if wanted == "dslopes" else arguments["q"].nbytes
        return peak_bytes(lambda: chunked_backward(**arguments, causal=causal, wanted=[wanted])) - result_bytes

    assert peak(16384) < peak(2048) + 50_000


@pytest.mark.parametrize("causal", [True, False])
def test_memory_beyond_the_state_does_not_grow_with_the_heads(causal, rng, monkeypatch):
    monkeypatch.setattr(reference, "_num_cores", lambda: 1)

    def peak(heads):
        *inputs, _ = make(rng, 65, dtype="float32", heads=heads, key_dim=32, value_dim=32)
        out = np.empty_like(inputs[2])
        state_bytes = 2 * heads * 32 * 32 * 4
        return peak_bytes(lambda: chunked(*inputs, out, causal=causal)) - state_bytes

    assert peak(256) < peak(32) + 50_000


def test_speed(rng):
    """At least 42 % of what NumPy could do on the machine at hand: large products, and each array copied once.

    Counted are the products of the algorithm with chunks of C tokens: for a token and head 2 d^2 for each of q S and
    k^T v, and C d, the causal half, for each of q k^T and its product with v; and copies of q, k, v and o. All else is
    time alone. Products alone would be no measure: the wider a CPU's vectors, the less of its time goes to them. The
    share is the median of turns, each the best of three runs of all, as other work on the machine slows some.
    """
    n, heads, dim, chunk = 8192, 16, 128, 64
    q, k, v = (rng.standard_normal((n, heads, dim), dtype=np.float32) for _ in range(3))
    a, b = (rng.standard_normal((2048, 2048), dtype=np.float32) for _ in range(2))
    slopes = np.exp2(-8 * np.arange(1, heads + 1) / heads)
    out, product = np.empty_like(v), np.empty_like(a)
    work, work_of_product = n * heads * (4 * dim**2 + 2 * chunk * dim), 2 * 2048**3

    def seconds(function, *arguments, **options):
        time.sleep(0.1)  # until the threads of an earlier product no longer wait for more in a busy loop
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            function(*arguments, **options)
            best = min(best, time.perf_counter() - start)
        return best

    shares = []
    while len(shares) < 3 or (len(shares) < 20 and np.median(shares) < 0.42):
        products = seconds(np.matmul, a, b, out=product) * work / work_of_product
        copies = 4 * seconds(np.copyto, out, v)
        shares.append((products + copies) / seconds(chunked, q, k, v, out, slopes=slopes, chunk=chunk))
    assert np.median(shares) >= 0.42, f"products {products:.3f} s, copies {copies:.3f} s; their shares were {shares}"
