"""`Conv2d`: PyTorch's convolution, made in float32 where that is faster on the CPU than its own 16 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nbhd._modes import makes_a_graph
from nbhd.linear import dtype_of_products, is_slow


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`: the same parameters, and results of the same dtype, equal but for rounding.

    In 16 bits, of its tensors or of autocast, it computes in float32 where `nbhd.linear.sixteen_bits_are_slow`, and
    rounds the result. Graphs have the plain operator.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ...)``."""
        # First of all whether a graph is made: a compiler would warn of the cache behind sixteen_bits_are_slow.
        if makes_a_graph():
            return super().forward(input)
        weight, bias = self.weight, self.bias  # looked at once: parametrized ones are computed each time
        if not is_slow(input, weight, bias, _positions(input, self.stride)):
            return self._conv_forward(input, weight, bias)
        dtype = dtype_of_products(input)
        with torch.autocast("cpu", enabled=False):
            output = self._conv_forward(input.float(), weight.float(), None if bias is None else bias.float())
        return output.to(dtype)


def _positions(input: Tensor, stride: tuple[int, ...]) -> int:
    """About how many a convolution computes: what are rows to a product."""
    if type(input) is not Tensor or input.ndim < 3:
        return 0
    *batch, _, height, width = input.shape
    return math.prod(batch) * -(-height // stride[0]) * -(-width // stride[1])
