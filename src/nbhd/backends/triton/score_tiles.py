"""A tile of scores inside a kernel: products, masks, the relative position bias and the sums that are its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from nbhd.backends.triton.tiles import INTERPRETED

#: A running maximum before any key is seen: finite, so that nothing becomes inf - inf.
LOW = tl.constexpr(-1.0e30)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
#: Threads of a program that sums a bias gradient, at most: 8 warps of 32, 4 of 64.
MOST_THREADS = tl.constexpr(256)


@triton.jit
def operand(x):
    if INTERPRETED:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def dot(a, b, PREC: tl.constexpr):
    """``a [m, c]`` times ``b [c, n]``, in float32."""
    return tl.dot(operand(a), operand(b), input_precision=PREC)


@triton.jit
def dot_add(a, b, total, PREC: tl.constexpr):
    return tl.dot(operand(a), operand(b), total, input_precision=PREC)


@triton.jit
def dot_nt(a, b, PREC: tl.constexpr):
    """``a [m, c]`` times the transpose of ``b [n, c]``."""
    return dot(a, tl.trans(b), PREC)


@triton.jit
def _sees(p, first, end, KEY: tl.constexpr, QUERY: tl.constexpr):
    t = tl.expand_dims(p, KEY)
    return (t >= tl.expand_dims(first, QUERY)) & (t < tl.expand_dims(end, QUERY))


@triton.jit
def _sees_all(p, first, end, PAIRS: tl.constexpr, KEY: tl.constexpr, QUERY: tl.constexpr):
    if PAIRS[2] > 1:
        ok = _sees(p[2], first[2], end[2], KEY, QUERY)
        if PAIRS[1] > 1:
            ok = ok & _sees(p[1], first[1], end[1], KEY, QUERY)
        if PAIRS[0] > 1:
            ok = ok & _sees(p[0], first[0], end[0], KEY, QUERY)
        return ok
    elif PAIRS[1] > 1:
        ok = _sees(p[1], first[1], end[1], KEY, QUERY)
        if PAIRS[0] > 1:
            ok = ok & _sees(p[0], first[0], end[0], KEY, QUERY)
        return ok
    else:
        return _sees(p[0], first[0], end[0], KEY, QUERY)


@triton.jit
def sees(p, first, end, PAIRS: tl.constexpr):
    """``[m, n]``: whether the query of a row, which sees ``first`` to ``end``, sees the key of a column.

    PAIRS: queries times keys of a tile along each axis; where it is 1 a query meets its own keys and nothing is tested.
    """
    return _sees_all(p, first, end, PAIRS, -2, -1)


@triton.jit
def seen_by(p, first, end, PAIRS: tl.constexpr):
    """The same with keys as rows and queries as columns."""
    return _sees_all(p, first, end, PAIRS, -1, -2)


@triton.jit
def gather_bias(ptr, index, INLINE: tl.constexpr):
    """``ptr[index]`` of a padded table: no index leaves it.

    A ``tl.load`` would be laid out for coalescing and drag the whole softmax, or a copy of it, out of the layout of the
    matrix product (seven times the instructions). Inline assembly is elementwise: the scores' layout reaches the
    addresses.
    """
    if INLINE:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [(ptr + index).to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(ptr + index)


@triton.constexpr_function
def bias_padding(axes: tuple[int, ...], tq: tuple[int, ...], tk: tuple[int, ...]) -> int:
    """Elements before and after the table of a head that masked pairs of a tile may reach."""
    rows = tq[0] + tk[0] + axes[1]
    planes = rows * (2 * axes[3] - 1) + tq[1] + tk[1] + axes[4]
    return planes * (2 * axes[6] - 1) + tq[2] + tk[2] + axes[7]


@triton.constexpr_function
def bias_size(axes: tuple[int, ...]) -> int:
    """Entries of the table of a head."""
    return (2 * axes[0] - 1) * (2 * axes[3] - 1) * (2 * axes[6] - 1)


@triton.constexpr_function
def pairs(tq: tuple[int, ...], tk: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a * b for a, b in zip(tq, tk, strict=True))


@triton.jit
def bias_row(y, AXES: tl.constexpr):
    """What a query at places ``y`` subtracts from :func:`bias_column` of a key: the index is linear in both."""
    T1: tl.constexpr = 2 * AXES[3] - 1
    T2: tl.constexpr = 2 * AXES[6] - 1
    return ((y[0] - (AXES[0] - 1)) * T1 + (y[1] - (AXES[3] - 1))) * T2 + (y[2] - (AXES[6] - 1))


@triton.jit
def bias_column(p, AXES: tl.constexpr):
    T1: tl.constexpr = 2 * AXES[3] - 1
    T2: tl.constexpr = 2 * AXES[6] - 1
    return (p[0] * T1 + p[1]) * T2 + p[2]


@triton.jit
def pad_table(source, padded, SIZE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr):
    """The bias of each head in float32 times log2(e), zeros around it: what the kernels gather from."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(0).to(tl.int64)
    inside = (i >= PADDING) & (i < SIZE + PADDING)
    x = tl.load(source + h * SIZE + (i - PADDING), mask=inside, other=0.0).to(tl.float32) * LOG2E
    tl.store(padded + h * (SIZE + 2 * PADDING) + i, x, mask=i < SIZE + 2 * PADDING)


@triton.jit
def slab_keys(f, z, u, last, slab, AXES: tl.constexpr, W: tl.constexpr):
    """Of the places from ``f`` to ``z`` those whose keys lie in a slab for some query from ``u`` to ``last``.

    A slab has ``W`` entries an axis, from ``slab`` on. Entry ``w`` of the table is the key that lies
    ``w - (kernel_size - 1)`` places after a query.
    """
    f = (
        tl.maximum(f[0], u[0] + (slab[0] - (AXES[0] - 1))),
        tl.maximum(f[1], u[1] + (slab[1] - (AXES[3] - 1))),
        tl.maximum(f[2], u[2] + (slab[2] - (AXES[6] - 1))),
    )
    z = (
        tl.maximum(tl.minimum(z[0], last[0] + (slab[0] + W[0] - (AXES[0] - 1))), f[0]),
        tl.maximum(tl.minimum(z[1], last[1] + (slab[1] + W[1] - (AXES[3] - 1))), f[1]),
        tl.maximum(tl.minimum(z[2], last[2] + (slab[2] + W[2] - (AXES[6] - 1))), f[2]),
    )
    return f, z


@triton.jit
def slab_entry(at, u, slab, AXES: tl.constexpr):
    """The entry of a slab for the key at place ``at`` and the query at place ``u``: three numbers."""
    return (
        at[0] - u[0] + (AXES[0] - 1) - slab[0],
        at[1] - u[1] + (AXES[3] - 1) - slab[1],
        at[2] - u[2] + (AXES[6] - 1) - slab[2],
    )


@triton.jit
def _axis_sums(x, first, W: tl.constexpr):
    """``x [r, tq, tk]`` -> ``[r, W]``: entry ``w`` sums the pairs with key - query + first == w."""
    R: tl.constexpr = x.shape[0]
    TQ: tl.constexpr = x.shape[1]
    TK: tl.constexpr = x.shape[2]
    if R * TQ * TK < MOST_THREADS:
        # compared, not gathered: Triton 3.6 fails on an assertion where there are fewer numbers than threads
        w = tl.arange(0, TK)[None, None, :] - tl.arange(0, TQ)[None, :, None] + tl.zeros([R, 1, 1], tl.int32) + first
        hit = w[:, :, :, None] == tl.arange(0, W)[None, None, None, :]
        return tl.sum(tl.sum(tl.where(hit, x[:, :, :, None], 0.0), 2), 1)
    else:
        k = tl.arange(0, W)[None, None, :] + tl.arange(0, TQ)[None, :, None] + tl.zeros([R, 1, 1], tl.int32) - first
        found = tl.gather(x, tl.minimum(tl.maximum(k, 0), TK - 1), 2)
        return tl.sum(tl.where((k >= 0) & (k < TK), found, 0.0), 1)


@triton.jit
def table_sums(ds, first, TQ: tl.constexpr, TK: tl.constexpr, W: tl.constexpr):
    """Sums of ``ds [m, n]`` over the pairs of equal relative place: ``[W2 * W1 * W0]``.

    Entry w of an axis takes the pairs with index of key - index of query + first == w, others are dropped. One axis at
    a time, by gathers inside the program: exact, no atomics.
    """
    x = tl.reshape(ds, (TQ[0], TQ[1], TQ[2], TK[0], TK[1], TK[2]))
    x = tl.permute(x, (0, 3, 1, 4, 2, 5))
    x = tl.reshape(x, (TQ[0] * TK[0] * TQ[1] * TK[1], TQ[2], TK[2]))
    if TQ[2] * TK[2] > 1 or W[2] > 1:
        x = _axis_sums(x, first[2], W[2])
    if TQ[1] * TK[1] > 1 or W[1] > 1:
        x = tl.permute(tl.reshape(x, (TQ[0] * TK[0], TQ[1], TK[1], W[2])), (0, 3, 1, 2))
        x = _axis_sums(tl.reshape(x, (TQ[0] * TK[0] * W[2], TQ[1], TK[1])), first[1], W[1])
    x = tl.permute(tl.reshape(x, (TQ[0], TK[0], W[2] * W[1])), (2, 0, 1))
    x = tl.reshape(x, (W[2] * W[1], TQ[0], TK[0]))
    return tl.reshape(_axis_sums(x, first[0], W[0]), (W[2] * W[1] * W[0],))
