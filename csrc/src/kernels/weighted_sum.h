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
#include "pack.h"
#include "tile.h"

namespace nbhd::NBHD_ISA {

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
};

constexpr int sum_accumulators = registers >= 32 ? 16 : 12;
constexpr int columns_for(int rows) {
    const int fit = sum_accumulators / (2 * rows);
    return fit < 6 ? fit : 6;
}

// The columns of a block: each one's keys [first, last) of a row, and where the weight of (its lane, key 0) lies.
template <int columns>
struct Columns {
    int first[columns], last[columns];
    int64_t weight[columns];
};

// Keys [from, to) of one key row. `active(q)` says, at compile time or not, whether column q sees the key.
template <int begin, int end, int columns, int vectors, int rows, class Active>
NBHD_INLINE void sum_key(Vec (&a)[rows][columns][vectors], const Real *const *weights, const Columns<columns> &c,
                         int64_t step, int key, const Real *values, Active active) {
    Vec v[vectors];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) v[i] = load(values + i * lanes), keep(v[i]);
#pragma GCC unroll 8
    for (int q = 0; q < columns; q++) {
        if (!active(q)) continue;
#pragma GCC unroll 4
        for (int r = begin; r < end; r++) {
            const Vec w = broadcast(weights[r] + (key * step + c.weight[q]));
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) a[r][q][i] = fma(w, v[i], a[r][q][i]);
        }
    }
}

// One key row, seen by query rows [begin, end). `sliding`: each column's keys start and end one after its neighbour's, so
// that the head and the tail of the union are triangles known at compile time.
template <int begin, int end, int columns, int vectors, bool sliding, int rows>
NBHD_INLINE void sum_key_row(Vec (&a)[rows][columns][vectors], const Real *const *weights, const Columns<columns> &c,
                             int64_t step, int width, const Real *values) {
    const auto every = [](int) { return true; };
    const int first = c.first[0], last = c.last[columns - 1];
    if constexpr (sliding) {
        const Real *v = values + (int64_t)first * width;
#pragma GCC unroll 8
        for (int i = 0; i < columns - 1; i++, v += width)
            sum_key<begin, end>(a, weights, c, step, first + i, v, [i](int q) { return q <= i; });
        for (int k = first + columns - 1; k < last - (columns - 1); k++, v += width)
            sum_key<begin, end>(a, weights, c, step, k, v, every);
#pragma GCC unroll 8
        for (int i = 0; i < columns - 1; i++, v += width)
            sum_key<begin, end>(a, weights, c, step, last - (columns - 1) + i, v, [i](int q) { return q > i; });
    } else {
        const int to = c.last[0], from = c.first[columns - 1] < to ? c.first[columns - 1] : to; // seen by every column
        const Real *v = values + (int64_t)first * width;
        int k = first;
        for (; k < from; k++, v += width)
            sum_key<begin, end>(a, weights, c, step, k, v, [&](int q) { return c.first[q] <= k && k < c.last[q]; });
        for (; k < to; k++, v += width) sum_key<begin, end>(a, weights, c, step, k, v, every);
        for (; k < last; k++, v += width)
            sum_key<begin, end>(a, weights, c, step, k, v, [&](int q) { return c.first[q] <= k && k < c.last[q]; });
    }
}

// `columns` query columns from lane `l`, `vectors` vectors of channels from channel c0.
template <int rows, int columns, int vectors, bool sliding>
static void sum_block(const WeightedSum &sum, int l, int c0) {
    const WeightedSum s = sum; // a copy that no store can alias
    const RowTile &t = *s.rows;
    Vec a[rows][columns][vectors];
    const Real *base[rows];
    Columns<columns> c;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        base[r] = s.weights + r * s.weights_row - t.shift[r] * lanes;
#pragma GCC unroll 8
        for (int q = 0; q < columns; q++)
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) a[r][q][i] = Vec{};
    }
#pragma GCC unroll 8
    for (int q = 0; q < columns; q++) {
        c.first[q] = sliding ? s.first[l] + q : s.first[l + q];
        c.last[q] = sliding ? s.end[l] + q : s.end[l + q];
        c.weight[q] = s.lane + (l + q) * (sliding ? 1 : s.lane_step) - c.first[q] * s.step;
    }
    const KeyRow *const end = t.key + t.key_rows;
    for (const KeyRow *key = t.key; key < end; key++) {
        const Real *values = s.values + key->ring * s.ring_row + c0;
        const int64_t slot = (int64_t)key->slot * lanes;
        const Real *weights[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) weights[r] = base[r] + slot;
        switch (key->begin * 8 + key->end) {
#define NBHD_ROWS(b, e)                                                                                                \
    case b * 8 + e:                                                                                                    \
        if constexpr (e <= rows) sum_key_row<b, e, columns, vectors, sliding>(a, weights, c, s.step, s.width, values); \
        break;
            NBHD_ROWS(0, 1)
            NBHD_ROWS(0, 2)
            NBHD_ROWS(1, 2)
            NBHD_ROWS(0, 3)
            NBHD_ROWS(1, 3) NBHD_ROWS(2, 3) NBHD_ROWS(0, 4) NBHD_ROWS(1, 4) NBHD_ROWS(2, 4) NBHD_ROWS(3, 4)
#undef NBHD_ROWS
        }
    }
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

template <int rows, int columns, bool sliding>
static void sum_columns(const WeightedSum &s, int l) {
    int c = 0;
    for (; c + 2 * lanes <= s.width; c += 2 * lanes) sum_block<rows, columns, 2, sliding>(s, l, c);
    if (c < s.width) sum_block<rows, columns, 1, sliding>(s, l, c);
}

template <int rows>
static void sum_rows(const WeightedSum &s, int n) {
    constexpr int columns = columns_for(rows);
    int l = 0;
    for (; l + columns <= n; l += columns) {
        bool sliding = s.lane_step == 1 && s.end[l] - s.first[l] >= columns - 1;
        for (int q = 1; q < columns; q++) sliding &= s.first[l + q] == s.first[l] + q && s.end[l + q] == s.end[l] + q;
        if (sliding) sum_columns<rows, columns, true>(s, l);
        else sum_columns<rows, columns, false>(s, l);
    }
    for (; l < n; l++) sum_columns<rows, 1, false>(s, l);
}

// The first n query columns of every row of the tile.
static void weighted_sum(const WeightedSum &s, int n) {
    switch (s.rows->n) {
    case 1: sum_rows<1>(s, n); break;
    case 2: sum_rows<2>(s, n); break;
    case 3: sum_rows<3>(s, n); break;
    case 4:
        if constexpr (tile_rows > 3) sum_rows<4>(s, n);
        break;
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
