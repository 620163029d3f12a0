// Which kernels this CPU runs.
#include "kernels.h"

#include <cstring>

namespace dart {
namespace {

bool has(const char* name) {
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avx2")) return avx2;
#endif
  return !std::strcmp(name, "portable");
}

const Kernels* const ALL[] = {
#if defined(__x86_64__)
    &avx512bf16::table, &avx512::table, &avx2::table,
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
