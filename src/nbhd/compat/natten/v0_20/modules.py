"""The modules of 0.20 and later: ``stride`` fourth, no bias and no padding unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbhd.compat.natten.core.layers import Module
from nbhd.errors import ArgumentError

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodAttentionGeneric",
]


class NeighborhoodAttentionGeneric(Module):
    """As :class:`nbhd.nn.NeighborhoodAttention2D`, for ``na_dim`` axes.

    Args:
        na_dim: 1, 2 or 3.
        embed_dim: channels in and out.
        num_heads: attention heads.
        kernel_size: window, an int or one per axis.
        stride: an int or one per axis; None is 1.
        dilation: an int or one per axis; None is 1.
        is_causal: a bool or one per axis; None is False.
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: factor on the scores; default ``head_dim ** -0.5``.
        proj_drop: dropout on the output.
        dim: what ``embed_dim`` was called before.
        rel_pos_bias: learn a relative position bias (parameter ``rpb``), as up to 0.17.
        attn_drop: dropout on the attention, as up to 0.17.
        pad_small_inputs: pad a map smaller than the window with zeros and crop the result, as up to 0.15.
    """

    era = "0.20 and later"

    def __init__(
        self,
        na_dim: int,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        dim: int | None = None,
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
        pad_small_inputs: bool = False,
    ) -> None:
        channels = dim if embed_dim is None else embed_dim
        if channels is None or num_heads is None or kernel_size is None:
            raise TypeError(f"{type(self).__name__} needs embed_dim, num_heads and kernel_size.")
        if embed_dim is not None and dim is not None:
            raise TypeError("dim is the old name of embed_dim: pass one of them.")
        if na_dim not in (1, 2, 3):
            raise ArgumentError(f"na_dim must be 1, 2 or 3, got {na_dim!r}.")
        self.axes = na_dim
        super().__init__(
            channels,
            num_heads,
            kernel_size,
            stride,
            dilation,
            is_causal,
            rel_pos_bias,
            qkv_bias,
            qk_scale,
            attn_drop,
            proj_drop,
        )
        self.pad_small_inputs = pad_small_inputs


class NeighborhoodAttention1D(NeighborhoodAttentionGeneric):
    __doc__ = f"One axis, ``[batch, X, embed_dim]``.\n\n    {NeighborhoodAttentionGeneric.__doc__}"

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        **extras: Any,
    ) -> None:
        super().__init__(
            1, embed_dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale, proj_drop, **extras
        )


class NeighborhoodAttention2D(NeighborhoodAttentionGeneric):
    __doc__ = f"Two axes, ``[batch, X, Y, embed_dim]``.\n\n    {NeighborhoodAttentionGeneric.__doc__}"

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        **extras: Any,
    ) -> None:
        super().__init__(
            2, embed_dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale, proj_drop, **extras
        )


class NeighborhoodAttention3D(NeighborhoodAttentionGeneric):
    __doc__ = f"Three axes, ``[batch, X, Y, Z, embed_dim]``.\n\n    {NeighborhoodAttentionGeneric.__doc__}"

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        **extras: Any,
    ) -> None:
        super().__init__(
            3, embed_dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale, proj_drop, **extras
        )
