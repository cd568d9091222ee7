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

// From one of the inputs that `inputs` makes in a room to the next: normalised ones become words where they lie.
static int64_t inputs_stride(const LinearLayers &l) { return padded(l.norm.is_there ? l.in : words(l.in)); }

// The block's inputs as the tiles want them, in words: as they lie, or in the room.
template <class T>
static Rows inputs(const LinearLayers &l, int64_t row, int64_t rows, bool keeps_moments, float *room) {
    const RowsOf<T> as_they_lie = rows_of<T>(l.input, row);
    if (!l.norm.is_there) return to_words(as_they_lie, rows, l.in, room);
    const Output made{room, inputs_stride(l)};
    Rows x{made.data, made.stride};
    if constexpr (is_float<T>) x = as_they_lie;
    else widen(as_they_lie, rows, l.in, made.data, made.stride);
    normalise(x, l.norm, l.epsilon, rows, l.in, keeps_moments && l.moments ? l.moments + 2 * row : nullptr, made.data,
              made.stride);
    become_words(made, rows, l.in);
    return {made.data, made.stride};
}

// What becomes of the sums of a hidden layer from row `row` on, on their way to `to`: words, from the weight's first output.
static Finish<Multiplied> hidden_finish(const LinearLayers &l, int64_t row, Output to) {
    const int64_t out = l.hidden.out;
    return {l.hidden.bias, nullptr, {}, true, {l.sums ? l.sums + row * out : nullptr, out}, {}, numbers(to)};
}

// Where the sums of last layers are made: in the output, or in memory of the task.
template <class T>
struct LastSums {
    const LinearLayers *l;
    int64_t row;
    Output room;

    OutputOf<T> output(int p) const {
        const Elements &output = l->output[p];
        return {(T *)output.data + row * output.stride, output.stride};
    }
    Output of(int p) const {
        if constexpr (is_float<T>) return output(p);
        else return room;
    }
    Finish<T> finish(int p) const {
        return {l->last[p].bias, l->scale, rows_of<T>(l->residual, row), l->gelu, {}, {}, output(p)};
    }
};

} // namespace nbhd::NBHD_ISA
