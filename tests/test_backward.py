"""Gradients on the CPU: the reference against finite differences, the public function against the reference."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from conftest import GRADIENT_BOUNDS, STATE_GRADIENT_BOUNDS, relative_rms
from test_reference import DTYPES, SLOPES, make

import lightning_cupy
from lightning_cupy import lightning_attention, lightning_attention_backward
from lightning_cupy.reference import Gradients, chunked_backward, recurrent, recurrent_backward

ALL = Gradients._fields
BACKWARDS = (recurrent_backward, chunked_backward)


def make_all(rng, n, rank=4, dtype="float64", **sizes):
    """Random do, q, k and v of the rank's shape, and states as options."""
    q, k, v, initial_state = make(rng, n, rank, dtype=dtype, **sizes)
    do = rng.standard_normal(v.shape).astype(v.dtype)
    dstate = rng.standard_normal(initial_state.shape).astype(initial_state.dtype)
    return (do, q, k, v), {"initial_state": initial_state, "dstate": dstate}


def check(actual, expected, dtype="float64", names=ALL):
    for name in names:
        bounds = GRADIENT_BOUNDS if name in ("dq", "dk", "dv") else STATE_GRADIENT_BOUNDS
        found, exact = getattr(actual, name), getattr(expected, name)
        if exact is None:
            assert found is None, name
        else:
            assert relative_rms(found, exact) <= bounds[dtype], name


def difference(loss, values, name, direction, step):
    """Return the central difference of a loss along a direction of one of its arguments."""
    ahead, behind = (loss(**(values | {name: values[name] + sign * step * direction})) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 11])
@pytest.mark.parametrize("causal", [True, False])
def test_finite_differences(rng, backward, rank, n, causal):
    (do, q, k, v), states = make_all(rng, n, rank, key_dim=3, value_dim=5, heads=2)
    dstate = states.pop("dstate")
    values = {"q": q, "k": k, "v": v, **states}
    if causal:
        values["slopes"] = np.array([0.3, -0.2][: q.shape[-2] if rank > 2 else 1])

    def loss(**values):
        o, state = recurrent(**values, scale=0.7, causal=causal)
        return np.sum(o * do) + np.sum(state * dstate)

    found = backward(do, **values, scale=0.7, causal=causal, dstate=dstate)
    for name, value in values.items():
        gradient = getattr(found, f"d{name}")
        assert gradient.shape == value.shape
        for _ in range(3):
            direction = rng.standard_normal(value.shape)
            expected = difference(loss, values, name, direction, 1e-6)
            size = np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert abs(np.sum(gradient * direction) - expected) <= 1e-7 * size, name


@pytest.mark.parametrize("slopes", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize("n", [0, 1, 5, 63, 64, 65, 130, 300])
def test_chunks(rng, slopes, n):
    arrays, states = make_all(rng, n)
    expected = recurrent_backward(*arrays, slopes=slopes, **states)
    for chunk in (1, 7, 64, 1000):
        check(chunked_backward(*arrays, slopes=slopes, **states, chunk=chunk), expected)
    without = recurrent_backward(*arrays, slopes=slopes)
    check(chunked_backward(*arrays, slopes=slopes), without)


@pytest.mark.parametrize("scale", [0.0, -2.0, 1e-300])
@pytest.mark.parametrize("causal", [True, False])
def test_scales(rng, scale, causal):
    arrays, states = make_all(rng, 70)
    options = {"scale": scale, "causal": causal, **states}
    expected = recurrent_backward(*arrays, **options)
    check(chunked_backward(*arrays, **options), expected)
    assert (expected.dslopes is None) is not causal


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (1, 7), (5, 1)])
def test_one_column(rng, key_dim, value_dim):
    arrays, states = make_all(rng, 130, key_dim=key_dim, value_dim=value_dim, heads=40)
    check(chunked_backward(*arrays, slopes=0.05, **states), recurrent_backward(*arrays, slopes=0.05, **states))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(rng, dtype):
    arrays, states = make_all(rng, 200, dtype=dtype)
    expected = recurrent_backward(*arrays, slopes=0.05, **states, dtype=np.float64)
    for backward in BACKWARDS:
        found = backward(*arrays, slopes=0.05, **states)
        check(found, expected, dtype)
        assert [x.dtype for x in found] == [DTYPES[dtype]] * 3 + [np.float32] * 2


@pytest.mark.parametrize("slopes", [None, 1e-6, 0.002])
def test_float32_of_long_sequences(rng, slopes):
    do, q, k, v = rng.standard_normal((4, 16_384, 2, 32), dtype=np.float32)
    expected = chunked_backward(do, q, k, v, slopes=slopes, dtype=np.float64)
    check(chunked_backward(do, q, k, v, slopes=slopes), expected, "float32")


def test_slopes_of_heads_that_forget_fast(rng):
    # Differences of large sums would leave nothing of these.
    do, q, k, v = rng.standard_normal((4, 8192, 4, 32), dtype=np.float32)
    slopes = np.array([1.0, 3.0, 10.0, 30.0])
    found = chunked_backward(do, q, k, v, slopes=slopes, wanted=["dslopes"]).dslopes
    expected = chunked_backward(do, q, k, v, slopes=slopes, wanted=["dslopes"], chunk=5, dtype=np.float64).dslopes
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_strides_and_broadcasts(rng):
    (do, q, k, v), _ = make_all(rng, 70, value_dim=16)
    expected = chunked_backward(do, q, k, v, slopes=0.1)
    as_views = [np.asfortranarray(x[:, ::-1])[:, ::-1] for x in (do, q, k, v)]
    check(chunked_backward(*as_views, slopes=0.1), expected)
    one = np.broadcast_to(np.float64(1), v.shape)
    check(chunked_backward(one, q, k, v, slopes=0.1), chunked_backward(np.array(one), q, k, v, slopes=0.1))


def test_inputs_are_not_modified(rng):
    arrays, states = make_all(rng, 130)
    before = [x.copy() for x in (*arrays, *states.values())]
    for backward, causal in itertools.product(BACKWARDS, (True, False)):
        backward(*arrays, causal=causal, **states)
    for x, y in zip(before, (*arrays, *states.values()), strict=True):
        assert np.array_equal(x, y)


def test_nan_stays_in_its_head(rng):
    arrays, states = make_all(rng, 130)
    clean = chunked_backward(*arrays, slopes=0.1, **states)
    arrays[3][1, 70, 2, 3] = np.nan
    found = chunked_backward(*arrays, slopes=0.1, **states)
    others = np.ones((2, 4), bool)
    others[1, 2] = False
    for name in ("dq", "dk", "dv"):
        a, b = (getattr(x, name).swapaxes(1, 2)[others] for x in (clean, found))
        assert np.array_equal(a, b), name
    assert np.isnan(found.dq[1, :, 2]).any()
    assert list(np.isnan(found.dslopes)) == [False, False, True, False]


def test_growth_that_overflows_is_seen_by_none_but_itself(rng):
    arrays, _ = make_all(rng, 20)
    found = chunked_backward(*arrays, slopes=[0.1, -1000.0, 0.1, 0.0], chunk=4)
    expected = recurrent_backward(*arrays, slopes=[0.1, 0.1, 0.1, 0.0])
    for head in (0, 2, 3):
        assert relative_rms(found.dq[:, :, head], expected.dq[:, :, head]) <= GRADIENT_BOUNDS["float64"]


@pytest.mark.parametrize("backward", BACKWARDS)
def test_reference_names_what_is_wrong(rng, backward):
    (do, q, k, v), states = make_all(rng, 3)
    with pytest.raises(ValueError, match="do must have v's shape"):
        backward(do[:, :2], q, k, v)
    with pytest.raises(TypeError, match="do must be a NumPy array in q's dtype, float64, but got float32"):
        backward(do.astype(np.float32), q, k, v)
    with pytest.raises(ValueError, match="dstate must have shape"):
        backward(do, q, k, v, dstate=states["dstate"][0])
    if backward is chunked_backward:
        with pytest.raises(ValueError, match="chunk must be 1 or more, but got 0"):
            backward(do, q, k, v, chunk=0)


# The public function


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_public_function(rng, dtype, rank):
    arrays, states = make_all(rng, 130, rank, dtype=dtype)
    found = lightning_attention_backward(*arrays, slopes=0.05, **states, backend="cpu")
    expected = recurrent_backward(*arrays, slopes=0.05, **states, dtype=np.float64)
    check(found, expected, dtype)
    state_dtype = np.float64 if dtype == "float64" else np.float32
    assert [x.dtype for x in found] == [DTYPES[dtype]] * 3 + [state_dtype] * 2
    assert [x.shape for x in found] == [
        *(x.shape for x in arrays[1:]),
        states["dstate"].shape,
        (arrays[0].shape[-2] if rank > 2 else 1,),
    ]


def test_what_is_computed_by_default(rng):
    (do, q, k, v), states = make_all(rng, 9)

    def names(**options):
        gradients = lightning_attention_backward(do, q, k, v, backend="cpu", **options)
        return [name for name, x in zip(ALL, gradients, strict=True) if x is not None]

    first = ["dq", "dk", "dv"]
    assert names() == first
    assert names(dstate=states["dstate"]) == first
    assert names(initial_state=states["initial_state"]) == [*first, "dinitial_state"]
    assert names(slopes=0.0) == [*first, "dslopes"]
    assert names(causal=False) == first
    assert names(wanted=["dslopes", "dq"]) == ["dq", "dslopes"]
    assert names(wanted={"dinitial_state"}) == ["dinitial_state"]
    assert names(wanted=()) == []


def test_parts_are_those_of_the_whole(rng):
    arrays, states = make_all(rng, 130)
    whole = lightning_attention_backward(*arrays, slopes=0.05, **states, backend="cpu")
    for name in ALL:
        part = lightning_attention_backward(*arrays, slopes=0.05, **states, wanted=(name,), backend="cpu")
        assert np.array_equal(getattr(part, name), getattr(whole, name))


def test_a_sequence_in_two_parts(rng):
    (do, q, k, v), states = make_all(rng, 130, heads=3)
    options = {"slopes": [0.1, 0.0, 1.0], "backend": "cpu"}
    whole = lightning_attention_backward(do, q, k, v, **options, **states)
    first, second = slice(0, 50), slice(50, 130)
    _, between = lightning_attention(
        q[:, first], k[:, first], v[:, first], initial_state=states["initial_state"], return_state=True, **options
    )
    behind = lightning_attention_backward(
        *(x[:, second] for x in (do, q, k, v)), initial_state=between, dstate=states["dstate"], **options
    )
    before = lightning_attention_backward(
        *(x[:, first] for x in (do, q, k, v)),
        initial_state=states["initial_state"],
        dstate=behind.dinitial_state,
        **options,
    )
    joined = [np.concatenate([getattr(before, name), getattr(behind, name)], 1) for name in ("dq", "dk", "dv")]
    check(Gradients(*joined, before.dinitial_state, before.dslopes + behind.dslopes), whole)


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays, states = make_all(rng, 70, dtype="bfloat16")

    def to_torch(x):
        bits = x.dtype == ml_dtypes.bfloat16
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(x)

    given = {name: to_torch(x) for name, x in states.items()}
    found = lightning_attention_backward(*map(to_torch, arrays), slopes=torch.tensor([0.1] * 4), **given, backend="cpu")
    expected = lightning_attention_backward(*arrays, slopes=[np.float32(0.1)] * 4, **states, backend="cpu")
    for name in ALL:
        assert isinstance(getattr(found, name), torch.Tensor)
        a, b = getattr(found, name).double().numpy(), getattr(expected, name).astype(np.float64)
        assert np.array_equal(a, b), name


WRONG = {
    "shape of do": ({"do": np.zeros((5, 2, 4), "f")}, ValueError, r"^do has shape \(5, 2, 4\), but v has \(5, 2, 6\)$"),
    "dtype of do": (
        {"do": np.zeros((5, 2, 6))},
        TypeError,
        "^do must be float32 to go with q's float32, but got float64$",
    ),
    "no array": ({"do": [1.0]}, TypeError, "^do must be a NumPy, CuPy or torch array, or export DLPack, but got list$"),
    "shape of dstate": (
        {"dstate": np.zeros((2, 6, 4), "f")},
        ValueError,
        r"^dstate must have shape \(2, 4, 6\), but got \(2, 6, 4\)$",
    ),
    "dtype of dstate": (
        {"dstate": np.zeros((2, 4, 6))},
        TypeError,
        "^dstate must be float32 to go with q's float32, but got float64$",
    ),
    "k": ({"k": np.zeros((5, 2, 3), "f")}, ValueError, r"^k has shape \(5, 2, 3\), but q has \(5, 2, 4\)$"),
    "slopes": ({"slopes": [0.1]}, ValueError, r"^slopes must be one number or have shape \(2,\), but got \(1,\)$"),
    "scale": ({"scale": math.nan}, ValueError, "^scale must be finite, but got nan$"),
    "backend": ({"backend": "gpu"}, ValueError, "^backend must be 'auto', 'cuda' or 'cpu', but got 'gpu'$"),
    "name": (
        {"wanted": ("dq", "dx")},
        ValueError,
        "^wanted must be names out of dq, dk, dv, dinitial_state, dslopes, but got 'dx'$",
    ),
    "one name": ({"wanted": "dq"}, TypeError, "^wanted must be a collection of names, but got 'dq'$"),
    "slopes of no order": (
        {"wanted": ("dslopes",), "causal": False},
        ValueError,
        r"^wanted must not have 'dslopes' with causal=False: decay needs an order of tokens$",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(changes, error, message, monkeypatch):
    def run(*args, **options):
        raise AssertionError("something was computed")

    monkeypatch.setattr(lightning_cupy.reference, "chunked_backward", run)
    arguments = {name: np.zeros((5, 2, dim), "f") for name, dim in (("do", 6), ("q", 4), ("k", 4), ("v", 6))}
    with pytest.raises(error, match=message):
        lightning_attention_backward(**({"backend": "cpu"} | arguments | changes))
