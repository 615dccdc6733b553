"""Speed beside a peer in the same run, on the GPU that the claim is made for; ``-s`` prints the times."""

from __future__ import annotations

import time

import pytest
from conftest import BOUNDS, relative_rms

from lightning_cupy import bench, lightning_attention, reference, slopes

pytestmark = pytest.mark.gpu


def median_milliseconds(torch, *calls, count: int = 30, rests: float = 0) -> list[float]:
    """Device time of calls that take turns, with an empty L2 cache, the host well ahead; the device rests between."""
    flush = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
    for call in 3 * calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for call, of_call in count * list(zip(calls, times, strict=True)):
        time.sleep(rests * min(of_call, default=0) / 1e3)
        flush.amax()  # read: what is written goes back to memory later, while the call is timed
        torch.cuda._sleep(4_000_000)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        of_call.append(start.elapsed_time(stop))
    return [sorted(of_call)[count // 2] for of_call in times]


def name_of_h200(torch) -> str:
    """Return the device's name, or skip the test if it is another GPU than the claims are for."""
    name = torch.cuda.get_device_name()
    if "H200" not in name:
        pytest.skip(f"the claim is for an H200, this is {name}")
    return name


def test_forward_beats_flash_linear_attention():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peer = pytest.importorskip("fla.ops.simple_gla", reason="flash-linear-attention is not installed")
    name = name_of_h200(torch)
    batch, num_heads, seqlen, head_dim = 4, 32, 2048, 128
    q, k, v = (torch.randn(batch, seqlen, num_heads, head_dim, device="cuda").bfloat16() for _ in range(3))
    decay = torch.tensor(slopes(num_heads), device="cuda")
    out = torch.full_like(v, torch.nan)

    lightning_attention(q, k, v, out, slopes=decay)
    expected, _ = reference.chunked(*(x[0].double().cpu().numpy() for x in (q, k, v)), slopes=slopes(num_heads))
    assert relative_rms(out[0].double().cpu(), expected) <= BOUNDS["bfloat16"]

    ours, theirs, copy = median_milliseconds(
        torch,
        lambda: lightning_attention(q, k, v, out, slopes=decay),
        lambda: peer.chunk_simple_gla(q, k, v, g_gamma=-decay.float(), scale=head_dim**-0.5),
        lambda: out.copy_(v),
    )
    gigabytes = 2 * v.numel() * v.element_size() / 1e6
    print(f"\n{name}, batch 4, 32 heads, 2048 tokens, head_dim 128, bfloat16: lightning_cupy {ours:.3f} ms, ")
    print(f"flash-linear-attention {theirs:.3f} ms, {theirs / ours:.2f} times; copy {gigabytes / copy:.0f} GB/s")
    assert ours < theirs


def test_a_token_takes_as_long_in_a_million_as_in_eight_thousand():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    name = name_of_h200(torch)
    lengths, num_heads, head_dim = (8192, 32_768, 131_072, 1_048_576), 64, 128
    free, _ = torch.cuda.mem_get_info()
    wanted = 4.5 * lengths[-1] * num_heads * head_dim * 2
    if free < wanted:
        pytest.skip(f"{wanted / 1e9:.0f} GB of memory wanted, {free / 1e9:.0f} are free")
    decay = torch.tensor(slopes(num_heads), device="cuda")
    q, k, v = (torch.randn(1, lengths[-1], num_heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = torch.empty_like(v)
    nanoseconds = {}
    for length in lengths:
        arrays = [x[:, :length] for x in (q, k, v, out)]
        # With rests, or after some tenths of a second the GPU has reached its 700 W, and lowers its clock.
        [milliseconds] = median_milliseconds(
            torch, lambda arrays=arrays: lightning_attention(*arrays, slopes=decay), count=9, rests=20
        )
        nanoseconds[length] = milliseconds / length * 1e6
    print(f"\n{name}, 64 heads, head_dim 128, bfloat16: ns a token {nanoseconds}")
    assert max(nanoseconds.values()) <= 1.05 * nanoseconds[lengths[0]]


@pytest.mark.parametrize("shape", bench.DEFAULT_SHAPES, ids=str)
def test_high_precision_takes_little_more_time(shape):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    name = name_of_h200(torch)
    sizes = shape.batch, shape.seqlen, shape.num_heads, shape.head_dim
    q, k, v = (torch.randn(sizes, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, decay = torch.empty_like(v), torch.tensor(slopes(shape.num_heads), device="cuda")
    default, high = median_milliseconds(
        torch,
        lambda: lightning_attention(q, k, v, out, slopes=decay),
        lambda: lightning_attention(q, k, v, out, slopes=decay, precision="high"),
        count=11,
    )
    print(f"\n{name}, {shape}, bfloat16: {default:.4f} ms, high precision {high:.4f} ms, {high / default:.2f} times")
    assert high <= 1.6 * default


def test_views_of_memory_with_heads_first_take_little_more_time():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    name = name_of_h200(torch)
    ratios = {}
    for sizes in ((4, 32, 8192, 128), (8, 16, 8192, 64), (1, 64, 4096, 128), (4, 32, 2048, 128)):
        views = [torch.randn(sizes, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]
        arrays = [x.contiguous() for x in views]
        decay = torch.tensor(slopes(sizes[1]), device="cuda")
        milliseconds, of_views = median_milliseconds(
            torch,
            lambda arrays=arrays, decay=decay: lightning_attention(*arrays, slopes=decay),
            lambda arrays=views, decay=decay: lightning_attention(*arrays, slopes=decay),
            count=51,
        )
        assert torch.equal(arrays[3], views[3])
        ratios[sizes] = of_views / milliseconds
    print(f"\n{name}, batch, heads, tokens, head_dim, bfloat16: heads first take {ratios} times the time")
    # Each differs by a percent from process to process, with where the arrays are.
    assert sum(ratios.values()) / len(ratios) <= 1.03
    assert max(ratios.values()) <= 1.05
