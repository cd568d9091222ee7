// Copies of tokens in the two orders the kernels read.
//
//     pack_rows        dst[token][channel]       lanes of a vector are channels
//     pack_transposed  dst[channel][token]       lanes of a vector are tokens
//
// Both multiply by `factor` and pad with zeros up to whole vectors.
#pragma once
#include "element.h"

namespace nbhd::NBHD_ISA {

// Asks for n tokens that will be written, to be owned by then.
template <class T>
NBHD_INLINE void prefetch_to_write(T *p, int64_t stride, int n, int channels) {
    for (int t = 0; t < n; t++, p += stride)
        for (int c = 0; c < channels; c += 64 / (int)sizeof(T)) __builtin_prefetch(p + c, 1, 3);
}

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

// dst has one row of `pitch` Reals for each channel, with room for round_up(n).
template <class T>
static void pack_transposed(const T *src, int64_t stride, int n, int channels, Real *dst, int pitch, Real factor) {
    alignas(64) static const T zeros[lanes] = {};
    const Vec f = splat(factor);
    for (int t = 0; t < n; t += lanes)
        for (int c = 0; c < channels; c += lanes) {
            const int rows = channels - c < lanes ? channels - c : lanes;
            Vec r[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; i++) {
                const T *s = src + (t + i) * stride + c;
                if (t + i >= n) s = zeros;
                r[i] = (rows == lanes || t + i >= n ? load(s) : load_part(s, rows)) * f;
            }
            transpose(r);
            if (rows == lanes) {
#pragma GCC unroll 16
                for (int i = 0; i < lanes; i++) store(dst + (c + i) * (int64_t)pitch + t, r[i]);
            } else {
                for (int i = 0; i < rows; i++) store(dst + (c + i) * (int64_t)pitch + t, r[i]);
            }
        }
}

// Queries of one vector: dst[channel][lane], token[l] the channels of lane l. Idle lanes repeat a query: nobody reads their results.
template <class T>
NBHD_INLINE void pack_lanes(const T *const *token, int channels, Real *dst, Real factor) {
    const Vec f = splat(factor);
    for (int c = 0; c < channels; c += lanes) {
        const int rows = channels - c < lanes ? channels - c : lanes;
        Vec r[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; l++) r[l] = (rows == lanes ? load(token[l] + c) : load_part(token[l] + c, rows)) * f;
        transpose(r);
        if (rows == lanes) {
#pragma GCC unroll 16
            for (int i = 0; i < lanes; i++) store(dst + (c + i) * lanes, r[i]);
        } else {
            for (int i = 0; i < rows; i++) store(dst + (c + i) * lanes, r[i]);
        }
    }
}

template <int... i>
NBHD_INLINE void alternate(Vec a, Vec b, Vec &low, Vec &high, Sequence<i...>) {
    low = __builtin_shufflevector(a, b, (i / 2 + (i & 1) * lanes)...);
    high = __builtin_shufflevector(a, b, (i / 2 + (i & 1) * lanes + lanes / 2)...);
}
// Keys of a paired tile: dst[channel][offset][2] from a transposed row, `a` and `b` the first keys of the two groups. Writes
// whole vectors: up to 2 * lanes Reals past the end.
static void pack_pairs(const Real *src, int pitch, int channels, int a, int b, int kernel, Real *dst) {
    for (int c = 0; c < channels; c++, src += pitch, dst += 2 * kernel)
        for (int j = 0; j < kernel; j += lanes) {
            Vec low, high;
            alternate(load(src + a + j), load(src + b + j), low, high, EachLane{});
            store(dst + 2 * j, low), store(dst + 2 * j + lanes, high);
        }
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

} // namespace nbhd::NBHD_ISA
