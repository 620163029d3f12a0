// Kernels for CPUs with avx2 and avxvnni.
#include "kernels_common.h"

#if defined(__x86_64__) && !defined(DART_WITHOUT_AVXVNNI)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

namespace dart::avxvnni {
namespace {
struct S {
#include "vectors_avx2.h"
  static constexpr int64_t FEW = 256;
  static constexpr int TAKEN = 0;
  static W dot8(W to, B levels, B x) { return _mm256_dpbusd_avx_epi32(to, levels, x); }
  static W dot6(W to, B levels, B x) { return dot8(to, levels, x); }
  static W add_pairs(W to, B levels, B x) { return dot8(to, levels, x); }
  static W sum_pairs(W sums) { return sums; }
};
constexpr const char* NAME = "avxvnni";
}  // namespace
#include "kernels_body.h"
}  // namespace dart::avxvnni

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
