#include "head_ops.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "likeliest.h"
#include "packed_ops.h"
#include "together.h"

namespace dart {
namespace {

using at::Tensor;
using Matrix = c10::intrusive_ptr<PackedMatrix>;

constexpr int64_t SPANS = 64;  // of words that are searched at a time; words of the best lie close
constexpr int64_t LINE = 64;   // bytes

// The head's own rows, plain or in blocks.
struct Rows {
  Dtype dtype;
  const char* plain;
  const Packed* packed;
  int64_t bytes;  // of a plain row

  // y[j] = row ids[j] . x of `n` words; plain rows are asked for before they are needed.
  void dots(const Kernels& kernels, const Input& x, const int32_t* ids, int64_t n, float* y) const {
    if (packed) {
      std::vector<float> found(size_t(n), 0.0f);
      kernels.packed.dots(*packed, x.rounded, ids, 0, n, found.data());
      for (int64_t j = 0; j < n; ++j) y[ids[j]] = found[size_t(j)];
      return;
    }
    for (int64_t j = 0; j < n; ++j) {
      if (j + 1 < n)
        for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(plain + ids[j + 1] * bytes + at);
      kernels.matvec(dtype, plain, nullptr, x, ids[j], ids[j] + 1, y, 0);
    }
  }
};

// One hidden state through a screen; members call its steps in turn.
struct Pass {
  const Kernels& kernels;
  const float* basis;  // [D, D]
  const Directions& rough;
  int64_t keep;        // directions that are read
  const Rows& rows;
  float threshold;
  Input x;                             // one vector
  float *z, *y;                        // [D], [V] in whole runs
  const std::vector<int64_t>* banned;  // where the likeliest of all other words is wanted
  std::vector<int32_t> ids;            // of the directions
  std::optional<RoundedRows> values;   // along these
  Along along{};
  std::vector<float> best;  // of each run
  std::array<Likeliest, SPANS> likeliest;
  std::atomic<int64_t> exact{0};

  void run(Worker& team) {
    Input wide{x.wide, x.wide, 1, x.size};
    team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
      Span own = part(x.size, one, parts);
      kernels.matvec(Dtype::f32, basis, nullptr, wide, own.begin, own.end, z, x.size);
    });
    team.finish();
    team.in_parts(1, [&](int64_t, int64_t) { choose_directions(); });
    team.finish();
    team.in_parts(rough.runs(), [&](int64_t one, int64_t) {
      kernels.packed.scores(rough, along, one, y + one * RUN);
      int64_t end = std::min(rough.words, (one + 1) * RUN);
      best[size_t(one)] = *std::max_element(y + one * RUN, y + end);
    });
    team.finish();
    float limit = *std::max_element(best.begin(), best.end()) - threshold;
    team.in_parts(SPANS, [&](int64_t one, int64_t parts) { score(part(rough.words, one, parts), limit, one); });
    team.finish();
  }

  // The `keep` largest of z, rounded to 8 bits.
  void choose_directions() {
    ids.resize(size_t(x.size));
    kernels.strongest(z, x.size, keep, ids.data());
    std::vector<float> chosen;
    for (int64_t i = 0; i < keep; ++i) chosen.push_back(z[ids[size_t(i)]]);
    values.emplace(kernels, chosen.data(), 1, keep);
    while (keep % 8) ids[size_t(keep)] = ids[size_t(keep - 1)], ++keep;  // of level 0
    along = {ids.data(), keep, values->view(), 0};
    for (int64_t i = 0; i < keep; i += GROUP) along.sum += along.values.sums[i / GROUP];
  }

  // Words of a span that come near the best get their own scores.
  void score(Span own, float limit, int64_t one) {
    thread_local std::vector<int32_t> near;
    near.clear();
    constexpr int64_t STEP = 16;
    for (int64_t i = own.begin; i < own.end; i += STEP) {
      int64_t end = std::min(own.end, i + STEP);
      int any = 0;
      for (int64_t j = i; j < end; ++j) any |= y[j] >= limit;
      if (!any) continue;
      for (int64_t j = i; j < end; ++j)
        if (y[j] >= limit) near.push_back(int32_t(j));
    }
    rows.dots(kernels, x, near.data(), int64_t(near.size()), y);
    exact.fetch_add(int64_t(near.size()), std::memory_order_relaxed);
    if (!banned) return;
    for (int64_t i : *banned)
      if (i >= own.begin && i < own.end) y[i] = -std::numeric_limits<float>::infinity();
    likeliest[size_t(one)].see(rows.dtype, y, own.begin, own.end);
  }
};

// x [M, D]; basis [D, D] float32; levels [V / RUN, D, RUN / 2] uint8 and by [V in whole runs] float32: see
// Directions; `keep` of them are read.  The head is `weight` [V, D], or `packed` in its place.  Returns
// scores [M, V] in the dtype of x, or with `forbidden` the likeliest words [M] but for these, int64; and
// how many words of each row are exact, M numbers.
std::tuple<Tensor, std::vector<int64_t>> screened_head(const Tensor& x, const Tensor& basis, const Tensor& levels,
                                         const Tensor& by, int64_t keep, const std::optional<Tensor>& weight,
                                         const std::optional<Matrix>& packed, double threshold,
                                         const std::optional<std::vector<int64_t>>& forbidden) {
  c10::InferenceMode mode(false);
  at::NoGradGuard no_graph;
  auto type = x.scalar_type();
  bool known = type == at::kFloat || type == at::kBFloat16;
  TORCH_CHECK(known && x.dim() == 2 && x.is_contiguous() && levels.dim() == 3, "native: this screen has another shape");
  TORCH_CHECK(weight.has_value() != packed.has_value(), "native: a head is plain or packed");
  int64_t count = x.size(0), hidden = x.size(1), words = weight ? weight->size(0) : (*packed)->packed.rows;
  Directions rough{nullptr, nullptr, words, hidden};
  int64_t room = rough.runs() * RUN;
  TORCH_CHECK(basis.is_contiguous() && basis.scalar_type() == at::kFloat && basis.dim() == 2 && basis.size(0) == hidden &&
                  basis.size(1) == hidden && levels.is_contiguous() && levels.scalar_type() == at::kByte &&
                  levels.size(0) == rough.runs() && levels.size(1) == hidden && levels.size(2) == RUN / 2 &&
                  by.is_contiguous() && by.scalar_type() == at::kFloat && by.numel() == room && keep > 0 &&
                  keep <= hidden && hidden % 8 == 0,
              "native: this screen has another shape");
  rough.levels = levels.const_data_ptr<uint8_t>(), rough.by = by.const_data_ptr<float>();
  Dtype dtype = type == at::kFloat ? Dtype::f32 : Dtype::bf16;
  Rows rows{dtype, nullptr, nullptr, hidden * int64_t(x.element_size())};
  if (weight) {
    TORCH_CHECK(weight->scalar_type() == type && weight->is_contiguous() && weight->size(1) == hidden,
                "native: this head has another shape");
    rows.plain = static_cast<const char*>(weight->const_data_ptr());
  } else {
    rows.packed = &(*packed)->packed;
    TORCH_CHECK(rows.packed->order == Order::rows && rows.packed->columns == hidden,
                "native: words here and there are read of rows alone");
  }
  const Kernels& kernels = best();
  Tensor wide = x.to(at::kFloat);
  Tensor likeliest = at::empty({forbidden ? count : 0}, wide.options().dtype(at::kLong));
  std::vector<int64_t> exact;
  thread_local std::vector<float> y, z;  // new pages for every token would take longer than the scores
  y.resize(size_t(count * room)), z.resize(size_t(hidden));
  RoundedRows rounded(kernels, wide.const_data_ptr<float>(), packed ? count : 0, hidden);
  for (int64_t m = 0; m < count; ++m) {
    Input given{static_cast<const char*>(x.const_data_ptr()) + m * rows.bytes,
                wide.const_data_ptr<float>() + m * hidden, 1, hidden,
                packed ? rounded.view().at(m) : Rounded{}};
    Pass pass{kernels, basis.const_data_ptr<float>(), rough, keep, rows, float(threshold), given,
              z.data(), y.data() + m * room,
              forbidden ? &*forbidden : nullptr, {}, {}, {}, std::vector<float>(size_t(rough.runs())), {}};
    Jobs jobs(4);
    jobs.begin();
    together([&](int64_t) {
      Worker team(jobs);
      pass.run(team);
    });
    exact.push_back(pass.exact.load());
    if (!forbidden) continue;
    Likeliest found;
    for (const Likeliest& one : pass.likeliest) found.see(one);
    likeliest.mutable_data_ptr<int64_t>()[m] = found.index;
  }
  if (forbidden) return {likeliest, exact};
  Tensor scores = at::from_blob(y.data(), {count, words}, {room, 1}, wide.options());
  return {at::empty({count, words}, x.options()).copy_(scores), exact};
}

}  // namespace

void register_head(torch::Library& library) { library.def("screened_head", screened_head); }

}  // namespace dart
