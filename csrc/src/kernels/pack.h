// Copies of tokens in the two orders the kernels read.
//
//     pack_rows     dst[token][channel]       lanes of a vector are channels
//     pack_lanes    dst[channel][token]       lanes of a vector are tokens
//     pack_pairs    dst[pair][token]          the same, two channels of 16 bits in a word
//
// The first two multiply by `factor`; rows are padded with zeros up to whole vectors, pairs up to whole words. All lanes of a vector
// have a token; those that are not needed repeat one.
#pragma once
#include "element.h"

namespace nbhd::NBHD_ISA {

// n tokens, `stride` elements apart, of `channels` channels; a packed token has round_up(channels).
template <class T>
static void pack_rows(const T *src, int64_t stride, int n, int channels, Real *dst, Real factor) {
    const int whole = channels / lanes * lanes, width = round_up(channels);
    const Vec f = splat(factor);
    for (int t = 0; t < n; t++, src += stride, dst += width) {
        for (int c = 0; c < whole; c += lanes) store(dst + c, load(src + c) * f);
        if (whole < channels) store(dst + whole, load_part(src + whole, channels - whole) * f);
    }
}

#if !NBHD_DOUBLE
// Calls put(word, vector of lanes) for words [w, words) of the tokens, `step` at a time, and raises w to the first that is left.
template <int step, class T, class Put>
NBHD_INLINE void pack_words(const T *src, const int64_t *token, int &w, int words, Put put) {
    constexpr int in_word = sizeof(float) / sizeof(T);
    for (; w + step <= words; w += step) {
        Vec r[step];
        load_transposed(r, src + w * in_word, token);
#pragma GCC unroll 8
        for (int i = 0; i < step; i++) put(w + i, r[i]);
    }
    if constexpr (step > 4) pack_words<4>(src, token, w, words, put);
}
#endif

// One vector of tokens: dst[channel * pitch + lane], lane l from src + token[l].
template <class T>
NBHD_INLINE void pack_lanes(const T *src, const int64_t *token, int channels, Real *dst, int64_t pitch, Real factor) {
    const Vec f = splat(factor);
    int c = 0;
#if !NBHD_DOUBLE
    if constexpr (sizeof(T) == sizeof(float))
        pack_words<most_words>(src, token, c, channels,
                               [&](int i, Vec v) NBHD_INLINE_LAMBDA { store(dst + i * pitch, v * f); });
    if constexpr (is_bfloat16<T>) { // the upper half of a float: a word is two of them, transposed at once
        int words = 0;
        pack_words<most_words>(src, token, words, channels / 2, [&](int i, Vec v) NBHD_INLINE_LAMBDA {
            store(dst + 2 * i * pitch, (Vec)((UInt)v << 16) * f);
            store(dst + (2 * i + 1) * pitch, (Vec)((UInt)v & 0xffff0000) * f);
        });
        c = 2 * words;
    }
#endif
    for (; c < channels; c += lanes) {
        const int rows = channels - c < lanes ? channels - c : lanes;
        Vec r[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; l++)
            r[l] = rows == lanes ? load(src + token[l] + c) : load_part(src + token[l] + c, rows);
        transpose(r);
        if (rows == lanes) {
#pragma GCC unroll 16
            for (int i = 0; i < lanes; i++) store(dst + (c + i) * pitch, r[i] * f);
        } else {
            for (int i = 0; i < rows; i++) store(dst + (c + i) * pitch, r[i] * f);
        }
    }
}

#if NBHD_PAIRS
template <class T>
NBHD_INLINE void pack_pairs(const T *src, const int64_t *token, int channels, Real *dst, int64_t pitch) {
    int w = 0;
    pack_words<most_words>(src, token, w, channels / 2,
                           [&](int i, Vec v) NBHD_INLINE_LAMBDA { store(dst + i * pitch, v); });
    if (const int left = channels - 2 * w) {
        Vec r[lanes];
        const __mmask32 some = (1u << left) - 1;
#pragma GCC unroll 16
        for (int l = 0; l < lanes; l++) r[l] = (Vec)_mm512_maskz_loadu_epi16(some, src + token[l] + 2 * w);
        transpose(r);
        for (int i = 0; i < (left + 1) / 2; i++) store(dst + (w + i) * pitch, r[i]);
    }
}
#endif

// Queries or keys as the scores want them. Pairs are left as they are: there the scores are multiplied by the factor.
NBHD_INLINE int score_words(int channels) { return pairs ? (channels + 1) / 2 : channels; }
template <class T>
NBHD_INLINE void pack_for_scores(const T *src, const int64_t *token, int channels, Real *dst, int64_t pitch,
                                 Real factor) {
#if NBHD_PAIRS
    (void)factor;
    pack_pairs(src, token, channels, dst, pitch);
#else
    pack_lanes(src, token, channels, dst, pitch, factor);
#endif
}

// Packed rows back to tensor tokens: dst = factor * src, or dst + factor * src.
template <bool add, class T>
NBHD_INLINE void unpack_rows_as(const Real *src, int n, int channels, T *dst, int64_t stride, Real factor) {
    const int whole = channels / lanes * lanes, width = round_up(channels), rest = channels - whole;
    const Vec f = splat(factor);
    for (int t = 0; t < n; t++, src += width, dst += stride) {
        for (int c = 0; c < whole; c += lanes) {
            const Vec v = load(src + c) * f;
            store(dst + c, add ? v + load(dst + c) : v);
        }
        if (rest) {
            const Vec v = load(src + whole) * f;
            store_part(dst + whole, add ? v + load_part(dst + whole, rest) : v, rest);
        }
    }
}
template <class T>
static void unpack_rows(const Real *src, int n, int channels, T *dst, int64_t stride, Real factor, bool add) {
    if (add) unpack_rows_as<true>(src, n, channels, dst, stride, factor);
    else unpack_rows_as<false>(src, n, channels, dst, stride, factor);
}

// Adds a packed token to another one.
NBHD_INLINE void add_row(const Real *from, Real *to, int channels) {
    for (int c = 0; c < channels; c += lanes) store(to + c, load(to + c) + load(from + c));
}

} // namespace nbhd::NBHD_ISA
