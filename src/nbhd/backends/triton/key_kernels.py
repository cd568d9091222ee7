"""The backward kernel of keys: dK and dV over the queries that see them.

A program owns a box of keys and walks the boxes of queries that see any of them (the inverse neighborhoods are
intervals too), for each query head that reads its key head. Scores are kept transposed, ``[keys, queries]``:

    dV = P^T dO        dK = scale * dS^T Q
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
    HAS_BIAS: tl.constexpr,
    INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, TWIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does one box of keys of one key head of one image."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    PAD: tl.constexpr = bias_padding(AXES, TQ, TK)
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
    x = places(u, 1, TK)
    k = load_box(k_ptr + kv_head * (ksh * ALIGN) + b * (ksb * ALIGN), ks, u, g, G, d, 1, TK, D, BD)
    v = load_box(v_ptr + kv_head * (vsh * ALIGN) + b * (vsb * ALIGN), vs, u, g, G, d, 1, TK, DV, BDV)
    k_bias = bias_column(x, AXES)
    tokens = L0.to(tl.int64) * L1 * L2
    f = first_queries(u, G, AXES)
    z = end_queries(last_places(u, G, TK), G, AXES)
    boxes = count_boxes(f, z, TQ)
    dk = tl.zeros([N, BD], tl.float32)
    dv = tl.zeros([N, BDV], tl.float32)
    at = f
    head = kv_head * kv_group
    for _ in tl.range(boxes * kv_group):
        base = b * tokens * heads + head
        q = load_box(q_ptr + head * (qsh * ALIGN) + b * (qsb * ALIGN), qs, at, g, G, d, 1, TQ, D, BD)
        do = load_box(do_ptr + head * (gsh * ALIGN) + b * (gsb * ALIGN), gs, at, g, G, d, 1, TQ, DV, BDV)
        y = places(at, 1, TQ)
        ok = in_group(y, G)[None, :]
        y = clamp(y, G)
        ok = ok & seen_by(x, first_keys(y, G, AXES), end_keys(y, G, AXES), pairs(TQ, TK))
        row = tokens_of(y, g, L, d, WIDE) * heads
        lse = tl.load(lse_ptr + base + row) * LOG2E
        delta = tl.load(delta_ptr + base + row)
        s = dot_nt(k, q, PREC) * scale - lse[None, :]
        if HAS_BIAS:
            table = bias_ptr + head * (bias_size(AXES) + 2 * PAD) + PAD
            s += gather_bias(table, k_bias[:, None] - bias_row(y, AXES)[None, :], INLINE)
        w = tl.exp2(tl.where(ok, s, float("-inf")))
        dv = dot_add(w.to(do.dtype), do, dv, PREC)
        ds = w * (dot_nt(v, do, PREC) - delta[None, :])
        dk = dot_add(ds.to(q.dtype), q, dk, PREC)
        at = next_box(at, f, z, TQ)
        is_last = at[0] >= z[0]  # the next head begins
        at = (tl.where(is_last, f[0], at[0]), at[1], at[2])
        head += is_last.to(tl.int64)
    inside = in_group(x, G)
    base = b * tokens * kv_heads + kv_head
    row = tokens_of(clamp(x, G), g, L, d, WIDE) * kv_heads
    store_rows(dk_ptr + base * D, row * D, dk * (scale * LN2), inside, D, BD)
    store_rows(dv_ptr + base * DV, row * DV, dv, inside, DV, BDV)
