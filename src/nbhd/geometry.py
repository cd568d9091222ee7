"""Neighborhoods as integer tables: the only place that says which keys a query sees.

One axis of ``L`` positions with window ``k``, dilation ``d`` and stride ``s``. Positions of equal residue mod ``d``
form a group; inside its group a position has a *place*:

    group  g = i mod d        place  u = i div d        length of the group  Lg = ceil((L - g) / d)

    not causal   leader  u* = min((u div s) * s + s div 2, Lg - 1)
                 window  places [w, w + k - 1],   w = clamp(u* - k div 2, 0, Lg - k)
    causal       leader  u* = min((u div s) * s + s - 1, Lg - 1)
                 window  places [max(u* - k + 1, 0), u]

so a window never leaves the map (it is pushed inward at a border and keeps its ``k`` keys), and a causal one shrinks at
the start. A neighborhood on several axes is the product of one window per axis. Sources: Hassani et al. 2023
(arXiv:2204.07143), Hassani & Shi 2022 (arXiv:2209.15001, dilation), Hassani et al. 2025 (arXiv:2504.16922, stride).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighborhood:
    """The parameters of a neighborhood, one entry per axis. Assumed valid: ``functional`` checks them."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def axes(self) -> int:
        return len(self.kernel_size)

    @property
    def slots(self) -> int:
        """Number of keys in a full window: the product of ``kernel_size``."""
        return math.prod(self.kernel_size)

    def tables(self, spatial: tuple[int, ...]) -> tuple[AxisTable, ...]:
        """The table of each axis of a map of size ``spatial``."""
        return tuple(
            axis_table(*axis)
            for axis in zip(spatial, self.kernel_size, self.stride, self.dilation, self.is_causal, strict=True)
        )


@dataclass(frozen=True)
class AxisTable:
    """One axis: ``[length]`` int64 CPU tensors, positions (not places).

    Query ``i`` sees the keys ``first[i] + j * dilation`` for ``0 <= j < count[i]``.
    Key ``i`` is seen by the queries ``first_query[i] + j * dilation`` for ``0 <= j < query_count[i]``: seen from a key,
    too, the others form an interval of its dilation group, because the window's ends never move back along the axis.
    """

    length: int
    kernel_size: int
    dilation: int
    first: Tensor
    count: Tensor
    first_query: Tensor
    query_count: Tensor


def window(
    position: Tensor, length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """First key position and number of keys of the queries at ``position`` (any int64 tensor), by the formulas above.

    Written in tensor arithmetic alone, so that it can be traced with a ``length`` that is not a constant.
    """
    group = position % dilation
    place = position // dilation
    group_length = (length - group + dilation - 1) // dilation
    if is_causal:
        leader = torch.minimum(place // stride * stride + (stride - 1), group_length - 1)
        first = (leader - (kernel_size - 1)).clamp(min=0)
        return first * dilation + group, place - first + 1
    leader = torch.minimum(place // stride * stride + stride // 2, group_length - 1)
    first = torch.minimum((leader - kernel_size // 2).clamp(min=0), group_length - kernel_size)
    return first * dilation + group, torch.full_like(first, kernel_size)


#: Bytes of tables after which all that keep some forget them: lengths that are never the same again would fill memory.
MOST_BYTES = 1 << 27

_forget: list[Callable[[], None]] = []
_bytes_made = 0


def forget_with_tables(clear: Callable[[], None]) -> None:
    """Have ``clear`` called when tables have become too many: that of a cache whose entries hold some."""
    _forget.append(clear)


def _make_room(length: int) -> None:
    global _bytes_made
    _bytes_made += 4 * length * torch.int64.itemsize
    if _bytes_made > MOST_BYTES:
        _bytes_made = 4 * length * torch.int64.itemsize
        for clear in _forget:
            clear()


@functools.lru_cache(maxsize=512)
def axis_table(length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> AxisTable:
    """The forward and inverse intervals of one axis. Cached: treat the tensors as read-only."""
    _make_room(length)
    with torch.inference_mode(False):  # an inference tensor in the cache could never be saved for a backward
        position = torch.arange(length, device="cpu")
        first, count = window(position, length, kernel_size, stride, dilation, is_causal)
        last = first + (count - 1) * dilation
        # Both ends are non-decreasing inside a dilation group, so the queries that see a key are found by counting:
        # those whose window ends before it lie left of the interval, those whose window begins after it lie right of
        # it. Group after group in one ascending row makes that one search.
        group = position % dilation
        order = torch.argsort(group, stable=True)
        row = group * length
        members = (row + position)[order]
        ended = torch.searchsorted((row + last)[order], members)
        begun = torch.searchsorted((row + first)[order], members, right=True)
        first_query, query_count = torch.empty_like(first), torch.empty_like(first)
        first_query[order] = order[ended]
        query_count[order] = begun - ended
    return AxisTable(length, kernel_size, dilation, first, count, first_query, query_count)


forget_with_tables(axis_table.cache_clear)
