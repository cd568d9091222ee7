// Layer norm of rows, (x - mean) / sqrt(variance + epsilon) * weight + bias, the variance that of all numbers there are.
#pragma once
#include "rows.h"

namespace nbhd::NBHD_ISA {

// The sum of a vector's lanes, in each of them.
template <int half, int... i>
NBHD_INLINE Vec add_across(Vec v, Sequence<i...>) {
    return v + __builtin_shufflevector(v, v, (i ^ half)...);
}
NBHD_INLINE Vec total(Vec v) {
    if constexpr (lanes > 8) v = add_across<8>(v, EachLane{});
    if constexpr (lanes > 4) v = add_across<4>(v, EachLane{});
    v = add_across<2>(v, EachLane{});
    return add_across<1>(v, EachLane{});
}

// Of a row: its mean, and one over its deviation.
struct Moments {
    float mean, factor;
};

// `x` less `of` in the first n lanes, zero in the others.
NBHD_INLINE Vec deviation(const float *x, int64_t n, Vec of) {
    const Vec d = load_some(x, n) - of;
    return n >= lanes ? d : lane_numbers() < Int(n) ? d : Vec{};
}

NBHD_INLINE Moments moments_of(const float *x, int64_t n, float epsilon) {
    // The sum is of deviations from one of the numbers: of numbers far from zero it is as exact as of those around it, and of
    // equal ones it is nothing.
    const Vec over_n = splat(1 / float(n)), first = broadcast(x);
    Vec sum[2] = {};
    for (int64_t i = 0; i < n; i += 2 * lanes)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            if (const int64_t left = n - i - v * lanes; left > 0) sum[v] += deviation(x + i + v * lanes, left, first);
    const Vec mean = first + total(sum[0] + sum[1]) * over_n;
    sum[0] = sum[1] = Vec{};
    for (int64_t i = 0; i < n; i += 2 * lanes)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            if (const int64_t left = n - i - v * lanes; left > 0) {
                const Vec d = deviation(x + i + v * lanes, left, mean);
                sum[v] = fma(d, d, sum[v]);
            }
    const float variance = total(sum[0] + sum[1])[0] * over_n[0];
    return {mean[0], 1 / __builtin_sqrtf(variance + epsilon)};
}

template <class T>
NBHD_INLINE Vec normalised(const T *x, int64_t left, Moments m) {
    return (load_some(x, left) - splat(m.mean)) * splat(m.factor);
}

// `n` columns of a row from column `first` on.
template <class T>
NBHD_INLINE void normalise_row(const T *x, Moments m, const Norm &norm, int64_t first, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i += lanes) {
        const int64_t left = n - i;
        Vec y = normalised(x + first + i, left, m);
        if (norm.weight) y *= load_some(norm.weight + first + i, left);
        if (norm.bias) y += load_some(norm.bias + first + i, left);
        store_some(to + i, y, left);
    }
}

// `moments`: where to keep them, [rows][2], or null.
static void normalise(Rows input, const Norm &norm, float epsilon, int64_t rows, int64_t n, float *moments, float *to,
                      int64_t stride) {
    for (int64_t r = 0; r < rows; r++, to += stride) {
        const float *x = input.data + r * input.stride;
        const Moments m = moments_of(x, n, epsilon);
        if (moments) moments[2 * r] = m.mean, moments[2 * r + 1] = m.factor;
        normalise_row(x, m, norm, 0, n, to);
    }
}

} // namespace nbhd::NBHD_ISA
