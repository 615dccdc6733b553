"""Each bad input is an exception that names the argument, what is wanted and what it got, before anything runs."""

from __future__ import annotations

import dataclasses
import re
import types

import ml_dtypes
import numpy as np
import pytest

from lightning_cupy import _arrays, _compile, _environment, forward, lightning_attention, reference

SHAPE, V_SHAPE, STATE_SHAPE = (2, 5, 3, 4), (2, 5, 3, 6), (2, 3, 4, 6)


def zeros(shape=SHAPE, dtype="float32"):
    return np.zeros(shape, dtype)


def good(**changed):
    """Arguments without a fault but for those changed."""
    return {"q": zeros(), "k": zeros(), "v": zeros(V_SHAPE), "backend": "cpu"} | changed


class Ran(Exception):
    """Something was compiled, launched or computed."""


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    def run(*args, **options):
        raise Ran

    monkeypatch.setattr(_compile, "kernel", run)
    monkeypatch.setattr(_compile, "compile_cubin", run)
    monkeypatch.setattr(forward, "forward", run)
    monkeypatch.setattr(reference, "chunked", run)


def fails(error: type[Exception], message: str, **arguments):
    """The call raises just this error, with a message in which all of this stands."""
    with pytest.raises(error, match=message) as caught:
        lightning_attention(**arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"out": zeros(V_SHAPE)},
        {"slopes": [0.1, 0.2, 0.3], "scale": 2},
        {"causal": False, "initial_state": zeros(STATE_SHAPE)},
    ],
)
def test_the_same_calls_without_a_fault_run(changed):
    with pytest.raises(Ran):
        lightning_attention(**good(**changed))


def read_only(array):
    array.flags.writeable = False
    return array


class Foreign:
    """A DLPack producer: of which library, on which device, and what its export raises."""

    def __init__(self, device=(1, 0), namespace=np, problem=None):
        self.device, self.namespace, self.problem = device, namespace, problem

    def __array_namespace__(self, api_version=None):
        return self.namespace

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if self.problem is not None:
            raise self.problem
        return zeros().__dlpack__(**options)


WRONG_KIND = "must be a NumPy, CuPy or torch array, or export DLPack, but got "
KINDS = [
    *((name, None, WRONG_KIND + "NoneType") for name in "qkv"),
    *((name, [[1.0]], WRONG_KIND + "list") for name in ("q", "k", "v", "out", "initial_state")),
    ("q", 1.0, WRONG_KIND + "float"),
    ("k", "k.npy", WRONG_KIND + "str"),
    ("v", np.float32(1), WRONG_KIND + "float32"),
    ("q", np.ma.masked_array(zeros()), WRONG_KIND + "MaskedArray"),
    ("q", Foreign(namespace=types.SimpleNamespace()), "is a Foreign, whose library has no from_dlpack"),
    ("k", Foreign(device=(10, 0)), "is on DLPack device type 10, but the CPU (1) or CUDA (2) is wanted"),
    ("v", Foreign(problem=BufferError("no such dtype")), "is a Foreign that NumPy cannot borrow: no such dtype"),
]


@pytest.mark.parametrize(("name", "array", "message"), KINDS)
def test_kind_of_array(name, array, message):
    fails(TypeError, f"^{name} {re.escape(message)}", **good(**{name: array}))


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 5, 3, 4)])
def test_rank(shape):
    message = r"^q must have shape \[seqlen, head_dim\], .* but got " + re.escape(str(shape))
    fails(ValueError, message, **good(q=zeros(shape), k=zeros(shape), v=zeros(shape)))


K_SHAPES = [(2, 5, 3, 5), (2, 5, 1, 4), (2, 6, 3, 4), (1, 5, 3, 4), (5, 3, 4), (2, 5, 12), (2, 5, 3, 4, 1)]


@pytest.mark.parametrize("shape", K_SHAPES)
def test_shape_of_k(shape):
    message = f"k has shape {shape}, but q has {SHAPE}"
    fails(ValueError, re.escape(message), **good(k=zeros(shape)))


@pytest.mark.parametrize("shape", [(2, 5, 1, 6), (2, 6, 3, 6), (1, 5, 3, 6), (5, 3, 6), (2, 5, 3), ()])
def test_shape_of_v(shape):
    message = f"v has shape {shape}, but (2, 5, 3, 'V') is wanted to go with q's {SHAPE}"
    fails(ValueError, re.escape(message), **good(v=zeros(shape)))


@pytest.mark.parametrize("head_dim", [0, 257, 512])
@pytest.mark.parametrize("name", ["q", "v"])
def test_head_dim(name, head_dim):
    shape = (5, 3, head_dim)
    arrays = {"q": zeros((5, 3, 4)), "k": zeros((5, 3, 4)), "v": zeros((5, 3, 4))}
    arrays |= {"q": zeros(shape), "k": zeros(shape)} if name == "q" else {"v": zeros(shape)}
    fails(ValueError, f"^{name} must have a head_dim from 1 to 256, but got {head_dim}$", **good(**arrays))


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint16", "bool", "complex64", "complex128", "object"])
def test_dtype_of_q(dtype):
    message = f"^q must be one of float16, bfloat16, float32, float64, but got {dtype}$"
    arrays = {"q": zeros(dtype=dtype), "k": zeros(dtype=dtype), "v": zeros(V_SHAPE, dtype)}
    fails(TypeError, message, **good(**arrays))


@pytest.mark.parametrize("dtype", ["float64", "float16", ml_dtypes.bfloat16, "int32", "complex64"])
@pytest.mark.parametrize(("name", "shape"), [("k", SHAPE), ("v", V_SHAPE), ("out", V_SHAPE)])
def test_mixed_dtypes(name, shape, dtype):
    message = f"^{name} must be float32 to go with q's float32, but got {np.dtype(dtype).name}$"
    fails(TypeError, message, **good(**{name: zeros(shape, dtype)}))


@pytest.mark.parametrize("shape", [SHAPE, (2, 5, 3, 7), (5, 3, 6), (2, 3, 5, 6), (1, 5, 3, 6)])
def test_shape_of_out(shape):
    fails(ValueError, re.escape(f"out must have v's shape {V_SHAPE}, but got {shape}"), **good(out=zeros(shape)))


def test_read_only_out():
    fails(ValueError, "^out must be writable, but got a read-only array$", **good(out=read_only(zeros(V_SHAPE))))


@pytest.mark.parametrize("axis", range(4))
def test_out_with_one_address_for_several_elements(axis):
    storage = zeros((2, 10, 6, 12))
    strides = [0 if axis == index else stride for index, stride in enumerate(storage.strides)]
    out = np.lib.stride_tricks.as_strided(storage, V_SHAPE, strides)
    fails(ValueError, r"^out must have an address for each element, but got strides \(", **good(out=out))


def test_out_whose_rows_overlap():
    out = np.lib.stride_tricks.sliding_window_view(zeros((10,)), 6, writeable=True)
    message = re.escape("out must have an address for each element, but got strides (1, 1) for (5, 6)")
    fails(ValueError, message, **good(q=zeros((5, 4)), k=zeros((5, 4)), v=zeros((5, 6)), out=out))


def overlapping_calls():
    """Pairs of the argument that out overlaps, and the arguments."""
    square = {name: zeros() for name in "qkv"}
    yield from ((name, square | {"out": square[name]}) for name in "qkv")
    yield "q", square | {"out": square["q"][::-1, :, :, ::-1]}
    # The last row of one is the first of the other.
    storage = zeros((9, 4))
    yield "k", {"q": zeros((5, 4)), "k": storage[:5], "v": zeros((5, 4)), "out": storage[4:]}
    # Columns of one buffer, apart but for one.
    packed = zeros((5, 11))
    yield "v", {"q": zeros((5, 4)), "k": zeros((5, 4)), "v": packed[:, :6], "out": packed[:, 5:]}
    # A state whose last number is out's first.
    storage = zeros(4 * 6 + 5 * 6 - 1)
    state, out = storage[: 4 * 6].reshape(4, 6), storage[4 * 6 - 1 :].reshape(5, 6)
    inputs = {"q": zeros((5, 4)), "k": zeros((5, 4)), "v": zeros((5, 6))}
    yield "initial_state", inputs | {"initial_state": state, "out": out}


@pytest.mark.parametrize(("name", "arguments"), list(overlapping_calls()))
def test_out_overlapping_an_input(name, arguments):
    fails(ValueError, f"^out must not overlap an input, but it shares memory with {name}$", **good(**arguments))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_bad_input_comes_before_the_question_of_a_gpu(backend, monkeypatch):
    monkeypatch.setattr(_environment, "cuda_problem", lambda: "no GPU")
    fails(ValueError, "^k has shape", **good(k=zeros((1,)), backend=backend))
    fails(ValueError, "^slopes must be finite", **good(slopes=np.nan, backend=backend))
    fails(ValueError, "^out must be writable", **good(out=read_only(zeros(V_SHAPE)), backend=backend))


ONE_OR_THREE = r"^slopes must be one number or have shape \(3,\), but got "


@pytest.mark.parametrize(
    ("slopes", "error", "message"),
    [
        ([0.1, 0.2], ValueError, ONE_OR_THREE + r"\(2,\)"),
        ([0.1] * 4, ValueError, ONE_OR_THREE + r"\(4,\)"),
        ([], ValueError, ONE_OR_THREE + r"\(0,\)"),
        ([0.1], ValueError, ONE_OR_THREE + r"\(1,\)"),
        (np.zeros((3, 1)), ValueError, ONE_OR_THREE + r"\(3, 1\)"),
        ([[0.1], [0.2, 0.3]], ValueError, r"^slopes must be .* \(3,\).* but got "),
        ([0.1, np.nan, 0.3], ValueError, "^slopes must be finite, but got .*nan"),
        (np.array([0.1, 0.2, np.inf], np.float32), ValueError, "^slopes must be finite, but got .*inf"),
        (-np.inf, ValueError, "^slopes must be finite, but got -inf"),
        ([1j, 2j, 3j], TypeError, "^slopes must be real numbers, but got complex128"),
        ("fla", TypeError, "^slopes must be real numbers, but got 'fla'"),
        (True, TypeError, "^slopes must be real numbers, but got bool"),
        ({0: 0.1}, TypeError, "^slopes must be real numbers, but got object"),
        ([None] * 3, TypeError, "^slopes must be real numbers, but got object"),
    ],
)
def test_slopes(slopes, error, message):
    fails(error, message, **good(slopes=slopes))


def test_slopes_of_one_head():
    arguments = good(q=zeros((5, 4)), k=zeros((5, 4)), v=zeros((5, 4)), slopes=[0.1] * 5)
    fails(ValueError, r"^slopes must be one number or have shape \(1,\), but got \(5,\)$", **arguments)


@pytest.mark.parametrize("slopes", [0, 0.1, [0.1, 0.2, 0.3]], ids=str)
def test_slopes_without_causal(slopes):
    fails(ValueError, "^slopes must be None with causal=False", **good(slopes=slopes, causal=False))


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ("0.5", TypeError, "must be a real number, but got str"),
        (1j, TypeError, "must be a real number, but got complex"),
        (True, TypeError, "must be a real number, but got bool"),
        ([1.0], TypeError, "must be a real number, but got list"),
        (np.ones(3), TypeError, "must be a real number, but got ndarray"),
        (np.nan, ValueError, "must be finite, but got nan"),
        (np.float32(-np.inf), ValueError, "must be finite, but got -inf"),
        (10**400, ValueError, "must be finite, but got inf"),
    ],
)
def test_scale(scale, error, message):
    fails(error, f"^scale {message}$", **good(scale=scale))


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (3, 4, 6), (1, 3, 4, 6), (2, 1, 4, 6), (2, 3, 4, 4), (2, 5, 3, 6)])
def test_shape_of_initial_state(shape):
    message = re.escape(f"initial_state must have shape {STATE_SHAPE}, but got {shape}")
    fails(ValueError, message, **good(initial_state=zeros(shape)))


@pytest.mark.parametrize(("shape", "wanted"), [((5, 4), (4, 4)), ((5, 3, 4), (3, 4, 4)), ((2, 5, 3, 4), (2, 3, 4, 4))])
def test_rank_of_initial_state(shape, wanted):
    arrays = {name: zeros(shape) for name in "qkv"}
    message = re.escape(f"initial_state must have shape {wanted}, but got (4,)")
    fails(ValueError, message, **good(**arrays, initial_state=zeros((4,))))


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "wanted"),
    [
        ("float16", "float16", "float32"),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16, "float32"),
        ("float32", "float64", "float32"),
        ("float64", "float32", "float64"),
        ("float32", "int32", "float32"),
        ("float32", "complex64", "float32"),
    ],
)
def test_dtype_of_initial_state(dtype, state_dtype, wanted):
    arrays = {"q": zeros(dtype=dtype), "k": zeros(dtype=dtype), "v": zeros(V_SHAPE, dtype)}
    name, got = np.dtype(dtype).name, np.dtype(state_dtype).name
    message = f"^initial_state must be {wanted} to go with q's {name}, but got {got}$"
    fails(TypeError, message, **good(**arrays, initial_state=zeros(STATE_SHAPE, state_dtype)))


@pytest.mark.parametrize("backend", ["gpu", "CUDA", None, "numpy", 0])
def test_backend(backend):
    message = f"^backend must be 'auto', 'cuda' or 'cpu', but got {backend!r}$"
    fails(ValueError, message, **good(backend=backend))


@pytest.mark.parametrize("precision", ["higher", "HIGH", None, True, b"high"])
def test_precision(precision, on_cuda):
    message = f"^precision must be 'default' or 'high', but got {re.escape(repr(precision))}$"
    fails(ValueError, message, **good(precision=precision))
    fails(ValueError, message, **all_on_cuda(on_cuda), precision=precision)


@pytest.mark.parametrize("precision", ["default", "high"])
def test_precision_without_a_fault_runs(precision):
    with pytest.raises(Ran):
        lightning_attention(**good(precision=precision))


@pytest.fixture
def on_cuda(monkeypatch):
    """Tell the checks that an array is on a CUDA device; no GPU is needed, for none of them looks at elements."""
    places = {}
    view = _arrays.view

    def view_elsewhere(name, array):
        _, device = places.get(id(array), (array, None))
        return dataclasses.replace(view(name, array), device=device)

    def move(array, device=0):
        places[id(array)] = array, device  # the array too, so that its id stays its own
        return array

    monkeypatch.setattr(_arrays, "view", view_elsewhere)
    monkeypatch.setattr(_arrays, "stream_of", lambda borrowed: 0)
    return move


ARGUMENTS = {"k": SHAPE, "v": V_SHAPE, "out": V_SHAPE, "initial_state": STATE_SHAPE}


def all_on_cuda(on_cuda, device=0):
    """Arguments without a fault, on a CUDA device."""
    shapes = {"q": SHAPE} | ARGUMENTS
    return {name: on_cuda(zeros(shape), device) for name, shape in shapes.items()} | {"backend": "auto"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_two_cuda_devices(name, on_cuda):
    arguments = all_on_cuda(on_cuda, 0)
    on_cuda(arguments[name], 1)
    fails(ValueError, f"^{name} is on CUDA device 1, but q is on CUDA device 0$", **arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_cpu_mixed_with_cuda(name, on_cuda):
    shape = ARGUMENTS[name]
    arguments = all_on_cuda(on_cuda) | {name: zeros(shape)}
    fails(ValueError, f"^{name} is on the CPU, but q is on CUDA device 0$", **arguments)
    fails(ValueError, f"^{name} is on CUDA device 0, but q is on the CPU$", **good(**{name: on_cuda(zeros(shape))}))


@pytest.mark.parametrize(
    ("slopes", "device", "error", "message"),
    [
        (zeros(3), 1, ValueError, "slopes are on CUDA device 1, but q is on CUDA device 0"),
        (zeros(2), 0, ValueError, r"slopes must have shape \(3,\), but got \(2,\)"),
        (zeros(()), 0, ValueError, r"slopes must have shape \(3,\), but got \(\)"),
        (zeros(3, "int32"), 0, TypeError, "slopes on a GPU must be float32 or float64, but got int32"),
    ],
)
def test_slopes_on_cuda(slopes, device, error, message, on_cuda):
    fails(error, f"^{message}$", **all_on_cuda(on_cuda), slopes=on_cuda(slopes, device))


def test_slopes_on_cuda_for_arrays_on_the_cpu(on_cuda):
    fails(ValueError, "^slopes are on CUDA device 0, but q is on the CPU$", **good(slopes=on_cuda(zeros(3))))


def test_cuda_arrays_never_run_on_the_cpu(on_cuda, monkeypatch):
    message = "^backend='cpu' is for arrays on the CPU, but q is on CUDA device 0$"
    fails(ValueError, message, **all_on_cuda(on_cuda) | {"backend": "cpu"})
    monkeypatch.setattr(_environment, "cuda_problem", lambda: "no GPU wanted, got one")
    fails(RuntimeError, "^q is on CUDA device 0: no GPU wanted, got one$", **all_on_cuda(on_cuda))


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


def torch_arguments(torch, **changed):
    shapes = {"q": SHAPE, "k": SHAPE, "v": V_SHAPE}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | {"backend": "cpu"} | changed


def test_torch_without_a_fault_runs(torch):
    with pytest.raises(Ran):
        lightning_attention(**torch_arguments(torch))


def test_torch_dtypes(torch):
    arguments = torch_arguments(torch)
    fails(TypeError, "^q must be one of .*, but got int64$", **arguments | {"q": arguments["q"].long()})
    fails(TypeError, "^q must be one of .*, but got complex64$", **arguments | {"q": arguments["q"].cfloat()})
    float8 = arguments["q"].to(torch.float8_e4m3fn)
    fails(TypeError, "^q must be one of .*, but got float8_e4m3fn$", **arguments | {"q": float8})
    message = "^k must be float32 to go with q's float32, but got bfloat16$"
    fails(TypeError, message, **arguments | {"k": arguments["k"].bfloat16()})


def test_torch_sparse(torch):
    sparse = torch.zeros(SHAPE).to_sparse()
    fails(TypeError, r"^k has layout torch\.sparse_coo, but a dense tensor", **torch_arguments(torch, k=sparse))


def test_torch_other_devices(torch):
    tensor = torch.zeros(V_SHAPE, device="meta")
    message = "^v is on device meta, but the CPU or a CUDA device is wanted$"
    fails(TypeError, message, **torch_arguments(torch, v=tensor))


def test_torch_lazily_negated(torch):
    negated = torch.zeros(SHAPE, dtype=torch.complex64).conj().imag
    fails(TypeError, r"^q is a lazily negated view: pass q\.resolve_neg\(\)$", **torch_arguments(torch, q=negated))


def test_out_of_another_kind(torch):
    message = "^out must be of q's kind, torch, but got numpy$"
    fails(TypeError, message, **torch_arguments(torch, out=zeros(V_SHAPE)))
    message = "^out must be of q's kind, numpy, but got torch$"
    fails(TypeError, message, **good(out=torch.zeros(V_SHAPE)))


def test_torch_out(torch):
    expanded = torch.zeros((2, 1, 3, 6)).expand(V_SHAPE)
    message = "^out must have an address for each element"
    fails(ValueError, message, **torch_arguments(torch, out=expanded))
    arguments = torch_arguments(torch, v=torch.zeros(SHAPE))
    message = "^out must not overlap an input, but it shares memory with q$"
    fails(ValueError, message, **arguments, out=arguments["q"].view(SHAPE))


def test_overlap_across_libraries(torch):
    q = zeros()
    message = "^out must not overlap an input, but it shares memory with k$"
    fails(ValueError, message, **good(q=q, k=torch.from_numpy(out := zeros()), v=zeros(), out=out))
