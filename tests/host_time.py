"""What calls take on the host, in microseconds, as JSON: ``python tests/host_time.py cupy``, torch or train.

In a process of its own: in one that has done much else, as pytest's has, the same calls take twice as long.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import cupy
import ml_dtypes
import numpy as np

from lightning_cupy import lightning_attention, lightning_attention_backward

SHAPE = (1, 64, 2, 64)


def microseconds(calls: dict) -> dict:
    """Medians over batches of what each call takes on the host, the device never far behind.

    Batches of all calls take turns: what else the machine does for a moment is in a few batches of each.
    """
    times = {name: [] for name in calls}
    for _ in range(41):
        for name, call in calls.items():
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for _ in range(25):
                call()
            times[name].append((time.perf_counter() - start) / 25 * 1e6)
    return {name: statistics.median(batches[1:]) for name, batches in times.items()}


def arrays_of(library: str) -> tuple:
    """Return q, k, v, out, and slopes of each head."""
    if library == "cupy":
        return *(cupy.zeros(SHAPE, ml_dtypes.bfloat16) for _ in range(4)), cupy.asarray([0.1, 0.2])
    import torch

    device = torch.device("cuda")
    arrays = (torch.zeros(SHAPE, dtype=torch.bfloat16, device=device) for _ in range(4))
    return *arrays, torch.tensor([0.1, 0.2], device=device)


def training_steps() -> dict:
    """Return a forward and a backward through torch, both functions alone, and what torch takes for doing nothing."""
    import torch

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return v.detach()

        @staticmethod
        def backward(ctx, do):
            return do, do, do

    q, k, v, do, slopes = arrays_of("torch")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    detached = [x.detach() for x in inputs]
    return {
        "forward and backward": lambda: torch.autograd.grad(lightning_attention(*inputs, slopes=slopes), inputs, do),
        "forward": lambda: lightning_attention(*detached, slopes=slopes),
        "nothing": lambda: torch.autograd.grad(Nothing.apply(*inputs), inputs, do),
        "backward": lambda: lightning_attention_backward(do, *detached, slopes=slopes, wanted=("dq", "dk", "dv")),
    }


def main(library: str) -> None:
    """Print the time of each way to call, and that of an empty kernel through CuPy."""
    if library == "train":
        print(json.dumps(microseconds(training_steps())))
        return
    q, k, v, out, slopes = arrays_of(library)
    host = np.array([0.1, 0.2])
    kernel = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    calls = {
        "q, k, v": lambda: lightning_attention(q, k, v),
        "out": lambda: lightning_attention(q, k, v, out),
        "slopes on the GPU": lambda: lightning_attention(q, k, v, slopes=slopes),
        "one slope": lambda: lightning_attention(q, k, v, slopes=0.1),
        "slopes of NumPy": lambda: lightning_attention(q, k, v, slopes=host),
        "out, slopes on the GPU": lambda: lightning_attention(q, k, v, out, slopes=slopes),
        "empty kernel": lambda: kernel((1,), (1,), ()),
    }
    print(json.dumps(microseconds(calls)))


if __name__ == "__main__":
    main(sys.argv[1])
