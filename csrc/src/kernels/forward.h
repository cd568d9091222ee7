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
    PackedKeys keys;
    Real *values; // [head][slot][key][channel]
    int64_t values_head;
    ColumnTile *columns;
    ColumnTiles tiles;
    KeyRow *key_rows;
    BiasTables bias;
    Real *query, *scores, *maximum, *normaliser, *out;
};

static ColumnTiles lay_out_columns(Arena &arena, const Map &m, const Block &b, ColumnTile *&tiles) {
    const ColumnTiles n = make_column_tiles(m.axis[2], b.begin[2], b.end[2], b.key_begin[2], nullptr);
    tiles = arena.take<ColumnTile>(n.n);
    if (tiles) make_column_tiles(m.axis[2], b.begin[2], b.end[2], b.key_begin[2], tiles);
    return n;
}

static void lay_out(ForwardBuffers &f, Arena &arena, const Problem &p, const Map &m, const Block &b, const Task &t) {
    const int kv_heads = t.head_end - t.head_begin, heads = kv_heads * p.queries_per_kv_head();
    f.ring = make_ring(m, b);
    f.tiles = lay_out_columns(arena, m, b, f.columns);
    f.key_rows = arena.take<KeyRow>(most_key_rows(m, b));
    f.values_head = f.ring.shape.slots() * f.ring.natural_row(p.dim_v);
    f.keys = lay_out_keys(arena, f.ring, p.dim, p.axis[2].kernel, kv_heads, f.tiles.pairs);
    f.values = arena.take<Real>(kv_heads * f.values_head);
    lay_out_bias(f.bias, arena, p, heads, f.tiles.sets, false);
    f.query = arena.take<Real>(tile_rows * p.dim * lanes);
    f.scores = arena.take<Real>((int64_t)tile_rows * p.window() * lanes);
    f.maximum = arena.take<Real>(tile_rows * lanes);
    f.normaliser = arena.take<Real>(tile_rows * lanes);
    f.out = arena.take<Real>(tile_rows * lanes * round_up(p.dim_v));
}

// Scores of a whole tile with packed keys of one head, from bias table `head` when start says so.
static void tile_scores(const Problem &p, const RowTile &t, const ColumnTile &c, const PackedKeys &keys, int kv_head,
                        const Real *query, const BiasTables *bias, int head, Real *scores_out, Real *maximum) {
    const int kernel = p.axis[2].kernel, channels = keys.channels;
    const int64_t row_scores = (int64_t)p.window() * lanes;
    ScoreBlock s;
    s.score_step = p.axis[1].kernel * lanes;
    s.bias_step = bias && bias->expanded ? bias->rows_y * lanes : s.score_step;
    s.query_row = (int64_t)channels * lanes, s.pitch = c.keys == Keys::paired ? 2 * kernel : keys.pitch,
    s.channels = channels, s.index = &c.index;
    s.start = !bias || !bias->present ? Start::zero : c.bias_set ? Start::by_lane : Start::shared;
    for (int i = 0; i < t.key_rows; i++) {
        const KeyRow &key = t.key[i];
        const int n = key.end - key.begin;
        if (n <= 0) continue;
        s.query = query + key.begin * s.query_row;
        s.keys =
            c.keys == Keys::paired ? keys.pair_row(kv_head, c.pair, key.ring) : keys.row(kv_head, key.ring) + c.origin;
        s.maximum = maximum ? maximum + key.begin * lanes : nullptr;
        for (int k = 0; k < n; k++) {
            const int r = key.begin + k, row = key.bias_row - r;
            s.scores[k] = scores_out + r * row_scores + (int64_t)(key.slot - t.shift[r]) * lanes;
            if (s.start == Start::shared) s.bias[k] = bias->compact_row(head, row) + c.lane_column[0];
            else if (s.start == Start::by_lane) {
                if (bias->expanded) s.bias[k] = bias->table_row(head, c.bias_set, row);
                else gather_bias(*bias, head, row, c, s.scores[k], s.score_step), s.bias[k] = s.scores[k];
            }
        }
        scores(s, n, kernel, c.keys);
    }
}

template <class T>
static void forward_tile(const Problem &p, const View<const T> &query, const View<T> &out, const View<Real> &lse,
                         ForwardBuffers &f, const RowTile &t, const ColumnTile &c, int local_kv_head, int head,
                         int local_head) {
    const int slots = p.window();
    const bool holes = has_holes(t, c, p);
    for (int i = 0; i < c.runs; i++)
        for (int r = 0; r < t.n; r++)
            prefetch_tokens<true>(out.at(t.z, t.y + r, c.run[i].x, head), out.x, c.run[i].n, p.dim_v);
    for (int r = 0; r < t.n; r++) {
        const T *token[lanes] = {};
        for (int i = 0; i < c.n; i++) token[c.lane[i]] = query.at(t.z, t.y + r, c.x[i], head);
        pack_lanes(token, p.dim, f.query + r * p.dim * lanes, Real(p.scale) * log2_e);
        store(f.maximum + r * lanes, splat(nothing));
    }
    tile_scores(p, t, c, f.keys, local_kv_head, f.query, &f.bias, local_head, f.scores, f.maximum);
    for (int r = 0; r < t.n; r++) {
        Real *scores = f.scores + (int64_t)r * slots * lanes;
        Vec m = load(f.maximum + r * lanes);
        if (holes) fill_holes(scores, t, r, c, p, nothing), m = row_maximum(scores, slots);
        const Vec sum = exponentials(scores, slots, m);
        store(f.normaliser + r * lanes, splat(Real(1)) / sum);
        const Vec l = (m + log2(sum)) * splat(ln_2);
        Real *to = lse.at(t.z, t.y + r, 0, head);
        for (int i = 0; i < c.n; i++) to[c.x[i] * lse.x] = l[c.lane[i]];
    }
    WeightedSum s;
    s.weights = f.scores, s.weights_row = (int64_t)slots * lanes, s.step = p.axis[1].kernel * lanes;
    s.values = f.values + local_kv_head * f.values_head, s.ring_row = f.ring.natural_row(p.dim_v),
    s.width = round_up(p.dim_v);
    s.rows = &t, s.normaliser = f.normaliser, s.factor = 1;
    for (int i = 0; i < c.runs; i++) {
        const Run &run = c.run[i];
        s.first = c.first + run.index, s.end = c.end + run.index, s.lane = run.lane, s.lane_step = run.step;
        weighted_sum_to(s, run.n, out.at(t.z, t.y, run.x, head), out.y, out.x, p.dim_v, f.out);
    }
}

template <class T>
static void forward_map(const Problem &p, const Map &m, const Block &b, const Task &task, ForwardBuffers &f) {
    const auto query = view<const T>(p.query, p, m), key = view<const T>(p.key, p, m),
               value = view<const T>(p.value, p, m);
    const auto out = view<T>(p.out, p, m);
    const auto lse = lse_view(p.lse, p, m);
    const int group = p.queries_per_kv_head();
    restart(f.ring, b);
    for (int z = b.begin[0]; z < b.end[0]; z++)
        for (int y = b.begin[1]; y < b.end[1]; y += tile_rows) {
            RowTile t;
            t.key = f.key_rows;
            const int n = y + tile_rows < b.end[1] ? tile_rows : b.end[1] - y;
            row_tile(t, m.axis[0], m.axis[1], p.axis[2].kernel, f.ring.shape, z, y, n);
            int from, to;
            leading_range(f.ring, m, z, y, n, from, to);
            if (f.ring.packed < from) f.ring.packed = from;
            for_each_row(f.ring, b, f.ring.packed, to, [&](int kz, int ky, int slot) {
                for (int x = 0; x < f.ring.width; x += lanes) // heads inside: a token's channels lie side by side
                    for (int h = task.head_begin; h < task.head_end; h++) {
                        const int n = x + lanes < f.ring.width ? lanes : f.ring.width - x, local = h - task.head_begin;
                        pack_transposed(key.at(kz, ky, b.key_begin[2] + x, h), key.x, n, p.dim,
                                        f.keys.row(local, slot) + x, f.keys.pitch, Real(1));
                        pack_rows(value.at(kz, ky, b.key_begin[2] + x, h), value.x, n, p.dim_v,
                                  f.values + local * f.values_head + slot * f.ring.natural_row(p.dim_v) +
                                      (int64_t)x * round_up(p.dim_v),
                                  Real(1));
                    }
                pack_pairs_of(f.keys, slot, f.columns, f.tiles);
            });
            if (f.ring.packed < to) f.ring.packed = to;
            const NextRows next = next_rows(f.ring, b, z, y);
            for (int i = 0; i < f.tiles.n; i++)
                for (int h = task.head_begin; h < task.head_end; h++)
                    for (int q = 0; q < group; q++) {
                        const int local = h - task.head_begin;
                        for (int r = 0; r < f.columns[i].runs; r++) {
                            const Run &run = f.columns[i].run[r];
                            prefetch_rows(query, z, next.query_begin, next.query_end, run, h * group + q, p.dim);
                            if (q) continue;
                            prefetch_rows(key, b.key_begin[0], next.key_begin, next.key_end, run, h, p.dim);
                            prefetch_rows(value, b.key_begin[0], next.key_begin, next.key_end, run, h, p.dim_v);
                        }
                        forward_tile<T>(p, query, out, lse, f, t, f.columns[i], local, h * group + q,
                                        local * group + q);
                    }
        }
}

struct ForwardJob {
    const Problem *p;
    Plan plan;
    bool failed; // by any thread: out of memory
};

template <class T>
static void forward_task(int64_t i, void *context) {
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
            fill_bias(f.bias, p, task.head_begin * group, heads, f.columns, f.tiles.n);
            clear(f.keys);
            for (int64_t image = 0; image < images; image++) {
                Map one = m;
                one.batch += int(image);
                forward_map<T>(p, one, b, task, f);
            }
        });
        n += images;
    }
}

template <class T>
static bool forward_as(const Problem &p, const Threads &threads) {
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
