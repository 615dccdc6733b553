"""A layer of lightning attention for torch models."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch

from . import api, conventions


class LightningAttention(torch.nn.Module):
    """Multi-head lightning attention with projections, activation, output norm and gate.

    With the defaults, the layer of MiniMax-01 (arXiv 2501.08313), as transformers has it::

        q, k, v = silu(x W_qkv)                              of each head: q, then k, then v
        y = lightning_attention(q, k, v, slopes)             with scale 1
        output = (rms_norm(y) * sigmoid(x W_gate)) W_out

    and with ``norm="layer", gate_rank=head_dim`` that of TransNormerLLM (arXiv 2307.14995), whose norm is that of all
    heads together, and whose gate is of low rank.

    Parameters
    ----------
    embed_dim : int
        Features of the input and of the output.
    num_heads : int
    head_dim : int, optional
        Of q, k and v, up to 256; ``embed_dim / num_heads`` by default.
    slopes : str, default "minimax"
        A preset of :func:`lightning_cupy.slopes`.
    layer, num_layers : int, default 0 and 1
        Which layer of the model this is, for the presets that decay less from layer to layer.
    trainable_slopes : bool, default False
        Whether the slopes are a parameter. They start at the preset.
    activation : {"silu", "identity"}, default "silu"
        Of q, k and v.
    norm : {"rms", "layer", "none"}, default "rms"
        Of the outputs of all heads.
    gate_rank : int, optional
        Of the product of matrices that the gate then is; by default it is one matrix. 0 is no gate.
    scale : float, default 1.0
        Factor of q k^T. None is ``1 / sqrt(head_dim)``.
    bias : bool, default False
        Of all projections.
    eps : float, default 1e-6
        Of the norm.
    device, dtype
        Of the parameters, as of torch's modules. Slopes are float32.

    Attributes
    ----------
    slopes : Tensor, ``[num_heads]``
        A buffer, or a parameter.

    Examples
    --------
    >>> import torch
    >>> from lightning_cupy.torch import LightningAttention
    >>> layer = LightningAttention(64, num_heads=4)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    slopes: torch.Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        slopes: str = "minimax",
        layer: int = 0,
        num_layers: int = 1,
        trainable_slopes: bool = False,
        activation: Literal["silu", "identity"] = "silu",
        norm: Literal["rms", "layer", "none"] = "rms",
        gate_rank: int | None = None,
        scale: float | None = 1.0,
        bias: bool = False,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if operator.index(size) < 1:
                raise ValueError(f"{name} must be 1 or more, but got {size}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim must be a multiple of num_heads {num_heads}, but got {embed_dim}")
            head_dim = embed_dim // num_heads
        if not 1 <= operator.index(head_dim) <= api.MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be from 1 to {api.MAX_HEAD_DIM}, but got {head_dim}")
        if activation not in ("silu", "identity"):
            raise ValueError(f"activation must be 'silu' or 'identity', but got {activation!r}")
        if norm not in ("rms", "layer", "none"):
            raise ValueError(f"norm must be 'rms', 'layer' or 'none', but got {norm!r}")
        if gate_rank is not None and operator.index(gate_rank) < 0:
            raise ValueError(f"gate_rank must be 0 or more, but got {gate_rank}")
        self.embed_dim, self.num_heads, self.head_dim, self.scale = embed_dim, num_heads, head_dim, scale
        self.preset, self.activation = slopes, activation

        width = num_heads * head_dim
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.qkv = torch.nn.Linear(embed_dim, 3 * width, **options)
        self.out = torch.nn.Linear(width, embed_dim, **options)
        self.norm: torch.nn.Module = torch.nn.Identity()
        if norm == "rms":
            self.norm = torch.nn.RMSNorm(width, eps=eps, device=device, dtype=dtype)
        elif norm == "layer":
            self.norm = torch.nn.LayerNorm(width, eps=eps, device=device, dtype=dtype)
        self.gate: torch.nn.Module | None = None
        if gate_rank is None:
            self.gate = torch.nn.Linear(embed_dim, width, **options)
        elif gate_rank > 0:
            self.gate = torch.nn.Sequential(
                torch.nn.Linear(embed_dim, gate_rank, **options), torch.nn.Linear(gate_rank, width, **options)
            )
        of_layer: dict[str, Any] = (
            {} if slopes in ("lightning2", "retnet") else {"layer": layer, "num_layers": num_layers}
        )
        rates = torch.as_tensor(conventions.slopes(num_heads, slopes, **of_layer), dtype=torch.float32, device=device)
        if trainable_slopes:
            self.slopes = torch.nn.Parameter(rates)
        else:
            self.register_buffer("slopes", rates, persistent=False)

    def forward(
        self, x: torch.Tensor, initial_state: torch.Tensor | None = None, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Parameters
        ----------
        x : Tensor, ``[batch, seqlen, embed_dim]`` or ``[seqlen, embed_dim]``
        initial_state : Tensor, ``[batch, num_heads, head_dim, head_dim]`` without the batch that x lacks, optional
            What `return_state` gave for the tokens before; float32 (float64 for float64 parameters).
        return_state : bool, default False
            Whether to return the state behind the last token too.

        Returns
        -------
        output : Tensor, shape of x
        state : Tensor
            With ``return_state=True``.
        """
        qkv = self.qkv(x)
        if self.activation == "silu":
            qkv = torch.nn.functional.silu(qkv)
        q, k, v = qkv.unflatten(-1, (self.num_heads, 3 * self.head_dim)).split(self.head_dim, -1)
        y, state = api.lightning_attention(
            q, k, v, slopes=self.slopes, scale=self.scale, initial_state=initial_state, return_state=True
        )
        y = self.norm(y.flatten(-2))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        output: torch.Tensor = self.out(y)
        return (output, state) if return_state else output

    def _apply(self, fn: Any, recurse: bool = True) -> LightningAttention:
        # NOTE: `.to(torch.bfloat16)` and the like keep slopes: 16 bits would change how far heads look back.
        before = self.slopes.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.slopes.dtype.itemsize < before.dtype.itemsize:
            self.slopes.data = before.to(self.slopes.device)
        return self

    def extra_repr(self) -> str:
        """Return what torch shows between the brackets."""
        slopes = ", trainable" if isinstance(self.slopes, torch.nn.Parameter) else ""
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, slopes={self.preset!r}{slopes}, "
            f"activation={self.activation!r}, scale={self.scale}"
        )
