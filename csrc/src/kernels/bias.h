// The relative position bias, as the score kernel wants it, and its gradient.
//
//      compact    [head][bias row][bias column]            sliding tiles: all lanes of offset j read one number
//      expanded   [head][set][z row][x offset][y row][lane]      other tiles: one set for each, a vector per offset
//
// With two heads in the lanes all tiles are other tiles, and tables are numbered by pair of heads.
//
// The gradient is summed in the expanded form, for all images of a task, and folded into [head][row][column] once. Where the
// expanded tables would be large (3D windows, long sequences), those gather and scatter tile by tile instead.
#pragma once
#include <limits>

#include "block.h"
#include "softmax.h"

namespace nbhd::NBHD_ISA {

struct BiasTables {
    bool present = false, expanded = false;
    int rows, rows_y, columns, kernel;
    int lane_heads, group;       // heads in the lanes; query heads of a key/value head
    int own_sets, sum_sets;      // of tiles that need their own; with the common one, number 0, if it is used
    Real *compact, *table, *sum; // sum: null in the forward

    int64_t set_size() const { return (int64_t)rows * kernel * lanes; }
    const Real *compact_row(int head, int row) const { return compact + ((int64_t)head * rows + row) * columns; }
    // Of x offset 0; the next is rows_y * lanes further, the next y row `lanes`: the order of the slots.
    int64_t in_set(int row) const { return ((int64_t)(row / rows_y) * kernel * rows_y + row % rows_y) * lanes; }
    int tables(int heads) const { return heads / lane_heads; }
    int table_of(int head) const { return head / group / lane_heads * group + head % group; }
    int head_of(int table, int lane_head) const {
        return (table / group * lane_heads + lane_head) * group + table % group;
    }
    Real *table_row(int table_number, int set, int row) const {
        return table + ((int64_t)table_number * own_sets + set - 1) * set_size() + in_set(row);
    }
    Real *sum_row(int table_number, int set, int row) const {
        return sum + ((int64_t)table_number * sum_sets + set - (own_sets == sum_sets)) * set_size() + in_set(row);
    }
};

static void lay_out_bias(BiasTables &b, Arena &arena, const Problem &p, int heads, const ColumnTiles &tiles,
                         int lane_heads, bool gradient) {
    constexpr int64_t most = 192 * 1024; // of a head: which heads a task has must not change the order of sums
    b.present = p.bias != nullptr;
    if (!b.present) return;
    b.rows = p.bias_rows(), b.rows_y = 2 * p.axis[1].kernel - 1, b.columns = p.bias_columns(),
    b.kernel = p.axis[2].kernel, b.lane_heads = lane_heads, b.group = p.queries_per_kv_head();
    b.own_sets = tiles.sets - 1, b.sum_sets = b.own_sets + tiles.common;
    b.compact = arena.take<Real>((int64_t)heads * b.rows * b.columns + lanes);
    const int64_t size = b.tables(heads) * b.set_size(), sets = b.own_sets + (gradient ? b.sum_sets : 0);
    b.expanded = sets * b.group * b.set_size() * (int64_t)sizeof(Real) <= most;
    b.table = b.expanded ? arena.take<Real>(size * b.own_sets) : nullptr;
    b.sum = b.expanded && gradient ? arena.take<Real>(size * b.sum_sets) : nullptr;
}

// One bias row of a tile, [x offset][lane], offsets `step` apart: a table, or the scores themselves where those start from it.
static void expand_bias(const BiasTables &b, int table, int row, const ColumnTile &t, Real *to, int64_t step) {
    if (b.columns <= lanes) { // one vector; past it lies the next row
        const Vec one = load(b.compact_row(b.head_of(table, 0), row)),
                  other = t.heads > 1 ? load(b.compact_row(b.head_of(table, 1), row)) : one;
        for (int j = 0; j < b.kernel; j++) {
            const Index column = t.bias_columns(j);
            store(to + j * step, t.lane_head == 1 ? permute(other, column) : permute(one, column));
        }
        return;
    }
    for (int l = 0; l < lanes; l++) {
        const Real *const from = b.compact_row(b.head_of(table, t.lane_head[l]), row);
        for (int j = 0; j < b.kernel; j++) {
            const int column = t.bias_column(l, j); // outside the table only where the lane has no such key
            to[j * step + l] = column < b.columns ? from[column] : Real(0);
        }
    }
}

// A finite bias stays finite: the most negative number is a customary way to switch a head's offset off.
static Vec in_units(Vec bias, Real unit) {
    const Vec most = splat(std::numeric_limits<Real>::max()), scaled = bias * splat(unit),
              low = scaled < -most ? -most : scaled, both = low > most ? most : low;
    return bias - bias == Vec{} ? both : scaled;
}

// Fills the tables for heads [head_begin, head_begin + heads), in the units of the scores.
static void fill_bias(BiasTables &b, const Problem &p, int head_begin, int heads, const ColumnTile *tiles,
                      int n_tiles) {
    if (!b.present) return;
    const int64_t size = (int64_t)b.rows * b.columns;
    const Real *src = (const Real *)p.bias + head_begin * size;
    const Real unit = score_unit(p);
    int64_t i = 0;
    for (; i + lanes <= heads * size; i += lanes) store(b.compact + i, in_units(load(src + i), unit));
    for (; i < heads * size; i++) b.compact[i] = in_units(splat(src[i]), unit)[0];
    if (!b.expanded) return;
    for (int table = 0; table < b.tables(heads); table++)
        for (int i = 0; i < n_tiles; i++)
            if (tiles[i].bias_set)
                for (int row = 0; row < b.rows; row++)
                    expand_bias(b, table, row, tiles[i], b.table_row(table, tiles[i].bias_set, row), b.rows_y * lanes);
    if (b.sum) memset(b.sum, 0, b.tables(heads) * b.sum_sets * b.set_size() * sizeof(Real));
}

// Adds a tile's score gradients of one key row to row `row` of d_bias [heads][rows][columns].
static void scatter_bias(const BiasTables &b, int table, int row, const ColumnTile &t, const Real *d_scores,
                         int64_t step, Real *d_bias) {
    for (int i = 0; i < t.n; i++) {
        const int l = t.lane[i];
        Real *const to = d_bias + ((int64_t)b.head_of(table, t.head[i]) * b.rows + row) * b.columns;
        const int low = t.low[l], high = t.high[l], count = t.count[l];
        const auto add = [&](int from, int end, int column) {
            const Real *d = d_scores + from * step + l;
            for (int j = from; j < end; j++, d += step) to[column + j] += *d;
        };
        add(0, low < count ? low : count, t.bias_column(l, 0)); // copies, if any
        add(low, high < count ? high : count, int(t.column[l]));
        add(high, count, int(t.column[l]) - t.wrap);
    }
}

// Folds the expanded sums into d_bias [heads][rows][columns].
static void fold_bias(const BiasTables &b, int heads, const ColumnTile *tiles, int n_tiles, Real *d_bias) {
    int common = -1; // bias column of set 0; its idle lanes hold zeros
    for (int i = 0; i < n_tiles; i++)
        if (!tiles[i].bias_set) common = tiles[i].column[0];
    for (int table = 0; table < b.tables(heads); table++)
        for (int row = 0; row < b.rows; row++) {
            for (int i = 0; i < n_tiles; i++)
                if (tiles[i].bias_set)
                    scatter_bias(b, table, row, tiles[i], b.sum_row(table, tiles[i].bias_set, row), b.rows_y * lanes,
                                 d_bias);
            if (common < 0) continue;
            const Real *from = b.sum_row(table, 0, row);
            Real *to = d_bias + ((int64_t)table * b.rows + row) * b.columns; // one head in the lanes
            for (int j = 0; j < b.kernel; j++)
                for (int l = 0; l < lanes; l++) to[common + j] += from[(int64_t)j * b.rows_y * lanes + l];
        }
}

} // namespace nbhd::NBHD_ISA
