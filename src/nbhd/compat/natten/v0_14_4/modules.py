"""The modules up to 0.14.4: a bias always, dilation last and possibly chosen per call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from nbhd.compat.natten.core.layers import EarlyModule
from nbhd.nn.attention import Geometry

__all__ = ["NeighborhoodAttention", "NeighborhoodAttention1D", "NeighborhoodAttention2D"]


class _Module(EarlyModule):
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
        fixed = None if isinstance(dilation, str) else dilation
        super().__init__(dim, num_heads, kernel_size, 1, fixed, False, True, qkv_bias, qk_scale, attn_drop, proj_drop)
        if isinstance(dilation, str):
            self.dilation = None

    def _geometry(self, spatial: Sequence[int]) -> Geometry:
        if self.dilation is not None:
            return super()._geometry(spatial)
        window = self._each("kernel_size", self.kernel_size)
        dilation = max(min(int(n) for n in spatial) // window[0], 1)  # while torch.jit traces, lengths are tensors
        return window, self.stride, (dilation,) * self.axes, self.is_causal

    @property
    def window_size(self) -> Any:
        """Positions that a window spans, ``kernel_size * dilation``; None where the dilation follows the map."""
        return None if self.dilation is None else super().window_size


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
