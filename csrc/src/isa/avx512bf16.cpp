// The kernels of avx512 for bfloat16 tensors alone, with products of pairs of 16-bit numbers where those are exact.
#define NBHD_ISA avx512bf16
#define NBHD_DOUBLE 0
#define NBHD_PAIRS 1
#define NBHD_VECTOR_BYTES 64
#define NBHD_REGISTERS 32
#define NBHD_SPECIALISE 1 // kernels for common window sizes as well
#include "../kernels/backward_task.h"

namespace nbhd {
extern const Kernels avx512bf16_kernels;
const Kernels avx512bf16_kernels{NBHD_ISA::forward, NBHD_ISA::backward};
} // namespace nbhd
