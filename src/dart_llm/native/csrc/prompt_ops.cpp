#include "prompt_ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <algorithm>
#include <cmath>

#include "packed_ops.h"
#include "threads.h"

namespace dart {
namespace {

using at::Tensor;
using Floats = std::vector<float>;

constexpr int64_t ENOUGH = 1 << 14;  // values that are worth waking a thread for

// Calls work(row) for each of `count` rows of some `width` values on torch's threads.
template <class Work>
void by_rows(int64_t count, int64_t width, const Work& work) {
  at::parallel_for(0, count, std::max<int64_t>(1, ENOUGH / width), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) work(m);
  });
}

// Rows of a matrix [M, n] of weights' dtype, read and written as float32.
struct Narrow {
  explicit Narrow(const Tensor& t)
      : kernels(best()),
        dtype(t.scalar_type() == at::kFloat ? Dtype::f32 : Dtype::bf16),
        base(static_cast<char*>(t.mutable_data_ptr())),
        bytes(int64_t(t.element_size())),
        pitch(t.size(-1)) {}

  void read(int64_t m, int64_t first, int64_t n, float* to) const {
    kernels.widen(dtype, base + (m * pitch + first) * bytes, to, n);
  }
  void write(int64_t m, const float* from, int64_t n) const {
    kernels.round(dtype, from, base + m * pitch * bytes, n);
  }
  void add_bias(const void* bias, int64_t n, float* to) const {
    if (bias) kernels.add(dtype, bias, 0, n, to);
  }

  const Kernels& kernels;
  Dtype dtype;
  char* base;
  int64_t bytes, pitch;
};

// stream += y [M, D] with a bias, normed by `after`, or nothing; the stream normed by `next`, rounded.
Tensor add(const Prompt& p, const Tensor& y, const float* wide_bias, const void* bias, const Norm& after,
           const Tensor& stream, const Norm& next) {
  int64_t hidden = p.decoder.hidden;
  Tensor found = at::empty(stream.sizes(), stream.options().dtype(p.type));
  Narrow from(y.defined() ? y : found), to(found);
  float* streams = stream.mutable_data_ptr<float>();
  by_rows(stream.size(0), hidden, [&](int64_t m) {
    thread_local Floats room;
    room.resize(size_t(hidden));
    float *row = room.data(), *own = streams + m * hidden;
    if (y.defined()) {
      from.read(m, 0, hidden, row);
      from.add_bias(bias, hidden, row);
      for (int64_t i = 0; wide_bias && i < hidden; ++i) row[i] += wide_bias[i];
      p.decoder.norm_row(after, row, hidden, row);
      for (int64_t i = 0; i < hidden; ++i) own[i] += row[i];
    }
    p.decoder.norm_row(next, own, hidden, row);
    to.write(m, row, hidden);
  });
  return found;
}

// The stream, normed and rounded: [M, D].
Tensor normed(const Prompt& p, const Norm& by, const Tensor& stream) {
  return add(p, {}, nullptr, nullptr, {}, stream, by);
}

struct Heads {
  Tensor queries, keys, values;  // [B, H, T, S], [B, K, T, S] twice
};

// Of projected rows [M, in_qkv]: with biases, normed and rotated.
Heads heads_of(const Prompt& p, const Layer& layer, const Tensor& qkv) {
  const Decoder& d = p.decoder;
  auto room = [&](int64_t heads) { return at::empty({p.texts, heads, p.tokens, d.size}, qkv.options()); };
  Heads found{room(d.heads), room(d.kv_heads), room(d.kv_heads)};
  Narrow from(qkv), to[] = {Narrow(found.queries), Narrow(found.keys), Narrow(found.values)};
  int64_t q = d.heads * d.size, kv = d.kv_heads * d.size;
  by_rows(qkv.size(0), d.in_qkv(), [&](int64_t m) {
    thread_local Floats row;
    row.resize(size_t(d.in_qkv()));
    float* own = row.data();
    int64_t text = m / p.tokens, token = m % p.tokens, each = token * p.angles;
    from.read(m, 0, d.in_qkv(), own);
    from.add_bias(layer.q_bias, d.fused ? d.in_qkv() : q, own);
    from.add_bias(layer.k_bias, kv, own + q), from.add_bias(layer.v_bias, kv, own + q + kv);
    if (d.over_all) d.norm_row(layer.q_norm, own, q, own), d.norm_row(layer.k_norm, own + q, kv, own + q);
    for (int64_t kind = 0; kind < 3; ++kind)
      for (int64_t one = 0, n = kind ? d.kv_heads : d.heads; one < n; ++one) {
        float* head = own + d.head_at(kind, one);
        if (kind < 2)
          d.rotate(head, kind ? layer.k_norm : layer.q_norm, layer.table, p.cosine + each, p.sine + each);
        to[kind].write((text * n + one) * p.tokens + token, head, d.size);
      }
  });
  return found;
}

// The activations [M, I] of the FFN's input.
Tensor activated(const Prompt& p, const Ffn& ffn, const Tensor& h) {
  int64_t width = p.decoder.width;
  bool gated = ffn.packed_gate;
  Tensor ups = times_rows(h, {ffn.packed_up}, p.few);
  Tensor gates = gated ? times_rows(h, {ffn.packed_gate}, p.few) : ups;
  Narrow of_gate(gates), of_up(ups);
  by_rows(h.size(0), width, [&](int64_t m) {
    thread_local Floats gate, up;
    gate.resize(size_t(width + GROUP)), up.resize(size_t(width + GROUP));
    if (gated) {
      of_gate.read(m, 0, width, gate.data());
      of_gate.add_bias(ffn.gate_bias, width, gate.data());
    }
    of_up.read(m, 0, width, up.data());
    of_up.add_bias(ffn.up_bias, width, up.data());
    best().packed.activate(ffn.act, gated ? gate.data() : nullptr, up.data(), width);
    of_up.write(m, up.data(), width);
  });
  return ups;
}

}  // namespace

std::vector<Tensor> Prompt::begin(const Tensor& ids) const {
  int64_t hidden = decoder.hidden;
  Tensor stream = at::empty({texts * tokens, hidden}, ids.options().dtype(at::kFloat));
  float* to = stream.mutable_data_ptr<float>();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const Kernels& kernels = best();
  by_rows(stream.size(0), hidden, [&](int64_t m) {
    float* own = to + m * hidden;
    decoder.row(kernels, decoder.embedding, id[m], own);
    for (int64_t i = 0; i < hidden; ++i) own[i] *= decoder.embedding_scale;
    if (!decoder.places) return;
    thread_local Floats place;
    place.resize(size_t(hidden));
    decoder.row(kernels, decoder.positions, m % tokens, place.data());
    for (int64_t i = 0; i < hidden; ++i) own[i] += place[size_t(i)];
  });
  const Norm& first = decoder.layers.empty() ? decoder.norm : decoder.layers[0].before_attention;
  return {stream, normed(*this, first, stream)};
}

std::vector<Tensor> Prompt::layer(int64_t index, const Tensor& stream, const Tensor& given) const {
  const Layer& own = decoder.layers[size_t(index)];
  bool last = size_t(index) + 1 == decoder.layers.size();
  const Norm& next = last ? decoder.norm : decoder.layers[size_t(index) + 1].before_attention;
  std::vector<const Packed*> projections = {own.q.packed};
  if (!decoder.fused) projections = {own.q.packed, own.k.packed, own.v.packed};
  Heads heads = heads_of(*this, own, times_rows(given, projections, few));
  Tensor mixed = at::scaled_dot_product_attention(heads.queries, heads.keys, heads.values, {}, 0.0, true,
                                                  double(decoder.scale), decoder.heads != decoder.kv_heads);
  mixed = mixed.transpose(1, 2).reshape({texts * tokens, decoder.heads * decoder.size});
  Tensor added = times_rows(mixed, {own.o.packed}, few), h;
  if (decoder.parallel) h = normed(*this, own.before_ffn, stream);
  Tensor after = add(*this, added, nullptr, own.o_bias, own.after_attention, stream, own.before_ffn);
  if (!decoder.parallel) h = after;
  Tensor u = activated(*this, own.ffn, h);
  Tensor z = times_rows(u, {own.ffn.packed_down}, few);
  Tensor passed = add(*this, z, own.bias, nullptr, own.after_ffn, stream, next);
  return {heads.keys, heads.values, u.view({texts, tokens, -1}), h.view({texts, tokens, -1}), passed};
}

std::vector<Tensor> Prompt::layers(int64_t first, int64_t last, const Tensor& stream, const Tensor& given,
                                   int64_t observed, PromptRoom& room) const {
  const Decoder& d = decoder;
  auto options = given.options().dtype(type);
  std::vector<Tensor> found;
  auto place = [&](at::IntArrayRef sizes) { return found.emplace_back(at::empty(sizes, options)); };
  std::vector<Left> left(size_t(last - first));
  for (Left& own : left) {
    own.keys = place({texts, d.kv_heads, tokens, d.size}).mutable_data_ptr();
    own.values = place({texts, d.kv_heads, tokens, d.size}).mutable_data_ptr();
  }
  for (int64_t kind = 0; kind < observed; ++kind) {
    Tensor all = place({last - first, texts, tokens, kind ? d.hidden : d.width});
    for (size_t i = 0; i < left.size(); ++i)
      (kind ? left[i].h : left[i].u) = all[int64_t(i)].mutable_data_ptr();
  }
  room.jobs.begin();
  Text text{texts, tokens, cosine, sine, angles};
  const Kernels& kernels = best();
  run_on_threads([&](int64_t member) {
    prompt_layers(kernels, d, text, first, last, stream.mutable_data_ptr<float>(),
                  given.mutable_data_ptr<float>(), left.data(), room, member);
  });
  return found;
}

std::vector<Tensor> Prompt::end(const Tensor& given, int64_t keep) const {
  Tensor hidden = given.view({texts, tokens, -1});
  int64_t count = keep ? std::min(keep, tokens) : tokens;
  Tensor last = hidden.narrow(1, tokens - count, count).reshape({texts * count, -1});
  Tensor logits = times_rows(last, {decoder.head.packed}, few);
  if (decoder.logits_cap) logits = logits.div(decoder.logits_cap).tanh().mul(decoder.logits_cap);
  return {logits.view({texts, count, -1}), hidden};
}

}  // namespace dart
