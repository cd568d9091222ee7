"""Neighborhood attention as modules: projections in, projections out."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nbhd.errors import ArgumentError
from nbhd.functional import AXES, apply_attention_weights, attention_weights, na1d, na2d, na3d
from nbhd.nn.linear import Linear
from nbhd.qkv import split_qkv

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]

#: Window, stride, dilation and causality, one of each an axis.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]

_OPERATORS = {1: na1d, 2: na2d, 3: na3d}


class NeighborhoodAttention(nn.Module):
    """Self-attention over neighborhoods of a ``[batch, *spatial, embed_dim]`` map.

    A map smaller than ``kernel_size * dilation`` is padded with zeros at the end of that axis before the projections,
    and the result cropped back, as NAT and DiNAT do it: the padded positions take part in the attention, unmasked.

    Args:
        embed_dim: channels in and out; a multiple of ``num_heads``.
        num_heads: attention heads.
        kernel_size: window, an int or one per axis.
        stride: queries in a group of ``stride`` share a window; an int or one per axis.
        dilation: an int or one per axis.
        is_causal: a bool or one per axis.
        rel_pos_bias: learn a relative position bias (parameter ``rpb``, ``[num_heads, 2 * k - 1, ...]``).
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: factor on the scores; default ``(embed_dim // num_heads) ** -0.5``.
        attn_drop: dropout on the attention probabilities. In training it takes the unfused path, which stores them.
        proj_drop: dropout on the output.
        num_kv_heads: heads of key and value, a divisor of ``num_heads``; default as many. With fewer, each is shared by
            ``num_heads // num_kv_heads`` heads of the query that follow one another (grouped heads).

    Raises:
        ArgumentError: a parameter breaks a rule of the operator, or ``embed_dim`` is no multiple of ``num_heads``.
    """

    axes: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ArgumentError(
                f"embed_dim must be a multiple of num_heads, got embed_dim {embed_dim}, num_heads {num_heads}."
            )
        kv_heads = num_heads if num_kv_heads is None else _as_int(num_kv_heads)
        if type(kv_heads) is not int or kv_heads < 1 or num_heads % kv_heads:
            raise ArgumentError(
                "num_kv_heads must be a divisor of num_heads, "
                f"got num_kv_heads {num_kv_heads!r}, num_heads {num_heads}."
            )
        for name, rate in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not 0.0 <= rate <= 1.0:
                raise ArgumentError(f"{name} must be a probability between 0 and 1, got {rate!r}.")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.kernel_size = self._each("kernel_size", kernel_size)
        self.stride = self._each("stride", stride)
        self.dilation = self._each("dilation", dilation)
        self.is_causal = self._each("is_causal", is_causal)
        self.qk_scale = qk_scale
        self.qkv = Linear(embed_dim, (num_heads + 2 * kv_heads) * (embed_dim // num_heads), bias=qkv_bias)
        self.rpb = (
            nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size))) if rel_pos_bias else None
        )
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self._try_parameters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the relative position bias anew: truncated normal, standard deviation 0.02, as NAT's authors do."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, *spatial, embed_dim]`` to the same shape."""
        if input.ndim != self.axes + 2 or input.shape[-1] != self.embed_dim:
            raise ArgumentError(
                f"input must be [batch, {', '.join(AXES[: self.axes])}, {self.embed_dim}], got {tuple(input.shape)}."
            )
        spatial = input.shape[1:-1]
        geometry = self._geometry(spatial)
        missing = [max(0, k * d - length) for k, d, length in zip(geometry[0], geometry[2], spatial, strict=True)]
        # functional.pad counts axes from the last, which are the channels.
        padding = (0, 0, *(n for extra in reversed(missing) for n in (0, extra)))
        padded = functional.pad(input, padding) if any(missing) else input
        query, key, value = split_qkv(self.qkv(padded), self.num_heads, self.num_kv_heads)
        out = self._attend(query, key, value, geometry).flatten(-2)
        if any(missing):
            for axis, length in enumerate(spatial, 1):
                out = out.narrow(axis, 0, length)
        output: Tensor = self.proj_drop(self.proj(out))
        return output

    def _geometry(self, spatial: Sequence[int]) -> Geometry:
        """Window, stride, dilation and causality, one of each an axis, for a map of ``spatial`` positions."""
        return self.kernel_size, self.stride, self.dilation, self.is_causal

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Tensor:
        if self.training and self.attn_drop.p > 0:
            weights = attention_weights(query, key, *geometry, self.qk_scale, rel_pos_bias=self.rpb)
            return apply_attention_weights(self.attn_drop(weights), value, *geometry)
        return _OPERATORS[self.axes](query, key, value, *geometry, self.qk_scale, rel_pos_bias=self.rpb)

    def _each(self, name: str, given: Any) -> tuple[Any, ...]:
        values = tuple(given) if isinstance(given, Sequence) else (given,) * self.axes
        if len(values) != self.axes:
            raise ArgumentError(f"{name} must be one value or {self.axes} of them, one per axis, got {given!r}.")
        return tuple(map(_as_int, values))

    def _try_parameters(self) -> None:
        """Let the operator's own checks speak when the module is built, not at its first call."""
        spatial = tuple(
            max(1, k * d) if isinstance(k, int) and isinstance(d, int) else 1
            for k, d in zip(self.kernel_size, self.dilation, strict=True)
        )
        dim = self.embed_dim // self.num_heads
        query, key = (
            torch.empty(0, *spatial, heads, dim, device="meta") for heads in (self.num_heads, self.num_kv_heads)
        )
        _OPERATORS[self.axes](
            query, key, key, self.kernel_size, self.stride, self.dilation, self.is_causal, self.qk_scale
        )

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}, "
            f"rel_pos_bias={self.rpb is not None}"
        )


def _as_int(entry: Any) -> Any:
    """An int for what counts as one, such as numpy's; all else as it is, for the operator to judge."""
    return int(entry) if type(entry) is not bool and isinstance(entry, numbers.Integral) else entry


class NeighborhoodAttention1D(NeighborhoodAttention):
    __doc__ = f"One spatial axis: ``[batch, X, embed_dim]``.\n\n    {NeighborhoodAttention.__doc__}"
    axes = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    __doc__ = f"Two spatial axes: ``[batch, X, Y, embed_dim]``.\n\n    {NeighborhoodAttention.__doc__}"
    axes = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    __doc__ = f"Three spatial axes: ``[batch, X, Y, Z, embed_dim]``.\n\n    {NeighborhoodAttention.__doc__}"
    axes = 3
