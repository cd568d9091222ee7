"""The modules of 0.17: ``dilation`` fourth, causal axes, the bias off by default."""

from __future__ import annotations

from collections.abc import Sequence

from nbhd.compat.natten.core import knobs
from nbhd.compat.natten.core.layers import Module

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _Module(Module):
    """As :class:`nbhd.nn.NeighborhoodAttention2D`; a map smaller than the window is an error.

    Args:
        dim: channels in and out.
        num_heads: attention heads.
        kernel_size: window, an int or one per axis.
        dilation: an int or one per axis; None is 1.
        is_causal: a bool or one per axis; None is False.
        rel_pos_bias: learn a relative position bias (parameter ``rpb``).
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: factor on the scores; default ``head_dim ** -0.5``.
        attn_drop: dropout on the attention, always applied in training.
        proj_drop: dropout on the output.
        use_experimental_ops: accepted, without effect.
        pad_small_inputs: pad a map smaller than the window with zeros and crop the result, as NATTEN up to 0.15.
    """

    era = "0.17"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
        *,
        pad_small_inputs: bool = False,
    ) -> None:
        knobs.ignore(use_experimental_ops=use_experimental_ops)
        super().__init__(
            dim, num_heads, kernel_size, 1, dilation, is_causal, rel_pos_bias, qkv_bias, qk_scale, attn_drop, proj_drop
        )
        self.pad_small_inputs = pad_small_inputs


class NeighborhoodAttention1D(_Module):
    __doc__ = f"One axis, ``[batch, X, dim]``.\n\n    {_Module.__doc__}"
    axes = 1


class NeighborhoodAttention2D(_Module):
    __doc__ = f"Two axes, ``[batch, X, Y, dim]``.\n\n    {_Module.__doc__}"
    axes = 2


class NeighborhoodAttention3D(_Module):
    __doc__ = f"Three axes, ``[batch, X, Y, Z, dim]``.\n\n    {_Module.__doc__}"
    axes = 3
