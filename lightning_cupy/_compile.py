"""A file of kernels_cu, constants and an architecture become a cubin, a file in a cache, a loaded kernel."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Constants = tuple[tuple[str, str | int], ...]
Wanted = tuple[str, str, Constants, int]  # file, name, constants and smem_bytes of a kernel

# Instructions of just this architecture (wgmma, TMA on Hopper) need the "a"; 7.x and 8.x have none.
_ARCH_SPECIFIC = 90
_OPTIONS = ("-std=c++17", "-lineinfo", "--ptxas-options=-v")


def kernels_dir() -> Path:
    """Return the folder of CUDA sources: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "kernels_cu", package.parent / "kernels_cu"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"kernels_cu is neither in {package} nor beside it; reinstall lightning_cupy")


def cache_dir() -> Path:
    """Return the folder of compiled kernels: LIGHTNING_CUPY_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("LIGHTNING_CUPY_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", os.path.expanduser("~"))
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "lightning_cupy"


def cached_files() -> list[Path]:
    """Return the compiled kernels in the cache; the folder may hold other people's files, which do not count."""
    return sorted(cache_dir().glob("lightning-*.cubin"))


def clear_cache() -> tuple[int, int]:
    """Delete the compiled kernels in the cache; return their number and bytes."""
    count = num_bytes = 0
    for path in cached_files():
        size = path.stat().st_size
        path.unlink(missing_ok=True)
        count, num_bytes = count + 1, num_bytes + size
    return count, num_bytes


def arch_name(compute_capability: int) -> str:
    """Return the NVRTC name of an architecture: 80 -> "80", 90 -> "90a", 120 -> "120a"."""
    return f"{compute_capability}a" if compute_capability >= _ARCH_SPECIFIC else str(compute_capability)


# From NVRTC 13.0 where several threads are the first to compile: its library of built-ins opens for one, but may fail
# to for others. These try again, one by one, when it is open.
_NOT_OPEN = "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE"
_opening = threading.Lock()
_NUM_TRIES, _S_BEFORE_RETRY = 3, 0.1


def compile_cubin(file: str, constants: Constants, compute_capability: int) -> tuple[bytes, str]:
    """Compile ``kernels_cu/<file>`` with NVRTC; no GPU is needed.

    Parameters
    ----------
    file
        Name of a ``.cu`` file in ``kernels_cu``.
    constants
        Pairs of name and value, passed as ``-D``.
    compute_capability
        Major times ten plus minor, as 90.

    Returns
    -------
    cubin, log
        Machine code, and ptxas' report of registers, spills and stack.

    Raises
    ------
    RuntimeError
        When the source does not compile, or NVRTC does not know the architecture; the log is in the message.
    """
    from cupy.cuda import nvrtc

    path = kernels_dir() / file
    source = path.read_text(encoding="utf-8")
    options = (
        f"--gpu-architecture=sm_{arch_name(compute_capability)}",
        f"-I{path.parent}",
        *_OPTIONS,
        *(f"-D{name}={value}" for name, value in constants),
    )
    for is_last in (*[False] * (_NUM_TRIES - 1), True):
        program = nvrtc.createProgram(source, str(path), (), ())
        try:
            nvrtc.compileProgram(program, options)
            # NOTE: CuPy leaves out the last byte, as if it ended a string; the driver does not mind, disassemblers do.
            return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
        except nvrtc.NVRTCError as error:
            if is_last or _NOT_OPEN not in str(error):
                major, minor = nvrtc.getVersion()
                raise RuntimeError(
                    f"NVRTC {major}.{minor} did not compile {file} for sm_{arch_name(compute_capability)}: {error}\n"
                    f"{' '.join(options)}\n{nvrtc.getProgramLog(program)}"
                ) from error
        finally:
            nvrtc.destroyProgram(program)
        with _opening:
            time.sleep(_S_BEFORE_RETRY)
    raise AssertionError("the last try returns or raises")


@functools.cache
def _sources_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(file: str, constants: Constants, compute_capability: int) -> str:
    from cupy.cuda import nvrtc

    parts = (
        _sources_digest(kernels_dir()),
        file,
        constants,
        compute_capability,
        _OPTIONS,
        nvrtc.getVersion(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _content_digest(cubin: bytes) -> str:
    return hashlib.sha256(cubin).hexdigest()[:16]


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@functools.cache
def _warn_of_unwritable_cache(folder: Path, reason: str | None) -> None:
    warnings.warn(
        f"compiled kernels are not kept, since {folder} cannot be written ({reason}); "
        "set LIGHTNING_CUPY_CACHE_DIR to a folder that can",
        RuntimeWarning,
        stacklevel=2,
    )


def cubin_path(file: str, constants: Constants, compute_capability: int) -> Path | bytes:
    """Return the cached cubin's path, compiled now if need be; its bytes where the cache cannot be written.

    The name carries a digest of the content, so a truncated or foreign file is never loaded: it is compiled over.
    """
    folder = cache_dir()
    stem = f"lightning-{_key(file, constants, compute_capability)}"
    for path in folder.glob(f"{stem}-*.cubin"):
        try:
            if path.stem == f"{stem}-{_content_digest(path.read_bytes())}":
                return path
            path.unlink()
        except OSError:
            continue
    if os.environ.get("LIGHTNING_CUPY_VERBOSE"):
        print(
            f"lightning_cupy: compiling {file} for sm_{arch_name(compute_capability)} {dict(constants)}",
            file=sys.stderr,
        )
    cubin, log = compile_cubin(file, constants, compute_capability)
    if os.environ.get("LIGHTNING_CUPY_VERBOSE"):
        print(log, file=sys.stderr)
    path = folder / f"{stem}-{_content_digest(cubin)}.cubin"
    try:
        _write_atomically(path, cubin)
    except OSError as error:
        _warn_of_unwritable_cache(folder, error.strerror)
        return cubin
    return path


_lock = threading.Lock()
_kernels: dict[tuple[str, str, Constants, int], concurrent.futures.Future[Any]] = {}


def kernel(file: str, name: str, constants: Constants, smem_bytes: int, device_id: int) -> Any:
    """Return the kernel `name`, loaded on the device.

    Compiled at most once for each file, constants and architecture, by whichever thread comes first; different ones
    at the same time.
    """
    key = (file, name, constants, device_id)
    with _lock:
        found = _kernels.get(key)
        if found is None:
            mine = _kernels[key] = concurrent.futures.Future()
    if found is not None:
        return found.result()
    try:
        mine.set_result(_load(file, name, constants, smem_bytes, device_id))
    except BaseException as error:
        with _lock:
            _kernels.pop(key, None)
        mine.set_exception(error)
    return mine.result()


def kernels(wanted: Sequence[Wanted], device_id: int) -> list[Any]:
    """Return kernels as `kernel` does; those that are missing are compiled at the same time."""
    missing = [one for one in wanted if (*one[:3], device_id) not in _kernels]
    if len(missing) > 1:
        with concurrent.futures.ThreadPoolExecutor(len(missing)) as pool:
            list(pool.map(lambda one: kernel(one[0], one[1], one[2], one[3], device_id), missing))
    return [kernel(file, name, constants, smem_bytes, device_id) for file, name, constants, smem_bytes in wanted]


def _load(file: str, name: str, constants: Constants, smem_bytes: int, device_id: int) -> Any:
    import cupy

    cubin = cubin_path(file, constants, int(cupy.cuda.Device(device_id).compute_capability))
    with cupy.cuda.Device(device_id), _as_file(cubin) as path:
        raw_kernel = cupy.RawModule(path=str(path)).get_function(name)
        if smem_bytes > 48 * 1024:  # what a kernel may have without asking
            raw_kernel.max_dynamic_shared_size_bytes = smem_bytes
        return raw_kernel.kernel


@contextlib.contextmanager
def _as_file(cubin: Path | bytes) -> Iterator[Path]:
    """Give a path to the cubin; one that is only bytes stands in a temporary folder while it is loaded."""
    if isinstance(cubin, Path):
        yield cubin
        return
    with tempfile.TemporaryDirectory(prefix="lightning_cupy-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        yield path
