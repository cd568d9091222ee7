"""The backward kernels of queries: their gradient, delta and, where a box of keys is enough, the bias gradient.

    delta = rowsum(P * dP) - d_lse            stored for the kernels that follow
    dS = P * (dP - delta)                     dQ = scale * dS K

``query_once`` and ``query_loop`` correspond to ``forward_once`` and ``forward_loop``. The loop, which has a part of P
at a time, takes ``rowsum(out * d_out)`` for ``rowsum(P * dP)``; there delta has the rounding of ``out``. After
``query_loop`` the bias gradient is made by ``table_kernels``. ``PARTS`` is 3 where the gradients of query, key and
value are parts of one tensor ``[batch, *spatial, 3, heads, dim]``, else 1, and nothing of it is left in the machine
code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbhd.backends.triton.forward_kernels import SIZES
from nbhd.backends.triton.score_tiles import (
    LN2,
    LOG2E,
    bias_column,
    bias_padding,
    bias_row,
    bias_size,
    dot,
    dot_add,
    dot_nt,
    gather_bias,
    pairs,
    sees,
    slab_entry,
    table_sums,
)
from nbhd.backends.triton.tiles import (
    clamp,
    count_boxes,
    end_keys,
    far,
    first_keys,
    in_group,
    is_outside,
    last_places,
    load_box,
    load_rows,
    locate,
    next_box,
    places,
    seen_whole,
    store_rows,
    tokens_of,
    wide,
)


@triton.jit
def _delta(
    o_ptr, dlse_ptr, delta_ptr, do, base, row, inside, DV: tl.constexpr,
    BDV: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Delta of the rows ``base + row``, from the output, and store it."""
    o = load_rows(o_ptr + base * DV, row * DV, DV, BDV)
    return _kept(tl.sum(o.to(tl.float32) * do.to(tl.float32), -1), dlse_ptr, delta_ptr, base, row, inside, HAS_DLSE)


@triton.jit
def _kept(delta, dlse_ptr, delta_ptr, base, row, inside, HAS_DLSE: tl.constexpr):
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + base + row)
    tl.store(delta_ptr + base + row, delta, mask=inside)
    return delta


@triton.jit(do_not_specialize=SIZES)
def query_once(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, bias_ptr,
    dq_ptr, delta_ptr, table_ptr,
    qsb, qs0, qs1, qs2, qsh,
    ksb, ks0, ks1, ks2, ksh,
    vsb, vs0, vs1, vs2, vsh,
    gsb, gs0, gs1, gs2, gsh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    images, first_box,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DLSE: tl.constexpr, PARTS: tl.constexpr,
    INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, TWIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Tables ``[boxes, image groups, heads, W]``: dS is summed over images, then its diagonals are taken."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    PAD: tl.constexpr = bias_padding(AXES, TQ, TK)
    box = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    u, g, G = locate(box + first_box, L, d, TQ)
    if is_outside(u, G):
        return
    f = first_keys(u, G, AXES)
    y = places(u, TQ)
    inside = in_group(y, G)
    y = clamp(y, G)
    p = places(f, TK)
    head = (tl.program_id(0) % heads).to(tl.int64)
    # a repeated row sees nothing: it must not count twice
    ok = sees(p, first_keys(y, G, AXES), end_keys(y, G, AXES), pairs(TQ, TK)) & inside[:, None]
    if HAS_BIAS:
        bias_ptr += head * (bias_size(AXES) + 2 * PAD) + PAD
        index = bias_column(p, AXES)[None, :] - bias_row(y, AXES)[:, None]
        term = tl.where(ok, gather_bias(bias_ptr, index, INLINE), float("-inf"))
        total = tl.zeros([M, N], tl.float32)
    else:
        term = tl.where(ok, 0.0, float("-inf"))
    qs = wide((qs0, qs1, qs2), ALIGN, WIDE)
    ks = wide((ks0, ks1, ks2), ALIGN, WIDE)
    vs = ks if TWIN else wide((vs0, vs1, vs2), ALIGN, WIDE)
    gs = wide((gs0, gs1, gs2), ALIGN, WIDE)
    q_ptr += head * far(qsh, ALIGN)
    k_ptr += head // kv_group * far(ksh, ALIGN)
    v_ptr += head // kv_group * far(vsh, ALIGN)
    do_ptr += head * far(gsh, ALIGN)
    row = tokens_of(y, g, L, d, WIDE) * heads
    size = L0.to(tl.int64) * L1 * L2 * heads
    start = tl.program_id(0) // heads * images
    for i in tl.range(0, tl.minimum(images, batch - start)):
        b = (start + i).to(tl.int64)
        base = b * size + head
        do = load_box(do_ptr + b * far(gsb, ALIGN), gs, u, g, G, d, TQ, DV, BDV)
        lse = tl.load(lse_ptr + base + row) * LOG2E
        q = load_box(q_ptr + b * far(qsb, ALIGN), qs, u, g, G, d, TQ, D, BD)
        k = load_box(k_ptr + b * far(ksb, ALIGN), ks, f, g, G, d, TK, D, BD)
        v = load_box(v_ptr + b * far(vsb, ALIGN), vs, f, g, G, d, TK, DV, BDV)
        w = tl.exp2(dot_nt(q, k, PREC) * scale + term - lse[:, None])
        dp = dot_nt(do, v, PREC)
        delta = tl.sum(w * dp, 1)
        if v.dtype == tl.float32:
            # The rounding of lse keeps the weights from adding up to one; with this dS still adds up to nothing, as it
            # must where values have much in common. A repeated row has no weights.
            delta = delta / tl.maximum(tl.sum(w, 1), 1.0e-30)
        delta = _kept(delta, dlse_ptr, delta_ptr, base, row, inside, HAS_DLSE)
        ds = w * (dp - delta[:, None])
        if HAS_BIAS:
            total += ds
        dq = dot(ds.to(k.dtype), k, PREC)
        base += b * size * (PARTS - 1)
        store_rows(dq_ptr + base * D, row * (PARTS * D), dq * (scale * LN2), inside, D, BD)
    if HAS_BIAS:
        SIZE: tl.constexpr = W[0] * W[1] * W[2]
        table = table_sums(total, slab_entry(f, u, (0, 0, 0), AXES), TQ, TK, W)
        number = box.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(table_ptr + number * SIZE + tl.arange(0, SIZE), table)


@triton.jit(do_not_specialize=SIZES)
def query_loop(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, bias_ptr,
    dq_ptr, delta_ptr,
    qsb, qs0, qs1, qs2, qsh,
    ksb, ks0, ks1, ks2, ksh,
    vsb, vs0, vs1, vs2, vsh,
    gsb, gs0, gs1, gs2, gsh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DLSE: tl.constexpr, PARTS: tl.constexpr,
    INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, TWIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does one box of queries of one head of one image."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    PAD: tl.constexpr = bias_padding(AXES, TQ, TK)
    bh = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    u, g, G = locate(tl.program_id(0), L, d, TQ)
    if is_outside(u, G) | (bh >= batch * heads):
        return
    head = (bh % heads).to(tl.int64)
    b = (bh // heads).to(tl.int64)
    kv_head = head // kv_group
    qs = wide((qs0, qs1, qs2), ALIGN, WIDE)
    ks = wide((ks0, ks1, ks2), ALIGN, WIDE)
    vs = ks if TWIN else wide((vs0, vs1, vs2), ALIGN, WIDE)
    gs = wide((gs0, gs1, gs2), ALIGN, WIDE)
    k_ptr += (b * ksb + kv_head * ksh) * ALIGN
    v_ptr += (b * vsb + kv_head * vsh) * ALIGN
    y = places(u, TQ)
    inside = in_group(y, G)
    y = clamp(y, G)
    first = first_keys(y, G, AXES)
    end = end_keys(y, G, AXES)
    bias_ptr += head * (bias_size(AXES) + 2 * PAD) + PAD
    q_bias = bias_row(y, AXES)
    size = L0.to(tl.int64) * L1 * L2 * heads
    base = b * size + head
    row = tokens_of(y, g, L, d, WIDE) * heads
    q = load_box(q_ptr + head * far(qsh, ALIGN) + b * far(qsb, ALIGN), qs, u, g, G, d, TQ, D, BD)
    do = load_box(do_ptr + head * far(gsh, ALIGN) + b * far(gsb, ALIGN), gs, u, g, G, d, TQ, DV, BDV)
    lse = tl.load(lse_ptr + base + row) * LOG2E
    delta = _delta(o_ptr, dlse_ptr, delta_ptr, do, base, row, inside, DV, BDV, HAS_DLSE)

    last = last_places(u, G, TQ)
    f = first_keys(u, G, AXES)
    z = end_keys(last, G, AXES)
    at = f
    acc = tl.zeros([M, BD], tl.float32)
    for _ in tl.range(count_boxes(f, z, TK)):
        p = places(at, TK)
        k = load_box(k_ptr, ks, at, g, G, d, TK, D, BD)
        v = load_box(v_ptr, vs, at, g, G, d, TK, DV, BDV)
        s = dot_nt(q, k, PREC) * scale
        if HAS_BIAS:
            s += gather_bias(bias_ptr, bias_column(p, AXES)[None, :] - q_bias[:, None], INLINE)
        s -= lse[:, None]
        if not seen_whole(at, TK, u, last, G, AXES):
            s = tl.where(sees(p, first, end, pairs(TQ, TK)), s, float("-inf"))
        ds = tl.exp2(s) * (dot_nt(do, v, PREC) - delta[:, None])
        acc = dot_add(ds.to(k.dtype), k, acc, PREC)
        at = next_box(at, f, z, TK)
    base += b * size * (PARTS - 1)
    store_rows(dq_ptr + base * D, row * (PARTS * D), acc * (scale * LN2), inside, D, BD)
