"""Query, key and value as parts of one tensor, as one projection makes them, and their gradients as parts of one.

A layer projects its input once, to ``3 * heads * dim`` channels, and the operator reads the three parts where they lie.
Taken apart by PyTorch's own views, their gradients come as three tensors, which autograd then copies into one: another
pass over all of it. `split_qkv` and `room_for_gradients` spare it: the backward writes all three into one tensor, and
`split_qkv` hands that on as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbhd._modes import is_transformed, makes_a_graph
from nbhd.errors import ArgumentError

Three = tuple[Tensor, Tensor, Tensor]


def split_qkv(qkv: Tensor, num_heads: int, num_kv_heads: int | None = None) -> Three:
    """Query, key and value, as views, of a projection's output, whose channels are in this order: part, head, channel.

    The same as ``qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)``, where key and value have as many heads. The
    gradients come back faster: those of the parts lie in the memory of that of ``qkv``. Who asks for both and changes
    one in place changes the other.

    Args:
        qkv: ``[batch, *spatial, (num_heads + 2 * num_kv_heads) * dim]``.
        num_heads: heads of the query.
        num_kv_heads: heads of key and value each, default ``num_heads``. Grouped heads have fewer.

    Returns:
        Three views ``[batch, *spatial, heads, dim]``.

    Raises:
        ArgumentError: a number of heads is below 1, or the channels are no multiple of all heads.

    Example:
        >>> qkv = torch.randn(2, 14, 14, 3 * 128)
        >>> query, key, value = split_qkv(qkv, num_heads=4)
        >>> query.shape
        torch.Size([2, 14, 14, 4, 32])
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or kv_heads < 1 or qkv.shape[-1] % (num_heads + 2 * kv_heads):
        heads, given = (
            ("3 * num_heads", f"num_heads {num_heads}")
            if num_kv_heads is None
            else ("(num_heads + 2 * num_kv_heads)", f"num_heads {num_heads}, num_kv_heads {num_kv_heads}")
        )
        raise ArgumentError(f"qkv must have {heads} * dim channels, got {tuple(qkv.shape)} and {given}.")
    if not (torch.is_grad_enabled() and qkv.requires_grad) or _knows_plain_operators_only(qkv):
        return _views(qkv, num_heads, kv_heads)
    query, key, value = _Split.apply(qkv, num_heads, kv_heads)
    return query, key, value


def _views(qkv: Tensor, num_heads: int, num_kv_heads: int) -> Three:
    if num_heads == num_kv_heads:
        query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    else:
        by_heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
        query, key, value = by_heads.split([num_heads, num_kv_heads, num_kv_heads], -2)
    return query, key, value


def _knows_plain_operators_only(qkv: Tensor) -> bool:
    """Whether a compiler, a tracer, a transform or a class of tensors is to see what is done."""
    return makes_a_graph() or type(qkv) is not Tensor or torch._C._len_torch_dispatch_stack() > 0 or is_transformed()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, num_kv_heads: int) -> Three:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        parts = _views(qkv, num_heads, num_kv_heads)
        ctx.whole = qkv.shape
        ctx.shapes = [part.shape for part in parts]
        ctx.is_leaf = qkv.is_leaf or (qkv._base is not None and qkv._base.is_leaf)
        return parts

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        given = [part for part in parts if part is not None]
        if not given:
            return None, None, None
        # where grad is enabled the gradient itself is to be differentiated
        whole = None if torch.is_grad_enabled() else _whole(*parts)
        if whole is None:
            zero = given[0].new_zeros(())
            each = [zero.expand(shape) if part is None else part for part, shape in zip(parts, ctx.shapes, strict=True)]
            whole = torch.cat(each, -2).view(ctx.whole)
        elif ctx.is_leaf:  # it will be added to in place, and somebody may have kept the parts
            whole = whole.clone()
        return whole, None, None


def _whole(*parts: Tensor | None) -> Tensor | None:
    """The tensor ``[..., (heads + 2 * kv_heads) * dim]`` that these are the parts of, or None if they are not."""
    query, key, value = parts
    if query is None or key is None or value is None or not are_parts(query, key, value):
        return None
    channels = (query.shape[-2] + 2 * key.shape[-2]) * query.shape[-1]
    return query.as_strided((*query.shape[:-2], channels), (*query.stride()[:-2], 1))


def lie_as_parts(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether their shapes and strides are those of the parts of a tensor ``[..., (heads + 2 * kv_heads) * dim]``."""
    *places, heads, dim = query.shape
    *key_places, kv_heads, key_dim = key.shape
    return (
        key.shape == value.shape
        and places == key_places
        and dim == key_dim
        and query.stride() == key.stride() == value.stride()
        and query.stride()[-3:] == ((heads + 2 * kv_heads) * dim, dim, 1)
    )


def are_parts(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether they are the parts, in this order, of a tensor ``[..., (heads + 2 * kv_heads) * dim]``."""
    if not lie_as_parts(query, key, value):
        return False
    storage = query.untyped_storage().data_ptr()
    dim = query.shape[-1]
    at_key = query.storage_offset() + query.shape[-2] * dim
    return (
        key.untyped_storage().data_ptr() == storage == value.untyped_storage().data_ptr()
        and key.storage_offset() == at_key
        and value.storage_offset() == at_key + key.shape[-2] * dim
    )


def room_for_gradients(query: Tensor, key: Tensor, value: Tensor) -> Three | None:
    """Three empty parts of one tensor where these are parts of one; else None."""
    if not are_parts(query, key, value):
        return None
    *places, heads, dim = query.shape
    kv_heads = key.shape[-2]
    return _views(query.new_empty((*places, (heads + 2 * kv_heads) * dim)), heads, kv_heads)
