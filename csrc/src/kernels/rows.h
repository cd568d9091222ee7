// Rows whose number of columns is no multiple of a vector; 16-bit rows as floats and back; rows as products want them.
#pragma once
#include "../linear.h"
#include "element.h"

namespace nbhd::NBHD_ISA {

constexpr int64_t padding = 16;     // floats after a row of our own: powers of two would share a few lines of the cache
constexpr int64_t alias = 4096 / 4; // floats: at multiples of it rows lie in the same lines of a first-level cache

// From one row of our own to the next.
NBHD_INLINE constexpr int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16 + padding; }

NBHD_INLINE Vec load_some(const float *p, int64_t n) {
    if (n >= lanes) return load(p);
    Vec v{};
    for (int64_t i = 0; i < n; i++) ((float *)&v)[i] = p[i];
    return v;
}
NBHD_INLINE void store_some(float *p, Vec v, int64_t n) {
    if (n >= lanes) return store(p, v);
    for (int64_t i = 0; i < n; i++) p[i] = ((float *)&v)[i];
}

template <class T>
NBHD_INLINE Vec load_some(const T *p, int64_t n) {
    return n >= lanes ? load(p) : load_part(p, int(n));
}
template <class T>
NBHD_INLINE void store_some(T *p, Vec v, int64_t n) {
    if (n >= lanes) return store(p, v);
    store_part(p, v, int(n));
}

static void copy(const float *from, int64_t from_stride, float *to, int64_t to_stride, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        __builtin_memcpy(to + r * to_stride, from + r * from_stride, size_t(columns) * sizeof(float));
}

// What products are made of: words, each of them a float, or two bfloat16 (NBHD_PAIRS), the second zero where there is none.
#if NBHD_PAIRS
using Multiplied = BFloat16;
#else
using Multiplied = float;
#endif
constexpr int64_t numbers_of_word = pairs ? 2 : 1;
NBHD_INLINE constexpr int64_t words(int64_t numbers) { return (numbers + numbers_of_word - 1) / numbers_of_word; }

// Rows of words, as those numbers.
NBHD_INLINE OutputOf<Multiplied> numbers(Output a) { return {(Multiplied *)a.data, a.stride * numbers_of_word}; }

NBHD_INLINE RowsOf<Multiplied> multiplied(Output a) { return {numbers(a).data, numbers(a).stride}; }

// A word in each lane, of these numbers.
NBHD_INLINE Vec word_of(const Vec (&x)[numbers_of_word]) {
#if NBHD_PAIRS
    const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x[0])),
                  second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x[1]));
    return (Vec)_mm512_or_si512(first, _mm512_slli_epi32(second, 16));
#else
    return x[0];
#endif
}

// Whether rows of these are words as they lie.
template <class T>
NBHD_INLINE bool are_words(RowsOf<T> a, int64_t columns) {
    if constexpr (!pairs) return is_float<T>;
    return is_bfloat16<T> && !(columns % 2) && !(a.stride % 2) && !((uintptr_t)a.data % sizeof(float));
}
template <class T>
NBHD_INLINE Rows as_words(RowsOf<T> a) {
    return {(const float *)a.data, a.stride / numbers_of_word};
}

// The numbers of each row of floats, where they lie, become words.
static void become_words([[maybe_unused]] Output a, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t columns) {
#if NBHD_PAIRS
    for (int64_t r = 0; r < rows; r++, a.data += a.stride)
        for (int64_t i = 0; i < columns; i += lanes)
            store((BFloat16 *)a.data + i, load_some(a.data + i, columns - i)); // zeros past the last one
#endif
}

// A row's last word is whole: written has been up to its last number.
static void end_words([[maybe_unused]] Output a, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t columns) {
#if NBHD_PAIRS
    if (columns % 2)
        for (int64_t r = 0; r < rows; r++, a.data += a.stride) ((BFloat16 *)a.data)[columns].bits = 0;
#endif
}

// The rows as tiles want them: as they lie, or in `room` where they would be in each other's way.
static Rows apart(Rows a, int64_t rows, int64_t columns, float *room) {
    if (a.stride % alias) return a;
    copy(a.data, a.stride, room, padded(columns), rows, columns);
    return {room, padded(columns)};
}

// f(pointer): `data` as numbers of the dtype, which is not float64.
template <class F>
NBHD_INLINE auto with_type(Dtype dtype, const void *data, const F &f) {
    if (dtype == Dtype::bfloat16) return f((const BFloat16 *)data);
    if (dtype == Dtype::float16) return f((const Float16 *)data);
    return f((const float *)data);
}
template <class T>
constexpr Dtype dtype_of = is_float<T>      ? Dtype::float32
                           : is_bfloat16<T> ? Dtype::bfloat16
                                            : Dtype::float16;

// Rows of any dtype but float64.
struct AnyRows {
    const void *data; // or null
    int64_t stride;
    Dtype dtype;

    AnyRows() : data(nullptr), stride(0), dtype(Dtype::float32) {}
    template <class T>
    AnyRows(RowsOf<T> a) : data(a.data), stride(a.stride), dtype(dtype_of<T>) {}
    // f(rows), which begin with that one
    template <class F>
    void from(int64_t row, const F &f) const {
        with_type(dtype, data, [&]<class T>(const T *p) { f(RowsOf<T>{p, stride}.from(row)); });
    }
};

// As floats.
template <class T>
static void widen(RowsOf<T> from, int64_t rows, int64_t columns, float *to, int64_t to_stride) {
    for (int64_t r = 0; r < rows; r++, from.data += from.stride, to += to_stride)
        for (int64_t i = 0; i < columns; i += lanes)
            store_some(to + i, load_some(from.data + i, columns - i), columns - i);
}

// Whether rows are words as they lie, and not in each other's way.
template <class T>
NBHD_INLINE bool lie_well(RowsOf<T> a, int64_t columns) {
    return are_words(a, columns) && as_words(a).stride % alias;
}
// Rows as the words that tiles want: as they lie, or in `room`.
template <class T>
static Rows to_words(RowsOf<T> a, int64_t rows, int64_t columns, float *room) {
    if (are_words(a, columns)) return apart(as_words(a), rows, words(columns), room);
    const Output to{room, padded(words(columns))};
    const OutputOf<Multiplied> in_words = numbers(to);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < columns; i += lanes) // zeros past the last one
            store(in_words.data + r * in_words.stride + i, load_some(a.data + r * a.stride + i, columns - i));
    return {to.data, to.stride};
}

} // namespace nbhd::NBHD_ISA
