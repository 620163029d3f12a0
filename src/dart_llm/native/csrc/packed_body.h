// Kernels of packed matrices, written once over the set of vectors `S` of one CPU kind; included by
// kernels_*.cpp after kernels_body.h.
//
// S: BYTES of a vector of bytes B; bytes; low and high four bits of each; W: whole numbers of N
// lanes; whole(int), load_whole, store_whole; dot8 and dot4 add to each lane the products of four
// bytes of levels (0..255, 0..15) with four of an input (-127..127); to_float; spread<block>: a
// unit's 2 or 4 factors, again and again; half, small: n <= N of float16 or int8 as floats;
// interleave: see packed.h.

template <int BITS>
inline S::W dot(S::W to, S::B levels, S::B x) {
  if constexpr (BITS == 4) return S::dot4(to, levels, x);
  else return S::dot8(to, levels, x);
}

constexpr int64_t CHUNK = 1024;  // columns whose factors are read at a time

// factors[i] = those of blocks first to first + n of a row; n even and at most CHUNK / SIZE.
template <int SIZE>
inline void read_factors(const Factors& f, int64_t row, int64_t each, int64_t supers_each,
                         int64_t first, int64_t n, float* factors) {
  int64_t at = row * each + first;
  if (!f.supers) {
    auto own = static_cast<const uint16_t*>(f.own) + at;
    for (int64_t i = 0; i < n; i += S::N) S::store(factors + i, S::half(own + i, n - i));
    return;
  }
  constexpr int64_t PER = SUPER / SIZE;
  alignas(64) float by[CHUNK / SIZE];
  for (int64_t super = 0; super < CHUNK / SUPER; ++super) {
    int64_t there = first / PER + super;
    float value = there < supers_each ? half_to_float(f.supers[row * supers_each + there]) : 0;
    for (int64_t i = 0; i < PER; ++i) by[super * PER + i] = value;
  }
  auto own = static_cast<const int8_t*>(f.own) + at;
  for (int64_t i = 0; i < n; i += S::N)
    S::store(factors + i, S::mul(S::small(own + i, n - i), S::load(by + i)));
}

template <int BITS, int SIZE>
struct RowDots {
  // R rows at once: their loads of x are shared.
  template <int R>
  static void run(const Packed& p, const Rounded& x, const int64_t* rows, const int64_t* later,
                  float* y) {
    typename S::V sum[R], rest[R];
    for (int r = 0; r < R; ++r) sum[r] = rest[r] = S::zero();
    const uint8_t *at[R], *next[R];
    for (int r = 0; r < R; ++r) {
      at[r] = p.levels + rows[r] * p.pitch;
      next[r] = p.levels + later[r] * p.pitch;
    }
    int64_t columns = p.units() * UNIT;
    for (int64_t c = 0; c < columns; c += CHUNK) {
      int64_t left = columns - c < CHUNK ? columns - c : CHUNK, blocks = left / SIZE;
      alignas(64) float scales[R][CHUNK / SIZE];
      const float *x_scales = x.scales_of(SIZE) + c / SIZE, *x_sums = x.sums_of(SIZE) + c / SIZE;
      for (int r = 0; r < R; ++r) {
        float* own = scales[r];
        read_factors<SIZE>(p.scales, rows[r], p.each(), p.supers_each(), c / SIZE, blocks, own);
        auto bias = S::all(float(-p.bias));
        if (p.offsets.own) {
          alignas(64) float offsets[CHUNK / SIZE];
          read_factors<SIZE>(p.offsets, rows[r], p.each(), p.supers_each(), c / SIZE, blocks, offsets);
          for (int64_t b = 0; b < blocks; b += S::N)
            rest[r] = S::fma(S::load(offsets + b), S::load(x_sums + b), rest[r]);
        }
        for (int64_t b = 0; b < blocks; b += S::N) {
          auto by = S::load(own + b);
          if (p.bias) rest[r] = S::fma(S::mul(by, bias), S::load(x_sums + b), rest[r]);
          S::store(own + b, S::mul(by, S::load(x_scales + b)));
        }
      }
      levels_of<R>(at, next, x.levels + c, left, scales, sum);
    }
    for (int r = 0; r < R; ++r) y[r] = S::sum(S::add(sum[r], rest[r]));
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
    if constexpr (BITS == 8) {
      for (int64_t i = 0; i < left; i += STEP) {
        auto given = S::bytes(x + i);
        for (int r = 0; r < R; ++r) {
          __builtin_prefetch(next[r] + i, 0, 2);
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
            __builtin_prefetch(next[r] + i / 2 + j, 0, 2);
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
  auto go = [&](auto dots) {
    using Dots = decltype(dots);
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
  };
  if (p.bits == 4 && p.block == 32) go(RowDots<4, 32>());
  else if (p.bits == 4) go(RowDots<4, 16>());
  else if (p.block == 32) go(RowDots<8, 32>());
  else go(RowDots<8, 16>());
}

constexpr int64_t TILES_AHEAD = 1024;  // bytes of levels that are asked for before they are needed

// Rows of a tile times M vectors, N rows at a time.
template <int BITS, int SIZE>
struct TileDots {
  static constexpr int BLOCKS = UNIT / SIZE;

  template <int M>
  static void run(const Packed& p, const Rounded& x, int64_t tile, int64_t part, float (*y)[TILE]) {
    const uint8_t* levels = p.levels + tile * TILE * p.pitch + part * S::BYTES;
    Rounded own[M];
    typename S::V sum[M], bias = S::all(float(-p.bias)), above, above_offset;
    for (int m = 0; m < M; ++m) own[m] = x.at(m), sum[m] = S::zero();
    above = above_offset = S::zero();
    for (int64_t unit = 0; unit < p.units(); ++unit, levels += TILE * UNIT * BITS / 8) {
      typename S::W found[M][BLOCKS];
      products<M>(levels, own, unit, part == 0, found);
      if (p.scales.supers && unit % (SUPER / UNIT) == 0) {
        int64_t at = (tile * p.supers_each() + unit * UNIT / SUPER) * TILE + part * S::N;
        above = S::half(p.scales.supers + at, S::N);
        if (p.offsets.own) above_offset = S::half(p.offsets.supers + at, S::N);
      }
      for (int b = 0; b < BLOCKS; ++b) {
        int64_t at = (tile * p.each() + unit * BLOCKS + b) * TILE + part * S::N;
        int64_t of_x = unit * BLOCKS + (SIZE == 16 ? turn_of(b) : b);
        auto scale = factors(p.scales, at, above);
        for (int m = 0; m < M; ++m) {
          auto sums = S::all(own[m].sums_of(SIZE)[of_x]);
          auto value = S::fma(S::to_float(found[m][b]), S::all(own[m].scales_of(SIZE)[of_x]),
                              S::mul(bias, sums));
          sum[m] = S::fma(scale, value, sum[m]);
          if (p.offsets.own) sum[m] = S::fma(factors(p.offsets, at, above_offset), sums, sum[m]);
        }
      }
    }
    for (int m = 0; m < M; ++m) S::store(y[m] + part * S::N, sum[m]);
  }

  static typename S::V factors(const Factors& f, int64_t at, typename S::V above) {
    if (!f.supers) return S::half(static_cast<const uint16_t*>(f.own) + at, S::N);
    return S::mul(S::small(static_cast<const int8_t*>(f.own) + at, S::N), above);
  }

  // found[m][b] = of each row: the unit's levels of block b times those of x[m].
  template <int M>
  static void products(const uint8_t* levels, const Rounded* x, int64_t unit, bool ask,
                       typename S::W (*found)[BLOCKS]) {
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < BLOCKS; ++b) found[m][b] = S::whole(0);
    auto add = [&](int64_t four, typename S::B of_four) {
      for (int m = 0; m < M; ++m) {
        uint32_t given;
        std::memcpy(&given, x[m].levels + unit * UNIT + 4 * four_of(four), 4);
        auto& to = found[m][4 * four / SIZE];
        to = dot<BITS>(to, of_four, S::same(given));
      }
    };
#pragma GCC unroll 16
    for (int64_t four = 0; four < UNIT * BITS / 32; ++four) {
      auto bytes = S::bytes(levels + 4 * TILE * four);
      if (ask) __builtin_prefetch(levels + 4 * TILE * four + TILES_AHEAD, 0, 2);
      if (BITS == 8) {
        add(four, bytes);
      } else {
        add(four, S::low(bytes)), add(four + 8, S::high(bytes));
      }
    }
  }
};

template <int BITS, int SIZE>
void tiles_of(const Packed& p, const Rounded& x, int64_t begin, int64_t end, float* y, int64_t stride) {
  constexpr int MOST = S::N == 16 ? 4 : 2;  // vectors whose sums fit into registers
  float found[MOST][TILE];
  for (int64_t tile = begin / TILE; tile * TILE < end; ++tile)
    for (int64_t m = 0; m < x.count;) {
      int64_t count = x.count - m < MOST ? 1 : MOST;
      for (int64_t part = 0; part < TILE / S::N; ++part) {
        if (count == 1) TileDots<BITS, SIZE>::template run<1>(p, x.at(m), tile, part, found);
        else TileDots<BITS, SIZE>::template run<MOST>(p, x.at(m), tile, part, found);
      }
      int64_t first = std::max(begin, tile * TILE), last = std::min(end, (tile + 1) * TILE);
      for (int64_t i = 0; i < count; ++i, ++m)
        std::copy(found[i] + first % TILE, found[i] + (last - tile * TILE), y + m * stride + first);
    }
}

void packed_tiles(const Packed& p, const Rounded& x, int64_t begin, int64_t end, float* y,
                  int64_t stride) {
  if (p.bits == 4 && p.block == 32) tiles_of<4, 32>(p, x, begin, end, y, stride);
  else if (p.bits == 4) tiles_of<4, 16>(p, x, begin, end, y, stride);
  else if (p.block == 32) tiles_of<8, 32>(p, x, begin, end, y, stride);
  else tiles_of<8, 16>(p, x, begin, end, y, stride);
}

void packed_matvec(const Packed& p, const Rounded& x, int64_t begin, int64_t end, float* y,
                   int64_t stride) {
  if (p.order == Order::tiles) return packed_tiles(p, x, begin, end, y, stride);
  packed_rows(p, x, [](int64_t row) { return row; }, begin, end, y, stride);
}

void packed_dots(const Packed& p, const Rounded& x, const int32_t* ids, int64_t first, int64_t n,
                 float* y) {
  if (ids) packed_rows(p, x, [&](int64_t j) { return int64_t(ids[j]); }, 0, n, y, 0);
  else packed_rows(p, x, [&](int64_t j) { return first + j; }, 0, n, y, 0);
}

// whole[0..64) += four neurons' levels times four bytes `u`, of a unit.
template <int BITS>
inline void add_unit(const S::B* rows, S::B u, int32_t* whole, int64_t half, bool first, S::W start) {
  typename S::B mixed[4];
  S::interleave(rows, mixed);
  for (int v = 0; v < 4; ++v) {
    int32_t* at = whole + 16 * v + half * S::N;
    S::store_whole(at, dot<BITS>(first ? start : S::load_whole(at), mixed[v], u));
  }
}

template <int BITS>
void add_four(const Packed& p, const uint8_t* const* rows, const uint8_t* const* next, uint32_t four,
              bool first, int start, int32_t* whole) {
  constexpr int64_t STEP = S::BYTES;
  auto u = S::same(four);
  auto begin = S::whole(start);
  int64_t columns = p.units() * UNIT;
  typename S::B own[4];
  if constexpr (BITS == 8) {
    for (int64_t c = 0; c < columns; c += STEP) {
      for (int r = 0; r < 4; ++r) {
        own[r] = S::bytes(rows[r] + c);
        __builtin_prefetch(next[r] + c, 0, 2);
      }
      add_unit<8>(own, u, whole + c / UNIT * UNIT, c % UNIT / STEP, first, begin);
    }
  } else {
    int64_t c = 0;
    for (; c + 2 * UNIT <= columns; c += 2 * UNIT)
      for (int64_t j = 0; j < UNIT; j += STEP) {
        typename S::B both[4];
        for (int r = 0; r < 4; ++r) {
          both[r] = S::bytes(rows[r] + c / 2 + j);
          __builtin_prefetch(next[r] + c / 2 + j, 0, 2);
          own[r] = S::low(both[r]);
        }
        add_unit<4>(own, u, whole + c, j / STEP, first, begin);
        for (int r = 0; r < 4; ++r) own[r] = S::high(both[r]);
        add_unit<4>(own, u, whole + c + UNIT, j / STEP, first, begin);
      }
    if (c < columns)
      for (int64_t j = 0; j < UNIT; j += STEP) {
        for (int r = 0; r < 4; ++r) own[r] = S::last(rows[r] + c / 2, j);
        add_unit<4>(own, u, whole + c, j / STEP, first, begin);
      }
  }
}

// to[c] += factors of a group of neurons times by[c] (or `factor` where by is null).
inline void add_factors(const Packed& p, const Factors& f, int64_t group, const int32_t* by,
                        float factor, float* to) {
  int64_t columns = p.units() * UNIT, super = group / (SUPER / p.block);
  auto times = S::all(factor);
  for (int64_t c = 0; c < columns; c += S::N) {
    auto value = f.supers ? S::small(static_cast<const int8_t*>(f.own) + group * columns + c, S::N)
                          : S::half(static_cast<const uint16_t*>(f.own) + group * columns + c, S::N);
    if (f.supers) value = S::mul(value, S::half(f.supers + super * columns + c, S::N));
    value = S::mul(value, times);
    auto sum = S::load(to + c);
    S::store(to + c, by ? S::fma(S::to_float(S::load_whole(by + c)), value, sum) : S::add(sum, value));
  }
}

// Rounds GROUP values to levels of 8 bits: their scale, and the sums of both halves' levels.  What is
// no number, or infinite, makes the whole group none; numbers whose inverse is infinite count as 0.
inline float round_group(const float* from, int8_t* levels, int* halves) {
  constexpr int COUNT = GROUP / S::N;
  typename S::V x[COUNT], most = S::zero(), odd = S::zero();
  for (int i = 0; i < COUNT; ++i) {
    x[i] = S::load(from + i * S::N);
    most = S::most(most, S::magnitude(x[i]));
    odd = S::add(odd, S::sub(x[i], x[i]));
  }
  float largest = S::largest(most);
  bool none = !(S::sum(odd) == 0);
  auto back = S::all(largest >= 0x1p-120f && !none ? 127.0f / largest : 0.0f);
  halves[0] = halves[1] = 0;
  for (int i = 0; i < COUNT; ++i) {
    auto level = none ? S::whole(0) : S::nearest(S::mul(x[i], back));
    S::store_small(levels + i * S::N, level);
    halves[i * S::N / 16] += S::sum_of(level);
  }
  return none ? std::nanf("") : largest / 127.0f;
}

// Adds neurons 0 to n of one block; behind them, `left` in all, are those whose turn is next.
void add_block(const Packed& p, const int32_t* ids, const float* u, int64_t n, int64_t left, float* sums,
               int32_t* whole) {
  float values[GROUP] = {};
  std::copy(u, u + n, values);
  int8_t levels[GROUP];
  int halves[2];
  float scale = round_group(values, levels, halves);
  if (scale == 0) return;
  int total = halves[0] + halves[1];
  auto row = [&](int64_t i, int64_t end) {
    return p.levels + int64_t(ids[i < end ? i : end - 1]) * p.pitch;
  };
  for (int64_t i = 0; i < n; i += 4) {
    uint32_t four;
    std::memcpy(&four, levels + i, 4);
    const uint8_t *rows[4], *next[4];
    int64_t later = i + 4 < n ? i + 4 : n;
    for (int r = 0; r < 4; ++r) rows[r] = row(i + r, n), next[r] = row(later + r, left);
    if (p.bits == 4) add_four<4>(p, rows, next, four, i == 0, -p.bias * total, whole);
    else add_four<8>(p, rows, next, four, i == 0, -p.bias * total, whole);
  }
  add_factors(p, p.scales, ids[0] / p.block, whole, scale, sums);
  if (p.offsets.own) add_factors(p, p.offsets, ids[0] / p.block, nullptr, scale * float(total), sums);
}

void packed_add_neurons(const Packed& p, const int32_t* ids, const float* u, int64_t n, float* sums,
                        int32_t* whole) {
  for (int64_t begin = 0, end; begin < n; begin = end) {
    for (end = begin + 1; end < n && ids[end] / p.block == ids[begin] / p.block;) ++end;
    add_block(p, ids + begin, u + begin, end - begin, n - begin, sums, whole);
  }
}

void packed_round(const float* from, int64_t n, int8_t* levels, float* scales, float* sums) {
  int64_t size = (n + UNIT - 1) / UNIT * UNIT, facts = Rounded::facts(size);
  float *small_scales = scales + facts, *small_sums = sums + facts;
  for (int64_t g = 0; g < size / GROUP; ++g) {
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
    for (int64_t k = 0; k < GROUP / 4; ++k)
      std::memcpy(unit + 4 * four_of(g % 2 * 8 + k), found + 4 * k, 4);
    sums[g] = scale * float(halves[0] + halves[1]);
    for (int half = 0; half < 2; ++half) {
      int64_t at = g / 2 * 4 + turn_of(g % 2 * 2 + half);
      small_scales[at] = scale;
      small_sums[at] = scale * float(halves[half]);
    }
  }
  std::fill(scales + size / 32, small_scales, 0.0f), std::fill(sums + size / 32, small_sums, 0.0f);
  std::fill(small_scales + size / 16, small_scales + facts, 0.0f);
  std::fill(small_sums + size / 16, small_sums + facts, 0.0f);
}

// e to the x, to about one part in 10^7; x is cut off where the result would leave float32.
inline S::V exponential(S::V x) {
  x = S::most(S::least(x, S::all(88.0f)), S::all(-87.0f));
  auto whole = S::nearest(S::mul(x, S::all(1.44269504f)));
  auto n = S::to_float(whole);
  auto rest = S::fma(n, S::all(-0.693359375f), x);
  rest = S::fma(n, S::all(2.12194440e-4f), rest);
  auto y = S::all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = S::fma(y, rest, S::all(c));
  y = S::fma(S::mul(rest, rest), y, S::add(rest, S::all(1.0f)));
  return S::mul(y, S::power_of_two(whole));
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

// Levels of a unit of a row, by their places.
inline void levels_by_place(const Packed& p, int64_t row, int64_t unit, uint8_t* to) {
  const uint8_t* from = p.levels + row * p.pitch;
  if (p.order == Order::tiles) {
    from = p.levels + row / TILE * TILE * p.pitch + unit * TILE * UNIT * p.bits / 8 + row % TILE * 4;
    for (int64_t c = 0; c < UNIT * p.bits / 8; ++c) {
      uint8_t one = from[c / 4 * 4 * TILE + c % 4];
      if (p.bits == 8) to[c] = one;
      else to[c] = one & 15, to[c + 32] = one >> 4;
    }
  } else if (p.bits == 8) {
    std::memcpy(to, from + unit * UNIT, UNIT);
  } else if (unit % 2 == 0 && unit + 1 == p.units()) {
    for (int64_t j = 0; j < 32; ++j) to[j] = from[unit * 32 + j] & 15;
    for (int64_t j = 0; j < 32; ++j) to[j + 32] = from[unit * 32 + j] >> 4;
  } else {
    int shift = unit % 2 ? 4 : 0;
    for (int64_t j = 0; j < UNIT; ++j) to[j] = from[unit / 2 * UNIT + j] >> shift & 15;
  }
}

// Levels of a unit of a row, by columns.
inline void unit_levels(const Packed& p, int64_t row, int64_t unit, uint8_t* to) {
  uint8_t own[UNIT];
  levels_by_place(p, row, unit, own);
  for (int64_t c = 0; c < UNIT; c += 4) std::memcpy(to + c, own + place_of(p.order, c), 4);
}

// to[0..UNIT) = factors of a unit's columns.
inline void unit_factors(const Packed& p, const Factors& f, int64_t row, int64_t unit, float* to) {
  if (p.order == Order::neurons) {
    int64_t at = row / p.block * p.each() + unit * UNIT, above = row / SUPER * p.each() + unit * UNIT;
    for (int64_t c = 0; c < UNIT; c += S::N) {
      if (!f.supers) S::store(to + c, S::half(static_cast<const uint16_t*>(f.own) + at + c, S::N));
      else
        S::store(to + c, S::mul(S::small(static_cast<const int8_t*>(f.own) + at + c, S::N),
                                S::half(f.supers + above + c, S::N)));
    }
    return;
  }
  int64_t blocks = UNIT / p.block;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t at = p.factor_of(row, unit * blocks + b);
    int64_t above = p.super_of(row, unit * UNIT / SUPER);
    float own = f.supers ? float(static_cast<const int8_t*>(f.own)[at]) * half_to_float(f.supers[above])
                         : half_to_float(static_cast<const uint16_t*>(f.own)[at]);
    for (int64_t j = 0; j < p.block; ++j) to[b * p.block + j] = own;
  }
}

inline uint16_t to_bf16(float x) {
  uint32_t bits = to_bits(x);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

void packed_dequantise(const Packed& p, int64_t row, Dtype dtype, void* to) {
  float bias = float(p.bias);
  for (int64_t unit = 0; unit < p.units(); ++unit) {
    uint8_t levels[UNIT];
    alignas(64) float scales[UNIT], offsets[UNIT] = {};
    unit_levels(p, row, unit, levels);
    unit_factors(p, p.scales, row, unit, scales);
    if (p.offsets.own) unit_factors(p, p.offsets, row, unit, offsets);
    for (int64_t j = 0; j < UNIT; ++j) scales[j] = scales[j] * (float(levels[j]) - bias) + offsets[j];
    int64_t n = std::min<int64_t>(UNIT, p.columns - unit * UNIT);
    if (dtype == Dtype::f32) {
      std::memcpy(static_cast<float*>(to) + unit * UNIT, scales, size_t(n) * 4);
    } else {
      uint16_t narrow[UNIT];
      for (int64_t j = 0; j < UNIT; ++j) narrow[j] = to_bf16(scales[j]);
      std::memcpy(static_cast<uint16_t*>(to) + unit * UNIT, narrow, size_t(n) * 2);
    }
  }
}

const PackedKernels packed_table = {packed_matvec, packed_dots,     packed_add_neurons,
                                    packed_round,  packed_activate, packed_dequantise};
