// Vectors of Real (float or double) in GCC and Clang vector extensions: as fast as intrinsics when compiled with
// -fno-tree-vectorize -fno-tree-slp-vectorize (the automatic vectoriser rewrites the pointer tables around the kernels and
// causes store-forwarding stalls) and -O3 (at -O2 GCC leaves small arrays of vectors in memory, five times slower).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define NBHD_INLINE static inline __attribute__((always_inline))
#define NBHD_INLINE_MEMBER inline __attribute__((always_inline))
#define NBHD_INLINE_LAMBDA __attribute__((always_inline))

namespace nbhd::NBHD_ISA {

#if NBHD_DOUBLE
using Real = double;
#else
using Real = float;
#endif
template <int size>
struct IntOf;
template <>
struct IntOf<4> {
    using type = int32_t;
};
template <>
struct IntOf<8> {
    using type = int64_t;
};
using Int = IntOf<sizeof(Real)>::type;

constexpr bool is_double = sizeof(Real) == 8;
#ifndef NBHD_PAIRS
#define NBHD_PAIRS 0
#endif
// Products straight from 16-bit numbers, two bfloat16 in each word: the scores of tensors of this type, for which alone the file is
// then, or those of linear layers.
constexpr bool pairs = NBHD_PAIRS;
constexpr int lanes = NBHD_VECTOR_BYTES / sizeof(Real);
constexpr int registers = NBHD_REGISTERS;

typedef Real Vec __attribute__((vector_size(NBHD_VECTOR_BYTES)));
typedef Int Index __attribute__((vector_size(NBHD_VECTOR_BYTES)));
typedef Real UnalignedVec __attribute__((vector_size(NBHD_VECTOR_BYTES), aligned(sizeof(Real)), may_alias));

NBHD_INLINE int round_up(int n) { return (n + lanes - 1) / lanes * lanes; }

NBHD_INLINE Vec load(const Real *p) { return *(const UnalignedVec *)p; }
NBHD_INLINE void store(Real *p, Vec v) { *(UnalignedVec *)p = v; }
NBHD_INLINE Vec splat(Real x) { return x - Vec{}; } // x - 0 is folded to x: one broadcast
NBHD_INLINE Vec broadcast(const Real *p) { return splat(*p); }
NBHD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; } // contracted by -ffp-contract=fast
// The second operand when either is NaN, so that `max(bound, x)` keeps a NaN in x. By intrinsics on x86: written as below, the
// compiler must care for signed zeros and takes a comparison and a blend.
NBHD_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64
    if constexpr (is_double) return (Vec)_mm512_max_pd((__m512d)a, (__m512d)b);
    else return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && NBHD_VECTOR_BYTES == 32
    if constexpr (is_double) return (Vec)_mm256_max_pd((__m256d)a, (__m256d)b);
    else return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__) && NBHD_VECTOR_BYTES == 16
    if constexpr (is_double) return (Vec)_mm_max_pd((__m128d)a, (__m128d)b);
    else return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

NBHD_INLINE Index lane_numbers() {
    Index n;
#pragma GCC unroll 16
    for (int l = 0; l < lanes; l++) n[l] = l;
    return n;
}

// p[0] in the even lanes, p[1] in the odd ones.
NBHD_INLINE Vec broadcast_pair(const Real *p) {
#if NBHD_DOUBLE
    Vec v;
#pragma GCC unroll 16
    for (int l = 0; l < lanes; l++) v[l] = p[l & 1];
    return v;
#else
    typedef double Pair __attribute__((aligned(4), may_alias));
    typedef double Pairs __attribute__((vector_size(NBHD_VECTOR_BYTES)));
    return (Vec)(*(const Pair *)p - Pairs{});
#endif
}

// a * b + c; with pairs the two products of each word's halves.
NBHD_INLINE Vec multiply_words(Vec a, Vec b, Vec c) {
#if NBHD_PAIRS
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    return fma(a, b, c);
#endif
}

// Keep a loaded vector in a register: compilers otherwise fold the load into every multiply that uses it.
NBHD_INLINE void keep(Vec &v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

// Load an index vector at each use instead of holding it in a register through the loop, where registers are short: left to
// itself GCC hoists the load and spills an accumulator.
NBHD_INLINE Index reload(const Index *p) {
#if defined(__AVX__) && NBHD_REGISTERS == 16
    Index v;
    asm volatile("vmovdqa %1, %0" : "=x"(v) : "m"(*p));
    return v;
#else
    return *p;
#endif
}

// result[l] = v[index[l]]
NBHD_INLINE Vec permute(Vec v, Index index) {
#if defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64
    if constexpr (is_double) return (Vec)_mm512_permutexvar_pd((__m512i)index, (__m512d)v);
    else return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(__AVX2__) && NBHD_VECTOR_BYTES == 32
    if constexpr (!is_double) return (Vec)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
    const Index low = index + index; // halves of a double: 2 i and 2 i + 1
    return (Vec)_mm256_permutevar8x32_epi32((__m256i)v, (__m256i)(low | ((low + 1) << 32)));
#elif defined(__GNUC__) && !defined(__clang__)
    return __builtin_shuffle(v, index);
#else
    Vec r{};
    for (int l = 0; l < lanes; l++) r[l] = v[index[l]];
    return r;
#endif
}

// 2^x; 0 below -127 (-1023 for double, -126 with AVX-512), NaN for NaN. Taylor series on [-1/2, 1/2]; float: minimax, 1 to 2 ulp. `n`
// of them at a time, step by step, so that neighbouring instructions do not wait for each other.
template <int n>
NBHD_INLINE void exp2(Vec (&x)[n]) {
#if defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64 && !NBHD_DOUBLE
    // 2^(x - floor x) by a polynomial on [0, 1), exact at both ends, and `scalef`, which multiplies by 2^floor x: nine operations instead of eleven.
    // Results below 2^-126 are made zero by a mask: subnormal numbers would take hundreds of cycles each, here and in every product.
    constexpr float c[6] = {1.f, 6.931516528e-1f, 2.401604205e-1f, 5.581594631e-2f, 8.993349038e-3f, 1.878642826e-3f};
    __m512 f[n], p[n];
    __mmask16 normal[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) normal[i] = _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(-126), _CMP_NLT_UQ);
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) f[i] = _mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) p[i] = _mm512_set1_ps(c[5]);
#pragma GCC unroll 16
    for (int k = 4; k >= 0; k--)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) p[i] = _mm512_fmadd_ps(p[i], f[i], _mm512_set1_ps(c[k]));
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) x[i] = (Vec)_mm512_maskz_scalef_ps(normal[i], p[i], (__m512)x[i]);
#else
    constexpr int terms = is_double ? 14 : 6;
    constexpr double c[14] = {
        1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
        1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
    constexpr float f[6] = {1.f, 6.931469440e-1f, 2.402212024e-1f, 5.550713092e-2f, 9.675540961e-3f, 1.327647129e-3f};
    const Vec lowest = splat(Real(is_double ? -1023 : -127));
    const Vec shift =
        splat(Real(is_double ? 6755399441055744.0 : 12582912)); // 1.5 * 2^52, 2^23: adding it rounds to an integer
    Vec t[n], p[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) x[i] = max(lowest, x[i]);
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) t[i] = x[i] + shift;
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) p[i] = t[i] - shift;
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) x[i] = x[i] - p[i];
    if constexpr (is_double)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) x[i] *= splat(Real(0.6931471805599453094));
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) p[i] = splat(Real(is_double ? c[terms - 1] : f[terms % 7 - 1]));
#pragma GCC unroll 16
    for (int k = terms - 2; k >= 0; k--)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) p[i] = fma(p[i], x[i], splat(Real(is_double ? c[k] : f[k % 6])));
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) x[i] = (Vec)((Index)p[i] + ((Index)t[i] << (is_double ? 52 : 23)));
#endif
}
NBHD_INLINE Vec exp2(Vec x) {
    Vec one[1] = {x};
    exp2(one);
    return one[0];
}

// log2 x for normal x > 0: exponent plus 2/ln 2 * atanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)).
// Outside (0, inf) the answer is NaN.
NBHD_INLINE Vec log2(Vec x) {
    constexpr int mantissa = is_double ? 52 : 23;
    const Index half_root = (Index)splat(Real(0.70710678118654752));
    const Index shifted = (Index)x - half_root;
    const Index exponent = shifted >> mantissa; // arithmetic: floor
    const Vec m = (Vec)((Index)x - (exponent << mantissa));
    const Vec t = (m - splat(Real(1))) / (m + splat(Real(1))), s = t * t;
    constexpr int terms = is_double ? 11 : 5;
    Vec p = splat(Real(1.0 / (2 * terms - 1)));
#pragma GCC unroll 16
    for (int i = terms - 1; i >= 1; i--) p = fma(p, s, splat(Real(1.0 / (2 * i - 1))));
    Vec e;
    if constexpr (is_double) {
        e = (Vec)(exponent + (Index)splat(Real(6755399441055744.0))) - splat(Real(6755399441055744.0));
    } else {
        e = (Vec)(exponent + (Index)splat(Real(12582912))) - splat(Real(12582912));
    }
    const Vec r = fma(p * t, splat(Real(2.8853900817779268)), e);
    const Vec nan = splat(Real(__builtin_nan("")));
    return ((x > splat(Real(0))) & (x < splat(Real(__builtin_inf())))) ? r : nan;
}

// Element i of a two-vector shuffle is taken from `a` (index below lanes) or `b`; the index is a constant expression in i.
template <int... i>
struct Sequence {};
template <int n, int... i>
struct Count : Count<n - 1, n - 1, i...> {};
template <int... i>
struct Count<0, i...> {
    using type = Sequence<i...>;
};
using EachLane = Count<lanes>::type;

// Exchanges the off-diagonal blocks of `half` elements: the step of a transpose that is one instruction at 64 bits and above.
template <int half, int... i>
NBHD_INLINE void exchange(Vec &a, Vec &b, Sequence<i...>) {
    const Vec low = __builtin_shufflevector(a, b, ((i & half) ? i - half + lanes : i)...);
    const Vec high = __builtin_shufflevector(a, b, ((i & half) ? i + lanes : i + half)...);
    a = low, b = high;
}
// a0 b0 a1 b1 and a2 b2 a3 b3 in each block of four; then the same for pairs.
template <int... i>
NBHD_INLINE void interleave(Vec a, Vec b, Vec &low, Vec &high, Sequence<i...>) {
    low = __builtin_shufflevector(a, b, ((i & ~3) + (i >> 1 & 1) + (i & 1) * lanes)...);
    high = __builtin_shufflevector(a, b, ((i & ~3) + (i >> 1 & 1) + 2 + (i & 1) * lanes)...);
}
template <int... i>
NBHD_INLINE void interleave_pairs(Vec a, Vec b, Vec &low, Vec &high, Sequence<i...>) {
    low = __builtin_shufflevector(a, b, ((i & ~3) + (i & 1) + (i >> 1 & 1) * lanes)...);
    high = __builtin_shufflevector(a, b, ((i & ~3) + (i & 1) + 2 + (i >> 1 & 1) * lanes)...);
}
template <int half>
NBHD_INLINE void exchange_all(Vec *r) {
    if constexpr (half < lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++)
            if (!(i & half)) exchange<half>(r[i], r[i + half], EachLane{});
        exchange_all<half * 2>(r);
    }
}
#if NBHD_DOUBLE
// lanes x lanes transpose of r[0..lanes) in registers.
NBHD_INLINE void transpose(Vec *r) { exchange_all<1>(r); }
#else
// 4x4 transposes inside 128 bits.
NBHD_INLINE void transpose_block(Vec *r) {
    Vec a, b, c, d;
    interleave(r[0], r[1], a, b, EachLane{});
    interleave(r[2], r[3], c, d, EachLane{});
    interleave_pairs(a, c, r[0], r[1], EachLane{});
    interleave_pairs(b, d, r[2], r[3], EachLane{});
}
// lanes x lanes transpose of r[0..lanes) in registers.
NBHD_INLINE void transpose(Vec *r) {
#pragma GCC unroll 4
    for (int i = 0; i < lanes; i += 4) transpose_block(r + i);
    exchange_all<4>(r);
}
// Words that are transposed at a time. Loads of a part of a vector are half of a transpose and need no shuffle; on a Zen 5 eight words
// a load take two thirds of the time of four.
constexpr int most_words = NBHD_VECTOR_BYTES == 64 ? 8 : 4;
// Four words from each of src + token[0], src + token[4], ...
template <class T>
NBHD_INLINE Vec load_fours(const T *src, const int64_t *token) {
#if defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps((const float *)(src + token[0])));
    v = _mm512_insertf32x4(v, _mm_loadu_ps((const float *)(src + token[4])), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps((const float *)(src + token[8])), 2);
    return (Vec)_mm512_insertf32x4(v, _mm_loadu_ps((const float *)(src + token[12])), 3);
#elif defined(__AVX__) && NBHD_VECTOR_BYTES == 32
    return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float *)(src + token[0]))),
                                     _mm_loadu_ps((const float *)(src + token[4])), 1);
#else
    Vec v;
    memcpy(&v, src + token[0], 16);
    return v;
#endif
}
// r[word][lane] from src + token[lane]; a word is a float or two 16-bit numbers.
template <class T>
NBHD_INLINE void load_transposed(Vec (&r)[4], const T *src, const int64_t *token) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) r[i] = load_fours(src, token + i);
    transpose_block(r);
}
#if defined(__AVX512F__) && NBHD_VECTOR_BYTES == 64
template <class T>
NBHD_INLINE void load_transposed(Vec (&r)[8], const T *src, const int64_t *token) {
    const auto eight = [&](int l) NBHD_INLINE_LAMBDA { return _mm256_loadu_pd((const double *)(src + token[l])); };
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) // words 0-3 and 4-7 of a token, and of the one eight further
        r[i] = (Vec)_mm512_insertf64x4(_mm512_castpd256_pd512(eight(i)), eight(i + 8), 1);
    transpose_block(r), transpose_block(r + 4);
    // r[i]: tokens 0-3 of words i and 4 + i, then tokens 8-11; r[4 + i]: the same of tokens 4-7 and 12-15
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Vec a = r[i], b = r[4 + i];
        const __m512i low = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), high = low + 2;
        r[i] = (Vec)_mm512_permutex2var_pd((__m512d)a, low, (__m512d)b);
        r[4 + i] = (Vec)_mm512_permutex2var_pd((__m512d)a, high, (__m512d)b);
    }
}
#endif
#endif

} // namespace nbhd::NBHD_ISA
