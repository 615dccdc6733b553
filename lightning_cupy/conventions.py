"""Decay rates of published models: a rate for each head, times a factor for each layer."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["slopes"]

Rates = npt.NDArray[np.float64]


def slopes(
    num_heads: int,
    preset: str = "lightning2",
    *,
    layer: int | None = None,
    num_layers: int | None = None,
    heads: slice | None = None,
) -> Rates:
    """Decay rate of each head per token, as a published model has it, for ``lightning_attention(slopes=...)``.

    A slope is the rate of its head h of H times the factor of its layer l of L, both counted from 0:

    ============= ================= ============================= ==============================================
    preset        rate of the head  factor of the layer           as in
    ============= ================= ============================= ==============================================
    "lightning2"  alibi             1                             lightning-attention and LASP of OpenNLPLab
    "minimax"     alibi             1 - l / (L - 1) + 1e-5        MiniMax-01 in vLLM and SGLang
    "minimax-hf"  geometric         1 - l / (L - 1 + 1e-5) + 1e-5 MiniMax-01 in transformers
    "ling-hf"     alibi             1 - (l - 1) / (L - 1) + 1e-5  Ling-2.5 and Ring-2.5 in their own model code
    "ling-sglang" alibi             that of "minimax"             Ling-2.5 and Ring-2.5 in SGLang
    "fla"         8 h / H           1 - l / L                     lightning_attn of flash-linear-attention
    "retnet"      -ln(1 - 2^(-5-h)) 1                             retention of flash-linear-attention
    ============= ================= ============================= ==============================================

    geometric is ``2^(-8 (h + 1) / H)``. alibi (Press et al., arXiv 2108.12409) is the same where H is a power of
    two; otherwise it is alibi of C heads, C the power of two below H, then every other rate of 2 C heads. The
    rate and factor of "fla" are those of TransNormerLLM (arXiv 2307.14995): head 0 never decays. The rate of
    "retnet" is from Sun et al. (arXiv 2307.08621, equation 8). Where a model has one layer, factors that would
    divide by ``L - 1`` are ``1 + 1e-5``.

    Parameters
    ----------
    num_heads : int
        H, the heads of the whole model, also where each device has only some of them.
    preset : str, default "lightning2"
        One of the table.
    layer, num_layers : int, optional
        l and L: for the presets whose factor has them, and only for those.
    heads : slice, optional
        The heads wanted, such as those of one device in a tensor-parallel group; all by default.

    Returns
    -------
    slopes : float64 array, [num_heads], or shorter where `heads` says so
        In full precision; models that keep float32 round them.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong kind or value: the message names the argument, what is wanted and what it got.

    Examples
    --------
    >>> import lightning_cupy
    >>> lightning_cupy.slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    >>> lightning_cupy.slopes(64, "minimax", layer=79, num_layers=80, heads=slice(62, 64))  # the slowest
    array([4.25979583e-08, 3.90625000e-08])
    """
    if not isinstance(preset, str) or preset not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, but got {preset!r}")
    if heads is not None and not isinstance(heads, slice):
        raise TypeError(f"heads must be a slice, but got {type(heads).__name__}")
    rate, factor = _PRESETS[preset]
    rates = rate(_integer("num_heads", num_heads, 1))
    if factor is not None:
        if layer is None or num_layers is None:
            raise ValueError(f"preset {preset!r} wants layer and num_layers, but got {layer} and {num_layers}")
        num_layers = _integer("num_layers", num_layers, 1)
        rates *= factor(_integer("layer", layer, 0, num_layers), num_layers)
    elif layer is not None or num_layers is not None:
        raise ValueError(f"layer and num_layers must be None with preset {preset!r}, but got {layer} and {num_layers}")
    return rates if heads is None else rates[heads].copy()


def _integer(name: str, value: Any, least: int, stop: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, but got {type(value).__name__}") from None
    if number < least or (stop is not None and number >= stop):
        wanted = f"{least} or more" if stop is None else f"from {least} to {stop - 1}"
        raise ValueError(f"{name} must be {wanted}, but got {number}")
    return number


def _geometric(num_heads: int) -> Rates:
    return np.exp2(-8 * np.arange(1, num_heads + 1) / num_heads)


def _alibi(num_heads: int) -> Rates:
    below = 2 ** (num_heads.bit_length() - 1)
    return np.concatenate([_geometric(below), _geometric(2 * below)[::2][: num_heads - below]])


def _transnormer(num_heads: int) -> Rates:
    return 8 * np.arange(num_heads) / num_heads


def _retnet(num_heads: int) -> Rates:
    rates: Rates = -np.log1p(-np.exp2(-5.0 - np.arange(num_heads)))
    return rates


def _minimax(layer: int, num_layers: int) -> float:
    # Where L is 1, so that l is 0, the fraction is 0 and any divisor will do.
    return 1 - layer / max(num_layers - 1, 1) + 1e-5


def _minimax_hf(layer: int, num_layers: int) -> float:
    return 1 - layer / (num_layers - 1 + 1e-5) + 1e-5


def _ling_hf(layer: int, num_layers: int) -> float:
    return 1 - (layer - 1) / (num_layers - 1) + 1e-5 if num_layers > 1 else 1 + 1e-5


def _transnormer_layer(layer: int, num_layers: int) -> float:
    return 1 - layer / num_layers


# The rates of H heads, and the factor of layer l of L; None is the same slopes in all layers.
_PRESETS: dict[str, tuple[Callable[[int], Rates], Callable[[int, int], float] | None]] = {
    "lightning2": (_alibi, None),
    "minimax": (_alibi, _minimax),
    "minimax-hf": (_geometric, _minimax_hf),
    "ling-hf": (_alibi, _ling_hf),
    "ling-sglang": (_alibi, _minimax),
    "fla": (_transnormer, _transnormer_layer),
    "retnet": (_retnet, None),
}
