// The kernels, written once over a set of vectors `S` of one CPU kind; included by kernels_*.cpp
// inside their namespace, after `S`.
//
// S: N lanes of float; V; all, zero, load(const float*), load(const bf16*), fma, sum, store; levels:
// N bytes of two levels + 8 each, as whole numbers; pairs, dot_bf16 and unpack where there are
// products of bfloat16 pairs (PAIRS).

constexpr int BLOCK = 4;  // neurons at a time: their rows stay in the first cache for all inputs

inline float wide(float x) { return x; }
inline float wide(bf16 x) { return from_bits(uint32_t(x) << 16); }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) {
  uint32_t b = to_bits(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) {
    *to = bf16((b >> 16) | 0x40);
    return;
  }
  *to = bf16((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}

// Asks for R rows while as many are read: in the order of their addresses, in which memory is read
// fastest, where they are neighbours; else in all of them at once.  `rows` may be null.
template <class T, int R>
class Ask {
 public:
  Ask(const T* const* rows, int64_t size)
      : rows_(rows), neighbours_(rows && rows[R - 1] - rows[0] == (R - 1) * size) {}
  // As much as values i to i + N of each.
  template <int N>
  void some(int64_t i) const {
    constexpr int LINE = 64 / int(sizeof(T));
    if (neighbours_)
      for (int j = 0; j < R * N; j += LINE) __builtin_prefetch(rows_[0] + R * i + j, 0, 2);
    else if (rows_ && i % LINE == 0)
      for (int r = 0; r < R; ++r) __builtin_prefetch(rows_[r] + i, 0, 2);
  }

 private:
  const T* const* rows_;
  bool neighbours_;
};

// R rows times C vectors, which lie one after the other: out[c][r].  What is read of a row serves all
// of them; the sums of each are those that it has alone.
template <int R, int C>
inline void dots(const float* const* rows, const void*, const float* x, int64_t n, float (*out)[R],
                 const float* const* next) {
  typename S::V a[C][R];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) a[c][r] = S::zero();
  const Ask<float, R> ask(next, n);
  int64_t i = 0;
  for (; i + S::N <= n; i += S::N) {
    ask.template some<S::N>(i);
    typename S::V v[C];
    for (int c = 0; c < C; ++c) v[c] = S::load(x + c * n + i);
    for (int r = 0; r < R; ++r) {
      auto row = S::load(rows[r] + i);
      for (int c = 0; c < C; ++c) a[c][r] = S::fma(row, v[c], a[c][r]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) out[c][r] = S::sum(a[c][r]);
  for (; i < n; ++i)
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) out[c][r] += rows[r][i] * x[c * n + i];
}

template <int R, int C>
inline void dots(const bf16* const* rows, const void* raw, const float* x, int64_t n, float (*out)[R],
                 const bf16* const* next) {
  typename S::V a[C][R];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) a[c][r] = S::zero();
  const Ask<bf16, R> ask(next, n);
  int64_t i = 0;
  if constexpr (S::PAIRS) {
    const bf16* narrow_x = static_cast<const bf16*>(raw);
    for (; i + 2 * S::N <= n; i += 2 * S::N) {
      ask.template some<2 * S::N>(i);
      decltype(S::pairs(narrow_x)) v[C];
      for (int c = 0; c < C; ++c) v[c] = S::pairs(narrow_x + c * n + i);
      for (int r = 0; r < R; ++r) {
        auto row = S::pairs(rows[r] + i);
        for (int c = 0; c < C; ++c) a[c][r] = S::dot_bf16(a[c][r], row, v[c]);
      }
    }
  }
  for (; i + S::N <= n; i += S::N) {
    ask.template some<S::N>(i);
    typename S::V v[C];
    for (int c = 0; c < C; ++c) v[c] = S::load(x + c * n + i);
    for (int r = 0; r < R; ++r) {
      auto row = S::load(rows[r] + i);
      for (int c = 0; c < C; ++c) a[c][r] = S::fma(row, v[c], a[c][r]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) out[c][r] = S::sum(a[c][r]);
  for (; i < n; ++i)
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) out[c][r] += wide(rows[r][i]) * x[c * n + i];
}

// The same with vectors m to m + C of `x`.
template <class T, int R, int C>
inline void dots_of(const T* const* rows, const Input& x, int64_t m, float (*out)[R],
                    const T* const* next = nullptr) {
  const T* raw = static_cast<const T*>(x.raw) + m * x.size;
  dots<R, C>(rows, raw, x.wide + m * x.size, x.size, out, m ? nullptr : next);
}

// sums[c] += u[c][0] rows[0] + ... + u[c][R-1] rows[R-1], C vectors one after the other.
template <class T, int R, int C>
inline void add_rows(const T* const* rows, const float (*u)[R], int64_t n, float* sums,
                     const T* const* next = nullptr) {
  typename S::V by[C][R];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) by[c][r] = S::all(u[c][r]);
  const Ask<T, R> ask(next, n);
  int64_t i = 0;
  for (; i + S::N <= n; i += S::N) {
    ask.template some<S::N>(i);
    typename S::V row[R];
    for (int r = 0; r < R; ++r) row[r] = S::load(rows[r] + i);
    for (int c = 0; c < C; ++c) {
      auto v = S::load(sums + c * n + i);
      for (int r = 0; r < R; ++r) v = S::fma(row[r], by[c][r], v);
      S::store(sums + c * n + i, v);
    }
  }
  for (; i < n; ++i)
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) sums[c * n + i] += u[c][r] * wide(rows[r][i]);
}

// Calls work(C, m) for vectors m to m + C until there were `count`: as many as the registers hold.
template <class Work>
inline void in_groups(int64_t count, const Work& work) {
  constexpr int MOST = S::N == 16 ? 4 : 2;
  int64_t m = 0;
  for (; m + MOST <= count; m += MOST) work(std::integral_constant<int, MOST>(), m);
  for (; m < count; ++m) work(std::integral_constant<int, 1>(), m);
}

inline float activate(Act act, float x) {
  switch (act) {
    case Act::silu:
      return x / (1.0f + std::exp(-x));
    case Act::gelu:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case Act::gelu_tanh:
      return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Act::relu:
      return x < 0 ? 0 : x;  // not-a-number stays what it is
    default: {
      float y = x < 0 ? 0 : x;
      return y * y;
    }
  }
}

// y[m * stride + j] = row(j) . x[m] for R rows from j on; R rows after these are needed next.
template <class T, int R, class Row>
void dots_block(const Row& row, const Input& x, int64_t j, float* y, int64_t stride) {
  const T *rows[R], *next[R];
  for (int r = 0; r < R; ++r) rows[r] = row(j + r), next[r] = row(j + R + r);
  in_groups(x.count, [&](auto group, int64_t m) {
    constexpr int C = decltype(group)::value;
    float found[C][R];
    dots_of<T, R, C>(rows, x, m, found, next);
    for (int c = 0; c < C; ++c) std::copy_n(found[c], R, y + (m + c) * stride + j);
  });
}

// y[m * stride + j] = row(j) . x[m] for j < n; rows n and on are those that are needed afterwards.
template <class T, class Row>
void dots_rows(const Row& row, const Input& x, int64_t n, float* y, int64_t stride) {
  int64_t j = 0;
  for (; j + BLOCK <= n; j += BLOCK) dots_block<T, BLOCK>(row, x, j, y, stride);
  for (; j < n; ++j) dots_block<T, 1>(row, x, j, y, stride);
}

template <class T>
void matvec_rows(const T* rows, const T* bias, const Input& x, int64_t begin, int64_t end, float* y,
                 int64_t stride) {
  auto row = [&](int64_t j) { return rows + (begin + j) * x.size; };
  dots_rows<T>(row, x, end - begin, y + begin, stride);
  for (int64_t m = 0; bias && m < x.count; ++m)
    for (int64_t i = begin; i < end; ++i) y[m * stride + i] += wide(bias[i]);
}

constexpr int64_t STRETCH = 128, INPUTS = 32;  // whose activations are worked on at a time

// sums[m] += the sum of u[m * STRETCH + j] row(j) over R rows from j on; as above.
template <class T, int R, class Row>
void add_block(const Row& row, const float* u, const Input& x, int64_t j, float* sums) {
  const T *rows[R], *next[R];
  for (int r = 0; r < R; ++r) rows[r] = row(j + r), next[r] = row(j + R + r);
  in_groups(x.count, [&](auto group, int64_t m) {
    constexpr int C = decltype(group)::value;
    float by[C][R];
    for (int c = 0; c < C; ++c) std::copy_n(u + (m + c) * STRETCH + j, R, by[c]);
    add_rows<T, R, C>(rows, by, x.size, sums + m * x.size, m ? nullptr : next);
  });
}

// Neurons id(0) to id(n - 1); those from id(n) on are needed afterwards.  One matrix after the other:
// their rows are read as one stream each.
template <class T, class Id>
void ffn_some(const Ffn& f, const Input& x, const Id& id, int64_t n, float* sums, float* u,
              int64_t u_stride) {
  const T* up_bias = static_cast<const T*>(f.up_bias);
  const T* gate_bias = static_cast<const T*>(f.gate_bias);
  float gate[INPUTS * STRETCH], up[INPUTS * STRETCH];
  // row(j) of a matrix for j < n, and then what is read next: rows of `after` from id(first) on
  auto rows = [&](const void* of, const void* after, int64_t first = 0) {
    return [=, &id, &x](int64_t j) {
      return static_cast<const T*>(j < n ? of : after) + id(j < n ? j : j - n + first) * x.size;
    };
  };
  if (f.gate) dots_rows<T>(rows(f.gate, f.up), x, n, gate, STRETCH);
  dots_rows<T>(rows(f.up, f.down), x, n, up, STRETCH);
  for (int64_t m = 0; m < x.count; ++m)
    for (int64_t j = 0; j < n; ++j) {
      float& value = up[m * STRETCH + j];
      if (up_bias) value += wide(up_bias[id(j)]);
      if (!f.gate) value = activate(f.act, value);
      else value *= activate(f.act, gate[m * STRETCH + j] + (gate_bias ? wide(gate_bias[id(j)]) : 0.0f));
      if (u) u[m * u_stride + j] = value;
      if (f.mean) value -= f.mean[id(j)];
    }
  auto down = rows(f.down, f.gate ? f.gate : f.up, n);
  int64_t j = 0;
  for (; j + BLOCK <= n; j += BLOCK) add_block<T, BLOCK>(down, up, x, j, sums);
  for (; j < n; ++j) add_block<T, 1>(down, up, x, j, sums);
}

template <class T>
void ffn_rows(const Ffn& f, const Input& x, int64_t begin, int64_t end, float* sums, float* u,
              int64_t u_stride) {
  for (int64_t place = begin, n; place < end; place += n) {
    n = std::min(end - place, STRETCH);
    auto id = [&](int64_t j) {
      j = std::min(place + j, f.kept - 1);
      return f.ids ? int64_t(f.ids[j]) : j;
    };
    for (int64_t m = 0, count; m < x.count; m += count) {
      count = std::min(x.count - m, INPUTS);
      Input some{static_cast<const T*>(x.raw) + m * x.size, x.wide + m * x.size, count, x.size};
      ffn_some<T>(f, some, id, n, sums + m * x.size, u ? u + m * u_stride + place : nullptr, u_stride);
    }
  }
}

template <class T>
void features_rows(const Ffn& f, const Input& x, int64_t begin, int64_t end, float* sums) {
  for (int64_t row = begin; row < end; ++row) {
    const T* basis = static_cast<const T*>(f.basis) + row * x.size;
    const T* adds = static_cast<const T*>(f.features) + row * x.size;
    for (int64_t m = 0; m < x.count; ++m) {
      float found[1][1];
      dots_of<T, 1, 1>(&basis, x, m, found);
      add_rows<T, 1, 1>(&adds, found, x.size, sums + m * x.size);
    }
  }
}

constexpr int64_t GROUP = 32;  // of the 4-bit proxies that have a way of their own

// One row of a 4-bit copy in such groups times x; D is a multiple of 2 GROUP.
template <class T, class Set = S>
float copied(const uint8_t* levels, const uint16_t* scales, const T* raw, const float* x, int64_t size) {
  int64_t half = size / 2, groups = half / GROUP;
  auto total = S::zero();
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* bytes = levels + g * GROUP;
    auto low = S::all(wide(bf16(scales[g]))), high = S::all(wide(bf16(scales[groups + g])));
    if constexpr (Set::PAIRS && sizeof(T) == 2) {
      auto levels_of = Set::unpack(bytes);
      auto a = Set::dot_bf16(S::zero(), levels_of.low, Set::pairs(raw + g * GROUP));
      auto b = Set::dot_bf16(S::zero(), levels_of.high, Set::pairs(raw + half + g * GROUP));
      total = S::fma(high, b, S::fma(low, a, total));
    } else {
      auto a = S::zero(), b = S::zero();
      for (int64_t j = 0; j < GROUP; j += S::N) {
        auto levels_of = S::levels(bytes + j);
        a = S::fma(levels_of.low, S::load(x + g * GROUP + j), a);
        b = S::fma(levels_of.high, S::load(x + half + g * GROUP + j), b);
      }
      total = S::fma(high, b, S::fma(low, a, total));
    }
  }
  return S::sum(total);
}

// One row of any copy times x.
inline float copied_any(const Proxies& c, const uint8_t* levels, const uint16_t* scales, const float* x,
                        int64_t size) {
  constexpr int64_t MOST = 64;  // values at a time
  int64_t half = (size + 1) / 2;
  float total = 0, values[MOST];
  for (int64_t d = 0, end; d < size; d = end) {
    end = std::min({size, (d / c.group + 1) * c.group, d + MOST});
    for (int64_t j = d; j < end; ++j)
      values[j - d] = float(c.bits == 8 ? int(int8_t(levels[j]))
                                        : (j < half ? levels[j] & 15 : levels[j - half] >> 4) - 8);
    const float* row = values;
    float found[1][1];
    dots<1, 1>(&row, nullptr, x + d, end - d, found, nullptr);
    total += wide(bf16(scales[d / c.group])) * found[0][0];
  }
  return total;
}

template <class T>
void estimate_rows(const Proxies& c, const Ffn& f, const Input& x, int64_t begin, int64_t end,
                   float* strength) {
  const T* raw = static_cast<const T*>(x.raw);
  const T* up_bias = static_cast<const T*>(f.up_bias);
  const T* gate_bias = static_cast<const T*>(f.gate_bias);
  int64_t bytes = c.bits == 8 ? x.size : (x.size + 1) / 2;
  int64_t groups = (x.size + c.group - 1) / c.group;
  bool usual = c.bits == 4 && c.group == GROUP && x.size % (2 * GROUP) == 0;
  auto product = [&](const uint8_t* levels, const uint16_t* scales, int64_t i, const T* bias) {
    const uint8_t* row = levels + i * bytes;
    const uint16_t* by = scales + i * groups;
    float found = usual ? copied(row, by, raw, x.wide, x.size) : copied_any(c, row, by, x.wide, x.size);
    return bias ? found + wide(bias[i]) : found;
  };
  for (int64_t place = begin; place < end; ++place) {
    int64_t i = f.ids ? f.ids[place] : place;
    float up = product(c.up, c.up_scales, i, up_bias);
    float u =
        c.gate ? activate(f.act, product(c.gate, c.gate_scales, i, gate_bias)) * up : activate(f.act, up);
    strength[place] = std::fabs(u) * c.saliency[i];
  }
}

constexpr int64_t AHEAD = 12;  // rows that are asked for before their turn

// C factors of W vectors of values, held in registers while the rows go by.
template <class T, int C, int W>
inline void fold_tile(const T* rows, const int32_t* ids, int64_t n, int64_t size, const float* factors,
                      int64_t count, int64_t at, float* to) {
  typename S::V a[C][W];
  for (int c = 0; c < C; ++c)
    for (int w = 0; w < W; ++w) a[c][w] = S::zero();
  for (int64_t k = 0; k < n; ++k) {
    const T* row = rows + int64_t(ids[k]) * size + at;
    __builtin_prefetch(rows + int64_t(ids[k + AHEAD < n ? k + AHEAD : k]) * size + at);
    typename S::V v[W];
    for (int w = 0; w < W; ++w) v[w] = S::load(row + w * S::N);
    for (int c = 0; c < C; ++c) {
      auto factor = S::all(factors[k * count + c]);
      for (int w = 0; w < W; ++w) a[c][w] = S::fma(v[w], factor, a[c][w]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int w = 0; w < W; ++w) S::store(to + c * size + at + w * S::N, a[c][w]);
}

template <class T>
void fold_rows(const T* rows, const int32_t* ids, int64_t n, int64_t size, const float* factors,
               int64_t count, int64_t begin, int64_t end, float* to) {
  constexpr int MOST = S::N == 16 ? 11 : 4, VECTORS = 2;  // what the registers hold; 33 = 3 x 11
  int64_t at = begin;
  for (; at + VECTORS * S::N <= end; at += VECTORS * S::N) {
    int64_t f = 0;
    auto tiles = [&](auto tile) {
      constexpr int C = decltype(tile)::value;
      for (; f + C <= count; f += C)
        fold_tile<T, C, VECTORS>(rows, ids, n, size, factors + f, count, at, to + f * size);
    };
    tiles(std::integral_constant<int, MOST>());
    tiles(std::integral_constant<int, 4>());
    tiles(std::integral_constant<int, 1>());
  }
  for (; at < end; ++at)
    for (int64_t f = 0; f < count; ++f) {
      float total = 0;
      for (int64_t k = 0; k < n; ++k)
        total += wide(rows[int64_t(ids[k]) * size + at]) * factors[k * count + f];
      to[f * size + at] = total;
    }
}

// e to the x, to about one part in 10^7; x is cut off where the result would leave float32.
inline S::V exponential(S::V x) {
  x = S::max(S::min(x, S::all(88.0f)), S::all(-87.0f));
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

// scores[0..n) = exp(scale scores - most), and 0 up to `room`, whole vectors; returns their sum.
// most: at least what it was, and at least their maximum.
inline float soften(float* scores, int64_t n, int64_t room, float scale, float& most) {
  std::fill(scores + n, scores + room, -INFINITY);
  auto largest = S::all(most), total = S::zero(), by = S::all(scale);
  for (int64_t i = 0; i < room; i += S::N) {
    auto own = S::mul(S::load(scores + i), by);
    S::store(scores + i, own), largest = S::max(largest, own);
  }
  largest = S::all(most = S::largest(largest));
  for (int64_t i = 0; i < room; i += S::N) {
    S::store(scores + i, exponential(S::sub(S::load(scores + i), largest)));
    if (i + S::N > n) std::fill(scores + std::max(i, n), scores + i + S::N, 0.0f);
    total = S::add(total, S::load(scores + i));
  }
  return S::sum(total);
}

constexpr int KEYS = 4;     // that are multiplied with a query at a time: S::sums adds up four vectors
constexpr int COLUMNS = 4;  // vectors of each sum of values that are held in registers
constexpr int SET = S::N == 16 ? 4 : 3;  // queries at a time: the registers hold no more sums
inline int64_t sets_of(int64_t count) { return (count + SET - 1) / SET; }

// Asks for values that are read soon, in so many steps and in the order of their addresses.
class Gradually {
 public:
  template <class T>
  Gradually(const T* values, int64_t count, int64_t steps)
      : at_(reinterpret_cast<uintptr_t>(values)),
        bytes_(count * int64_t(sizeof(T))),
        step_(bytes_ / steps + 1) {}
  void ask() {
    due_ = std::min(due_ + step_, bytes_);
    for (; asked_ < due_; asked_ += 64) __builtin_prefetch(reinterpret_cast<const char*>(at_ + asked_));
  }

 private:
  uintptr_t at_;
  int64_t bytes_, step_, due_ = 0, asked_ = 0;
};

// scores[c, r] = queries[c] . keys[r] of C queries and KEYS keys: each is read once for all queries.
template <int C, class T>
inline void key_dots(const float* queries, const T* const* keys, int64_t size, float* scores) {
  typename S::V sums[C][KEYS];
  for (auto& of_query : sums)
    for (auto& one : of_query) one = S::zero();
  int64_t i = 0;
  for (; i + S::N <= size; i += S::N) {
    typename S::V own[C];
    for (int c = 0; c < C; ++c) own[c] = S::load(queries + c * size + i);
    for (int r = 0; r < KEYS; ++r) {
      auto key = S::load(keys[r] + i);
      for (int c = 0; c < C; ++c) sums[c][r] = S::fma(key, own[c], sums[c][r]);
    }
  }
  for (int c = 0; c < C; ++c) S::sums(sums[c], scores + c * POSITIONS);
  for (; i < size; ++i)
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < KEYS; ++r) scores[c * POSITIONS + r] += wide(keys[r][i]) * queries[c * size + i];
}

// to[c] = factors[c] to[c] + shares[c, 0] values[0] + ... of n rows: W vectors of C sums, in registers.
template <int C, int W, class T>
inline void add_tile(const T* values, int64_t n, int64_t stride, const float* shares, const float* factors,
                     float* to, int64_t pitch, Gradually& next) {
  typename S::V sums[C][W];
  for (int c = 0; c < C; ++c)
    for (int w = 0; w < W; ++w) sums[c][w] = S::mul(S::load(to + c * pitch + w * S::N), S::all(factors[c]));
  for (int64_t t = 0; t < n; ++t) {
    if (t % KEYS == 0) next.ask();
    typename S::V by[C];
    for (int c = 0; c < C; ++c) by[c] = S::all(shares[c * POSITIONS + t]);
    for (int w = 0; w < W; ++w) {
      auto own = S::load(values + t * stride + w * S::N);
      for (int c = 0; c < C; ++c) sums[c][w] = S::fma(own, by[c], sums[c][w]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int w = 0; w < W; ++w) S::store(to + c * pitch + w * S::N, sums[c][w]);
}

template <int C, class T>
inline void add_values(const T* values, int64_t n, int64_t stride, int64_t size, const float* shares,
                       const float* factors, float* to, int64_t pitch, Gradually& next) {
  int64_t i = 0;
  for (; i + COLUMNS * S::N <= size; i += COLUMNS * S::N)
    add_tile<C, COLUMNS>(values + i, n, stride, shares, factors, to + i, pitch, next);
  for (; i + S::N <= size; i += S::N)
    add_tile<C, 1>(values + i, n, stride, shares, factors, to + i, pitch, next);
  for (; i < size; ++i)
    for (int c = 0; c < C; ++c) {
      float sum = factors[c] * to[c * pitch + i];
      for (int64_t t = 0; t < n; ++t) sum += shares[c * POSITIONS + t] * wide(values[t * stride + i]);
      to[c * pitch + i] = sum;
    }
}

// Calls work(C, first) for queries first to first + C until there were `count`: about as many each time.
template <class Work>
inline void in_sets(int64_t count, const Work& work) {
  for (int64_t first = 0, sets = sets_of(count), own; sets; --sets, first += own) {
    own = (count - first + sets - 1) / sets;
    if (own == 1) work(std::integral_constant<int, 1>(), first);
    else if (own == 2) work(std::integral_constant<int, 2>(), first);
    else if (SET == 3 || own == SET) work(std::integral_constant<int, SET>(), first);
    else work(std::integral_constant<int, 3>(), first);
  }
}

// Some positions at a time: while one half of what they need is worked on, the other is asked for.
template <class T>
void attend_group(const float* queries, int64_t count, const T* keys, const T* values, int64_t n,
                  int64_t size, float cap, float* scores, float* to) {
  int64_t pitch = size + 2, blocks = (n + POSITIONS - 1) / POSITIONS;
  int64_t each = ((n + blocks - 1) / blocks + KEYS - 1) / KEYS * KEYS;
  float* factors = scores + count * POSITIONS;  // of the sums so far, as larger scores are found
  Gradually(keys, std::min(each, n) * size, 1).ask();
  for (int64_t q = 0; q < count; ++q) {
    std::fill_n(to + q * pitch, size, 0.0f);
    to[q * pitch + size] = -INFINITY, to[q * pitch + size + 1] = 0;
  }
  for (int64_t begin = 0; begin < n; begin += each) {
    int64_t own = std::min(each, n - begin), fours = (own + KEYS - 1) / KEYS;
    Gradually own_values(values + begin * size, own * size, fours);
    for (int64_t t = 0; t < own; t += KEYS) {
      const T* four[KEYS];  // beyond the last one: that one again
      for (int64_t r = 0; r < KEYS; ++r) four[r] = keys + (begin + std::min(t + r, own - 1)) * size;
      own_values.ask();
      in_sets(count, [&](auto set, int64_t first) {
        key_dots<decltype(set)::value>(queries + first * size, four, size, scores + first * POSITIONS + t);
      });
    }
    for (int64_t q = 0; q < count; ++q) {
      float *line = scores + q * POSITIONS, *facts = to + q * pitch + size, before = facts[0];
      for (int64_t t = 0; t < own && cap; ++t) line[t] = cap * std::tanh(line[t] / cap);
      float total = soften(line, own, (own + S::N - 1) / S::N * S::N, 1, facts[0]);
      factors[q] = before == facts[0] ? 1 : std::exp(before - facts[0]);
      facts[1] = factors[q] * facts[1] + total;
    }
    // beyond the last ones are most often those of the part that comes next
    int64_t tiles = std::max<int64_t>(1, size / (COLUMNS * S::N));
    Gradually next_keys(keys + (begin + own) * size, each * size, sets_of(count) * tiles * fours);
    in_sets(count, [&](auto set, int64_t first) {
      add_values<decltype(set)::value>(values + begin * size, own, size, size, scores + first * POSITIONS,
                                       factors + first, to + first * pitch, pitch, next_keys);
    });
  }
}

void merge(const float* parts, int64_t count, int64_t stride, int64_t size, float* to) {
  float shares[POSITIONS], factor = 0, most = -INFINITY, total = 0;
  for (int64_t one = 0; one < count; ++one) shares[one] = parts[one * stride + size];
  soften(shares, count, (count + S::N - 1) / S::N * S::N, 1, most);
  for (int64_t one = 0; one < count; ++one) total += shares[one] * parts[one * stride + size + 1];
  for (int64_t one = 0; one < count; ++one) shares[one] /= total;
  std::fill_n(to, size, 0.0f);
  Gradually none(to, 0, 1);
  add_values<1>(parts, count, stride, size, shares, &factor, to, size, none);
}

#define DART_BY_DTYPE(call)  \
  if (dtype == Dtype::f32) { \
    using T = float;         \
    call;                    \
  } else {                   \
    using T = bf16;          \
    call;                    \
  }

void matvec(Dtype dtype, const void* rows, const void* bias, const Input& x, int64_t begin, int64_t end,
            float* y, int64_t stride) {
  DART_BY_DTYPE(
      matvec_rows<T>(static_cast<const T*>(rows), static_cast<const T*>(bias), x, begin, end, y, stride))
}

void ffn(Dtype dtype, const Ffn& f, const Input& x, int64_t begin, int64_t end, float* sums, float* u,
         int64_t u_stride) {
  DART_BY_DTYPE(ffn_rows<T>(f, x, begin, end, sums, u, u_stride))
}

void low_rank(Dtype dtype, const Ffn& f, const Input& x, int64_t begin, int64_t end, float* sums) {
  DART_BY_DTYPE(features_rows<T>(f, x, begin, end, sums))
}

void estimate(Dtype dtype, const Proxies& c, const Ffn& f, const Input& x, int64_t begin, int64_t end,
              float* strength) {
  DART_BY_DTYPE(estimate_rows<T>(c, f, x, begin, end, strength))
}

void fold(Dtype dtype, const void* rows, const int32_t* ids, int64_t n, int64_t size, const float* factors,
          int64_t count, int64_t begin, int64_t end, float* to) {
  DART_BY_DTYPE(fold_rows<T>(static_cast<const T*>(rows), ids, n, size, factors, count, begin, end, to))
}

void attend(Dtype dtype, const float* queries, int64_t count, const void* keys, const void* values, int64_t n,
            int64_t size, float cap, float* scores, float* to) {
  DART_BY_DTYPE(attend_group<T>(queries, count, static_cast<const T*>(keys), static_cast<const T*>(values), n,
                                size, cap, scores, to))
}

void round(Dtype dtype, const float* from, void* to, int64_t n) {
  DART_BY_DTYPE(for (int64_t i = 0; i < n; ++i) narrow(from[i], static_cast<T*>(to) + i))
}

void widen(Dtype dtype, const void* from, float* to, int64_t n) {
  DART_BY_DTYPE(for (int64_t i = 0; i < n; ++i) to[i] = wide(static_cast<const T*>(from)[i]))
}

void add(Dtype dtype, const void* bias, int64_t begin, int64_t end, float* y) {
  DART_BY_DTYPE(for (int64_t i = begin; i < end; ++i) y[i - begin] += wide(static_cast<const T*>(bias)[i]))
}

void add_at(Dtype dtype, const void* bias, const int32_t* ids, int64_t n, float* y) {
  DART_BY_DTYPE(for (int64_t i = 0; i < n; ++i) y[i] += wide(static_cast<const T*>(bias)[ids[i]]))
}

Cut cut(const float* values, int64_t n, int64_t k, int32_t* orders) {
  if (k >= n) return {-1, -1};
  // fewer than k, `above`, reach `high`; k at least, `below`, reach `low`
  int32_t low = 0x7f800001, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t order = orders[i] = Cut::order_of(values[i]);
    low = std::min(low, order), high = std::max(high, order);
  }
  high += 1;
  auto count = [&](int32_t least) {
    int32_t found = 0;
    for (int64_t i = 0; i < n; ++i) found += orders[i] >= least;
    return int64_t(found);
  };
  int64_t above = 0, below = n, width;
  for (bool guess = true; above < k && (width = int64_t(high) - low) > 1; guess = !guess) {
    // as if they lay evenly between the two; every other time the half, for they may not
    int64_t step = guess ? width * (below - k) / (below - above) : width / 2;
    int32_t middle = low + int32_t(std::min(std::max<int64_t>(step, 1), width - 1));
    int64_t found = count(middle);
    if (found > k) low = middle, below = found;
    else high = middle, above = found;
  }
  if (above == k) return {high - 1, -1};
  Cut found{low, -1};
  for (int64_t i = 0, rest = k - above; rest; ++i)
    if (orders[i] == low) found.last = int32_t(i), --rest;
  return found;
}

void select(const float* __restrict u, const float* __restrict mean, const float* __restrict strength,
            const Cut& by, int64_t begin, int64_t end, float* __restrict to) {
  const Cut cut = by;
  auto all = [&](const auto& value) {  // bits, as in `lose_some`
    for (int64_t i = begin; i < end; ++i)
      to[i] = from_bits(to_bits(value(i)) & -uint32_t(cut.takes(strength[i], int32_t(i))));
  };
  if (mean) all([&](int64_t i) { return u[i] - mean[i]; });
  else all([&](int64_t i) { return u[i]; });
}

template <int T>
void lose_some(const float* __restrict u, const float* __restrict saliency, int64_t n, int64_t k,
               const float* __restrict weights, float* __restrict strength, int32_t* __restrict orders,
               float* __restrict sums, int64_t pitch) {
  int32_t last[T];
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < n; ++i) strength[i] = std::fabs(u[t * n + i]) * saliency[i];
    last[t] = cut(strength, n, k, orders + t * n).order;
  }
  float* __restrict squares = sums, * __restrict all = squares + pitch;
  float* __restrict lost = all + pitch, * __restrict losses = lost + pitch;
  for (int64_t i = 0; i < n; ++i) {
    float square = squares[i], sum = all[i], of_lost = lost[i], count = losses[i];
    for (int64_t t = 0; t < T; ++t) {
      uint32_t mask = -uint32_t(orders[t * n + i] <= last[t]);  // bits, or it would not be vectorised
      float own = u[t * n + i], value = weights[t] * own;
      square += value * own, sum += value, of_lost += from_bits(to_bits(value) & mask);
      count += from_bits(to_bits(weights[t]) & mask);
    }
    squares[i] = square, all[i] = sum, lost[i] = of_lost, losses[i] = count;
  }
}

void lose(const float* u, const float* saliency, int64_t n, int64_t k, const float* weights, int64_t count,
          float* strength, int32_t* orders, float* sums, int64_t pitch) {
  int64_t t = 0;
  for (; t + LOST <= count; t += LOST)
    lose_some<LOST>(u + t * n, saliency, n, k, weights + t, strength, orders, sums, pitch);
  for (; t < count; ++t) lose_some<1>(u + t * n, saliency, n, k, weights + t, strength, orders, sums, pitch);
}

#include "packed_body.h"
#include "prompt_body.h"

const Kernels table = {NAME,  matvec,      ffn,   low_rank, estimate, cut,    lose,   fold,        attend,
                       merge, attend_some, round, widen,    add,      add_at, select, packed_table};
