// Linear layers over rows, with what stands around them in a transformer: a layer norm before, GELU between two of them, a
// factor and a residual after. A task has a block of rows; what it makes between input and output stays in its cache.
//
//      rows of the block  x  panel of the weight  ->  tile of sums in registers: 14 rows by two vectors (6 with 16 registers)
//
// A panel is the weights of 32 outputs, input by input, so that a vector of them is one load, which every row of the tile
// multiplies by its own input. Sums are made over `depth` inputs in registers and added up in memory: no result depends on
// how rows and panels are shared among tasks.
#pragma once
#include "../linear.h"
#include "vec.h"

namespace nbhd::NBHD_ISA {

constexpr int tile_vectors = 2, tile_columns = tile_vectors * lanes;
constexpr int most_tile_rows = registers == 32 ? 14 : 6;
static_assert(panel_columns % tile_columns == 0);
constexpr int64_t depth = 256;      // 32 KB of a panel, about a first-level cache
constexpr int64_t most_rows = 98;   // of a block: its inputs take a part of a second-level cache
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

// x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, and erfc(t / sqrt 2) = 2^(t q(t)), q fitted on [0, 6] for the least error
// of the whole, 3e-8. Further out its last term rules, which takes it below every float.
NBHD_INLINE void gelu(Vec (&x)[tile_vectors]) {
    constexpr float q[8] = {-1.151111007f,    -4.591621459e-1f, -5.262761563e-2f, 7.245428860e-3f,
                            -2.720814082e-4f, -1.314708788e-4f, 2.805643999e-5f,  -1.902023087e-6f};
    Vec t[tile_vectors], p[tile_vectors];
#pragma GCC unroll 2
    for (int i = 0; i < tile_vectors; i++) {
        const Vec size = (Vec)((Index)x[i] & 0x7fffffff);
        t[i] = -max(splat(Real(-16)), -size); // infinity times nothing would be NaN
        p[i] = splat(Real(q[7]));
    }
#pragma GCC unroll 8
    for (int k = 6; k >= 0; k--)
#pragma GCC unroll 2
        for (int i = 0; i < tile_vectors; i++) p[i] = fma(p[i], t[i], splat(Real(q[k])));
#pragma GCC unroll 2
    for (int i = 0; i < tile_vectors; i++) p[i] *= t[i];
    exp2(p);
#pragma GCC unroll 2
    for (int i = 0; i < tile_vectors; i++) x[i] = fma(splat(Real(-0.5)) * t[i], p[i], max(Vec{}, x[i]));
}

NBHD_INLINE int64_t tiles(int64_t rows) { return (rows + most_tile_rows - 1) / most_tile_rows; }

// What becomes of sums.
struct Finish {
    const float *bias, *scale; // or null
    Rows residual;             // from the first row of the block; or without data
    bool gelu;
};

// Part of the panel that comes next, asked for while a tile is computed: a weight is read once by a task, often from memory, and what
// the processor fetches by itself ends with each page.
struct Ahead {
    const char *from;
    int64_t step; // bytes for each input
};

// c[rows][tile_columns] = or += a[rows][n] b[n][panel_columns], of b the first tile_columns; then what `f` says, which begins with
// the tile's first row and column.
template <int rows>
static void tile(const float *a, int64_t a_stride, const float *b, int64_t n, float *c, int64_t c_stride, bool adds,
                 const Finish &f, Ahead ahead) {
    Vec sum[rows][tile_vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) sum[r][v] = Vec{};
    // three rows to a pointer: it, and one and two strides further, are addresses of one instruction
    const float *three[(rows + 2) / 3];
#pragma GCC unroll 16
    for (int i = 0; i < (rows + 2) / 3; i++) three[i] = a + 3 * i * a_stride;
    for (int64_t k = 0; k < n; k++) {
        Vec w[tile_vectors];
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) w[v] = load(b + v * lanes);
        b += panel_columns;
        __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const Vec x = broadcast(three[r / 3] + r % 3 * a_stride + k);
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++) sum[r][v] = fma(x, w[v], sum[r][v]);
        }
    }
    if (adds) { // not what sums begin with: short chains of sums are more exact
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++) sum[r][v] += load(c + r * c_stride + v * lanes);
    }
    if (f.bias) {
        Vec bias[tile_vectors];
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) bias[v] = load(f.bias + v * lanes);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++) sum[r][v] += bias[v];
    }
    if (f.residual.data) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++) {
                const Vec residual = load(f.residual.data + r * f.residual.stride + v * lanes);
                sum[r][v] = f.scale ? fma(sum[r][v], load(f.scale + v * lanes), residual) : sum[r][v] + residual;
            }
    } else if (f.scale) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++) sum[r][v] *= load(f.scale + v * lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) store(c + r * c_stride + v * lanes, sum[r][v]);
}

using TileKernel = void (*)(const float *, int64_t, const float *, int64_t, float *, int64_t, bool, const Finish &,
                            Ahead);
template <int... i>
static TileKernel tile_of(int64_t rows, Sequence<i...>) {
    static constexpr TileKernel kernels[] = {tile<i + 1>...};
    return kernels[rows - 1];
}
static TileKernel tile_of(int64_t rows) { return tile_of(rows, Count<most_tile_rows>::type{}); }

// Rows of the next tile, of those that are left: no tile of so few that its sums wait for each other, if it can be helped.
NBHD_INLINE int64_t next_tile(int64_t left) {
    if (left <= most_tile_rows) return left;
    return left < most_tile_rows + 4 ? (left + 1) / 2 : most_tile_rows;
}

// The rest of it where a tile goes beyond the last output, or GELU is wanted: too much for the registers that hold the sums.
static void finish(const Finish &f, const float *sums, int64_t sums_stride, int64_t row, int64_t rows, int64_t column,
                   int64_t columns, float *c, int64_t c_stride) {
    for (int64_t r = 0; r < rows; r++, sums += sums_stride, c += c_stride) {
        const float *residual = f.residual.data + (row + r) * f.residual.stride + column;
        Vec x[tile_vectors];
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) {
            x[v] = load(sums + v * lanes);
            if (f.bias) x[v] += load_some(f.bias + column + v * lanes, columns - v * lanes);
        }
        if (f.gelu) gelu(x);
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) {
            const int64_t left = columns - v * lanes;
            if (f.scale) x[v] *= load_some(f.scale + column + v * lanes, left);
            if (f.residual.data) x[v] += load_some(residual + v * lanes, left);
            store_some(c + v * lanes, x[v], left);
        }
    }
}

// A block of rows times a part of a weight.
struct Product {
    Rows a; // from the first row and the first of the `n` inputs
    int64_t rows, n;
    const Weight *weight;
    int64_t in, first; // inputs of the weight, and the one that `a` begins with
    int64_t panel_begin, panel_end;
    float *c; // from the first row and the first panel of the weight
    int64_t c_stride;
    bool adds, ends; // there are sums in c already; these are the last
};

static void copy(const float *from, int64_t from_stride, float *to, int64_t to_stride, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        __builtin_memcpy(to + r * to_stride, from + r * from_stride, size_t(columns) * sizeof(float));
}

static void multiply(const Product &p, const Finish &f) {
    alignas(64) float edge[most_tile_rows * tile_columns]; // a tile that goes beyond the last output
    // a panel's share of each input and each tile; those of several tiles' width lie in the same lines
    const int64_t ahead_step = panel_columns * int64_t(sizeof(float)) / tiles(p.rows) + 1;
    for (int64_t k = 0; k < p.n; k += depth) {
        const int64_t n = p.n - k < depth ? p.n - k : depth;
        const bool adds = p.adds || k, ends = p.ends && k + n == p.n;
        for (int64_t column = p.panel_begin * panel_columns;
             column < p.panel_end * panel_columns && column < p.weight->out; column += tile_columns) {
            const int64_t left = p.weight->out - column, columns = left < tile_columns ? left : tile_columns;
            const float *b = p.weight->panels + (column / panel_columns * p.in + p.first + k) * panel_columns +
                             column % panel_columns;
            Ahead ahead{(const char *)(b + p.in * panel_columns - column % panel_columns), ahead_step};
            const bool is_whole = columns == tile_columns, by_tile = is_whole && !f.gelu;
            for (int64_t row = 0, rows; row < p.rows; row += rows) {
                rows = next_tile(p.rows - row);
                const float *a = p.a.data + row * p.a.stride + k;
                float *c = p.c + row * p.c_stride + column, *sums = is_whole ? c : edge;
                const int64_t stride = is_whole ? p.c_stride : tile_columns;
                if (!is_whole && adds) copy(c, p.c_stride, edge, stride, rows, columns);
                Finish now{};
                if (ends && by_tile) {
                    now.bias = f.bias ? f.bias + column : nullptr, now.scale = f.scale ? f.scale + column : nullptr;
                    if (f.residual.data)
                        now.residual = {f.residual.data + row * f.residual.stride + column, f.residual.stride};
                }
                tile_of(rows)(a, p.a.stride, b, n, sums, stride, adds, now, ahead), ahead.from += n * ahead.step;
                if (ends && !by_tile) finish(f, sums, stride, row, rows, column, columns, c, p.c_stride);
                else if (!is_whole) copy(edge, stride, c, p.c_stride, rows, columns);
            }
        }
    }
}

// The sum of a vector's lanes, in each of them.
template <int half, int... i>
NBHD_INLINE Vec add_across(Vec v, Sequence<i...>) {
    return v + __builtin_shufflevector(v, v, (i ^ half)...);
}
NBHD_INLINE Vec total(Vec v) {
    if constexpr (lanes > 8) v = add_across<8>(v, EachLane{});
    if constexpr (lanes > 4) v = add_across<4>(v, EachLane{});
    v = add_across<2>(v, EachLane{});
    return add_across<1>(v, EachLane{});
}

// Layer norm of rows: (x - mean) / sqrt(variance + epsilon) * weight + bias, the variance that of all numbers there are.
static void normalise(const LinearLayers &l, int64_t row, int64_t rows, float *to, int64_t stride) {
    const int64_t n = l.in;
    const Vec over_n = splat(1 / float(n));
    for (int64_t r = 0; r < rows; r++, to += stride) {
        const float *x = l.input.data + (row + r) * l.input.stride;
        Vec sum[2] = {};
        for (int64_t i = 0; i < n; i += 2 * lanes)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) sum[v] += load_some(x + i + v * lanes, n - i - v * lanes);
        const Vec mean = total(sum[0] + sum[1]) * over_n;
        sum[0] = sum[1] = Vec{};
        for (int64_t i = 0; i < n; i += 2 * lanes)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) {
                const int64_t left = n - i - v * lanes;
                if (left <= 0) continue;
                Vec d = load_some(x + i + v * lanes, left) - mean;
                if (left < lanes) d = lane_numbers() < Int(left) ? d : Vec{};
                sum[v] = fma(d, d, sum[v]);
            }
        const float variance = total(sum[0] + sum[1])[0] * over_n[0];
        const Vec factor = splat(1 / __builtin_sqrtf(variance + l.epsilon));
        for (int64_t i = 0; i < n; i += lanes) {
            const int64_t left = n - i;
            Vec y = (load_some(x + i, left) - mean) * factor;
            if (l.norm_weight) y *= load_some(l.norm_weight + i, left);
            if (l.norm_bias) y += load_some(l.norm_bias + i, left);
            store_some(to + i, y, left);
        }
    }
}

// A part of a call that threads share: row blocks times groups of panels.
struct LinearJob {
    const LinearLayers *l;
    const Weight *weight; // of the layer that is computed; null: both in one go
    float *hidden;        // what is between the layers where they are computed apart: [rows][hidden_stride]
    int64_t hidden_stride;
    int64_t block_rows, blocks, group_panels, groups;
    bool failed; // by any thread: out of memory
};

// The block's inputs as the tiles want them: normalised, or as they lie, or copied where they would be in each other's way.
static Rows inputs(const LinearLayers &l, int64_t row, int64_t rows, float *room, int64_t stride) {
    const Rows as_they_lie{l.input.data + row * l.input.stride, l.input.stride};
    if (l.normalises) {
        normalise(l, row, rows, room, stride);
    } else if (l.input.stride % alias == 0) {
        copy(as_they_lie.data, as_they_lie.stride, room, stride, rows, l.in);
    } else {
        return as_they_lie;
    }
    return {room, stride};
}

static void linear_task(int64_t i, void *context) {
    LinearJob &job = *(LinearJob *)context;
    const LinearLayers &l = *job.l;
    const int64_t row = i / job.groups * job.block_rows, group = i % job.groups,
                  rows = l.rows - row < job.block_rows ? l.rows - row : job.block_rows;
    const int64_t in_stride = padded(l.in), between_stride = padded(depth);
    const bool is_last = job.weight != &l.hidden, both = !job.weight;
    float *room = nullptr;
    if (both || !job.hidden || !is_last) {
        room = (float *)thread_scratch((job.block_rows * (in_stride + between_stride)) * int64_t(sizeof(float)));
        if (!room) {
            __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
            return;
        }
    }
    const Finish of_hidden{l.hidden.bias, nullptr, {}, true};
    const Rows residual{l.residual.data ? l.residual.data + row * l.residual.stride : nullptr, l.residual.stride};
    const Finish of_last{l.last.bias, l.scale, residual, l.gelu};
    float *output = l.output + row * l.output_stride;
    if (both) {
        float *between = room + job.block_rows * in_stride;
        const Rows a = inputs(l, row, rows, room, in_stride);
        for (int64_t k = 0; k < l.hidden.out; k += depth) {
            const int64_t n = l.hidden.out - k < depth ? l.hidden.out - k : depth, panels = depth / panel_columns;
            const int64_t begin = k / panel_columns;
            multiply(
                {a, rows, l.in, &l.hidden, l.in, 0, begin, begin + panels, between - k, between_stride, false, true},
                of_hidden);
            multiply({{between, between_stride},
                      rows,
                      n,
                      &l.last,
                      l.hidden.out,
                      k,
                      0,
                      l.last.n_panels(),
                      output,
                      l.output_stride,
                      k > 0,
                      k + n == l.hidden.out},
                     of_last);
        }
        return;
    }
    const int64_t begin = group * job.group_panels, panels = job.weight->n_panels(),
                  end = begin + job.group_panels < panels ? begin + job.group_panels : panels;
    const bool from_hidden = is_last && job.hidden;
    const int64_t in = from_hidden ? l.hidden.out : l.in;
    const Rows a = from_hidden ? Rows{job.hidden + row * job.hidden_stride, job.hidden_stride}
                               : inputs(l, row, rows, room, in_stride);
    float *c = is_last ? output : job.hidden + row * job.hidden_stride;
    multiply(
        {a, rows, in, job.weight, in, 0, begin, end, c, is_last ? l.output_stride : job.hidden_stride, false, true},
        is_last ? of_last : of_hidden);
}

// Blocks of whole tiles, all about as large; where they are few, several tasks share the panels of each.
static bool share(LinearJob &job, const Weight &weight, const Threads &threads) {
    job.weight = &weight;
    const int64_t panels = weight.n_panels(), tasks = 3 * threads.count;
    job.groups = threads.count == 1 || job.blocks >= tasks ? 1 : (tasks + job.blocks - 1) / job.blocks;
    if (job.groups > panels) job.groups = panels;
    job.group_panels = (panels + job.groups - 1) / job.groups;
    job.groups = (panels + job.group_panels - 1) / job.group_panels;
    run_tasks(threads, job.blocks * job.groups, linear_task, &job);
    return !job.failed;
}

static bool linear(const LinearLayers &l, const Threads &threads) {
    LinearJob job{&l, nullptr, nullptr, 0, 0, 0, 0, 1, false};
    // inputs of a block in a megabyte, and no fewer rows than a tile has
    const int64_t fit = (int64_t(1) << 18) / (l.in + padding) / most_tile_rows * most_tile_rows,
                  most = fit < most_tile_rows ? most_tile_rows
                         : fit < most_rows    ? fit
                                              : most_rows;
    job.blocks = (l.rows + most - 1) / most;
    const int64_t even = (l.rows + job.blocks - 1) / job.blocks;
    job.block_rows = (even + most_tile_rows - 1) / most_tile_rows * most_tile_rows;
    job.blocks = (l.rows + job.block_rows - 1) / job.block_rows;
    if (!l.hidden.out) return share(job, l.last, threads);
    if (threads.count == 1 || job.blocks >= 2 * threads.count) {
        run_tasks(threads, job.blocks, linear_task, &job);
        return !job.failed;
    }
    job.hidden_stride = padded(l.hidden.out);
    job.hidden = (float *)allocate(l.rows * job.hidden_stride * int64_t(sizeof(float)));
    const bool done = job.hidden && share(job, l.hidden, threads) && share(job, l.last, threads);
    release(job.hidden);
    return done;
}

} // namespace nbhd::NBHD_ISA
