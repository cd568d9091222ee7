// Rows times a weight, with what becomes of the sums while they are at hand: a bias, GELU, a factor, a residual.
//
//      rows of a block  x  panel of the weight  ->  tile of sums in registers: 14 rows by two vectors (6 with 16 registers)
//
// A panel is the weights of 32 outputs, input by input, so that a vector of them is one load, which every row of the tile
// multiplies by its own input; or word by word, where an input is half a word (rows.h). Sums are made over `depth` words in
// registers and added up in memory: no result depends on how rows and panels are shared among tasks.
#pragma once
#include "gelu.h"
#include "rows.h"

namespace nbhd::NBHD_ISA {

constexpr int tile_vectors = 2, tile_columns = tile_vectors * lanes;
constexpr int most_tile_rows = registers == 32 ? 14 : 6;
static_assert(panel_columns % tile_columns == 0);
constexpr int64_t depth = 256;    // words: 32 KB of a panel, about a first-level cache
constexpr int64_t most_rows = 98; // of a block: its inputs take a part of a second-level cache

NBHD_INLINE int64_t tiles(int64_t rows) { return (rows + most_tile_rows - 1) / most_tile_rows; }

// What becomes of sums, which are floats, on their way to rows of T. Rows begin with the first one of the block; those without data
// are not there.
template <class T>
struct Finish {
    const float *bias, *scale; // or null
    RowsOf<T> residual;
    bool gelu;
    Output before_gelu; // where to keep what GELU is taken of
    Rows slope_at;      // times the slope of GELU there
    OutputOf<T> to;     // from the weight's first output; floats stay where the sums are

    // A tile has no registers left for more than the first three.
    bool is_simple() const { return is_float<T> && !gelu && !slope_at.data; }
};

// Part of the panel that comes next, asked for while a tile is computed: a weight is read once by a task, often from memory, and what
// the processor fetches by itself ends with each page.
struct Ahead {
    const char *from;
    int64_t step; // bytes for each word
};

// c[rows][tile_columns] = or += a[rows][n] b[n][panel_columns], words both, of b the first tile_columns; then what `f` says, which
// begins with the tile's first row and column.
template <int rows>
static void tile(const float *a, int64_t a_stride, const float *b, int64_t n, float *c, int64_t c_stride, bool adds,
                 const Finish<float> &f, Ahead ahead) {
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
            for (int v = 0; v < tile_vectors; v++) sum[r][v] = multiply_words(x, w[v], sum[r][v]);
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

using TileKernel = void (*)(const float *, int64_t, const float *, int64_t, float *, int64_t, bool,
                            const Finish<float> &, Ahead);
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

// The rest of it where a tile goes beyond the last output, or more is wanted than there are registers for: `to` begins with the
// tile's first row and column.
template <class T>
static void finish(const Finish<T> &f, const float *sums, int64_t sums_stride, int64_t row, int64_t rows,
                   int64_t column, int64_t columns, OutputOf<T> to) {
    for (int64_t r = 0; r < rows; r++, sums += sums_stride, to.data += to.stride) {
        const T *residual = f.residual.from(row + r).data;
        Vec x[tile_vectors];
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) {
            x[v] = load(sums + v * lanes);
            if (f.bias) x[v] += load_some(f.bias + column + v * lanes, columns - v * lanes);
        }
        if (f.before_gelu.data)
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++)
                store_some(f.before_gelu.data + (row + r) * f.before_gelu.stride + column + v * lanes, x[v],
                           columns - v * lanes);
        if (f.gelu) gelu(x);
        if (f.slope_at.data) {
            const float *at = f.slope_at.data + (row + r) * f.slope_at.stride + column;
            Vec slope[tile_vectors];
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++) slope[v] = load_some(at + v * lanes, columns - v * lanes);
            gelu_slope(slope);
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++) {
                // Next to nothing, which the slope makes of much, is nothing: numbers below a float's smallest normal ones would take
                // hundreds of cycles in every product.
                x[v] *= slope[v];
                x[v] = (Vec)((Index)x[v] & 0x7fffffff) < splat(Real(0x1p-100)) ? Vec{} : x[v];
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) {
            const int64_t left = columns - v * lanes;
            if (f.scale) x[v] *= load_some(f.scale + column + v * lanes, left);
            if (residual) x[v] += load_some(residual + column + v * lanes, left);
            store_some(to.data + v * lanes, x[v], left);
        }
    }
}

// Memory that is read or written next.
struct Coming {
    const char *begin; // or null: nothing is known of it
    int64_t bytes;
};
template <class T>
NBHD_INLINE Coming coming(RowsOf<T> a, int64_t rows) {
    return {(const char *)a.data, rows * a.stride * int64_t(sizeof(T))};
}

// A block of rows times a part of a weight.
struct Product {
    Rows a; // words, from the first row and the first of `n` words
    int64_t rows, n;
    const Weight *weight;
    int64_t in, first; // words of an output's weight, and the one that `a` begins with
    int64_t panel_begin, panel_end;
    float *c; // sums, from the first row and the first panel of the weight
    int64_t c_stride;
    bool adds, ends; // there are sums in c already; these are the last
    Coming next;     // asked for meanwhile, in place of the next panel: where panels stay in the cache
};

// Asks for a tile's columns of rows that were not looked at for long.
template <class T>
NBHD_INLINE void ask_for(RowsOf<T> a, int64_t column, int64_t rows) {
    for (int64_t r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) __builtin_prefetch(a.data + r * a.stride + column + v * lanes, 0, 3);
}

template <class T>
static void multiply(const Product &p, const Finish<T> &f) {
    // sums of a tile that goes beyond the last output, or of one that is written elsewhere at once
    alignas(64) float apart[most_tile_rows * tile_columns] = {};
    // a panel's share of each word and each tile; those of several tiles' width lie in the same lines
    const int64_t ahead_step = panel_columns * int64_t(sizeof(float)) / tiles(p.rows) + 1;
    const int64_t panels = (p.panel_end < p.weight->n_panels() ? p.panel_end : p.weight->n_panels()) - p.panel_begin,
                  steps = p.n * tiles(p.rows) * panels * (panel_columns / tile_columns);
    Ahead next{p.next.begin, p.next.bytes / (steps > 0 ? steps : 1) + 1};
    for (int64_t k = 0; k < p.n; k += depth) {
        const int64_t n = p.n - k < depth ? p.n - k : depth;
        const bool adds = p.adds || k, ends = p.ends && k + n == p.n;
        for (int64_t column = p.panel_begin * panel_columns;
             column < p.panel_end * panel_columns && column < p.weight->out; column += tile_columns) {
            const int64_t left = p.weight->out - column, columns = left < tile_columns ? left : tile_columns;
            const float *b = p.weight->panels + (column / panel_columns * p.in + p.first + k) * panel_columns +
                             column % panel_columns;
            Ahead ahead{(const char *)(b + p.in * panel_columns - column % panel_columns), ahead_step};
            const bool is_whole = columns == tile_columns, by_tile = is_whole && f.is_simple(),
                       is_apart = !is_whole || (!is_float<T> && ends && !adds);
            for (int64_t row = 0, rows; row < p.rows; row += rows) {
                rows = next_tile(p.rows - row);
                const float *a = p.a.data + row * p.a.stride + k;
                float *c = p.c + row * p.c_stride + column, *sums = is_apart ? apart : c;
                const int64_t stride = is_apart ? tile_columns : p.c_stride;
                if (is_apart && adds) copy(c, p.c_stride, apart, stride, rows, columns);
                Finish<float> now{};
                OutputOf<T> to{};
                if constexpr (is_float<T>) {
                    if (ends && by_tile) {
                        now.bias = f.bias ? f.bias + column : nullptr, now.scale = f.scale ? f.scale + column : nullptr;
                        if (f.residual.data)
                            now.residual = {f.residual.data + row * f.residual.stride + column, f.residual.stride};
                    }
                    to = {c, p.c_stride};
                } else if (ends) {
                    to = {f.to.data + row * f.to.stride + column, f.to.stride};
                }
                if (ends) {
                    if (f.residual.data) ask_for(f.residual.from(row), column, rows);
                    if (f.slope_at.data) ask_for(f.slope_at.from(row), column, rows);
                }
                Ahead &asked = p.next.begin ? next : ahead;
                tile_of(rows)(a, p.a.stride, b, n, sums, stride, adds, now, asked), asked.from += n * asked.step;
                if (ends && !by_tile) finish(f, sums, stride, row, rows, column, columns, to);
                else if (is_apart) copy(apart, stride, c, p.c_stride, rows, columns);
            }
        }
    }
}

// Panels of a weight, [out][in]: as they are multiplied by inputs; or, for gradients of inputs, by those of outputs, times `factor`.
struct Packing {
    const Weight *weight;
    Dtype dtype; // of its source
    int64_t in;
    bool transposed;
    float factor;
    float *panels;

    int64_t n_outputs() const { return transposed ? in : weight->out; }
    int64_t n_inputs() const { return transposed ? weight->out : in; }
    int64_t n_panels() const { return (n_outputs() + panel_columns - 1) / panel_columns; }
    int64_t size() const { return n_panels() * panel_columns * words(n_inputs()); }
};

// The words of n numbers, as many as a vector has.
template <class T>
NBHD_INLINE Vec load_words(const T *p, int64_t n) {
#if NBHD_PAIRS
    if constexpr (is_bfloat16<T>) {
        const __mmask32 first = n < 2 * lanes ? (__mmask32(1) << (n > 0 ? n : 0)) - 1 : ~__mmask32(0);
        return (Vec)_mm512_maskz_loadu_epi16(first, p);
    } else {
        BFloat16 both[2 * lanes];
        store(both, load_some(p, n)), store(both + lanes, n > lanes ? load_some(p + lanes, n - lanes) : Vec{});
        return load((const float *)both);
    }
#else
    return load_some(p, n);
#endif
}

// A panel of `n` inputs, of which `source` has `columns` outputs, [columns][in].
template <class T>
static void pack_inputs(const T *source, int64_t in, int64_t columns, int64_t n, float *to) {
    for (int64_t c = 0; c < panel_columns; c += lanes) {
        const T *from = source + c * in;
        for (int64_t k = 0; k < words(n); k += lanes) {
            const int64_t first = k * numbers_of_word, some = words(n) - k < lanes ? words(n) - k : lanes;
            Vec r[lanes];
#pragma GCC unroll 16
            for (int l = 0; l < lanes; l++)
                r[l] = c + l < columns ? load_words(from + l * in + first, n - first) : Vec{};
            transpose(r);
            for (int64_t i = 0; i < some; i++) store(to + (k + i) * panel_columns + c, r[i]);
        }
    }
}

template <class T>
static void pack_panel(const Packing &p, const T *source, int64_t panel) {
    const int64_t first = panel * panel_columns, in = p.in, n = p.n_inputs();
    const int64_t left = p.n_outputs() - first, columns = left < panel_columns ? left : panel_columns;
    float *to = p.panels + panel * words(n) * panel_columns;
    if (p.transposed) {
        const Vec factor = splat(p.factor);
        const T *from = source + first;
        for (int64_t k = 0; k < n; k += numbers_of_word, from += numbers_of_word * in, to += panel_columns)
            for (int64_t c = 0; c < panel_columns; c += lanes) {
                Vec x[numbers_of_word];
#pragma GCC unroll 2
                for (int h = 0; h < numbers_of_word; h++)
                    x[h] = c < columns && k + h < n ? load_some(from + h * in + c, columns - c) * factor : Vec{};
                store(to + c, word_of(x));
            }
        return;
    }
    pack_inputs(source + first * in, in, columns, n, to);
}

static void pack_panel(const Packing &p, int64_t panel) {
    with_type(p.dtype, p.weight->source, [&](const auto *source) { pack_panel(p, source, panel); });
}

struct PackingJob {
    const Packing *packings;
    int n;
};
static void packing_task(int64_t i, void *context) {
    const PackingJob &job = *(const PackingJob *)context;
    const Packing *p = job.packings;
    for (; i >= p->n_panels(); p++) i -= p->n_panels();
    pack_panel(*p, i);
}

// Packs them all into memory that the caller releases; null when there is none.
static float *pack_all(Packing *packings, int n, const Threads &threads) {
    int64_t size = 0, panels = 0;
    for (int i = 0; i < n; i++) size += packings[i].size(), panels += packings[i].n_panels();
    float *const memory = (float *)allocate(size * int64_t(sizeof(float)));
    if (!memory) return nullptr;
    float *next = memory;
    for (int i = 0; i < n; i++) packings[i].panels = next, next += packings[i].size();
    PackingJob job{packings, n};
    run_tasks(threads, panels, packing_task, &job);
    return memory;
}

// Blocks of whole tiles, all about as large: of `columns` a megabyte at most, and no fewer rows than a tile has.
struct Blocks {
    int64_t rows, count;

    Blocks() : rows(0), count(0) {}
    Blocks(int64_t all, int64_t columns) {
        const int64_t fit = (int64_t(1) << 18) / (columns + padding) / most_tile_rows * most_tile_rows,
                      most = fit < most_tile_rows ? most_tile_rows
                             : fit < most_rows    ? fit
                                                  : most_rows;
        const int64_t blocks = (all + most - 1) / most, even = (all + blocks - 1) / blocks;
        rows = (even + most_tile_rows - 1) / most_tile_rows * most_tile_rows;
        count = (all + rows - 1) / rows;
    }
    int64_t rows_of(int64_t block, int64_t all) const { return all - block * rows < rows ? all - block * rows : rows; }
    // Whether they are enough to keep all threads busy, each with whole blocks.
    bool are_many(const Threads &threads) const { return threads.count == 1 || count >= 2 * threads.count; }
};

// Numbers of weights that stay in a second-level cache, half of it with their packed copies.
constexpr int64_t small_weights = int64_t(1) << 17;

// Numbers of all weights of a call, forward or backward.
template <class Call>
static int64_t numbers_of_weights(const Call &c) {
    int64_t n = c.hidden.out * c.in;
    for (int p = 0; p < c.n_last; p++) n += c.last[p].out * (c.hidden.out ? c.hidden.out : c.in);
    return n;
}

// Where blocks are few, several tasks share the panels of each.
struct Groups {
    int64_t panels, count;

    Groups() : panels(1), count(1) {}
    Groups(int64_t all, int64_t blocks, const Threads &threads) {
        const int64_t tasks = 3 * threads.count;
        count = threads.count == 1 || blocks >= tasks ? 1 : (tasks + blocks - 1) / blocks;
        if (count > all) count = all;
        panels = (all + count - 1) / count;
        count = (all + panels - 1) / panels;
    }
    int64_t end(int64_t group, int64_t all) const { return (group + 1) * panels < all ? (group + 1) * panels : all; }
};

} // namespace nbhd::NBHD_ISA
