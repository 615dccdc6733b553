"""The wheel holds the package and its kernels and works on its own; the sources pass their linters."""

from __future__ import annotations

import email.message
import email.parser
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import BOUNDS, relative_rms

import lightning_cupy
from lightning_cupy import reference

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the checkout with what is installed."""
    for module in ("build", "hatchling"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    result = run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_name(wheel):
    assert wheel.name == f"lightning_cupy-{lightning_cupy.__version__}-py3-none-any.whl"


def test_contents(wheel):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lightning_cupy").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    kernels = {f"lightning_cupy/kernels_cu/{path.name}" for path in (ROOT / "kernels_cu").iterdir() if path.is_file()}
    assert "lightning_cupy/kernels_cu/forward.cu" in kernels
    assert {"lightning_cupy/__init__.py", "lightning_cupy/py.typed"} <= wanted
    info = f"lightning_cupy-{lightning_cupy.__version__}.dist-info"
    wanted |= kernels | {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == sorted(wanted)
        for path in (ROOT / "kernels_cu").iterdir():
            assert archive.read(f"lightning_cupy/kernels_cu/{path.name}") == path.read_bytes()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def requirements(metadata, extra: str | None) -> dict[str, str]:
    """Names of the distributions that an extra, or None for the core, asks for, and what it says of their versions."""
    found = {}
    for line in metadata.get_all("Requires-Dist"):
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if marker == (f"extra == '{extra}'" if extra else ""):
            name, rest = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
            found[name.replace("_", "-")] = rest
    return found


def test_metadata(metadata):
    assert metadata["Name"] == "lightning_cupy"
    assert metadata["Version"] == lightning_cupy.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Provides-Extra")) == {"cuda12x", "cuda13x", "torch", "test", "notebooks"}


def test_core_dependencies(metadata):
    assert set(requirements(metadata, None)) == {"numpy", "ml-dtypes"}


@pytest.mark.parametrize("toolkit", ["12", "13"])
def test_cuda_extras(toolkit, metadata):
    found = requirements(metadata, f"cuda{toolkit}x")
    assert found[f"cupy-cuda{toolkit}x"] == ">=14"
    assert found["cuda-toolkit"] in (f"[cudart,nvrtc]=={toolkit}.*", f"[nvrtc,cudart]=={toolkit}.*")
    assert len([name for name in found if name.startswith("cupy")]) == 1


def test_torch_is_asked_for_by_its_own_extra_alone(metadata):
    assert set(requirements(metadata, "torch")) == {"torch"}
    assert not any("torch" in requirements(metadata, extra) for extra in ("test", "notebooks", "cuda12x", "cuda13x"))


def test_the_unpacked_wheel_works(wheel, tmp_path, rng):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    q, k, v = rng.standard_normal((3, 65, 2, 16), dtype=np.float32)
    np.savez(tmp_path / "inputs.npz", q=q, k=k, v=v)
    code = f"""
import json, sys
folder = {str(tmp_path)!r}
sys.path.insert(0, folder)
import numpy, lightning_cupy
from lightning_cupy import _compile
o = lightning_cupy.lightning_attention(**numpy.load(folder + "/inputs.npz"), slopes=0.1, backend="cpu")
numpy.save(folder + "/o.npy", o)
print(json.dumps([lightning_cupy.__file__, str(_compile.kernels_dir())]))
"""
    # -I: neither the checkout nor the environment is on the path.
    result = run("-I", "-c", code)
    assert result.returncode == 0, result.stderr
    file, kernels = map(Path, json.loads(result.stdout))
    assert file == tmp_path / "lightning_cupy" / "__init__.py"
    assert kernels == tmp_path / "lightning_cupy" / "kernels_cu"
    expected, _ = reference.recurrent(q, k, v, slopes=0.1, dtype=np.float64)
    assert relative_rms(np.load(tmp_path / "o.npy"), expected) <= BOUNDS["float32"]


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_linters(command):
    tool, *options = command.split()
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    result = run("-m", tool, *options)
    assert result.returncode == 0, result.stdout + result.stderr
