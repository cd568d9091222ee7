// Scores Q K^T (and dO V^T). Lanes are consecutive queries of the last axis.
//
//        keys of a row, transposed:      channel 0   k0 k1 k2 k3 k4 k5 k6 k7 k8 ...
//                                        channel 1   ...
//
//        offset j of all lanes is one load at first + j:      [k_j .. k_{j+lanes-1}]
//        at a border lanes share keys: the same load and one permute by (first of lane - first of lane 0)
//
// A block holds `rows` query rows x `offsets` window offsets in registers, so a key load serves all rows and a query load all
// offsets. Nothing outside the windows is computed.
#pragma once
#include "vec.h"

namespace nbhd::NBHD_ISA {

// Query rows of a tile, and the largest block of offsets for a number of rows (accumulators + rows + 1 key fit the registers).
constexpr int tile_rows = registers >= 32 ? 4 : 3;
constexpr int max_offsets = 8;
constexpr int offsets_for(int rows) {
    const int fit = (registers - 1 - rows) / rows;
    return fit < max_offsets ? fit : max_offsets;
}

// What an accumulator starts from: nothing, one number for all lanes at bias[r][j], or a vector at bias[r][j * lanes].
enum class Start { zero, shared, by_lane };

struct ScoreBlock {
    const Real *query;           // [row][channel][lane]
    int64_t query_row;           // from a row to the next
    const Real *keys;            // [channel][key], at the first key of lane 0
    int64_t pitch;               // from a channel to the next
    int channels;
    const Index *index;          // permute of the keys, for border tiles
    Start start;
    const Real *bias[tile_rows]; // by row
    Real *scores[tile_rows];     // by row: [offset][lane]
    Real *maximum;               // [row][lane], raised to the scores; or null
};

// Offsets [from, from + offsets) of a block.
template <int rows, int offsets, bool permuted> static void score_block(const ScoreBlock &b, int from) {
    Vec a[rows][offsets];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) {
            if (b.start == Start::zero) a[r][j] = Vec{};
            else if (b.start == Start::shared) a[r][j] = broadcast(b.bias[r] + from + j);
            else a[r][j] = load(b.bias[r] + (from + j) * lanes);
        }
    const Real *q = b.query, *k = b.keys + from;
    for (int c = 0; c < b.channels; c++, q += lanes, k += b.pitch) {
        Vec qv[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) qv[r] = load(q + r * b.query_row), keep(qv[r]);
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) {
            Vec kv;
            if constexpr (permuted) kv = permute(load(k + j), registers >= 32 ? *b.index : reload(b.index));
            else kv = load(k + j);
            keep(kv);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) a[r][j] = fma(qv[r], kv, a[r][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        Real *s = b.scores[r] + from * lanes;
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) store(s + j * lanes, a[r][j]);
        if (b.maximum) {
            Vec m = load(b.maximum + r * lanes);
#pragma GCC unroll 8
            for (int j = 0; j < offsets; j++) m = max(m, a[r][j]);
            store(b.maximum + r * lanes, m);
        }
    }
}

template <int rows, bool permuted> static void score_row(const ScoreBlock &b, int kernel) {
    constexpr int most = offsets_for(rows);
    const int parts = (kernel + most - 1) / most;
    for (int part = 0, from = 0; part < parts; part++) { // parts of equal length, up to one
        const int n = (kernel - from) / (parts - part);
        switch (n) {
        case 1: score_block<rows, 1, permuted>(b, from); break;
        case 2: score_block<rows, 2, permuted>(b, from); break;
        case 3: score_block<rows, 3, permuted>(b, from); break;
        case 4: if constexpr (most >= 4) score_block<rows, 4, permuted>(b, from); break;
        case 5: if constexpr (most >= 5) score_block<rows, 5, permuted>(b, from); break;
        case 6: if constexpr (most >= 6) score_block<rows, 6, permuted>(b, from); break;
        case 7: if constexpr (most >= 7) score_block<rows, 7, permuted>(b, from); break;
        case 8: if constexpr (most >= 8) score_block<rows, 8, permuted>(b, from); break;
        }
        from += n;
    }
}

// Scores of one key row with `rows` query rows, all `kernel` offsets.
NBHD_INLINE void scores(const ScoreBlock &b, int rows, int kernel, bool permuted) {
    switch (rows * 2 + permuted) {
    case 2: score_row<1, false>(b, kernel); break;
    case 3: score_row<1, true>(b, kernel); break;
    case 4: score_row<2, false>(b, kernel); break;
    case 5: score_row<2, true>(b, kernel); break;
    case 6: score_row<3, false>(b, kernel); break;
    case 7: score_row<3, true>(b, kernel); break;
    case 8: if constexpr (tile_rows > 3) score_row<4, false>(b, kernel); break;
    case 9: if constexpr (tile_rows > 3) score_row<4, true>(b, kernel); break;
    }
}

} // namespace nbhd::NBHD_ISA
