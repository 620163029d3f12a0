// Many tokens at once through a decoder whose matrices are all packed, by products on the blocks.
#pragma once
#include <vector>

#include "decode.h"

namespace dart {

// Room for `count` vectors of `columns` values, rounded for products of many.
struct RoundedLots {
  RoundedLots(const Kernels&, int64_t count, int64_t columns);

  std::vector<int8_t> levels;
  std::vector<float> factors;
  std::vector<int32_t> totals;
  Lots view;
};

// A product of a packed matrix and many vectors: what of it is done at a time does not depend on the
// number of members.
struct LotsProduct {
  explicit LotsProduct(const Packed&);

  const Packed* matrix;
  int64_t outputs, parts;
  // Part `index` of the outputs; rows of y `stride` apart.
  void run(const Kernels&, const Lots& x, int64_t index, float* y, int64_t stride) const;
};

// Texts of T tokens each that begin with them; M = B T rows, those of one text one after the other.
struct Text {
  int64_t texts, tokens;       // B, T
  const float *cosine, *sine;  // [T, angles]
  int64_t angles;              // tables R
  int64_t rows() const { return texts * tokens; }
};

// Where a layer leaves what others want of it, in the weights' dtype; null: nobody does.
struct Left {
  void *keys, *values;  // [B, K, T, S]
  void *u, *h;          // [M, I] and [M, D]: activations, and the FFN's input
};

// What a prompt is worked on in, from its first layer to its last; all float32.
struct PromptRoom {
  PromptRoom(const Kernels&, const Decoder&, const Text&, int64_t layers, int64_t threads);

  Jobs jobs;                         // begin() them before the members begin
  int64_t qkv_pitch, width;          // values from one row to the next
  RoundedLots given, mixed, active;  // what projections, the output projection and `down` are given
  std::vector<float> qkv, attended;  // [M, qkv_pitch], [M, H S]
  std::vector<float> keys, values;   // [B K, S, T], [B K, T, S], of whole lanes
  std::vector<float> scores;         // by member
  std::vector<float> gate, up;       // [M, width]
  std::vector<float> sums;           // [M, D]
  std::vector<float> h;              // [M, D]: the FFN's input where it reads what attention read
  std::vector<float> lines;          // by member: a row
  int64_t line, score, threads;
};

// Runs one member's share of layers `first` to `last` on the stream [M, D] float32; all members call it.
// normed [M, D]: what layer `first` is given, then what layer `last` or the head is.  left: of each.
void prompt_layers(const Kernels&, const Decoder&, const Text&, int64_t first, int64_t last, float* stream,
                   float* normed, const Left* left, PromptRoom&, int64_t member);

}  // namespace dart
