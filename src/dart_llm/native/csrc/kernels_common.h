// What every kernels_*.cpp needs, included before its target is chosen.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace dart {
using bf16 = uint16_t;
static inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
}  // namespace dart

#if defined(__x86_64__)
#include <immintrin.h>
#endif
