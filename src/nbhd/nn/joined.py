"""A layer norm, linear layers and the exact GELU between two of them in one call of the native core, with gradients.

Of what lies between the layers only what GELU was taken of is kept for the backward, which computes the rest again:
PyTorch's layers keep the norm's output and GELU's too. In the backward the gradients of inputs, of the norm and of all
weights are one call as well. Weights are packed at each call, which is a small part of it from a few dozen rows on; for
inference `nbhd.nn.packed` keeps them packed.

In 16 bits, of the tensors or of autocast, the core computes in float32 and rounds what it returns; products, those of
gradients too, are made in bfloat16 where it has instructions for that (`nbhd.backends.cpu_linear.product_dtype`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from nbhd._gradients import expect_kept, is_special
from nbhd._modes import has_function_mode, is_transformed, makes_a_graph
from nbhd._processor import is_zen_4, maker
from nbhd.backends import cpu, cpu_linear
from nbhd.backends.cpu_linear import DTYPES, Gradients, Layer, Norm, is_dense
from nbhd.errors import BackendError
from nbhd.nn.sixteen_bits import are_slow, dtype_of_products

#: Fewer rows than this are over before packing the weights has paid.
FEWEST_ROWS = 32


@functools.cache
def joined_layers_are_faster(dtype: torch.dtype, with_gradients: bool) -> bool:
    """Whether `join` beats PyTorch's layers on this CPU, which compute in ``dtype``.

    In float32 that is true on Intel's processors with AVX-512 and on AMD's Zen 4, with AVX2 alone on AMD's processors,
    and without gradients on Intel's, which were measured with their instructions limited to it; elsewhere it is not yet
    measured. In 16 bits it is true where PyTorch's own are slow (`nbhd.nn.sixteen_bits.are_slow`), and on Zen 4 in
    bfloat16.
    """
    if cpu.why_unusable() is not None or not cpu.loaded_library().isa.startswith("avx"):
        return False
    if dtype != torch.float32:
        is_paired = is_zen_4() and cpu_linear.product_dtype(dtype) == dtype
        return are_slow(dtype) or is_paired
    ours, pytorchs = cpu.loaded_library().isa.startswith("avx512"), torch.backends.cpu.get_cpu_capability()
    if ours and pytorchs == "AVX512":
        return maker() == "GenuineIntel" or is_zen_4()
    if not ours and pytorchs == "AVX2":
        return maker() == "AuthenticAMD" or (maker() == "GenuineIntel" and not with_gradients)
    return False


#: As they were when this was imported: who has put something else in their place wants to see what they are given.
_FUNCTIONS = {name: getattr(functional, name) for name in ("linear", "layer_norm", "gelu")}


def _is_watched() -> bool:
    """Whether somebody sees PyTorch's operators or functions run."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or has_function_mode()
        or any(getattr(functional, name) is not function for name, function in _FUNCTIONS.items())
    )


def _is_checkpointed() -> bool:
    """Whether `torch.utils.checkpoint` keeps nothing and computes again, and has to find the same tensors then.

    Whoever watches only once of the two times must not make a difference to it.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def may_join(input: Tensor) -> bool:
    """Whether `join` may be called with ``input`` here, and is faster.

    That is: plain float32, bfloat16 or float16 in order in the CPU's memory, not too few rows, in eager mode without
    ``torch.func``, checkpoints or ``torch.backends.mkldnn.flags(enabled=False)``, and nobody watches, who would know
    PyTorch's operators only. Under autocast the input may be float32 or of autocast's dtype.
    """
    return (
        not makes_a_graph()  # the first of all: a compiler would warn of the cache behind joined_layers_are_faster
        and type(input) in (Tensor, nn.Parameter)  # others may stand for a tensor in a graph and have no dtype
        and joined_layers_are_faster(dtype := dtype_of_products(input), torch.is_grad_enabled())
        and input.dtype in (torch.float32, dtype)
        and not is_transformed()  # its tensors have no memory to ask for
        and not _is_watched()
        and not _is_checkpointed()
        and bool(torch.backends.mkldnn.enabled)
        and is_dense(input, input.shape, input.dtype)
        and input.numel() >= FEWEST_ROWS * input.shape[-1] > 0
    )


def join(
    input: Tensor, last: Sequence[Layer], *, hidden: Layer | None = None, norm: Norm | None = None,
    residual: Tensor | None = None, factor: float = 1.0,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """``residual + factor * last(gelu(hidden(norm(input))))``, with those parts that are given.

    Args:
        input: ``[..., in]``, one that `may_join` takes.
        last: up to three layers of the same input, such as query, key and value; one if there is ``hidden`` or
            ``residual``.
        hidden: a layer before it, which the exact GELU follows.
        norm: of the input.
        residual: ``[..., out]``; may be ``input`` itself.
        factor: of what is added to the residual.

    Returns:
        ``[..., out]`` of each last layer, of the input's dtype; None where PyTorch's layers are to be taken: parameters
        of other kinds or shapes, of another dtype without autocast, or some that learn and some that do not, for whose
        gradients less has to be kept.
    """
    products = dtype_of_products(input)
    call = Call(norm.epsilon if norm else None, hidden is not None, factor, residual is input, products)
    if call.adds_input:
        residual = None
    parameters = (
        *(norm[:2] if norm else (None, None)), *(hidden[1:] if hidden else (None, None)),
        *(tensor for layer in last for tensor in layer[1:]),
    )  # fmt: skip
    if not call.fits(input, residual, parameters):
        return None
    if last[0].weight.dtype != input.dtype and not torch.is_autocast_enabled("cpu"):
        return None
    if torch.is_grad_enabled():
        learn = [parameter.requires_grad for parameter in parameters if parameter is not None]
        if any(learn) or input.requires_grad or (residual is not None and residual.requires_grad):
            if not all(learn):
                return None
            outputs: tuple[Tensor, ...] = _Join.apply(call, input, residual, *parameters)
            return outputs
    made = call.run(input, residual, parameters, keeps=False)
    return None if made is None else made.outputs


_Tensors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Call:
    """What is computed from input, residual, the norm's weight and bias, the hidden layer's, and each last layer's."""

    epsilon: float | None
    has_hidden: bool
    factor: float
    #: The input is the residual, too.
    adds_input: bool
    #: What PyTorch's layers would make products in.
    products: torch.dtype

    def fits(self, batch: Tensor, residual: Tensor | None, parameters: _Tensors) -> bool:
        """Whether all tensors are such as the core reads, and of shapes that fit each other."""
        features = batch.shape[-1]
        norm_weight, norm_bias, hidden_weight, hidden_bias, *last = parameters
        dtype = None if last[0] is None else last[0].dtype
        if dtype not in DTYPES:
            return False
        if not (_fits(norm_weight, (features,), dtype) and _fits(norm_bias, (features,), dtype)):
            return False
        if self.has_hidden:
            if not _is_layer(hidden_weight, hidden_bias, features, dtype):
                return False
            features = _rows(hidden_weight)
        if not all(_is_layer(weight, bias, features, dtype) for weight, bias in _pairs(last)):
            return False
        shape = (*batch.shape[:-1], _rows(last[0]))
        return batch.shape == shape if self.adds_input else _fits(residual, shape, batch.dtype)

    def layers(self, parameters: _Tensors) -> tuple[Norm | None, Layer | None, list[Layer]]:
        norm_weight, norm_bias, hidden_weight, hidden_bias, *last = parameters
        norm = None if self.epsilon is None else Norm(norm_weight, norm_bias, self.epsilon)
        hidden = None if hidden_weight is None else Layer(None, hidden_weight, hidden_bias)
        return norm, hidden, [Layer(None, weight, bias) for weight, bias in _pairs(last) if weight is not None]

    def run(self, batch: Tensor, residual: Tensor | None, parameters: _Tensors, keeps: bool) -> cpu_linear.Made | None:
        norm, hidden, last = self.layers(parameters)
        scale = None
        if self.factor != 1:
            scale = torch.full((_rows(last[0].weight),), self.factor, dtype=torch.float32, device="cpu")
        residual = batch if self.adds_input else residual
        return cpu_linear.run(batch, last, hidden, norm, scale, residual, self.products, keeps)

    def by_pytorch(self, batch: Tensor, parameters: _Tensors, sums: Tensor | None) -> list[Tensor]:
        """The outputs by PyTorch's operators in float32, but for a residual that is not the input.

        GELU is taken of ``sums``.
        """
        norm, hidden, last = self.layers([_wide(tensor) for tensor in parameters])
        x = batch.float()
        if norm is not None:
            x = functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)
        if hidden is not None:
            x = functional.linear(x, hidden.weight, hidden.bias)
            if sums is not None:  # as they were, whatever the bias is by now
                x = x + (sums.view(x.shape) - x.detach())
            x = functional.gelu(x)
        outputs = [functional.linear(x, layer.weight, layer.bias) for layer in last]
        if self.factor != 1:
            outputs = [output * self.factor for output in outputs]
        return [(output + batch if self.adds_input else output).to(batch.dtype) for output in outputs]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: Call, batch: Tensor, residual: Tensor | None, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        made = call.run(batch, residual, parameters, keeps=True)
        if made is None:  # something lies at odd bytes of a file
            copies = [None if tensor is None else tensor.clone() for tensor in (batch, residual, *parameters)]
            made = call.run(cast(Tensor, copies[0]), copies[1], copies[2:], keeps=True)
        if made is None:
            raise BackendError(f"the native core does not take layers of an input of {list(batch.shape)}.")
        norm_weight, norm_bias, hidden_weight, hidden_bias, *last = parameters
        ctx.save_for_backward(batch, made.moments, made.sums, norm_weight, norm_bias, hidden_weight, *last[::2])
        ctx.call, ctx.shape, ctx.dtype = call, batch.shape, batch.dtype
        # Their values are not needed, and may change before the backward, as they may with PyTorch's layers.
        ctx.biases = hidden_bias, *last[1::2]
        ctx.set_materialize_grads(False)
        return made.outputs

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, wants_batch, wants_residual, *wants = ctx.needs_input_grad
        if all(gradient is None for gradient in d_outputs):
            return (None,) * len(ctx.needs_input_grad)
        batch, moments, sums, norm_weight, norm_bias, hidden_weight, *weights = ctx.saved_tensors
        hidden_bias, *biases = ctx.biases
        last = (tensor for pair in zip(weights, biases, strict=True) for tensor in pair)
        kept = Kept(batch, moments, sums, (norm_weight, norm_bias, hidden_weight, hidden_bias, *last))
        kept.expect(ctx.shape, ctx.dtype)
        # Where grad is enabled the gradient itself is to be differentiated, which PyTorch's operators know how to.
        by_pytorch = torch.is_grad_enabled() or is_transformed() or _is_watched() or any(map(is_special, d_outputs))
        found = gradients(ctx.call, kept, d_outputs, (wants_batch, *wants), by_pytorch)
        return None, found[0], d_outputs[0] if wants_residual else None, *found[1:]


class Kept(NamedTuple):
    """What autograd kept."""

    batch: Tensor
    moments: Tensor | None
    sums: Tensor | None
    parameters: tuple[Tensor | None, ...]

    def expect(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Refuse what has come back changed; ``shape`` and ``dtype`` are those of the input."""
        expect_kept("the input", self.batch, shape, dtype)
        rows = self.batch.numel() // shape[-1]
        expect_kept("the moments of a norm", self.moments, (rows, 2), torch.float32)
        expect_kept("the sums of a hidden layer", self.sums, (rows, _rows(self.parameters[2])), torch.float32)


def gradients(
    call: Call, kept: Kept, d_outputs: _Tensors, wants: Sequence[bool], by_pytorch: bool = False
) -> list[Tensor | None]:
    """Gradients of input and parameters that are wanted; ``by_pytorch``: differentiable where grad is enabled."""
    found = None if by_pytorch else _backward(call, kept, d_outputs, wants)
    return _backward_by_pytorch(call, kept, d_outputs, wants) if found is None else found


def _backward(call: Call, kept: Kept, d_outputs: _Tensors, wants: Sequence[bool]) -> list[Tensor | None] | None:
    """The same by the core; None if it does not take what it is given."""
    # hooks may have kept copies, laid out otherwise
    batch = kept.batch.contiguous()
    moments, sums, *parameters = (
        None if tensor is None else tensor.float().contiguous()
        for tensor in (kept.moments, kept.sums, *kept.parameters)
    )
    if not all(tensor is None or is_dense(tensor, tensor.shape) for tensor in (moments, sums)):
        return None
    if not is_dense(batch, batch.shape, batch.dtype) or not call.fits(batch, None, parameters):
        return None
    norm, hidden, last = call.layers(parameters)
    shapes = [(*batch.shape[:-1], _rows(layer.weight)) for layer in last]
    gradients = [
        batch.new_zeros(shape) if gradient is None else gradient.resolve_neg().to(batch.dtype).contiguous()
        for gradient, shape in zip(d_outputs, shapes, strict=True)
    ]
    if not all(is_dense(g, shape, batch.dtype) for g, shape in zip(gradients, shapes, strict=True)):
        return None
    found = [
        torch.empty_like(tensor) if wanted and tensor is not None else None
        for tensor, wanted in zip((batch, *parameters), wants, strict=True)
    ]
    d_batch, *d_parameters = found
    of_norm, of_hidden, *of_last = _pairs(d_parameters)
    added = gradients[0] if call.adds_input and d_batch is not None else None
    into = Gradients(d_batch, of_norm, of_hidden, of_last)
    done = cpu_linear.gradients(
        batch, last, hidden, norm, moments, sums, call.factor, gradients, added, into, call.products
    )
    if not done:
        return None
    dtypes = [tensor.dtype if tensor is not None else torch.float32 for tensor in (kept.batch, *kept.parameters)]
    return [None if t is None else t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)]


def _backward_by_pytorch(call: Call, kept: Kept, d_outputs: _Tensors, wants: Sequence[bool]) -> list[Tensor | None]:
    """The same by PyTorch's operators, which can be differentiated again if grad is enabled."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Views, so that leaves and tensors with a history are treated alike and the graph stays connected.
        tensors = [
            tensor if tensor is None or not wanted
            else tensor.view_as(tensor) if tensor.requires_grad
            else tensor.detach().requires_grad_()
            for tensor, wanted in zip((kept.batch, *kept.parameters), wants, strict=True)
        ]  # fmt: skip
        outputs = call.by_pytorch(cast(Tensor, tensors[0]), tensors[1:], kept.sums)
        pairs = [(o, g) for o, g in zip(outputs, d_outputs, strict=True) if g is not None]
        results, given = zip(*pairs, strict=True)
        present = [t for t, wanted in zip(tensors, wants, strict=True) if wanted and t is not None]
        found = iter(
            torch.autograd.grad(
                results, present, given, create_graph=differentiable, allow_unused=True, materialize_grads=True
            )
        )
    return [next(found) if wanted and t is not None else None for t, wanted in zip(tensors, wants, strict=True)]


def _pairs(tensors: _Tensors) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    return zip(tensors[::2], tensors[1::2], strict=True)


def _rows(weight: Tensor | None) -> int:
    return 0 if weight is None else weight.shape[0]


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _fits(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None) -> bool:
    return tensor is None or (dtype is not None and is_dense(tensor, shape, dtype))


def _is_layer(weight: Tensor | None, bias: Tensor | None, features: int, dtype: torch.dtype | None) -> bool:
    if weight is None or dtype is None or weight.ndim != 2:
        return False
    out = weight.shape[0]
    return out > 0 and is_dense(weight, (out, features), dtype) and _fits(bias, (out,), dtype)
