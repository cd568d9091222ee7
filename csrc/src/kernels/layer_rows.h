// What linear layers read and write: rows of the call's dtype, and floats.
#pragma once
#include "layer_norm.h"
#include "product.h"

namespace nbhd::NBHD_ISA {

static int64_t widest_last(const LinearLayers &l) {
    int64_t n = 0;
    for (int p = 0; p < l.n_last; p++)
        if (l.last[p].out > n) n = l.last[p].out;
    return n;
}

// The call's rows from one of them on.
template <class T>
NBHD_INLINE RowsOf<T> rows_of(Elements e, int64_t row) {
    return RowsOf<T>{(const T *)e.data, e.stride}.from(row);
}

// The block's inputs as the tiles want them.
template <class T>
static Rows inputs(const LinearLayers &l, int64_t row, int64_t rows, bool keeps_moments, float *room) {
    const RowsOf<T> as_they_lie = rows_of<T>(l.input, row);
    const int64_t stride = padded(l.in);
    Rows x{room, stride};
    if constexpr (is_float<T>) {
        if (!l.norm.is_there) return apart(as_they_lie, rows, l.in, room);
        x = as_they_lie;
    } else {
        widen(as_they_lie, rows, l.in, room, stride);
        if (!l.norm.is_there) return x;
    }
    float *moments = keeps_moments && l.moments ? l.moments + 2 * row : nullptr;
    normalise(x, l.norm, l.epsilon, rows, l.in, moments, room, stride);
    return {room, stride};
}

// Where the sums of last layers are made: in the output, or in memory of the task and written from there.
template <class T>
struct LastSums {
    const LinearLayers *l;
    int64_t row, rows;
    Output room;

    Output of(int p) const {
        const Elements &output = l->output[p];
        if constexpr (is_float<T>) return {(T *)output.data + row * output.stride, output.stride};
        else return room;
    }
    Finish finish(int p) const {
        Finish f{l->last[p].bias, l->scale, {}, l->gelu, {}, {}};
        if constexpr (is_float<T>) f.residual = rows_of<T>(l->residual, row);
        return f;
    }
    // Columns [begin, end) are complete.
    void write(int p, int64_t begin, int64_t end) const {
        if constexpr (!is_float<T>) {
            const Elements &output = l->output[p];
            RowsOf<T> residual = rows_of<T>(l->residual, row);
            if (residual.data) residual.data += begin;
            narrow(Rows{room.data + begin, room.stride}, residual, rows, end - begin,
                   (T *)output.data + row * output.stride + begin, output.stride);
        }
    }
};

} // namespace nbhd::NBHD_ISA
