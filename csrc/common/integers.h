// Integer arithmetic of sizes and partitions, for the host and for the device.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fastvae {
inline namespace FASTVAE_ISA {

// For a >= 0 and b > 0.
FASTVAE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTVAE_INLINE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTVAE_INLINE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace FASTVAE_ISA
}  // namespace fastvae
