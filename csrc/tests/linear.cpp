// Linear layers on random shapes against plain loops in double, the same bits at every thread count, and arguments no caller should
// pass.
//
//   linear [cases]
//   exit 77: NBHD_CPU_ISA names a set this machine does not have
#include "layers.h"

namespace {

using namespace layers;

struct Case : Network {
    int64_t input_stride = 0, residual_stride = 0;
    Floats input, scale, residual, output[NBHD_LAYERS], moments, sums;
    Halves half_output[NBHD_LAYERS];
    std::vector<Halves> halves; // of what is given
    nbhd_linear_call call{};

    static int32_t run(const nbhd_linear_call *c) { return nbhd_linear(c); }
    std::vector<Floats *> outputs() { return {&output[0], &output[1], &output[2], &moments, &sums}; }

    // Rows and parameters are float32 or, of a shape that leaves something out, of any dtype; products are bfloat16 where
    // they can be, of most that have 16 bits.
    void make(Random &random, const Shape &s) {
        const auto dtype = [&] { return s.all ? int64_t(NBHD_FLOAT32) : std::max(int64_t(0), between(random, -1, 2)); };
        const int64_t of_rows = dtype(), of_parameters = dtype();
        const bool is_paired = has_pairs() && !s.all && between(random, 0, of_rows || of_parameters ? 3 : 1);
        make(random, s, of_rows, of_parameters, is_paired ? NBHD_BFLOAT16 : NBHD_FLOAT32);
    }
    void make(Random &random, const Shape &s, int64_t dtype, int64_t parameter_dtype, int64_t product_dtype) {
        Network::make(random, s, call);
        const auto maybe = [&] { return s.all || between(random, 0, 1); };
        const bool aliases = !between(random, 0, 19), is_one = n_last() == 1;
        // rows in each other's way, of 16 bits too
        input_stride = aliases ? (s.in + 2047) / 2048 * 2048 : s.in + between(random, 0, 3);
        input = rows_of_input(random, input_stride);
        call.input = input.data(), call.input_stride = input_stride, call.norm_epsilon = epsilon;
        for (int i = 0; i < n_last(); i++) {
            call.output_stride[i] = s.out[i] + between(random, 0, 3);
            output[i].resize(size_t(s.rows * call.output_stride[i])), call.output[i] = output[i].data();
        }
        if (is_one && maybe()) call.gelu = 1;
        if (is_one && maybe()) scale = normal(random, s.out[0]), call.scale = scale.data();
        if (is_one && maybe()) {
            residual_stride = s.out[0] + between(random, 0, 3), residual = normal(random, s.rows * residual_stride);
            call.residual = residual.data(), call.residual_stride = residual_stride;
        }
        if (s.norm && maybe()) moments.resize(size_t(2 * s.rows)), call.moments = moments.data();
        if (s.hidden && maybe()) sums.resize(size_t(s.rows * s.hidden)), call.sums = sums.data();
        round_to(dtype, parameter_dtype);
        if (product_dtype == NBHD_BFLOAT16) pair();
        poison();
    }
    // What is left of the numbers in these types is what the truth is made of.
    void round_to(int64_t dtype, int64_t parameter_dtype) {
        call.dtype = dtype, call.parameter_dtype = parameter_dtype;
        const auto learned = [&](Floats &x) { return given(x, parameter_dtype, halves); };
        const auto layer = [&](Layer &of, nbhd_weight &w) {
            w.source = learned(of.weight), w.bias = learned(of.bias);
            learned(of.panels); // which are floats all the same
        };
        call.input = given(input, dtype, halves), call.residual = given(residual, dtype, halves);
        call.norm_weight = learned(norm_weight), call.norm_bias = learned(norm_bias);
        layer(hidden, call.hidden);
        for (int i = 0; i < n_last(); i++) {
            layer(last[i], call.last[i]);
            if (dtype == NBHD_FLOAT32) continue;
            half_output[i].resize(output[i].size()), call.output[i] = half_output[i].data();
        }
    }
    // Products are of pairs of bfloat16, and panels that are there already as well.
    void pair() {
        call.product_dtype = NBHD_BFLOAT16;
        const auto layer = [&](Layer &of, nbhd_weight &w) {
            of.product_dtype = NBHD_BFLOAT16;
            if (of.panels.empty()) return;
            const size_t steps = size_t(of.in + 1) / 2, all = of.panels.size() / size_t(of.in);
            Halves &h = halves.emplace_back(all * steps * 2);
            for (size_t i = 0; i < of.panels.size(); i++) {
                const size_t column = i % NBHD_PANEL, k = i / NBHD_PANEL % size_t(of.in),
                             panel = i / NBHD_PANEL / size_t(of.in);
                put(&h[((panel * steps + k / 2) * NBHD_PANEL + column) * 2 + k % 2], NBHD_BFLOAT16, of.panels[i]);
            }
            w.panels = h.data();
        };
        layer(hidden, call.hidden);
        for (int i = 0; i < n_last(); i++) layer(last[i], call.last[i]);
    }
    int32_t run() {
        const int32_t status = run(&call);
        if (call.dtype)
            for (int i = 0; i < n_last(); i++)
                for (size_t k = 0; k < output[i].size(); k++) output[i][k] = float(get(&half_output[i][k], call.dtype));
        return status;
    }
    void poison() {
        for (Floats *x : outputs()) std::fill(x->begin(), x->end(), NAN);
        for (Halves &x : half_output) std::fill(x.begin(), x.end(), uint16_t(0xffff)); // NaN of both
    }
    // Of what a row's numbers are rounded to when they are written.
    double rounding() const { return layers::rounding(call.dtype); }
    // What a layer multiplies may be at the middle between two numbers of the products' dtype and fall to either side, where it
    // is computed: all of the others are the same.
    double tolerance() const {
        return 5e-6 + (call.product_dtype == NBHD_BFLOAT16 && (call.norm || shape.hidden) ? 0x1p-7 : 0);
    }
    // The largest deviation, as a multiple of the largest number of the row.
    static double deviation(const Floats &got, int64_t stride, const Matrix &wanted) {
        double most = 0;
        for (int64_t r = 0; r < wanted.rows; r++) {
            double size = 1, off = 0;
            const float *y = got.data() + r * stride;
            for (int64_t o = 0; o < wanted.columns; o++) {
                const double d = std::fabs(y[o] - wanted[r][o]);
                size = std::max(size, std::fabs(wanted[r][o])), off = std::max(off, d == d ? d : INFINITY);
            }
            most = std::max(most, off / size);
            for (int64_t o = wanted.columns; o < stride; o++) // nothing is written between the rows
                if (y[o] == y[o]) return INFINITY;
        }
        return most;
    }
    double deviation() const {
        const Values v = of({input.data(), shape.rows, shape.in, input_stride});
        double most = 0;
        for (int i = 0; i < n_last(); i++) {
            Matrix y = last[i].of(v.last_input);
            for (int64_t r = 0; r < y.rows; r++)
                for (int64_t o = 0; o < y.columns; o++) {
                    if (call.gelu) y[r][o] = gelu(y[r][o]);
                    if (call.scale) y[r][o] *= scale[size_t(o)];
                    if (call.residual) y[r][o] += residual[size_t(r * residual_stride + o)];
                }
            most = std::max(most, deviation(output[i], call.output_stride[i], y) - rounding());
        }
        if (call.sums) most = std::max(most, deviation(sums, shape.hidden, v.sums));
        for (size_t i = 0; i < moments.size(); i++) { // each by itself: a mean and a factor have no common size
            const double wanted = v.moments.x[i], d = std::fabs(moments[i] - wanted) / std::max(1., std::fabs(wanted));
            most = std::max(most, d == d ? d : INFINITY);
        }
        return most;
    }
};

void refuse(int32_t wanted, const char *what, const std::function<void(Case &)> &change, int n_last = 1) {
    layers::refuse<Case>(wanted, what, change, n_last);
}

void hostile() {
    layers::hostile<Case>();
    for (int64_t n : {int64_t(-1), int64_t(INT64_MAX), int64_t(INT64_MIN)}) {
        refuse(NBHD_BAD_SHAPE, "input_stride", [=](Case &c) { c.call.input_stride = n; });
        refuse(NBHD_BAD_SHAPE, "residual_stride", [=](Case &c) { c.call.residual_stride = n; });
        for (int i = 0; i < NBHD_LAYERS; i++)
            refuse(NBHD_BAD_SHAPE, "output_stride", [=](Case &c) { c.call.output_stride[i] = n; }, NBHD_LAYERS);
        refuse(NBHD_UNSUPPORTED, "gelu", [=](Case &c) { c.call.gelu = n; });
    }
    refuse(NBHD_BAD_SHAPE, "inputs that overlap", [](Case &c) { c.call.input_stride = c.call.in - 1; });
    refuse(NBHD_BAD_SHAPE, "outputs that overlap", [](Case &c) { c.call.output_stride[0] = c.call.last[0].out - 1; });
    for (double e : {-1., double(NAN), double(INFINITY)})
        refuse(NBHD_BAD_SHAPE, "epsilon", [=](Case &c) { c.call.norm_epsilon = e; });
    refuse(NBHD_BAD_POINTER, "misaligned", [](Case &c) { c.call.scale = odd(c.call.scale); });
    for (auto member : {&nbhd_linear_call::input, &nbhd_linear_call::residual})
        refuse(NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.*member = odd(c.call.*member); });
    for (auto member : {&nbhd_linear_call::moments, &nbhd_linear_call::sums})
        refuse(NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.*member = odd(c.call.*member); });
    refuse(NBHD_BAD_POINTER, "no input", [](Case &c) { c.call.input = nullptr; });
    for (int i = 0; i < NBHD_LAYERS; i++) {
        refuse(NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.output[i] = odd(c.call.output[i]); }, NBHD_LAYERS);
        refuse(NBHD_BAD_POINTER, "no output", [=](Case &c) { c.call.output[i] = nullptr; }, NBHD_LAYERS);
    }
    const float one = 1;
    refuse(NBHD_UNSUPPORTED, "GELU of several", [](Case &c) { c.call.gelu = 1; }, NBHD_LAYERS);
    refuse(NBHD_UNSUPPORTED, "several scaled", [&](Case &c) { c.call.scale = &one; }, NBHD_LAYERS);
    refuse(NBHD_UNSUPPORTED, "several residuals", [&](Case &c) { c.call.residual = &one; }, NBHD_LAYERS);
    refuse(NBHD_OK, "no source", [](Case &c) { c.last[0].weight[0] = 7, c.call.last[0].source = nullptr; });
    refuse(NBHD_OK, "no rows", [](Case &c) { c.call.rows = 0, c.call.input = nullptr, c.call.output[0] = nullptr; });
}

// 16-bit calls: what they refuse, and numbers at the ends of their range.
void halves() {
    for (int64_t dtype : {int64_t(-1), int64_t(NBHD_FLOAT64), int64_t(4), int64_t(INT64_MAX), int64_t(INT64_MIN)})
        for (auto member : {&nbhd_linear_call::dtype, &nbhd_linear_call::parameter_dtype})
            refuse(NBHD_BAD_DTYPE, "dtype", [=](Case &c) { c.call.*member = dtype; });
    for (int64_t dtype : {NBHD_BFLOAT16, NBHD_FLOAT16}) {
        const auto expect = [=](int32_t wanted, const char *what, const std::function<void(Case &)> &change) {
            Random random(7);
            Case c;
            c.make(random, {5, 7, 9, {33, 0, 0}, true, true}, dtype, dtype, NBHD_FLOAT32);
            change(c);
            const int32_t status = c.run();
            if (status != wanted) printf("%s: status %d, expected %d\n", what, status, wanted), failures++;
            if (status != NBHD_OK && !is_untouched(c.output[0])) printf("%s: wrote all the same\n", what), failures++;
        };
        expect(NBHD_OK, "16 bits", [](Case &) {});
        for (auto member : {&nbhd_linear_call::input, &nbhd_linear_call::residual, &nbhd_linear_call::norm_weight,
                            &nbhd_linear_call::norm_bias})
            expect(NBHD_BAD_POINTER, "odd", [=](Case &c) { c.call.*member = odd(c.call.*member); });
        for (auto member : {&nbhd_weight::source, &nbhd_weight::bias})
            expect(NBHD_BAD_POINTER, "odd", [=](Case &c) { c.call.last[0].*member = odd(c.call.last[0].*member); });
        expect(NBHD_BAD_POINTER, "odd output", [](Case &c) { c.call.output[0] = odd(c.call.output[0]); });
        expect(NBHD_STALE_WEIGHT, "another weight", [](Case &c) { c.last[0].panels[0] *= 2; });
        expect(NBHD_OK, "packed by the call", [](Case &c) { c.call.last[0].panels = nullptr; });
        // Each of the 65,536 numbers through a layer that does nothing: as it was, and NaN as NaN.
        std::vector<uint16_t> input(65536), output(65536);
        for (size_t i = 0; i < input.size(); i++) input[i] = uint16_t(i);
        uint16_t one[4]; // room for any dtype, as far as a compiler can tell
        put(one, dtype, 1);
        for (int packed : {0, 1}) {
            float panel[NBHD_PANEL] = {1};
            nbhd_linear_call c{};
            c.size = sizeof c, c.dtype = c.parameter_dtype = dtype, c.rows = 65536,
            c.in = c.input_stride = c.output_stride[0] = 1;
            c.input = input.data(), c.output[0] = output.data(), c.threads = 2;
            c.last[0] = {1, packed ? panel : nullptr, one, nullptr};
            int32_t status = nbhd_linear(&c);
            for (size_t i = 0; i < input.size() && !status; i++) {
                const double x = get(&input[i], dtype), y = get(&output[i], dtype);
                if (x != x ? y == y : x != y) status = -1, printf("%g is %g, dtype %d\n", x, y, int(dtype));
            }
            failures += status != 0;
        }
        // A weight that is any of them is still what it was packed of.
        for (size_t i = 0; i < input.size(); i++) {
            float panel[NBHD_PANEL] = {float(get(&input[i], dtype))};
            uint16_t x = 0, y;
            nbhd_linear_call c{};
            c.size = sizeof c, c.dtype = c.parameter_dtype = dtype,
            c.rows = c.in = c.input_stride = c.output_stride[0] = 1, c.threads = 1;
            c.input = &x, c.output[0] = &y, c.last[0] = {1, panel, &input[i], nullptr};
            if (const int32_t status = nbhd_linear(&c))
                printf("%g of dtype %d: status %d\n", double(panel[0]), int(dtype), status), failures++;
        }
    }
}

// Products of pairs: what is refused, and numbers at the ends of their range.
void products() {
    for (int64_t dtype : {int64_t(-1), int64_t(NBHD_FLOAT16), int64_t(NBHD_FLOAT64), int64_t(INT64_MAX)})
        refuse(NBHD_BAD_DTYPE, "product_dtype", [=](Case &c) { c.call.product_dtype = dtype; });
    if (!has_pairs()) return refuse(NBHD_UNSUPPORTED, "pairs", [](Case &c) { c.call.product_dtype = NBHD_BFLOAT16; });
    for (int64_t dtype : {NBHD_FLOAT32, NBHD_BFLOAT16, NBHD_FLOAT16}) {
        Random random(9);
        Case c;
        c.make(random, {5, 7, 9, {33, 0, 0}, true, true}, dtype, dtype, NBHD_BFLOAT16);
        if (const int32_t status = c.run()) printf("pairs: status %d\n", status), failures++;
        c.halves.back()[0] ^= 64; // panels of the last layer
        if (const int32_t status = c.run(); status != NBHD_STALE_WEIGHT)
            printf("a packed pair is another: status %d\n", status), failures++;
    }
    // Each bfloat16 through a layer that does nothing: as it was, but that those below a float's normal ones may be nothing; in
    // pairs of them, of which one is multiplied by zero, where neither is infinite or NaN.
    std::vector<uint16_t> input(2 * 65536), output(65536);
    for (size_t i = 0; i < output.size(); i++) input[2 * i] = uint16_t(i), input[2 * i + 1] = uint16_t(i * 40503);
    const uint16_t weight[2] = {0x3f80, 0}; // 1, 0
    for (int64_t in : {1, 2}) {
        nbhd_linear_call c{};
        c.size = sizeof c, c.dtype = c.parameter_dtype = c.product_dtype = NBHD_BFLOAT16, c.rows = 65536, c.in = in,
        c.input_stride = 2, c.output_stride[0] = 1, c.input = input.data(), c.output[0] = output.data(), c.threads = 2;
        c.last[0] = {1, nullptr, weight, nullptr};
        if (const int32_t status = nbhd_linear(&c)) printf("pairs: status %d\n", status), failures++;
        for (size_t i = 0; i < output.size(); i++) {
            const double x = get(&input[2 * i], NBHD_BFLOAT16), y = get(&output[i], NBHD_BFLOAT16),
                         other = in == 2 ? get(&input[2 * i + 1], NBHD_BFLOAT16) : 0;
            const double wanted = std::isfinite(other) ? x : NAN;
            const bool is_right = wanted != wanted ? y != y : y == wanted || (y == 0 && std::fabs(x) < 0x1p-126);
            if (!is_right) printf("%g and %g are %g\n", x, other, y), failures++;
        }
    }
}

// What GELU makes of numbers that have no neighbours.
void extremes() {
    const float one = 1;
    const float inputs[] = {0, -0.f, 1e-30f, -1e-30f, 3, -3, 20, -20, 1e30f, -1e30f, INFINITY, -INFINITY, NAN};
    for (float x : inputs) {
        float y = NAN;
        nbhd_linear_call c{};
        c.size = sizeof c, c.rows = c.in = c.input_stride = c.output_stride[0] = 1, c.input = &x, c.output[0] = &y,
        c.gelu = 1, c.last[0].out = 1, c.last[0].source = &one;
        const int32_t status = nbhd_linear(&c);
        const double wanted = std::isinf(x) ? NAN : gelu(x); // infinity times nothing
        const bool is_right =
            wanted != wanted ? y != y : std::fabs(y - wanted) <= 4e-8 * std::max(1., std::fabs(wanted));
        if (status || !is_right) printf("gelu(%g) = %g, expected %g\n", x, y, wanted), failures++;
    }
}

// Right, and the same bits at any number of threads.
bool is_right(Case &c, long i, double &worst) {
    std::vector<Floats> first;
    for (int64_t threads : {1, 3}) {
        c.poison(), c.call.threads = threads;
        const int32_t status = c.run();
        const double off = status ? INFINITY : threads == 1 ? c.deviation() : 0;
        if (c.tolerance() < 1e-5) worst = std::max(worst, off);
        bool differs = false;
        for (size_t k = 0; k < first.size(); k++) {
            const Floats &now = *c.outputs()[k];
            differs = differs || (now.size() && memcmp(first[k].data(), now.data(), now.size() * sizeof(float)));
        }
        if (off > c.tolerance() || differs) {
            printf(
                "case %ld: off by %g (status %d), %d threads%s; dtypes %d, %d and %d, gelu %d, scale %d, residual %d, ",
                i, off, status, int(threads), differs ? ", other bits than with one" : "", int(c.call.dtype),
                int(c.call.parameter_dtype), int(c.call.product_dtype), int(c.call.gelu), !!c.call.scale,
                !!c.call.residual);
            return c.print(), false;
        }
        for (const Floats *x : c.outputs()) first.push_back(*x);
    }
    return true;
}

// Rows of 16 bits that are words as they lie, but in each other's way, at the ends of what is computed in which manner.
void aliases() {
    for (int64_t rows : {1, 2, 49, 196, 197, 400})
        for (int64_t hidden : {0, 40}) {
            Random random(static_cast<uint64_t>(rows));
            Case c;
            c.make(random, {rows, 2048, hidden, {64, 0, 0}, false, false}, NBHD_BFLOAT16, NBHD_BFLOAT16,
                   has_pairs() ? NBHD_BFLOAT16 : NBHD_FLOAT32);
            c.call.hidden.panels = c.call.last[0].panels = nullptr; // each call packs them
            c.input_stride = c.call.input_stride = 2048;
            double worst = 0;
            if (!is_right(c, -1, worst)) failures++;
        }
}

} // namespace

int main(int argc, char **argv) {
    return run_cases<Case>(argc, argv, is_right, [] { hostile(), halves(), products(), aliases(), extremes(); });
}
