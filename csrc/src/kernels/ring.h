// The packed keys and values of a block: a ring along the leading axis, filled just ahead of the tiles.
//
//      leading axis (Y in 2D, Z in 3D)
//        row 0   flushed: no later tile sees it
//        row 1   |
//        row 2   | alive: packed, at most `span` rows; row y lies in slot y mod span
//        row 3   |
//        row 4   not packed yet
#pragma once
#include "block.h"
#include "pack.h"

namespace nbhd::NBHD_ISA {

struct Ring {
    RingShape shape;
    int width, pitch;    // keys of a row; channel pitch of the transposed copies
    int packed, flushed; // places along the leading axis

    static int pitch_for(int width) { return round_up(width + lanes - 1); }
    int64_t natural_row(int channels) const { return (int64_t)width * round_up(channels); }
};

static Ring make_ring(const Map &m, const Block &b) {
    Ring r;
    r.shape = ring_shape(m, b);
    r.width = b.key_end[2] - b.key_begin[2];
    r.pitch = Ring::pitch_for(r.width);
    r.packed = r.flushed = 0;
    return r;
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

// What the next row tile will read (its queries and, where the ring moves along Y, its new keys) is asked for while this one is
// computed, a few tokens between one block of products and the next: asked for at once they would only wait for one another.
struct Ahead {
    static constexpr int most_rows = 32;
    struct Row {
        const char *token;
        int64_t stride;
        int bytes;
    } row[most_rows];
    int rows = 0, tokens = 0, at_row = 0, at_token = 0, per_step = 0;

    // Tokens [x, x_end) of the query rows (keys: rows along Y) [y, y_end).
    template <class T>
    void add(const View<T> &v, int z, int y, int y_end, int x, int x_end, int head, int channels) {
        if (!v.data) return;
        tokens = x_end - x;
        for (; y < y_end && rows < most_rows; y++)
            row[rows++] = Row{(const char *)v.at(z, y, x, head), v.x * (int64_t)sizeof(T), channels * (int)sizeof(T)};
    }
    void share_among(int steps) { per_step = (rows * tokens + steps - 1) / steps; }
    void step() {
        for (int n = per_step; n > 0 && at_row < rows; n--) {
            const Row &r = row[at_row];
            const char *p = r.token + at_token * r.stride;
            for (int i = 0; i < r.bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
            if (++at_token == tokens) at_token = 0, at_row++;
        }
    }
};

// The rows of the tile after (z, y): of this map or, after the last, of the task's next one, and those of its keys that are new.
// In 3D a whole plane of keys is new at once: every tile of a plane asks for its share of the next.
struct NextRows {
    bool next_map;
    int z, query_begin, query_end, key_z, key_begin, key_end;
};
static NextRows next_rows(const Ring &r, const Block &b, const GroupAxis &y_axis, int z, int y) {
    const auto least = [](int a, int c) { return a < c ? a : c; };
    const bool plane_ends = y + tile_rows >= b.end[1];
    NextRows n{plane_ends && z + 1 == b.end[0], z, y + tile_rows, 0, b.key_begin[0], r.packed, r.packed + tile_rows};
    if (plane_ends) n.z = n.next_map ? b.begin[0] : z + 1, n.query_begin = b.begin[1];
    n.query_end = least(n.query_begin + tile_rows, b.end[1]);
    if (r.shape.planes) {
        const int tiles = (b.end[1] - b.begin[1] + tile_rows - 1) / tile_rows, tile = (y - b.begin[1]) / tile_rows;
        n.key_z = r.packed;
        n.key_begin = b.key_begin[1] + r.shape.rows * tile / tiles,
        n.key_end = b.key_begin[1] + r.shape.rows * (tile + 1) / tiles;
        if (n.next_map || r.packed >= b.key_end[0]) n.key_end = n.key_begin;
    } else if (n.next_map) {
        n.key_begin = b.key_begin[1], n.key_end = y_axis.end(n.query_end - 1);
    } else {
        n.key_end = least(n.key_end, b.key_end[1]);
    }
    return n;
}

// Transposed keys (or values) of the ring for all heads of a task, [head][slot][channel][key], and the copies that paired
// column tiles read, [head][pair][slot][channel][offset][2].
struct PackedKeys {
    Real *data, *pairs;
    int heads, n_pairs, slots, channels, pitch, kernel;

    int64_t row_size() const { return (int64_t)channels * pitch; }
    int64_t pair_row_size() const { return (int64_t)channels * 2 * kernel + 2 * lanes; }
    Real *row(int head, int slot) const { return data + ((int64_t)head * slots + slot) * row_size(); }
    Real *pair_row(int head, int pair, int slot) const {
        return pairs + (((int64_t)head * n_pairs + pair) * slots + slot) * pair_row_size();
    }
    int64_t size() const { return heads * slots * row_size() + lanes; }
};

static PackedKeys lay_out_keys(Arena &arena, const Ring &ring, int channels, int kernel, int heads, int n_pairs) {
    PackedKeys k{nullptr, nullptr, heads, n_pairs, ring.shape.slots(), channels, ring.pitch, kernel};
    k.data = arena.take<Real>(k.size());
    k.pairs = arena.take<Real>(heads * n_pairs * k.slots * k.pair_row_size());
    return k;
}
// Idle lanes read past the keys of a row: numbers, not whatever the memory held.
static void clear(const PackedKeys &k) {
    if (k.data) memset(k.data, 0, k.size() * sizeof(Real));
}

// The copies for paired tiles of one packed row, all heads.
static void pack_pairs_of(const PackedKeys &k, int slot, const ColumnTile *tiles, const ColumnTiles &n) {
    if (!n.pairs) return;
    for (int i = 0; i < n.n; i++) {
        if (tiles[i].keys != Keys::paired) continue;
        for (int h = 0; h < k.heads; h++)
            pack_pairs(k.row(h, slot), k.pitch, k.channels, tiles[i].pair_origin[0], tiles[i].pair_origin[1], k.kernel,
                       k.pair_row(h, tiles[i].pair, slot));
    }
}

} // namespace nbhd::NBHD_ISA
