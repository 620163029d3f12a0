// The scores of a screened head as an operator; inside a step the decoder gives them.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "screen.h"

namespace dart {

// Of a head [V, D]: basis [D, D] float32; levels [V / RUN, D, RUN / 2] uint8 and by [V in whole runs]
// float32, see Directions; `keep` of them are read.  Whoever reads it keeps these alive.
Screen read_screen(const at::Tensor& basis, const at::Tensor& levels, const at::Tensor& by, int64_t keep,
                   double threshold, int64_t words, int64_t hidden);

// Adds the operator.
void register_head(torch::Library&);

}  // namespace dart
