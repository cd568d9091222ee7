// Whether a struct that a caller handed in is one that this library knows.
#pragma once
#include <cstdint>

#include "../include/nbhd.h"

namespace nbhd {

// Its first field is its size. A newer caller's is longer, which is fine while what we do not know is zero.
inline int32_t check_size(const void *call, int64_t ours) {
    if (!call) return NBHD_BAD_STRUCT;
    const int64_t size = *static_cast<const int64_t *>(call);
    if (size < ours || size > 4096) return NBHD_BAD_STRUCT;
    const char *bytes = static_cast<const char *>(call);
    for (int64_t i = ours; i < size; i++)
        if (bytes[i]) return NBHD_UNSUPPORTED;
    return NBHD_OK;
}

} // namespace nbhd
