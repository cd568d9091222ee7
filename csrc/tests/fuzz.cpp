// Random geometries, dtypes, layouts and thread counts against plain loops in double.
//
//   fuzz [cases = 10000] [seed = 1]       exit 77: NBHD_CPU_ISA names a set this machine does not have
#include <cstdio>
#include <cstdlib>

#include "call.h"

namespace {

using Random = std::mt19937_64;

int64_t between(Random &r, int64_t low, int64_t high) { return low + int64_t(r() % uint64_t(high - low + 1)); }

truth::Case random_case(Random &r) {
    truth::Case c;
    const int axes = int(between(r, 1, 3));
    for (int a = 3 - axes; a < 3; a++) {
        truth::Axis &x = c.axis[a];
        const bool is_long = between(r, 0, 9) == 0;
        x.length = between(r, 1, axes == 3 ? (is_long ? 20 : 8) : axes == 2 ? (is_long ? 60 : 20) : is_long ? 400 : 60);
        x.kernel = between(r, 1, std::min<int64_t>(x.length, between(r, 0, 3) ? 7 : x.length));
        x.dilation = between(r, 0, 1) ? 1 : between(r, 1, x.length / x.kernel);
        x.stride = between(r, 0, 2) ? 1 : between(r, 1, x.kernel);
        x.causal = between(r, 0, 3) == 0;
    }
    c.kv_heads = between(r, 1, 3), c.heads = c.kv_heads * (between(r, 0, 2) ? 1 : between(r, 1, 3));
    c.batch = between(r, 1, 2);
    const int64_t dims[] = {1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 33, 64};
    c.dim = dims[between(r, 0, 13)], c.dim_v = between(r, 0, 1) ? c.dim : dims[between(r, 0, 13)];
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

} // namespace

int main(int argc, char **argv) {
    const long cases = argc > 1 ? atol(argv[1]) : 10000;
    Random random(uint64_t(argc > 2 ? atol(argv[2]) : 1));
    if (!strcmp(nbhd_isa(), "none")) return printf("skipped: this machine has no %s\n", getenv("NBHD_CPU_ISA")), 77;
    const double tolerance[] = {1e-5, 1.2e-2, 1.6e-3, 1e-13}; // by dtype; the sums run in float (double)
    const char *names[] = {"out", "lse", "d_query", "d_key", "d_value", "d_rel_pos_bias"};
    double worst[4][6] = {};
    for (long i = 0; i < cases; i++) {
        truth::Case c;
        do c = random_case(random);
        while (work(c) > (i % 100 ? 1e5 : 3e6));
        const int64_t dtype = between(random, 0, 3);
        Prepared p;
        p.make(c, dtype, random);
        truth::run(c, p.t);
        p.call.threads = between(random, 1, 3);
        int32_t status = nbhd_forward(&p.call);
        if (!status) status = nbhd_backward(&p.call);
        const std::vector<double> ours[] = {p.out.values(p.t.out.size()),         p.reals(p.lse),
                                            p.d_query.values(p.t.d_query.size()), p.d_key.values(p.t.d_key.size()),
                                            p.d_value.values(p.t.d_value.size()), p.reals(p.d_bias)};
        const std::vector<double> *truths[] = {&p.t.out, &p.t.lse, &p.t.d_query, &p.t.d_key, &p.t.d_value, &p.t.d_bias};
        for (int k = 0; k < 6; k++) {
            // the log-sum-exp and the bias gradient, a sum over all queries, stay in Real whatever the tensors are
            const double real = dtype == NBHD_FLOAT64 ? tolerance[3] : tolerance[0];
            const double allowed = k == 1 ? real : k == 5 ? 10 * real : tolerance[dtype];
            const bool difference = k == 2 || k == 3 || k == 5; // of products of dim_v terms
            const double least = difference ? 0.25 * std::sqrt(double(c.dim_v)) : 0.25;
            const double off = status ? INFINITY : deviation(ours[k], *truths[k], least);
            worst[dtype][k] = std::max(worst[dtype][k], off);
            if (off <= allowed) continue;
            printf("case %ld: %s off by %g (status %d), dtype %d, threads %d, batch %d, heads %d/%d, dim %d/%d, bias "
                   "%d, d_lse %d\n",
                   i, names[k], off, status, int(dtype), int(p.call.threads), int(c.batch), int(c.heads),
                   int(c.kv_heads), int(c.dim), int(c.dim_v), c.bias, c.d_lse);
            for (const truth::Axis &a : c.axis)
                printf("  length %d kernel %d stride %d dilation %d causal %d\n", int(a.length), int(a.kernel),
                       int(a.stride), int(a.dilation), a.causal);
            return 1;
        }
    }
    printf("%s: %ld cases\n", nbhd_isa(), cases);
    for (int d = 0; d < 4; d++)
        printf("  dtype %d worst: out %.1e lse %.1e dq %.1e dk %.1e dv %.1e db %.1e\n", d, worst[d][0], worst[d][1],
               worst[d][2], worst[d][3], worst[d][4], worst[d][5]);
    return 0;
}
