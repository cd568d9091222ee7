#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace nbhd {

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels avx512_f32_kernels, avx2_f32_kernels, avx2_f64_kernels, baseline_f32_kernels, baseline_f64_kernels;

static bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static bool has_baseline() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.2");
}
// Best first. float64 has no kernels of its own in AVX-512: it takes the AVX2 ones.
static const InstructionSet sets[] = {
    {"avx512", has_avx512, &avx512_f32_kernels, &avx2_f64_kernels},
    {"avx2", has_avx2, &avx2_f32_kernels, &avx2_f64_kernels},
    {"baseline", has_baseline, &baseline_f32_kernels, &baseline_f64_kernels},
};
#elif defined(__aarch64__)
extern const Kernels neon_f32_kernels, neon_f64_kernels;
static bool always() { return true; }
static const InstructionSet sets[] = {{"neon", always, &neon_f32_kernels, &neon_f64_kernels}};
#else
#error "nbhd has kernels for x86-64 and AArch64 only"
#endif

static const InstructionSet *choose() {
    const char *wanted = getenv("NBHD_CPU_ISA");
    for (const InstructionSet &s : sets)
        if (s.usable() && (!wanted || !*wanted || !strcmp(wanted, s.name))) return &s;
    return nullptr;
}

const InstructionSet *instruction_set() {
    static std::atomic<const InstructionSet *> chosen{nullptr};
    const InstructionSet *s = chosen.load(std::memory_order_acquire);
    if (!s) chosen.store(s = choose(), std::memory_order_release); // twice by two threads: the same answer
    return s;
}

} // namespace nbhd
