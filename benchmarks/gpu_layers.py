"""Whole attention layers on the GPU: projections in, attention, projection out.

    nbhd-layer         ``nbhd.nn.NeighborhoodAttention2D``
    swin-layer         Swin's: padded, rolled, cut into windows, projected, attended to by SDPA with bias and mask,
                       projected, put together, rolled back
    swin-layer-eager   the same with products and a softmax of their own, for where SDPA is slow with a mask

All have one projection for query, key and value, and one for the output, with biases, in the dtype of the case. What is
differentiated is the input and every parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cases import Case
from benchmarks.gpu_peers import Contender
from benchmarks.peers import swin
from benchmarks.subject import NotHere


class SwinLayer(nn.Module):
    """Swin's (shifted) window attention on maps ``[batch, rows, columns, channels]`` of one size."""

    index: Tensor
    mask: Tensor | None

    def __init__(
        self, embed_dim: int, num_heads: int, window: int, rows: int, columns: int, *, has_bias: bool, is_eager: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.is_eager = num_heads, window, is_eager
        self.spatial = rows, columns
        self.padded = tuple(-(-length // window) * window for length in (rows, columns))
        # where one window covers the map Swin does not shift
        self.shift = window // 2 if min(rows, columns) > window else 0
        self.qkv, self.proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, num_heads) * 0.02) if has_bias else None
        self.register_buffer("index", swin._bias_index(window))
        self.register_buffer("mask", swin._shift_mask(*self.padded, window, self.shift) if self.shift else None)

    def forward(self, x: Tensor) -> Tensor:
        batch, area = x.shape[0], self.window**2
        x = swin._roll(swin._pad(x, *self.padded), -self.shift)
        cut = swin._partition(x, self.window).flatten(1, 2)
        q, k, v = self.qkv(cut).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if self.table is not None:
            bias = self.table[self.index].view(area, area, -1).permute(2, 0, 1).contiguous()[None]
        out = self._eager(q, k, v, bias, batch) if self.is_eager else self._sdpa(q, k, v, bias, batch)
        out = self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (self.window, self.window))
        out = swin._roll(swin._merge(out, self.window, *self.padded), self.shift)
        return out[:, : self.spatial[0], : self.spatial[1]].contiguous()

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        added = bias
        if self.mask is not None:  # [windows, area, area]: the windows of an image are neighbours along the first axis
            each = self.mask[:, None] if bias is None else bias + self.mask[:, None]
            added = each[None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=added)

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        if self.mask is not None:
            scores = (scores.unflatten(0, (batch, -1)) + self.mask[:, None]).flatten(0, 1)
        return scores.softmax(-1) @ v


def _input(case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, *case.spatial, case.heads * case.head_dim)
    return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype).requires_grad_()


def _contender(layer: nn.Module, case: Case, device: torch.device) -> Contender:
    layer = layer.to(device, case.torch_dtype)
    x = _input(case, device)

    def call(x: Tensor) -> Tensor:
        out = layer(x)
        assert isinstance(out, Tensor)
        return out

    return Contender(call, [x], list(layer.parameters()), None)


def prepare_ours(case: Case, device: torch.device) -> Contender:
    from nbhd import nn as layers

    kind = {1: "1D", 2: "2D", 3: "3D"}[len(case.spatial)]
    make = getattr(layers, f"NeighborhoodAttention{kind}")
    return _contender(
        make(
            case.heads * case.head_dim, case.heads, case.kernel_size, case.stride, case.dilation, case.is_causal,
            rel_pos_bias=case.has_bias,
        ), case, device,
    )  # fmt: skip


def prepare_swin(case: Case, device: torch.device, *, is_eager: bool = False) -> Contender:
    if len(case.spatial) != 2 or case.kernel_size[0] != case.kernel_size[1]:
        raise NotHere("Swin's windows are squares on a map of two axes")
    layer = SwinLayer(
        case.heads * case.head_dim, case.heads, case.kernel_size[0], *case.spatial, has_bias=case.has_bias,
        is_eager=is_eager,
    )  # fmt: skip
    return _contender(layer, case, device)


def prepare_swin_eager(case: Case, device: torch.device) -> Contender:
    return prepare_swin(case, device, is_eager=True)


PEERS: dict[str, Callable[[Case, torch.device], Contender]] = {
    "nbhd-layer": prepare_ours,
    "swin-layer": prepare_swin,
    "swin-layer-eager": prepare_swin_eager,
}
