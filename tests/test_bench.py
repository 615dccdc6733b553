"""The bench: what it checks, prints, draws, writes and refuses; on a GPU, from end to end.

More than 500 lines, as what needs a GPU is also run over host memory, with what stands for CuPy here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import BOUNDS
from test_compile import ARCHS, spilled_bytes

from lightning_cupy import __main__ as cli
from lightning_cupy import (
    _arrays,
    _bench_gpu,
    _compile,
    _environment,
    _progress,
    bench,
    forward,
    lightning_attention,
    lightning_attention_backward,
    reference,
    slopes,
)


class FakeInputs:
    """Arrays on the host, in place of `_bench_gpu.Inputs`."""

    def __init__(self, shape: bench.Shape, dtype: str, decay: np.ndarray, heads_first: bool = False) -> None:
        rng = np.random.default_rng(0)
        of_head = (shape.num_heads, shape.seqlen) if heads_first else (shape.seqlen, shape.num_heads)
        arrays = (
            rng.standard_normal((shape.batch, *of_head, dim)).astype(dtype) for dim in (*shape[3:4] * 2, *shape[4:] * 2)
        )
        self.q, self.k, self.v, self.o = (array.swapaxes(1, 2) if heads_first else array for array in arrays)
        self.slopes, self.sampled = decay, [(0, 0), (shape.batch - 1, shape.num_heads - 1)]

    def attend(self) -> None:
        self.o[...] = lightning_attention(self.q, self.k, self.v, slopes=self.slopes, backend="cpu")

    def stream(self) -> None:
        self.o[...] = self.q.sum() + self.k.sum() + self.v

    def poison(self) -> None:
        self.o[...] = np.nan

    def is_unwritten(self) -> bool:
        return bool(np.isnan(self.o).any())

    def sample(self, array: np.ndarray) -> np.ndarray:
        return np.stack([array[batch_idx, :, head_idx] for batch_idx, head_idx in self.sampled], 1).astype(np.float64)


class FakeGradientInputs(FakeInputs):
    """In place of `_bench_gpu.GradientInputs`; a step through torch is the backward."""

    def __init__(self, shape: bench.Shape, dtype: str, decay: np.ndarray) -> None:
        super().__init__(shape, dtype, decay)
        self.do = self.o

    def gradients(self, *more: str):
        if more:
            time.sleep(0.001)
        return lightning_attention_backward(
            self.do, self.q, self.k, self.v, slopes=self.slopes, wanted=("dq", "dk", "dv"), backend="cpu"
        )

    def stream_backward(self) -> None:
        pass

    def stream_training(self) -> None:
        pass

    def train(self):
        return self.gradients

    def step_of(self, function):
        return function()

    backward_of = step_of

    def extra_memory(self, call) -> float:
        return 0.125


class FakeGpu:
    """Every call takes 2 ms, but the floor takes 1, and what asks for more gradients 3."""

    inputs = staticmethod(FakeInputs)
    gradient_inputs = staticmethod(FakeGradientInputs)
    torch = "torch"

    def time(self, call, seconds) -> bench.Timing:
        call()
        ms = 1.0 if call.__name__.startswith("stream") else 3.0 if call.__defaults__ else 2.0
        return bench.Timing(ms, ms, ms, 7)

    def time_in_turn(self, calls, seconds) -> list[bench.Timing]:
        return [self.time(call, seconds) for call in calls]

    def environment(self) -> dict[str, str]:
        return {"GPU": "Fake GPU", "driver": "1.2", "CUDA": "12.9"}

    def copy_gb_per_s(self) -> float:
        return 4321.0

    def host_us(self, call) -> float:
        return 12.5

    def host_us_of_launch(self) -> float:
        return 5.2


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """Let the bench run on the host, without peers, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_environment, "cuda_problem", lambda: None)
    monkeypatch.setattr(_bench_gpu, "current_gpu", lambda: contextlib.nullcontext(FakeGpu()))
    monkeypatch.setattr(_bench_gpu, "why_missing", lambda _: "not installed")


@pytest.fixture
def peers(fake_gpu, monkeypatch):
    """Let one peer be right in one of two variants, and another raise."""

    def right(x):
        return lightning_attention(x.q, x.k, x.v, slopes=x.slopes, backend="cpu")

    def broken():
        raise NotImplementedError("no such head_dim\nand much more")

    calls = {
        "fla": lambda x: {"fla chunk": lambda: 1.1 * right(x), "fla fused_chunk": lambda: right(x)},
        "sdpa": lambda x: {"sdpa": lambda: 2 * right(x)},
        "tk": lambda x: {"tk": broken},
        "lightning_attn": lambda x: {"lightning_attn": lambda: -right(x)},
        "naive": lambda x: broken(),
        "portable": lambda x: {"portable": lambda: right(x)},
    }
    monkeypatch.setattr(_bench_gpu, "PEER_CALLS", calls)
    # Functions that make calls, in place of functions of q, k and v.
    gradients = {
        "fla": lambda x: {
            "fla chunk": lambda: lambda: [1.1 * y for y in x.gradients()[:3]],
            "fla fused_chunk": lambda: x.gradients,
            "fla parallel": broken,
        },
        "sdpa": lambda x: {"sdpa": lambda: broken},
    }
    monkeypatch.setattr(_bench_gpu, "DIFFERENTIABLE_PEERS", gradients)
    monkeypatch.setattr(_bench_gpu, "why_missing", lambda _: None)


class HostArray(np.ndarray):
    """In place of CuPy's."""

    @property
    def data(self):
        return types.SimpleNamespace(memset_async=functools.partial(ctypes.memset, self.ctypes.data))

    def __eq__(self, other):
        assert self.size <= _bench_gpu._NUM_AT_A_TIME, "a large temporary array"
        return super().__eq__(other)


@pytest.fixture(params=["cupy", "torch"])
def machine(request, monkeypatch):
    """In place of `_bench_gpu.Gpu`, over host memory in which all bits are 1; notes launches."""
    rng = np.random.default_rng(0)

    def standard_normal(size, dtype):
        assert size <= _bench_gpu._NUM_AT_A_TIME, "a large temporary array"
        return rng.standard_normal(size, dtype)

    cupy = types.SimpleNamespace(
        empty=lambda shape, dtype: np.full(shape, -1, dtype).view(HostArray),
        asarray=np.asarray,
        asnumpy=np.asarray,
        random=types.SimpleNamespace(default_rng=lambda _: types.SimpleNamespace(standard_normal=standard_normal)),
    )
    torch = pytest.importorskip("torch") if request.param == "torch" else None
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(_bench_gpu, "lightning_attention", functools.partial(lightning_attention, backend="cpu"))
    monkeypatch.setattr(_bench_gpu, "_NUM_AT_A_TIME", 1000)
    launches = []
    return types.SimpleNamespace(
        torch=torch,
        device=types.SimpleNamespace(id=0),
        launches=launches,
        launch=lambda *arguments: launches.append(arguments),
    )


SHAPES = ["--shapes", "2,3,100,16", "1,2,65,32,8"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(out: str) -> list[list[str]]:
    """Rows of a Markdown table, checked to be one, and aligned."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == len({line.count("|") for line in lines}) == 1
    assert all(set(cell) <= {"-", ":"} for cell in cells(lines.pop(1)))
    return [cells(line) for line in lines]


# What it measures and prints


def test_bench_prints_a_table(fake_gpu, capsys):
    assert cli.main(["bench", *SHAPES, "--dtype", "float32", "float64", "--slopes", "0.1"]) == 0
    out = capsys.readouterr().out
    for words in (
        "forward on Fake GPU, driver 1.2, CUDA 12.9, 20",
        "`python -m lightning_cupy bench --shapes 2,3,100,16 1,2,65,32,8 --dtype float32 float64 --slopes 0.1`",
        "4,321 GB/s",
        "5.2 us (empty kernel), 12.5 us (float32), 12.5 us (float64)",
        "Not here: fla (not installed), tk (not installed)",
    ):
        assert words in out
    head, *rows = table(out)
    assert head == ["batch, heads, tokens, head_dim", "dtype", "ms", "TFLOP/s", "GB/s", "share", "error"]
    assert [row[:3] for row in rows] == [
        ["2, 3, 100, 16", "float32", "2.000"],
        ["1, 2, 65, 32, 8", "float32", "2.000"],
        ["2, 3, 100, 16", "float64", "2.000"],
        ["1, 2, 65, 32, 8", "float64", "2.000"],
    ]
    assert all(row[5] == "50 %" for row in rows)
    assert all(float(row[6]) <= BOUNDS[row[1]] for row in rows)


def test_bench_beside_peers(peers, capsys):
    assert cli.main(["bench", "--shapes", "2,3,100,16", "--dtype", "float32", "--json", "b.json"]) == 0
    head, row = table(capsys.readouterr().out)
    assert dict(zip(head[6:-1], row[6:-1], strict=True)) == {
        "fla": "1.00x",
        "tk": "-",
        "lightning_attn": "1.00x, differs",
        "sdpa": "1.00x",  # another function, and known to be
        "naive": "-",
        "portable": "1.00x",
    }
    (row,) = json.loads(Path("b.json").read_text())["rows"]
    assert set(row["peers"]) == {"fla", "fla chunk", "fla fused_chunk", "lightning_attn", "sdpa", "portable"}
    assert row["problems"] == dict.fromkeys(["tk", "naive"], "NotImplementedError: no such head_dim")
    assert row["peer_errors"]["fla chunk"] == pytest.approx(0.1, rel=1e-3)
    assert row["peer_errors"]["fla"] == row["peer_errors"]["fla fused_chunk"] < 2e-6


@pytest.mark.parametrize("options", [["--heads-first"], []])
def test_heads_first(fake_gpu, monkeypatch, capsys, options):
    attend, are_first = FakeInputs.attend, set()

    def attend_and_look(x):
        if x.q.shape[2] > 1:
            are_first.update(array.swapaxes(1, 2).flags.c_contiguous for array in (x.q, x.k, x.v, x.o))
        attend(x)

    monkeypatch.setattr(FakeInputs, "attend", attend_and_look)
    assert cli.main(["bench", *SHAPES, "--dtype", "float32", *options, "--json", "b.json"]) == 0
    subject = "forward of heads-first arrays on Fake GPU" if options else "forward on Fake GPU"
    assert capsys.readouterr().out.startswith(subject)
    assert are_first == {bool(options)}
    assert json.loads(Path("b.json").read_text())["heads_first"] == bool(options)


@pytest.mark.parametrize("wrong", ["value", "NaN", "unwritten"])
def test_wrong_output_gets_no_speed(peers, monkeypatch, capsys, wrong):
    attend = FakeInputs.attend

    def attend_wrongly(x):
        if wrong != "unwritten":
            attend(x)
            x.o[0, 50:, 0] *= 1.001 if wrong == "value" else np.nan

    monkeypatch.setattr(FakeInputs, "attend", attend_wrongly)
    assert cli.main(["bench", *SHAPES, "--dtype", "float32", "--json", "b.json", "--plot", "b.png"]) == 1
    _, *rows = table(capsys.readouterr().out)
    for row in rows:
        assert row[2:-1] == ["-"] * 10
        assert row[-1].endswith("FAILED, bound 2e-06")
        assert re.match(r"\d\.\de-04 " if wrong == "value" else "NaN ", row[-1])
    assert all(row["ours"] is None and not row["peers"] for row in json.loads(Path("b.json").read_text())["rows"])


@pytest.mark.parametrize(("seqlen", "factor"), [(63, 1.5), (64, 1)])
def test_fewer_tokens_than_a_chunk_may_be_further_off(fake_gpu, monkeypatch, seqlen, factor):
    attend = FakeInputs.attend

    def attend_wrongly(x):
        attend(x)
        x.o[...] *= 1 + np.float64(error)

    monkeypatch.setattr(FakeInputs, "attend", attend_wrongly)
    for share in (0.9, 1.1):
        error = share * factor * BOUNDS["float64"]
        result = bench.forward([(1, 2, seqlen, 16)], dtypes=["float64"], against=[])
        assert result.passed == (share < 1), result
    assert f"FAILED, bound {factor * BOUNDS['float64']:g}" in str(result)


@pytest.mark.parametrize("error", [MemoryError("of CuPy"), RuntimeError("CUDA out of memory. Tried to allocate")])
def test_shape_that_does_not_fit_is_said_to(fake_gpu, monkeypatch, capsys, error):
    def raise_error(*_):
        raise error

    monkeypatch.setattr(
        FakeGpu, "inputs", lambda _, shape, *rest: raise_error() if shape[0] > 1 else FakeInputs(shape, *rest)
    )
    assert cli.main(["bench", *SHAPES, "--dtype", "float32"]) == 0
    _, *rows = table(capsys.readouterr().out)
    assert rows[0][-1] == "does not fit in memory"
    assert float(rows[1][-1]) < 2e-6


def test_other_errors_are_not_taken_for_want_of_memory(fake_gpu, monkeypatch, capsys):
    def attend(_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(FakeInputs, "attend", attend)
    assert cli.main(["bench", *SHAPES]) == 2
    assert capsys.readouterr().err.endswith("error: an illegal memory access was encountered\n")


def test_result_in_a_notebook(fake_gpu):
    result = bench.forward([(1, 2, 65, 16)], dtypes=["float32"], against=[], slopes=0.25)
    assert result.passed
    assert result._repr_markdown_() == repr(result) == str(result)
    assert "Not here" not in str(result)
    assert table(str(result))[1][0] == "1, 2, 65, 16"


@pytest.mark.parametrize("seqlen", [40, 301, 399, 400, 1000])
def test_expected_outputs_of_windows(monkeypatch, rng, seqlen):
    q, k, v = (rng.standard_normal((seqlen, 2, dim)) for dim in (16, 16, 8))
    monkeypatch.setattr(bench, "_WINDOW", 100)
    whole, _ = reference.recurrent(q, k, v, slopes=[0.01, 0.0], dtype=np.float64)
    expected = bench._expected(q, k, v, np.array([0.01, 0.0]))
    assert [(window.start, window.stop) for window, _ in expected] == (
        [(0, seqlen)] if seqlen < 400 else [(0, 100), (seqlen // 2, seqlen // 2 + 100), (seqlen - 100, seqlen)]
    )
    assert bench._error(whole, expected) < 1e-12
    assert bench._error(1.01 * whole, expected) == pytest.approx(0.01)
    whole[-1] += 1
    assert bench._error(whole, expected) > 1e-3


def test_shape_counts():
    shape = bench.Shape.of(2, 3, 100, 128, 64)
    assert shape.num_bytes("bfloat16") == 2 * 3 * 100 * (128 + 128 + 64 + 64) * 2
    assert shape.num_bytes("bfloat16", "backward") == 2 * 3 * 100 * (4 * 128 + 3 * 64) * 2
    assert shape.num_bytes("float32", "train") == 2 * 3 * 100 * (6 * 128 + 5 * 64) * 4
    assert shape.flop() == 2 * 3 * 100 * (2 * 128 * 64 * 2 + 64 * (128 + 64))
    assert shape.flop("backward") == 2 * 3 * 100 * (5 * 2 * 128 * 64 + 64 * (3 * 128 + 2 * 64))
    assert shape.flop("train") == shape.flop() + shape.flop("backward")
    assert str(shape) == "2, 3, 100, 128, 64"
    assert str(bench.Shape.of(2, 3, 100, 128)) == "2, 3, 100, 128"


def test_default_shapes_are_those_with_stated_speeds():
    seqlens = {  # by batch, heads, head_dim
        (4, 32, 128): (512, 2048, 8192, 32768),
        (8, 16, 64): (2048, 8192),
        (1, 64, 128): (1024, 4096, 65536),
        (1, 8, 64): (1024,),
        (1, 8, 128): (32768, 131072),
        (1, 1, 128): (131072,),
        **{(2, 12, head_dim): (2048,) for head_dim in (96, 192, 256)},
        (33, 4, 128): (4096,),
    }
    stated = [(*sizes, seqlen, dim, dim) for (*sizes, dim), numbers in seqlens.items() for seqlen in numbers]
    assert sorted(bench.DEFAULT_SHAPES) == sorted(stated)
    assert set(bench.QUICK_SHAPES) < set(bench.DEFAULT_SHAPES)


# What it computes with


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_inputs(machine, dtype, heads_first):
    x = _bench_gpu.Inputs(machine, bench.Shape.of(2, 3, 70, 16, 8), dtype, slopes(3), heads_first)
    for name, dim in {"q": 16, "k": 16, "v": 8, "o": 8}.items():
        view, memory = _arrays.view(name, getattr(x, name)), np.asarray(x.bits[name])
        assert (view.kind, view.dtype) == ("torch" if machine.torch else "numpy", dtype)
        assert view.shape == (2, 70, 3, dim)
        assert view.strides == (210 * dim, *((dim, 70 * dim) if heads_first else (3 * dim, dim)), 1)
        assert view.pointer == memory.ctypes.data
        if name != "o":
            values = memory.view(_arrays.dtype_of(dtype)).astype(np.float64)
            assert np.std(values) == pytest.approx(1, abs=0.1)
            assert np.abs(values).max() < 6
            last_head = np.asarray(memory.reshape(2, 3, 70, dim)[1, 2] if heads_first else memory[1, :, 2])
            sampled = x.sample(getattr(x, name))[:, 1]
            np.testing.assert_array_equal(sampled, last_head.view(_arrays.dtype_of(dtype)))
    x.poison()
    assert x.is_unwritten()
    x.attend()
    assert not x.is_unwritten()
    q, k, v = (x.sample(array) for array in (x.q, x.k, x.v))
    expected, _ = reference.chunked(q, k, v, slopes=slopes(3)[[0, 2]], dtype=np.float64)
    assert bench._error(x.sample(x.o), [(slice(None), expected)]) <= BOUNDS[dtype]
    x.bits["o"].reshape(-1)[-1] = -1
    assert x.is_unwritten()


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 70, 16), (2, 3, 70, 16, 8), (2, 3, 70, 8, 16), (1, 1, 256, 8), (1, 1, 1, 1)])
def test_stream_has_a_thread_for_each_vector(machine, shape, heads_first):
    x = _bench_gpu.Inputs(machine, bench.Shape.of(*shape), "float16", slopes(shape[1]), heads_first)
    x.stream()
    ((name, num_blocks, o, q, k, v, num_qk, num_v),) = machine.launches
    assert name == "stream"
    for array, wanted, num_vectors in zip((o, q, k, v), "oqkv", (num_v, num_qk, num_qk, num_v), strict=True):
        assert array is x.bits[wanted]
        assert array.flags.c_contiguous
        assert type(num_vectors) is np.int64
        assert num_vectors == array.nbytes // 16
    assert num_blocks == max(1, np.ceil(max(num_qk, num_v) / 128))


def test_repeats_each_follow_a_flush_that_reads(monkeypatch):
    l2_bytes, queued = 80 * 2**20, []

    class Event:
        done = False

        def record(self):
            queued.append("event")

    device = types.SimpleNamespace(id=0, attributes={"L2CacheSize": l2_bytes}, synchronize=lambda: None)
    cuda = types.SimpleNamespace(Device=lambda: device, Event=Event, get_elapsed_time=lambda *_: 2.0)
    # What would set NumPy's memory as if it were CuPy's, raises.
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(zeros=np.zeros, cuda=cuda))
    monkeypatch.setattr(_compile, "kernel", lambda file, name, *_: lambda *launch: queued.append((name, *launch)))
    timing = _bench_gpu.Gpu(None).time(lambda: queued.append("call"), 0.0)
    assert timing == bench.Timing(2.0, 2.0, 2.0, 7), "of a slow call, few repeats"
    names = [step if isinstance(step, str) else step[0] for step in queued]
    assert names == ["call", "call", *("flush", "wait", "event", "call", "event") * 7]
    queued_before = len(queued)
    calls = [lambda name=name: queued.append(name) for name in ("this", "that")]
    assert _bench_gpu.Gpu(None).time_in_turn(calls, 0.0) == 2 * [timing]
    names = [step if isinstance(step, str) else step[0] for step in queued[queued_before:]]
    turn = [step for name in ("this", "that") for step in ("flush", "wait", "event", name, "event")]
    assert names == ["this", "that", "this", "that", *7 * turn], "at the same clocks"
    _, (num_blocks, *_), (num_threads, *_), (zeros, num_vectors) = queued[2]
    assert (num_threads, type(num_vectors)) == (128, np.int64)
    assert zeros.nbytes == 16 * num_vectors >= 2 * l2_bytes
    assert num_vectors <= num_blocks * num_threads < num_vectors + num_threads
    assert not zeros.any()


@pytest.mark.parametrize(("peer", "words"), [("sdpa", "18 PFLOP"), ("naive", "140737 GB")])
def test_peers_that_would_take_too_long_are_left_out(peer, words):
    x = types.SimpleNamespace(shape=bench.Shape.of(1, 64, 2**20, 128), dtype="bfloat16")
    with pytest.raises(ValueError, match=f"its scores would take {words}"):
        _bench_gpu.PEER_CALLS[peer](x)


def test_sdpa_is_beside_every_default_shape():
    torch = pytest.importorskip("torch")
    arrays = dict.fromkeys("qkv", torch.zeros(1, 1, 1, 1))
    for shape in bench.DEFAULT_SHAPES:
        assert set(_bench_gpu.PEER_CALLS["sdpa"](types.SimpleNamespace(shape=shape, torch=torch, **arrays))) == {"sdpa"}


@pytest.mark.parametrize("heads_first", [False, True])
def test_portable_kernels_get_the_same_views(machine, monkeypatch, heads_first):
    problems = []
    monkeypatch.setattr(forward, "device_properties", lambda _: (90, 132))
    for name in ("steps_for", "portable_steps"):
        monkeypatch.setattr(forward, name, problems.append)
    x = _bench_gpu.Inputs(machine, bench.Shape.of(2, 3, 70, 16, 8), "float32", slopes(3), heads_first)
    with pytest.raises(ValueError, match="the same kernels"):
        _bench_gpu.PEER_CALLS["portable"](x)
    for name in "oqkv":
        strides = _arrays.view(name, getattr(x, name)).strides
        assert [getattr(problem, name).strides for problem in problems] == [strides] * 2


# Files


@pytest.mark.parametrize("op", ["backward", "train"])
def test_gradients(peers, capsys, op):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", op, *SHAPES, "--dtype", "float32", "--json", "b.json", "--plot", "b.png"]) == 0
    out = capsys.readouterr().out
    head, *rows = table(out)
    assert f"{op} on Fake GPU" in out
    more = ["dinitial_state", "dslopes"] if op == "backward" else []
    assert head[2:] == ["ms", "TFLOP/s", "GB/s", "share", *more, "memory", "fla", "sdpa", "error"]
    shape = bench.Shape.of(2, 3, 100, 16)
    assert rows[0][2:4] == ["2.000", f"{shape.flop(op) / 2e9:.3g}"]
    assert rows[0][5:] == ["50 %", *["+50 %"] * len(more), "12 %", "1.00x", "-", rows[0][-1]]
    content = json.loads(Path("b.json").read_text())
    assert content["op"] == content["rows"][0]["op"] == op
    assert content["rows"][0]["problems"] == dict.fromkeys(
        ["fla parallel", "sdpa"], "NotImplementedError: no such head_dim"
    )
    assert content["rows"][0]["gb_per_s"] == pytest.approx(shape.num_bytes("float32", op) / 2e6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_wrong_gradient_gets_no_speed(fake_gpu, monkeypatch, capsys, which):
    right = FakeGradientInputs.gradients

    def wrong(self, *more):
        found = list(right(self, *more)[:3])
        found[which] = found[which] * 1.01
        return found

    monkeypatch.setattr(FakeGradientInputs, "gradients", wrong)
    assert cli.main(["bench", "backward", *SHAPES, "--dtype", "float32"]) == 1
    _, *rows = table(capsys.readouterr().out)
    assert rows[0][2:8] == ["-"] * 6
    assert "FAILED, bound 4e-06" in rows[0][-1]


def test_training_without_a_gpu_says_so_first(monkeypatch, capsys):
    monkeypatch.setattr(_environment, "cuda_problem", lambda: "a CUDA device wanted, got none")
    monkeypatch.setattr(_bench_gpu, "why_missing", lambda _: "needs torch")
    assert cli.main(["bench", "train"]) == 2
    assert "bench train: a CUDA device wanted, got none" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["step_of", "backward_of"])
def test_gradients_through_torch(which):
    torch = pytest.importorskip("torch")
    x = types.SimpleNamespace(torch=torch, do=torch.ones(5), **{name: torch.rand(5) for name in "qkv"})
    x._leaves = functools.partial(_bench_gpu.GradientInputs._leaves, x)
    with torch.no_grad():  # as where the bench measures
        call = getattr(_bench_gpu.GradientInputs, which)(x, lambda q, k, v: q * k + 2 * v)
        for _ in range(2):
            for gradient, expected in zip(call(), (x.k, x.q, 2 * x.do), strict=True):
                assert torch.equal(gradient, expected)
    assert not x.q.requires_grad


def test_training_without_torch_says_what_mends_it(fake_gpu, monkeypatch, capsys):
    monkeypatch.setattr(_bench_gpu, "why_missing", lambda _: "needs torch")
    assert cli.main(["bench", "train"]) == 2
    assert "bench train needs torch; run: pip install torch" in capsys.readouterr().err


def test_json_has_all_numbers(fake_gpu):
    assert cli.main(["bench", *SHAPES, "--dtype", "float32", "--json", "b.json"]) == 0
    content = json.loads(Path("b.json").read_text())
    assert content["environment"]["GPU"] == "Fake GPU"
    assert content["command"].startswith("python -m lightning_cupy bench --shapes")
    assert content["host_us"] == {"empty kernel": 5.2, "float32": 12.5}
    assert set(content["missing"]) == set(bench.PEERS)
    row = content["rows"][1]
    assert row["shape"] == {"batch": 1, "num_heads": 2, "seqlen": 65, "head_dim": 32, "v_dim": 8}
    assert row["ours"] == {"median": 2.0, "min": 2.0, "p90": 2.0, "num_repeats": 7}
    assert row["floor"]["median"] == 1.0
    assert row["share"] == 0.5
    assert row["gb_per_s"] == pytest.approx(2 * 65 * 80 * 4 / 2e-3 / 1e9)
    assert row["tflops"] == pytest.approx(2 * 65 * (4 * 32 * 8 + 64 * 40) / 2e-3 / 1e12)


@pytest.mark.parametrize("words", [["--json", "{}"], ["--json={}"], ["--js", "{}"], ["--plot", "{}.png"]])
def test_recorded_command_has_no_folder(fake_gpu, tmp_path, capsys, words):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    folder = tmp_path / "my=folder"
    folder.mkdir()
    assert cli.main(["bench", *SHAPES, *(word.format(folder / "b") for word in words), "--slopes=0.1"]) == 0
    command = " ".join(["python -m lightning_cupy bench", *SHAPES, *words, "--slopes=0.1"]).format("b")
    out, (path,) = capsys.readouterr().out, folder.iterdir()
    assert f"`{command}`" in out
    assert "folder" not in out
    if path.suffix != ".png":
        assert json.loads(path.read_text())["command"] == command


def test_plot(peers):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", *SHAPES, "--dtype", "float32", "--plot", "b.png"]) == 0
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in Path().iterdir()] == ["b.png"]


def test_plot_into_axes(peers):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    result = bench.forward([(1, 2, 65, 16)], dtypes=["float32"], heads_first=True)
    assert result.plot(axes) is axes
    assert axes.get_title() == "forward of heads-first arrays on Fake GPU: batch, heads, tokens, head_dim"
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"lightning_cupy", "fla", "copy", "only read q, k, v and write o"} <= legend
    pyplot.close(figure)


def test_failed_write_leaves_what_was_there(fake_gpu, monkeypatch, capsys):
    Path("b.json").write_text("old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    assert cli.main(["bench", *SHAPES, "--json", "b.json"]) == 2
    assert "error: disk full" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["b.json"]
    assert Path("b.json").read_text() == "old"


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["sideways"], "invalid choice: 'sideways'"),
        (
            ["--shapes", "1,2,3"],
            "batch,heads,tokens,head_dim[,v_dim], whole numbers from 1, are wanted, but got '1,2,3'",
        ),
        (["--shapes", "1,2,3,4,5,6"], "but got '1,2,3,4,5,6'"),
        (["--shapes", "0,2,3,4"], "but got '0,2,3,4'"),
        (["--shapes", "1,2,3,four"], "but got '1,2,3,four'"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_usage(capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *options])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shapes", "1,2,3,257"], "q must have a head_dim from 1 to 256, but got 257"),
        (
            ["--against", "fla,flash"],
            "against must be of fla, tk, lightning_attn, sdpa, naive, portable, but got 'flash'",
        ),
        (["backward", "--against", "portable"], "against must be of fla, sdpa, but got 'portable'"),
        (["backward", "--shapes", "1,2,3,257"], "q must have a head_dim from 1 to 256, but got 257"),
        (["train", "--heads-first"], "--heads-first is for the forward, but got train"),
        (["--slopes", "lightening"], "preset must be one of"),
        (["--slopes", "inf"], "slopes must be finite"),
        (["--plot", "b.pdf"], "--plot must end in .png, but got b.pdf"),
        (["--json", "nowhere/b.json"], "--json must be in a folder that exists"),
        (["--json", "b.png", "--plot", "b.png"], "--plot must be a file of its own"),
    ],
)
def test_bench_refuses_before_it_measures(fake_gpu, monkeypatch, capsys, options, words):
    monkeypatch.setattr(_bench_gpu, "current_gpu", None)
    assert cli.main(["bench", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert captured.out == ""
    assert not list(Path().iterdir())


def test_bench_without_a_gpu_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(_environment, "cuda_problem", lambda: "a CUDA device wanted, got none")
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == "error: bench: a CUDA device wanted, got none\n"


def test_plot_without_matplotlib_says_what_mends_it(fake_gpu, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--plot", "b.png"]) == 2
    assert "matplotlib wanted" in (err := capsys.readouterr().err)
    assert err.endswith("run: pip install matplotlib\n")


@pytest.mark.parametrize(
    ("modules", "cuda", "why"),
    [
        ({"torch": None}, True, "needs torch"),
        ({}, False, "needs a torch with CUDA"),
        ({"fla": None}, True, "not importable"),
        ({}, True, "not installed"),
    ],
)
def test_why_a_peer_is_missing(monkeypatch, modules, cuda, why):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    if why == "not installed" and importable("fla"):
        pytest.skip("flash-linear-attention is installed")
    assert _bench_gpu.why_missing("fla").startswith(why)


def importable(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def test_bench_imports_nothing_heavy():
    code = (
        "import sys, lightning_cupy.bench\n"
        "assert not {'cupy', 'torch', 'matplotlib', 'fla'} & set(sys.modules), sorted(sys.modules)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert finished.returncode == 0, finished.stderr


def test_plain_progress_writes_over_longer_words(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _progress.progress(2, "rows") as bar:
        bar.set_postfix_str("long words")
        bar.set_postfix_str("short")
        bar.update(2)
    *_, short, done, end = capsys.readouterr().err.split("\r")
    assert short == "0 of 2 rows, short     "
    assert done == "2 of 2 rows, short     "
    assert end == "2 of 2 rows            \n"


# The kernels


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spills(arch):
    pytest.importorskip("cupy", reason="NVRTC comes through CuPy, which is not installed")
    _, log = _compile.compile_cubin("bench.cu", _bench_gpu._CONSTANTS, arch)
    assert len(spilled_bytes(log)) == 5 * 3
    assert not any(spilled_bytes(log))
    assert "warning" not in log


@pytest.mark.parametrize(("name", "num_loads", "never"), [("stream", 3, -2), ("flush", 1, 0)])
def test_kernels_load_by_16_bytes_what_a_store_depends_on(name, num_loads, never):
    pytest.importorskip("cupy", reason="NVRTC comes through CuPy, which is not installed")
    from cupy.cuda import nvrtc

    source = (_compile.kernels_dir() / "bench.cu").read_text()
    program = nvrtc.createProgram(source, "bench.cu", (), ())
    constants = (f"-D{constant}={value}" for constant, value in _bench_gpu._CONSTANTS)
    nvrtc.compileProgram(program, ("--gpu-architecture=compute_75", *constants))
    kernel = re.search(rf"\.entry {name}\(.*?^}}", nvrtc.getPTX(program).decode(), re.DOTALL | re.MULTILINE)[0]
    accesses = re.findall(r"(?:ld|st)\.global\S*", kernel.replace("global.cs", "global"))
    assert accesses == ["ld.global.v4.u32"] * num_loads + ["st.global.v4.u32"]
    assert re.search(rf"setp\.(eq|ne)\.s32\s+%p\d+, %r\d+, {never};", kernel)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("with_torch", [True, False])
def test_quick_bench_on_a_gpu(tmp_path, capsys, monkeypatch, with_torch):
    if with_torch:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("torch has no CUDA")
    else:
        monkeypatch.setattr(_bench_gpu, "why_missing", lambda _: "needs torch")
    start = time.perf_counter()
    assert cli.main(["bench", "--quick", "--json", str(tmp_path / "b.json")]) == 0
    assert time.perf_counter() - start < 20
    content = json.loads((tmp_path / "b.json").read_text())
    assert len(content["rows"]) == len(bench.QUICK_SHAPES)
    for row in content["rows"]:
        assert 0 < row["share"] < 1.2
        assert row["error"] <= BOUNDS["bfloat16"]
        assert ("sdpa" in row["peers"]) == with_torch
    assert 0 < content["host_us"]["empty kernel"] < 1000
    assert "| 4, 32, 2048, 128" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_bench_of_odd_shapes_on_a_gpu(dtype, heads_first):
    shapes, against = [(2, 3, 1000, 40, 24), (1, 1, 2, 64)], ["naive", "portable"]
    result = bench.forward(shapes, dtypes=[dtype], against=against, slopes="retnet", heads_first=heads_first)
    assert result.passed, result
    assert all(row.ours and row.floor and 0 < row.ours.min <= row.ours.median <= row.ours.p90 for row in result.rows)
    assert all(bench._at_most(row.peer_errors.get("portable", 0.0), row.bound) for row in result.rows)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("v_dim", [16, 32, 40])
def test_inputs_on_a_gpu(heads_first, v_dim):
    with _bench_gpu.current_gpu() as gpu:
        x = gpu.inputs(bench.Shape.of(1, 4, 300, 32, v_dim), "float32", slopes(4), heads_first)
        q, k, v = (x.sample(array) for array in (x.q, x.k, x.v))
        assert abs(np.mean(q)) < 0.1
        assert np.std(q) == pytest.approx(1, abs=0.1)
        assert np.abs(np.mean(q * k)) < 0.1
        x.poison()
        assert x.is_unwritten()
        x.attend()
        assert not x.is_unwritten()
        expected, _ = reference.chunked(q, k, v, slopes=slopes(4)[[0, 3]], dtype=np.float64)
        assert bench._error(x.sample(x.o), [(slice(None), expected)]) <= BOUNDS["float32"]

        x.stream()
        o, q, k, v = (x.bits[name].get().ravel() for name in "oqkv")
        count = min(o.size, q.size)
        v[:count] ^= q[:count] ^ k[:count]
        np.testing.assert_array_equal(o, v)
        gpu.flush()
        assert not gpu._zeros.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("op", ["backward", "train"])
def test_gradients_on_a_gpu(op, dtype):
    if op == "train":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("torch has no CUDA")
    result = getattr(bench, op)([(1, 2, 65, 16), (2, 3, 130, 32, 8)], dtypes=[dtype], against=["sdpa"])
    assert result.passed
    for row in result.rows:
        assert row.ours.median > 0
        assert row.floor.median > 0
        assert list(row.more) == (["dinitial_state", "dslopes"] if op == "backward" else [])
