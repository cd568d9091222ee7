"""Boxes of queries and keys, chosen and counted on the host. No Triton here.

A neighborhood becomes three axes: a sequence has its axis first, a plane its rows first and its columns last; the rest
have length 1. Box sizes are powers of two and depend on the window, never on the size of the map (but for the one
question whether a window is the whole axis), so that a new map compiles nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from nbhd.geometry import Neighborhood, axis_table

Triple = tuple[int, int, int]


class Axis(NamedTuple):
    """One of three axes, as the kernels see it. ``is_whole``: every window is all of its dilation group."""

    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    is_whole: bool


class Tile(NamedTuple):
    """A box of ``queries`` and a box of ``keys`` that meet."""

    queries: Triple
    keys: Triple


#: Where the axes of a map go among three.
POSITIONS = {1: (0,), 2: (0, 2), 3: (0, 1, 2)}


def three(values: tuple[int, ...], absent: int) -> Triple:
    """One value an axis of the map -> three, ``absent`` for the axes it has not."""
    found = [absent] * 3
    for position, value in zip(POSITIONS[len(values)], values, strict=True):
        found[position] = value
    return found[0], found[1], found[2]


@functools.lru_cache(maxsize=1024)
def axes_of(neighborhood: Neighborhood, spatial: tuple[int, ...]) -> tuple[Axis, Axis, Axis]:
    found = [Axis(1, 1, 1, False, True)] * 3
    for axis, position in enumerate(POSITIONS[len(spatial)]):
        k, d, length = neighborhood.kernel_size[axis], neighborhood.dilation[axis], spatial[axis]
        causal = neighborhood.is_causal[axis]
        # with a window of one key stride and causality change nothing
        found[position] = Axis(k, neighborhood.stride[axis], d, causal, not causal and math.ceil(length / d) == k)
    return found[0], found[1], found[2]


def power_of_two(n: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(0, (n - 1).bit_length())


def halo(axis: Axis, queries: int) -> int:
    """Most places along an axis that the windows of consecutive queries touch, whatever the size of the map."""
    if axis.is_whole:
        return axis.kernel_size
    return queries - 1 + axis.kernel_size + (0 if axis.is_causal else axis.stride - 1)


def padding(axes: tuple[Axis, ...], queries: Triple) -> float:
    """What boxes that reach beyond an axis cost, where its length is known: a window that is the whole axis."""
    return math.prod(
        math.ceil(a.kernel_size / t) * t / a.kernel_size for a, t in zip(axes, queries, strict=True) if a.is_whole
    )


def _splits(n: int, axes: tuple[Axis, ...]) -> list[Triple]:
    """The ways to make a box of ``n`` elements, ``n`` a power of two, on the axes that are there."""
    sizes = [1 << i for i in range(n.bit_length())]
    found = []
    for a, b in itertools.product(sizes, sizes):
        if n % (a * b) == 0:
            found.append((a, b, n // (a * b)))
    # an axis that is not there, or has windows of one key, takes what no other can
    used = [t for t in found if all(size == 1 or axis.kernel_size > 1 for size, axis in zip(t, axes, strict=True))]
    return used or [t for t in found if t[1] == 1 and t[2] == 1] or found


@functools.lru_cache(maxsize=4096)
def once(axes: tuple[Axis, Axis, Axis], own: int, most: int) -> tuple[Triple, Triple] | None:
    """Boxes of ``own`` queries and of the keys that they see, the fewest; None where these are more than ``most``.

    Away from the ends of an axis the same boxes hold keys and the queries that see them.
    """
    best = None
    for box in _splits(own, axes):
        met = tuple(power_of_two(halo(axis, t)) for axis, t in zip(axes, box, strict=True))
        met = (met[0], met[1], max(met[2], power_of_two(math.ceil(16 / (met[0] * met[1])))))  # no product is narrower
        # equal work: the longer rows in memory
        cost = (math.prod(met) * padding(axes, box), -box[2], -box[1])
        if math.prod(met) <= most and (best is None or cost < best[0]):
            best = cost, box, met
    return None if best is None else (best[1], best[2])


@functools.lru_cache(maxsize=4096)
def loop(axes: tuple[Axis, Axis, Axis], own: int, met: int) -> tuple[Triple, Triple]:
    """Boxes of ``own`` queries (or keys) and of the ``met`` keys (or queries) that they visit at a time.

    Those with the least visited work, then those with the longer rows in memory.
    """
    best = None
    for mine in _splits(own, axes):
        for box in _splits(met, axes):
            cost = (waste(axes, mine, box), -box[2] - mine[2], -box[1] - mine[1])
            if best is None or cost < best[0]:
                best = cost, mine, box
    assert best is not None
    return best[1], best[2]


def turns(axes: tuple[Axis, Axis, Axis], own: Triple, met: Triple) -> int:
    """Boxes of ``met`` that a program visits which owns a box of ``own``, away from borders."""
    return math.prod(math.ceil(halo(axis, o) / m) for axis, o, m in zip(axes, own, met, strict=True))


def waste(axes: tuple[Axis, Axis, Axis], own: Triple, met: Triple) -> float:
    """Visited work over useful work away from borders, where every query has its full window."""
    pairs = turns(axes, own, met) * math.prod(met) * padding(axes, own)
    return pairs / math.prod(axis.kernel_size for axis in axes)


def programs(lengths: Triple, axes: tuple[Axis, Axis, Axis], box: Triple) -> int:
    """Boxes that cover the places of every dilation group of every axis."""
    count = 1
    for length, axis, size in zip(lengths, axes, box, strict=True):
        count *= math.ceil(math.ceil(length / axis.dilation) / size) * axis.dilation
    return count


def visits(length: int, axis: Axis, own: int, walk: int, *, inverse: bool = False) -> int:
    """Boxes of ``walk`` places visited by all the boxes of ``own`` places of one axis, from the geometry tables."""
    table = axis_table(length, axis.kernel_size, axis.stride, axis.dilation, axis.is_causal)
    first, count = (table.first_query, table.query_count) if inverse else (table.first, table.count)
    found = 0
    for group in range(min(axis.dilation, length)):
        begin = (first[group :: axis.dilation] - group) // axis.dilation
        end = begin + count[group :: axis.dilation]
        for box in range(0, len(begin), own):
            last = min(box + own, len(begin)) - 1
            found += math.ceil(int(end[last] - begin[box]) / walk)
    return found
