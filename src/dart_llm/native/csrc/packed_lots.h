// Products of packed matrices with many vectors: levels are unpacked once for all of them; included by
// packed_body.h.
//
// A panel is TILE outputs over some of the inputs: for every four of these the levels of one output
// after the other, four bytes each, and for every block the outputs' scales and what is added to a
// level times its scale.

constexpr int LOT = S::N == 16 ? 4 : 2;  // vectors whose sums, of WIDE vectors of outputs, fit into registers
constexpr int WIDE = 2;
constexpr int64_t BESIDE = WIDE * S::N;  // outputs at a time
constexpr int64_t SOME = 1024;           // inputs of a panel, at most: it stays near

// Rounds n floats to vector m.
void packed_round_lot(const float* from, int64_t n, const Lots& to, int64_t m) {
  int64_t lot = m / to.lot, own = m % to.lot, size = to.size;
  auto place = [&](int64_t each, int64_t i) { return (lot * (size / each) + i) * to.lot + own; };
  for (int64_t g = 0; g < size / GROUP; ++g) {
    float last[GROUP] = {};
    const float* values = from + g * GROUP;
    if ((g + 1) * GROUP > n) {
      if (g * GROUP < n) std::copy(values, from + n, last);
      values = last;
    }
    int8_t levels[GROUP];
    int halves[2];
    float scale = round_group(values, levels, halves);
    for (int64_t k = 0; k < GROUP / 4; ++k)
      std::memcpy(to.levels + 4 * place(4, g * GROUP / 4 + k), levels + 4 * k, 4);
    to.scales[place(GROUP, g)] = scale;
    int whole = halves[0] + halves[1];
    to.totals[0][place(GROUP, g)] = whole, to.sums[0][place(GROUP, g)] = scale * float(whole);
    for (int64_t half = 0; half < 2; ++half) {
      int64_t at = place(16, 2 * g + half);
      to.totals[1][at] = halves[half], to.sums[1][at] = scale * float(halves[half]);
    }
  }
}

// BESIDE outputs: where their levels, scales and offsets lie, those of each vector of outputs.
struct Panel {
  const uint8_t* levels[WIDE];
  const float *scales[WIDE], *offsets[WIDE];
};

// M vectors of a lot over some blocks: their levels, and their factors by blocks, `LOT` apart.
struct Given {
  const int8_t* levels;
  const float *scales, *sums;
  const int32_t* starts;  // what the products of a block begin at
};

// y[m], `stride` values apart, = of BESIDE outputs: the products of `blocks` blocks, and what was there
// unless it is the first that is added.
template <int BITS, int SIZE, bool OFFSETS, int M>
void panel_dots(const Panel& p, const Given& x, int64_t blocks, bool fresh, float* y, int64_t stride) {
  typename S::V sum[M][WIDE];
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < WIDE; ++t) sum[m][t] = fresh ? S::zero() : S::load(y + m * stride + t * S::N);
  for (int64_t b = 0; b < blocks; ++b) {
    typename S::W found[M][WIDE];
    for (int m = 0; m < M; ++m)
      for (int t = 0; t < WIDE; ++t) found[m][t] = S::whole(x.starts[b * LOT + m]);
#pragma GCC unroll 8
    for (int64_t four = 0; four < SIZE / 4; ++four) {
      int64_t at = b * (SIZE / 4) + four;
      typename S::B levels[WIDE];
      for (int t = 0; t < WIDE; ++t) levels[t] = S::bytes(p.levels[t] + at * 4 * TILE);
      for (int m = 0; m < M; ++m) {
        uint32_t given;
        std::memcpy(&given, x.levels + (at * LOT + m) * 4, 4);
        auto same = S::same(given);
        for (int t = 0; t < WIDE; ++t) found[m][t] = dot<BITS>(found[m][t], levels[t], same);
      }
    }
    for (int t = 0; t < WIDE; ++t) {
      auto scale = S::load(p.scales[t] + b * TILE);
      for (int m = 0; m < M; ++m) {
        auto of_x = S::all(x.scales[b * SIZE / GROUP * LOT + m]);
        sum[m][t] = S::fma(S::mul(S::to_float(found[m][t]), of_x), scale, sum[m][t]);
      }
      if (!OFFSETS) continue;
      auto offset = S::load(p.offsets[t] + b * TILE);
      for (int m = 0; m < M; ++m) sum[m][t] = S::fma(offset, S::all(x.sums[b * LOT + m]), sum[m][t]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < WIDE; ++t) S::store(y + m * stride + t * S::N, sum[m][t]);
}

template <int BITS, int SIZE, bool OFFSETS>
void lot_dots(const Panel& p, const Given& x, int64_t blocks, int64_t count, bool fresh, float* y,
              int64_t stride) {
  if (count == 1) panel_dots<BITS, SIZE, OFFSETS, 1>(p, x, blocks, fresh, y, stride);
  else if (count == 2) panel_dots<BITS, SIZE, OFFSETS, 2>(p, x, blocks, fresh, y, stride);
  else if constexpr (LOT > 2) {
    if (count == 3) panel_dots<BITS, SIZE, OFFSETS, 3>(p, x, blocks, fresh, y, stride);
    else panel_dots<BITS, SIZE, OFFSETS, 4>(p, x, blocks, fresh, y, stride);
  }
}

// y = or, unless it is `fresh`, += the products of a panel, which is `part`, with all vectors.
template <int BITS, int SIZE>
void add_panel(const Packed& p, const Panel& panel, const Lots& x, const Part& part, bool fresh, float* y,
               int64_t stride) {
  constexpr int64_t BLOCKS = UNIT / SIZE;
  int32_t starts[SOME / SIZE * LOT];
  int64_t blocks = (part.last - part.first) * BLOCKS, n = part.end - part.begin, which = SIZE == 16;
  for (int64_t first = 0; first < x.count; first += LOT) {
    // where the lot's fours, groups or blocks of some size begin
    auto at = [&](int64_t size) {
      return (first / LOT * (x.size / size) + part.first * (UNIT / size)) * LOT;
    };
    const int32_t* totals = x.totals[which] + at(SIZE);
    for (int64_t i = 0; i < blocks * LOT; ++i) starts[i] = bias_of<BITS>(p) * totals[i];
    Given given{x.levels + 4 * at(4), x.scales + at(GROUP), x.sums[which] + at(SIZE), starts};
    int64_t count = std::min<int64_t>(LOT, x.count - first), apart = stride;
    float last[LOT][BESIDE], *own = y + first * stride + part.begin, *to = own;
    if (n < BESIDE) {  // whole vectors are written
      for (int64_t m = 0; m < count && !fresh; ++m) std::copy_n(own + m * stride, n, last[m]);
      to = last[0], apart = BESIDE;
    }
    if (p.offsets.own) lot_dots<BITS, SIZE, true>(panel, given, blocks, count, fresh, to, apart);
    else lot_dots<BITS, SIZE, false>(panel, given, blocks, count, fresh, to, apart);
    for (int64_t m = 0; m < count && n < BESIDE; ++m) std::copy_n(last[m], n, own + m * stride);
  }
}

// COUNT panels beside each other, of up to LENGTH inputs.
template <int BITS, int SIZE, int64_t COUNT, int64_t LENGTH>
struct Panels {
  static constexpr int64_t BLOCKS = UNIT / SIZE;
  alignas(64) uint8_t levels[COUNT][LENGTH * TILE];
  alignas(64) float scales[COUNT][LENGTH / SIZE][TILE], offsets[COUNT][LENGTH / SIZE][TILE];
  const uint8_t* begin[COUNT];

  // Factors of panel `one`'s block b: N of them from place(i) on, whose supers are at above(i).
  template <class Place, class Above>
  void read_factors(const Packed& p, int64_t one, int64_t b, const Place& place, const Above& above) {
    for (int64_t i = 0; i < TILE; i += S::N) {
      S::store(scales[one][b] + i, factors_at(p.scales, place(i), above(i)));
      if (p.offsets.own) S::store(offsets[one][b] + i, factors_at(p.offsets, place(i), above(i)));
    }
  }

  static void write(uint8_t* to, const S::B& levels) { std::memcpy(to, &levels, S::BYTES); }

  // As panel `one`: a tile's rows, `units` units from `unit` on.
  void read_tile(const Packed& p, int64_t one, int64_t tile, int64_t unit, int64_t units) {
    const uint8_t* from = p.levels + tile * TILE * p.pitch + bytes_of(unit * TILE * UNIT, BITS);
    for (int64_t b = 0; b < units * BLOCKS; ++b) {
      int64_t at = (tile * p.each() + unit * BLOCKS + b) * TILE;
      int64_t super = (tile * p.supers_each() + (unit + b / BLOCKS) * UNIT / SUPER) * TILE;
      read_factors(p, one, b, [=](int64_t i) { return at + i; }, [=](int64_t i) { return super + i; });
    }
    begin[one] = BITS == 4 ? levels[one] : from;
    constexpr int64_t HALF = TILE * UNIT / 2;
    if (BITS == 4)
      for (int64_t u = 0; u < units; ++u)
        for (int64_t i = 0; i < HALF; i += S::BYTES) {
          auto both = S::bytes(from + u * HALF + i);
          write(levels[one] + u * 2 * HALF + i, S::low(both));
          write(levels[one] + (u * 2 + 1) * HALF + i, S::high(both));
        }
  }

  // As panel `one`: rows that lie on their own, from `row` on.
  void read_rows(const Packed& p, int64_t one, int64_t row, int64_t unit, int64_t units) {
    begin[one] = levels[one];
    for (int64_t r = 0; r < TILE; ++r) {  // rows that are none are the last one again
      int64_t own = std::min(row + r, p.rows - 1);
      row_factors_to(p, p.scales, own, unit, units, scales[one][0] + r);
      if (p.offsets.own) row_factors_to(p, p.offsets, own, unit, units, offsets[one][0] + r);
    }
    for (int64_t u = 0; u < units; ++u)
      for (int64_t r = 0; r < TILE; r += 4) {
        uint8_t places[4][UNIT], rotary[4][16];
        for (int64_t i = 0; i < 4; ++i)
          levels_by_place<BITS>(p, std::min(row + r + i, p.rows - 1), unit + u, places[i]);
        for (int64_t k = 0; k < 4; ++k) {
          transpose_fours(places[0] + 16 * k, UNIT, rotary[0], 16);
          for (int64_t i = 0; i < 4; ++i) {
            int64_t four = u * UNIT / 4 + 4 * quarter_place(i) + k;  // whose place is 4 k + i: see four_of
            std::memcpy(levels[one] + (four * TILE + r) * 4, rotary[i], 16);
          }
        }
      }
  }

  static void row_factors_to(const Packed& p, const Factors& f, int64_t row, int64_t unit, int64_t units,
                             float* to) {
    int64_t first = unit * BLOCKS, count = units * BLOCKS;
    for (int64_t b = 0; b < count; b += S::N) {
      float some[S::N];
      S::store(some, row_factors<SIZE>(p, f, row, first + b, count - b));
      for (int64_t i = 0; i < S::N && b + i < count; ++i) {
        int64_t block = SIZE == 16 ? (b + i) / 4 * 4 + quarter_place((b + i) % 4) : b + i;
        to[block * TILE] = some[i];
      }
    }
  }

  // y = or, unless it is `fresh`, += the products of what was read, which is `part`.
  void add(const Packed& p, const Lots& x, const Part& part, bool fresh, float* y, int64_t stride) const {
    for (int64_t i = part.begin; i < part.end; i += BESIDE) {
      Panel panel;
      for (int64_t t = 0; t < WIDE; ++t) {
        int64_t at = i - part.begin + t * S::N, one = at / TILE, lane = at % TILE;
        panel.levels[t] = begin[one] + 4 * lane;
        panel.scales[t] = scales[one][0] + lane, panel.offsets[t] = offsets[one][0] + lane;
      }
      add_panel<BITS, SIZE>(p, panel, x, {i, std::min(i + BESIDE, part.end), part.first, part.last}, fresh, y,
                            stride);
    }
  }
};

template <int BITS, int SIZE>
void rows_of_lots(const Packed& p, const Lots& x, Part part, float* y, int64_t stride) {
  constexpr int64_t TILES = BESIDE < TILE ? 1 : BESIDE / TILE;
  Panels<BITS, SIZE, TILES, SOME> panels;
  for (int64_t row = part.begin; row < part.end; row += TILES * TILE)
    for (int64_t unit = part.first, units; unit < part.last; unit += units) {
      units = std::min(part.last - unit, SOME / UNIT);
      for (int64_t t = 0; t < TILES; ++t) {
        int64_t tile = std::min(row / TILE + t, (part.end - 1) / TILE);  // a last one stands beside itself
        if (p.order == Order::tiles) panels.read_tile(p, t, tile, unit, units);
        else panels.read_rows(p, t, tile * TILE, unit, units);
      }
      panels.add(p, x, {row, std::min(row + TILES * TILE, part.end), unit, unit + units}, unit == part.first,
                 y, stride);
    }
}

void packed_lots(const Packed& p, const Lots& x, const Part& part, float* y, int64_t stride) {
  by_levels(p, [&](auto bits, auto size) { rows_of_lots<bits, size>(p, x, part, y, stride); });
}
