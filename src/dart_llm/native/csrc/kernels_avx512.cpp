// Kernels for CPUs with avx512.
#include "kernels_common.h"

#if defined(__x86_64__) && !defined(DART_WITHOUT_AVX512)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace dart::avx512 {
namespace {
struct S {
#include "vectors_avx512.h"
  static constexpr int64_t FEW = 32;
  static constexpr bool PAIRS = false;
  static V pairs(const bf16*) { return zero(); }
  static V dot_bf16(V a, V, V) { return a; }
  static constexpr int TAKEN = 0;
  static W dot8(W to, B levels, B x) {
    B even = _mm512_and_si512(levels, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(levels, 8);
    B x_even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), x_odd = _mm512_srai_epi16(x, 8);
    W sum = _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd));
    return _mm512_add_epi32(to, sum);
  }
  static W dot6(W to, B levels, B x) { return add(to, sum_pairs(_mm512_maddubs_epi16(levels, x))); }
  static W add_pairs(W to, B levels, B x) { return _mm512_add_epi16(to, _mm512_maddubs_epi16(levels, x)); }
  static W sum_pairs(W pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
};
constexpr const char* NAME = "avx512";
}  // namespace
#include "kernels_body.h"
}  // namespace dart::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
