// Kernels for CPUs with avx2.
#include "kernels_common.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace dart::avx2 {
namespace {
struct S {
#include "vectors_avx2.h"
  static constexpr int64_t FEW = 32;
  static W dot8(W to, B levels, B x) {
    B even = _mm256_and_si256(levels, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(levels, 8);
    B x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    W sum = _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd));
    return _mm256_add_epi32(to, sum);
  }
  static W dot4(W to, B levels, B x) {  // 15 x 127 x 2 fits into 16 bits
    B pairs = _mm256_maddubs_epi16(levels, x);
    return _mm256_add_epi32(to, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
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
