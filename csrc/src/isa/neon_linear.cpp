// The linear layers for neon. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA neon_linear
#define NBHD_DOUBLE 0
#define NBHD_VECTOR_BYTES 16
#define NBHD_REGISTERS 32
#include "../kernels/linear.h"

namespace nbhd {
extern const LinearKernel neon_linear_kernel;
const LinearKernel neon_linear_kernel = NBHD_ISA::linear;
} // namespace nbhd
