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
    const Real *weights;     // [row][slot][lane], at the first lane
    int64_t weights_row;     // from a query row to the next
    int kernel;              // slots of a key row
    const Real *values;      // ring rows of [key][width]
    int64_t ring_row;
    int width;               // channels of a packed token
    const RowTile *rows;
    const int *first, *end;  // keys of each column
    const Real *normaliser;  // [row][lane] factor of each query, at the first lane; or null
    Real factor;             // of every query
    Real *out;               // [row][column][channel]
    int64_t out_row, out_column;
};

constexpr int sum_accumulators = registers >= 32 ? 16 : 12;
constexpr int columns_for(int rows) {
    const int fit = sum_accumulators / (2 * rows);
    return fit < 6 ? fit : 6;
}

// Keys [from, to) of one key row; `some`: not every column sees all of them.
template <int begin, int end, int columns, int vectors, bool some, int rows>
NBHD_INLINE void sum_keys(Vec (&a)[rows][columns][vectors], const Real *const *weights, const int *column, const WeightedSum &s,
                          const int *first, const int *last, const Real *values, int from, int to) {
    const Real *v = values + (int64_t)from * s.width;
    for (int k = from; k < to; k++, v += s.width) {
        Vec vv[vectors];
#pragma GCC unroll 4
        for (int c = 0; c < vectors; c++) vv[c] = load(v + c * lanes), keep(vv[c]);
#pragma GCC unroll 8
        for (int q = 0; q < columns; q++) {
            if (some && (k < first[q] || k >= last[q])) continue;
#pragma GCC unroll 4
            for (int r = begin; r < end; r++) {
                const Vec w = broadcast(weights[r] + (k * lanes + column[q]));
#pragma GCC unroll 4
                for (int c = 0; c < vectors; c++) a[r][q][c] = fma(w, vv[c], a[r][q][c]);
            }
        }
    }
}

template <int begin, int end, int columns, int vectors, int rows>
NBHD_INLINE void sum_key_row(Vec (&a)[rows][columns][vectors], const Real *const *weights, const int *column, const WeightedSum &s,
                             const int *first, const int *last, const Real *values) {
    if constexpr (columns == 1) {
        sum_keys<begin, end, columns, vectors, false>(a, weights, column, s, first, last, values, first[0], last[0]);
    } else {
        const int common_from = first[columns - 1] < last[0] ? first[columns - 1] : last[0];
        const int common_to = last[0];
        if (first[0] < common_from)
            sum_keys<begin, end, columns, vectors, true>(a, weights, column, s, first, last, values, first[0], common_from);
        sum_keys<begin, end, columns, vectors, false>(a, weights, column, s, first, last, values, common_from, common_to);
        if (common_to < last[columns - 1])
            sum_keys<begin, end, columns, vectors, true>(a, weights, column, s, first, last, values, common_to, last[columns - 1]);
    }
}

// `columns` query columns from lane `l`, `vectors` vectors of channels from channel c0.
template <int rows, int columns, int vectors> static void sum_block(const WeightedSum &s, int l, int c0) {
    Vec a[rows][columns][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int q = 0; q < columns; q++)
#pragma GCC unroll 4
            for (int c = 0; c < vectors; c++) a[r][q][c] = Vec{};
    int first[columns], last[columns], column[columns];
#pragma GCC unroll 8
    for (int q = 0; q < columns; q++)
        first[q] = s.first[l + q], last[q] = s.end[l + q], column[q] = l + q - first[q] * lanes;
    const RowTile &t = *s.rows;
    const int64_t slots = (int64_t)s.kernel * lanes;
    for (int i = 0; i < t.key_rows; i++) {
        const KeyRow &key = t.key[i];
        const Real *values = s.values + key.ring * s.ring_row + c0;
        const Real *weights[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) weights[r] = s.weights + r * s.weights_row + (key.slot - t.shift[r]) * slots;
        switch (key.begin * 8 + key.end) {
#define NBHD_ROWS(b, e)                                                                                                        \
    case b * 8 + e:                                                                                                            \
        if constexpr (e <= rows) sum_key_row<b, e, columns, vectors>(a, weights, column, s, first, last, values);              \
        break;
            NBHD_ROWS(0, 1) NBHD_ROWS(0, 2) NBHD_ROWS(1, 2) NBHD_ROWS(0, 3) NBHD_ROWS(1, 3) NBHD_ROWS(2, 3)
            NBHD_ROWS(0, 4) NBHD_ROWS(1, 4) NBHD_ROWS(2, 4) NBHD_ROWS(3, 4)
#undef NBHD_ROWS
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int q = 0; q < columns; q++) {
            Vec m = splat(s.factor);
            if (s.normaliser) m *= broadcast(s.normaliser + r * lanes + l + q);
#pragma GCC unroll 4
            for (int c = 0; c < vectors; c++)
                store(s.out + r * s.out_row + (l + q) * s.out_column + c0 + c * lanes, a[r][q][c] * m);
        }
}

template <int rows> static void sum_rows(const WeightedSum &s, int n) {
    constexpr int columns = columns_for(rows);
    int l = 0;
    for (; l + columns <= n; l += columns) {
        int c = 0;
        for (; c + 2 * lanes <= s.width; c += 2 * lanes) sum_block<rows, columns, 2>(s, l, c);
        if (c < s.width) sum_block<rows, columns, 1>(s, l, c);
    }
    for (; l < n; l++) {
        int c = 0;
        for (; c + 2 * lanes <= s.width; c += 2 * lanes) sum_block<rows, 1, 2>(s, l, c);
        if (c < s.width) sum_block<rows, 1, 1>(s, l, c);
    }
}

// The first n query columns of every row of the tile.
static void weighted_sum(const WeightedSum &s, int n) {
    switch (s.rows->n) {
    case 1: sum_rows<1>(s, n); break;
    case 2: sum_rows<2>(s, n); break;
    case 3: sum_rows<3>(s, n); break;
    case 4: if constexpr (tile_rows > 3) sum_rows<4>(s, n); break;
    }
}

// The same into a tensor of any element type: straight where its vectors are whole Reals, else through `buffer`
// [tile_rows][lanes][width].
template <class T>
static void weighted_sum_to(WeightedSum &s, int n, T *out, int64_t out_row, int64_t out_column, int channels, Real *buffer) {
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
