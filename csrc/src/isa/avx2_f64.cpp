// The kernels for avx2, arithmetic in double. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA avx2_f64
#define NBHD_DOUBLE 1
#define NBHD_VECTOR_BYTES 32
#define NBHD_REGISTERS 16
#define NBHD_SPECIALISE 0 // kernels for common window sizes as well
#include "../kernels/backward_task.h"

namespace nbhd {
extern const Kernels avx2_f64_kernels;
const Kernels avx2_f64_kernels{NBHD_ISA::forward, NBHD_ISA::backward};
} // namespace nbhd
