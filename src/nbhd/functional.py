"""The operator: ``na1d``, ``na2d``, ``na3d`` and their unfused halves. Every argument is checked here alone."""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nbhd import dense, ops
from nbhd.backends import reference
from nbhd.errors import ArgumentError
from nbhd.flops import tell_counters
from nbhd.geometry import Neighborhood, forget_with_tables
from nbhd.merging import merge_attentions

Ints = int | Sequence[int]
Bools = bool | Sequence[bool]

AXES = "XYZ"

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@overload
def na1d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, stride: Ints = ..., dilation: Ints = ...,
    is_causal: Bools = ..., scale: float | None = ..., *, rel_pos_bias: Tensor | None = ...,
    return_lse: Literal[False] = ..., backend: str = ..., additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def na1d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, stride: Ints = ..., dilation: Ints = ...,
    is_causal: Bools = ..., scale: float | None = ..., *, rel_pos_bias: Tensor | None = ...,
    return_lse: bool, backend: str = ..., additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    *,
    rel_pos_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each token of a sequence to the ``kernel_size`` tokens around it.

    Shapes are those of :func:`na2d` with one spatial axis: query ``[batch, X, heads, dim]``. See there.

    Example:
        >>> q = k = v = torch.randn(1, 1000, 4, 32)
        >>> na1d(q, k, v, kernel_size=65, dilation=4, is_causal=True).shape
        torch.Size([1, 1000, 4, 32])
    """
    return _attention(
        1, query, key, value, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, return_lse, backend,
        additional_keys, additional_values,
    )  # fmt: skip


@overload
def na2d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, stride: Ints = ..., dilation: Ints = ...,
    is_causal: Bools = ..., scale: float | None = ..., *, rel_pos_bias: Tensor | None = ...,
    return_lse: Literal[False] = ..., backend: str = ..., additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def na2d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, stride: Ints = ..., dilation: Ints = ...,
    is_causal: Bools = ..., scale: float | None = ..., *, rel_pos_bias: Tensor | None = ...,
    return_lse: bool, backend: str = ..., additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    *,
    rel_pos_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each position of a map to the ``kernel_size`` window of its nearest neighbours.

    At a border the window is pushed inward, not padded, so every query sees the same number of keys, unless it is
    causal (Hassani et al. 2023, arXiv:2204.07143). With ``dilation`` d the window is taken among the positions of the
    same residue mod d (arXiv:2209.15001). With ``stride`` s, s consecutive queries share the window of one of them:
    of the one at ``s // 2``, or of the last where it is causal (arXiv:2504.16922). docs/attention.md draws them all.

    Args:
        query: ``[batch, X, Y, heads, dim]``; float64, float32, bfloat16 or float16, any strides. X are the rows.
        key: ``[batch, X, Y, kv_heads, dim]``, where ``heads`` is a multiple of ``kv_heads``: query head ``h`` reads
            head ``h // (heads // kv_heads)``.
        value: ``[batch, X, Y, kv_heads, dim_v]``.
        kernel_size: window, an int or one per axis; at least 1, odd or even, ``kernel_size * dilation <= (X, Y)``. An
            even window reaches one further to the left.
        stride: 1 to ``kernel_size``. ``stride == kernel_size`` is attention in blocks.
        dilation: at least 1.
        is_causal: per axis; the window is the query's own place and the ``kernel_size - 1`` before it, fewer at the
            beginning, instead of one around it.
        scale: factor on the scores before the softmax; default ``dim ** -0.5``. 0.0 is taken as 0.0.
        rel_pos_bias: ``[heads, 2 * kx - 1, 2 * ky - 1]`` added to the scaled scores, in a dtype of its own: the entry
            at (place of the key - place of the query + k - 1) on each axis, places counted in steps of ``dilation``.
        return_lse: also return the log-sum-exp of the scores, bias included. It has a gradient.
        backend: ``"auto"``, or the name of one (see ``nbhd info``): an error if that one cannot run the call.
        additional_keys: ``[batch, tokens, kv_heads, dim]``, seen by every query beside its window, in one softmax with
            it and without a bias: a text prompt, registers, learned sinks. With ``additional_values``.
        additional_values: ``[batch, tokens, kv_heads, dim_v]``.

    Returns:
        ``[batch, X, Y, heads, dim_v]`` in the dtype of ``query``, or of an active autocast; sums run in float32
        (float64 for float64). With ``return_lse`` also ``[batch, X, Y, heads]``, natural logarithm, float32 (float64
        for float64).

    Raises:
        ArgumentError: shapes or parameters do not fit (a ``ValueError``; the message names the axis and a remedy).
        BackendError: the named backend cannot run this call (a ``RuntimeError``).

    Example:
        >>> q = k = v = torch.randn(1, 14, 14, 4, 32)
        >>> na2d(q, k, v, kernel_size=7, dilation=2).shape
        torch.Size([1, 14, 14, 4, 32])
    """
    return _attention(
        2, query, key, value, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, return_lse, backend,
        additional_keys, additional_values,
    )  # fmt: skip


@overload
def na3d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, stride: Ints = ..., dilation: Ints = ...,
    is_causal: Bools = ..., scale: float | None = ..., *, rel_pos_bias: Tensor | None = ...,
    return_lse: Literal[False] = ..., backend: str = ..., additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def na3d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, stride: Ints = ..., dilation: Ints = ...,
    is_causal: Bools = ..., scale: float | None = ..., *, rel_pos_bias: Tensor | None = ...,
    return_lse: bool, backend: str = ..., additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    *,
    rel_pos_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each position of a volume or video to the ``kernel_size`` box of its nearest neighbours.

    Shapes are those of :func:`na2d` with three spatial axes: query ``[batch, X, Y, Z, heads, dim]`` (for video X is
    time). See there.

    Example:
        >>> q = k = v = torch.randn(1, 8, 14, 14, 4, 32)
        >>> na3d(q, k, v, kernel_size=(3, 7, 7), is_causal=(True, False, False)).shape
        torch.Size([1, 8, 14, 14, 4, 32])
    """
    return _attention(
        3, query, key, value, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, return_lse, backend,
        additional_keys, additional_values,
    )  # fmt: skip


def attention_scores(
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    *,
    rel_pos_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The scores before the softmax, bias included: :func:`attention_weights` without its last step.

    Returns:
        ``[batch, *spatial, heads, prod(kernel_size)]`` in the dtype of ``query``; minus infinity in unused slots.
    """
    axes = _axes_of(query, "query")
    query, key = _autocast(query, key)
    neighborhood, scale = _check(
        axes, query, key, key, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, backend
    )
    if _needs_plain_torch(query, key, rel_pos_bias):
        return reference.scores(query, key, rel_pos_bias, neighborhood, scale)
    tell_counters()
    result: Tensor = torch.ops.nbhd.scores(query, key, rel_pos_bias, *ops.flat(neighborhood), scale, backend)
    return result


def attention_weights(
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    *,
    rel_pos_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention probabilities, for pictures and for what happens between softmax and values (dropout).

    Takes as much memory as its result; :func:`na2d` never forms it. The number of axes follows from ``query``:
    ``[batch, *spatial, heads, dim]`` with one to three spatial axes. Arguments are those of :func:`na2d`.

    Returns:
        ``[batch, *spatial, heads, prod(kernel_size)]`` in the dtype of ``query``, summing to 1 over the last axis.
        Slots are row-major over the window's offsets: slot ``j`` of an axis is the window's ``j``-th key. A causal
        window that is not full has zeros in its last slots.
    """
    scores = attention_scores(
        query, key, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias=rel_pos_bias, backend=backend
    )
    return torch.softmax(scores, -1)


def apply_attention_weights(
    weights: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Each position's ``weights`` times the values of its neighborhood: the second half of attention.

    Args:
        weights: ``[batch, *spatial, heads, prod(kernel_size)]``, as from :func:`attention_weights`. They need not sum
            to 1.
        value: ``[batch, *spatial, kv_heads, dim_v]``.

    Returns:
        ``[batch, *spatial, heads, dim_v]`` in the dtype of ``value``.
    """
    axes = _axes_of(value, "value")
    weights, value = _autocast(weights, value)
    neighborhood, _ = _check(axes, value, value, value, kernel_size, stride, dilation, is_causal, 1.0, None, backend)
    expected = (*value.shape[:-2], neighborhood.slots)
    if (
        not isinstance(weights, Tensor)
        or weights.ndim != axes + 3
        or (*weights.shape[:-2], weights.shape[-1]) != expected
    ):
        raise ArgumentError(
            f"weights must be [batch, *spatial, heads, {neighborhood.slots}] for value {_shape(value)} and kernel_size "
            f"{neighborhood.kernel_size}, got {_shape(weights)}. Use what attention_weights returns."
        )
    if weights.shape[-2] % value.shape[-2]:
        raise ArgumentError(_heads_rule("weights", weights.shape[-2], value.shape[-2]))
    _same_kind("weights", weights, "value", value)
    if _needs_plain_torch(weights, value):
        return reference.weighted_sum(weights, value, neighborhood)
    tell_counters()
    result: Tensor = torch.ops.nbhd.weighted_sum(weights, value, *ops.flat(neighborhood), backend)
    return result


# ---- what the three share


def _attention(
    axes: int, query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, stride: Ints, dilation: Ints,
    is_causal: Bools, scale: float | None, rel_pos_bias: Tensor | None, return_lse: bool, backend: str,
    additional_keys: Tensor | None, additional_values: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    query, key, value = _autocast(query, key, value)
    if additional_keys is not None or additional_values is not None:
        out, lse = _attention(
            axes, query, key, value, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, True, backend,
            None, None,
        )  # fmt: skip
        if rel_pos_bias is not None:  # which may hide a whole window
            out = out.masked_fill((lse == -math.inf)[..., None], 0.0)
        out, lse = _with_additional(out, lse, query, key, value, additional_keys, additional_values, scale)
        return (out, lse) if return_lse else out
    if ops.is_watched(query, key, value, rel_pos_bias):
        neighborhood, scale = _check(
            axes, query, key, value, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, backend
        )
        if _needs_plain_torch(query, key, value, rel_pos_bias):
            out, lse = reference.attend(query, key, value, rel_pos_bias, neighborhood, scale)
        else:
            out, lse = ops.attend(query, key, value, rel_pos_bias, neighborhood, scale, backend)
        return (out, lse) if return_lse else out
    # A model makes the same call over and over: what was checked and chosen for one is kept for those like it.
    signature = _signature(
        axes, query, key, value, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, backend
    )
    call = _calls.get(signature)
    if call is None:
        neighborhood, scale = _check(
            axes, query, key, value, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, backend
        )
        call = ops.PreparedCall(query, key, value, rel_pos_bias, neighborhood, scale, backend)
        if signature is not None:
            if len(_calls) >= 4096:
                _calls.clear()
            _calls[signature] = call
    if not return_lse:
        return call.attend(query, key, value, rel_pos_bias, False)[0]
    out, lse = call.attend(query, key, value, rel_pos_bias, True)
    return out, lse


_calls: dict[Any, ops.PreparedCall] = {}
forget_with_tables(_calls.clear)


def _with_additional(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, more_keys: Any, more_values: Any,
    scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp of neighborhoods, with the tokens that every query sees besides."""
    if more_keys is None or more_values is None:
        raise ArgumentError("additional_keys and additional_values must be given together, got only one of them.")
    more_keys, more_values = _autocast(more_keys, more_values)
    for name, tensor, like in (("additional_keys", more_keys, key), ("additional_values", more_values, value)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        _same_kind(name, tensor, "query", query)
        batch, heads, dim = like.shape[0], like.shape[-2], like.shape[-1]
        if tensor.ndim != 4 or (tensor.shape[0], *tensor.shape[2:]) != (batch, heads, dim):
            raise ArgumentError(
                f"{name} must be [batch, tokens, heads, dim] = [{batch}, tokens, {heads}, {dim}], got {_shape(tensor)}."
            )
    if more_keys.shape[1] != more_values.shape[1]:
        raise ArgumentError(
            f"additional_values must have the tokens of additional_keys, {more_keys.shape[1]}, got "
            f"{more_values.shape[1]}."
        )
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    extra, extra_lse = dense.attend(query.flatten(1, -3), more_keys, more_values, factor, False, with_lse=True)
    assert extra_lse is not None
    extra, extra_lse = extra.unflatten(1, query.shape[1:-2]), extra_lse.unflatten(1, query.shape[1:-2])
    return merge_attentions([out, extra], [lse, extra_lse])


def _signature(
    axes: int, query: Tensor, key: Tensor, value: Tensor, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any,
    scale: Any, rel_pos_bias: Tensor | None, backend: str,
) -> Any:  # fmt: skip
    """All that checks, the choice of a backend and its preparations depend on; None if that cannot be told."""
    # 3.0 equals 3 and True equals 1, but they are refused
    kinds = tuple(map(_kind_of_parameter, (kernel_size, stride, dilation, is_causal)))
    if not _HASHED.issuperset(map(type, (kernel_size, stride, dilation, is_causal))):  # such as lists, of a JSON
        kernel_size, stride, dilation, is_causal = map(_hashable, (kernel_size, stride, dilation, is_causal))
    try:
        signature = (
            axes, kernel_size, stride, dilation, is_causal, scale, backend, kinds,
            query.shape, query.stride(), query.dtype, query.device,
            key.shape, key.stride(), key.dtype, key.device,
            value.shape, value.stride(), value.dtype, value.device,
            query.is_neg(), key.is_neg(), value.is_neg(),  # those are copied, and the copies lie otherwise
            None if rel_pos_bias is None else (rel_pos_bias.shape, rel_pos_bias.dtype, rel_pos_bias.device),
        )  # fmt: skip
        hash(signature)
    except (TypeError, RuntimeError):  # not hashable, or no strided tensor
        return None
    return signature


#: Parameters of these types are told apart by their values.
_HASHED = frozenset((int, bool, tuple))


def _kind_of_parameter(parameter: Any) -> Any:
    kind = type(parameter)
    return (kind, *map(type, parameter)) if kind is tuple or kind is list else kind


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """As scaled_dot_product_attention: inputs take an active autocast's dtype; float64 stays, and so does a bias."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    device = first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and asking raises
        return tensors
    dtype = torch.get_autocast_dtype(device)
    short = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in short else t for t in tensors)


def _needs_plain_torch(*tensors: Tensor | None) -> bool:
    """Whether only ordinary operations will do: under ``torch.func``, in forward mode and in ``torch.jit.trace``."""
    if torch.compiler.is_compiling():
        # Dual numbers, whose tangents ops would lose: the compiler sees the level and makes another graph for it.
        return torch.autograd.forward_ad._current_level >= 0
    if torch._C._get_tracing_state() is not None:  # it records no list of bools, which the ops have
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _axes_of(tensor: Any, name: str) -> int:
    if not isinstance(tensor, Tensor) or not 4 <= tensor.ndim <= 6:
        raise ArgumentError(
            f"{name} must be a tensor [batch, *spatial, heads, dim], one to three spatial axes, got {_shape(tensor)}."
        )
    return tensor.ndim - 3


# ---- checks


def _check(
    axes: int, query: Any, key: Any, value: Any, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any,
    scale: Any, rel_pos_bias: Any, backend: Any,
) -> tuple[Neighborhood, float]:  # fmt: skip
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    _same_kind("key", key, "query", query)
    _same_kind("value", value, "query", query)
    if not isinstance(backend, str):
        raise ArgumentError(f"backend must be a string such as 'auto', got {backend!r}.")
    parameters = (_hashable(kernel_size), _hashable(stride), _hashable(dilation), _hashable(is_causal))
    shapes = (query.shape, key.shape, value.shape, None if rel_pos_bias is None else _bias_shape(rel_pos_bias, query))
    if torch.compiler.is_compiling():  # lengths may be symbols there
        neighborhood = _check_shapes(axes, *shapes, *parameters)
    else:
        try:
            neighborhood = _check_shapes_once(axes, *shapes, *parameters, tuple(map(_kind_of_parameter, parameters)))
        except TypeError:  # what cannot be hashed: symbols of a tracer's, or no parameters at all
            neighborhood = _check_shapes(axes, *shapes, *parameters)
    if scale is None:
        return neighborhood, query.shape[-1] ** -0.5
    if isinstance(scale, Tensor) or not isinstance(scale, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise ArgumentError(f"scale must be None or a real number, got {scale!r}. Pass a float, such as dim ** -0.5.")
    if isinstance(scale, numbers.Real) and not _is_finite(scale):
        raise ArgumentError(f"scale must be finite and within the range of a float, got {_short(scale)}.")
    return neighborhood, float(scale)


def _is_finite(number: numbers.Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond a float's range
        return False


def _short(number: numbers.Real) -> str:
    """The number, or how it begins: an int may have thousands of digits."""
    try:
        digits = repr(number)
    except ValueError:  # more than Python writes out
        return "an int of very many digits"
    return digits if len(digits) <= 40 else f"{digits[:20]}... ({len(digits)} digits)"


def _bias_shape(bias: Any, query: Tensor) -> Any:
    if not isinstance(bias, Tensor) or bias.dtype not in DTYPES:
        raise ArgumentError(
            f"rel_pos_bias must be None or a float64, float32, bfloat16 or float16 tensor, got {_kind(bias)}."
        )
    if bias.device != query.device:
        raise ArgumentError(
            f"rel_pos_bias is on {bias.device}, query on {query.device}. Move it: .to({str(query.device)!r})."
        )
    return bias.shape


def _check_shapes(
    axes: int, query: Sequence[int], key: Sequence[int], value: Sequence[int], bias: Sequence[int] | None,
    kernel_size: Any, stride: Any, dilation: Any, is_causal: Any, _kinds: Any = None,
) -> Neighborhood:  # fmt: skip
    # `_kinds` are for the cache alone: what equals a good argument need not be one
    layout = f"[batch, {', '.join(AXES[:axes])}, heads, dim]"
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) != axes + 3:
            raise ArgumentError(
                f"{name} must have {axes + 3} axes for na{axes}d, {layout}, got {len(shape)}: {tuple(shape)}."
                + (f" For {len(shape) - 3} spatial axes use na{len(shape) - 3}d." if 4 <= len(shape) <= 6 else "")
            )
        if name != "query" and tuple(shape[:-2]) != tuple(query[:-2]):
            raise ArgumentError(
                f"{name} must have the batch and map of query, {tuple(query[:-2])}, got {tuple(shape[:-2])} in shape "
                f"{tuple(shape)}. Tensors are heads-last, {layout}; move a heads-first axis with .movedim(1, -2)."
            )
    if key[-1] != query[-1]:
        raise ArgumentError(f"key must have the dim of query, {query[-1]}, got {key[-1]}.")
    if value[-2] != key[-2]:
        raise ArgumentError(f"value must have the heads of key, {key[-2]}, got {value[-2]}.")
    if query[-1] < 1 or value[-1] < 1 or query[-2] < 1 or key[-2] < 1:
        raise ArgumentError(f"heads and dim must be at least 1, got query {tuple(query)} and value {tuple(value)}.")
    if query[-2] % key[-2]:
        raise ArgumentError(_heads_rule("query", query[-2], key[-2]))
    spatial = query[1:-2]
    kernel = _per_axis("kernel_size", kernel_size, axes)
    strides = _per_axis("stride", stride, axes)
    dilations = _per_axis("dilation", dilation, axes)
    causal = _per_axis_bools(is_causal, axes)
    for axis in range(axes):
        k, s, d, length, name = kernel[axis], strides[axis], dilations[axis], spatial[axis], AXES[axis]
        if k < 1:
            raise ArgumentError(f"kernel_size must be at least 1, got {k} on axis {name}.")
        if d < 1:
            raise ArgumentError(f"dilation must be at least 1, got {d} on axis {name}.")
        if not 1 <= s <= k:
            raise ArgumentError(
                f"stride must be between 1 and kernel_size, got stride {s} with kernel_size {k} on axis {name}. "
                f"Use stride <= {k}, or a larger window."
            )
        if k * d > length:
            raise ArgumentError(_too_large(name, k, d, length))
    if bias is not None:
        expected = (query[-2], *(2 * k - 1 for k in kernel))
        if tuple(bias) != expected:
            raise ArgumentError(
                f"rel_pos_bias must be [heads, 2 * kernel_size - 1, ...] = {expected} for {query[-2]} heads and "
                f"kernel_size {kernel}, got {tuple(bias)}."
            )
    return Neighborhood(kernel, strides, dilations, causal)


_check_shapes_once = functools.lru_cache(maxsize=4096)(_check_shapes)


def _too_large(axis: str, k: int, d: int, length: int) -> str:
    remedy = [f"pad or resize the input to at least {k * d} along {axis}"]
    if k <= length and d > 1:
        remedy.insert(0, f"use dilation <= {length // k}")
    elif length // d >= 1:
        remedy.insert(0, f"use kernel_size <= {length // d}")
    return (
        f"kernel_size * dilation must fit the map: axis {axis} has {length} positions, but kernel_size {k} with "
        f"dilation {d} spans {k * d}. Here {', or '.join(remedy)}. Tensors are heads-last, "
        "[batch, *spatial, heads, dim]."
    )


def _hashable(parameter: Any) -> Any:
    is_other = isinstance(parameter, Sequence) and not isinstance(parameter, (tuple, str))
    return tuple(parameter) if is_other else parameter


def _per_axis(name: str, given: Any, axes: int) -> tuple[int, ...]:
    values = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,) * axes
    if len(values) != axes:
        raise ArgumentError(
            f"{name} must be an int or {axes} of them, one per axis, got {len(values)}: {tuple(values)}."
        )
    return tuple(_integer(name, entry) for entry in values)


def _integer(name: str, given: Any) -> int:
    if isinstance(given, torch.SymInt):
        return given  # type: ignore[return-value]  # stands for an int while a graph is traced
    try:
        if isinstance(given, (bool, Tensor)):
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise ArgumentError(f"{name} must be an int or one per axis, got {given!r} ({type(given).__name__}).") from None


def _per_axis_bools(given: Any, axes: int) -> tuple[bool, ...]:
    values = given if isinstance(given, (tuple, list)) else (given,) * axes
    # NumPy's are called bool_ before its version 2
    if len(values) != axes or not all(type(entry).__name__ in ("bool", "bool_") for entry in values):
        raise ArgumentError(f"is_causal must be a bool or {axes} of them, one per axis, got {given!r}.")
    return tuple(bool(entry) for entry in values)


def _same_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for each_name, each in ((other_name, other), (name, tensor)):
        if each.is_nested:
            raise ArgumentError(
                f"{each_name} must be a dense tensor, got a nested one. Pad it: {each_name}.to_padded_tensor(0.0), or "
                "call once for each of its tensors."
            )
        if each.layout is not torch.strided:
            raise ArgumentError(
                f"{each_name} must be a dense tensor, got layout {each.layout}. Pass {each_name}.to_dense()."
            )
    if tensor.dtype not in DTYPES:
        raise ArgumentError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}.")
    if tensor.dtype != other.dtype:
        raise ArgumentError(
            f"{name} is {tensor.dtype}, {other_name} {other.dtype}: they must agree. Convert with .to()."
        )
    if tensor.device != other.device:
        raise ArgumentError(
            f"{name} is on {tensor.device}, {other_name} on {other.device}: they must agree. Move it with .to()."
        )


def _heads_rule(name: str, heads: int, kv_heads: int) -> str:
    return f"{name} must have a multiple of the heads of key and value, {kv_heads}, got {heads} heads."


def _shape(tensor: Any) -> str:
    return str(tuple(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__


def _kind(tensor: Any) -> str:
    return str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
