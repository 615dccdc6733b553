"""Every plan of every kernel compiles for its architecture without spills, and the cache keeps its promises."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from lightning_cupy import _compile, backward, forward, forward_sm90

pytest.importorskip("cupy", reason="NVRTC comes through CuPy, which is not installed")

ARCHS = (75, 80, 86, 89, 90, 100, 120)
DTYPES = ("float16", "bfloat16", "float32", "float64")

# What ptxas says, C7510 to C7519, where products of wgmma wait for each other, and C7508 where registers stay put.
PERFORMANCE_LOSS = re.compile(r"\(C75\d\d\)")

HOPPER_PLANS = (forward_sm90.HopperPlan, forward_sm90.HopperFloatPlan)
Plan = (
    forward.ForwardPlan
    | forward.ScanPlan
    | backward.SlopesPlan
    | forward_sm90.HopperPlan
    | forward_sm90.HopperFloatPlan
)


def accepted_spills(plan: Plan) -> int:
    """Bytes of spill stores and loads each, and of stack, that a plan may have."""
    # Hopper's registers are set by hand for each role, and where an SM's are the tightest some plans want a few more:
    # what is spilled is a few words beside hundreds of instructions, and differs with NVRTC.
    if isinstance(plan, forward_sm90.HopperFloatPlan):
        return 64 if plan.v_groups == 2 else 0
    if isinstance(plan, forward_sm90.HopperPlan) and plan.slopes:
        if not plan.split:
            return {("float16", 128): 44, ("bfloat16", 128): 8}.get((plan.dtype, plan.qk_dim), 0)
        return {("float16", 128): 204, ("bfloat16", 128): 40}.get((plan.dtype, plan.qk_dim), 0)
    if isinstance(plan, forward_sm90.HopperPlan) and plan.split:
        if plan.dtype == "float16" and plan.qk_dim == 256:
            return 76 if plan.in_reverse else 72
        return 8 if plan.v_groups == 2 or plan.high else 0
    if isinstance(plan, backward.SlopesPlan):
        return {"float16": 48, "bfloat16": 12, "float64": 16}.get(plan.dtype, 0)
    if isinstance(plan, forward.ForwardPlan) and plan.dtype == "float32":
        # Three blocks an SM leave a thread 80 registers.
        return 8 * (plan.in_reverse + (plan.compute_capability == 120))
    return 0


def arch_of(plan: Plan) -> int:
    """Compute capability that a plan is for."""
    return 90 if isinstance(plan, HOPPER_PLANS) else plan.compute_capability


def all_plans() -> list[Plan]:
    """Every plan that a call can ask for."""
    passes = ({}, {"outputs": False}, {"causal": False})
    directions = (False, True)
    plans = {
        forward.plan_for(dtype, head_dim, arch, **options, in_reverse=in_reverse)
        for dtype, head_dim, arch, options, in_reverse in itertools.product(
            DTYPES, range(1, 257), ARCHS, passes, directions
        )
    }
    scans = [forward.ScanPlan(*fields) for fields in itertools.product(("float", "double"), ARCHS, directions)]
    tilings = tuple(forward_sm90._OUTPUTS_US)
    kinds = ({}, {"high": True}, {"in_reverse": True}, {"in_reverse": True, "attentions": 2})
    hopper = [
        forward_sm90.plan_for(dtype, *tiling, cluster=cluster, neighbours=neighbours, split=split, **kind)
        for dtype, tiling, kind in itertools.product(DTYPES[:2], tilings, kinds)
        for cluster, neighbours, split in (
            *((1, 1, False), (1, 1, True)),
            *((size, 1, False) for size in (2, 3, 4) if tiling[1] == 1),
            *([(1, 2, False)] if tiling[0] <= 96 else []),
        )
    ]
    hopper += [
        forward_sm90.plan_for(dtype, qk_dim, 1, cluster=cluster, neighbours=neighbours, split=split, slopes=True)
        for dtype, qk_dim in itertools.product(DTYPES[:2], (64, 128))
        for cluster, neighbours, split in (
            *((size, 1, False) for size in (1, 2, 3, 4)),
            *([(1, 2, False)] if qk_dim == 64 else []),
            (1, 1, True),
        )
    ]
    floats = [
        forward_sm90.float_plan_for(*tiling, in_reverse=in_reverse)
        for tiling, in_reverse in itertools.product(tilings, directions)
        if tiling[0] != 96
    ]
    slopes = {backward.slopes_plan_for(*fields) for fields in itertools.product(DTYPES, range(1, 257), ARCHS)}
    return hopper + floats + sorted(plans | slopes, key=repr) + scans


def sources_of(file: str) -> str:
    """Text of a file of kernels_cu and of all that it includes."""
    text = (_compile.kernels_dir() / file).read_text()
    return text + "".join(map(sources_of, re.findall(r'^#include "(.*)"', text, re.MULTILINE)))


def compile_plan(plan: Plan, folder: Path) -> str:
    """Return the log, kept in the folder until one of the files that it is of changes."""
    from cupy.cuda import nvrtc

    parts = sources_of(plan.file), plan.constants, arch_of(plan), _compile._OPTIONS, nvrtc.getVersion()
    path = folder / hashlib.sha256(repr(parts).encode()).hexdigest()
    if not path.exists():
        _, log = _compile.compile_cubin(plan.file, plan.constants, arch_of(plan))
        _compile._write_atomically(path, log.encode())
    return path.read_text()


def spilled_bytes(log: str) -> list[int]:
    """Spill stores, spill loads and stack frame of each kernel in a log of ptxas."""
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return [int(number) for kernel in found for number in kernel]


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Logs of all plans, compiled in as many processes as there are cores, and kept in pytest's cache."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("logs-of-plans") if cache else tmp_path_factory.mktemp("logs-of-plans")
    plans = all_plans()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        logs = pool.map(compile_plan, plans, itertools.repeat(folder), chunksize=4)
        return dict(zip(plans, logs, strict=True))


def test_every_plan_compiles_without_spills(compiled):
    spills = {plan: spilled_bytes(log) for plan, log in compiled.items()}
    assert all(spills.values()), "a log without ptxas' report"
    assert {plan: numbers for plan, numbers in spills.items() if max(numbers) > accepted_spills(plan)} == {}
    assert {plan: log for plan, log in compiled.items() if "warning" in log or PERFORMANCE_LOSS.search(log)} == {}


def test_every_plan_fits_its_architecture(compiled):
    assert sum(isinstance(plan, HOPPER_PLANS) for plan in compiled) == 128 + 120 + 32 + 12 + 22
    for plan in compiled:
        if not isinstance(plan, forward.ScanPlan):
            limit = {75: 64, 80: 163, 90: 227, 100: 227}.get(arch_of(plan), 99)
            assert plan.smem_bytes <= limit * 1024, plan
            assert plan.num_threads <= 1024, plan


def test_products_that_wait_are_seen(tmp_path, monkeypatch):
    source = """
        #include "ptx_sm90.cuh"
        __device__ __noinline__ void wait() { wgmma_wait<0>(); }
        extern "C" __global__ void f(float* to, uint64_t from) {
          float sum[32] = {};
          wgmma_fence();
          wgmma_64x64x16<true, false, false>(sum, from, from, 1);
          wgmma_commit();
          wait();
          for (int i = 0; i < 32; i++) to[i] = sum[i];
        }"""
    for path in _compile.kernels_dir().glob("*.cuh"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "waits.cu").write_text(source)
    monkeypatch.setattr(_compile, "kernels_dir", lambda: tmp_path)
    _, log = _compile.compile_cubin("waits.cu", (("AMPERE", 1),), 90)
    assert PERFORMANCE_LOSS.search(log)


def test_spills_are_seen():
    log = "f\nptxas . 16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
    assert spilled_bytes(log) == [16, 8, 4]


def test_compile_error_names_file_and_line():
    plan = forward.plan_for("float32", 64, 80)
    constants = tuple((name, 1 if name == "SMEM_BYTES" else value) for name, value in plan.constants)
    with pytest.raises(RuntimeError, match=r"forward_float\.cu(.|\n)*smem_bytes is smaller than Shared"):
        _compile.compile_cubin(plan.file, constants, 80)


def test_unknown_architecture_is_named():
    plan = forward.ScanPlan("float", 80)
    with pytest.raises(RuntimeError, match="sm_60"):
        _compile.compile_cubin(plan.file, plan.constants, 60)


SCAN = forward.ScanPlan("float", 80)


def cubin_path() -> Path | bytes:
    return _compile.cubin_path(SCAN.file, SCAN.constants, SCAN.compute_capability)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_CUPY_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def count_compiles(monkeypatch) -> list:
    calls = []
    original = _compile.compile_cubin
    monkeypatch.setattr(_compile, "compile_cubin", lambda *args: calls.append(args) or original(*args))
    return calls


def test_cache_is_used(cache, count_compiles):
    first, second = cubin_path(), cubin_path()
    assert first == second
    assert first.parent == cache
    assert first.read_bytes()[:4] == b"\x7fELF"
    assert len(count_compiles) == 1
    assert _compile.cached_files() == [first]


def test_cache_says_what_it_compiles_when_asked(cache, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_CUPY_VERBOSE", "1")
    cubin_path()
    assert "compiling scan.cu for sm_80" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x7fELF truncated", b"something else"])
def test_corrupt_file_is_compiled_over(cache, count_compiles, content):
    path = cubin_path()
    whole = path.read_bytes()
    path.write_bytes(content)
    assert cubin_path() == path
    assert path.read_bytes() == whole
    assert len(count_compiles) == 2


def test_unwritable_folder_warns_once_and_compiles(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIGHTNING_CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="LIGHTNING_CUPY_CACHE_DIR"):
        assert cubin_path()[:4] == b"\x7fELF"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cubin_path()[:4] == b"\x7fELF"


def test_cubin_without_a_cache_stands_in_a_file_while_it_is_loaded():
    with _compile._as_file(b"cubin") as path:
        assert path.read_bytes() == b"cubin"
    assert not path.exists()


def test_failed_write_leaves_nothing(cache, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(RuntimeWarning, match="disk full"):
        assert isinstance(cubin_path(), bytes)
    assert list(cache.iterdir()) == []


def test_clear_deletes_only_kernels(cache):
    path = cubin_path()
    size = path.stat().st_size
    (cache / "notes.txt").write_text("mine")
    assert _compile.clear_cache() == (1, size)
    assert [left.name for left in cache.iterdir()] == ["notes.txt"]


def test_changed_header_is_compiled_anew(cache, tmp_path, monkeypatch, count_compiles):
    sources = tmp_path / "kernels_cu"
    sources.mkdir()
    for path in _compile.kernels_dir().iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    before = cubin_path()
    monkeypatch.setattr(_compile, "kernels_dir", lambda: sources)
    assert cubin_path() == before, "the same sources elsewhere have the same key"
    with open(sources / "tile.cuh", "a") as header:
        header.write("// changed\n")
    _compile._sources_digest.cache_clear()
    after = cubin_path()
    assert after.name.split("-")[1] != before.name.split("-")[1]
    assert len(count_compiles) == 2


def test_two_processes_at_once(cache):
    code = (
        "from lightning_cupy import _compile, forward; plan = forward.ScanPlan('float', 80);"
        "print(_compile.cubin_path(plan.file, plan.constants, plan.compute_capability))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert paths == {str(path) for path in cache.iterdir()}, "one file, and no temporary one left"


def test_threads_load_a_kernel_once(monkeypatch):
    loads = []
    started = threading.Barrier(8)

    def load(*args):
        loads.append(args)
        return object()

    monkeypatch.setattr(_compile, "_load", load)
    monkeypatch.setattr(_compile, "_kernels", {})

    def ask(_):
        started.wait()
        return _compile.kernel("scan.cu", "scan", SCAN.constants, 0, 0)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        kernels = set(pool.map(ask, range(8)))
    assert len(loads) == len(kernels) == 1


def test_threads_may_be_the_first_to_compile():
    # In about half of such processes NVRTC 13.0 fails at first; 12.9 does not.
    code = (
        "import concurrent.futures, threading\n"
        "from lightning_cupy import _compile\n"
        "from test_compile import SCAN\n"
        "start = threading.Barrier(4)\n"
        "def work(_):\n"
        "    start.wait()\n"
        "    return len(_compile.compile_cubin('scan.cu', SCAN.constants, 90)[0])\n"
        "with concurrent.futures.ThreadPoolExecutor(4) as pool:\n"
        "    print(set(pool.map(work, range(4))))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for _ in range(3):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_compiles_again_where_nvrtc_could_not_open_its_library(monkeypatch):
    from cupy.cuda import nvrtc

    compile_program, failures, tries = nvrtc.compileProgram, [nvrtc.NVRTCError(7)], []

    def compile_or_fail(program, options):
        tries.append(program)
        if failures:
            raise failures.pop()
        return compile_program(program, options)

    monkeypatch.setattr(nvrtc, "compileProgram", compile_or_fail)
    cubin, _ = _compile.compile_cubin("scan.cu", SCAN.constants, 80)
    assert cubin.startswith(b"\x7fELF")
    assert len(tries) == 2

    failures += [nvrtc.NVRTCError(7)] * 10
    with pytest.raises(RuntimeError, match="BUILTIN_OPERATION_FAILURE"):
        _compile.compile_cubin("scan.cu", SCAN.constants, 80)
    assert len(failures) == 7, "it gives up in the end"

    failures[:] = [nvrtc.NVRTCError(6)] * 10
    with pytest.raises(RuntimeError, match="COMPILATION"):
        _compile.compile_cubin("scan.cu", SCAN.constants, 80)
    assert len(failures) == 9, "what does not compile is not tried again"
