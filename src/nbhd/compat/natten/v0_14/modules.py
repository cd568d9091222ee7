"""The modules of 0.14.5 to 0.15: ``dilation`` fourth, ``bias`` on by default, small maps padded."""

from __future__ import annotations

from nbhd.compat.natten.core.layers import EarlyModule

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D"]


class _Module(EarlyModule):
    """As :class:`nbhd.nn.NeighborhoodAttention2D`, small maps padded.

    Args:
        dim: channels in and out.
        num_heads: attention heads.
        kernel_size: window.
        dilation: as in the operator; None is 1.
        bias: learn a relative position bias (parameter ``rpb``).
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: factor on the scores; default ``head_dim ** -0.5``.
        attn_drop: dropout on the attention.
        proj_drop: dropout on the output.
    """

    era = "0.14.6"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            dim, num_heads, kernel_size, 1, dilation, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop
        )


class NeighborhoodAttention1D(_Module):
    __doc__ = f"One axis, ``[batch, X, dim]``.\n\n    {_Module.__doc__}"
    axes = 1


class NeighborhoodAttention2D(_Module):
    __doc__ = f"Two axes, ``[batch, X, Y, dim]``.\n\n    {_Module.__doc__}"
    axes = 2
