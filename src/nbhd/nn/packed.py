"""Layers for inference that keep their weights a second time, in the order they are multiplied in.

PyTorch hands its libraries a weight as it lies in the checkpoint, and every call puts it in order anew. For a few rows
that takes as long as the product: a 3x3 convolution from 256 to 512 channels over a 14x14 map spends five sixths of its
time on it. Linear layers are made by the native CPU core, which takes what stands around them in the same call
(`Layers`): a layer norm, GELU, a factor and a residual. Convolutions are oneDNN's.

The layers here have the parameters, state dicts and results of those they stand for. The ordered copy is no part of
that: it is made at the first call, again when the weight has changed, and neither copied nor pickled with the layer. A
weight that wants gradients is not packed. What is written into a weight behind autograd's back (``weight.data``, NumPy)
is noticed by some of its numbers: a whole tensor written anew always, a few numbers perhaps not.
`nbhd.optimize_for_inference` puts the layers in place.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nbhd._modes import makes_a_graph
from nbhd._processor import is_zen_4, maker
from nbhd.backends import cpu, cpu_linear
from nbhd.backends.cpu_linear import DTYPES, is_dense
from nbhd.nn.convolution import Conv2d
from nbhd.nn.linear import Linear, is_left_to_us

#: Numbers of a convolution's weight that are compared at each call, a microsecond or two.
SAMPLE = 256


@functools.cache
def packed_convolutions_are_faster() -> bool:
    """Whether `PackedConv2d` beats the plain layer on this CPU.

    True on Intel's processors with AVX-512, on AMD's Zen 4, and on AMD's with AVX2 alone; elsewhere it is not yet
    measured.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return maker() == "GenuineIntel" or is_zen_4()
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and maker() == "AuthenticAMD"


def packed_linear_gain(dtype: torch.dtype = torch.float32) -> float:
    """How many times faster an MLP is in one call of the native core than by plain layers, measured in this process.

    Takes some tens of milliseconds, once for each dtype. 0 where there is no core or none for ``dtype``, and where it
    cannot be measured: under a mode that is to see PyTorch's operators.
    """
    if dtype not in DTYPES:
        return 0.0
    try:
        return _measured_gain(dtype)
    except _NotNow:
        return 0.0


class _NotNow(Exception):
    """The core cannot be used where this is asked."""


@functools.cache
def _measured_gain(dtype: torch.dtype) -> float:
    def ramp(*shape: int) -> Tensor:  # and no random number, which somebody else may be counting on
        return torch.linspace(-0.1, 0.1, math.prod(shape), dtype=torch.float32).view(shape).to(dtype)

    def layer(out: int, features: int) -> Linear:
        made = Linear(features, out, device="meta")
        made.weight, made.bias = (nn.Parameter(ramp(*s), requires_grad=False) for s in ((out, features), (out,)))
        return made

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    alone = torch.autocast("cpu", enabled=False), torch.device("cpu"), torch.inference_mode(False), torch.no_grad()
    with alone[0], alone[1], alone[2], alone[3]:
        rows, dim, hidden = 392, 128, 384  # a small part of NAT-Tiny
        batch, norm = ramp(rows, dim), nn.LayerNorm(dim, dtype=dtype)
        first, second = layer(hidden, dim), layer(dim, hidden)
        whole = Layers(PackedLinear(second), hidden=PackedLinear(first), norm=norm)
        if whole(batch, batch) is None:
            raise _NotNow
        times = [
            (seconds(lambda: batch + second(first.with_gelu(norm(batch)))), seconds(lambda: whole(batch, batch)))
            for _ in range(8)
        ]
    plain, packed = (min(column) for column in zip(*times, strict=True))
    gain: float = plain / packed
    return gain


class PackedLinear(Linear):
    """`nbhd.nn.linear.Linear` with its weight packed, in `product_dtype` of the dtype it has.

    In another dtype than it has now, one that it is converted to later, it is the plain layer.

    Args:
        layer: whose parameters to take, the same objects.
    """

    packed_dtype = torch.float32

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        _take_parameters(self, layer)
        self.packed_dtype = layer.weight.dtype
        self._packed = _Packed()
        self._calls = Layers(self), Layers(self, gelu=True)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        output = self._own_calls()[0](input)
        return super().forward(input) if output is None else output

    def with_gelu(self, input: Tensor) -> Tensor:
        """The exact GELU of `forward`, in the same call."""
        output = self._own_calls()[1](input)
        return super().with_gelu(input) if output is None else output

    def _own_calls(self) -> tuple[Layers, Layers]:
        if self._calls[0].last is not self:  # a shallow copy has those of the original
            self._packed, self._calls = _Packed(), (Layers(self), Layers(self, gelu=True))
        return self._calls


class Layers:
    """``residual + scale * gelu(last(gelu(hidden(norm(input)))))``, with those parts that are given, in one call.

    They are looked at closely at the first call, and again when their parameters are others.

    Args:
        last: the layer that makes the output.
        hidden: a layer before it, which the exact GELU follows.
        norm: of the input.
        gelu: the exact GELU of ``last``.
    """

    def __init__(
        self, last: PackedLinear, *, hidden: PackedLinear | None = None, norm: nn.LayerNorm | None = None,
        gelu: bool = False,
    ) -> None:  # fmt: skip
        self.last = last
        self._others = hidden, norm, gelu
        self._prepared: _Prepared | None = None  # threads replace it as a whole

    def __call__(self, input: Tensor, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor | None:
        """The output.

        Args:
            input: ``[..., in_features]``.
            residual: ``[..., out_features]``.
            scale: ``[out_features]``, float32.

        Returns:
            ``[..., out_features]``; None where PyTorch's own layers are to be taken: for a gradient, in another dtype
            or elsewhere than in the CPU's memory, in graphs and under modes that know PyTorch's operators only, and for
            shapes that do not fit, which its errors explain.
        """
        if is_left_to_us(input, self.last.weight, self.last.bias, self.last.packed_dtype):
            return self.run(input, residual, scale)
        self.forget_other_kinds()
        return None

    def run(self, input: Tensor, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor | None:
        """The same where `nbhd.nn.linear.is_left_to_us` is known."""
        if not input.is_contiguous() or input.is_neg() or not input.numel():
            return None
        for _ in range(2):
            prepared = self._prepared
            if prepared is None or not prepared.is_current():
                prepared = self._prepared = _prepare(input.shape[-1], self.last, *self._others)
            if prepared is None or not prepared.takes(input, residual, scale):
                return None
            try:
                return prepared.call(input, scale, residual)
            except cpu_linear.Stale:
                self.forget()
        return None  # somebody writes into the weight while it is packed

    def forget(self) -> None:
        """Drop the packed weights."""
        self._prepared = None
        for layer in (self.last, self._others[0]):
            if layer is not None:
                layer._packed.forget()

    def forget_other_kinds(self) -> None:
        """Drop the packed weights if the layer's are not of their dtype in the CPU's memory any more."""
        kind = self.last.weight.dtype, self.last.weight.device.type
        if not torch.compiler.is_compiling() and kind != (self.last.packed_dtype, "cpu"):
            self.forget()

    def __getstate__(self) -> dict[str, Any]:  # of copies as well
        return {"last": self.last, "_others": self._others, "_prepared": None}


class _Parameter(NamedTuple):
    """A parameter as it was when a call was prepared, and where to find what it is now."""

    place: dict[str, Any]
    name: str
    #: It shares the parameter's memory, which no other tensor can come to lie in; None if there was none.
    source: Tensor | None
    #: Whether it is a weight that is packed.
    is_packed: bool
    #: Address, shape, strides, dtype; if it is packed also its version.
    was: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module, name: str, dtype: torch.dtype, is_packed: bool = False) -> _Parameter | None:
        """None if the core may not read it: it is no plain ``dtype`` in order in the CPU's memory."""
        place = module._parameters
        parameter = place.get(name, _ABSENT)
        if parameter is None:
            return cls(place, name, None, is_packed, ())
        if parameter is _ABSENT or type(parameter) not in (Tensor, nn.Parameter):
            return None
        # what is looked at is what is computed with, whatever other threads put in its place
        source = parameter.detach()
        if not is_dense(source, source.shape, dtype) or (is_packed and (source.is_inference() or source.ndim != 2)):
            return None
        return cls(place, name, source, is_packed, _state(source, is_packed))

    def is_current(self) -> bool:
        parameter = self.place.get(self.name, _ABSENT)
        if parameter is None or self.source is None or parameter is _ABSENT:
            return parameter is self.source
        return _state(parameter, self.is_packed) == self.was

    def has_shape(self, *shape: int) -> bool:
        return self.source is None or self.source.shape == shape


_ABSENT: Any = object()


def _state(tensor: Tensor, with_version: bool) -> tuple[Any, ...]:
    state = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    return (*state, tensor._version) if with_version else state


@dataclass(frozen=True)
class _Prepared:
    """A call, and how to tell that it is still that of the parameters."""

    call: cpu_linear.PreparedLayers
    #: Whose memory the call points into.
    layers: tuple[cpu_linear.Layer | None, ...]
    parameters: tuple[_Parameter, ...]
    norm: nn.LayerNorm | None
    #: The norm's shape and epsilon.
    settings: tuple[object, ...]

    def is_current(self) -> bool:
        if self.norm is not None and (self.norm.normalized_shape, self.norm.eps) != self.settings:
            return False
        return all(map(_Parameter.is_current, self.parameters))

    def takes(self, input: Tensor, residual: Tensor | None, scale: Tensor | None) -> bool:
        call = self.call
        if input.shape[-1] != call.features:
            return False
        if not (residual is None or is_dense(residual, (*input.shape[:-1], call.out), input.dtype)):
            return False
        if not (scale is None or is_dense(scale, (call.out,))):
            return False
        now = [p.place.get(p.name) for p in self.parameters]
        # a weight that learns is not packed
        if any(t is not None and t.requires_grad for p, t in zip(self.parameters, now, strict=True) if p.is_packed):
            return False
        return not torch.is_grad_enabled() or not any(
            t is not None and t.requires_grad for t in (*now, input, residual, scale)
        )


def _prepare(
    features: int, last: PackedLinear, hidden: PackedLinear | None, norm: nn.LayerNorm | None, gelu: bool
) -> _Prepared | None:
    """A call for inputs of so many features; None where PyTorch's layers are to be taken."""
    dtype = last.packed_dtype
    if cpu.why_unusable() is not None or dtype not in DTYPES:
        return None
    found: list[_Parameter | None] = []
    of_norm = None
    if norm is not None:
        found += [_Parameter.of(norm, "weight", dtype), _Parameter.of(norm, "bias", dtype)]
        if norm.normalized_shape != (features,) or not all(p is not None and p.has_shape(features) for p in found):
            return None
        weight_and_bias = [p.source for p in found if p is not None]
        of_norm = cpu_linear.Norm(weight_and_bias[0], weight_and_bias[1], norm.eps)
    settings = (norm.normalized_shape, norm.eps) if norm is not None else ()
    layers: list[cpu_linear.Layer] = []
    for layer in (last,) if hidden is None else (hidden, last):
        weight, bias = _Parameter.of(layer, "weight", dtype, is_packed=True), _Parameter.of(layer, "bias", dtype)
        if weight is None or bias is None or weight.source is None or layer.weight.requires_grad:
            return None
        out = weight.source.shape[0]
        if weight.source.shape[1] != features or not bias.has_shape(out):
            return None
        panels = layer._packed.of(weight.source, cpu_linear.pack, compares=False)
        layers.append(cpu_linear.Layer(panels, weight.source, bias.source))
        found += [weight, bias]
        features = out
    call = cpu_linear.PreparedLayers(layers[-1], layers[0] if hidden is not None else None, of_norm, gelu)
    return _Prepared(call, tuple(layers), tuple(p for p in found if p is not None), norm, settings)


class PackedConv2d(Conv2d):
    """`nbhd.nn.convolution.Conv2d` with its weight packed, for maps with their channels last.

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
        return (
            type(layer) in (nn.Conv2d, Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )

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
    settings: tuple[object, ...]
    #: Some of its numbers as they are, and as they were; or None, for the core to compare.
    samples: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, weight: Tensor, pack: Callable[[Tensor], Tensor], settings: tuple[object, ...], compares: bool
    ) -> _Kept:
        version, source = weight._version, weight.detach()
        samples = None
        if compares:
            # an odd step, which does not stay in one column
            now = source.view(-1)[:: max(1, source.numel() // SAMPLE) | 1]
            samples = now, now.clone()
        return cls(pack(source), source, version, settings, samples)

    def is_of(self, weight: Tensor, settings: tuple[object, ...]) -> bool:
        return (
            weight.data_ptr() == self.source.data_ptr()
            and weight._version == self.version
            and weight.shape == self.source.shape
            and settings == self.settings
            and (self.samples is None or torch.equal(*self.samples))
        )


class _Packed:
    """The packed copy of a weight."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None  # threads replace it as a whole

    def may_be_used(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether oneDNN may be given a packed weight; forgets it where the weight has become another kind."""
        # First of all whether a graph is made: a compiler would warn of packed_convolutions_are_faster's cache.
        if (
            not makes_a_graph()
            and packed_convolutions_are_faster()
            and bool(torch.backends.mkldnn.enabled)
            and is_left_to_us(input, weight, bias)
        ):
            # tensors of inference mode do not tell that they have changed
            return input.numel() > 0 and not weight.is_inference() and not weight.requires_grad
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            self.forget()
        return False

    def forget(self) -> None:
        """Drop the copy."""
        if self._kept is not None and not torch.compiler.is_compiling():
            self._kept = None

    def of(self, weight: Tensor, pack: Callable[[Tensor], Tensor], *settings: object, compares: bool = True) -> Tensor:
        """``pack(weight)``, kept until the weight, its memory or ``settings`` are others."""
        kept = self._kept
        if kept is None or not kept.is_of(weight, settings):
            kept = self._kept = _Kept.of(weight, pack, settings, compares)
        return kept.weight

    def __deepcopy__(self, memo: dict[int, object]) -> _Packed:
        return _Packed()

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()
