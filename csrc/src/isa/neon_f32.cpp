// The kernels for neon, arithmetic in float. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA neon_f32
#define NBHD_DOUBLE 0
#define NBHD_VECTOR_BYTES 16
#define NBHD_REGISTERS 32
#define NBHD_SPECIALISE 1 // kernels for common window sizes as well
#include "../kernels/backward_task.h"

namespace nbhd {
extern const Kernels neon_f32_kernels;
const Kernels neon_f32_kernels{NBHD_ISA::forward, NBHD_ISA::backward};
} // namespace nbhd
