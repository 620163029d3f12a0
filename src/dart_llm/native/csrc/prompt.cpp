#include "prompt.h"

#include <algorithm>

namespace dart {
namespace {

constexpr int64_t JOBS = 13;    // of a layer, at most
constexpr int64_t TOKENS = 16;  // rows of a part: their values share no line of the cache

int64_t units_of(int64_t n) { return (n + UNIT - 1) / UNIT; }
int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

void* at(void* base, Dtype dtype, int64_t values) {
  return static_cast<char*>(base) + values * (dtype == Dtype::f32 ? 4 : 2);
}

// One member at work on the layers of a prompt.
struct Reader : Worker {
  const Kernels& kernels;
  const Decoder& decoder;
  const Text& text;
  PromptRoom& room;
  float *stream, *normed, *line, *scores;

  // Calls work(m) for every row.
  template <class Work>
  void by_rows(const Work& work) {
    int64_t rows = text.rows(), some = std::clamp<int64_t>(rows / PARTS, 1, TOKENS);
    in_parts(pieces(rows, some), [&](int64_t one, int64_t) {
      for (int64_t m = one * some; m < std::min(rows, (one + 1) * some); ++m) work(m);
    });
  }

  // y [M, stride] = matrix x; several may be open at once.
  void multiply(const Packed& matrix, const RoundedLots& x, float* y, int64_t stride) {
    LotsProduct product(matrix);
    in_parts(product.parts,
             [&, product](int64_t one, int64_t) { product.run(kernels, x.view, one, y, stride); });
  }

  void round(const float* from, int64_t n, const RoundedLots& to, int64_t m) const {
    kernels.packed.round_lot(from, n, to.view, m);
  }

  void add_bias(const void* bias, int64_t n, float* to) const {
    if (bias) kernels.add(decoder.dtype, bias, 0, n, to);
  }

  // Keys and values of row m, and its queries in place: with biases, normed and rotated.
  void heads(const Layer& layer, const Left& left, int64_t m) {
    const Decoder& d = decoder;
    float* own = room.qkv.data() + m * room.qkv_pitch;
    int64_t q = d.heads * d.size, kv = d.kv_heads * d.size, token = m % text.tokens,
            size = whole_lanes(d.size);
    int64_t positions = whole_lanes(text.tokens), each = token * text.angles;
    add_bias(layer.q_bias, d.fused ? d.in_qkv() : q, own);
    add_bias(layer.k_bias, kv, own + q), add_bias(layer.v_bias, kv, own + q + kv);
    if (d.over_all) d.norm_row(layer.q_norm, own, q, own), d.norm_row(layer.k_norm, own + q, kv, own + q);
    for (int64_t kind = 0; kind < 3; ++kind)
      for (int64_t one = 0; one < (kind ? d.kv_heads : d.heads); ++one) {
        float* head = own + d.head_at(kind, one);
        if (kind < 2)
          d.rotate(head, kind ? layer.k_norm : layer.q_norm, layer.table, text.cosine + each,
                   text.sine + each);
        if (!kind) continue;
        int64_t place = m / text.tokens * d.kv_heads + one;
        void* to = kind == 1 ? left.keys : left.values;
        kernels.round(d.dtype, head, at(to, d.dtype, (place * text.tokens + token) * d.size), d.size);
        if (kind == 2) std::copy_n(head, d.size, room.values.data() + (place * positions + token) * size);
        else
          for (int64_t i = 0; i < d.size; ++i)
            room.keys[size_t((place * d.size + i) * positions + token)] = head[i];
      }
  }

  void attend() {
    const Decoder& d = decoder;
    int64_t blocks = pieces(text.tokens, QUERIES), positions = whole_lanes(text.tokens),
            size = whole_lanes(d.size);
    in_parts(text.texts * d.heads * blocks, [&](int64_t index, int64_t parts) {
      int64_t task = parts - 1 - index;  // the last of a text take longest
      int64_t block = task / (text.texts * d.heads), rest = task % (text.texts * d.heads);
      int64_t one = rest % d.heads, of = rest / d.heads, first = block * QUERIES;
      int64_t place = of * d.kv_heads + one / (d.heads / d.kv_heads), row = of * text.tokens + first;
      kernels.attend_some({room.qkv.data() + row * room.qkv_pitch + d.head_at(0, one), room.qkv_pitch, first,
                           std::min(QUERIES, text.tokens - first),
                           room.keys.data() + place * d.size * positions, positions,
                           room.values.data() + place * positions * size, d.size, d.scale, scores,
                           room.attended.data() + (row * d.heads + one) * d.size, d.heads * d.size});
    });
  }

  // The stream's row m += y [M, D] with a bias, normed by `after`.
  void add(const float* y, const float* wide_bias, const void* bias, const Norm& after, int64_t m) {
    int64_t hidden = decoder.hidden;
    const float* from = y + m * hidden;
    for (int64_t i = 0; i < hidden; ++i) line[i] = from[i] + (wide_bias ? wide_bias[i] : 0.0f);
    add_bias(bias, hidden, line);
    decoder.norm_row(after, line, hidden, line);
    float* to = stream + m * hidden;
    for (int64_t i = 0; i < hidden; ++i) to[i] += line[i];
  }

  void ffn(const Layer& layer, const Left& left) {
    const Ffn& ffn = layer.ffn;
    float *up = room.up.data(), *gate = ffn.packed_gate ? room.gate.data() : nullptr;
    int64_t width = decoder.width;
    multiply(*ffn.packed_up, room.given, up, room.width);
    if (gate) multiply(*ffn.packed_gate, room.given, gate, room.width);
    finish();
    by_rows([&](int64_t m) {
      float *own = up + m * room.width, *its_gate = gate ? gate + m * room.width : nullptr;
      if (gate) add_bias(ffn.gate_bias, width, its_gate);
      add_bias(ffn.up_bias, width, own);
      kernels.packed.activate(ffn.act, its_gate, own, width);
      if (left.u) kernels.round(decoder.dtype, own, at(left.u, decoder.dtype, m * width), width);
      round(own, width, room.active, m);
    });
    finish();
    multiply(*ffn.packed_down, room.active, room.sums.data(), decoder.hidden);
    finish();
  }

  void layer(const Layer& layer, const Norm& next, const Left& left) {
    const Decoder& d = decoder;
    int64_t hidden = d.hidden, q = d.heads * d.size;
    float *qkv = room.qkv.data(), *sums = room.sums.data();
    multiply(*layer.q.packed, room.given, qkv, room.qkv_pitch);
    if (!d.fused) {
      multiply(*layer.k.packed, room.given, qkv + q, room.qkv_pitch);
      multiply(*layer.v.packed, room.given, qkv + q + d.kv_heads * d.size, room.qkv_pitch);
    }
    finish();
    by_rows([&](int64_t m) { heads(layer, left, m); });
    finish();
    attend();
    finish();
    by_rows([&](int64_t m) { round(room.attended.data() + m * q, q, room.mixed, m); });
    finish();
    multiply(*layer.o.packed, room.mixed, sums, hidden);
    finish();
    by_rows([&](int64_t m) {
      float *h = normed + m * hidden, *to = stream + m * hidden;
      if (d.parallel) d.norm_row(layer.before_ffn, to, hidden, h);
      add(sums, nullptr, layer.o_bias, layer.after_attention, m);
      if (!d.parallel) d.norm_row(layer.before_ffn, to, hidden, h);
      if (left.h) kernels.round(d.dtype, h, at(left.h, d.dtype, m * hidden), hidden);
      round(h, hidden, room.given, m);
    });
    finish();
    ffn(layer, left);
    by_rows([&](int64_t m) {
      float* h = normed + m * hidden;
      add(sums, layer.bias, nullptr, layer.after_ffn, m);
      d.norm_row(next, stream + m * hidden, hidden, h);
      round(h, hidden, room.given, m);
    });
    finish();
  }
};

}  // namespace

RoundedLots::RoundedLots(const Kernels& kernels, int64_t count, int64_t columns) {
  int64_t size = units_of(columns) * UNIT, lot = kernels.packed.lot;
  int64_t values = pieces(count, lot) * lot * size, blocks = values / GROUP;
  levels.resize(size_t(values)), factors.resize(size_t(4 * blocks)), totals.resize(size_t(3 * blocks));
  float* own = factors.data();
  view = {
      levels.data(), own, {totals.data(), totals.data() + blocks}, {own + blocks, own + 2 * blocks}, count,
      size,          lot};
}

LotsProduct::LotsProduct(const Packed& p)
    : matrix(&p), outputs(p.rows), parts(std::min(PARTS, pieces(p.rows, 2 * TILE))) {}

void LotsProduct::run(const Kernels& kernels, const Lots& x, int64_t index, float* y, int64_t stride) const {
  Span own = part(outputs, index, parts, 2 * TILE);
  kernels.packed.lots(*matrix, x, {own.begin, own.end, 0, matrix->units()}, y, stride);
}

PromptRoom::PromptRoom(const Kernels& kernels, const Decoder& d, const Text& text, int64_t layers,
                       int64_t threads_)
    : jobs(layers * JOBS + 1),
      qkv_pitch(d.in_qkv()),
      width(whole_lanes(d.width) + GROUP),
      given(kernels, text.rows(), d.hidden),
      mixed(kernels, text.rows(), d.heads * d.size),
      active(kernels, text.rows(), d.width),
      threads(threads_) {
  int64_t rows = text.rows(), positions = whole_lanes(text.tokens), size = whole_lanes(d.size);
  qkv.resize(rows * qkv_pitch), attended.resize(rows * d.heads * d.size);
  keys.resize(text.texts * d.kv_heads * d.size * positions);
  values.resize(text.texts * d.kv_heads * positions * size);
  score = QUERIES * (positions + size), scores.resize(threads * score);
  gate.resize(rows * width), up.resize(rows * width);
  sums.resize(rows * d.hidden);
  line = whole_lanes(d.hidden), lines.resize(threads * line);
}

void prompt_layers(const Kernels& kernels, const Decoder& decoder, const Text& text, int64_t first,
                   int64_t last, float* stream, float* normed, const Left* left, PromptRoom& room,
                   int64_t member) {
  Reader one{Worker(room.jobs),
             kernels,
             decoder,
             text,
             room,
             stream,
             normed,
             room.lines.data() + member * room.line,
             room.scores.data() + member * room.score};
  one.by_rows([&](int64_t m) { one.round(normed + m * decoder.hidden, decoder.hidden, room.given, m); });
  one.finish();
  for (int64_t index = first; index < last; ++index) {
    bool end = size_t(index) + 1 == decoder.layers.size();
    const Norm& next = end ? decoder.norm : decoder.layers[size_t(index) + 1].before_attention;
    one.layer(decoder.layers[size_t(index)], next, left[index - first]);
  }
}

}  // namespace dart
