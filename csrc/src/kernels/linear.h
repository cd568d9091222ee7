// Linear layers over rows, with what stands around them in a transformer: a layer norm before, GELU between two of them, a
// factor and a residual after. A task has a block of rows; what it makes between input and output stays in its cache.
#pragma once
#include "few_rows.h"

namespace nbhd::NBHD_ISA {

// What a part of a call computes: all; the hidden layer, or what comes after it.
enum class Stage { whole, hidden, last };

// A part of a call that threads share: row blocks times groups of panels.
struct LinearJob {
    const LinearLayers *l;
    Weight hidden, last[most_layers]; // packed
    float *between; // the hidden layer's output in words, where it is computed apart: [rows][between_stride]
    int64_t between_stride;
    Blocks blocks;
    Groups groups;
    Stage stage;
    int64_t run; // blocks that a task computes one after another, asking for what the next one needs
    bool failed; // by any thread: out of memory

    int64_t last_panels() const {
        int64_t n = 0;
        for (int i = 0; i < l->n_last; i++) n += last[i].n_panels();
        return n;
    }
};

// Memory of a task for a block.
enum { input_room, hidden_room, hidden_sums_room, last_sums_room, n_rooms };

// Shares it among matrices of so many rows, each of which has its stride, or takes nothing. False: there is none.
static bool take(Output (&rooms)[n_rooms], int64_t rows) {
    int64_t columns = 0;
    for (const Output &room : rooms) columns += room.stride;
    float *next = columns ? (float *)thread_scratch(rows * columns * int64_t(sizeof(float))) : nullptr;
    if (columns && !next) return false;
    for (Output &room : rooms) room.data = next, next += rows * room.stride;
    return true;
}

template <class T>
static void linear_block(LinearJob &job, int64_t block, int64_t group, bool goes_on) {
    const LinearLayers &l = *job.l;
    const int64_t row = block * job.blocks.rows, rows = job.blocks.rows_of(block, l.rows);
    const bool has_hidden = l.hidden.out > 0, takes_hidden = job.stage == Stage::last && has_hidden,
               is_mlp = job.stage == Stage::whole && has_hidden, is_hidden = job.stage == Stage::hidden;
    // numbers of the hidden layer that are made before the last one takes them
    constexpr int64_t step = depth * numbers_of_word;
    Output rooms[n_rooms] = {};
    if (!takes_hidden) rooms[input_room].stride = padded(l.in);
    if (is_mlp) rooms[hidden_room].stride = padded(depth);
    if (pairs && (is_mlp || is_hidden))
        rooms[hidden_sums_room].stride = is_mlp ? padded(step) : padded(job.groups.panels * panel_columns);
    if (!is_float<T> && !is_hidden) rooms[last_sums_room].stride = padded(widest_last(l));
    if (!take(rooms, job.blocks.rows)) {
        __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
        return;
    }
    const LastSums<T> last{&l, row, rooms[last_sums_room]};
    const int64_t in = takes_hidden ? words(l.hidden.out) : words(l.in);
    const Output between =
        is_mlp ? rooms[hidden_room] : Output{job.between + row * job.between_stride, job.between_stride};
    const Rows a =
        takes_hidden ? Rows{between.data, between.stride} : inputs<T>(l, row, rows, !group, rooms[input_room].data);
    const Coming next_input =
        goes_on ? coming(rows_of<T>(l.input, row + rows), job.blocks.rows_of(block + 1, l.rows)) : Coming{};
    const auto output_rows = [&](int p) { return coming(rows_of<T>(l.output[p], row), rows); };
    // Words [begin, end) of the hidden layer; `to` and, where words are no sums, `room` begin with the first of them.
    const auto make_hidden = [&](int64_t begin, int64_t end, Output to, Output room, Coming next) {
        const int64_t first = begin * numbers_of_word;
        const Output from_first_word{to.data - begin, to.stride}, sums = pairs ? room : to;
        multiply({a, rows, in, &job.hidden, in, 0, first / panel_columns, end * numbers_of_word / panel_columns,
                  sums.data - first, sums.stride, false, true, next},
                 hidden_finish(l, row, from_first_word));
        if (end >= words(l.hidden.out)) end_words(from_first_word, rows, l.hidden.out);
    };
    if (is_mlp) {
        const Finish<T> of_last = last.finish(0);
        const Output to = last.of(0);
        const int64_t n_hidden = words(l.hidden.out);
        for (int64_t k = 0; k < n_hidden; k += depth) {
            const int64_t n = n_hidden - k < depth ? n_hidden - k : depth;
            make_hidden(k, k + depth, between, rooms[hidden_sums_room], goes_on && !k ? output_rows(0) : Coming{});
            multiply({{between.data, between.stride},
                      rows,
                      n,
                      &job.last[0],
                      n_hidden,
                      k,
                      0,
                      job.last[0].n_panels(),
                      to.data,
                      to.stride,
                      k > 0,
                      k + n == n_hidden,
                      k ? Coming{} : next_input},
                     of_last);
        }
        return;
    }
    if (is_hidden) {
        const int64_t begin = words(group * job.groups.panels * panel_columns),
                      end = words(job.groups.end(group, job.hidden.n_panels()) * panel_columns);
        return make_hidden(begin, end, {between.data + begin, between.stride}, rooms[hidden_sums_room], {});
    }
    int64_t begin = group * job.groups.panels, end = job.groups.end(group, job.last_panels());
    for (int p = 0; p < l.n_last; p++) {
        const int64_t panels = job.last[p].n_panels();
        if (begin < panels && end > 0) {
            const int64_t from = begin > 0 ? begin : 0, until = end < panels ? end : panels;
            const Coming next = !goes_on ? Coming{} : p + 1 < l.n_last ? output_rows(p + 1) : next_input;
            const Output to = last.of(p);
            multiply({a, rows, in, &job.last[p], in, 0, from, until, to.data, to.stride, false, true, next},
                     last.finish(p));
        }
        begin -= panels, end -= panels;
    }
}

template <class T>
static void linear_task(int64_t i, void *context) {
    LinearJob &job = *(LinearJob *)context;
    if (job.run == 1) return linear_block<T>(job, i / job.groups.count, i % job.groups.count, false);
    const int64_t end = (i + 1) * job.run < job.blocks.count ? (i + 1) * job.run : job.blocks.count;
    for (int64_t block = i * job.run; block < end; block++) linear_block<T>(job, block, 0, block + 1 < end);
}

template <class T>
static bool run_stage(LinearJob &job, Stage stage, const Threads &threads) {
    const int64_t panels = stage == Stage::hidden ? job.hidden.n_panels() : job.last_panels();
    job.stage = stage;
    job.groups = stage == Stage::whole ? Groups{} : Groups{panels, job.blocks.count, threads};
    // Small weights stay in the cache, and there is time to ask for something else.
    constexpr int64_t run = 4;
    const bool is_small = numbers_of_weights(*job.l) <= small_weights && job.groups.count == 1;
    job.run = is_small && job.blocks.count >= 4 * run * threads.count ? run : 1;
    run_tasks(threads, job.run > 1 ? (job.blocks.count + run - 1) / run : job.blocks.count * job.groups.count,
              linear_task<T>, &job);
    return !job.failed;
}

template <class T>
static bool linear_of_many_rows(const LinearLayers &l, const Threads &threads) {
    const int64_t columns = l.in + (is_float<T> ? 0 : widest_last(l)); // that a block keeps of its rows
    LinearJob job{&l, l.hidden, {}, nullptr, 0, {l.rows, columns}, {}, Stage::whole, 1, false};
    Packing packings[1 + most_layers];
    Weight *packed[1 + most_layers];
    int n = 0;
    if (l.hidden.out && !l.hidden.panels)
        packed[n] = &job.hidden, packings[n++] = {&l.hidden, l.parameter_dtype, l.in, false, 1, nullptr};
    for (int p = 0; p < l.n_last; p++) {
        job.last[p] = l.last[p];
        if (!l.last[p].panels)
            packed[n] = &job.last[p],
            packings[n++] = {&l.last[p], l.parameter_dtype, l.hidden.out ? l.hidden.out : l.in, false, 1, nullptr};
    }
    float *const memory = n ? pack_all(packings, n, threads) : nullptr;
    if (n && !memory) return false;
    for (int i = 0; i < n; i++) packed[i]->panels = packings[i].panels;
    bool done;
    if (!l.hidden.out) {
        done = run_stage<T>(job, Stage::last, threads);
    } else if (job.blocks.are_many(threads)) {
        done = run_stage<T>(job, Stage::whole, threads);
    } else {
        job.between_stride = padded(words(l.hidden.out));
        job.between = (float *)allocate(l.rows * job.between_stride * int64_t(sizeof(float)));
        done = job.between && run_stage<T>(job, Stage::hidden, threads) && run_stage<T>(job, Stage::last, threads);
        release(job.between);
    }
    release(memory);
    return done;
}

static bool linear(const LinearLayers &l, const Threads &threads) {
    return with_type(l.dtype, nullptr, [&]<class T>(const T *) {
        return are_few_rows(l) ? linear_of_few_rows<T>(l, threads) : linear_of_many_rows<T>(l, threads);
    });
}

} // namespace nbhd::NBHD_ISA
