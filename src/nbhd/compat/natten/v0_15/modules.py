"""The modules of 0.15: those of 0.14.6, and one for three axes."""

from __future__ import annotations

from collections.abc import Sequence

from nbhd.compat.natten.core.layers import EarlyModule
from nbhd.compat.natten.core.tensors import or_default
from nbhd.compat.natten.v0_14 import modules as before
from nbhd.nn.attention import Geometry

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class NeighborhoodAttention1D(before.NeighborhoodAttention1D):
    __doc__ = f"{before.NeighborhoodAttention1D.__doc__}"
    era = "0.15"


class NeighborhoodAttention2D(before.NeighborhoodAttention2D):
    __doc__ = f"{before.NeighborhoodAttention2D.__doc__}"
    era = "0.15"


class NeighborhoodAttention3D(EarlyModule):
    """Three axes, ``[batch, X, Y, Z, dim]``; the first, the depth, may have its own window and dilation.

    A map smaller than the window is padded on every axis. (NATTEN's own padding of the depth fails.)

    Args:
        dim: channels in and out.
        num_heads: attention heads.
        kernel_size: window of the last two axes.
        kernel_size_d: window of the depth; default ``kernel_size``.
        dilation: dilation of the last two axes; None is 1.
        dilation_d: dilation of the depth; default ``dilation``.
        bias: learn a relative position bias (parameter ``rpb``).
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: factor on the scores; default ``head_dim ** -0.5``.
        attn_drop: dropout on the attention.
        proj_drop: dropout on the output.
    """

    axes = 3
    era = "0.15"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        dilation = or_default(dilation, 1)
        window = (or_default(kernel_size_d, kernel_size), kernel_size, kernel_size)
        dilations = (or_default(dilation_d, dilation), dilation, dilation)
        super().__init__(dim, num_heads, window, 1, dilations, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    def _keep_ints(self) -> None:
        self.kernel_size_d, self.kernel_size, _ = self.kernel_size
        self.dilation_d, self.dilation, _ = self.dilation

    def _geometry(self, spatial: Sequence[int]) -> Geometry:
        window = (self.kernel_size_d, self.kernel_size, self.kernel_size)
        return window, self.stride, (self.dilation_d, self.dilation, self.dilation), self.is_causal

    @property
    def window_size_d(self) -> int:
        """Positions that a window spans along the depth."""
        return int(self.kernel_size_d * self.dilation_d)
