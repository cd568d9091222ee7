"""Linear layers over rows, and what stands around them in a transformer, in the native CPU core.

One call is a layer norm, a linear layer with GELU and another one, a factor and a residual, or some of these
(``nbhd_linear`` in ``csrc/include/nbhd.h``); what lies between them never leaves a thread's cache.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from nbhd.backends import cpu

#: Outputs that lie together in a packed weight.
PANEL = 32

# nbhd_linear_call: size, rows, in, input; norm, the two weights, gelu; what else comes after, output, threads.
_INPUT, _LAYERS, _OUTPUT = struct.Struct("=5q"), struct.Struct("=3qd9q"), struct.Struct("=7q")
_CALL_BYTES = _INPUT.size + _LAYERS.size + _OUTPUT.size
_NO_LAYER = (0,) * 4

_BAD_SHAPE, _BAD_POINTER, _STALE_WEIGHT = 3, 5, 8


class Layer(NamedTuple):
    """A linear layer.

    Attributes:
        panels: `pack` of the weight.
        weight: ``[out, in]``, float32, dense.
        bias: ``[out]``, float32, dense, or None.
    """

    panels: Tensor
    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """A layer norm: ``[in]``, float32, dense, or None, and what is added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    epsilon: float


class Stale(Exception):
    """The packed weight of a layer is not that of its weight: pack it again."""


def pack(weight: Tensor) -> Tensor:
    """``[out, in]`` in the order it is multiplied in: ``[panels, in, PANEL]``, zeros past the last output."""
    weight = weight.detach()
    out, features = weight.shape
    panels = -(-out // PANEL)
    padded = weight.new_zeros(panels * PANEL, features)
    padded[:out] = weight
    return padded.view(panels, PANEL, features).transpose(1, 2).contiguous()


class PreparedLayers:
    """``residual + scale * gelu(last(gelu(hidden(norm(input)))))``, with those parts that are given.

    All of the call is packed but the tensors that go in and out. It points into the layers' memory and does not keep
    it.

    Args:
        last: the layer that makes the output.
        hidden: a layer before it, which the exact GELU follows.
        norm: of the input.
        gelu: the exact GELU of ``last``.
    """

    __slots__ = ("_layers", "_library", "features", "out")

    def __init__(self, last: Layer, hidden: Layer | None, norm: Norm | None, gelu: bool) -> None:
        self._library = cpu.loaded_library()
        self.features = (last if hidden is None else hidden).weight.shape[1]
        self.out = last.weight.shape[0]
        self._layers = _LAYERS.pack(
            *((1, _pointer(norm.weight), _pointer(norm.bias), norm.epsilon) if norm else (0, 0, 0, 0.0)),
            *(_NO_LAYER if hidden is None else _numbers(hidden)), *_numbers(last), gelu,
        )  # fmt: skip

    def __call__(self, input: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """The output.

        Args:
            input: ``[..., features]``, float32, dense, as everything here.
            scale: ``[out]``, or None.
            residual: ``[..., out]``, or None.

        Returns:
            ``[..., out]``; None if the library does not take a tensor's memory (at odd bytes of a file) or a size or
            epsilon (no outputs, an epsilon below zero).

        Raises:
            Stale: a packed weight is not that of its layer.
        """
        features, out, library = self.features, self.out, self._library
        output = input.new_empty((*input.shape[:-1], out))
        status = library.linear(
            _INPUT.pack(_CALL_BYTES, input.numel() // features, features, input.data_ptr(), features)
            + self._layers
            + _OUTPUT.pack(
                0 if scale is None else scale.data_ptr(), 0 if residual is None else residual.data_ptr(), out,
                output.data_ptr(), out, library.parallel_for, torch.get_num_threads(),
            )
        )  # fmt: skip
        if not status:
            return output
        if status == _STALE_WEIGHT:
            raise Stale
        if status not in (_BAD_SHAPE, _BAD_POINTER):
            cpu.refused(library, status)
        return None


def _numbers(layer: Layer) -> tuple[int, int, int, int]:
    return layer.weight.shape[0], layer.panels.data_ptr(), layer.weight.data_ptr(), _pointer(layer.bias)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
