"""Lightning Attention as CuPy raw kernels, for NumPy, CuPy and torch arrays."""

from . import reference
from ._warmup import warmup
from .api import lightning_attention, lightning_attention_backward
from .conventions import slopes

__all__ = ["lightning_attention", "lightning_attention_backward", "reference", "slopes", "warmup"]
__version__ = "0.1.0"
