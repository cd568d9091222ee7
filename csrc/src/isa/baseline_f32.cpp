// The kernels for baseline, arithmetic in float. Compiled with that instruction set's flags (CMakeLists.txt).
#define NBHD_ISA baseline_f32
#define NBHD_DOUBLE 0
#define NBHD_VECTOR_BYTES 16
#define NBHD_REGISTERS 16
#define NBHD_SPECIALISE 0 // kernels for common window sizes as well
#include "../kernels/backward_task.h"

namespace nbhd {
extern const Kernels baseline_f32_kernels;
const Kernels baseline_f32_kernels{NBHD_ISA::forward, NBHD_ISA::backward};
} // namespace nbhd
