// Sums of rows with scores as weights: out = P V, and dQ = dS K. Lanes are channels.
//
//      values of a key row lie as [key][channel], as in memory; the weight of (row, slot, lane) is one broadcast load
//
//      key          0  1  2  3  4  5  6  7         a block: up to tile_rows query rows x `columns` query columns
//      column 0     x  x  x  x  x  x  .            x 1 or 2 vectors of channels, in registers through the whole window;
//      column 1     .  x  x  x  x  x  x            each key's vectors are loaded once for all of them
//                      <- common ->
//
// No transposes of values or outputs, and borders need no permute: each column has its own first key and end.
#pragma once
#include "ahead.h"
#include "pack.h"
#include "tile.h"

namespace nbhd::NBHD_ISA {

// Query rows [begin, end) of a tile, as a type.
template <int begin, int end>
struct Span {};

struct WeightedSum {
    const Real *weights; // [row][slot][lane]
    int64_t weights_row; // from a query row to the next
    int64_t step;        // of a weight from a key to the next
    const Real *values;  // ring rows of [key][width]
    int64_t ring_row;
    int width; // channels of a packed token
    const RowTile *rows;
    const int *first, *end; // keys of each column
    int lane, lane_step;    // of the columns
    const Real *normaliser; // [row][lane] factor of each query, or null
    Real factor;            // of every query
    Real *out;              // [row][column][channel]
    int64_t out_row, out_column;
    Ahead *ahead;
};
// Register blocks: where a token has four vectors of channels, one column has work enough and needs no neighbour with the
// same keys. Fewer vectors: several columns.
constexpr int sum_accumulators = registers >= 32 ? 16 : 12;
constexpr int max_vectors = registers >= 32 ? 2 : 4;
constexpr int columns_for(int rows, int vectors) { // powers of two leave no columns over
    const int fit = sum_accumulators / (vectors * rows);
    return fit < 1 ? 1 : fit < 4 ? fit : fit < 8 ? 4 : 8;
}

// Steps of `ahead`, one for each key row of each block, that n columns take.
static int sum_steps(const RowTile &t, int n, int width) {
    const int columns = columns_for(t.n, 2);
    return (n + columns - 1) / columns * t.key_rows * ((width + 2 * lanes - 1) / (2 * lanes));
}

// The columns of a block: each one's keys [first, last) of a row, and where the weight of (its lane, key 0) lies.
template <int columns>
struct Columns {
    int first[columns], last[columns];
    int64_t weight[columns];
};

// One key for the query rows [begin, end). `active(q)` says, at compile time or not, whether column q sees it.
template <int begin, int end, int columns, int vectors, int rows, class Active>
NBHD_INLINE void sum_key(Vec (&a)[rows][columns][vectors], const Real *const *weights, const int64_t *column,
                         int64_t at, const Real *values, Active active) {
    if constexpr (vectors > 2) { // registers hold the weights and one vector at a time
        Vec w[rows][columns];
#pragma GCC unroll 4
        for (int r = begin; r < end; r++)
#pragma GCC unroll 8
            for (int q = 0; q < columns; q++)
                if (w[r][q] = Vec{}; active(q)) w[r][q] = broadcast(weights[r] + (at + column[q])), keep(w[r][q]);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            Vec v = load(values + i * lanes);
            keep(v);
#pragma GCC unroll 4
            for (int r = begin; r < end; r++)
#pragma GCC unroll 8
                for (int q = 0; q < columns; q++)
                    if (active(q)) a[r][q][i] = fma(w[r][q], v, a[r][q][i]);
        }
        return;
    }
    Vec v[vectors];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) v[i] = load(values + i * lanes), keep(v[i]);
#pragma GCC unroll 8
    for (int q = 0; q < columns; q++) {
        if (!active(q)) continue;
#pragma GCC unroll 4
        for (int r = begin; r < end; r++) {
            const Vec w = broadcast(weights[r] + (at + column[q]));
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) a[r][q][i] = fma(w, v[i], a[r][q][i]);
        }
    }
}

// How the windows of neighbouring columns lie: the same keys, each one key further than the last, or anything.
enum class Advance { none, one, any };

// One key row, seen by query rows [begin, end).
template <int begin, int end, int columns, int vectors, Advance advance, int kernel, int rows>
NBHD_INLINE void sum_key_row(Vec (&a)[rows][columns][vectors], const Real *const *weights, const Columns<columns> &c,
                             int64_t run_time_step, int width, const Real *values) {
    const auto every = [](int) { return true; };
    const int first = c.first[0], last = c.last[columns - 1];
    const int64_t step = kernel ? kernel * lanes : run_time_step;
    const Real *v = values + (int64_t)first * width;
    if constexpr (kernel > 0 &&
                  advance != Advance::any) { // straight code; `weight` counts from each column's first key
        constexpr int extra = advance == Advance::one ? columns - 1 : 0;
#pragma GCC unroll 16
        for (int k = 0; k < kernel + extra; k++, v += width)
            sum_key<begin, end>(a, weights, c.weight, k * step, v,
                                [k](int q) { return !extra || (q <= k && k < kernel + q); });
    } else if constexpr (advance == Advance::one && columns > 1) { // the head and the tail of the union are triangles
#pragma GCC unroll 8
        for (int i = 0; i < columns - 1; i++, v += width)
            sum_key<begin, end>(a, weights, c.weight, (first + i) * step, v, [i](int q) { return q <= i; });
        for (int k = first + columns - 1; k < last - (columns - 1); k++, v += width)
            sum_key<begin, end>(a, weights, c.weight, k * step, v, every);
#pragma GCC unroll 8
        for (int i = 0; i < columns - 1; i++, v += width)
            sum_key<begin, end>(a, weights, c.weight, (last - (columns - 1) + i) * step, v,
                                [i](int q) { return q > i; });
    } else if constexpr (advance != Advance::any || columns == 1) {
        for (int k = first; k < last; k++, v += width) sum_key<begin, end>(a, weights, c.weight, k * step, v, every);
    } else {
        const int to = c.last[0], from = c.first[columns - 1] < to ? c.first[columns - 1] : to; // seen by every column
        int k = first;
        const auto some = [&](int q) { return c.first[q] <= k && k < c.last[q]; };
        for (; k < from; k++, v += width) sum_key<begin, end>(a, weights, c.weight, k * step, v, some);
        for (; k < to; k++, v += width) sum_key<begin, end>(a, weights, c.weight, k * step, v, every);
        for (; k < last; k++, v += width) sum_key<begin, end>(a, weights, c.weight, k * step, v, some);
    }
}

// Writes a block's sums, each times its query's normaliser.
template <int columns, int vectors, int rows>
NBHD_INLINE void finish_sum(const WeightedSum &s, const Vec (&a)[rows][columns][vectors], int l, int c0) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int q = 0; q < columns; q++) {
            Vec m = splat(s.factor);
            if (s.normaliser) m *= broadcast(s.normaliser + r * lanes + s.lane + (l + q) * s.lane_step);
            Real *out = s.out + r * s.out_row + (l + q) * s.out_column + c0;
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) store(out + i * lanes, a[r][q][i] * m);
        }
}

// `columns` query columns from column `l`, `vectors` vectors of channels from channel c0.
template <int rows, int columns, int vectors, Advance advance, int kernel>
static void sum_block(const WeightedSum &s, int l, int c0) {
    const RowTile &t = *s.rows;
    Vec a[rows][columns][vectors];
    const Real *weights[rows];
    Columns<columns> c;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        weights[r] = s.weights + r * s.weights_row + (s.lane + l * s.lane_step - t.shift[r] * lanes);
#pragma GCC unroll 8
        for (int q = 0; q < columns; q++)
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) a[r][q][i] = Vec{};
    }
    constexpr bool straight = kernel > 0 && advance != Advance::any;
    const int64_t step = s.step;
#pragma GCC unroll 8
    for (int q = 0; q < columns; q++) {
        c.first[q] = s.first[l + q], c.last[q] = s.end[l + q];
        c.weight[q] = q * s.lane_step;
        if constexpr (straight)
            c.weight[q] -= advance == Advance::one ? q * kernel * lanes : 0; // key k is the k - q th of column q
        else c.weight[q] -= c.first[q] * step;
    }
    const int width = s.width;
    const int64_t ring_row = s.ring_row;
    const Real *const base = s.values + c0;
    Ahead *const ahead = s.ahead;
    if constexpr (kernel >= rows && kernel > 0) {
        if (t.shape != RowShape::any) {
            const KeyRow *key = t.key;
            for (int plane = 0; plane < t.z_count; plane++) {
                const Real *w[rows];
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) w[r] = weights[r] + (int64_t)key->slot * lanes;
                const auto add = [&]<int begin, int end>(Span<begin, end>) NBHD_INLINE_LAMBDA {
                    ahead->step();
                    sum_key_row<begin, end, columns, vectors, advance, kernel>(a, w, c, step, width,
                                                                               base + key->ring * ring_row);
                    key++;
#pragma GCC unroll 8
                    for (int r = 0; r < rows; r++) w[r] += lanes;
                };
                if (t.shape == RowShape::stairs) {
                    if constexpr (rows > 1) add(Span<0, 1>{});
                    if constexpr (rows > 2) add(Span<0, 2>{});
                    if constexpr (rows > 3) add(Span<0, 3>{});
                    for (int i = rows - 1; i < kernel; i++) add(Span<0, rows>{});
                    if constexpr (rows > 1) add(Span<1, rows>{});
                    if constexpr (rows > 2) add(Span<2, rows>{});
                    if constexpr (rows > 3) add(Span<3, rows>{});
                } else {
                    for (int i = 0; i < kernel; i++) add(Span<0, rows>{});
                }
            }
            return finish_sum(s, a, l, c0);
        }
    }
    int slot = 0; // of the key row that the weights point to
    const KeyRow *const end = t.key + t.key_rows;
    for (const KeyRow *key = t.key; key < end; key++) {
        ahead->step();
        const Real *values = base + key->ring * ring_row;
        const int64_t move = (int64_t)(key->slot - slot) * lanes;
        slot = key->slot;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) weights[r] += move;
        switch (key->begin * 8 + key->end) {
#define NBHD_ROWS(b, e)                                                                                                \
    case b * 8 + e:                                                                                                    \
        if constexpr (e <= rows)                                                                                       \
            sum_key_row<b, e, columns, vectors, advance, kernel>(a, weights, c, step, width, values);                  \
        break;
            NBHD_ROWS(0, 1)
            NBHD_ROWS(0, 2)
            NBHD_ROWS(1, 2)
            NBHD_ROWS(0, 3)
            NBHD_ROWS(1, 3) NBHD_ROWS(2, 3) NBHD_ROWS(0, 4) NBHD_ROWS(1, 4) NBHD_ROWS(2, 4) NBHD_ROWS(3, 4)
#undef NBHD_ROWS
        }
    }
    finish_sum(s, a, l, c0);
}

// Channels [c0, c0 + vectors) of the columns from l to n, `columns` at a time and the rest in smaller blocks: a sum must wait for
// itself where there are few.
template <int rows, int vectors, int kernel, int columns = columns_for(rows, vectors)>
static void sum_columns(const WeightedSum &s, int l, int n, int c0) {
    if constexpr (columns > 1) {
        for (; l + columns <= n; l += columns) {
            const int window = s.end[l] - s.first[l];
            bool one = kernel ? window == kernel : window >= columns - 1, none = !kernel || one;
            for (int q = 1; q < columns; q++) {
                one &= s.first[l + q] == s.first[l] + q && s.end[l + q] == s.end[l] + q;
                none &= s.first[l + q] == s.first[l] && s.end[l + q] == s.end[l];
            }
            if (none) sum_block<rows, columns, vectors, Advance::none, kernel>(s, l, c0);
            else if (one) sum_block<rows, columns, vectors, Advance::one, kernel>(s, l, c0);
            else if (columns > 2 && window < columns - 1) break; // short windows of a sequence: fewer columns see a key
            else sum_block<rows, columns, vectors, Advance::any, 0>(s, l, c0);
        }
        constexpr bool waits = rows * vectors < sum_accumulators / 2 || vectors > 2;
        sum_columns<rows, vectors, kernel, columns <= 2 || !waits ? 1 : (columns + 1) / 2>(s, l, n, c0);
    } else {
        for (; l < n; l++) {
            if (!kernel || s.end[l] - s.first[l] != kernel) sum_block<rows, 1, vectors, Advance::none, 0>(s, l, c0);
            else sum_block<rows, 1, vectors, Advance::none, kernel>(s, l, c0);
        }
    }
}

template <int rows, int kernel>
static void sum_rows(const WeightedSum &s, int n) {
    int c = 0;
    if constexpr (max_vectors > 2)
        for (; c + max_vectors * lanes <= s.width; c += max_vectors * lanes)
            sum_columns<rows, max_vectors, kernel>(s, 0, n, c);
    for (; c + 2 * lanes <= s.width; c += 2 * lanes) sum_columns<rows, 2, kernel>(s, 0, n, c);
    if (c < s.width) sum_columns<rows, 1, 0>(s, 0, n, c);
}

template <int kernel>
static void weighted_sum_of(const WeightedSum &s, int n) {
    switch (s.rows->n) {
    case 1: sum_rows<1, kernel>(s, n); break;
    case 2: sum_rows<2, kernel>(s, n); break;
    case 3: sum_rows<3, kernel>(s, n); break;
    case 4:
        if constexpr (tile_rows > 3) sum_rows<4, kernel>(s, n);
        break;
    }
}

// The first n query columns of every row of the tile.
static void weighted_sum(const WeightedSum &s, int n) {
    const int kernel = s.end[0] - s.first[0];
    switch (NBHD_SPECIALISE && kernel * lanes == s.step ? kernel : 0) {
#if NBHD_SPECIALISE
    case 3: return weighted_sum_of<3>(s, n);
    case 5: return weighted_sum_of<5>(s, n);
    case 7: return weighted_sum_of<7>(s, n);
#endif
    default: return weighted_sum_of<0>(s, n);
    }
}

// The same into a tensor of any element type: straight where its vectors are whole Reals, else through `buffer`
// [tile_rows][lanes][width].
template <class T>
static void weighted_sum_to(WeightedSum &s, int n, T *out, int64_t out_row, int64_t out_column, int channels,
                            Real *buffer) {
    if constexpr (sizeof(T) == sizeof(Real)) {
        if (channels == s.width) {
            s.out = (Real *)out, s.out_row = out_row, s.out_column = out_column;
            return weighted_sum(s, n);
        }
    }
    s.out = buffer, s.out_row = (int64_t)lanes * s.width, s.out_column = s.width;
    weighted_sum(s, n);
    for (int r = 0; r < s.rows->n; r++)
        unpack_rows(buffer + r * s.out_row, n, channels, out + r * out_row, out_column, Real(1), false);
}

} // namespace nbhd::NBHD_ISA
