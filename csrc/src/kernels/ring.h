// The packed keys and values of a block: a ring along the leading axis, filled just ahead of the tiles.
//
//      leading axis (Y in 2D, Z in 3D)
//        row 0   flushed: no later tile sees it
//        row 1   |
//        row 2   | alive: packed, at most `span` rows; row y lies in slot y mod span
//        row 3   |
//        row 4   not packed yet
#pragma once
#include "ahead.h"
#include "block.h"
#include "pack.h"

namespace nbhd::NBHD_ISA {

struct Ring {
    RingShape shape;
    int heads;           // in the lanes
    int width, pitch;    // places of a row; from a channel of the transposed copies to the next
    int packed, flushed; // places along the leading axis

    int64_t natural_row(int channels) const { return (int64_t)width * round_up(channels); }
};

// At least `least` numbers from a channel to the next: whole vectors, and an odd number of cache lines where a tile reads only some of
// them, so that the channels of a tile do not fall into the same few sets of the first-level cache.
static int row_pitch(int least) {
    constexpr int line = 64 / (int)sizeof(Real);
    const int pitch = round_up(least);
    return pitch > 3 * line && pitch % (2 * line) == 0 ? pitch + line : pitch;
}

static Ring make_ring(const Map &m, const Block &b, int heads, const ColumnTiles &tiles) {
    Ring r;
    r.shape = ring_shape(m, b);
    r.heads = heads, r.width = b.row.width;
    r.pitch = row_pitch(r.width * heads > tiles.reach ? r.width * heads : tiles.reach);
    r.packed = r.flushed = 0;
    return r;
}
// Whether the one row of keys that a block sees is packed as its strips of columns come to it.
static bool packs_by_strip(const Map &m) { return m.axis[0].length == 1 && m.axis[1].length == 1; }
// Places that the column tiles up to `last` read, the idle lanes of a tile included.
static int places_read(const Ring &r, const ColumnTile &last, int kernel) {
    const int end = (last.origin + kernel + 2 * lanes - 1) / lanes * lanes;
    return end < r.width ? end : r.width;
}

static void restart(Ring &r, const Block &b) { r.packed = r.flushed = b.key_begin[r.shape.planes ? 0 : 1]; }

// Calls visit(z, y, slot) for the key rows at places [from, to) of the leading axis.
template <class Visit>
static void for_each_row(const Ring &r, const Block &b, int from, int to, Visit visit) {
    for (int u = from; u < to; u++) {
        if (!r.shape.planes) visit(b.key_begin[0], u, r.shape.slot(0, u));
        else
            for (int y = b.key_begin[1]; y < b.key_end[1]; y++) visit(u, y, r.shape.slot(u, y));
    }
}

// Key places along the leading axis that a tile at (z, y) of n rows sees.
static void leading_range(const Ring &r, const Map &m, int z, int y, int n, int &from, int &to) {
    if (r.shape.planes) from = m.axis[0].first[z], to = m.axis[0].end(z);
    else from = m.axis[1].first[y], to = m.axis[1].end(y + n - 1);
}

// The rows of the tile after (z, y): of this map or, after the last, of the task's next one, and those of its keys that are new.
// In 3D a whole plane of keys is new at once: every tile of a plane asks for its share of the next.
struct NextRows {
    bool next_map;
    int z, query_begin, query_end, key_z, key_begin, key_end;
};
static NextRows next_rows(const Ring &r, const Block &b, const GroupAxis &y_axis, int z, int y, int rows) {
    const bool plane_ends = y + rows == b.end[1];
    NextRows n{plane_ends && z + 1 == b.end[0], z, y + rows, 0, b.key_begin[0], r.packed, 0};
    if (plane_ends) n.z = n.next_map ? b.begin[0] : z + 1, n.query_begin = b.begin[1];
    n.query_end = n.query_begin + rows_of_tile(y_axis, n.query_begin, b.end[1]);
    if (r.shape.planes) {
        const int all = b.end[1] - b.begin[1], done = y - b.begin[1];
        n.key_z = r.packed;
        n.key_begin = b.key_begin[1] + r.shape.rows * done / all,
        n.key_end = b.key_begin[1] + r.shape.rows * (done + rows) / all;
        if (n.next_map || r.packed >= b.key_end[0]) n.key_end = n.key_begin;
    } else {
        if (n.next_map) n.key_begin = b.key_begin[1];
        n.key_end = y_axis.end(n.query_end - 1);
    }
    return n;
}

// Asks for what the next tile reads and writes of a map's tensors, in the columns [x, x_end).
template <class T>
struct NextTile {
    Ahead &ahead;
    const Problem &p;
    const Map &map;
    const NextRows &rows;
    int x, x_end, heads;

    void keys(const Tensor &tensor, int head, int channels) const {
        ahead.add(view<const T>(tensor, p, map), rows.key_z, rows.key_begin, rows.key_end, x, x_end, head, channels,
                  heads);
    }
    void queries(const Tensor &tensor, int head, int channels) const {
        ahead.add(view<const T>(tensor, p, map), rows.z, rows.query_begin, rows.query_end, x, x_end, head, channels,
                  heads);
    }
};

// The same of the next strip of a sequence, in this block or the one after: as many tokens as this strip has, queries from x on
// and keys from `key` on.
template <class T>
struct NextStrip {
    Ahead &ahead;
    const Problem &p;
    const Map &map;
    int x, key, n, heads;

    void keys(const Tensor &tensor, int head, int channels) const { add(tensor, key, head, channels); }
    void queries(const Tensor &tensor, int head, int channels) const { add(tensor, x, head, channels); }

  private:
    void add(const Tensor &tensor, int from, int head, int channels) const {
        const int length = map.axis[2].length, to = from + n < length ? from + n : length;
        ahead.add(view<const T>(tensor, p, map), 0, 0, 1, from < 0 ? 0 : from, to, head, channels, heads);
    }
};

// The rows of keys whose gradients leave the ring after the tile at (z, y): memory to write is asked for like memory to read. None in
// 3D, where whole planes leave it.
struct FinishedRows {
    int z, begin, end;
};
static FinishedRows finished_rows(const Ring &r, const Block &b, const GroupAxis &y_axis, int z, int y, int rows) {
    if (r.shape.planes) return {z, 0, 0};
    return {z, r.flushed, y + rows < b.end[1] ? y_axis.first[y + rows] : b.key_end[1]};
}

// Transposed keys (or values) of the ring for all heads of a task, [head][slot][channel][key] or, with two heads in the lanes,
// [pair of heads][slot][channel][key][2].
struct PackedKeys {
    Real *data;
    int lane_heads, heads, slots, channels, width, pitch, kernel;

    int words() const { return score_words(channels); }
    int64_t row_size() const { return (int64_t)words() * pitch; }
    Real *row(int head, int slot) const { return data + ((int64_t)(head / lane_heads) * slots + slot) * row_size(); }
    int64_t size() const { return heads / lane_heads * slots * row_size() + lanes; }
};

static PackedKeys lay_out_keys(Arena &arena, const Ring &ring, int channels, int kernel, int heads) {
    PackedKeys k{nullptr,    ring.heads, heads, ring.shape.slots(), channels, round_up(ring.width * ring.heads),
                 ring.pitch, kernel};
    k.data = arena.take<Real>(k.size());
    return k;
}
// Idle lanes read past the keys of a row: numbers, not whatever the memory held. Packing a row writes `width` places, copies behind
// the last key; the rest is written here, once.
static void clear_rest(const PackedKeys &k) {
    if (!k.data) return;
    store(k.data + k.size() - lanes, Vec{});
    const int64_t rows = (int64_t)k.heads / k.lane_heads * k.slots * k.words();
    for (int i = k.width; i < k.pitch; i += lanes)
        for (int64_t row = 0; row < rows; row++) store(k.data + row * k.pitch + i, Vec{});
}

// Places of a packed row. Of those to pack, `from` begins a vector and `to` ends one or the row.
struct Places {
    int from, to;
};

// Packs places of row (z, y) of the keys of all heads of a task, whose first is `head`. Heads inside: a token's channels lie side by
// side.
template <class T, int lane_heads>
static void pack_keys_of(const PackedKeys &k, const PackedRow &row, Places places, const View<const T> &v, int z, int y,
                         int head, int slot) {
    const int n = places.to * lane_heads;
    for (int i = places.from * lane_heads; i < n; i += lanes) {
        const Index key = row.keys<lane_heads>(i, n);
        int64_t token[lanes];
        for (int l = 0; l < lanes; l++) token[l] = int64_t(key[l]) * v.x + l % lane_heads * v.head;
        for (int h = 0; h < k.heads; h += lane_heads)
            pack_for_scores(v.at(z, y, 0, head + h), token, k.channels, k.row(h, slot) + i, k.pitch, Real(1));
    }
}
template <class T>
static void pack_keys(const PackedKeys &k, const PackedRow &row, Places places, const View<const T> &v, int z, int y,
                      int head, int slot) {
    if (k.lane_heads == 2) pack_keys_of<T, 2>(k, row, places, v, z, y, head, slot);
    else pack_keys_of<T, 1>(k, row, places, v, z, y, head, slot);
}

// Calls visit(place, n, head) for up to eight neighbours at a time and every head: a token's heads lie side by side.
template <class Visit>
static void for_each_eight(Places places, int heads, Visit visit) {
    for (int from = places.from, n; from < places.to; from += n) {
        n = from + 8 < places.to ? 8 : places.to - from;
        for (int h = 0; h < heads; h++) visit(from, n, h);
    }
}

// The same key by key, each with the channels as they lie in memory; head h of the task at rows + h * head_step.
template <class T>
static void pack_values(Real *rows, int64_t head_step, int channels, const PackedRow &row, Places places,
                        const View<const T> &v, int z, int y, int head, int head_end) {
    const int64_t width = round_up(channels);
    const int ends[3] = {row.copies_left(), row.own_end(), row.width};
    for (int part = 0, from = places.from; part < 3; part++) {
        const int end = ends[part] < places.to ? ends[part] : places.to;
        for_each_eight(Places{from, end}, head_end - head, [&](int place, int n, int h) {
            pack_rows(v.at(z, y, row.key(place), head + h), v.x, n, channels, rows + h * head_step + place * width,
                      Real(1));
        });
        if (from < end) from = end;
    }
}

// Calls visit(place, its key's own place) for the copies of a packed row. A narrow block may not hold the key itself: such a place
// lies outside the row.
template <class Visit>
static void for_each_copy(const PackedRow &row, Visit visit) {
    for (int i = 0; i < row.copies_left(); i++) visit(i, i + row.kernel);
    for (int i = row.own_end(); i < row.width; i++) visit(i, i - row.kernel);
}

} // namespace nbhd::NBHD_ISA
