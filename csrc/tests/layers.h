// Linear layers on random shapes, and what they come to as plain loops in double: what the tests of both calls begin with.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "../include/nbhd.h"
#include "../src/problem.h"
#include "elements.h"

namespace layers {

using Random = std::mt19937_64;
using Floats = std::vector<float>; // exactly as large as what it is: what lies beyond is the sanitizer's to find
using Halves = std::vector<uint16_t>;

inline int64_t between(Random &random, int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
}
inline Floats normal(Random &random, int64_t n, double size = 1) {
    std::normal_distribution<double> d(0, size);
    Floats x(static_cast<size_t>(n));
    for (float &v : x) v = float(d(random));
    return x;
}
inline const float *or_null(const Floats &x) { return x.empty() ? nullptr : x.data(); }
inline bool is_untouched(const Floats &x) {
    return std::all_of(x.begin(), x.end(), [](float v) { return v != v; });
}

// Whether products of bfloat16 are to be had.
inline bool has_pairs() { return !strcmp(nbhd_isa(), "avx512bf16"); }

// What writing it in that dtype does to a number.
inline double rounding(int64_t dtype) { return dtype == NBHD_BFLOAT16 ? 0x1p-8 : dtype == NBHD_FLOAT16 ? 0x1p-11 : 0; }
// The numbers in that dtype, which `x` has afterwards; null if it has none. Those of 16 bits are in `halves`.
inline const void *given(Floats &x, int64_t dtype, std::vector<Halves> &halves) {
    if (x.empty()) return nullptr;
    if (dtype == NBHD_FLOAT32) return x.data();
    Halves &h = halves.emplace_back(x.size());
    for (size_t i = 0; i < x.size(); i++) put(&h[i], dtype, x[i]), x[i] = float(get(&h[i], dtype));
    return h.data();
}

constexpr double epsilon = 1e-5;
inline double gelu(double x) { return x * std::erfc(-x / std::sqrt(2.)) / 2; }
inline double gelu_slope(double x) {
    return std::erfc(-x / std::sqrt(2.)) / 2 + x * std::exp(-x * x / 2) * 0.3989422804014327;
}

struct Matrix {
    int64_t rows, columns;
    std::vector<double> x;

    Matrix(int64_t rows, int64_t columns) : rows(rows), columns(columns), x(size_t(rows * columns)) {}
    Matrix(const float *from, int64_t rows, int64_t columns, int64_t stride) : Matrix(rows, columns) {
        for (int64_t r = 0; r < rows; r++) std::copy_n(from + r * stride, columns, (*this)[r]);
    }
    double *operator[](int64_t row) { return x.data() + row * columns; }
    const double *operator[](int64_t row) const { return x.data() + row * columns; }
    Floats floats() const { return {x.begin(), x.end()}; }
};

inline void add(double factor, const double *x, int64_t n, double *to) {
    for (int64_t i = 0; i < n; i++) to[i] += factor * x[i];
}

struct Layer {
    int64_t in = 0, out = 0;
    int64_t product_dtype = NBHD_FLOAT32; // what inputs and weights are rounded to
    Floats weight, panels, bias;          // without panels: the call packs the weight

    void make(Random &random, int64_t inputs, int64_t outputs, bool all) {
        in = inputs, out = outputs, weight = normal(random, in * out, 1 / std::sqrt(double(in)));
        if (all || between(random, 0, 2)) bias = normal(random, out);
        if (!all && between(random, 0, 1)) return;
        panels.assign(size_t((out + NBHD_PANEL - 1) / NBHD_PANEL * in * NBHD_PANEL), 0);
        for (int64_t o = 0; o < out; o++)
            for (int64_t i = 0; i < in; i++)
                panels[size_t((o / NBHD_PANEL * in + i) * NBHD_PANEL + o % NBHD_PANEL)] = weight[size_t(o * in + i)];
    }
    nbhd_weight view() const { return {out, or_null(panels), or_null(weight), or_null(bias)}; }
    Matrix of(const Matrix &x) const {
        Matrix y(x.rows, out), transposed(in, out);
        for (int64_t o = 0; o < out; o++)
            for (int64_t i = 0; i < in; i++) transposed[i][o] = rounded(weight[size_t(o * in + i)], product_dtype);
        for (int64_t r = 0; r < x.rows; r++) {
            std::copy(bias.begin(), bias.end(), y[r]);
            for (int64_t i = 0; i < in; i++) add(rounded(x[r][i], product_dtype), transposed[i], out, y[r]);
        }
        return y;
    }
};

struct Shape {
    int64_t rows, in, hidden, out[NBHD_LAYERS];
    bool norm, all; // all: whatever may be left out is there

    int64_t last_in() const { return hidden ? hidden : in; }
    int64_t products() const { return rows * (in * hidden + last_in() * (out[0] + out[1] + out[2])); }
};

// Most are small. Some have rows that are cut into several slices, or of a length at which rows are in each other's way.
inline Shape draw(Random &random) {
    const int64_t kind = between(random, 0, 99);
    Shape s{between(random, 1, kind < 2 ? 15000 : kind < 20 ? 2500 : kind < 30 ? 400 : 40), 1, 0, {}, false, false};
    s.norm = between(random, 0, 1);
    const int64_t has_hidden = between(random, 0, 1), n_last = has_hidden ? 1 : between(random, 1, NBHD_LAYERS);
    const auto width = [&] {
        const int64_t what = between(random, 0, 19);
        return what ? between(random, 1, what < 3 ? 600 : 90) : 1024 * between(random, 1, 2);
    };
    do {
        s.in = width(), s.hidden = has_hidden ? width() : 0;
        for (int64_t i = 0; i < n_last; i++) s.out[i] = width();
    } while (s.products() > int64_t(1) << 24); // which bounds what a case costs
    return s;
}

// What a call is made of and both calls have.
struct Network {
    Shape shape{};
    Floats norm_weight, norm_bias;
    Layer hidden, last[NBHD_LAYERS];

    int n_last() const {
        return int(std::count_if(shape.out, shape.out + NBHD_LAYERS, [](int64_t n) { return n; }));
    }
    // Two or three numbers may be all but equal; normalised, they would be what was rounded.
    Floats rows_of_input(Random &random, int64_t stride) const {
        Floats x = normal(random, shape.rows * stride);
        if (shape.norm && shape.in < 4)
            for (int64_t i = 0; i < int64_t(x.size()); i++) x[size_t(i)] += float(8 * (i % stride));
        return x;
    }
    template <class Call>
    void make(Random &random, const Shape &s, Call &call) {
        shape = s, call.size = sizeof call, call.rows = s.rows, call.in = s.in, call.norm = s.norm;
        if (s.all || between(random, 0, 1)) norm_weight = normal(random, s.in);
        if (s.all || between(random, 0, 1)) norm_bias = normal(random, s.in);
        call.norm_weight = or_null(norm_weight), call.norm_bias = or_null(norm_bias);
        if (s.hidden) hidden.make(random, s.in, s.hidden, s.all), call.hidden = hidden.view();
        for (int i = 0; i < n_last(); i++)
            last[i].make(random, s.last_in(), s.out[i], s.all), call.last[i] = last[i].view();
    }

    struct Values {
        Matrix moments, normal, sums, last_input;
    };
    Values of(const Matrix &input) const {
        Values v{{input.rows, 2}, input, {input.rows, 0}, {0, 0}};
        for (int64_t r = 0; r < input.rows && shape.norm; r++) {
            const double *x = input[r], n = double(shape.in);
            double mean = 0, variance = 0;
            for (int64_t i = 0; i < shape.in; i++) mean += x[i] / n;
            for (int64_t i = 0; i < shape.in; i++) variance += (x[i] - mean) * (x[i] - mean) / n;
            v.moments[r][0] = mean, v.moments[r][1] = 1 / std::sqrt(variance + epsilon);
            for (int64_t i = 0; i < shape.in; i++) {
                double &y = v.normal[r][i];
                y = (x[i] - mean) * v.moments[r][1];
                if (!norm_weight.empty()) y *= norm_weight[size_t(i)];
                if (!norm_bias.empty()) y += norm_bias[size_t(i)];
            }
        }
        v.last_input = v.normal;
        if (shape.hidden) {
            v.last_input = v.sums = hidden.of(v.normal);
            for (double &x : v.last_input.x) x = gelu(x);
        }
        return v;
    }
    void print() const {
        printf("rows %d, in %d, hidden %d, out %d %d %d, norm %d", int(shape.rows), int(shape.in), int(shape.hidden),
               int(shape.out[0]), int(shape.out[1]), int(shape.out[2]), shape.norm);
    }
};

inline int failures = 0;

// A call of a small case that has all there is to have, with one thing changed.
template <class Case>
void refuse(int32_t wanted, const char *what, const std::function<void(Case &)> &change, int n_last = 1) {
    Random random(5);
    Shape s{5, 7, n_last > 1 ? 0 : 9, {}, true, true};
    for (int i = 0; i < n_last; i++) s.out[i] = 33 - i;
    Case c;
    c.make(random, s);
    change(c);
    const int32_t got = Case::run(&c.call);
    if (got != wanted)
        printf("%s: status %d (%s), expected %d\n", what, got, nbhd_status_text(got), wanted), failures++;
    if (wanted == NBHD_OK) return;
    for (const Floats *x : c.outputs())
        if (!is_untouched(*x)) {
            printf("%s: wrote all the same\n", what), failures++;
            return;
        }
}

template <class T>
T *odd(T *p) {
    return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(p) + 1);
}

// What both calls refuse.
template <class Case>
void hostile() {
    using Call = decltype(Case::call);
    const auto refuse = [](int32_t wanted, const char *what, const std::function<void(Case &)> &change,
                           int n_last = 1) { layers::refuse<Case>(wanted, what, change, n_last); };
    const int64_t huge = INT64_MAX, least = INT64_MIN, too_wide = (int64_t(1) << 24) + 1;
    for (int64_t n : {int64_t(0), int64_t(8), int64_t(sizeof(Call)) - 8, int64_t(4104), huge, least})
        refuse(NBHD_BAD_STRUCT, "size", [=](Case &c) { c.call.size = n; });
    for (int64_t n : {int64_t(-1), huge, least}) {
        refuse(NBHD_BAD_SHAPE, "rows", [=](Case &c) { c.call.rows = n; });
        refuse(NBHD_UNSUPPORTED, "norm", [=](Case &c) { c.call.norm = n; });
    }
    for (int64_t n : {int64_t(-1), too_wide, huge, least}) {
        refuse(NBHD_BAD_SHAPE, "in", [=](Case &c) { c.call.in = n; });
        refuse(NBHD_BAD_SHAPE, "hidden", [=](Case &c) { c.call.hidden.out = n; });
        for (int i = 0; i < NBHD_LAYERS; i++)
            refuse(NBHD_BAD_SHAPE, "out", [=](Case &c) { c.call.last[i].out = n; }, NBHD_LAYERS);
    }
    refuse(NBHD_UNSUPPORTED, "norm", [](Case &c) { c.call.norm = 2; });
    refuse(NBHD_BAD_SHAPE, "no inputs", [](Case &c) { c.call.in = 0; });
    refuse(NBHD_BAD_SHAPE, "no outputs", [](Case &c) { c.call.last[0].out = 0; });
    for (int i : {0, 1}) refuse(NBHD_BAD_SHAPE, "a gap", [=](Case &c) { c.call.last[i].out = 0; }, NBHD_LAYERS);
    refuse(NBHD_BAD_SHAPE, "rows past all memory", [](Case &c) { c.call.rows = int64_t(1) << 48; });
    refuse(NBHD_UNSUPPORTED, "more than one after a hidden layer", [](Case &c) { c.call.last[1] = c.call.last[0]; });
    for (auto member : {&Call::norm_weight, &Call::norm_bias})
        refuse(NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.*member = odd(c.call.*member); });
    const auto misaligned = [&](auto member) {
        refuse(NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.hidden.*member = odd(c.call.hidden.*member); });
        for (int i = 0; i < NBHD_LAYERS; i++)
            refuse(
                NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.last[i].*member = odd(c.call.last[i].*member); },
                NBHD_LAYERS);
    };
    misaligned(&nbhd_weight::panels), misaligned(&nbhd_weight::source), misaligned(&nbhd_weight::bias);
    refuse(NBHD_BAD_POINTER, "no weight",
           [](Case &c) { c.call.hidden.panels = nullptr, c.call.hidden.source = nullptr; });
    for (int i = 0; i < NBHD_LAYERS; i++) {
        refuse(
            NBHD_BAD_POINTER, "no weight",
            [=](Case &c) { c.call.last[i].panels = nullptr, c.call.last[i].source = nullptr; }, NBHD_LAYERS);
        refuse(
            NBHD_STALE_WEIGHT, "another weight",
            [=](Case &c) {
                for (float &v : c.last[i].weight) v *= 2;
            },
            NBHD_LAYERS);
    }
    refuse(NBHD_STALE_WEIGHT, "a first number", [](Case &c) { c.hidden.weight[0] = NAN; });
    refuse(NBHD_OK, "NaN is NaN", [](Case &c) { c.last[0].weight[0] = c.last[0].panels[0] = NAN; });
    refuse(NBHD_OK, "not packed", [](Case &c) { c.last[0].weight[0] = 7, c.call.last[0].panels = nullptr; });
    refuse(NBHD_OK, "threads", [](Case &c) { c.call.threads = INT64_MIN; });
    refuse(NBHD_OK, "a newer caller", [](Case &c) {
        struct {
            Call call;
            int64_t future;
        } later{c.call, 0};
        later.call.size = sizeof later;
        if (Case::run(&later.call) != NBHD_OK) printf("a newer caller\n"), failures++;
        later.future = 1;
        if (Case::run(&later.call) != NBHD_UNSUPPORTED) printf("a newer caller that wants something new\n"), failures++;
    });
    if (Case::run(nullptr) != NBHD_BAD_STRUCT) printf("null is taken\n"), failures++;
}

// A test of random cases, and then of what there is besides. A case tells what is wrong with it itself, and keeps the worst deviation.
template <class Case>
int run_cases(int argc, char **argv, bool (*is_right)(Case &c, long i, double &worst), void (*besides)()) {
    if (!strcmp(nbhd_isa(), "none")) return printf("skipped: this machine has no %s\n", getenv("NBHD_CPU_ISA")), 77;
    const long cases = argc > 1 ? atol(argv[1]) : 2000;
    Random random(1);
    double worst = 0;
    for (long i = 0; i < cases; i++) {
        Case c;
        c.make(random, draw(random));
        nbhd::poisons_scratch = i % 2 == 0;
        if (!is_right(c, i, worst)) return 1;
    }
    besides();
    printf("%s: %ld cases, worst deviation %.1e\n", nbhd_isa(), cases, worst);
    return failures != 0;
}

} // namespace layers
