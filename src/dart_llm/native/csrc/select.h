// Per-token selection: the k neurons of the largest estimated contribution.
#pragma once
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "team.h"

namespace dart {

// From now on `ffn` keeps what the first token selects out of its neurons, and token m those `kept`
// ids further on: estimates in parts, then one choice for each token.  Every member calls it, with
// its own `ffn`; input(): the M tokens; strength, selected: [M, kept].
template <class MakeInput>
void select(Worker& team, const Kernels& kernels, Dtype dtype, const Proxies& proxies, MakeInput& input,
            int64_t count, Ffn& ffn, float* strength, int32_t* selected) {
  team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
    Span own = part(ffn.kept, one, parts);
    const Input& x = input();
    for (int64_t m = 0; m < count; ++m)
      kernels.estimate(dtype, proxies, ffn, one_of(dtype, x, m), own.begin, own.end, strength + m * ffn.kept);
  });
  team.finish();
  team.in_parts(count, [&](int64_t m, int64_t) {
    int32_t* own = selected + m * ffn.kept;
    kernels.top_k(strength + m * ffn.kept, ffn.kept, proxies.keep, own);
    for (int64_t i = 0; ffn.ids && i < proxies.keep; ++i) own[i] = ffn.ids[own[i]];
  });
  team.finish();
  ffn.ids = selected;
  ffn.kept = proxies.keep;
}

// places: of the `keep` candidates that contribute most by their activations u [kept], ascending.
// strength: scratch, [kept]; places: room for as many.
inline void top_k_of(const Kernels& kernels, const Proxies& proxies, const Ffn& ffn, const float* u,
                     float* strength, int32_t* places) {
  for (int64_t i = 0; i < ffn.kept; ++i)
    strength[i] = std::fabs(u[i]) * proxies.saliency[ffn.ids ? ffn.ids[i] : i];
  kernels.top_k(strength, ffn.kept, proxies.keep, places);
}

// As `select`, by the exact activations of all candidate neurons: u [M, pitch], each row of which
// begins with those of the selected from now on.  Call it when u is complete.
inline void select_by_activations(Worker& team, const Kernels& kernels, const Proxies& proxies, int64_t count,
                                  Ffn& ffn, float* u, int64_t pitch, float* strength, int32_t* selected) {
  team.in_parts(count, [&](int64_t m, int64_t) {
    int32_t* own = selected + m * ffn.kept;
    float* of_row = u + m * pitch;
    top_k_of(kernels, proxies, ffn, of_row, strength + m * ffn.kept, own);
    for (int64_t i = 0; i < proxies.keep; ++i) {
      of_row[i] = of_row[own[i]];
      if (ffn.ids) own[i] = ffn.ids[own[i]];
    }
  });
  team.finish();
  ffn.ids = selected;
  ffn.kept = proxies.keep;
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
