#include "decode.h"
#include "choose.h"

#include <algorithm>
#include <cmath>

namespace dart {
namespace {

constexpr int64_t JOBS = 9;       // of a layer: q, k, v, attention, o, the choice (2), FFN, its sum
constexpr int64_t SUMS = 4;       // parts of adding up what the parts of an FFN gave
constexpr int64_t LEAST = 32768;  // weights that are worth a part of their own

// Of a member's sums: two vectors [D], or a head's norm, which may be longer.
int64_t stride(const Decoder& d) { return std::max(2 * d.hidden, d.size); }

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

const void* at(const void* base, Dtype dtype, int64_t values) {
  return static_cast<const char*>(base) + values * bytes_of(dtype);
}

void* at(void* base, Dtype dtype, int64_t values) {
  return static_cast<char*>(base) + values * bytes_of(dtype);
}

// One member at work: the step's parts in order, with its own share of the scratch.
struct Member : Worker {
  const Kernels& kernels;
  const Decoder& decoder;
  const Cache& cache;
  const float *cosine, *sine;
  Scratch& scratch;
  float *normed, *sums, *scores;
  uint16_t* narrow;

  static int64_t parts_of(int64_t values) { return std::min(PARTS, 1 + values / LEAST); }

  // `from` rounded to the weights' dtype, as the model's own modules hand it on.
  Input input(const float* from, int64_t n) {
    if (decoder.dtype == Dtype::f32) return {from, from, 1, n};
    kernels.round(decoder.dtype, from, narrow, n);
    kernels.widen(decoder.dtype, narrow, normed, n);
    return {narrow, normed, 1, n};
  }

  void norm(const float* from, const void* weight, int64_t n, float* to) const {
    float lanes[8] = {}, total = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      for (int64_t j = 0; j < 8; ++j) lanes[j] += from[i + j] * from[i + j];
    for (; i < n; ++i) lanes[0] += from[i] * from[i];
    for (float lane : lanes) total += lane;
    float factor = 1.0f / std::sqrt(total / float(n) + decoder.eps);
    kernels.widen(decoder.dtype, weight, sums, n);
    for (i = 0; i < n; ++i) to[i] = from[i] * factor * sums[i];
  }

  void project(const void* rows, const void* bias, const Input& x, int64_t count, float* y,
               float* stream = nullptr) {
    in_parts(parts_of(count * x.size), [&](int64_t one, int64_t parts) {
      Span own = part(count, one, parts);
      kernels.matvec(decoder.dtype, rows, bias, x, own.begin, own.end, y, count);
      if (stream)
        for (int64_t i = own.begin; i < own.end; ++i) stream[i] += y[i];
    });
  }

  void rotate(float* head, const void* weight) const {
    int64_t size = decoder.size, half = size / 2;
    if (weight) norm(head, weight, size, head);
    for (int64_t i = 0; i < half; ++i) {
      float a = head[i], b = head[i + half];
      head[i] = a * cosine[i] - b * sine[i];
      head[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
  }

  // All query heads of one key-value head, which also writes its new position.
  void attend(int64_t index, int64_t kv) {
    const Layer& layer = decoder.layers[index];
    int64_t size = decoder.size, group = decoder.heads / decoder.kv_heads;
    float* queries = scratch.qkv.data();
    float* key = queries + (decoder.heads + kv) * size;
    float* value = queries + (decoder.heads + decoder.kv_heads + kv) * size;
    int64_t place = kv * cache.capacity * size, next = cache.length * size;
    void* keys = at(cache.keys[index], decoder.dtype, place);
    void* values = at(cache.values[index], decoder.dtype, place);
    rotate(key, layer.k_norm);
    kernels.round(decoder.dtype, key, at(keys, decoder.dtype, next), size);
    kernels.round(decoder.dtype, value, at(values, decoder.dtype, next), size);
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
      float* query = queries + head * size;
      rotate(query, layer.q_norm);
      kernels.attend(decoder.dtype, query, keys, values, cache.length, size, key, value, size,
                     decoder.scale, scores, scratch.attended.data() + head * size);
    }
  }

  void ffn(int64_t index) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden;
    float* x = sums + hidden;
    norm(scratch.stream.data(), layer.ffn_norm, hidden, x);
    Input given = input(x, hidden);
    Ffn ffn = layer.ffn;
    if (layer.copies.keep)
      choose(*this, kernels, decoder.dtype, layer.copies, given, ffn, scratch.strength.data(),
             scratch.chosen.data());
    float* u = scratch.observed ? scratch.u.data() + index * decoder.width : nullptr;
    in_parts(PARTS, [&](int64_t one, int64_t parts) {
      if (one == 0 && scratch.observed) observe(index, x);
      float* to = scratch.parts.data() + one * hidden;
      std::fill_n(to, hidden, 0.0f);
      Span own = part(ffn.kept, one, parts);
      kernels.ffn(decoder.dtype, ffn, given, own.begin, own.end, to, u, decoder.width);
      own = part(ffn.rank, one, parts, 1);
      kernels.low_rank(decoder.dtype, ffn, given, own.begin, own.end, to);
    });
  }

  void observe(int64_t index, const float* given) {
    int64_t hidden = decoder.hidden;
    std::copy_n(scratch.stream.data(), hidden, scratch.x.data() + index * hidden);
    std::copy_n(given, hidden, scratch.h.data() + index * hidden);
  }

  void add_sums(int64_t index) {
    int64_t hidden = decoder.hidden;
    const float* bias = decoder.layers[index].bias;
    in_parts(SUMS, [&](int64_t one, int64_t parts) {
      Span own = part(hidden, one, parts);
      for (int64_t i = own.begin; i < own.end; ++i) {
        float total = bias ? bias[i] : 0.0f;
        for (int64_t from = 0; from < PARTS; ++from) total += scratch.parts[from * hidden + i];
        if (scratch.observed) scratch.z[index * hidden + i] = total;
        scratch.stream[i] += total;
      }
    });
  }

  void layer(int64_t index) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden, size = decoder.size, heads = decoder.heads;
    float* x = sums + hidden;
    norm(scratch.stream.data(), layer.attention_norm, hidden, x);
    Input given = input(x, hidden);
    float* qkv = scratch.qkv.data();
    int64_t kv = decoder.kv_heads * size;
    project(layer.q, layer.q_bias, given, heads * size, qkv);
    project(layer.k, layer.k_bias, given, kv, qkv + heads * size);
    project(layer.v, layer.v_bias, given, kv, qkv + heads * size + kv);
    finish();
    in_parts(decoder.kv_heads, [&](int64_t one, int64_t) { attend(index, one); });
    finish();
    project(layer.o, layer.o_bias, input(scratch.attended.data(), heads * size), hidden, qkv,
            scratch.stream.data());
    finish();
    ffn(index);
    finish();
    add_sums(index);
    finish();
  }

  void run(int64_t token) {
    int64_t hidden = decoder.hidden;
    in_parts(1, [&](int64_t, int64_t) {
      const void* row = at(decoder.embedding, decoder.dtype, token * hidden);
      kernels.widen(decoder.dtype, row, scratch.stream.data(), hidden);
    });
    finish();
    for (int64_t index = 0; index < int64_t(decoder.layers.size()); ++index) layer(index);
    float* x = sums + hidden;
    norm(scratch.stream.data(), decoder.norm, hidden, x);
    Input given = input(x, hidden);
    in_parts(1, [&](int64_t, int64_t) { std::copy_n(given.wide, hidden, scratch.normed.data()); });
    project(decoder.head, nullptr, given, decoder.vocabulary, scratch.logits.data());
  }
};

int64_t widest(const Decoder& d) { return std::max(d.hidden, d.heads * d.size); }

}  // namespace

Scratch::Scratch(const Decoder& d, int64_t threads_, int64_t positions_)
    : jobs(int64_t(d.layers.size()) * JOBS + 3), threads(threads_), positions(positions_) {
  int64_t layers = int64_t(d.layers.size());
  stream.resize(d.hidden);
  qkv.resize(std::max((d.heads + 2 * d.kv_heads) * d.size, d.hidden));
  attended.resize(d.heads * d.size);
  logits.resize(d.vocabulary);
  sums.resize(threads * stride(d));
  parts.resize(PARTS * d.hidden);
  normed.resize(d.hidden + threads * widest(d));
  narrow.resize(threads * widest(d));
  strength.resize(d.width);
  chosen.resize(d.width);
  scores.resize(threads * positions);
  u.resize(layers * d.width);
  x.resize(layers * d.hidden);
  h.resize(layers * d.hidden);
  z.resize(layers * d.hidden);
}

void step(const Kernels& kernels, const Decoder& decoder, const Cache& cache, int64_t token,
          const float* cosine, const float* sine, Scratch& scratch, int64_t member) {
  int64_t wide = widest(decoder);
  Member one{Worker(scratch.jobs), kernels, decoder, cache, cosine, sine, scratch,
             scratch.normed.data() + decoder.hidden + member * wide,
             scratch.sums.data() + member * stride(decoder),
             scratch.scores.data() + member * scratch.positions,
             scratch.narrow.data() + member * wide};
  one.run(token);
}

}  // namespace dart
