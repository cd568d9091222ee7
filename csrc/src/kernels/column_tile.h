// Queries of the last axis that share a vector, and how their keys are read.
//
//      windows of 7, moved into the map:    query        0   1   2   3   4   5   6   7
//                                           first key    0   0   0   0   1   2   3   4
//
// A packed row of keys has copies at its ends, so that windows at a border slide like all others. They see the same keys in
// another order, which only the bias must know:
//
//                  place    0 1 2 3 4 5 6 7 8 9 10 ...
//                  key      4 5 6 0 1 2 3 4 5 6 7  ...         at the other end the last keys are followed by key - 7
//                  query 0  x x x x x x x
//                  query 1    x x x x x x x
//
// Where windows lie otherwise (strides, causal axes) or are long, the first keys of a tile decide:
//
//      shared     0 0 0 0                      every lane sees the same keys: offset j is one number for all
//      sliding    1 2 3 4 5 6 7 8              lane l starts l keys further: offset j is one load
//      permuted   anything, such as 2 2 4 4    the load of `sliding` and a permute, which costs as much as the products
//
// A map of at most half a vector of columns takes two heads at once in alternating lanes, their keys alternating as well. Idle
// lanes are those past the last query.
#pragma once
#include "../problem.h"
#include "scores.h"

namespace nbhd::NBHD_ISA {

// One axis of one dilation group, undilated: place u sees keys [first[u], first[u] + count[u]).
struct GroupAxis {
    int length, kernel, before; // see Axis
    const int32_t *first, *count;
    int end(int u) const { return first[u] + count[u]; }
    // Whether packed rows have copies. Not for long windows: at a border of them whole vectors of queries share their keys.
    bool wraps() const { return before >= 0 && kernel < length && kernel <= 2 * lanes; }
    // First key of u as packed rows count them: below 0 or behind the axis where copies begin.
    int start(int u) const { return wraps() ? u - before : first[u]; }
};

// Which keys of the last axis a packed row holds, place by place.
struct PackedRow {
    int begin, width; // key of place 0, were it no copy; number of places
    int length, kernel;
    int copies_left() const { return begin < 0 ? -begin : 0; }
    int copies_right() const { return begin + width > length ? begin + width - length : 0; }
    int own_end() const { return width - copies_right(); }
    int key(int place) const {
        const int k = begin + place;
        return k < 0 ? k + kernel : k >= length ? k - kernel : k;
    }
    // The same of a vector of lanes from `lane` on, of which `heads` share a place; lanes from n on repeat the first.
    template <int heads>
    Index keys(int lane, int n) const {
        const Index l = lane_numbers(), k = begin + (lane + (l < n - lane ? l : l % heads)) / heads;
        return k < 0 ? k + kernel : k >= length ? k - kernel : k;
    }
};
// Those that queries [x, x_end) see.
static PackedRow packed_row(const GroupAxis &a, int x, int x_end) {
    return {a.start(x), a.start(x_end - 1) + a.count[x_end - 1] - a.start(x), a.length, a.kernel};
}

// Neighbouring queries of one head, in lanes lane, lane + step, ... A permuted tile is cut where its first keys turn from staying to
// advancing, because the sums of neighbours go together where they do one or the other.
constexpr int most_cuts = 3, most_runs = 2 * most_cuts;
struct Run {
    int x, n; // first query, number
    int lane, step;
    int index; // of the first query in the tile's order: run after run
    int head;  // of the tile's
};

struct ColumnTile {
    Keys keys;
    int heads;   // 1, or 2 in alternating lanes
    int runs, n; // queries of all runs
    Run run[most_runs];
    int origin;                             // place of lane 0's first key
    bool masked;                            // some lane sees fewer keys than the kernel
    int bias_set;                           // expanded bias table and gradient sums; 0: the sliding tiles' common one
    int x[lanes], head[lanes], lane[lanes]; // in the tile's order
    int first[lanes], end[lanes];           // places of the keys, in the tile's order
    int lane_x[lanes], lane_query[lanes];   // by lane; idle lanes repeat the first query
    Index lane_head;                        // all vectors are by lane
    Index index, count;                     // key relative to lane 0's; number of keys
    Index column;                           // of the bias table for offset 0, were it no copy
    Index low, high;                        // offsets [low, high) are no copies
    int wrap;                               // the kernel

    int bias_column(int l, int offset) const {
        return int(column[l]) + offset + (offset < low[l] ? wrap : offset >= high[l] ? -wrap : 0);
    }
    Index bias_columns(int offset) const {
        const Index o = Index{} + offset, w = Index{} + wrap;
        return column + o + ((o < low) & w) - ((o >= high) & w);
    }
};

// Queries from x on whose first keys advance by `step`, at most `most`.
static int run_length(const GroupAxis &a, int x, int x_end, int step, int most) {
    int n = 1;
    while (n < most && x + n < x_end && a.first[x + n] == a.first[x] + n * step) n++;
    return n;
}

// n queries from x on; `cut` of them, from the tile's first, came before.
static void add_run(ColumnTile &t, const GroupAxis &a, const PackedRow &row, int x, int n, int cut, int head) {
    const int lane = cut * t.heads + head;
    t.run[t.runs++] = Run{x, n, lane, t.heads, t.n, head};
    for (int i = 0; i < n; i++, t.n++) {
        const int u = x + i, l = lane + i * t.heads, start = a.start(u);
        t.x[t.n] = u, t.head[t.n] = head, t.lane[t.n] = l;
        t.first[t.n] = start - row.begin, t.end[t.n] = t.first[t.n] + a.count[u];
        t.lane_x[l] = u, t.lane_head[l] = head, t.lane_query[l] = t.n;
        t.column[l] = start - u + a.kernel - 1;
        t.low[l] = start < 0 ? -start : 0;
        t.high[l] = a.wraps() && start + a.kernel > a.length ? a.length - start : a.kernel;
        t.count[l] = a.count[u];
        t.index[l] = t.heads * (t.first[t.n] - t.origin) + head;
        if (a.count[u] < a.kernel) t.masked = true;
    }
}

// What the tile that begins at x will be: n queries from there.
struct TileKind {
    Keys keys;
    int x, n;
};
static TileKind tile_kind(const GroupAxis &a, int x, int x_end, int heads) {
    const int wide = lanes / heads;
    if (a.wraps()) return {Keys::sliding, x, x_end - x < wide ? x_end - x : wide};
    const int shared = run_length(a, x, x_end, 0, wide), sliding = run_length(a, x, x_end, 1, wide),
              most = shared > sliding ? shared : sliding;
    int permuted = most; // the permute reaches lanes - 1 keys past lane 0's
    while (permuted < wide && x + permuted < x_end && a.first[x + permuted] - a.first[x] < wide) permuted++;
    if (permuted > 2 * most || (permuted > most && x + permuted == x_end)) return {Keys::permuted, x, permuted};
    return {sliding >= shared ? Keys::sliding : Keys::shared, x, most};
}

static void make_tile(ColumnTile &t, const GroupAxis &a, const PackedRow &row, TileKind kind, int heads) {
    t = ColumnTile{};
    t.keys = kind.keys, t.heads = heads, t.wrap = a.kernel, t.count = Index{} + a.kernel;
    t.origin = a.start(kind.x) - row.begin;
    const int end = kind.x + kind.n;
    int ends[most_cuts + 1] = {kind.x, end}, cuts = 1; // where each piece ends
    if (kind.keys == Keys::permuted) {
        cuts = 0;
        for (int x = kind.x; x < end && cuts < most_cuts;) {
            const int shared = run_length(a, x, end, 0, lanes), sliding = run_length(a, x, end, 1, lanes);
            ends[++cuts] = x += shared > sliding ? shared : sliding;
        }
        if (ends[cuts] < end) ends[cuts = 1] = end; // no pattern
    }
    for (int head = 0; head < heads; head++)
        for (int i = 0; i < cuts; i++) add_run(t, a, row, ends[i], ends[i + 1] - ends[i], ends[i] - kind.x, head);
    for (int l = 0; l < lanes; l++) // idle lanes
        if (l >= heads * kind.n) {
            t.lane_x[l] = kind.x, t.column[l] = t.column[0];
            t.low[l] = t.low[0], t.high[l] = t.high[0];
        }
}

struct ColumnTiles {
    int n, sets; // tiles, expanded bias tables (the common one included)
    bool common; // whether some tile uses that
    int reach;   // numbers of a packed row that the tiles read
};

// Whether all lanes of a sliding tile see whole windows without copies.
static bool is_plain(const ColumnTile &t, const GroupAxis &a) {
    bool plain = t.keys == Keys::sliding && t.heads == 1 && !t.masked;
    for (int l = 0; l < t.n; l++) plain &= t.low[l] == 0 && t.high[l] == a.kernel;
    return plain;
}
// Whether a tile is the plain one `t` moved on by its queries. Most tiles of a long map are, and are sooner moved than made.
static bool goes_on(const ColumnTile &t, const GroupAxis &a, TileKind kind) {
    if (kind.keys != Keys::sliding || kind.n != lanes || t.n != lanes) return false;
    if (a.wraps()) return a.start(kind.x + lanes - 1) + a.kernel <= a.length;
    bool whole = a.first[kind.x] == a.first[t.x[0]] + lanes;
    for (int i = 0; i < lanes; i++) whole &= a.count[kind.x + i] == a.kernel;
    return whole;
}
static void move_on(ColumnTile &t) {
    t.origin += lanes, t.run[0].x += lanes;
    for (int i = 0; i < lanes; i++) t.x[i] += lanes, t.first[i] += lanes, t.end[i] += lanes, t.lane_x[i] += lanes;
}

// Tiles of the queries [x, x_end); with no array only counts.
static ColumnTiles make_column_tiles(const GroupAxis &a, const PackedRow &row, int x, int x_end, int heads,
                                     ColumnTile *tiles) {
    ColumnTiles c{0, 1, false, 0};
    int common = 0; // bias column of the plain tiles
    ColumnTile t;
    bool plain = false;
    for (TileKind kind; x < x_end; x += kind.n, c.n++) {
        kind = tile_kind(a, x, x_end, heads);
        if (plain && goes_on(t, a, kind)) move_on(t);
        else make_tile(t, a, row, kind, heads), plain = is_plain(t, a);
        if (plain && !c.common) c.common = true, common = int(t.column[0]);
        t.bias_set = plain && t.column[0] == common ? 0 : c.sets++;
        const int reach = heads * (t.origin + a.kernel - 1) + (kind.keys == Keys::shared ? heads : lanes);
        if (c.reach < reach) c.reach = reach;
        if (tiles) tiles[c.n] = t;
    }
    return c;
}

} // namespace nbhd::NBHD_ISA
