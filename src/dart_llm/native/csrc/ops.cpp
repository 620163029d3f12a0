// The kernels as torch operators, on torch's threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <map>
#include <optional>

#include "select.h"
#include "decode.h"
#include "head_ops.h"
#include "packed_ffn.h"
#include "packed_ops.h"
#include "prompt_ops.h"
#include "selection_trial.h"
#include "threads.h"

namespace {

using at::Tensor;
using dart::best;
using dart::run_on_threads;
using MaybeTensor = std::optional<Tensor>;

dart::Dtype dtype_of(const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), "native kernels run on the CPU");
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16,
              "native kernels take float32 and bfloat16");
  return t.scalar_type() == at::kFloat ? dart::Dtype::f32 : dart::Dtype::bf16;
}

const void* data(const Tensor& t, at::ScalarType type) {
  TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), "native: dtype or layout is wrong");
  return t.const_data_ptr();
}

const void* data(const MaybeTensor& t, at::ScalarType type) { return t ? data(*t, type) : nullptr; }

std::atomic<const dart::Kernels*> in_use{nullptr};  // null: not looked for yet

// From now on the kernels of that name, "": the best; false where this CPU lacks them.
bool use(const std::string& name) {
  const dart::Kernels* found = name.empty() ? dart::kernels() : dart::kernels(name.c_str());
  if (found) in_use = found;
  return found;
}

std::string cpu() { return best().name; }

dart::Input input(const Tensor& x, const Tensor& wide) {
  return {x.const_data_ptr(), wide.const_data_ptr<float>(), x.size(0), x.size(1)};
}

// Whether torch's own allocator made the memory of `t`: it is not a map of a file nor another
// library's array.
bool allocated(const Tensor& t) {
  return t.storage().data_ptr().get_deleter() == c10::GetAllocator(c10::kCPU)->raw_deleter();
}

// Lays the values of `parameter` [N, M] out by columns, or by rows again, in its own memory: shape,
// values and address stay.  One call, so that no signal finds the values written and the strides
// not; the version says to autograd that what it saved lies in another order now.
void lay_out(const Tensor& parameter, bool columns) {
  c10::InferenceMode mode(parameter.is_inference());
  at::NoGradGuard no_graph;
  TORCH_CHECK(parameter.dim() == 2, "native: shapes do not fit");
  int64_t n = parameter.size(0), m = parameter.size(1);
  Tensor memory = parameter.variable_data();
  Tensor values = (columns ? memory.t() : memory).clone(at::MemoryFormat::Contiguous);
  std::vector<int64_t> strides = columns ? std::vector<int64_t>{1, n} : std::vector<int64_t>{m, 1};
  Tensor place = memory.as_strided({n, m}, strides, memory.storage_offset());
  (columns ? place.t() : place).copy_(values);
  parameter.set_data(place);
  if (!parameter.is_inference()) parameter.unsafeGetTensorImpl()->bump_version();
}

// x [M, D], weight [N, D], bias [N]: [M, N].
Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  auto type = x.scalar_type();
  dart::Dtype dtype = dtype_of(x);
  const void *rows = data(weight, type), *add = data(bias, type);
  data(x, type);
  TORCH_CHECK(x.dim() == 2 && weight.size(1) == x.size(1), "native: shapes do not fit");
  Tensor wide = x.to(at::kFloat);
  Tensor y = at::empty({x.size(0), weight.size(0)}, wide.options());
  dart::Input given = input(x, wide);
  const dart::Kernels& kernels = best();
  float* to = y.mutable_data_ptr<float>();
  std::atomic<int64_t> taken{0};
  run_on_threads([&](int64_t) {
    for (int64_t group; (group = taken++) < dart::PARTS;) {
      dart::Span own = dart::part(weight.size(0), group, dart::PARTS);
      kernels.matvec(dtype, rows, add, given, own.begin, own.end, to, weight.size(0));
    }
  });
  return y.to(type);
}

// rows [I, D], ids int32 [n], factors [n, c] float32: rows[ids]^T factors, transposed: [c, D].
Tensor fold(const Tensor& rows, const Tensor& ids, const Tensor& factors) {
  dart::Dtype dtype = dtype_of(rows);
  const void* from = data(rows, rows.scalar_type());
  const auto* which = static_cast<const int32_t*>(data(ids, at::kInt));
  const auto* by = static_cast<const float*>(data(factors, at::kFloat));
  int64_t n = ids.size(0), size = rows.size(1), count = factors.size(1);
  TORCH_CHECK(rows.dim() == 2 && factors.size(0) == n, "native: shapes do not fit");
  Tensor found = at::empty({count, size}, factors.options());
  float* to = found.mutable_data_ptr<float>();
  const dart::Kernels& kernels = best();
  std::atomic<int64_t> taken{0};
  run_on_threads([&](int64_t) {
    for (int64_t group; (group = taken++) < dart::PARTS;) {
      dart::Span own = dart::part(size, group, dart::PARTS, 32);
      kernels.fold(dtype, from, which, n, size, by, count, own.begin, own.end, to);
    }
  });
  return found;
}

dart::Ffn read_ffn(const MaybeTensor& gate, const Tensor& up, const Tensor& down,
                   const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& ids,
                   const MaybeTensor& basis, const MaybeTensor& features, int64_t act) {
  auto type = up.scalar_type();
  TORCH_CHECK(up.dim() == 2 && down.sizes() == up.sizes(), "native: shapes do not fit");
  TORCH_CHECK(!gate || gate->sizes() == up.sizes(), "native: shapes do not fit");
  TORCH_CHECK(basis.has_value() == features.has_value(), "native: a map needs both its parts");
  if (basis)
    TORCH_CHECK(basis->sizes() == features->sizes() && basis->size(1) == up.size(1),
                "native: shapes do not fit");
  dart::Ffn f{};
  f.gate = data(gate, type);
  f.up = data(up, type);
  f.down = data(down, type);
  f.gate_bias = data(gate_bias, type);
  f.up_bias = data(up_bias, type);
  f.basis = data(basis, type);
  f.features = data(features, type);
  f.ids = static_cast<const int32_t*>(data(ids, at::kInt));
  f.kept = ids ? ids->size(0) : up.size(0);
  f.rank = basis ? basis->size(0) : 0;
  f.act = dart::Act(act);
  return f;
}

// By what the tokens of one FFN select `keep` of its neurons: see Proxies in kernels.h.  Without `up`
// by their activations, of packed matrices alone.
struct Choice : torch::CustomClassHolder {
  dart::Proxies proxies{};
  const float* mean;  // [I], or null: what the others stand at
  int64_t width, inputs;
  std::vector<Tensor> held;  // keeps what is pointed at alive

  // numbers: D, bits, group, keep, and whether down rows of the others are skipped; gate, gate_scales:
  // None in a plain FFN.
  Choice(const MaybeTensor& gate, const MaybeTensor& gate_scales, const MaybeTensor& up,
         const MaybeTensor& up_scales, const Tensor& saliency, const MaybeTensor& mean_,
         std::vector<int64_t> numbers)
      : mean(static_cast<const float*>(data(mean_, at::kFloat))),
        width(saliency.numel()),
        inputs(numbers.at(0)) {
    int64_t bits = numbers.at(1), group = numbers.at(2), keep = numbers.at(3);
    auto type = bits == 8 ? at::kChar : at::kByte;
    auto fits = [&](const MaybeTensor& t, int64_t columns) {
      return !t || (t->dim() == 2 && t->size(0) == width && t->size(1) == columns);
    };
    int64_t each = bits == 8 ? inputs : (inputs + 1) / 2,
            groups = group > 0 ? (inputs + group - 1) / group : 0;
    TORCH_CHECK((bits == 4 || bits == 8) && group > 0 && keep > 0 && keep <= width &&
                    gate.has_value() == gate_scales.has_value() && up.has_value() == up_scales.has_value() &&
                    (up || !gate) && (!mean_ || mean_->numel() == width) && fits(gate, each) &&
                    fits(up, each) && fits(gate_scales, groups) && fits(up_scales, groups),
                "native: these proxies have another shape");
    proxies = {static_cast<const uint8_t*>(data(gate, type)),
               static_cast<const uint8_t*>(data(up, type)),
               static_cast<const uint16_t*>(data(gate_scales, at::kBFloat16)),
               static_cast<const uint16_t*>(data(up_scales, at::kBFloat16)),
               static_cast<const float*>(data(saliency, at::kFloat)),
               bits,
               group,
               keep,
               bool(numbers.at(4))};
    for (const auto& t : {gate, gate_scales, up, up_scales, MaybeTensor(saliency), mean_})
      if (t) held.push_back(*t);
  }

  // The proxies of an FFN of I neurons of D inputs, with f.kept candidates for a token.
  const dart::Proxies& of(const dart::Ffn& f, int64_t neurons, int64_t hidden) const {
    TORCH_CHECK(
        width == neurons && inputs == hidden && proxies.keep <= f.kept &&
            (proxies.own() ? bool(f.packed_up) : (proxies.gate == nullptr) == (!f.gate && !f.packed_gate)),
        "native: these proxies are of another FFN");
    return proxies;
  }

  // By what the tokens of the newest call selected out of candidates: strengths [M, candidates].  Not
  // synchronised: an FFN runs in one thread at a time.
  void took(std::vector<float>&& strengths_, const MaybeTensor& candidates_) {
    strengths = std::move(strengths_), candidates = candidates_;
  }
  std::vector<float> strengths;
  MaybeTensor candidates;

  // What they selected, as bits [M, I / 8 rounded up]: bit i % 8 of byte i / 8 is neuron i.
  Tensor marks() const {
    int64_t kept = candidates ? candidates->numel() : width, bytes = dart::marked_bytes(width);
    int64_t count = int64_t(strengths.size()) / kept;
    Tensor found = at::zeros({count, bytes}, at::kByte);
    uint8_t* to = found.mutable_data_ptr<uint8_t>();
    std::vector<int32_t> orders(static_cast<size_t>(kept));
    const auto* ids = static_cast<const int32_t*>(data(candidates, at::kInt));
    for (const dart::Chosen& of_row :
         dart::chosen_of(best(), proxies, count, kept, strengths.data(), orders.data()))
      dart::mark(ids, kept, of_row, to), to += bytes;
    return found;
  }
};
using MaybeChoice = std::optional<c10::intrusive_ptr<Choice>>;

// x [M, D] through the kept neurons: z [M, D].  Matrices [I, D], down too; bias [D] float32.
// With a choice M is 1, and the token selects out of the kept neurons.
Tensor ffn(const Tensor& x, const MaybeTensor& gate, const Tensor& up, const Tensor& down,
           const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& ids,
           const MaybeTensor& bias, const MaybeTensor& basis, const MaybeTensor& features,
           const MaybeChoice& choice, int64_t act) {
  dart::Dtype dtype = dtype_of(x);
  auto type = x.scalar_type();
  data(x, type);
  TORCH_CHECK(x.dim() == 2 && up.size(1) == x.size(1) && up.scalar_type() == type,
              "native: shapes do not fit");
  dart::Ffn f = read_ffn(gate, up, down, gate_bias, up_bias, ids, basis, features, act);
  dart::Proxies proxies{};
  if (choice) {
    TORCH_CHECK(x.size(0) == 1, "native: tokens select one at a time");
    proxies = (*choice)->of(f, up.size(0), x.size(1));
    f.mean = (*choice)->mean;
  }
  const float* add = static_cast<const float*>(data(bias, at::kFloat));
  Tensor wide = x.to(at::kFloat);
  dart::Input given = input(x, wide);
  int64_t size = x.numel(), count = x.size(0), hidden = x.size(1);
  std::vector<float> sums(size * dart::PARTS), strength(choice ? f.kept : 0);
  Tensor z = at::empty(x.sizes(), wide.options());
  float* to = z.mutable_data_ptr<float>();
  const dart::Kernels& kernels = best();
  dart::Jobs jobs(3);
  run_on_threads([&](int64_t) {
    dart::Worker team(jobs);
    std::vector<int32_t> ids(strength.size());
    auto tokens = [&]() -> const dart::Input& { return given; };
    if (choice) dart::estimate_strengths(team, kernels, dtype, proxies, f, tokens, strength.data());
    dart::Once chosen(
        [&] { return dart::chosen_of(kernels, proxies, 1, f.kept, strength.data(), ids.data()); });
    team.in_parts(dart::PARTS, [&](int64_t one, int64_t parts) {
      float* sum = sums.data() + one * size;
      dart::Span span = dart::part(f.kept, one, parts);
      dart::Ffn own = f;
      if (choice) {
        own.kept = dart::selected_ids(f, chosen()[0], span.begin, span.end, ids.data());
        own.ids = ids.data(), span = {0, own.kept};
      }
      kernels.ffn(dtype, own, given, span.begin, span.end, sum, nullptr, 0);
      span = dart::part(f.rank, one, parts, 1);
      kernels.low_rank(dtype, f, given, span.begin, span.end, sum);
    });
  });
  for (int64_t i = 0; i < size; ++i) to[i] = add ? add[i % hidden] : 0.0f;
  for (int64_t group = 0; group < dart::PARTS; ++group)
    for (int64_t i = 0; i < size; ++i) to[i] += sums[group * size + i];
  if (choice) (*choice)->took(std::move(strength), ids);
  return z.to(type);
}

using Packs = c10::intrusive_ptr<dart::PackedMatrix>;

// What packed_ffn reads: gate (null in a plain FFN) and up of `width` rows, down of as many neurons,
// or compact weights of the neurons `ids`.
void check_packed(const dart::Packed* gate, const dart::Packed& up, const dart::Packed& down, int64_t width,
                  int64_t hidden, const MaybeTensor& ids, const MaybeChoice& choice) {
  bool kept = down.kept, some = ids || (choice && !(*choice)->proxies.own());
  int64_t count = kept && ids ? ids->numel() : width;
  auto fits = [&](const dart::Packed& one) {
    return one.order == up.order && one.rows == count && one.columns == hidden && one.kept == kept;
  };
  bool neurons = down.order == dart::Order::neurons;
  bool down_fits = neurons ? !kept && down.rows == count && down.columns == hidden
                           : down.rows == hidden && (kept ? down.kept_columns : down.columns) == count;
  TORCH_CHECK(up.order != dart::Order::neurons && fits(up) && down_fits && (!gate || fits(*gate)),
              "native: shapes do not fit");
  TORCH_CHECK(kept ? ids.has_value() && !choice : !some || up.order == dart::Order::rows,
              "native: neurons here and there are read of rows alone");
}

// As `ffn`, on packed matrices: gate (None in a plain FFN) and up of rows, down of tiles or neurons.  With
// a choice by activations M may be any number.
Tensor packed_ffn(const Tensor& x, const std::optional<Packs>& gate, const Packs& up, const Packs& down,
                  const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& ids,
                  const MaybeTensor& bias, const MaybeTensor& basis, const MaybeTensor& features,
                  const MaybeChoice& choice, int64_t act) {
  dart::Dtype dtype = dtype_of(x);
  auto type = x.scalar_type();
  data(x, type);
  int64_t hidden = up->packed.columns, width = up->packed.rows, count = x.size(0);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == hidden && basis.has_value() == features.has_value(),
              "native: shapes do not fit");
  check_packed(gate ? &(*gate)->packed : nullptr, up->packed, down->packed, width, hidden, ids, choice);
  dart::Ffn f{};
  f.packed_gate = gate ? &(*gate)->packed : nullptr;
  f.packed_up = &up->packed, f.packed_down = &down->packed;
  f.gate_bias = data(gate_bias, type), f.up_bias = data(up_bias, type);
  f.basis = data(basis, type), f.features = data(features, type);
  f.ids = static_cast<const int32_t*>(data(ids, at::kInt));
  f.kept = ids ? ids->size(0) : width;
  f.rank = basis ? basis->size(0) : 0;
  f.act = dart::Act(act);
  dart::Proxies proxies{};
  if (choice) {
    proxies = (*choice)->of(f, width, hidden);
    TORCH_CHECK(count == 1 || proxies.own(), "native: tokens select one at a time");
    f.mean = (*choice)->mean;
  }
  const float* add = static_cast<const float*>(data(bias, at::kFloat));
  Tensor wide = x.to(at::kFloat);
  const dart::Kernels& kernels = best();
  std::vector<float> strength(choice ? size_t(count * f.kept) : 0);
  dart::RoundedRows rounded(kernels, wide.const_data_ptr<float>(), count, hidden);
  std::vector<float> u(size_t(count * f.kept));
  bool whole = dart::by_outputs(f);  // each part has whole sums of some outputs, not a part of all
  int64_t columns = whole ? hidden : down->packed.units() * dart::UNIT;
  Tensor parts = at::zeros({whole ? 1 : dart::PARTS, count, columns}, wide.options());
  float* sums = parts.mutable_data_ptr<float>();
  Tensor low = at::zeros({dart::PARTS, count, f.rank ? hidden : 0}, wide.options());
  dart::Input given = input(x, wide);
  dart::Jobs jobs(4);
  run_on_threads([&](int64_t) {
    dart::Worker team(jobs);
    std::vector<int32_t> orders(strength.size());
    auto tokens = [&]() -> const dart::Input& { return given; };
    if (choice && !proxies.own())
      dart::estimate_strengths(team, kernels, dtype, proxies, f, tokens, strength.data());
    dart::Once chosen([&] {
      return dart::chosen_of(kernels, proxies, choice ? count : 0, f.kept, strength.data(), orders.data());
    });
    team.in_parts(dart::PARTS, [&](int64_t one, int64_t number) {
      dart::Span span = dart::part(f.kept, one, number, dart::GROUP);
      for (int64_t m = 0; m < count; ++m) {
        float* of_row = u.data() + m * f.kept;
        dart::Rounded row = rounded.view().at(m);
        if (choice && !proxies.own())
          dart::packed_hidden_of(kernels, dtype, f, chosen()[0], row, span.begin, span.end, of_row);
        else dart::packed_hidden(kernels, dtype, f, row, span.begin, span.end, of_row);
        if (proxies.own())
          dart::strengths_of(proxies, f, of_row, span.begin, span.end, strength.data() + m * f.kept);
      }
    });
    team.finish();
    auto of_row = [&](int64_t m) { return choice ? &chosen()[size_t(m)] : nullptr; };
    dart::Once active([&] {
      std::vector<float> own(size_t(count * down->packed.columns));
      for (int64_t m = 0; m < count; ++m)
        dart::down_input(kernels, f, of_row(m), u.data() + m * f.kept, 0, down->packed.columns,
                         own.data() + m * down->packed.columns);
      return dart::RoundedRows(kernels, own.data(), count, down->packed.columns);
    });
    team.in_parts(dart::PARTS, [&](int64_t one, int64_t number) {
      dart::Span span =
          whole ? dart::part(hidden, one, number, dart::TILE) : dart::part(f.kept, one, number, dart::GROUP);
      if (whole) kernels.packed.matvec(down->packed, active().view(), span.begin, span.end, sums, hidden);
      for (int64_t m = 0; m < count && !whole; ++m)
        dart::packed_output(kernels, f, of_row(m), u.data() + m * f.kept, span.begin, span.end,
                            sums + (one * count + m) * columns);
      span = dart::part(f.rank, one, number, 1);
      if (f.rank)
        kernels.low_rank(dtype, f, given, span.begin, span.end,
                         low.mutable_data_ptr<float>() + one * count * hidden);
    });
  });
  if (choice) (*choice)->took(std::move(strength), ids);
  Tensor z = parts.sum(0).narrow(1, 0, hidden);
  if (f.rank) z = z.add(low.sum(0));
  if (add) z = z.add(*bias);
  return z.to(type);
}

// Sums over the tokens of u [L, T, I], each of which selects kept[l] neurons of layer l by their activations
// times saliency [L, I]: [4, L, I] of squared activations, of all activations, of those that are not
// selected, and how many these are.  weights: [T].  What ties with the strongest that is not selected
// counts as not selected.
Tensor selection_sums(const Tensor& u, const Tensor& saliency, const std::vector<int64_t>& kept,
                      const Tensor& weights) {
  TORCH_CHECK(u.dim() == 3 && saliency.dim() == 2 && saliency.size(0) == u.size(0) &&
                  saliency.size(1) == u.size(2) && int64_t(kept.size()) == u.size(0) &&
                  weights.numel() == u.size(1),
              "native: shapes do not fit");
  int64_t layers = u.size(0), tokens = u.size(1), width = u.size(2), each = layers * width;
  int64_t parts = std::max<int64_t>(1, dart::PARTS / std::max<int64_t>(1, layers));
  auto floats = [](const Tensor& t) { return static_cast<const float*>(data(t, at::kFloat)); };
  const float *values = floats(u), *factors = floats(saliency), *by = floats(weights);
  Tensor sums = at::zeros({parts, 4, layers, width}, u.options());
  float* to = sums.mutable_data_ptr<float>();
  const dart::Kernels& kernels = best();
  std::atomic<int64_t> taken{0};
  run_on_threads([&](int64_t) {
    std::vector<float> strength(static_cast<size_t>(width));
    std::vector<int32_t> orders(static_cast<size_t>(dart::LOST * width));
    for (int64_t one; (one = taken++) < layers * parts;) {
      int64_t l = one / parts, place = one % parts;
      dart::Span own = dart::part(tokens, place, parts, 1);
      kernels.lose(values + (l * tokens + own.begin) * width, factors + l * width, width, kept[size_t(l)],
                   by + own.begin, own.end - own.begin, strength.data(), orders.data(),
                   to + place * 4 * each + l * width, each);
    }
  });
  return sums.sum(0);
}

// Seconds that the down projections of a model take for a token that selects `share` of the neurons by
// their activations: [0] all of `tiles` are read, [1] of the same matrices by neurons those of the others
// are skipped.  The least of several turns, about `seconds` in all.  Which neurons win is random; real
// winners lie in runs hardly longer.
std::vector<double> selection_times(const std::vector<Packs>& tiles, const std::vector<Packs>& neurons,
                                    double share, double seconds) {
  TORCH_CHECK(!tiles.empty() && tiles.size() == neurons.size() && share > 0 && share <= 1,
              "native: matrices are missing");
  using Clock = std::chrono::steady_clock;
  int64_t most = 0;
  std::map<std::pair<int64_t, int64_t>, dart::SelectionTrial> trials;  // by width and padded hidden size
  std::vector<dart::SelectionTrial*> of_layer;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const dart::Packed &own = tiles[i]->packed, &other = neurons[i]->packed;
    TORCH_CHECK(own.order == dart::Order::tiles && other.order == dart::Order::neurons &&
                    own.columns == other.rows && own.rows == other.columns,
                "native: shapes do not fit");
    int64_t width = other.rows, hidden = other.units() * dart::UNIT;
    of_layer.push_back(&trials.try_emplace({width, hidden}, best(), width, hidden, share).first->second);
    most = std::max(most, width);
  }
  std::vector<dart::SelectionTrial::Room> rooms(size_t(at::get_num_threads()),
                                                dart::SelectionTrial::Room(most));
  std::vector<double> least(2, INFINITY);
  auto begin = Clock::now();
  for (int64_t turn = 0; turn < 6 || std::chrono::duration<double>(Clock::now() - begin).count() < seconds;
       ++turn) {
    bool skip = turn % 2;
    dart::Jobs jobs(2 * int64_t(tiles.size()), at::get_num_threads());
    auto start = Clock::now();
    run_on_threads([&](int64_t member) {
      dart::Worker team(jobs, member);
      auto& room = rooms[size_t(member)];
      for (size_t i = 0; i < tiles.size(); ++i)
        of_layer[i]->run(team, (skip ? neurons : tiles)[i]->packed, skip, room);
    });
    double& own = least[size_t(skip)];
    own = std::min(own, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return least;
}

// A decoder whose weights stay where they are; see decode.h.  M: rows of a step.
struct Decoder : torch::CustomClassHolder {
  dart::Decoder model;
  std::vector<Tensor> held;  // keeps what is pointed at alive
  struct Mask {
    MaybeChoice choice;
    std::vector<Tensor> parts;
    std::vector<Packs> matrices;
  };
  std::vector<Mask> masks;
  std::unique_ptr<dart::Scratch> scratch;
  bool watched = false, timed = false;            // see watch() and time_parts()
  std::unique_ptr<dart::PromptRoom> prompt_room;  // from the begin of a prompt to its end

  // sizes: D, H, K, S, I, V, R; kind: as set_kind reads it; numbers: eps, scale, of the embedding,
  // caps of scores and logits; weights: embedding, head, positions, then EACH per layer, [] for none:
  // q k v o, their biases, gate up down, biases of gate and up; norms: the last one, then NORMS per
  // layer: factor and bias [n] float32 each; tables: per layer.
  Decoder(std::vector<int64_t> sizes, std::vector<std::string> kind, std::vector<double> numbers,
          std::vector<Tensor> weights, std::vector<Tensor> norms, std::vector<int64_t> tables, int64_t act) {
    model.dtype = dtype_of(weights.at(0));
    type = weights[0].scalar_type();
    model.hidden = sizes.at(0), model.heads = sizes.at(1), model.kv_heads = sizes.at(2);
    model.size = sizes.at(3), model.width = sizes.at(4), model.vocabulary = sizes.at(5);
    model.rotary = sizes.at(6);
    model.eps = float(numbers.at(0)), model.scale = float(numbers.at(1));
    model.embedding_scale = float(numbers.at(2));
    model.attention_cap = float(numbers.at(3)), model.logits_cap = float(numbers.at(4));
    set_kind(kind);
    size_t layers = tables.size();
    TORCH_CHECK(weights.size() == ENDS + EACH * layers && norms.size() == 2 + 2 * NORMS * layers,
                "native: weights are missing");
    read_weights(weights, layers);
    read_norms(norms);
    for (size_t index = 0; index < layers; ++index) {
      dart::Layer& layer = model.layers[index];
      layer.table = tables[index];
      layer.ffn.act = dart::Act(act), layer.ffn.kept = model.width;
    }
    masks.resize(layers);
    model.known = weights[0].numel() ? weights[0].size(0) : model.vocabulary;
    model.places = weights[2].numel() ? weights[2].size(0) : 0;
    held = std::move(weights);
    held.insert(held.end(), norms.begin(), norms.end());
  }
  static constexpr size_t ENDS = 3, EACH = 13, NORMS = 6;

  // Words: fused, by_heads, over_all, parallel, centred; see decode.h.
  void set_kind(const std::vector<std::string>& kind) {
    auto is = [&](const char* word) { return std::find(kind.begin(), kind.end(), word) != kind.end(); };
    model.fused = is("fused"), model.by_heads = is("by_heads"), model.over_all = is("over_all");
    model.parallel = is("parallel"), centred = is("centred");
  }
  bool centred = false;  // the norms of the stream are layer norms

  void read_weights(const std::vector<Tensor>& weights, size_t layers) {
    auto next = [&, place = size_t(0)]() mutable -> const void* {
      const Tensor& t = weights.at(place++);
      return t.numel() ? data(t, type) : nullptr;
    };
    for (dart::Matrix* end : {&model.embedding, &model.head, &model.positions}) *end = {next(), nullptr};
    for (size_t index = 0; index < layers; ++index) {
      dart::Layer layer{};
      for (const void** slot : {&layer.q.plain, &layer.k.plain, &layer.v.plain, &layer.o.plain, &layer.q_bias,
                                &layer.k_bias, &layer.v_bias, &layer.o_bias, &layer.ffn.gate, &layer.ffn.up,
                                &layer.ffn.down, &layer.ffn.gate_bias, &layer.ffn.up_bias})
        *slot = next();
      model.layers.push_back(layer);
    }
  }

  void read_norms(const std::vector<Tensor>& norms) {
    auto next = [&, place = size_t(0)](int64_t size, bool of_stream) mutable {
      const Tensor *factor = &norms.at(place), *bias = &norms.at(place + 1);
      place += 2;
      for (const Tensor* t : {factor, bias})
        TORCH_CHECK(!t->numel() || t->numel() == size, "native: a norm has another shape");
      auto floats = [](const Tensor& t) {
        return t.numel() ? static_cast<const float*>(data(t, at::kFloat)) : nullptr;
      };
      return dart::Norm{floats(*factor), floats(*bias), centred && of_stream};
    };
    int64_t q = model.size, k = model.size;
    if (model.over_all) q *= model.heads, k *= model.kv_heads;
    model.norm = next(model.hidden, true);
    for (dart::Layer& layer : model.layers) {
      for (dart::Norm* one :
           {&layer.before_attention, &layer.after_attention, &layer.before_ffn, &layer.after_ffn})
        *one = next(model.hidden, true);
      layer.q_norm = next(q, false), layer.k_norm = next(k, false);
    }
  }

  // Puts a packed matrix in the place of weight `index`.
  void set_packed(int64_t index, const c10::intrusive_ptr<dart::PackedMatrix>& matrix) {
    const dart::Packed* packed = &matrix->packed;
    int64_t layers = int64_t(model.layers.size()), ends = int64_t(ENDS), each = int64_t(EACH);
    int64_t place = (index - ends) % each;
    TORCH_CHECK(index >= 0 && index < ends + each * layers &&
                    (index < ends || place < 4 || (place >= 8 && place < 11)) && !packed->kept &&
                    packed->order != dart::Order::neurons,
                "native: no packed matrix has this place");
    if (index < ends) {
      dart::Matrix* matrices[] = {&model.embedding, &model.head, &model.positions};
      matrices[index]->packed = packed;
      if (index == 2) model.places = packed->rows;
    } else {
      dart::Layer& layer = model.layers[size_t((index - ends) / each)];
      dart::Matrix* outer[] = {&layer.q, &layer.k, &layer.v, &layer.o};
      const dart::Packed** inner[] = {&layer.ffn.packed_gate, &layer.ffn.packed_up, &layer.ffn.packed_down};
      if (place < 4) outer[place]->packed = packed;
      else *inner[place - 8] = packed;
    }
    packs.push_back(matrix);
  }
  std::vector<Packs> packs;
  at::ScalarType type;  // of weights, biases and caches

  // What layer `index` runs from now on; ids: int32 [k] or None for all; with a choice every token
  // selects out of these.
  // matrices: of a packed FFN, gate (if it has one), up and down: all of them, or compact weights of the
  // neurons `ids`; else [].
  void set_mask(int64_t index, const MaybeTensor& ids, const MaybeTensor& bias, const MaybeTensor& basis,
                const MaybeTensor& features, const MaybeChoice& choice, const std::vector<Packs>& matrices) {
    dart::Layer& layer = model.layers.at(index);
    if (layer.ffn.packed_up) set_matrices(layer.ffn, matrices, ids, choice);
    layer.ffn.ids = static_cast<const int32_t*>(data(ids, at::kInt));
    layer.ffn.kept = ids ? ids->size(0) : model.width;
    layer.ffn.basis = data(basis, type);
    layer.ffn.features = data(features, type);
    layer.ffn.rank = basis ? basis->size(0) : 0;
    layer.bias = static_cast<const float*>(data(bias, at::kFloat));
    layer.ffn.mean = choice ? (*choice)->mean : nullptr;
    layer.proxies = choice ? (*choice)->of(layer.ffn, model.width, model.hidden) : dart::Proxies{};
    masks[index] = {choice, {}, matrices};
    for (const auto& t : {ids, bias, basis, features})
      if (t) masks[index].parts.push_back(*t);
  }

  void set_matrices(dart::Ffn& ffn, const std::vector<Packs>& matrices, const MaybeTensor& ids,
                    const MaybeChoice& choice) const {
    TORCH_CHECK(matrices.size() == (ffn.packed_gate ? 3u : 2u), "native: matrices are missing");
    const dart::Packed* gate = ffn.packed_gate ? &matrices[0]->packed : nullptr;
    const dart::Packed *up = &matrices[matrices.size() - 2]->packed, *down = &matrices.back()->packed;
    check_packed(gate, *up, *down, model.width, model.hidden, ids, choice);
    ffn.packed_gate = gate, ffn.packed_up = up, ffn.packed_down = down;
  }

  // The caches of the steps to come; keys and values: per layer [M, K, capacity, S], which the
  // caller keeps alive.  ends: where the filled positions end; counts: how many they are; most:
  // how many a step reads beside its own, -1: all.
  void bind(const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
            const std::vector<int64_t>& ends, const std::vector<int64_t>& counts,
            const std::vector<int64_t>& most) {
    size_t layers = model.layers.size();
    for (size_t length : {keys.size(), values.size(), ends.size(), counts.size(), most.size()})
      TORCH_CHECK(length == layers, "native: caches are missing");
    std::vector<Buffers> found;
    for (size_t index = 0; index < layers; ++index)
      found.push_back(buffers_of(keys[index], values[index], ends[index], counts[index], most[index]));
    bound = std::move(found);
  }

  struct Buffers {
    char *keys, *values;
    int64_t rows, capacity, pitch, row_pitch, bytes;  // bytes: of one position of a head
    int64_t end, count, most;
  };
  std::vector<Buffers> bound;

  Buffers buffers_of(const Tensor& keys, const Tensor& values, int64_t end, int64_t count,
                     int64_t most) const {
    for (const Tensor* t : {&keys, &values})
      TORCH_CHECK(t->scalar_type() == type && t->dim() == 4 && t->size(0) == keys.size(0) &&
                      t->size(1) == model.kv_heads && t->size(3) == model.size && t->stride(3) == 1 &&
                      t->stride(2) == model.size && t->stride(1) == keys.stride(1) &&
                      t->stride(0) == keys.stride(0) && t->size(2) == keys.size(2),
                  "native: the cache has another shape");
    TORCH_CHECK(count >= 0 && count <= end && end <= keys.size(2), "native: the cache is too small");
    return {static_cast<char*>(keys.data_ptr()),
            static_cast<char*>(values.data_ptr()),
            keys.size(0),
            keys.size(2),
            keys.stride(1),
            keys.stride(0),
            model.size * int64_t(keys.element_size()),
            end,
            count,
            most};
  }

  // What a step of so many rows reads and writes, `steps` after bind().
  dart::Cache cache_after(int64_t steps, int64_t position, int64_t count) const {
    TORCH_CHECK(bound.size() == model.layers.size(), "native: caches are missing");
    dart::Cache cache{{}, position, count};
    cache.layers.reserve(bound.size());
    for (const Buffers& one : bound) {
      TORCH_CHECK(one.rows == count, "native: the cache has other rows");
      TORCH_CHECK(steps >= 0 && one.end + steps < one.capacity, "native: the cache is full");
      int64_t length = one.count + steps;
      if (one.most >= 0) length = std::min(length, one.most);
      int64_t offset = (one.end + steps - length) * one.bytes;
      cache.layers.push_back({one.keys + offset, one.values + offset, length, one.pitch, one.row_pitch});
    }
    return cache;
  }

  // Decodes `tokens` [M], which stand at `position` of their texts, `steps` after bind(): that many
  // steps have written a position each.  cosine, sine: [positions, tables, R] float32.
  // Returns logits [M, V], hidden [M, D], in the weights' dtype, whatever mode the caller is in;
  // with `forbidden`, in the place of logits the likeliest tokens [M] but for these, int64.
  std::vector<Tensor> step(const std::vector<int64_t>& tokens, int64_t steps, int64_t position,
                           const Tensor& cosine, const Tensor& sine, bool observe,
                           const std::optional<std::vector<int64_t>>& forbidden) {
    c10::InferenceMode mode(false);
    at::NoGradGuard no_graph;
    TORCH_CHECK(!tokens.empty(), "native: tokens are missing");
    rows = int64_t(tokens.size());
    dart::Cache cache = cache_after(steps, position, rows);
    check_tokens(tokens.data(), rows);
    int64_t each = check_angles(position, cosine, sine);
    int64_t threads = at::get_num_threads();
    int64_t known = scratch ? scratch->rows : 0;
    if (known < rows || scratch->threads < threads)
      scratch = std::make_unique<dart::Scratch>(model, threads, std::max(known, rows));
    scratch->observed = observe, scratch->watched = watched, scratch->greedy = forbidden.has_value();
    scratch->forbidden = forbidden.value_or(std::vector<int64_t>{});
    std::fill(scratch->likeliest.begin(), scratch->likeliest.end(), dart::Likeliest{});
    const float* cos = static_cast<const float*>(data(cosine, at::kFloat)) + position * each;
    const float* sin = static_cast<const float*>(data(sine, at::kFloat)) + position * each;
    const dart::Kernels& kernels = best();
    scratch->jobs.begin();
    if (timed) scratch->times.emplace().begin();
    else scratch->times.reset();
    run_on_threads([&](int64_t member) {
      dart::step(kernels, model, cache, tokens.data(), cos, sin, *scratch, member);
    });
    if (timed) scratch->times->end(dart::StepPart::head);
    int64_t pitch = model.logits_pitch();
    auto logits = [&] {
      return at::from_blob(scratch->logits.data(), {rows, model.vocabulary}, {pitch, 1}, at::kFloat);
    };
    return {forbidden ? likeliest() : logits().to(type, false, true),
            copy(scratch->normed, {rows, model.hidden}, type)};
  }

  Tensor likeliest() const {
    Tensor tokens = at::empty({rows}, at::kLong);
    for (int64_t m = 0; m < rows; ++m) {
      dart::Likeliest best;
      for (int64_t i = 0; i < scratch->threads; ++i) best.see(scratch->likeliest[i * scratch->rows + m]);
      tokens.data_ptr<int64_t>()[m] = best.index;
    }
    return tokens;
  }
  int64_t rows = 0;  // of the last step

  // Steps score words by a screen of the head from now on: see read_screen.
  void set_screen(const Tensor& basis, const Tensor& levels, const Tensor& by, int64_t keep,
                  double threshold) {
    dart::Screen read = dart::read_screen(basis, levels, by, keep, threshold, model.vocabulary, model.hidden);
    TORCH_CHECK(!model.head.packed || model.head.packed->order == dart::Order::rows,
                "native: words here and there are read of rows alone");
    scratch.reset();
    model.screen = read;
    held.insert(held.end(), {basis, levels, by});
  }

  // Steps score words by the whole head again.
  void drop_screen() {
    scratch.reset();
    model.screen.reset();
  }

  // Of the last step, by a screen: words of each row that were scored exactly.
  std::vector<int64_t> exact_words() const {
    TORCH_CHECK(scratch && model.screen, "native: no words were screened");
    std::vector<int64_t> found;
    for (int64_t m = 0; m < rows; ++m) found.push_back(scratch->screened.exact_words(m));
    return found;
  }

  void check_tokens(const int64_t* tokens, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      TORCH_CHECK_INDEX(tokens[i] >= 0 && tokens[i] < model.known, "token id ", tokens[i],
                        " is outside the vocabulary of ", model.known,
                        " tokens: encode the text with the tokenizer of this model");
  }

  // Values of all angles of a position.
  int64_t check_angles(int64_t position, const Tensor& cosine, const Tensor& sine) const {
    TORCH_CHECK_INDEX(!model.places || position < model.places, "the text is longer than the ", model.places,
                      " positions that this model knows");
    TORCH_CHECK(cosine.dim() == 3 && cosine.sizes() == sine.sizes() && position < cosine.size(0),
                "native: angles are missing");
    int64_t each = cosine.size(1) * cosine.size(2);
    for (const dart::Layer& layer : model.layers)
      TORCH_CHECK(each >= (layer.table + 1) * model.rotary, "native: angles are missing");
    return each;
  }

  // Whole prompts [B, T] without masks, of packed matrices: see prompt_ops.h.  few: vectors up to which a
  // product runs on the blocks.
  dart::Prompt prompt(int64_t texts, int64_t tokens, const Tensor& cosine, const Tensor& sine,
                      int64_t few) const {
    int64_t each = check_angles(tokens - 1, cosine, sine);
    auto floats = [](const Tensor& t) { return static_cast<const float*>(data(t, at::kFloat)); };
    return {model, type, few, texts, tokens, floats(cosine), floats(sine), each};
  }

  void check_prompt() const {
    bool all = model.embedding.packed && model.head.packed && !model.attention_cap;
    for (const dart::Layer& one : model.layers) {
      all = all && one.q.packed && one.o.packed && (model.fused || (one.k.packed && one.v.packed));
      all = all && one.ffn.packed_up && one.ffn.packed_down && (!one.ffn.gate || one.ffn.packed_gate);
      all = all && !one.ffn.ids && !one.ffn.rank && !one.proxies.keep;
    }
    TORCH_CHECK(all, "native: a prompt takes packed matrices and no masks");
  }

  // on_blocks: the layers run by prompt_layers, and not one by one.
  std::vector<Tensor> prompt_begin(const Tensor& ids, const Tensor& cosine, const Tensor& sine,
                                   bool on_blocks) {
    c10::InferenceMode mode(false);
    at::NoGradGuard no_graph;
    check_prompt();
    TORCH_CHECK(ids.dim() == 2 && ids.numel(), "native: tokens are missing");
    Tensor tokens = ids.to(at::kLong).contiguous();
    check_tokens(tokens.const_data_ptr<int64_t>(), tokens.numel());
    dart::Prompt made = prompt(ids.size(0), ids.size(1), cosine, sine, 0);
    if (on_blocks) {
      made.type = at::kFloat;
      prompt_room = std::make_unique<dart::PromptRoom>(best(), model, dart::Text{made.texts, made.tokens},
                                                       int64_t(model.layers.size()), at::get_num_threads());
    }
    return made.begin(tokens);
  }

  // Layers `first` to `last` of a prompt that was begun so: see prompt_ops.h.
  std::vector<Tensor> prompt_layers(int64_t first, int64_t last, const Tensor& stream, const Tensor& given,
                                    int64_t texts, const Tensor& cosine, const Tensor& sine,
                                    int64_t observed) {
    c10::InferenceMode mode(false);
    at::NoGradGuard no_graph;
    TORCH_CHECK(prompt_room && 0 <= first && first <= last && last <= int64_t(model.layers.size()) &&
                    at::get_num_threads() <= prompt_room->threads,
                "native: no such layers");
    return prompt(texts, given.size(0) / texts, cosine, sine, 0)
        .layers(first, last, stream, given, observed, *prompt_room);
  }

  std::vector<Tensor> prompt_layer(int64_t index, const Tensor& stream, const Tensor& given, int64_t texts,
                                   const Tensor& cosine, const Tensor& sine, int64_t few) const {
    c10::InferenceMode mode(false);
    at::NoGradGuard no_graph;
    TORCH_CHECK(index >= 0 && index < int64_t(model.layers.size()), "native: no such layer");
    return prompt(texts, given.size(0) / texts, cosine, sine, few).layer(index, stream, given);
  }

  std::vector<Tensor> prompt_end(const Tensor& given, int64_t texts, int64_t keep, int64_t few) {
    c10::InferenceMode mode(false);
    at::NoGradGuard no_graph;
    prompt_room.reset();
    dart::Prompt made{model, type, few, texts, given.size(0) / texts, nullptr, nullptr, 0};
    return made.end(given.to(type), keep);
  }

  // Of the last step, which was observed: u [L, M, I], h [L, M, D] and, with `stream` (else
  // [0, M, D]), z, x and r [L, M, D], in the weights' dtype; r is z where no norm comes between.
  std::vector<Tensor> observed(bool stream) {
    TORCH_CHECK(scratch && scratch->observed, "native: nothing was observed");
    int64_t layers = int64_t(model.layers.size()), read = stream ? layers : 0;
    bool normed = !model.layers.empty() && model.layers[0].after_ffn.factor;
    return {copy(scratch->u, {layers, rows, model.width}, type),
            copy(scratch->h, {layers, rows, model.hidden}, type),
            copy(scratch->z, {read, rows, model.hidden}, type),
            copy(scratch->x, {read, rows, model.hidden}, type),
            copy(normed ? scratch->r : scratch->z, {read, rows, model.hidden}, type)};
  }

  // Whether steps record what their tokens select, from the next one on.
  void watch(bool choices) { watched = choices; }

  // Of the last step, watched: what its tokens selected, as bits [L, M, I / 8 rounded up], as of
  // Choice::marks; zeros in layers without selection.
  Tensor marks() const {
    TORCH_CHECK(scratch && scratch->watched, "native: nobody watched the last step");
    int64_t layers = int64_t(model.layers.size()), bytes = dart::marked_bytes(model.width);
    Tensor found = at::empty({layers, rows, bytes}, at::kByte);
    std::copy_n(scratch->marks.data(), found.numel(), found.mutable_data_ptr<uint8_t>());
    return found;
  }

  // Whether steps record the times of their parts, from the next one on.
  void time_parts(bool on) { timed = on; }

  // Of the last step, timed: seconds of its parts, in the order of StepPart.
  std::vector<double> part_seconds() const {
    TORCH_CHECK(scratch && scratch->times, "native: nobody timed the last step");
    return {scratch->times->seconds.begin(), scratch->times->seconds.end()};
  }

  // Bytes of scratch memory beside the weights and the masks.
  int64_t nbytes() const {
    if (!scratch) return 0;
    const dart::Scratch& s = *scratch;
    size_t numbers = 0;
    for (const auto* floats :
         {&s.stream, &s.qkv, &s.attended, &s.logits, &s.inputs, &s.normed, &s.scores, &s.parts, &s.u, &s.h,
          &s.z, &s.x, &s.r, &s.strength, &s.screened.z, &s.screened.values})
      numbers += floats->size();
    return int64_t(4 * (numbers + s.orders.size()) + 2 * s.narrow.size() + s.marks.size() +
                   8 * (s.jobs.taken.size() + s.jobs.done.size()));
  }

  static Tensor copy(std::vector<float>& from, std::vector<int64_t> shape, at::ScalarType type) {
    return at::from_blob(from.data(), shape, at::kFloat).to(type, false, true);
  }
};

// Bytes a second at which torch's threads read `t`, which must be larger than the CPU's caches: the most of
// several turns.  Like the kernels, each thread reads one stream and asks for it ahead.
double read_speed(const Tensor& t) {
  constexpr int64_t LINE = 8, AHEAD = 256;  // numbers
  const auto* from = static_cast<const uint64_t*>(data(t, at::kLong));
  int64_t count = t.numel() / LINE * LINE;
  double least = INFINITY;
  std::atomic<uint64_t> total{0};  // so that the reads are not left out
  for (int turn = 0; turn < 3; ++turn) {
    auto start = std::chrono::steady_clock::now();
    int64_t threads = at::get_num_threads();
    std::atomic<int64_t> taken{0};
    run_on_threads([&](int64_t) {
      for (int64_t one; (one = taken++) < threads;) {
        dart::Span own = dart::part(count, one, threads, LINE);
        uint64_t sums[LINE] = {};
        for (int64_t i = own.begin; i < own.end; i += LINE) {
          __builtin_prefetch(from + i + AHEAD);
          for (int64_t j = 0; j < LINE; ++j) sums[j] += from[i + j];
        }
        for (uint64_t sum : sums) total += sum;
      }
    });
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return double(count * 8) / least;
}

}  // namespace

const dart::Kernels& dart::best() {
  const Kernels* found = in_use.load(std::memory_order_relaxed);
  if (!found) in_use = found = kernels();
  return *found;
}

TORCH_LIBRARY(dart_llm, library) {
  dart::register_packed(library);
  dart::register_head(library);
  library.class_<Choice>("Choice")
      .def(torch::init<const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                       const Tensor&, const MaybeTensor&, std::vector<int64_t>>())
      .def("marks", &Choice::marks);
  library.def("linear", linear);
  library.def("ffn", ffn);
  library.def("packed_ffn", packed_ffn);
  library.def("selection_sums", selection_sums);
  library.def("selection_times", selection_times);
  library.def("read_speed", read_speed);
  library.def("fold", fold);
  library.def("allocated", allocated);
  library.def("lay_out", lay_out);
  library.def("cpu", cpu);
  library.def("use", use);
  library.class_<Decoder>("Decoder")
      .def(torch::init<std::vector<int64_t>, std::vector<std::string>, std::vector<double>,
                       std::vector<Tensor>, std::vector<Tensor>, std::vector<int64_t>, int64_t>())
      .def("set_mask", &Decoder::set_mask)
      .def("set_packed", &Decoder::set_packed)
      .def("bind", &Decoder::bind)
      .def("step", &Decoder::step)
      .def("set_screen", &Decoder::set_screen)
      .def("drop_screen", &Decoder::drop_screen)
      .def("exact_words", &Decoder::exact_words)
      .def("prompt_begin", &Decoder::prompt_begin)
      .def("prompt_layer", &Decoder::prompt_layer)
      .def("prompt_layers", &Decoder::prompt_layers)
      .def("prompt_end", &Decoder::prompt_end)
      .def("nbytes", &Decoder::nbytes)
      .def("observed", &Decoder::observed)
      .def("watch", &Decoder::watch)
      .def("marks", &Decoder::marks)
      .def("time_parts", &Decoder::time_parts)
      .def("part_seconds", &Decoder::part_seconds);
}
