// The C interface of the linear layers: check a call, put it into the kernels' terms, run it.
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../include/nbhd.h"
#include "call_size.h"
#include "dispatch.h"

namespace nbhd {
namespace {

static_assert(NBHD_PANEL == panel_columns);
constexpr int64_t most_columns = int64_t(1) << 24, most_numbers = int64_t(1) << 48;

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

bool is_aligned_or_null(const void *p, Dtype dtype) {
    return reinterpret_cast<uintptr_t>(p) % uintptr_t(size_of(dtype)) == 0;
}
bool is_aligned(const void *p, Dtype dtype) { return p && is_aligned_or_null(p, dtype); }
bool is_aligned_or_null(const float *p) { return is_aligned_or_null(p, Dtype::float32); }
bool is_aligned(const float *p) { return is_aligned(p, Dtype::float32); }

// Whether rows of that many columns can lie there: they do not overlap, and the last ends inside an address space.
bool rows_fit(int64_t rows, int64_t columns, int64_t stride) {
    return stride >= columns && stride <= most_numbers / (rows > 0 ? rows : 1);
}

// A number as a float, which all of them are.
float number(const void *from, int64_t i, Dtype dtype) {
    if (dtype == Dtype::float32) return static_cast<const float *>(from)[i];
    const uint32_t half = static_cast<const uint16_t *>(from)[i], sign = (half & 0x8000) << 16;
    uint32_t bits = half << 16;
    if (dtype == Dtype::float16) {
        const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
        // None of it is below the smallest normal float, which a thread may have told the processor to take for nothing.
        if (!exponent) return (sign ? -1.f : 1.f) * float(mantissa) * 0x1p-24f;
        bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
    }
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The nearest bfloat16, of two the even one.
float rounded_to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x == x) bits += (bits >> 16 & 1) + 0x7fff;
    bits &= 0xffff0000;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// What layers multiply, and where the weight of output o and input k is among panels of it.
struct Products {
    Dtype dtype; // float32 or bfloat16

    float of(float x) const { return dtype == Dtype::bfloat16 ? rounded_to_bfloat16(x) : x; }
    int64_t place(int64_t in, int64_t o, int64_t k) const {
        const int64_t panel = o / panel_columns, column = o % panel_columns;
        if (dtype == Dtype::float32) return (panel * in + k) * panel_columns + column;
        return ((panel * ((in + 1) / 2) + k / 2) * panel_columns + column) * 2 + k % 2;
    }
};

// `source` is still what `panels` was made of, as far as a few dozen numbers tell, spread over rows and columns.
bool is_of_source(const nbhd_weight &w, int64_t in, Dtype dtype, Products products) {
    if (!w.source) return true;
    constexpr int64_t samples = 64;
    const int64_t n = w.out * in, step = n <= samples ? 1 : n / samples | 1; // odd: it does not stay in one column
    for (int64_t i = 0; i < n; i += step) {
        const int64_t o = i / in, k = i % in;
        const float packed = number(w.panels, products.place(in, o, k), products.dtype),
                    now = products.of(number(w.source, i, dtype));
        if (std::memcmp(&packed, &now, sizeof now) && (packed == packed || now == now)) return false;
    }
    return true;
}

int32_t check_weight(const nbhd_weight &w, int64_t in, Dtype dtype, Products products) {
    if (w.out < 0 || w.out > most_columns || !rows_fit(w.out, in, in)) return NBHD_BAD_SHAPE;
    if (!w.out) return NBHD_OK;
    if (!is_aligned_or_null(w.panels, Dtype::float32) || !is_aligned_or_null(w.source, dtype) ||
        !is_aligned_or_null(w.bias, dtype) || (!w.panels && !w.source))
        return NBHD_BAD_POINTER;
    return !w.panels || is_of_source(w, in, dtype, products) ? NBHD_OK : NBHD_STALE_WEIGHT;
}

// What both calls have: the weights, and the sizes of what is between them.
template <class Call>
int32_t check_layers(const Call &c, Dtype dtype, Products products, int &n_last) {
    if (c.norm < 0 || c.norm > 1) return NBHD_UNSUPPORTED;
    if (c.rows < 0 || c.rows > most_numbers || c.in < 1 || c.in > most_columns || c.last[0].out < 1)
        return NBHD_BAD_SHAPE;
    if (const int32_t status = check_weight(c.hidden, c.in, dtype, products)) return status;
    const int64_t of_last = c.hidden.out ? c.hidden.out : c.in;
    if (!rows_fit(c.rows, c.hidden.out, c.hidden.out)) return NBHD_BAD_SHAPE;
    n_last = 0;
    for (int i = 0; i < NBHD_LAYERS; i++) {
        if (const int32_t status = check_weight(c.last[i], of_last, dtype, products)) return status;
        if (!c.last[i].out) continue;
        if (n_last++ < i) return NBHD_BAD_SHAPE; // one without outputs is before it
    }
    if (n_last > 1 && c.hidden.out) return NBHD_UNSUPPORTED;
    return is_aligned_or_null(c.norm_weight, dtype) && is_aligned_or_null(c.norm_bias, dtype) ? NBHD_OK
                                                                                              : NBHD_BAD_POINTER;
}

// The few numbers of a call that are one for each column, as floats.
class Vectors {
  public:
    explicit Vectors(Dtype dtype) : dtype(dtype) {}
    ~Vectors() {
        for (int i = 0; i < made; i++) release(memory[i]);
    }
    Vectors(const Vectors &) = delete;
    Vectors &operator=(const Vectors &) = delete;

    bool failed = false; // out of memory

    const float *of(const void *vector, int64_t n) {
        if (!vector || dtype == Dtype::float32) return static_cast<const float *>(vector);
        float *const to = static_cast<float *>(allocate(n * int64_t(sizeof(float))));
        if (!to) return failed = true, nullptr;
        memory[made++] = to;
        for (int64_t i = 0; i < n; i++) to[i] = number(vector, i, dtype);
        return to;
    }
    Weight weight(const nbhd_weight &w) {
        return {w.out, static_cast<const float *>(w.panels), w.source, of(w.bias, w.out)};
    }

  private:
    Dtype dtype;
    float *memory[NBHD_LAYERS + 3];
    int made = 0;
};

// Those of this machine that make products of it, if it has any.
const LinearKernels *kernels_of(int64_t product_dtype) {
    const InstructionSet *set = instruction_set();
    return !set ? nullptr : product_dtype == NBHD_BFLOAT16 ? set->linear_of_pairs : set->linear;
}

Elements elements(const void *data, int64_t stride) { return {const_cast<void *>(data), stride}; }

Threads threads_of(nbhd_parallel_for parallel_for, int64_t threads) {
    return {reinterpret_cast<void *>(parallel_for), threads < 1 ? 1 : threads > 1024 ? 1024 : threads};
}

int32_t run(const nbhd_linear_call *call) {
    if (const int32_t status = check_size(call, sizeof(nbhd_linear_call))) return status;
    const nbhd_linear_call &c = *call;
    int n_last;
    for (int64_t d : {c.dtype, c.parameter_dtype})
        if (d < NBHD_FLOAT32 || d > NBHD_FLOAT16) return NBHD_BAD_DTYPE;
    if (c.product_dtype != NBHD_FLOAT32 && c.product_dtype != NBHD_BFLOAT16) return NBHD_BAD_DTYPE;
    const LinearKernels *kernels = kernels_of(c.product_dtype);
    if (!kernels) return NBHD_UNSUPPORTED;
    const Products products{static_cast<Dtype>(c.product_dtype)};
    const Dtype dtype = static_cast<Dtype>(c.dtype), parameter_dtype = static_cast<Dtype>(c.parameter_dtype);
    if (c.gelu < 0 || c.gelu > 1) return NBHD_UNSUPPORTED;
    if (c.norm && !(c.norm_epsilon >= 0 && c.norm_epsilon - c.norm_epsilon == 0)) return NBHD_BAD_SHAPE;
    if (const int32_t status = check_layers(c, parameter_dtype, products, n_last)) return status;
    if (n_last > 1 && (c.gelu || c.scale || c.residual)) return NBHD_UNSUPPORTED;
    if (!rows_fit(c.rows, c.in, c.input_stride) || (c.residual && !rows_fit(c.rows, c.last[0].out, c.residual_stride)))
        return NBHD_BAD_SHAPE;
    for (int i = 0; i < n_last; i++)
        if (!rows_fit(c.rows, c.last[i].out, c.output_stride[i])) return NBHD_BAD_SHAPE;
    if (!is_aligned_or_null(c.scale) || !is_aligned_or_null(c.residual, dtype) || !is_aligned_or_null(c.moments) ||
        !is_aligned_or_null(c.sums))
        return NBHD_BAD_POINTER;
    for (int i = 0; i < n_last; i++)
        if (c.rows && (!is_aligned(c.input, dtype) || !is_aligned(c.output[i], dtype))) return NBHD_BAD_POINTER;
    if (!c.rows) return NBHD_OK;
    Vectors vectors(parameter_dtype);
    LinearLayers l{};
    l.dtype = dtype, l.parameter_dtype = parameter_dtype, l.rows = c.rows, l.in = c.in,
    l.input = elements(c.input, c.input_stride);
    l.norm = {c.norm == 1, vectors.of(c.norm_weight, c.in), vectors.of(c.norm_bias, c.in)};
    l.epsilon = float(c.norm_epsilon);
    l.hidden = vectors.weight(c.hidden), l.n_last = n_last;
    l.gelu = c.gelu == 1, l.scale = c.scale;
    l.residual = elements(c.residual, c.residual_stride);
    l.moments = c.moments, l.sums = c.sums;
    for (int i = 0; i < n_last; i++) l.last[i] = vectors.weight(c.last[i]);
    if (vectors.failed) return NBHD_OUT_OF_MEMORY;
    for (int i = 0; i < n_last; i++) {
        const int64_t out = c.last[i].out;
        l.output[i] = {c.output[i], c.output_stride[i]};
        if (c.output_stride[i] == out) will_fill(c.output[i], c.rows * out * size_of(dtype));
    }
    if (c.sums) will_fill(c.sums, c.rows * c.hidden.out * int64_t(sizeof(float)));
    return kernels->layers(l, threads_of(c.parallel_for, c.threads)) ? NBHD_OK : NBHD_OUT_OF_MEMORY;
}

int32_t run(const nbhd_linear_gradients_call *call) {
    if (const int32_t status = check_size(call, sizeof(nbhd_linear_gradients_call))) return status;
    const nbhd_linear_gradients_call &c = *call;
    int n_last;
    if (c.dtype < NBHD_FLOAT32 || c.dtype > NBHD_FLOAT16) return NBHD_BAD_DTYPE;
    if (c.product_dtype != NBHD_FLOAT32 && c.product_dtype != NBHD_BFLOAT16) return NBHD_BAD_DTYPE;
    const Dtype dtype = static_cast<Dtype>(c.dtype);
    const LinearKernels *kernels = kernels_of(c.product_dtype);
    if (!kernels) return NBHD_UNSUPPORTED;
    const Products products{static_cast<Dtype>(c.product_dtype)};
    if (const int32_t status = check_layers(c, Dtype::float32, products, n_last)) return status;
    const float factor = float(c.factor);
    if (factor - factor != 0) return NBHD_UNSUPPORTED; // not a number, or none of a float's
    if (!rows_fit(c.rows, c.in, c.in)) return NBHD_BAD_SHAPE;
    const auto lacks_source = [](const nbhd_weight &w) { return w.out && !w.source; };
    if (lacks_source(c.hidden) || !is_aligned(c.input, dtype) || (c.norm && !is_aligned(c.moments)) ||
        (c.hidden.out && !is_aligned(c.sums)))
        return NBHD_BAD_POINTER;
    if (!is_aligned_or_null(c.added, dtype) || !is_aligned_or_null(c.d_input, dtype)) return NBHD_BAD_POINTER;
    for (const float *p : {c.d_norm_weight, c.d_norm_bias, c.d_hidden_weight, c.d_hidden_bias})
        if (!is_aligned_or_null(p)) return NBHD_BAD_POINTER;
    for (int i = 0; i < n_last; i++) {
        if (!rows_fit(c.rows, c.last[i].out, c.last[i].out)) return NBHD_BAD_SHAPE;
        if (lacks_source(c.last[i]) || !is_aligned(c.d_output[i], dtype) || !is_aligned_or_null(c.d_weight[i]) ||
            !is_aligned_or_null(c.d_bias[i]))
            return NBHD_BAD_POINTER;
    }
    if (!c.rows) return NBHD_BAD_SHAPE; // sums over nothing are the caller's
    LinearGradients g{};
    g.dtype = dtype, g.rows = c.rows, g.in = c.in, g.input = c.input;
    Vectors vectors(Dtype::float32); // nothing to make
    g.norm = {c.norm == 1, c.norm_weight, c.norm_bias};
    g.hidden = vectors.weight(c.hidden), g.n_last = n_last, g.factor = factor;
    g.moments = c.moments, g.sums = c.sums, g.added = c.added, g.d_input = c.d_input;
    g.d_norm_weight = c.d_norm_weight, g.d_norm_bias = c.d_norm_bias;
    g.d_hidden_weight = c.d_hidden_weight, g.d_hidden_bias = c.d_hidden_bias;
    for (int i = 0; i < n_last; i++) {
        g.last[i] = vectors.weight(c.last[i]), g.d_output[i] = c.d_output[i];
        g.d_weight[i] = c.d_weight[i], g.d_bias[i] = c.d_bias[i];
    }
    if (c.d_input) will_fill(c.d_input, c.rows * c.in * size_of(dtype));
    return kernels->gradients(g, threads_of(c.parallel_for, c.threads)) ? NBHD_OK : NBHD_OUT_OF_MEMORY;
}

} // namespace
} // namespace nbhd

extern "C" int32_t nbhd_linear(const nbhd_linear_call *call) { return nbhd::run(call); }
extern "C" int32_t nbhd_linear_gradients(const nbhd_linear_gradients_call *call) { return nbhd::run(call); }
