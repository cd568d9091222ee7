// Copies of tokens in the two orders the kernels read.
//
//     pack_rows     dst[token][channel]       lanes of a vector are channels
//     pack_lanes    dst[channel][token]       lanes of a vector are tokens
//     pack_pairs    dst[pair][token]          the same, two channels of 16 bits in a word
//
// The first two multiply by `factor`; rows are padded with zeros up to whole vectors, pairs up to whole words.
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

// One vector of tokens: dst[channel * pitch + lane], lane l from src + token[l]; lanes from n on are zero.
template <class T>
NBHD_INLINE void pack_lanes(const T *src, const int64_t *token, int n, int channels, Real *dst, int64_t pitch,
                            Real factor) {
    const Vec f = splat(factor);
    for (int c = 0; c < channels; c += lanes) {
        const int rows = channels - c < lanes ? channels - c : lanes;
        Vec r[lanes];
#if !NBHD_DOUBLE
        if constexpr (sizeof(T) == sizeof(float))
            if (n >= lanes && rows == lanes) {
                load_transposed(r, src + c, token);
#pragma GCC unroll 16
                for (int i = 0; i < lanes; i++) store(dst + (c + i) * pitch, r[i] * f);
                continue;
            }
#endif
#pragma GCC unroll 16
        for (int l = 0; l < lanes; l++)
            r[l] = l < n ? rows == lanes ? load(src + token[l] + c) : load_part(src + token[l] + c, rows) : Vec{};
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
NBHD_INLINE void pack_pairs(const T *src, const int64_t *token, int n, int channels, Real *dst, int64_t pitch) {
    for (int c = 0; c < channels; c += 2 * lanes, dst += lanes * pitch) {
        const int left = channels - c, rows = left < 2 * lanes ? (left + 1) / 2 : lanes;
        Vec r[lanes];
        if (n >= lanes && left >= 2 * lanes) {
            load_transposed(r, src + c, token);
        } else {
            const __mmask32 some = left < 2 * lanes ? (1u << left) - 1 : ~0u;
#pragma GCC unroll 16
            for (int l = 0; l < lanes; l++)
                r[l] = l < n ? (Vec)_mm512_maskz_loadu_epi16(some, src + token[l] + c) : Vec{};
            transpose(r);
        }
        if (rows == lanes) {
#pragma GCC unroll 16
            for (int i = 0; i < lanes; i++) store(dst + i * pitch, r[i]);
        } else {
            for (int i = 0; i < rows; i++) store(dst + i * pitch, r[i]);
        }
    }
}
#endif

// Queries or keys as the scores want them. Pairs are left as they are: there the scores are multiplied by the factor.
NBHD_INLINE int score_words(int channels) { return pairs ? (channels + 1) / 2 : channels; }
template <class T>
NBHD_INLINE void pack_for_scores(const T *src, const int64_t *token, int n, int channels, Real *dst, int64_t pitch,
                                 Real factor) {
#if NBHD_PAIRS
    (void)factor;
    pack_pairs(src, token, n, channels, dst, pitch);
#else
    pack_lanes(src, token, n, channels, dst, pitch, factor);
#endif
}

// Packed rows back to tensor tokens: dst = factor * src, or dst + factor * src.
template <class T>
static void unpack_rows(const Real *src, int n, int channels, T *dst, int64_t stride, Real factor, bool add) {
    const int whole = channels / lanes * lanes, width = round_up(channels);
    const Vec f = splat(factor);
    for (int t = 0; t < n; t++, src += width, dst += stride) {
        for (int c = 0; c < whole; c += lanes) {
            const Vec v = load(src + c) * f;
            store(dst + c, add ? v + load(dst + c) : v);
        }
        if (const int rest = channels - whole) {
            const Vec v = load(src + whole) * f;
            store_part(dst + whole, add ? v + load_part(dst + whole, rest) : v, rest);
        }
    }
}

// Adds a packed token to another one.
NBHD_INLINE void add_row(const Real *from, Real *to, int channels) {
    for (int c = 0; c < channels; c += lanes) store(to + c, load(to + c) + load(from + c));
}

} // namespace nbhd::NBHD_ISA
