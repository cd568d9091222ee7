// A checked call of linear layers: what their kernels may rely on. Plain data, as in problem.h.
#pragma once
#include "problem.h"

namespace nbhd {

// Outputs that lie together in a packed weight: [panel][input][panel_columns].
constexpr int64_t panel_columns = 32;

struct Weight {
    int64_t out;
    const float *panels, *bias; // bias: or null

    int64_t n_panels() const { return (out + panel_columns - 1) / panel_columns; }
};

// Matrices of rows; columns are contiguous.
struct Rows {
    const float *data;
    int64_t stride;
};

// output = residual + scale * last(gelu(hidden(norm(input)))), with the parts that a call has.
struct LinearLayers {
    int64_t rows, in;
    Rows input;
    bool normalises;
    const float *norm_weight, *norm_bias; // or null
    float epsilon;
    Weight hidden; // without outputs: there is none
    Weight last;
    bool gelu;          // after the last layer
    const float *scale; // or null
    Rows residual;      // without data: none
    float *output;
    int64_t output_stride;
};

// Returns false when memory ran out.
using LinearKernel = bool (*)(const LinearLayers &, const Threads &);

} // namespace nbhd
