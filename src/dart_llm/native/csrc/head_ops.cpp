#include "head_ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <optional>
#include <tuple>
#include <vector>

#include "packed_ops.h"
#include "threads.h"

namespace dart {

using at::Tensor;

Screen read_screen(const Tensor& basis, const Tensor& levels, const Tensor& by, int64_t keep,
                   double threshold, int64_t words, int64_t hidden) {
  Directions rough{nullptr, nullptr, words, hidden};
  auto is = [](const Tensor& t, at::ScalarType type, std::vector<int64_t> sizes) {
    return t.is_contiguous() && t.scalar_type() == type && t.sizes() == at::IntArrayRef(sizes);
  };
  TORCH_CHECK(is(basis, at::kFloat, {hidden, hidden}) &&
                  is(levels, at::kByte, {rough.runs(), hidden, RUN / 2}) &&
                  is(by, at::kFloat, {rough.runs() * RUN}) && keep > 0 && keep <= hidden && hidden % 8 == 0,
              "native: this screen has another shape");
  rough.levels = levels.const_data_ptr<uint8_t>(), rough.by = by.const_data_ptr<float>();
  return {basis.const_data_ptr<float>(), rough, keep, float(threshold)};
}

namespace {

// x [M, D]; the screen as read_screen takes it.  The head is `weight` [V, D], or `packed` in its place.
// Returns scores [M, V] in the dtype of x, and how many words of each row are exact, M numbers.
std::tuple<Tensor, std::vector<int64_t>> screened_head(
    const Tensor& x, const Tensor& basis, const Tensor& levels, const Tensor& by, int64_t keep,
    double threshold, const std::optional<Tensor>& weight,
    const std::optional<c10::intrusive_ptr<PackedMatrix>>& packed) {
  c10::InferenceMode mode(false);
  at::NoGradGuard no_graph;
  auto type = x.scalar_type();
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && x.dim() == 2 && x.is_contiguous(),
              "native: this screen has another shape");
  TORCH_CHECK(weight.has_value() != packed.has_value(), "native: a head is plain or packed");
  int64_t count = x.size(0), hidden = x.size(1), words = weight ? weight->size(0) : (*packed)->packed.rows;
  Screen screen = read_screen(basis, levels, by, keep, threshold, words, hidden);
  Dtype dtype = type == at::kFloat ? Dtype::f32 : Dtype::bf16;
  Matrix head{};
  if (weight) {
    TORCH_CHECK(weight->scalar_type() == type && weight->is_contiguous() && weight->size(1) == hidden,
                "native: this head has another shape");
    head.plain = weight->const_data_ptr();
  } else {
    head.packed = &(*packed)->packed;
    TORCH_CHECK(head.packed->order == Order::rows && head.packed->columns == hidden,
                "native: words here and there are read of rows alone");
  }
  const Kernels& kernels = best();
  Tensor wide = x.to(at::kFloat);
  RoundedRows rounded(kernels, wide.const_data_ptr<float>(), packed ? count : 0, hidden);
  Input given{x.const_data_ptr(), wide.const_data_ptr<float>(), count, hidden,
              packed ? rounded.view() : Rounded{}};
  ScreenRoom room(screen, count);
  thread_local std::vector<float> y;  // new pages for every token would take longer than the scores
  y.resize(size_t(count * screen.pitch()));
  float* to = y.data();
  Jobs jobs(SCREEN_JOBS);
  run_on_threads([&](int64_t) {
    Worker team(jobs);
    auto tokens = [&]() -> const Input& { return given; };
    score_by_screen(team, kernels, dtype, screen, head, tokens, count, room, to,
                    [](int64_t, int64_t, int64_t) {});
  });
  std::vector<int64_t> exact;
  for (int64_t m = 0; m < count; ++m) exact.push_back(room.exact_words(m));
  Tensor scores = at::from_blob(to, {count, words}, {screen.pitch(), 1}, wide.options());
  return {at::empty({count, words}, x.options()).copy_(scores), exact};
}

}  // namespace

void register_head(torch::Library& library) { library.def("screened_head", screened_head); }

}  // namespace dart
