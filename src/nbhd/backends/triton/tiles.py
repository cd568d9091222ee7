"""What a program visits: boxes of queries and keys, as arithmetic inside the kernels.

Everything is written for three axes; a sequence or a plane has axes of length 1. A dilation group is a map of its
own: place ``u`` of group ``g`` is position ``g + u * d``. Triples, one entry an axis: ``g`` groups, ``G`` their
lengths, ``d`` dilations, ``at`` the first place of a box, ``T*`` the size of a box (powers of two, at compile time).
``AXES`` is ``(kernel_size, stride, is_causal)`` for each axis, flat.

The formulas are those of :mod:`nbhd.geometry`; a test holds each of the four intervals to its tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether Triton's interpreter runs the kernels. It multiplies bfloat16 as integers, so products are float32 there.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def first_key(u, G, AXES: tl.constexpr, I: tl.constexpr):
    """First place that the query at place ``u`` of a group of length ``G`` sees along axis ``I``."""
    K: tl.constexpr = AXES[3 * I]
    S: tl.constexpr = AXES[3 * I + 1]
    if AXES[3 * I + 2]:
        lead = u if S == 1 else tl.minimum((u // S) * S + S - 1, G - 1)
        return tl.maximum(lead - (K - 1), 0)
    else:
        lead = u if S == 1 else tl.minimum((u // S) * S + S // 2, G - 1)
        return tl.minimum(tl.maximum(lead - K // 2, 0), G - K)


@triton.jit
def end_key(u, G, AXES: tl.constexpr, I: tl.constexpr):
    """One past the last place that the query at place ``u`` sees."""
    if AXES[3 * I + 2]:
        return u + 1
    else:
        return first_key(u, G, AXES, I) + AXES[3 * I]


@triton.jit
def first_query(p, G, AXES: tl.constexpr, I: tl.constexpr):
    """First place whose query sees the key at place ``p``; the queries that see it are an interval too."""
    K: tl.constexpr = AXES[3 * I]
    S: tl.constexpr = AXES[3 * I + 1]
    if AXES[3 * I + 2]:
        return p
    else:
        # seen from u  <=>  leader(u) >= p - K + 1 + K // 2, unless the window is pressed against the start
        low = tl.maximum(p - (K - 1) + K // 2 - S // 2 + S - 1, 0) // S * S
        return tl.where(p < K, 0, low)


@triton.jit
def end_query(p, G, AXES: tl.constexpr, I: tl.constexpr):
    """One past the last place whose query sees the key at place ``p``."""
    K: tl.constexpr = AXES[3 * I]
    S: tl.constexpr = AXES[3 * I + 1]
    if AXES[3 * I + 2]:
        high = (p + K) // S * S
        return tl.where(p + K >= G, G, tl.minimum(high, G))
    else:
        high = (p + K // 2 - S // 2 + S) // S * S
        return tl.where(p >= G - K, G, tl.minimum(high, G))


@triton.jit
def _locate_axis(number, L, d, T: tl.constexpr):
    count = (((L + d - 1) // d) + T - 1) // T  # boxes of the longest group
    g = number // count
    # a group that does not exist is empty, and its program leaves at once
    return (number % count) * T, g, tl.where(g < d, (L - g + d - 1) // d, 0)


@triton.jit
def locate(number, L, d, T: tl.constexpr):
    """Number of a box of size ``T`` -> its first places, their groups, the lengths of these."""
    n1 = (((L[1] + d[1] - 1) // d[1]) + T[1] - 1) // T[1] * d[1]
    n2 = (((L[2] + d[2] - 1) // d[2]) + T[2] - 1) // T[2] * d[2]
    u2, g2, G2 = _locate_axis(number % n2, L[2], d[2], T[2])
    number = number // n2
    u1, g1, G1 = _locate_axis(number % n1, L[1], d[1], T[1])
    u0, g0, G0 = _locate_axis(number // n1, L[0], d[0], T[0])
    return (u0, u1, u2), (g0, g1, g2), (G0, G1, G2)


@triton.jit
def is_outside(at, G):
    """Whether a box has no place at all: the last programs of the longest groups have none in the others."""
    return (at[0] >= G[0]) | (at[1] >= G[1]) | (at[2] >= G[2])


@triton.jit
def places(at, T: tl.constexpr):
    """Places of the elements of a box: three ``[n]``."""
    i = tl.arange(0, T[0] * T[1] * T[2])
    return at[0] + i // (T[1] * T[2]), at[1] + (i // T[2]) % T[1], at[2] + i % T[2]


@triton.jit
def in_group(y, G):
    return (y[0] < G[0]) & (y[1] < G[1]) & (y[2] < G[2])


@triton.jit
def clamp(y, G):
    """Places past the end of a group repeat its last one: always in memory."""
    return tl.minimum(y[0], G[0] - 1), tl.minimum(y[1], G[1] - 1), tl.minimum(y[2], G[2] - 1)


@triton.jit
def first_keys(u, G, AXES: tl.constexpr):
    return first_key(u[0], G[0], AXES, 0), first_key(u[1], G[1], AXES, 1), first_key(u[2], G[2], AXES, 2)


@triton.jit
def end_keys(u, G, AXES: tl.constexpr):
    return end_key(u[0], G[0], AXES, 0), end_key(u[1], G[1], AXES, 1), end_key(u[2], G[2], AXES, 2)


@triton.jit
def first_queries(p, G, AXES: tl.constexpr):
    return first_query(p[0], G[0], AXES, 0), first_query(p[1], G[1], AXES, 1), first_query(p[2], G[2], AXES, 2)


@triton.jit
def end_queries(p, G, AXES: tl.constexpr):
    return end_query(p[0], G[0], AXES, 0), end_query(p[1], G[1], AXES, 1), end_query(p[2], G[2], AXES, 2)


@triton.jit
def last_places(at, G, T: tl.constexpr):
    return (
        tl.minimum(at[0] + T[0], G[0]) - 1,
        tl.minimum(at[1] + T[1], G[1]) - 1,
        tl.minimum(at[2] + T[2], G[2]) - 1,
    )


@triton.jit
def count_boxes(first, end, T: tl.constexpr):
    """Boxes that cover the places from ``first`` to ``end``."""
    return tl.cdiv(end[0] - first[0], T[0]) * tl.cdiv(end[1] - first[1], T[1]) * tl.cdiv(end[2] - first[2], T[2])


@triton.jit
def next_box(at, first, end, T: tl.constexpr):
    """The box after the one at ``at``, the last axis fastest: carries are cheaper than dividing a counter."""
    a2 = at[2] + T[2]
    over2 = a2 >= end[2]
    a1 = tl.where(over2, at[1] + T[1], at[1])
    over1 = a1 >= end[1]
    return (
        tl.where(over1, at[0] + T[0], at[0]),
        tl.where(over1, first[1], a1),
        tl.where(over2, first[2], a2),
    )


@triton.jit
def seen_whole(at, T: tl.constexpr, u, last, G, AXES: tl.constexpr):
    """Whether every query of the box from ``u`` to ``last`` sees every key of the box at ``at``: no mask is needed."""
    whole = True
    for i in tl.static_range(3):
        low = first_key(last[i], G[i], AXES, i)
        high = end_key(u[i], G[i], AXES, i)
        whole = whole & (at[i] >= low) & (at[i] + T[i] <= high)
    return whole


@triton.jit
def tokens_of(y, g, L, d, WIDE: tl.constexpr):
    """Number of each place's position, row-major over the map."""
    x0 = g[0] + y[0] * d[0]
    x1 = g[1] + y[1] * d[1]
    if WIDE:
        x0 = x0.to(tl.int64)
    return (x0 * L[1] + x1) * L[2] + (g[2] + y[2] * d[2])


@triton.jit
def wide(stride, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Strides of three axes that arrive divided by ``ALIGN``, so that the compiler knows what divides them."""
    if WIDE:
        return stride[0].to(tl.int64) * ALIGN, stride[1].to(tl.int64) * ALIGN, stride[2].to(tl.int64) * ALIGN
    else:
        return stride[0] * ALIGN, stride[1] * ALIGN, stride[2] * ALIGN


@triton.jit
def far(stride, ALIGN: tl.constexpr):
    """The same for the stride of the batch or of heads: always 64 bits, since images may lie anywhere."""
    return stride.to(tl.int64) * ALIGN


@triton.jit
def load_box(ptr, stride, at, g, G, d, T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The rows of a box, ``[n, BD]``, zeros past ``D``.

    One vector of offsets an axis, added by broadcasting: an eighth of the integer work of offsets row by row.
    """
    o0 = tl.minimum(at[0] + tl.arange(0, T[0]), G[0] - 1) * (d[0] * stride[0]) + g[0] * stride[0]
    o1 = tl.minimum(at[1] + tl.arange(0, T[1]), G[1] - 1) * (d[1] * stride[1]) + g[1] * stride[1]
    o2 = tl.minimum(at[2] + tl.arange(0, T[2]), G[2] - 1) * (d[2] * stride[2]) + g[2] * stride[2]
    c = tl.arange(0, BD)
    o = (o2[:, None] + c[None, :])[None, :, :] + o1[:, None, None]
    o = o0[:, None, None, None] + o[None, :, :, :]
    if D == BD:
        x = tl.load(ptr + o)
    else:
        x = tl.load(ptr + o, mask=(o >= 0) & (c < D), other=0.0)
    return tl.reshape(x, (T[0] * T[1] * T[2], BD))


@triton.jit
def load_rows(ptr, row, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``[.., BD]`` of a contiguous tensor; ``row`` are element offsets inside memory."""
    c = tl.arange(0, BD)
    o = tl.expand_dims(row, -1) + c
    if D == BD:
        return tl.load(ptr + o)
    else:
        return tl.load(ptr + o, mask=(o >= 0) & (c < D), other=0.0)


@triton.jit
def store_rows(ptr, row, x, inside, D: tl.constexpr, BD: tl.constexpr):
    """``x`` ``[.., BD]`` to the rows that are ``inside``, in the dtype of ``ptr``."""
    c = tl.arange(0, BD)
    ok = tl.expand_dims(inside, -1)
    o = tl.expand_dims(row, -1) + c
    tl.store(ptr + o, x.to(ptr.dtype.element_ty), mask=(ok & (c < D)) if D != BD else ok)
