// Linear layers over so few rows that a weight serves one task alone. A task packs a panel where it is about to be used, as many
// inputs at a time as stay in its first-level cache: nothing packed is ever in memory, and nobody waits for it.
#pragma once
#include "layer_rows.h"

namespace nbhd::NBHD_ISA {

constexpr int64_t few_rows = 2 * most_rows;

static bool are_few_rows(const LinearLayers &l) {
    bool are_packed = l.hidden.out && l.hidden.panels;
    for (int p = 0; p < l.n_last; p++) are_packed = are_packed || l.last[p].panels;
    return l.rows <= few_rows && !are_packed;
}

// The hidden layer, or the last ones.
struct FewRowsJob {
    const LinearLayers *l;
    Rows a; // words, the inputs of the layers
    float *room;
    const Weight *weights;
    int n_weights;
    int64_t in;     // numbers
    Output between; // words that the hidden layer makes; without data: these are the last ones
    Blocks blocks;
    Groups groups; // of the panels of all of them
    bool failed;   // by any thread: out of memory

    int64_t n_panels() const {
        int64_t n = 0;
        for (int p = 0; p < n_weights; p++) n += weights[p].n_panels();
        return n;
    }
};

// One panel of a layer over all rows, of whose outputs T are made.
template <class T>
static void panel_of_few_rows(const FewRowsJob &job, int p, int64_t panel, float *room, Output sums,
                              const Finish<T> &f) {
    const LinearLayers &l = *job.l;
    const Weight &w = job.weights[p];
    const int64_t first = panel * panel_columns, left = w.out - first,
                  columns = left < panel_columns ? left : panel_columns;
    const int64_t size = l.parameter_dtype == Dtype::float32 ? 4 : 2, next = (first + panel_columns) * job.in,
                  next_columns = left - panel_columns < panel_columns ? left - panel_columns : panel_columns;
    constexpr int64_t step = depth * numbers_of_word;
    for (int64_t k = 0; k < job.in; k += step) {
        const int64_t n = job.in - k < step ? job.in - k : step;
        with_type(l.parameter_dtype, w.source,
                  [&](const auto *source) { pack_inputs(source + first * job.in + k, job.in, columns, n, room); });
        const Weight packed{w.out, room - panel * words(n) * panel_columns, nullptr, nullptr};
        // The next panel's weights lie together; a part of them is asked for with each part of this one.
        const Coming coming = next_columns > 0 ? Coming{(const char *)w.source + (next + k * next_columns) * size,
                                                        n * next_columns * size}
                                               : Coming{};
        multiply({{job.a.data + words(k), job.a.stride},
                  l.rows,
                  words(n),
                  &packed,
                  words(n),
                  0,
                  panel,
                  panel + 1,
                  sums.data,
                  sums.stride,
                  k > 0,
                  k + n == job.in,
                  coming},
                 f);
    }
}

// The same of the hidden layer, or of the last ones.
template <class T>
static void panel_of_few_rows(const FewRowsJob &job, int p, int64_t panel, float *room) {
    const LinearLayers &l = *job.l;
    const Output sums{room + depth * panel_columns - panel * panel_columns, panel_columns};
    if (job.between.data) {
        panel_of_few_rows(job, p, panel, room, pairs ? sums : job.between, hidden_finish(l, 0, job.between));
        if ((panel + 1) * panel_columns >= l.hidden.out) end_words(job.between, l.rows, l.hidden.out);
        return;
    }
    const LastSums<T> last{&l, 0, sums};
    panel_of_few_rows(job, p, panel, room, last.of(p), last.finish(p));
}

template <class T>
static void few_rows_task(int64_t i, void *context) {
    FewRowsJob &job = *(FewRowsJob *)context;
    const int64_t sums = is_float<T> && !pairs ? 0 : job.l->rows * panel_columns;
    float *const room = (float *)thread_scratch((depth * panel_columns + sums) * int64_t(sizeof(float)));
    if (!room) {
        __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
        return;
    }
    int64_t panel = i * job.groups.panels, left = job.groups.end(i, job.n_panels()) - panel;
    for (int p = 0; left > 0; panel -= job.weights[p++].n_panels())
        for (; panel < job.weights[p].n_panels() && left > 0; panel++, left--)
            panel_of_few_rows<T>(job, p, panel, room);
}

// A block's inputs, where they are not as they lie.
template <class T>
static void few_inputs_task(int64_t block, void *context) {
    const FewRowsJob &job = *(const FewRowsJob *)context;
    const int64_t row = block * job.blocks.rows;
    inputs<T>(*job.l, row, job.blocks.rows_of(block, job.l->rows), true, job.room + row * job.a.stride);
}

template <class T>
static bool linear_of_few_rows(const LinearLayers &l, const Threads &threads) {
    FewRowsJob job{&l, {}, nullptr, nullptr, 0, l.in, {}, {l.rows, l.in}, {}, false};
    const RowsOf<T> as_they_lie = rows_of<T>(l.input, 0);
    const bool as_given = !l.norm.is_there && lie_well(as_they_lie, l.in);
    const int64_t in_stride = inputs_stride(l), between_stride = padded(words(l.hidden.out));
    const int64_t of_inputs = as_given ? 0 : l.rows * in_stride, of_hidden = l.hidden.out ? l.rows * between_stride : 0;
    float *const memory =
        of_inputs + of_hidden ? (float *)allocate((of_inputs + of_hidden) * int64_t(sizeof(float))) : nullptr;
    if (of_inputs + of_hidden && !memory) return false;
    if (as_given) {
        job.a = as_words(as_they_lie);
    } else {
        job.room = memory, job.a = {memory, in_stride};
        run_tasks(threads, job.blocks.count, few_inputs_task<T>, &job);
    }
    const auto run = [&](const Weight *weights, int n) {
        job.weights = weights, job.n_weights = n;
        job.groups = Groups{job.n_panels(), 1, threads};
        run_tasks(threads, job.groups.count, few_rows_task<T>, &job);
    };
    if (l.hidden.out) {
        job.between = {memory + of_inputs, between_stride};
        run(&l.hidden, 1);
        job.a = {job.between.data, between_stride}, job.in = l.hidden.out, job.between = {};
    }
    if (!job.failed) run(l.last, l.n_last);
    release(memory);
    return !job.failed;
}

} // namespace nbhd::NBHD_ISA
