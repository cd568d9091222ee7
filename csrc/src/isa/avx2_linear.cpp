// The linear layers for avx2. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA avx2_linear
#define NBHD_DOUBLE 0
#define NBHD_VECTOR_BYTES 32
#define NBHD_REGISTERS 16
#include "../kernels/linear.h"
#include "../kernels/linear_gradients.h"

namespace nbhd {
extern const LinearKernels avx2_linear_kernels;
const LinearKernels avx2_linear_kernels = {NBHD_ISA::linear, NBHD_ISA::linear_gradients};
} // namespace nbhd
