// Kernels for 64-bit Arm CPUs with dot products of bytes.
#include "kernels_common.h"

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace dart::neon {
namespace {
struct S {
#include "vectors_neon.h"
  static constexpr int64_t FEW = 16;  // more were not measured
};
constexpr const char* NAME = "neon";
}  // namespace
#include "kernels_body.h"
}  // namespace dart::neon

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
