#include "head_ops.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

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
  const float* basis;  // [rank, D]
  int64_t rank;
  const Packed& rough;
  const Rows& rows;
  float threshold;
  Input x;         // one vector
  float *z, *y;    // [rank], [V]
  float best[PARTS];
  std::atomic<int64_t> exact{0};

  void run(Worker& team) {
    Input wide{x.wide, x.wide, 1, x.size};
    team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
      Span own = part(rank, one, parts);
      kernels.matvec(Dtype::f32, basis, nullptr, wide, own.begin, own.end, z, rank);
    });
    team.finish();
    RoundedRows turned(kernels, z, 1, rank);
    team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
      Span own = part(rough.rows, one, parts, TILE);
      kernels.packed.matvec(rough, turned.view(), own.begin, own.end, y, rough.rows);
      float most = -std::numeric_limits<float>::infinity();  // not in `best`, whose line others write
      for (int64_t i = own.begin; i < own.end; ++i) most = std::max(most, y[i]);
      best[one] = most;
    });
    team.finish();
    float limit = *std::max_element(best, best + PARTS) - threshold;
    std::vector<int32_t> near;
    team.in_parts(SPANS, [&](int64_t one, int64_t parts) {
      Span own = part(rough.rows, one, parts);
      near.clear();
      for (int64_t i = own.begin; i < own.end; ++i)
        if (y[i] >= limit) near.push_back(int32_t(i));
      rows.dots(kernels, x, near.data(), int64_t(near.size()), y);
      exact.fetch_add(int64_t(near.size()), std::memory_order_relaxed);
    });
    team.finish();
  }
};

// x [M, D]; basis [r, D] float32; rough [V, r]; the head is `weight` [V, D], or `packed` in its place.
// Returns scores [M, V] in the dtype of x, and how many words of each row are exact, [M] int64.
std::tuple<Tensor, Tensor> screened_head(const Tensor& x, const Tensor& basis, const Matrix& rough,
                                         const std::optional<Tensor>& weight,
                                         const std::optional<Matrix>& packed, double threshold) {
  c10::InferenceMode mode(false);
  at::NoGradGuard no_graph;
  auto type = x.scalar_type();
  bool known = type == at::kFloat || type == at::kBFloat16;
  int64_t count = x.size(0), hidden = x.size(1), words = rough->packed.rows, rank = rough->packed.columns;
  TORCH_CHECK(known && x.dim() == 2 && x.is_contiguous() && basis.is_contiguous() &&
                  basis.scalar_type() == at::kFloat && basis.size(0) == rank && basis.size(1) == hidden,
              "native: this screen has another shape");
  TORCH_CHECK(weight.has_value() != packed.has_value(), "native: a head is plain or packed");
  Dtype dtype = type == at::kFloat ? Dtype::f32 : Dtype::bf16;
  Rows rows{dtype, nullptr, nullptr, hidden * int64_t(x.element_size())};
  if (weight) {
    TORCH_CHECK(weight->scalar_type() == type && weight->is_contiguous() && weight->size(0) == words &&
                    weight->size(1) == hidden,
                "native: this head has another shape");
    rows.plain = static_cast<const char*>(weight->const_data_ptr());
  } else {
    rows.packed = &(*packed)->packed;
    TORCH_CHECK(rows.packed->order == Order::rows && rows.packed->rows == words &&
                    rows.packed->columns == hidden,
                "native: words here and there are read of rows alone");
  }
  const Kernels& kernels = best();
  Tensor wide = x.to(at::kFloat);
  Tensor y = at::empty({count, words}, wide.options()), z = at::empty({count, rank}, wide.options());
  Tensor exact = at::empty({count}, wide.options().dtype(at::kLong));
  RoundedRows rounded(kernels, wide.const_data_ptr<float>(), packed ? count : 0, hidden);
  for (int64_t m = 0; m < count; ++m) {
    Input given{static_cast<const char*>(x.const_data_ptr()) + m * rows.bytes,
                wide.const_data_ptr<float>() + m * hidden, 1, hidden,
                packed ? rounded.view().at(m) : Rounded{}};
    Pass pass{kernels, basis.const_data_ptr<float>(), rank, rough->packed, rows, float(threshold), given,
              z.mutable_data_ptr<float>() + m * rank, y.mutable_data_ptr<float>() + m * words, {}};
    Jobs jobs(3);
    jobs.begin();
    together([&](int64_t) {
      Worker team(jobs);
      pass.run(team);
    });
    exact.mutable_data_ptr<int64_t>()[m] = pass.exact.load();
  }
  return {y.to(type), exact};
}

}  // namespace

void register_head(torch::Library& library) { library.def("screened_head", screened_head); }

}  // namespace dart
