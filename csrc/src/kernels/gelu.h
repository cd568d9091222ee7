// The exact GELU, x Phi(x), and its slope, Phi(x) + x phi(x), with Phi and phi the normal distribution and its density.
#pragma once
#include "vec.h"

namespace nbhd::NBHD_ISA {

// erfc(|x| / sqrt 2) = 2 Phi(-|x|) = 2^(t q(t)) of t = -|x|; q fitted on [0, 6] for the least error of GELU, 3e-8. Further out its
// last term rules, which takes it below every float. At infinity it is nothing, which times infinity is NaN, as PyTorch's is.
template <int n>
NBHD_INLINE void twice_the_tail(const Vec (&x)[n], Vec (&t)[n], Vec (&p)[n]) {
    constexpr float q[8] = {-1.151111007f,    -4.591621459e-1f, -5.262761563e-2f, 7.245428860e-3f,
                            -2.720814082e-4f, -1.314708788e-4f, 2.805643999e-5f,  -1.902023087e-6f};
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
        t[i] = (Vec)((Index)x[i] & 0x7fffffff);
        p[i] = splat(Real(q[7]));
    }
#pragma GCC unroll 8
    for (int k = 6; k >= 0; k--)
#pragma GCC unroll 2
        for (int i = 0; i < n; i++) p[i] = fma(p[i], t[i], splat(Real(q[k])));
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) p[i] *= t[i];
    exp2(p);
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|)
template <int n>
NBHD_INLINE void gelu(Vec (&x)[n]) {
    Vec t[n], p[n];
    twice_the_tail(x, t, p);
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) x[i] = fma(splat(Real(-0.5)) * t[i], p[i], max(Vec{}, x[i]));
}

template <int n>
NBHD_INLINE void gelu_slope(Vec (&x)[n]) {
    Vec t[n], p[n], density[n];
    twice_the_tail(x, t, p);
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) density[i] = x[i] * x[i] * splat(Real(-0.72134752044448170)); // exp(-x^2 / 2) = 2^that
    exp2(density);
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
        const Vec tail = splat(Real(0.5)) * p[i], whole = splat(Real(1)) - tail;
        const Vec phi = x[i] >= Vec{} ? whole : tail;
        x[i] = fma(x[i] * splat(Real(0.39894228040143268)), density[i], phi);
    }
}

} // namespace nbhd::NBHD_ISA
