// Elements of the tensors and their conversion to and from Real. Sums always run in Real; 16-bit types are rounded to
// nearest even at the last store.
#pragma once
#include "vec.h"

namespace nbhd::NBHD_ISA {

#if !NBHD_DOUBLE // 16-bit tensors are computed in float
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<BFloat16> = true;
template <class T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;

typedef uint16_t Half __attribute__((vector_size(lanes * 2)));
typedef Half UnalignedHalf __attribute__((aligned(2), may_alias));
typedef uint32_t UInt __attribute__((vector_size(lanes * 4)));

NBHD_INLINE Vec load(const BFloat16 *p) {
    return (Vec)(__builtin_convertvector((Half) * (const UnalignedHalf *)p, UInt) << 16);
}

NBHD_INLINE void store(BFloat16 *p, Vec v) {
#if NBHD_PAIRS // what is below a float's smallest normal numbers is nothing there, as it is in products
    *(UnalignedHalf *)p = (Half)_mm512_cvtneps_pbh((__m512)v);
#else
    const UInt u = (UInt)v;
    const UInt rounded = u + (((u >> 16) & 1) + 0x7fff);
    const UInt quiet = u | 0x400000; // rounding could carry a NaN into infinity
    *(UnalignedHalf *)p = __builtin_convertvector((v == v ? rounded : quiet) >> 16, Half);
#endif
}

NBHD_INLINE Vec load(const Float16 *p) {
#if defined(__F16C__) && NBHD_VECTOR_BYTES == 32
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    // Shift exponent and mantissa into place and multiply by 2^112, which also scales subnormals right.
    const UInt h = __builtin_convertvector((Half) * (const UnalignedHalf *)p, UInt);
    const UInt magnitude = (h & 0x7fff) << 13;
    const UInt scaled = (UInt)((Vec)magnitude * splat(5.192296858534828e33f));
    return (Vec)((magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : scaled) | ((h & 0x8000) << 16));
#endif
}

NBHD_INLINE void store(Float16 *p, Vec v) {
#if defined(__F16C__) && NBHD_VECTOR_BYTES == 32
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
    const UInt bits = (UInt)v, sign = (bits >> 16) & 0x8000, u = bits & 0x7fffffff;
    // normal results: rebias the exponent by -112 and round the 13 lost bits to even; 65520 and above carry into infinity
    const UInt normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    // subnormal results: adding 1/2 aligns the mantissa and lets the addition round
    const UInt subnormal = (UInt)((Vec)u + splat(0.5f)) - 0x3f000000u;
    UInt r = u < (113u << 23) ? subnormal : normal;
    r = u >= (143u << 23) ? UInt{} + 0x7c00u : r;
    r = u > 0x7f800000u ? UInt{} + 0x7e00u : r;
    *(UnalignedHalf *)p = __builtin_convertvector(r | sign, Half);
#endif
}
#endif

// The first n < lanes elements; the others read as zero and are not written. A loop over n, or a memcpy of n, would be a call.
NBHD_INLINE Index first_lanes(int n) { return lane_numbers() < Index{} + n; }
NBHD_INLINE Vec load_part(const Real *p, int n) {
#if defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64
    if constexpr (is_double) return (Vec)_mm512_maskz_loadu_pd((__mmask8)((1 << n) - 1), p);
    else return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), p);
#elif defined(__AVX2__) && NBHD_VECTOR_BYTES == 32
    if constexpr (is_double) return (Vec)_mm256_maskload_pd((const double *)p, (__m256i)first_lanes(n));
    else return (Vec)_mm256_maskload_ps((const float *)p, (__m256i)first_lanes(n));
#else
    Vec v{};
#pragma GCC unroll 16
    for (int l = 0; l < lanes - 1; l++)
        if (l < n) v[l] = p[l];
    return v;
#endif
}
NBHD_INLINE void store_part(Real *p, Vec v, int n) {
#if defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64
    if constexpr (is_double) _mm512_mask_storeu_pd(p, (__mmask8)((1 << n) - 1), (__m512d)v);
    else _mm512_mask_storeu_ps(p, (__mmask16)((1 << n) - 1), (__m512)v);
#elif defined(__AVX2__) && NBHD_VECTOR_BYTES == 32
    if constexpr (is_double) _mm256_maskstore_pd((double *)p, (__m256i)first_lanes(n), (__m256d)v);
    else _mm256_maskstore_ps((float *)p, (__m256i)first_lanes(n), (__m256)v);
#else
#pragma GCC unroll 16
    for (int l = 0; l < lanes - 1; l++)
        if (l < n) p[l] = v[l];
#endif
}
#if !NBHD_DOUBLE
template <class T>
NBHD_INLINE Vec load_part(const T *p, int n) {
    T buffer[lanes] = {};
#pragma GCC unroll 16
    for (int l = 0; l < lanes - 1; l++)
        if (l < n) buffer[l] = p[l];
    return load(buffer);
}
template <class T>
NBHD_INLINE void store_part(T *p, Vec v, int n) {
    T buffer[lanes];
    store(buffer, v);
#pragma GCC unroll 16
    for (int l = 0; l < lanes - 1; l++)
        if (l < n) p[l] = buffer[l];
}
#endif

} // namespace nbhd::NBHD_ISA
