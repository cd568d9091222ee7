"""The operator as PyTorch sees it: schemas, fakes and autograd. No arithmetic of its own.

    nbhd::na_forward      out, lse                          nbhd::na_backward       the gradients of both
    nbhd::scores          the scores before the softmax     nbhd::scores_backward
    nbhd::weighted_sum    weights times values              nbhd::weighted_sum_backward

Each picks its backend when it runs, so a traced or exported graph is not tied to the machine that made it. Eager calls
on ordinary tensors skip the dispatcher (``PreparedCall``): on a small map it costs more than the attention. The
gradient of a backward op goes through the reference, which autograd differentiates to any order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nbhd import backends
from nbhd._gradients import expect_kept, is_special
from nbhd._modes import has_function_mode, is_transformed, makes_a_graph
from nbhd.backends import reference
from nbhd.flops import tell_counters
from nbhd.geometry import Neighborhood
from nbhd.qkv import lie_as_parts, room_for_gradients

_GEOMETRY = "SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, bool[] is_causal"
_QKV = "Tensor query, Tensor key, Tensor value, Tensor? rel_pos_bias"
_SCHEMAS = {
    "na_forward": f"({_QKV}, {_GEOMETRY}, float scale, str backend) -> (Tensor out, Tensor lse)",
    "na_backward": f"(Tensor? d_out, Tensor? d_lse, {_QKV}, Tensor out, Tensor lse, {_GEOMETRY}, float scale,"
    " str backend) -> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_rel_pos_bias)",
    "scores": f"(Tensor query, Tensor key, Tensor? rel_pos_bias, {_GEOMETRY}, float scale, str backend) -> Tensor",
    "scores_backward": f"(Tensor d_scores, Tensor query, Tensor key, Tensor? rel_pos_bias, {_GEOMETRY}, float scale,"
    " str backend) -> (Tensor d_query, Tensor d_key, Tensor d_rel_pos_bias)",
    "weighted_sum": f"(Tensor weights, Tensor value, {_GEOMETRY}, str backend) -> Tensor",
    "weighted_sum_backward": f"(Tensor d_out, Tensor weights, Tensor value, {_GEOMETRY}, str backend)"
    " -> (Tensor d_weights, Tensor d_value)",
}
_library = torch.library.Library("nbhd", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

Ints = Sequence[int]
Bools = Sequence[bool]
Grad = Tensor | None


@functools.lru_cache(maxsize=1024)
def _cached(kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> Neighborhood:
    return Neighborhood(kernel_size, stride, dilation, is_causal)


def _neighborhood(kernel_size: Ints, stride: Ints, dilation: Ints, is_causal: Bools) -> Neighborhood:
    return _cached(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal))


def flat(neighborhood: Neighborhood) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """A neighborhood as the four arguments the schemas have for it."""
    return neighborhood.kernel_size, neighborhood.stride, neighborhood.dilation, neighborhood.is_causal


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous and no sign to be changed, which is all that backends may rely on."""
    if tensor.is_neg():  # a view such as that of conj().imag: its memory holds the opposite
        tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _resolved(tensor: Grad) -> Grad:
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


def _bias_gradient(bias: Tensor | None, like: Tensor) -> Tensor:
    """What stands for the gradient of a bias that is not there: an op cannot return None."""
    return like.new_zeros(0) if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)


# ---- forward and backward


def _na_forward(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, kernel_size: Ints, stride: Ints,
    dilation: Ints, is_causal: Bools, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if query.numel() == 0:
        return _na_forward_fake(query, key, value)
    neighborhood = _neighborhood(kernel_size, stride, dilation, is_causal)
    query, key, value = _rows(query), _rows(key), _rows(value)
    call = backends.Call(query, key, value, rel_pos_bias, neighborhood)
    out, lse = backends.choose(backend, call).forward(query, key, value, rel_pos_bias, neighborhood, scale)
    return out, lse


def attend(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp by the op."""
    tell_counters()
    out, lse = torch.ops.nbhd.na_forward(query, key, value, rel_pos_bias, *flat(neighborhood), scale, backend)
    return out, lse


class PreparedCall:
    """What the op would do for calls like the given one, without the dispatcher.

    Like: tensors of the same shapes, strides, dtypes and devices, and the same parameters, which the caller has
    checked. Of use where nobody watches the dispatcher (``is_watched``).
    """

    __slots__ = ("arguments", "backend", "empty", "kept", "lse_dtype", "may_be_parts", "run")

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood,
        scale: float, backend: str,
    ) -> None:  # fmt: skip
        self.arguments = neighborhood, scale
        self.backend = backend
        self.kept = _layout(query, key, value, rel_pos_bias)
        self.lse_dtype = reference.accumulation_dtype(query.dtype)
        self.empty = query.numel() == 0
        if self.empty:
            return
        query, key, value = _rows(query), _rows(key), _rows(value)
        self.may_be_parts = lie_as_parts(query, key, value)
        module = backends.choose(backend, backends.Call(query, key, value, rel_pos_bias, neighborhood))
        #: forward(query, key, value, rel_pos_bias, with_lse) and backward(d_out, d_lse, ..., out, lse, into)
        self.run = (
            module.prepare(query, key, value, neighborhood, scale)
            if hasattr(module, "prepare")
            else _AnyCall(module, neighborhood, scale)
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Any]:
        """Output and, if asked for, log-sum-exp (else perhaps None); differentiable."""
        if torch.is_grad_enabled() and (
            query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or (rel_pos_bias is not None and rel_pos_bias.requires_grad)
        ):
            out, lse = _Attend.apply(query, key, value, rel_pos_bias, self)
            return out, lse
        return self.forward(query, key, value, rel_pos_bias, with_lse)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Any]:
        if self.empty:
            return _na_forward_fake(query, key, value)
        out, lse = self.run.forward(_rows(query), _rows(key), _rows(value), _resolved(rel_pos_bias), with_lse)
        return out, lse

    def backward(
        self, d_out: Grad, d_lse: Grad, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None,
        out: Tensor, lse: Tensor, all_wanted: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        if self.empty:
            return _no_gradients(query, key, value, rel_pos_bias)
        d_out = torch.zeros_like(out) if d_out is None else _rows(d_out)
        query, key, value = _rows(query), _rows(key), _rows(value)
        into = room_for_gradients(query, key, value) if self.may_be_parts and all_wanted else None
        d_query, d_key, d_value, d_bias = self.run.backward(
            d_out, _resolved(d_lse), query, key, value, _resolved(rel_pos_bias), out, lse, into
        )
        return d_query, d_key, d_value, d_bias

    def is_for(
        self, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, out: Tensor, lse: Tensor
    ) -> bool:
        """Whether what autograd kept is as the forward had it: hooks may have kept copies, laid out otherwise."""
        places = query.shape[:-1]
        return (
            _layout(query, key, value, rel_pos_bias) == self.kept
            and lse.shape == places
            and lse.dtype == self.lse_dtype
            and out.shape == (*places, value.shape[-1])
            and out.dtype == query.dtype
        )


def _layout(query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None) -> tuple[Any, ...]:
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
        query.dtype, key.dtype, value.dtype, query.device, key.device, value.device,
        query.is_neg(), key.is_neg(), value.is_neg(),
        None if rel_pos_bias is None else rel_pos_bias.shape,
    )  # fmt: skip


class _AnyCall:
    """A prepared call of a backend that has no preparations."""

    def __init__(self, module: Any, neighborhood: Neighborhood, scale: float) -> None:
        self._module, self._rest = module, (neighborhood, scale)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, with_lse: bool) -> Any:
        return self._module.forward(query, key, value, bias, *self._rest)

    def backward(self, *given: Any) -> Any:
        return self._module.backward(*given[:-1], *self._rest, into=given[-1])


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def is_watched(query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None) -> bool:
    """Whether a tensor subclass, a fake device, a mode, a transform, a tracer or a profiler wants to see the op."""
    return (
        makes_a_graph()  # torch.jit.trace would record the empty output, and no kernel
        or type(query) not in _PLAIN
        or type(key) not in _PLAIN
        or type(value) not in _PLAIN
        or (rel_pos_bias is not None and type(rel_pos_bias) not in _PLAIN)
        or query.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or has_function_mode()
        or torch.autograd._profiler_enabled()
        or is_transformed()
    )


def _na_forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty([*query.shape[:-1], value.shape[-1]])
    return out, query.new_empty(query.shape[:-1], dtype=reference.accumulation_dtype(query.dtype))


def _na_backward(
    d_out: Grad, d_lse: Grad, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, out: Tensor,
    lse: Tensor, kernel_size: Ints, stride: Ints, dilation: Ints, is_causal: Bools, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if query.numel() == 0:
        d_query, d_key, d_value, d_bias = _no_gradients(query, key, value, rel_pos_bias)
    else:
        neighborhood = _neighborhood(kernel_size, stride, dilation, is_causal)
        *places, heads, dim = query.shape
        expect_kept("key", key, (*places, key.shape[-2], dim), query.dtype)
        expect_kept("value", value, (*places, key.shape[-2], value.shape[-1]), query.dtype)
        expect_kept("rel_pos_bias", rel_pos_bias, (heads, *(2 * k - 1 for k in kernel_size)))
        for name, tensor in (("out", out), ("the gradient of out", d_out)):
            expect_kept(name, tensor, (*places, heads, value.shape[-1]))
        lse = lse.to(reference.accumulation_dtype(query.dtype))
        for name, tensor in (("lse", lse), ("the gradient of lse", d_lse)):
            expect_kept(name, tensor, (*places, heads))
        d_out = torch.zeros_like(out) if d_out is None else _rows(d_out)
        query, key, value = _rows(query), _rows(key), _rows(value)
        chosen = backends.choose(backend, backends.Call(query, key, value, rel_pos_bias, neighborhood))
        d_query, d_key, d_value, d_bias = chosen.backward(
            d_out, d_lse, query, key, value, rel_pos_bias, out, lse, neighborhood, scale
        )
    return d_query, d_key, d_value, _bias_gradient(None, query) if d_bias is None else d_bias


def _no_gradients(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients where there is no query: as many zeros as there are keys, values and bias entries."""
    zeros = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    return zeros[0], zeros[1], zeros[2], _bias_gradient(rel_pos_bias, query)


def _na_backward_fake(
    d_out: Grad, d_lse: Grad, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = query.new_empty(0 if rel_pos_bias is None else rel_pos_bias.shape)
    d_bias = d_bias if rel_pos_bias is None else d_bias.to(rel_pos_bias.dtype)
    return _empty(query), _empty(key), _empty(value), d_bias


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _na_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, rel_pos_bias, *options = inputs
    ctx.save_for_backward(query, key, value, rel_pos_bias, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _na_autograd(ctx: Any, d_out: Grad, d_lse: Grad) -> tuple[Any, ...]:
    nothing = (None,) * 10
    if d_out is None and d_lse is None:
        return nothing
    return *_na_gradients((d_out, d_lse), ctx.saved_tensors, ctx.options), *nothing[4:]


def _na_gradients(gradients: tuple[Grad, ...], kept: tuple[Any, ...], options: Sequence[Any]) -> tuple[Grad, ...]:
    """By the op, of query, key, value and bias."""

    def backward(d_out: Grad, d_lse: Grad) -> tuple[Grad, ...]:
        d_query, d_key, d_value, d_bias = torch.ops.nbhd.na_backward(d_out, d_lse, *kept, *options)
        return d_query, d_key, d_value, None if kept[3] is None else d_bias

    return _along_tangents(backward, gradients)


def _along_tangents(backward: Any, gradients: tuple[Grad, ...]) -> tuple[Grad, ...]:
    """``backward(*gradients)`` in forward mode as well: it is linear in the gradients, and ops drop their tangents."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return tuple(backward(*gradients))
    pairs = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in gradients]
    if all(tangent is None for _, tangent in pairs):
        return tuple(backward(*gradients))
    primals = backward(*(primal for primal, _ in pairs))
    tangents = backward(
        *(torch.zeros_like(p) if p is not None and tangent is None else tangent for p, tangent in pairs)
    )
    return tuple(
        None if primal is None else forward_ad.make_dual(primal, tangent)
        for primal, tangent in zip(primals, tangents, strict=True)
    )


class _Attend(torch.autograd.Function):
    """``na_forward`` with its gradient, called without the dispatcher."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, call: PreparedCall
    ) -> tuple[Tensor, Tensor]:
        out, lse = call.forward(query, key, value, rel_pos_bias, True)
        ctx.save_for_backward(query, key, value, rel_pos_bias, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Grad, d_lse: Grad) -> tuple[Any, ...]:  # type: ignore[override]
        if d_out is None and d_lse is None:
            return (None,) * 5
        query, key, value, rel_pos_bias, out, lse = ctx.saved_tensors
        kept = (query, key, value, rel_pos_bias, out, lse)
        call: PreparedCall = ctx.call
        # Where grad is enabled the gradient itself is to be differentiated, which the op knows how to.
        if (
            torch.is_grad_enabled()
            or is_watched(query, key, value, None)
            or not call.is_for(query, key, value, rel_pos_bias, out, lse)
            or is_special(d_out)
            or is_special(d_lse)
        ):
            neighborhood, scale = call.arguments
            return *_na_gradients((d_out, d_lse), kept, (*flat(neighborhood), scale, call.backend)), None
        *gradients, d_bias = call.backward(d_out, d_lse, *kept, all(ctx.needs_input_grad[:3]))
        return *gradients, None if rel_pos_bias is None else d_bias, None


def _na_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d_out, d_lse, query, key, value, rel_pos_bias, _out, _lse, *options = inputs
    ctx.save_for_backward(d_out, d_lse, query, key, value, rel_pos_bias)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _na_backward_autograd(ctx: Any, *gradients: Grad) -> tuple[Any, ...]:
    d_out, d_lse, query, key, value, rel_pos_bias = ctx.saved_tensors
    *geometry, scale, _ = ctx.options

    def first_order(d_out: Grad, d_lse: Grad, *arguments: Grad) -> list[Grad]:
        q, k, v, bias = arguments
        assert q is not None and k is not None and v is not None
        out, lse = reference.attend(q, k, v, bias, _neighborhood(*geometry), scale)
        results, grads = zip(*((r, g) for r, g in ((out, d_out), (lse, d_lse)) if g is not None), strict=True)
        present = [t for t in arguments if t is not None]
        found = iter(torch.autograd.grad(results, present, grads, create_graph=True))
        return [None if t is None else next(found) for t in arguments]

    inputs = [d_out, d_lse, query, key, value, rel_pos_bias]
    return (*_differentiate(first_order, inputs, gradients), None, None, *(None,) * len(ctx.options))


def _differentiate(first_order: Any, inputs: list[Grad], gradients: Sequence[Grad]) -> list[Grad]:
    """The gradients of ``first_order(*inputs)``, which is itself a gradient, for the incoming ``gradients``."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that leaves and tensors with a history are treated alike and the graph stays connected for the next
        # order.
        inputs = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs
        ]
        pairs = [
            (o, g)
            for o, g in zip(first_order(*inputs), gradients, strict=True)
            if o is not None and g is not None and o.requires_grad
        ]
        present = [t for t in inputs if t is not None]
        if not pairs:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, present, grads, create_graph=wanted, allow_unused=True))
        return [None if t is None else next(found) for t in inputs]


# ---- the unfused pair


def _unfused(name: str, backend: str, call: backends.Call) -> Any:
    """The function ``name`` of the first backend that has it."""
    chosen = backends.choose(backend, call)
    return getattr(chosen, name, None) or getattr(reference, name)


def _scores(
    query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, kernel_size: Ints, stride: Ints, dilation: Ints,
    is_causal: Bools, scale: float, backend: str,
) -> Tensor:  # fmt: skip
    if query.numel() == 0:
        return _scores_fake(query, key, rel_pos_bias, kernel_size)
    neighborhood = _neighborhood(kernel_size, stride, dilation, is_causal)
    query, key = _rows(query), _rows(key)
    run = _unfused("scores", backend, backends.Call(query, key, key, rel_pos_bias, neighborhood))
    result: Tensor = run(query, key, rel_pos_bias, neighborhood, scale)
    return result


def _scores_fake(query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, kernel_size: Ints, *_: Any) -> Tensor:
    slots = 1
    for k in kernel_size:
        slots = slots * k
    return query.new_empty([*query.shape[:-1], slots])


def _scores_backward(
    d_scores: Tensor, query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, kernel_size: Ints, stride: Ints,
    dilation: Ints, is_causal: Bools, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if query.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), _bias_gradient(rel_pos_bias, query)
    neighborhood = _neighborhood(kernel_size, stride, dilation, is_causal)
    expect_kept("key", key, (*query.shape[:-2], key.shape[-2], query.shape[-1]), query.dtype)
    expect_kept("rel_pos_bias", rel_pos_bias, (query.shape[-2], *(2 * k - 1 for k in kernel_size)))
    expect_kept("the gradient of the scores", d_scores, (*query.shape[:-1], neighborhood.slots))
    query, key = _rows(query), _rows(key)
    run = _unfused("scores_backward", backend, backends.Call(query, key, key, rel_pos_bias, neighborhood))
    d_query, d_key, d_bias = run(_rows(d_scores), query, key, rel_pos_bias, neighborhood, scale)
    return d_query, d_key, _bias_gradient(None, query) if d_bias is None else d_bias


def _scores_backward_fake(
    d_scores: Tensor, query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = query.new_empty(0) if rel_pos_bias is None else _empty(rel_pos_bias)
    return _empty(query), _empty(key), d_bias


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, rel_pos_bias, *options = inputs
    ctx.save_for_backward(query, key, rel_pos_bias)
    ctx.options = options


def _scores_autograd(ctx: Any, d_scores: Tensor) -> tuple[Any, ...]:
    kept = ctx.saved_tensors

    def backward(d_scores: Tensor) -> tuple[Grad, ...]:
        d_query, d_key, d_bias = torch.ops.nbhd.scores_backward(d_scores, *kept, *ctx.options)
        return d_query, d_key, None if kept[2] is None else d_bias

    return *_along_tangents(backward, (d_scores,)), *(None,) * len(ctx.options)


def _scores_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d_scores, query, key, rel_pos_bias, *options = inputs
    ctx.save_for_backward(d_scores, query, key, rel_pos_bias)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _scores_backward_autograd(ctx: Any, *gradients: Grad) -> tuple[Any, ...]:
    *geometry, scale, _ = ctx.options

    def first_order(d_scores: Tensor, *arguments: Grad) -> list[Grad]:
        q, k, bias = arguments
        assert q is not None and k is not None
        present = [t for t in arguments if t is not None]
        result = reference.scores(q, k, bias, _neighborhood(*geometry), scale)
        found = iter(torch.autograd.grad(result, present, d_scores, create_graph=True))
        return [None if t is None else next(found) for t in arguments]

    return (*_differentiate(first_order, list(ctx.saved_tensors), gradients), *(None,) * len(ctx.options))


def _weighted_sum(
    weights: Tensor, value: Tensor, kernel_size: Ints, stride: Ints, dilation: Ints, is_causal: Bools, backend: str
) -> Tensor:
    if weights.numel() == 0 or value.numel() == 0:
        return _weighted_sum_fake(weights, value)
    neighborhood = _neighborhood(kernel_size, stride, dilation, is_causal)
    weights, value = _rows(weights), _rows(value)
    run = _unfused("weighted_sum", backend, backends.Call(_as_query(weights, value), value, value, None, neighborhood))
    result: Tensor = run(weights, value, neighborhood)
    return result


def _as_query(weights: Tensor, value: Tensor) -> Tensor:
    """A tensor with the shape the query of this call had, for a backend to judge: no memory behind it."""
    return weights[..., :1].expand(*weights.shape[:-1], value.shape[-1])


def _weighted_sum_fake(weights: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty([*weights.shape[:-1], value.shape[-1]])


def _weighted_sum_backward(
    d_out: Tensor, weights: Tensor, value: Tensor, kernel_size: Ints, stride: Ints, dilation: Ints, is_causal: Bools,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if weights.numel() == 0 or value.numel() == 0:
        return torch.zeros_like(weights), torch.zeros_like(value)
    neighborhood = _neighborhood(kernel_size, stride, dilation, is_causal)
    heads = weights.shape[-2]
    expect_kept("weights", weights, (*value.shape[:-2], heads, neighborhood.slots), value.dtype)
    expect_kept("the gradient of out", d_out, (*value.shape[:-2], heads, value.shape[-1]))
    weights, value = _rows(weights), _rows(value)
    call = backends.Call(_as_query(weights, value), value, value, None, neighborhood)
    d_weights, d_value = _unfused("weighted_sum_backward", backend, call)(_rows(d_out), weights, value, neighborhood)
    return d_weights, d_value


def _weighted_sum_backward_fake(d_out: Tensor, weights: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(weights), _empty(value)


def _weighted_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, value, *options = inputs
    ctx.save_for_backward(weights, value)
    ctx.options = options


def _weighted_sum_autograd(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    kept = ctx.saved_tensors

    def backward(d_out: Tensor) -> tuple[Grad, ...]:
        return tuple(torch.ops.nbhd.weighted_sum_backward(d_out, *kept, *ctx.options))

    return *_along_tangents(backward, (d_out,)), *(None,) * len(ctx.options)


def _weighted_sum_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d_out, weights, value, *options = inputs
    ctx.save_for_backward(d_out, weights, value)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _weighted_sum_backward_autograd(ctx: Any, *gradients: Grad) -> tuple[Any, ...]:
    *geometry, _ = ctx.options

    def first_order(d_out: Tensor, weights: Tensor, value: Tensor) -> list[Grad]:
        result = reference.weighted_sum(weights, value, _neighborhood(*geometry))
        return list(torch.autograd.grad(result, (weights, value), d_out, create_graph=True))

    return (*_differentiate(first_order, list(ctx.saved_tensors), gradients), *(None,) * len(ctx.options))


def _register(name: str, run: Any, fake: Any, setup: Any, backward: Any) -> None:
    qualified = f"nbhd::{name}"
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)


_register("na_forward", _na_forward, _na_forward_fake, _na_setup, _na_autograd)
_register("na_backward", _na_backward, _na_backward_fake, _na_backward_setup, _na_backward_autograd)
_register("scores", _scores, _scores_fake, _scores_setup, _scores_autograd)
_register("scores_backward", _scores_backward, _scores_backward_fake, _scores_backward_setup, _scores_backward_autograd)
_register("weighted_sum", _weighted_sum, _weighted_sum_fake, _weighted_sum_setup, _weighted_sum_autograd)
_register(
    "weighted_sum_backward",
    _weighted_sum_backward,
    _weighted_sum_backward_fake,
    _weighted_sum_backward_setup,
    _weighted_sum_backward_autograd,
)
