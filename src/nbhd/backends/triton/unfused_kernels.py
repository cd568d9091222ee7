"""The unfused pair: scores out, weights in. Three kernels do both and their gradients.

What is stored is ``[batch, *spatial, heads, slots]``: slot ``((j0 * k1) + j1) * k2 + j2`` of a query is the key ``j``
places after the first of its window along each axis.

    pairs      a, b -> slots     scale * <a[query], b[key]> + bias        scores; the gradient of weights
    gather     slots, b -> rows  scale * sum over keys slot * b[key]      the weighted sum; the gradient of queries
    scatter    slots, a -> rows  scale * sum over queries slot * a[query] the gradients of keys and values
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbhd.backends.triton.forward_kernels import SIZES
from nbhd.backends.triton.score_tiles import (
    LN2,
    bias_column,
    bias_padding,
    bias_row,
    bias_size,
    dot_add,
    dot_nt,
    gather_bias,
    pairs as pairs_of,
    seen_by,
    sees,
    slab_entry,
    slab_keys,
    table_sums,
)
from nbhd.backends.triton.tiles import (
    clamp,
    count_boxes,
    end_keys,
    end_queries,
    first_keys,
    first_queries,
    in_group,
    is_outside,
    last_places,
    load_box,
    locate,
    next_box,
    places,
    store_rows,
    tokens_of,
    wide,
)


@triton.jit
def slots_of(p, first, AXES: tl.constexpr):
    """``[m, n]``: slot of the key of a column in the window of the query of a row."""
    s0 = tl.expand_dims(p[0], 0) - tl.expand_dims(first[0], 1)
    s1 = tl.expand_dims(p[1], 0) - tl.expand_dims(first[1], 1)
    s2 = tl.expand_dims(p[2], 0) - tl.expand_dims(first[2], 1)
    return (s0 * AXES[3] + s1) * AXES[6] + s2


@triton.jit(do_not_specialize=SIZES)
def pairs(
    q_ptr, k_ptr, bias_ptr, slots_ptr,
    qsb, qs0, qs1, qs2, qsh,
    ksb, ks0, ks1, ks2, ksh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    D: tl.constexpr, BD: tl.constexpr, AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    HAS_BIAS: tl.constexpr, INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does one box of queries. Slots without a key are left as they are."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    PAD: tl.constexpr = bias_padding(AXES, TQ, TK)
    SLOTS: tl.constexpr = AXES[0] * AXES[3] * AXES[6]
    bh = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    u, g, G = locate(tl.program_id(0), L, d, TQ)
    if is_outside(u, G) | (bh >= batch * heads):
        return
    head = (bh % heads).to(tl.int64)
    b = (bh // heads).to(tl.int64)
    kv_head = head // kv_group
    qs = wide((qs0, qs1, qs2), ALIGN, WIDE)
    ks = wide((ks0, ks1, ks2), ALIGN, WIDE)
    k_ptr += (b * ksb + kv_head * ksh) * ALIGN
    y = places(u, TQ)
    inside = in_group(y, G)
    y = clamp(y, G)
    first = first_keys(y, G, AXES)
    end = end_keys(y, G, AXES)
    bias_ptr += head * (bias_size(AXES) + 2 * PAD) + PAD
    slots_ptr += (b * (L0.to(tl.int64) * L1 * L2 * heads) + head) * SLOTS
    row = tokens_of(y, g, L, d, WIDE) * heads * SLOTS
    q = load_box(q_ptr + (b * qsb + head * qsh) * ALIGN, qs, u, g, G, d, TQ, D, BD)
    f = first_keys(u, G, AXES)
    z = end_keys(last_places(u, G, TQ), G, AXES)
    at = f
    for _ in tl.range(count_boxes(f, z, TK)):
        p = places(at, TK)
        k = load_box(k_ptr, ks, at, g, G, d, TK, D, BD)
        s = dot_nt(q, k, PREC) * scale
        if HAS_BIAS:
            # the table is in base 2
            s += gather_bias(bias_ptr, bias_column(p, AXES)[None, :] - bias_row(y, AXES)[:, None], INLINE) * LN2
        ok = sees(p, first, end, pairs_of(TQ, TK)) & inside[:, None]
        tl.store(slots_ptr + (row[:, None] + slots_of(p, first, AXES)), s.to(slots_ptr.dtype.element_ty), mask=ok)
        at = next_box(at, f, z, TK)


@triton.jit(do_not_specialize=(*SIZES, "slab0", "slab1", "slab2"))
def gather(
    slots_ptr, k_ptr, out_ptr, table_ptr,
    ksb, ks0, ks1, ks2, ksh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    first_box, slab0, slab1, slab2,
    D: tl.constexpr, BD: tl.constexpr, AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, W: tl.constexpr,
    WANT_ROWS: tl.constexpr, WANT_TABLE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does one box of queries, and with WANT_TABLE its part of the bias gradient (``table_kernels``)."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    SLOTS: tl.constexpr = AXES[0] * AXES[3] * AXES[6]
    SIZE: tl.constexpr = W[0] * W[1] * W[2]
    bh = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    u, g, G = locate(tl.program_id(0) + first_box, L, d, TQ)
    if is_outside(u, G) | (bh >= batch * heads):
        return
    head = (bh % heads).to(tl.int64)
    b = (bh // heads).to(tl.int64)
    kv_head = head // kv_group
    ks = wide((ks0, ks1, ks2), ALIGN, WIDE)
    k_ptr += (b * ksb + kv_head * ksh) * ALIGN
    y = places(u, TQ)
    inside = in_group(y, G)
    y = clamp(y, G)
    first = first_keys(y, G, AXES)
    end = end_keys(y, G, AXES)
    base = b * (L0.to(tl.int64) * L1 * L2 * heads) + head
    row = tokens_of(y, g, L, d, WIDE) * heads
    last = last_places(u, G, TQ)
    f = first_keys(u, G, AXES)
    z = end_keys(last, G, AXES)
    if not WANT_ROWS:
        f, z = slab_keys(f, z, u, last, (slab0, slab1, slab2), AXES, W)
    at = f
    acc = tl.zeros([M, BD], tl.float32)
    table = tl.zeros([SIZE], tl.float32)
    for _ in tl.range(count_boxes(f, z, TK)):
        p = places(at, TK)
        ok = sees(p, first, end, pairs_of(TQ, TK)) & inside[:, None]
        o = row[:, None] * SLOTS + slots_of(p, first, AXES)
        w = tl.load(slots_ptr + base * SLOTS + o, mask=ok, other=0.0)
        if WANT_ROWS:
            k = load_box(k_ptr, ks, at, g, G, d, TK, D, BD)
            acc = dot_add(w.to(k.dtype), k, acc, PREC)
        if WANT_TABLE:
            table += table_sums(w.to(tl.float32), slab_entry(at, u, (slab0, slab1, slab2), AXES), TQ, TK, W)
        at = next_box(at, f, z, TK)
    if WANT_ROWS:
        store_rows(out_ptr + base * D, row * D, acc * scale, inside, D, BD)
    if WANT_TABLE:
        number = tl.program_id(0).to(tl.int64) * (batch * heads) + bh
        tl.store(table_ptr + number * SIZE + tl.arange(0, SIZE), table)


@triton.jit(do_not_specialize=SIZES)
def scatter(
    slots_ptr, q_ptr, out_ptr,
    qsb, qs0, qs1, qs2, qsh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    D: tl.constexpr, BD: tl.constexpr, AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does one box of keys, over the query heads that read its head."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    SLOTS: tl.constexpr = AXES[0] * AXES[3] * AXES[6]
    kv_heads = heads // kv_group
    bh = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    u, g, G = locate(tl.program_id(0), L, d, TK)
    if is_outside(u, G) | (bh >= batch * kv_heads):
        return
    kv_head = (bh % kv_heads).to(tl.int64)
    b = (bh // kv_heads).to(tl.int64)
    qs = wide((qs0, qs1, qs2), ALIGN, WIDE)
    x = places(u, TK)
    tokens = L0.to(tl.int64) * L1 * L2
    f = first_queries(u, G, AXES)
    z = end_queries(last_places(u, G, TK), G, AXES)
    boxes = count_boxes(f, z, TQ)
    acc = tl.zeros([N, BD], tl.float32)
    at = f
    head = kv_head * kv_group
    for _ in tl.range(boxes * kv_group):
        q = load_box(q_ptr + (b * qsb + head * qsh) * ALIGN, qs, at, g, G, d, TQ, D, BD)
        y = places(at, TQ)
        ok = in_group(y, G)
        y = clamp(y, G)
        first = first_keys(y, G, AXES)
        ok = ok[None, :] & seen_by(x, first, end_keys(y, G, AXES), pairs_of(TQ, TK))
        row = tokens_of(y, g, L, d, WIDE) * heads
        o = row[None, :] * SLOTS + tl.trans(slots_of(x, first, AXES))
        w = tl.load(slots_ptr + (b * tokens * heads + head) * SLOTS + o, mask=ok, other=0.0)
        acc = dot_add(w.to(q.dtype), q, acc, PREC)
        at = next_box(at, f, z, TQ)
        is_last = at[0] >= z[0]  # the next head begins
        at = (tl.where(is_last, f[0], at[0]), at[1], at[2])
        head += is_last.to(tl.int64)
    base = b * tokens * kv_heads + kv_head
    row = tokens_of(clamp(x, G), g, L, d, WIDE) * kv_heads
    store_rows(out_ptr + base * D, row * D, acc * scale, in_group(x, G), D, BD)
