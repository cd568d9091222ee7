"""Linear layers over rows, and what stands around them in a transformer, in the native CPU core.

One call is a layer norm, a linear layer with GELU and another one, a factor and a residual, or some of these
(``nbhd_linear`` in ``csrc/include/nbhd.h``); what lies between them never leaves a thread's cache. `PreparedLayers` has
its weights in the order they are multiplied in; `run` and `gradients` put them in order at each call.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nbhd.backends import cpu

#: Outputs that lie together in a packed weight.
PANEL = 32

#: Layers of the same input that a call can have.
MOST_LAYERS = 3

#: Of rows and, apart from that, of what is learned. It is computed in float32 and rounded where it is written; products
#: may be of bfloat16 (`product_dtype`).
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# nbhd_linear_call: size, three dtypes, rows, in, input; norm, the hidden and the last weights, gelu; what else comes
# after, outputs, what is kept for the gradients, threads.
_INPUT, _LAYERS, _OUTPUT = struct.Struct("=8q"), struct.Struct("=3qd17q"), struct.Struct("=13q")
_CALL_BYTES = _INPUT.size + _LAYERS.size + _OUTPUT.size
# nbhd_linear_gradients_call: size, two dtypes, rows, in, input, norm, the weights, what was kept; factor; gradients,
# threads.
_GIVEN, _FACTOR, _WANTED = struct.Struct("=27q"), struct.Struct("=d"), struct.Struct("=17q")
_GRADIENTS_CALL_BYTES = _GIVEN.size + _FACTOR.size + _WANTED.size
_NO_LAYER = (0,) * 4

_BAD_SHAPE, _BAD_POINTER, _STALE_WEIGHT = 3, 5, 8


class Layer(NamedTuple):
    """A linear layer.

    Attributes:
        panels: `pack` of the weight for the call's products; None: each call packs it.
        weight: ``[out, in]``, dense, of one of `DTYPES`, which all parameters of a call have.
        bias: ``[out]``, dense, or None.
    """

    panels: Tensor | None
    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """A layer norm: ``[in]``, dense, or None, and what is added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    epsilon: float


def is_dense(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> bool:
    """Whether the core may read it as it lies: plain, of this dtype and shape, in order, in the CPU's memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == dtype
        and tensor.layout == torch.strided
        and tensor.shape == shape
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.is_cpu
        and tensor.data_ptr() != 0
    )


class Stale(Exception):
    """The packed weight of a layer is not that of its weight: pack it again."""


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the core makes products of where PyTorch's layers would make them in ``dtype``: of bfloat16, or of float32.

    bfloat16 where the core takes instructions for it: on AMD's processors that have them, or where ``NBHD_CPU_ISA``
    says so.
    """
    is_paired = dtype == torch.bfloat16 and cpu.loaded_library().isa == "avx512bf16"
    return dtype if is_paired else torch.float32


def pack(weight: Tensor) -> Tensor:
    """``[out, in]`` in the order it is multiplied in, with zeros past the last output and input.

    ``[panels, in, PANEL]`` in float32, or ``[panels, ceil(in / 2), PANEL, 2]`` in bfloat16: `product_dtype` of its own.
    """
    weight = weight.detach()
    out, features = weight.shape
    dtype = product_dtype(weight.dtype)
    panels, at_once = -(-out // PANEL), 1 if dtype == torch.float32 else 2
    steps = -(-features // at_once)
    padded = weight.new_zeros(panels * PANEL, steps * at_once, dtype=dtype)
    padded[:out, :features] = weight
    ordered = padded.view(panels, PANEL, steps, at_once).transpose(1, 2).contiguous()
    return ordered if at_once > 1 else ordered.squeeze(-1)


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

    __slots__ = ("_dtypes", "_layers", "_library", "features", "out")

    def __init__(self, last: Layer, hidden: Layer | None, norm: Norm | None, gelu: bool) -> None:
        self._library = cpu.loaded_library()
        self.features = (last if hidden is None else hidden).weight.shape[1]
        self.out = last.weight.shape[0]
        dtype = last.weight.dtype
        self._dtypes = DTYPES[dtype], DTYPES[product_dtype(dtype)]
        self._layers = _LAYERS.pack(*_of_norm(norm), *_of_layers(hidden, (last,)), gelu)

    def __call__(self, input: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """The output.

        Args:
            input: ``[..., features]``, of one of `DTYPES`, dense, as everything here.
            scale: ``[out]``, float32, or None.
            residual: ``[..., out]`` of the input's dtype, or None.

        Returns:
            ``[..., out]`` of the input's dtype; None if the library does not take a tensor's memory (at odd bytes of a
            file) or a size or epsilon (no outputs, an epsilon below zero).

        Raises:
            Stale: a packed weight is not that of its layer.
        """
        out, library = self.out, self._library
        output = input.new_empty((*input.shape[:-1], out))
        status = library.linear(
            _of_input(input, *self._dtypes)
            + self._layers
            + _OUTPUT.pack(
                _pointer(scale), _pointer(residual), out, output.data_ptr(), 0, 0, out, 0, 0, 0, 0,
                library.parallel_for, torch.get_num_threads(),
            )
        )  # fmt: skip
        if status == _STALE_WEIGHT:
            raise Stale
        return output if _is_done(library, status) else None


class Made(NamedTuple):
    """What `run` has made.

    Attributes:
        outputs: ``[..., out]`` of each last layer, of the input's dtype.
        moments: ``[rows, 2]``, float32, of each row its mean and one over its deviation, for the gradients of a norm.
        sums: ``[rows, hidden]``, float32, what GELU was taken of.
    """

    outputs: tuple[Tensor, ...]
    moments: Tensor | None
    sums: Tensor | None


def run(
    input: Tensor, last: Sequence[Layer], hidden: Layer | None, norm: Norm | None, scale: Tensor | None,
    residual: Tensor | None, products: torch.dtype, keeps: bool,
) -> Made | None:  # fmt: skip
    """``residual + scale * last(gelu(hidden(norm(input))))`` with those parts that are given.

    Args:
        input: ``[..., in]``, of one of `DTYPES`, dense, as everything here.
        last: up to `MOST_LAYERS` of the same input; one if there are ``hidden``, ``scale`` or ``residual``.
        hidden: a layer before it, which the exact GELU follows.
        norm: of the input.
        scale: ``[out]``, float32, or None.
        residual: ``[..., out]`` of the input's dtype, or None.
        products: what PyTorch's layers would make products in; they are made in `product_dtype` of it.
        keeps: keep what `gradients` asks for.

    Returns:
        None if the library does not take a tensor's memory (at odd bytes of a file) or a size or epsilon.
    """
    library, features = cpu.loaded_library(), input.shape[-1]
    rows = input.numel() // features
    widths = [layer.weight.shape[0] for layer in last]
    outputs = tuple(input.new_empty((*input.shape[:-1], width)) for width in widths)
    moments = sums = None
    if keeps and norm is not None:
        moments = input.new_empty(rows, 2, dtype=torch.float32)
    if keeps and hidden is not None:
        sums = input.new_empty(rows, hidden.weight.shape[0], dtype=torch.float32)
    status = library.linear(
        _of_input(input, DTYPES[last[0].weight.dtype], DTYPES[product_dtype(products)])
        + _LAYERS.pack(*_of_norm(norm), *_of_layers(hidden, last), 0)
        + _OUTPUT.pack(
            _pointer(scale), _pointer(residual), widths[0], *_pointers(outputs), *_three(widths), _pointer(moments),
            _pointer(sums), library.parallel_for, torch.get_num_threads(),
        )
    )  # fmt: skip
    return Made(outputs, moments, sums) if _is_done(library, status) else None


class Gradients(NamedTuple):
    """Tensors that `gradients` writes, each like what it is the gradient of; None: not wanted."""

    input: Tensor | None
    norm: tuple[Tensor | None, Tensor | None]
    hidden: tuple[Tensor | None, Tensor | None]
    last: Sequence[tuple[Tensor | None, Tensor | None]]


def gradients(
    input: Tensor, last: Sequence[Layer], hidden: Layer | None, norm: Norm | None, moments: Tensor | None,
    sums: Tensor | None, factor: float, d_outputs: Sequence[Tensor], added: Tensor | None, into: Gradients,
    products: torch.dtype,
) -> bool:  # fmt: skip
    """Gradients of ``factor * last(gelu(hidden(norm(input))))``.

    Args:
        input, last, hidden, norm: those of `run`, parameters in float32, and what it kept in ``moments`` and ``sums``.
        d_outputs: like the outputs, of the input's dtype.
        added: like the input, added to its gradient; or None.
        into: what is wanted.
        products: that of `run`.

    Returns:
        Whether the library took the tensors, as `run` may not; nothing is written otherwise.
    """
    library, features = cpu.loaded_library(), input.shape[-1]
    weights, biases = zip(*into.last, strict=True)
    status = library.linear_gradients(
        _GIVEN.pack(
            _GRADIENTS_CALL_BYTES, DTYPES[input.dtype], DTYPES[product_dtype(products)], input.numel() // features,
            features, input.data_ptr(), *_of_norm(norm)[:3], *_of_layers(hidden, last), _pointer(moments),
            _pointer(sums),
        )
        + _FACTOR.pack(factor)
        + _WANTED.pack(
            *_pointers(d_outputs), _pointer(added), _pointer(into.input), *map(_pointer, into.norm),
            *map(_pointer, into.hidden), *_pointers(weights), *_pointers(biases), library.parallel_for,
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return _is_done(library, status)


def _is_done(library: cpu.Library, status: int) -> bool:
    """Whether the library has done it; it may not take a tensor's memory or a size."""
    if status not in (0, _BAD_SHAPE, _BAD_POINTER):
        cpu.refused(library, status)
    return not status


def _of_input(input: Tensor, parameter_dtype: int, of_products: int) -> bytes:
    features = input.shape[-1]
    rows, dtype = input.numel() // features, DTYPES[input.dtype]
    return _INPUT.pack(_CALL_BYTES, dtype, parameter_dtype, of_products, rows, features, input.data_ptr(), features)


def _of_norm(norm: Norm | None) -> tuple[int, int, int, float]:
    return (1, _pointer(norm.weight), _pointer(norm.bias), norm.epsilon) if norm else (0, 0, 0, 0.0)


def _of_layers(hidden: Layer | None, last: Sequence[Layer]) -> list[int]:
    numbers: list[int] = []
    for layer in (hidden, *last, *(None,) * (MOST_LAYERS - len(last))):
        numbers += _NO_LAYER if layer is None else _numbers(layer)
    return numbers


def _numbers(layer: Layer) -> tuple[int, int, int, int]:
    return layer.weight.shape[0], _pointer(layer.panels), layer.weight.data_ptr(), _pointer(layer.bias)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    return _three([_pointer(tensor) for tensor in tensors])


def _three(numbers: list[int]) -> list[int]:
    return numbers + [0] * (MOST_LAYERS - len(numbers))
