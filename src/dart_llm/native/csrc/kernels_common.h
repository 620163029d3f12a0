// What every kernels_*.cpp needs, included before its target is selected.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "packed.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dart {
using bf16 = uint16_t;
static inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
// float16, by its bits.
static inline float half_to_float(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  float x = rest < 0x400u ? float(rest) * 0x1p-24f : from_bits((rest + (112u << 10)) << 13);
  return from_bits(to_bits(x) | sign);
}

// Four times four fours of bytes, transposed: four i of the j-th line of `to` is four j of the i-th of
// `from`; lines lie `apart` bytes apart.
static inline void transpose_fours(const uint8_t* from, int64_t apart, uint8_t* to, int64_t to_apart) {
#if defined(__x86_64__)
  auto line = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * apart)); };
  auto write = [&](int64_t i, __m128i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_apart), x);
  };
  __m128i a = _mm_unpacklo_epi32(line(0), line(1)), b = _mm_unpackhi_epi32(line(0), line(1));
  __m128i c = _mm_unpacklo_epi32(line(2), line(3)), d = _mm_unpackhi_epi32(line(2), line(3));
  write(0, _mm_unpacklo_epi64(a, c)), write(1, _mm_unpackhi_epi64(a, c));
  write(2, _mm_unpacklo_epi64(b, d)), write(3, _mm_unpackhi_epi64(b, d));
#else
  uint8_t lines[4][16];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) std::memcpy(lines[j] + 4 * i, from + i * apart + 4 * j, 4);
  for (int j = 0; j < 4; ++j) std::memcpy(to + j * to_apart, lines[j], 16);
#endif
}
}  // namespace dart
