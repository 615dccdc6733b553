"""Kernels compiled and loaded before they are needed; no GPU is needed, for loading is left out."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

import lightning_cupy
from lightning_cupy import _compile, _environment, backward, forward

pytest.importorskip("cupy", reason="NVRTC comes through CuPy, which is not installed")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtypes": "int8"}, ValueError, "dtypes must be of float16, bfloat16, float32, float64, but got 'int8'"),
        ({"dtypes": ["float32", np.float32]}, ValueError, "dtypes must be of .*, but got <class 'numpy.float32'>"),
        ({"dtypes": 3}, TypeError, "dtypes must be a name or a sequence of names, but got int"),
        ({"head_dims": 0}, ValueError, "head_dims must be from 1 to 256, but got 0"),
        ({"head_dims": [64, 257]}, ValueError, "head_dims must be from 1 to 256, but got 257"),
        ({"head_dims": [(64, 300)]}, ValueError, r"head_dims must be from 1 to 256, but got \(64, 300\)"),
        ({"head_dims": [(64, 64, 64)]}, TypeError, r"head_dims must be .* pairs of them, but got \(64, 64, 64\)"),
        ({"head_dims": "64"}, TypeError, "head_dims must be whole numbers or pairs of them, but got '64'"),
        ({"head_dims": [64.0]}, TypeError, "head_dims must be whole numbers or pairs of them, but got 64.0"),
        ({"head_dims": True}, TypeError, "head_dims must be whole numbers or pairs of them, but got True"),
        ({"head_dims": 64.0}, TypeError, "head_dims must be whole numbers or pairs of them, but got 64.0"),
        ({"device": "cuda:0"}, TypeError, "device must be a CUDA ordinal, but got str"),
        ({"device": True}, TypeError, "device must be a CUDA ordinal, but got bool"),
        ({"device": 2}, ValueError, "device must be from 0 to 1, but got 2"),
        ({"device": -1}, ValueError, "device must be from 0 to 1, but got -1"),
    ],
)
def test_bad_arguments(arguments, error, message, machine):
    with pytest.raises(error, match=f"^{message}$"):
        lightning_cupy.warmup(**arguments)
    assert _compile.cached_files() == []


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_environment, "cuda_problem", lambda: "no GPU")
    with pytest.raises(RuntimeError, match=r"^warmup: no GPU$"):
        lightning_cupy.warmup()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Two devices on which kernels are compiled, but not loaded; returns what was asked for."""
    import cupy

    loaded = []

    def load(file, name, constants, smem_bytes, device_id):
        loaded.append((file, name, constants, smem_bytes, device_id, threading.get_ident()))
        return _compile.cubin_path(file, constants, 80)

    monkeypatch.setenv("LIGHTNING_CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_compile, "_load", load)
    monkeypatch.setattr(_compile, "_kernels", {})
    monkeypatch.setattr(_environment, "cuda_problem", lambda: None)
    monkeypatch.setattr(forward, "device_properties", lambda device_id: (80, 108))
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    return loaded


@pytest.mark.parametrize("causal", [True, False])
def test_compiles_what_calls_launch(machine, capsys, causal):
    lightning_cupy.warmup("float32", [16, (16, 32)], causal=causal)
    plan = forward.plan_for("float32", 16, 80, causal=causal)
    states = forward.plan_for("float32", 16, 80, outputs=False)
    wanted = {(plan.file, plan.constants), (states.file, states.constants)}
    wanted |= {(scan.file, scan.constants) for scan in (forward.ScanPlan("float", 80),)}
    assert {(file, constants) for file, _, constants, *_ in machine} == wanted
    assert len(machine) == len(_compile.cached_files()) == 3, "each kernel once"
    assert {device_id for *_, device_id, _ in machine} == {0}
    assert "kernels" in capsys.readouterr().err

    lightning_cupy.warmup("float32", 16, causal=causal, show_progress=False)
    assert len(machine) == 3, "loaded already"
    assert capsys.readouterr().err == ""


def test_compiles_what_gradients_launch(machine):
    lightning_cupy.warmup("float32", 16, gradients=True, show_progress=False)
    directions = [
        forward.plan_for("float32", 16, 80, outputs=outputs, in_reverse=in_reverse)
        for outputs, in_reverse in itertools.product((True, False), (True, False))
    ]
    plans = [*directions, backward.slopes_plan_for("float32", 16, 80)]
    plans += [forward.ScanPlan("float", 80, in_reverse) for in_reverse in (False, True)]
    assert {(file, constants) for file, _, constants, *_ in machine} == {(plan.file, plan.constants) for plan in plans}
    names = [name for file, name, *_ in machine if file == "backward_float.cu"]
    assert sorted(names) == ["slope_partials", "slope_states", "sum_partials"]


def test_device(machine):
    lightning_cupy.warmup("float32", 16, device=1, show_progress=False)
    assert {device_id for *_, device_id, _ in machine} == {1}


def test_kernels_of_a_call_are_loaded_at_the_same_time(machine, monkeypatch):
    together = threading.Barrier(3, timeout=60)

    def load(*args):
        together.wait()
        return args

    monkeypatch.setattr(_compile, "_load", load)
    wanted = [("scan.cu", "scan", (("N", n),), 0) for n in range(3)]
    assert [one[2] for one in _compile.kernels(wanted, 0)] == [one[2] for one in wanted]


def test_a_kernel_that_does_not_compile_is_named_and_tried_again(machine, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("NVRTC did not compile it")

    monkeypatch.setattr(_compile, "_load", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="NVRTC did not compile it"):
            lightning_cupy.warmup("float32", 16)
    assert _compile._kernels == {}
