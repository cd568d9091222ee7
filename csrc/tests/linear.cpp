// Linear layers on random shapes against plain loops in double, the same bits at every thread count, and arguments no caller should
// pass.
//
//   linear [cases]
//   exit 77: NBHD_CPU_ISA names a set this machine does not have
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "../include/nbhd.h"
#include "../src/problem.h"

namespace {

using Random = std::mt19937_64;
using Floats = std::vector<float>;

int64_t between(Random &random, int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
}

Floats normal(Random &random, int64_t n, double size = 1) {
    std::normal_distribution<double> d(0, size);
    Floats x(static_cast<size_t>(n));
    for (float &v : x) v = float(d(random));
    return x;
}

// A layer, its weight exactly as large as it is: what lies beyond is the sanitizer's to find.
struct Layer {
    int64_t in = 0, out = 0;
    Floats weight, panels, bias;

    void make(Random &random, int64_t inputs, int64_t outputs) {
        in = inputs, out = outputs, weight = normal(random, in * out, 1 / std::sqrt(double(in)));
        bias = between(random, 0, 2) ? normal(random, out) : Floats{};
        panels.assign(size_t((out + NBHD_PANEL - 1) / NBHD_PANEL * in * NBHD_PANEL), 0);
        for (int64_t o = 0; o < out; o++)
            for (int64_t i = 0; i < in; i++)
                panels[size_t((o / NBHD_PANEL * in + i) * NBHD_PANEL + o % NBHD_PANEL)] = weight[size_t(o * in + i)];
    }
    nbhd_weight view() const { return {out, panels.data(), weight.data(), bias.empty() ? nullptr : bias.data()}; }
    std::vector<double> of(const std::vector<double> &x) const {
        std::vector<double> y(static_cast<size_t>(out));
        for (int64_t o = 0; o < out; o++) {
            double sum = bias.empty() ? 0 : bias[size_t(o)];
            for (int64_t i = 0; i < in; i++) sum += x[size_t(i)] * weight[size_t(o * in + i)];
            y[size_t(o)] = sum;
        }
        return y;
    }
};

double gelu(double x) { return x * std::erfc(-x / std::sqrt(2.)) / 2; }

struct Case {
    int64_t rows, input_stride, output_stride, residual_stride;
    Layer hidden, last;
    Floats input, norm_weight, norm_bias, scale, residual, output;
    nbhd_linear_call call{};

    void make(Random &random) {
        const int64_t in = between(random, 1, between(random, 0, 9) ? 90 : 600),
                      out = between(random, 1, between(random, 0, 9) ? 90 : 600);
        rows = between(random, 1, between(random, 0, 9) ? 40 : 400);
        const bool has_hidden = between(random, 0, 1), aliases = !between(random, 0, 19);
        if (has_hidden) hidden.make(random, in, between(random, 1, between(random, 0, 9) ? 90 : 600));
        last.make(random, has_hidden ? hidden.out : in, out);
        input_stride = aliases ? (in + 1023) / 1024 * 1024 : in + between(random, 0, 3);
        output_stride = out + between(random, 0, 3), residual_stride = out + between(random, 0, 3);
        input = normal(random, rows * input_stride), output.assign(size_t(rows * output_stride), NAN);
        call.size = sizeof call, call.rows = rows, call.in = in;
        call.input = input.data(), call.input_stride = input_stride;
        call.norm = between(random, 0, 1), call.norm_epsilon = 1e-5;
        if (between(random, 0, 1)) norm_weight = normal(random, in), call.norm_weight = norm_weight.data();
        if (between(random, 0, 1)) norm_bias = normal(random, in), call.norm_bias = norm_bias.data();
        if (has_hidden) call.hidden = hidden.view();
        call.last = last.view(), call.gelu = between(random, 0, 1);
        if (between(random, 0, 1)) scale = normal(random, out), call.scale = scale.data();
        if (between(random, 0, 1)) {
            residual = normal(random, rows * residual_stride);
            call.residual = residual.data(), call.residual_stride = residual_stride;
        }
        call.output = output.data(), call.output_stride = output_stride;
    }
    // The largest deviation, as a multiple of the largest number of the row.
    double deviation() const {
        double most = 0;
        for (int64_t r = 0; r < rows; r++) {
            std::vector<double> x(static_cast<size_t>(call.in));
            for (int64_t i = 0; i < call.in; i++) x[size_t(i)] = input[size_t(r * input_stride + i)];
            if (call.norm) {
                double mean = 0, variance = 0;
                for (double v : x) mean += v / double(call.in);
                for (double v : x) variance += (v - mean) * (v - mean) / double(call.in);
                for (size_t i = 0; i < x.size(); i++)
                    x[i] = (x[i] - mean) / std::sqrt(variance + call.norm_epsilon) *
                               (norm_weight.empty() ? 1 : norm_weight[i]) +
                           (norm_bias.empty() ? 0 : norm_bias[i]);
            }
            if (call.hidden.out) {
                x = hidden.of(x);
                for (double &v : x) v = gelu(v);
            }
            x = last.of(x);
            double size = 1, off = 0;
            for (size_t o = 0; o < x.size(); o++) {
                if (call.gelu) x[o] = gelu(x[o]);
                if (!scale.empty()) x[o] *= scale[o];
                if (!residual.empty()) x[o] += residual[size_t(r * residual_stride) + o];
                const double d = std::fabs(output[size_t(r * output_stride) + o] - x[o]);
                size = std::max(size, std::fabs(x[o])), off = std::max(off, d == d ? d : INFINITY);
            }
            most = std::max(most, off / size);
            for (int64_t o = call.last.out; o < output_stride; o++) // nothing is written between the rows
                if (output[size_t(r * output_stride + o)] == output[size_t(r * output_stride + o)]) return INFINITY;
        }
        return most;
    }
};

int failures = 0;

// A call with one thing changed.
void refuse(int32_t wanted, const char *what, const std::function<void(Case &)> &change) {
    Random random(5);
    Case c;
    do {
        c = Case{};
        c.make(random);
    } while (!c.call.hidden.out || !c.call.norm || !c.call.residual || !c.call.scale || !c.call.norm_weight ||
             !c.call.last.bias);
    change(c);
    const int32_t got = nbhd_linear(&c.call);
    if (got != wanted)
        printf("%s: status %d (%s), expected %d\n", what, got, nbhd_status_text(got), wanted), failures++;
    if (wanted == NBHD_OK) return;
    for (float v : c.output)
        if (v == v) {
            printf("%s: wrote all the same\n", what), failures++;
            return;
        }
}

void hostile() {
    if (nbhd_linear(nullptr) != NBHD_BAD_STRUCT) printf("null is taken\n"), failures++;
    const int64_t huge = INT64_MAX, least = INT64_MIN;
    for (int64_t n : {int64_t(0), int64_t(8), int64_t(sizeof(nbhd_linear_call)) - 8, huge, least})
        refuse(NBHD_BAD_STRUCT, "size", [=](Case &c) { c.call.size = n; });
    for (int64_t n : {int64_t(-1), huge, least}) {
        refuse(NBHD_BAD_SHAPE, "rows", [=](Case &c) { c.call.rows = n; });
        refuse(NBHD_BAD_SHAPE, "in", [=](Case &c) { c.call.in = n; });
        refuse(NBHD_BAD_SHAPE, "hidden", [=](Case &c) { c.call.hidden.out = n; });
        refuse(NBHD_BAD_SHAPE, "out", [=](Case &c) { c.call.last.out = n; });
        refuse(NBHD_BAD_SHAPE, "input_stride", [=](Case &c) { c.call.input_stride = n; });
        refuse(NBHD_BAD_SHAPE, "output_stride", [=](Case &c) { c.call.output_stride = n; });
        refuse(NBHD_BAD_SHAPE, "residual_stride", [=](Case &c) { c.call.residual_stride = n; });
        refuse(NBHD_UNSUPPORTED, "norm", [=](Case &c) { c.call.norm = n; });
        refuse(NBHD_UNSUPPORTED, "gelu", [=](Case &c) { c.call.gelu = n; });
    }
    refuse(NBHD_BAD_SHAPE, "no inputs", [](Case &c) { c.call.in = 0; });
    refuse(NBHD_BAD_SHAPE, "no outputs", [](Case &c) { c.call.last.out = 0; });
    refuse(NBHD_BAD_SHAPE, "rows that overlap", [](Case &c) { c.call.output_stride = c.call.last.out - 1; });
    for (double e : {-1., double(NAN), double(INFINITY)})
        refuse(NBHD_BAD_SHAPE, "epsilon", [=](Case &c) { c.call.norm_epsilon = e; });
    const auto odd = [](const float *p) {
        return reinterpret_cast<const float *>(reinterpret_cast<const char *>(p) + 1);
    };
    for (auto member : {&nbhd_linear_call::input, &nbhd_linear_call::norm_weight, &nbhd_linear_call::scale,
                        &nbhd_linear_call::residual})
        refuse(NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.*member = odd(c.call.*member); });
    for (auto member : {&nbhd_weight::panels, &nbhd_weight::source, &nbhd_weight::bias})
        refuse(NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.last.*member = odd(c.call.last.*member); });
    refuse(NBHD_BAD_POINTER, "no input", [](Case &c) { c.call.input = nullptr; });
    refuse(NBHD_BAD_POINTER, "no weight", [](Case &c) { c.call.hidden.panels = nullptr; });
    refuse(NBHD_BAD_POINTER, "no output", [](Case &c) { c.call.output = nullptr; });
    refuse(NBHD_STALE_WEIGHT, "another weight", [](Case &c) {
        for (float &v : c.last.weight) v *= 2;
    });
    refuse(NBHD_STALE_WEIGHT, "a first number", [](Case &c) { c.hidden.weight[0] = NAN; });
    refuse(NBHD_OK, "no source", [](Case &c) { c.last.weight[0] = 7, c.call.last.source = nullptr; });
    refuse(NBHD_OK, "NaN is NaN", [](Case &c) { c.last.weight[0] = c.last.panels[0] = NAN; });
    refuse(NBHD_OK, "threads", [](Case &c) { c.call.threads = INT64_MIN; });
    struct {
        nbhd_linear_call call;
        int64_t future;
    } later{};
    refuse(NBHD_OK, "a newer caller", [&](Case &c) {
        later.call = c.call, later.call.size = sizeof later;
        if (nbhd_linear(&later.call) != NBHD_OK) printf("a newer caller\n"), failures++;
        later.future = 1;
        if (nbhd_linear(&later.call) != NBHD_UNSUPPORTED)
            printf("a newer caller that wants something new\n"), failures++;
    });
    refuse(NBHD_OK, "no rows", [](Case &c) { c.call.rows = 0, c.call.input = nullptr, c.call.output = nullptr; });
}

// What GELU makes of numbers that have no neighbours.
void extremes() {
    Layer one;
    Random random(3);
    one.make(random, 1, 1);
    one.weight[0] = one.panels[0] = 1, one.bias.clear();
    const float inputs[] = {0, -0.f, 1e-30f, -1e-30f, 3, -3, 20, -20, 1e30f, -1e30f, INFINITY, -INFINITY, NAN};
    for (float x : inputs) {
        float y = NAN;
        nbhd_linear_call c{};
        c.size = sizeof c, c.rows = c.in = c.input_stride = c.output_stride = 1, c.input = &x, c.output = &y,
        c.gelu = 1;
        c.last = one.view();
        const int32_t status = nbhd_linear(&c);
        const double wanted = x == -INFINITY ? 0 : gelu(x);
        const bool is_right = wanted != wanted     ? y != y
                              : std::isinf(wanted) ? y == float(wanted)
                                                   : std::fabs(y - wanted) <= 4e-8 * std::max(1., std::fabs(wanted));
        if (status || !is_right) printf("gelu(%g) = %g, expected %g\n", x, y, wanted), failures++;
    }
}

} // namespace

int main(int argc, char **argv) {
    if (!strcmp(nbhd_isa(), "none")) return printf("skipped: this machine has no %s\n", getenv("NBHD_CPU_ISA")), 77;
    const long cases = argc > 1 ? atol(argv[1]) : 2000;
    Random random(1);
    double worst = 0;
    for (long i = 0; i < cases; i++) {
        Case c;
        c.make(random);
        nbhd::poisons_scratch = i % 2 == 0;
        Floats first;
        for (int64_t threads : {1, 3}) {
            std::fill(c.output.begin(), c.output.end(), NAN);
            c.call.threads = threads;
            const int32_t status = nbhd_linear(&c.call);
            const double off = status ? INFINITY : c.deviation();
            worst = std::max(worst, off);
            const bool differs = threads > 1 && memcmp(first.data(), c.output.data(), first.size() * sizeof(float));
            if (off > 5e-6 || differs) {
                printf("case %ld: off by %g (status %d), %d threads%s; rows %d, in %d, hidden %d, out %d, norm %d, "
                       "gelu %d\n",
                       i, off, status, int(threads), differs ? ", other bits than with one" : "", int(c.rows),
                       int(c.call.in), int(c.call.hidden.out), int(c.call.last.out), int(c.call.norm),
                       int(c.call.gelu));
                return 1;
            }
            first = c.output;
        }
    }
    hostile();
    extremes();
    printf("%s: %ld cases, worst deviation %.1e\n", nbhd_isa(), cases, worst);
    return failures != 0;
}
