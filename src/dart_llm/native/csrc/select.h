// Per-token selection: the k neurons of the largest estimated contribution.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace dart {

// What one token selects out of an FFN's candidates, known by their strengths [kept].
struct Chosen {
  Cut cut;
  const float* strength;
  bool skip;  // whether the down rows of the others are skipped, or read and multiplied by 0

  bool takes(int64_t place) const { return cut.takes(strength[place], int32_t(place)); }

  // Of n candidates from `begin` on, with their activations u: takes the others out, or sets them to 0.
  // Returns how many are left.
  int64_t apply(int64_t begin, int64_t n, int32_t* ids, float* u) const {
    if (!skip) {
      for (int64_t i = 0; i < n; ++i) u[i] = takes(begin + i) ? u[i] : 0.0f;
      return n;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {  // without a branch: nobody could foretell it
      ids[count] = ids[i], u[count] = u[i];
      count += takes(begin + i);
    }
    return count;
  }
};

// strength [M, kept] of all candidates by the proxies; every member calls it.  input(): the M tokens.
template <class MakeInput>
void estimate_strengths(Worker& team, const Kernels& kernels, Dtype dtype, const Proxies& proxies,
                        const Ffn& ffn, MakeInput& input, float* strength) {
  team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
    Span own = part(ffn.kept, one, parts);
    const Input& x = input();
    for (int64_t m = 0; m < x.count; ++m)
      kernels.estimate(dtype, proxies, ffn, one_of(dtype, x, m), own.begin, own.end, strength + m * ffn.kept);
  });
  team.finish();
}

// The selections of `count` tokens; every member makes its own from strengths [count, kept] that are
// complete, which costs less than to wait for one that makes it for all.  orders: scratch, [kept].
inline std::vector<Chosen> chosen_of(const Kernels& kernels, const Proxies& proxies, int64_t count,
                                     int64_t kept, const float* strength, int32_t* orders) {
  std::vector<Chosen> found;
  for (int64_t m = 0; m < count; ++m, strength += kept)
    found.push_back({kernels.cut(strength, kept, proxies.keep, orders), strength, proxies.skip});
  return found;
}

// ids: of the selected ones among candidates begin to end of `ffn`, ascending; returns their number.
inline int64_t selected_ids(const Ffn& ffn, const Chosen& chosen, int64_t begin, int64_t end, int32_t* ids) {
  int64_t count = 0;
  for (int64_t place = begin; place < end; ++place) {
    ids[count] = ffn.ids ? ffn.ids[place] : int32_t(place);
    count += chosen.takes(place);
  }
  return count;
}

// strength[place] by the exact activations u[place] of candidates begin to end.
inline void strengths_of(const Proxies& proxies, const Ffn& ffn, const float* u, int64_t begin, int64_t end,
                         float* strength) {
  if (ffn.ids)
    for (int64_t i = begin; i < end; ++i) strength[i] = std::fabs(u[i]) * proxies.saliency[ffn.ids[i]];
  else
    for (int64_t i = begin; i < end; ++i) strength[i] = std::fabs(u[i]) * proxies.saliency[i];
}

inline int64_t marked_bytes(int64_t width) { return (width + 7) / 8; }

// Sets bit i % 8 of byte i / 8 for each selected neuron i, in bytes that are zero.
inline void mark(const int32_t* ids, int64_t kept, const Chosen& chosen, uint8_t* bits) {
  int64_t place = 0;
  for (; !ids && place + 8 <= kept; place += 8) {
    uint8_t found = 0;
    for (int64_t i = 0; i < 8; ++i) found |= uint8_t(chosen.takes(place + i) << i);
    bits[place / 8] = found;
  }
  for (int64_t next; place < kept; place = next) {
    int64_t byte = (ids ? ids[place] : place) / 8;
    uint8_t found = 0;  // a byte at a time: one bit after the other would wait for memory
    for (next = place; next < kept; ++next) {
      int64_t id = ids ? ids[next] : next;
      if (id / 8 != byte) break;
      found |= uint8_t(chosen.takes(next) << id % 8);
    }
    bits[byte] = found;
  }
}

}  // namespace dart
