"""The notebooks run anywhere, and are committed as a clean run left them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient, of the test extra, is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat, of the test extra, is not installed")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART = ROOT / "notebooks" / "1-quickstart.ipynb"

# /home/name, /root, /Users/name, C:\Users\name, /tmp
LOCAL_PATH = re.compile(r"(?<![\w.])(?:/(?:home|Users)/\w|/(?:root|tmp)\b|[A-Za-z]:\\Users\\)")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def num_images(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def stderr(notebook) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stderr")


def stdout(notebook) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def strings(node):
    """Every string in a notebook, but for the keys."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for child in node.values() if isinstance(node, dict) else node:
            yield from strings(child)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a copy of a notebook, in an empty folder with nothing of the user's but the checkout to import from."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's python3, not another's of the user
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))

    def run(path: Path, *import_paths: Path):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (*import_paths, ROOT))))
        folder = tmp_path / "notebooks"
        folder.mkdir()
        notebook = nbformat.read(shutil.copy(path, folder), as_version=4)
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        return client.execute()  # raises CellExecutionError, with the cell and its traceback

    return run


def test_all_notebooks_are_found():
    names = ["1-quickstart.ipynb", "2-inside-a-chunk.ipynb", "3-training-in-torch.ipynb"]
    assert [path.name for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, execute):
    if "torch" in path.stem:
        pytest.importorskip("torch", reason="torch is not installed")
    notebook = execute(path)
    assert num_images(notebook) >= 1
    assert "Warning" not in stderr(notebook)


def test_quickstart_runs_with_numpy_only(execute, tmp_path):
    hidden = tmp_path / "hidden"
    for name in ("cupy", "torch"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name} here', name='{name}')\n")
    notebook = execute(QUICKSTART, hidden)
    assert num_images(notebook) >= 1
    assert "numpy.ndarray" in stdout(notebook)
    assert "torch.Tensor" not in stdout(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_rendered(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run once, top to bottom"
    assert num_images(notebook) >= 1
    assert not stderr(notebook)
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_has_no_trace_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 700_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}, "a Python version, say"
    assert not any(cell.metadata for cell in notebook.cells), "times of execution, say"
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)
    text = "\n".join(strings(notebook))
    assert not LOCAL_PATH.search(text), LOCAL_PATH.search(text)
    assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/home/ada/x.py", True),
        (r"C:\Users\ada", True),
        ("File '/root/x.py'", True),
        ("(/Users/ada)", True),
        ("in\n/tmp/ipykernel_17/1.py", True),
        ("https://example.org/home/page", False),
        ("tokens/roots", False),
    ],
)
def test_local_paths_are_recognised(text, found):
    assert bool(LOCAL_PATH.search(text)) is found
