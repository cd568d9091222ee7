// The linear layers for avx2. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA avx2_linear
#define NBHD_DOUBLE 0
#define NBHD_VECTOR_BYTES 32
#define NBHD_REGISTERS 16
#include "../kernels/linear.h"

namespace nbhd {
extern const LinearKernel avx2_linear_kernel;
const LinearKernel avx2_linear_kernel = NBHD_ISA::linear;
} // namespace nbhd
