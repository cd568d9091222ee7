// What each kernel of the CPU core reaches on its own, in cycles and as a share of the machine's fused multiply-adds: one map,
// one head, one tile of queries after another, everything in the first-level cache. docs/cpu-kernels.md reads these numbers.
//
//   F="-std=c++20 -O3 -fno-tree-vectorize -fno-tree-slp-vectorize -fno-math-errno -fno-trapping-math -ffp-contract=fast"
//   g++ $F -mavx2 -mfma -mf16c -mbmi2 benchmarks/core/tiles.cpp -o build/tiles           # or, for AVX-512:
//   g++ $F -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mbmi2 -DNBHD_VECTOR_BYTES=64 -DNBHD_REGISTERS=32 ...
//   taskset -c 1 build/tiles [side = 28] [window = 7] [dim = 32]
//
// Each figure is the shortest of many runs, which other work on the machine cannot make shorter.
#define NBHD_ISA tiles
#define NBHD_DOUBLE 0
#ifndef NBHD_VECTOR_BYTES
#define NBHD_VECTOR_BYTES 32
#define NBHD_REGISTERS 16
#endif
#ifndef NBHD_SPECIALISE
#define NBHD_SPECIALISE 1
#endif
#include "../../csrc/src/kernels/backward_task.h"

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

namespace nbhd { // what the library's other files provide
void *allocate(int64_t bytes) { return aligned_alloc(64, size_t(bytes + 64) / 64 * 64); }
void release(void *memory) { free(memory); }
void *thread_scratch(int64_t) {
    static void *const memory = allocate(64 << 20);
    return memory;
}
void run_tasks(const Threads &, int64_t count, void (*task)(int64_t, void *), void *context) {
    for (int64_t i = 0; i < count; i++) task(i, context);
}
} // namespace nbhd

using namespace nbhd;
using namespace nbhd::tiles;

static double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

template <class Run>
static double shortest(Run run) {
    double best = 1e9;
    for (const double end = seconds() + 0.3; seconds() < end;) {
        const double begin = seconds();
        for (int i = 0; i < 10; i++) run();
        const double took = (seconds() - begin) / 10;
        if (took < best) best = took;
    }
    return best;
}

// Fused multiply-adds of a vector in a second: twelve sums in registers.
static double peak() {
    constexpr int rounds = 2000;
    return rounds * 12 / shortest([] {
               Vec a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{};
               const Vec one = splat(1);
               const auto add = [&](Vec &sum) { asm volatile("vfmadd231ps %1, %1, %0" : "+v"(sum) : "v"(one)); };
               for (int n = 0; n < rounds; n++)
                   add(a), add(b), add(c), add(d), add(e), add(f), add(g), add(h), add(i), add(j), add(k), add(l);
           });
}

int main(int argc, char **argv) {
    const int side = argc > 1 ? atoi(argv[1]) : 28, window = argc > 2 ? atoi(argv[2]) : 7,
              dim = argc > 3 ? atoi(argv[3]) : 32;
    const double fma_per_second = peak();
    const auto print = [&](const char *what, double took, double products) {
        const double vectors = products / lanes;
        printf("%-28s %9.0f cycles of two products", what, took * fma_per_second / 2);
        if (products > 0) printf(", %.2f of peak", vectors / (took * fma_per_second));
        printf("\n");
    };
    printf("%.2f vector products a nanosecond, %.0f GFLOP/s\n", fma_per_second * 1e-9, fma_per_second * lanes * 2e-9);

    std::vector<int32_t> first(side), count(side, window);
    for (int i = 0; i < side; i++) {
        const int f = i - window / 2, last = side - window;
        first[i] = f < 0 ? 0 : f > last ? last : f;
    }
    const int32_t zero = 0, one = 1;
    const int64_t n = (int64_t)side * side * dim, table = (2 * window - 1) * (2 * window - 1);
    std::vector<float> tensors[8], lse(side * side), bias(table, .1f), d_bias(table);
    for (std::vector<float> &t : tensors) t.assign(n, .1f);
    const auto tensor = [&](int i) { return Tensor{tensors[i].data(), n, {n, (int64_t)side * dim, dim}, dim}; };
    Problem p{};
    p.part = Part::attention, p.dtype = Dtype::float32, p.batch = p.heads = p.kv_heads = 1, p.dim = p.dim_v = dim;
    p.scale = .2, p.cache_bytes = p.heads_cache_bytes = 512 * 1024, p.small = true;
    p.least_work_of_cut = int64_t(1) << 40; // one task
    p.axis[0] = Axis{1, 1, 1, &zero, &one, -1};
    p.axis[1] = p.axis[2] = Axis{side, window, 1, first.data(), count.data(), window / 2};
    p.query = tensor(0), p.key = tensor(1), p.value = tensor(2), p.out = tensor(3);
    p.d_out = tensor(4), p.d_query = tensor(5), p.d_key = tensor(6), p.d_value = tensor(7);
    p.lse = lse.data(), p.bias = bias.data(), p.d_bias = d_bias.data();

    const double half = double(side) * side * window * window * dim;
    print("forward", shortest([&] { forward(p, Threads{}); }), 2 * half);
    print("backward", shortest([&] { backward(p, Threads{}); }), 5 * half);

    const Plan plan = make_plan(p, 1, 1, 1);
    const Map m = map_of(p, 0);
    const Task task = task_of(plan, p, 0);
    const int begin[3] = {0, 0, 0}, end[3] = {1, side, side};
    const Block block = make_block(m, begin, end);
    const auto buffers = [&](auto &b) {
        Arena arena;
        lay_out(b, arena, p, m, block, task);
        // with numbers to calculate with: what lay there before may be subnormal, which takes hundreds of cycles
        float *const numbers = (float *)thread_scratch(0);
        for (int64_t i = 0; i < arena.used / (int64_t)sizeof(float); i++) numbers[i] = .1f;
        arena = Arena{(char *)thread_scratch(0)};
        lay_out(b, arena, p, m, block, task);
    };
    const int64_t row_scores = (int64_t)window * window * lanes;
    for (int y : {0, side / 2 / tile_rows * tile_rows}) {
        ForwardBuffers f{};
        buffers(f);
        fill_bias(f.bias, p, 0, 1, f.columns, f.tiles.n);
        clear_rest(f.keys);
        Ahead nothing_ahead;
        RowTile t;
        t.key = f.key_rows;
        row_tile(t, m.axis[0], m.axis[1], window, f.ring.shape, 0, y, tile_rows);
        for (int i = 0; i < f.tiles.n; i++) {
            const ColumnTile &c = f.columns[i];
            const double products = double(tile_rows) * window * window * dim * c.n;
            printf("rows %d to %d, %d queries of tile %d\n", y, y + tile_rows - 1, c.n, i);
            print("  scores", shortest([&] {
                      tile_scores(TileScores{&t, t.key, t.key + t.key_rows, &c, &f.keys, 0, f.query, 1, &f.bias, 0,
                                             window, window, row_scores, f.scores, f.maximum, &nothing_ahead, 0,
                                             score_words(dim)});
                  }),
                  products);
            print("  exponentials", shortest([&] {
                      for (int r = 0; r < tile_rows; r++)
                          store(f.normaliser + r * lanes,
                                exponentials(f.scores + r * row_scores, window * window, splat(0)));
                  }),
                  0);
            WeightedSum s;
            s.weights = f.scores, s.weights_row = row_scores, s.step = window * lanes, s.values = f.values;
            s.ring_row = f.ring.natural_row(dim), s.width = round_up(dim), s.rows = &t, s.normaliser = f.normaliser;
            s.factor = 1, s.ahead = &nothing_ahead;
            print("  weighted sum", shortest([&] {
                      for (int k = 0; k < c.runs; k++) {
                          const Run &run = c.run[k];
                          s.first = c.first + run.index, s.end = c.end + run.index, s.lane = run.lane,
                          s.lane_step = run.step;
                          weighted_sum_to(s, run.n, tensors[3].data() + (y * side + run.x) * dim, side * dim, dim, dim,
                                          f.out);
                      }
                  }),
                  products);
        }
        BackwardBuffers g{};
        buffers(g);
        t.key = g.key_rows;
        row_tile(t, m.axis[0], m.axis[1], window, g.ring.shape, 0, y, tile_rows);
        KeyGradient k{};
        k.ahead = &nothing_ahead;
        k.rows = &t, k.blocks = g.blocks, k.n_blocks = make_gradient_blocks(t, g.vectors_at_once, g.blocks);
        k.vectors_at_once = g.vectors_at_once, k.weights = g.scores, k.weights_row = row_scores,
        k.step = window * lanes;
        k.width = round_up(dim), k.vectors_row = lanes * k.width, k.gradient = g.d_values;
        k.ring_row = g.ring.natural_row(dim);
        for (int i = 0; i < g.tiles.n; i++) {
            const ColumnTile &c = g.columns[i];
            print("  key gradient", shortest([&] {
                      for (int j = 0; j < c.runs; j++) {
                          const Run &run = c.run[j];
                          k.run = &run, k.first = c.first + run.index, k.end = c.end + run.index;
                          k.vectors = g.d_out_rows + run.index * k.width;
                          key_gradient(k);
                      }
                  }),
                  double(tile_rows) * window * window * dim * c.n);
        }
    }
}
