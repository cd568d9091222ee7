// The C interface: check a call, put it into the kernels' terms, run it.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "../include/nbhd.h"
#include "call_size.h"
#include "dispatch.h"

namespace nbhd {
namespace {

constexpr int64_t most = int64_t(1) << 30;        // of any one length; products are checked on their own
constexpr int64_t most_window = int64_t(1) << 26; // slots of a window: a row of scores has to fit memory

// Interval tables in places of the dilation groups, all axes.
struct Tables {
    std::vector<int32_t> first[3], count[3];
};

bool to_places(const nbhd_call &c, int a, Tables &tables) {
    const int64_t length = c.length[a], d = c.dilation[a], kernel = c.kernel_size[a];
    const int64_t *first = c.first[a], *count = c.count[a];
    tables.first[a].resize(size_t(length)), tables.count[a].resize(size_t(length));
    int32_t *to_first = tables.first[a].data(), *to_count = tables.count[a].data();
    for (int64_t g = 0; g < d; g++) {
        int64_t covered = 0, begin = 0, places = (length - g + d - 1) / d;
        for (int64_t x = g; x < length; x += d) {
            const int64_t f = first[x], n = count[x];
            if (f < g || f >= length || (f - g) % d || n < 1 || n > kernel) return false;
            const int64_t p = (f - g) / d;
            // never down along the axis, and no key that nobody sees
            if (p < begin || p > covered || p + n < covered || p + n > places) return false;
            begin = p, covered = p + n;
            *to_first++ = int32_t(p), *to_count++ = int32_t(n);
        }
        if (covered != places) return false;
    }
    return true;
}

// How many keys come before the query in windows that are only moved to stay inside the axis; -1 where some lie otherwise.
int keys_before(const nbhd_call &c, int a, const Tables &tables) {
    const int64_t length = c.length[a], d = c.dilation[a], kernel = c.kernel_size[a];
    for (int64_t before : {kernel / 2, (kernel - 1) / 2}) {
        bool all = true;
        size_t i = 0;
        for (int64_t g = 0; g < d && all; g++) {
            const int64_t places = (length - g + d - 1) / d;
            for (int64_t u = 0; u < places && all; u++, i++) {
                const int64_t last = places - kernel, start = u - before < 0      ? 0
                                                              : u - before > last ? last
                                                                                  : u - before;
                all = tables.first[a][i] == start && tables.count[a][i] == kernel;
            }
        }
        if (all) return int(before);
    }
    return -1;
}

// Every index into the bias table is inside it.
bool bias_fits(const nbhd_call &c, int a, const Tables &tables) {
    const int64_t length = c.length[a], d = c.dilation[a], kernel = c.kernel_size[a];
    size_t i = 0;
    for (int64_t g = 0; g < d; g++)
        for (int64_t u = 0; g + u * d < length; u++, i++) {
            const int64_t low = tables.first[a][i] - u + kernel - 1, high = low + tables.count[a][i] - 1;
            if (low < 0 || high > 2 * kernel - 2) return false;
        }
    return true;
}

bool product_fits(std::initializer_list<int64_t> factors, int64_t limit) {
    int64_t n = 1;
    for (int64_t f : factors) {
        if (f < 1 || n > limit / f) return false;
        n *= f;
    }
    return true;
}

int32_t check_shape(const nbhd_call &c) {
    if (c.batch < 0 || c.batch > most) return NBHD_BAD_SHAPE;
    for (int64_t n : {c.heads, c.kv_heads, c.dim, c.dim_v})
        if (n < 1 || n > (1 << 20)) return NBHD_BAD_SHAPE;
    if (c.heads % c.kv_heads) return NBHD_BAD_SHAPE;
    for (int a = 0; a < 3; a++) {
        if (c.length[a] < 1 || c.length[a] > most || c.kernel_size[a] < 1 || c.dilation[a] < 1) return NBHD_BAD_SHAPE;
        if (c.kernel_size[a] > c.length[a] || c.dilation[a] > c.length[a] / c.kernel_size[a]) return NBHD_BAD_GEOMETRY;
        if (!c.first[a] || !c.count[a]) return NBHD_BAD_POINTER;
    }
    const int64_t d = c.dim > c.dim_v ? c.dim : c.dim_v;
    if (!product_fits({c.batch > 0 ? c.batch : 1, c.length[0], c.length[1], c.length[2], c.heads, d}, int64_t(1) << 48))
        return NBHD_BAD_SHAPE;
    if (!product_fits({c.kernel_size[0], c.kernel_size[1], c.kernel_size[2]}, most_window)) return NBHD_BAD_SHAPE;
    if (!(c.scale == c.scale) || c.scale - c.scale != 0) return NBHD_BAD_SHAPE;
    return NBHD_OK;
}

// Times 1024.
int64_t kilo(const char *variable, long otherwise) {
    const char *text = getenv(variable);
    const long n = text ? strtol(text, nullptr, 10) : 0;
    return (n > 0 && n < 1 << 20 ? n : otherwise) * int64_t(1024);
}

// Sizes for machines with other caches, and for tests, which cut small maps into many blocks and tasks with them.
constexpr long least_cache = 512; // Zen 3; later cores have more
int64_t cache_bytes() {
    static const int64_t bytes = kilo("NBHD_CPU_CACHE_KB", least_cache);
    return bytes;
}
// Half of the second-level cache, where the system says how large that is, and no more than a megabyte: a thread keeps as much.
int64_t heads_cache_bytes() {
    static const int64_t bytes = [] {
        constexpr long most = 1024;
        long half = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        half = sysconf(_SC_LEVEL2_CACHE_SIZE) / 2 / 1024;
#endif
        return kilo("NBHD_CPU_CACHE_KB", half < least_cache ? least_cache : half < most ? half : most);
    }();
    return bytes;
}
int64_t last_cache_bytes() {
    static const int64_t bytes = kilo("NBHD_CPU_LAST_CACHE_KB", 32 * 1024); // what a Zen 3 or 4 has for eight cores
    return bytes;
}
int64_t least_work_of_cut() {
    static const int64_t products = kilo("NBHD_CPU_CUT_KILOPRODUCTS", 2048);
    return products;
}

size_t element_size(int64_t dtype) { return dtype == NBHD_FLOAT64 ? 8 : dtype == NBHD_FLOAT32 ? 4 : 2; }

bool aligned(const void *p, size_t size) { return p && reinterpret_cast<uintptr_t>(p) % size == 0; }

Tensor tensor(const nbhd_tensor &t) {
    return Tensor{t.data, t.stride[0], {t.stride[1], t.stride[2], t.stride[3]}, t.stride[4]};
}

// An output without gaps is filled to the last byte.
void announce(const Tensor &t, const nbhd_call &c, int64_t heads, int64_t dim) {
    const int64_t length[] = {heads, c.length[2], c.length[1], c.length[0], c.batch};
    const int64_t stride[] = {t.head, t.axis[2], t.axis[1], t.axis[0], t.batch};
    int64_t n = dim;
    for (int i = 0; i < 5; i++) {
        if (length[i] > 1 && stride[i] != n) return;
        n *= length[i];
    }
    if (t.data) will_fill(t.data, n * int64_t(element_size(c.dtype)));
}

// Whether the three gradients are parts of one tensor [token][part][head][channel].
bool are_parts(const Problem &p, int64_t dtype) {
    const size_t part = size_t(p.heads) * size_t(p.dim) * element_size(dtype);
    const char *query = static_cast<const char *>(p.d_query.data);
    return query && p.heads == p.kv_heads && p.dim == p.dim_v && p.d_key.data == query + part &&
           p.d_value.data == query + 2 * part;
}

struct Entry {
    Part part;
    bool backward;
};

// The tensors an entry point reads or writes, as members of the call and of the problem.
struct Use {
    nbhd_tensor nbhd_call::*of_call;
    Tensor Problem::*of_problem;
    bool (*used)(Part, bool backward);
};
const Use uses[] = {
    {&nbhd_call::query, &Problem::query, [](Part p, bool) { return p != Part::sum; }},
    {&nbhd_call::key, &Problem::key, [](Part p, bool) { return p != Part::sum; }},
    {&nbhd_call::value, &Problem::value, [](Part p, bool) { return p != Part::scores; }},
    {&nbhd_call::out, &Problem::out, [](Part p, bool b) { return p != Part::scores && !b; }},
    {&nbhd_call::d_out, &Problem::d_out, [](Part p, bool b) { return p != Part::scores && b; }},
    {&nbhd_call::d_query, &Problem::d_query, [](Part p, bool b) { return p != Part::sum && b; }},
    {&nbhd_call::d_key, &Problem::d_key, [](Part p, bool b) { return p != Part::sum && b; }},
    {&nbhd_call::d_value, &Problem::d_value, [](Part p, bool b) { return p != Part::scores && b; }},
    {&nbhd_call::weights, &Problem::weights,
     [](Part p, bool b) { return p == Part::sum || (p == Part::scores && !b); }},
    {&nbhd_call::d_weights, &Problem::d_weights, [](Part p, bool b) { return p != Part::attention && b; }},
};

int32_t check_pointers(const nbhd_call &c, Entry e) {
    const size_t real = c.dtype == NBHD_FLOAT64 ? 8 : 4, element = element_size(c.dtype);
    if (c.batch > 0) {
        for (const Use &u : uses)
            if (u.used(e.part, e.backward) && !aligned((c.*u.of_call).data, element)) return NBHD_BAD_POINTER;
        if (e.part == Part::attention && (e.backward || c.lse) && !aligned(c.lse, real)) return NBHD_BAD_POINTER;
    }
    if (e.part == Part::sum) return NBHD_OK;
    if (c.rel_pos_bias && !aligned(c.rel_pos_bias, real)) return NBHD_BAD_POINTER;
    if (!e.backward) return NBHD_OK;
    if (e.part == Part::attention && c.d_lse && !aligned(c.d_lse, real)) return NBHD_BAD_POINTER;
    if (c.d_rel_pos_bias && (!c.rel_pos_bias || !aligned(c.d_rel_pos_bias, real))) return NBHD_BAD_POINTER;
    return NBHD_OK;
}

int32_t run(const nbhd_call *call, Entry e) {
    if (const int32_t status = check_size(call, sizeof(nbhd_call))) return status;
    const nbhd_call &c = *call;
    if (c.dtype < NBHD_FLOAT32 || c.dtype > NBHD_FLOAT64) return NBHD_BAD_DTYPE;
    if (const int32_t status = check_shape(c)) return status;
    if (e.part != Part::attention && !product_fits({c.batch > 0 ? c.batch : 1, c.length[0], c.length[1], c.length[2],
                                                    c.heads, c.kernel_size[0] * c.kernel_size[1] * c.kernel_size[2]},
                                                   int64_t(1) << 48))
        return NBHD_BAD_SHAPE;
    if (const int32_t status = check_pointers(c, e)) return status;

    const bool biased = c.rel_pos_bias && e.part != Part::sum;
    Tables tables;
    for (int a = 0; a < 3; a++) {
        if (!to_places(c, a, tables)) return NBHD_BAD_GEOMETRY;
        if (biased && !bias_fits(c, a, tables)) return NBHD_BAD_GEOMETRY;
    }
    Problem p{};
    p.part = e.part, p.dtype = Dtype(c.dtype), p.batch = c.batch;
    p.heads = int(c.heads), p.kv_heads = int(c.kv_heads), p.dim = int(c.dim), p.dim_v = int(c.dim_v);
    for (int a = 0; a < 3; a++)
        p.axis[a] = Axis{int(c.length[a]),       int(c.kernel_size[a]),  int(c.dilation[a]),
                         tables.first[a].data(), tables.count[a].data(), -1};
    // only the fused passes do not care for the order of a window's keys
    if (e.part == Part::attention) p.axis[2].before = keys_before(c, 2, tables);
    p.scale = c.scale, p.cache_bytes = cache_bytes(), p.heads_cache_bytes = heads_cache_bytes();
    p.least_work_of_cut = least_work_of_cut();
    const int64_t elements =
        c.batch * c.length[0] * c.length[1] * c.length[2] * (c.heads + c.kv_heads) * (c.dim + c.dim_v);
    p.small = elements * (e.backward ? 2 : 1) * (c.dtype == NBHD_FLOAT64 ? 8 : 4) <= p.cache_bytes;
    const int64_t bytes = elements * int64_t(element_size(c.dtype));
    p.from_memory = bytes > last_cache_bytes();
    for (const Use &u : uses)
        if (u.used(e.part, e.backward)) p.*u.of_problem = tensor(c.*u.of_call);
    if (biased) p.bias = c.rel_pos_bias;
    if (e.part == Part::attention) p.lse = c.lse;
    if (e.part == Part::attention && e.backward) p.d_lse = c.d_lse;
    if (biased && e.backward) p.d_bias = c.d_rel_pos_bias;
    const InstructionSet *set = instruction_set();
    if (!set) return NBHD_UNSUPPORTED;
    if (c.batch == 0) { // no query: the bias gradient is an empty sum
        const size_t real = c.dtype == NBHD_FLOAT64 ? 8 : 4;
        if (p.d_bias) memset(p.d_bias, 0, size_t(p.heads) * size_t(p.bias_rows()) * size_t(p.bias_columns()) * real);
        return NBHD_OK;
    }
    announce(p.out, c, c.heads, c.dim_v);
    if (are_parts(p, c.dtype)) announce(p.d_query, c, 3 * c.heads, c.dim);
    announce(p.d_query, c, c.heads, c.dim); // those without data are not this call's
    announce(p.d_key, c, c.kv_heads, c.dim), announce(p.d_value, c, c.kv_heads, c.dim_v);
    const Kernels &kernels = p.dtype == Dtype::float64    ? *set->f64
                             : p.dtype == Dtype::bfloat16 ? *set->bf16
                                                          : *set->f32;
    const Threads threads{reinterpret_cast<void *>(c.parallel_for), c.threads < 1      ? 1
                                                                    : c.threads > 1024 ? 1024
                                                                                       : c.threads};
    return (e.backward ? kernels.backward : kernels.forward)(p, threads) ? NBHD_OK : NBHD_OUT_OF_MEMORY;
}

int32_t guarded(const nbhd_call *call, Part part, bool backward) noexcept {
    try {
        return run(call, Entry{part, backward});
    } catch (const std::bad_alloc &) { return NBHD_OUT_OF_MEMORY; } catch (...) {
        return NBHD_UNSUPPORTED;
    }
}

} // namespace
} // namespace nbhd

extern "C" {

int32_t nbhd_forward(const nbhd_call *call) { return nbhd::guarded(call, nbhd::Part::attention, false); }
int32_t nbhd_backward(const nbhd_call *call) { return nbhd::guarded(call, nbhd::Part::attention, true); }
int32_t nbhd_scores(const nbhd_call *call) { return nbhd::guarded(call, nbhd::Part::scores, false); }
int32_t nbhd_scores_backward(const nbhd_call *call) { return nbhd::guarded(call, nbhd::Part::scores, true); }
int32_t nbhd_weighted_sum(const nbhd_call *call) { return nbhd::guarded(call, nbhd::Part::sum, false); }
int32_t nbhd_weighted_sum_backward(const nbhd_call *call) { return nbhd::guarded(call, nbhd::Part::sum, true); }
int32_t nbhd_abi_version(void) { return NBHD_ABI_VERSION; }

const char *nbhd_isa(void) {
    const nbhd::InstructionSet *set = nbhd::instruction_set();
    return set ? set->name : "none";
}

const char *nbhd_status_text(int32_t status) {
    switch (status) {
    case NBHD_OK: return "ok";
    case NBHD_BAD_STRUCT: return "the call struct is null or of an unknown size";
    case NBHD_BAD_DTYPE: return "unknown dtype";
    case NBHD_BAD_SHAPE: return "a length, head count, channel count or the scale is out of range";
    case NBHD_BAD_GEOMETRY: return "an axis table does not describe windows inside the axis";
    case NBHD_BAD_POINTER: return "a required pointer is null or misaligned";
    case NBHD_OUT_OF_MEMORY: return "out of memory";
    case NBHD_STALE_WEIGHT: return "a packed weight is not that of its source";
    case NBHD_UNSUPPORTED: return "no kernels for this machine, or NBHD_CPU_ISA names a set it does not have";
    default: return "unknown status";
    }
}

} // extern "C"
