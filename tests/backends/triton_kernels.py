"""Kernels that write down what the real ones are told to visit. Imported under Triton's interpreter only."""

from __future__ import annotations

import triton
import triton.language as tl

from nbhd.backends.triton.tiles import (
    count_boxes,
    end_key,
    end_keys,
    end_queries,
    end_query,
    first_key,
    first_keys,
    first_queries,
    first_query,
    is_outside,
    last_places,
    locate,
    next_box,
    seen_whole,
)


@triton.jit
def intervals(out, G, n, AXES: tl.constexpr, BLOCK: tl.constexpr):
    """``out [4, n]``: first and end key, first and end query of each place of a group of length ``G``."""
    i = tl.arange(0, BLOCK)
    ok = i < n
    tl.store(out + i, first_key(i, G, AXES, 0), mask=ok)
    tl.store(out + n + i, end_key(i, G, AXES, 0), mask=ok)
    tl.store(out + 2 * n + i, first_query(i, G, AXES, 0), mask=ok)
    tl.store(out + 3 * n + i, end_query(i, G, AXES, 0), mask=ok)


@triton.jit
def visited(
    out, count, L0, L1, L2, d0, d1, d2, MOST: tl.constexpr,
    AXES: tl.constexpr, OWN: tl.constexpr, WALK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """``out [programs, MOST, 10]``: own box, groups, visited box, whether it is seen whole; ``count [programs]``."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    u, g, G = locate(tl.program_id(0), L, d, OWN)
    if is_outside(u, G):
        return
    last = last_places(u, G, OWN)
    if INVERSE:
        f = first_queries(u, G, AXES)
        z = end_queries(last, G, AXES)
    else:
        f = first_keys(u, G, AXES)
        z = end_keys(last, G, AXES)
    n = count_boxes(f, z, WALK)
    tl.store(count + tl.program_id(0), n)
    at = f
    row = out + tl.program_id(0) * (MOST * 10)
    for _ in tl.range(n):
        for i in tl.static_range(3):
            tl.store(row + i, u[i])
            tl.store(row + 3 + i, g[i])
            tl.store(row + 6 + i, at[i])
        if not INVERSE:
            tl.store(row + 9, seen_whole(at, WALK, u, last, G, AXES).to(tl.int32))
        row += 10
        at = next_box(at, f, z, WALK)
