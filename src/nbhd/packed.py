"""Layers for inference that keep their weights a second time, in the order oneDNN multiplies them in.

PyTorch hands oneDNN a weight as it lies in the checkpoint, so every call puts it in order anew. For a few rows that
takes as long as the product: a 3x3 convolution from 256 to 512 channels over a 14x14 map spends five sixths of its time
on it.

The layers here have the parameters, state dicts and results of those they stand for. The ordered copy is no part of
that: it is made at the first call, again when the weight has changed, and neither copied nor pickled with the layer. A
weight that wants gradients is not packed. What is written into a weight behind autograd's back (``weight.data``, NumPy)
is noticed by `SAMPLE` of its numbers: a whole tensor written anew always, a few numbers perhaps not.
`nbhd.optimize_for_inference` puts the layers in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbhd.linear import Linear, in_one_piece, one_piece_is_faster, runs_in_one_piece

#: Numbers of a weight that are compared at each call, a microsecond or two.
SAMPLE = 256


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
        if not self._packed.may_be_used(input, self.weight, self.bias):
            return False
        return input.is_contiguous() and input.shape[-1:] == self.weight.shape[1:]

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
        if not self._packed.may_be_used(input, self.weight, self.bias) or input.ndim != 4:
            return False
        padding: Any = self.padding
        sides = zip(input.shape[2:], padding, self.dilation, self.kernel_size, strict=True)
        is_right = input.shape[1] == self.in_channels == self.weight.shape[1] * self.groups
        is_large_enough = all(side + 2 * pad > dilation * (kernel - 1) for side, pad, dilation, kernel in sides)
        return is_right and is_large_enough and input.is_contiguous(memory_format=torch.channels_last)


def _take_parameters(to: nn.Module, layer: nn.Module) -> None:
    for name in ("weight", "bias"):
        setattr(to, name, getattr(layer, name))
    to.train(layer.training)


@dataclass(frozen=True)
class _Kept:
    """A packed weight, and how to tell that it is still that of a layer's weight."""

    weight: Tensor
    #: The weight as it was, sharing its memory: no other weight can come to lie there.
    source: Tensor
    version: int
    #: Some of its numbers as they are, and as they were.
    now: Tensor
    then: Tensor
    settings: tuple[object, ...]

    @classmethod
    def of(cls, weight: Tensor, pack: Callable[[Tensor], Tensor], settings: tuple[object, ...]) -> _Kept:
        version, source = weight._version, weight.detach()
        # an odd step, which does not stay in one column
        now = source.view(-1)[:: max(1, source.numel() // SAMPLE) | 1]
        return cls(pack(source), source, version, now, now.clone(), settings)

    def is_of(self, weight: Tensor, settings: tuple[object, ...]) -> bool:
        return (
            weight.data_ptr() == self.source.data_ptr()
            and weight._version == self.version
            and weight.shape == self.source.shape
            and settings == self.settings
            and torch.equal(self.now, self.then)
        )


class _Packed:
    """The packed copy of a weight."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None  # threads replace it as a whole

    def may_be_used(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether a product may be made with a packed weight; forgets it where the weight has become another kind."""
        # whether a graph is made comes first; tensors of inference mode do not tell that they have changed
        if runs_in_one_piece(input, weight, bias):
            return input.numel() > 0 and not weight.is_inference() and not weight.requires_grad
        is_another_kind = weight.dtype != torch.float32 or weight.device.type != "cpu"
        if is_another_kind and self._kept is not None and not torch.compiler.is_compiling():
            self._kept = None
        return False

    def of(self, weight: Tensor, pack: Callable[[Tensor], Tensor], *settings: object) -> Tensor:
        """``pack(weight)``, kept until the weight, its memory or ``settings`` are others."""
        kept = self._kept
        if kept is None or not kept.is_of(weight, settings):
            kept = self._kept = _Kept.of(weight, pack, settings)
        return kept.weight

    def __deepcopy__(self, memo: dict[int, object]) -> _Packed:
        return _Packed()

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()
