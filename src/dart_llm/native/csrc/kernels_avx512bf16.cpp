// Kernels for CPUs with avx512bf16.
#include "kernels_common.h"

#if defined(__x86_64__) && !defined(DART_WITHOUT_AVX512BF16)
#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")
#endif

namespace dart::avx512bf16 {
namespace {
struct S {
#include "vectors_avx512.h"
  static constexpr int64_t FEW = 256;
  static constexpr bool PAIRS = true;
  static __m512bh pairs(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static V dot_bf16(V a, __m512bh b, __m512bh c) { return _mm512_dpbf16_ps(a, b, c); }
  struct Halves {
    __m512bh low, high;
  };
  // 32 bytes of two levels each, as bfloat16.
  static Halves unpack(const uint8_t* bytes) {
    // -8 to 7; an index counts from 0 to 15, and its other half repeats that
    const __m256i half = _mm256_setr_epi16(short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0),
                                           short(0xc080), short(0xc040), short(0xc000), short(0xbf80), 0,
                                           0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    const __m512i table = _mm512_broadcast_i64x4(half);
    __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    __m512i low = _mm512_and_si512(both, _mm512_set1_epi16(15));
    __m512i high = _mm512_srli_epi16(both, 4);
    return {reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(low, table)),
            reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(high, table))};
  }
  static constexpr int TAKEN = 0;
  static W dot8(W to, B levels, B x) { return _mm512_dpbusd_epi32(to, levels, x); }
  static W dot6(W to, B levels, B x) { return dot8(to, levels, x); }
  static W add_pairs(W to, B levels, B x) { return dot8(to, levels, x); }
  static W sum_pairs(W sums) { return sums; }
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
