"""`nbhd.nn.joined` in the graphs of `torch.compile`, which cannot look into a call of the native core.

    nbhd::layers    nbhd::layers_backward

stand for it there. They choose when they run: a graph that comes to another machine has PyTorch's layers in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import functional

from nbhd._modes import is_transformed, makes_a_graph_for_this_machine
from nbhd.backends import cpu
from nbhd.backends.cpu_linear import Layer, Norm, is_dense
from nbhd.nn.joined import Call, Kept, gradients, joined_layers_are_faster

#: Tensors that a call gives: the outputs of up to three layers, and what the backward wants besides.
_OUTPUTS = 5


def may_join_in_graph(input: Tensor) -> bool:
    """Whether `join_in_graph` may be called with ``input`` while a graph is made, and is faster on this machine.

    That is: the graph is `torch.compile`'s, ``input`` is in the CPU's memory, and there are neither autocast nor dual
    numbers, nor, when the graph is made, ``torch.func`` or ``torch.backends.mkldnn.flags(enabled=False)``.
    """
    if not makes_a_graph_for_this_machine():
        return False
    if input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if forward_ad._current_level >= 0:  # here, where the compiler sees it and makes another graph when it changes
        return False
    return _is_faster_when_compiled(input.dtype, torch.is_grad_enabled())


def _is_faster_when_compiled(dtype: torch.dtype, with_gradients: bool) -> bool:
    usual = bool(torch.backends.mkldnn.enabled) and not is_transformed()
    return usual and joined_layers_are_faster(dtype, with_gradients)


# torch.compiler.assume_constant_result, which would import the compiler: it is called and not looked into.
_is_faster_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def join_in_graph(
    input: Tensor, last: Sequence[Layer], *, hidden: Layer | None = None, norm: Norm | None = None,
    residual: Tensor | None = None, factor: float = 1.0,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """`nbhd.nn.joined.join` as an operator of the graph.

    Args and returned tensors: those of `join`.
    """
    adds_input = residual is input
    parameters: list[Tensor | None] = [None] * 10
    if norm is not None:
        parameters[:2] = norm.weight, norm.bias
    if hidden is not None:
        parameters[2:4] = hidden.weight, hidden.bias
    for i, layer in enumerate(last):
        parameters[4 + 2 * i : 6 + 2 * i] = layer.weight, layer.bias
    present = [parameter for parameter in parameters if parameter is not None]
    for tensor in (input, *present) if residual is None else (input, residual, *present):
        # others, quantised or sharded, know linear() but not this
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != input.dtype:
            return None
    learn = [parameter.requires_grad for parameter in present]
    learns = torch.is_grad_enabled() and (
        any(learn) or input.requires_grad or (residual is not None and residual.requires_grad)
    )
    if learns and not all(learn):
        return None
    made = torch.ops.nbhd.layers(
        input, None if adds_input else residual, *parameters, None if norm is None else norm.epsilon, factor,
        adds_input, learns,
    )  # fmt: skip
    return tuple(made[: len(last)])


def _call(input: Tensor, parameters: Sequence[Tensor | None], rest: Sequence[Any]) -> tuple[Call, list[Tensor | None]]:
    """The call of an operator's arguments, and its parameters without the layers that are not there."""
    epsilon, factor, adds_input = rest
    has_hidden = parameters[2] is not None
    pairs = [(w, b) for w, b in zip(parameters[4::2], parameters[5::2], strict=True) if w is not None]
    given = [*parameters[:4], *(tensor for pair in pairs for tensor in pair)]
    return Call(epsilon, has_hidden, factor, adds_input, input.dtype), given


def _layers(input: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """The outputs, what the norm and GELU keep for the backward, and in the places of what is not there nothing."""
    *parameters, epsilon, factor, adds_input, keeps = arguments
    call, given = _call(input, parameters, (epsilon, factor, adds_input))
    batch, residual = input.contiguous(), None if residual is None else residual.contiguous()
    given = [None if tensor is None else tensor.detach().contiguous() for tensor in given]
    usable = cpu.why_unusable() is None and batch.numel() and is_dense(batch, batch.shape, batch.dtype)
    made = call.run(batch, residual, given, keeps=keeps) if usable and call.fits(batch, residual, given) else None
    if made is None:
        outputs, moments, sums = _by_pytorch(call, batch, residual, given, keeps)
    else:
        outputs, moments, sums = list(made.outputs), made.moments, made.sums
    outputs += [input.new_empty(0) for _ in range(_OUTPUTS - 2 - len(outputs))]
    kept = (input.new_empty(0, dtype=torch.float32) if tensor is None else tensor for tensor in (moments, sums))
    return *outputs, *kept


def _by_pytorch(
    call: Call, input: Tensor, residual: Tensor | None, given: Sequence[Tensor | None], keeps: bool
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    with torch.no_grad():
        outputs = call.by_pytorch(input, given, None)
        if residual is not None:
            outputs = [(outputs[0].float() + residual).to(input.dtype)]
        if not keeps:
            return outputs, None, None
        norm, hidden, _ = call.layers([None if t is None else t.float() for t in given])
        x, moments = input.float().flatten(0, -2), None
        if norm is not None:
            x, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)
            moments = torch.stack((mean.flatten(), deviation.flatten()), -1)
        return outputs, moments, None if hidden is None else functional.linear(x, hidden.weight, hidden.bias)


def _layers_fake(input: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, epsilon, _, _, keeps = arguments
    places, rows = input.shape[:-1], math.prod(input.shape[:-1])
    widths = [None if weight is None else weight.shape[0] for weight in parameters[4::2]]
    outputs = [input.new_empty(0 if width is None else (*places, width)) for width in widths]
    of_norm = (rows, 2) if keeps and epsilon is not None else 0
    of_hidden = (rows, parameters[2].shape[0]) if keeps and parameters[2] is not None else 0
    return *outputs, *(input.new_empty(shape, dtype=torch.float32) for shape in (of_norm, of_hidden))


def _layers_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    batch, _, *parameters, epsilon, factor, adds_input, _ = inputs
    ctx.save_for_backward(batch, *parameters[:3], *parameters[4::2], *output[3:])
    # Their values are not needed, and may change before the backward, as they may with PyTorch's layers.
    ctx.biases = parameters[3::2]
    ctx.rest = epsilon, factor, adds_input
    ctx.set_materialize_grads(False)


def _layers_autograd(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
    wants_input, wants_residual, *wants = ctx.needs_input_grad[:12]
    d_last: Sequence[Any] = d_outputs[:3]
    options = (None,) * 4
    if all(gradient is None for gradient in d_last):
        return (None,) * 12 + options
    kept: list[Any] = list(ctx.saved_tensors)
    batch, norm_weight, norm_bias, *weights, moments, sums = kept
    pairs = (tensor for pair in zip(weights, ctx.biases, strict=True) for tensor in pair)
    arguments = (batch, norm_weight, norm_bias, *pairs, moments, sums, *ctx.rest, [wants_input, *wants])
    # Where grad is enabled the gradient itself is to be differentiated, which PyTorch's operators know how to.
    if torch.is_grad_enabled() or any(g is not None and is_legacy_batchedtensor(g) for g in d_last):
        found = _gradients(*d_last, *arguments, by_pytorch=True)
    else:
        found = torch.ops.nbhd.layers_backward(*d_last, *arguments)
    d_input, *d_parameters = (
        gradient if wanted else None for gradient, wanted in zip(found, (wants_input, *wants), strict=True)
    )
    return d_input, d_outputs[0] if wants_residual else None, *d_parameters, *options


def _gradients(
    d_1: Any, d_2: Any, d_3: Any, input: Tensor, *arguments: Any, by_pytorch: bool = False
) -> list[Tensor | None]:
    """Of the input and all parameters, those that are wanted."""
    *parameters, moments, sums, epsilon, factor, adds_input, wants = arguments
    call, given = _call(input, parameters, (epsilon, factor, adds_input))
    n_last = (len(given) - 4) // 2
    kept = Kept(input, moments if moments.numel() else None, sums if sums.numel() else None, tuple(given))
    found = gradients(call, kept, (d_1, d_2, d_3)[:n_last], wants[: 1 + len(given)], by_pytorch)
    return found + [None] * (len(parameters) + 1 - len(found))


def _layers_backward(d_1: Any, d_2: Any, d_3: Any, input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    found = _gradients(d_1, d_2, d_3, input, *arguments)
    return tuple(input.new_empty(0) if gradient is None else gradient.contiguous() for gradient in found)


def _layers_backward_fake(d_1: Any, d_2: Any, d_3: Any, input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, _, _, _, _, _, wants = arguments
    return tuple(
        input.new_empty(tensor.shape, dtype=tensor.dtype) if wanted and tensor is not None else input.new_empty(0)
        for tensor, wanted in zip((input, *parameters), wants, strict=True)
    )


_LAYERS = ", ".join(
    f"Tensor? {name}"
    for name in (
        "norm_weight", "norm_bias", "hidden_weight", "hidden_bias", "weight_1", "bias_1", "weight_2", "bias_2",
        "weight_3", "bias_3",
    )
)  # fmt: skip
_CALL = "float? epsilon, float factor, bool adds_input"
_library = torch.library.Library("nbhd", "FRAGMENT")
for _name, _schema in (
    ("layers", f"(Tensor input, Tensor? residual, {_LAYERS}, {_CALL}, bool keeps) -> ({', '.join(['Tensor'] * 5)})"),
    (
        "layers_backward",
        f"(Tensor? d_1, Tensor? d_2, Tensor? d_3, Tensor input, {_LAYERS}, Tensor moments, Tensor sums, {_CALL}, "
        f"bool[] wants) -> ({', '.join(['Tensor'] * 11)})",
    ),
):
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _run, _fake in (
    ("layers", _layers, _layers_fake), ("layers_backward", _layers_backward, _layers_backward_fake),
):  # fmt: skip
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nbhd::{_name}", _fake, lib=_library)
torch.library.register_autograd("nbhd::layers", _layers_autograd, setup_context=_layers_setup, lib=_library)
