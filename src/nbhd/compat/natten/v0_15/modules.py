"""The modules of 0.15: those of 0.14.6, and one for three axes."""

from __future__ import annotations

from nbhd.compat.natten.core.layers import Module
from nbhd.compat.natten.v0_14 import modules as before

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class NeighborhoodAttention1D(before.NeighborhoodAttention1D):
    __doc__ = f"{before.NeighborhoodAttention1D.__doc__}"
    era = "0.15"


class NeighborhoodAttention2D(before.NeighborhoodAttention2D):
    __doc__ = f"{before.NeighborhoodAttention2D.__doc__}"
    era = "0.15"


class NeighborhoodAttention3D(Module):
    """Three axes, ``[batch, X, Y, Z, dim]``; the first, the depth, may have its own window and dilation.

    A map smaller than the window is padded on every axis. (NATTEN's own padding of the depth fails.)

    Args:
        dim: channels in and out.
        num_heads: attention heads.
        kernel_size: window of the last two axes.
        kernel_size_d: window of the depth; default ``kernel_size``.
        dilation: dilation of the last two axes.
        dilation_d: dilation of the depth; default ``dilation``.
        bias: learn a relative position bias (parameter ``rpb``).
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: factor on the scores; default ``head_dim ** -0.5``.
        attn_drop: dropout on the attention.
        proj_drop: dropout on the output.
    """

    axes = 3
    era = "0.15"
    pad_small_inputs = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        window = (kernel_size if kernel_size_d is None else kernel_size_d, kernel_size, kernel_size)
        dilations = (dilation if dilation_d is None else dilation_d, dilation, dilation)
        super().__init__(dim, num_heads, window, 1, dilations, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop)
