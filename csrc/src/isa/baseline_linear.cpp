// The linear layers for baseline. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA baseline_linear
#define NBHD_DOUBLE 0
#define NBHD_VECTOR_BYTES 16
#define NBHD_REGISTERS 16
#include "../kernels/linear.h"

namespace nbhd {
extern const LinearKernel baseline_linear_kernel;
const LinearKernel baseline_linear_kernel = NBHD_ISA::linear;
} // namespace nbhd
