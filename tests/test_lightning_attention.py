"""lightning_attention on host arrays, on the CPU, against the recurrence in float64.

More than 500 lines, as all that the public function promises without a GPU stands here, beside its helpers.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import BOUNDS, LENGTHS, STATE_BOUNDS, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_cupy
from lightning_cupy import _environment, lightning_attention, reference

ROOT = Path(__file__).parent.parent
SHAPES = {2: (65, 16), 3: (65, 3, 16), 4: (2, 65, 3, 16)}
V_DIM = 24
SLOPES = (0.25, 0.0, 2.0)

attend = functools.partial(lightning_attention, backend="cpu")


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def normal(rng, shape, dtype="float32", v_dim=V_DIM):
    """Random q, k and v; v with its own head_dim."""
    shapes = (shape, shape, (*shape[:-1], v_dim))
    return [rng.standard_normal(each).astype(numpy_dtype(dtype)) for each in shapes]


def state_shape(q, v):
    """``[batch, num_heads, K, V]`` without the axes that q lacks."""
    return (*np.delete(q.shape[:-1], -2 if q.ndim > 2 else 0).tolist(), q.shape[-1], v.shape[-1])


def expect(q, k, v, **options):
    """Outputs and state in float64, token by token."""
    return reference.recurrent(q, k, v, dtype=np.float64, **options)


class Exported:
    """An array of yet another library, of which only DLPack is known."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self, api_version=None):
        return types.SimpleNamespace(from_dlpack=lambda array: Exported(np.from_dlpack(array)))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A library: the type of its arrays, and the way from NumPy's and back, without a copy."""

    type: type
    make: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]


def make_kind(name: str) -> Kind:
    if name == "numpy":
        return Kind(np.ndarray, lambda array: array, lambda array: array)
    if name == "dlpack":
        return Kind(Exported, Exported, lambda exported: exported.array)
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def make(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def back(tensor):
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Kind(torch.Tensor, make, back)


KINDS = ("numpy", "torch", "dlpack")


@pytest.fixture
def kind(request) -> Kind:
    return make_kind(request.param)


every_kind = pytest.mark.parametrize("kind", KINDS, indirect=True)


def check(actual, expected, dtype, bounds=BOUNDS):
    assert relative_rms(actual, expected) <= bounds[dtype]


# NOTE: NumPy's bfloat16 cannot leave NumPy by DLPack.
KINDS_AND_DTYPES = [(kind, dtype) for kind in KINDS for dtype in BOUNDS if (kind, dtype) != ("dlpack", "bfloat16")]


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, indirect=["kind"])
def test_result_and_state(kind, dtype, rank, rng):
    q, k, v = normal(rng, SHAPES[rank], dtype)
    state_dtype = "float64" if dtype == "float64" else "float32"
    initial = rng.standard_normal(state_shape(q, v)).astype(state_dtype)
    slopes = SLOPES if rank > 2 else 0.25
    arrays = [kind.make(array) for array in (q, k, v)]

    o, state = attend(*arrays, slopes=slopes, initial_state=kind.make(initial), return_state=True)

    assert type(o) is kind.type
    assert type(state) is kind.type
    o, state = kind.numpy(o), kind.numpy(state)
    assert o.dtype == q.dtype
    assert o.shape == v.shape
    assert state.dtype == state_dtype
    assert state.shape == initial.shape
    expected, expected_state = expect(q, k, v, slopes=slopes, initial_state=initial)
    check(o, expected, dtype)
    check(state, expected_state, dtype, STATE_BOUNDS)


@every_kind
def test_without_return_state_only_the_outputs(kind, rng):
    arrays = [kind.make(array) for array in normal(rng, SHAPES[3])]
    assert type(attend(*arrays)) is kind.type
    assert type(attend(*arrays, return_state=True)) is tuple


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(n, causal, rng):
    q, k, v = normal(rng, (n, 2, 32))
    options = {"slopes": (0.05, 0.0)} if causal else {"causal": False}
    o, state = attend(q, k, v, return_state=True, **options)
    expected, expected_state = expect(q, k, v, **options)
    check(o, expected, "float32")
    check(state, expected_state, "float32")


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(1, 1), (1, 256), (256, 1), (80, 72), (192, 128), (256, 256)])
def test_head_dims(qk_dim, v_dim, rng):
    q, k, v = normal(rng, (70, 2, qk_dim), v_dim=v_dim)
    check(attend(q, k, v, slopes=0.1), expect(q, k, v, slopes=0.1)[0], "float32")


@pytest.mark.parametrize(("rank", "axes"), [(2, "n"), (3, "nh"), (4, "bnh")])
def test_all_tokens_without_causal(rank, axes, rng):
    q, k, v = normal(rng, SHAPES[rank])
    initial = rng.standard_normal(state_shape(q, v)).astype(np.float32)
    o, state = attend(q, k, v, causal=False, scale=0.5, initial_state=initial, return_state=True)
    kept = axes.replace("n", "")
    expected_state = initial + np.einsum(f"{axes}k,{axes}v->{kept}kv", k, v, dtype=np.float64)
    check(state, expected_state, "float32")
    check(o, 0.5 * np.einsum(f"{axes}k,{kept}kv->{axes}v", q, expected_state), "float32")


# How the same values may lie in memory.


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def transposed(array):
    """Heads before tokens in memory, as (b, h, n, d) users have them."""
    return np.ascontiguousarray(array.swapaxes(-3, -2)).swapaxes(-3, -2)


def reversed_axes(array):
    return np.asfortranarray(array)


def strided(array):
    """Gaps along each axis, the last included."""
    storage = np.full([2 * size for size in array.shape], np.nan, array.dtype)
    view = storage[(slice(None, None, 2),) * array.ndim]
    view[...] = array
    return view


def negative(array):
    return np.ascontiguousarray(np.flip(array))[(slice(None, None, -1),) * array.ndim]


def one_row_for_all(array):
    """Stride 0 along tokens."""
    return np.lib.stride_tricks.as_strided(array, strides=(array.strides[0], 0, *array.strides[2:]))


def off_by_an_element(array):
    storage = np.empty(array.size + 1, array.dtype)
    storage[1:] = array.ravel()
    return storage[1:].reshape(array.shape)


def off_by_a_byte(array):
    storage = np.empty(array.nbytes + 1, np.uint8)
    storage[1:] = np.frombuffer(array.tobytes(), np.uint8)
    return storage[1:].view(array.dtype).reshape(array.shape)


def field_of_records(array):
    """Byte strides that are no multiple of an element."""
    records = np.zeros(array.shape, [("value", array.dtype), ("flag", np.uint8)])
    records["value"] = array
    return records["value"]


WHOLE_ELEMENTS = (transposed, reversed_axes, strided, one_row_for_all, off_by_an_element)
LAYOUTS = [
    *(("numpy", layout) for layout in (*WHOLE_ELEMENTS, read_only, negative, off_by_a_byte, field_of_records)),
    *(("torch", layout) for layout in WHOLE_ELEMENTS),
    *(("dlpack", layout) for layout in (*WHOLE_ELEMENTS, read_only, negative)),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS, indirect=["kind"])
def test_layouts(kind, layout, dtype, rng):
    q, k, v = (layout(array) for array in normal(rng, SHAPES[4], dtype))
    initial = layout(rng.standard_normal(state_shape(q, v)).astype(np.float32))
    arrays = [kind.make(array) for array in (q, k, v)]
    o = kind.numpy(attend(*arrays, slopes=SLOPES, initial_state=kind.make(initial)))
    check(o, expect(q, k, v, slopes=SLOPES, initial_state=initial)[0], dtype)


def test_memmap(tmp_path, rng):
    arrays = normal(rng, SHAPES[3])
    for name, array in zip("qkv", arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    on_disk = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "qkv"]
    out = np.lib.format.open_memmap(tmp_path / "o.npy", mode="w+", dtype=np.float32, shape=on_disk[2].shape)
    assert type(attend(*on_disk)) is np.ndarray
    assert attend(*on_disk, out) is out
    out.flush()
    check(np.load(tmp_path / "o.npy"), expect(*arrays)[0], "float32")


def test_subclasses_of_numpy_arrays_are_plain_arrays(rng):
    # Products of np.matrix are others than those of arrays, and it stays of two axes whatever it is asked.
    q, k, v = (array.view(np.matrix) for array in normal(rng, SHAPES[2]))
    o = attend(q, k, v)
    assert type(o) is np.ndarray
    check(o, expect(*(np.asarray(array) for array in (q, k, v)))[0], "float32")


def test_other_byte_order(rng):
    arrays = normal(rng, SHAPES[3])
    q, k, v = (array.astype(array.dtype.newbyteorder()) for array in arrays)
    o = attend(q, k, v, out := np.full_like(v, np.nan))
    assert o is out
    check(o, expect(*arrays)[0], "float32")
    assert attend(q, k, v).dtype == np.float32


OUT_LAYOUTS = [
    *(("numpy", layout) for layout in (transposed, reversed_axes, strided, negative, off_by_a_byte)),
    *(("torch", layout) for layout in (transposed, reversed_axes, strided, off_by_an_element)),
    *(("dlpack", layout) for layout in (transposed, reversed_axes, strided, negative)),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("kind", "layout"), OUT_LAYOUTS, indirect=["kind"])
def test_out_is_written_in_place(kind, layout, dtype, rng):
    q, k, v = normal(rng, SHAPES[4], dtype)
    storage = layout(np.full_like(v, np.nan))
    out = kind.make(storage)
    arrays = [kind.make(array) for array in (q, k, v)]
    assert attend(*arrays, out) is out
    check(storage, expect(q, k, v)[0], dtype)
    o, _ = attend(*arrays, out, return_state=True)
    assert o is out


def test_out_touches_nothing_between_its_elements(rng):
    q, k, v = normal(rng, SHAPES[4])
    storage = np.full([2 * size for size in v.shape], np.nan, np.float32)
    attend(q, k, v, storage[::2, ::2, ::2, ::2])
    assert np.count_nonzero(~np.isnan(storage)) == v.size


def test_out_interleaved_with_inputs(rng):
    arrays = normal(rng, SHAPES[4], v_dim=16)
    packed = np.stack([*arrays, np.full_like(arrays[0], np.nan)], axis=-1)
    q, k, v, out = (packed[..., i] for i in range(4))
    attend(q, k, v, out)
    check(out, expect(*arrays)[0], "float32")
    for before, after in zip(arrays, (q, k, v), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("kind", ["numpy", "torch"], indirect=True)
def test_plain_call(kind, rng, monkeypatch):
    monkeypatch.setattr(_environment, "prefers_gpu", lambda: False)
    arrays = normal(rng, (1000, 64), v_dim=64)
    q, k, v = (kind.make(array) for array in arrays)
    output = kind.make(np.full((1000, 64), np.nan, np.float32))
    lightning_attention(q, k, v, output)
    check(kind.numpy(output), expect(*arrays)[0], "float32")


def torch_slopes(values):
    return make_kind("torch").make(np.array(values, np.float32))


@pytest.mark.parametrize(
    "given_as",
    [list, tuple, np.float16, np.float32, np.float64, ml_dtypes.bfloat16, torch_slopes, Exported],
    ids=lambda form: form.__name__,
)
def test_slopes_given_as(given_as, rng):
    arrays = normal(rng, SHAPES[3])
    if given_as is Exported:
        slopes = Exported(np.array(SLOPES))
    elif isinstance(given_as, type) and issubclass(given_as, np.generic):
        slopes = np.array(SLOPES, given_as)
    else:
        slopes = given_as(SLOPES)
    o = attend(*arrays, slopes=slopes)
    check(o, expect(*arrays, slopes=SLOPES)[0], "float32")
    # The values are exact in each dtype, so each form means the same bits.
    np.testing.assert_array_equal(o, attend(*arrays, slopes=np.array(SLOPES)))


@pytest.mark.parametrize("slope", [2, 0.25, np.float32(0.25), np.float64(0.25), np.array(0.25), np.int64(2)], ids=repr)
def test_one_slope_for_all_heads(slope, rng):
    arrays = normal(rng, SHAPES[3])
    o = attend(*arrays, slopes=slope)
    check(o, expect(*arrays, slopes=[float(slope)] * 3)[0], "float32")


def test_no_slopes_is_no_decay(rng):
    arrays = normal(rng, SHAPES[3])
    np.testing.assert_array_equal(attend(*arrays), attend(*arrays, slopes=0))


@pytest.mark.parametrize("slope", [0.0, 1e-8, 3.9e-8, 0.917, 3.0, 7.0, 100.0, -0.01, -0.1])
def test_range_of_slopes(slope, rng):
    arrays = normal(rng, (300, 2, 16))
    o, state = attend(*arrays, slopes=[slope, 0.1], return_state=True)
    expected, expected_state = expect(*arrays, slopes=[slope, 0.1])
    for head in range(2):
        check(o[:, head], expected[:, head], "float32")
        check(state[head], expected_state[head], "float32")


@pytest.mark.parametrize("scale", [None, 1, 0.125, -2.0, 0.0, np.float32(0.3)], ids=repr)
def test_scale(scale, rng):
    q, k, v = normal(rng, SHAPES[3])
    factor = 16**-0.5 if scale is None else float(scale)
    check(attend(q, k, v, scale=scale), factor * expect(q, k, v, scale=1.0)[0], "float32")


@pytest.mark.parametrize("split", [0, 1, 64, 100, 199, 200])
def test_state_carries_on(split, rng):
    arrays = normal(rng, (2, 200, 3, 16))
    whole, whole_state = attend(*arrays, slopes=SLOPES, return_state=True)
    first, state = attend(*(array[:, :split] for array in arrays), slopes=SLOPES, return_state=True)
    second, state = attend(
        *(array[:, split:] for array in arrays), slopes=SLOPES, initial_state=state, return_state=True
    )
    check(np.concatenate([first, second], axis=1), whole, "float32")
    check(state, whole_state, "float32")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [0, 65])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_inputs_are_not_modified(dtype, n, causal, rng):
    arrays = normal(rng, (2, n, 3, 16), dtype)
    initial = rng.standard_normal((2, 3, 16, V_DIM)).astype("float64" if dtype == "float64" else "float32")
    copies = [array.copy() for array in (*arrays, initial)]
    slopes = np.array(SLOPES) if causal else None
    o, state = attend(*arrays, slopes=slopes, causal=causal, initial_state=initial, return_state=True)
    for array, copy in zip((*arrays, initial), copies, strict=True):
        np.testing.assert_array_equal(array, copy)
        assert not np.shares_memory(array, o)
        assert not np.shares_memory(array, state)
    assert slopes is None or tuple(slopes) == SLOPES


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("with_out", [True, False])
@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (5, 0, 4), (0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4)], ids=str)
@every_kind
def test_empty(kind, shape, with_out, with_state, causal):
    q, v = np.ones(shape, np.float32), np.ones((*shape[:-1], 6), np.float32)
    initial = np.full(state_shape(q, v), 7, np.float32) if with_state else None
    out = kind.make(np.empty_like(v)) if with_out else None
    o, state = attend(
        *(kind.make(array) for array in (q, q, v)),
        out,
        causal=causal,
        initial_state=kind.make(initial) if with_state else None,
        return_state=True,
    )
    assert type(o) is kind.type
    assert kind.numpy(o).shape == v.shape
    np.testing.assert_array_equal(kind.numpy(state), np.full(state_shape(q, v), 7 if with_state else 0))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("where", ["q", "k", "v", "initial_state"])
def test_nan_stays_in_its_head(where, causal, rng):
    arrays = dict(zip("qkv", normal(rng, (2, 130, 3, 16)), strict=True))
    arrays["initial_state"] = rng.standard_normal((2, 3, 16, V_DIM)).astype(np.float32)
    options = {"causal": causal, "return_state": True} | ({"slopes": SLOPES} if causal else {})
    clean_o, clean_state = attend(**arrays, **options)
    poisoned = arrays[where]
    poisoned[(1, 1) if where == "initial_state" else (1, 70, 1)] = np.nan

    o, state = attend(**arrays, **options)

    elsewhere = np.ones((2, 3), bool)
    elsewhere[1, 1] = False
    np.testing.assert_array_equal(o.swapaxes(1, 2)[elsewhere], clean_o.swapaxes(1, 2)[elsewhere])
    np.testing.assert_array_equal(state[elsewhere], clean_state[elsewhere])
    assert np.isnan(o[1, 70, 1]).all()
    assert np.isnan(state[1, 1]).any() == (where != "q")


@pytest.mark.parametrize("q_kind", KINDS)
@pytest.mark.parametrize("k_kind", KINDS)
def test_mixed_host_kinds(q_kind, k_kind, rng):
    q_kind, k_kind = make_kind(q_kind), make_kind(k_kind)
    q, k, v = normal(rng, SHAPES[3])
    o = attend(q_kind.make(q), k_kind.make(k), v)
    assert type(o) is q_kind.type
    check(q_kind.numpy(o), expect(q, k, v)[0], "float32")


def test_same_bits_every_time_from_eight_threads(rng):
    problems = [normal(rng, (n, 3, 32)) for n in range(100, 900, 100)]
    options = {"slopes": SLOPES, "return_state": True}
    alone = [attend(*arrays, **options) for arrays in problems]
    together: list = [None] * len(problems)
    start = threading.Barrier(len(problems))

    def work(index):
        start.wait()
        together[index] = [attend(*problems[(index + shift) % 8], **options) for shift in range(8)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for index, results in enumerate(together):
        assert results is not None, "a thread failed"
        for shift, (o, state) in enumerate(results):
            expected_o, expected_state = alone[(index + shift) % 8]
            np.testing.assert_array_equal(o, expected_o)
            np.testing.assert_array_equal(state, expected_state)


def modules_after(code: str) -> set[str]:
    """Which of CuPy and torch a fresh interpreter has imported after `code`, on a machine whose GPU is hidden."""
    code += "\nimport sys; print(*{'cupy', 'torch'} & set(sys.modules))"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


CALL = """
import numpy as np, lightning_cupy
q = np.ones((5, 2, 4), np.float32)
o = lightning_cupy.lightning_attention(q, q, q, slopes=[0.5, 1.0], backend={backend!r})
assert o.shape == q.shape
"""


def test_import_takes_neither_cupy_nor_torch():
    assert modules_after("import lightning_cupy") == set()


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_the_cpu_path_takes_neither_cupy_nor_torch(backend):
    assert modules_after(CALL.format(backend=backend)) == set()


def test_public_names():
    assert lightning_cupy.lightning_attention is lightning_attention
    assert all(hasattr(lightning_cupy, name) for name in lightning_cupy.__all__)


SLOPE = st.sampled_from([0.0, 3.9e-8, 0.917, 7.0, 100.0, -0.01]) | st.floats(-0.05, 4.0)


@st.composite
def placements(draw, num_axes):
    """An order of axes in memory, and a step along each."""
    order = draw(st.permutations(range(num_axes)))
    steps = draw(st.lists(st.sampled_from([1, 1, 2, 3, -1, -2]), min_size=num_axes, max_size=num_axes))
    return order, steps


def place(array, placement):
    """Return the same values in memory of their own with this order of axes and these steps."""
    order, steps = placement
    sizes = [array.shape[axis] * abs(step) for axis, step in zip(order, steps, strict=True)]
    view = np.full(sizes, np.nan, array.dtype)[tuple(slice(None, None, step) for step in steps)]
    view = view.transpose(np.argsort(order))
    view[...] = array
    return view


@st.composite
def calls(draw):
    """Arguments of a call, anywhere in memory."""
    rank = draw(st.sampled_from([2, 3, 4]))
    batch, num_heads, n = draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(st.integers(0, 140))
    leading = {2: (n,), 3: (n, num_heads), 4: (batch, n, num_heads)}[rank]
    qk_dim, v_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(list(BOUNDS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, k, v = normal(rng, (*leading, qk_dim), dtype, v_dim)
    initial = rng.standard_normal(state_shape(q, v)).astype("float64" if dtype == "float64" else "float32")
    causal = draw(st.booleans())
    heads = num_heads if rank > 2 else 1
    slopes = draw(st.none() | SLOPE | st.lists(SLOPE, min_size=heads, max_size=heads)) if causal else None
    arrays = {"q": q, "k": k, "v": v, "out": np.full_like(v, np.nan)}
    if draw(st.booleans()):
        arrays["initial_state"] = initial
    placed = {name: place(array, draw(placements(array.ndim))) for name, array in arrays.items()}
    return placed, {"slopes": slopes, "causal": causal, "scale": draw(st.sampled_from([None, 1.0, 0.125, -2.0, 0.0]))}


@settings(deadline=None)
@given(calls())
def test_any_shapes_strides_dtypes_and_slopes(call):
    arrays, options = call
    dtype = arrays["q"].dtype.name
    o, state = attend(**arrays, **options, return_state=True)
    assert o is arrays.pop("out")

    # A few outputs may cancel, so errors are measured against the sums of magnitudes; and a single number may be
    # rounded by twice what many are on average, or to a subnormal.
    expected = expect(**arrays, **options)
    magnitudes = {name: np.abs(array.astype(np.float64)) for name, array in arrays.items()}
    scale = options["scale"] if options["scale"] is None else abs(options["scale"])
    sizes = expect(**magnitudes, **options | {"scale": scale})
    for actual, wanted, size, bounds in zip((o, state), expected, sizes, (BOUNDS, STATE_BOUNDS), strict=True):
        assert actual.shape == wanted.shape
        allowed = 2 * bounds[dtype] * size + float(ml_dtypes.finfo(actual.dtype).smallest_subnormal)
        assert (np.abs(actual.astype(np.float64) - wanted) <= allowed).all()
