// The neurons of each token: the k strongest of those that it may choose.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace dart {

// The k largest of n values that are not negative, as ascending places.
// Ties go to the lower place; not-a-number is the largest, as torch sorts.  places: room for n.
inline void strongest(const float* values, int64_t n, int64_t k, int32_t* places) {
  // such floats are ordered as their bits are: count by the upper ones, sort where the cut falls
  constexpr int BITS = 12;
  auto bits = [&](int64_t i) {
    uint32_t b;
    std::memcpy(&b, values + i, 4);
    return std::min(b & 0x7fffffffu, 0x7f800001u);  // one kind of not-a-number: they tie too
  };
  thread_local std::array<int32_t, 1 << BITS> counts;
  counts.fill(0);
  for (int64_t i = 0; i < n; ++i) ++counts[bits(i) >> (31 - BITS)];
  int64_t above = 0, bin = int64_t(counts.size()) - 1;
  while (bin > 0 && above + counts[bin] < k) above += counts[bin--];
  thread_local std::vector<int32_t> edge;
  edge.clear();
  for (int64_t i = 0; i < n; ++i)
    if (int64_t(bits(i) >> (31 - BITS)) == bin) edge.push_back(int32_t(i));
  int64_t rest = std::min<int64_t>(k - above, int64_t(edge.size()));
  std::nth_element(edge.begin(), edge.begin() + rest, edge.end(), [&](int32_t a, int32_t b) {
    return bits(a) != bits(b) ? bits(a) > bits(b) : a < b;
  });
  edge.resize(rest);
  std::sort(edge.begin(), edge.end());
  int64_t next = 0, count = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t at = bits(i) >> (31 - BITS);
    bool cut = next < rest && edge[next] == i;
    next += cut;
    if (at > bin || cut) places[count++] = int32_t(i);
  }
}

// From now on `ffn` keeps what the first token chooses out of its neurons, and token m those `kept`
// ids further on: estimates in parts, then one choice for each token.  Every member calls it, with
// its own `ffn`; strength, chosen: [M, kept].
inline void choose(Worker& team, const Kernels& kernels, Dtype dtype, const Copies& copies,
                   const Input& x, Ffn& ffn, float* strength, int32_t* chosen) {
  team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
    Span own = part(ffn.kept, one, parts);
    for (int64_t m = 0; m < x.count; ++m)
      kernels.estimate(dtype, copies, ffn, one_of(dtype, x, m), own.begin, own.end,
                       strength + m * ffn.kept);
  });
  team.finish();
  team.in_parts(x.count, [&](int64_t m, int64_t) {
    int32_t* own = chosen + m * ffn.kept;
    strongest(strength + m * ffn.kept, ffn.kept, copies.keep, own);
    for (int64_t i = 0; ffn.ids && i < copies.keep; ++i) own[i] = ffn.ids[own[i]];
  });
  team.finish();
  ffn.ids = chosen;
  ffn.kept = copies.keep;
}

}  // namespace dart
