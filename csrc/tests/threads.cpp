// The same bits at every thread count and in every run, and several calls at once.
//
//   threads [few: two dtypes, and one and three threads] [no-fork]
//   exit 77: NBHD_CPU_ISA names a set this machine does not have
#include <cstdio>
#include <thread>
#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "call.h"

namespace {

struct Result {
    std::vector<unsigned char> out, lse, d_query, d_key, d_value, d_bias, scores, d_weights;
    bool operator==(const Result &) const = default;
};

Result run(Prepared &p, int64_t threads) {
    p.call.threads = threads;
    if (nbhd_forward(&p.call) || nbhd_backward(&p.call)) return {};
    return {p.out.memory, p.lse, p.d_query.memory, p.d_key.memory, p.d_value.memory, p.d_bias, {}, {}};
}

// The unfused pair, with weights and their gradients as given.
Result run_pair(Prepared p, int64_t threads) {
    const std::vector<unsigned char> given = p.weights.memory, d_given = p.d_weights.memory;
    const nbhd_tensor none{};
    p.point_to_own_memory(), p.call.threads = threads;
    nbhd_call c = p.call;
    c.value = c.out = c.d_out = c.d_value = none, c.lse = nullptr, c.d_lse = nullptr;
    if (nbhd_scores_backward(&c) || nbhd_scores(&c)) return {};
    Result r{{}, {}, p.d_query.memory, p.d_key.memory, {}, p.d_bias, p.weights.memory, {}};
    p.weights.memory = given;
    c = p.call;
    c.query = c.key = c.d_query = c.d_key = none, c.lse = nullptr, c.d_lse = nullptr, c.rel_pos_bias = nullptr;
    if (nbhd_weighted_sum(&c) || nbhd_weighted_sum_backward(&c)) return {};
    r.out = p.out.memory, r.d_value = p.d_value.memory, r.d_weights = p.d_weights.memory;
    return r;
}

} // namespace

int main(int argc, char **argv) {
    if (!strcmp(nbhd_isa(), "none")) return 77;
    const auto asked = [&](const char *what) {
        for (int i = 1; i < argc; i++)
            if (!strcmp(argv[i], what)) return true;
        return false;
    };
    const bool few = asked("few");
    const std::vector<int64_t> counts = few ? std::vector<int64_t>{1, 3} : std::vector<int64_t>{1, 2, 3, 7};
    int failures = 0;
    for (int which = 0; which < 9; which++)
        for (int64_t dtype = 0; dtype < (few ? 2 : 4); dtype++) {
            truth::Case c;
            c.axis[1].length = which == 3 ? 1 : 47, c.axis[2].length = which == 3 ? 200 : 29;
            c.axis[1].kernel = which == 3 ? 1 : 5, c.axis[2].kernel = 5;
            if (which == 1) c.axis[1].dilation = 2, c.axis[2].dilation = 3;
            if (which == 2) c.axis[0].length = 13, c.axis[0].kernel = 3, c.axis[1].length = 12, c.axis[2].length = 9;
            if (which == 4) c.axis[1].causal = true, c.axis[2].stride = 2;
            c.heads = 2, c.kv_heads = which == 4 ? 1 : 2, c.dim = 12, c.dim_v = 16, c.bias = true,
            c.batch = which == 5 ? 16 : 2, c.scale = 0.3;
            // many heads, of which one thread takes more at a time than several: two of them in the lanes, if their number is even
            if (which >= 6) c.axis[1].length = 17, c.axis[2].length = which == 6 ? 29 : 7, c.batch = 5;
            if (which >= 6) c.heads = which == 6 ? 6 : which == 7 ? 16 : 5, c.kv_heads = which == 7 ? 8 : c.heads;
            std::mt19937_64 random(uint64_t(which + 1));
            Prepared p;
            p.make(c, dtype, random);
            const Result once = run(p, 1);
            for (int64_t threads : counts)
                if (once.out.empty() || run(p, threads) != once)
                    printf("case %d dtype %d: %d threads differ\n", which, int(dtype), int(threads)), failures++;
            p.weights.set(p.pair.weights), p.d_weights.set(p.pair.d_scores);
            const Result pair = run_pair(p, 1);
            for (int64_t threads : counts)
                if (pair.out.empty() || run_pair(p, threads) != pair)
                    printf("case %d dtype %d: the pair with %d threads differs\n", which, int(dtype), int(threads)),
                        failures++;
            // two callers at once, each with threads
            Prepared a = p, b = p;
            a.point_to_own_memory(), b.point_to_own_memory();
            Result ra, rb;
            std::thread other([&] { ra = run(a, 2); });
            rb = run(b, 2);
            other.join();
            if (ra != once || rb != once)
                printf("case %d dtype %d: calls at the same time differ\n", which, int(dtype)), failures++;
        }
#if !defined(_WIN32)
    if (asked("no-fork")) return failures != 0; // emulators and the thread sanitizer know no threads there
    // a child process has none of its parent's threads, and computes all the same
    std::mt19937_64 random(1);
    truth::Case c;
    c.axis[1].length = 40, c.axis[1].kernel = 5, c.axis[2].length = 30, c.axis[2].kernel = 5, c.heads = c.kv_heads = 4,
    c.dim = c.dim_v = 8;
    Prepared p;
    p.make(c, NBHD_FLOAT32, random);
    const Result parent = run(p, 3);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20); // rather than wait for threads that are not there
        _exit(run(p, 3) == parent ? 0 : 1);
    }
    int status = 1;
    if (waitpid(child, &status, 0) != child || status != 0) printf("a forked child differs or hangs\n"), failures++;
#endif
    if (!failures) printf("ok\n");
    return failures != 0;
}
