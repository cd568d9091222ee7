// The linear layers for avx512 with products of pairs of 16-bit numbers.
#define NBHD_ISA avx512bf16_linear
#define NBHD_DOUBLE 0
#define NBHD_PAIRS 1
#define NBHD_VECTOR_BYTES 64
#define NBHD_REGISTERS 32
#include "../kernels/linear.h"
#include "../kernels/linear_gradients.h"

namespace nbhd {
extern const LinearKernels avx512bf16_linear_kernels;
const LinearKernels avx512bf16_linear_kernels = {NBHD_ISA::linear, NBHD_ISA::linear_gradients};
} // namespace nbhd
