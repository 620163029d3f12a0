// The kept neurons of a packed FFN, for one token: their activations, then what they give.
#pragma once
#include <algorithm>

#include "kernels.h"
#include "select.h"

namespace dart {

constexpr int64_t MOST = 32 * GROUP;  // neurons whose activations are worked on at a time

// u[begin..end) = activations of kept neurons; all of them are there before packed_output runs.
inline void packed_hidden(const Kernels& kernels, Dtype dtype, const Ffn& f, const Rounded& x, int64_t begin,
                          int64_t end, float* u) {
  for (int64_t n; begin < end; begin += n) {
    n = std::min(end - begin, MOST);
    float gate[MOST], up[MOST];
    const int32_t* ids = f.ids ? f.ids + begin : nullptr;
    const int32_t* rows = f.packed_up->kept ? nullptr : ids;  // of the matrices
    auto add = [&](const void* bias, float* to) {
      if (!bias) return;
      if (ids) kernels.add_at(dtype, bias, ids, n, to);
      else kernels.add(dtype, bias, begin, begin + n, to);
    };
    kernels.packed.dots(*f.packed_up, x, rows, begin, n, up);
    add(f.up_bias, up);
    if (f.packed_gate) {
      kernels.packed.dots(*f.packed_gate, x, rows, begin, n, gate);
      add(f.gate_bias, gate);
    }
    int64_t whole = (n + GROUP - 1) / GROUP * GROUP;
    std::fill(up + n, up + whole, 0.0f), std::fill(gate + n, gate + whole, 0.0f);
    kernels.packed.activate(f.act, f.packed_gate ? gate : nullptr, up, n);
    std::copy_n(up, n, u + begin);
  }
}

// u[place] = activations of those neurons that a token selects among candidates begin to end.
inline void packed_hidden_of(const Kernels& kernels, Dtype dtype, Ffn f, const Chosen& chosen,
                             const Rounded& x, int64_t begin, int64_t end, float* u) {
  for (int64_t n; begin < end; begin += n) {
    n = std::min(end - begin, MOST);
    int32_t ids[MOST];
    float found[MOST];
    Ffn own = f;
    own.ids = ids, own.kept = selected_ids(f, chosen, begin, begin + n, ids);
    packed_hidden(kernels, dtype, own, x, 0, own.kept, found);
    for (int64_t i = 0, next = 0; i < n && next < own.kept; ++i)
      if (chosen.takes(begin + i)) u[begin + i] = found[next++];
  }
}

// Whether a down projection's rows are outputs, not neurons.
inline bool by_outputs(const Ffn& f) { return f.packed_down && f.packed_down->order != Order::neurons; }

// What such a down projection is given, columns begin to end of to [columns]: the activations u of a
// token's kept neurons, of which it may have `chosen` some, and 0 for the others.
inline void down_input(const Kernels& kernels, const Ffn& f, const Chosen* chosen, const float* u,
                       int64_t begin, int64_t end, float* to) {
  const Packed& down = *f.packed_down;
  if (!f.ids) {
    if (chosen) kernels.select(u, f.mean, chosen->strength, chosen->cut, begin, end, to);
    else std::copy(u + begin, u + end, to + begin);
    return;
  }
  const int32_t* places = down.kept ? down.places : f.ids;  // ascending
  std::fill(to + begin, to + end, 0.0f);
  for (int64_t i = std::lower_bound(places, places + f.kept, begin) - places; i < f.kept && places[i] < end;
       ++i) {
    float own = f.mean ? u[i] - f.mean[f.ids[i]] : u[i];
    to[places[i]] = !chosen || chosen->takes(i) ? own : 0.0f;
  }
}

// sums[:] += the output of kept neurons begin to end (whole units), of which a token may have `chosen`
// some.  Neurons of one block are rounded together, wherever work is divided: those at an end of the span
// belong to whoever has the block's first.
inline void packed_output(const Kernels& kernels, const Ffn& f, const Chosen* chosen, const float* u,
                          int64_t begin, int64_t end, float* sums) {
  int64_t block = f.packed_down->block;
  auto id = [&](int64_t place) { return f.ids ? int64_t(f.ids[place]) : place; };
  auto first_of_block = [&](int64_t place) {
    while (place > 0 && place < f.kept && id(place) / block == id(place - 1) / block) ++place;
    return place;
  };
  begin = first_of_block(begin), end = first_of_block(end);
  for (int64_t n; begin < end; begin += n) {
    n = std::min(end, first_of_block(std::min(end, begin + MOST - GROUP + 1))) - begin;
    int32_t ids[MOST];
    float own[MOST];
    for (int64_t i = 0; i < n; ++i) ids[i] = int32_t(id(begin + i)), own[i] = u[begin + i];
    for (int64_t i = 0; i < n && f.mean; ++i) own[i] -= f.mean[ids[i]];
    int64_t count = chosen ? chosen->apply(begin, n, ids, own) : n;
    kernels.packed.add_neurons(*f.packed_down, ids, own, count, sums);
  }
}

}  // namespace dart
