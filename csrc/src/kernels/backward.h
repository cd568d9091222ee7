// The backward pass of a task. For each tile of queries: scores again, weights P from the log-sum-exp, dP = dO V^T,
// dS = P (dP - sum P dP + d_lse), then dQ = dS K, dV += P^T dO, dK += dS^T Q. The forward's output is not read. Of the halves,
// one is given dS and the other P, and they do what is left.
//
// Gradients of keys and values gather in a ring like the packed keys and leave it when no later tile sees them. Where a map is
// cut into blocks, neighbours share key rows: they add to the tensor, first the even cuts of the map, then the odd. A 16-bit
// gradient of such a row is rounded once for each of them, two as a rule; sums in float would be a second map in memory.
#pragma once
#include "forward.h"
#include "key_gradient.h"

namespace nbhd::NBHD_ISA {

constexpr int backward_transposed = 2, backward_rows = 3; // K and V transposed; K, dK and dV as they are

struct BackwardBuffers {
    Ring ring;
    PackedKeys keys, values;
    Real *key_rows_copy, *d_keys, *d_values; // [head][slot][key][channel]
    int64_t key_head, value_head;
    ColumnTile *columns;
    ColumnTiles tiles;
    KeyRow *key_rows;
    GradientBlock *blocks;
    int n_blocks, vectors_at_once;
    BiasTables bias;
    int strip;                                     // column tiles at a time, for which the buffers below are
    Real *query, *d_out, *query_rows, *d_out_rows; // [tile][row][channel][lane], [tile][row][query][channel]
    Real *scores, *d_scores, *part, *out;
    int *slot_order; // of the halves
};

static void lay_out(BackwardBuffers &f, Arena &arena, const Problem &p, const Map &m, const Block &b, const Task &t) {
    const int kv_heads = t.head_end - t.head_begin, heads = kv_heads * p.queries_per_kv_head();
    const int lane_heads = heads_in_lanes(p, m, t);
    lay_out_columns(f.tiles, f.columns, arena, m, b, lane_heads);
    f.ring = make_ring(m, b, lane_heads, f.tiles);
    f.key_rows = arena.take<KeyRow>(most_key_rows(m, b));
    f.blocks = arena.take<GradientBlock>(most_key_rows(m, b));
    const bool fours = round_up(p.dim) % (4 * lanes) == 0 && round_up(p.dim_v) % (4 * lanes) == 0;
    f.vectors_at_once = takes_four_vectors && fours ? 4 : 2;
    const int slots = f.ring.shape.slots();
    f.key_head = slots * f.ring.natural_row(p.dim), f.value_head = slots * f.ring.natural_row(p.dim_v);
    const bool has_keys = p.part != Part::sum, has_values = p.part != Part::scores;
    if (p.part == Part::attention) f.keys = lay_out_keys(arena, f.ring, p.dim, p.axis[2].kernel, kv_heads);
    else f.slot_order = arena.take<int>(p.window());
    f.strip = strip_tiles(p, 2);
    const int64_t strip_rows = f.strip * most_query_rows(p);
    if (has_keys) {
        f.key_rows_copy = arena.take<Real>(kv_heads * f.key_head);
        f.d_keys = arena.take<Real>(kv_heads * f.key_head);
        f.query = arena.take<Real>(strip_rows * score_words(p.dim) * lanes);
        f.query_rows = arena.take<Real>(strip_rows * lanes * round_up(p.dim));
    }
    if (has_values) {
        f.values = lay_out_keys(arena, f.ring, p.dim_v, p.axis[2].kernel, kv_heads);
        f.d_values = arena.take<Real>(kv_heads * f.value_head);
        f.d_out = arena.take<Real>(strip_rows * score_words(p.dim_v) * lanes);
        f.d_out_rows = arena.take<Real>(strip_rows * lanes * round_up(p.dim_v));
        f.scores = arena.take<Real>(strip_rows * p.window() * lanes);
    }
    lay_out_bias(f.bias, arena, p, heads, f.tiles, f.ring.heads, true);
    f.d_scores = arena.take<Real>(strip_rows * p.window() * lanes);
    if (sums_in_parts(f.keys) || sums_in_parts(f.values)) f.part = arena.take<Real>(strip_rows * p.window() * lanes);
    f.out = arena.take<Real>(tile_rows * lanes * round_up(p.dim));
}

template <class T>
struct BackwardViews {
    View<const T> query, key, value, d_out, weights, read_d_weights;
    View<T> d_query, d_key, d_value, d_weights;
    View<Real> lse, d_lse;
};

// Adds the score gradients of query row r to those of the bias. The slots of one z and x offset, and the bias rows they use, both
// follow one another.
template <class Add>
static void for_each_bias_run(const Problem &p, BackwardBuffers &f, const RowTile &t, const ColumnTile &c, int r,
                              int local_head, Add add) {
    const int kernel = p.axis[2].kernel, ky = p.axis[1].kernel, bias_rows_y = 2 * ky - 1,
              bias_row = t.key[0].bias_row - r + t.shift[r];
    for (int z = 0; z < t.z_count; z++) {
        Real *sum = f.bias.sum_row(f.bias.table_of(local_head), c.bias_set, bias_row + z * bias_rows_y);
        for (int x = 0; x < kernel; x++, sum += bias_rows_y * lanes)
            add((int64_t)(z * kernel + x) * ky * lanes, t.y_count[r], sum);
    }
}
static void scatter_bias_row(const Problem &p, BackwardBuffers &f, const RowTile &t, const ColumnTile &c, int r,
                             const Real *d, int local_head, Real *d_bias) {
    const int kernel = p.axis[2].kernel, ky = p.axis[1].kernel, bias_rows_y = 2 * ky - 1,
              bias_row = t.key[0].bias_row - r + t.shift[r];
    for (int z = 0; z < t.z_count; z++)
        for (int y = 0; y < t.y_count[r]; y++)
            scatter_bias(f.bias, f.bias.table_of(local_head), bias_row + z * bias_rows_y + y, c,
                         d + ((int64_t)z * kernel * ky + y) * lanes, ky * lanes, d_bias);
}

// Weights, score gradients and the bias gradient of query row r.
static void softmax_gradient(const Problem &p, BackwardBuffers &f, const RowTile &t, const ColumnTile &c, int r,
                             bool holes, Real *s, Real *d, const RowLse &lse, int local_head, Real *d_bias) {
    const int slots = p.window();
    if (holes) fill_holes(s, t, r, c, p, nothing), fill_holes(d, t, r, c, p, Real(0));
    RowGradient row = weights_and_delta(s, d, slots, holes, lse);
    if (d_bias && f.bias.expanded) {
        // the sums of plain tiles are of all lanes
        if (!c.bias_set && c.n < lanes) clear_idle_lanes(s, d, slots, c.n, row);
        return for_each_bias_run(p, f, t, c, r, local_head, [&](int64_t at, int n, Real *sum) {
            score_gradients_and_add(s + at, d + at, n, row, sum);
        });
    }
    score_gradients(s, d, slots, row);
    if (d_bias) scatter_bias_row(p, f, t, c, r, d, local_head, d_bias);
}

// The same for the halves: of the scores, whose gradients are given, or of the sum, whose weights are.
template <class T>
static void unfused_row(const Problem &p, const BackwardViews<T> &v, BackwardBuffers &f, const RowTile &t,
                        const ColumnTile &c, int r, bool holes, Real *s, Real *d, int head, int local_head,
                        Real *d_bias) {
    const int slots = p.window();
    if (p.part == Part::sum) {
        if (holes) fill_holes(d, t, r, c, p, Real(0));
        write_slots(d, f.slot_order, slots, v.d_weights, t, r, c, head);
        return read_slots(s, f.slot_order, slots, v.weights, t, r, c, head);
    }
    read_slots(d, f.slot_order, slots, v.read_d_weights, t, r, c, head);
    if (!d_bias) return;
    if (holes) fill_holes(d, t, r, c, p, Real(0));
    if (!f.bias.expanded) return scatter_bias_row(p, f, t, c, r, d, local_head, d_bias);
    for_each_bias_run(p, f, t, c, r, local_head, [&](int64_t at, int n, Real *sum) { add_scores(d + at, n, sum); });
}

template <class T>
static void backward_strip(const Problem &p, const BackwardViews<T> &v, BackwardBuffers &f, const RowTile &t,
                           const ColumnTile *columns, int n, int local_kv_head, int head, int local_head, Real *d_bias,
                           Ahead &ahead) {
    const int slots = p.window(), width = round_up(p.dim), width_v = round_up(p.dim_v), group = p.queries_per_kv_head(),
              most_rows = most_query_rows(p);
    const int64_t row_scores = (int64_t)slots * lanes, tile_scores = most_rows * row_scores,
                  query_row = (int64_t)score_words(p.dim) * lanes, d_out_row = (int64_t)score_words(p.dim_v) * lanes,
                  query_rows = (int64_t)lanes * width, d_out_rows = (int64_t)lanes * width_v;
    const bool attention = p.part == Part::attention, has_keys = p.part != Part::sum,
               has_values = p.part != Part::scores;
    const bool sequence = is_sequence(t, p.axis[1].kernel * lanes);
    const Real factor = Real(p.scale) * score_unit(p);
    int steps =
        2 * n * t.n + (attention ? score_steps(t, f.keys, n) : 0) + (has_values ? score_steps(t, f.values, n) : 0);
    for (int k = 0; k < n; k++) {
        const int columns_n = columns[k].n, kernel = p.axis[2].kernel;
        if (has_keys) steps += sum_steps(t, columns_n, width);
        if (has_keys && !sequence) steps += gradient_steps(t, columns_n, kernel, width);
        if (has_values && !sequence) steps += gradient_steps(t, columns_n, kernel, width_v);
    }
    ahead.share_among(steps);
    for (int k = 0; k < n; k++) {
        const ColumnTile &c = columns[k];
        for (int r = 0; r < t.n; r++) {
            const auto pack = [&](const View<const T> &from, int channels, Real factor, Real *rows, Real *lane_copy) {
                const int wide = round_up(channels);
                for (int i = 0; i < c.runs; i++)
                    pack_rows(from.at(t.z, t.y + r, c.run[i].x, head + c.run[i].head * group), from.x, c.run[i].n,
                              channels, rows + c.run[i].index * wide, factor);
                if (!lane_copy) return;
                int64_t token[lanes];
                if constexpr (pairs) {
                    for (int l = 0; l < lanes; l++)
                        token[l] = c.lane_x[l] * from.x + c.lane_head[l] * group * from.head;
                    pack_for_scores(from.at(t.z, t.y + r, 0, head), token, channels, lane_copy, lanes, factor);
                } else { // the copy just made is near, and of Reals
                    for (int l = 0; l < lanes; l++) token[l] = c.lane_query[l] * wide;
                    pack_lanes(rows, token, channels, lane_copy, lanes, Real(1));
                }
            };
            const int row = k * most_rows + r;
            if (has_keys)
                pack(v.query, p.dim, factor, f.query_rows + row * query_rows,
                     attention ? f.query + row * query_row : nullptr);
            if (has_values) pack(v.d_out, p.dim_v, Real(1), f.d_out_rows + row * d_out_rows, f.d_out + row * d_out_row);
            ahead.step();
        }
    }
    TileScores scores{&t,         nullptr,  nullptr, nullptr,    &f.keys,          local_kv_head,
                      f.query,    factor,   &f.bias, local_head, p.axis[2].kernel, p.axis[1].kernel,
                      row_scores, f.scores, nullptr, &ahead};
    if (attention) all_scores(scores, columns, n, most_rows * query_row, tile_scores, f.part);
    scores.keys = &f.values, scores.query = f.d_out, scores.factor = 1, scores.bias = nullptr,
    scores.scores = f.d_scores;
    if (has_values) all_scores(scores, columns, n, most_rows * d_out_row, tile_scores, f.part);
    for (int k = 0; k < n; k++) {
        const ColumnTile &c = columns[k];
        const bool holes = has_holes(t, c, p);
        Real *const weights = f.scores + k * tile_scores, *const d_scores = f.d_scores + k * tile_scores;
        for (int r = 0; r < t.n; r++) {
            Real *const row_weights = weights + r * row_scores, *const row_d_scores = d_scores + r * row_scores;
            ahead.step();
            if (!attention) {
                unfused_row(p, v, f, t, c, r, holes, row_weights, row_d_scores, head, local_head, d_bias);
                continue;
            }
            const Real *l = v.lse.at(t.z, t.y + r, 0, head),
                       *dl = v.d_lse.data ? v.d_lse.at(t.z, t.y + r, 0, head) : nullptr;
            RowLse lse{splat(l[c.x[0] * v.lse.x] * log2_e), Vec{}, false}; // idle lanes repeat the first query
            for (int i = 0; i < c.n; i++) {
                const Real one = l[c.x[i] * v.lse.x + c.head[i] * group * v.lse.head] * log2_e;
                lse.lse[c.lane[i]] = one, lse.is_large |= !(one < largest_lse && one > -largest_lse);
                if (dl) lse.d_lse[c.lane[i]] = dl[c.x[i] * v.d_lse.x + c.head[i] * group * v.d_lse.head];
            }
            softmax_gradient(p, f, t, c, r, holes, row_weights, row_d_scores, lse, local_head, d_bias);
        }
        WeightedSum s;
        s.weights = d_scores, s.weights_row = row_scores, s.step = p.axis[1].kernel * lanes;
        s.ring_row = f.ring.natural_row(p.dim), s.width = width;
        s.rows = &t, s.normaliser = nullptr, s.factor = Real(p.scale), s.ahead = &ahead;
        KeyGradient g;
        g.weights_row = row_scores, g.step = p.axis[1].kernel * lanes, g.rows = &t, g.blocks = f.blocks,
        g.n_blocks = f.n_blocks, g.vectors_at_once = f.vectors_at_once, g.ahead = &ahead;
        for (int i = 0; i < c.runs; i++) {
            const Run &run = c.run[i];
            const int kv_head = local_kv_head + run.head;
            s.values = f.key_rows_copy + kv_head * f.key_head;
            s.first = g.first = c.first + run.index, s.end = g.end = c.end + run.index;
            s.lane = run.lane, s.lane_step = run.step, g.run = &run;
            if (has_keys)
                weighted_sum_to(s, run.n, v.d_query.at(t.z, t.y, run.x, head + run.head * group), v.d_query.y,
                                v.d_query.x, p.dim, f.out);

            if (sequence) continue;
            g.weights = weights, g.vectors = f.d_out_rows + k * most_rows * d_out_rows + run.index * width_v,
            g.vectors_row = d_out_rows, g.width = width_v;
            g.gradient = f.d_values + kv_head * f.value_head, g.ring_row = f.ring.natural_row(p.dim_v);
            if (has_values) key_gradient(g);
            g.weights = d_scores, g.vectors = f.query_rows + k * most_rows * query_rows + run.index * width,
            g.vectors_row = query_rows, g.width = width;
            g.gradient = f.d_keys + kv_head * f.key_head, g.ring_row = f.ring.natural_row(p.dim);
            if (has_keys) key_gradient(g);
        }
    }
    ahead.finish();
    if (!sequence) return;
    for (int in_lanes = 0; in_lanes < f.ring.heads; in_lanes++) {
        KeyGradient of_values[most_cuts * most_strip], of_keys[most_cuts * most_strip];
        int runs = 0;
        for (int k = 0; k < n; k++)
            for (int i = 0; i < columns[k].runs; i++) {
                const ColumnTile &c = columns[k];
                const Run &run = c.run[i];
                if (run.head != in_lanes) continue;
                KeyGradient g{};
                g.weights_row = row_scores, g.step = lanes, g.rows = &t, g.vectors_at_once = f.vectors_at_once;
                g.run = &run, g.first = c.first + run.index, g.end = c.end + run.index;
                of_values[runs] = of_keys[runs] = g;
                KeyGradient &of_value = of_values[runs], &of_key = of_keys[runs];
                of_value.weights = f.scores + k * tile_scores, of_value.width = width_v;
                of_value.vectors = f.d_out_rows + k * most_rows * d_out_rows + run.index * width_v;
                of_value.gradient = f.d_values + (local_kv_head + in_lanes) * f.value_head;
                of_value.ring_row = f.ring.natural_row(p.dim_v);
                of_key.weights = f.d_scores + k * tile_scores, of_key.width = width;
                of_key.vectors = f.query_rows + k * most_rows * query_rows + run.index * width;
                of_key.gradient = f.d_keys + (local_kv_head + in_lanes) * f.key_head;
                of_key.ring_row = f.ring.natural_row(p.dim);
                runs++;
            }
        if (has_values) sequence_gradient(of_values, runs);
        if (has_keys) sequence_gradient(of_keys, runs);
    }
}

// The keys whose gradients a block stores: those at [begin, end) along an axis. To others, which blocks before it have stored, it adds.
struct StoredKeys {
    int axis, begin, end;

    // Places of row (z, y) that hold them, copies left out.
    Places of_row(const PackedRow &row, int z, int y) const {
        const int u = axis == 0 ? z : y, first = row.copies_left(), last = row.own_end();
        if (axis < 2) return {first, u >= begin && u < end ? last : first};
        const auto inside = [](int place, int low, int high) {
            return place < low ? low : place > high ? high : place;
        };
        const int from = inside(begin - row.begin, first, last);
        return {from, inside(end - row.begin, from, last)};
    }
};

template <class T>
static void backward_map(const Problem &p, const Map &m, const Map *next_map, const Block &b, const Task &task,
                         BackwardBuffers &f, StoredKeys stored, Real *d_bias) {
    BackwardViews<T> v{view<const T>(p.query, p, m),
                       view<const T>(p.key, p, m),
                       view<const T>(p.value, p, m),
                       view<const T>(p.d_out, p, m),
                       view<const T>(p.weights, p, m),
                       view<const T>(p.d_weights, p, m),
                       view<T>(p.d_query, p, m),
                       view<T>(p.d_key, p, m),
                       view<T>(p.d_value, p, m),
                       view<T>(p.d_weights, p, m),
                       p.lse ? lse_view(p.lse, p, m) : View<Real>{},
                       p.d_lse ? lse_view(p.d_lse, p, m) : View<Real>{}};
    const bool attention = p.part == Part::attention, has_keys = p.part != Part::sum,
               has_values = p.part != Part::scores;
    const int group = p.queries_per_kv_head(), kv_heads = task.head_end - task.head_begin;
    Ring &ring = f.ring;
    restart(ring, b);
    const Places whole_row{0, ring.width};
    const auto clear_gradients = [&](int slot, Places places) {
        const auto clear = [&](Real *rows, int64_t head_step, int channels) {
            const int64_t wide = round_up(channels);
            for (int h = 0; h < kv_heads; h++)
                memset(rows + h * head_step + slot * ring.natural_row(channels) + places.from * wide, 0,
                       (places.to - places.from) * wide * sizeof(Real));
        };
        if (has_keys) clear(f.d_keys, f.key_head, p.dim);
        if (has_values) clear(f.d_values, f.value_head, p.dim_v);
    };
    const auto pack = [&](int kz, int ky, int slot, Places places) {
        if (has_keys)
            pack_values(f.key_rows_copy + slot * ring.natural_row(p.dim), f.key_head, p.dim, b.row, places, v.key, kz,
                        ky, task.head_begin, task.head_end);
        if (attention) pack_keys(f.keys, b.row, places, v.key, kz, ky, task.head_begin, slot);
        if (has_values) pack_keys(f.values, b.row, places, v.value, kz, ky, task.head_begin, slot);
        clear_gradients(slot, places);
    };
    const bool by_strip = packs_by_strip(m);
    int places = 0;                                  // packed, by strip
    const Real key_factor = Real(1) / score_unit(p); // queries were packed times the unit
    const auto flush = [&](int kz, int ky, int slot) {
        if ((ring.shape.planes ? kz : ky) >= ring.packed) clear_gradients(slot, whole_row); // nobody sees that row
        const Places written = stored.of_row(b.row, kz, ky);
        const auto leave = [&](Real *rows, int64_t head_step, int channels, const View<T> &to, Real factor) {
            const int64_t wide = round_up(channels);
            const auto unpack = [&](int place, int n, int h, bool add) {
                unpack_rows(rows + h * head_step + place * wide, n, channels,
                            to.at(kz, ky, b.row.key(place), task.head_begin + h), to.x, factor, add);
            };
            for_each_copy(b.row, [&](int place, int own) {
                for (int h = 0; h < kv_heads; h++) {
                    if (own < 0 || own >= ring.width) unpack(place, 1, h, true); // of a block, which stores nothing
                    else add_row(rows + h * head_step + place * wide, rows + h * head_step + own * wide, channels);
                }
            });
            const auto unpack_all = [&](Places places, bool add) {
                for_each_eight(places, kv_heads, [&](int place, int n, int h) { unpack(place, n, h, add); });
            };
            unpack_all(Places{b.row.copies_left(), written.from}, true), unpack_all(written, false);
            unpack_all(Places{written.to, b.row.own_end()}, true);
        };
        if (has_keys) leave(f.d_keys + slot * ring.natural_row(p.dim), f.key_head, p.dim, v.d_key, key_factor);
        if (has_values) leave(f.d_values + slot * ring.natural_row(p.dim_v), f.value_head, p.dim_v, v.d_value, Real(1));
    };
    for (int z = b.begin[0]; z < b.end[0]; z++)
        for (int y = b.begin[1], rows; y < b.end[1]; y += rows) {
            RowTile t;
            t.key = f.key_rows;
            rows = rows_of_tile(m.axis[1], y, b.end[1]);
            row_tile(t, m.axis[0], m.axis[1], p.axis[2].kernel, ring.shape, z, y, rows);
            f.n_blocks = make_gradient_blocks(t, f.vectors_at_once, f.blocks);
            int from, to;
            leading_range(ring, m, z, y, rows, from, to);
            if (ring.flushed < from) for_each_row(ring, b, ring.flushed, from, flush), ring.flushed = from;
            if (ring.packed < from) ring.packed = from;
            if (!by_strip)
                for_each_row(ring, b, ring.packed, to,
                             [&](int kz, int ky, int slot) { pack(kz, ky, slot, whole_row); });
            if (ring.packed < to) ring.packed = to;
            const NextRows next = next_rows(ring, b, m.axis[1], z, y, rows);
            const FinishedRows finished = finished_rows(ring, b, m.axis[1], z, y, rows);
            for (int i = 0; i < f.tiles.n; i += f.strip) {
                const int n = i + f.strip < f.tiles.n ? f.strip : f.tiles.n - i;
                const int x = b.begin[2] + (b.end[2] - b.begin[2]) * i / f.tiles.n,
                          x_end = b.begin[2] + (b.end[2] - b.begin[2]) * (i + n) / f.tiles.n;
                if (by_strip) {
                    const int end = places_read(ring, f.columns[i + n - 1], p.axis[2].kernel);
                    if (places < end) pack(0, 0, ring.shape.slot(0, 0), Places{places, end}), places = end;
                }
                for (int h = task.head_begin; h < task.head_end; h += ring.heads)
                    for (int q = 0; q < group; q++) {
                        const int local = h - task.head_begin, head = h * group + q;
                        Ahead ahead;
                        if (!p.small && !q) {
                            ahead.add(v.d_key, finished.z, finished.begin, finished.end, x, x_end, h, p.dim,
                                      ring.heads);
                            ahead.add(v.d_value, finished.z, finished.begin, finished.end, x, x_end, h, p.dim_v,
                                      ring.heads);
                        }
                        const auto ask = [&](const auto &ahead_of) {
                            if (!q) ahead_of.keys(p.key, h, p.dim), ahead_of.keys(p.value, h, p.dim_v);
                            ahead_of.queries(p.query, head, p.dim), ahead_of.queries(p.d_out, head, p.dim_v);
                            ahead_of.queries(p.d_query, head, p.dim);
                        };
                        if (p.small) {
                        } else if (by_strip) {
                            ask(NextStrip<T>{ahead, p, m, x_end, b.row.begin + places, x_end - x, ring.heads});
                        } else if (!next.next_map || next_map) {
                            ask(NextTile<T>{ahead, p, next.next_map ? *next_map : m, next, x, x_end, ring.heads});
                        }
                        backward_strip<T>(p, v, f, t, f.columns + i, n, local, head, local * group + q, d_bias, ahead);
                    }
            }
        }
    for_each_row(ring, b, ring.flushed, b.key_end[ring.shape.planes ? 0 : 1], flush);
}

} // namespace nbhd::NBHD_ISA
