// The relative position bias, as the score kernel wants it, and its gradient.
//
//      compact    [head][bias row][bias column]            sliding tiles: all lanes of offset j read one number
//      expanded   [head][set][z row][x offset][y row][lane]      other tiles: one set for each, a vector per offset
//
// The gradient is summed in the expanded form, for all images of a task, and folded into [head][row][column] once. Where the
// expanded tables would be large (3D windows, long sequences), those gather and scatter tile by tile instead.
#pragma once
#include "block.h"
#include "softmax.h"

namespace nbhd::NBHD_ISA {

struct BiasTables {
    bool present = false, expanded = false;
    int rows, rows_y, columns, kernel, sets; // set 0 is the sliding tiles'
    Real *compact, *table, *sum;             // sum: null in the forward

    int64_t set_size() const { return (int64_t)rows * kernel * lanes; }
    const Real *compact_row(int head, int row) const { return compact + ((int64_t)head * rows + row) * columns; }
    // Of x offset 0; the next is rows_y * lanes further, the next y row `lanes`: the order of the slots.
    int64_t in_set(int row) const { return ((int64_t)(row / rows_y) * kernel * rows_y + row % rows_y) * lanes; }
    Real *table_row(int head, int set, int row) const {
        return table + ((int64_t)head * (sets - 1) + set - 1) * set_size() + in_set(row);
    }
    Real *sum_row(int head, int set, int row) const {
        return sum + ((int64_t)head * sets + set) * set_size() + in_set(row);
    }
};

static void lay_out_bias(BiasTables &b, Arena &arena, const Problem &p, int heads, int sets, bool gradient) {
    constexpr int64_t most = 192 * 1024;
    b.present = p.bias != nullptr;
    if (!b.present) return;
    b.rows = p.bias_rows(), b.rows_y = 2 * p.axis[1].kernel - 1, b.columns = p.bias_columns(),
    b.kernel = p.axis[2].kernel, b.sets = sets;
    b.compact = arena.take<Real>((int64_t)heads * b.rows * b.columns + lanes);
    const int64_t size = heads * b.set_size();
    b.expanded = size * (sets - 1 + (gradient ? sets : 0)) * (int64_t)sizeof(Real) <= most;
    b.table = b.expanded ? arena.take<Real>(size * (sets - 1)) : nullptr;
    b.sum = b.expanded && gradient ? arena.take<Real>(size * sets) : nullptr;
}

// Fills the tables for heads [head_begin, head_begin + heads), in the units of the scores.
static void fill_bias(BiasTables &b, const Problem &p, int head_begin, int heads, const ColumnTile *tiles,
                      int n_tiles) {
    if (!b.present) return;
    const int64_t size = (int64_t)b.rows * b.columns;
    const Real *src = (const Real *)p.bias + head_begin * size;
    for (int64_t i = 0; i < heads * size; i++) b.compact[i] = src[i] * score_unit(p);
    if (!b.expanded) return;
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < n_tiles; i++) {
            const ColumnTile &t = tiles[i];
            if (!t.bias_set) continue;
            for (int row = 0; row < b.rows; row++) {
                const Real *from = b.compact_row(h, row);
                Real *to = b.table_row(h, t.bias_set, row);
                for (int j = 0; j < b.kernel; j++)
                    for (int l = 0; l < lanes; l++) {
                        const int column =
                            t.lane_column[l] + j; // outside the table only where the lane has no such key
                        to[(int64_t)j * b.rows_y * lanes + l] = column < b.columns ? from[column] : Real(0);
                    }
            }
        }
    if (b.sum) memset(b.sum, 0, heads * b.sets * b.set_size() * sizeof(Real));
}

// Bias of a tile without a table, gathered into the scores themselves, where the score kernel then starts from.
static void gather_bias(const BiasTables &b, int head, int row, const ColumnTile &t, Real *scores, int64_t step) {
    const Real *from = b.compact_row(head, row);
    for (int j = 0; j < b.kernel; j++)
        for (int l = 0; l < lanes; l++) {
            const int column = t.lane_column[l] + j;
            scores[j * step + l] = column < b.columns ? from[column] : Real(0);
        }
}

// Adds a tile's score gradients of one key row to d_bias row `to`.
static void scatter_bias(const ColumnTile &t, const Real *d_scores, int64_t step, int kernel, Real *to) {
    for (int j = 0; j < kernel; j++)
        for (int i = 0; i < t.n; i++) {
            const int l = t.lane[i];
            if (j < t.count[l]) to[t.lane_column[l] + j] += d_scores[j * step + l];
        }
}

// Folds the expanded sums into d_bias [heads][rows][columns].
static void fold_bias(const BiasTables &b, int heads, const ColumnTile *tiles, int n_tiles, Real *d_bias) {
    int common = -1; // bias column of set 0; its idle lanes hold zeros
    for (int i = 0; i < n_tiles; i++)
        if (!tiles[i].bias_set) common = tiles[i].lane_column[0];
    for (int h = 0; h < heads; h++)
        for (int row = 0; row < b.rows; row++) {
            Real *to = d_bias + ((int64_t)h * b.rows + row) * b.columns;
            for (int i = 0; i < n_tiles; i++)
                if (tiles[i].bias_set)
                    scatter_bias(tiles[i], b.sum_row(h, tiles[i].bias_set, row), b.rows_y * lanes, b.kernel, to);
            if (common < 0) continue;
            const Real *from = b.sum_row(h, 0, row);
            for (int j = 0; j < b.kernel; j++)
                for (int l = 0; l < lanes; l++) to[common + j] += from[(int64_t)j * b.rows_y * lanes + l];
        }
}

} // namespace nbhd::NBHD_ISA
