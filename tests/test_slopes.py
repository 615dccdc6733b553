"""lightning_cupy.slopes: each preset against values written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_cupy import slopes

# The rates of two heads, of eight, and of twenty: sixteen and then every other one of thirty-two.
ALIBI = {
    2: [1 / 16, 1 / 256],
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
    20: [2 ** (-i / 2) for i in range(1, 17)] + [2 ** (-i / 4) for i in (1, 3, 5, 7)],
}
GEOMETRIC = {2: ALIBI[2], 8: ALIBI[8], 20: [2 ** (-0.4 * i) for i in range(1, 21)]}
TRANSNORMER = {2: [0, 4], 8: [0, 1, 2, 3, 4, 5, 6, 7], 20: [0.4 * i for i in range(20)]}
RETNET = [math.log(32 / 31), math.log(64 / 63), math.log(128 / 127)]

# By layer of five.
MINIMAX = {0: 1.00001, 1: 0.75001, 4: 0.00001}
MINIMAX_HF = {0: 1.00001, 1: 1.00001 - 1 / 4.00001, 4: 1.00001 - 4 / 4.00001}
LING_HF = {0: 1.25001, 1: 1.00001, 4: 0.25001}
TRANSNORMER_LAYER = {0: 1, 1: 0.8, 4: 0.2}

OF_ALL_LAYERS = ("lightning2", "retnet")
BY_LAYER = {
    "minimax": (ALIBI, MINIMAX),
    "minimax-hf": (GEOMETRIC, MINIMAX_HF),
    "ling-hf": (ALIBI, LING_HF),
    "ling-sglang": (ALIBI, MINIMAX),
    "fla": (TRANSNORMER, TRANSNORMER_LAYER),
}


@pytest.mark.parametrize("num_heads", ALIBI)
def test_lightning2(num_heads):
    np.testing.assert_allclose(slopes(num_heads, "lightning2"), ALIBI[num_heads], rtol=1e-15)


def test_lightning2_is_the_default():
    np.testing.assert_array_equal(slopes(20), slopes(20, "lightning2"))


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (1, [1 / 256]),
        (3, [1 / 16, 1 / 256, 1 / 4]),
        (6, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
        (7, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8, 1 / 32]),
    ],
)
def test_alibi_between_powers_of_two(num_heads, expected):
    np.testing.assert_allclose(slopes(num_heads), expected, rtol=1e-15)


def test_retnet():
    np.testing.assert_allclose(slopes(3, "retnet"), RETNET, rtol=1e-14)
    # Where 1 - 2**(-5 - h) is no longer another number than 1, the slope is the power of two itself.
    np.testing.assert_allclose(slopes(64, "retnet")[-1], 2.0**-68, rtol=1e-15)


@pytest.mark.parametrize("layer", [0, 1, 4])
@pytest.mark.parametrize("num_heads", [2, 8, 20])
@pytest.mark.parametrize("preset", BY_LAYER)
def test_presets_by_layer(preset, num_heads, layer):
    rates, factors = BY_LAYER[preset]
    expected = np.array(rates[num_heads]) * factors[layer]
    np.testing.assert_allclose(slopes(num_heads, preset, layer=layer, num_layers=5), expected, rtol=1e-10)


def test_slowest_head_of_the_last_layer_of_a_large_model():
    assert slopes(64, "minimax", layer=79, num_layers=80).min() == pytest.approx(2**-8 * 1e-5, rel=1e-9)
    # 79 / 79.00001 falls short of 1 by 1.27e-7.
    assert slopes(64, "minimax-hf", layer=79, num_layers=80).min() == pytest.approx(2**-8 * 1.012658e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("preset", "factor"),
    [("minimax", 1.00001), ("minimax-hf", 1.00001), ("ling-hf", 1.00001), ("ling-sglang", 1.00001), ("fla", 1)],
)
def test_model_of_one_layer(preset, factor):
    expected = np.array(BY_LAYER[preset][0][2]) * factor
    np.testing.assert_allclose(slopes(2, preset, layer=0, num_layers=1), expected, rtol=1e-12)


@pytest.mark.parametrize("preset", [*BY_LAYER, *OF_ALL_LAYERS])
def test_heads_are_taken_from_those_of_the_whole_model(preset):
    layer = {"layer": 2, "num_layers": 5} if preset in BY_LAYER else {}
    whole = slopes(20, preset, **layer)
    assert (whole.shape, whole.dtype) == ((20,), np.float64)
    devices = [slopes(20, preset, **layer, heads=slice(start, start + 5)) for start in (0, 5, 10, 15)]
    np.testing.assert_array_equal(np.concatenate(devices), whole)
    np.testing.assert_array_equal(slopes(20, preset, **layer, heads=slice(1, None, 2)), whole[1::2])
    assert slopes(20, preset, **layer, heads=slice(20, 30)).shape == (0,)


def test_each_call_returns_its_own_array():
    slopes(4)[:] = 0
    assert slopes(4)[0] == 0.25


def test_numpy_integers_are_integers():
    numbers = [np.int64(value) for value in (4, 1, 5)]
    np.testing.assert_array_equal(
        slopes(numbers[0], "minimax", layer=numbers[1], num_layers=numbers[2]),
        slopes(4, "minimax", layer=1, num_layers=5),
    )


LAYER = {"layer": 0, "num_layers": 5}


@pytest.mark.parametrize(
    ("num_heads", "preset", "options", "error", "message"),
    [
        (0, "lightning2", {}, ValueError, "num_heads must be 1 or more, but got 0"),
        (4.0, "lightning2", {}, TypeError, "num_heads must be an integer, but got float"),
        (4, "alibaba", {}, ValueError, "preset must be one of lightning2, minimax, .*, but got 'alibaba'"),
        (4, None, {}, ValueError, "preset must be one of .*, but got None"),
        (4, "minimax", {}, ValueError, "preset 'minimax' wants layer and num_layers, but got None and None"),
        (4, "fla", {"layer": 3}, ValueError, "preset 'fla' wants layer and num_layers, but got 3 and None"),
        (4, "ling-hf", {"num_layers": 3}, ValueError, "wants layer and num_layers, but got None and 3"),
        (4, "retnet", LAYER, ValueError, "must be None with preset 'retnet', but got 0 and 5"),
        (4, "lightning2", {"layer": 0}, ValueError, "must be None with preset 'lightning2', but got 0 and None"),
        (4, "minimax", {"layer": 5, "num_layers": 5}, ValueError, "layer must be from 0 to 4, but got 5"),
        (4, "minimax", {"layer": -1, "num_layers": 5}, ValueError, "layer must be from 0 to 4, but got -1"),
        (4, "minimax", {"layer": 0.5, "num_layers": 5}, TypeError, "layer must be an integer, but got float"),
        (4, "minimax", {"layer": 0, "num_layers": 0}, ValueError, "num_layers must be 1 or more, but got 0"),
        (4, "minimax", {**LAYER, "heads": 3}, TypeError, "heads must be a slice, but got int"),
    ],
)
def test_errors(num_heads, preset, options, error, message):
    with pytest.raises(error, match=message):
        slopes(num_heads, preset, **options)
