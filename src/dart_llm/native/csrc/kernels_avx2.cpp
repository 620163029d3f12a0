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
  static constexpr int TAKEN = 128;
  static W dot8(W to, B levels, B x) {  // 128 x 127 x 2 fits into 16 bits
    B own = _mm256_xor_si256(levels, _mm256_set1_epi8(-128));
    B pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(own), _mm256_sign_epi8(x, own));
    return add(to, sum_pairs(pairs));
  }
  static W dot6(W to, B levels, B x) { return add(to, sum_pairs(_mm256_maddubs_epi16(levels, x))); }
  static W add_pairs(W to, B levels, B x) { return _mm256_add_epi16(to, _mm256_maddubs_epi16(levels, x)); }
  static W sum_pairs(W pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
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
