// The first of the largest of a token's logits, found by many members in pieces.
#pragma once
#include "kernels_common.h"

namespace dart {

// The largest of n values, more than none; a number that is none is larger than all others.
inline float largest(const float* values, int64_t n) {
  constexpr int64_t LANES = 64;
  auto larger = [](float a, float b) { return b > a || b != b ? b : a; };
  float lanes[LANES], top = values[0];
  std::fill_n(lanes, LANES, top);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t j = 0; j < LANES; ++j) lanes[j] = larger(lanes[j], values[i + j]);
  for (; i < n; ++i) top = larger(top, values[i]);
  for (float lane : lanes) top = larger(top, lane);
  return top;
}

// As in torch and numpy, NaN is larger than all other numbers.
struct Likeliest {
  float value = 0;
  int64_t index = -1;  // -1: nothing seen yet

  bool beaten_by(float other, int64_t at) const {
    if (index < 0) return true;
    if (std::isnan(value) || std::isnan(other))
      return std::isnan(other) && (!std::isnan(value) || at < index);
    return other > value || (other == value && at < index);
  }

  void see(const Likeliest& other) {
    if (other.index >= 0 && beaten_by(other.value, other.index)) *this = other;
  }

  // Looks at values[begin..end), compared as they are in `dtype`.
  void see(Dtype dtype, const float* values, int64_t begin, int64_t end) {
    if (begin == end) return;
    float top = rounded(dtype, largest(values + begin, end - begin));
    if (!beaten_by(top, begin)) return;
    int64_t at = begin;
    while (std::isnan(top) ? !std::isnan(values[at]) : rounded(dtype, values[at]) != top) ++at;
    if (beaten_by(top, at)) value = top, index = at;
  }

 private:
  static float rounded(Dtype dtype, float x) {
    if (dtype == Dtype::f32 || std::isnan(x)) return x;
    uint32_t bits = to_bits(x);
    return from_bits((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
  }
};

}  // namespace dart
