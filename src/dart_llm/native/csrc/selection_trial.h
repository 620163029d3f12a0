// What decides whether per-token selection skips the others' down rows: both ways are tried.
#pragma once
#include <random>
#include <vector>

#include "packed_ffn.h"
#include "packed_ops.h"

namespace dart {

// A down projection times the activations that a token selected, as a step does it (decode.cpp).
struct SelectionTrial {
  SelectionTrial(const Kernels& kernels_, int64_t width, int64_t hidden, double share_)
      : kernels(kernels_),
        share(share_),
        u(size_t(width)),
        sums(size_t(PARTS * hidden)),
        rounded(kernels, u.data(), 1, width) {
    std::minstd_rand random(1);
    for (float& one : u) one = float(random() % 65536 + 1);
  }

  // What a member works with, for activations [width] of padded size.
  struct Room {
    explicit Room(int64_t width)
        : orders(size_t(width)),
          levels(size_t((width + UNIT - 1) / UNIT * UNIT)),
          sums(size_t(2 * Rounded::facts(int64_t(levels.size())))) {}
    std::vector<int32_t> orders;
    std::vector<int8_t> levels;
    std::vector<float> sums;
  };

  // One member's share of it; a room for at least its width.
  void run(Worker& team, const Packed& down, bool skip, Room& room) {
    Ffn f{};
    f.packed_down = &down, f.kept = skip ? down.rows : down.columns;
    Proxies own{};
    own.skip = skip, own.keep = std::max<int64_t>(1, int64_t(share * double(f.kept)));
    Once chosen([&] { return chosen_of(kernels, own, 1, f.kept, u.data(), room.orders.data()); });
    if (skip) by_neurons(team, f, chosen);
    else by_outputs(team, f, chosen, room);
  }

  template <class Selections>
  void by_neurons(Worker& team, const Ffn& f, Selections& chosen) {
    int64_t hidden = f.packed_down->units() * UNIT;
    team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
      Span own = part(f.kept, one, parts, GROUP);
      float* to = sums.data() + one * hidden;
      std::fill_n(to, hidden, 0.0f);
      packed_output(kernels, f, &chosen()[0], u.data(), own.begin, own.end, to);
    });
    team.finish();
    team.in_parts(FEW_PARTS, [&](int64_t one, int64_t parts) {
      Span own = part(hidden, one, parts);
      for (int64_t part = 1; part < PARTS; ++part)
        for (int64_t i = own.begin; i < own.end; ++i) sums[size_t(i)] += sums[size_t(part * hidden + i)];
    });
    team.finish();
  }

  // Activations are rounded before: in a step by who computes them.
  template <class Selections>
  void by_outputs(Worker& team, const Ffn& f, Selections& chosen, Room& room) {
    Once given([&] {
      kernels.packed.mask(rounded.levels.data(), rounded.scales.data(), u.data(), chosen()[0].cut, f.kept,
                          room.levels.data(), room.sums.data());
      return Rounded{room.levels.data(), rounded.scales.data(), room.sums.data(), 1, rounded.size};
    });
    team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
      Span own = part(f.packed_down->rows, one, parts, TILE);
      kernels.packed.matvec(*f.packed_down, given(), own.begin, own.end, sums.data(), 0);
    });
    team.finish();
  }

  const Kernels& kernels;
  double share;
  std::vector<float> u, sums;
  RoundedRows rounded;
};

}  // namespace dart
