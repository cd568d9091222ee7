// Gradients of linear layers' weights and biases: d_weight[m][n] = sum over rows of d[row][m] x[row][n], d_bias[m] that of d[row][m].
//
//      strip of d: [row][14 columns]  x  panel of x: [row][32]  ->  tile of d_weight in registers: 14 by two vectors
//
// Both are copied in that order, some rows at a time, where words are pairs those of two rows together. What x is made of (layer
// norm, GELU) is computed while it is copied: it was not kept. Long columns are cut into slices that are added up at the end, into
// as many whatever the number of threads: no result depends on it.
#pragma once
#include "layer_norm.h"
#include "product.h"

namespace nbhd::NBHD_ISA {

constexpr int64_t gradient_depth = 256 * numbers_of_word; // rows that are copied at a time
constexpr int64_t chunk_columns = 512; // of strips that lie side by side: with that many rows half a megabyte
constexpr int64_t slice_rows = 768;    // at least, of a slice
constexpr int64_t most_slices = 16;    // of a product
constexpr int64_t most_partial = int64_t(1) << 21; // numbers of all slices of a weight

// Columns of d, and whose.
struct Strip {
    int layer;
    int64_t first, columns;
};

// What the weights of layers of the same input are multiplied by: the input as it is, its layer norm, or its GELU.
enum class Made { as_it_is, by_norm, by_gelu };

struct WeightProduct {
    int64_t rows;
    int layers;
    AnyRows d[most_layers]; // without data: who adds rows has it
    int64_t out[most_layers];
    float *d_weight[most_layers], *d_bias[most_layers]; // or null
    float factor;                                       // of d
    AnyRows x;
    int64_t in;
    Made made;
    Norm norm;
    const float *moments;
};

template <int rows>
static void gradient_tile(const float *a, const float *b, int64_t n, float *c, int64_t c_stride, bool adds) {
    Vec sum[rows][tile_vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) sum[r][v] = Vec{};
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) __builtin_prefetch(c + r * c_stride + v * lanes, 1, 2);
    for (int64_t k = 0; k < n; k++, a += rows, b += panel_columns) {
        Vec x[tile_vectors];
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) x[v] = load(b + v * lanes);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const Vec d = broadcast(a + r);
#pragma GCC unroll 2
            for (int v = 0; v < tile_vectors; v++) sum[r][v] = multiply_words(d, x[v], sum[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; v++) {
            float *to = c + r * c_stride + v * lanes;
            store(to, adds ? load(to) + sum[r][v] : sum[r][v]);
        }
}

using GradientTile = void (*)(const float *, const float *, int64_t, float *, int64_t, bool);
template <int... i>
static GradientTile gradient_tile_of(int64_t rows, Sequence<i...>) {
    static constexpr GradientTile tiles[] = {gradient_tile<i + 1>...};
    return tiles[rows - 1];
}

// Sums of columns over more rows than are copied at a time, and what rounding has left out of them (Kahan).
struct ColumnSums {
    float *sums, *lost; // or null: nobody wants them; lost has whole vectors
    bool adds;          // there are some already

    void add(int64_t column, int64_t left, Vec x) const {
        if (adds) {
            const Vec before = load_some(sums + column, left), y = x - load(lost + column), after = before + y;
            const Vec rest = (after - before) - y;
            store(lost + column, rest == rest ? rest : Vec{}); // of infinity there is none
            store_some(sums + column, after, left);
        } else {
            store(lost + column, Vec{}), store_some(sums + column, x, left);
        }
    }
};

// d[rows][columns] times `factor`, to words [row][columns] without gaps. `to` has room for a vector more.
template <class T>
static void pack_strip(RowsOf<T> d, int64_t rows, int64_t columns, float factor, float *to, const ColumnSums &sums) {
    constexpr int chains = 4, terms = 64; // of sums: short ones are more exact, and do not wait for each other
    static_assert(chains % numbers_of_word == 0);
    const Vec f = splat(factor);
    for (int64_t i = 0; i < columns; i += lanes) {
        const int64_t left = columns - i;
        const T *from = d.data + i;
        Vec all{};
        for (int64_t first = 0; first < rows; first += terms) {
            const int64_t last = first + terms < rows ? first + terms : rows;
            Vec sum[chains] = {};
            for (int64_t r = first; r < last; r += chains)
#pragma GCC unroll 4
                for (int64_t v = 0; v < chains; v += numbers_of_word) {
                    if (r + v >= last) continue;
                    Vec x[numbers_of_word];
#pragma GCC unroll 2
                    for (int64_t h = 0; h < numbers_of_word; h++) {
                        const int64_t row = r + v + h, rest = rows - 1 - row;
                        // what lies beyond the strip is of the rows after it, whose turn comes later
                        const bool is_inside = rest * d.stride + left >= lanes;
                        x[h] = row >= last ? Vec{}
                               : is_inside ? load(from + row * d.stride) * f
                                           : load_some(from + row * d.stride, left) * f;
                        sum[v + h] += x[h];
                    }
                    float *const word = to + (r + v) / numbers_of_word * columns;
                    if (columns <= lanes) store(word, word_of(x));
                    else store_some(word + i, word_of(x), left);
                }
            all += (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
        if (sums.sums) sums.add(i, left, all);
    }
}

// Columns [first, first + panel_columns) of what a row of x, `from`, is made into; zeros past the last.
template <class T>
NBHD_INLINE void make_inputs(const WeightProduct &p, const T *from, int64_t row, int64_t first, float *to) {
    const int64_t left = p.in - first, columns = left < panel_columns ? left : panel_columns;
    if (columns < panel_columns) __builtin_memset(to, 0, panel_columns * sizeof(float));
    if (p.made == Made::by_norm) {
        const float *m = p.moments + 2 * row;
        return normalise_row(from, {m[0], m[1]}, p.norm, first, columns, to);
    }
    for (int64_t c = 0; c < columns; c += 2 * lanes) {
        Vec x[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) x[v] = load_some(from + first + c + v * lanes, columns - c - v * lanes);
        if (p.made == Made::by_gelu) gelu(x);
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) store_some(to + c + v * lanes, x[v], columns - c - v * lanes);
    }
}

// The same of some rows, in words.
template <class T>
static void pack_inputs(const WeightProduct &p, RowsOf<T> x, int64_t row, int64_t rows, int64_t first, float *to) {
    for (int64_t r = 0; r < rows; r += numbers_of_word, to += panel_columns) {
        const T *const from = x.data + r * x.stride;
        if constexpr (!pairs) {
            make_inputs(p, from, row + r, first, to);
        } else {
            alignas(64) float made[numbers_of_word][panel_columns] = {};
            for (int64_t h = 0; h < numbers_of_word && r + h < rows; h++)
                make_inputs(p, from + h * x.stride, row + r + h, first, made[h]);
            for (int64_t c = 0; c < panel_columns; c += lanes) {
                Vec x[numbers_of_word];
                for (int h = 0; h < numbers_of_word; h++) x[h] = load(made[h] + c);
                store(to + c, word_of(x));
            }
        }
    }
}

// A product's share of the tasks: slices of rows, times chunks of strips, times groups of panels.
struct WeightPlan {
    const WeightProduct *p;
    Strip *strips;
    int64_t n_strips, chunks, slices, rows_of_slice, panels, group_panels, groups;
    float *partial; // of all slices but the first: the weights that are wanted, one after another, then the biases
    int64_t partial_size;

    int64_t tasks() const { return slices * chunks * groups; }
    // Where a slice has its sums of a layer.
    float *weight_of(int64_t slice, int layer) const {
        if (!slice) return p->d_weight[layer];
        float *at = partial + (slice - 1) * partial_size;
        for (int i = 0; i < layer; i++) at += p->d_weight[i] ? p->out[i] * p->in : 0;
        return at;
    }
    float *bias_of(int64_t slice, int layer) const {
        if (!slice) return p->d_bias[layer];
        float *at = weight_of(slice, most_layers);
        for (int i = 0; i < layer; i++) at += p->d_bias[i] ? p->out[i] : 0;
        return at;
    }
};

// What a task adds to: a slice's sums of some strips, by some panels.
struct Share {
    int64_t slice, first_strip, last_strip, first_panel, last_panel;

    // Numbers of memory for so many rows at a time.
    int64_t strips_room(int64_t rows) const {
        return (last_strip - first_strip) * most_tile_rows * words(rows) + lanes;
    }
    int64_t room(int64_t rows) const { return strips_room(rows) + panel_columns * words(rows); }
    int64_t sums_room() const { return (last_strip - first_strip) * strip_sums; }
    static constexpr int64_t strip_sums = (most_tile_rows + lanes - 1) / lanes * lanes;
};

// Adds the products of at most `most` rows, of which `row` is the first, or begins the sums with them. `d_rows` are gradients of
// layers that p has not. `room` is for the strips and a panel; `lost`, what sums have lost, stays until the next rows.
static void add_rows(const WeightPlan &plan, const Share &share, AnyRows d_rows, int64_t row, int64_t rows, bool adds,
                     int64_t most, float *room, float *lost) {
    const WeightProduct &p = *plan.p;
    const int64_t deep = words(rows);
    alignas(64) float edge[most_tile_rows * tile_columns] = {};
    float *panel = room + share.strips_room(most), *to = room;
    for (int64_t s = share.first_strip; s < share.last_strip; s++) {
        const Strip &strip = plan.strips[s];
        const AnyRows &d = p.d[strip.layer];
        const bool sums_up = !share.first_panel && p.d_bias[strip.layer];
        const ColumnSums sums{sums_up ? plan.bias_of(share.slice, strip.layer) + strip.first : nullptr,
                              lost + (s - share.first_strip) * Share::strip_sums, adds};
        const auto pack = [&]<class T>(RowsOf<T> from) {
            pack_strip(RowsOf<T>{from.data + strip.first, from.stride}, rows, strip.columns, p.factor, to, sums);
        };
        d.data ? d.from(row, pack) : d_rows.from(0, pack);
        to += deep * strip.columns;
    }
    for (int64_t n = share.first_panel; n < share.last_panel; n++) {
        p.x.from(row, [&](auto x) { pack_inputs(p, x, row, rows, n * panel_columns, panel); });
        for (int64_t column = n * panel_columns; column < (n + 1) * panel_columns && column < p.in;
             column += tile_columns) {
            const int64_t left = p.in - column;
            const float *a = room, *b = panel + column % panel_columns;
            for (int64_t s = share.first_strip; s < share.last_strip; a += deep * plan.strips[s++].columns) {
                const Strip &strip = plan.strips[s];
                if (!p.d_weight[strip.layer]) continue; // its bias alone
                float *c = plan.weight_of(share.slice, strip.layer) + strip.first * p.in + column;
                const GradientTile tile = gradient_tile_of(strip.columns, Count<most_tile_rows>::type{});
                if (left >= tile_columns) {
                    tile(a, b, deep, c, p.in, adds);
                } else {
                    if (adds) copy(c, p.in, edge, tile_columns, strip.columns, left);
                    tile(a, b, deep, edge, tile_columns, adds);
                    copy(edge, tile_columns, c, p.in, strip.columns, left);
                }
            }
        }
    }
}

constexpr int most_products = 2;
struct WeightJob {
    WeightPlan plans[most_products];
    int n;
    Strip *strips;
    float *partial;
    bool failed;
};

static void weight_task(int64_t i, void *context) {
    WeightJob &job = *(WeightJob *)context;
    const WeightPlan *plan = job.plans;
    for (; i >= plan->tasks(); plan++) i -= plan->tasks();
    const WeightProduct &p = *plan->p;
    const int64_t group = i % plan->groups, chunk = i / plan->groups % plan->chunks,
                  slice = i / plan->groups / plan->chunks, first_panel = group * plan->group_panels,
                  next_panel = first_panel + plan->group_panels;
    const Share share{slice, chunk * plan->n_strips / plan->chunks, (chunk + 1) * plan->n_strips / plan->chunks,
                      first_panel, next_panel < plan->panels ? next_panel : plan->panels};
    float *room = (float *)thread_scratch((share.room(gradient_depth) + share.sums_room()) * int64_t(sizeof(float)));
    if (!room) {
        __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
        return;
    }
    const int64_t begin = slice * plan->rows_of_slice,
                  end = slice + 1 < plan->slices ? begin + plan->rows_of_slice : p.rows,
                  cuts = (end - begin + gradient_depth - 1) / gradient_depth;
    for (int64_t cut = 0; cut < cuts; cut++) {
        const int64_t row = begin + (end - begin) * cut / cuts, rows = begin + (end - begin) * (cut + 1) / cuts - row;
        add_rows(*plan, share, {}, row, rows, cut > 0, gradient_depth, room, room + share.room(gradient_depth));
    }
}

// Adds `count` pieces of n numbers, `stride` apart, to what is there, one after another.
static void add_up(const float *pieces, int64_t count, int64_t stride, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i += lanes) {
        Vec sum = load_some(to + i, n - i);
        for (int64_t p = 0; p < count; p++) sum += load_some(pieces + p * stride + i, n - i);
        store_some(to + i, sum, n - i);
    }
}

// The slices' sums, added to the first one's.
struct Gather {
    const WeightPlan *plan;
    int64_t numbers; // of a task
};
static void gather_task(int64_t i, void *context) {
    const Gather &job = *(const Gather *)context;
    const WeightPlan &plan = *job.plan;
    const int64_t begin = i * job.numbers, end = begin + job.numbers;
    int64_t at = 0;
    const auto take = [&](float *to, int64_t size) {
        if (!to) return;
        const int64_t from = begin - at > 0 ? begin - at : 0, until = end - at < size ? end - at : size;
        if (from < until) add_up(plan.partial + at + from, plan.slices - 1, plan.partial_size, until - from, to + from);
        at += size;
    };
    for (int l = 0; l < plan.p->layers; l++) take(plan.p->d_weight[l], plan.p->out[l] * plan.p->in);
    for (int l = 0; l < plan.p->layers; l++) take(plan.p->d_bias[l], plan.p->out[l]);
}

// How a product is cut, into at least so many tasks if it can be; or into slices of so many rows, each of them one task. `strips` has
// room for those of its layers.
static WeightPlan plan_of(const WeightProduct &p, Strip *strips, int64_t tasks, int64_t rows_of_slice) {
    WeightPlan plan{};
    plan.p = &p, plan.strips = strips;
    int64_t columns = 0;
    for (int l = 0; l < p.layers; l++) {
        if (p.d_bias[l]) plan.partial_size += p.out[l];
        if (p.d_weight[l]) plan.partial_size += p.out[l] * p.in;
        if (!p.d_bias[l] && !p.d_weight[l]) continue;
        for (int64_t m = 0, some; m < p.out[l]; m += some)
            some = next_tile(p.out[l] - m), strips[plan.n_strips++] = {l, m, some};
        columns += p.out[l];
    }
    const auto cut = [](int64_t n, int64_t pieces) { return (n + pieces - 1) / pieces; };
    plan.chunks = plan.groups = 1, plan.panels = plan.group_panels = cut(p.in, panel_columns);
    if (rows_of_slice) {
        plan.rows_of_slice = rows_of_slice, plan.slices = cut(p.rows, rows_of_slice);
        return plan;
    }
    const int64_t wanted = p.rows / slice_rows, fit = most_partial / plan.partial_size;
    plan.slices = wanted < most_slices ? wanted : most_slices;
    if (plan.slices > fit) plan.slices = fit;
    if (plan.slices < 1) plan.slices = 1;
    plan.rows_of_slice = cut(cut(p.rows, gradient_depth), plan.slices) * gradient_depth;
    plan.slices = cut(p.rows, plan.rows_of_slice);
    // more tasks by what has to be read again for it: x for each chunk, d for each group
    plan.chunks = cut(columns, chunk_columns);
    const int64_t have = plan.slices * plan.chunks, times = have < tasks ? cut(tasks, have) : 1;
    if (columns >= p.in) plan.chunks = plan.chunks * times < plan.n_strips ? plan.chunks * times : plan.n_strips;
    else plan.groups = times < plan.panels ? times : plan.panels;
    plan.group_panels = cut(plan.panels, plan.groups), plan.groups = cut(plan.panels, plan.group_panels);
    return plan;
}

// Memory for the gradients of products; `finish` gives it back.
static bool prepare(WeightJob &job, const WeightProduct *products, int n, int64_t rows_of_slice,
                    const Threads &threads) {
    int64_t n_strips = 0, partial = 0;
    for (int i = 0; i < n; i++)
        for (int l = 0; l < products[i].layers; l++) n_strips += products[i].out[l] / (most_tile_rows / 2) + 2;
    job.n = n, job.strips = (Strip *)allocate(n_strips * int64_t(sizeof(Strip)));
    if (!job.strips) return false;
    Strip *next_strips = job.strips;
    for (int i = 0; i < n; i++) {
        WeightPlan &plan = job.plans[i];
        plan = plan_of(products[i], next_strips, threads.count == 1 ? 1 : 4 * threads.count / n, rows_of_slice);
        next_strips += plan.n_strips, partial += (plan.slices - 1) * plan.partial_size;
    }
    float *next = job.partial = (float *)allocate(partial * int64_t(sizeof(float)));
    for (int i = 0; i < n && next; i++)
        job.plans[i].partial = next, next += (job.plans[i].slices - 1) * job.plans[i].partial_size;
    return job.partial != nullptr;
}

static void finish(WeightJob &job, bool gathers, const Threads &threads) {
    for (int i = 0; i < job.n && gathers; i++) {
        Gather gather{&job.plans[i], 1 << 15};
        if (job.plans[i].slices > 1)
            run_tasks(threads, (job.plans[i].partial_size + gather.numbers - 1) / gather.numbers, gather_task, &gather);
    }
    release(job.partial), release(job.strips);
}

// Those gradients of the products that are wanted.
static bool weight_gradients(const WeightProduct *products, int n, const Threads &threads) {
    WeightJob job{};
    bool done = prepare(job, products, n, 0, threads);
    if (done) {
        int64_t tasks = 0;
        for (int i = 0; i < n; i++) tasks += job.plans[i].tasks();
        run_tasks(threads, tasks, weight_task, &job);
        done = !job.failed;
    }
    finish(job, done, threads);
    return done;
}

} // namespace nbhd::NBHD_ISA
