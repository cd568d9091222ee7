// The forward pass of a task: pack keys and values row by row, then for each tile of queries scores, softmax, weighted sum.
#pragma once
#include "bias.h"
#include "ring.h"
#include "weighted_sum.h"

namespace nbhd::NBHD_ISA {

constexpr int forward_transposed = 1, forward_rows = 1; // copies of a key's channels: K transposed, V as it is

// Buffers of one block, for all heads of a task.
struct ForwardBuffers {
    Ring ring;
    Real *keys, *values; // [head][slot][channel][key] and [head][slot][key][channel]
    int64_t keys_head, values_head;
    ColumnTile *columns;
    int n_columns;
    KeyRow *key_rows;
    BiasTables bias;
    Real *query, *scores, *maximum, *normaliser, *out;
};

static int lay_out_columns(Arena &arena, const Map &m, const Block &b, ColumnTile *&tiles, int &sets) {
    int n = 0;
    sets = 1;
    for (int x = b.begin[2]; x < b.end[2]; n++) {
        const ColumnTile t = column_tile(m.axis[2], x, b.end[2], b.key_begin[2]);
        sets += !t.plain;
        x += t.n;
    }
    tiles = arena.take<ColumnTile>(n);
    if (tiles) {
        int set = 1, i = 0;
        for (int x = b.begin[2]; x < b.end[2]; x += tiles[i++].n) {
            tiles[i] = column_tile(m.axis[2], x, b.end[2], b.key_begin[2]);
            if (!tiles[i].plain) tiles[i].bias_set = set++;
        }
    }
    return n;
}

static void lay_out(ForwardBuffers &f, Arena &arena, const Problem &p, const Map &m, const Block &b, const Task &t) {
    const int kv_heads = t.head_end - t.head_begin, heads = kv_heads * p.queries_per_kv_head();
    int sets;
    f.ring = make_ring(m, b);
    f.n_columns = lay_out_columns(arena, m, b, f.columns, sets);
    f.key_rows = arena.take<KeyRow>(most_key_rows(m, b));
    f.keys_head = f.ring.shape.slots() * f.ring.transposed_row(p.dim);
    f.values_head = f.ring.shape.slots() * f.ring.natural_row(p.dim_v);
    f.keys = arena.take<Real>(kv_heads * f.keys_head + lanes);
    f.values = arena.take<Real>(kv_heads * f.values_head);
    lay_out_bias(f.bias, arena, p, heads, sets, false);
    f.query = arena.take<Real>(tile_rows * p.dim * lanes);
    f.scores = arena.take<Real>((int64_t)tile_rows * p.window() * lanes);
    f.maximum = arena.take<Real>(tile_rows * lanes);
    f.normaliser = arena.take<Real>(tile_rows * lanes);
    f.out = arena.take<Real>(tile_rows * lanes * round_up(p.dim_v));
}

// Scores of a whole tile with packed keys of one head, from bias table `head` when start says so.
static void tile_scores(const Problem &p, const RowTile &t, const ColumnTile &c, const Ring &ring, const Real *query, int channels,
                        const Real *keys, const BiasTables *bias, int head, Real *scores_out, Real *maximum) {
    const int kernel = p.axis[2].kernel;
    const int64_t row_scores = (int64_t)p.window() * lanes, slot_scores = (int64_t)kernel * lanes;
    ScoreBlock s;
    s.query_row = (int64_t)channels * lanes, s.pitch = ring.pitch, s.channels = channels, s.index = &c.index;
    s.start = !bias || !bias->present ? Start::zero : c.plain ? Start::shared : Start::by_lane;
    for (int i = 0; i < t.key_rows; i++) {
        const KeyRow &key = t.key[i];
        const int n = key.end - key.begin;
        if (n <= 0) continue;
        s.query = query + key.begin * s.query_row;
        s.keys = keys + key.ring * ring.transposed_row(channels) + c.origin;
        s.maximum = maximum ? maximum + key.begin * lanes : nullptr;
        for (int k = 0; k < n; k++) {
            const int r = key.begin + k, row = key.bias_row - r;
            s.scores[k] = scores_out + r * row_scores + (key.slot - t.shift[r]) * slot_scores;
            if (s.start == Start::shared) s.bias[k] = bias->compact_row(head, row) + c.bias_column;
            else if (s.start == Start::by_lane) {
                if (bias->expanded) s.bias[k] = bias->table_row(head, c.bias_set, row);
                else gather_bias(*bias, head, row, c, s.scores[k]), s.bias[k] = s.scores[k];
            }
        }
        scores(s, n, kernel, !c.plain);
    }
}

template <class T>
static void forward_tile(const Problem &p, const View<const T> &query, const View<T> &out, const View<Real> &lse, ForwardBuffers &f,
                         const RowTile &t, const ColumnTile &c, int local_kv_head, int head, int local_head) {
    const int slots = p.window();
    const bool holes = has_holes(t, c, p);
    for (int r = 0; r < t.n; r++) {
        pack_transposed(query.at(t.z, t.y + r, c.x, head), query.x, c.n, p.dim, f.query + r * p.dim * lanes, lanes,
                        Real(p.scale) * log2_e);
        store(f.maximum + r * lanes, splat(nothing));
    }
    tile_scores(p, t, c, f.ring, f.query, p.dim, f.keys + local_kv_head * f.keys_head, &f.bias, local_head, f.scores, f.maximum);
    for (int r = 0; r < t.n; r++) {
        Real *scores = f.scores + (int64_t)r * slots * lanes;
        Vec m = load(f.maximum + r * lanes);
        if (holes) fill_holes(scores, t, r, c, p, nothing), m = row_maximum(scores, slots);
        const Vec sum = exponentials(scores, slots, m);
        store(f.normaliser + r * lanes, splat(Real(1)) / sum);
        const Vec l = (m + log2(sum)) * splat(ln_2);
        Real *to = lse.at(t.z, t.y + r, c.x, head);
        for (int i = 0; i < c.n; i++) to[i * lse.x] = l[i];
    }
    WeightedSum s;
    s.weights = f.scores, s.weights_row = (int64_t)slots * lanes, s.kernel = p.axis[2].kernel;
    s.values = f.values + local_kv_head * f.values_head, s.ring_row = f.ring.natural_row(p.dim_v), s.width = round_up(p.dim_v);
    s.rows = &t, s.first = c.first, s.end = c.end, s.normaliser = f.normaliser, s.factor = 1;
    weighted_sum_to(s, c.n, out.at(t.z, t.y, c.x, head), out.y, out.x, p.dim_v, f.out);
}

template <class T>
static void forward_map(const Problem &p, const Map &m, const Block &b, const Task &task, ForwardBuffers &f) {
    const auto query = view<const T>(p.query, p, m), key = view<const T>(p.key, p, m), value = view<const T>(p.value, p, m);
    const auto out = view<T>(p.out, p, m);
    const auto lse = lse_view(p.lse, p, m);
    const int group = p.queries_per_kv_head();
    restart(f.ring, b);
    for (int z = b.begin[0]; z < b.end[0]; z++)
        for (int y = b.begin[1]; y < b.end[1]; y += tile_rows) {
            RowTile t;
            t.key = f.key_rows;
            const int n = y + tile_rows < b.end[1] ? tile_rows : b.end[1] - y;
            row_tile(t, m.axis[0], m.axis[1], f.ring.shape, z, y, n);
            int from, to;
            leading_range(f.ring, m, z, y, n, from, to);
            if (f.ring.packed < from) f.ring.packed = from;
            for_each_row(f.ring, b, f.ring.packed, to, [&](int kz, int ky, int slot) {
                for (int x = 0; x < f.ring.width; x += lanes) // heads inside: a token's channels lie side by side
                    for (int h = task.head_begin; h < task.head_end; h++) {
                        const int n = x + lanes < f.ring.width ? lanes : f.ring.width - x, local = h - task.head_begin;
                        pack_transposed(key.at(kz, ky, b.key_begin[2] + x, h), key.x, n, p.dim,
                                        f.keys + local * f.keys_head + slot * f.ring.transposed_row(p.dim) + x, f.ring.pitch, Real(1));
                        pack_rows(value.at(kz, ky, b.key_begin[2] + x, h), value.x, n, p.dim_v,
                                  f.values + local * f.values_head + slot * f.ring.natural_row(p.dim_v) + x * round_up(p.dim_v), Real(1));
                    }
            });
            if (f.ring.packed < to) f.ring.packed = to;
            for (int i = 0; i < f.n_columns; i++)
                for (int h = task.head_begin; h < task.head_end; h++)
                    for (int q = 0; q < group; q++) {
                        const int local = h - task.head_begin;
                        forward_tile<T>(p, query, out, lse, f, t, f.columns[i], local, h * group + q, local * group + q);
                    }
        }
}

struct ForwardJob {
    const Problem *p;
    Plan plan;
    bool failed; // by any thread: out of memory
};

template <class T> static void forward_task(int64_t i, void *context) {
    ForwardJob &job = *(ForwardJob *)context;
    const Problem &p = *job.p;
    const Task task = task_of(job.plan, p, i);
    const int group = p.queries_per_kv_head(), heads = (task.head_end - task.head_begin) * group;
    for (int64_t n = task.map_begin; n < task.map_end;) {
        const Map m = map_of(p, n);
        const int64_t images = p.batch - m.batch < task.map_end - n ? p.batch - m.batch : task.map_end - n;
        for_each_block(job.plan, m, task.lead, [&](const Block &b) {
            ForwardBuffers f;
            Arena arena;
            lay_out(f, arena, p, m, b, task);
            void *memory = thread_scratch(arena.used);
            if (!memory) {
                __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
                return;
            }
            arena = Arena{(char *)memory};
            lay_out(f, arena, p, m, b, task);
            fill_bias(f.bias, p, task.head_begin * group, heads, f.columns, f.n_columns);
            for (int64_t image = 0; image < images; image++) {
                Map one = m;
                one.batch += int(image);
                forward_map<T>(p, one, b, task, f);
            }
        });
        n += images;
    }
}

template <class T> static bool forward_as(const Problem &p, const Threads &threads) {
    ForwardJob job{&p, make_plan(p, forward_transposed, forward_rows), false};
    run_tasks(threads, job.plan.tasks(), forward_task<T>, &job);
    return !job.failed;
}

static bool forward(const Problem &p, const Threads &threads) {
#if NBHD_DOUBLE
    return forward_as<double>(p, threads);
#else
    if (p.dtype == Dtype::bfloat16) return forward_as<BFloat16>(p, threads);
    if (p.dtype == Dtype::float16) return forward_as<Float16>(p, threads);
    return forward_as<float>(p, threads);
#endif
}

} // namespace nbhd::NBHD_ISA
