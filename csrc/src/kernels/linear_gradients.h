// Gradients of linear layers and of what stands before them: back through the last layers, GELU, the hidden one and the layer norm,
// block by block as in linear.h; and those of weights and biases. Where weights are small and rows are many, a task adds what each of
// its blocks makes of the weights' gradients while the block is in its cache; elsewhere that comes after.
#pragma once
#include "layer_norm_gradient.h"
#include "weight_gradient.h"

namespace nbhd::NBHD_ISA {

constexpr int64_t least_blocks_of_slice = 4;

// What a part of a call computes: the gradient of the hidden layer's sums; that of the input, or of its norm's output, from it;
// what the norm makes of that; or all of them, of a block; or of a slice of blocks, and the weights' as well.
enum class GradientStage { hidden, input, norm, block, slice };

struct GradientJob {
    const LinearGradients *g;
    Weight hidden, last[most_layers]; // packed for the other way: their outputs are what was input
    float *d_hidden;                  // in words, [rows][hidden_stride], unless a task keeps that of its block
    int64_t hidden_stride;
    float *d_normalised; // where that is computed apart: [rows][padded(in)]
    float *of_norm;      // [blocks][2][in]: what each block adds to the gradients of its weight and bias
    bool wants_input;    // or what is computed from it
    Blocks blocks;
    int64_t slice_blocks;
    Groups groups;
    GradientStage stage;
    WeightJob weights;
    bool failed;

    template <class T>
    RowsOf<T> d_output(int p, int64_t row) const {
        return RowsOf<T>{(const T *)g->d_output[p], g->last[p].out}.from(row);
    }
    template <class T>
    RowsOf<T> added(int64_t row) const {
        return RowsOf<T>{(const T *)g->added, g->in}.from(row);
    }
    template <class T>
    RowsOf<T> input(int64_t row) const {
        return RowsOf<T>{(const T *)g->input, g->in}.from(row);
    }
    template <class T>
    T *d_input(int64_t row) const {
        return g->d_input ? (T *)g->d_input + row * g->in : nullptr;
    }

    // What a row of gradients of outputs needs where it is not words that tiles want as it lies.
    template <class T>
    int64_t widest_that_lies_badly() const {
        int64_t n = 0;
        for (int p = 0; p < g->n_last; p++)
            if (const int64_t out = g->last[p].out; out > n && !lie_well(d_output<T>(p, 0), out)) n = out;
        return n ? padded(words(n)) : 0;
    }
};

// Panels of the hidden layer whose gradients are computed before the input's gradient takes them.
constexpr int64_t step_panels = depth * numbers_of_word / panel_columns;

// Memory of a task for a block.
struct BlockRoom {
    int64_t d_output, d_normalised, d_hidden, sums_stride, sums; // numbers of each
    float *memory;

    BlockRoom(const GradientJob &job, int64_t widest_that_lies_badly) : memory(nullptr) {
        const int64_t rows = job.blocks.rows,
                      hidden_panels = job.stage == GradientStage::hidden ? job.groups.panels : step_panels;
        d_output = rows * widest_that_lies_badly, d_normalised = rows * padded(job.g->in);
        d_hidden = job.d_hidden ? 0 : rows * job.hidden_stride;
        // where words are no sums, those of the hidden layer
        sums_stride = pairs && job.g->hidden.out ? padded(hidden_panels * panel_columns) : 0;
        sums = rows * sums_stride;
    }
    int64_t size() const { return d_output + d_normalised + d_hidden + sums; }
    float *hidden_sums() const { return memory + d_output + d_normalised + d_hidden; }
};

// d_hidden of some panels, of the block; its rows begin with the first of all panels.
static void hidden_gradient(const GradientJob &job, Rows d, int64_t row, int64_t rows, int64_t begin, int64_t end,
                            float *d_hidden, const BlockRoom &room, Coming next) {
    const LinearGradients &g = *job.g;
    const Output in_words{d_hidden, job.hidden_stride},
        sums = pairs ? Output{room.hidden_sums() - begin * panel_columns, room.sums_stride} : in_words;
    Finish<Multiplied> f{};
    f.slope_at = {g.sums + row * g.hidden.out, g.hidden.out}, f.to = numbers(in_words);
    const int64_t out = words(g.last[0].out);
    multiply({d, rows, out, &job.last[0], out, 0, begin, end, sums.data, sums.stride, false, true, next}, f);
    if (end >= job.last[0].n_panels()) end_words(in_words, rows, g.hidden.out);
}

template <class T>
static void norm_gradient(const GradientJob &job, int64_t block, Rows d) {
    const LinearGradients &g = *job.g;
    const int64_t row = block * job.blocks.rows;
    float *of_norm = job.of_norm + block * 2 * g.in;
    normalise_backward(job.input<T>(row), g.moments + 2 * row, g.norm.weight, d, job.added<T>(row),
                       job.blocks.rows_of(block, g.rows), g.in, job.d_input<T>(row), of_norm, of_norm + g.in);
}

// Gradients of a block, or of the group's panels of it.
template <class T>
static void block_gradients(const GradientJob &job, int64_t block, int64_t group, const BlockRoom &room) {
    const LinearGradients &g = *job.g;
    const int64_t row = block * job.blocks.rows, rows = job.blocks.rows_of(block, g.rows), in_stride = padded(g.in);
    const bool has_hidden = g.hidden.out > 0, is_whole = job.stage >= GradientStage::block;
    const RowsOf<T> d_output = job.d_output<T>(0, row);
    float *d_hidden =
        job.d_hidden ? job.d_hidden + row * job.hidden_stride : room.memory + room.d_output + room.d_normalised;
    if (job.stage == GradientStage::hidden) {
        const int64_t end = job.groups.end(group, job.last[0].n_panels());
        const Rows d = to_words(d_output, rows, g.last[0].out, room.memory);
        return hidden_gradient(job, d, row, rows, group * job.groups.panels, end, d_hidden, room, {});
    }
    // where sums are made that become the input's gradient: there, or apart
    const bool is_apart = g.norm.is_there || !is_float<T>;
    float *to = job.d_normalised ? job.d_normalised + row * in_stride
                : is_apart       ? room.memory + room.d_output
                                 : (float *)job.d_input<T>(row);
    const int64_t stride = is_apart ? in_stride : g.in, panels = (g.in + panel_columns - 1) / panel_columns;
    const int64_t begin = is_whole ? 0 : group * job.groups.panels,
                  end = is_whole ? panels : job.groups.end(group, panels);
    Coming next_sums{}, next_d{}; // of the slice's next block
    if (job.stage == GradientStage::slice && block + 1 < job.blocks.count) {
        const int64_t next_rows = job.blocks.rows_of(block + 1, g.rows);
        if (has_hidden) next_sums = coming(Rows{g.sums, g.hidden.out}.from(row + rows), next_rows);
        next_d = coming(job.d_output<T>(0, row + rows), next_rows);
    }
    Finish<T> f{};
    f.residual = job.added<T>(row), f.to = {job.d_input<T>(row), g.in};
    const auto multiply_into = [&](const Product &p) {
        g.norm.is_there ? multiply(p, Finish<float>{}) : multiply(p, f);
    };
    if (has_hidden) {
        const Rows d = is_whole ? to_words(d_output, rows, g.last[0].out, room.memory) : Rows{};
        const int64_t n_hidden = words(g.hidden.out);
        for (int64_t k = 0, panel = 0; k < n_hidden; k += depth, panel += step_panels) {
            const int64_t n = n_hidden - k < depth ? n_hidden - k : depth;
            if (is_whole)
                hidden_gradient(job, d, row, rows, panel, panel + step_panels, d_hidden, room,
                                k ? Coming{} : next_sums);
            if (job.wants_input)
                multiply_into({{d_hidden + k, job.hidden_stride},
                               rows,
                               n,
                               &job.hidden,
                               n_hidden,
                               k,
                               begin,
                               end,
                               to,
                               stride,
                               k > 0,
                               k + n == n_hidden,
                               k ? Coming{} : next_d});
        }
    } else if (job.wants_input) {
        for (int p = 0; p < g.n_last; p++) {
            const int64_t out = g.last[p].out;
            const Rows d = to_words(job.d_output<T>(p, row), rows, out, room.memory);
            const int64_t n = words(out);
            multiply_into({d, rows, n, &job.last[p], n, 0, begin, end, to, stride, p > 0, p + 1 == g.n_last,
                           p + 1 == g.n_last ? next_d : Coming{}});
        }
    }
    if (is_whole && g.norm.is_there && job.wants_input) norm_gradient<T>(job, block, {to, stride});
}

// A slice of blocks, with what they add to the weights' gradients.
template <class T>
static void slice_gradients(const GradientJob &job, int64_t slice, const BlockRoom &room) {
    const LinearGradients &g = *job.g;
    const int64_t begin = slice * job.slice_blocks,
                  end = begin + job.slice_blocks < job.blocks.count ? begin + job.slice_blocks : job.blocks.count;
    Share shares[most_products] = {};
    for (int i = 0; i < job.weights.n; i++)
        shares[i] = {slice, 0, job.weights.plans[i].n_strips, 0, job.weights.plans[i].panels};
    for (int64_t block = begin; block < end; block++) {
        float *lost = room.memory + room.size();
        float *const of_weights = lost + shares[0].sums_room() + (job.weights.n > 1 ? shares[1].sums_room() : 0);
        if (job.wants_input || g.hidden.out) block_gradients<T>(job, block, 0, room);
        const int64_t row = block * job.blocks.rows;
        for (int i = 0; i < job.weights.n; i++) {
            const Output d_hidden{room.memory + room.d_output + room.d_normalised, job.hidden_stride};
            add_rows(job.weights.plans[i], shares[i], multiplied(d_hidden), row, job.blocks.rows_of(block, g.rows),
                     block > begin, job.blocks.rows, of_weights, lost);
            lost += shares[i].sums_room();
        }
    }
}

template <class T>
static void gradient_task(int64_t i, void *context) {
    GradientJob &job = *(GradientJob *)context;
    const int64_t block = i / job.groups.count, group = i % job.groups.count;
    if (job.stage == GradientStage::norm)
        return norm_gradient<T>(job, block,
                                {job.d_normalised + block * job.blocks.rows * padded(job.g->in), padded(job.g->in)});
    BlockRoom room(job, job.widest_that_lies_badly<T>());
    int64_t of_weights = 0, of_sums = 0;
    for (int p = 0; p < job.weights.n; p++) {
        const Share share{0, 0, job.weights.plans[p].n_strips, 0, 0};
        of_weights = share.room(job.blocks.rows) > of_weights ? share.room(job.blocks.rows) : of_weights;
        of_sums += share.sums_room();
    }
    room.memory = (float *)thread_scratch((room.size() + of_weights + of_sums) * int64_t(sizeof(float)));
    if (!room.memory) __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
    else if (job.stage == GradientStage::slice) slice_gradients<T>(job, i, room);
    else block_gradients<T>(job, block, group, room);
}

template <class T>
static void run_stage(GradientJob &job, GradientStage stage, int64_t panels, const Threads &threads) {
    job.stage = stage;
    const bool by_panels = stage == GradientStage::hidden || stage == GradientStage::input;
    job.groups = by_panels ? Groups{panels, job.blocks.count, threads} : Groups{};
    const int64_t slices = job.slice_blocks ? (job.blocks.count + job.slice_blocks - 1) / job.slice_blocks : 0;
    run_tasks(threads, stage == GradientStage::slice ? slices : job.blocks.count * job.groups.count, gradient_task<T>,
              &job);
}

template <class T>
static bool input_gradients(GradientJob &job, const Threads &threads) {
    const LinearGradients &g = *job.g;
    if (job.blocks.are_many(threads)) {
        run_stage<T>(job, GradientStage::block, 1, threads);
        return !job.failed;
    }
    if (g.hidden.out) run_stage<T>(job, GradientStage::hidden, job.last[0].n_panels(), threads);
    if (!job.wants_input || job.failed) return !job.failed;
    if (g.norm.is_there) {
        job.d_normalised = (float *)allocate(g.rows * padded(g.in) * int64_t(sizeof(float)));
        if (!job.d_normalised) return false;
    }
    run_stage<T>(job, GradientStage::input, (g.in + panel_columns - 1) / panel_columns, threads);
    if (g.norm.is_there && !job.failed) run_stage<T>(job, GradientStage::norm, 1, threads);
    release(job.d_normalised);
    return !job.failed;
}

// The sum of what all blocks have for one of the norm's gradients.
static void gather_blocks(const GradientJob &job, const float *of_blocks, float *to) {
    const int64_t n = job.g->in;
    if (!to) return;
    copy(of_blocks, n, to, n, 1, n);
    add_up(of_blocks + 2 * n, job.blocks.count - 1, 2 * n, n, to);
}

// The products that make the wanted gradients of weights. Returns how many.
template <class T>
static int weight_products(const GradientJob &job, WeightProduct *products) {
    const LinearGradients &g = *job.g;
    const bool has_hidden = g.hidden.out > 0;
    const RowsOf<T> input = job.input<T>(0);
    const Made made = g.norm.is_there ? Made::by_norm : Made::as_it_is;
    int n = 0;
    bool any = false;
    WeightProduct last{};
    last.rows = g.rows, last.layers = g.n_last, last.factor = g.factor, last.norm = g.norm, last.moments = g.moments;
    for (int p = 0; p < g.n_last; p++) {
        last.d[p] = job.d_output<T>(p, 0), last.out[p] = g.last[p].out;
        last.d_weight[p] = g.d_weight[p], last.d_bias[p] = g.d_bias[p];
        any = any || g.d_weight[p] || g.d_bias[p];
    }
    last.x = has_hidden ? AnyRows(Rows{g.sums, g.hidden.out}) : AnyRows(input),
    last.in = has_hidden ? g.hidden.out : g.in;
    last.made = has_hidden ? Made::by_gelu : made;
    if (any) products[n++] = last;
    if (has_hidden && (g.d_hidden_weight || g.d_hidden_bias)) {
        WeightProduct hidden{};
        hidden.rows = g.rows, hidden.layers = 1, hidden.factor = 1, hidden.norm = g.norm, hidden.moments = g.moments;
        hidden.d[0] = multiplied({job.d_hidden, job.hidden_stride}), hidden.out[0] = g.hidden.out;
        hidden.d_weight[0] = g.d_hidden_weight, hidden.d_bias[0] = g.d_hidden_bias;
        hidden.x = input, hidden.in = g.in, hidden.made = made;
        products[n++] = hidden;
    }
    return n;
}

template <class T>
static bool linear_gradients_of(const LinearGradients &g, const Threads &threads) {
    GradientJob job{};
    const bool has_hidden = g.hidden.out > 0;
    job.g = &g, job.blocks = {g.rows, g.hidden.out > g.in ? g.hidden.out : g.in};
    job.wants_input = g.d_input || (g.norm.is_there && (g.d_norm_weight || g.d_norm_bias));
    job.hidden_stride = has_hidden ? padded(words(g.hidden.out)) : 0;
    const bool by_slices = numbers_of_weights(g) <= small_weights && job.blocks.count >= 4 * least_blocks_of_slice;
    const bool needs_blocks = job.wants_input || (has_hidden && (g.d_hidden_weight || g.d_hidden_bias));
    bool done = true;
    float *packed = nullptr;
    if (needs_blocks) {
        Packing packings[1 + most_layers];
        int n = 0;
        for (int p = 0; p < g.n_last; p++)
            packings[n++] = {&g.last[p], Dtype::float32, has_hidden ? g.hidden.out : g.in, true, g.factor, nullptr};
        if (has_hidden && job.wants_input) packings[n++] = {&g.hidden, Dtype::float32, g.in, true, 1, nullptr};
        packed = pack_all(packings, n, threads);
        done = packed != nullptr;
        for (int i = 0; i < n && done; i++)
            (i < g.n_last ? job.last[i] : job.hidden) =
                Weight{packings[i].n_outputs(), packings[i].panels, nullptr, nullptr};
        if (has_hidden && !by_slices) {
            job.d_hidden = (float *)allocate(g.rows * job.hidden_stride * int64_t(sizeof(float)));
            done = done && job.d_hidden;
        }
        if (g.norm.is_there) {
            job.of_norm = (float *)allocate(job.blocks.count * 2 * g.in * int64_t(sizeof(float)));
            done = done && job.of_norm;
        }
    }
    WeightProduct products[most_products]{};
    const int n = weight_products<T>(job, products);
    if (done && needs_blocks && by_slices) {
        const int64_t slices = job.blocks.count / least_blocks_of_slice < most_slices
                                   ? job.blocks.count / least_blocks_of_slice
                                   : most_slices;
        job.slice_blocks = (job.blocks.count + slices - 1) / slices;
        done = !n || prepare(job.weights, products, n, job.slice_blocks * job.blocks.rows, threads);
        if (done) run_stage<T>(job, GradientStage::slice, 1, threads);
        done = done && !job.failed;
        if (n) finish(job.weights, done, threads);
    } else if (done) {
        done = (!needs_blocks || input_gradients<T>(job, threads)) && (!n || weight_gradients(products, n, threads));
    }
    if (done && g.norm.is_there && job.wants_input) {
        gather_blocks(job, job.of_norm, g.d_norm_weight);
        gather_blocks(job, job.of_norm + g.in, g.d_norm_bias);
    }
    release(job.of_norm), release(job.d_hidden), release(packed);
    return done;
}

static bool linear_gradients(const LinearGradients &g, const Threads &threads) {
    return with_type(g.dtype, nullptr, [&]<class T>(const T *) { return linear_gradients_of<T>(g, threads); });
}

} // namespace nbhd::NBHD_ISA
