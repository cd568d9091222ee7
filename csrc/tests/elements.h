// Numbers of any dtype in memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../include/nbhd.h"

inline size_t element_size(int64_t dtype) { return dtype == NBHD_FLOAT64 ? 8 : dtype == NBHD_FLOAT32 ? 4 : 2; }

// Conversions are slow and plain on purpose: they check the library's.
inline uint16_t to_half(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7e00;
    const double a = std::fabs(x);
    if (a >= 65520) return sign | 0x7c00;
    int e = a > 0 ? std::max(std::ilogb(a), -14) : -14;
    double m = std::nearbyint(std::ldexp(a, 10 - e)); // 11 bits with the leading one
    if (m >= 2048) m /= 2, e++;
    return sign | uint16_t(m < 1024 ? m : m - 1024 + (e + 15) * 1024);
}
inline double from_half(uint16_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const double a = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(m + 1024, e - 25) : std::ldexp(m, -24);
    return h & 0x8000 ? -a : a;
}
inline void put(void *p, int64_t dtype, double x) {
    if (dtype == NBHD_FLOAT64) memcpy(p, &x, 8);
    else if (dtype == NBHD_FLOAT16) {
        const uint16_t h = to_half(x);
        memcpy(p, &h, 2);
    } else {
        const float f = float(x);
        uint32_t u;
        memcpy(&u, &f, 4);
        if (dtype == NBHD_FLOAT32) memcpy(p, &u, 4);
        else {
            const uint16_t h = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
            memcpy(p, &h, 2);
        }
    }
}
inline double get(const void *p, int64_t dtype);
inline double rounded(double x, int64_t dtype) {
    double bytes;
    put(&bytes, dtype, x);
    return get(&bytes, dtype);
}
inline double get(const void *p, int64_t dtype) {
    if (dtype == NBHD_FLOAT64) {
        double x;
        memcpy(&x, p, 8);
        return x;
    }
    uint32_t u = 0;
    if (dtype == NBHD_FLOAT32) memcpy(&u, p, 4);
    else {
        uint16_t h;
        memcpy(&h, p, 2);
        if (dtype == NBHD_FLOAT16) return from_half(h);
        u = uint32_t(h) << 16;
    }
    float f;
    memcpy(&f, &u, 4);
    return f;
}
