// Softmax and its gradient, elementwise over score vectors [slot][lane] of one query row.
#pragma once
#include "tile.h"

namespace nbhd::NBHD_ISA {

constexpr Real log2_e = Real(1.4426950408889634074), ln_2 = Real(0.69314718055994530942);
// Scores of attention are in units of log2, so that weights are powers of two; those of the unfused pair are as they are.
static Real score_unit(const Problem &p) { return p.part == Part::attention ? log2_e : Real(1); }
constexpr Real nothing = Real(-1e30); // a score whose weight is exactly zero

// Whether some slot of the tile belongs to no key, as under a causal axis.
static bool has_holes(const RowTile &t, const ColumnTile &c, const Problem &p) {
    if (c.masked || t.z_count < p.axis[0].kernel) return true;
    for (int r = 0; r < t.n; r++)
        if (t.y_count[r] < p.axis[1].kernel) return true;
    return false;
}

// Writes `fill` to the slots of query row r that belong to no key.
static void fill_holes(Real *scores, const RowTile &t, int r, const ColumnTile &c, const Problem &p, Real fill) {
    const int kz = p.axis[0].kernel, ky = p.axis[1].kernel, kx = p.axis[2].kernel;
    for (int z = 0; z < kz; z++)
        for (int x = 0; x < kx; x++)
            for (int y = 0; y < ky; y++, scores += lanes) {
                if (z >= t.z_count || y >= t.y_count[r]) store(scores, splat(fill));
                else if (c.masked) store(scores, c.count > x ? load(scores) : splat(fill));
            }
}

static Vec row_maximum(const Real *scores, int slots) {
    Vec m = splat(nothing);
    for (int i = 0; i < slots; i++) m = max(m, load(scores + i * lanes));
    return m;
}

// scores -> exp2(scores - maximum); returns the sum. Four at a time, because one exponential is a long chain of few instructions.
static Vec exponentials(Real *scores, int slots, Vec maximum) {
    Vec sum[2] = {};
    int i = 0;
    for (; i + 4 <= slots; i += 4) {
        Real *s = scores + i * lanes;
        Vec e[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) e[k] = load(s + k * lanes) - maximum;
        exp2(e);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) store(s + k * lanes, e[k]), sum[k & 1] += e[k];
    }
    for (; i < slots; i++) {
        const Vec e = exp2(load(scores + i * lanes) - maximum);
        store(scores + i * lanes, e);
        sum[0] += e;
    }
    return sum[0] + sum[1];
}

// scores -> weights P = exp2(scores - lse); returns sum of P dP.
static Vec weights_and_delta(Real *scores, const Real *d_weights, int slots, Vec lse) {
    Vec sum[2] = {};
    int i = 0;
    for (; i + 4 <= slots; i += 4) {
        Real *s = scores + i * lanes;
        const Real *d = d_weights + i * lanes;
        Vec e[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) e[k] = load(s + k * lanes) - lse;
        exp2(e);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) store(s + k * lanes, e[k]), sum[k & 1] = fma(e[k], load(d + k * lanes), sum[k & 1]);
    }
    for (; i < slots; i++) {
        const Vec e = exp2(load(scores + i * lanes) - lse);
        store(scores + i * lanes, e);
        sum[0] = fma(e, load(d_weights + i * lanes), sum[0]);
    }
    return sum[0] + sum[1];
}

// d_weights -> dS = P (dP + shift), shift = d_lse - delta.
static void score_gradient(const Real *weights, Real *d_weights, int slots, Vec shift) {
    for (int i = 0; i < slots; i++)
        store(d_weights + i * lanes, load(weights + i * lanes) * (load(d_weights + i * lanes) + shift));
}
// The same, and added to `sum`, as long.
static void score_gradient_and_add(const Real *weights, Real *d_weights, int slots, Vec shift, Real *sum) {
    for (int i = 0; i < slots; i++) {
        const Vec g = load(weights + i * lanes) * (load(d_weights + i * lanes) + shift);
        store(d_weights + i * lanes, g);
        store(sum + i * lanes, load(sum + i * lanes) + g);
    }
}

// sum += scores; returns the largest sum.
static Vec add_scores(const Real *scores, int slots, Real *sum) {
    Vec m = splat(nothing);
    for (int i = 0; i < slots; i++) {
        const Vec s = load(sum + i * lanes) + load(scores + i * lanes);
        store(sum + i * lanes, s), m = max(m, s);
    }
    return m;
}

} // namespace nbhd::NBHD_ISA
