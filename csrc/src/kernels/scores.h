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
#include "ahead.h"
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
enum class Keys { sliding, shared, permuted };

// What an accumulator starts from: nothing, one number for all lanes at bias[r][j], or a vector at bias[r][j * bias_step].
enum class Start { zero, shared, by_lane };

// One row of keys against `rows` query rows.
struct ScoreRow {
    const Real *query;  // [row][channel][lane], of channels or pairs of them
    int64_t query_row;  // from a row to the next
    const Real *keys;   // [channel][key], or [channel][key][2] with two heads in the lanes; at the first key of lane 0
    int64_t pitch;      // from a channel to the next
    int channels;       // or pairs of them
    Real factor;        // of the products, where they are of pairs
    const Index *index; // of the keys of a permuted tile
    Start start;
    const Real *bias[tile_rows]; // by row
    int64_t bias_step;
    Real *scores[tile_rows]; // by row, for offset 0
    int64_t score_step;      // from an offset to the next
    Real *maximum;           // [row][lane], raised to the scores; or null
    int64_t maximum_row;     // from a row to the next
    Ahead *ahead;            // a step for each of `channels_a_step`
};
constexpr int channels_a_step = 8;

// The rows of keys that a tile sees are more than a first-level cache holds, so each comes from the second one. The two lines of a
// channel that a tile reads are asked for so many channels ahead, past the end of a row those of the row in the next slot, mostly
// the next one to come. 2 to 6 % of a pass on an Intel Xeon with AVX-512; shorter vectors have not been measured.
constexpr int channels_ahead = NBHD_VECTOR_BYTES == 64 ? 16 : 0;

// With vectors as long as a cache line, all loads of a sliding tile but one in sixteen cross a line and count double. Its first
// keys lie at the begin of a line, so an offset known at compile time can be cut out of two aligned loads instead, which takes a
// turn of the products' ports: `aligned_offsets` of a block do, for the best of both.
#if defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64 && !NBHD_DOUBLE
constexpr bool can_align = true;
template <int shift>
NBHD_INLINE Vec align(Vec low, Vec high) {
    return (Vec)_mm512_alignr_epi32((__m512i)high, (__m512i)low, shift);
}
#else
constexpr bool can_align = false;
template <int>
NBHD_INLINE Vec align(Vec low, Vec) {
    return low;
}
#endif
constexpr int aligned_offsets(int rows) { return rows == 1 ? 3 : 0; }

NBHD_INLINE Vec start_of(const ScoreRow &b, int r, int offset) {
    if (b.start == Start::zero) return Vec{};
    return b.start == Start::shared ? broadcast(b.bias[r] + offset) : load(b.bias[r] + offset * b.bias_step);
}

// Offsets [from, from + offsets), with `heads` heads in the lanes. `at` is `from` where that is known at compile time, or -1.
template <int rows, int offsets, Keys keys, int heads, int at>
NBHD_INLINE void score_block(const ScoreRow &b, int from) {
    Vec a[rows][offsets];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) a[r][j] = pairs ? Vec{} : start_of(b, r, from + j);
    const Real *q = b.query, *k = b.keys + heads * from;
    const int64_t pitch = b.pitch, query_row = b.query_row, ahead = channels_ahead * pitch;
    const auto channel = [&]() NBHD_INLINE_LAMBDA {
        if constexpr (channels_ahead > 0 && keys == Keys::sliding && at <= 0)
            __builtin_prefetch(k + ahead, 0, 3), __builtin_prefetch(k + ahead + lanes, 0, 3);
        Vec qv[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) qv[r] = load(q + r * query_row), keep(qv[r]);
        if constexpr (keys == Keys::sliding && can_align && at >= 0 && aligned_offsets(rows) > 0) {
            constexpr int line = at * heads / lanes * lanes; // from the line that holds offset `at`
            const Real *const base = k + (line - at * heads);
            const Vec low = load(base), high = load(base + lanes);
            [&]<int... j>(Sequence<j...>) NBHD_INLINE_LAMBDA {
                (
                    [&] {
                        constexpr int shift = (at + j) * heads - line;
                        Vec kv;
                        if constexpr (shift == 0) kv = low;
                        else if constexpr (shift == lanes) kv = high;
                        else if constexpr (shift < lanes && j % 2 == 1 && j / 2 < aligned_offsets(rows))
                            kv = align<shift>(low, high);
                        else kv = load(base + shift);
                        keep(kv);
#pragma GCC unroll 8
                        for (int r = 0; r < rows; r++) a[r][j] = multiply_words(qv[r], kv, a[r][j]);
                    }(),
                    ...);
            }(typename Count<offsets>::type{});
            return;
        }
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) {
            Vec kv;
            if constexpr (keys == Keys::sliding) kv = load(k + heads * j);
            else if constexpr (keys == Keys::permuted) kv = permute(load(k + heads * j), reload(b.index));
            else if constexpr (heads == 2) kv = broadcast_pair(k + 2 * j);
            else kv = broadcast(k + j);
            keep(kv);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) a[r][j] = multiply_words(qv[r], kv, a[r][j]);
        }
    };
    for (int left = b.channels; left > 0; left -= channels_a_step) {
        b.ahead->step();
        for (int c = left < channels_a_step ? left : channels_a_step; c > 0; c--, q += lanes, k += pitch) channel();
    }
    if constexpr (pairs)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int j = 0; j < offsets; j++) a[r][j] = fma(a[r][j], splat(b.factor), start_of(b, r, from + j));
    const int64_t maximum_row = b.maximum_row;
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
        Vec m = load(maximum + r * maximum_row);
#pragma GCC unroll 8
        for (int j = 0; j < offsets; j++) m = max(m, a[r][j]);
        store(maximum + r * maximum_row, m);
    }
}

// All offsets, in blocks of equal length, up to one. A kernel known at compile time (else 0) needs no dispatch.
template <int rows, Keys keys, int heads, int left, int from>
NBHD_INLINE void score_parts(const ScoreRow &b) {
    if constexpr (left > 0) {
        constexpr int most = offsets_for(rows), parts = (left + most - 1) / most, n = (left + parts - 1) / parts;
        score_block<rows, n, keys, heads, from>(b, from);
        score_parts<rows, keys, heads, left - n, from + n>(b);
    }
}
// Offsets [from, to), known at run time.
template <int rows, Keys keys, int heads = 1>
NBHD_INLINE void score_span(const ScoreRow &b, int from, int to) {
    constexpr int most = offsets_for(rows);
    for (int parts = (to - from + most - 1) / most; parts > 0; parts--) {
        const int n = (to - from) / parts;
        switch (n) {
#define NBHD_CASE(n)                                                                                                   \
    case n:                                                                                                            \
        if constexpr (n <= most) score_block<rows, n, keys, heads, -1>(b, from);                                       \
        break;
            NBHD_CASE(1)
            NBHD_CASE(2)
            NBHD_CASE(3)
            NBHD_CASE(4)
            NBHD_CASE(5)
            NBHD_CASE(6)
            NBHD_CASE(7)
            NBHD_CASE(8)
#undef NBHD_CASE
        }
        from += n;
    }
}
template <int rows, Keys keys, int heads, int kernel>
NBHD_INLINE void score_row(const ScoreRow &b, int run_time_kernel) {
    if constexpr (kernel > 0) score_parts<rows, keys, heads, kernel, 0>(b);
    else score_span<rows, keys, heads>(b, 0, run_time_kernel);
}

} // namespace nbhd::NBHD_ISA
