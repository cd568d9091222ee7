"""`Linear`: PyTorch's linear layer, made by the faster of the two libraries that PyTorch has for products on the CPU.

`torch.nn.functional.linear` in float32 goes to MKL where PyTorch is built with it. On processors of other makers than
Intel MKL stays at AVX2 even where there is AVX-512, and takes twice the time a product needs there. Convolutions go to
oneDNN, which does not mind the maker; and a linear layer is a convolution with a 1x1 kernel over a channels-last map,
which is how the data lie already. ``python -m benchmarks.linear`` times the two.

On Intel's processors MKL's products are as fast. There oneDNN gains in inference, where it adds the bias and applies
GELU while a product is at hand (`linear_gelu`) instead of reading and writing all of it again for each.

In bfloat16 and float16 PyTorch takes several times as long as in float32 on processors without instructions for them
(`nbhd.nn.sixteen_bits`): there products are made in float32, and rounded.

    nbhd::linear    nbhd::linear_d_weight

stand for it in compiled graphs, where PyTorch's own compiler would call MKL. They choose when they run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nbhd._modes import is_transformed, makes_a_graph, makes_a_graph_for_this_machine
from nbhd._processor import features, is_zen_4, maker
from nbhd.nn.sixteen_bits import dtype_of_products, is_slow

#: Fewer products (multiplications and additions) than this are over before oneDNN's preparations have paid: where
#: AVX-512 makes twice the products of AVX2, and on AMD's Zen 4, where it makes as many and oneDNN is a little ahead.
SMALLEST_WORK, SMALLEST_WORK_ON_ZEN_4 = 8_000_000, 100_000_000

#: Fewer rows than this leave oneDNN's blocks half empty.
FEWEST_ROWS = 128

#: The same where MKL's products are as fast and oneDNN gains by what it does beside them; and how many times the work
#: it takes for a bias alone.
FEWEST_ROWS_IN_ONE_PIECE, TIMES_THE_WORK_FOR_A_BIAS = 32, 4


class Linear(nn.Linear):
    """`torch.nn.Linear`: the same parameters and results, equal but for rounding; faster where `linear` is."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return linear(input, self.weight, self.bias)

    def with_gelu(self, input: Tensor) -> Tensor:
        """The exact GELU of `forward`; see `linear_gelu` and `joins`."""
        return linear_gelu(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that is the faster library for it.

    That is: large products of contiguous float32 tensors on a CPU that `mkl_is_slow` for, in compiled graphs too (from
    PyTorch 2.7). Exported and traced graphs have the plain operator, and so have autocast, ``torch.func`` inside
    compiled functions and ``torch.backends.mkldnn.flags(enabled=False)``.

    Where 16 bits are slow (`nbhd.nn.sixteen_bits`) products in them, of autocast too, are made in float32 in eager
    mode, and rounded.

    Args:
        input: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``, or None.

    Returns:
        ``[..., out_features]``, contiguous.
    """
    # First of all whether a graph is made: a compiler would warn of the cache behind mkl_is_slow.
    if not makes_a_graph():
        if _broadcasts(bias, weight):
            return functional.linear(input, weight, bias)
        if _is_slow(input, weight, bias):
            multiply = _InFloat32.apply if torch.is_grad_enabled() else _in_float32
            made: Tensor = multiply(input, weight, bias, dtype_of_products(input))
            return made
        if bias is not None and _takes_one_piece(input, weight, bias, TIMES_THE_WORK_FOR_A_BIAS):
            return in_one_piece(input, weight, bias, "none")
        # With gradients there are three products to prepare instead of one.
        return _by_either(input, weight, bias, times_the_work=2 if torch.is_grad_enabled() else 1)
    if _graph_takes_operator(input, weight) and not _broadcasts(bias, weight):
        output: Tensor = torch.ops.nbhd.linear(input, weight, bias)
        return output
    return functional.linear(input, weight, bias)


def joins(layer: nn.Module, activation: nn.Module) -> bool:
    """Whether `Linear.with_gelu` may stand for a `Linear` and an exact GELU, and gains by it.

    Not where a graph is made, and not where somebody waits for what is between the two: with hooks, with a ``forward``
    put in the place of theirs, as adapters and offloading have them, or in a class that has a ``forward`` of its own
    and no ``with_gelu``.
    """
    # the first of all for the same reason as in `linear`
    if makes_a_graph() or not one_piece_is_faster() or not isinstance(layer, Linear):
        return False
    if "with_gelu" not in type(layer).__dict__:
        return False
    return is_plain(layer) and is_plain(activation) and not nn.modules.module._has_any_global_hook()


def is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its class's ``forward``: no hooks, no other one in its place."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return "forward" not in module.__dict__ and module._compiled_call_impl is None and not any(hooks)


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.gelu`` of `linear`, by one kernel of oneDNN's where that is faster.

    That is: large float32 products of contiguous tensors without a gradient to come, in eager mode, on Intel's
    processors with AVX-512.

    Args and returned tensor: those of `linear`.
    """
    if not makes_a_graph() and _takes_one_piece(input, weight, bias):
        return in_one_piece(input, weight, bias, "gelu")
    return functional.gelu(linear(input, weight, bias))


def is_left_to_us(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a product may be made by other means than PyTorch's.

    That is: plain tensors of ``dtype`` in the CPU's memory, no gradient to come, in eager mode, and nobody watches.
    """
    return not makes_a_graph() and _suits(input, weight, dtype) and _is_left_alone(input, weight, bias)


def _takes_one_piece(input: Tensor, weight: Tensor, bias: Tensor | None, times_the_work: int = 1) -> bool:
    """Whether the product is large enough for `in_one_piece` as well, with the weight as it lies."""
    return (
        one_piece_is_faster()
        and _pays(input, weight, times_the_work, FEWEST_ROWS_IN_ONE_PIECE)
        and _is_left_alone(input, weight, bias)
    )


def _is_left_alone(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether no gradient is to come, and nobody watches what runs or takes it apart, who know plain operators only."""
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    return (
        not wants_gradient
        and weight.is_contiguous()
        and (bias is None or _is_plain_bias(bias, weight))
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
    )


def _broadcasts(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether there is a bias that is not one number for each output, as PyTorch's own products take it."""
    # what stands for a tensor in a graph has no shape to ask for
    return isinstance(bias, Tensor) and isinstance(weight, Tensor) and bias.shape != weight.shape[:1]


def _is_plain_bias(bias: Tensor, weight: Tensor) -> bool:
    """Whether ``bias`` lies as oneDNN reads it."""
    return bias.dtype == weight.dtype and bias.is_contiguous() and not _broadcasts(bias, weight)


def in_one_piece(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """A product with its bias and ``"none"`` or ``"gelu"``, the exact one, by one kernel of oneDNN's.

    As PyTorch's compiler calls it too.
    """
    exact = "none" if activation == "gelu" else ""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, activation, [], exact)
    return output


def _by_either(input: Tensor, weight: Tensor, bias: Tensor | None, times_the_work: int) -> Tensor:
    images = _images_for_onednn(input, weight, times_the_work)
    if not images:
        return functional.linear(input, weight, bias)
    return as_convolution(input, weight, bias, images)


def as_convolution(input: Tensor, weight: Tensor, bias: Tensor | None, images: int) -> Tensor:
    """The same as a convolution over ``images`` maps, which have to divide the rows of ``input`` evenly."""
    multiply = _Convolution.apply if torch.is_grad_enabled() else functional.conv2d
    output: Tensor = multiply(_as_maps(input, images), weight[:, :, None, None], bias)
    return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], weight.shape[0])


def _as_maps(rows: Tensor, images: int) -> Tensor:
    return rows.reshape(images, 1, -1, rows.shape[-1]).permute(0, 3, 1, 2)  # a view, channels last


def _convolution_backward(
    gradient: Tensor, maps: Tensor, kernel: Tensor, for_maps: bool, for_kernel: bool
) -> tuple[Tensor | None, Tensor | None]:
    one, none = [1, 1], [0, 0]
    of_maps, of_kernel, _ = torch.ops.aten.convolution_backward(
        gradient, maps, kernel, None, one, none, one, False, none, 1, [for_maps, for_kernel, False]
    )
    return of_maps, of_kernel


class _Convolution(torch.autograd.Function):
    """A convolution with a 1x1 kernel, whose bias gets its gradient from a sum.

    oneDNN adds up the rows of the output's gradient one after another: for 25,000 of them that is fifty times less
    exact than a sum and takes a fifth of the backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(maps, kernel, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        maps, kernel, _ = inputs
        ctx.save_for_backward(maps, kernel)
        ctx.save_for_forward(maps, kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        maps, kernel = ctx.saved_tensors
        for_maps, for_kernel, for_bias = ctx.needs_input_grad
        of_maps, of_kernel = _convolution_backward(gradient, maps, kernel, for_maps, for_kernel)
        return of_maps, of_kernel, gradient.sum((0, 2, 3)) if for_bias else None

    @staticmethod
    def jvp(ctx: Any, maps: Tensor | None, kernel: Tensor | None, bias: Tensor | None) -> Tensor:
        saved_maps, saved_kernel = ctx.saved_tensors
        parts = [functional.conv2d(maps, saved_kernel)] if maps is not None else []
        parts += [functional.conv2d(saved_maps, kernel)] if kernel is not None else []
        parts += [bias[:, None, None]] if bias is not None else []
        tangent: Tensor = torch.broadcast_tensors(sum(parts), parts[0])[0]
        return tangent


def images_of(rows: int) -> int:
    """Into how many images of equal size ``rows`` are best cut for oneDNN; 0 if there is no good way."""
    if torch.get_num_threads() > 1:
        return 1
    # With one thread PyTorch gives it a convolution only if there are more than 16 images, and images of fewer than 7
    # rows are slower than MKL.
    return next((images for images in range(17, rows // 7 + 1) if rows % images == 0), 0)


def _images_for_onednn(input: Tensor, weight: Tensor, times_the_work: int) -> int:
    """`images_of` a product that oneDNN is the faster library for; 0 for others."""
    pays = mkl_is_slow() and _pays(input, weight, times_the_work)
    return images_of(input.numel() // weight.shape[1]) if pays else 0


def _suits(input: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    # Tensors of other classes (sharded, quantised) know linear() but not always a convolution.
    if type(input) is not Tensor or type(weight) not in (Tensor, nn.Parameter):
        return False
    return input.dtype == weight.dtype == dtype and input.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _pays(input: Tensor, weight: Tensor, times_the_work: int, fewest_rows: int = FEWEST_ROWS) -> bool:
    if not _suits(input, weight) or not input.is_contiguous() or not torch.backends.mkldnn.enabled:
        return False
    if input.shape[-1:] != weight.shape[1:]:  # PyTorch's error says what does not fit
        return False
    enough_rows = input.numel() >= fewest_rows * weight.shape[1]
    return enough_rows and input.numel() * weight.shape[0] >= times_the_work * smallest_work()


def _graph_takes_operator(input: Tensor, weight: Tensor) -> bool:
    """Whether the graph is `torch.compile`'s, for this machine, and the layer may be one that oneDNN is faster for."""
    return makes_a_graph_for_this_machine() and _suits(input, weight) and _mkl_is_slow_when_compiled()


def _mkl_is_slow_when_compiled() -> bool:
    return mkl_is_slow() and not is_transformed()


# torch.compiler.assume_constant_result, which would import the compiler: it is called and not looked into.
_mkl_is_slow_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def mkl_is_slow() -> bool:
    """Whether `torch.nn.functional.linear` leaves this CPU's widest vectors unused in float32.

    True where PyTorch has MKL and oneDNN and the processor has AVX-512 but is not Intel's.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and maker() not in (None, "GenuineIntel")
    )


@functools.cache
def one_piece_is_faster() -> bool:
    """Whether oneDNN's products with a bias and GELU in them beat MKL's and what comes after.

    True on Intel's processors with AVX-512; elsewhere it is not yet measured.
    """
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and maker() == "GenuineIntel"
    )


def _is_slow(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if type(input) is not Tensor or weight.ndim != 2:
        return False
    rows = input.numel() // max(1, weight.shape[1])
    return is_slow(input, weight, bias, rows) and not _keeps_up(dtype_of_products(input))


@functools.cache
def _keeps_up(dtype: torch.dtype) -> bool:
    """Whether 16 bits are slower by no more than conversions to float32 take: linear layers in float16 on Intel's."""
    return dtype == torch.float16 and "avx512_fp16" in (features() or ())


def _in_float32(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return linear(input.float(), weight.float(), None if bias is None else bias.float()).to(dtype)


class _InFloat32(torch.autograd.Function):
    """A product in float32 that keeps input and weight as they are, and converts them again in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _in_float32(input, weight, bias, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        batch, weight, bias, ctx.dtype = inputs
        ctx.save_for_backward(batch, weight)
        ctx.save_for_forward(batch, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        batch, weight = ctx.saved_tensors
        for_batch, for_weight, for_bias, _ = ctx.needs_input_grad
        of_batch = of_weight = of_bias = None
        with torch.autocast("cpu", enabled=False):
            gradient = gradient.float()
            rows = gradient.reshape(-1, gradient.shape[-1])
            if for_batch:
                of_batch = linear(gradient, weight.float().t()).to(batch.dtype)
            if for_weight:
                of_weight = (rows.t() @ batch.float().reshape(-1, batch.shape[-1])).to(weight.dtype)
            if for_bias:
                of_bias = rows.sum(0).to(ctx.bias_dtype)
        return of_batch, of_weight, of_bias, None

    @staticmethod
    def jvp(ctx: Any, input: Tensor | None, weight: Tensor | None, bias: Tensor | None, _: None) -> Tensor:
        saved_input, saved_weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            parts = [linear(input.float(), saved_weight.float())] if input is not None else []
            parts += [linear(saved_input.float(), weight.float())] if weight is not None else []
            parts += [bias.float()] if bias is not None else []
            shape = (*saved_input.shape[:-1], saved_weight.shape[0])
            total: Tensor = sum(parts[1:], parts[0])
            return total.to(ctx.dtype).expand(shape)


@functools.cache
def smallest_work() -> int:
    """Products from which on oneDNN is the faster, where it is for some; with gradients twice as many."""
    return SMALLEST_WORK_ON_ZEN_4 if is_zen_4() else SMALLEST_WORK


# ---- the operators in compiled graphs

_library = torch.library.Library("nbhd", "FRAGMENT")
_library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("linear_d_weight(Tensor d_out, Tensor input) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.no_grad():  # autograd is above; without a graph to make there is no need of _Convolution
        return _by_either(input, weight, bias, times_the_work=1).contiguous()


def _linear_fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(input, weight, bias).contiguous()


def _linear_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _linear_autograd(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    batch, weight = ctx.saved_tensors
    for_batch, for_weight, for_bias = ctx.needs_input_grad
    d_out = d_out.contiguous()
    d_batch = torch.ops.nbhd.linear(d_out, weight.t(), None) if for_batch else None
    d_weight = torch.ops.nbhd.linear_d_weight(d_out, batch) if for_weight else None
    return d_batch, d_weight, d_out.reshape(-1, d_out.shape[-1]).sum(0) if for_bias else None


def _linear_d_weight(d_out: Tensor, input: Tensor) -> Tensor:
    """``[..., out_features]`` and ``[..., in_features]`` to ``[out_features, in_features]``."""
    weight = _linear_d_weight_fake(d_out, input)  # its shape is asked for, and not what is in it
    images = _images_for_onednn(input, weight, times_the_work=2) if d_out.is_contiguous() else 0
    if not images:
        return d_out.reshape(-1, d_out.shape[-1]).t() @ input.reshape(-1, input.shape[-1])
    maps, kernel = _as_maps(input, images), weight[:, :, None, None]
    _, of_kernel = _convolution_backward(_as_maps(d_out, images), maps, kernel, for_maps=False, for_kernel=True)
    assert of_kernel is not None
    return of_kernel.reshape(weight.shape).contiguous()


def _linear_d_weight_fake(d_out: Tensor, input: Tensor) -> Tensor:
    return input.new_empty(d_out.shape[-1], input.shape[-1])


def _linear_d_weight_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_d_weight_autograd(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    d_out, batch = ctx.saved_tensors
    for_d_out, for_batch = ctx.needs_input_grad
    of_d_out = torch.ops.nbhd.linear(batch, gradient, None) if for_d_out else None
    return of_d_out, torch.ops.nbhd.linear(d_out, gradient.t(), None) if for_batch else None


for _name, _run, _fake, _setup, _backward in (
    ("linear", _linear, _linear_fake, _linear_setup, _linear_autograd),
    ("linear_d_weight", _linear_d_weight, _linear_d_weight_fake, _linear_d_weight_setup, _linear_d_weight_autograd),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nbhd::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"nbhd::{_name}", _backward, setup_context=_setup, lib=_library)
