// Checked calls of linear layers: what their kernels may rely on. Plain data, as in problem.h.
#pragma once
#include "problem.h"

namespace nbhd {

// Outputs that lie together in a packed weight: [panel][input][panel_columns].
constexpr int64_t panel_columns = 32;
constexpr int most_layers = 3; // of the same input

struct Weight {
    int64_t out;
    const float *panels; // of words (rows.h); or null: source is to be packed
    const void *source;  // of the call's parameter_dtype
    const float *bias;   // or null

    int64_t n_panels() const { return (out + panel_columns - 1) / panel_columns; }
};

// Matrices of rows; columns are contiguous.
template <class T>
struct RowsOf {
    const T *data;
    int64_t stride;

    RowsOf from(int64_t row) const { return {data ? data + row * stride : nullptr, stride}; }
};
using Rows = RowsOf<float>;
template <class T>
struct OutputOf {
    T *data;
    int64_t stride;
};
using Output = OutputOf<float>;
struct Elements { // of the call's dtype
    void *data;
    int64_t stride;
};

struct Norm {
    bool is_there;
    const float *weight, *bias; // or null
};

// output = residual + scale * last(gelu(hidden(norm(input)))), with the parts that a call has.
struct LinearLayers {
    Dtype dtype, parameter_dtype; // not float64
    int64_t rows, in;
    Elements input;
    Norm norm;
    float epsilon;
    Weight hidden; // without outputs: there is none
    Weight last[most_layers];
    int n_last;
    bool gelu;          // after the last layer
    const float *scale; // or null
    Elements residual;  // without data: none
    Elements output[most_layers];
    float *moments, *sums; // or null: nobody wants them
};

// Gradients of output = factor * last(gelu(hidden(norm(input)))). Those that are null are not wanted.
struct LinearGradients {
    Dtype dtype; // not float64
    int64_t rows, in;
    const void *input; // of dtype; so are d_output, added and d_input
    Norm norm;
    Weight hidden;
    Weight last[most_layers];
    int n_last;
    const float *moments, *sums;
    float factor;
    const void *d_output[most_layers];
    const void *added; // to d_input; or null
    void *d_input;
    float *d_norm_weight, *d_norm_bias, *d_hidden_weight, *d_hidden_bias;
    float *d_weight[most_layers], *d_bias[most_layers];
};

// They return false when memory ran out.
struct LinearKernels {
    bool (*layers)(const LinearLayers &, const Threads &);
    bool (*gradients)(const LinearGradients &, const Threads &);
};

} // namespace nbhd
