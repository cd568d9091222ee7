// The C interface of the linear layers: check a call, put it into the kernels' terms, run it.
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "../include/nbhd.h"
#include "call_size.h"
#include "dispatch.h"

namespace nbhd {
namespace {

static_assert(NBHD_PANEL == panel_columns);
constexpr int64_t most_columns = int64_t(1) << 24, most_numbers = int64_t(1) << 48;

bool is_aligned(const void *p) { return p && reinterpret_cast<uintptr_t>(p) % sizeof(float) == 0; }
bool is_aligned_or_null(const void *p) { return !p || is_aligned(p); }

// Whether rows of that many columns can lie there: they do not overlap, and the last ends inside an address space.
bool rows_fit(int64_t rows, int64_t columns, int64_t stride) {
    return stride >= columns && stride <= most_numbers / (rows > 0 ? rows : 1);
}

// `source` is still what `panels` was made of, as far as a few dozen numbers tell, spread over rows and columns.
bool is_of_source(const nbhd_weight &w, int64_t in) {
    if (!w.source) return true;
    constexpr int64_t samples = 64;
    const int64_t n = w.out * in, step = n <= samples ? 1 : n / samples | 1; // odd: it does not stay in one column
    for (int64_t i = 0; i < n; i += step) {
        const int64_t o = i / in, k = i % in;
        const float *packed = w.panels + (o / panel_columns * in + k) * panel_columns + o % panel_columns;
        if (std::memcmp(packed, w.source + i, sizeof(float))) return false; // by its bits: NaN is NaN
    }
    return true;
}

int32_t check_weight(const nbhd_weight &w, int64_t in) {
    if (w.out < 0 || w.out > most_columns) return NBHD_BAD_SHAPE;
    if (!w.out) return NBHD_OK;
    if (!is_aligned(w.panels) || !is_aligned_or_null(w.source) || !is_aligned_or_null(w.bias)) return NBHD_BAD_POINTER;
    return is_of_source(w, in) ? NBHD_OK : NBHD_STALE_WEIGHT;
}

int32_t run(const nbhd_linear_call *call) {
    if (const int32_t status = check_size(call, sizeof(nbhd_linear_call))) return status;
    const nbhd_linear_call &c = *call;
    if (c.norm < 0 || c.norm > 1 || c.gelu < 0 || c.gelu > 1) return NBHD_UNSUPPORTED;
    if (c.rows < 0 || c.rows > most_numbers || c.in < 1 || c.in > most_columns || c.last.out < 1) return NBHD_BAD_SHAPE;
    if (c.norm && !(c.norm_epsilon >= 0 && c.norm_epsilon - c.norm_epsilon == 0)) return NBHD_BAD_SHAPE;
    const int64_t of_last = c.hidden.out > 0 ? c.hidden.out : c.in;
    for (const auto &[weight, in] : {std::pair{&c.hidden, c.in}, std::pair{&c.last, of_last}})
        if (const int32_t status = check_weight(*weight, in)) return status;
    if (!rows_fit(c.rows, c.in, c.input_stride) || !rows_fit(c.rows, c.last.out, c.output_stride) ||
        (c.residual && !rows_fit(c.rows, c.last.out, c.residual_stride)) ||
        (c.hidden.out && !rows_fit(c.rows, c.hidden.out, c.hidden.out)))
        return NBHD_BAD_SHAPE;
    if (!is_aligned_or_null(c.norm_weight) || !is_aligned_or_null(c.norm_bias) || !is_aligned_or_null(c.scale) ||
        !is_aligned_or_null(c.residual))
        return NBHD_BAD_POINTER;
    if (c.rows && (!is_aligned(c.input) || !is_aligned(c.output))) return NBHD_BAD_POINTER;
    const InstructionSet *set = instruction_set();
    if (!set) return NBHD_UNSUPPORTED;
    if (!c.rows) return NBHD_OK;
    LinearLayers l{};
    l.rows = c.rows, l.in = c.in, l.input = {c.input, c.input_stride};
    l.normalises = c.norm == 1, l.norm_weight = c.norm_weight, l.norm_bias = c.norm_bias;
    l.epsilon = float(c.norm_epsilon);
    l.hidden = {c.hidden.out, c.hidden.panels, c.hidden.bias}, l.last = {c.last.out, c.last.panels, c.last.bias};
    l.gelu = c.gelu == 1, l.scale = c.scale, l.residual = {c.residual, c.residual_stride};
    l.output = c.output, l.output_stride = c.output_stride;
    if (c.output_stride == c.last.out) will_fill(c.output, c.rows * c.last.out * int64_t(sizeof(float)));
    const Threads threads{reinterpret_cast<void *>(c.parallel_for), c.threads < 1      ? 1
                                                                    : c.threads > 1024 ? 1024
                                                                                       : c.threads};
    return (*set->linear)(l, threads) ? NBHD_OK : NBHD_OUT_OF_MEMORY;
}

} // namespace
} // namespace nbhd

extern "C" int32_t nbhd_linear(const nbhd_linear_call *call) { return nbhd::run(call); }
