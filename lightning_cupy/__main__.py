"""The command line: python -m lightning_cupy demo | run | bench | info | cache."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import os
import platform
import secrets
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from . import __version__, _compile, _environment, bench, conventions
from ._progress import progress
from .api import lightning_attention
from .demo import BOUNDS, demo, in_bytes

Array = np.ndarray[Any, Any]

_FAILED, _REFUSED, _INTERRUPTED = 1, 2, 130
_BLOCK_BYTES = 64 * 2**20  # of q, k, v and o: small in memory, large beside the cost of a call


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Returns
    -------
    int
        0; 1 when an error that the demo or the bench finds is above its bound; 130 when interrupted; 2 with one
        line on stderr for what the user can mend, as argparse does.
    """
    arguments = _parser().parse_args(argv)
    arguments.words = sys.argv[1:] if argv is None else argv
    try:
        return int(arguments.command(arguments))
    except (TypeError, ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m lightning_cupy",
        description="Lightning Attention on GPUs and CPUs.",
        epilog="Start with: python -m lightning_cupy demo",
    )
    parser.add_argument("--version", action="version", version=f"lightning_cupy {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
        added.set_defaults(command=command)
        return added

    sub = add("demo", _demo, "run the attention on real text, check it and time it beside its O(n^2) form")
    sub.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the text (default: Python's own library)")
    sub.add_argument("--heads", type=_count, default=8, metavar="H", help="number of heads (default: 8)")
    sub.add_argument("--head-dim", type=_count, default=64, metavar="D", help="1 to 256 (default: 64)")
    sub.add_argument("--dtype", choices=BOUNDS, help="default: bfloat16 on a GPU, float32 on the CPU")
    sub.add_argument("--tokens", type=_count, metavar="N", help="bytes of text to take at most (default: 65536)")
    _add_backend(sub)

    sub = add("run", _run, "run the attention over arrays on disk, block by block along the sequence")
    shapes = "[seqlen, head_dim], [seqlen, heads, head_dim] or [batch, seqlen, heads, head_dim]"
    sub.add_argument("q", type=Path, metavar="q.npy", help=f"queries, {shapes}")
    sub.add_argument("k", type=Path, metavar="k.npy", help="keys, as q")
    sub.add_argument("v", type=Path, metavar="v.npy", help="values, as q, but with a head_dim of their own")
    sub.add_argument(
        "-o", "--out", type=Path, required=True, metavar="o.npy", help="the result; appears when complete, or not"
    )
    sub.add_argument(
        "--slopes",
        metavar="S",
        help="decay rates: numbers joined by commas (--slopes=-0.1,0.2 if the first is negative), "
        "a .npy file, or a preset of lightning_cupy.slopes (default: no decay)",
    )
    sub.add_argument("--layer", type=int, metavar="L", help="for presets that depend on the layer, from 0")
    sub.add_argument("--num-layers", type=_count, metavar="N", help="for presets that depend on the layer")
    sub.add_argument("--scale", type=float, metavar="X", help="factor of q k^T (default: 1 / sqrt(head_dim))")
    sub.add_argument("--non-causal", action="store_true", help="every token attends to all")
    sub.add_argument("--initial-state", type=Path, metavar="s.npy", help="state before the first token")
    sub.add_argument("--save-state", type=Path, metavar="s.npy", help="where to write the state behind the last token")
    sub.add_argument("--dtype", choices=["bfloat16"], help="of files that NumPy shows as |V2 or uint16")
    sub.add_argument("--tokens-per-block", type=_count, metavar="N", help="default: about 64 MiB of arrays a block")
    _add_backend(sub)

    sub = add("bench", _bench, "time an op on the GPU beside the floor that memory sets and beside other packages")
    ops = ["forward", "backward", "train"]
    sub.add_argument("op", nargs="?", choices=ops, default="forward", help="default: forward")
    sub.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="B,H,N,D",
        help="batch,heads,tokens,head_dim, and v's head_dim as a fifth where it differs (default: a table of them)",
    )
    sub.add_argument("--dtype", nargs="+", choices=BOUNDS, default=["bfloat16"], help="default: bfloat16")
    sub.add_argument(
        "--against",
        type=lambda text: [] if text == "none" else text.split(","),
        metavar="P",
        help=f"other packages, joined by commas, or none (default: {','.join(bench.PEERS)})",
    )
    sub.add_argument(
        "--slopes", default="lightning2", metavar="S", help="a number for all heads, or a preset (default: lightning2)"
    )
    sub.add_argument(
        "--heads-first", action="store_true", help="arrays are transposed views of [batch, heads, tokens, head_dim]"
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    sub.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them there, which takes matplotlib")
    sub.add_argument("--quick", action="store_true", help="a few shapes, and only what is timed at once")
    add("info", _info, "print versions, devices, the cache, and what is missing with the command that mends it")
    sub = add("cache", _cache, "print the folder and size of the compiled kernels, or clear them")
    sub.add_argument("action", nargs="?", choices=["clear"], help="delete them; they are compiled again when needed")
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=["auto", "cuda", "cpu"], default="auto", help="default: the GPU where there is one"
    )


def _count(text: str) -> int:
    try:
        if int(text) >= 1:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a whole number from 1 is wanted, but got {text!r}")


def _shape(text: str) -> bench.Shape:
    try:
        return bench.Shape.of(*map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"batch,heads,tokens,head_dim[,v_dim], whole numbers from 1, are wanted, but got {text!r}"
        ) from None


def _demo(arguments: argparse.Namespace) -> int:
    passed = demo(
        arguments.file,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        dtype=arguments.dtype,
        backend=arguments.backend,
        num_tokens=arguments.tokens,
    )
    return 0 if passed else _FAILED


def _run(arguments: argparse.Namespace) -> int:
    q, k, v = (_open(name, getattr(arguments, name), arguments.dtype) for name in "qkv")
    # Copied: it may be saved over the file that it came from, and Windows replaces none that is mapped.
    state = np.array(_open("initial_state", arguments.initial_state)) if arguments.initial_state else None
    options = {
        "slopes": _slopes(arguments, num_heads=q.shape[-2] if q.ndim > 2 else 1),
        "scale": arguments.scale,
        "causal": not arguments.non_causal,
        "backend": arguments.backend,
    }
    # The library refuses what is wrong before it computes; what fits is shown to it without any token.
    fits = q.ndim in (2, 3, 4) and q.shape == k.shape and q.shape[:-1] == v.shape[:-1]
    shown = (_tokens(array, slice(0, 0)) for array in (q, k, v)) if fits else (q, k, v)
    lightning_attention(*shown, initial_state=state, **options)

    inputs = [arguments.q, arguments.k, arguments.v]
    inputs += [Path(arguments.slopes)] if str(arguments.slopes).endswith(".npy") else []
    targets = [_target("--out", arguments.out, [*inputs, arguments.initial_state])]
    if arguments.save_state:
        targets.append(_target("--save-state", arguments.save_state, [*inputs, targets[0]]))

    seqlen = q.shape[-3] if q.ndim > 2 else q.shape[0]
    blocks = _blocks(seqlen, arguments.tokens_per_block or _default_block(seqlen, q, k, v, v))
    num_steps = seqlen if options["causal"] else 2 * seqlen
    start = time.perf_counter()
    with _complete_or_absent(targets) as paths, progress(num_steps, "tokens") as bar:
        o = _create(paths[0], v.shape, q.dtype)
        state = _attend(q, k, v, o.view(q.dtype), state, blocks, options, bar)
        o.flush()
        for path in paths[1:]:
            with path.open("xb") as stream:
                np.save(stream, state)
    seconds = time.perf_counter() - start
    print(f"{arguments.out}: {q.dtype.name} {v.shape}, {seqlen:,} tokens in {seconds:.3g} s")
    return 0


def _open(name: str, path: Path, dtype: str | None = None) -> Array:
    """Map a .npy file into memory, to read; as bfloat16, which NumPy itself only knows as two bytes, if asked."""
    try:
        array = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except ValueError as error:
        raise ValueError(f"{name} must be a .npy file, but {path} is not one or is damaged: {error}") from error
    if dtype is None and array.dtype == "V2":
        raise TypeError(
            f"{name} must be of numbers, but {path} holds {array.dtype}: if it is bfloat16, add --dtype bfloat16"
        )
    if dtype is not None and array.dtype not in ("V2", "uint16"):
        raise TypeError(f"{name} must hold bfloat16 to go with --dtype bfloat16, but {path} holds {array.dtype}")
    return array if dtype is None else array.view(ml_dtypes.bfloat16)


def _slopes(arguments: argparse.Namespace, num_heads: int) -> Any:
    text, of_layer = arguments.slopes, {"layer": arguments.layer, "num_layers": arguments.num_layers}
    if text is not None and not text.endswith(".npy"):
        try:
            numbers = [float(number) for number in text.split(",")]
        except ValueError:
            return conventions.slopes(num_heads, text, **of_layer)
    if any(value is not None for value in of_layer.values()):
        raise ValueError(f"--layer and --num-layers go with a preset of --slopes, but got {text}")
    if text is None:
        return None
    if text.endswith(".npy"):
        return _open("slopes", Path(text))
    return numbers if len(numbers) > 1 else numbers[0]


def _default_block(seqlen: int, *arrays: Array) -> int:
    """Tokens whose arrays take about `_BLOCK_BYTES`, in whole chunks of any kernel: one call would cut so too."""
    num_bytes = max(sum(array.nbytes for array in arrays), 1)
    return max(_BLOCK_BYTES * seqlen // num_bytes // 1024, 1) * 1024


def _blocks(seqlen: int, size: int) -> list[slice]:
    """Cut the sequence; an empty one is one empty block, since it has a state too."""
    return [slice(start, min(start + size, seqlen)) for start in range(0, max(seqlen, 1), size)]


def _tokens(array: Array, block: slice) -> Array:
    return array[:, block] if array.ndim == 4 else array[block]


def _target(name: str, path: Path, others: Sequence[Path | None]) -> Path:
    """Return where a file is to appear, links followed, or refuse."""
    target = Path(os.path.realpath(path))
    if target in [Path(os.path.realpath(other)) for other in others if other]:
        raise ValueError(f"{name} must be a file of its own, but {path} is given twice")
    if target.exists() and not target.is_file():
        raise ValueError(f"{name} must be an ordinary file, but {path} is not")
    if not target.parent.is_dir():
        raise ValueError(f"{name} must be in a folder that exists, but {target.parent} does not")
    return target


@contextlib.contextmanager
def _complete_or_absent(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Give names beside the targets to write to; the files move to the targets at the end, or vanish on any error."""
    temporaries = [target.with_name(f".{target.name}.{secrets.token_hex(4)}.part") for target in targets]
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
    """Map a new .npy file into memory, to write; bfloat16 is two bytes to NumPy."""
    as_stored = np.dtype("V2") if dtype == ml_dtypes.bfloat16 else dtype
    array: np.memmap[Any, Any] = np.lib.format.open_memmap(path, "w+", as_stored, shape)
    if hasattr(os, "posix_fallocate"):
        # A mapped page that finds the disk full kills the process; so take the room now, or say that there is none.
        with path.open("rb+") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
    return array


def _attend(
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    state: Array | None,
    blocks: Sequence[slice],
    options: dict[str, Any],
    bar: Any,
) -> Array:
    """Write `o` block by block, the state carried, and return the state behind the last token."""
    if not options["causal"]:
        # The state of all tokens first, by queries that are nothing; then the outputs, by keys that are nothing.
        for block in blocks:
            nothing = np.broadcast_to(np.zeros(1, q.dtype), _tokens(q, block).shape)
            k_block, v_block = _tokens(k, block), _tokens(v, block)
            _, state = lightning_attention(nothing, k_block, v_block, initial_state=state, return_state=True, **options)
            bar.update(block.stop - block.start)
        k, v = (np.broadcast_to(np.zeros(1, q.dtype), array.shape) for array in (k, v))
    for block in blocks:
        q_block, k_block, v_block, out = (_tokens(array, block) for array in (q, k, v, o))
        _, state = lightning_attention(
            q_block, k_block, v_block, out, initial_state=state, return_state=True, **options
        )
        bar.update(block.stop - block.start)
    assert state is not None
    return state


def _without_folder(word: str) -> str:
    """Return a word of a command with no folder of this machine in it: of a path only the name is left."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{equals}{Path(value).name}"


def _bench(arguments: argparse.Namespace) -> int:
    targets = []
    if arguments.json:
        targets.append(_target("--json", arguments.json, []))
    if arguments.plot:
        if arguments.plot.suffix != ".png":
            raise ValueError(f"--plot must end in .png, but got {arguments.plot}")
        targets.append(_target("--plot", arguments.plot, targets))
        bench.pyplot()  # missing now, not after the measurement
    slopes: str | float = arguments.slopes
    with contextlib.suppress(ValueError):
        slopes = float(arguments.slopes)
    options = {}
    if arguments.heads_first:
        if arguments.op != "forward":
            raise ValueError(f"--heads-first is for the forward, but got {arguments.op}")
        options["heads_first"] = True
    result = getattr(bench, arguments.op)(
        arguments.shapes,
        dtypes=arguments.dtype,
        against=arguments.against,
        slopes=slopes,
        quick=arguments.quick,
        **options,
        command=f"python -m lightning_cupy {shlex.join(map(_without_folder, arguments.words))}",
    )
    print(result)
    with _complete_or_absent(targets) as paths:
        if arguments.json:
            result.save(paths[0])
        if arguments.plot:
            result.plot().figure.savefig(paths[-1], format="png", dpi=150)
    return 0 if result.passed else _FAILED


def _info(_: argparse.Namespace) -> int:
    nvrtc_problem = _environment.nvrtc_problem()
    cupys = [f"{importlib.metadata.version(wheel)} ({wheel})" for wheel in _environment.cupy_wheels()]
    lines = [
        ("lightning_cupy", __version__),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("NumPy", np.__version__),
        ("CuPy", ", ".join(cupys) or "not installed"),
        ("torch", _torch_version()),
        ("NVRTC", "not found" if nvrtc_problem else _nvrtc_version()),
        *_devices(),
        ("kernels", str(_compile.kernels_dir())),
        ("cache", _cache_in_words()),
    ]
    problems = [_environment.cuda_problem()]
    if sys.modules.get("cupy") and nvrtc_problem not in problems:
        problems.append(nvrtc_problem)
    lines += [("missing for GPUs", problem) for problem in problems if problem] or [("missing", "nothing")]
    for label, words in lines:
        print(f"{label:<18}{words}")
    return 0


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (optional)"


def _nvrtc_version() -> str:
    from cupy.cuda import nvrtc

    return ".".join(str(part) for part in nvrtc.getVersion())


def _devices() -> list[tuple[str, str]]:
    """Label and description of each GPU; why there is none to describe, otherwise."""
    if not _environment.gpu_is_present():
        return [("GPU", "none that a driver sees: the attention runs on the CPU")]
    try:
        from cupy.cuda import runtime

        all_properties = [runtime.getDeviceProperties(device_id) for device_id in range(runtime.getDeviceCount())]
    except (ImportError, RuntimeError) as error:
        return [("GPU", f"there is one, but CuPy does not describe it: {error}")]
    return [
        (
            f"GPU {device_id}",
            f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']} "
            f"(sm_{_compile.arch_name(10 * properties['major'] + properties['minor'])}), "
            f"{properties['totalGlobalMem'] / 2**30:.1f} GiB, {properties['multiProcessorCount']} SMs",
        )
        for device_id, properties in enumerate(all_properties)
    ]


def _cache_in_words() -> str:
    files = _compile.cached_files()
    size = in_bytes(sum(path.stat().st_size for path in files))
    return f"{_compile.cache_dir()}: {len(files)} compiled kernels, {size}"


def _cache(arguments: argparse.Namespace) -> int:
    if arguments.action == "clear":
        count, num_bytes = _compile.clear_cache()
        print(f"{_compile.cache_dir()}: {count} compiled kernels deleted, {in_bytes(num_bytes)}")
    else:
        print(_cache_in_words())
    return 0


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    # As Ctrl-C does, so that nothing half written is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
