// The linear layers for avx512. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA avx512_linear
#define NBHD_DOUBLE 0
#define NBHD_VECTOR_BYTES 64
#define NBHD_REGISTERS 32
#include "../kernels/linear.h"

namespace nbhd {
extern const LinearKernel avx512_linear_kernel;
const LinearKernel avx512_linear_kernel = NBHD_ISA::linear;
} // namespace nbhd
