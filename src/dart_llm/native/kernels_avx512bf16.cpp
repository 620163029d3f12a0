// Kernels for CPUs with avx512bf16.
#include "kernels_common.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif

namespace dart::avx512bf16 {
namespace {
struct S {
  static constexpr int N = 16;
  using V = __m512;
  static V all(float v) { return _mm512_set1_ps(v); }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const bf16* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(V a) { return _mm512_reduce_add_ps(a); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static constexpr bool PAIRS = true;
  static __m512bh pairs(const bf16* p) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  static V dot_bf16(V a, __m512bh b, __m512bh c) { return _mm512_dpbf16_ps(a, b, c); }
};
constexpr const char* NAME = "avx512bf16";
}  // namespace
#include "kernels_body.h"
}  // namespace dart::avx512bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
