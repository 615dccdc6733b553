"""Lightning Attention in plain NumPy: the definition that the tests trust, and the path of a CPU.

Three forms of one function, for one head::

    recurrent   S_t = exp(-slope) S_{t-1} + k_t v_t^T,   o_t = scale q_t^T S_t
    quadratic   o = scale ((q k^T * M) v + D q S_0),     M_ij = exp(-slope (i - j)) for i >= j, else 0
    chunked     the quadratic form inside a chunk of tokens, the recurrent one from chunk to chunk

The chunked form is the tiling of Lightning Attention-2 (arXiv 2401.04658, algorithm 1, equations 4 to 10):
time O(n (K V + chunk (K + V))) a head, and working memory that does not depend on n. Exponents only count
tokens back in time, so with slopes >= 0 no exponential exceeds 1, whatever the slope and the length.

Gradients, with ``G_t = scale q_t do_t^T + exp(-slope) G_(t+1)`` that of S_t::

    dq_t = scale S_t do_t,   dk_t = G_t v_t,   dv_t = G_t^T k_t,   dinitial_state = exp(-slope) G_1
    dslope = - sum over t of exp(-slope) <G_t, S_(t-1)>

so that dq, dk and dv are functions of the same form, dk and dv from the last token to the first.

More than 500 lines, as what the tests trust is one file without imports of its own, half of it what each form takes.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Gradients", "chunked", "chunked_backward", "quadratic", "recurrent", "recurrent_backward"]

Array = npt.NDArray[Any]
Slopes = float | Sequence[float] | Array | None

_DTYPES = ("float16", "bfloat16", "float32", "float64")

# OpenBLAS keeps a product of fewer multiply-adds on the calling thread. Larger ones it shares among all cores
# under one lock, where threads that each have their own heads wait for one another.
_SHARED_PRODUCT = 2**19
_TILES = 16  # chunks of all its heads that a thread has in hand: fewer cost interpreter time, more the cache


class Gradients(NamedTuple):
    """Gradients with respect to what goes into lightning attention; None for one that was not wanted.

    Attributes
    ----------
    dq, dk, dv : array
        In the shapes and the dtype of q, k and v.
    dinitial_state : array, (batch, heads, K, V) without the leading axes that q lacks
        In float32, or float64 for float64 inputs.
    dslopes : array, (heads,)
        Summed over the batch, in the dtype of dinitial_state.
    """

    dq: Any
    dk: Any
    dv: Any
    dinitial_state: Any
    dslopes: Any


def recurrent(
    q: Array,
    k: Array,
    v: Array,
    *,
    slopes: Slopes = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    dtype: npt.DTypeLike | None = None,
) -> tuple[Array, Array]:
    """The definition, token by token: ``S = exp(-slope) S + k v^T``, then ``o = scale q^T S``.

    In float32 a slope below 3e-8 is no decay at all here, for ``exp(-slope)`` rounds to 1: ask for float64.

    Parameters
    ----------
    q, k : array, (n, K), (n, heads, K) or (batch, n, heads, K)
        Queries and keys in float16, bfloat16 (of ml_dtypes), float32 or float64, with any strides.
    v : array, as k but with its own last axis V
        Values.
    slopes : float, or array or sequence of [heads] floats, optional
        Decay rate of each head per token; negative ones grow. None is no decay.
    scale : float, optional
        Factor of the outputs, but not of the state; ``1 / sqrt(K)`` by default.
    causal : bool, default True
        Without it every token sees all: ``o = scale q (initial_state + k^T v)``, with no slopes.
    initial_state : array, (batch, heads, K, V) without the leading axes that q lacks, optional
        State before the first token; zeros by default. Not modified.
    dtype : dtype, optional
        Of the computation and of both results. By default computation and state are in float32 (float64 for
        float64 inputs), and o has q's dtype.

    Returns
    -------
    o : array, shape of v
    state : array, (batch, heads, K, V) without the leading axes that q lacks

    Raises
    ------
    TypeError
        For inputs that are no NumPy arrays of one floating-point dtype.
    ValueError
        For slopes other than 0 with ``causal=False``, and for shapes that do not fit together.
    """
    x = _problem(q, k, v, slopes, scale, causal, initial_state, dtype)
    o, outputs = _outputs(q, v, dtype)
    state = x.state
    queries, keys, values = (array.astype(state.dtype, copy=False) for array in (x.q, x.k, x.v))
    decay = _decay(x.slopes, 1)[:, None, None].astype(state.dtype)
    for t in range(queries.shape[2]):
        state = _times(state, decay)
        state += keys[:, :, t, :, None] * values[:, :, t, None, :]
        if causal:
            outputs[:, :, t] = (x.scale * (queries[:, :, t, None, :] @ state))[:, :, 0]
    if not causal:
        outputs[...] = x.scale * (queries @ state)
    return o, _as_leading_axes_of(q, state)


def recurrent_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    slopes: Slopes = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    dstate: Array | None = None,
    dtype: npt.DTypeLike | None = None,
) -> Gradients:
    """All gradients of `recurrent`, token by token; the states of all tokens are in memory.

    Parameters
    ----------
    do : array, shape of v
        Gradient of o.
    q, k, v, slopes, scale, causal, initial_state
        As of `recurrent`.
    dstate : array, shape of the state, optional
        Gradient of the state behind the last token; zeros by default.
    dtype : dtype, optional
        Of the computation and of all results; by default as of `recurrent`.

    Returns
    -------
    gradients : Gradients
        dslopes is None with ``causal=False``.

    Raises
    ------
    TypeError, ValueError
        As `recurrent` does.
    """
    x = _problem(q, k, v, slopes, scale, causal, initial_state, dtype)
    gradient = _state_gradient(x, do, q, v, dstate)
    queries, keys, values, grads = (array.astype(gradient.dtype) for array in (x.q, x.k, x.v, _by_head(do)))
    (dq, by_head_dq), (dk, by_head_dk), (dv, by_head_dv) = (_outputs(q, like, dtype) for like in (q, k, v))
    if not causal:
        state = x.state + keys.swapaxes(-1, -2) @ values
        gradient += x.scale * queries.swapaxes(-1, -2) @ grads
        by_head_dq[...] = x.scale * grads @ state.swapaxes(-1, -2)
        by_head_dk[...] = values @ gradient.swapaxes(-1, -2)
        by_head_dv[...] = keys @ gradient
        return Gradients(dq, dk, dv, _as_leading_axes_of(q, gradient), None)

    decay = _decay(x.slopes, 1)[:, None, None].astype(gradient.dtype)
    states = [x.state]
    for t in range(queries.shape[2]):
        states.append(_times(states[t], decay) + keys[:, :, t, :, None] * values[:, :, t, None, :])
    dslopes = np.zeros(len(x.slopes))
    for t in reversed(range(queries.shape[2])):
        gradient += x.scale * queries[:, :, t, :, None] * grads[:, :, t, None, :]
        by_head_dq[:, :, t] = x.scale * (states[t + 1] @ grads[:, :, t, :, None])[..., 0]
        by_head_dk[:, :, t] = (gradient @ values[:, :, t, :, None])[..., 0]
        by_head_dv[:, :, t] = (keys[:, :, t, None, :] @ gradient)[:, :, 0]
        gradient = _times(gradient, decay)
        dslopes -= np.sum(_times(states[t], gradient), (0, 2, 3), np.float64)
    return Gradients(dq, dk, dv, _as_leading_axes_of(q, gradient), dslopes.astype(gradient.dtype))


def quadratic(
    q: Array,
    k: Array,
    v: Array,
    *,
    slopes: Slopes = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    dtype: npt.DTypeLike | None = None,
) -> tuple[Array, Array]:
    """The closed form ``scale ((q k^T * M) v + D q initial_state)``, in O(n^2) time and memory a head.

    ``M_ij = exp(-slope (i - j))`` for ``i >= j``, else 0, and ``D_ii = exp(-slope (i + 1))``, counting tokens
    from 0: arXiv 2401.04658, equation 3 with a state before the first token. With ``causal=False`` M and D
    are all ones.

    Parameters, results and errors are those of `recurrent`.
    """
    x = _problem(q, k, v, slopes, scale, causal, initial_state, dtype)
    o, outputs = _outputs(q, v, dtype)
    compute = x.state.dtype
    queries, keys, values = (array.astype(compute, copy=False) for array in (x.q, x.k, x.v))
    position = np.arange(queries.shape[2])
    mask = _decay(x.slopes, np.maximum(position[:, None] - position, 0))  # [heads, n, n]
    if causal:
        mask = np.tril(mask)
    query_decay = _decay(x.slopes, position + 1)[..., None].astype(compute)  # [heads, n, 1]
    key_decay = _decay(x.slopes, position[::-1])[..., None].astype(compute)
    state_decay = _decay(x.slopes, len(position))[:, None, None].astype(compute)
    scores = (queries @ keys.swapaxes(-1, -2)) * mask.astype(compute)
    outputs[...] = x.scale * (scores @ values + query_decay * (queries @ x.state))
    state = state_decay * x.state + (key_decay * keys).swapaxes(-1, -2) @ values
    return o, _as_leading_axes_of(q, state)


def chunked(
    q: Array,
    k: Array,
    v: Array,
    out: Array | None = None,
    *,
    slopes: Slopes = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    chunk: int = 64,
    dtype: npt.DTypeLike | None = None,
) -> tuple[Array, Array]:
    """The quadratic form inside a chunk of tokens, the recurrent one from chunk to chunk.

    Batch rows and heads are spread over the cores, and inputs are converted some chunks at a time. A NaN or an
    infinity in the inputs reaches its own chunk and the tokens after it, never another head or batch row.

    Parameters
    ----------
    q, k, v, slopes, scale, causal, initial_state, dtype
        As of `recurrent`: q and k ``(batch, n, heads, K)``, v ``(batch, n, heads, V)``, or all without batch, or
        without batch and heads.
    out : array, shape of v, optional
        Where o is written, and then returned; with any strides, but apart from the inputs in memory.
    chunk : int, default 64
        Tokens in a chunk, 1 or more. Results differ by rounding only.

    Returns
    -------
    o : array, shape of v
        In q's dtype, or in `dtype`; `out` itself where it was given.
    state : array, (batch, heads, K, V) without the leading axes that q lacks
        In float32 (float64 for float64 inputs), or in `dtype`.

    Raises
    ------
    TypeError, ValueError
        As `recurrent` does, and for an `out` of another shape or a chunk below 1.
    """
    x = _problem(q, k, v, slopes, scale, causal, initial_state, dtype)
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, but got {chunk}")
    if out is not None and out.shape != v.shape:
        raise ValueError(f"out must have v's shape {v.shape}, but got {out.shape}")
    o, outputs = _outputs(q, v, dtype) if out is None else (out, _by_head(out))
    _attend(x, outputs, causal, chunk)
    return o, _as_leading_axes_of(q, x.state)


def chunked_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    slopes: Slopes = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Array | None = None,
    dstate: Array | None = None,
    wanted: Collection[str] = Gradients._fields,
    chunk: int = 64,
    dtype: npt.DTypeLike | None = None,
) -> Gradients:
    """Gradients of `chunked`, likewise some chunks at a time, on all cores.

    Parameters
    ----------
    do, q, k, v, slopes, scale, causal, initial_state, dstate, dtype
        As of `recurrent_backward`.
    wanted : collection of str
        Fields of the result to compute; the rest is None. By default all, but dslopes with ``causal=False``.
    chunk : int, default 64
        Tokens in a chunk, 1 or more. Results differ by rounding only.

    Returns
    -------
    gradients : Gradients

    Raises
    ------
    TypeError, ValueError
        As `recurrent_backward` does, and for a chunk below 1 or other names in `wanted`.
    """
    x = _problem(q, k, v, slopes, scale, causal, initial_state, dtype)
    gradient = _state_gradient(x, do, q, v, dstate)
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, but got {chunk}")
    for name in wanted:
        if name not in Gradients._fields:
            raise ValueError(f"wanted must be names out of {', '.join(Gradients._fields)}, but got {name!r}")
    grads = _by_head(do)
    found: dict[str, Array] = {}
    if "dslopes" in wanted and causal:
        found["dslopes"] = _slope_gradients(x, grads, gradient, chunk).astype(gradient.dtype)
    if "dq" in wanted:
        found["dq"], outputs = _outputs(q, q, dtype)
        state = x.state.swapaxes(-1, -2).copy()
        _attend(x._replace(q=grads, k=x.v, v=x.k, state=state), outputs, causal, chunk)
    # From the last token to the first.
    queries, keys, values, grads = (array[:, :, ::-1] for array in (x.q, x.k, x.v, grads))
    if "dk" in wanted:
        found["dk"], outputs = _outputs(q, k, dtype)
        state = gradient.swapaxes(-1, -2).copy()
        flipped = x._replace(q=values, k=grads, v=queries, state=state, in_reverse=True)
        _attend(flipped, outputs[:, :, ::-1], causal, chunk)
    if "dv" in wanted or "dinitial_state" in wanted:
        dv, outputs = _outputs(q, v, dtype)
        flipped = x._replace(q=keys, k=queries, v=grads, state=gradient, in_reverse=True)
        _attend(flipped, outputs[:, :, ::-1], causal, chunk)
        found |= {"dv": dv, "dinitial_state": _as_leading_axes_of(q, gradient)}
    return Gradients(*(found[name] if name in found and name in wanted else None for name in Gradients._fields))


class _Problem(NamedTuple):
    """Arguments in one shape: views of the inputs, and a state of our own."""

    q: Array  # [batch, heads, n, K], as k
    k: Array
    v: Array  # [batch, heads, n, V]
    state: Array  # [batch, heads, K, V] in the dtype of the computation
    slopes: Array  # [heads], float64
    scale: float
    # Whether tokens are flipped, for gradients. What a token hands on is then a state that has scale and its own decay
    # in it already, so that gradients of states go in and come out as they are.
    in_reverse: bool = False


def _problem(
    q: Array,
    k: Array,
    v: Array,
    slopes: Slopes,
    scale: float | None,
    causal: bool,
    initial_state: Array | None,
    dtype: npt.DTypeLike | None,
) -> _Problem:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not isinstance(array, np.ndarray) or array.dtype.name not in _DTYPES or array.dtype != q.dtype:
            got = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"{name} must be a NumPy array in q's dtype, one of {', '.join(_DTYPES)}, but got {got}")
    if q.ndim not in (2, 3, 4) or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            "q, k and v must be (n, d), (n, heads, d) or (batch, n, heads, d), alike but for v's d, "
            f"but have shapes {q.shape}, {k.shape} and {v.shape}"
        )
    queries, keys, values = map(_by_head, (q, k, v))
    batch, heads, _, key_dim = queries.shape
    rates = np.asarray(0 if slopes is None else slopes, np.float64)
    if rates.shape not in ((), (heads,)):
        raise ValueError(f"slopes must be one number or have shape {(heads,)}, but got {rates.shape}")
    rates = np.broadcast_to(rates, heads)
    if not causal and rates.any():
        raise ValueError(f"slopes must be None with causal=False, but got {slopes}")
    if dtype is None:
        dtype = np.float64 if q.dtype == np.float64 else np.float32
    state = np.zeros((batch, heads, key_dim, values.shape[-1]), dtype)
    if initial_state is not None:
        view = _as_leading_axes_of(q, state)
        if initial_state.shape != view.shape:
            raise ValueError(f"initial_state must have shape {view.shape}, but got {initial_state.shape}")
        view[...] = initial_state
    return _Problem(queries, keys, values, state, rates, key_dim**-0.5 if scale is None else float(scale))


def _state_gradient(x: _Problem, do: Array, q: Array, v: Array, dstate: Array | None) -> Array:
    """Check the gradients that a backward pass is given; return dstate, of our own, as [batch, heads, K, V]."""
    if not isinstance(do, np.ndarray) or do.dtype != q.dtype:
        got = getattr(do, "dtype", type(do).__name__)
        raise TypeError(f"do must be a NumPy array in q's dtype, {q.dtype}, but got {got}")
    if do.shape != v.shape:
        raise ValueError(f"do must have v's shape {v.shape}, but got {do.shape}")
    gradient = np.zeros_like(x.state)
    if dstate is not None:
        view = _as_leading_axes_of(q, gradient)
        if dstate.shape != view.shape:
            raise ValueError(f"dstate must have shape {view.shape}, but got {dstate.shape}")
        view[...] = dstate
    return gradient


def _by_head(array: Array) -> Array:
    """View (n, d), (n, heads, d) or (batch, n, heads, d) as [batch, heads, n, d]."""
    view: Array = array[{2: np.s_[None, :, None], 3: np.s_[None], 4: np.s_[...]}[array.ndim]].swapaxes(1, 2)
    return view


def _as_leading_axes_of(q: Array, state: Array) -> Array:
    """View [batch, heads, K, V] without the leading axes that q lacks."""
    view: Array = state[(0,) * (4 - q.ndim)]
    return view


def _outputs(q: Array, v: Array, dtype: npt.DTypeLike | None) -> tuple[Array, Array]:
    """Return an uninitialised o, and its view [batch, heads, n, V]."""
    o = np.empty(v.shape, q.dtype if dtype is None else dtype)
    return o, _by_head(o)


def _decay(slopes: Array, tokens: int | Array) -> Array:
    """``exp(-slope tokens)`` in float64, of shape [heads, *tokens.shape]."""
    decay: Array = np.exp(np.multiply.outer(-slopes, tokens))
    return decay


def _times(state: Array, factor: Array) -> Array:
    """Return ``state * factor`` with no 0 * inf, where decays overflow before a growing state has begun."""
    product: Array = np.multiply(state, factor, out=np.zeros_like(state), where=state != 0)
    return product


def _chunk_decays(x: _Problem, chunk: int) -> tuple[Array, Array, Array]:
    """Factors of scores, q and k in a chunk: [heads, 1, chunk, chunk] and twice [heads, 1, chunk, 1]."""
    position = np.arange(chunk)
    mask = np.tril(_decay(x.slopes, np.maximum(position[:, None] - position, 0)))
    tokens = (position, position[::-1] + 1) if x.in_reverse else (position + 1, position[::-1])
    query_decay, key_decay = (_decay(x.slopes, count)[:, None, :, None] for count in tokens)
    query_scale, key_scale = (1, x.scale) if x.in_reverse else (x.scale, 1)
    return x.scale * mask[:, None], query_scale * query_decay, key_scale * key_decay


def _attend(x: _Problem, outputs: Array, causal: bool, chunk: int) -> None:
    """Write the outputs [batch, heads, n, V] and advance the state, parts of the heads on each core."""
    run = _causal if causal else _bidirectional
    size = max(1, min(chunk, x.q.shape[2]))
    _for_parts(x, chunk, lambda part, inputs: run(inputs, outputs[part], size))


def _for_parts(x: _Problem, chunk: int, run: Callable[[tuple[slice, slice], _Problem], None]) -> None:
    """Call for parts of batch and heads, on all cores: one for each, or more where one had more than _TILES heads."""
    batch, heads, n, _ = x.q.shape
    threads = _num_cores() if n > chunk else 1
    share = min(math.ceil(batch * heads / threads), _TILES)
    part_heads = max(1, min(heads, share))
    part_batch = max(1, share // part_heads)
    parts = list(itertools.product(_slices(batch, part_batch), _slices(heads, part_heads)))

    def run_part(part: tuple[slice, slice]) -> None:
        _, h = part
        # As on a GPU, what becomes of infinities is not reported. Threads do not have the caller's errstate anyway.
        with np.errstate(all="ignore"):
            run(part, x._replace(q=x.q[part], k=x.k[part], v=x.v[part], state=x.state[part], slopes=x.slopes[h]))

    if len(parts) > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run_part, parts))
    else:
        for part in parts:
            run_part(part)


def _slope_gradients(x: _Problem, grads: Array, dstate: Array, chunk: int) -> Array:
    """Return [heads], computed in float64: one number of a head is often a small sum of large ones.

    Pairs of tokens count as many times as they are apart: in a chunk directly; with those in front of it by the state,
    and by the state whose terms are multiplied by their ages. No weight is the difference of large ones, in which heads
    that forget fast would lose all digits.
    """
    batch, heads, n, _ = x.q.shape
    totals = np.zeros((batch, heads))
    position = np.arange(max(1, min(chunk, n)))
    distance = np.tril(position[:, None] - position)

    def dot(state: Array, other: Array) -> Array:
        sums: Array = np.sum(_times(state, other), (-1, -2))
        return sums

    def run(part: tuple[slice, slice], x: _Problem) -> None:
        state, aged = x.state.astype(np.float64), np.zeros_like(x.state, np.float64)
        weights = x.scale * distance * _decay(x.slopes, distance)
        for tokens in _slices(n, len(position)):
            q, k, v, do = (array[:, :, tokens].astype(np.float64) for array in (x.q, x.k, x.v, grads[part]))
            size = q.shape[2]
            past, age = position[:size, None] + 1, position[:size][::-1, None]
            query_decay, key_decay = x.scale * _decay(x.slopes, past), _decay(x.slopes, age)
            pairs = _product(q, k.swapaxes(-1, -2)) * _product(do, v.swapaxes(-1, -2))
            found = np.sum(pairs * weights[:, :size, :size], (-1, -2))
            found += dot(aged, _product((query_decay * q).swapaxes(-1, -2), do))
            found += dot(state, _product((past * query_decay * q).swapaxes(-1, -2), do))
            totals[part] += found
            decay = _decay(x.slopes, size)[:, None, None]
            k *= key_decay
            aged += size * state
            _advance(aged, decay, _product((age * k).swapaxes(-1, -2), v), aged)
            _advance(state, decay, _product(k.swapaxes(-1, -2), v), state)
        totals[part] += dot(aged, dstate[part])

    _for_parts(x, chunk, run)
    return np.asarray(0 - np.sum(totals, 0))


def _causal(x: _Problem, o: Array, chunk: int) -> None:
    """Write o and advance the state, some chunks at a time: ``o = [scores | q] [v ; state]`` is one product."""
    batch, heads, n, key_dim = x.q.shape
    value_dim, dtype = x.v.shape[-1], x.state.dtype
    mask, query_decay, key_decay = (array.astype(dtype) for array in _chunk_decays(x, chunk))
    overflows = np.isinf(query_decay).any()
    tiles = (batch, heads, max(1, min(_TILES // (batch * heads), n // chunk)))
    left = np.empty((*tiles, chunk, chunk + key_dim), dtype)
    right = np.empty((*tiles, chunk + key_dim, value_dim), dtype)
    all_keys = np.empty((*tiles, chunk, key_dim), dtype)
    all_updates = np.empty((*tiles, key_dim, value_dim), dtype)
    all_results = np.empty((*tiles, chunk, value_dim), dtype)

    states = right[:, :, :, chunk:]  # before each chunk
    states[:, :, 0] = x.state
    start = 0
    while start < n:
        size = min(chunk, n - start)  # the last chunk may be short, and is then alone
        count = min(tiles[-1], (n - start) // size)
        tokens = slice(start, start + count * size)
        start = tokens.stop
        q, k, v, results = (
            array[:, :, tokens].reshape(batch, heads, count, size, array.shape[-1]) for array in (x.q, x.k, x.v, o)
        )
        weights, inputs = left[:, :, :count, :size, chunk - size :], right[:, :, :count, chunk - size :]
        scores, queries, values = weights[..., :size], weights[..., size:], inputs[..., :size, :]
        keys, updates = all_keys[:, :, :count, :size], all_updates[:, :, :count]
        queries[...], keys[...], values[...] = q, k, v

        _matmul(queries, keys.swapaxes(-1, -2), scores)
        scores *= mask[..., :size, :size]
        queries *= query_decay[..., :size, :]
        keys *= key_decay[..., chunk - size :, :]
        _matmul(keys.swapaxes(-1, -2), values, updates)
        decay = _decay(x.slopes, size)[:, None, None]
        for i in range(count - 1):
            _advance(states[:, :, i], decay, updates[:, :, i], states[:, :, i + 1])
        if overflows:
            queries[~states[:, :, :count].any((-1, -2))] = 0  # no 0 * inf before a growing state has begun
        _matmul(weights, inputs, all_results[:, :, :count, :size])
        results[...] = all_results[:, :, :count, :size]
        _advance(states[:, :, count - 1], decay, updates[:, :, count - 1], states[:, :, 0])
    x.state[...] = states[:, :, 0]


def _advance(state: Array, decay: Array, update: Array, out: Array) -> None:
    """Write ``decay * state + update``, with decay in float64; the update is overwritten.

    A decay near 1 is applied as ``state + (decay - 1) * state``. As a factor in float32 it is off by up to 3e-8
    at every chunk, in the same direction, which is 4e-6 after 16,384 tokens.
    """
    factor = decay.astype(state.dtype)
    overflows = np.isinf(factor)
    by_parts = (decay > 0.9) & ~overflows
    rest = np.where(by_parts, decay - 1, 0)
    factor[by_parts] = 1
    if rest.any():
        update += rest.astype(state.dtype) * state
    if overflows.any():
        factor = np.where(state == 0, 0, factor)  # no 0 * inf
    np.multiply(state, factor, out=out)
    out += update


def _bidirectional(x: _Problem, o: Array, chunk: int) -> None:
    """Add all keys and values to the state, then write o, some chunks at a time."""
    batch, heads, n, _ = x.q.shape
    dtype = x.state.dtype
    blocks = _slices(n, chunk * max(1, _TILES // (batch * heads)))
    update = np.empty_like(x.state)
    for tokens in blocks:
        k, v = (np.ascontiguousarray(array[:, :, tokens], dtype) for array in (x.k, x.v))
        _matmul(k.swapaxes(-1, -2), v, update)
        if x.in_reverse:
            update *= x.scale
        np.add(x.state, update, out=x.state)
    for tokens in blocks:
        q = np.ascontiguousarray(x.q[:, :, tokens], dtype)
        results = np.empty((*q.shape[:-1], x.v.shape[-1]), dtype)
        _matmul(q, x.state, results)
        o[:, :, tokens] = results if x.in_reverse else np.multiply(results, x.scale, out=results)


def _product(a: Array, b: Array) -> Array:
    """Return ``a @ b`` of stacked matrices, on the calling thread."""
    out = np.empty((*a.shape[:-1], b.shape[-1]), a.dtype)
    _matmul(a, b, out)
    return out


def _matmul(a: Array, b: Array, out: Array) -> None:
    """``np.matmul(a, b, out)`` of stacked matrices, in products that stay on the calling thread."""
    rows, (inner, columns) = a.shape[-2], b.shape[-2:]
    while rows * inner * columns >= _SHARED_PRODUCT and max(rows, columns) > 16:
        rows, columns = (math.ceil(rows / 2), columns) if rows > columns else (rows, math.ceil(columns / 2))
    for m in _slices(a.shape[-2], rows):
        for n in _slices(b.shape[-1], columns):
            np.matmul(a[..., m, :], b[..., n], out=out[..., m, n])


def _slices(stop: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, stop)) for start in range(0, stop, step)]


def _num_cores() -> int:
    """Cores that this process may use; 32 at most, as threads of Python share one interpreter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 32)
