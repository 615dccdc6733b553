"""Which calls the Hopper kernels take, how they are spread over blocks, and what is handed to them.

No GPU is needed: the driver's one function is played by an object that writes what it got into the descriptor.
More than 500 lines, as gradients are handed to the same kernels, and are read back by the same helpers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import re

import numpy as np
import pytest

from lightning_cupy import _compile, _launch, _tensor_map, backward, forward, forward_sm90

NUM_SMS = 132  # of an H100 or H200

# What the driver below writes: the order in which cuTensorMapEncodeTiled takes it, with the address in plain bytes.
TENSOR_MAP = np.dtype(
    [
        *(("sizes", np.uint64, 4), ("strides", np.uint64, 3), ("address", np.uint64)),
        *(("dtype", np.int32), ("box", np.uint32, 4), ("element_strides", np.uint32, 4)),
        *(("interleave", np.int32), ("swizzle", np.int32), ("promotion", np.int32), ("fill", np.int32)),
        ("checksum", np.int32),
    ]
)
ADDRESS = TENSOR_MAP.fields["address"][1]


class Driver:
    """Its descriptors are like those of 64 bytes and more behind the address, if `checksum` is not set."""

    def __init__(self, status=0, checksum=False):
        self.status, self.checksum = status, checksum

    def cuTensorMapEncodeTiled(self, memory, dtype, rank, address, sizes, strides, box, element_strides, *rest):
        assert memory.value % 64 == 0
        assert rank.value == len(sizes) == len(strides) + 1 == len(box) == len(element_strides)
        plain = (*sizes,), (*strides,), address.value, dtype.value, (*box,), (*element_strides,)
        checksum = address.value % 997 if self.checksum else 0
        content = np.array((*plain, *(flag.value for flag in rest), checksum), TENSOR_MAP)
        ctypes.memmove(memory.value, content.tobytes(), TENSOR_MAP.itemsize)
        return self.status


@pytest.fixture
def play(monkeypatch):
    """A function that puts such a driver where the real one would be."""

    def install(driver):
        monkeypatch.setattr(_tensor_map, "_driver", lambda: driver)
        _tensor_map.address_offset.cache_clear()

    yield install
    _tensor_map.address_offset.cache_clear()


def contiguous(shape):
    return forward.Layout(tuple(int(np.prod(shape[axis + 1 :])) for axis in range(4)), aligned=True)


def heads_first(shape):
    _, seqlen, num_heads, head_dim = shape
    return forward.Layout((num_heads * seqlen * head_dim, head_dim, seqlen * head_dim, 1), aligned=True)


def problem_of(batch, num_heads, seqlen, qk_dim, v_dim=None, **changed):
    """A call on contiguous bfloat16 arrays on Hopper, but for what is changed."""
    widths = {"o": v_dim or qk_dim, "q": qk_dim, "k": qk_dim, "v": v_dim or qk_dim}
    fields = {name: contiguous((batch, seqlen, num_heads, width)) for name, width in widths.items()}
    fields |= {"compute_capability": 90, "num_sms": NUM_SMS, "dtype": "bfloat16", "scale": 0.25} | changed
    sizes = {"batch": batch, "num_heads": num_heads, "seqlen": seqlen, "qk_dim": qk_dim, "v_dim": widths["v"]}
    return forward.Problem(**fields | sizes)


def chunks(num_tokens):
    return -(-num_tokens // 64)


# How it is spread


@pytest.mark.parametrize(
    ("shape", "tiling"),
    [
        ((4, 32, 2048, 128), (2, 1, 1)),
        ((8, 16, 8192, 64), (1, 1, 1)),
        *(((1, 64, seqlen, 128), (1, 2, 1)) for seqlen in (4096, 16_384, 65_536)),
        ((1, 8, 32_768, 128), (2, 1, 16)),
        ((1, 1, 131_072, 128), (2, 1, 128)),
        *(((2, 12, 2048, head_dim), (1, 1, 2)) for head_dim in (96, 128)),
        ((2, 12, 2048, 192), (1, 3, 1)),
        ((2, 12, 2048, 256), (1, 4, 1)),
        ((1, 32, 4096, 256), (1, 1, 1)),
        ((33, 4, 4096, 128), (2, 1, 1)),
    ],
)
def test_tiling_for(shape, tiling):
    batch, num_heads, seqlen, head_dim = shape
    found = forward_sm90.tiling_for(batch * num_heads, seqlen, head_dim, head_dim, NUM_SMS)
    assert (found.v_groups, found.cluster, found.team_size) == tiling


def test_one_long_head_has_most_of_the_gpu():
    tiling = forward_sm90.tiling_for(1, 131_072, 128, 128, NUM_SMS)
    assert 100 < tiling.cluster * tiling.team_size <= NUM_SMS


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 16, 71])
@pytest.mark.parametrize("wanted_size", [2, 3, 16, 100])
@pytest.mark.parametrize("chunks", [1, 2, 7, 100])
def test_cut_leaves_nobody_without_chunks(num_chunks, wanted_size, chunks):
    team_size, first, others = forward_sm90.cut(num_chunks, wanted_size, chunks)
    assert team_size <= wanted_size
    assert first > 0
    assert first + (team_size - 1) * others == num_chunks
    assert others == chunks


@pytest.mark.parametrize(
    ("num_heads", "v_dim", "cluster"),
    [(64, 128, 2), (66, 128, 2), (67, 128, 1), (32, 192, 3), (33, 192, 1), (24, 256, 4), (25, 200, 1), (100, 64, 1)],
)
def test_blocks_of_a_head_are_a_cluster_where_all_are_there_at_once(play, num_heads, v_dim, cluster):
    play(Driver())
    launch, args = only_launch(forward_sm90.steps(problem_of(1, num_heads, 4000, 256, v_dim)))
    constants = dict(launch.constants)
    assert (constants["CLUSTER"], constants["SPLIT"]) == (cluster, 0)
    assert launch.grid[0] == num_heads * -(-v_dim // 64) == args["num_rows"]


@pytest.mark.parametrize(
    ("shape", "neighbours"),
    [
        ((8, 16, 8192, 64), 2),
        ((4, 32, 2048, 96), 2),
        ((2, 67, 1024, 64), 2),
        ((1, 131, 8192, 64), 1),  # one row would have none
        ((8, 16, 512, 64), 1),  # over before it pays
        ((4, 32, 8192, 128), 1),  # pieces of 256 bytes
        ((1, 8, 8192, 64), 1),  # cut
    ],
)
def test_blocks_of_small_heads_load_in_step(play, shape, neighbours):
    play(Driver())
    launch, _ = only_launch(forward_sm90.steps(problem_of(*shape)))
    assert dict(launch.constants)["NEIGHBOURS"] == neighbours
    assert launch.grid[0] % neighbours == 0


@pytest.mark.parametrize("num_sms", [132, 114, 78, 1])
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(64, 64), (40, 128), (96, 96), (128, 128), (192, 256), (256, 8)])
def test_teams_fit_the_sequence_and_the_gpu(play, qk_dim, v_dim, num_sms):
    play(Driver())
    for num_heads, seqlen in itertools.product((1, 2, 3, 16, 67, 131, 500), (1, 63, 64, 65, 129, 1000, 20_000, 2**20)):
        steps = forward_sm90.steps(problem_of(1, num_heads, seqlen, qk_dim, v_dim, num_sms=num_sms))
        launch, args = only_launch(steps)
        constants = dict(launch.constants)
        team_size, first, others = (int(args[name]) for name in ("team_size", "first_length", "segment_length"))
        assert 1 <= team_size <= chunks(seqlen)
        if team_size > 1:
            assert first % 64 == others % 64 == 0 < first
            last = seqlen - first - (team_size - 2) * others
            assert 0 < last <= others, "a member without tokens, or tokens left"
        assert constants["SPLIT"] == (team_size > 1)
        assert launch.cooperative == (team_size > 2) == bool(steps.buffers)
        assert launch.grid[0] % (constants["CLUSTER"] * constants["NEIGHBOURS"]) == 0
        assert launch.grid[1:] == (team_size, 1)
        # Blocks that wait for each other are all there at once, and two states of each are all that they need.
        limit = num_sms if team_size > 1 else int(args["num_rows"])
        assert launch.grid[0] * team_size <= limit
        of_a_block = 2 * (constants["QK_DIM"] * 64 + 2) * constants["V_GROUPS"]
        assert sum(np.prod(buffer.shape) for buffer in steps.buffers) <= num_sms * of_a_block


# Whether it takes a call


def changed_strides(name, axis, stride, batch=2, num_heads=3):
    """A call where one array has another stride along one axis."""
    problem = problem_of(batch, num_heads, 100, 64)
    strides = list(getattr(problem, name).strides)
    strides[axis] = stride
    return dataclasses.replace(problem, **{name: forward.Layout(tuple(strides), aligned=True)})


GOOD = problem_of(2, 3, 100, 64)
REFUSED = {
    "an older GPU": dataclasses.replace(GOOD, compute_capability=89),
    "a newer GPU": dataclasses.replace(GOOD, compute_capability=100),
    "float32 of few heads": dataclasses.replace(GOOD, dtype="float32"),
    "float64": dataclasses.replace(GOOD, dtype="float64"),
    "not causal": dataclasses.replace(GOOD, causal=False),
    "no tokens": problem_of(1, 3, 0, 64),
    "more tokens than int has": problem_of(1, 1, 2**31 - 1, 8),
    "head_dim of odd bytes": problem_of(2, 3, 100, 17),
    "v_dim of 8 bytes": problem_of(2, 3, 100, 64, 100),
    **{
        f"{name} unaligned": dataclasses.replace(GOOD, **{name: getattr(GOOD, name)._replace(aligned=False)})
        for name in "oqkv"
    },
    **{
        f"{name}, axis {axis} by {stride}": changed_strides(name, axis, stride)
        for name, axis, stride in (
            *(("q", axis, 20_004) for axis in range(3)),  # 8 bytes more than a multiple of 16
            *(("k", axis, 0) for axis in range(3)),
            *(("v", axis, -64) for axis in range(3)),
            *(("o", 1, stride) for stride in (0, -192, 2**39)),
            *((name, 3, 2) for name in "oqkv"),
        )
    },
}


@pytest.mark.parametrize("problem", REFUSED.values(), ids=REFUSED)
def test_takes_all_but(problem):
    assert forward_sm90.fits(GOOD)
    assert not forward_sm90.fits(problem)


@pytest.mark.parametrize("stride", [0, -7, 3, 2**50])
def test_stride_along_one_index_does_not_matter(play, stride):
    play(Driver())
    for axis, name in itertools.product((0, 2), "oqkv"):
        problem = changed_strides(name, axis, stride, batch=1, num_heads=1)
        assert forward_sm90.fits(problem)
        _, args = only_launch(forward_sm90.steps(problem))
        strides = tensor_map(args, name)["strides"]
        assert all(0 < one < 2**40 and one % 16 == 0 for one in strides), "the driver refuses others"
    token = changed_strides("q", 1, stride)
    assert not forward_sm90.fits(token)
    assert forward_sm90.fits(dataclasses.replace(problem_of(2, 3, 1, 64), q=token.q, k=token.q))
    narrow = problem_of(2, 3, 100, 64, 1, v=forward.Layout((2400, 24, 8, stride), True), o=GOOD.o)
    assert forward_sm90.fits(narrow)


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("problem", [GOOD, *REFUSED.values()], ids=["good", *REFUSED])
def test_family_of_kernels(play, problem, high):
    play(Driver())
    problem = dataclasses.replace(problem, high=high)
    if forward_sm90.fits(problem):
        launch, _ = only_launch(forward.steps_for(problem))
        assert launch.file == "forward_sm90.cu"
        assert dict(launch.constants)["HIGH"] == high
    elif high and problem.causal and problem.dtype == "bfloat16" and problem.seqlen > 0:
        with pytest.raises(ValueError, match=r"^precision='high' of bfloat16 wants a GPU of compute capability 9\.0"):
            forward.steps_for(problem)
    else:
        assert forward.steps_for(problem) == (forward.portable_steps(problem) if problem.seqlen else _launch.Steps())


def test_no_tokens_have_any_precision():
    problem = dataclasses.replace(REFUSED["no tokens"], high=True, return_state=True)
    assert forward.steps_for(problem) == forward.portable_steps(problem)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(128, 128), (64, 128), (128, 256), (64, 192), (96, 96)])
def test_warmup_knows_all_kernels_of_wide_v(play, monkeypatch, dtype, qk_dim, v_dim):
    check_kernels_for(play, monkeypatch, dtype, qk_dim, v_dim)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(64, 64), (192, 192), (256, 256), (17, 17)])
def test_warmup_knows_all_kernels(play, monkeypatch, dtype, qk_dim, v_dim):
    check_kernels_for(play, monkeypatch, dtype, qk_dim, v_dim)


def check_kernels_for(play, monkeypatch, dtype, qk_dim, v_dim):
    play(Driver())
    monkeypatch.setattr(forward, "device_properties", lambda _: (90, NUM_SMS))
    known = forward.kernels_for(dtype, qk_dim, v_dim, causal=True, device_id=0)
    for num_heads, seqlen in itertools.product(
        (1, 2, 8, 33, 40, 50, 64, 100, 132, 200, 1000), (1, 65, 1000, 4096, 2**15)
    ):
        steps = forward.steps_for(problem_of(1, num_heads, seqlen, qk_dim, v_dim, dtype=dtype))
        assert {launch.kernel for launch in steps.launches} <= set(known), (num_heads, seqlen)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(64, 64), (128, 128), (64, 128)])
def test_warmup_knows_all_kernels_of_gradients(play, monkeypatch, dtype, qk_dim, v_dim):
    play(Driver())
    monkeypatch.setattr(forward, "device_properties", lambda _: (90, NUM_SMS))
    known = backward.kernels_for(dtype, qk_dim, v_dim, causal=True, device_id=0)
    wanted = ("dq", "dk", "dv", "dslopes")
    for num_heads, seqlen in itertools.product((1, 3, 8, 33, 64, 100, 132, 200, 1000), (1, 65, 1000, 4096, 2**15)):
        steps = backward.steps_for(gradients_of(1, num_heads, seqlen, qk_dim, v_dim, dtype=dtype, wanted=wanted))
        assert {launch.kernel for launch in steps.launches} <= set(known), (num_heads, seqlen)


# What it is handed


def only_launch(steps):
    (launch,) = steps.launches
    return launch, np.frombuffer(launch.arguments.template[: forward_sm90._ARGS.itemsize], forward_sm90._ARGS)[0]


def tensor_map(args, name):
    return np.frombuffer(args[name].tobytes()[: TENSOR_MAP.itemsize], TENSOR_MAP)[0]


def check_pointers(launch, wanted):
    """Each array's pointer goes where the struct has it; into its descriptor, if it has one."""
    offsets = {name: forward_sm90._ARGS.fields[name][1] + (ADDRESS if name in "qkvo" else 0) for name in wanted}
    names = {"first_flag": _launch.UNIQUE}
    assert {name: offset for offset, name in launch.arguments.pointers} == {
        names.get(name, name): offset for name, offset in offsets.items()
    }
    assert len(launch.arguments.template) % 64 == 0, "descriptors are aligned to 64 bytes"


def test_steps_of_a_whole_sequence(play):
    play(Driver())
    shape = (4, 2000, 32, 128)
    problem = problem_of(4, 32, 2000, 128, q=heads_first(shape), o=heads_first(shape), slope=0.5, dtype="float16")
    steps = forward_sm90.steps(problem)
    launch, args = only_launch(steps)
    plan = forward_sm90.plan_for("float16", 128, 2)
    assert steps.buffers == ()
    assert (launch.file, launch.name, launch.constants) == ("forward_sm90.cu", "forward", plan.constants)
    assert (launch.grid, launch.block) == ((128, 1, 1), (512, 1, 1))
    assert launch.smem_bytes == plan.smem_bytes
    assert not launch.cooperative
    check_pointers(launch, "qkvo")
    token, head, batch = 32 * 128 * 2, 128 * 2, 2000 * 32 * 128 * 2
    for name, strides in {
        "k": (token, head),
        "v": (token, head),
        "q": (256, 2000 * 256),
        "o": (256, 2000 * 256),
    }.items():
        described = tensor_map(args, name)
        assert tuple(described["sizes"]) == (128, 2000, 32, 4)
        assert tuple(described["strides"]) == (*strides, batch)
        assert tuple(described["box"]) == (64, 64, 1, 1)
        assert tuple(described["element_strides"]) == (1, 1, 1, 1)
        # CU_TENSOR_MAP_DATA_TYPE_FLOAT16, _SWIZZLE_128B, and zeros outside.
        flags = {"dtype": 6, "interleave": 0, "swizzle": 3, "promotion": 3, "fill": 0}
        assert {flag: int(described[flag]) for flag in flags} == flags
    sizes = {"num_rows": 128, "seqlen": 2000, "team_size": 1, "num_heads": 32}
    sizes |= {"qk_dim": 128, "v_dim": 128, "num_v_blocks": 1, "scale": 0.25, "slope": 0.5}
    assert {name: args[name] for name in sizes} == sizes


@pytest.mark.parametrize("slopes_dtype", ["float32", "float64"])
def test_steps_of_a_split_sequence(play, monkeypatch, slopes_dtype):
    play(Driver())
    tiling = forward_sm90.Tiling(1, 1, *forward_sm90.cut(79, 20, 4))
    monkeypatch.setattr(forward_sm90, "tiling_for", lambda *_: tiling)
    extras = {"slopes": (slopes_dtype, 3), "initial_strides": (7, 5, 3, 1), "return_state": True, "high": True}
    steps = forward_sm90.steps(problem_of(2, 3, 5000, 192, 136, **extras))
    launch, args = only_launch(steps)
    plan = forward_sm90.plan_for("bfloat16", 192, 1, split=True, high=True)
    assert launch.constants == plan.constants
    # 6 teams of 20 of 132 blocks, for 18 rows.
    assert (launch.grid, launch.block) == ((6, 20, 1), (384, 1, 1))
    assert launch.cooperative
    # Two states behind each member but the last, and two flags of 8 bytes for each member.
    assert steps.buffers == (_launch.Buffer("workspace", (6 * 2 * (19 * 192 * 64 + 20 * 2),), "float32"),)
    check_pointers(launch, [*"qkvo", "final_state", "initial_state", "workspace", "first_flag", "slopes"])
    assert tuple(args["initial_strides"]) == (7, 5, 3, 1)
    sizes = {"num_rows": 18, "team_size": 20, "first_length": 192, "segment_length": 256, "num_v_blocks": 3}
    sizes |= {"slopes_stride": 3}
    assert {name: args[name] for name in sizes} == sizes
    assert bool(args["slopes_are_double"]) == (slopes_dtype == "float64")
    assert tuple(tensor_map(args, "q")["sizes"]) == (192, 5000, 3, 2)
    assert tuple(tensor_map(args, "v")["sizes"]) == (136, 5000, 3, 2)
    assert tensor_map(args, "v")["dtype"] == 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16


def test_steps_of_teams_of_different_sizes(play):
    play(Driver())
    problem = problem_of(1, 8, 32_768, 128, slopes=("float32", 1))
    launch, args = only_launch(forward_sm90.steps(problem))
    tiling = forward_sm90.tiling_for(8, 32_768, 128, 128, 132)
    assert (tiling.v_groups, tiling.team_size) == (2, 16)
    assert launch.grid == (132, 1, 1), "all blocks, which the kernel shares out"
    assert launch.cooperative
    assert 0.1 < args["states_time"] < 1
    # Of rows that need no state behind their last member, and flags of all.
    (workspace,) = forward_sm90.steps(problem).buffers
    assert workspace.shape == (2 * ((132 - 8) * 2 * 128 * 64 + 132 * 2 * 2),)
    # The same slope for all, or none: teams of one size.
    for slope in (0.0, 0.5):
        launch, args = only_launch(forward_sm90.steps(problem_of(1, 8, 32_768, 128, slope=slope)))
        assert (launch.grid, args["states_time"]) == ((8, 16, 1), 0)


@pytest.mark.parametrize(
    ("num_rows", "team_size", "chunks", "expected"),
    [
        *((8, 16, 32, True), (8, 16, 20, False), (8, 16, 4096, False), (8, 17, 32, False), (1, 132, 100, False)),
        *((32, 4, 100, True), (33, 4, 100, False), (44, 3, 100, False), (2, 2, 100, False), (2, 66, 100, True)),
    ],
)
def test_rows_that_get_teams_of_their_own_size(num_rows, team_size, chunks, expected):
    tiling = forward_sm90.Tiling(2, 1, team_size, 1, chunks)
    assert forward_sm90.is_balanced(tiling, num_rows, 128, 132) is expected


def test_steps_of_a_pair(play, monkeypatch):
    play(Driver())
    monkeypatch.setattr(forward_sm90, "tiling_for", lambda *_: forward_sm90.Tiling(1, 1, 2, 50, 29))
    steps = forward_sm90.steps(problem_of(2, 3, 5000, 96))
    launch, args = only_launch(steps)
    assert launch.constants == forward_sm90.plan_for("bfloat16", 96, 1, split=True).constants
    assert launch.grid == (2 * 3 * 2, 2, 1)
    assert not launch.cooperative, "the second needs nothing of the first"
    assert steps.buffers == ()
    check_pointers(launch, "qkvo")
    assert (args["first_length"], args["segment_length"], args["team_size"]) == (3200, 1856, 2)


@pytest.mark.parametrize(("num_heads", "v_dim", "v_groups"), [(132, 64, 1), (66, 128, 1), (67, 128, 2), (300, 72, 2)])
def test_steps_of_float32(play, num_heads, v_dim, v_groups):
    play(Driver())
    problem = problem_of(1, num_heads, 5000, 128, v_dim, dtype="float32", return_state=True)
    assert forward_sm90.fits(problem)
    launch, args = only_launch(forward.steps_for(problem))
    plan = forward_sm90.float_plan_for(128, v_groups)
    assert (launch.file, launch.constants) == ("forward_float_sm90.cu", plan.constants)
    assert launch.grid == (num_heads * -(-v_dim // (64 * v_groups)), 1, 1)
    assert launch.block == (128 * (2 + v_groups), 1, 1)
    assert not launch.cooperative
    check_pointers(launch, [*"qkvo", "final_state"])
    described = tensor_map(args, "v")
    assert tuple(described["sizes"]) == (v_dim, 5000, num_heads, 1)
    assert tuple(described["strides"][:2]) == (num_heads * v_dim * 4, v_dim * 4)
    assert tuple(described["box"]) == (32, 64, 1, 1)
    assert described["dtype"] == 7  # CU_TENSOR_MAP_DATA_TYPE_FLOAT32


def gradients_of(*sizes, dstate_strides=None, wanted=("dq", "dk", "dv"), do=None, **options):
    """A problem of the backward over contiguous arrays."""
    of = problem_of(*sizes, **options) if do is None else problem_of(*sizes, o=do, **options)
    return backward.Problem(of, dstate_strides, wanted)


def test_gradients_are_attentions(play):
    play(Driver())
    strides = {"initial_strides": (7, 5, 3, 1), "dstate_strides": (11, 9, 1, 2)}
    wanted = ("dq", "dk", "dv", "dinitial_state")
    steps = backward.steps_for(gradients_of(4, 32, 2000, 128, slope=0.5, wanted=wanted, **strides))
    assert steps.buffers == ()
    pair, alone = steps.launches
    assert pair.constants == forward_sm90.plan_for("bfloat16", 128, 2, in_reverse=True, attentions=2).constants
    assert alone.constants == forward_sm90.plan_for("bfloat16", 128, 2).constants
    assert (pair.grid, alone.grid) == ((256, 1, 1), (128, 1, 1))
    offsets = {name: field[1] + (ADDRESS if name in "qkvo" else 0) for name, field in forward_sm90._ARGS.fields.items()}

    def roles(launch, first):
        names = {offset: name for offset, name in launch.arguments.pointers}
        return {role: names.get(first + offset) for role, offset in offsets.items() if first + offset in names}

    second = len(alone.arguments.template)
    assert len(pair.arguments.template) == 2 * second
    assert roles(pair, 0) == {"q": "v", "k": "do", "v": "q", "o": "dk", "initial_state": "dstate"}
    of_dv = {"q": "k", "k": "q", "v": "do", "o": "dv", "initial_state": "dstate", "final_state": "dinitial_state"}
    assert roles(pair, second) == of_dv
    assert roles(alone, 0) == {"q": "do", "k": "v", "v": "k", "o": "dq", "initial_state": "initial_state"}

    def args_at(launch, first):
        template = launch.arguments.template[first : first + forward_sm90._ARGS.itemsize]
        return np.frombuffer(template, forward_sm90._ARGS)[0]

    # States of dq and dk are transposed.
    assert tuple(args_at(alone, 0)["initial_strides"]) == (7, 5, 1, 3)
    assert tuple(args_at(pair, 0)["initial_strides"]) == (11, 9, 2, 1)
    assert tuple(args_at(pair, second)["initial_strides"]) == (11, 9, 1, 2)
    assert args_at(pair, 0)["num_rows"] == args_at(pair, second)["num_rows"] == 256


def test_gradients_that_do_not_share_a_launch(play):
    play(Driver())

    def launched(**options):
        steps = backward.steps_for(gradients_of(4, 32, 2000, **options))
        return [(launch.file, dict(launch.constants).get("ATTENTIONS")) for launch in steps.launches]

    alone, both = ("forward_sm90.cu", 1), ("forward_sm90.cu", 2)
    assert launched(qk_dim=128) == [both, alone]
    assert launched(qk_dim=128, v_dim=64) == [alone] * 3
    assert launched(qk_dim=128, wanted=("dk",)) == [alone]
    assert launched(qk_dim=128, wanted=("dinitial_state",)) == [alone]
    assert launched(qk_dim=128, dtype="float32") == [("forward_float_sm90.cu", None)] * 3
    unaligned = forward.contiguous(4, 2000, 32, 128)._replace(aligned=False)
    assert launched(qk_dim=128, do=unaligned) == [("forward.cu", None)] * 3
    assert launched(qk_dim=128, causal=False)[0] == ("forward.cu", None)
    assert launched(qk_dim=128, wanted=()) == []


def test_parts_of_a_backward_share_no_memory(play):
    play(Driver())
    wanted = ("dq", "dk", "dinitial_state", "dslopes")
    steps = backward.steps_for(gradients_of(1, 8, 32_768, 128, slopes=("float32", 1), wanted=wanted))
    names = [buffer.name for buffer in steps.buffers]
    assert len(set(names)) == len(names)
    assert {"workspace of dk and dv", "workspace of dq", "dv", "partials"} == set(names)
    taken = {name for launch in steps.launches for _, name in launch.arguments.pointers}
    assert taken <= {*names, *backward.ARRAYS, _launch.UNIQUE}
    assert [launch.name for launch in steps.launches] == ["forward", "forward", "sum_partials"]


def test_slopes_are_summed_with_dq(play):
    play(Driver())
    strides = {"initial_strides": (7, 5, 3, 1), "dstate_strides": (11, 9, 1, 2)}
    steps = backward.steps_for(gradients_of(4, 32, 2000, 128, 96, slope=0.5, wanted=("dslopes",), **strides))
    launch, sum_launch = steps.launches
    plan = forward_sm90.plan_for("bfloat16", 96, 1, cluster=2, slopes=True)
    assert plan.qk_dim == 128
    assert (launch.constants, launch.block, launch.smem_bytes) == (plan.constants, (512, 1, 1), plan.smem_bytes)
    # A number of each of 12 warps, of each of two blocks of a head.
    partials, dq = steps.buffers
    assert partials == _launch.Buffer("partials", (4 * 32 * 2 * 12,), "float64")
    assert dq == _launch.Buffer("dq", (4, 2000, 32, 128), "bfloat16")
    roles = {"q": "do", "k": "v", "v": "k", "o": "dq", "primal": "q"}
    offsets = {name: forward_sm90._ARGS.fields[name][1] + ADDRESS for name in roles}
    roles |= {name: name for name in ("initial_state", "dstate", "partials")}
    offsets |= {name: forward_sm90._ARGS.fields[name][1] for name in ("initial_state", "dstate", "partials")}
    assert dict(launch.arguments.pointers) == {offsets[name]: role for name, role in roles.items()}
    args = np.frombuffer(launch.arguments.template[: forward_sm90._ARGS.itemsize], forward_sm90._ARGS)[0]
    assert tuple(args["initial_strides"]) == (7, 5, 1, 3), "states of dq are transposed"
    assert tuple(args["dstate_strides"]) == (11, 9, 2, 1)
    assert (args["num_rows"], args["max_members"], args["num_v_blocks"]) == (256, 1, 2)
    assert tuple(tensor_map(args, "primal")["sizes"]) == (128, 2000, 32, 4)

    assert sum_launch.name == "sum_partials"
    sum_args = np.frombuffer(sum_launch.arguments.template, backward._ARGS)[0]
    sizes = {"batch": 4, "num_heads": 32, "num_v_blocks": 24, "num_segments": 1}
    assert {name: sum_args[name] for name in sizes} == sizes


def test_numbers_that_teams_leave_for_slopes(play):
    play(Driver())
    of = {"wanted": ("dslopes",), "qk_dim": 128}
    launch, _ = backward.steps_for(gradients_of(1, 8, 32_768, slopes=("float32", 1), **of)).launches
    args = np.frombuffer(launch.arguments.template[: forward_sm90._ARGS.itemsize], forward_sm90._ARGS)[0]
    assert (launch.grid, args["num_rows"]) == ((132, 1, 1), 16)
    assert args["max_members"] == 132 - 15, "all that the other rows leave, each of which has one"
    steps = backward.steps_for(gradients_of(1, 8, 32_768, slope=0.1, **of))
    args = np.frombuffer(steps.launches[0].arguments.template[: forward_sm90._ARGS.itemsize], forward_sm90._ARGS)[0]
    assert args["max_members"] == args["team_size"] == steps.launches[0].grid[1]
    assert steps.buffers[-2].shape == (8 * 2 * args["team_size"] * 12,)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"v_dim": 136},
        {"seqlen": 500},
        {"batch": 1, "num_heads": 4},
        {"q": forward.contiguous(4, 2000, 32, 128)._replace(aligned=False)},
        {"do": forward.contiguous(4, 2000, 32, 128)._replace(aligned=False)},
    ],
    ids=str,
)
def test_slopes_that_are_not_summed_with_dq(play, options):
    play(Driver())
    sizes = {"batch": 4, "num_heads": 32, "seqlen": 2000, "qk_dim": 128} | options
    steps = backward.steps_for(gradients_of(wanted=("dq", "dslopes"), **sizes))
    assert [launch.name for launch in steps.launches][-3:-1] == ["slope_partials", "sum_partials"]
    assert "dq" not in {buffer.name for buffer in steps.buffers}


def test_address_that_is_not_there_in_plain_bytes(play):
    play(Driver(checksum=True))
    with pytest.raises(RuntimeError, match=r"^the driver's TMA descriptors have changed"):
        _tensor_map.address_offset()
    play(Driver())
    assert _tensor_map.address_offset() == ADDRESS


def test_refusal_of_the_driver_is_said(play):
    play(Driver(status=1))
    message = r"^cuTensorMapEncodeTiled refuses bfloat16 \(2, 100, 3, 64\) with strides .*: CUDA error 1$"
    with pytest.raises(RuntimeError, match=message):
        forward_sm90.steps(GOOD)


# How structs of the CUDA sources lie in memory, by names of types; pointers to anything are alike.
C_TYPES = {
    "TensorMap": ctypes.c_uint64 * 16,
    "Strides": ctypes.c_int64 * 4,
    "StateStrides": ctypes.c_int64 * 4,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "double": ctypes.c_double,
    "float": ctypes.c_float,
    "int": ctypes.c_int32,
}


@pytest.mark.parametrize(
    ("file", "name", "packed"),
    [
        ("forward.cuh", "Args", forward._ARGS),
        ("forward_sm90.cuh", "HopperArgs", forward_sm90._ARGS),
        ("backward.cuh", "SlopeArgs", backward._ARGS),
    ],
)
def test_struct_is_packed_as_the_kernel_reads_it(file, name, packed):
    source = re.sub(r"//.*", "", (_compile.kernels_dir() / file).read_text())
    body = re.search(rf"struct {name} {{(.*?)}};", source, re.DOTALL)[1]
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+)\s*(.*)", declaration, re.DOTALL).groups()
        for field in names.split(","):
            is_pointer = field.strip().startswith("*")
            fields.append((field.strip(" *\n"), ctypes.c_void_p if is_pointer else C_TYPES[kind]))
    in_c = type("InC", (ctypes.Structure,), {"_fields_": fields})
    layout = {field: (getattr(in_c, field).offset, getattr(in_c, field).size) for field, _ in fields}
    assert {field: (offset, dtype.itemsize) for field, (dtype, offset, *_) in packed.fields.items()} == layout
