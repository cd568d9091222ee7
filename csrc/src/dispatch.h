// Which kernels this process uses: chosen once, at the first call.
#pragma once
#include "linear.h"

namespace nbhd {

struct InstructionSet {
    const char *name;
    bool (*usable)();
    bool (*worth_it)();                            // on this machine, where nobody names it
    const Kernels *f32, *f64, *bf16;               // arithmetic in float, in double; of bfloat16 tensors
    const LinearKernels *linear, *linear_of_pairs; // products of floats; of bfloat16, or null
};

// The best instruction set this machine has, or the one NBHD_CPU_ISA names; null when there is none.
const InstructionSet *instruction_set();

} // namespace nbhd
