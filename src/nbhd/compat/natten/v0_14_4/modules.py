"""The modules up to 0.14.4: a bias always, dilation last and possibly chosen per call."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from nbhd.compat.natten.core.layers import Module

__all__ = ["NeighborhoodAttention", "NeighborhoodAttention1D", "NeighborhoodAttention2D"]


class _Module(Module):
    """As :class:`nbhd.nn.NeighborhoodAttention2D`, with a bias, small maps padded.

    Args:
        dim: channels in and out.
        kernel_size: window.
        num_heads: attention heads.
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: factor on the scores; default ``head_dim ** -0.5``.
        attn_drop: dropout on the attention.
        proj_drop: dropout on the output.
        dilation: None is 1; a string means the largest that fits the map, call by call.
    """

    era = "up to 0.14.4"
    pad_small_inputs = True

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dilation: int | str | None = None,
    ) -> None:
        fixed = 1 if dilation is None or isinstance(dilation, str) else dilation
        super().__init__(dim, num_heads, kernel_size, 1, fixed, False, True, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.dilation_follows_input = isinstance(dilation, str)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, *spatial, dim]`` to the same shape."""
        if self.dilation_follows_input and isinstance(x, Tensor) and x.ndim == self.axes + 2:
            self.dilation = (max(min(x.shape[1:-1]) // self.kernel_size[0], 1),) * self.axes
        return super().forward(x)


class NeighborhoodAttention1D(_Module):
    __doc__ = f"One axis, ``[batch, X, dim]``.\n\n    {_Module.__doc__}"
    axes = 1


class NeighborhoodAttention2D(_Module):
    __doc__ = f"Two axes, ``[batch, X, Y, dim]``.\n\n    {_Module.__doc__}"
    axes = 2


class NeighborhoodAttention(NeighborhoodAttention2D):
    """The old name of :class:`NeighborhoodAttention2D`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn("natten.NeighborhoodAttention is now NeighborhoodAttention2D.", DeprecationWarning, stacklevel=2)
        super().__init__(*args, **kwargs)
