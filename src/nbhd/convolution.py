"""`Conv2d`: PyTorch's convolution, made in float32 where that is faster on the CPU than its own 16 bits."""

from __future__ import annotations

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
        weight, bias = self.weight, self.bias
        if makes_a_graph() or not is_slow(input, weight, bias):
            return super().forward(input)
        dtype = dtype_of_products(input)
        with torch.autocast("cpu", enabled=False):
            output = self._conv_forward(input.float(), weight.float(), None if bias is None else bias.float())
        return output.to(dtype)
