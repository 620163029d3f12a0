// Kernels for CPUs with avx512.
#include "kernels_common.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

namespace dart::avx512 {
namespace {
struct S {
#include "vectors_avx512.h"
  static constexpr bool PAIRS = false;
  static V pairs(const bf16*) { return zero(); }
  static V dot_bf16(V a, V, V) { return a; }
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
