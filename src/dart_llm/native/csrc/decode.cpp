#include "decode.h"
#include "choose.h"
#include "packed_blocks.h"
#include "packed_ffn.h"

#include <algorithm>
#include <cmath>

namespace dart {
namespace {

constexpr int64_t JOBS = 11;      // of a layer, at most: q, k, v, their norms, attention, o, its norm,
                                  // the choice (2), FFN, its sum
constexpr int64_t SUMS = 4;       // parts of adding up what the parts of an FFN gave
constexpr int64_t LEAST = 32768;  // weights that are worth a part of their own

int64_t padded(int64_t n) { return (n + UNIT - 1) / UNIT * UNIT; }

const void* at(const void* base, Dtype dtype, int64_t values) {
  return static_cast<const char*>(base) + values * (dtype == Dtype::f32 ? 4 : 2);
}

void* at(void* base, Dtype dtype, int64_t values) {
  return static_cast<char*>(base) + values * (dtype == Dtype::f32 ? 4 : 2);
}

float capped(float x, float cap) { return cap * std::tanh(x / cap); }

// One member at work: the step's parts in order, with its own share of the scratch.
struct Member : Worker {
  const Kernels& kernels;
  const Decoder& decoder;
  const Cache& cache;
  const float *cosine, *sine;
  Scratch& scratch;
  float *normed, *x, *scores;  // x [D]: what a part of a layer is given
  uint16_t* narrow;
  int8_t* levels;
  float *scales, *group_sums;
  int32_t* whole;

  static int64_t parts_of(int64_t values) { return std::min(PARTS, 1 + values / LEAST); }

  // `from` rounded to the weights' dtype, as the model's own modules hand it on.
  Input input(const float* from, int64_t n) {
    kernels.packed.round(from, n, levels, scales, group_sums);
    Rounded rounded{levels, scales, group_sums, 1, (n + UNIT - 1) / UNIT * UNIT};
    if (decoder.dtype == Dtype::f32) return {from, from, 1, n, rounded};
    kernels.round(decoder.dtype, from, narrow, n);
    kernels.widen(decoder.dtype, narrow, normed, n);
    return {narrow, normed, 1, n, rounded};
  }

  void norm(const Norm& by, const float* from, int64_t n, float* to) const {
    if (!by.factor) {
      if (to != from) std::copy_n(from, n, to);
      return;
    }
    float mean = by.centred ? sum(n, [&](int64_t i) { return from[i]; }) / float(n) : 0.0f;
    float squares = sum(n, [&](int64_t i) { return (from[i] - mean) * (from[i] - mean); });
    float factor = 1.0f / std::sqrt(squares / float(n) + decoder.eps);
    for (int64_t i = 0; i < n; ++i) to[i] = (from[i] - mean) * factor * by.factor[i];
    if (by.bias)
      for (int64_t i = 0; i < n; ++i) to[i] += by.bias[i];
  }

  template <class Value>
  static float sum(int64_t n, const Value& value) {
    float lanes[8] = {}, total = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      for (int64_t j = 0; j < 8; ++j) lanes[j] += value(i + j);
    for (; i < n; ++i) lanes[0] += value(i);
    for (float lane : lanes) total += lane;
    return total;
  }

  // y = rows x + bias, and then(begin, end) for the rows that are done.
  template <class Then>
  void project(const Matrix& rows, const void* bias, const Input& in, int64_t count, float* y,
               const Then& then) {
    in_parts(parts_of(count * in.size), [&](int64_t one, int64_t parts) {
      Span own = part(count, one, parts);
      if (rows.packed) {
        kernels.packed.matvec(*rows.packed, in.rounded, own.begin, own.end, y, count);
        if (bias) kernels.add(decoder.dtype, bias, own.begin, own.end, y);
      } else {
        kernels.matvec(decoder.dtype, rows.plain, bias, in, own.begin, own.end, y, count);
      }
      then(own.begin, own.end);
    });
  }

  void project(const Matrix& rows, const void* bias, const Input& in, int64_t count, float* y) {
    project(rows, bias, in, count, y, [](int64_t, int64_t) {});
  }

  void turn(float* head, const Norm& by, int64_t table) const {
    if (!decoder.over_all) norm(by, head, decoder.size, head);
    if (table < 0) return;
    int64_t half = decoder.turned / 2;
    const float *cosines = cosine + table * decoder.turned, *sines = sine + table * decoder.turned;
    for (int64_t i = 0; i < half; ++i) {
      float a = head[i], b = head[i + half];
      head[i] = a * cosines[i] - b * sines[i];
      head[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
  }

  // Where head number `one` of queries (0), keys (1) or values (2) stands in qkv.
  float* head(int64_t kind, int64_t one) const {
    int64_t before[] = {0, decoder.heads, decoder.heads + decoder.kv_heads};
    int64_t place = decoder.by_heads ? 3 * one + kind : before[kind] + one;
    return scratch.qkv.data() + place * decoder.size;
  }

  // All query heads of one key-value head, which also writes its new position.
  void attend(int64_t index, int64_t kv) {
    const Layer& layer = decoder.layers[index];
    const Cache::Part& held = cache.layers[index];
    int64_t size = decoder.size, group = decoder.heads / decoder.kv_heads;
    float *key = head(1, kv), *value = head(2, kv);
    void* keys = at(held.keys, decoder.dtype, kv * held.pitch);
    void* values = at(held.values, decoder.dtype, kv * held.pitch);
    turn(key, layer.k_norm, layer.table);
    kernels.round(decoder.dtype, key, at(keys, decoder.dtype, held.length * size), size);
    kernels.round(decoder.dtype, value, at(values, decoder.dtype, held.length * size), size);
    for (int64_t one = kv * group; one < (kv + 1) * group; ++one) {
      float* query = head(0, one);
      turn(query, layer.q_norm, layer.table);
      kernels.attend(decoder.dtype, query, keys, values, held.length, size, key, value, size,
                     decoder.scale, decoder.attention_cap, scores,
                     scratch.attended.data() + one * size);
    }
  }

  void ffn(int64_t index) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden;
    norm(layer.before_ffn, scratch.stream.data(), hidden, x);
    Input given = input(x, hidden);
    Ffn ffn = layer.ffn;
    if (layer.copies.keep)
      choose(*this, kernels, decoder.dtype, layer.copies, given, ffn, scratch.strength.data(),
             scratch.chosen.data());
    float* u = scratch.observed ? scratch.u.data() + index * decoder.width : nullptr;
    in_parts(PARTS, [&](int64_t one, int64_t parts) {
      if (one == 0 && scratch.observed) observe(index);
      float* to = scratch.parts.data() + one * padded(hidden);
      std::fill_n(to, padded(hidden), 0.0f);
      Span own = part(ffn.kept, one, parts, ffn.packed_down ? GROUP : 4);
      if (ffn.packed_down)
        packed_ffn(kernels, decoder.dtype, ffn, given, own.begin, own.end, to, u, whole);
      else
        kernels.ffn(decoder.dtype, ffn, given, own.begin, own.end, to, u, decoder.width);
      own = part(ffn.rank, one, parts, 1);
      kernels.low_rank(decoder.dtype, ffn, given, own.begin, own.end, to);
    });
  }

  void observe(int64_t index) {
    int64_t hidden = decoder.hidden;
    std::copy_n(scratch.stream.data(), hidden, scratch.x.data() + index * hidden);
    std::copy_n(x, hidden, scratch.h.data() + index * hidden);
  }

  // Adds what the parts of an FFN gave, and the attention's output where both read one stream.
  void add_sums(int64_t index) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden, place = index * hidden;
    bool last = layer.after_ffn.factor;  // a norm of the whole comes after
    in_parts(last ? 1 : SUMS, [&](int64_t one, int64_t parts) {
      Span own = part(hidden, one, parts);
      for (int64_t i = own.begin; i < own.end; ++i) {
        float total = layer.bias ? layer.bias[i] : 0.0f;
        for (int64_t from = 0; from < PARTS; ++from) total += scratch.parts[from * padded(hidden) + i];
        if (scratch.observed) scratch.z[place + i] = total;
        x[i] = total;
      }
      norm(layer.after_ffn, x + own.begin, own.end - own.begin, x + own.begin);
      if (last && scratch.observed) std::copy_n(x, hidden, scratch.r.data() + place);
      for (int64_t i = own.begin; i < own.end; ++i)
        scratch.stream[i] += decoder.parallel ? x[i] + scratch.qkv[i] : x[i];
    });
  }

  void attention(int64_t index) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden, q = decoder.heads * decoder.size;
    int64_t kv = decoder.kv_heads * decoder.size;
    norm(layer.before_attention, scratch.stream.data(), hidden, x);
    Input given = input(x, hidden);
    float* qkv = scratch.qkv.data();
    project(layer.q, layer.q_bias, given, decoder.fused ? q + 2 * kv : q, qkv);
    if (!decoder.fused) {
      project(layer.k, layer.k_bias, given, kv, qkv + q);
      project(layer.v, layer.v_bias, given, kv, qkv + q + kv);
    }
    finish();
    if (decoder.over_all) {
      in_parts(2, [&](int64_t one, int64_t) {
        one ? norm(layer.k_norm, qkv + q, kv, qkv + q) : norm(layer.q_norm, qkv, q, qkv);
      });
      finish();
    }
    in_parts(decoder.kv_heads, [&](int64_t one, int64_t) { attend(index, one); });
    finish();
    add_attention(layer);
  }

  void add_attention(const Layer& layer) {
    int64_t hidden = decoder.hidden;
    float *y = scratch.qkv.data(), *stream = scratch.stream.data();
    Input given = input(scratch.attended.data(), decoder.heads * decoder.size);
    bool last = !layer.after_attention.factor && !decoder.parallel;
    project(layer.o, layer.o_bias, given, hidden, y, [&](int64_t begin, int64_t end) {
      if (last)
        for (int64_t i = begin; i < end; ++i) stream[i] += y[i];
    });
    if (decoder.parallel) return;
    finish();
    if (last) return;
    in_parts(1, [&](int64_t, int64_t) {
      norm(layer.after_attention, y, hidden, y);
      for (int64_t i = 0; i < hidden; ++i) stream[i] += y[i];
    });
    finish();
  }

  // A row of the embedding or of the positions.
  void row(const Matrix& rows, int64_t index, float* to) const {
    int64_t hidden = decoder.hidden;
    if (rows.packed)
      kernels.packed.dequantise(*rows.packed, index, Dtype::f32, to);
    else
      kernels.widen(decoder.dtype, at(rows.plain, decoder.dtype, index * hidden), to, hidden);
  }

  void embed(int64_t token) {
    float* to = scratch.stream.data();
    row(decoder.embedding, token, to);
    for (int64_t i = 0; i < decoder.hidden; ++i) to[i] *= decoder.embedding_scale;
    if (!decoder.places) return;
    row(decoder.positions, cache.position, x);
    for (int64_t i = 0; i < decoder.hidden; ++i) to[i] += x[i];
  }

  void run(int64_t token) {
    int64_t hidden = decoder.hidden;
    in_parts(1, [&](int64_t, int64_t) { embed(token); });
    finish();
    for (int64_t index = 0; index < int64_t(decoder.layers.size()); ++index) {
      attention(index);
      ffn(index);
      finish();
      add_sums(index);
      finish();
    }
    norm(decoder.norm, scratch.stream.data(), hidden, x);
    Input given = input(x, hidden);
    in_parts(1, [&](int64_t, int64_t) { std::copy_n(given.wide, hidden, scratch.normed.data()); });
    float* logits = scratch.logits.data();
    project(decoder.head, nullptr, given, decoder.vocabulary, logits, [&](int64_t begin, int64_t end) {
      if (decoder.logits_cap)
        for (int64_t i = begin; i < end; ++i) logits[i] = capped(logits[i], decoder.logits_cap);
    });
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
  inputs.resize(threads * d.hidden);
  parts.resize(PARTS * padded(d.hidden));
  normed.resize(d.hidden + threads * widest(d));
  narrow.resize(threads * widest(d));
  levels.resize(threads * padded(widest(d)));
  scales.resize(threads * 2 * Rounded::facts(padded(widest(d))));
  group_sums.resize(scales.size());
  whole.resize(threads * padded(d.hidden));
  strength.resize(d.width);
  chosen.resize(d.width);
  scores.resize(threads * positions);
  u.resize(layers * d.width);
  x.resize(layers * d.hidden);
  h.resize(layers * d.hidden);
  z.resize(layers * d.hidden);
  r.resize(layers * d.hidden);
}

void step(const Kernels& kernels, const Decoder& decoder, const Cache& cache, int64_t token,
          const float* cosine, const float* sine, Scratch& scratch, int64_t member) {
  int64_t wide = widest(decoder);
  Member one{Worker(scratch.jobs), kernels, decoder, cache, cosine, sine, scratch,
             scratch.normed.data() + decoder.hidden + member * wide,
             scratch.inputs.data() + member * decoder.hidden,
             scratch.scores.data() + member * scratch.positions,
             scratch.narrow.data() + member * wide,
             scratch.levels.data() + member * padded(wide),
             scratch.scales.data() + member * 2 * Rounded::facts(padded(wide)),
             scratch.group_sums.data() + member * 2 * Rounded::facts(padded(wide)),
             scratch.whole.data() + member * padded(decoder.hidden)};
  one.run(token);
}

}  // namespace dart
