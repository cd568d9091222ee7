// The linear layers for neon. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA neon_linear
#define NBHD_DOUBLE 0
#define NBHD_VECTOR_BYTES 16
#define NBHD_REGISTERS 32
#include "../kernels/linear.h"
#include "../kernels/linear_gradients.h"

namespace nbhd {
extern const LinearKernels neon_linear_kernels;
const LinearKernels neon_linear_kernels = {NBHD_ISA::linear, NBHD_ISA::linear_gradients};
} // namespace nbhd
