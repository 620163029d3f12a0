// The kept neurons of a packed FFN, for one token.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace dart {

// sums[:] += the output of kept neurons begin to end (whole units); u[begin..end) if not null;
// whole: as many int32 of scratch as there are sums.  Neurons of one block are rounded together,
// wherever work is divided: those at an end of the span belong to whoever has the block's first.
inline void packed_ffn(const Kernels& kernels, Dtype dtype, const Ffn& f, const Input& x, int64_t begin,
                       int64_t end, float* sums, float* u, int32_t* whole) {
  int64_t block = f.packed_down->block;
  auto id = [&](int64_t place) { return f.ids ? int64_t(f.ids[place]) : place; };
  auto first_of_block = [&](int64_t place) {
    while (place > 0 && place < f.kept && id(place) / block == id(place - 1) / block) ++place;
    return place;
  };
  begin = first_of_block(begin), end = first_of_block(end);
  constexpr int64_t MOST = 4 * GROUP;
  for (int64_t n; begin < end; begin += n) {
    n = std::min(end, first_of_block(std::min(end, begin + MOST - GROUP + 1))) - begin;
    int32_t ids[MOST];
    float gate[MOST], up[MOST];
    for (int64_t i = 0; i < n; ++i) ids[i] = int32_t(id(begin + i));
    std::fill(up + n, up + (n + GROUP - 1) / GROUP * GROUP, 0.0f);
    std::fill(gate + n, gate + (n + GROUP - 1) / GROUP * GROUP, 0.0f);
    kernels.packed.dots(*f.packed_up, x.rounded, ids, 0, n, up);
    if (f.up_bias) kernels.add_at(dtype, f.up_bias, ids, n, up);
    if (f.packed_gate) {
      kernels.packed.dots(*f.packed_gate, x.rounded, ids, 0, n, gate);
      if (f.gate_bias) kernels.add_at(dtype, f.gate_bias, ids, n, gate);
    }
    kernels.packed.activate(f.act, f.packed_gate ? gate : nullptr, up, n);
    for (int64_t i = 0; i < n; ++i) {
      if (u) u[begin + i] = up[i];
      if (f.mean) up[i] -= f.mean[ids[i]];
    }
    kernels.packed.add_neurons(*f.packed_down, ids, up, n, sums, whole);
  }
}

}  // namespace dart
