"""The unfused pair: scores of a neighborhood, and values weighted with it. Heads first in and out.

    qk   query, key [batch, heads, *spatial, dim]             ->  [batch, heads, *spatial, slots (+ additional tokens)]
    av   attn [batch, heads, *spatial, slots (+ additional)]  ->  [batch, heads, *spatial, dim]

No scaling and no softmax inside. Slots are row-major over the window; where a causal window is not full its last slots
hold minus infinity. Scores of additional tokens come after all slots.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nbhd.compat.natten.core.signature import Signature
from nbhd.compat.natten.core.tensors import autocast, check_tensor, or_default, per_axis
from nbhd.errors import ArgumentError
from nbhd.functional import apply_attention_weights, attention_scores


def scores(
    signature: Signature,
    axes: int,
    query: Tensor,
    key: Tensor,
    kernel_size: Any,
    dilation: Any,
    is_causal: Any = False,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Dot products of each query with the keys of its window, plus ``rpb`` ``[heads, 2k - 1, ...]``."""
    if _any_nested(query, key, additional_keys):
        return _each(
            lambda q, k, extra: scores(signature, axes, q, k, kernel_size, dilation, is_causal, rpb, extra),
            query,
            key,
            additional_keys,
        )
    check_tensor(signature, "query", query, axes + 3)
    check_tensor(signature, "key", key, axes + 3)
    if query.shape != key.shape:
        raise signature.error(f"Query and key must have one shape, got {tuple(query.shape)} and {tuple(key.shape)}.")
    if rpb is not None and isinstance(rpb, Tensor) and rpb.ndim == axes + 1 and rpb.shape[0] != query.shape[1]:
        raise signature.error(
            f"The bias has {rpb.shape[0]} heads, query has {query.shape[1]} in shape {tuple(query.shape)}. If query is "
            f"heads last, move its heads: .movedim(-2, 1)."
        )
    query, key = autocast(query, key)
    if additional_keys is not None:
        additional_keys = _additional(signature, "additional_keys", additional_keys, query)
    try:
        found = attention_scores(
            query.movedim(1, -2),
            key.movedim(1, -2),
            kernel_size,
            1,
            or_default(dilation, 1),
            or_default(is_causal, False),
            1.0,
            rel_pos_bias=rpb,
        )
    except ArgumentError as error:
        raise signature.error(f"{error} Query is {tuple(query.shape)}.") from None
    found = found.movedim(-2, 1)
    if additional_keys is None:
        return found.contiguous()
    extra = torch.matmul(query.flatten(2, -2), additional_keys.transpose(-1, -2))
    return torch.cat([found, extra.unflatten(2, query.shape[2:-1])], -1)


def weighted_sum(
    signature: Signature,
    axes: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: Any,
    dilation: Any,
    is_causal: Any = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Weights times the values of each window. ``attn`` is cast to the dtype of ``value``."""
    if _any_nested(attn, value, additional_values):
        return _each(
            lambda a, v, extra: weighted_sum(signature, axes, a, v, kernel_size, dilation, is_causal, extra),
            attn,
            value,
            additional_values,
        )
    check_tensor(signature, "attn", attn, axes + 3)
    check_tensor(signature, "value", value, axes + 3)
    (value,) = autocast(value)
    more = 0
    if additional_values is not None:
        additional_values = _additional(signature, "additional_values", additional_values, value)
        more = additional_values.shape[2]
    try:
        slots = math.prod(per_axis(kernel_size, axes))
    except TypeError:
        raise signature.error(f"Got kernel_size {kernel_size!r}.") from None
    if attn.shape[:-1] != value.shape[:-1] or attn.shape[-1] != slots + more:
        wanted = f"{slots} + {more}" if more else f"{slots}"
        raise signature.error(
            f"Attention must be [batch, heads, ..., {wanted}] with the batch, heads and map of value, got "
            f"{tuple(attn.shape)} and value {tuple(value.shape)}."
        )
    attn = attn.to(value.dtype)
    window, rest = (attn, None) if additional_values is None else attn.split([slots, more], -1)
    try:
        out = apply_attention_weights(
            window.movedim(1, -2),
            value.movedim(1, -2),
            kernel_size,
            1,
            or_default(dilation, 1),
            or_default(is_causal, False),
        )
    except ArgumentError as error:
        raise signature.error(f"{error} Value is {tuple(value.shape)}.") from None
    out = out.movedim(-2, 1)
    if additional_values is None or rest is None:
        return out.contiguous()
    extra = torch.matmul(rest.flatten(2, -2), additional_values)
    return out + extra.unflatten(2, value.shape[2:-1])


def _additional(signature: Signature, name: str, extra: Any, like: Tensor) -> Tensor:
    """Additional tokens, in the dtype of an active autocast as ``like`` is, and checked against it."""
    check_tensor(signature, name, extra, 4)
    batch, heads, dim = like.shape[0], like.shape[1], like.shape[-1]
    if extra.shape[0] != batch or extra.shape[1] != heads or extra.shape[3] != dim:
        raise signature.error(
            f"{name} must be [batch, heads, tokens, dim] = [{batch}, {heads}, tokens, {dim}], got {tuple(extra.shape)}."
        )
    (found,) = autocast(extra)
    if found.dtype != like.dtype or found.device != like.device:
        raise signature.error(f"{name} is {found.dtype} on {found.device}, not {like.dtype} on {like.device}.")
    return found


def _any_nested(*tensors: Any) -> bool:
    return any(isinstance(t, Tensor) and t.is_nested for t in tensors)


def _each(function: Any, *tensors: Tensor | None) -> Tensor:
    """Component by component of nested tensors, for inference, as NATTEN 0.15 to 0.17."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ArgumentError("Nested tensors are for inference only: use torch.no_grad(), or a loop over components.")
    count = max(t.size(0) for t in tensors if t is not None and t.is_nested)
    parts = [[None] * count if t is None else list(t.unbind()) for t in tensors]
    if any(len(part) != count for part in parts):
        raise ArgumentError(f"Nested tensors must have as many components as one another, got {[*map(len, parts)]}.")
    return torch.nested.nested_tensor([function(*components) for components in zip(*parts, strict=True)])
