"""Whether this process can run CUDA kernels, and if not, what is missing and the command that mends it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import sys
import warnings
from pathlib import Path

MIN_COMPUTE_CAPABILITY = 75


@functools.cache
def gpu_is_present() -> bool:
    """Whether the CUDA driver is installed and sees a device. Imports nothing."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def cupy_wheels() -> list[str]:
    """Names of the installed CuPy distributions; more than one of them overwrite each other's files."""
    names = {dist.metadata["Name"] or "" for dist in importlib.metadata.distributions()}
    return sorted(name for name in names if name == "cupy" or name.startswith(("cupy-cuda", "cupy-rocm")))


def extra() -> str:
    """The pip command that installs CuPy and NVRTC for the toolkit of the CuPy wheel that is here, or for 12."""
    version = "13" if "cupy-cuda13x" in cupy_wheels() else "12"
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f'pip install -e "{checkout}[cuda{version}x]"'
    return f'pip install "lightning_cupy[cuda{version}x]"'


@functools.cache
def cuda_problem() -> str | None:
    """Say what keeps kernels from running here, and what mends it; None when nothing does."""
    wheels = cupy_wheels()
    if len(wheels) > 1:
        return (
            f"one CuPy wheel wanted, got {len(wheels)} that overwrite each other: {', '.join(wheels)}; "
            f"run: pip uninstall -y {' '.join(wheels)}, then: {extra()}"
        )
    try:
        import cupy
    except Exception as error:  # an ImportError, or what a binary made for another NumPy raises
        return f"CuPy wanted, got {error!r}; run: {extra()}"
    if int(cupy.__version__.split(".")[0]) < 14:
        return f"CuPy 14 or later wanted, got {cupy.__version__}; run: {extra()}"
    runtime = cupy.cuda.runtime
    try:
        driver_version, runtime_version = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except runtime.CUDARuntimeError as error:
        return f"a CUDA driver wanted, got: {error}; install NVIDIA's driver"
    if driver_version == 0:
        return "a CUDA driver wanted, got none; install NVIDIA's driver"
    if driver_version < runtime_version // 1000 * 1000:
        older = ", or the extra cuda12x in place of cuda13x" if runtime_version >= 13000 else ""
        return (
            f"a driver for CUDA {runtime_version // 1000} or later wanted, got one for CUDA "
            f"{driver_version // 1000}.{driver_version % 1000 // 10}; install a newer NVIDIA driver{older}"
        )
    try:
        if runtime.getDeviceCount() == 0:
            return "a CUDA device wanted, got none"
    except runtime.CUDARuntimeError as error:
        return f"a CUDA device wanted, got: {error}"
    return nvrtc_problem()


def nvrtc_problem() -> str | None:
    """Say what keeps NVRTC, the run-time compiler, from being loaded; None when nothing does."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # what is raised depends on CuPy's version and on what is missing
        return f"NVRTC (libnvrtc, CUDA's run-time compiler) wanted, got {error!r}; run: {extra()}"
    return None


def require_cuda(reason: str) -> None:
    """Raise RuntimeError unless kernels can run here; `reason` names the argument that asks for it."""
    problem = cuda_problem()
    if problem is not None:
        raise RuntimeError(f"{reason}: {problem}")


def _level_of_caller() -> int:
    """Return the stacklevel, for who calls this, of the first frame outside of the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        level, frame = level + 1, frame.f_back
    return level


@functools.cache
def prefers_gpu() -> bool:
    """Whether host arrays go to a GPU under ``backend="auto"``; warns once about a GPU that cannot be used."""
    if not gpu_is_present():
        return False
    problem = cuda_problem()
    if problem is not None:
        warnings.warn(
            f'there is a GPU, but lightning_cupy computes on the CPU: {problem}. backend="cpu" silences this.',
            RuntimeWarning,
            stacklevel=_level_of_caller(),
        )
    return problem is None
