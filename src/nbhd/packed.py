"""Layers for inference that keep their weights a second time, in the order oneDNN multiplies them in.

PyTorch hands oneDNN a weight as it lies in the checkpoint, so every call puts it in order anew. For a few rows that
takes as long as the product: a 3x3 convolution from 256 to 512 channels over a 14x14 map spends five sixths of its time
on it.

The layers here have the parameters, state dicts and results of those they stand for. The ordered copy is no part of
that: it is made at the first call, again when the weight has changed, and neither copied nor pickled with the layer.
`nbhd.optimize_for_inference` puts them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nbhd.linear import Linear, in_one_piece, one_piece_is_faster, runs_in_one_piece


def packing_is_faster() -> bool:
    """Whether the layers of this module beat the plain ones on this CPU.

    True on Intel's processors with AVX-512; elsewhere it is not yet measured.
    """
    return one_piece_is_faster() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class PackedLinear(Linear):
    """`nbhd.linear.Linear` with its weight packed.

    Args:
        layer: whose parameters to take, the same objects.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        _take_parameters(self, layer)
        self._packed = _Packed()

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return self._multiply(input, "none") if self._is_packed(input) else super().forward(input)

    def with_gelu(self, input: Tensor) -> Tensor:
        """The exact GELU of `forward`, in the same kernel."""
        return self._multiply(input, "gelu") if self._is_packed(input) else super().with_gelu(input)

    def _is_packed(self, input: Tensor) -> bool:
        return _may_be_packed(input, self.weight, self.bias) and input.is_contiguous()

    def _multiply(self, input: Tensor, activation: str) -> Tensor:
        weight = self._packed.of(self.weight, torch.ops.mkldnn._reorder_linear_weight)
        return in_one_piece(input, weight, self.bias, activation)


class PackedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with its weight packed, for maps with their channels last.

    Args:
        layer: whose parameters and settings to take. Padding by zeros, given in numbers.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        settings: dict[str, Any] = {name: getattr(layer, name) for name in names}
        super().__init__(layer.in_channels, layer.out_channels, bias=layer.bias is not None, device="meta", **settings)
        _take_parameters(self, layer)
        self._packed = _Packed()

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether ``layer`` is one that this class may stand for."""
        return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ...)``, channels last in memory."""
        if not self._is_packed(input):
            return super().forward(input)
        padding, stride, dilation = (list(pair) for pair in (self.padding, self.stride, self.dilation))
        geometry = (padding, stride, dilation, self.groups)
        size = list(input.shape)  # the order depends on the size of the maps as well

        def pack(weight: Tensor) -> Tensor:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            packed: Tensor = reorder(weight.to_mkldnn(), *geometry, size)
            return packed

        weight = self._packed.of(self.weight, pack, size, geometry)
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(input, weight, self.bias, *geometry, "none", [], "")
        return output

    def _is_packed(self, input: Tensor) -> bool:
        if not _may_be_packed(input, self.weight, self.bias) or input.ndim != 4 or input.shape[1] != self.in_channels:
            return False
        padding: Any = self.padding
        sides = zip(input.shape[2:], padding, self.dilation, self.kernel_size, strict=True)
        is_large_enough = all(side + 2 * pad > dilation * (kernel - 1) for side, pad, dilation, kernel in sides)
        return is_large_enough and input.is_contiguous(memory_format=torch.channels_last)


def _may_be_packed(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # whether a graph is made comes first; tensors of inference mode do not tell that they have changed
    return runs_in_one_piece(input, weight, bias) and input.numel() > 0 and not weight.is_inference()


def _take_parameters(to: nn.Module, layer: nn.Module) -> None:
    for name in ("weight", "bias"):
        setattr(to, name, getattr(layer, name))
    to.train(layer.training)


class _Packed:
    """The packed copy of a weight."""

    def __init__(self) -> None:
        self._kept: tuple[object, Tensor] | None = None  # what it was made of, and itself: threads replace both at once

    def of(self, weight: Tensor, pack: Callable[[Tensor], Tensor], *settings: object) -> Tensor:
        """``pack(weight)``, kept until the weight, its memory or ``settings`` are others."""
        source = (weight.data_ptr(), weight._version, weight.shape, settings)
        kept = self._kept
        if kept is None or kept[0] != source:
            kept = self._kept = (source, pack(weight.detach()))
        return kept[1]

    def __deepcopy__(self, memo: dict[int, object]) -> _Packed:
        return _Packed()

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()
