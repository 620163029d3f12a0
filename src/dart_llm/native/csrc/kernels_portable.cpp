// Kernels for any CPU: eight lanes of plain C++, which compilers turn into what there is.
#include "kernels_common.h"

namespace dart::portable {
namespace {
struct S {
  static constexpr int N = 8;
  static constexpr bool PAIRS = false;
  struct V { float x[N]; };
  static V all(float v) { V r; for (int i = 0; i < N; ++i) r.x[i] = v; return r; }
  static V zero() { return all(0); }
  static V load(const float* p) { V r; for (int i = 0; i < N; ++i) r.x[i] = p[i]; return r; }
  static V load(const bf16* p) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = from_bits(uint32_t(p[i]) << 16);
    return r;
  }
  static V fma(V a, V b, V c) { for (int i = 0; i < N; ++i) c.x[i] += a.x[i] * b.x[i]; return c; }
  static float sum(V a) { float s = 0; for (int i = 0; i < N; ++i) s += a.x[i]; return s; }
  static void store(float* p, V a) { for (int i = 0; i < N; ++i) p[i] = a.x[i]; }
  struct Levels { V low, high; };
  static Levels levels(const uint8_t* bytes) {
    Levels r;
    for (int i = 0; i < N; ++i) {
      r.low.x[i] = float(int(bytes[i] & 15) - 8);
      r.high.x[i] = float(int(bytes[i] >> 4) - 8);
    }
    return r;
  }
  static V pairs(const bf16*) { return zero(); }
  static V dot_bf16(V a, V, V) { return a; }
};
constexpr const char* NAME = "portable";
}  // namespace
#include "kernels_body.h"
}  // namespace dart::portable
