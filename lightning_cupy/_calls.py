"""Calls made before: what does not depend on where arrays are is worked out once, and found again.

The first call on arrays like these is checked and resolved in full. What comes of that, a `Call`, is kept under the
call's signature: all of its arguments that the checks and launches depend on, but addresses. The next such call finds
it, and only has to allocate, put pointers in, and launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ._arrays import library_of_type
from ._launch import Program
from .reference import Gradients

Signature = tuple[Any, ...]

_MAX_CALLS = 1024
# By signature; and the latest by the type of its arrays, since to compare takes half as long as to hash and compare.
_calls: dict[Signature | type, tuple[Signature, Any]] = {}

_SLOPES = -1  # where the pointer of slopes is, among those of a call


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A call without the addresses of its arrays, which are of one library on one CUDA device."""

    program: Program  # takes pointers in the order of forward.ARRAYS; its results are o, unless given, and the state
    return_state: bool
    slopes: int  # pointer of slopes that were uploaded, or 0
    # View.reach of `out`, if it is given, and of the inputs, with the index of the pointer that they count from.
    reach_of_out: tuple[int, int] | None
    reaches: tuple[tuple[int, int, int], ...]
    note_write: Callable[[Any], None]
    current_context: Callable[[], int]

    def __call__(self, q: Any, out: Any, pointers: list[int]) -> Any:
        """Run, and return what the public function does."""
        if self.slopes:
            pointers[_SLOPES] = self.slopes
        if self.current_context() == self.program.context:
            results = self.program.run(pointers, q)
        else:
            with self.program.device():
                results = self.program.run(pointers, q)
        if out is not None:
            self.note_write(out)
            results = [out, *results]
        return tuple(results) if self.return_state else results[0]

    def writes_apart(self, pointers: list[int]) -> bool:
        """Whether `out` ends before each input begins or begins after it ends, so that no element can be shared."""
        assert self.reach_of_out is not None
        first, behind = self.reach_of_out
        first, behind = first + pointers[0], behind + pointers[0]
        for idx, low, high in self.reaches:
            if pointers[idx] + low < behind and first < pointers[idx] + high:
                return False
        return True


@dataclasses.dataclass(frozen=True, slots=True)
class BackwardCall:
    """Likewise of a backward pass."""

    program: Program  # takes pointers in the order of backward.ARRAYS
    wanted: tuple[bool, ...]  # of the fields of Gradients
    slopes: int
    current_context: Callable[[], int]

    def __call__(self, q: Any, pointers: list[int]) -> Gradients:
        """Run, and return what the public function does."""
        if self.slopes:
            pointers[_SLOPES] = self.slopes
        if self.current_context() == self.program.context:
            results = self.program.run(pointers, q)
        else:
            with self.program.device():
                results = self.program.run(pointers, q)
        if len(results) == len(self.wanted):
            return Gradients._make(results)
        rest = iter(results)
        return Gradients._make([next(rest) if is_wanted else None for is_wanted in self.wanted])


def look_up(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    slopes: Any,
    scale: Any,
    causal: Any,
    initial_state: Any,
    return_state: Any,
    precision: Any,
    backend: Any,
) -> tuple[Signature | None, list[int], Call | None]:
    """Take a call apart into its signature and its pointers, and return the call that was made with that signature.

    The signature is None for calls that are checked each time: on host arrays, on arrays of several libraries or of
    others than CuPy and torch, and with anything of which a glance does not tell whether it has changed. The call is
    None where there was none, or where `out` may overlap an input at these pointers.
    """
    kind = type(q)
    library = library_of_type(kind)
    if library is None or type(k) is not kind or type(v) is not kind:
        return None, [], None
    if type(causal) is not bool or type(return_state) is not bool:
        return None, [], None
    if type(precision) is not str or type(backend) is not str:
        return None, [], None
    read = library.read
    o_pointer = initial_pointer = slopes_pointer = 0
    try:
        if scale is not None:
            scale = _scale_facts(scale)
        q_facts, q_pointer = read(q)
        k_facts, k_pointer = read(k)
        v_facts, v_pointer = read(v)
        if out is not None:
            if type(out) is not kind:
                return None, [], None
            out, o_pointer = read(out)
        if initial_state is not None:
            if not isinstance(initial_state, kind):  # torch's parameters are read like tensors
                return None, [], None
            initial_state, initial_pointer = read(initial_state)
        if slopes is not None:
            slopes, slopes_pointer = _slope_facts(slopes, kind, read)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return None, [], None  # what cannot be read is for the checks to name
    options = causal, return_state, precision, backend
    signature = kind, q_facts, k_facts, v_facts, out, slopes, scale, initial_state, options
    pointers = [o_pointer, q_pointer, k_pointer, v_pointer, 0, initial_pointer, slopes_pointer]
    found = _calls.get(kind)
    if found is None or found[0] != signature:
        found = _calls.get(signature)
        if found is None:
            return signature, pointers, None
        _calls[kind] = found
    call = found[1]
    if out is not None and not call.writes_apart(pointers):
        return signature, pointers, None
    return signature, pointers, call


def look_up_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    slopes: Any,
    scale: Any,
    causal: Any,
    initial_state: Any,
    dstate: Any,
    wanted: Any,
    backend: Any,
) -> tuple[Signature | None, list[int], BackwardCall | None]:
    """Do what `look_up` does, for a backward pass."""
    kind = type(q)
    library = library_of_type(kind)
    if library is None or type(do) is not kind or type(k) is not kind or type(v) is not kind:
        return None, [], None
    if type(causal) is not bool or type(backend) is not str or (wanted is not None and type(wanted) is not tuple):
        return None, [], None
    read = library.read
    states: list[Any] = []
    state_pointers: list[int] = []
    try:
        if scale is not None:
            scale = _scale_facts(scale)
        do_facts, do_pointer = read(do)
        q_facts, q_pointer = read(q)
        k_facts, k_pointer = read(k)
        v_facts, v_pointer = read(v)
        for state in (initial_state, dstate):
            if state is None:
                states.append(None)
                state_pointers.append(0)
            elif isinstance(state, kind):
                facts, pointer = read(state)
                states.append(facts)
                state_pointers.append(pointer)
            else:
                return None, [], None
        slopes, slopes_pointer = _slope_facts(slopes, kind, read)
        signature = (
            "backward",
            kind,
            do_facts,
            q_facts,
            k_facts,
            v_facts,
            *states,
            slopes,
            scale,
            causal,
            wanted,
            backend,
        )
        pointers = [0, 0, 0, 0, 0, do_pointer, q_pointer, k_pointer, v_pointer, *state_pointers, slopes_pointer]
        found = _calls.get(signature)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return None, [], None  # what cannot be read is for the checks to name
    return signature, pointers, found[1] if found is not None else None


def _scale_facts(scale: Any) -> float:
    # NOTE: types count, since True == 1.0, but is refused; and 0.0 == -0.0, which give zeros of other signs.
    if type(scale) is not float and type(scale) is not int and not isinstance(scale, np.floating):
        raise TypeError
    value = float(scale)
    if value == 0:
        raise ValueError
    return value


def _slope_facts(slopes: Any, kind: type, read: Callable[[Any], tuple[Any, int]]) -> tuple[Any, int]:
    if slopes is None or type(slopes) is float:
        return slopes, 0
    if isinstance(slopes, kind):
        return read(slopes)
    if type(slopes) is int or isinstance(slopes, (np.ndarray, np.generic, list, tuple)):
        # By value, since the caller may change what is in it.
        values = np.asarray(slopes)
        return (values.dtype, values.shape, values.tobytes()), 0
    raise TypeError


def keep(signature: Signature, call: Call | BackwardCall) -> None:
    """Let the next call with this signature find this one; when there are too many, all are forgotten."""
    if len(_calls) >= _MAX_CALLS:
        _calls.clear()
    _calls[signature] = signature, call
    if isinstance(call, Call):
        _calls[signature[0]] = signature, call
