// What a tile of queries sees, from the axis tables.
//
//      keys of a 3 x 8 tile, window 5x5, inside the map           column tile: lanes queries of the last axis
//
//        . . . . . . . . . . . .      first row tile row          row tile: up to tile_rows queries of the Y axis
//        . . . . . . . . . . . .
//        . . Q Q Q Q Q Q Q Q . .      key row y meets query rows [begin, end): the rows that see it, always
//        . . Q Q Q Q Q Q Q Q . .      neighbours, because first keys and last keys never go down along an axis
//        . . Q Q Q Q Q Q Q Q . .
//        . . . . . . . . . . . .
//        . . . . . . . . . . . .
//
// A slot is a place in a query's window, (z, y, x) offsets in row-major order. Scores lie as [row][slot][lane].
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

// Up to `lanes` neighbouring queries of the last axis. Key positions count from the block's first key column.
struct ColumnTile {
    int x, n;            // first query, number of queries
    int origin;          // first key of lane 0
    bool plain;          // every lane used, its keys one further than its neighbour's, all of them: no permute, no mask
    bool masked;         // some lane sees fewer keys than the kernel
    int bias_column;     // plain tiles: column of the bias table for offset 0
    int bias_set;        // which expanded bias table and gradient accumulator: 0 for plain tiles
    int first[lanes], end[lanes];
    int lane_column[lanes]; // column of the bias table for offset 0
    Index index, count;
};

static ColumnTile column_tile(const GroupAxis &x_axis, int x, int x_end, int key_origin) {
    ColumnTile t;
    t.x = x;
    t.origin = x_axis.first[x] - key_origin;
    const int kernel = x_axis.kernel;
    int n = 0; // the permute reaches lanes - 1 past the first key of lane 0
    while (n < lanes && x + n < x_end && x_axis.first[x + n] - x_axis.first[x] < lanes) n++;
    t.n = n;
    t.plain = n == lanes;
    t.masked = false;
    t.index = Index{};
    t.count = Index{} + kernel;
    for (int l = 0; l < lanes; l++) {
        const int u = l < n ? x + l : x + n - 1;
        t.first[l] = x_axis.first[u] - key_origin;
        t.end[l] = t.first[l] + x_axis.count[u];
        t.lane_column[l] = x_axis.first[u] - u + kernel - 1;
        t.index[l] = t.first[l] - t.origin;
        t.count[l] = x_axis.count[u];
        if (t.index[l] != l) t.plain = false;
        if (x_axis.count[u] < kernel) t.masked = true, t.plain = false;
    }
    t.bias_column = t.lane_column[0];
    t.bias_set = 0;
    return t;
}

// A row of keys that some query row of the tile sees.
struct KeyRow {
    int ring;        // where the key ring keeps it
    int begin, end;  // query rows
    int slot;        // offset along (Z, Y) for query row 0; row r has slot - shift[r]
    int bias_row;    // row of the bias table for query row 0; row r has bias_row - r
};

struct RowTile {
    int z, y, n;           // first query row, number of rows
    int shift[tile_rows];  // first key row minus that of row 0
    int z_count, y_count[tile_rows];
    int key_rows, key_rows_per_plane;
    KeyRow *key;
};

// Rows of keys are kept in a ring. Along the leading axis (Z in 3D, else Y) `span` of them are alive at a time; each has
// `rows` rows (the key rows of the block along Y in 3D, else one).
struct RingShape {
    bool planes; // the leading axis is Z
    int span, rows, row_origin;
    int slot(int z, int y) const { return planes ? z % span * rows + (y - row_origin) : y % span; }
    int slots() const { return span * rows; }
};

static void row_tile(RowTile &t, const GroupAxis &z_axis, const GroupAxis &y_axis, const RingShape &ring, int z, int y, int n) {
    t.z = z, t.y = y, t.n = n;
    const int y_first = y_axis.first[y], y_end = y_axis.end(y + n - 1), z_first = z_axis.first[z];
    for (int r = 0; r < n; r++) t.shift[r] = y_axis.first[y + r] - y_first, t.y_count[r] = y_axis.count[y + r];
    t.z_count = z_axis.count[z];
    t.key_rows_per_plane = y_end - y_first;
    t.key_rows = t.z_count * t.key_rows_per_plane;
    const int bias_rows_y = 2 * y_axis.kernel - 1;
    KeyRow *k = t.key;
    for (int zi = 0; zi < t.z_count; zi++)
        for (int yk = y_first; yk < y_end; yk++, k++) {
            k->ring = ring.slot(z_first + zi, yk);
            k->begin = 0;
            while (k->begin < n && y_axis.end(y + k->begin) <= yk) k->begin++;
            k->end = k->begin;
            while (k->end < n && y_axis.first[y + k->end] <= yk) k->end++;
            k->slot = zi * y_axis.kernel + yk - y_first;
            k->bias_row = (z_first + zi - z + z_axis.kernel - 1) * bias_rows_y + yk - y + y_axis.kernel - 1;
        }
}

} // namespace nbhd::NBHD_ISA
