// Gradients of a layer norm of rows.
#pragma once
#include "layer_norm.h"

namespace nbhd::NBHD_ISA {

// d_input = what the norm makes of `d`, the gradient of its output, plus `added` if that has data. d_weight and d_bias, [n], become
// those of these rows.
template <class T>
static void normalise_backward(RowsOf<T> input, const float *moments, const float *weight, Rows d, RowsOf<T> added,
                               int64_t rows, int64_t n, T *d_input, float *d_weight, float *d_bias) {
    for (int64_t i = 0; i < n; i += lanes) store_some(d_weight + i, Vec{}, n - i), store_some(d_bias + i, Vec{}, n - i);
    const Vec over_n = splat(1 / float(n));
    for (int64_t r = 0; r < rows; r++) {
        const T *x = input.data + r * input.stride;
        const float *g = d.data + r * d.stride;
        const Moments m{moments[2 * r], moments[2 * r + 1]};
        Vec sum{}, with_x{};
        for (int64_t i = 0; i < n; i += lanes) {
            const int64_t left = n - i;
            const Vec y = normalised(x + i, left, m);
            Vec dy = load_some(g + i, left);
            if (left < lanes) dy = lane_numbers() < Int(left) ? dy : Vec{};
            store_some(d_bias + i, load_some(d_bias + i, left) + dy, left);
            store_some(d_weight + i, fma(dy, y, load_some(d_weight + i, left)), left);
            if (weight) dy *= load_some(weight + i, left);
            sum += dy, with_x = fma(dy, y, with_x);
        }
        if (!d_input) continue;
        const Vec mean = total(sum) * over_n, slope = total(with_x) * over_n;
        T *to = d_input + r * n;
        for (int64_t i = 0; i < n; i += lanes) {
            const int64_t left = n - i;
            Vec dy = load_some(g + i, left);
            if (weight) dy *= load_some(weight + i, left);
            Vec dx = (dy - mean - normalised(x + i, left, m) * slope) * splat(m.factor);
            if (added.data) dx += load_some(added.data + r * added.stride + i, left);
            store_some(to + i, dx, left);
        }
    }
}

} // namespace nbhd::NBHD_ISA
