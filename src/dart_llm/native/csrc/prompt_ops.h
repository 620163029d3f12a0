// Many tokens at once through a decoder whose matrices are all packed, a layer at a time.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "prompt.h"

namespace dart {

// Texts of T tokens each that begin with them; M = B T rows, those of one text one after the other.
struct Prompt {
  const Decoder& decoder;
  at::ScalarType type;         // of the weights
  int64_t few;                 // vectors up to which a product runs on the blocks
  int64_t texts, tokens;       // B, T
  const float *cosine, *sine;  // [T, tables, R]
  int64_t angles;              // tables R

  // The stream [M, D] float32 before the first layer, and what this layer is given: the stream normed,
  // in the weights' dtype.  ids: [B, T] int64.
  std::vector<at::Tensor> begin(const at::Tensor& ids) const;
  // Takes the stream through a layer.  Returns keys and values [B, K, T, S], activations [B, T, I], the
  // FFN's input [B, T, D], and what the next layer is given, or after the last one the head.
  std::vector<at::Tensor> layer(int64_t index, const at::Tensor& stream, const at::Tensor& given) const;
  // The same of layers `first` to `last` by products on the blocks; `given` [M, D] float32 is changed.
  // Returns keys and values of each layer and, if `observed` is 1, activations of all [L, B, T, I]; if 2,
  // inputs [L, B, T, D] too.
  std::vector<at::Tensor> layers(int64_t first, int64_t last, const at::Tensor& stream,
                                 const at::Tensor& given, int64_t observed, PromptRoom& room) const;
  // Logits [B, n, V] of the last `keep` tokens (0: of all), and what the head is given, [B, T, D].
  std::vector<at::Tensor> end(const at::Tensor& given, int64_t keep) const;
};

}  // namespace dart
