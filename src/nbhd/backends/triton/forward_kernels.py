"""The forward kernels: output and log-sum-exp.

``forward_once``   all keys that a box of queries sees fit one box of keys (NAT's windows): nothing is rebuilt, and
                   places, offsets, masks and the bias serve several images, whose loads overlap with the work
``forward_loop``   any window: a walk over boxes of keys with an online softmax

Scores are in base 2: the scale and the bias hold log2(e). FINAL says that the products are scaled before the maximum
is taken, which a bias needs, and a scale that is not positive; without it scaling and subtracting are one operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbhd.backends.triton.score_tiles import (
    LN2,
    LOW,
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
    locate,
    next_box,
    places,
    seen_whole,
    store_rows,
    tokens_of,
    wide,
)

#: Integers that differ from call to call: a kernel is not compiled anew for their sake.
SIZES = (
    "batch", "heads", "kv_group", "L0", "L1", "L2", "images", "first_box",
    *(f"{t}{i}" for t in ("qs", "ks", "vs", "gs") for i in ("b", "0", "1", "2", "h")),
)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def forward_once(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, bias_ptr,
    qsb, qs0, qs1, qs2, qsh,
    ksb, ks0, ks1, ks2, ksh,
    vsb, vs0, vs1, vs2, vsh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    images,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, TWIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does one box of queries of one head, in ``images`` images one after the other."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    PAD: tl.constexpr = bias_padding(AXES, TQ, TK)
    u, g, G = locate(tl.program_id(1) + tl.program_id(2) * tl.num_programs(1), L, d, TQ)
    if is_outside(u, G):
        return
    f = first_keys(u, G, AXES)
    y = places(u, TQ)
    inside = in_group(y, G)
    y = clamp(y, G)
    p = places(f, TK)
    head = (tl.program_id(0) % heads).to(tl.int64)
    ok = sees(p, first_keys(y, G, AXES), end_keys(y, G, AXES), pairs(TQ, TK))
    if HAS_BIAS:
        bias_ptr += head * (bias_size(AXES) + 2 * PAD) + PAD
        index = bias_column(p, AXES)[None, :] - bias_row(y, AXES)[:, None]
        term = tl.where(ok, gather_bias(bias_ptr, index, INLINE), float("-inf"))
    else:
        term = tl.where(ok, 0.0, float("-inf"))
    qs = wide((qs0, qs1, qs2), ALIGN, WIDE)
    ks = wide((ks0, ks1, ks2), ALIGN, WIDE)
    vs = ks if TWIN else wide((vs0, vs1, vs2), ALIGN, WIDE)
    q_ptr += head * far(qsh, ALIGN)
    k_ptr += head // kv_group * far(ksh, ALIGN)
    v_ptr += head // kv_group * far(vsh, ALIGN)
    row = tokens_of(y, g, L, d, WIDE) * heads
    size = L0.to(tl.int64) * L1 * L2 * heads
    start = tl.program_id(0) // heads * images
    for i in tl.range(0, tl.minimum(images, batch - start)):
        b = (start + i).to(tl.int64)
        q = load_box(q_ptr + b * far(qsb, ALIGN), qs, u, g, G, d, TQ, D, BD)
        k = load_box(k_ptr + b * far(ksb, ALIGN), ks, f, g, G, d, TK, D, BD)
        v = load_box(v_ptr + b * far(vsb, ALIGN), vs, f, g, G, d, TK, DV, BDV)
        s = dot_nt(q, k, PREC) * scale + term
        m = tl.maximum(tl.max(s, 1), LOW)
        w = tl.exp2(s - m[:, None])
        total = tl.sum(w, 1)
        acc = dot(w.to(v.dtype), v, PREC)
        base = b * size + head
        tl.store(lse_ptr + base + row, (m + tl.log2(total)) * LN2, mask=inside)
        store_rows(o_ptr + base * DV, row * DV, acc * (1.0 / total)[:, None], inside, DV, BDV)


@triton.jit(do_not_specialize=SIZES)
def forward_loop(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, bias_ptr,
    qsb, qs0, qs1, qs2, qsh,
    ksb, ks0, ks1, ks2, ksh,
    vsb, vs0, vs1, vs2, vsh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    HAS_BIAS: tl.constexpr, FINAL: tl.constexpr,
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
    k_ptr += (b * ksb + kv_head * ksh) * ALIGN
    v_ptr += (b * vsb + kv_head * vsh) * ALIGN
    y = places(u, TQ)
    inside = in_group(y, G)
    y = clamp(y, G)
    first = first_keys(y, G, AXES)
    end = end_keys(y, G, AXES)
    bias_ptr += head * (bias_size(AXES) + 2 * PAD) + PAD
    q_bias = bias_row(y, AXES)
    q = load_box(q_ptr + head * far(qsh, ALIGN) + b * far(qsb, ALIGN), qs, u, g, G, d, TQ, D, BD)

    last = last_places(u, G, TQ)
    f = first_keys(u, G, AXES)  # keys that some query sees lie in [f, z) along each axis
    z = end_keys(last, G, AXES)
    at = f
    m = tl.full([M], LOW, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BDV], tl.float32)
    left = 1.0 if FINAL else scale  # what is still to be multiplied
    for _ in tl.range(count_boxes(f, z, TK)):
        p = places(at, TK)
        k = load_box(k_ptr, ks, at, g, G, d, TK, D, BD)
        v = load_box(v_ptr, vs, at, g, G, d, TK, DV, BDV)
        s = dot_nt(q, k, PREC)
        if FINAL:
            s = s * scale
        if HAS_BIAS:
            s += gather_bias(bias_ptr, bias_column(p, AXES)[None, :] - q_bias[:, None], INLINE)
        if not seen_whole(at, TK, u, last, G, AXES):
            s = tl.where(sees(p, first, end, pairs(TQ, TK)), s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1) * left)
        shrink = tl.exp2(m - new)
        w = tl.exp2(s * left - new[:, None])
        total = total * shrink + tl.sum(w, 1)
        acc = dot_add(w.to(v.dtype), v, acc * shrink[:, None], PREC)
        m = new
        at = next_box(at, f, z, TK)

    row = b * (L0.to(tl.int64) * L1 * L2 * heads) + tokens_of(y, g, L, d, WIDE) * heads + head
    tl.store(lse_ptr + row, (m + tl.log2(total)) * LN2, mask=inside)
    store_rows(o_ptr, row * DV, acc * (1.0 / total)[:, None], inside, DV, BDV)
