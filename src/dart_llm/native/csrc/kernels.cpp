// Which kernels this CPU runs.
#include "kernels.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dart {
namespace {

#if defined(__x86_64__)
// A name that __builtin_cpu_supports of older compilers does not know.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}
#elif defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}
#endif

bool has(const char* name) {
#if defined(__x86_64__)
  bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx512bf16"))
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avxvnni")) return avx2 && has_avxvnni();
  if (!std::strcmp(name, "avx2")) return avx2;
#elif defined(__aarch64__)
  if (!std::strcmp(name, "neon")) return has_dot_products();
#endif
  return !std::strcmp(name, "portable");
}

const Kernels* const ALL[] = {
#if defined(__x86_64__)
#if !defined(DART_WITHOUT_AVX512BF16)
    &avx512bf16::table,
#endif
#if !defined(DART_WITHOUT_AVX512)
    &avx512::table,
#endif
#if !defined(DART_WITHOUT_AVXVNNI)
    &avxvnni::table,
#endif
    &avx2::table,
#elif defined(__aarch64__)
    &neon::table,
#endif
    &portable::table};

}  // namespace

const Kernels* kernels(const char* name) {
  for (const Kernels* one : ALL)
    if (!std::strcmp(one->name, name)) return has(name) ? one : nullptr;
  return nullptr;
}

const Kernels* kernels() {
  for (const Kernels* one : ALL)
    if (has(one->name)) return one;
  return &portable::table;
}

}  // namespace dart
