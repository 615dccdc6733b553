"""What is missing for a GPU is said, with the command that mends it, and nothing runs until it is there."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import BOUNDS, relative_rms

from lightning_cupy import (
    _compile,
    _environment,
    backward,
    forward,
    lightning_attention,
    lightning_attention_backward,
    reference,
)

ROOT = Path(__file__).parent.parent
CACHES = (_environment.gpu_is_present, _environment.cuda_problem, _environment.prefers_gpu)


@pytest.fixture(autouse=True)
def fresh_caches():
    """Ask anew what is installed, and forget the answer."""
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


class CUDARuntimeError(RuntimeError):
    """Stands for CuPy's."""


@pytest.fixture
def install(monkeypatch):
    """Pretend that these are installed; an exception in place of an answer is raised."""

    def answer(value):
        def ask():
            if isinstance(value, Exception):
                raise value
            return value

        return ask

    def install(wheels=("cupy-cuda12x",), version="14.2.0", driver=12090, runtime=12090, devices=1, nvrtc=(12, 9)):
        names = ("numpy", "cupy-like", *wheels)
        distributions = [types.SimpleNamespace(metadata={"Name": name}) for name in names]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: distributions)
        cupy, cuda, compiler = (types.ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.nvrtc"))
        compiler.getVersion = answer(nvrtc)
        cuda.nvrtc = compiler
        cuda.runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            driverGetVersion=answer(driver),
            runtimeGetVersion=answer(runtime),
            getDeviceCount=answer(devices),
        )
        cupy.cuda, cupy.__version__ = cuda, version
        for module in (cupy, cuda, compiler):
            monkeypatch.setitem(sys.modules, module.__name__, module if wheels else None)

    return install


@pytest.fixture
def nothing_runs(monkeypatch):
    def run(*args, **options):
        raise AssertionError("something was compiled, launched or computed")

    for module, name in (
        *((_compile, "kernel"), (_compile, "compile_cubin"), (forward, "forward"), (backward, "backward")),
        *((reference, "chunked"), (reference, "chunked_backward")),
    ):
        monkeypatch.setattr(module, name, run)


EXTRA_12 = r'pip install -e ".*\[cuda12x\]"$'  # from a checkout
EXTRA_13 = r'pip install -e ".*\[cuda13x\]"$'
PROBLEMS = {
    "CuPy absent": ({"wheels": ()}, "CuPy wanted, got ModuleNotFoundError.*; run: " + EXTRA_12),
    "CuPy too old": ({"version": "13.6.0"}, r"CuPy 14 or later wanted, got 13\.6\.0; run: " + EXTRA_12),
    "two CuPy wheels": (
        {"wheels": ("cupy-cuda13x", "cupy-cuda12x")},
        "one CuPy wheel wanted, got 2 that overwrite each other: cupy-cuda12x, cupy-cuda13x; "
        "run: pip uninstall -y cupy-cuda12x cupy-cuda13x, then: pip install ",
    ),
    "a wheel and a build from source": (
        {"wheels": ("cupy", "cupy-cuda12x")},
        "one CuPy wheel wanted, got 2 that overwrite each other: cupy, cupy-cuda12x; ",
    ),
    "driver too old": (
        {"driver": 12040, "runtime": 13000, "wheels": ("cupy-cuda13x",)},
        r"a driver for CUDA 13 or later wanted, got one for CUDA 12\.4; install a newer NVIDIA driver",
    ),
    "driver not reached": ({"driver": CUDARuntimeError("no answer")}, "a CUDA driver wanted, got: no answer; install "),
    "driver absent": (
        {"driver": 0, "devices": CUDARuntimeError("cudaErrorInsufficientDriver")},
        "a CUDA (driver|device) wanted, got",
    ),
    "device hidden": (
        {"devices": CUDARuntimeError("cudaErrorNoDevice")},
        "a CUDA device wanted, got: cudaErrorNoDevice",
    ),
    "no device": ({"devices": 0}, "a CUDA device wanted, got none$"),
    "NVRTC missing": (
        {"nvrtc": RuntimeError("no libnvrtc.so.12")},
        r"NVRTC \(.*\) wanted, got RuntimeError\('no libnvrtc\.so\.12'\); run: " + EXTRA_12,
    ),
    "NVRTC 13 missing": (
        {"nvrtc": RuntimeError("no libnvrtc.so.13"), "wheels": ("cupy-cuda13x",), "driver": 13000, "runtime": 13000},
        r"NVRTC \(.*\) wanted, got RuntimeError\('no libnvrtc\.so\.13'\); run: " + EXTRA_13,
    ),
}


@pytest.mark.parametrize(("installed", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_backend_cuda(installed, message, install, nothing_runs):
    install(**installed)
    q = np.zeros((5, 4), np.float32)
    with pytest.raises(RuntimeError, match=f"^backend='cuda': {message}"):
        lightning_attention(q, q, q, backend="cuda")


@pytest.mark.parametrize(
    "installed",
    [
        {},
        {"version": "15.0.0rc1"},
        {"driver": 12020, "runtime": 12090},  # any driver of a major version runs all its toolkits
        {"driver": 13000, "runtime": 12090},
        {"wheels": ("cupy-cuda13x",), "driver": 13000, "runtime": 13000, "nvrtc": (13, 0)},
        {"wheels": ("cupy",)},
    ],
    ids=str,
)
def test_no_problem(installed, install):
    install(**installed)
    assert _environment.cuda_problem() is None
    _environment.require_cuda("q is on CUDA device 0")


def test_no_gpu_with_the_cupy_that_is_here():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    code = "import numpy, lightning_cupy as l; q = numpy.ones((5, 4)); l.lightning_attention(q, q, q, backend='cuda')"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.match("RuntimeError: backend='cuda': a CUDA (driver|device) wanted, got", result.stderr.splitlines()[-1])


def test_no_nvrtc_with_the_cupy_that_is_here():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    pytest.importorskip("cuda.pathfinder", reason="this CuPy does not find NVRTC through cuda-pathfinder")
    code = """
from cuda import pathfinder
find = pathfinder.load_nvidia_dynamic_lib
def find_all_but_nvrtc(name):
    if name == "nvrtc":
        raise pathfinder.DynamicLibNotFoundError("no libnvrtc")
    return find(name)
pathfinder.load_nvidia_dynamic_lib = find_all_but_nvrtc
from lightning_cupy import _environment
print(_environment.nvrtc_problem())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("NVRTC (libnvrtc, CUDA's run-time compiler) wanted, got DynamicLibNotFoundError")
    assert re.search(r'run: pip install -e ".*\[cuda1', result.stdout)


def call_on(rng):
    """A call with nothing said of a backend, and what it should give."""
    q, k, v = rng.standard_normal((3, 65, 2, 16), dtype=np.float32)
    expected, _ = reference.recurrent(q, k, v, dtype=np.float64)
    return lambda: relative_rms(lightning_attention(q, k, v), expected)


def test_a_gpu_that_cannot_be_used_is_told_of_once(install, monkeypatch, rng):
    install(version="13.6.0")
    monkeypatch.setattr(_environment, "gpu_is_present", lambda: True)
    call = call_on(rng)
    with pytest.warns(RuntimeWarning, match=r"there is a GPU, but .* on the CPU: CuPy 14 .*, got 13\.6\.0") as caught:
        assert call() <= BOUNDS["float32"]
    # It points at the call of lightning_attention.
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, call.__code__.co_firstlineno)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call() <= BOUNDS["float32"]


def test_backend_cpu_asks_for_no_gpu(monkeypatch):
    def ask():
        raise AssertionError("backend='cpu' looked for a GPU")

    for name in ("gpu_is_present", "cuda_problem", "prefers_gpu"):
        monkeypatch.setattr(_environment, name, ask)
    q = np.ones((5, 4), np.float32)
    assert lightning_attention(q, q, q, backend="cpu").shape == q.shape


def test_without_a_gpu_nothing_is_said_and_cupy_is_not_asked(monkeypatch, rng):
    def ask():
        raise AssertionError("CuPy was asked for")

    monkeypatch.setattr(_environment, "gpu_is_present", lambda: False)
    monkeypatch.setattr(_environment, "cuda_problem", ask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call_on(rng)() <= BOUNDS["float32"]


def test_a_gpu_that_can_be_used_is_preferred(install, monkeypatch):
    install()
    monkeypatch.setattr(_environment, "gpu_is_present", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _environment.prefers_gpu()


@pytest.mark.parametrize(
    ("init", "status", "count", "present"),
    [(0, 0, 1, True), (0, 0, 8, True), (0, 0, 0, False), (100, 0, 1, False), (0, 3, 1, False)],
)
def test_gpu_is_present(init, status, count, present, monkeypatch):
    def count_devices(reference):
        reference._obj.value = count
        return status

    driver = types.SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=count_devices)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert _environment.gpu_is_present() is present


def test_no_driver_is_no_gpu(monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert _environment.gpu_is_present() is False


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


def tensors(torch):
    shapes = {"q": (5, 2, 4), "k": (5, 2, 4), "v": (5, 2, 6), "out": (5, 2, 6), "initial_state": (2, 4, 6)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state", "slopes"])
def test_out_where_gradients_are_recorded(name, torch, nothing_runs):
    arguments = tensors(torch) | {"slopes": torch.tensor([0.1, 0.2])}
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=r"^out must be None where an input requires grad, but got a Tensor$"):
        lightning_attention(**arguments, backend="cpu")


def test_out_that_requires_grad(torch, nothing_runs):
    arguments = tensors(torch)
    arguments["out"].requires_grad_()
    message = r"^out requires grad, but no gradient would be recorded: pass out\.detach\(\), or call it under torch\.no"
    with pytest.raises(ValueError, match=message):
        lightning_attention(**arguments, backend="cpu")


@pytest.mark.parametrize("name", ["do", "q", "k", "v", "initial_state", "dstate", "slopes"])
def test_gradients_of_a_tensor_that_requires_grad(name, torch, nothing_runs):
    arguments = tensors(torch) | {"slopes": torch.tensor([0.1, 0.2])}
    arguments |= {"do": arguments.pop("out"), "dstate": arguments["initial_state"].clone()}
    arguments[name].requires_grad_()
    message = rf"^{name} requires grad, but no gradient would be recorded: pass {name}\.detach\(\)"
    with pytest.raises(ValueError, match=message):
        lightning_attention_backward(**arguments, backend="cpu")


@pytest.mark.parametrize("context", ["no_grad", "inference_mode"])
def test_grad_that_nobody_records(context, torch):
    arguments = tensors(torch)
    out = arguments.pop("out")
    slopes = torch.tensor([0.1, 0.2])
    expected, _ = reference.recurrent(
        *(arguments[name].numpy() for name in "qkv"),
        slopes=slopes.numpy(),
        initial_state=arguments["initial_state"].numpy(),
        dtype=np.float64,
    )
    for tensor in (*arguments.values(), slopes):
        tensor.requires_grad_()
    with getattr(torch, context)():
        o = lightning_attention(**arguments, slopes=slopes, backend="cpu")
        assert lightning_attention(**arguments, out=out, slopes=slopes, backend="cpu") is out
    for result in (o, out):
        assert not result.requires_grad
        assert relative_rms(result.numpy(), expected) <= BOUNDS["float32"]


def test_a_detached_tensor(torch):
    arguments = tensors(torch)
    detached = {name: tensor.requires_grad_().detach() for name, tensor in arguments.items()}
    assert lightning_attention(**detached, backend="cpu") is detached["out"]


def test_a_gpu_older_than_turing(monkeypatch):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    volta = types.SimpleNamespace(compute_capability="70", attributes={"MultiProcessorCount": 80})
    monkeypatch.setattr(cupy.cuda, "Device", lambda device_id: volta)
    forward.device_properties.cache_clear()
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5 or later wanted, but CUDA device 3 has 7\.0"):
        forward.device_properties(3)
