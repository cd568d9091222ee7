// Scores Q K^T (and dO V^T). Lanes are consecutive queries of the last axis.
//
//        keys of a row, transposed:      channel 0   k0 k1 k2 k3 k4 k5 k6 k7 k8 ...
//                                        channel 1   ...
//
//        offset j of all lanes is one load at first + j:      [k_j .. k_{j+lanes-1}]
//        (how border tiles, whose lanes share keys, do with one load as well: column_tile.h)
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

// How the lanes' keys lie: see column_tile.h.
enum class Keys { sliding, shared, paired, permuted };

// What an accumulator starts from: nothing, one number for all lanes at bias[r][j], or a vector at bias[r][j * bias_step].
enum class Start { zero, shared, by_lane };

struct ScoreBlock {
    const Real *query; // [row][channel][lane]
    int64_t query_row; // from a row to the next
    const Real *keys;  // [channel][key], at the first key of lane 0; paired: [channel][offset][2]
    int64_t pitch;     // from a channel to the next
    int channels;
    const Index *index; // of the keys of a permuted tile
    Start start;
    const Real *bias[tile_rows]; // by row
    int64_t bias_step;
    Real *scores[tile_rows]; // by row, for offset 0
    int64_t score_step;      // from an offset to the next
    Real *maximum;           // [row][lane], raised to the scores; or null
};

// Offsets [from, from + offsets) of a block.
template <int rows, int offsets, Keys keys>
static void score_block(const ScoreBlock &b, int from) {
    Vec a[rows][offsets];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) {
            if (b.start == Start::zero) a[r][j] = Vec{};
            else if (b.start == Start::shared) a[r][j] = broadcast(b.bias[r] + from + j);
            else a[r][j] = load(b.bias[r] + (from + j) * b.bias_step);
        }
    const Real *q = b.query, *k = b.keys + (keys == Keys::paired ? 2 * from : from);
    for (int c = 0; c < b.channels; c++, q += lanes, k += b.pitch) {
        Vec qv[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) qv[r] = load(q + r * b.query_row), keep(qv[r]);
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) {
            Vec kv;
            if constexpr (keys == Keys::sliding) kv = load(k + j);
            else if constexpr (keys == Keys::shared) kv = broadcast(k + j);
            else if constexpr (keys == Keys::paired) kv = broadcast_pair(k + 2 * j);
            else kv = permute(load(k + j), reload(b.index));
            keep(kv);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) a[r][j] = fma(qv[r], kv, a[r][j]);
        }
    }
    Real *to[rows], *const maximum = b.maximum; // read before the stores, which could alias them
    const int64_t step = b.score_step;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) to[r] = b.scores[r] + from * step;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) store(to[r] + j * step, a[r][j]);
    if (!maximum) return;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        Vec m = load(maximum + r * lanes);
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) m = max(m, a[r][j]);
        store(maximum + r * lanes, m);
    }
}

template <int rows, Keys keys>
static void score_row(const ScoreBlock &b, int kernel) {
    constexpr int most = offsets_for(rows);
    const int parts = (kernel + most - 1) / most;
    for (int part = 0, from = 0; part < parts; part++) { // parts of equal length, up to one
        const int n = (kernel - from) / (parts - part);
        switch (n) {
        case 1: score_block<rows, 1, keys>(b, from); break;
        case 2: score_block<rows, 2, keys>(b, from); break;
        case 3: score_block<rows, 3, keys>(b, from); break;
        case 4:
            if constexpr (most >= 4) score_block<rows, 4, keys>(b, from);
            break;
        case 5:
            if constexpr (most >= 5) score_block<rows, 5, keys>(b, from);
            break;
        case 6:
            if constexpr (most >= 6) score_block<rows, 6, keys>(b, from);
            break;
        case 7:
            if constexpr (most >= 7) score_block<rows, 7, keys>(b, from);
            break;
        case 8:
            if constexpr (most >= 8) score_block<rows, 8, keys>(b, from);
            break;
        }
        from += n;
    }
}

template <Keys keys>
static void score_rows(const ScoreBlock &b, int rows, int kernel) {
    switch (rows) {
    case 1: score_row<1, keys>(b, kernel); break;
    case 2: score_row<2, keys>(b, kernel); break;
    case 3: score_row<3, keys>(b, kernel); break;
    case 4:
        if constexpr (tile_rows > 3) score_row<4, keys>(b, kernel);
        break;
    }
}

// Scores of one key row with `rows` query rows, all `kernel` offsets.
static void scores(const ScoreBlock &b, int rows, int kernel, Keys keys) {
    switch (keys) {
    case Keys::sliding: score_rows<Keys::sliding>(b, rows, kernel); break;
    case Keys::shared: score_rows<Keys::shared>(b, rows, kernel); break;
    case Keys::paired: score_rows<Keys::paired>(b, rows, kernel); break;
    case Keys::permuted: score_rows<Keys::permuted>(b, rows, kernel); break;
    }
}

} // namespace nbhd::NBHD_ISA
