// Softmax and its gradient, elementwise over score vectors [slot][lane] of one query row.
#pragma once
#include "element.h"
#include "tile.h"

namespace nbhd::NBHD_ISA {

constexpr Real log2_e = Real(1.4426950408889634074), ln_2 = Real(0.69314718055994530942);
// Scores of attention are in units of log2, so that weights are powers of two; those of the unfused pair are as they are.
static Real score_unit(const Problem &p) { return p.part == Part::attention ? log2_e : Real(1); }
constexpr Real infinity = Real(__builtin_inf());
constexpr Real nothing = -infinity; // a score whose weight is exactly zero

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

// What the forward left of a row, and the gradient of it.
struct RowLse {
    Vec lse, d_lse;
    bool is_large;
};
// Beyond, a log-sum-exp is not exact to a small part of one any more.
constexpr Real largest_lse = Real(1e6);

// Of the weights of a row: 1 / their sum, and d_lse - delta, delta = sum P dP of weights whose sum is one.
struct RowGradient {
    Vec normaliser, shift;
};

// scores -> P = exp2(scores - lse), where `normaliser` is still to be applied: the log-sum-exp is rounded, so that these do not add
// up to one, and what is missing would be in every gradient of the bias times whatever the dP have in common. For the same reason
// delta is summed over dP less the mean of some. Long rows are summed by parts.
static RowGradient weights_and_delta(Real *scores, const Real *d_weights, int slots, bool holes, const RowLse &row) {
    constexpr int part = 4 * 64;
    // the first slot is never a hole
    const auto one_in_four = [&](int i) { return load(d_weights + (holes ? 0 : slots * i / 4) * lanes); };
    const Vec origin = row.is_large ? row_maximum(scores, slots) : row.lse,
              common = ((one_in_four(0) + one_in_four(1)) + (one_in_four(2) + one_in_four(3))) * splat(Real(0.25));
    Vec all{}, delta{};
    for (int i = 0; i < slots;) {
        const int end = slots - i < part ? slots : i + part;
        Vec sum[4] = {}, products[4] = {};
        for (; i + 4 <= end; i += 4) {
            Real *s = scores + i * lanes;
            const Real *d = d_weights + i * lanes;
            Vec e[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) e[k] = load(s + k * lanes) - origin;
            exp2(e);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                store(s + k * lanes, e[k]), sum[k] += e[k];
                products[k] = fma(e[k], load(d + k * lanes) - common, products[k]);
            }
        }
        for (; i < end; i++) {
            const Vec e = exp2(load(scores + i * lanes) - origin);
            store(scores + i * lanes, e), sum[0] += e;
            products[0] = fma(e, load(d_weights + i * lanes) - common, products[0]);
        }
        all += (sum[0] + sum[1]) + (sum[2] + sum[3]);
        delta += (products[0] + products[1]) + (products[2] + products[3]);
    }
    const Vec normaliser = splat(Real(1)) / all;
    return {normaliser, (row.d_lse - common) - delta * normaliser};
}

// weights -> P, normalised; d_weights -> dS = P (dP + shift).
static Vec score_gradient(Real *weights, Real *d_weights, const RowGradient &row) {
    const Vec w = load(weights) * row.normaliser, g = w * (load(d_weights) + row.shift);
    store(weights, w), store(d_weights, g);
    return g;
}
static void score_gradients(Real *weights, Real *d_weights, int slots, const RowGradient &row) {
    for (int i = 0; i < slots; i++) score_gradient(weights + i * lanes, d_weights + i * lanes, row);
}
// The same, and added to `sum`, as long.
static void score_gradients_and_add(Real *weights, Real *d_weights, int slots, const RowGradient &row, Real *sum) {
    for (int i = 0; i < slots; i++) {
        const Vec g = score_gradient(weights + i * lanes, d_weights + i * lanes, row);
        store(sum + i * lanes, load(sum + i * lanes) + g);
    }
}

// Lanes from n on -> zero, whatever they held.
static void clear_idle_lanes(Real *weights, Real *d_weights, int slots, int n, RowGradient &row) {
    const Index busy = first_lanes(n);
    for (int i = 0; i < slots * lanes; i += lanes) {
        store(weights + i, busy ? load(weights + i) : Vec{});
        store(d_weights + i, busy ? load(d_weights + i) : Vec{});
    }
    row.normaliser = busy ? row.normaliser : Vec{}, row.shift = busy ? row.shift : Vec{};
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
