// A tensor seen from one map: places instead of positions.
#pragma once
#include <cstdint>

#include "vec.h"

namespace nbhd::NBHD_ISA {

template <class T>
struct View {
    T *data;
    int64_t z, y, x, head;
    T *at(int64_t zi, int64_t yi, int64_t xi, int64_t h) const { return data + zi * z + yi * y + xi * x + h * head; }
};

} // namespace nbhd::NBHD_ISA
