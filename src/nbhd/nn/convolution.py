"""`Conv2d`: PyTorch's convolution, made in float32 where that is faster on the CPU than its own 16 bits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nbhd._modes import makes_a_graph
from nbhd.nn.sixteen_bits import dtype_of_products, is_slow

#: Backward in float16 PyTorch's convolutions take a hundred times as long as in float32: conversions pay for all but
#: the thinnest.
_WITH_GRADIENTS = {torch.float16: 4}


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`: the same parameters, and results of the same dtype, equal but for rounding.

    In 16 bits, of its tensors or of autocast, it computes in float32 where `nbhd.nn.sixteen_bits.are_slow`, and
    rounds the result. Graphs have the plain operator.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ...)``."""
        # First of all whether a graph is made: a compiler would warn of the cache behind are_slow.
        if makes_a_graph():
            return super().forward(input)
        weight, bias = self.weight, self.bias  # looked at once: parametrized ones are computed each time
        pays = _WITH_GRADIENTS if torch.is_grad_enabled() else None
        if not is_slow(input, weight, bias, _positions(input, self.stride), pays):
            plain: Tensor = self._conv_forward(input, weight, bias)
            return plain
        dtype = dtype_of_products(input)
        if self.padding_mode == "zeros" and not isinstance(self.padding, str) and torch.is_grad_enabled():
            geometry = _Geometry(self.stride, self.padding, self.dilation, self.groups)
            made: Tensor = _InFloat32.apply(input, weight, bias, geometry, dtype)
            return made
        with torch.autocast("cpu", enabled=False):
            output: Tensor = self._conv_forward(input.float(), weight.float(), None if bias is None else bias.float())
        return output.to(dtype)


def _positions(input: Tensor, stride: tuple[int, ...]) -> int:
    """About how many outputs a channel has."""
    if type(input) is not Tensor or input.ndim < 3:
        return 0
    *batch, _, height, width = input.shape
    return math.prod(batch) * -(-height // stride[0]) * -(-width // stride[1])


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _InFloat32(torch.autograd.Function):
    """A convolution in float32 that keeps input and weight as they are, and converts them again in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            wide = None if bias is None else bias.float()
            return functional.conv2d(input.float(), weight.float(), wide, *geometry).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        maps, weight, bias, ctx.geometry, ctx.dtype = inputs
        ctx.save_for_backward(maps, weight)
        ctx.save_for_forward(maps, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        maps, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        for_maps, for_weight, for_bias, _, _ = ctx.needs_input_grad
        gradient, wide = gradient.float(), maps.float()
        is_batch = maps.ndim == 4
        of_maps: Any = None
        of_weight: Any = None
        if for_maps or for_weight:
            of_maps, of_weight, _ = torch.ops.aten.convolution_backward(
                gradient if is_batch else gradient[None], wide if is_batch else wide[None], weight.float(), None,
                stride, padding, dilation, False, [0, 0], groups, [for_maps, for_weight, False],
            )  # fmt: skip
        # The bias's is a sum of PyTorch's: oneDNN's is less exact.
        return (
            of_maps.reshape(maps.shape).to(maps.dtype) if for_maps else None,
            of_weight.to(weight.dtype) if for_weight else None,
            gradient.sum((0, -1, -2) if is_batch else (-1, -2)).to(ctx.bias_dtype) if for_bias else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, maps: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: None) -> Tensor:
        saved_maps, saved_weight = (tensor.float() for tensor in ctx.saved_tensors)
        parts = []
        with torch.autocast("cpu", enabled=False):
            if maps is not None:
                parts.append(functional.conv2d(maps.float(), saved_weight, None, *ctx.geometry))
            if weight is not None:
                parts.append(functional.conv2d(saved_maps, weight.float(), None, *ctx.geometry))
            if bias is not None:
                like = functional.conv2d(saved_maps, saved_weight, None, *ctx.geometry)
                parts.append(torch.zeros_like(like) + bias.float()[:, None, None])
        total: Tensor = sum(parts[1:], parts[0])
        return total.to(ctx.dtype)
