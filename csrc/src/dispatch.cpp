#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace nbhd {

#if defined(__x86_64__) || defined(_M_X64)
static bool has_baseline() { // x86-64-v2
    __builtin_cpu_init();
    return __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
}
// Not among the features that Clang before 18 knows by name.
[[maybe_unused]] static bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
[[maybe_unused]] static bool has_avx2() {
    return has_baseline() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
           __builtin_cpu_supports("bmi2");
}
[[maybe_unused]] static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] static bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel's cores have one port for products of pairs and two for others: no more products, and 10 to 15 % more time.
[[maybe_unused]] static bool pairs_are_faster() { return __builtin_cpu_is("amd"); }
#endif
[[maybe_unused]] static bool always() { return true; }

extern const Kernels avx512bf16_kernels, avx512_f32_kernels, avx2_f32_kernels, avx2_f64_kernels, baseline_f32_kernels,
    baseline_f64_kernels, neon_f32_kernels, neon_f64_kernels;

// Best first. The NBHD_... macros say which of them this build has (CMakeLists.txt, NBHD_SETS).
static const InstructionSet sets[] = {
#ifdef NBHD_AVX512BF16
    {"avx512bf16", has_avx512bf16, pairs_are_faster, &avx512_f32_kernels, &avx2_f64_kernels, &avx512bf16_kernels},
#endif
#ifdef NBHD_AVX512 // float64 has no kernels of its own there: it takes the AVX2 ones
    {"avx512", has_avx512, always, &avx512_f32_kernels, &avx2_f64_kernels, &avx512_f32_kernels},
#endif
#ifdef NBHD_AVX2
    {"avx2", has_avx2, always, &avx2_f32_kernels, &avx2_f64_kernels, &avx2_f32_kernels},
#endif
#ifdef NBHD_BASELINE
    {"baseline", has_baseline, always, &baseline_f32_kernels, &baseline_f64_kernels, &baseline_f32_kernels},
#endif
#ifdef NBHD_NEON
    {"neon", always, always, &neon_f32_kernels, &neon_f64_kernels, &neon_f32_kernels},
#endif
};

static const InstructionSet *choose() {
    const char *wanted = getenv("NBHD_CPU_ISA");
    for (const InstructionSet &s : sets)
        if (s.usable() && (wanted && *wanted ? !strcmp(wanted, s.name) : s.worth_it())) return &s;
    return nullptr;
}

const InstructionSet *instruction_set() {
    static std::atomic<const InstructionSet *> chosen{nullptr};
    const InstructionSet *s = chosen.load(std::memory_order_acquire);
    if (!s) chosen.store(s = choose(), std::memory_order_release); // twice by two threads: the same answer
    return s;
}

} // namespace nbhd
