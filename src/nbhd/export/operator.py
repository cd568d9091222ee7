"""The operator in ordinary tensor operations of any length, for graphs that leave nbhd behind.

A graph made by ``torch.export`` calls ``nbhd::na_forward``. What is written here computes the same with Range, Gather
along one axis at a time, MatMul and elementwise arithmetic, with map sizes that may stay symbols; `program` puts it
into an exported program and `onnx_tensor` into an ONNX graph. The last axis is cut into blocks of ``T`` queries, whose
keys lie in ``T + k - 1`` consecutive places; the other axes are walked one window offset at a time, with an online
softmax (Milakov and Gimelshein, arXiv:1805.02867):

    for each offset of the outer axes:            one copy of the key and value blocks, rows gathered
        scores  [.., T, T + k - 1] = q k' + bias, masked outside each query's window
        maximum, sum and output are rescaled and added to

so beyond its inputs it holds a few tensors of the size of key and value, and never ``prod(kernel_size)`` copies.

Only operations that `nbhd.export.onnx_tensor.OnnxTensor` knows too are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbhd.geometry import window

#: Fewest queries in a block of the last axis: smaller products are dominated by the cost of starting them.
SMALLEST_BLOCK = 8

#: Most keys that one product sees, so that scores stay small beside keys and values.
MOST_KEYS = 128

#: Added to the scores of keys outside a window. Finite, because minus infinity less itself is not a number.
OUTSIDE = -1e30


def attend(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, kernel_size: Sequence[int],
    stride: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool], scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``nbhd::na_forward``: output ``[batch, *spatial, heads, dim_v]`` and log-sum-exp ``[batch, *spatial, heads]``."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, *spatial = query.shape[:-2]
    outer = spatial[:-1]
    heads, kv_heads, dim, dim_v = query.shape[-2], key.shape[-2], key.shape[-1], value.shape[-1]
    groups = heads // kv_heads
    axis = query.ndim - 3
    blocks = _blocks(spatial[-1], kernel_size[-1], stride[-1], dilation[-1], is_causal[-1], query)
    n, t, s, rows = blocks.number, blocks.queries, blocks.keys, groups * blocks.queries

    # [batch, *outer, block * kv_heads, groups * T, dim], and keys and values to multiply that with
    q = (query.to(dtype) * scale).index_select(axis, blocks.query_position)
    q = q.reshape(batch, *outer, n, t, kv_heads, groups, dim).movedim(-4, -2)
    q = q.reshape(batch, *outer, n * kv_heads, rows, dim)
    k = key.to(dtype).index_select(axis, blocks.key_position).reshape(batch, *outer, n, s, kv_heads, dim)
    k = k.movedim(-3, -1).reshape(batch, *outer, n * kv_heads, dim, s)
    v = value.to(dtype).index_select(axis, blocks.key_position).reshape(batch, *outer, n, s, kv_heads, dim_v)
    v = v.movedim(-3, -2).reshape(batch, *outer, n * kv_heads, s, dim_v)

    added = _added(blocks, rel_pos_bias, kv_heads, groups, dtype)  # [*tables, block * kv_heads, groups * T, S]
    steps = [_steps(*each, query) for each in zip(outer, kernel_size, stride, dilation, is_causal, strict=False)]

    highest: Any = None
    total: Any = None
    result: Any = None
    for offsets in itertools.product(*steps):
        k_rows, v_rows, here = k, v, added
        for place, offset in enumerate(offsets):
            k_rows, v_rows = k_rows.index_select(place + 1, offset.key), v_rows.index_select(place + 1, offset.key)
            if rel_pos_bias is not None:
                here = here.index_select(place, offset.relative)
        for begin in range(0, s, MOST_KEYS):
            many = min(MOST_KEYS, s - begin)
            found = torch.matmul(q, _narrow(k_rows, -1, begin, many)) + _narrow(here, -1, begin, many)
            for place, offset in enumerate(offsets):
                if offset.outside is not None:
                    found = found + offset.outside.to(dtype).reshape(-1, *(1,) * (found.ndim - place - 2))
            top = found.amax(-1, keepdim=True)
            if highest is not None:
                top = torch.maximum(top, highest)
            weights = torch.exp(found - top)
            part = torch.matmul(weights, _narrow(v_rows, -2, begin, many))
            share = weights.sum(-1, keepdim=True)
            if highest is not None:
                before = torch.exp(highest - top)
                part, share = result * before + part, total * before + share
            highest, total, result = top, share, part

    def to_map(tensor: Tensor, channels: int) -> Tensor:
        tensor = tensor.reshape(batch, *outer, n, kv_heads, groups, t, channels).movedim(-2, -4)
        return tensor.reshape(batch, *outer, n * t, heads, channels).index_select(axis, blocks.place_of_position)

    out = to_map(result / total, dim_v).to(query.dtype)
    return out, to_map(highest + torch.log(total), 1).squeeze(-1)


@dataclass(frozen=True)
class _Blocks:
    """The last axis as blocks of queries with the keys they may see; dilation groups one after the other."""

    number: int  # blocks, of all groups
    queries: int  # T, of a block
    keys: int  # S, of a block
    query_position: Tensor  # [number * T]; queries beyond the group's end repeat its last
    key_position: Tensor  # [number * S]
    inside: Tensor  # [number, T, S] whether the query sees the key
    relative: Tensor  # [number * T * S] index into the bias's last axis
    place_of_position: Tensor  # [length] where a position's query stands in query_position


def _blocks(length: Any, kernel_size: int, stride: int, dilation: int, is_causal: bool, like: Tensor) -> _Blocks:
    # A whole number of strides, so that the windows of a block begin within T - 1 places of the first one's.
    t = -(-max(kernel_size, SMALLEST_BLOCK) // stride) * stride
    s = t + kernel_size - 1
    per_group = ((length + (dilation - 1)) // dilation + (t - 1)) // t
    group = _range(dilation, like).reshape(dilation, 1, 1, 1)
    last = (length - 1 - group) // dilation  # last place of the group
    place = torch.minimum(_range(per_group * t, like).reshape(1, per_group, t, 1), last)
    position = place * dilation + group
    first, count = window(position, length, kernel_size, stride, dilation, is_causal)
    first = (first - group) // dilation
    key = first.narrow(2, 0, 1) + _range(s, like)  # [d, per_group, 1, S] places
    inside = (key >= first) & (key < first + count)
    number = dilation * per_group
    everywhere = _range(length, like)
    return _Blocks(
        number,
        t,
        s,
        position.reshape(-1),
        (torch.minimum(key, last) * dilation + group).reshape(-1),
        inside.reshape(number, t, s),
        (key - place + (kernel_size - 1)).clamp(min=0, max=2 * kernel_size - 2).reshape(-1),
        everywhere % dilation * (per_group * t) + everywhere // dilation,
    )


def _added(blocks: _Blocks, bias: Tensor | None, kv_heads: int, groups: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, for each relative place on the outer axes: the bias, and the mask."""
    mask = torch.where(blocks.inside, 0.0, OUTSIDE).to(dtype)  # [number, T, S]
    n, rows, s = blocks.number, groups * blocks.queries, blocks.keys
    if bias is None:
        mask = mask if groups == 1 else torch.cat([mask] * groups, 1)
        return mask if kv_heads == 1 else torch.stack([mask] * kv_heads, 1).reshape(n * kv_heads, rows, s)
    outer = bias.shape[1:-1]
    table = bias.to(dtype).index_select(bias.ndim - 1, blocks.relative)
    table = table.reshape(kv_heads * groups, *outer, n, blocks.queries, s) + mask
    return table.movedim(0, -3).reshape(*outer, n * kv_heads, rows, s)


@dataclass(frozen=True)
class _Step:
    """One window offset of one axis, for all its queries."""

    key: Tensor  # [length] position of the key
    relative: Tensor  # [length] index into the bias's table
    outside: Tensor | None  # [length] 0 where there is such a key, else OUTSIDE; None where there is one for all


def _steps(length: Any, kernel_size: int, stride: int, dilation: int, is_causal: bool, like: Tensor) -> list[_Step]:
    position = _range(length, like)
    first, count = window(position, length, kernel_size, stride, dilation, is_causal)
    steps = []
    for offset in range(kernel_size):
        # A slot without a key repeats the last one. Slot 0 always has one.
        used = (count - 1).clamp(max=offset) if is_causal else offset
        key = first + used * dilation
        relative = (key - position) // dilation + (kernel_size - 1)
        outside = torch.where(count > offset, 0.0, OUTSIDE) if is_causal and offset else None
        steps.append(_Step(key, relative, outside))
    return steps


# ---- the unfused pair: what is stored has prod(kernel_size) slots by its definition


def scores(
    query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, kernel_size: Sequence[int], stride: Sequence[int],
    dilation: Sequence[int], is_causal: Sequence[bool], scale: float, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``nbhd::scores``: ``[batch, *spatial, heads, slots]``, minus infinity in unused slots."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    *shape, heads, dim = query.shape
    kv_heads = key.shape[-2]
    q = (query.to(dtype) * scale).reshape(*shape, kv_heads, heads // kv_heads, dim)
    k = key.to(dtype).reshape(*shape, kv_heads, 1, dim)
    found = []
    for offsets in _all_steps(query, kernel_size, stride, dilation, is_causal):
        one = (q * _picked(k, offsets)).sum(-1, keepdim=True).reshape(*shape, heads)
        if rel_pos_bias is not None:
            bias = rel_pos_bias.to(dtype)
            for place, offset in enumerate(offsets):
                bias = bias.index_select(place + 1, offset.relative)
            one = one + bias.movedim(0, -1)
        found.append(_masked(one, offsets, float("-inf")))
    return torch.stack(found, len(shape) + 1).to(query.dtype)


def weighted_sum(
    weights: Tensor, value: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    is_causal: Sequence[bool], backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``nbhd::weighted_sum``: ``[batch, *spatial, heads, dim_v]``."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    *shape, kv_heads, dim_v = value.shape
    heads = weights.shape[-2]
    v = value.to(dtype).reshape(*shape, kv_heads, 1, dim_v)
    result: Any = None
    for slot, offsets in enumerate(_all_steps(value, kernel_size, stride, dilation, is_causal)):
        weight = _narrow(weights.to(dtype), -1, slot, 1).reshape(*shape, heads)
        weight = _masked(weight, offsets, 0.0).reshape(*shape, kv_heads, heads // kv_heads, 1)
        part = weight * _picked(v, offsets)
        result = part if result is None else result + part
    combined: Tensor = result.reshape(*shape, heads, dim_v).to(value.dtype)
    return combined


def _all_steps(
    tensor: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> list[tuple[_Step, ...]]:  # fmt: skip
    """The steps of every slot, row-major over the window's offsets."""
    axes = zip(tensor.shape[1:-2], kernel_size, stride, dilation, is_causal, strict=True)
    return list(itertools.product(*(_steps(*axis, tensor) for axis in axes)))


def _picked(tensor: Tensor, offsets: Sequence[_Step]) -> Tensor:
    for place, offset in enumerate(offsets):
        tensor = tensor.index_select(place + 1, offset.key)
    return tensor


def _masked(tensor: Tensor, offsets: Sequence[_Step], fill: float) -> Tensor:
    """``[batch, *spatial, heads]`` with ``fill`` where the slot has no key."""
    for place, offset in enumerate(offsets):
        if offset.outside is not None:
            outside = (offset.outside < 0).reshape(-1, *(1,) * (tensor.ndim - place - 2))
            tensor = tensor.masked_fill(outside, fill)
    return tensor


def _range(length: Any, like: Tensor) -> Tensor:
    """0 to ``length - 1`` as int64."""
    if isinstance(like, Tensor):
        return torch.arange(length, device=like.device)
    return type(like).range(length)  # type: ignore[unreachable]


def _narrow(tensor: Tensor, axis: int, begin: int, length: int) -> Tensor:
    return tensor if tensor.shape[axis] == length else tensor.narrow(axis, begin, length)
