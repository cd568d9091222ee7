// Random geometries, dtypes, layouts and thread counts against plain loops in double.
//
//   fuzz [cases = 10000] [seed = 1] [most images = 2] [long: one axis of every map is]
//   exit 77: NBHD_CPU_ISA names a set this machine does not have
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "../src/problem.h"
#include "call.h"

namespace {

using Random = std::mt19937_64;

int64_t between(Random &r, int64_t low, int64_t high) { return low + int64_t(r() % uint64_t(high - low + 1)); }

truth::Case random_case(Random &r, long most_images, bool one_is_long) {
    truth::Case c;
    const int axes = int(between(r, 1, 3)), long_axis = one_is_long ? int(between(r, 3 - axes, 2)) : -1;
    for (int a = 3 - axes; a < 3; a++) {
        truth::Axis &x = c.axis[a];
        const bool is_long = between(r, 0, 9) == 0;
        if (a == long_axis) { // enough for three cuts with vectors of 16 lanes, or less than that
            const int64_t least[] = {3, 24, 100}, most[] = {30, 200, 1600};
            x.length = between(r, least[a], most[a]);
        } else {
            x.length = between(r, 1,
                               axes == 3   ? (is_long ? 20 : 8)
                               : axes == 2 ? (is_long ? 60 : 20)
                               : is_long   ? 400
                                           : 60);
        }
        x.kernel = between(r, 1, std::min<int64_t>(x.length, between(r, 0, 3) ? 7 : x.length));
        x.dilation = between(r, 0, 1) ? 1 : between(r, 1, x.length / x.kernel);
        x.stride = between(r, 0, 2) ? 1 : between(r, 1, x.kernel);
        x.causal = between(r, 0, 3) == 0;
    }
    c.kv_heads = between(r, 1, 3), c.heads = c.kv_heads * (between(r, 0, 2) ? 1 : between(r, 1, 3));
    c.batch = between(r, 1, most_images);
    const int64_t dims[] = {1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 33, 64, 96, 128, 200, 300};
    c.dim = dims[between(r, 0, 17)], c.dim_v = between(r, 0, 1) ? c.dim : dims[between(r, 0, 17)];
    c.scale = std::pow(double(c.dim), -0.5);
    c.bias = between(r, 0, 1), c.d_lse = between(r, 0, 1);
    return c;
}

double work(const truth::Case &c) {
    double w = double(c.batch * c.positions() * c.heads) * double(c.dim + c.dim_v);
    for (const truth::Axis &a : c.axis) w *= double(a.kernel);
    return w;
}

// Largest deviation relative to the largest value of the truth, or to `least`: inputs are of size 1, and a gradient that is a
// difference of larger numbers may vanish (a window of one key).
double deviation(const std::vector<double> &ours, const std::vector<double> &truth, double least) {
    double off = 0, most = least;
    for (size_t i = 0; i < truth.size(); i++) {
        if (!(std::fabs(ours[i] - truth[i]) <= 1e30)) return INFINITY; // NaN: never written
        off = std::max(off, std::fabs(ours[i] - truth[i])), most = std::max(most, std::fabs(truth[i]));
    }
    return off / most;
}

struct Result {
    const char *name;
    std::vector<double> ours;
    const std::vector<double> *truth;
    bool real;       // stays in Real, whatever the tensors are: the log-sum-exp and the bias gradient
    bool many;       // a sum over all queries
    bool difference; // of products of dim_v terms
};

std::vector<Result> attention(Prepared &p, int32_t &status) {
    truth::run(p.c, p.t);
    status = nbhd_forward(&p.call);
    if (!status) status = nbhd_backward(&p.call);
    const truth::Tensors &t = p.t;
    return {{"out", p.out.values(t.out.size()), &t.out, false, false, false},
            {"lse", p.reals(p.lse), &t.lse, true, false, false},
            {"d_query", p.d_query.values(t.d_query.size()), &t.d_query, false, false, true},
            {"d_key", p.d_key.values(t.d_key.size()), &t.d_key, false, false, true},
            {"d_value", p.d_value.values(t.d_value.size()), &t.d_value, false, false, false},
            {"d_rel_pos_bias", p.reals(p.d_bias), &t.d_bias, true, true, true}};
}

// The two halves, each forward and backward. What a half does not name is null.
std::vector<Result> pair(Prepared &p, int32_t &status) {
    truth::Pair &t = p.pair;
    p.weights.set(t.weights), p.d_weights.set(t.d_scores);
    truth::run_pair(p.c, p.t, t);
    const nbhd_tensor none{};
    nbhd_call c = p.call;
    c.value = c.out = c.d_out = c.d_value = none, c.lse = nullptr, c.d_lse = nullptr;
    status = nbhd_scores_backward(&c); // reads d_weights
    Stored scores = p.weights;
    scores.view.data = scores.memory.data(), c.weights = scores.view;
    if (!status) status = nbhd_scores(&c);
    c = p.call;
    c.query = c.key = c.d_query = c.d_key = none, c.lse = nullptr, c.d_lse = nullptr, c.rel_pos_bias = nullptr;
    if (!status) status = nbhd_weighted_sum(&c);
    if (!status) status = nbhd_weighted_sum_backward(&c);
    std::vector<double> ours = scores.values(t.scores.size());
    for (size_t i = 0; i < ours.size(); i++) // slots without a key: minus infinity in both
        if (std::isinf(t.scores[i]) && ours[i] == t.scores[i]) ours[i] = t.scores[i] = 0;
    return {{"scores", ours, &t.scores, false, false, false},
            {"d_query of scores", p.d_query.values(t.d_query.size()), &t.d_query, false, false, false},
            {"d_key of scores", p.d_key.values(t.d_key.size()), &t.d_key, false, false, false},
            {"d_rel_pos_bias of scores", p.reals(p.d_bias), &t.d_bias, true, true, false},
            {"weighted sum", p.out.values(t.out.size()), &t.out, false, false, false},
            {"d_weights", p.d_weights.values(t.d_weights.size()), &t.d_weights, false, false, false},
            {"d_value of weights", p.d_value.values(t.d_value.size()), &t.d_value, false, false, false}};
}

} // namespace

int main(int argc, char **argv) {
    const long cases = argc > 1 ? atol(argv[1]) : 10000;
    Random random(uint64_t(argc > 2 ? atol(argv[2]) : 1));
    const long most_images = argc > 3 ? atol(argv[3]) : 2;
    const bool one_is_long = argc > 4;
    if (!strcmp(nbhd_isa(), "none")) return printf("skipped: this machine has no %s\n", getenv("NBHD_CPU_ISA")), 77;
    const double tolerance[] = {1e-5, 1.2e-2, 1.6e-3, 1e-13}; // by dtype; the sums run in float (double)
    std::map<std::string, std::array<double, 4>> worst;
    for (long i = 0; i < cases; i++) {
        truth::Case c;
        do c = random_case(random, most_images, one_is_long);
        while (work(c) > (one_is_long ? 4e5 : i % 100 ? 5e4 : 1.5e6) * double(most_images));
        const int64_t dtype = between(random, 0, 3);
        Prepared p;
        p.make(c, dtype, random);
        p.call.threads = between(random, 1, 3);
        nbhd::poisons_scratch = i % 2 == 0; // the others find what earlier calls left
        int32_t status;
        for (const Result &r : i % 2 ? pair(p, status) : attention(p, status)) {
            const double allowed =
                (r.real && dtype != NBHD_FLOAT64 ? tolerance[0] : tolerance[dtype]) * (r.many ? 10 : 1);
            const double least = r.difference ? 0.5 * std::sqrt(double(c.dim_v)) : 0.25;
            const double off = status ? INFINITY : deviation(r.ours, *r.truth, least);
            double &most = worst[r.name][size_t(dtype)];
            most = std::max(most, off);
            if (off <= allowed) continue;
            printf("case %ld: %s off by %g (status %d), dtype %d, threads %d, batch %d, heads %d/%d, dim %d/%d, bias "
                   "%d, d_lse %d\n",
                   i, r.name, off, status, int(dtype), int(p.call.threads), int(c.batch), int(c.heads), int(c.kv_heads),
                   int(c.dim), int(c.dim_v), c.bias, c.d_lse);
            for (const truth::Axis &a : c.axis)
                printf("  length %d kernel %d stride %d dilation %d causal %d\n", int(a.length), int(a.kernel),
                       int(a.stride), int(a.dilation), a.causal);
            return 1;
        }
        if (!p.gaps_are_untouched()) return printf("case %ld: written between the heads\n", i), 1;
    }
    printf("%s: %ld cases, worst deviation in float32, bfloat16, float16, float64\n", nbhd_isa(), cases);
    for (const auto &[name, w] : worst) printf("  %-25s %.1e %.1e %.1e %.1e\n", name.c_str(), w[0], w[1], w[2], w[3]);
    return 0;
}
