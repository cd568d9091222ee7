"""The gradient of a bias whose windows are walked: sums over diagonals of dS.

Each program adds up the slab of the table (``W`` entries an axis from ``slab``) that its boxes touch in registers and
stores it as a table of its own; the host adds those up in a fixed order. No atomics anywhere. What costs is going from
dS to diagonals, so dS is summed over images first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbhd.backends.triton.forward_kernels import SIZES
from nbhd.backends.triton.score_tiles import (
    LOG2E,
    bias_column,
    bias_padding,
    bias_row,
    bias_size,
    dot_nt,
    gather_bias,
    pairs,
    sees,
    slab_entry,
    slab_keys,
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
    locate,
    next_box,
    places,
    tokens_of,
    wide,
)


@triton.jit(do_not_specialize=(*SIZES, "slab0", "slab1", "slab2"))
def table_loop(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, table_ptr,
    qsb, qs0, qs1, qs2, qsh,
    ksb, ks0, ks1, ks2, ksh,
    vsb, vs0, vs1, vs2, vsh,
    gsb, gs0, gs1, gs2, gsh,
    batch, heads, kv_group, L0, L1, L2, d0, d1, d2, scale,
    images, first_box, slab0, slab1, slab2,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    AXES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, W: tl.constexpr,
    INLINE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, TWIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program does a box of queries of one head in ``images`` images. Tables: ``[boxes, image groups, heads, W]``."""
    L = (L0, L1, L2)
    d = (d0, d1, d2)
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    PAD: tl.constexpr = bias_padding(AXES, TQ, TK)
    SIZE: tl.constexpr = W[0] * W[1] * W[2]
    slab = (slab0, slab1, slab2)
    box = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    u, g, G = locate(box + first_box, L, d, TQ)
    if is_outside(u, G):
        return
    head = (tl.program_id(0) % heads).to(tl.int64)
    qs = wide((qs0, qs1, qs2), ALIGN, WIDE)
    ks = wide((ks0, ks1, ks2), ALIGN, WIDE)
    vs = ks if TWIN else wide((vs0, vs1, vs2), ALIGN, WIDE)
    gs = wide((gs0, gs1, gs2), ALIGN, WIDE)
    q_ptr += head * far(qsh, ALIGN)
    k_ptr += head // kv_group * far(ksh, ALIGN)
    v_ptr += head // kv_group * far(vsh, ALIGN)
    do_ptr += head * far(gsh, ALIGN)
    bias_ptr += head * (bias_size(AXES) + 2 * PAD) + PAD
    y = places(u, TQ)
    inside = in_group(y, G)
    y = clamp(y, G)
    first = first_keys(y, G, AXES)
    end = end_keys(y, G, AXES)
    q_bias = bias_row(y, AXES)
    row = tokens_of(y, g, L, d, WIDE) * heads
    size = L0.to(tl.int64) * L1 * L2 * heads
    start = tl.program_id(0) // heads * images
    count = tl.minimum(images, batch - start)
    last = last_places(u, G, TQ)
    f, z = slab_keys(first_keys(u, G, AXES), end_keys(last, G, AXES), u, last, slab, AXES, W)
    at = f
    table = tl.zeros([SIZE], tl.float32)
    for _ in tl.range(count_boxes(f, z, TK), num_stages=1):
        p = places(at, TK)
        # a repeated row sees nothing: it must not count twice
        ok = sees(p, first, end, pairs(TQ, TK)) & inside[:, None]
        found = gather_bias(bias_ptr, bias_column(p, AXES)[None, :] - q_bias[:, None], INLINE)
        term = tl.where(ok, found, float("-inf"))
        total = tl.zeros([M, N], tl.float32)
        for i in tl.range(0, count):
            b = (start + i).to(tl.int64)
            q = load_box(q_ptr + b * far(qsb, ALIGN), qs, u, g, G, d, TQ, D, BD)
            k = load_box(k_ptr + b * far(ksb, ALIGN), ks, at, g, G, d, TK, D, BD)
            v = load_box(v_ptr + b * far(vsb, ALIGN), vs, at, g, G, d, TK, DV, BDV)
            do = load_box(do_ptr + b * far(gsb, ALIGN), gs, u, g, G, d, TQ, DV, BDV)
            lse = tl.load(lse_ptr + (b * size + head) + row) * LOG2E
            delta = tl.load(delta_ptr + (b * size + head) + row)
            w = tl.exp2(dot_nt(q, k, PREC) * scale + term - lse[:, None])
            total += w * (dot_nt(do, v, PREC) - delta[:, None])
        table += table_sums(total, slab_entry(at, u, slab, AXES), TQ, TK, W)
        at = next_box(at, f, z, TK)
    number = box.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(table_ptr + number * SIZE + tl.arange(0, SIZE), table)
