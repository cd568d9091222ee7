// The backward pass of a call: tasks, the order in which they add to shared keys, and the sums that follow.
#pragma once
#include "backward.h"

namespace nbhd::NBHD_ISA {

struct BackwardJob {
    const Problem *p;
    Plan plan;
    int parity;            // of the cuts that run in this pass; -1: all
    Tensor d_key, d_value; // targets
    bool real_targets;     // the targets hold Real, whatever the dtype
    Real *d_bias;          // [task][head of the task][row][column], or null
    int64_t d_bias_task;
    bool failed; // by any thread: out of memory
};

static int64_t elements(const Problem &p, int channels) {
    return p.batch * p.axis[0].length * p.axis[1].length * p.axis[2].length * p.kv_heads * channels;
}
static Tensor dense(Real *data, const Problem &p, int channels) {
    const int64_t x = (int64_t)p.kv_heads * channels, y = x * p.axis[2].length, z = y * p.axis[1].length;
    return Tensor{data, z * p.axis[0].length, {z, y, x}, channels};
}

// The cuts of one parity share no key, in any group: they may run at the same time.
static bool alternate_blocks_are_apart(const Problem &p, const Plan &plan) {
    const Axis &axis = p.axis[plan.cut_axis];
    for (int g = 0; g < axis.dilation; g++) {
        const GroupAxis a = group_axis(axis, g);
        for (int64_t i = 0; i + 2 < plan.cuts; i++) {
            const int64_t end = a.length * (i + 1) / plan.cuts, next = a.length * (i + 2) / plan.cuts;
            if (end < 1 || a.end(int(end) - 1) > a.first[next]) return false;
        }
    }
    return true;
}

template <class T, class G>
static void backward_blocks(BackwardJob &job, const Task &task, Real *d_bias) {
    const Problem &p = *job.p;
    const int group = p.queries_per_kv_head(), heads = (task.head_end - task.head_begin) * group;
    for (int64_t n = task.map_begin; n < task.map_end;) {
        const Map m = map_of(p, n);
        const int64_t maps = maps_alike(p, n, task.map_end);
        for_each_block(job.plan, m, task.cut, [&](const Block &b) {
            BackwardBuffers f{};
            Arena arena;
            lay_out(f, arena, p, m, b, task);
            void *memory = thread_scratch(arena.used);
            if (!memory) {
                __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
                return;
            }
            arena = Arena{(char *)memory};
            lay_out(f, arena, p, m, b, task);
            fill_bias(f.bias, p, task.head_begin * group, heads, f.columns, f.tiles.n);
            clear(f.keys), clear(f.values);
            if (f.slot_order) fill_slot_order(p, f.slot_order);
            Map one = m;
            for (int64_t i = 0; i < maps; i++) {
                const Map next = map_of(p, i + 1 < maps ? n + i + 1 : n);
                const GradientTarget<G> target{view<G>(job.d_key, p, one), view<G>(job.d_value, p, one),
                                               job.plan.shares_keys()};
                backward_map<T, G>(p, one, i + 1 < maps ? &next : nullptr, b, task, f, target, d_bias);
                one = next;
            }
            if (d_bias && f.bias.expanded) fold_bias(f.bias, heads, f.columns, f.tiles.n, d_bias);
        });
        n += maps;
    }
}

template <class T>
static void backward_task(int64_t i, void *context) {
    BackwardJob &job = *(BackwardJob *)context;
    const Task task = task_of(job.plan, *job.p, i);
    if (job.parity >= 0 && (task.cut & 1) != job.parity) return;
    Real *d_bias = job.d_bias ? job.d_bias + i * job.d_bias_task : nullptr;
    if (job.real_targets) backward_blocks<T, Real>(job, task, d_bias);
    else backward_blocks<T, T>(job, task, d_bias);
}

// One image plane (batch, z) of dK and dV: set to zero, or taken from the Real sums.
template <class T>
static void finish_plane(int64_t i, void *context) {
    const BackwardJob &job = *(BackwardJob *)context;
    const Problem &p = *job.p;
    const int64_t b = i / p.axis[0].length, z = i % p.axis[0].length;
    for (int which = 0; which < 2; which++) {
        const Tensor &to = which ? p.d_value : p.d_key, &from = which ? job.d_value : job.d_key;
        const int channels = which ? p.dim_v : p.dim;
        if (!to.data) continue;
        for (int y = 0; y < p.axis[1].length; y++)
            for (int x = 0; x < p.axis[2].length; x++)
                for (int h = 0; h < p.kv_heads; h++) {
                    T *t = (T *)to.data + b * to.batch + z * to.axis[0] + y * to.axis[1] + x * to.axis[2] + h * to.head;
                    if (!job.real_targets) {
                        memset(t, 0, channels * sizeof(T));
                        continue;
                    }
                    const Real *s = (const Real *)from.data + b * from.batch + z * from.axis[0] + y * from.axis[1] +
                                    x * from.axis[2] + h * from.head;
                    int c = 0;
                    for (; c + lanes <= channels; c += lanes) store(t + c, load(s + c));
                    if (c < channels) store_part(t + c, load_part(s + c, channels - c), channels - c);
                }
    }
}

// d_bias[head] = sum over the tasks of that head, in their order.
static void reduce_bias(const BackwardJob &job) {
    const Problem &p = *job.p;
    const int64_t size = (int64_t)p.bias_rows() * p.bias_columns();
    Real *out = (Real *)p.d_bias;
    memset(out, 0, p.heads * size * sizeof(Real));
    const int group = p.queries_per_kv_head();
    for (int64_t i = 0; i < job.plan.tasks(); i++) {
        const Task task = task_of(job.plan, p, i);
        const Real *from = job.d_bias + i * job.d_bias_task;
        Real *to = out + task.head_begin * group * size;
        for (int64_t j = 0; j < (task.head_end - task.head_begin) * group * size; j++) to[j] += from[j];
    }
}

template <class T>
static bool backward_as(const Problem &p, const Threads &threads) {
    BackwardJob job{&p,   make_plan(p, backward_transposed, backward_rows), -1, p.d_key, p.d_value, false, nullptr, 0,
                    false};
    while (job.plan.cuts > 1 && !alternate_blocks_are_apart(p, job.plan)) job.plan.cuts--;
    if (job.plan.cuts == 2) job.plan.cuts = 1; // one after the other: nothing won
    const int64_t tasks = job.plan.tasks();
    Real *sums = nullptr;
    if (p.d_bias) {
        job.d_bias_task = (int64_t)job.plan.heads_per_task * p.queries_per_kv_head() * p.bias_rows() * p.bias_columns();
        job.d_bias = (Real *)allocate(tasks * job.d_bias_task * sizeof(Real));
        if (job.d_bias) memset(job.d_bias, 0, tasks * job.d_bias_task * sizeof(Real));
        job.failed = !job.d_bias;
    }
    if (job.plan.shares_keys() && sizeof(T) != sizeof(Real)) {
        const int64_t n = elements(p, p.dim), n_v = elements(p, p.dim_v);
        sums = (Real *)allocate((n + n_v) * sizeof(Real));
        job.failed |= !sums;
        if (sums) memset(sums, 0, (n + n_v) * sizeof(Real));
        job.d_key = dense(sums, p, p.dim), job.d_value = dense(sums + n, p, p.dim_v);
        job.real_targets = true;
    }
    if (!job.failed) {
        const int64_t planes = p.batch * p.axis[0].length;
        if (job.plan.shares_keys() && !job.real_targets) run_tasks(threads, planes, finish_plane<T>, &job);
        if (job.plan.cuts > 1) {
            for (job.parity = 0; job.parity < 2; job.parity++) run_tasks(threads, tasks, backward_task<T>, &job);
        } else {
            run_tasks(threads, tasks, backward_task<T>, &job);
        }
        if (job.real_targets) run_tasks(threads, planes, finish_plane<T>, &job);
        if (p.d_bias) reduce_bias(job);
    }
    release(sums);
    release(job.d_bias);
    return !job.failed;
}

static bool backward(const Problem &p, const Threads &threads) {
#if NBHD_DOUBLE
    return backward_as<double>(p, threads);
#elif NBHD_PAIRS
    return backward_as<BFloat16>(p, threads);
#else
    if (p.dtype == Dtype::bfloat16) return backward_as<BFloat16>(p, threads);
    if (p.dtype == Dtype::float16) return backward_as<Float16>(p, threads);
    return backward_as<float>(p, threads);
#endif
}

} // namespace nbhd::NBHD_ISA
