// Gradients of linear layers on random shapes against plain loops in double, the same bits at every thread count, and arguments no
// caller should pass.
//
//   linear_gradients [cases]
//   exit 77: NBHD_CPU_ISA names a set this machine does not have
#include "layers.h"

namespace {

using namespace layers;

// What a gradient should be. `size`: what its numbers come to where their terms do not cancel. Errors are relative to it, or to the
// largest of them.
struct Gradient : Matrix {
    double size;

    Gradient(Matrix m, double size) : Matrix(std::move(m)), size(size) {}
};

double size_of(const std::vector<double> &x) {
    double squares = 0;
    for (double v : x) squares += v * v;
    return std::sqrt(squares / double(x.size()));
}
double largest(const std::vector<double> &x) {
    double most = 0;
    for (double v : x) most = std::max(most, std::fabs(v));
    return most;
}

// As it is multiplied: in the products' dtype.
Matrix multiplied(Matrix m, int64_t product_dtype) {
    for (double &x : m.x) x = rounded(x, product_dtype);
    return m;
}
Gradient multiplied(const Gradient &g, int64_t product_dtype) {
    return {multiplied(static_cast<Matrix>(g), product_dtype), g.size};
}
Gradient times(Gradient g, double factor) {
    for (double &x : g.x) x *= factor;
    g.size *= std::fabs(factor);
    return g;
}

// Of a layer's input, added to `d_x`.
void add_input_gradient(const Layer &l, float factor, const Gradient &d, Gradient &d_x) {
    std::vector<double> weight(l.weight.begin(), l.weight.end());
    for (double &w : weight) w = rounded(double(float(w) * factor), l.product_dtype);
    for (int64_t r = 0; r < d.rows; r++)
        for (int64_t o = 0; o < l.out; o++) add(d[r][o], weight.data() + o * l.in, l.in, d_x[r]);
    d_x.size = std::hypot(d_x.size, std::sqrt(double(l.out)) * d.size * size_of(weight));
}
Gradient weight_gradient(const Gradient &d, const Matrix &x) {
    Gradient g({d.columns, x.columns}, std::sqrt(double(d.rows)) * d.size * size_of(x.x));
    for (int64_t r = 0; r < d.rows; r++)
        for (int64_t o = 0; o < d.columns; o++) add(d[r][o], x[r], x.columns, g[o]);
    return g;
}
Gradient bias_gradient(const Gradient &d) {
    Gradient g({1, d.columns}, std::sqrt(double(d.rows)) * d.size);
    for (int64_t r = 0; r < d.rows; r++) add(1, d[r], d.columns, g[0]);
    return g;
}

struct Case : Network {
    struct Wanted {
        const char *name;
        Gradient truth;
        Floats got;

        double deviation() const {
            double most = 0;
            for (size_t i = 0; i < got.size(); i++) {
                const double d = std::fabs(got[i] - truth.x[i]);
                most = std::max(most, d == d ? d : INFINITY);
            }
            return most / std::max(largest(truth.x), truth.size);
        }
    };
    Floats input, moments, sums, d_output[NBHD_LAYERS], added;
    std::vector<Halves> halves; // of what is given
    Halves d_input;             // of 16 bits
    std::vector<Wanted> wanted; // that of the input is the last
    nbhd_linear_gradients_call call{};

    static int32_t run(const nbhd_linear_gradients_call *c) { return nbhd_linear_gradients(c); }
    int32_t run() {
        for (Floats *x : outputs()) std::fill(x->begin(), x->end(), NAN);
        std::fill(d_input.begin(), d_input.end(), uint16_t(0xffff)); // NaN of both
        const int32_t status = run(&call);
        for (size_t i = 0; i < d_input.size(); i++) wanted.back().got[i] = float(get(&d_input[i], call.dtype));
        return status;
    }
    std::vector<Floats *> outputs() {
        std::vector<Floats *> all;
        for (Wanted &w : wanted) all.push_back(&w.got);
        return all;
    }

    void make(Random &random, const Shape &s) {
        Network::make(random, s, call);
        const int64_t products = has_pairs() && !s.all && between(random, 0, 1) ? NBHD_BFLOAT16 : NBHD_FLOAT32;
        if (products == NBHD_BFLOAT16) pair();
        call.dtype = s.all ? int64_t(NBHD_FLOAT32) : std::max(int64_t(0), between(random, -1, 2));
        const auto maybe = [&] { return s.all || between(random, 0, 1); };
        const int64_t extent = s.all ? 1 : between(random, 0, 9); // everything is wanted; or nothing; or some
        const auto want = [&](const char *name, auto &where, Gradient truth) {
            if (extent > 3 ? !maybe() : !extent) return;
            Floats memory(truth.x.size(), NAN);
            where = memory.data(), wanted.push_back({name, std::move(truth), std::move(memory)});
        };
        input = rows_of_input(random, s.in), call.input = given(input, call.dtype, halves);
        const Matrix x(input.data(), s.rows, s.in, s.in);
        const Values v = of(x);
        if (s.norm) moments = v.moments.floats(), call.moments = moments.data();
        if (s.hidden) sums = v.sums.floats(), call.sums = sums.data();
        call.factor = maybe() ? std::exp(std::normal_distribution<double>()(random)) : 1;
        if (maybe()) call.factor *= -1;
        Gradient d({s.rows, s.last_in()}, 0);
        const Matrix last_input = multiplied(v.last_input, products), hidden_input = multiplied(v.normal, products);
        for (int i = 0; i < n_last(); i++) {
            d_output[i] = normal(random, s.rows * s.out[i]);
            call.d_output[i] = given(d_output[i], call.dtype, halves);
            const Gradient of_output({d_output[i].data(), s.rows, s.out[i], s.out[i]}, 1),
                with_factor = times(of_output, call.factor);
            want("d_weight", call.d_weight[i], weight_gradient(multiplied(with_factor, products), last_input));
            want("d_bias", call.d_bias[i], bias_gradient(with_factor));
            add_input_gradient(last[i], float(call.factor), multiplied(of_output, products), d);
        }
        if (s.hidden) {
            for (size_t i = 0; i < d.x.size(); i++) d.x[i] *= gelu_slope(v.sums.x[i]);
            d = multiplied(d, products);
            want("d_hidden_weight", call.d_hidden_weight, weight_gradient(d, hidden_input));
            want("d_hidden_bias", call.d_hidden_bias, bias_gradient(d));
            Gradient of_hidden({s.rows, s.in}, 0);
            add_input_gradient(hidden, 1, d, of_hidden), d = of_hidden;
        }
        if (s.norm) d = norm_gradient(x, v.moments, d, want);
        if (maybe()) {
            added = normal(random, s.rows * s.in), call.added = given(added, call.dtype, halves);
            for (size_t i = 0; i < added.size(); i++) d.x[i] += added[i];
        }
        want("d_input", call.d_input, d);
        if (call.d_input && call.dtype) d_input.resize(d.x.size()), call.d_input = d_input.data();
    }
    // Products are of pairs of bfloat16.
    void pair() {
        call.product_dtype = NBHD_BFLOAT16;
        const auto layer = [](Layer &of, nbhd_weight &w) {
            of.product_dtype = NBHD_BFLOAT16;
            of.panels.clear(), w.panels = nullptr; // nobody reads them here
        };
        layer(hidden, call.hidden);
        for (int i = 0; i < n_last(); i++) layer(last[i], call.last[i]);
    }
    // What is multiplied may be at the middle between two numbers of the products' dtype, and fall to either side.
    double tolerance(const Wanted &w) const {
        return (call.product_dtype == NBHD_BFLOAT16 ? 0x1p-7 : 5e-6) +
               (&w == &wanted.back() && call.d_input ? rounding(call.dtype) : 0);
    }
    template <class Want>
    Gradient norm_gradient(const Matrix &x, const Matrix &of_rows, Gradient d, Want want) {
        const double n = double(shape.in);
        Matrix normalised = x;
        for (int64_t r = 0; r < x.rows; r++)
            for (int64_t i = 0; i < x.columns; i++) normalised[r][i] = (x[r][i] - of_rows[r][0]) * of_rows[r][1];
        Gradient of_weight({1, shape.in}, std::sqrt(double(x.rows)) * d.size);
        for (size_t i = 0; i < d.x.size(); i++) of_weight.x[i % size_t(shape.in)] += d.x[i] * normalised.x[i];
        want("d_norm_weight", call.d_norm_weight, of_weight);
        want("d_norm_bias", call.d_norm_bias, bias_gradient(d));
        double factors = 0;
        for (int64_t r = 0; r < x.rows; r++) {
            double mean = 0, slope = 0;
            for (int64_t i = 0; i < shape.in; i++) {
                if (!norm_weight.empty()) d[r][i] *= norm_weight[size_t(i)];
                mean += d[r][i] / n, slope += d[r][i] * normalised[r][i] / n;
            }
            for (int64_t i = 0; i < shape.in; i++)
                d[r][i] = (d[r][i] - mean - normalised[r][i] * slope) * of_rows[r][1];
            factors = std::max(factors, of_rows[r][1]);
        }
        d.size *= factors;
        return d;
    }
};

void refuse(int32_t wanted, const char *what, const std::function<void(Case &)> &change, int n_last = 1) {
    layers::refuse<Case>(wanted, what, change, n_last);
}

void hostile() {
    using Call = nbhd_linear_gradients_call;
    layers::hostile<Case>();
    for (double f : {double(NAN), double(INFINITY), -double(INFINITY)})
        refuse(NBHD_UNSUPPORTED, "factor", [=](Case &c) { c.call.factor = f; });
    const auto misaligned = [](auto member) {
        refuse(NBHD_BAD_POINTER, "misaligned", [=](Case &c) { c.call.*member = odd(c.call.*member); });
    };
    const auto needed = [&](auto member) {
        refuse(NBHD_BAD_POINTER, "null", [=](Case &c) { c.call.*member = nullptr; });
        misaligned(member);
    };
    needed(&Call::input), needed(&Call::moments), needed(&Call::sums);
    misaligned(&Call::added), misaligned(&Call::d_input);
    for (auto member : {&Call::d_norm_weight, &Call::d_norm_bias, &Call::d_hidden_weight, &Call::d_hidden_bias})
        misaligned(member);
    for (int64_t dtype : {int64_t(-1), int64_t(NBHD_FLOAT64), int64_t(INT64_MAX)})
        refuse(NBHD_BAD_DTYPE, "dtype", [=](Case &c) { c.call.dtype = dtype; });
    refuse(NBHD_BAD_POINTER, "no source", [](Case &c) { c.call.hidden.source = nullptr; });
    for (int i = 0; i < NBHD_LAYERS; i++) {
        const auto spoil = [i](const char *what, auto how) {
            refuse(NBHD_BAD_POINTER, what, [=](Case &c) { how(c.call, i); }, NBHD_LAYERS);
        };
        spoil("no source", [](Call &c, int i) { c.last[i].source = nullptr; });
        spoil("no gradient", [](Call &c, int i) { c.d_output[i] = nullptr; });
        spoil("misaligned", [](Call &c, int i) { c.d_output[i] = odd(c.d_output[i]); });
        spoil("misaligned", [](Call &c, int i) { c.d_weight[i] = odd(c.d_weight[i]); });
        spoil("misaligned", [](Call &c, int i) { c.d_bias[i] = odd(c.d_bias[i]); });
    }
    for (int64_t dtype : {int64_t(-1), int64_t(NBHD_FLOAT16), int64_t(NBHD_FLOAT64), int64_t(INT64_MAX)})
        refuse(NBHD_BAD_DTYPE, "product_dtype", [=](Case &c) { c.call.product_dtype = dtype; });
    if (!has_pairs()) refuse(NBHD_UNSUPPORTED, "pairs", [](Case &c) { c.call.product_dtype = NBHD_BFLOAT16; });
    refuse(NBHD_BAD_SHAPE, "no rows", [](Case &c) { c.call.rows = 0; });
    refuse(NBHD_OK, "nothing wanted", [](Case &c) {
        c.call.d_input = c.call.d_norm_weight = c.call.d_norm_bias = nullptr;
        c.call.d_hidden_weight = c.call.d_hidden_bias = c.call.d_weight[0] = c.call.d_bias[0] = nullptr;
    });
}

// The slope of GELU at numbers that have no neighbours.
void extremes() {
    const float one = 1;
    for (float x : {0.f, -0.f, 1e-30f, -1e-30f, 3.f, -3.f, 20.f, -20.f, 1e30f, -1e30f, NAN}) {
        float y = NAN;
        nbhd_linear_gradients_call c{};
        c.size = sizeof c, c.rows = c.in = c.hidden.out = c.last[0].out = 1, c.factor = 1;
        c.hidden.source = c.last[0].source = c.input = c.d_output[0] = &one, c.sums = &x, c.d_hidden_bias = &y;
        const int32_t status = nbhd_linear_gradients(&c);
        const double wanted = gelu_slope(x);
        if (status || (wanted != wanted ? y == y : !(std::fabs(y - wanted) <= 1e-7)))
            printf("slope of gelu(%g) = %g, expected %g\n", x, y, wanted), failures++;
    }
}

// Right, and the same bits at any number of threads.
bool is_right(Case &c, long i, double &worst) {
    std::vector<Floats> first;
    for (int64_t threads : {1, 2, 3}) {
        c.call.threads = threads;
        const int32_t status = c.run();
        for (size_t k = 0; k < c.wanted.size(); k++) {
            const Floats &got = c.wanted[k].got;
            const double off = status ? INFINITY : threads == 1 ? c.wanted[k].deviation() : 0;
            const bool differs = threads > 1 && memcmp(first[k].data(), got.data(), got.size() * sizeof(float));
            const double tolerance = c.tolerance(c.wanted[k]);
            if (tolerance < 1e-5) worst = std::max(worst, off);
            if (off > tolerance || differs) {
                printf("case %ld: %s is off by %g (status %d), %d threads%s; dtypes %d, %d, factor %g, added %d, ", i,
                       c.wanted[k].name, off, status, int(threads), differs ? ", other bits than with one" : "",
                       int(c.call.dtype), int(c.call.product_dtype), c.call.factor, !!c.call.added);
                return c.print(), false;
            }
            if (threads == 1) first.push_back(got);
        }
        if (status) return printf("case %ld: status %d; ", i, status), c.print(), false;
    }
    return true;
}

} // namespace

int main(int argc, char **argv) {
    return run_cases<Case>(argc, argv, is_right, [] { hostile(), extremes(); });
}
