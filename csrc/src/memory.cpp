// The memory of threads and calls, and what the system is told of the memory that a call fills.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "problem.h"

namespace nbhd {
namespace {

constexpr std::align_val_t alignment{64};

struct Scratch {
    void *memory = nullptr;
    int64_t bytes = 0;
    ~Scratch() { release(memory); }
};

} // namespace

void *allocate(int64_t bytes) { return ::operator new(bytes > 0 ? size_t(bytes) : 1, alignment, std::nothrow); }
void release(void *memory) { ::operator delete(memory, alignment); }

bool poisons_scratch = false;

void *thread_scratch(int64_t bytes) {
    static thread_local Scratch scratch;
    if (scratch.bytes < bytes) {
        release(scratch.memory);
        scratch.memory = allocate(bytes);
        scratch.bytes = scratch.memory ? bytes : 0;
    }
    if (poisons_scratch && scratch.memory) std::memset(scratch.memory, 0xff, size_t(bytes));
    return scratch.memory;
}

void will_fill([[maybe_unused]] void *data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t(2) << 20;
    if (bytes < int64_t(2 * page)) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page,
                    end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE); // a wish: failing is fine
#endif
}

} // namespace nbhd
