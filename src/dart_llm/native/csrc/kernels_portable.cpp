// Kernels for any CPU: eight lanes of plain C++, which compilers turn into what there is.
#include "kernels_common.h"

namespace dart::portable {
namespace {
struct S {
  static constexpr int64_t FEW = 16;
  static constexpr int N = 8;
  static constexpr bool PAIRS = false;
  struct V {
    float x[N];
  };
  static V all(float v) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = v;
    return r;
  }
  static V zero() { return all(0); }
  static V load(const float* p) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = p[i];
    return r;
  }
  static V load(const bf16* p) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = from_bits(uint32_t(p[i]) << 16);
    return r;
  }
  static V fma(V a, V b, V c) {
    for (int i = 0; i < N; ++i) c.x[i] += a.x[i] * b.x[i];
    return c;
  }
  static float sum(V a) {
    float s = 0;
    for (int i = 0; i < N; ++i) s += a.x[i];
    return s;
  }
  static void sums(const V* four, float* to) {
    for (int i = 0; i < 4; ++i) to[i] = sum(four[i]);
  }
  static void store(float* p, V a) {
    for (int i = 0; i < N; ++i) p[i] = a.x[i];
  }
  static void store(bf16* p, V a) {
    for (int i = 0; i < N; ++i) {
      uint32_t bits = to_bits(a.x[i]);
      p[i] = bf16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
  }
  struct Levels {
    V low, high;
  };
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

  // Asks for a line of memory.
  static void ask(const uint8_t* p) { __builtin_prefetch(p); }

  // For packed matrices: see packed_body.h.
  static constexpr int64_t BYTES = 32;
  struct B {
    uint8_t x[BYTES];
  };
  struct W {
    int32_t x[N];
  };
  static V add(V a, V b) {
    for (int i = 0; i < N; ++i) a.x[i] += b.x[i];
    return a;
  }
  static V mul(V a, V b) {
    for (int i = 0; i < N; ++i) a.x[i] *= b.x[i];
    return a;
  }
  static B bytes(const void* p) {
    B r;
    std::memcpy(r.x, p, BYTES);
    return r;
  }
  static B same(uint32_t four) {
    B r;
    for (int i = 0; i < N; ++i) std::memcpy(r.x + 4 * i, &four, 4);
    return r;
  }
  static B low(B both) {
    for (uint8_t& x : both.x) x &= 15;
    return both;
  }
  static B high(B both) {
    for (uint8_t& x : both.x) x >>= 4;
    return both;
  }
  static B last(const uint8_t* p, int64_t column) { return column ? high(bytes(p)) : low(bytes(p)); }
  static W whole(int x) {
    W r;
    for (int32_t& one : r.x) one = x;
    return r;
  }
  static V to_float(W x) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = float(x.x[i]);
    return r;
  }
  static constexpr int TAKEN = 0;
  static W dot8(W to, B levels, B x) {
    for (int i = 0; i < BYTES; ++i) to.x[i / 4] += int(levels.x[i]) * int(int8_t(x.x[i]));
    return to;
  }
  static W dot6(W to, B levels, B x) { return dot8(to, levels, x); }
  static W add_pairs(W to, B levels, B x) { return dot8(to, levels, x); }
  static W sum_pairs(W sums) { return sums; }
  static W add(W a, W b) {
    for (int i = 0; i < N; ++i) a.x[i] += b.x[i];
    return a;
  }
  static V level(const uint8_t* p) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = p[i];
    return r;
  }
  static V half(const uint16_t* p, int64_t n) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = i < n ? half_to_float(p[i]) : 0;
    return r;
  }
  static V small(const int8_t* p, int64_t n) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = i < n ? float(p[i]) : 0;
    return r;
  }
  template <int SIZE>
  static V spread(const float* p) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = p[i % (UNIT / SIZE)];
    return r;
  }
  static V sub(V a, V b) {
    for (int i = 0; i < N; ++i) a.x[i] -= b.x[i];
    return a;
  }
  static V div(V a, V b) {
    for (int i = 0; i < N; ++i) a.x[i] /= b.x[i];
    return a;
  }
  static V max(V a, V b) {
    for (int i = 0; i < N; ++i) a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    return a;
  }
  static V min(V a, V b) {
    for (int i = 0; i < N; ++i) a.x[i] = a.x[i] < b.x[i] ? a.x[i] : b.x[i];
    return a;
  }
  static W max(W a, W b) {
    for (int i = 0; i < N; ++i) a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    return a;
  }
  static W magnitude(V a) {  // bits
    W r;
    for (int i = 0; i < N; ++i) {
      float x = std::fabs(a.x[i]);
      std::memcpy(&r.x[i], &x, 4);
    }
    return r;
  }
  static int largest(W a) {
    int32_t m = a.x[0];
    for (int32_t x : a.x) m = x > m ? x : m;
    return m;
  }
  static float largest(V a) {
    float m = a.x[0];
    for (float x : a.x) m = x > m ? x : m;
    return m;
  }
  static W nearest(V a) {
    W r;
    for (int i = 0; i < N; ++i) r.x[i] = int32_t(std::lrint(a.x[i]));
    return r;
  }
  static int sum_of(W a) {
    int s = 0;
    for (int32_t x : a.x) s += x;
    return s;
  }
  static void store_small(int8_t* p, W a) {
    for (int i = 0; i < N; ++i) p[i] = int8_t(a.x[i]);
  }
  static V power_of_two(W a) {
    V r;
    for (int i = 0; i < N; ++i) r.x[i] = from_bits(uint32_t(a.x[i] + 127) << 23);
    return r;
  }
  static void interleave(const B* r, B* to) {
    for (int place = 0; place < BYTES; ++place)
      for (int row = 0; row < 4; ++row)
        to[place / 4 % 4].x[place / 16 * 16 + place % 4 * 4 + row] = r[row].x[place];
  }
};
constexpr const char* NAME = "portable";
}  // namespace
#include "kernels_body.h"
}  // namespace dart::portable
