// Linear layers over rows, with what stands around them in a transformer: a layer norm before, GELU between two of them, a
// factor and a residual after. A task has a block of rows; what it makes between input and output stays in its cache.
#pragma once
#include "layer_norm.h"
#include "product.h"

namespace nbhd::NBHD_ISA {

// What a part of a call computes: all; the hidden layer, or what comes after it.
enum class Stage { whole, hidden, last };

// A part of a call that threads share: row blocks times groups of panels.
struct LinearJob {
    const LinearLayers *l;
    Weight hidden, last[most_layers]; // packed
    float *between;                   // the hidden layer's output where it is computed apart: [rows][between_stride]
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

// The block's inputs as the tiles want them.
static Rows inputs(const LinearLayers &l, int64_t row, int64_t rows, bool keeps_moments, float *room) {
    const Rows as_they_lie = l.input.from(row);
    if (!l.norm.is_there) return apart(as_they_lie, rows, l.in, room);
    float *moments = keeps_moments && l.moments ? l.moments + 2 * row : nullptr;
    normalise(as_they_lie, l.norm, l.epsilon, rows, l.in, moments, room, padded(l.in));
    return {room, padded(l.in)};
}

static void linear_block(LinearJob &job, int64_t block, int64_t group, bool goes_on) {
    const LinearLayers &l = *job.l;
    const int64_t row = block * job.blocks.rows, rows = job.blocks.rows_of(block, l.rows), in_stride = padded(l.in),
                  between_stride = padded(depth);
    const bool has_hidden = l.hidden.out > 0, from_hidden = job.stage == Stage::last && has_hidden;
    float *room = nullptr;
    if (!from_hidden) {
        room = (float *)thread_scratch(job.blocks.rows * (in_stride + between_stride) * int64_t(sizeof(float)));
        if (!room) {
            __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
            return;
        }
    }
    const Output sums{l.sums ? l.sums + row * l.hidden.out : nullptr, l.hidden.out};
    const Finish of_hidden{l.hidden.bias, nullptr, {}, true, sums, {}};
    const Rows a = from_hidden ? Rows{job.between + row * job.between_stride, job.between_stride}
                               : inputs(l, row, rows, !group, room);
    const Coming next_input =
        goes_on ? coming(l.input.from(row + rows), job.blocks.rows_of(block + 1, l.rows)) : Coming{};
    const auto output_of = [&](int p) { return Rows{l.output[p].data, l.output[p].stride}.from(row); };
    if (job.stage == Stage::whole && has_hidden) {
        const Finish of_last{l.last[0].bias, l.scale, l.residual.from(row), l.gelu, {}, {}};
        float *between = room + job.blocks.rows * in_stride, *output = l.output[0].data + row * l.output[0].stride;
        for (int64_t k = 0; k < l.hidden.out; k += depth) {
            const int64_t n = l.hidden.out - k < depth ? l.hidden.out - k : depth, panels = depth / panel_columns,
                          begin = k / panel_columns;
            const Coming output_rows = goes_on && !k ? coming(output_of(0), rows) : Coming{};
            multiply({a, rows, l.in, &job.hidden, l.in, 0, begin, begin + panels, between - k, between_stride, false,
                      true, output_rows},
                     of_hidden);
            multiply({{between, between_stride},
                      rows,
                      n,
                      &job.last[0],
                      l.hidden.out,
                      k,
                      0,
                      job.last[0].n_panels(),
                      output,
                      l.output[0].stride,
                      k > 0,
                      k + n == l.hidden.out,
                      k ? Coming{} : next_input},
                     of_last);
        }
        return;
    }
    if (job.stage == Stage::hidden) {
        const int64_t end = job.groups.end(group, job.hidden.n_panels());
        multiply({a,
                  rows,
                  l.in,
                  &job.hidden,
                  l.in,
                  0,
                  group * job.groups.panels,
                  end,
                  job.between + row * job.between_stride,
                  job.between_stride,
                  false,
                  true,
                  {}},
                 of_hidden);
        return;
    }
    const int64_t in = has_hidden ? l.hidden.out : l.in;
    int64_t begin = group * job.groups.panels, end = job.groups.end(group, job.last_panels());
    for (int p = 0; p < l.n_last; p++) {
        const int64_t panels = job.last[p].n_panels();
        if (begin < panels && end > 0) {
            const Finish f{l.last[p].bias, l.scale, l.residual.from(row), l.gelu, {}, {}};
            const Coming next = !goes_on ? Coming{} : p + 1 < l.n_last ? coming(output_of(p + 1), rows) : next_input;
            multiply({a, rows, in, &job.last[p], in, 0, begin > 0 ? begin : 0, end < panels ? end : panels,
                      l.output[p].data + row * l.output[p].stride, l.output[p].stride, false, true, next},
                     f);
        }
        begin -= panels, end -= panels;
    }
}

static void linear_task(int64_t i, void *context) {
    LinearJob &job = *(LinearJob *)context;
    if (job.run == 1) return linear_block(job, i / job.groups.count, i % job.groups.count, false);
    const int64_t end = (i + 1) * job.run < job.blocks.count ? (i + 1) * job.run : job.blocks.count;
    for (int64_t block = i * job.run; block < end; block++) linear_block(job, block, 0, block + 1 < end);
}

static bool run_stage(LinearJob &job, Stage stage, const Threads &threads) {
    const int64_t panels = stage == Stage::hidden ? job.hidden.n_panels() : job.last_panels();
    job.stage = stage;
    job.groups = stage == Stage::whole ? Groups{} : Groups{panels, job.blocks.count, threads};
    // Small weights stay in the cache, and there is time to ask for something else.
    constexpr int64_t run = 4;
    const bool is_small = numbers_of_weights(*job.l) <= small_weights && job.groups.count == 1;
    job.run = is_small && job.blocks.count >= 4 * run * threads.count ? run : 1;
    run_tasks(threads, job.run > 1 ? (job.blocks.count + run - 1) / run : job.blocks.count * job.groups.count,
              linear_task, &job);
    return !job.failed;
}

static bool linear(const LinearLayers &l, const Threads &threads) {
    LinearJob job{&l, l.hidden, {}, nullptr, 0, {l.rows, l.in}, {}, Stage::whole, 1, false};
    Packing packings[1 + most_layers];
    Weight *packed[1 + most_layers];
    int n = 0;
    if (l.hidden.out && !l.hidden.panels) packed[n] = &job.hidden, packings[n++] = {&l.hidden, l.in, false, 1, nullptr};
    for (int p = 0; p < l.n_last; p++) {
        job.last[p] = l.last[p];
        if (!l.last[p].panels)
            packed[n] = &job.last[p],
            packings[n++] = {&l.last[p], l.hidden.out ? l.hidden.out : l.in, false, 1, nullptr};
    }
    float *const memory = n ? pack_all(packings, n, threads) : nullptr;
    if (n && !memory) return false;
    for (int i = 0; i < n; i++) packed[i]->panels = packings[i].panels;
    bool done;
    if (!l.hidden.out) {
        done = run_stage(job, Stage::last, threads);
    } else if (job.blocks.are_many(threads)) {
        done = run_stage(job, Stage::whole, threads);
    } else {
        job.between_stride = padded(l.hidden.out);
        job.between = (float *)allocate(l.rows * job.between_stride * int64_t(sizeof(float)));
        done = job.between && run_stage(job, Stage::hidden, threads) && run_stage(job, Stage::last, threads);
        release(job.between);
    }
    release(memory);
    return done;
}

} // namespace nbhd::NBHD_ISA
