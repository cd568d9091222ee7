// What a tile of queries sees, from the axis tables.
//
//      keys of a 3 x 8 tile, window 5x5, inside the map           column tile (column_tile.h): queries of the last axis
//
//        . . . . . . . . . . . .                                  row tile: up to tile_rows queries of the Y axis
//        . . . . . . . . . . . .
//        . . Q Q Q Q Q Q Q Q . .      key row y meets query rows [begin, end): the rows that see it, always
//        . . Q Q Q Q Q Q Q Q . .      neighbours, because first keys and last keys never go down along an axis
//        . . Q Q Q Q Q Q Q Q . .
//        . . . . . . . . . . . .
//        . . . . . . . . . . . .
//
// Scores lie as [query row][slot][lane], the slots of a window as [z offset][x offset][y offset]: the key rows of one key
// column follow one another, at distances the gradient kernel knows at compile time.
#pragma once
#include "column_tile.h"

namespace nbhd::NBHD_ISA {

// A row of keys that some query row of the tile sees.
struct KeyRow {
    int ring;       // where the key ring keeps it
    int begin, end; // query rows
    int slot;       // of x offset 0, for query row 0; row r has slot - shift[r]
    int bias_row;   // row of the bias table for query row 0; row r has bias_row - r
};

// How the windows of a tile's query rows lie, one plane like another: each a key row further than the last, all the same, or neither.
enum class RowShape { stairs, flat, any };

// Query rows of the tile that begins at place y: as many as fit or, where that makes no more tiles in the end, as many as make stairs or
// are flat. At the borders of a map windows stop advancing, and a tile across that place would be neither.
static int rows_of_tile(const GroupAxis &a, int y, int y_end) {
    const int left = y_end - y, most = left < tile_rows ? left : tile_rows;
    int flat = 1, stairs = 1;
    while (flat < most && a.first[y + flat] == a.first[y]) flat++;
    while (stairs < most && a.first[y + stairs] == a.first[y] + stairs) stairs++;
    const int even = flat > stairs ? flat : stairs;
    const auto tiles = [](int rows) { return (rows + tile_rows - 1) / tile_rows; };
    return 1 + tiles(left - even) == tiles(left) ? even : most;
}

struct RowTile {
    int z, y, n; // first query row, number of rows
    RowShape shape;
    int shift[tile_rows]; // first key row minus that of row 0
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

static void row_tile(RowTile &t, const GroupAxis &z_axis, const GroupAxis &y_axis, int x_kernel, const RingShape &ring,
                     int z, int y, int n) {
    t.z = z, t.y = y, t.n = n;
    const int y_first = y_axis.first[y], y_end = y_axis.end(y + n - 1), z_first = z_axis.first[z];
    for (int r = 0; r < n; r++) t.shift[r] = y_axis.first[y + r] - y_first, t.y_count[r] = y_axis.count[y + r];
    t.z_count = z_axis.count[z];
    t.key_rows_per_plane = y_end - y_first;
    t.key_rows = t.z_count * t.key_rows_per_plane;
    bool whole = true, stairs = true, flat = true;
    for (int r = 0; r < n; r++)
        whole &= t.y_count[r] == y_axis.kernel, stairs &= t.shift[r] == r, flat &= t.shift[r] == 0;
    t.shape = !whole                         ? RowShape::any
              : stairs && y_axis.kernel >= n ? RowShape::stairs
              : flat                         ? RowShape::flat
                                             : RowShape::any;
    const int bias_rows_y = 2 * y_axis.kernel - 1;
    KeyRow *k = t.key;
    for (int zi = 0; zi < t.z_count; zi++)
        for (int yk = y_first; yk < y_end; yk++, k++) {
            k->ring = ring.slot(z_first + zi, yk);
            k->begin = 0;
            while (k->begin < n && y_axis.end(y + k->begin) <= yk) k->begin++;
            k->end = k->begin;
            while (k->end < n && y_axis.first[y + k->end] <= yk) k->end++;
            k->slot = zi * x_kernel * y_axis.kernel + yk - y_first;
            k->bias_row = (z_first + zi - z + z_axis.kernel - 1) * bias_rows_y + yk - y + y_axis.kernel - 1;
        }
}

} // namespace nbhd::NBHD_ISA
