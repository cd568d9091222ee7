// Gradients of keys and values, dK += dS^T Q and dV += P^T dO. Lanes are channels.
//
//      accumulators: one key column x up to 5 key rows (or one key row x 5 key columns where there is one row only)
//      x 1 or 2 vectors of channels, loaded from and stored to a ring of gradient rows
//
//      key row                query row 0   1   2
//         0                          x                 for each query lane that sees the column, a query row adds its
//         1                          x   x             weight times its vector to the rows [low, high) it sees: `low` and
//         2                          x   x   x         `high` are constants of an unrolled loop, chosen by a switch outside
//         3                              x   x         the loop over lanes
//         4                                  x
#pragma once
#include "tile.h"

namespace nbhd::NBHD_ISA {

struct KeyGradient {
    const Real *weights;    // [row][slot][lane]
    int64_t weights_row;
    int kernel;
    const Real *vectors;    // [row][query][width]: queries or output gradients
    int64_t vectors_row;
    int width;
    Real *gradient;         // ring rows of [key][width]
    int64_t ring_row;
    const RowTile *rows;
    const int *first, *end; // keys of each query
    int n, lane, lane_step; // queries and their lanes
};

constexpr int gradient_block = registers >= 32 ? 8 : 5;

// weight(i) of key i in [low, high) is at w + i * key_step; the next lane's at w + lane_step.
template <int low, int high, int vectors>
NBHD_INLINE void add_lanes(Vec (&a)[gradient_block][vectors], const Real *w, int64_t key_step, int64_t lane_step, const Real *v,
                           int width, int count) {
    for (int l = 0; l < count; l++, w += lane_step, v += width) {
        Vec vv[vectors];
#pragma GCC unroll 4
        for (int c = 0; c < vectors; c++) vv[c] = load(v + c * lanes), keep(vv[c]);
#pragma GCC unroll 8
        for (int i = low; i < high; i++) {
            const Vec b = broadcast(w + i * key_step);
#pragma GCC unroll 4
            for (int c = 0; c < vectors; c++) a[i][c] = fma(b, vv[c], a[i][c]);
        }
    }
}

template <int code, int vectors>
NBHD_INLINE void add_case(Vec (&a)[gradient_block][vectors], const Real *w, int64_t key_step, int64_t lane_step, const Real *v,
                          int width, int count) {
    constexpr int low = code / 16, high = code % 16;
    if constexpr (low < high && high <= gradient_block)
        add_lanes<low, high, vectors>(a, w, key_step, lane_step, v, width, count);
}

template <int vectors>
NBHD_INLINE void add(Vec (&a)[gradient_block][vectors], int low, int high, const Real *w, int64_t key_step, int64_t lane_step,
                     const Real *v, int width, int count) {
    switch (low * 16 + high) {
#define NBHD_CASE(low, high)                                                                                                   \
    case low * 16 + high: add_case<low * 16 + high, vectors>(a, w, key_step, lane_step, v, width, count); break;
#define NBHD_CASES(high) NBHD_CASE(0, high) NBHD_CASE(1, high) NBHD_CASE(2, high) NBHD_CASE(3, high) NBHD_CASE(4, high)         \
    NBHD_CASE(5, high) NBHD_CASE(6, high) NBHD_CASE(7, high)
        NBHD_CASES(1) NBHD_CASES(2) NBHD_CASES(3) NBHD_CASES(4) NBHD_CASES(5) NBHD_CASES(6) NBHD_CASES(7) NBHD_CASES(8)
#undef NBHD_CASES
#undef NBHD_CASE
    }
}

// Key rows [i0, i0 + keys) of the tile's list, all in one plane; every key column the tile sees.
template <int vectors> static void gradient_rows(const KeyGradient &g, int i0, int keys, int c0) {
    const RowTile &t = *g.rows;
    const int64_t slots = (int64_t)g.kernel * lanes;
    const KeyRow *key = t.key + i0;
    Real *row[gradient_block];
    for (int i = 0; i < gradient_block; i++) row[i] = g.gradient + key[i < keys ? i : 0].ring * g.ring_row + c0;
    int low[tile_rows], high[tile_rows];
    for (int r = 0; r < t.n; r++) {
        int i = 0;
        while (i < keys && !(key[i].begin <= r && r < key[i].end)) i++;
        low[r] = i;
        while (i < keys && key[i].begin <= r && r < key[i].end) i++;
        high[r] = i;
    }
    int from = 0, to = 0; // lanes that see the column
    for (int x = g.first[0]; x < g.end[g.n - 1]; x++) {
        while (from < g.n && g.end[from] <= x) from++;
        while (to < g.n && g.first[to] <= x) to++;
        if (from >= to) continue;
        Vec a[gradient_block][vectors];
        const int64_t at = (int64_t)x * g.width;
#pragma GCC unroll 8
        for (int i = 0; i < gradient_block; i++)
#pragma GCC unroll 4
            for (int c = 0; c < vectors; c++) a[i][c] = load(row[i] + at + c * lanes);
        for (int l = from; l < to;) { // runs of lanes whose first keys advance by the same step
            int run = l + 1;
            const int step = run < to ? g.first[run] - g.first[l] : 0;
            while (run < to && g.first[run] - g.first[run - 1] == step) run++;
            for (int r = 0; r < t.n; r++)
                add<vectors>(a, low[r], high[r],
                             g.weights + r * g.weights_row + (key[0].slot - t.shift[r]) * slots + (int64_t)(x - g.first[l]) * lanes + g.lane + l * g.lane_step,
                             slots, g.lane_step - (int64_t)step * lanes, g.vectors + r * g.vectors_row + (int64_t)l * g.width + c0, g.width,
                             run - l);
            l = run;
        }
#pragma GCC unroll 8
        for (int i = 0; i < gradient_block; i++)
            if (i < keys)
#pragma GCC unroll 4
                for (int c = 0; c < vectors; c++) store(row[i] + at + c * lanes, a[i][c]);
    }
}

static void key_gradient(const KeyGradient &g) {
    const RowTile &t = *g.rows;
    const int plane = t.key_rows_per_plane, parts = (plane + gradient_block - 1) / gradient_block;
    for (int z = 0; z < t.key_rows; z += plane)
        for (int part = 0, from = 0; part < parts; part++) {
            const int n = (plane - from) / (parts - part);
            int c = 0;
            for (; c + 2 * lanes <= g.width; c += 2 * lanes) gradient_rows<2>(g, z + from, n, c);
            if (c < g.width) gradient_rows<1>(g, z + from, n, c);
            from += n;
        }
}

} // namespace nbhd::NBHD_ISA
