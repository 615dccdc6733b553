"""The command line: what it computes, prints, refuses, and leaves on disk.

More than 500 lines, as each command is tried with what a person may get wrong about it.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import BOUNDS, STATE_BOUNDS, relative_rms

import lightning_cupy
from lightning_cupy import __main__ as cli
from lightning_cupy import _compile, _environment, demo, reference

SHAPES = [(300, 16), (300, 3, 16), (2, 300, 3, 16)]


@pytest.fixture
def save(tmp_path, rng, monkeypatch):
    """Write q, k, v of a shape into the current folder, which is a fresh one, and return them."""
    monkeypatch.chdir(tmp_path)

    def save(shape=(300, 3, 16), dtype=np.float32, v_dim=8):
        arrays = [rng.standard_normal((*shape[:-1], dim)).astype(dtype) for dim in (shape[-1], shape[-1], v_dim)]
        for name, array in zip("qkv", arrays, strict=True):
            np.save(f"{name}.npy", array)
        return arrays

    return save


def run(*options: str) -> int:
    return cli.main(["run", "q.npy", "k.npy", "v.npy", "-o", "o.npy", *map(str, options)])


def contents(folder: str | Path = ".") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the package under test, from wherever it is."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment(**variables), capture_output=True, text=True, timeout=120
    )


def environment(**variables: str) -> dict[str, str]:
    package = str(Path(lightning_cupy.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]), **variables}


# run: what it computes


@pytest.mark.parametrize("tokens_per_block", [None, 1, 77, 128, 1000])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_run_carries_the_state(save, shape, causal, tokens_per_block):
    q, k, v = save(shape)
    options = ["--slopes", "0.05"] if causal else ["--non-causal"]
    options += ["--tokens-per-block", tokens_per_block] if tokens_per_block else []
    assert run("--save-state", "s.npy", *options) == 0
    expected, expected_state = reference.recurrent(
        q, k, v, slopes=0.05 if causal else None, causal=causal, dtype=np.float64
    )
    o, state = np.load("o.npy"), np.load("s.npy")
    assert o.dtype == state.dtype == np.float32
    assert relative_rms(o, expected) < BOUNDS["float32"]
    assert relative_rms(state, expected_state) < STATE_BOUNDS["float32"]


@pytest.mark.parametrize("causal", [True, False])
def test_run_starts_from_a_state_and_may_save_over_it(save, rng, causal):
    q, k, v = save()
    state = rng.standard_normal((3, 16, 8)).astype(np.float32)
    np.save("s.npy", state)
    options = ["--slopes", "0.05"] if causal else ["--non-causal"]
    assert run("--initial-state", "s.npy", "--save-state", "s.npy", "--tokens-per-block", 70, *options) == 0
    expected, expected_state = reference.recurrent(
        q, k, v, slopes=0.05 if causal else None, causal=causal, initial_state=state, dtype=np.float64
    )
    assert relative_rms(np.load("o.npy"), expected) < BOUNDS["float32"]
    assert relative_rms(np.load("s.npy"), expected_state) < STATE_BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_run_dtypes(save, dtype):
    q, k, v = save(dtype=dtype)
    assert run("--slopes", "0.1", "--save-state", "s.npy", "--tokens-per-block", 50) == 0
    expected, expected_state = reference.recurrent(q, k, v, slopes=0.1, dtype=np.float64)
    o, state = np.load("o.npy"), np.load("s.npy")
    assert o.dtype == dtype
    assert state.dtype == ("float64" if dtype == "float64" else "float32")
    assert relative_rms(o, expected) < BOUNDS[dtype]
    assert relative_rms(state, expected_state) < STATE_BOUNDS[dtype]


@pytest.mark.parametrize("stored_as", ["V2", "uint16"])
def test_run_bfloat16_files(save, stored_as):
    arrays = save(dtype=ml_dtypes.bfloat16)
    for name, array in zip("qkv", arrays, strict=True):
        np.save(f"{name}.npy", array.view(stored_as))
    assert run("--dtype", "bfloat16", "--slopes", "0.1", "--tokens-per-block", 64) == 0
    expected, _ = reference.recurrent(*arrays, slopes=0.1, dtype=np.float64)
    o = np.load("o.npy")
    assert o.dtype == "V2"
    assert relative_rms(o.view(ml_dtypes.bfloat16), expected) < BOUNDS["bfloat16"]


def test_run_reads_fortran_order(save):
    arrays = save()
    for name, array in zip("qkv", arrays, strict=True):
        np.save(f"{name}.npy", np.asfortranarray(array))
    assert run("--tokens-per-block", 90) == 0
    assert relative_rms(np.load("o.npy"), reference.recurrent(*arrays, dtype=np.float64)[0]) < BOUNDS["float32"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 3, 16), (0, 300, 3, 16)])
def test_run_of_nothing(save, shape, causal):
    save(shape)
    assert run("--save-state", "s.npy", *([] if causal else ["--non-causal"])) == 0
    assert np.load("o.npy").shape == (*shape[:-1], 8)
    assert not np.load("s.npy").any()
    assert np.load("s.npy").shape == {2: (16, 8), 4: (shape[0], 3, 16, 8)}[len(shape)]


@pytest.mark.parametrize(
    ("option", "slopes"),
    [
        ("0.25", 0.25),
        ("0.5,0.1,0", [0.5, 0.1, 0]),
        ("-0.01,0.1,3.9e-8", [-0.01, 0.1, 3.9e-8]),
        ("slopes.npy", [0.3, 0.2, 0.1]),
        ("lightning2", [2**-4, 2**-8, 2**-2]),
    ],
)
def test_run_slopes(save, option, slopes):
    q, k, v = save()
    np.save("slopes.npy", [0.3, 0.2, 0.1])
    assert run(f"--slopes={option}", "--scale", "0.5") == 0
    expected, _ = reference.recurrent(q, k, v, slopes=slopes, scale=0.5, dtype=np.float64)
    assert relative_rms(np.load("o.npy"), expected) < BOUNDS["float32"]


def test_run_slopes_of_a_layer(save):
    q, k, v = save()
    assert run("--slopes", "minimax", "--layer", 3, "--num-layers", 10) == 0
    slopes = lightning_cupy.slopes(3, "minimax", layer=3, num_layers=10)
    expected, _ = reference.recurrent(q, k, v, slopes=slopes, dtype=np.float64)
    assert relative_rms(np.load("o.npy"), expected) < BOUNDS["float32"]


@pytest.mark.parametrize(
    ("seqlen", "bytes_per_token", "num_blocks"), [(10**6, 2**13, 123), (10**4, 2**30, 10), (100, 4, 1), (0, 4, 1)]
)
def test_default_blocks_are_bounded_and_cover_the_sequence(seqlen, bytes_per_token, num_blocks):
    array = np.broadcast_to(np.zeros(1, np.uint8), (seqlen, bytes_per_token))
    blocks = cli._blocks(seqlen, cli._default_block(seqlen, array))
    assert len(blocks) == num_blocks
    assert blocks[0].start == 0
    assert blocks[-1].stop == seqlen
    assert all(left.stop == right.start for left, right in itertools.pairwise(blocks))


# run: what it leaves on disk


@pytest.fixture
def fail_in_the_middle(monkeypatch):
    """Let the library fail at the third block."""

    def arrange(error):
        calls = []

        def attention(*args, **options):
            calls.append(args)
            if len(calls) == 4:  # the first is the look at the arguments
                raise error
            return lightning_cupy.lightning_attention(*args, **options)

        monkeypatch.setattr(cli, "lightning_attention", attention)
        return calls

    return arrange


@pytest.mark.parametrize("old", [b"what was there", None])
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("the device fell off"), 2, "error: the device fell off\n"),
        (MemoryError("no room for 3 GB"), 2, "error: no room for 3 GB\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_run_that_fails_leaves_everything_as_it_was(save, fail_in_the_middle, capsys, error, code, words, old):
    save()
    if old:
        Path("o.npy").write_bytes(old)
        Path("s.npy").write_bytes(old)
    before = contents()
    calls = fail_in_the_middle(error)
    assert run("--save-state", "s.npy", "--tokens-per-block", 100) == code
    assert len(calls) == 4
    assert capsys.readouterr().err.endswith(words)
    assert contents() == before


def test_run_writes_beside_the_output(save, fail_in_the_middle, monkeypatch, tmp_path):
    save()
    seen = []
    attention = cli.lightning_attention
    monkeypatch.setattr(cli, "lightning_attention", lambda *a, **o: seen.append(set(contents())) or attention(*a, **o))
    assert run("--tokens-per-block", 100) == 0
    assert seen[0] == {"q.npy", "k.npy", "v.npy"}  # nothing is written before the arguments are looked at
    assert all("o.npy" not in names and len(names) == 4 for names in seen[1:])
    assert set(contents()) == {"q.npy", "k.npy", "v.npy", "o.npy"}


def test_run_on_a_full_disk(save, monkeypatch, capsys):
    save()
    before = contents()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert run() == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert contents() == before


def test_run_where_room_cannot_be_reserved(save, monkeypatch):
    save()

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    assert run() == 0
    assert np.isfinite(np.load("o.npy")).all()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")
def test_run_output_has_the_usual_permissions_and_follows_links(save):
    save()
    Path("folder").mkdir()
    Path("o.npy").symlink_to("folder/real.npy")
    umask = os.umask(0o027)
    try:
        assert run() == 0
    finally:
        os.umask(umask)
    assert Path("o.npy").is_symlink()
    assert Path("folder/real.npy").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_run_that_is_stopped_cleans_up(save, signal_number):
    save((20_000, 3, 16))  # at a token a block, this would take many seconds
    before = contents()
    files = ["q.npy", "k.npy", "v.npy", "-o", "o.npy"]
    command = [sys.executable, "-m", "lightning_cupy", "run", *files, "--tokens-per-block", "1", "--backend", "cpu"]
    # A shell's jobs in the background, so perhaps these tests, ignore SIGINT, and so would what they start.
    ours = signal.signal(signal_number, signal.SIG_DFL)
    try:
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal_number, ours)
    try:
        deadline = time.monotonic() + 60
        while not list(Path().glob(".o.npy.*.part")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(Path().glob(".o.npy.*.part"))
        process.send_signal(signal_number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert contents() == before


# run: what it shows


def test_run_progress_by_tqdm(save, capsys):
    pytest.importorskip("tqdm")
    save()
    assert run("--tokens-per-block", 100) == 0
    captured = capsys.readouterr()
    assert "100%" in captured.err
    assert captured.out.startswith("o.npy: float32 (300, 3, 8), 300 tokens in ")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(("options", "total"), [([], 300), (["--non-causal"], 600)])
def test_run_progress_without_tqdm(save, capsys, monkeypatch, options, total, terminal):
    save()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert run("--tokens-per-block", 200, *options) == 0
    steps = [f"{count} of {total} tokens" for count in (200, 300, 500, 600) if count <= total]
    assert capsys.readouterr().err == "".join(f"\r{step}" for step in (*steps[: 9 * terminal], steps[-1])) + "\n"


def test_run_names_the_shapes_of_the_files(save, capsys):
    save()
    np.save("k.npy", np.zeros((300, 3, 5), np.float32))
    assert run() == 2
    assert "error: k has shape (300, 3, 5), but q has (300, 3, " in capsys.readouterr().err


# run: what it refuses


def replace(name: str, array: np.ndarray) -> None:
    np.save(f"{name}.npy", array)


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (lambda: Path("k.npy").unlink(), [], ["No such file", "k.npy"]),
        (lambda: Path("k.npy").write_text("no array"), [], ["k must be a .npy file", "k.npy"]),
        (lambda: Path("k.npy").write_bytes(Path("k.npy").read_bytes()[:-9]), [], ["k must be a .npy file", "damaged"]),
        (lambda: replace("k", np.zeros((299, 3, 16), "f")), [], ["k has shape (299, 3, 16), but q has (300, 3, 16)"]),
        (lambda: replace("v", np.zeros((1, 3, 8), "f")), [], ["v has shape (1, 3, 8)"]),
        (lambda: replace("v", np.zeros((300, 8), "f")), [], ["v has shape (300, 8)"]),
        (lambda: replace("k", np.zeros((300, 3, 16))), [], ["k must be float32", "float64"]),
        (lambda: [replace(name, np.float32(1)) for name in "qkv"], [], ["q must have shape"]),
        (lambda: [replace(name, np.zeros((9, 300), "f")) for name in "qkv"], [], ["q", "head_dim", "256", "300"]),
        (lambda: [replace(name, np.zeros((9, 30), int)) for name in "qkv"], [], ["q must be one of", "int64"]),
        (lambda: [replace(name, np.zeros((9, 30), "V2")) for name in "qkv"], [], ["q.npy", "--dtype bfloat16"]),
        (lambda: None, ["--dtype", "bfloat16"], ["q must hold bfloat16", "float32"]),
        (
            lambda: replace("s", np.zeros((3, 8, 16), "f")),
            ["--initial-state", "s.npy"],
            ["initial_state", "(3, 16, 8)"],
        ),
        (lambda: replace("s", np.zeros((3, 16, 8))), ["--initial-state", "s.npy"], ["initial_state", "float64"]),
        (lambda: None, ["--initial-state", "none.npy"], ["No such file", "none.npy"]),
        (lambda: None, ["--slopes", "1,2"], ["slopes", "(3,)", "(2,)"]),
        (lambda: None, ["--slopes", "1,nan,2"], ["slopes must be finite"]),
        (lambda: None, ["--slopes", "lightening"], ["preset", "lightening"]),
        (lambda: None, ["--slopes", "1", "--layer", "2"], ["--layer", "preset"]),
        (lambda: None, ["--slopes", "none.npy"], ["No such file", "none.npy"]),
        (lambda: None, ["--slopes", "1", "--non-causal"], ["slopes must be None"]),
        (lambda: None, ["--scale", "inf"], ["scale must be finite"]),
        (lambda: None, ["-o", "q.npy"], ["--out must be a file of its own", "q.npy"]),
        (lambda: None, ["-o", "folder/../v.npy"], ["--out must be a file of its own", "v.npy"]),
        (lambda: None, ["--save-state", "o.npy"], ["--save-state must be a file of its own", "o.npy"]),
        (lambda: None, ["--save-state", "k.npy"], ["--save-state must be a file of its own", "k.npy"]),
        (lambda: None, ["--slopes", "x.npy", "-o", "x.npy"], ["--out must be a file of its own", "x.npy"]),
        (lambda: None, ["-o", "folder"], ["--out must be an ordinary file", "folder"]),
        (lambda: None, ["-o", "nowhere/o.npy"], ["--out must be in a folder that exists", "nowhere"]),
    ],
)
def test_run_refuses(save, capsys, prepare, options, words):
    save()
    Path("folder").mkdir()
    np.save("x.npy", np.zeros(3))
    prepare()
    before = contents()
    assert run(*options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert contents() == before
    assert not contents("folder")


@pytest.mark.parametrize("command", [["run", "q.npy", "k.npy", "v.npy", "-o", "o.npy"], ["demo"]])
def test_cuda_asked_for_where_there_is_none(save, monkeypatch, capsys, command):
    save()
    monkeypatch.setattr(_environment, "cuda_problem", lambda: "a CUDA device wanted, got none")
    assert cli.main([*command, "--backend", "cuda"]) == 2
    assert capsys.readouterr().err == "error: backend='cuda': a CUDA device wanted, got none\n"
    assert not Path("o.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["run", "q.npy"], "k.npy"),
        (["run", "q.npy", "k.npy", "v.npy"], "--out"),
        (["demo", "--heads", "0"], "a whole number from 1 is wanted, but got '0'"),
        (["demo", "--tokens", "many"], "a whole number from 1 is wanted, but got 'many'"),
        (["demo", "--dtype", "int8"], "int8"),
    ],
)
def test_usage(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"lightning_cupy {lightning_cupy.__version__}\n"


# demo


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("Das Wasser rauscht', das Wasser schwoll, ein Fischer saß daran. ".encode() * 60)
    return path


@pytest.mark.parametrize("dtype", BOUNDS)
def test_demo(text, capsys, dtype):
    options = ["--heads", "3", "--head-dim", "17", "--dtype", dtype, "--tokens", "2500", "--backend", "cpu"]
    assert cli.main(["demo", str(text), *options]) == 0
    out = capsys.readouterr().out
    for words in (
        f"{text}, the first 2,500 of {text.stat().st_size:,} bytes",
        f"3 heads of 17 in {dtype}",
        f"{dtype}: passed",
        "tokens/s",
    ):
        assert words in out
    rows = [line.split() for line in out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["2,048", "2,500"]
    assert "measured" in rows[0]
    assert "extrapolated" in rows[1]


def test_demo_has_a_text_of_its_own_and_fails_on_a_wrong_result(capsys, monkeypatch):
    attention = demo.lightning_attention
    options = ["demo", "--heads", "2", "--head-dim", "8", "--tokens", "600", "--dtype", "float32", "--backend", "cpu"]
    assert cli.main(options) == 0
    assert "passed" in capsys.readouterr().out
    monkeypatch.setattr(demo, "lightning_attention", lambda *args, **options: attention(*args, **options) * 1.00001)
    assert cli.main(options) == 1
    assert "FAILED" in capsys.readouterr().out


def test_demo_where_python_has_no_sources(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda _: str(tmp_path))
    assert cli.main(["demo", "--heads", "1", "--head-dim", "8", "--tokens", "300", "--backend", "cpu"]) == 0
    assert str(_compile.kernels_dir()) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nothing", [], ["is empty"]),
        ("absent", [], ["No such file"]),
        ("text", ["--head-dim", "257"], ["head_dim", "257"]),
    ],
)
def test_demo_refuses(text, capsys, name, options, words):
    (text.parent / "nothing").touch()
    assert cli.main(["demo", str(text.parent / name), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert all(word in err for word in words)


def test_demo_bounds_are_those_of_the_tests():
    assert demo.BOUNDS == BOUNDS


def test_error_of_rows():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 200, 3, 16))
    slopes = [0.0, 0.1, 3.0]
    o, _ = reference.quadratic(q, k, v, slopes=slopes, dtype=np.float64)
    assert demo.error_of_rows(o, q, k, v, slopes)[0] < 1e-12
    assert demo.error_of_rows(1.01 * o, q, k, v, slopes)[0] == pytest.approx(0.01)
    assert demo.error_of_rows(o[:, ::-1], q, k, v, slopes)[0] > 0.1
    assert not demo.error_of_rows(np.nan * o, q, k, v, slopes)[0] <= 1


def test_embed_is_the_same_every_time_and_keeps_distances():
    text = np.frombuffer(b"abcabc" * 50, np.uint8)
    q, k, v = demo.embed(text, 2, 15, "float64")
    for again, array in zip(demo.embed(text[:100], 2, 15, "float64"), (q, k, v), strict=True):
        np.testing.assert_array_equal(again, array[:100])
    np.testing.assert_array_equal(v[0], v[3])  # one byte value, one vector
    # Rotary: q_t k_j depends on the bytes and on t - j only.
    scores = np.einsum("thd,jhd->htj", q, k)
    np.testing.assert_allclose(scores[:, 10, 4], scores[:, 253, 247], rtol=1e-4)
    assert np.abs(scores[:, 10, 4] - scores[:, 10, 7]).min() > 1e-3


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_234_567, "1.2 MB"), (131_072, "131 kB"), (5e15, "5000 TB")],
)
def test_in_bytes(num_bytes, words):
    assert demo.in_bytes(num_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1.23e-5, "12.3 us"), (0.0123, "12.3 ms"), (1, "1 s"), (90, "90 s"), (400, "6.67 min"), (1e5, "27.8 hours")],
)
def test_in_time(seconds, words):
    assert demo.in_time(seconds) == words


def test_demo_as_a_process():
    finished = python("-m", "lightning_cupy", "demo", "--tokens", "500", "--heads", "2", "--backend", "cpu")
    assert finished.returncode == 0, finished.stderr
    assert "passed" in finished.stdout
    assert finished.stderr == ""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
def test_demo_on_a_gpu(text, capsys, dtype):
    assert cli.main(["demo", str(text), "--dtype", dtype, "--backend", "cuda"]) == 0
    out = capsys.readouterr().out
    for words in ("kernels_cu/forward", " blocks of ", "by events", "passed"):
        assert words in out


# info and cache


def test_info_without_cupy_says_what_mends_it():
    program = (
        "import sys; sys.modules['cupy'] = None; from lightning_cupy.__main__ import main; code = main(['info'])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    finished = python("-c", program, LIGHTNING_CUPY_CACHE_DIR="/nowhere/kernels")
    assert finished.returncode == 0, finished.stderr
    lines = {line[:18].strip(): line[18:] for line in finished.stdout.splitlines()}
    assert lines["lightning_cupy"] == lightning_cupy.__version__
    assert lines["NumPy"] == np.__version__
    assert lines["NVRTC"] == "not found"
    assert lines["cache"] == "/nowhere/kernels: 0 compiled kernels, 0 bytes"
    assert "CuPy wanted" in lines["missing for GPUs"]
    assert _environment.extra() in lines["missing for GPUs"]
    assert finished.stdout.count("missing for GPUs") == 1


@pytest.mark.parametrize("problems", [(None, None), ("no device", None), ("no device", "no NVRTC")])
def test_info_lists_every_problem_once(capsys, monkeypatch, problems):
    pytest.importorskip("cupy")
    cuda_problem, nvrtc_problem = problems
    monkeypatch.setattr(_environment, "cuda_problem", lambda: cuda_problem)
    monkeypatch.setattr(_environment, "nvrtc_problem", lambda: nvrtc_problem)
    assert cli.main(["info"]) == 0
    missing = [line[18:] for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert missing == ([problem for problem in problems if problem] or ["nothing"])


def test_info_names_the_gpu_or_its_absence(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert ("GPU 0 " in out and "(sm_" in out) if _environment.gpu_is_present() else "GPU               none" in out


def test_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_CUPY_CACHE_DIR", str(tmp_path))
    (tmp_path / "lightning-a-b.cubin").write_bytes(bytes(1500))
    (tmp_path / "lightning-c-d.cubin").write_bytes(bytes(500))
    (tmp_path / "somebody's.txt").touch()
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 2 compiled kernels, 2.0 kB\n"
    assert cli.main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 2 compiled kernels deleted, 2.0 kB\n"
    assert set(contents(tmp_path)) == {"somebody's.txt"}
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 0 compiled kernels, 0 bytes\n"
