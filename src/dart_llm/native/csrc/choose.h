// The neurons of each token: the k strongest of those that it may choose.
#pragma once
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "team.h"

namespace dart {

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
    kernels.strongest(strength + m * ffn.kept, ffn.kept, copies.keep, own);
    for (int64_t i = 0; ffn.ids && i < copies.keep; ++i) own[i] = ffn.ids[own[i]];
  });
  team.finish();
  ffn.ids = chosen;
  ffn.kept = copies.keep;
}

// places: of the copies.keep strongest of the kept neurons, by their activations u [kept], ascending.
// strength: scratch, [kept]; places: room for as many.
inline void strongest_of(const Kernels& kernels, const Copies& copies, const Ffn& ffn, const float* u,
                         float* strength, int32_t* places) {
  for (int64_t i = 0; i < ffn.kept; ++i)
    strength[i] = std::fabs(u[i]) * copies.worth[ffn.ids ? ffn.ids[i] : i];
  kernels.strongest(strength, ffn.kept, copies.keep, places);
}

// As `choose`, by the activations of all that tokens choose out of: u [M, pitch], each row of which
// begins with those of the chosen from now on.  Call it when u is complete.
inline void choose_by_activations(Worker& team, const Kernels& kernels, const Copies& copies,
                                  int64_t count, Ffn& ffn, float* u, int64_t pitch, float* strength,
                                  int32_t* chosen) {
  team.in_parts(count, [&](int64_t m, int64_t) {
    int32_t* own = chosen + m * ffn.kept;
    float* of_row = u + m * pitch;
    strongest_of(kernels, copies, ffn, of_row, strength + m * ffn.kept, own);
    for (int64_t i = 0; i < copies.keep; ++i) {
      of_row[i] = of_row[own[i]];
      if (ffn.ids) own[i] = ffn.ids[own[i]];
    }
  });
  team.finish();
  ffn.ids = chosen;
  ffn.kept = copies.keep;
}

inline int64_t marked_bytes(int64_t width) { return (width + 7) / 8; }

// Sets bit i % 8 of byte i / 8 for each of the `count` ids, ascending, in bytes that are zero; nothing
// is written beyond the byte of the last.
inline void mark(const int32_t* ids, int64_t count, uint8_t* bits) {
  for (int64_t i = 0; i < count;) {
    uint32_t word = uint32_t(ids[i]) / 64, last = 0;
    uint64_t found = 0;
    // 64 neurons at a time stay in a register: one byte after the other waits for memory
    for (; i < count && uint32_t(ids[i]) / 64 == word; ++i)
      found |= uint64_t(1) << (last = uint32_t(ids[i]) % 64);
    for (uint32_t byte = 0; byte <= last / 8; ++byte) bits[8 * word + byte] = uint8_t(found >> 8 * byte);
  }
}

}  // namespace dart
