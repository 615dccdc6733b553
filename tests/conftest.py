"""What all tests share: the table of error bounds, the error itself, and which library is here."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_cupy import _environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where no kernel can run, and say why."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        problem = _environment.cuda_problem() if _environment.gpu_is_present() else "no CUDA GPU"
        for item in marked if problem else ():
            item.add_marker(pytest.mark.skip(reason=problem))


# Relative RMS against float64. Rounding a perfect result alone gives 2.5e-8, 2.1e-4 and 1.66e-3.
BOUNDS = {"float64": 1e-12, "float32": 2e-6, "float16": 4e-4, "bfloat16": 2.5e-3}
HIGH_BOUNDS = BOUNDS | {"float16": 2.3e-4, "bfloat16": 1.8e-3}  # with precision="high"
STATE_BOUNDS = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-3}
# Of gradients of q, k and v; and of those of states and slopes.
GRADIENT_BOUNDS = {"float64": 1e-11, "float32": 4e-6, "float16": 6e-4, "bfloat16": 2.7e-3}
STATE_GRADIENT_BOUNDS = {"float64": 1e-11, "float32": 4e-6, "float16": 2e-3, "bfloat16": 2e-3}

LENGTHS = (1, 63, 64, 65, 1000)


def relative_rms(actual, expected) -> float:
    """``||actual - expected|| / ||expected||`` in float64; NaN anywhere gives NaN, which passes no bound."""
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} against {expected.shape}"
    norm = np.sqrt(np.sum(expected**2))
    return float(np.sqrt(np.sum((actual - expected) ** 2)) / norm) if norm else float(np.abs(actual).max(initial=0))


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers that differ from test to test and repeat from run to run."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
