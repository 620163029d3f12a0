// The scores of a screened head: rough ones of all words, exact ones of those near the best.
#pragma once
#include <torch/library.h>

namespace dart {

// Adds the operator.
void register_head(torch::Library&);

}  // namespace dart
