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

// Neighbouring queries of a tile, in lanes lane, lane + step, ...
struct Run {
    int x, n; // first query, number
    int lane, step;
    int index; // of the first query in the tile's order: run after run
};

struct ColumnTile {
    Keys keys;
    int runs, n; // queries of all runs
    Run run[2];
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

static ColumnTile empty_tile(const GroupAxis &a, Keys keys, int x, int origin) {
    ColumnTile t{};
    for (int l = 0; l < lanes; l++) t.lane_x[l] = x;
    t.keys = keys, t.origin = origin, t.count = Index{} + a.kernel;
    return t;
}

// The tile that begins at x; it covers n queries from there. `last`: a permuted tile may save one or two at the end.
static ColumnTile column_tile(const GroupAxis &a, int x, int x_end, int key_origin, bool last) {
    const int shared = run_length(a, x, x_end, 0), sliding = run_length(a, x, x_end, 1),
              most = shared > sliding ? shared : sliding;
    int permuted = 1; // the permute reaches lanes - 1 keys past lane 0's
    while (permuted < lanes && x + permuted < x_end && a.first[x + permuted] - a.first[x] < lanes) permuted++;
    const bool saves = permuted > 2 * most || (last && permuted > most && x + permuted == x_end);
    const Keys keys = saves ? Keys::permuted : sliding >= shared ? Keys::sliding : Keys::shared;
    ColumnTile t = empty_tile(a, keys, x, a.first[x] - key_origin);
    add_run(t, a, x, keys == Keys::permuted ? permuted : most, 0, 1, key_origin);
    return t;
}

// Joins two shared tiles of at most half a vector each. Not where windows are so long that the second copy of keys would weigh.
static bool can_pair(const ColumnTile &a, const ColumnTile &b, int kernel) {
    return a.keys == Keys::shared && b.keys == Keys::shared && a.n <= lanes / 2 && b.n <= lanes / 2 &&
           kernel <= 4 * lanes;
}
static ColumnTile paired(const GroupAxis &axis, const ColumnTile &a, const ColumnTile &b, int key_origin) {
    ColumnTile t = empty_tile(axis, Keys::paired, a.run[0].x, a.origin);
    t.pair_origin[0] = a.origin, t.pair_origin[1] = b.origin;
    add_run(t, axis, a.run[0].x, a.n, 0, 2, key_origin);
    add_run(t, axis, b.run[0].x, b.n, 1, 2, key_origin);
    return t;
}

struct ColumnTiles {
    int n, sets, pairs; // tiles, expanded bias tables (the common one included), paired tiles
};

// Tiles of the queries [x, x_end); with no array only counts.
static ColumnTiles make_column_tiles(const GroupAxis &a, int x, int x_end, int key_origin, ColumnTile *tiles) {
    ColumnTiles c{0, 1, 0};
    ColumnTile waiting; // a shared tile that looks for a partner
    bool waits = false;
    int common = -1; // bias column of the sliding tiles
    const auto put = [&](ColumnTile t) {
        if (common < 0 && t.keys == Keys::sliding && !t.masked) common = t.lane_column[0];
        if (t.keys != Keys::sliding || t.masked || t.lane_column[0] != common) t.bias_set = c.sets++;
        if (t.keys == Keys::paired) t.pair = c.pairs++;
        if (tiles) tiles[c.n] = t;
        c.n++;
    };
    while (x < x_end) {
        const ColumnTile t = column_tile(a, x, x_end, key_origin, !waits);
        x += t.n;
        if (!can_pair(t, t, a.kernel)) {
            put(t);
        } else if (waits) {
            put(paired(a, waiting, t, key_origin)), waits = false;
        } else {
            waiting = t, waits = true;
        }
    }
    if (waits) put(waiting);
    return c;
}

} // namespace nbhd::NBHD_ISA
