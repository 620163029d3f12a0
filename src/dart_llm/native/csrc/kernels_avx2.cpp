// Kernels for CPUs with avx2.
#include "kernels_common.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace dart::avx2 {
namespace {
struct S {
  static constexpr int N = 8;
  static constexpr bool PAIRS = false;
  using V = __m256;
  static V all(float v) { return _mm256_set1_ps(v); }
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const bf16* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(V a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  struct Levels { V low, high; };
  static Levels levels(const uint8_t* bytes) {
    __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    __m256i low = _mm256_and_si256(both, _mm256_set1_epi32(15));
    const V eight = all(8);
    return {_mm256_sub_ps(_mm256_cvtepi32_ps(low), eight),
            _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4)), eight)};
  }
  static V pairs(const bf16*) { return zero(); }
  static V dot_bf16(V a, V, V) { return a; }
};
constexpr const char* NAME = "avx2";
}  // namespace
#include "kernels_body.h"
}  // namespace dart::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
