// What every kernels_*.cpp needs, included before its target is chosen.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "packed.h"

namespace dart {
using bf16 = uint16_t;
static inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
// float16, by its bits.
static inline float half_to_float(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  float x = rest < 0x400u ? float(rest) * 0x1p-24f : from_bits((rest + (112u << 10)) << 13);
  return from_bits(to_bits(x) | sign);
}
}  // namespace dart

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
