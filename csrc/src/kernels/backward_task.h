// The backward pass of a call: tasks, the order in which they add to shared keys, and the sums that follow.
#pragma once
#include "backward.h"

namespace nbhd::NBHD_ISA {

struct BackwardJob {
    const Problem *p;
    Plan plan;
    int parity;   // of the cuts that run in this pass; -1: all
    Real *d_bias; // [task][head of the task][row][column], or null
    int64_t d_bias_task;
    bool failed; // by any thread: out of memory
};

// The cuts of one parity share no key, in any group: they may run at the same time.
static bool alternate_blocks_are_apart(const Problem &p, const Plan &plan) {
    const Axis &axis = p.axis[plan.cut_axis];
    for (int g = 0; g < axis.dilation; g++) {
        const GroupAxis a = group_axis(axis, g);
        for (int64_t i = 0; i + 2 < plan.cuts; i++) {
            const int end = plan.cut_begin(a.length, i + 1), next = plan.cut_begin(a.length, i + 2);
            if (end < 1 || a.end(end - 1) > a.first[next]) return false;
        }
    }
    return true;
}

// Cuts of even number run first. They store whatever they see; those between them add where an even one has been. Blocks of one task
// have keys in common in ways of their own: all of them add, to gradients that are zero.
static StoredKeys stored_keys(const Plan &plan, const Map &m, int cut) {
    const GroupAxis &a = m.axis[plan.cut_axis];
    if (plan.several_blocks) return {plan.cut_axis, 0, 0};
    if (cut % 2 == 0) return {plan.cut_axis, 0, a.length};
    const int begin = plan.cut_begin(a.length, cut), end = plan.cut_begin(a.length, cut + 1);
    return {plan.cut_axis, begin > 0 ? a.end(begin - 1) : 0, end < a.length ? a.first[end] : a.length};
}

template <class T>
static void backward_blocks(BackwardJob &job, const Task &task, Real *d_bias) {
    const Problem &p = *job.p;
    const int group = p.queries_per_kv_head(), heads = (task.head_end - task.head_begin) * group;
    for (int64_t n = task.map_begin; n < task.map_end;) {
        const Map m = map_of(p, n);
        const AlikeMaps maps = alike_maps(p, job.plan, task, n);
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
            clear_rest(f.keys), clear_rest(f.values);
            if (f.slot_order) fill_slot_order(p, f.slot_order);
            Map one = m;
            for (int64_t i = 0; i < maps.n; i++) {
                const Map next = map_of(p, maps.has_next(i) ? n + i + 1 : n);
                backward_map<T>(p, one, maps.has_next(i) ? &next : nullptr, b, task, f,
                                stored_keys(job.plan, one, task.cut), d_bias);
                one = next;
            }
            if (d_bias && f.bias.expanded) fold_bias(f.bias, heads, f.columns, f.tiles.n, d_bias);
        });
        n += maps.n;
    }
}

template <class T>
static void backward_task(int64_t i, void *context) {
    BackwardJob &job = *(BackwardJob *)context;
    const Task task = task_of(job.plan, *job.p, i);
    if (job.parity >= 0 && (task.cut & 1) != job.parity) return;
    Real *d_bias = job.d_bias ? job.d_bias + i * job.d_bias_task : nullptr;
    backward_blocks<T>(job, task, d_bias);
}

// One image plane (batch, z) of dK and dV: set to zero, for blocks to add to.
template <class T>
static void clear_plane(int64_t i, void *context) {
    const Problem &p = *((const BackwardJob *)context)->p;
    const int64_t b = i / p.axis[0].length, z = i % p.axis[0].length;
    for (int which = 0; which < 2; which++) {
        const Tensor &to = which ? p.d_value : p.d_key;
        const int channels = which ? p.dim_v : p.dim;
        if (!to.data) continue;
        for (int y = 0; y < p.axis[1].length; y++)
            for (int x = 0; x < p.axis[2].length; x++)
                for (int h = 0; h < p.kv_heads; h++)
                    memset((T *)to.data + b * to.batch + z * to.axis[0] + y * to.axis[1] + x * to.axis[2] + h * to.head,
                           0, channels * sizeof(T));
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
    BackwardJob job{&p, make_plan(p, threads.count, backward_transposed, backward_rows), -1, nullptr, 0, false};
    while (job.plan.cuts > 1 && !alternate_blocks_are_apart(p, job.plan)) job.plan.cuts--;
    if (job.plan.cuts == 2) job.plan.cuts = 1; // one after the other: nothing won
    const int64_t tasks = job.plan.tasks();
    if (p.d_bias) {
        job.d_bias_task = bias_sums_of_task(p, job.plan);
        job.d_bias = (Real *)allocate(tasks * job.d_bias_task * sizeof(Real));
        if (job.d_bias) memset(job.d_bias, 0, tasks * job.d_bias_task * sizeof(Real));
        job.failed = !job.d_bias;
    }
    if (!job.failed) {
        const int64_t planes = p.batch * p.axis[0].length;
        if (job.plan.several_blocks) run_tasks(threads, planes, clear_plane<T>, &job);
        if (job.plan.cuts > 1) {
            for (job.parity = 0; job.parity < 2; job.parity++) run_tasks(threads, tasks, backward_task<T>, &job);
        } else {
            run_tasks(threads, tasks, backward_task<T>, &job);
        }
        if (p.d_bias) reduce_bias(job);
    }
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
