// Queries of the last axis that share a vector, and how their keys are read.
//
//      first keys, window 7, 28 columns        0 0 0 0 1 2 3 4 ... 20 21 21 21 21
//
//      shared     0 0 0 0                      every lane sees the same keys: offset j is one number for all
//      sliding    1 2 3 4 5 6 7 8              lane l starts l keys further: offset j is one load
//      paired     0 21 0 21 0 21 0 21          two shared groups of at most half a vector in alternating lanes, their keys packed
//                                              in alternation too: offset j is one broadcast of two numbers
//      permuted   anything, such as 2 2 4 4    the load of `sliding` and a permute, which costs as much as the products
//
// Both borders of a map make one paired tile, or two shared ones. Idle lanes are those past the last query.
#pragma once
#include "../problem.h"
#include "scores.h"

namespace nbhd::NBHD_ISA {

// One axis of one dilation group, undilated: place u sees keys [first[u], first[u] + count[u]).
struct GroupAxis {
    int length, kernel;
    const int32_t *first, *count;
    int end(int u) const { return first[u] + count[u]; }
};

// Neighbouring queries of a tile, in lanes lane, lane + step, ... A permuted tile is cut where its first keys turn from staying to
// advancing, because the sums of neighbours go together where they do one or the other.
constexpr int most_runs = 3;
struct Run {
    int x, n; // first query, number
    int lane, step;
    int index; // of the first query in the tile's order: run after run
};

struct ColumnTile {
    Keys keys;
    int runs, n; // queries of all runs
    Run run[most_runs];
    int origin;         // first key of lane 0, counted as all keys here from the block's first key column
    int pair;           // paired tiles are numbered: which packed copy of the keys
    int pair_origin[2]; // first key of either group
    bool masked;        // some lane sees fewer keys than the kernel
    int bias_set;       // expanded bias table and gradient sums; 0: the sliding tiles' common one
    int x[lanes];       // in the tile's order, as are the next two
    int first[lanes], end[lanes];
    int lane[lanes]; // of the query
    int lane_x[lanes],
        lane_query[lanes];  // by lane: the query, as a place and in the tile's order; idle lanes repeat the first one
    int lane_column[lanes]; // by lane: column of the bias table for offset 0
    Index index, count;     // by lane: key relative to lane 0's; number of keys
};

// Queries from x on whose first keys advance by `step`, all their keys in the window.
static int run_length(const GroupAxis &a, int x, int x_end, int step) {
    int n = 1;
    while (n < lanes && x + n < x_end && a.first[x + n] == a.first[x] + n * step) n++;
    return n;
}

static void add_run(ColumnTile &t, const GroupAxis &a, int x, int n, int lane, int step, int key_origin) {
    t.run[t.runs++] = Run{x, n, lane, step, t.n};
    for (int i = 0; i < n; i++, t.n++) {
        const int u = x + i, l = lane + i * step;
        t.x[t.n] = u, t.lane[t.n] = l, t.lane_x[l] = u, t.lane_query[l] = t.n;
        t.first[t.n] = a.first[u] - key_origin, t.end[t.n] = t.first[t.n] + a.count[u];
        t.lane_column[l] = a.first[u] - u + a.kernel - 1;
        t.count[l] = a.count[u];
        t.index[l] = t.first[t.n] - t.origin;
        if (a.count[u] < a.kernel) t.masked = true;
    }
}

// What the tile that begins at x will be: n queries from there. `last`: a permuted tile may save one or two at the end.
struct TileKind {
    Keys keys;
    int x, n;
};
static TileKind tile_kind(const GroupAxis &a, int x, int x_end, bool last) {
    const int shared = run_length(a, x, x_end, 0), sliding = run_length(a, x, x_end, 1),
              most = shared > sliding ? shared : sliding;
    int permuted = most; // the permute reaches lanes - 1 keys past lane 0's
    while (permuted < lanes && x + permuted < x_end && a.first[x + permuted] - a.first[x] < lanes) permuted++;
    if (permuted > 2 * most || (last && permuted > most && x + permuted == x_end)) return {Keys::permuted, x, permuted};
    return {sliding >= shared ? Keys::sliding : Keys::shared, x, most};
}

static void start_tile(ColumnTile &t, const GroupAxis &a, Keys keys, int x, int key_origin) {
    t = ColumnTile{};
    for (int l = 0; l < lanes; l++) t.lane_x[l] = x;
    t.keys = keys, t.origin = a.first[x] - key_origin, t.count = Index{} + a.kernel;
}
static void make_tile(ColumnTile &t, const GroupAxis &a, TileKind kind, int key_origin) {
    start_tile(t, a, kind.keys, kind.x, key_origin);
    const int end = kind.x + kind.n;
    int ends[most_runs + 1] = {kind.x}, runs = 0; // where each ends
    for (int x = kind.x; x < end && runs < most_runs;) {
        const int shared = run_length(a, x, end, 0), sliding = run_length(a, x, end, 1);
        ends[++runs] = x += shared > sliding ? shared : sliding;
    }
    if (ends[runs] < end) ends[runs = 1] = end; // no pattern
    for (int i = 0; i < runs; i++) add_run(t, a, ends[i], ends[i + 1] - ends[i], ends[i] - kind.x, 1, key_origin);
}

// Joins two shared tiles of at most half a vector each. Not where windows are so long that the second copy of keys would weigh.
static bool can_pair(TileKind t, int kernel) {
    return t.keys == Keys::shared && t.n <= lanes / 2 && kernel <= 4 * lanes;
}
static void make_pair(ColumnTile &t, const GroupAxis &a, TileKind one, TileKind other, int key_origin) {
    start_tile(t, a, Keys::paired, one.x, key_origin);
    t.pair_origin[0] = t.origin, t.pair_origin[1] = a.first[other.x] - key_origin;
    add_run(t, a, one.x, one.n, 0, 2, key_origin);
    add_run(t, a, other.x, other.n, 1, 2, key_origin);
}

struct ColumnTiles {
    int n, sets, pairs; // tiles, expanded bias tables (the common one included), paired tiles
};

// Tiles of the queries [x, x_end); with no array only counts.
static ColumnTiles make_column_tiles(const GroupAxis &a, int x, int x_end, int key_origin, ColumnTile *tiles) {
    ColumnTiles c{0, 1, 0};
    TileKind waiting{}; // a shared tile that looks for a partner
    bool waits = false;
    int common = -1; // bias column of the sliding tiles
    // Whether the tile needs tables of its own for the bias.
    const auto number = [&](TileKind t, bool paired) {
        bool masked = false;
        for (int i = 0; i < t.n; i++) masked |= a.count[t.x + i] < a.kernel;
        const int column = a.first[t.x] - t.x + a.kernel - 1;
        const bool sliding = t.keys == Keys::sliding && !masked && !paired;
        if (sliding && common < 0) common = column;
        ColumnTile *const to = tiles ? tiles + c.n : nullptr;
        if (!sliding || column != common) {
            if (to) to->bias_set = c.sets;
            c.sets++;
        }
        if (paired) {
            if (to) to->pair = c.pairs;
            c.pairs++;
        }
        c.n++;
    };
    while (x < x_end) {
        const TileKind kind = tile_kind(a, x, x_end, !waits);
        x += kind.n;
        if (!can_pair(kind, a.kernel)) {
            if (tiles) make_tile(tiles[c.n], a, kind, key_origin);
            number(kind, false);
        } else if (waits) {
            if (tiles) make_pair(tiles[c.n], a, waiting, kind, key_origin);
            number(waiting, true), waits = false;
        } else {
            waiting = kind, waits = true;
        }
    }
    if (waits) {
        if (tiles) make_tile(tiles[c.n], a, waiting, key_origin);
        number(waiting, false);
    }
    return c;
}

} // namespace nbhd::NBHD_ISA
