// Tasks on the host's threads, or on a few of our own.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "../include/nbhd.h"
#include "problem.h"

namespace nbhd {

namespace {

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

// Threads of our own, for hosts that lend none (torch before 2.10). They are started when first wanted and sleep between calls;
// several callers may use them at once.
class Pool {
  public:
    void run(Queue &queue, int64_t helpers) {
        Job job{&queue, helpers, 0};
        std::unique_lock<std::mutex> lock(mutex_);
        while (threads_ < helpers) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (...) { break; } // no more threads to be had: those there are do the work
            threads_++;
        }
        const auto place = jobs_.insert(jobs_.end(), &job);
        lock.unlock();
        wake_.notify_all();
        queue.drain();
        lock.lock();
        jobs_.erase(place); // nobody joins any more
        done_.wait(lock, [&] { return job.running == 0; });
    }

  private:
    struct Job {
        Queue *queue;
        int64_t wanted; // helpers that may still join
        int64_t running;
    };

    Job *next() {
        for (Job *job : jobs_)
            if (job->wanted > 0) return job;
        return nullptr;
    }
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            Job *job = nullptr;
            wake_.wait(lock, [&] { return (job = next()) != nullptr; });
            job->wanted--, job->running++;
            lock.unlock();
            job->queue->drain();
            lock.lock();
            if (--job->running == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::list<Job *> jobs_;
    int64_t threads_ = 0;
};

// Never destroyed: its threads outlive main. A forked child has none of them and begins anew.
std::atomic<Pool *> the_pool{nullptr};
Pool &pool() {
    static const bool prepared = [] {
        the_pool.store(new Pool);
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { the_pool.store(new Pool); });
#endif
        return true;
    }();
    (void)prepared;
    return *the_pool.load();
}

} // namespace

void run_tasks(const Threads &threads, int64_t count, void (*task)(int64_t, void *), void *context) {
    Queue queue;
    queue.count = count, queue.task = task, queue.context = context;
    const int64_t workers = threads.count < count ? threads.count : count;
    if (workers > 1 && threads.parallel_for) {
        auto parallel_for = (nbhd_parallel_for)threads.parallel_for;
        parallel_for(0, workers, 1, drain_range, &queue);
    } else if (workers > 1) {
        pool().run(queue, workers - 1);
    }
    queue.drain(); // alone, or whatever a host that ran nothing left over
}

} // namespace nbhd
