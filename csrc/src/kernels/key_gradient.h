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
#include "ahead.h"
#include "tile.h"

namespace nbhd::NBHD_ISA {

// Key rows of a register block. With 16 registers a token of four vectors is taken whole: each row's sum waits for itself once for
// every query row that adds to it, so that blocks are better broad than high.
constexpr bool takes_four_vectors = registers < 32;
constexpr int gradient_block = registers >= 32 ? 10 : 5;
constexpr int gradient_rows(int vectors) { return vectors > 2 ? 3 : gradient_block; }

// Tiles of fewer query rows make no pattern: they are rare, and each costs a function.
constexpr int least_pattern_rows = tile_rows - 1;

// Key rows that are accumulated together: up to gradient_block neighbours of one plane. Query row r sees those in
// [low[r], high[r]) of them.
struct GradientBlock {
    const KeyRow *key;
    int keys, low[tile_rows], high[tile_rows];
    int pattern; // of low and high (see Pattern): keys * 4 + head * 2 + tail, or -1
};

static GradientBlock gradient_block_of(const RowTile &t, const KeyRow *key, int keys) {
    GradientBlock b{key, keys, {}, {}, -1};
    bool head = true, tail = true, no_head = true, no_tail = true, alike = true;
    for (int r = 0; r < t.n; r++) {
        int i = 0;
        while (i < keys && !(key[i].begin <= r && r < key[i].end)) i++;
        b.low[r] = i;
        while (i < keys && key[i].begin <= r && r < key[i].end) i++;
        b.high[r] = i;
        no_head &= b.low[r] == 0, head &= b.low[r] == r;
        no_tail &= b.high[r] == keys, tail &= b.high[r] == keys - t.n + 1 + r;
        if (r > 0) alike &= t.shift[r] - t.shift[r - 1] == t.shift[1] - t.shift[0];
    }
    if (t.n >= least_pattern_rows && alike && (head || no_head) && (tail || no_tail))
        b.pattern = keys * 4 + !no_head * 2 + !no_tail;
    return b;
}

// Cuts the key rows of a tile into blocks of equal size, up to one; returns their number, at most t.key_rows.
static int make_gradient_blocks(const RowTile &t, int vectors, GradientBlock *blocks) {
    const int most = gradient_rows(vectors), plane = t.key_rows_per_plane, parts = (plane + most - 1) / most;
    int n = 0;
    for (int z = 0; z < t.key_rows; z += plane)
        for (int part = 0, from = 0; part < parts; part++) {
            const int keys = (plane - from) / (parts - part);
            blocks[n++] = gradient_block_of(t, t.key + z + from, keys);
            from += keys;
        }
    return n;
}

struct KeyGradient {
    const Real *weights; // [row][slot][lane]
    int64_t weights_row;
    int64_t step;        // of a weight from a key column to the next; from a key row to the next it is `lanes`
    const Real *vectors; // [row][query][width]: queries or output gradients
    int64_t vectors_row;
    int width;
    Real *gradient; // ring rows of [key][width]
    int64_t ring_row;
    const RowTile *rows;
    const GradientBlock *blocks;
    int n_blocks, vectors_at_once; // what the blocks are made for
    const Run *run;                // the queries
    const int *first, *end;        // keys of each
    int advance;                   // how evenly they advance: see advance_of
    Ahead *ahead;
};
// Key columns, and steps of `ahead`, for each run of n queries.
static int gradient_steps(const RowTile &t, int n, int kernel, int width) {
    return (n + kernel - 1) * ((t.key_rows + gradient_block - 1) / gradient_block) *
           ((width + 2 * lanes - 1) / (2 * lanes));
}

// Which keys [low, high) of a block of n each query row adds to. Rows whose windows start one after another leave a triangle
// out of the first block (`head`), of the last (`tail`), or both; rows with the same window leave nothing out.
template <int n_, int rows_, bool head, bool tail>
struct Pattern {
    static constexpr int n = n_, rows = rows_;
    static constexpr int low(int r) { return !head ? 0 : r < n ? r : n; }
    static constexpr int high(int r) { return !tail ? n : n - rows + 1 + r > 0 ? n - rows + 1 + r : 0; }
};
// One query row, keys [low, high) of a whole block.
template <int n_, int low_, int high_>
struct OneRow {
    static constexpr int n = n_, rows = 1;
    static constexpr int low(int) { return low_; }
    static constexpr int high(int) { return high_; }
};

template <int n, int vectors>
NBHD_INLINE void load_block(Vec (&a)[n][vectors], Real *const *row, int64_t at) {
#pragma GCC unroll 10
    for (int i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int c = 0; c < vectors; c++) a[i][c] = load(row[i] + at + c * lanes);
}
template <int n, int vectors>
NBHD_INLINE void store_block(const Vec (&a)[n][vectors], Real *const *row, int64_t at, int keys) {
#pragma GCC unroll 10
    for (int i = 0; i < n; i++)
        if (i < keys)
#pragma GCC unroll 4
            for (int c = 0; c < vectors; c++) store(row[i] + at + c * lanes, a[i][c]);
}

// Adds `count` queries to the accumulators; the weight of (row, key) lies at w + row * row_step + key * lanes.
template <class Rows, int n, int vectors>
NBHD_INLINE void add_queries(Vec (&a)[n][vectors], const Real *w, int64_t row_step, int64_t lane_step, const Real *v,
                             int64_t vectors_row, int width, int count) {
    for (int l = 0; l < count; l++, w += lane_step, v += width)
#pragma GCC unroll 4
        for (int r = 0; r < Rows::rows; r++) {
            if constexpr (vectors > 2) { // registers hold the weights and one vector at a time
                Vec b[n];
#pragma GCC unroll 10
                for (int i = 0; i < n; i++)
                    if (i >= Rows::low(r) && i < Rows::high(r))
                        b[i] = broadcast(w + r * row_step + i * lanes), keep(b[i]);
#pragma GCC unroll 4
                for (int c = 0; c < vectors; c++) {
                    Vec vv = load(v + r * vectors_row + c * lanes);
                    keep(vv);
#pragma GCC unroll 10
                    for (int i = 0; i < n; i++)
                        if (i >= Rows::low(r) && i < Rows::high(r)) a[i][c] = fma(b[i], vv, a[i][c]);
                }
                continue;
            }
            Vec vv[vectors];
#pragma GCC unroll 4
            for (int c = 0; c < vectors; c++) vv[c] = load(v + r * vectors_row + c * lanes), keep(vv[c]);
#pragma GCC unroll 10
            for (int i = 0; i < n; i++) {
                if (i < Rows::low(r) || i >= Rows::high(r)) continue; // decided at compile time
                const Vec b = broadcast(w + r * row_step + i * lanes);
#pragma GCC unroll 4
                for (int c = 0; c < vectors; c++) a[i][c] = fma(b, vv[c], a[i][c]);
            }
        }
}

// A block whose rows make a pattern, for a run whose queries share their keys (advance 0) or start one key further each (1):
// which queries see a column is arithmetic.
template <class Rows, int vectors>
static void add_pattern(const KeyGradient &g, Real *const *rows, const Real *weights, int64_t row_step, const Real *v,
                        int advance) {
    const int n = g.run->n, width = g.width, begin = g.first[0], last = g.end[0] - 1, end = g.end[n - 1];
    const int64_t lane_step = g.run->step - advance * g.step, step = g.step, vectors_row = g.vectors_row;
    Real *row[Rows::n];
#pragma GCC unroll 10
    for (int i = 0; i < Rows::n; i++) row[i] = rows[i];
    for (int x = begin; x < end; x++) {
        g.ahead->step();
        const int from = advance && x > last ? x - last : 0, to = advance && x - begin + 1 < n ? x - begin + 1 : n;
        Vec a[Rows::n][vectors];
        load_block(a, row, (int64_t)x * width);
        add_queries<Rows>(a, weights + (x - begin) * step + from * lane_step, row_step, lane_step,
                          v + (int64_t)from * width, vectors_row, width, to - from);
        store_block(a, row, (int64_t)x * width, Rows::n);
    }
}

// Anything else: row by row, and in pieces of queries whose first keys advance evenly.
template <int n, int vectors>
NBHD_INLINE void add_span(Vec (&a)[n][vectors], int low, int high, const Real *w, int64_t lane_step, const Real *v,
                          int width, int count) {
    switch (low * 16 + high) {
#define NBHD_CASE(low, high)                                                                                           \
    case low * 16 + high:                                                                                              \
        if constexpr (low < high && high <= n)                                                                         \
            add_queries<OneRow<n, low, high>>(a, w, 0, lane_step, v, 0, width, count);                                 \
        break;
#define NBHD_CASES(high)                                                                                               \
    NBHD_CASE(0, high)                                                                                                 \
    NBHD_CASE(1, high)                                                                                                 \
    NBHD_CASE(2, high)                                                                                                 \
    NBHD_CASE(3, high)                                                                                                 \
    NBHD_CASE(4, high) NBHD_CASE(5, high) NBHD_CASE(6, high) NBHD_CASE(7, high) NBHD_CASE(8, high) NBHD_CASE(9, high)
        NBHD_CASES(1)
        NBHD_CASES(2)
        NBHD_CASES(3) NBHD_CASES(4) NBHD_CASES(5) NBHD_CASES(6) NBHD_CASES(7) NBHD_CASES(8) NBHD_CASES(9) NBHD_CASES(10)
#undef NBHD_CASES
#undef NBHD_CASE
    }
}
template <int vectors>
static void add_rows(const KeyGradient &g, const GradientBlock &b, Real *const *row, const Real *weights,
                     const Real *v) {
    const RowTile &t = *g.rows;
    const int n = g.run->n;
    int from = 0, to = 0; // queries that see the column
    for (int x = g.first[0]; x < g.end[n - 1]; x++) {
        while (from < n && g.end[from] <= x) from++;
        while (to < n && g.first[to] <= x) to++;
        if (from >= to) continue;
        g.ahead->step();
        Vec a[gradient_rows(vectors)][vectors];
        load_block(a, row, (int64_t)x * g.width);
        for (int l = from, next; l < to; l = next) {
            next = l + 1;
            const int advance = next < to ? g.first[next] - g.first[l] : 0;
            while (next < to && g.first[next] - g.first[next - 1] == advance) next++;
            for (int r = 0; r < t.n; r++)
                add_span(a, b.low[r], b.high[r],
                         weights + r * g.weights_row - (t.shift[r] - t.shift[0]) * lanes + (x - g.first[l]) * g.step +
                             l * g.run->step,
                         g.run->step - advance * g.step, v + r * g.vectors_row + (int64_t)l * g.width, g.width,
                         next - l);
        }
        store_block(a, row, (int64_t)x * g.width, b.keys);
    }
}

// How evenly the first keys of a run advance: 0, 1, or -1 for neither; every query must see as many keys.
static int advance_of(const KeyGradient &g) {
    const int n = g.run->n, advance = n > 1 ? g.first[1] - g.first[0] : 0;
    if (advance > 1) return -1;
    for (int i = 1; i < n; i++)
        if (g.first[i] - g.first[0] != i * advance || g.end[i] - g.first[i] != g.end[0] - g.first[0]) return -1;
    return advance;
}

template <int query_rows, int vectors>
static void add_pattern_of(int pattern, const KeyGradient &g, Real *const *row, const Real *weights, int64_t row_step,
                           const Real *v, int advance) {
    switch (pattern) {
#define NBHD_CASE(n, head, tail)                                                                                       \
    case n * 4 + head * 2 + tail:                                                                                      \
        if constexpr (n <= gradient_rows(vectors))                                                                     \
            add_pattern<Pattern<n, query_rows, head, tail>, vectors>(g, row, weights, row_step, v, advance);           \
        break;
#define NBHD_CASES(n) NBHD_CASE(n, 0, 0) NBHD_CASE(n, 0, 1) NBHD_CASE(n, 1, 0) NBHD_CASE(n, 1, 1)
        NBHD_CASES(1)
        NBHD_CASES(2)
        NBHD_CASES(3)
        NBHD_CASES(4)
        NBHD_CASES(5)
        NBHD_CASES(6)
        NBHD_CASES(7)
        NBHD_CASES(8)
        NBHD_CASES(9)
        NBHD_CASES(10)
#undef NBHD_CASES
#undef NBHD_CASE
    }
}

template <int vectors>
static void gradient_of_block(const KeyGradient &g, const GradientBlock &b, int advance, int c0) {
    const RowTile &t = *g.rows;
    constexpr int most = gradient_rows(vectors);
    Real *row[most];
    for (int i = 0; i < most; i++) row[i] = g.gradient + b.key[i < b.keys ? i : 0].ring * g.ring_row + c0;
    const Real *const weights = g.weights + (int64_t)(b.key[0].slot - t.shift[0]) * lanes + g.run->lane, *const v =
                                                                                                             g.vectors +
                                                                                                             c0;
    const int64_t row_step = g.weights_row - lanes * (t.n > 1 ? t.shift[1] - t.shift[0] : 0);
    if (advance < 0 || b.pattern < 0) add_rows<vectors>(g, b, row, weights, v);
    else if (t.n == tile_rows) add_pattern_of<tile_rows, vectors>(b.pattern, g, row, weights, row_step, v, advance);
    else add_pattern_of<least_pattern_rows, vectors>(b.pattern, g, row, weights, row_step, v, advance);
}

static void key_gradient(const KeyGradient &gradient) {
    const KeyGradient g = gradient; // a copy that no store can alias
    const int advance = advance_of(g);
    for (int i = 0; i < g.n_blocks; i++) {
        int c = 0;
        if constexpr (takes_four_vectors)
            if (g.vectors_at_once == 4)
                for (; c < g.width; c += 4 * lanes) gradient_of_block<4>(g, g.blocks[i], advance, c);
        for (; c + 2 * lanes <= g.width; c += 2 * lanes) gradient_of_block<2>(g, g.blocks[i], advance, c);
        if (c < g.width) gradient_of_block<1>(g, g.blocks[i], advance, c);
    }
}

// A single query row with a single key row, as in a sequence: the accumulators are neighbouring key columns, whose weights lie at
// the same distances as those of key rows elsewhere. The queries of several runs go together. Those of a run that see all of
// the columns are taken in one loop, others one by one.
static bool is_sequence(const RowTile &t, int64_t step) { return t.n == 1 && t.key_rows == 1 && step == lanes; }

template <int vectors>
static void add_sequence(const KeyGradient *runs, int n_runs, int c0) {
    constexpr int most = gradient_rows(vectors);
    const KeyGradient &all = runs[0];
    Real *const gradient = all.gradient + all.rows->key[0].ring * all.ring_row + c0;
    const int width = all.width;
    const int64_t step = all.step;
    int begin = all.first[0], end = all.end[all.run->n - 1];
    for (int i = 1; i < n_runs; i++) {
        if (runs[i].first[0] < begin) begin = runs[i].first[0];
        if (runs[i].end[runs[i].run->n - 1] > end) end = runs[i].end[runs[i].run->n - 1];
    }
    for (int x = begin; x < end; x += most) {
        const int columns = end - x < most ? end - x : most;
        Real *row[most];
        for (int i = 0; i < most; i++) row[i] = gradient + (int64_t)(x + (i < columns ? i : 0)) * width;
        Vec a[most][vectors];
        load_block(a, row, 0);
        for (int i = 0; i < n_runs; i++) {
            const KeyGradient &g = runs[i];
            const int n = g.run->n, lane_step = g.run->step;
            if (g.first[0] >= x + columns || g.end[n - 1] <= x) continue;
            const Real *const weights = g.weights + (int64_t)g.rows->key[0].slot * lanes + g.run->lane, *const v =
                                                                                                            g.vectors +
                                                                                                            c0;
            for (int l = 0, next; l < n; l = next) {
                next = l + 1;
                const int low = g.first[l] > x ? g.first[l] - x : 0,
                          high = g.end[l] - x < columns ? g.end[l] - x : columns;
                if (low >= high) continue;
                const bool whole = g.advance >= 0 && low == 0 && high == columns;
                while (whole && next < n && g.first[next] <= x && g.end[next] - x >= columns) next++;
                add_span(a, low, high, weights + (x - g.first[l]) * step + l * lane_step, lane_step - g.advance * step,
                         v + (int64_t)l * width, width, next - l);
            }
        }
        store_block(a, row, 0, columns);
    }
}
static void sequence_gradient(KeyGradient *runs, int n_runs) {
    for (int i = 0; i < n_runs; i++) runs[i].advance = advance_of(runs[i]);
    const int width = runs[0].width;
    int c = 0;
    if constexpr (takes_four_vectors)
        if (runs[0].vectors_at_once == 4)
            for (; c < width; c += 4 * lanes) add_sequence<4>(runs, n_runs, c);
    for (; c + 2 * lanes <= width; c += 2 * lanes) add_sequence<2>(runs, n_runs, c);
    if (c < width) add_sequence<1>(runs, n_runs, c);
}

} // namespace nbhd::NBHD_ISA
