// Tasks on the host's threads, or on a few of our own, and the memory of threads and calls.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "../include/nbhd.h"
#include "problem.h"

namespace nbhd {

namespace {

constexpr std::align_val_t alignment{64};

struct Scratch {
    void *memory = nullptr;
    int64_t bytes = 0;
    ~Scratch() { release(memory); }
};

// One call's tasks: whoever is free takes the next. Which thread runs a task changes nothing in its result.
struct Queue {
    std::atomic<int64_t> next{0};
    int64_t count;
    void (*task)(int64_t, void *);
    void *context;

    void drain() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i, context);
    }
};

void drain_range(int64_t begin, int64_t end, void *context) {
    for (; begin < end; begin++) ((Queue *)context)->drain();
}

} // namespace

void *allocate(int64_t bytes) { return ::operator new(bytes > 0 ? size_t(bytes) : 1, alignment, std::nothrow); }
void release(void *memory) { ::operator delete(memory, alignment); }

void *thread_scratch(int64_t bytes) {
    static thread_local Scratch scratch;
    if (scratch.bytes < bytes) {
        release(scratch.memory);
        scratch.memory = allocate(bytes);
        scratch.bytes = scratch.memory ? bytes : 0;
    }
    return scratch.memory;
}

void run_tasks(const Threads &threads, int64_t count, void (*task)(int64_t, void *), void *context) {
    Queue queue;
    queue.count = count, queue.task = task, queue.context = context;
    const int64_t workers = threads.count < count ? threads.count : count;
    if (workers > 1 && threads.parallel_for) {
        auto parallel_for = (nbhd_parallel_for)threads.parallel_for;
        parallel_for(0, workers, 1, drain_range, &queue);
    } else if (workers > 1) {
        std::vector<std::thread> pool;
        try {
            for (int64_t i = 1; i < workers; i++) pool.emplace_back([&queue] { queue.drain(); });
        } catch (...) { // no more threads to be had: those there are do the work
        }
        queue.drain();
        for (std::thread &t : pool) t.join();
    }
    queue.drain(); // alone, or whatever a host that ran nothing left over
}

} // namespace nbhd
