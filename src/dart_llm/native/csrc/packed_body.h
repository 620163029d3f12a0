// Kernels of packed matrices, written once over the set of vectors `S` of one CPU kind; included by
// kernels_*.cpp after kernels_body.h.
//
// S: BYTES of a vector of bytes B; bytes; low and high four bits of each; W: whole numbers of N
// lanes; whole(int); dot8 and dot6 add to each lane the products of four bytes of levels with four of
// an input (-127..127): levels of 0..255, off which dot8 takes TAKEN, and of 0..63; add_pairs does so
// in lanes that may have 16 bits, for sums that fit, and sum_pairs makes W of these; to_float;
// spread<block>: a unit's 2 or 4 factors, again and again; half, small: n <= N of float16 or int8 as
// floats; interleave: see packed.h; level: N levels as floats.
//
// BITS: the lowest ones of a level, in which it fits: 4, or 6 or 8 of a byte.

template <int BITS>
inline S::W dot(S::W to, S::B levels, S::B x) {
  if constexpr (BITS == 8) return S::dot8(to, levels, x);
  else return S::dot6(to, levels, x);
}

// What is added to a dot product of levels for every unit of the input's sum.
template <int BITS>
inline int bias_of(const Packed& p) {
  return BITS == 8 ? S::TAKEN - p.bias : -p.bias;
}

constexpr int64_t bytes_of(int64_t levels, int bits) { return bits == 4 ? levels / 2 : levels; }

// Calls go(BITS, block) for the levels of a matrix, both as types; no type has others.
template <class Go>
inline void by_levels(const Packed& p, const Go& go) {
  using std::integral_constant;
  if (p.bits == 4) go(integral_constant<int, 4>(), integral_constant<int, 32>());
  else if (p.block == 16) go(integral_constant<int, 6>(), integral_constant<int, 16>());
  else if (p.bias == 128) go(integral_constant<int, 8>(), integral_constant<int, 32>());
  else go(integral_constant<int, 6>(), integral_constant<int, 32>());
}

// The same with two more types: whether scales have `supers`, and whether there are offsets.
template <class Go>
inline void by_blocks(const Packed& p, const Go& go) {
  by_levels(p, [&](auto bits, auto size) {
    std::true_type yes;
    std::false_type no;
    if constexpr (bits == 8) go(bits, size, no, no);
    else if constexpr (size == 16) go(bits, size, yes, no);
    else if (p.scales.supers) go(bits, size, yes, yes);
    else if (p.offsets.own) go(bits, size, no, yes);
    else go(bits, size, no, no);
  });
}

constexpr int64_t CHUNK = 1024;  // columns whose factors are read at a time

// Asks for the factors of a row.
inline void ask_factors(const Packed& p, const Factors& f, int64_t row) {
  int64_t bytes = p.each() * (f.supers ? 1 : 2);
  auto own = static_cast<const char*>(f.own) + row * bytes;
  for (int64_t i = 0; i < bytes + 63; i += 64) __builtin_prefetch(own + i);
}

// N factors of a row's blocks from `first` on, 0 for those beyond `n`.
template <int SIZE>
inline S::V row_factors(const Packed& p, const Factors& f, int64_t row, int64_t first, int64_t n) {
  int64_t at = row * p.each() + first;
  if (!f.supers) return S::half(static_cast<const uint16_t*>(f.own) + at, n);
  constexpr int64_t PER = SUPER / SIZE;
  int64_t each = p.supers_each(), above = first / PER;
  alignas(64) float supers[S::N], by[S::N];
  S::store(supers, S::half(f.supers + row * each + above, std::min<int64_t>(each - above, S::N)));
  for (int64_t i = 0; i < S::N; ++i) by[i] = supers[i / PER];
  return S::mul(S::small(static_cast<const int8_t*>(f.own) + at, n), S::load(by));
}

template <int BITS, int SIZE>
struct RowDots {
  // R rows at once: their loads of x are shared.
  template <int R>
  static void run(const Packed& p, const Rounded& x, const int64_t* rows, const int64_t* later, float* y) {
    typename S::V sum[R], rest[R];
    for (int r = 0; r < R; ++r) sum[r] = rest[r] = S::zero();
    const uint8_t* at[R];
    const uint8_t* next[R];
    for (int r = 0; r < R; ++r) {
      at[r] = p.levels + rows[r] * p.pitch;
      next[r] = p.levels + later[r] * p.pitch;
      ask_factors(p, p.scales, later[r]);
      if (p.offsets.own) ask_factors(p, p.offsets, later[r]);
    }
    int64_t columns = p.units() * UNIT;
    for (int64_t c = 0; c < columns; c += CHUNK) {
      int64_t left = columns - c < CHUNK ? columns - c : CHUNK;
      alignas(64) float scales[R][CHUNK / SIZE];
      factors_of<R>(p, x, rows, c / SIZE, left / SIZE, scales, rest);
      levels_of<R>(at, next, x.levels + c, left, scales, sum);
    }
    for (int r = 0; r < R; ++r) y[r] = S::sum(S::add(sum[r], rest[r]));
  }

  // Scales of a block and of its input together, and what offset and bias add.
  template <int R, class Scales>
  static void factors_of(const Packed& p, const Rounded& x, const int64_t* rows, int64_t first, int64_t n,
                         Scales& scales, typename S::V* rest) {
    const float *of_x = x.scales_of(SIZE) + first, *x_sums = x.sums_of(SIZE) + first;
    auto bias = S::all(float(bias_of<BITS>(p)));
    for (int64_t b = 0; b < n; b += S::N) {
      auto by = S::load(of_x + b), sums = S::load(x_sums + b), biased = S::mul(bias, sums);
      for (int r = 0; r < R; ++r) {
        auto scale = row_factors<SIZE>(p, p.scales, rows[r], first + b, n - b);
        S::store(scales[r] + b, S::mul(scale, by));
        rest[r] = S::fma(scale, biased, rest[r]);
        if (p.offsets.own)
          rest[r] = S::fma(row_factors<SIZE>(p, p.offsets, rows[r], first + b, n - b), sums, rest[r]);
      }
    }
  }

  template <int R, class Scales>
  static void levels_of(const uint8_t** at, const uint8_t** next, const int8_t* x, int64_t left,
                        const Scales& scales, typename S::V* sum) {
    constexpr int64_t STEP = S::BYTES;
    auto add = [&](int r, typename S::B levels, typename S::B given, int64_t column) {
      auto found = S::to_float(dot<BITS>(S::whole(0), levels, given));
      auto by = S::template spread<SIZE>(scales[r] + column / UNIT * (UNIT / SIZE));
      sum[r] = S::fma(found, by, sum[r]);
    };
    if constexpr (BITS != 4) {
      for (int64_t i = 0; i < left; i += STEP) {
        auto given = S::bytes(x + i);
        for (int r = 0; r < R; ++r) {
          __builtin_prefetch(next[r] + i);
          add(r, S::bytes(at[r] + i), given, i);
        }
      }
      for (int r = 0; r < R; ++r) at[r] += left, next[r] += left;
    } else {
      int64_t i = 0;
      for (; i + 2 * UNIT <= left; i += 2 * UNIT)
        for (int64_t j = 0; j < UNIT; j += STEP) {
          auto first = S::bytes(x + i + j), second = S::bytes(x + i + UNIT + j);
          for (int r = 0; r < R; ++r) {
            auto both = S::bytes(at[r] + i / 2 + j);
            __builtin_prefetch(next[r] + i / 2 + j);
            add(r, S::low(both), first, i + j);
            add(r, S::high(both), second, i + UNIT + j);
          }
        }
      if (i < left)
        for (int64_t j = 0; j < UNIT; j += STEP) {
          auto given = S::bytes(x + i + j);
          for (int r = 0; r < R; ++r) add(r, S::last(at[r] + i / 2, j), given, i + j);
        }
      for (int r = 0; r < R; ++r) at[r] += left / 2, next[r] += left / 2;
    }
  }
};

constexpr int64_t ROWS_AHEAD = 4096;  // bytes of levels that are asked for before they are needed

template <class Id>
void packed_rows(const Packed& p, const Rounded& x, const Id& id, int64_t begin, int64_t end, float* y,
                 int64_t stride) {
  by_levels(p, [&](auto bits, auto size) {
    using Dots = RowDots<bits, size>;
    constexpr int R = 4;
    int64_t place = begin, rows[R], later[R];
    auto clamped = [&](int64_t at) { return id(at < end ? at : end - 1); };
    int64_t ahead = std::max<int64_t>(1, ROWS_AHEAD / (R * p.pitch)) * R;
    for (; place + R <= end; place += R) {
      for (int r = 0; r < R; ++r) rows[r] = id(place + r), later[r] = clamped(place + ahead + r);
      for (int64_t m = 0; m < x.count; ++m)
        Dots::template run<R>(p, x.at(m), rows, later, y + m * stride + place);
    }
    for (; place < end; ++place) {
      rows[0] = later[0] = id(place);
      for (int64_t m = 0; m < x.count; ++m)
        Dots::template run<1>(p, x.at(m), rows, later, y + m * stride + place);
    }
  });
}

constexpr int64_t TILES_AHEAD = S::N == 16 ? 4096 : 2048;  // bytes of levels asked for before they are needed

// The rows of a tile times M vectors; whether the matrix has `supers` and offsets.
template <int BITS, int SIZE, bool SUPERS, bool OFFSETS>
struct TileDots {
  static constexpr int VECTORS = TILE / S::N, BLOCKS = UNIT / SIZE, FOURS = SIZE / 4;
  static constexpr int BESIDE = BITS == 4 ? 2 : 1;  // blocks whose levels share bytes
  // Fours whose sums of pairs fit into 16 bits: levels are at most 15, or in bytes 31, or 63 in blocks of 16.
  static constexpr int SHORT = BITS == 4 ? 8 : SIZE == 32 ? 4 : 2;

  // KEPT: of kept columns.
  template <int M, bool KEPT>
  static void run(const Packed p, const Rounded& x, int64_t tile, float (*y)[TILE]) {
    const uint8_t *levels = p.levels + tile * TILE * p.pitch, *kept = p.fours;
    const int8_t* given[M];
    const float *scales[M], *sums[M];
    typename S::V sum[M][VECTORS], above[VECTORS], above_offset[VECTORS];
    auto bias = S::all(float(bias_of<BITS>(p)));
    for (int m = 0; m < M; ++m) {
      Rounded own = x.at(m);
      given[m] = own.levels, scales[m] = own.scales_of(SIZE), sums[m] = own.sums_of(SIZE);
      for (auto& one : sum[m]) one = S::zero();
    }
    for (int v = 0; v < VECTORS; ++v) above[v] = above_offset[v] = S::zero();
    int64_t units = p.units(), place = tile * p.each() * TILE, place_above = tile * p.supers_each() * TILE;
    for (int64_t unit = 0; unit < units; ++unit) {
      if (SUPERS && unit % (SUPER / UNIT) == 0)
        for (int v = 0; v < VECTORS; ++v, place_above += S::N) {
          above[v] = S::half(p.scales.supers + place_above, S::N);
          if (OFFSETS) above_offset[v] = S::half(p.offsets.supers + place_above, S::N);
        }
#pragma GCC unroll 4
      for (int first = 0; first < BLOCKS; first += BESIDE) {
        typename S::W found[M][BESIDE][VECTORS];
        int fours = KEPT ? *kept++ : FOURS;
        if (KEPT) some_products<M>(fours, levels, given, unit * UNIT, first * FOURS, found);
        else products<M, FOURS>(levels, given, unit * UNIT, first * FOURS, found);
        levels += fours * 4 * TILE;
        for (int b = 0; b < BESIDE; ++b, place += TILE) {
          int64_t of_x = unit * BLOCKS + (SIZE == 16 ? quarter_place(first + b) : first + b);
          for (int v = 0; v < VECTORS; ++v) {
            auto scale = factors(p.scales, place + v * S::N, above[v]);
            for (int m = 0; m < M; ++m) {
              auto of_levels = S::all(sums[m][of_x]), by = S::all(scales[m][of_x]);
              auto value = S::fma(S::to_float(found[m][b][v]), by, S::mul(bias, of_levels));
              sum[m][v] = S::fma(scale, value, sum[m][v]);
              if (OFFSETS)
                sum[m][v] =
                    S::fma(factors(p.offsets, place + v * S::N, above_offset[v]), of_levels, sum[m][v]);
            }
          }
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < VECTORS; ++v) S::store(y[m] + v * S::N, sum[m][v]);
  }

  static typename S::V factors(const Factors& f, int64_t at, typename S::V above) {
    if (!SUPERS) return S::half(static_cast<const uint16_t*>(f.own) + at, S::N);
    return S::mul(S::small(static_cast<const int8_t*>(f.own) + at, S::N), above);
  }

  // found[m][b] = of each row: the levels of a block, whose COUNT fours begin at `first` of the unit at
  // `column`, times those of x[m].
  template <int M, int COUNT>
  static void products(const uint8_t* levels, const int8_t* const* x, int64_t column, int64_t first,
                       typename S::W (*found)[BESIDE][VECTORS]) {
    typename S::W pairs[M][BESIDE][VECTORS];
    for (int m = 0; m < M && !COUNT; ++m)
      for (auto& block : found[m]) std::fill_n(block, VECTORS, S::whole(0));
#pragma GCC unroll 8
    for (int four = 0; four < COUNT; ++four) {
      typename S::B own[BESIDE][VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        auto bytes = S::bytes(levels + 4 * TILE * four + v * S::BYTES);
        own[0][v] = BITS == 4 ? S::low(bytes) : bytes;
        if constexpr (BITS == 4) own[1][v] = S::high(bytes);
      }
      S::ask(levels + 4 * TILE * four + TILES_AHEAD);
      for (int m = 0; m < M; ++m)
        for (int b = 0; b < BESIDE; ++b) {
          uint32_t given;
          std::memcpy(&given, x[m] + column + 4 * four_of(first + b * FOURS + four), 4);
          auto same = S::same(given);
          for (int v = 0; v < VECTORS; ++v) {
            auto &to = found[m][b][v], &some = pairs[m][b][v];
            if constexpr (BITS == 8) {
              to = dot<BITS>(four ? to : S::whole(0), own[b][v], same);
            } else {
              some = S::add_pairs(four % SHORT ? some : S::whole(0), own[b][v], same);
              if (four % SHORT == SHORT - 1 || four == COUNT - 1)
                to = four < SHORT ? S::sum_pairs(some) : S::add(to, S::sum_pairs(some));
            }
          }
        }
    }
  }

  // As many as `fours`: loops of a constant length are quicker.
  template <int M, class... Rest>
  static void some_products(int fours, Rest... rest) {
    switch (fours) {
      case 0:
        return products<M, 0>(rest...);
      case 1:
        return products<M, 1>(rest...);
      case 2:
        return products<M, 2>(rest...);
      case 3:
        return products<M, 3>(rest...);
      case 4:
        return products<M, 4>(rest...);
      case 5:
        return products<M, std::min(5, FOURS)>(rest...);
      case 6:
        return products<M, std::min(6, FOURS)>(rest...);
      case 7:
        return products<M, std::min(7, FOURS)>(rest...);
      default:
        return products<M, FOURS>(rest...);
    }
  }
};

// y[m * stride + row - origin] = rows[row] . x[m] for begin <= row < end.
void packed_tiles(const Packed& p, const Rounded& x, int64_t begin, int64_t end, float* y, int64_t stride,
                  int64_t origin) {
  constexpr int MOST = S::N == 16 ? 4 : 2;  // vectors whose sums fit into registers
  by_blocks(p, [&](auto bits, auto size, auto supers, auto offsets) {
    float found[MOST][TILE];
    using Dots = TileDots<bits, size, supers, offsets>;
    for (int64_t tile = begin / TILE; tile * TILE < end; ++tile)
      for (int64_t m = 0; m < x.count;) {
        int64_t count = x.count - m < MOST ? 1 : MOST;
        auto run = p.fours      ? count == 1 ? Dots::template run<1, true> : Dots::template run<MOST, true>
                   : count == 1 ? Dots::template run<1, false>
                                : Dots::template run<MOST, false>;
        run(p, x.at(m), tile, found);
        int64_t first = std::max(begin, tile * TILE), last = std::min(end, (tile + 1) * TILE);
        for (int64_t i = 0; i < count; ++i, ++m)
          std::copy(found[i] + first % TILE, found[i] + (last - tile * TILE),
                    y + m * stride + (first - origin));
      }
  });
}

void packed_matvec(const Packed& p, const Rounded& x, int64_t begin, int64_t end, float* y, int64_t stride) {
  if (p.order == Order::tiles) return packed_tiles(p, x, begin, end, y, stride, 0);
  packed_rows(p, x, [](int64_t row) { return row; }, begin, end, y, stride);
}

void packed_dots(const Packed& p, const Rounded& x, const int32_t* ids, int64_t first, int64_t n, float* y) {
  if (p.order == Order::tiles) return packed_tiles(p, x, first, first + n, y, 0, first);
  if (ids) packed_rows(p, x, [&](int64_t j) { return int64_t(ids[j]); }, 0, n, y, 0);
  else packed_rows(p, x, [&](int64_t j) { return first + j; }, 0, n, y, 0);
}

// Rows of one block of neurons, in fours, and the levels of their inputs; as many rows that are needed next.
struct Neurons {
  const uint8_t* rows[GROUP];
  const uint8_t* next[GROUP];
  uint32_t inputs[GROUP / 4];
  int64_t fours;
};

// Asks for rows in the order of their addresses, in which memory is read fastest: 128 bytes at a time.
class Ahead {
 public:
  Ahead(const uint8_t* const* rows, int64_t count, int64_t pitch)
      : row_(rows), last_(rows + count - 1), at_(*rows), left_(pitch), pitch_(pitch) {}
  void ask() {
    __builtin_prefetch(at_), __builtin_prefetch(at_ + 64);
    at_ += 128, left_ -= 128;
    if (left_ <= 0 && row_ != last_) at_ = *++row_ - left_, left_ += pitch_;
  }

 private:
  const uint8_t *const *row_, *const *last_;
  const uint8_t* at_;
  int64_t left_, pitch_;
};

// Calls then(c, sums) for N columns from c on: the neurons' levels times their inputs.
template <int BITS, class Then>
inline void add_fours(const Neurons& n, int64_t columns, const Then& then) {
  constexpr int64_t STEP = S::BYTES, UNITS = BITS == 4 ? 2 : 1;  // units to 64 bytes
  Ahead ahead(n.next, 4 * n.fours, bytes_of(columns, BITS));
  auto add = [&](auto units, int64_t column, const auto& bytes) {
    typename S::W sums[units][4];
    for (auto& of_unit : sums)
      for (auto& one : of_unit) one = S::whole(0);
    for (int64_t f = 0; f < n.fours; ++f) {
      typename S::B own[4], mixed[4];
      for (int r = 0; r < 4; ++r) own[r] = bytes(n.rows[4 * f + r]);
      for (int64_t i = 0; i < STEP; i += 32) ahead.ask();
      S::interleave(own, mixed);
      auto inputs = S::same(n.inputs[f]);
      for (int v = 0; v < 4; ++v) {
        auto& first = sums[0][v];
        if constexpr (BITS != 4) {
          first = dot<BITS>(first, mixed[v], inputs);
        } else if constexpr (units == 1) {
          first = S::add_pairs(first, mixed[v], inputs);
        } else {
          first = S::add_pairs(first, S::low(mixed[v]), inputs);
          sums[1][v] = S::add_pairs(sums[1][v], S::high(mixed[v]), inputs);
        }
      }
    }
    for (int64_t unit = 0; unit < units; ++unit)
      for (int v = 0; v < 4; ++v)
        then(column + unit * UNIT + 16 * v, BITS == 4 ? S::sum_pairs(sums[unit][v]) : sums[unit][v]);
  };
  int64_t wide = columns / (UNITS * UNIT) * UNIT;
  auto column = [](int64_t at) { return at / UNIT * UNITS * UNIT + at % UNIT / STEP * S::N; };
  for (int64_t at = 0; at < wide; at += STEP)
    add(std::integral_constant<int, UNITS>(), column(at),
        [=](const uint8_t* row) { return S::bytes(row + at); });
  if (columns > wide * UNITS)
    for (int64_t j = 0; j < UNIT; j += STEP)
      add(std::integral_constant<int, 1>(), column(wide + j),
          [=](const uint8_t* row) { return S::last(row + wide, j); });
}

// Factors of a group of neurons from column `c` on; asks for those of the next group.
inline S::V factors_of(const Packed& p, const Factors& f, int64_t group, int64_t c) {
  int64_t columns = p.units() * UNIT;
  if (!f.supers) {
    auto own = static_cast<const uint16_t*>(f.own) + group * columns + c;
    __builtin_prefetch(own + columns);
    return S::half(own, S::N);
  }
  auto own = static_cast<const int8_t*>(f.own) + group * columns + c;
  __builtin_prefetch(own + columns);
  return S::mul(S::small(own, S::N),
                S::half(f.supers + group / (p.block == 16 ? 16 : 8) * columns + c, S::N));
}

// Rounds GROUP values to levels of 8 bits: their scale, and the sums of both halves' levels.  What is
// no number, or infinite, makes the whole group none; numbers whose inverse is infinite count as 0.
inline float round_group(const float* from, int8_t* levels, int* halves) {
  constexpr int COUNT = GROUP / S::N, HALF = COUNT / 2;
  typename S::V x[COUNT];
  typename S::W level[COUNT], most = S::whole(0);
  for (int i = 0; i < COUNT; ++i) {
    x[i] = S::load(from + i * S::N);
    most = S::max(most, S::magnitude(x[i]));
  }
  int bits = S::largest(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof bits);
  bool none = bits >= 0x7f800000;
  auto back = S::all(largest >= 0x1p-120f && !none ? 127.0f / largest : 0.0f);
  for (int i = 0; i < COUNT; ++i) {
    level[i] = none ? S::whole(0) : S::nearest(S::mul(x[i], back));
    S::store_small(levels + i * S::N, level[i]);
  }
  for (int half = 0; half < 2; ++half) {
    auto sum = level[half * HALF];
    for (int i = 1; i < HALF; ++i) sum = S::add(sum, level[half * HALF + i]);
    halves[half] = S::sum_of(sum);
  }
  return none ? std::nanf("") : largest / 127.0f;
}

// Neurons of a block, and those whose turn is next.
struct Queue {
  const Packed& p;
  const int32_t* ids;

  const uint8_t* row(int64_t i) const { return p.levels + ids[i] * p.pitch; }
  // Row i of `left` that are known, or what lies behind the last one.
  const uint8_t* later(int64_t i, int64_t left) const {
    return i < left ? row(i) : row(left - 1) + (i - left + 1) * p.pitch;
  }
};

// sums[:] += neurons 0 to n of a queue of `left`, which are of one block.
void add_block(const Queue& queue, const float* u, int64_t n, int64_t left, float* sums) {
  float values[GROUP] = {};
  std::copy(u, u + n, values);
  int8_t levels[GROUP];
  int halves[2];
  float scale = round_group(values, levels, halves), total = float(halves[0] + halves[1]);
  if (scale == 0) return;
  Neurons some;
  some.fours = (n + 3) / 4;
  std::memcpy(some.inputs, levels, sizeof levels);
  for (int64_t r = 0; r < 4 * some.fours; ++r) {
    some.rows[r] = queue.row(std::min(r, n - 1));
    some.next[r] = queue.later(n + r, left);
  }
  const Packed& p = queue.p;
  int64_t group = queue.ids[0] / p.block;
  by_levels(p, [&](auto bits, auto) {
    auto by = S::all(scale), offset = S::all(scale * total), bias = S::all(float(bias_of<bits>(p)) * total);
    add_fours<bits>(some, p.units() * UNIT, [&](int64_t c, typename S::W found) {
      auto value = S::mul(factors_of(p, p.scales, group, c), by);
      auto sum = S::fma(S::add(S::to_float(found), bias), value, S::load(sums + c));
      if (p.offsets.own) sum = S::fma(factors_of(p, p.offsets, group, c), offset, sum);
      S::store(sums + c, sum);
    });
  });
}

void packed_add_neurons(const Packed& p, const int32_t* ids, const float* u, int64_t n, float* sums) {
  int shift = p.block == 16 ? 4 : 5;
  for (int64_t begin = 0, end; begin < n; begin = end) {
    for (end = begin + 1; end < n && ids[end] >> shift == ids[begin] >> shift;) ++end;
    add_block({p, ids + begin}, u + begin, end - begin, n - begin, sums);
  }
}

void packed_round(const float* from, int64_t begin, int64_t end, int64_t n, int8_t* levels, float* scales,
                  float* sums) {
  int64_t size = (n + UNIT - 1) / UNIT * UNIT, facts = Rounded::facts(size);
  float *small_scales = scales + facts, *small_sums = sums + facts;
  for (int64_t g = begin / GROUP; g < (end < n ? end : size) / GROUP; ++g) {
    float last[GROUP] = {};
    const float* own = from + g * GROUP;
    if ((g + 1) * GROUP > n) {
      std::copy(std::min(own, from + n), from + n, last);
      own = last;
    }
    int halves[2];
    int8_t found[GROUP];
    float scale = scales[g] = round_group(own, found, halves);
    int8_t* unit = levels + g / 2 * UNIT;
    for (int64_t k = 0; k < GROUP / 4; ++k) std::memcpy(unit + 4 * four_of(g % 2 * 8 + k), found + 4 * k, 4);
    sums[g] = scale * float(halves[0] + halves[1]);
    for (int half = 0; half < 2; ++half) {
      int64_t at = g / 2 * 4 + quarter_place(g % 2 * 2 + half);
      small_scales[at] = scale;
      small_sums[at] = scale * float(halves[half]);
    }
  }
  if (end < n) return;
  std::fill(scales + size / 32, small_scales, 0.0f), std::fill(sums + size / 32, small_sums, 0.0f);
  std::fill(small_scales + size / 16, small_scales + facts, 0.0f);
  std::fill(small_sums + size / 16, small_sums + facts, 0.0f);
}

void packed_mask(const int8_t* levels, const float* scales, const float* strength, const Cut& by, int64_t n,
                 int8_t* to, float* sums) {
  const Cut cut = by;
  int64_t facts = Rounded::facts((n + UNIT - 1) / UNIT * UNIT);
  const float* small_scales = scales + facts;
  float* small_sums = sums + facts;
  for (int64_t c = 0; c < n; c += UNIT, levels += UNIT, to += UNIT) {
    int8_t taken[UNIT] = {}, placed[UNIT];
    int64_t count = std::min(UNIT, n - c);
    for (int64_t i = 0; i < count; ++i) taken[i] = int8_t(-int(cut.takes(strength[c + i], int32_t(c + i))));
    for (int64_t k = 0; k < UNIT / 4; ++k) std::memcpy(placed + 4 * four_of(k), taken + 4 * k, 4);
    for (int64_t i = 0; i < UNIT; ++i) to[i] = levels[i] & placed[i];
    alignas(64) float of_fours[UNIT / 4], of_quarters[4];  // of quarters where they stand
    for (int64_t i = 0; i < UNIT; i += S::BYTES) {
      auto found = S::dot6(S::whole(0), S::same(0x01010101), S::bytes(to + i));
      S::store(of_fours + i / 4, S::to_float(found));
    }
    for (int64_t q = 0; q < 4; ++q)
      of_quarters[q] = of_fours[q] + of_fours[4 + q] + of_fours[8 + q] + of_fours[12 + q];
    for (int64_t q = 0; q < 4; ++q) small_sums[c / 16 + q] = small_scales[c / 16 + q] * of_quarters[q];
    for (int64_t g = 0; g < 2; ++g)
      sums[c / 32 + g] =
          scales[c / 32 + g] * (of_quarters[quarter_place(2 * g)] + of_quarters[quarter_place(2 * g + 1)]);
  }
}

// to[i] = act(gate[i]) up[i], or act(up[i]) without a gate, of n values; room for whole vectors.
void packed_activate(Act act, const float* gate, float* up, int64_t n) {
  if (act != Act::silu && act != Act::gelu_tanh) {
    for (int64_t i = 0; i < n; ++i) up[i] = gate ? activate(act, gate[i]) * up[i] : activate(act, up[i]);
    return;
  }
  auto one = S::all(1.0f);
  for (int64_t i = 0; i < n; i += S::N) {
    auto x = S::load((gate ? gate : up) + i), power = x;
    if (act == Act::gelu_tanh) {  // half of 1 + tanh(a) is 1 / (1 + exp(-2 a))
      auto cubic = S::fma(S::mul(S::mul(x, x), x), S::all(0.044715f), x);
      power = S::mul(cubic, S::all(2 * 0.79788456080286536f));
    }
    auto y = S::div(x, S::add(one, exponential(S::sub(S::zero(), power))));
    S::store(up + i, gate ? S::mul(y, S::load(up + i)) : y);
  }
}

constexpr int64_t LEVELS_AHEAD = 2048;  // bytes that are asked for before they are dequantised

// Levels of a unit of a row, by their places.
template <int BITS>
inline void levels_by_place(const Packed& p, int64_t row, int64_t unit, uint8_t* to) {
  const uint8_t* from = p.levels + row * p.pitch;
  __builtin_prefetch(from + bytes_of(unit * UNIT, BITS) + LEVELS_AHEAD, 0, 2);
  if (BITS != 4) {
    std::memcpy(to, from + unit * UNIT, UNIT);
  } else if (unit % 2 == 0 && unit + 1 == p.units()) {
    for (int64_t j = 0; j < 32; ++j) to[j] = from[unit * 32 + j] & 15;
    for (int64_t j = 0; j < 32; ++j) to[j + 32] = from[unit * 32 + j] >> 4;
  } else if (unit % 2) {
    for (int64_t j = 0; j < UNIT; ++j) to[j] = from[unit / 2 * UNIT + j] >> 4;
  } else {
    for (int64_t j = 0; j < UNIT; ++j) to[j] = from[unit / 2 * UNIT + j] & 15;
  }
}

// to[0..n) = scale * (level - bias) + offset, of scales and offset - scale * bias: a product of
// levels or bias with a scale is exact.
template <class T, class Scale, class Rest>
inline void weigh(const uint8_t* levels, int64_t n, T* to, const Scale& scale, const Rest& rest) {
  for (int64_t c = 0; c < n; c += S::N) S::store(to + c, S::fma(scale(c), S::level(levels + c), rest(c)));
}

// N factors from place `at` on, and the places of what they are multiplied by.
inline S::V factors_at(const Factors& f, int64_t at, int64_t above) {
  if (!f.supers) return S::half(static_cast<const uint16_t*>(f.own) + at, S::N);
  return S::mul(S::small(static_cast<const int8_t*>(f.own) + at, S::N), S::half(f.supers + above, S::N));
}

template <int BITS, class T>
static void dequantise_neuron(const Packed& p, int64_t row, T* to) {
  const Factors scales = p.scales, offsets = p.offsets;
  const auto bias = S::all(float(-p.bias));
  int64_t at = row / p.block * p.each(), above = row / SUPER * p.each();
  for (int64_t unit = 0; unit < p.units(); ++unit, at += UNIT, above += UNIT) {
    alignas(64) uint8_t places[UNIT], levels[UNIT];
    levels_by_place<BITS>(p, row, unit, places);
    transpose_fours(places, 16, levels, 16);
    auto scale = [=](int64_t c) { return factors_at(scales, at + c, above + c); };
    auto offset = [=](int64_t c) { return factors_at(offsets, at + c, above + c); };
    int64_t n = std::min(UNIT, p.columns - unit * UNIT);
    T last[UNIT], *own = n < UNIT ? last : to + unit * UNIT;
    if (offsets.own) weigh(levels, UNIT, own, scale, offset);
    else weigh(levels, UNIT, own, scale, [=](int64_t c) { return S::mul(scale(c), bias); });
    if (n < UNIT) std::copy_n(last, n, to + unit * UNIT);
  }
}

template <int BITS, int SIZE, class T>
static void dequantise_row(const Packed& p, int64_t row, T* to) {
  constexpr int64_t BLOCKS = UNIT / SIZE;
  for (int64_t c = 0; c < p.columns; c += CHUNK) {
    int64_t left = std::min(p.units() * UNIT - c, CHUNK);
    alignas(64) float scales[CHUNK / SIZE], rests[CHUNK / SIZE];
    for (int64_t b = 0, n = left / SIZE; b < n; b += S::N) {
      auto scale = row_factors<SIZE>(p, p.scales, row, c / SIZE + b, n - b);
      auto rest = p.offsets.own ? row_factors<SIZE>(p, p.offsets, row, c / SIZE + b, n - b)
                                : S::mul(scale, S::all(float(-p.bias)));
      S::store(scales + b, scale), S::store(rests + b, rest);
    }
    for (int64_t unit = 0; unit < left / UNIT; ++unit) {
      alignas(64) uint8_t places[UNIT], levels[UNIT];
      levels_by_place<BITS>(p, row, c / UNIT + unit, places);
      transpose_fours(places, 16, levels, 16);
      int64_t first = c + unit * UNIT;
      for (int64_t quarter = 0; quarter < 4 && first + 16 * quarter < p.columns; ++quarter) {
        int64_t block = unit * BLOCKS + (SIZE == 16 ? quarter_place(quarter) : quarter / 2);
        auto scale = S::all(scales[block]), rest = S::all(rests[block]);
        weigh(
            levels + 16 * quarter_place(quarter), 16, to + first + 16 * quarter,
            [&](int64_t) { return scale; }, [&](int64_t) { return rest; });
      }
    }
  }
}

// Levels of a unit of rows `begin` to `end` of a tile, and of others beside them: [TILE, UNIT].
template <int BITS>
inline void tile_levels(const Packed& p, int64_t tile, int64_t unit, int64_t begin, int64_t end,
                        uint8_t* to) {
  constexpr int64_t FOURS = UNIT / 4, EACH = 4 * TILE;  // bytes of a four of all rows
  const uint8_t* from = p.levels + tile * TILE * p.pitch + unit * FOURS * EACH * BITS / 8;
  alignas(64) uint8_t wide[FOURS * EACH];
  for (int64_t i = 0; i < FOURS * EACH * BITS / 8; i += 64) __builtin_prefetch(from + i + LEVELS_AHEAD, 0, 2);
  if (BITS == 4) {
    constexpr int64_t HALF = FOURS / 2 * EACH;
    for (int64_t i = 0; i < HALF; ++i) wide[i] = from[i] & 15;
    for (int64_t i = 0; i < HALF; ++i) wide[HALF + i] = from[i] >> 4;
    from = wide;
  }
  for (int64_t row = begin / 4 * 4; row < end; row += 4)
    for (int64_t four = 0; four < FOURS; four += 4)
      transpose_fours(from + four * EACH + 4 * row, EACH, to + row * UNIT + 4 * four, UNIT);
}

// Rows `begin` to `end` of a tile.
template <int BITS, int SIZE, class T>
static void dequantise_tile(const Packed& p, int64_t tile, int64_t begin, int64_t end, T* to) {
  constexpr int64_t BLOCKS = UNIT / SIZE;
  auto bias = S::all(float(-p.bias));
  for (int64_t unit = 0; unit < p.units(); ++unit) {
    alignas(64) uint8_t levels[TILE * UNIT];
    alignas(64) float scales[BLOCKS][TILE], rests[BLOCKS][TILE];
    tile_levels<BITS>(p, tile, unit, begin, end, levels);
    for (int64_t b = 0; b < BLOCKS; ++b)
      for (int64_t i = 0; i < TILE; i += S::N) {
        int64_t at = (tile * p.each() + unit * BLOCKS + b) * TILE + i;
        int64_t above = (tile * p.supers_each() + unit * UNIT / SUPER) * TILE + i;
        auto scale = factors_at(p.scales, at, above);
        S::store(scales[b] + i, scale);
        S::store(rests[b] + i, p.offsets.own ? factors_at(p.offsets, at, above) : S::mul(scale, bias));
      }
    int64_t n = std::min(UNIT, p.columns - unit * UNIT);
    for (int64_t row = begin; row < end; ++row)
      weigh(
          levels + row * UNIT, n, to + (row - begin) * p.columns + unit * UNIT,
          [&](int64_t c) { return S::all(scales[c / SIZE][row]); },
          [&](int64_t c) { return S::all(rests[c / SIZE][row]); });
  }
}

template <int BITS, int SIZE, class T>
void dequantise_rows(const Packed& p, int64_t row, int64_t count, T* to) {
  for (int64_t end = row + count, next; row < end; row = next, to += p.columns) {
    next = row + 1;
    if (p.order == Order::rows) dequantise_row<BITS, SIZE>(p, row, to);
    else if (p.order == Order::neurons) dequantise_neuron<BITS>(p, row, to);
    else {
      int64_t first = row / TILE * TILE;
      next = std::min(end, first + TILE);
      dequantise_tile<BITS, SIZE>(p, row / TILE, row - first, next - first, to);
      to += (next - row - 1) * p.columns;
    }
  }
}

template <class T>
void dequantise_as(const Packed& p, int64_t row, int64_t count, T* to) {
  if (p.bits == 4) dequantise_rows<4, 32>(p, row, count, to);
  else if (p.block == 32) dequantise_rows<8, 32>(p, row, count, to);
  else dequantise_rows<8, 16>(p, row, count, to);
}

void packed_dequantise(const Packed& p, int64_t row, int64_t count, Dtype dtype, void* to) {
  DART_BY_DTYPE(dequantise_as(p, row, count, static_cast<T*>(to)))
}

void packed_scores(const Directions& d, const Along& z, int64_t run, float* y) {
  constexpr int64_t PITCH = RUN / 2;
  const float* by = d.by + run * RUN;
  for (int64_t i = 0; i < z.count; i += GROUP) {
    Neurons some;
    some.fours = std::min(z.count - i, GROUP) / 4;
    bool last = i + GROUP >= z.count;
    int64_t later = last ? 0 : i + GROUP, ahead = last && run + 1 < d.runs() ? run + 1 : run;
    for (int64_t r = 0; r < 4 * some.fours; ++r) {
      some.rows[r] = d.levels + (run * d.size + z.ids[i + r]) * PITCH;
      some.next[r] = d.levels + (ahead * d.size + z.ids[std::min(later + r, z.count - 1)]) * PITCH;
    }
    for (int64_t f = 0; f < some.fours; ++f)
      std::memcpy(some.inputs + f, z.values.levels + i / UNIT * UNIT + 4 * four_of(i % UNIT / 4 + f), 4);
    auto scale = S::all(z.values.scales[i / GROUP]), rest = S::all(-MIDDLE * z.sum);
    add_fours<4>(some, RUN, [&](int64_t at, typename S::W found) {
      auto sum = S::fma(S::to_float(found), scale, i ? S::load(y + at) : rest);
      S::store(y + at, last ? S::mul(sum, S::load(by + at)) : sum);
    });
  }
}

#include "packed_lots.h"

const PackedKernels packed_table = {packed_matvec, packed_dots,      packed_add_neurons, packed_round,
                                    packed_mask,   packed_activate,  packed_dequantise,  LOT,
                                    S::FEW,        packed_round_lot, packed_lots,        packed_scores};
