// The scores of a screened head: rough ones of all words, exact ones of those near the best.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "likeliest.h"
#include "team.h"

namespace dart {

constexpr int64_t SCREEN_JOBS = 4;  // of a team that scores by a screen
constexpr int64_t SPANS = 64;       // of words that are searched at a time; words of the best lie close
constexpr int64_t LINE = 64;        // bytes

// A screen of an output head [V, D].
struct Screen {
  const float* basis;  // [D, D]
  Directions rough;
  int64_t keep;     // directions that a hidden state reads
  float threshold;  // words that come so near the best rough score are scored exactly

  // Values from the scores of one hidden state to those of the next: whole runs of words.
  int64_t pitch() const { return rough.runs() * RUN; }
};

// What scoring M hidden states, or fewer, leaves behind.
struct ScreenRoom {
  ScreenRoom() = default;
  ScreenRoom(const Screen& screen, int64_t rows)
      : size(screen.rough.size), runs(screen.rough.runs()), padded((size + UNIT - 1) / UNIT * UNIT) {
    z.resize(size_t(rows * size)), best.resize(size_t(rows * runs)), exact.resize(size_t(rows * SPANS));
    ids.resize(z.size()), values.resize(z.size()), along.resize(size_t(rows));
    levels.resize(size_t(rows * padded)), scales.resize(size_t(rows * 2 * Rounded::facts(padded)));
    sums.resize(scales.size());
  }

  int64_t size = 0, runs = 0, padded = 0;
  std::vector<float> z, best;  // [M, D]: along all directions; [M, runs]: the best rough score of each run
  std::vector<int64_t> exact;  // [M, SPANS]: words of a span that were scored exactly
  std::vector<Along> along;    // [M]: the directions that are read, on what follows
  std::vector<int32_t> ids;
  std::vector<float> values, scales, sums;
  std::vector<int8_t> levels;

  // Words that were scored exactly for hidden state m.
  int64_t exact_words(int64_t m) const {
    return std::accumulate(exact.begin() + m * SPANS, exact.begin() + (m + 1) * SPANS, int64_t(0));
  }

  // Chooses the directions of hidden state m, the `keep` largest of z, rounded to 8 bits.
  void select(const Kernels& kernels, int64_t m, int64_t keep) {
    int32_t* own = ids.data() + m * size;
    float *from = z.data() + m * size, *selected = values.data() + m * size;
    Cut cut = kernels.cut(from, size, keep, own);
    for (int64_t i = 0, count = 0; i < size && count < keep; ++i) {
      own[count] = int32_t(i), selected[count] = from[i];
      count += cut.takes(from[i], int32_t(i));
    }
    int64_t room = 2 * Rounded::facts(padded), whole = (keep + UNIT - 1) / UNIT * UNIT;
    Rounded to{levels.data() + m * padded, scales.data() + m * room, sums.data() + m * room, 1, whole};
    kernels.packed.round(selected, 0, keep, keep, levels.data() + m * padded, scales.data() + m * room,
                         sums.data() + m * room);
    while (keep % 8) own[keep] = own[keep - 1], ++keep;  // of level 0
    float sum = 0;
    for (int64_t i = 0; i < keep; i += GROUP) sum += to.sums[i / GROUP];
    along[size_t(m)] = {own, keep, to, sum};
  }
};

// y[ids[j]] = row ids[j] of the head . x, one vector; plain rows are asked for before they are needed.
inline void score_words(const Kernels& kernels, Dtype dtype, const Matrix& head, const Input& x,
                        const std::vector<int32_t>& ids, float* y) {
  int64_t n = int64_t(ids.size()), bytes = x.size * (dtype == Dtype::f32 ? 4 : 2);
  if (head.packed) {
    thread_local std::vector<float> found;
    found.resize(ids.size());
    kernels.packed.dots(*head.packed, x.rounded, ids.data(), 0, n, found.data());
    for (int64_t j = 0; j < n; ++j) y[ids[size_t(j)]] = found[size_t(j)];
    return;
  }
  const char* rows = static_cast<const char*>(head.plain);
  for (int64_t j = 0; j < n; ++j) {
    if (j + 1 < n)
      for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(rows + ids[size_t(j + 1)] * bytes + at);
    kernels.matvec(dtype, rows, nullptr, x, ids[size_t(j)], ids[size_t(j)] + 1, y, 0);
  }
}

// The words of a span whose score is `limit` or more.
inline void find_near(const float* y, Span own, float limit, std::vector<int32_t>& near) {
  constexpr int64_t STEP = 16;
  near.clear();
  for (int64_t i = own.begin; i < own.end; i += STEP) {
    int64_t end = std::min(own.end, i + STEP);
    int any = 0;
    for (int64_t j = i; j < end; ++j) any |= y[j] >= limit;
    if (!any) continue;
    for (int64_t j = i; j < end; ++j)
      if (y[j] >= limit) near.push_back(int32_t(j));
  }
}

// y[m] = scores of hidden state m of x, screen.pitch() apart, and then(m, begin, end) for what is done.
// Every member calls it; input(): the `count` hidden states; the rows of a packed head lie in Order::rows.
template <class MakeInput, class Then>
void score_by_screen(Worker& team, const Kernels& kernels, Dtype dtype, const Screen& screen,
                     const Matrix& head, MakeInput& input, int64_t count, ScreenRoom& room, float* y,
                     const Then& then) {
  int64_t pitch = screen.pitch(), words = screen.rough.words;
  team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
    const Input& x = input();
    Input wide{x.wide, x.wide, count, x.size};
    Span own = part(x.size, one, parts);
    kernels.matvec(Dtype::f32, screen.basis, nullptr, wide, own.begin, own.end, room.z.data(), x.size);
  });
  team.finish();
  team.in_parts(count, [&](int64_t m, int64_t) { room.select(kernels, m, screen.keep); });
  team.finish();
  team.in_parts(room.runs, [&](int64_t one, int64_t) {
    int64_t begin = one * RUN, end = std::min(words, begin + RUN);
    for (int64_t m = 0; m < count; ++m) {
      float* own = y + m * pitch + begin;
      kernels.packed.scores(screen.rough, room.along[size_t(m)], one, own);
      room.best[size_t(m * room.runs + one)] = largest(own, end - begin);
    }
  });
  team.finish();
  team.in_parts(SPANS, [&](int64_t one, int64_t parts) {
    thread_local std::vector<int32_t> near;
    Span own = part(words, one, parts);
    const Input& x = input();
    for (int64_t m = 0; m < count; ++m) {
      float* scores = y + m * pitch;
      float limit = largest(room.best.data() + m * room.runs, room.runs) - screen.threshold;
      find_near(scores, own, limit, near);
      score_words(kernels, dtype, head, one_of(dtype, x, m), near, scores);
      room.exact[size_t(m * SPANS + one)] = int64_t(near.size());
      then(m, own.begin, own.end);
    }
  });
}

}  // namespace dart
