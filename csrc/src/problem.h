// A checked call: what the kernels may rely on. Plain data, no inline functions of the standard library, because the
// files that include this are compiled with different instruction sets (see README.md).
#pragma once
#include <cstdint>

namespace nbhd {

enum class Dtype { float32, bfloat16, float16, float64 };

// One axis, cut into `dilation` groups of positions with the same remainder; place p of group g is position
// g + p * dilation. Inside a group there is no dilation any more: the keys of place u are [first, first + count).
struct Axis {
    int length, kernel, dilation;
    const int32_t *first, *count; // [length], one group after another
    int before; // where windows are [u - before, u - before + kernel) moved into the group: that; where they are not, or it is of no use: -1

    int group_length(int g) const { return (length - g + dilation - 1) / dilation; }
    int group_start(int g) const {
        const int longer = length % dilation; // the groups below this remainder have one place more
        return g * (length / dilation) + (g < longer ? g : longer);
    }
};

struct Tensor {
    void *data;
    int64_t batch, axis[3], head; // strides in elements; channels are contiguous
};

// What a call computes: attention, or one half of it with the weights of every query in memory between the two.
enum class Part { attention, scores, sum };

struct Problem {
    Part part;
    Dtype dtype;
    int64_t batch;
    int heads, kv_heads, dim, dim_v;
    Axis axis[3]; // Z, Y, X
    double scale;
    Tensor query, key, value, out, d_out, d_query, d_key, d_value; // without data where the part has no use for them
    Tensor weights,
        d_weights; // [batch, Z, Y, X, head, slot] of the halves; the scores, where those are what is computed
    void *lse;     // or null: nobody wants it
    const void *d_lse, *bias;
    void *d_bias;
    int64_t cache_bytes;       // that packed keys of a block may take: about a second-level cache
    int64_t heads_cache_bytes; // those of several heads that a task takes side by side
    int64_t least_work_of_cut; // products that a part of a map must be worth to be a task of its own
    bool small;                // the tensors are that small as well: nothing is worth asking for ahead
    bool from_memory;          // so large that no cache holds them

    int queries_per_kv_head() const { return heads / kv_heads; }
    int window() const { return axis[0].kernel * axis[1].kernel * axis[2].kernel; }
    // rows of the bias table (Z and Y offsets) and columns (X offsets)
    int bias_rows() const { return (2 * axis[0].kernel - 1) * (2 * axis[1].kernel - 1); }
    int bias_columns() const { return 2 * axis[2].kernel - 1; }
};

// Runs task(i, context) once for each i below count, on as many threads as the call allows.
struct Threads {
    void *parallel_for; // nbhd_parallel_for of the host, or null
    int64_t count;
};
void run_tasks(const Threads &threads, int64_t count, void (*task)(int64_t, void *), void *context);

// Memory of the calling thread, at least `bytes`, kept for its next call; null when there is none.
void *thread_scratch(int64_t bytes);
// For tests: that memory is NaN each time it is asked for.
extern bool poisons_scratch;
// Memory of one call.
void *allocate(int64_t bytes);
void release(void *memory);
// Every byte of it will be written. Asks the system for huge pages wherever a whole one fits inside: in fresh memory one fault for
// 2 MB instead of 512.
void will_fill(void *data, int64_t bytes);

// The kernels of one instruction set in one arithmetic. They return false when memory ran out.
struct Kernels {
    bool (*forward)(const Problem &, const Threads &);
    bool (*backward)(const Problem &, const Threads &);
};

} // namespace nbhd
