// What the drivers share: random values, and values as a dtype holds them.
#pragma once
#include <random>
#include <vector>

#include "kernels.h"

namespace {

using namespace dart;

std::mt19937 generator(7);
const char* const KINDS[] = {"avx512bf16", "avx512", "avxvnni", "avx2", "neon", "portable"};

std::vector<float> drawn(int64_t n, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(n);
  for (float& x : values) x = normal(generator);
  return values;
}

// Values as a dtype holds them: the bytes, and the same as float.
struct Held {
  std::vector<char> bytes;
  std::vector<float> wide;
};

Held hold(Dtype dtype, std::vector<float> values) {
  const Kernels& plain = *kernels("portable");
  Held held{std::vector<char>(values.size() * (dtype == Dtype::f32 ? 4 : 2)), values};
  plain.round(dtype, values.data(), held.bytes.data(), int64_t(values.size()));
  plain.widen(dtype, held.bytes.data(), held.wide.data(), int64_t(values.size()));
  return held;
}

}  // namespace
