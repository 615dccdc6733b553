"""Compile and load kernels before they are needed."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence

from . import _compile, _environment, backward, forward
from ._progress import progress
from .api import DTYPES, MAX_HEAD_DIM


def warmup(
    dtypes: str | Sequence[str] = ("bfloat16", "float16", "float32"),
    head_dims: int | Sequence[int | tuple[int, int]] = (64, 128),
    *,
    causal: bool = True,
    gradients: bool = False,
    device: int | None = None,
    show_progress: bool = True,
) -> None:
    """Compile and load the kernels of :func:`lightning_attention`, so that no call has to wait for them.

    What calls on contiguous arrays launch, whatever their length and number of heads, is compiled, as many kernels at
    a time as there are cores, kept in the cache, and loaded on the device. Without it each kind of call compiles
    what it needs the first time, which takes a second or two once per machine.

    Parameters
    ----------
    dtypes : str or sequence of str
        Of float16, bfloat16, float32 and float64.
    head_dims : int, or sequence of int or of pairs of int
        Of q and k; pairs where v has another: ``[64, (192, 128)]``. From 1 to 256.
    causal : bool, default True
        As in the calls to come.
    gradients : bool, default False
        Whether the kernels of gradients are wanted too.
    device : int, optional
        CUDA ordinal; the current device by default.
    show_progress : bool, default True
        Whether a bar on stderr counts the kernels: tqdm's, or a plain one where that is not installed.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong kind or value: the message names the argument, what is wanted and what it got.
    RuntimeError
        When kernels cannot run here; the message says what mends it.

    Examples
    --------
    >>> lightning_cupy.warmup("bfloat16", [128])  # doctest: +SKIP
    """
    names = _check_dtypes(dtypes)
    pairs = _check_head_dims(head_dims)
    if device is not None and (isinstance(device, bool) or not isinstance(device, int)):
        raise TypeError(f"device must be a CUDA ordinal, but got {type(device).__name__}")
    _environment.require_cuda("warmup")
    from cupy.cuda import runtime

    count = runtime.getDeviceCount()
    if device is not None and not 0 <= device < count:
        raise ValueError(f"device must be from 0 to {count - 1}, but got {device}")
    device_id = runtime.getDevice() if device is None else device
    wanted = [
        kernel
        for dtype in names
        for qk_dim, v_dim in pairs
        for kernels_for in (forward.kernels_for, backward.kernels_for)[: 1 + bool(gradients)]
        for kernel in kernels_for(dtype, qk_dim, v_dim, causal=bool(causal), device_id=device_id)
    ]
    _load_all(list(dict.fromkeys(wanted)), device_id, show_progress)


def _check_dtypes(dtypes: str | Sequence[str]) -> list[forward.Dtype]:
    if not isinstance(dtypes, Sequence):
        raise TypeError(f"dtypes must be a name or a sequence of names, but got {type(dtypes).__name__}")
    names = [dtypes] if isinstance(dtypes, str) else list(dtypes)
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"dtypes must be of {', '.join(DTYPES)}, but got {name!r}")
    return names  # type: ignore[return-value]


def _check_head_dims(head_dims: int | Sequence[int | tuple[int, int]]) -> list[tuple[int, int]]:
    """Return pairs of the head_dim of q and k, and that of v."""
    pairs = []
    for head_dim in head_dims if isinstance(head_dims, Sequence) and not isinstance(head_dims, str) else [head_dims]:
        pair = head_dim if isinstance(head_dim, tuple) and len(head_dim) == 2 else (head_dim, head_dim)
        if not all(isinstance(dim, int) and not isinstance(dim, bool) for dim in pair):
            raise TypeError(f"head_dims must be whole numbers or pairs of them, but got {head_dim!r}")
        if not all(1 <= dim <= MAX_HEAD_DIM for dim in pair):
            raise ValueError(f"head_dims must be from 1 to {MAX_HEAD_DIM}, but got {head_dim!r}")
        pairs.append(pair)
    return pairs


def _load_all(wanted: Sequence[_compile.Wanted], device_id: int, show_progress: bool) -> None:
    # NVRTC compiles in each thread by itself: two take as long as one, where there are two cores.
    with (
        progress(len(wanted), "kernels", show=show_progress) as bar,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        futures = [pool.submit(_compile.kernel, *one, device_id) for one in wanted]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
