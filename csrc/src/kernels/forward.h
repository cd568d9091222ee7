// The forward pass of a task: pack keys and values row by row, then for each tile of queries scores, softmax, weighted sum; or
// one half of that.
#pragma once
#include "bias.h"
#include "ring.h"
#include "slots.h"
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
    int strip; // column tiles at a time; the next three are for all of them
    Real *query, *scores, *part, *maximum, *normaliser, *out;
    int *slot_order; // of the halves
};

// Channels (or pairs of them) whose products are summed one after another. The rounding errors of a chain grow with its length, so
// longer sums are made of parts.
constexpr int longest_sum = 64;
static bool sums_in_parts(const PackedKeys &keys) { return keys.words() > longest_sum; }

// Column tiles of a block; counted when sizes are, and made with the memory.
static void lay_out_columns(ColumnTiles &n, ColumnTile *&tiles, Arena &arena, const Map &m, const Block &b, int heads) {
    const auto make = [&](ColumnTile *to) {
        return make_column_tiles(m.axis[2], b.row, b.begin[2], b.end[2], heads, to);
    };
    if (!n.n) n = make(nullptr);
    tiles = arena.take<ColumnTile>(n.n);
    if (tiles) make(tiles);
}

// Query rows that a tile can have: of a sequence one, so that buffers need not hold more.
static int most_query_rows(const Problem &p) { return p.axis[1].length == 1 ? 1 : tile_rows; }

// Column tiles of a strip, for which queries lie in the first-level cache, and scores too or, of long windows, in the second. In a
// sequence they are what shares a loaded key, so there are two however long the window.
constexpr int most_strip = 4;
static int strip_tiles(const Problem &p, int copies) {
    const int64_t row = (int64_t)copies * lanes * (int64_t)sizeof(Real);
    if (most_query_rows(p) == 1) {
        const int64_t most = 512 * 1024 / (row * p.window());
        return most < 2 ? 2 : most < tile_rows ? int(most) : tile_rows;
    }
    const int64_t most = 32 * 1024 / (row * tile_rows * (p.dim + p.window()));
    return most < 1 ? 1 : most < most_strip ? int(most) : most_strip;
}

static void lay_out(ForwardBuffers &f, Arena &arena, const Problem &p, const Map &m, const Block &b, const Task &t) {
    const int kv_heads = t.head_end - t.head_begin, heads = kv_heads * p.queries_per_kv_head();
    const int lane_heads = heads_in_lanes(p, m, t);
    lay_out_columns(f.tiles, f.columns, arena, m, b, lane_heads);
    f.ring = make_ring(m, b, lane_heads, f.tiles);
    f.key_rows = arena.take<KeyRow>(most_key_rows(m, b));
    f.values_head = f.ring.shape.slots() * f.ring.natural_row(p.dim_v);
    if (p.part != Part::sum) f.keys = lay_out_keys(arena, f.ring, p.dim, p.axis[2].kernel, kv_heads);
    if (p.part != Part::scores) f.values = arena.take<Real>(kv_heads * f.values_head);
    if (p.part != Part::attention) f.slot_order = arena.take<int>(p.window());
    lay_out_bias(f.bias, arena, p, heads, f.tiles, f.ring.heads, false);
    f.strip = strip_tiles(p, 1);
    const int64_t strip_rows = f.strip * most_query_rows(p);
    f.query = arena.take<Real>(strip_rows * score_words(p.dim) * lanes);
    f.scores = arena.take<Real>(strip_rows * p.window() * lanes);
    if (sums_in_parts(f.keys)) f.part = arena.take<Real>(strip_rows * p.window() * lanes);
    f.maximum = arena.take<Real>(f.strip * tile_rows * lanes);
    f.normaliser = arena.take<Real>(tile_rows * lanes);
    f.out = arena.take<Real>(tile_rows * lanes * round_up(p.dim_v));
}

// Scores of a whole tile with packed keys of the heads in its lanes, the first of them `kv_head` and, of queries, `head`.
struct TileScores {
    const RowTile *rows;
    const KeyRow *begin, *end; // of the tile's key rows, those to do now
    const ColumnTile *columns;
    const PackedKeys *keys;
    int kv_head;
    const Real *query;      // [row][channel][lane]
    Real factor;            // of the products of pairs
    const BiasTables *bias; // or null
    int head;
    int kernel_x, kernel_y;
    int64_t row_scores; // from a query row to the next
    Real *scores;       // [row][slot][lane]
    Real *maximum;      // or null
    Ahead *ahead;
    int first_word = 0, words = 0; // channels or pairs of them; `query` begins with the first
};

// Rows of keys that a strip of column tiles takes from the first-level cache.
static int key_rows_at_once(const PackedKeys &keys, int tiles) {
    const int64_t bytes = ((int64_t)tiles * lanes + keys.kernel) * keys.words() * (int64_t)sizeof(Real);
    return bytes > 8 * 1024 ? 1 : int(16 * 1024 / bytes);
}
template <Keys mode, int heads, int kernel>
static void tile_scores_as(const TileScores &s) {
    const RowTile &t = *s.rows;
    const ColumnTile &c = *s.columns;
    const PackedKeys &keys = *s.keys;
    const bool biased = s.bias && s.bias->present;
    ScoreRow b;
    b.score_step = kernel ? kernel * lanes : s.kernel_y * lanes;
    b.bias_step = biased && s.bias->expanded ? s.bias->rows_y * lanes : b.score_step;
    b.query_row = (int64_t)keys.words() * lanes, b.pitch = keys.pitch, b.channels = s.words, b.factor = s.factor,
    b.index = &c.index, b.maximum_row = lanes, b.ahead = s.ahead;
    b.start = !biased ? Start::zero : c.bias_set ? Start::by_lane : Start::shared;
    const Real *const key_base = keys.row(s.kv_head, 0) + s.first_word * b.pitch + heads * c.origin;
    const int64_t key_row = keys.row_size();
    const int table = biased ? s.bias->table_of(s.head) : 0;
    Real *scores[tile_rows];
    for (int r = 0; r < t.n; r++) scores[r] = s.scores + r * s.row_scores - (int64_t)t.shift[r] * lanes;
    for (const KeyRow *key = s.begin; key < s.end; key++) {
        const int begin = key->begin, n = key->end - begin;
        if (n <= 0) continue;
        b.query = s.query + begin * b.query_row;
        b.keys = key_base + key->ring * key_row;
        b.maximum = s.maximum ? s.maximum + begin * lanes : nullptr;
        for (int k = 0; k < n; k++) b.scores[k] = scores[begin + k] + (int64_t)key->slot * lanes;
        if (b.start == Start::shared) {
            const Real *row = s.bias->compact_row(s.head, key->bias_row - begin) + c.column[0];
            for (int k = 0; k < n; k++, row -= s.bias->columns) b.bias[k] = row;
        } else if (b.start == Start::by_lane) {
            for (int k = 0; k < n; k++) {
                const int row = key->bias_row - begin - k;
                if (s.bias->expanded) b.bias[k] = s.bias->table_row(table, c.bias_set, row);
                else expand_bias(*s.bias, table, row, c, b.scores[k], b.score_step), b.bias[k] = b.scores[k];
            }
        }
        switch (n) {
        case 1: score_row<1, mode, heads, kernel>(b, s.kernel_x); break;
        case 2: score_row<2, mode, heads, kernel>(b, s.kernel_x); break;
        case 3: score_row<3, mode, heads, kernel>(b, s.kernel_x); break;
        case 4:
            if constexpr (tile_rows > 3) score_row<4, mode, heads, kernel>(b, s.kernel_x);
            break;
        }
    }
}

template <int kernel>
static void tile_scores_of(const TileScores &s) {
    constexpr int common = kernel <= 5 ? kernel : 0; // permuted tiles are rare, and slow anyhow
    switch (s.columns->keys) {
    case Keys::sliding:
        if (s.columns->heads == 2) return tile_scores_as<Keys::sliding, 2, kernel>(s);
        return tile_scores_as<Keys::sliding, 1, kernel>(s);
    case Keys::shared:
        if (s.columns->heads == 2) return tile_scores_as<Keys::shared, 2, kernel>(s);
        return tile_scores_as<Keys::shared, 1, kernel>(s);
    case Keys::permuted:
        if (s.columns->heads == 2) return tile_scores_as<Keys::permuted, 2, 0>(s);
        return tile_scores_as<Keys::permuted, 1, common>(s);
    }
}
static void tile_scores(const TileScores &s) {
    switch (NBHD_SPECIALISE && s.kernel_x == s.kernel_y ? s.kernel_x : 0) {
#if NBHD_SPECIALISE
    case 3: return tile_scores_of<3>(s);
    case 5: return tile_scores_of<5>(s);
    case 7: return tile_scores_of<7>(s);
    case 9: return tile_scores_of<9>(s);
    case 11: return tile_scores_of<11>(s);
    case 13: return tile_scores_of<13>(s);
#endif
    default: return tile_scores_of<0>(s);
    }
}

// Neighbouring column tiles of a single query row, whose windows overlap, take the place of query rows: a key then serves all of
// them. The keys of tile r are `advance` further than those of tile r - 1: a vector, or none where all share one window.
//
//      window 24, three tiles of 8:   keys   0......7 8.....15 16....23 24....31 32....39
//                                     tile 0 xxxxxxxx xxxxxxxx xxxxxxxx
//                                     tile 1          xxxxxxxx xxxxxxxx xxxxxxxx
//                                     tile 2                   xxxxxxxx xxxxxxxx xxxxxxxx
struct TileGroup {
    int tiles, advance;
};

// So many that no more than half of what a group sees is seen by some of its tiles only.
static int most_together(int kernel) {
    const int most = 1 + kernel / (2 * lanes);
    return most < tile_rows ? most : tile_rows;
}

static TileGroup group_of(const TileScores &s, int n) {
    const ColumnTile *c = s.columns;
    const int most = most_together(s.kernel_x);
    TileGroup g{1, c[0].keys == Keys::sliding ? lanes : 0};
    if (s.rows->n > 1 || c[0].heads > 1 || c[0].keys == Keys::permuted) return g;
    if (s.bias && s.bias->present && c[0].bias_set) return g;
    while (g.tiles < n && g.tiles < most) {
        const ColumnTile &next = c[g.tiles];
        if (next.keys != c[0].keys || next.origin != c[0].origin + g.tiles * g.advance ||
            (s.bias && s.bias->present && next.bias_set))
            break;
        g.tiles++;
    }
    return g;
}

template <Keys mode>
static void group_scores_as(const TileScores &s, TileGroup g, int64_t query_tile, int64_t score_tile) {
    const ColumnTile &c = *s.columns;
    const PackedKeys &keys = *s.keys;
    const bool biased = s.bias && s.bias->present;
    ScoreRow b;
    b.score_step = s.kernel_y * lanes, b.bias_step = 1;
    b.query_row = query_tile, b.pitch = keys.pitch, b.channels = s.words, b.factor = s.factor, b.index = &c.index;
    b.maximum_row = tile_rows * lanes, b.ahead = s.ahead;
    b.start = biased ? Start::shared : Start::zero;
    for (const KeyRow *key = s.begin; key < s.end; key++) {
        b.keys = keys.row(s.kv_head, key->ring) + s.first_word * b.pitch + c.origin;
        // the keys between two of the 2 * tiles borders of windows have the same tiles
        for (int part = 0; part < 2 * g.tiles - 1; part++) {
            if (!g.advance && part) break;
            const int last = g.tiles - 1, first_tile = !g.advance || part < last ? 0 : part - last,
                      tiles = !g.advance ? g.tiles : (part < last ? part : last) - first_tile + 1;
            const int from = part <= last ? part * g.advance : s.kernel_x + (part - last - 1) * g.advance,
                      to = g.advance && part < last     ? from + g.advance
                           : part == last || !g.advance ? s.kernel_x
                                                        : from + g.advance;
            b.query = s.query + first_tile * query_tile;
            b.maximum = s.maximum ? s.maximum + first_tile * b.maximum_row : nullptr;
            for (int k = 0; k < tiles; k++) {
                const int r = first_tile + k;
                b.scores[k] = s.scores + r * score_tile + (int64_t)key->slot * lanes - r * g.advance * b.score_step;
                if (biased) b.bias[k] = s.bias->compact_row(s.head, key->bias_row) + c.column[0] - r * g.advance;
            }
            switch (tiles) {
            case 1: score_span<1, mode>(b, from, to); break;
            case 2: score_span<2, mode>(b, from, to); break;
            case 3: score_span<3, mode>(b, from, to); break;
            case 4:
                if constexpr (tile_rows > 3) score_span<4, mode>(b, from, to);
                break;
            }
        }
    }
}

// Steps of `ahead` that the scores of n column tiles take: each block of offsets, for as many rows or tiles as share its keys.
static int score_steps(const RowTile &t, const PackedKeys &keys, int n) {
    const int groups = t.n > 1 ? n : (n + tile_rows - 1) / tile_rows,
              offsets = offsets_for(t.n > 1         ? t.n
                                    : n < tile_rows ? n
                                                    : tile_rows);
    return groups * t.key_rows * ((keys.kernel + offsets - 1) / offsets) *
           ((keys.words() + channels_a_step - 1) / channels_a_step);
}

// Scores of a strip of column tiles. A few rows of keys at a time meet all tiles, so that they are read from the first-level
// cache: the rows that one tile sees are more than that holds.
static void strip_scores(TileScores s, const ColumnTile *columns, int n, int64_t query_tile, int64_t score_tile) {
    const RowTile &t = *s.rows;
    const KeyRow *const end = t.key + t.key_rows;
    const int rows = key_rows_at_once(*s.keys, n);
    for (s.begin = t.key; s.begin < end; s.begin = s.end) {
        s.end = end - s.begin < rows ? end : s.begin + rows;
        TileScores one = s;
        for (int i = 0; i < n;) {
            one.columns = columns + i;
            const TileGroup group = group_of(one, n - i);
            if (group.tiles == 1) tile_scores(one);
            else if (group.advance) group_scores_as<Keys::sliding>(one, group, query_tile, score_tile);
            else group_scores_as<Keys::shared>(one, group, query_tile, score_tile);
            i += group.tiles, one.query += group.tiles * query_tile, one.scores += group.tiles * score_tile;
            if (one.maximum) one.maximum += group.tiles * tile_rows * lanes;
        }
    }
}

// The same of all channels, by parts where they are many: `part` is as large as the scores.
static void all_scores(TileScores s, const ColumnTile *columns, int n, int64_t query_tile, int64_t score_tile,
                       Real *part) {
    const int words = s.keys->words(), slots = int(s.row_scores / lanes);
    Real *const maximum = s.maximum;
    s.words = words < longest_sum ? words : longest_sum;
    if (words > longest_sum) s.maximum = nullptr;
    strip_scores(s, columns, n, query_tile, score_tile);
    TileScores more = s;
    more.bias = nullptr, more.scores = part;
    for (int w = longest_sum; w < words; w += longest_sum) {
        more.first_word = w, more.words = words - w < longest_sum ? words - w : longest_sum;
        more.query = s.query + (int64_t)w * lanes;
        strip_scores(more, columns, n, query_tile, score_tile);
        const bool is_last = w + more.words == words;
        for (int64_t k = 0; k < n; k++)
            for (int r = 0; r < s.rows->n; r++) {
                const int64_t row = k * score_tile + r * s.row_scores;
                const Vec m = add_scores(part + row, slots, s.scores + row);
                if (is_last && maximum) store(maximum + (k * tile_rows + r) * lanes, m);
            }
    }
}

template <class T>
struct ForwardViews {
    View<const T> query, key, value, read_weights;
    View<T> out, weights;
    View<Real> lse;
};

// Weights of a query row, from scores of which `m` is the largest; returns 1 / their sum.
static Vec softmax_row(Real *scores, int slots, Vec m, const View<Real> &lse, const RowTile &t, int r,
                       const ColumnTile &c, int head, int group) {
    const Vec sum = exponentials(scores, slots, m);
    if (lse.data) {
        const Vec l = m - m == Vec{} ? (m + log2(sum)) * splat(ln_2) : m; // of no scores, or of infinite ones
        Real *to = lse.at(t.z, t.y + r, 0, head);
        for (int i = 0; i < c.n; i++) to[c.x[i] * lse.x + c.head[i] * group * lse.head] = l[c.lane[i]];
    }
    return splat(Real(1)) / sum;
}

template <class T>
static void forward_strip(const Problem &p, const ForwardViews<T> &v, ForwardBuffers &f, const RowTile &t,
                          const ColumnTile *columns, int n, int local_kv_head, int head, int local_head, Ahead &ahead) {
    const int slots = p.window(), group = p.queries_per_kv_head();
    const int64_t row_scores = (int64_t)slots * lanes, tile_scores = most_query_rows(p) * row_scores,
                  query_row = (int64_t)score_words(p.dim) * lanes, tile_query = most_query_rows(p) * query_row;
    const Real factor = Real(p.scale) * score_unit(p);
    int steps = p.part == Part::sum ? 0 : score_steps(t, f.keys, n) + 2 * n * t.n;
    for (int k = 0; k < n && p.part != Part::scores; k++) steps += sum_steps(t, columns[k].n, round_up(p.dim_v));
    ahead.share_among(steps);
    if (p.part != Part::sum) {
        for (int k = 0; k < n; k++) {
            const ColumnTile &c = columns[k];
            int64_t token[lanes];
            for (int l = 0; l < lanes; l++) token[l] = c.lane_x[l] * v.query.x + c.lane_head[l] * group * v.query.head;
            for (int r = 0; r < t.n; r++) {
                pack_for_scores(v.query.at(t.z, t.y + r, 0, head), token, p.dim,
                                f.query + k * tile_query + r * query_row, lanes, factor);
                store(f.maximum + (k * tile_rows + r) * lanes, splat(nothing));
                ahead.step();
            }
        }
        all_scores(TileScores{&t, nullptr, nullptr, nullptr, &f.keys, local_kv_head, f.query, factor, &f.bias,
                              local_head, p.axis[2].kernel, p.axis[1].kernel, row_scores, f.scores,
                              p.part == Part::attention ? f.maximum : nullptr, &ahead},
                   columns, n, tile_query, tile_scores, f.part);
    }
    for (int k = 0; k < n; k++) {
        const ColumnTile &c = columns[k];
        const bool holes = has_holes(t, c, p);
        for (int r = 0; r < t.n; r++) {
            Real *scores = f.scores + k * tile_scores + r * row_scores;
            ahead.step();
            if (p.part == Part::attention) {
                Vec m = load(f.maximum + (k * tile_rows + r) * lanes);
                if (holes) fill_holes(scores, t, r, c, p, nothing), m = row_maximum(scores, slots);
                store(f.normaliser + r * lanes, softmax_row(scores, slots, m, v.lse, t, r, c, head, group));
            } else if (p.part == Part::scores) {
                if (holes) fill_holes(scores, t, r, c, p, nothing);
                write_slots(scores, f.slot_order, slots, v.weights, t, r, c, head);
            } else {
                read_slots(scores, f.slot_order, slots, v.read_weights, t, r, c, head);
            }
        }
        if (p.part == Part::scores) continue;
        WeightedSum s;
        s.weights = f.scores + k * tile_scores, s.weights_row = row_scores, s.step = p.axis[1].kernel * lanes;
        s.ring_row = f.ring.natural_row(p.dim_v), s.width = round_up(p.dim_v);
        s.rows = &t, s.normaliser = p.part == Part::attention ? f.normaliser : nullptr, s.factor = 1, s.ahead = &ahead;
        for (int i = 0; i < c.runs; i++) {
            const Run &run = c.run[i];
            s.first = c.first + run.index, s.end = c.end + run.index, s.lane = run.lane, s.lane_step = run.step;
            s.values = f.values + (local_kv_head + run.head) * f.values_head;
            weighted_sum_to(s, run.n, v.out.at(t.z, t.y, run.x, head + run.head * group), v.out.y, v.out.x, p.dim_v,
                            f.out);
        }
    }
    ahead.finish();
}

template <class T>
static void forward_map(const Problem &p, const Map &m, const Map *next_map, const Block &b, const Task &task,
                        ForwardBuffers &f) {
    const ForwardViews<T> v{view<const T>(p.query, p, m),
                            view<const T>(p.key, p, m),
                            view<const T>(p.value, p, m),
                            view<const T>(p.weights, p, m),
                            view<T>(p.out, p, m),
                            view<T>(p.weights, p, m),
                            p.lse ? lse_view(p.lse, p, m) : View<Real>{}};
    const int group = p.queries_per_kv_head();
    const auto pack = [&](int kz, int ky, int slot, Places places) {
        if (p.part != Part::sum) pack_keys(f.keys, b.row, places, v.key, kz, ky, task.head_begin, slot);
        if (p.part != Part::scores)
            pack_values(f.values + slot * f.ring.natural_row(p.dim_v), f.values_head, p.dim_v, b.row, places, v.value,
                        kz, ky, task.head_begin, task.head_end);
    };
    const bool by_strip = packs_by_strip(m);
    int places = 0; // packed, by strip
    restart(f.ring, b);
    for (int z = b.begin[0]; z < b.end[0]; z++)
        for (int y = b.begin[1], rows; y < b.end[1]; y += rows) {
            RowTile t;
            t.key = f.key_rows;
            rows = rows_of_tile(m.axis[1], y, b.end[1]);
            row_tile(t, m.axis[0], m.axis[1], p.axis[2].kernel, f.ring.shape, z, y, rows);
            int from, to;
            leading_range(f.ring, m, z, y, rows, from, to);
            if (f.ring.packed < from) f.ring.packed = from;
            if (!by_strip)
                for_each_row(f.ring, b, f.ring.packed, to,
                             [&](int kz, int ky, int slot) { pack(kz, ky, slot, Places{0, f.ring.width}); });
            if (f.ring.packed < to) f.ring.packed = to;
            const NextRows next = next_rows(f.ring, b, m.axis[1], z, y, rows);
            for (int i = 0; i < f.tiles.n; i += f.strip) {
                const int n = i + f.strip < f.tiles.n ? f.strip : f.tiles.n - i;
                const int x = b.begin[2] + (b.end[2] - b.begin[2]) * i / f.tiles.n,
                          x_end = b.begin[2] + (b.end[2] - b.begin[2]) * (i + n) / f.tiles.n;
                if (by_strip) {
                    const int end = places_read(f.ring, f.columns[i + n - 1], p.axis[2].kernel);
                    if (places < end) pack(0, 0, f.ring.shape.slot(0, 0), Places{places, end}), places = end;
                }
                for (int h = task.head_begin; h < task.head_end; h += f.ring.heads)
                    for (int q = 0; q < group; q++) {
                        const int local = h - task.head_begin, head = h * group + q;
                        Ahead ahead;
                        const auto ask = [&](const auto &ahead_of) {
                            if (!q) ahead_of.keys(p.key, h, p.dim), ahead_of.keys(p.value, h, p.dim_v);
                            ahead_of.queries(p.query, head, p.dim), ahead_of.queries(p.out, head, p.dim_v);
                        };
                        if (p.small) {
                        } else if (by_strip) {
                            ask(NextStrip<T>{ahead, p, m, x_end, b.row.begin + places, x_end - x, f.ring.heads});
                        } else if (!next.next_map || next_map) {
                            ask(NextTile<T>{ahead, p, next.next_map ? *next_map : m, next, x, x_end, f.ring.heads});
                        }
                        forward_strip<T>(p, v, f, t, f.columns + i, n, local, head, local * group + q, ahead);
                    }
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
        const AlikeMaps maps = alike_maps(p, job.plan, task, n);
        for_each_block(job.plan, m, task.cut, [&](const Block &b) {
            ForwardBuffers f{};
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
            clear_rest(f.keys);
            if (f.slot_order) fill_slot_order(p, f.slot_order);
            Map one = m;
            for (int64_t i = 0; i < maps.n; i++) {
                const Map next = map_of(p, maps.has_next(i) ? n + i + 1 : n);
                forward_map<T>(p, one, maps.has_next(i) ? &next : nullptr, b, task, f);
                one = next;
            }
        });
        n += maps.n;
    }
}

template <class T>
static bool forward_as(const Problem &p, const Threads &threads) {
    ForwardJob job{&p, make_plan(p, threads.count, forward_transposed, forward_rows), false};
    run_tasks(threads, job.plan.tasks(), forward_task<T>, &job);
    return !job.failed;
}

static bool forward(const Problem &p, const Threads &threads) {
#if NBHD_DOUBLE
    return forward_as<double>(p, threads);
#elif NBHD_PAIRS
    return forward_as<BFloat16>(p, threads);
#else
    if (p.dtype == Dtype::bfloat16) return forward_as<BFloat16>(p, threads);
    if (p.dtype == Dtype::float16) return forward_as<Float16>(p, threads);
    return forward_as<float>(p, threads);
#endif
}

} // namespace nbhd::NBHD_ISA
