"""The backward kernels of keys: dK and dV over the queries that see them.

A program owns a box of keys and visits the boxes of queries that see any of them (the inverse neighborhoods are
intervals too), for each query head that reads its key head. Scores are kept transposed, ``[keys, queries]``:

    dV = P^T dO        dK = scale * dS^T Q

``key_once`` and ``key_loop`` correspond to ``forward_once`` and ``forward_loop``. Near the ends of an axis more queries
see a key than elsewhere, so that a box of keys may need more than one box of queries there: such a program walks.
``PARTS`` is that of ``query_kernels``.
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
    seen_by,
)
from nbhd.backends.triton.tiles import (
    clamp,
    count_boxes,
    end_keys,
    end_queries,
    far,
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
def _term(
    bias_ptr, x, at, G, head,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, HAS_BIAS: tl.constexpr, INLINE: tl.constexpr,
):  # fmt: skip
    """What the scores of the keys ``x`` and the queries of the box at ``at`` have added: a bias, minus infinity."""
    PAD: tl.constexpr = bias_padding(AXES, TQ, TK)
    y = places(at, TQ)
    ok = in_group(y, G)[None, :]
    y = clamp(y, G)
    ok = ok & seen_by(x, first_keys(y, G, AXES), end_keys(y, G, AXES), pairs(TQ, TK))
    if HAS_BIAS:
        bias_ptr += head * (bias_size(AXES) + 2 * PAD) + PAD
        index = bias_column(x, AXES)[:, None] - bias_row(y, AXES)[None, :]
        return tl.where(ok, gather_bias(bias_ptr, index, INLINE), float("-inf"))
    else:
        return tl.where(ok, 0.0, float("-inf"))


@triton.jit
def _weights(k, v, q, do, lse, delta, term, scale, PREC: tl.constexpr):
    """P^T and dS^T of a box of queries. ``lse`` is as the forward stored it."""
    w = tl.exp2(dot_nt(k, q, PREC) * scale + term - (lse * LOG2E)[None, :])
    return w, w * (dot_nt(v, do, PREC) - delta[None, :])


@triton.jit
def _walk(
    k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, b, kv_head, x, f, z, g, G, L, d, qs, gs, qsh, gsh,
    heads, kv_group, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    HAS_BIAS: tl.constexpr, INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums up dK (not scaled) and dV of the keys ``x`` over the query boxes from ``f`` to ``z`` of every query head."""
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    tokens = L[0].to(tl.int64) * L[1] * L[2]
    dk = tl.zeros([N, BD], tl.float32)
    dv = tl.zeros([N, BDV], tl.float32)
    at = f
    head = kv_head * kv_group
    qsh, gsh = far(qsh, ALIGN), far(gsh, ALIGN)
    for _ in tl.range(count_boxes(f, z, TQ) * kv_group, num_stages=STAGES):
        base = b * tokens * heads + head
        q = load_box(q_ptr + head * qsh, qs, at, g, G, d, TQ, D, BD)
        do = load_box(do_ptr + head * gsh, gs, at, g, G, d, TQ, DV, BDV)
        row = tokens_of(clamp(places(at, TQ), G), g, L, d, WIDE) * heads
        lse = tl.load(lse_ptr + base + row)
        delta = tl.load(delta_ptr + base + row)
        term = _term(bias_ptr, x, at, G, head, AXES, TQ, TK, HAS_BIAS, INLINE)
        w, ds = _weights(k, v, q, do, lse, delta, term, scale, PREC)
        dv = dot_add(w.to(do.dtype), do, dv, PREC)
        dk = dot_add(ds.to(q.dtype), q, dk, PREC)
        at = next_box(at, f, z, TQ)
        is_last = at[0] >= z[0]  # the next head begins
        at = (tl.where(is_last, f[0], at[0]), at[1], at[2])
        head += is_last.to(tl.int64)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def key_once(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr,
    dk_ptr, dv_ptr,
    qsb, qs0, qs1, qs2, qsh,
    ksb, ks0, ks1, ks2, ksh,
    vsb, vs0, vs1, vs2, vsh,
    gsb, gs0, gs1, gs2, gsh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    images,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, TWIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does one box of keys of one key head, in ``images`` images one after the other."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    kv_heads = heads // kv_group
    u, g, G = locate(tl.program_id(1) + tl.program_id(2) * tl.num_programs(1), L, d, TK)
    if is_outside(u, G):
        return
    qs = wide((qs0, qs1, qs2), ALIGN, WIDE)
    ks = wide((ks0, ks1, ks2), ALIGN, WIDE)
    vs = ks if TWIN else wide((vs0, vs1, vs2), ALIGN, WIDE)
    gs = wide((gs0, gs1, gs2), ALIGN, WIDE)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    k_ptr += kv_head * far(ksh, ALIGN)
    v_ptr += kv_head * far(vsh, ALIGN)
    x = places(u, TK)
    inside = in_group(x, G)
    own = tokens_of(clamp(x, G), g, L, d, WIDE) * kv_heads
    tokens = L0.to(tl.int64) * L1 * L2
    f = first_queries(u, G, AXES)
    z = end_queries(last_places(u, G, TK), G, AXES)
    qsb, ksb, vsb, gsb = far(qsb, ALIGN), far(ksb, ALIGN), far(vsb, ALIGN), far(gsb, ALIGN)
    start = tl.program_id(0) // kv_heads * images
    count = tl.minimum(images, batch - start)
    if count_boxes(f, z, TQ) * kv_group == 1:
        q_ptr += kv_head * far(qsh, ALIGN)
        do_ptr += kv_head * far(gsh, ALIGN)
        row = tokens_of(clamp(places(f, TQ), G), g, L, d, WIDE) * heads
        term = _term(bias_ptr, x, f, G, kv_head, AXES, TQ, TK, HAS_BIAS, INLINE)
        for i in tl.range(0, count):
            b = (start + i).to(tl.int64)
            base = b * tokens * heads + kv_head
            k = load_box(k_ptr + b * ksb, ks, u, g, G, d, TK, D, BD)
            v = load_box(v_ptr + b * vsb, vs, u, g, G, d, TK, DV, BDV)
            q = load_box(q_ptr + b * qsb, qs, f, g, G, d, TQ, D, BD)
            do = load_box(do_ptr + b * gsb, gs, f, g, G, d, TQ, DV, BDV)
            lse = tl.load(lse_ptr + base + row)
            delta = tl.load(delta_ptr + base + row)
            w, ds = _weights(k, v, q, do, lse, delta, term, scale, PREC)
            dv = dot(w.to(do.dtype), do, PREC)
            dk = dot(ds.to(q.dtype), q, PREC)
            base += b * tokens * kv_heads * (PARTS - 1)
            store_rows(dk_ptr + base * D, own * (PARTS * D), dk * (scale * LN2), inside, D, BD)
            store_rows(dv_ptr + base * DV, own * (PARTS * DV), dv, inside, DV, BDV)
    else:
        for i in tl.range(0, count, num_stages=1):
            b = (start + i).to(tl.int64)
            base = b * tokens * kv_heads + kv_head
            k = load_box(k_ptr + b * ksb, ks, u, g, G, d, TK, D, BD)
            v = load_box(v_ptr + b * vsb, vs, u, g, G, d, TK, DV, BDV)
            dk, dv = _walk(
                k, v, q_ptr + b * qsb, do_ptr + b * gsb, lse_ptr, delta_ptr, bias_ptr, b, kv_head,
                x, f, z, g, G, L, d, qs, gs, qsh, gsh, heads, kv_group, scale,
                D, BD, DV, BDV, AXES, TQ, TK, HAS_BIAS, INLINE, ALIGN, WIDE, PREC, 1,
            )  # fmt: skip
            base += b * tokens * kv_heads * (PARTS - 1)
            store_rows(dk_ptr + base * D, own * (PARTS * D), dk * (scale * LN2), inside, D, BD)
            store_rows(dv_ptr + base * DV, own * (PARTS * DV), dv, inside, DV, BDV)


@triton.jit(do_not_specialize=SIZES)
def key_loop(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr,
    dk_ptr, dv_ptr,
    qsb, qs0, qs1, qs2, qsh,
    ksb, ks0, ks1, ks2, ksh,
    vsb, vs0, vs1, vs2, vsh,
    gsb, gs0, gs1, gs2, gsh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, TWIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does one box of keys of one key head of one image."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    kv_heads = heads // kv_group
    bh = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    u, g, G = locate(tl.program_id(0), L, d, TK)
    if is_outside(u, G) | (bh >= batch * kv_heads):
        return
    kv_head = (bh % kv_heads).to(tl.int64)
    b = (bh // kv_heads).to(tl.int64)
    qs = wide((qs0, qs1, qs2), ALIGN, WIDE)
    ks = wide((ks0, ks1, ks2), ALIGN, WIDE)
    vs = ks if TWIN else wide((vs0, vs1, vs2), ALIGN, WIDE)
    gs = wide((gs0, gs1, gs2), ALIGN, WIDE)
    x = places(u, TK)
    k = load_box(k_ptr + kv_head * far(ksh, ALIGN) + b * far(ksb, ALIGN), ks, u, g, G, d, TK, D, BD)
    v = load_box(v_ptr + kv_head * far(vsh, ALIGN) + b * far(vsb, ALIGN), vs, u, g, G, d, TK, DV, BDV)
    dk, dv = _walk(
        k, v, q_ptr + b * far(qsb, ALIGN), do_ptr + b * far(gsb, ALIGN), lse_ptr, delta_ptr, bias_ptr, b, kv_head,
        x, first_queries(u, G, AXES), end_queries(last_places(u, G, TK), G, AXES), g, G, L, d, qs, gs, qsh, gsh,
        heads, kv_group, scale, D, BD, DV, BDV, AXES, TQ, TK, HAS_BIAS, INLINE, ALIGN, WIDE, PREC, None,
    )  # fmt: skip
    inside = in_group(x, G)
    tokens = L0.to(tl.int64) * L1 * L2
    base = b * (tokens * kv_heads) + kv_head
    own = tokens_of(clamp(x, G), g, L, d, WIDE) * kv_heads
    base += b * tokens * kv_heads * (PARTS - 1)
    store_rows(dk_ptr + base * D, own * (PARTS * D), dk * (scale * LN2), inside, D, BD)
    store_rows(dv_ptr + base * DV, own * (PARTS * DV), dv, inside, DV, BDV)
