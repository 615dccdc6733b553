"""Gradients, autocast, torch.compile and the layer: what torch has a say in, on the CPU and on a GPU.

More than 500 lines, as each is tried with each, on the same tensors.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BOUNDS, GRADIENT_BOUNDS, HIGH_BOUNDS, STATE_GRADIENT_BOUNDS, relative_rms

import lightning_cupy
from lightning_cupy import _calls, api, lightning_attention, reference

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from lightning_cupy.torch import LightningAttention, _attention_backward_op, _attention_op  # noqa: E402

INPUTS = ("q", "k", "v", "slopes", "initial_state")
FIELDS = dict(zip(INPUTS, ("dq", "dk", "dv", "dslopes", "dinitial_state"), strict=True))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def tensors(device, dtype="float64", shape=(2, 70, 3, 8), v_dim=5, requires_grad=INPUTS, seed=0):
    """Return q, k, v, slopes and initial_state."""
    generator = torch.Generator().manual_seed(seed)
    *outer, seqlen, num_heads, head_dim = shape
    state_dtype = torch.float64 if dtype == "float64" else torch.float32
    made = {
        "q": torch.randn(shape, generator=generator, dtype=torch.float64),
        "k": torch.randn(shape, generator=generator, dtype=torch.float64),
        "v": torch.randn((*outer, seqlen, num_heads, v_dim), generator=generator, dtype=torch.float64),
        "slopes": torch.tensor([0.1, 0.01, 0.0, 0.3][:num_heads], dtype=torch.float64),
        "initial_state": torch.randn((*outer, num_heads, head_dim, v_dim), generator=generator, dtype=torch.float64),
    }
    dtypes = {"slopes": state_dtype, "initial_state": state_dtype}
    made = {name: x.to(device, dtypes.get(name, getattr(torch, dtype))) for name, x in made.items()}
    return {name: x.requires_grad_(name in requires_grad) for name, x in made.items()}


def to_numpy(x):
    return x.detach().cpu().double().numpy()


def expected_gradients(x, do, dstate=None, **options):
    """Of what the tensors hold, in float64; `do` and `dstate` are tensors."""
    arrays = {name: to_numpy(tensor) for name, tensor in x.items()}
    do = np.broadcast_to(to_numpy(do), arrays["v"].shape)
    return reference.chunked_backward(
        do,
        *(arrays.pop(name) for name in "qkv"),
        **arrays,
        dstate=None if dstate is None else to_numpy(dstate),
        **options,
    )


def check(found, expected, dtype="float64", names=INPUTS):
    """Compare gradients, by the names of what they are of."""
    for name in names:
        bounds = GRADIENT_BOUNDS if name in ("q", "k", "v") else STATE_GRADIENT_BOUNDS
        assert relative_rms(to_numpy(found[name]), getattr(expected, FIELDS[name])) <= bounds[dtype], name


def grads_of(x):
    return {name: tensor.grad for name, tensor in x.items()}


def attend(q, k, v, slopes=None, initial_state=None, **options):
    return lightning_attention(q, k, v, slopes=slopes, initial_state=initial_state, **options)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("through", ["o", "state", "both"])
def test_gradients(device, dtype, through):
    x = tensors(device, dtype)
    o, state = attend(**x, return_state=True)
    do, dstate = torch.randn_like(o), torch.randn_like(state)
    if through == "o":
        o.backward(do)
        dstate = None
    elif through == "state":
        state.backward(dstate)
        do = torch.zeros_like(o)
    else:
        torch.autograd.backward((o, state), (do, dstate))
    check(grads_of(x), expected_gradients(x, do, dstate), dtype, INPUTS if through != "state" else INPUTS[1:])
    for name, tensor in x.items():
        assert tensor.grad.dtype == tensor.dtype, name
    if through == "state":
        assert not x["q"].grad.any()


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(device, causal):
    x = tensors(device, shape=(1, 6, 2, 3), v_dim=2)
    if not causal:
        x.pop("slopes")

    def call(*values):
        return attend(**dict(zip(x, values, strict=True)), causal=causal, return_state=True)

    assert torch.autograd.gradcheck(call, tuple(x.values()))


@pytest.mark.parametrize("name", INPUTS)
def test_one_input_that_requires_grad(device, name):
    x = tensors(device, requires_grad=(name,))
    o = attend(**x)
    do = torch.randn_like(o)
    o.backward(do)
    assert [other for other in x if x[other].grad is not None] == [name]
    check(grads_of(x), expected_gradients(x, do), names=(name,))


def test_slopes_of_other_kinds(device):
    x = tensors(device, "float32")
    do = torch.randn_like(x["v"])
    for slopes in (None, 0.1, [0.1, 0.2, 0.3], lightning_cupy.slopes(3)):
        found = torch.autograd.grad(lightning_attention(x["q"], x["k"], x["v"], slopes=slopes), x["q"], do)
        arrays = [to_numpy(x[name]) for name in "qkv"]
        expected = reference.chunked_backward(to_numpy(do), *arrays, slopes=slopes, wanted=("dq",))
        assert relative_rms(to_numpy(found[0]), expected.dq) <= GRADIENT_BOUNDS["float32"]
    # One number on the CPU, of all heads.
    slope = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    lightning_attention(x["q"], x["k"], x["v"], slopes=slope).backward(do)
    expected = reference.chunked_backward(to_numpy(do), *arrays, slopes=0.1)
    assert slope.grad.shape == ()
    assert slope.grad.dtype == torch.float64
    assert slope.grad.item() == pytest.approx(expected.dslopes.sum(), rel=1e-5)
    of_heads = torch.tensor([0.1, 0.1, 0.1], requires_grad=True)  # on the CPU, with q on a GPU
    lightning_attention(x["q"], x["k"], x["v"], slopes=of_heads).backward(do)
    assert relative_rms(to_numpy(of_heads.grad), expected.dslopes) <= STATE_GRADIENT_BOUNDS["float32"]


def test_sum(device):
    x = tensors(device)
    attend(**x).sum().backward()  # the gradient of o is one number, broadcast
    check(grads_of(x), expected_gradients(x, torch.ones(())))


def test_views(device):
    x = tensors(device)
    leaves = {name: torch.randn(3, 70, 2, 8, device=device, dtype=torch.float64, requires_grad=True) for name in "qk"}
    views = {name: leaf.transpose(0, 2) for name, leaf in leaves.items()}
    o = attend(**(x | views))
    do = torch.randn(5, 3, 70, 2, device=device, dtype=torch.float64).permute(3, 2, 1, 0)
    for _ in range(2):
        o.backward(do, retain_graph=True)
    expected = expected_gradients(x | views, do)
    for name, leaf in leaves.items():
        assert leaf.grad.shape == leaf.shape
        wanted = 2 * getattr(expected, FIELDS[name]).swapaxes(0, 2)
        assert relative_rms(to_numpy(leaf.grad), wanted) <= GRADIENT_BOUNDS["float64"]


def test_accumulation_into_strided_gradients(device):
    x = tensors(device)
    for name in "qkv":
        tensor = x[name]
        tensor.grad = torch.ones_like(tensor.transpose(0, 3).contiguous()).transpose(0, 3)
    o = attend(**x)
    do = torch.randn_like(o)
    o.backward(do)
    expected = expected_gradients(x, do)
    for name in "qkv":
        assert relative_rms(to_numpy(x[name].grad), 1 + getattr(expected, FIELDS[name])) <= GRADIENT_BOUNDS["float64"]


@pytest.mark.parametrize("name", ["q", "k", "slopes", "do"])
def test_second_derivative_is_refused(device, name):
    x = tensors(device)
    o = attend(**x)
    do = torch.ones_like(o, requires_grad=name == "do")
    # With a second way to q, on which alone its second derivative would be 2.
    (gradient,) = torch.autograd.grad((o, x["q"].square()), x["q"], (do, torch.ones_like(x["q"])), create_graph=True)
    with pytest.raises(RuntimeError, match="lightning_attention can be differentiated once"):
        torch.autograd.grad(gradient.sum(), do if name == "do" else x[name], retain_graph=True)
    with pytest.raises(RuntimeError, match="lightning_attention can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("names", [("k", "initial_state"), ("v",)])
def test_arrays_of_numpy_beside_tensors(names):
    x = tensors("cpu")
    mixed = x | {name: x[name].detach().numpy() for name in names}
    o = attend(**mixed)
    do = torch.randn_like(o)
    o.backward(do)
    check(grads_of(x | dict.fromkeys(names, x["q"])), expected_gradients(x, do), names=set(INPUTS) - set(names))


@pytest.mark.parametrize("name", INPUTS)
def test_only_what_is_wanted_is_computed(device, monkeypatch, name):
    x, asked = tensors(device, requires_grad=(name, "v")), []

    def spy(*arguments):
        asked.append(arguments[9])
        return backward(*arguments)

    backward = api.attend_backward
    monkeypatch.setattr(api, "attend_backward", spy)
    attend(**x).sum().backward()
    assert [set(wanted) for wanted in asked] == [{"dv", FIELDS[name]}]


def test_bad_arguments_are_named(device):
    x = tensors(device, "float32")
    for bad, error, message in (
        ({"k": x["k"][:, :3]}, ValueError, r"^k has shape \(2, 3, 3, 8\), but q has"),
        ({"v": [1.0]}, TypeError, "^v must be a NumPy, CuPy or torch array, or export DLPack, but got list$"),
        ({"slopes": x["slopes"][:2]}, ValueError, r"^slopes must .*have shape \(3,\), but got \(2,\)$"),
        ({"initial_state": x["initial_state"].bfloat16()}, TypeError, "^initial_state must be float32 to go with q's"),
        ({"q": x["q"].to("meta")}, TypeError, "^q is on device meta, but the CPU or a CUDA device is wanted$"),
        ({"precision": "low"}, ValueError, "^precision must be 'default' or 'high', but got 'low'$"),
    ):
        with pytest.raises(error, match=message):
            attend(**(x | bad))
    with pytest.raises(TypeError, match=r"^q is on device meta"), torch.autocast(device, torch.bfloat16):
        attend(**(x | {"q": x["q"].to("meta")}))


def test_high_precision(device):
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("precision='high' is for compute capability 9.0")
    x = tensors(device, "bfloat16", v_dim=8)
    o = attend(**x, precision="high")
    arrays = {name: to_numpy(tensor) for name, tensor in x.items()}
    expected, _ = reference.chunked(**arrays)
    assert relative_rms(to_numpy(o), expected) <= HIGH_BOUNDS["bfloat16"]
    do = torch.randn_like(o)
    o.backward(do)
    check(grads_of(x), expected_gradients(x, do), "bfloat16")


def test_parameters_are_looked_up_like_tensors():
    x = tensors("cpu", "float32", requires_grad=())
    parameters = {name: torch.nn.Parameter(x[name]) for name in ("slopes", "initial_state")}
    with torch.no_grad():
        (forward, _, _), (expected, _, _) = (
            _calls.look_up(
                *(x[name] for name in "qkv"),
                None,
                given["slopes"],
                None,
                True,
                given["initial_state"],
                False,
                "default",
                "auto",
            )
            for given in (parameters, x)
        )
        assert forward == expected is not None
        (backward, _, _), (expected, _, _) = (
            _calls.look_up_backward(
                *(x[name] for name in "vqkv"),
                given["slopes"],
                None,
                True,
                given["initial_state"],
                None,
                ("dslopes",),
                "auto",
            )
            for given in (parameters, x)
        )
        assert backward == expected is not None


class Scaled(torch.nn.Module):
    """Attention with a matrix before it, and slopes that can be learnt."""

    def __init__(self, device):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64).to(device))
        self.slopes = torch.nn.Parameter(torch.tensor([0.1, 0.01, 0.2], dtype=torch.float64, device=device))

    def forward(self, q, k, v):
        o, state = attend(q @ self.matrix, k, v, self.slopes, return_state=True)
        return o.square().sum() + state.sum()


def test_functional_call_and_functional_gradients(device):
    model = Scaled(device)
    arrays = [tensors(device, requires_grad=())[name] for name in "qkv"]
    model(*arrays).backward()
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, tuple(arrays))

    leaves = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
    called = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
    value, pull_back = torch.func.vjp(loss, parameters)
    for found in (called, torch.func.grad(loss)(parameters), *pull_back(torch.ones_like(value))):
        for name, parameter in model.named_parameters():
            assert relative_rms(to_numpy(found[name]), to_numpy(parameter.grad)) <= GRADIENT_BOUNDS["float64"], name
    with pytest.raises(RuntimeError, match="lightning_attention can be differentiated once"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x)["matrix"].sum())(parameters)


def test_inputs_that_were_written_since(device):
    x = tensors(device)
    o = attend(**x)
    with torch.no_grad():
        x["k"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_nothing_is_recorded_without_need(device):
    x = tensors(device, requires_grad=())
    assert attend(**x).grad_fn is None
    with torch.no_grad():
        assert attend(**tensors(device)).grad_fn is None
    with torch.inference_mode():
        assert not attend(**tensors(device)).requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(device, use_reentrant):
    x = tensors(device)
    o = checkpoint(lambda *values: attend(*values), *x.values(), use_reentrant=use_reentrant)
    do = torch.randn_like(o)
    o.backward(do)
    check(grads_of(x), expected_gradients(x, do))


# Autocast


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, autocast_dtype):
    name = str(autocast_dtype).removeprefix("torch.")
    x = tensors(device, "float32")
    x["k"] = x["k"].detach().bfloat16().requires_grad_()  # all of them become one dtype
    with torch.autocast(device, dtype=autocast_dtype):
        o, state = attend(**x, return_state=True)
        assert (o.dtype, state.dtype) == (autocast_dtype, torch.float32)
        do = torch.randn_like(o)
        inside = torch.autograd.grad(o, list(x.values()), do, retain_graph=True)
        with torch.no_grad():
            assert torch.equal(attend(**x), o)
    outside = torch.autograd.grad(o, list(x.values()), do)
    cast = {key: x[key].detach().to(autocast_dtype) for key in "qkv"}
    expected = expected_gradients(x | cast, do)
    for gradients in (inside, outside):
        found = dict(zip(x, gradients, strict=True))
        check(found, expected, name, [key for key in INPUTS if key != "k"])
        check(found, expected, "bfloat16", ["k"])
        for gradient, tensor in zip(gradients, x.values(), strict=True):
            assert gradient.dtype == tensor.dtype


def test_autocast_leaves_float64_alone(device):
    x = tensors(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert attend(**x).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert attend(**tensors(device, "float32")).dtype == torch.float32


# torch.compile


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    return lambda function, **options: torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, compiled, dynamic):
    def call(x):
        o, state = attend(**x, return_state=True)
        return 2 * o, state.tanh()

    function = compiled(call, dynamic=dynamic)
    for batch, seqlen in ((2, 70), (3, 9)):
        x = tensors(device, shape=(batch, seqlen, 3, 8))
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            found = function(x)
        expected = call(x)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        wanted = torch.autograd.grad([y.sum() for y in expected], list(x.values()))
        gradients = torch.autograd.grad([y.sum() for y in found], list(x.values()))
        for name, a, b in zip(x, gradients, wanted, strict=True):
            assert relative_rms(to_numpy(a), to_numpy(b)) <= GRADIENT_BOUNDS["float64"], name


@pytest.mark.parametrize("kind", ["none", "number", "list", "array", "made inside"])
def test_compile_with_slopes(device, compiled, kind):
    given = {"none": None, "number": 0.1, "list": [0.1, 0.2, 0.3], "array": lightning_cupy.slopes(3)}

    def call(q, k, v):
        return lightning_attention(q, k, v, slopes=given[kind] if kind in given else lightning_cupy.slopes(3))

    x = [tensors(device, "float32")[name] for name in "qkv"]
    found = compiled(call)(*x)
    assert torch.equal(found, call(*x))
    found.sum().backward()
    gradients = [tensor.grad.clone() for tensor in x]
    wanted = torch.autograd.grad(call(*x).sum(), x)
    for a, b in zip(gradients, wanted, strict=True):
        assert relative_rms(to_numpy(a), to_numpy(b)) <= GRADIENT_BOUNDS["float32"]


@pytest.mark.parametrize("kind", ["float", "scale", "list", "array", "number of numpy"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_with_values_that_change(device, compiled, kind, requires_grad):
    made = {
        "float": lambda value: {"slopes": value},
        "scale": lambda value: {"scale": value},
        "list": lambda value: {"slopes": [value, 0.2, 0.3]},
        "array": lambda value: {"slopes": np.array([value, 0.2, 0.3])},
        "number of numpy": lambda value: {"slopes": np.float64(value)},
    }[kind]
    x = [tensors(device, "float32", requires_grad="qkv" if requires_grad else "")[name] for name in "qkv"]
    function = compiled(lambda arrays, options: lightning_attention(*arrays, **options))
    for value in (0.1, 0.7, 0.4):
        assert torch.equal(function(x, made(value)), lightning_attention(*x, **made(value)))


def test_compile_names_what_is_wrong(device, compiled):
    x = [tensors(device, "float32")[name] for name in "qkv"]
    with pytest.raises(ValueError, match=r"^slopes must be one number or have shape \(3,\), but got \(1,\)$"):
        compiled(lambda *x: lightning_attention(*x, slopes=[0.1]))(*x)
    with pytest.raises(ValueError, match=r"^k has shape \(2, 3, 3, 8\), but q has \(2, 70, 3, 8\)$"):
        compiled(lambda q, k, v: lightning_attention(q, k[:, :3], v))(*x)


def test_compile_with_fewer_axes(device, compiled):
    x = tensors(device, "float32")
    function = compiled(lambda *x: lightning_attention(*x, slopes=0.1, return_state=True))
    for arrays in ([x[name][0].mT.contiguous().mT for name in "qkv"], [x[name][0, :, 0] for name in "qkv"]):
        expected = lightning_attention(*arrays, slopes=0.1, return_state=True)
        for a, b in zip(function(*arrays), expected, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("inside", [False, True])
def test_compile_with_autocast(device, compiled, inside):
    x = tensors(device, "float32")

    def call(x):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=inside or torch.is_autocast_enabled(device)):
            return attend(**x, return_state=True)

    function = compiled(call)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=not inside):
        found, expected = function(x), call(x)
    assert [y.dtype for y in found] == [torch.bfloat16, torch.float32]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    gradients, wanted = (
        torch.autograd.grad([y.sum() for y in result], list(x.values())) for result in (found, expected)
    )
    for (name, tensor), a, b in zip(x.items(), gradients, wanted, strict=True):
        assert a.dtype == tensor.dtype
        assert relative_rms(to_numpy(a), to_numpy(b)) <= GRADIENT_BOUNDS["bfloat16"], name


def test_compile_is_the_first_that_needs_the_adapter():
    # In a process of its own: here it is imported already.
    script = """
import sys, torch, lightning_cupy
assert "lightning_cupy.torch" not in sys.modules
x = torch.randn(9, 2, 4)
attend = lambda x: lightning_cupy.lightning_attention(x, x, x, slopes=0.1)
found = torch.compile(attend, fullgraph=True, backend="eager")(x)
assert torch.equal(found, attend(x))
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)


def test_export(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return lightning_attention(q, k, v, slopes=0.1)

    x = tuple(tensors(device, "float32", requires_grad=())[name] for name in "qkv")
    program = torch.export.export(Model(), x)
    assert torch.ops.lightning_cupy.attention.default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(*x), lightning_attention(*x, slopes=0.1))


def test_compile_refuses_out(device, compiled):
    x = tensors(device, requires_grad=())
    with pytest.raises(Exception, match=r"out must be None where torch\.compile traces the call"):
        compiled(lambda x: attend(**x, out=torch.empty_like(x["v"])))(x)


@pytest.mark.parametrize("slopes", [None, "tensor", [0.1]])
@pytest.mark.parametrize("return_state", [False, True])
def test_opcheck(device, slopes, return_state):
    x = tensors(device)
    decay = (x["slopes"], None) if slopes == "tensor" else (None, slopes)
    options = (None, True, return_state, "default", "auto")
    args = (x["q"], x["k"], x["v"], *decay, x["initial_state"] if return_state else None, *options)
    assert set(torch.library.opcheck(_attention_op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("wanted", [("dq", "dk", "dv"), ("dslopes", "dinitial_state"), ()])
def test_opcheck_of_the_backward(device, wanted):
    x = tensors(device, requires_grad=())
    states = (x["initial_state"], torch.randn_like(x["initial_state"]))
    args = (
        torch.randn_like(x["v"]),
        x["q"],
        x["k"],
        x["v"],
        x["slopes"],
        None,
        *states,
        0.3,
        True,
        list(wanted),
        "auto",
    )
    assert set(torch.library.opcheck(_attention_backward_op, args).values()) == {"SUCCESS"}


def test_inductor(device):
    if device == "cpu" and sys.platform != "linux":
        pytest.skip("torch.compile for a CPU wants a C++ compiler")
    layer = LightningAttention(32, 4).to(device)
    x = torch.randn(2, 70, 32, device=device)
    torch._dynamo.reset()
    try:
        found = torch.compile(layer, fullgraph=True)(x)
    except Exception as error:  # what inductor raises for want of a compiler
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"no compiler: {error}")
    assert relative_rms(to_numpy(found), to_numpy(layer(x))) <= 1e-5


# The layer


def definition(layer, x):
    """The layer on the O(n^2) form, in plain torch."""
    qkv = torch.nn.functional.silu(layer.qkv(x)).unflatten(-1, (layer.num_heads, 3, layer.head_dim))
    q, k, v = (array.transpose(1, 2) for array in qkv.unbind(-2))
    position = torch.arange(x.shape[1], device=x.device)
    distance = (position[:, None] - position).clamp(min=0)
    mask = torch.exp(-layer.slopes[:, None, None] * distance).tril()
    y = layer.norm(((q @ k.mT * mask) @ v * layer.scale).transpose(1, 2).flatten(-2))
    return layer.out(y if layer.gate is None else y * torch.sigmoid(layer.gate(x)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "layer", "gate_rank": 8, "slopes": "lightning2", "scale": 0.5},
        {"norm": "none", "gate_rank": 0, "head_dim": 5, "bias": True, "slopes": "fla", "layer": 1, "num_layers": 3},
    ],
    ids=["minimax", "transnormer", "bare"],
)
def test_layer(device, options):
    torch.manual_seed(0)
    layer = LightningAttention(32, 4, trainable_slopes=True, device=device, dtype=torch.float64, **options).double()
    x = torch.randn(2, 70, 32, device=device, dtype=torch.float64)
    layer(x).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    expected = definition(layer, x)
    assert relative_rms(to_numpy(layer(x)), to_numpy(expected)) <= BOUNDS["float64"]
    expected.square().sum().backward()
    assert "slopes" in gradients
    for name, parameter in layer.named_parameters():
        assert relative_rms(to_numpy(gradients[name]), to_numpy(parameter.grad)) <= GRADIENT_BOUNDS["float64"], name


def test_layer_in_two_parts(device):
    layer = LightningAttention(32, 4, device=device)
    x = torch.randn(2, 70, 32, device=device)
    first, state = layer(x[:, :33], return_state=True)
    second = layer(x[:, 33:], initial_state=state)
    assert relative_rms(to_numpy(torch.cat([first, second], 1)), to_numpy(layer(x))) <= 1e-5
    assert relative_rms(to_numpy(layer(x[0])), to_numpy(layer(x)[0])) <= 1e-5


@pytest.mark.parametrize("trainable", [False, True])
def test_layer_keeps_its_slopes(trainable):
    layer = LightningAttention(32, 4, layer=2, num_layers=4, trainable_slopes=trainable)
    wanted = lightning_cupy.slopes(4, "minimax", layer=2, num_layers=4).astype(np.float32)
    for changed in (layer, copy.deepcopy(layer).bfloat16(), copy.deepcopy(layer).to(torch.float16)):
        assert changed.slopes.dtype == torch.float32
        assert np.array_equal(changed.slopes.detach().numpy(), wanted)
        assert ("slopes" in dict(changed.named_parameters())) is trainable
        o = changed(torch.randn(3, 9, 32, dtype=changed.qkv.weight.dtype))
        assert o.dtype == changed.qkv.weight.dtype
        o.float().sum().backward()
        assert (changed.slopes.grad is not None) is trainable
    assert layer.double().slopes.dtype == torch.float64


def test_layer_names_what_is_wrong():
    for arguments, message in (
        ((30, 4), "embed_dim must be a multiple of num_heads 4, but got 30"),
        ((0, 4), "embed_dim must be 1 or more, but got 0"),
        ((32, 0), "num_heads must be 1 or more, but got 0"),
        ((1028, 4), "head_dim must be from 1 to 256, but got 257"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            LightningAttention(*arguments)
    for options, message in (
        ({"norm": "batch"}, "norm must be 'rms', 'layer' or 'none', but got 'batch'"),
        ({"activation": "relu"}, "activation must be 'silu' or 'identity', but got 'relu'"),
        ({"gate_rank": -1}, "gate_rank must be 0 or more, but got -1"),
        ({"slopes": "none"}, "preset must be one of .*, but got 'none'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            LightningAttention(32, 4, **options)


def test_layer_shows_what_it_is():
    text = repr(LightningAttention(32, 4, slopes="retnet", trainable_slopes=True))
    assert "32, num_heads=4, head_dim=8, slopes='retnet', trainable, activation='silu', scale=1.0" in text


# On a GPU


@pytest.mark.gpu
def test_cuda_graph_of_a_training_step():
    x = tensors("cuda", "bfloat16", shape=(2, 700, 4, 64), v_dim=64)
    target = torch.randn_like(x["v"])
    side = torch.cuda.Stream()

    def step():
        for tensor in x.values():
            tensor.grad = None
        o = attend(**x)
        (o * target).sum().backward()

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (1, 2):
        fresh = tensors("cuda", "bfloat16", shape=(2, 700, 4, 64), v_dim=64, seed=seed)
        with torch.no_grad():
            for name, tensor in x.items():
                tensor.copy_(fresh[name])
        graph.replay()
        check(grads_of(x), expected_gradients(x, target), "bfloat16")


@pytest.mark.gpu
def test_streams():
    x = tensors("cuda", "bfloat16", shape=(2, 3000, 4, 64), v_dim=64)
    do = torch.randn_like(x["v"])
    expected = torch.autograd.grad(attend(**x), list(x.values()), do)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            found.append(torch.autograd.grad(attend(**x), list(x.values()), do))
    torch.cuda.synchronize()
    for gradients in found:
        for a, b in zip(gradients, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("wants two GPUs")
    x = tensors("cuda:1", "bfloat16", shape=(2, 700, 4, 64), v_dim=64)
    o = attend(**x)
    do = torch.randn_like(o)
    o.backward(do)
    assert o.device.index == x["q"].grad.device.index == 1
    check(grads_of(x), expected_gradients(x, do), "bfloat16")


@pytest.mark.gpu
def test_host_time_of_a_training_step():
    # In a process of its own, as test_gpu_speed.py does.
    script = Path(__file__).with_name("host_time.py")
    done = subprocess.run([sys.executable, str(script), "train"], capture_output=True, text=True, check=True)
    times = json.loads(done.stdout)
    print(times)
    assert times["forward and backward"] <= 60
