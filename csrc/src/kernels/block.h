// Cutting a call into tasks, and a task into blocks.
//
//      call     all images, heads and dilation groups
//      map      one dilation group of one image: undilated, independent of every other map
//      task     a range of maps x a range of key/value heads x a range of places along one axis
//      block    a task's rows and columns, small enough for its packed keys to stay in the second-level cache
//
// The cuts depend on the shape alone, never on the number of threads: sums keep their order and results their bits. No sum has
// numbers of two heads, so how many heads a task takes does depend on it.
#pragma once
#include "tile.h"
#include "view.h"

namespace nbhd::NBHD_ISA {

// Hands out aligned pieces of a buffer; with no buffer, only counts.
struct Arena {
    char *base = nullptr;
    int64_t used = 0;
    template <class T>
    T *take(int64_t n) {
        T *p = base ? (T *)(base + used) : nullptr;
        used += (n * (int64_t)sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

struct Map {
    int batch, group[3];
    GroupAxis axis[3];
};

static GroupAxis group_axis(const Axis &a, int g) {
    const int start = a.group_start(g);
    return {a.group_length(g), a.kernel, a.before, a.first + start, a.count + start};
}

template <class T>
static View<T> view(const Tensor &t, const Problem &p, const Map &m) {
    View<T> v{};
    if (!t.data) return v; // of no use to the part that is computed
    v.data = (T *)t.data + m.batch * t.batch;
    for (int a = 0; a < 3; a++) v.data += m.group[a] * t.axis[a];
    v.z = t.axis[0] * p.axis[0].dilation, v.y = t.axis[1] * p.axis[1].dilation, v.x = t.axis[2] * p.axis[2].dilation;
    v.head = t.head;
    return v;
}

// The log-sum-exp and its gradient are dense [batch, Z, Y, X, heads].
static View<Real> lse_view(const void *data, const Problem &p, const Map &m) {
    const int64_t h = p.heads, x = p.axis[2].length * h, y = p.axis[1].length * x, z = p.axis[0].length * y;
    return view<Real>(Tensor{(void *)data, z, {y, x, h}, 1}, p, m);
}

struct Block {
    int begin[3], end[3];         // query places
    int key_begin[3], key_end[3]; // key places they see
    PackedRow row;                // those of the last axis, as they are packed
};

static Block make_block(const Map &m, const int *begin, const int *end) {
    Block b;
    for (int a = 0; a < 3; a++) {
        b.begin[a] = begin[a], b.end[a] = end[a];
        b.key_begin[a] = m.axis[a].first[begin[a]], b.key_end[a] = m.axis[a].end(end[a] - 1);
    }
    b.row = packed_row(m.axis[2], begin[2], end[2]);
    return b;
}

// Keys of the block kept packed at a time.
static RingShape ring_shape(const Map &m, const Block &b) {
    RingShape r;
    r.planes = m.axis[0].length > 1;
    r.rows = r.planes ? b.key_end[1] - b.key_begin[1] : 1;
    r.row_origin = r.planes ? b.key_begin[1] : 0;
    r.span = 1;
    const GroupAxis &lead = m.axis[r.planes ? 0 : 1];
    const int lead_axis = r.planes ? 0 : 1, end = b.end[lead_axis];
    for (int u = b.begin[lead_axis], n; u < end; u += n) {
        n = r.planes ? 1 : rows_of_tile(lead, u, end);
        const int alive = lead.end(u + n - 1) - lead.first[u];
        if (alive > r.span) r.span = alive;
    }
    return r;
}

// Most key rows a tile of the block can see.
static int most_key_rows(const Map &m, const Block &b) {
    int z = 0, y = 0;
    for (int u = b.begin[0]; u < b.end[0]; u++)
        if (m.axis[0].count[u] > z) z = m.axis[0].count[u];
    for (int u = b.begin[1], n; u < b.end[1]; u += n) {
        n = rows_of_tile(m.axis[1], u, b.end[1]);
        const int rows = m.axis[1].end(u + n - 1) - m.axis[1].first[u];
        if (rows > y) y = rows;
    }
    return z * y;
}

struct Plan {
    int heads_per_task, head_groups; // key/value heads
    int64_t maps, maps_per_task, map_chunks;
    int cut_axis, cuts;   // cuts along one axis, each a task
    int y_block, x_block; // places of a block; y_block cuts 3D maps only
    int64_t tasks() const { return map_chunks * head_groups * cuts; }
    int cut_begin(int64_t length, int64_t cut) const { return int(length * cut / cuts); } // the first place of a cut
    int head_groups_of(const Problem &p) const { return (p.kv_heads + heads_per_task - 1) / heads_per_task; }
    bool several_blocks; // a task's map has more than one block
};

// What a task is, by number: the cuts of a map follow one another, then the maps, then the heads, so that a thread that has done
// with a task finds its caches and what was asked for ahead of use in the next.
struct Task {
    int64_t map_begin, map_end;
    int head_begin, head_end, cut;
};

static Task task_of(const Plan &plan, const Problem &p, int64_t i) {
    Task t;
    t.cut = int(i % plan.cuts), i /= plan.cuts;
    const int group = int(i / plan.map_chunks);
    i %= plan.map_chunks;
    t.head_begin = group * plan.heads_per_task;
    t.head_end = t.head_begin + plan.heads_per_task < p.kv_heads ? t.head_begin + plan.heads_per_task : p.kv_heads;
    t.map_begin = i * plan.maps / plan.map_chunks;
    t.map_end = (i + 1) * plan.maps / plan.map_chunks;
    return t;
}

// Heads whose queries share vectors.
static bool is_narrow(const Problem &p, const Map &m) {
    return p.part == Part::attention && m.axis[2].length <= lanes / 2;
}
static int heads_in_lanes(const Problem &p, const Map &m, const Task &t) {
    return is_narrow(p, m) && (t.head_end - t.head_begin) % 2 == 0 ? 2 : 1;
}

// Maps are numbered group by group, so that a task meets one geometry after another and each for all its images.
static Map map_of(const Problem &p, int64_t number) {
    Map m;
    m.batch = int(number % p.batch);
    int64_t g = number / p.batch;
    for (int a = 2; a >= 0; a--) {
        m.group[a] = int(g % p.axis[a].dilation), g /= p.axis[a].dilation;
        m.axis[a] = group_axis(p.axis[a], m.group[a]);
    }
    return m;
}

// How many maps from `number` on, below `end`, are as long as that one along every axis: tables and buffers serve them all.
static int64_t maps_alike(const Problem &p, int64_t number, int64_t end) {
    const Map m = map_of(p, number);
    int64_t n = number - m.batch + p.batch;
    for (; n < end; n += p.batch) {
        const Map other = map_of(p, n);
        for (int a = 0; a < 3; a++)
            if (other.axis[a].length != m.axis[a].length) return n - number;
    }
    return end - number;
}

// Maps of a task from `begin` on that are alike, and how many more a thread can count on: the one after the task's last is read ahead
// as well, unless another block or cut comes first.
struct AlikeMaps {
    int64_t begin, n, ahead;
    bool has_next(int64_t i) const { return i + 1 < ahead; }
};
static AlikeMaps alike_maps(const Problem &p, const Plan &plan, const Task &task, int64_t begin) {
    const bool goes_on = plan.cuts == 1 && !plan.several_blocks && task.map_end < plan.maps;
    const int64_t ahead = maps_alike(p, begin, task.map_end + goes_on), left = task.map_end - begin;
    return {begin, ahead < left ? ahead : left, ahead};
}

// Bytes of packed keys and values of a block of the largest map, for one head.
static int64_t ring_bytes(const Problem &p, const Map &m, const Plan &plan, int copies_transposed, int copies_rows) {
    int begin[3] = {0, 0, 0}, end[3];
    for (int a = 0; a < 3; a++) end[a] = m.axis[a].length;
    if (plan.y_block < end[1]) begin[1] = (end[1] - plan.y_block) / 2, end[1] = begin[1] + plan.y_block;
    if (plan.x_block < end[2]) begin[2] = (end[2] - plan.x_block) / 2, end[2] = begin[2] + plan.x_block;
    const Block b = make_block(m, begin, end);
    const int64_t channels = round_up(p.dim > p.dim_v ? p.dim : p.dim_v), width = b.row.width;
    return ring_shape(m, b).slots() * channels * (copies_transposed * (width + lanes) + copies_rows * width) *
           (int64_t)sizeof(Real);
}

// What cuts and tasks are worth: the keys that two cuts pack, a task's tables, other threads' waiting. In products.
constexpr int64_t enough_tasks = 16, most_tasks = 256, least_work_of_task = 1 << 22;
constexpr int64_t most_sums = 4 << 20; // bytes for gradients of the bias, from which on there are enough_tasks only
constexpr int few_half_windows = 3, many_half_windows = 12; // of a cut, at least: up to enough_tasks, and for more
constexpr int tasks_of_thread = 4;                          // at least, for threads that have done sooner than others

// About what a head's tables of the bias take (bias.h): numbers and sums for the queries at either end, sums for those between.
static int64_t bias_bytes(const Problem &p, const Map &m) {
    const int tiles = (m.axis[2].length + lanes - 1) / lanes, sets = tiles > 2 ? 5 : 2 * tiles;
    const int64_t set = (int64_t)p.bias_rows() * p.axis[2].kernel * lanes * (int64_t)sizeof(Real);
    return !p.bias ? 0 : sets * p.queries_per_kv_head() * set / (is_narrow(p, m) ? 2 : 1);
}

static int64_t possible_cuts(const Map &m, int axis, int half_windows) {
    const int least_places[] = {1, 2 * tile_rows, 16 * lanes}, windows = half_windows * m.axis[axis].kernel / 2;
    return m.axis[axis].length / (windows > least_places[axis] ? windows : least_places[axis]);
}

static int64_t most_possible_cuts(const Map &m, int half_windows) {
    int64_t most = 1;
    for (int a = 0; a < 3; a++)
        if (const int64_t cuts = possible_cuts(m, a, half_windows); cuts > most) most = cuts;
    return most;
}

static Plan whole_maps(const Problem &p, const Map &m) {
    Plan plan{};
    plan.maps = p.batch;
    for (int a = 0; a < 3; a++) plan.maps *= p.axis[a].dilation;
    plan.y_block = m.axis[1].length, plan.x_block = m.axis[2].length;
    plan.cuts = 1;
    return plan;
}

// Numbers in a task's gradient of the bias.
static int64_t bias_sums_of_task(const Problem &p, const Plan &plan) {
    return (int64_t)plan.heads_per_task * p.queries_per_kv_head() * p.bias_rows() * p.bias_columns();
}

// Makes blocks smaller until `fits`, or until they are of `x_least` columns and a few rows.
template <class Fits>
static void make_blocks(Plan &plan, const Map &m, int x_least, Fits fits) {
    const int y_least = 4 * tile_rows > m.axis[1].kernel ? 4 * tile_rows : m.axis[1].kernel;
    if (x_least < m.axis[2].kernel) x_least = m.axis[2].kernel;
    while (!fits()) {
        const bool cut_y = m.axis[0].length > 1 && plan.y_block > y_least, cut_x = plan.x_block > x_least;
        if (!cut_y && !cut_x) break;
        if (cut_x && (!cut_y || plan.x_block / lanes >= plan.y_block / tile_rows))
            plan.x_block = round_up((plan.x_block + 1) / 2);
        else plan.y_block = (plan.y_block / 2 + tile_rows - 1) / tile_rows * tile_rows;
    }
}

// A task has one key/value head, or as many neighbours as the cache holds packed, halved while there are few tasks.
static void take_heads_that_fit(Plan &plan, const Problem &p, const Map &m, int copies_transposed, int copies_rows) {
    const auto bytes = [&] { return ring_bytes(p, m, plan, copies_transposed, copies_rows); };
    make_blocks(plan, m, 4 * lanes, [&] { return bytes() <= p.cache_bytes; });
    const int least = is_narrow(p, m) && p.kv_heads > 1 ? 2 : 1;
    int &heads = plan.heads_per_task = least;
    while (heads * 2 <= p.kv_heads && heads * 2 * bytes() <= p.cache_bytes) heads *= 2;
    while (heads > least && plan.maps * plan.head_groups_of(p) < enough_tasks) heads /= 2;
}

// Tensors that come from memory: a task has the heads of a whole token, or enough of them for a kilobyte of it. What lies side by
// side is then read together; head by head it takes up to twice the time. Blocks are narrow instead, of 16 columns and more. Their
// packed keys may fill the cache: a tile needs one head's. Returns whether that can be done with enough tasks.
static bool take_heads_together(Plan &plan, const Problem &p, const Map &m) {
    constexpr int enough_channels = 256, columns = 16;
    const int channels = p.dim > p.dim_v ? p.dim : p.dim_v;
    int &heads = plan.heads_per_task = p.kv_heads;
    while (heads > 1 && (heads + 1) / 2 * channels >= enough_channels) heads = (heads + 1) / 2;
    if (is_narrow(p, m) && heads > 1) heads &= ~1;
    const auto fits = [&] { return 10 * heads * ring_bytes(p, m, plan, 0, 1) <= 7 * p.cache_bytes; };
    make_blocks(plan, m, columns > lanes ? columns : lanes, fits);
    return fits() && plan.maps * plan.head_groups_of(p) * most_possible_cuts(m, few_half_windows) >= enough_tasks;
}

// Tasks with more heads than their cuts were made for, while there are tasks for all threads: a token's heads lie side by side, and
// what is read together comes faster. All that such a task keeps of its heads has to stay near.
static void take_more_heads(Plan &plan, const Problem &p, const Map &m, int64_t threads, int copies_transposed,
                            int copies_rows) {
    if (is_narrow(p, m) && p.kv_heads % 2) return; // else all heads have another one in their lanes
    const int rounds = plan.cuts > 1 ? 2 : 1;      // of a backward: even cuts, then odd ones
    const int64_t least_tasks = threads > 1 ? tasks_of_thread * rounds * threads : 1,
                  bytes = ring_bytes(p, m, plan, copies_transposed, copies_rows) + bias_bytes(p, m);
    while (plan.heads_per_task < p.kv_heads) {
        Plan more = plan;
        more.heads_per_task = 2 * plan.heads_per_task < p.kv_heads ? 2 * plan.heads_per_task : p.kv_heads;
        more.head_groups = more.head_groups_of(p);
        if (more.heads_per_task * bytes > p.heads_cache_bytes || more.tasks() < least_tasks) return;
        plan = more;
    }
}

// `copies`: how many transposed and row-wise copies of a key's channels the pass keeps.
static Plan make_plan(const Problem &p, int64_t threads, int copies_transposed, int copies_rows) {
    const Map m = map_of(p, 0); // the longest of all groups along every axis
    Plan plan = whole_maps(p, m);
    const bool together = p.from_memory && p.kv_heads > 1 && take_heads_together(plan, p, m);
    if (!together) {
        plan = whole_maps(p, m);
        take_heads_that_fit(plan, p, m, copies_transposed, copies_rows);
    }
    plan.several_blocks = plan.y_block < m.axis[1].length || plan.x_block < m.axis[2].length;
    plan.head_groups = plan.head_groups_of(p);

    // Tasks for many threads: places along an axis are cut where images and heads are few. Of work that is long enough there are
    // more, in powers of two, which threads share evenly.
    const int64_t have = plan.maps * plan.head_groups,
                  places = (int64_t)m.axis[0].length * m.axis[1].length * m.axis[2].length,
                  work = places * p.window() * (p.dim + p.dim_v) * plan.heads_per_task * p.queries_per_kv_head();
    const double all_work = double(have) * double(work);
    int64_t tasks = enough_tasks;
    const int64_t sums = p.d_bias ? bias_sums_of_task(p, plan) * (int64_t)sizeof(Real) : 0; // each task has its own
    while (tasks < most_tasks && all_work >= double(2 * tasks * least_work_of_task) && 2 * tasks * sums <= most_sums)
        tasks *= 2;
    const auto cut = [&](int64_t tasks, int half_windows) {
        int64_t wanted = (tasks + have - 1) / have;
        if (wanted > work / p.least_work_of_cut) wanted = work / p.least_work_of_cut;
        for (int a = 0; a < 3 && plan.cuts < wanted; a++) { // the first axis that is long enough, or the longest
            const int64_t possible = possible_cuts(m, a, half_windows);
            if (possible > plan.cuts) plan.cut_axis = a, plan.cuts = int(possible < wanted ? possible : wanted);
        }
    };
    cut(enough_tasks, few_half_windows), cut(tasks, many_half_windows);
    const int64_t parts = plan.head_groups * plan.cuts, chunks = (tasks + parts - 1) / parts;
    plan.map_chunks = chunks < plan.maps ? chunks : plan.maps;
    if (!together) take_more_heads(plan, p, m, threads, copies_transposed, copies_rows);
    return plan;
}

// Calls visit(block) for the blocks of a task's map.
template <class Visit>
static void for_each_block(const Plan &plan, const Map &m, int cut, Visit visit) {
    int from[3] = {0, 0, 0}, to[3] = {m.axis[0].length, m.axis[1].length, m.axis[2].length};
    const int n = m.axis[plan.cut_axis].length;
    from[plan.cut_axis] = plan.cut_begin(n, cut), to[plan.cut_axis] = plan.cut_begin(n, cut + 1);
    if (from[plan.cut_axis] >= to[plan.cut_axis]) return;
    int begin[3] = {from[0], from[1], from[2]}, end[3] = {to[0], to[1], to[2]};
    for (int y = from[1]; y < to[1]; y += plan.y_block)
        for (int x = from[2]; x < to[2]; x += plan.x_block) {
            begin[1] = y, end[1] = y + plan.y_block < to[1] ? y + plan.y_block : to[1];
            begin[2] = x, end[2] = x + plan.x_block < to[2] ? x + plan.x_block : to[2];
            visit(make_block(m, begin, end));
        }
}

} // namespace nbhd::NBHD_ISA
