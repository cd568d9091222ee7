#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace nbhd {

#if defined(__x86_64__)
// What the compilers' __builtin_cpu_supports does takes a library of theirs that not every linker is given (clang-cl's is not).
struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
};
static Leaf cpuid(unsigned leaf, unsigned part = 0) {
    Leaf l;
    if (!__get_cpuid_count(leaf, part, &l.a, &l.b, &l.c, &l.d)) return {};
    return l;
}
static bool has(unsigned word, std::initializer_list<int> bits) {
    for (int bit : bits)
        if (!(word >> bit & 1)) return false;
    return true;
}
// Whether the operating system keeps these registers when it changes threads: bits of XCR0.
static bool keeps(unsigned registers) {
    if (!has(cpuid(1).c, {27})) return false; // OSXSAVE
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & registers) == registers;
}
// x86-64-v2: SSE3 to SSE4.2, cmpxchg16b, popcnt
static bool has_baseline() { return has(cpuid(1).c, {0, 9, 13, 19, 20, 23}); }
// FMA, AVX, F16C; AVX2, BMI2
[[maybe_unused]] static bool has_avx2() {
    return has_baseline() && keeps(0x6) && has(cpuid(1).c, {12, 28, 29}) && has(cpuid(7).b, {5, 8});
}
// F, DQ, BW, VL
[[maybe_unused]] static bool has_avx512() { return has_avx2() && keeps(0xe6) && has(cpuid(7).b, {16, 17, 30, 31}); }
[[maybe_unused]] static bool has_avx512bf16() { return has_avx512() && has(cpuid(7, 1).a, {5}); }
// Intel's cores have one port for products of pairs and two for others: no more products, and 10 to 15 % more time.
[[maybe_unused]] static bool pairs_are_faster() {
    const Leaf maker = cpuid(0);
    const unsigned amd[3] = {0x68747541, 0x69746e65, 0x444d4163}; // "AuthenticAMD"
    return maker.b == amd[0] && maker.d == amd[1] && maker.c == amd[2];
}
#endif
[[maybe_unused]] static bool always() { return true; }

extern const Kernels avx512bf16_kernels, avx512_f32_kernels, avx2_f32_kernels, avx2_f64_kernels, baseline_f32_kernels,
    baseline_f64_kernels, neon_f32_kernels, neon_f64_kernels;
extern const LinearKernels avx512bf16_linear_kernels, avx512_linear_kernels, avx2_linear_kernels,
    baseline_linear_kernels, neon_linear_kernels;

// Best first. The NBHD_... macros say which of them this build has (CMakeLists.txt, NBHD_SETS).
static const InstructionSet sets[] = {
#ifdef NBHD_AVX512BF16
    {"avx512bf16", has_avx512bf16, pairs_are_faster, &avx512_f32_kernels, &avx2_f64_kernels, &avx512bf16_kernels,
     &avx512_linear_kernels, &avx512bf16_linear_kernels},
#endif
#ifdef NBHD_AVX512 // float64 has no kernels of its own there: it takes the AVX2 ones
    {"avx512", has_avx512, always, &avx512_f32_kernels, &avx2_f64_kernels, &avx512_f32_kernels, &avx512_linear_kernels,
     nullptr},
#endif
#ifdef NBHD_AVX2
    {"avx2", has_avx2, always, &avx2_f32_kernels, &avx2_f64_kernels, &avx2_f32_kernels, &avx2_linear_kernels, nullptr},
#endif
#ifdef NBHD_BASELINE
    {"baseline", has_baseline, always, &baseline_f32_kernels, &baseline_f64_kernels, &baseline_f32_kernels,
     &baseline_linear_kernels, nullptr},
#endif
#ifdef NBHD_NEON
    {"neon", always, always, &neon_f32_kernels, &neon_f64_kernels, &neon_f32_kernels, &neon_linear_kernels, nullptr},
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
