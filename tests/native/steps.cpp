// Random whole decode steps without torch, for sanitizers: decoders of any small size and shape, in
// buffers of exactly the right length, against the same step in plain loops.
//
// Usage: steps SEED FIRST STEPS: sequences FIRST, FIRST + 1, ... until STEPS steps were made.  Every
// sequence depends on SEED and its number alone; one that fails is named.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <sanitizer/common_interface_defs.h>
#include <thread>

#include "decode.h"
#include "held.h"

using namespace dart;

namespace {

using Values = std::vector<float>;

int64_t any(int64_t low, int64_t high) {  // both ends included
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

bool chance(double share) { return std::bernoulli_distribution(share)(generator); }

// Weights, which may lie at any multiple of their own size; empty: none.
struct Weights {
  Held held;
  int64_t before = 0;  // bytes in front of them
  const void* data() const { return held.wide.empty() ? nullptr : held.bytes.data() + before; }
};

Weights made(Dtype dtype, int64_t n, float scale) {
  Weights w{hold(dtype, drawn(n, scale)), 0};
  w.before = n && chance(0.5) ? int64_t(w.held.bytes.size()) / n : 0;
  w.held.bytes.insert(w.held.bytes.begin(), size_t(w.before), 0);
  w.held.bytes.shrink_to_fit();  // so that the end of the values is the end of the memory
  return w;
}

// 4-bit proxies of one matrix.
struct Levels {
  std::vector<uint8_t> bytes;
  Weights scales;
  const uint16_t* at() const { return static_cast<const uint16_t*>(scales.data()); }
};

// A norm's factors and biases; empty: none.
struct Factors {
  Values factor, bias;
  bool centred;
  Norm read() const {
    auto at = [](const Values& v) { return v.empty() ? nullptr : v.data(); };
    return {at(factor), at(bias), centred};
  }
};

struct LayerCase {
  Factors before_attention, after_attention, before_ffn, after_ffn, q_norm, k_norm;
  Weights q, k, v, o, q_bias, k_bias, v_bias, o_bias;
  int64_t table, window;  // -1: turns nothing; 0: sees all
  Weights gate, up, down, gate_bias, up_bias, basis, features;
  Levels gate_copy, up_copy;
  Values bias, mean, saliency;
  std::vector<int32_t> ids;
  bool all = true;  // no mask
  int64_t rank = 0, keep = 0;
};

struct Case {
  const Kernels* kernels;
  Dtype dtype;
  Act act;
  int64_t D, H, K, S, I, V, capacity, threads, rows;
  int64_t R, tables;
  bool gated, fused, by_heads, over_all, parallel, centred;
  bool wild = false;  // wild: values that no model should have
  float scale, embedding_scale, attention_cap, logits_cap;
  Weights embedding, positions, head;
  Factors norm;
  std::vector<LayerCase> layers;
};

constexpr float EPS = 1e-5f;

// a drawn decoder

void spoil(Dtype dtype, Weights& w) {
  const float odd[] = {NAN, INFINITY, -INFINITY, 1e38f, 1e-42f, -0.0f};
  Values values = w.held.wide;
  for (float& x : values)
    if (chance(0.01)) x = odd[any(0, 5)];
  kernels("portable")->round(dtype, values.data(), w.held.bytes.data() + w.before, int64_t(values.size()));
  w.held.wide = values;
}

constexpr int64_t BITS = 4, GROUP = 32;  // of the proxies by which tokens select

Levels levels(int64_t rows, int64_t size) {
  Levels made_of{std::vector<uint8_t>(rows * size / 2),
                 made(Dtype::bf16, rows * size / GROUP, 0.3f / std::sqrt(float(size)))};
  for (uint8_t& byte : made_of.bytes) byte = uint8_t(any(1, 15) | (any(1, 15) << 4));
  return made_of;
}

Factors factors(const Case& c, int64_t n, bool some = true, bool centred = false) {
  if (!some) return {};
  return {drawn(n), centred && chance(0.7) ? drawn(n, 0.3f) : Values(), centred && c.centred};
}

LayerCase layer_case(const Case& c) {
  LayerCase l;
  auto rows = [&](int64_t n, int64_t size) { return made(c.dtype, n * size, 1 / std::sqrt(float(size))); };
  auto maybe = [&](int64_t n) { return made(c.dtype, chance(0.4) ? n : 0, 0.3f); };
  int64_t q = c.H * c.S, kv = c.K * c.S;
  bool after = !c.parallel && chance(0.3);
  l.before_attention = factors(c, c.D, !after || chance(0.5), c.centred);
  l.before_ffn = factors(c, c.D, !after || chance(0.5), c.centred);
  l.after_attention = factors(c, c.D, after, c.centred);
  l.after_ffn = factors(c, c.D, after, c.centred);
  l.q = rows(c.fused ? q + 2 * kv : q, c.D), l.o = rows(c.D, q);
  l.q_bias = maybe(c.fused ? q + 2 * kv : q), l.o_bias = maybe(c.D);
  if (!c.fused) {
    l.k = rows(kv, c.D), l.v = rows(kv, c.D);
    l.k_bias = maybe(kv), l.v_bias = maybe(kv);
  }
  bool heads = c.over_all || chance(0.4);
  l.q_norm = factors(c, c.over_all ? q : c.S, heads), l.k_norm = factors(c, c.over_all ? kv : c.S, heads);
  l.table = any(-1, c.tables - 1), l.window = chance(0.3) ? any(2, 5) : 0;
  if (c.gated) l.gate = rows(c.I, c.D), l.gate_bias = maybe(c.I);
  l.up = rows(c.I, c.D), l.up_bias = maybe(c.I);
  l.down = made(c.dtype, c.I * c.D, 1 / std::sqrt(float(c.I)));
  return l;
}

// What may change between two steps: mask, compensation, or that tokens select.
void mask(const Case& c, LayerCase& l) {
  l.rank = l.keep = 0;
  l.all = chance(0.2);
  l.ids.clear(), l.mean.clear(), l.bias.clear();
  if (chance(0.5)) l.bias = drawn(c.D, 0.3f);
  if (c.D % (2 * GROUP) == 0 && chance(0.5)) {  // every token for itself
    l.all = true, l.keep = any(1, c.I);
    l.up_copy = levels(c.I, c.D);
    if (c.gated) l.gate_copy = levels(c.I, c.D);
    l.saliency = drawn(c.I);
    for (float& x : l.saliency) x = std::fabs(x);
    if (chance(0.5)) l.mean = drawn(c.I, 0.3f);
    return;
  }
  const int64_t sizes[] = {0, 1, any(0, c.I), any(0, c.I), c.I};
  if (!l.all) {
    l.ids.resize(c.I);
    for (int64_t i = 0; i < c.I; ++i) l.ids[i] = int32_t(i);
    std::shuffle(l.ids.begin(), l.ids.end(), generator);
    l.ids.resize(sizes[any(0, 4)]);
    std::sort(l.ids.begin(), l.ids.end());
    l.ids.shrink_to_fit();
  }
  if (chance(0.5)) {
    l.rank = any(1, 20);
    l.basis = made(c.dtype, l.rank * c.D, 1 / std::sqrt(float(c.D)));
    l.features = made(c.dtype, l.rank * c.D, 0.1f);
  }
}

Case drawn_case() {
  Case c{};
  std::vector<const Kernels*> kinds;
  for (const char* kind : KINDS)
    if (const Kernels* one = kernels(kind)) kinds.push_back(one);
  c.kernels = kinds[any(0, int64_t(kinds.size()) - 1)];
  c.dtype = chance(0.5) ? Dtype::f32 : Dtype::bf16;
  c.act = Act(any(0, 4)), c.gated = chance(0.7), c.threads = any(1, 2);
  c.D = chance(0.4) ? 64 * any(1, 2) : any(1, 70);
  c.K = any(1, 3), c.H = c.K * any(1, 3), c.S = 2 * any(1, 20);
  c.R = chance(0.7) ? c.S : 2 * any(1, c.S / 2), c.tables = any(1, 2);
  c.fused = chance(0.3), c.by_heads = c.fused && chance(0.5), c.over_all = !c.by_heads && chance(0.2);
  if (c.by_heads) c.H = c.K;
  c.parallel = chance(0.2), c.centred = chance(0.3);
  c.rows = chance(0.5) ? 1 : any(2, 6);
  c.I = any(1, 70), c.V = chance(0.05) ? any(600, 1200) : any(1, 90);  // many: several parts
  c.capacity = chance(0.02) ? any(60, 140) : any(1, 12);               // many: several parts
  c.scale = 1 / std::sqrt(float(c.S));
  c.embedding_scale = chance(0.3) ? 1.5f : 1, c.attention_cap = chance(0.3) ? 2.5f : 0;
  c.logits_cap = chance(0.3) ? 1.5f : 0;
  c.embedding = made(c.dtype, c.V * c.D, 1), c.norm = factors(c, c.D, true, c.centred);
  c.positions = made(c.dtype, chance(0.2) ? c.capacity * c.D : 0, 1);
  c.head = made(c.dtype, c.V * c.D, 1 / std::sqrt(float(c.D)));
  for (int64_t n = any(1, 3); n > 0; --n) {
    c.layers.push_back(layer_case(c));
    mask(c, c.layers.back());
  }
  if ((c.wild = chance(0.1)))
    for (LayerCase& l : c.layers)
      for (Weights* w : {&l.q, &l.v, &l.gate, &l.up, &l.down, &l.up_bias}) spoil(c.dtype, *w);
  return c;
}

Decoder decoder_of(const Case& c) {
  Decoder d{};
  d.dtype = c.dtype, d.hidden = c.D, d.heads = c.H, d.kv_heads = c.K, d.size = c.S, d.rotary = c.R;
  d.width = c.I, d.vocabulary = d.known = c.V, d.places = c.positions.data() ? c.capacity : 0;
  d.fused = c.fused, d.by_heads = c.by_heads, d.over_all = c.over_all, d.parallel = c.parallel;
  d.eps = EPS, d.scale = c.scale, d.embedding_scale = c.embedding_scale;
  d.attention_cap = c.attention_cap, d.logits_cap = c.logits_cap;
  d.embedding.plain = c.embedding.data(), d.positions.plain = c.positions.data();
  d.head.plain = c.head.data(), d.norm = c.norm.read();
  for (const LayerCase& l : c.layers) {
    Layer made_of{};
    made_of.before_attention = l.before_attention.read(), made_of.before_ffn = l.before_ffn.read();
    made_of.after_attention = l.after_attention.read(), made_of.after_ffn = l.after_ffn.read();
    made_of.q.plain = l.q.data(), made_of.k.plain = l.k.data(), made_of.v.plain = l.v.data();
    made_of.o.plain = l.o.data(), made_of.table = l.table;
    made_of.q_bias = l.q_bias.data(), made_of.k_bias = l.k_bias.data();
    made_of.v_bias = l.v_bias.data(), made_of.o_bias = l.o_bias.data();
    made_of.q_norm = l.q_norm.read(), made_of.k_norm = l.k_norm.read();
    Ffn& f = made_of.ffn;
    f.gate = l.gate.data(), f.up = l.up.data(), f.down = l.down.data();
    f.gate_bias = l.gate_bias.data(), f.up_bias = l.up_bias.data(), f.act = c.act;
    f.ids = l.all ? nullptr : l.ids.data(), f.kept = l.all ? c.I : int64_t(l.ids.size());
    f.rank = l.rank;
    if (l.rank) f.basis = l.basis.data(), f.features = l.features.data();
    f.mean = l.mean.empty() ? nullptr : l.mean.data();
    made_of.bias = l.bias.empty() ? nullptr : l.bias.data();
    if (l.keep)
      made_of.proxies = {c.gated ? l.gate_copy.bytes.data() : nullptr,
                         l.up_copy.bytes.data(),
                         c.gated ? l.gate_copy.at() : nullptr,
                         l.up_copy.at(),
                         l.saliency.data(),
                         BITS,
                         GROUP,
                         l.keep,
                         true};
    d.layers.push_back(made_of);
  }
  return d;
}

// the same step in plain loops

struct Plain {
  const Case& c;
  std::vector<std::vector<Values>> keys, values;  // per layer and position: [K S]
  Values cosine = Values(), sine = Values();
  Values u = Values(), h = Values(), z = Values(), x = Values(), r = Values(), logits = Values();
  bool sure = true;  // no token's choice hung on rounding

  Values rounded(const Values& from) const { return hold(c.dtype, from).wide; }

  static float dot(const float* a, const float* b, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += double(a[i]) * b[i];
    return float(total);
  }

  static Values product(const Weights& rows, const Weights& bias, const Values& in, int64_t n) {
    Values out(n);
    for (int64_t r = 0; r < n; ++r)
      out[r] = dot(&rows.held.wide[r * in.size()], in.data(), int64_t(in.size())) +
               (bias.data() ? bias.held.wide[r] : 0.0f);
    return out;
  }

  static void norm(float* values, const Factors& by, int64_t n) {
    if (by.factor.empty()) return;
    double mean = 0, squares = 0;
    for (int64_t i = 0; by.centred && i < n; ++i) mean += values[i] / double(n);
    for (int64_t i = 0; i < n; ++i) squares += (values[i] - mean) * (values[i] - mean) / double(n);
    for (int64_t i = 0; i < n; ++i) {
      values[i] = float((values[i] - mean) / std::sqrt(squares + EPS) * by.factor[i]);
      if (!by.bias.empty()) values[i] += by.bias[i];
    }
  }

  Values normed(Values values, const Factors& by) const {
    norm(values.data(), by, c.D);
    return values;
  }

  void rotate(float* head, const Factors& by, int64_t table) const {
    if (!c.over_all) norm(head, by, c.S);
    if (table < 0) return;
    for (int64_t i = 0, half = c.R / 2, j = table * c.R; i < half; ++i, ++j) {
      float a = head[i], b = head[i + half];
      head[i] = a * cosine[j] - b * sine[j];
      head[i + half] = b * cosine[j + half] + a * sine[j + half];
    }
  }

  static float capped(float x, float cap) { return cap ? cap * std::tanh(x / cap) : x; }

  // Queries, keys and values of one product, or of three.
  std::vector<Values> projected(const LayerCase& l, const Values& in) const {
    int64_t q = c.H * c.S, kv = c.K * c.S;
    if (!c.fused)
      return {product(l.q, l.q_bias, in, q), product(l.k, l.k_bias, in, kv), product(l.v, l.v_bias, in, kv)};
    Values all = product(l.q, l.q_bias, in, q + 2 * kv);
    std::vector<Values> found;
    for (int64_t kind = 0, place = 0; kind < 3; ++kind) {
      int64_t heads = kind ? c.K : c.H;
      found.emplace_back();
      for (int64_t head = 0; head < heads; ++head, ++place) {
        const float* from = &all[(c.by_heads ? 3 * head + kind : place) * c.S];
        found.back().insert(found.back().end(), from, from + c.S);
      }
    }
    return found;
  }

  Values attention(size_t index, const Values& in) {
    const LayerCase& l = c.layers[index];
    std::vector<Values> made_of = projected(l, in);
    Values &q = made_of[0], &k = made_of[1], &v = made_of[2], out(c.H * c.S);
    if (c.over_all) norm(q.data(), l.q_norm, c.H * c.S), norm(k.data(), l.k_norm, c.K * c.S);
    for (int64_t head = 0; head < c.K; ++head) rotate(&k[head * c.S], l.k_norm, l.table);
    keys[index].push_back(rounded(k)), values[index].push_back(rounded(v));
    for (int64_t head = 0; head < c.H; ++head) {
      rotate(&q[head * c.S], l.q_norm, l.table);
      int64_t at = head / (c.H / c.K) * c.S;
      auto all_keys = keys[index], all_values = values[index];
      int64_t unseen = l.window ? int64_t(all_keys.size()) - l.window : 0;
      if (unseen > 0) {
        all_keys.erase(all_keys.begin(), all_keys.begin() + unseen);
        all_values.erase(all_values.begin(), all_values.begin() + unseen);
      }
      Values shares;
      for (const Values& key : all_keys)
        shares.push_back(capped(dot(&q[head * c.S], &key[at], c.S) * c.scale, c.attention_cap));
      float most = *std::max_element(shares.begin(), shares.end()), total = 0;
      for (float& one : shares) total += one = std::exp(one - most);
      for (size_t t = 0; t < shares.size(); ++t)
        for (int64_t i = 0; i < c.S; ++i) out[head * c.S + i] += shares[t] / total * all_values[t][at + i];
    }
    return product(l.o, l.o_bias, rounded(out), c.D);
  }

  static float activated(Act act, float v) {
    switch (act) {
      case Act::silu:
        return v / (1 + std::exp(-v));
      case Act::gelu:
        return 0.5f * v * std::erfc(-v * 0.70710678f);
      case Act::gelu_tanh:
        return 0.5f * v * (1 + std::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
      case Act::relu:
        return std::fmax(v, 0.0f);
      default:
        return std::fmax(v, 0.0f) * std::fmax(v, 0.0f);
    }
  }

  float activation(const LayerCase& l, int64_t i, float gate, float up) const {
    if (l.up_bias.data()) up += l.up_bias.held.wide[i];
    if (l.gate_bias.data()) gate += l.gate_bias.held.wide[i];
    return c.gated ? activated(c.act, gate) * up : activated(c.act, up);
  }

  float copied(const Levels& from, int64_t row, const Values& in) const {
    float total = 0;
    for (int64_t d = 0; d < c.D; ++d) {
      uint8_t byte = from.bytes[row * (c.D / 2) + d % (c.D / 2)];
      int level = int(d < c.D / 2 ? byte & 15 : byte >> 4) - 8;
      total += float(level) * from.scales.held.wide[row * (c.D / GROUP) + d / GROUP] * in[d];
    }
    return total;
  }

  std::vector<int32_t> neurons(const LayerCase& l, const Values& in) {
    std::vector<int32_t> ids = l.ids;
    if (!l.all) return ids;
    ids.resize(c.I);
    for (int64_t i = 0; i < c.I; ++i) ids[i] = int32_t(i);
    if (!l.keep || l.keep == c.I) return ids;
    Values strength(c.I);
    for (int64_t i = 0; i < c.I; ++i) {
      float gate = c.gated ? copied(l.gate_copy, i, in) : 0.0f;
      strength[i] = std::fabs(activation(l, i, gate, copied(l.up_copy, i, in))) * l.saliency[i];
    }
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return strength[a] > strength[b]; });
    float last = strength[ids[l.keep - 1]], next = strength[ids[l.keep]];
    sure = sure && (last - next > 0.02f * (last + 0.05f) || (last == 0 && next == 0));
    ids.resize(l.keep);
    std::sort(ids.begin(), ids.end());
    return ids;
  }

  Values ffn(const LayerCase& l, const Values& in) {
    Values out(c.D);
    if (!l.bias.empty()) out = l.bias;
    u.resize(u.size() + c.I);
    float* seen = &u[u.size() - size_t(c.I)];
    for (int32_t i : neurons(l, in)) {
      const float* at = in.data();
      float gate = c.gated ? dot(&l.gate.held.wide[i * c.D], at, c.D) : 0.0f;
      float v = *seen++ = activation(l, i, gate, dot(&l.up.held.wide[i * c.D], at, c.D));
      if (!l.mean.empty()) v -= l.mean[i];
      for (int64_t d = 0; d < c.D; ++d) out[d] += v * l.down.held.wide[i * c.D + d];
    }
    for (int64_t r = 0; r < l.rank; ++r) {
      float feature = dot(&l.basis.held.wide[r * c.D], in.data(), c.D);
      for (int64_t d = 0; d < c.D; ++d) out[d] += feature * l.features.held.wide[r * c.D + d];
    }
    return out;
  }

  static void add(Values& to, const Values& from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  }

  void step(int64_t token, int64_t position) {
    const float* row = &c.embedding.held.wide[token * c.D];
    Values stream(row, row + c.D);
    for (int64_t i = 0; i < c.D; ++i) {
      stream[i] *= c.embedding_scale;
      if (c.positions.data()) stream[i] += c.positions.held.wide[position * c.D + i];
    }
    auto note = [](Values& to, const Values& from) { to.insert(to.end(), from.begin(), from.end()); };
    u.clear(), h.clear(), z.clear(), x.clear(), r.clear();
    for (size_t index = 0; index < c.layers.size(); ++index) {
      const LayerCase& l = c.layers[index];
      Values mixed = attention(index, rounded(normed(stream, l.before_attention)));
      norm(mixed.data(), l.after_attention, c.D);
      if (!c.parallel) add(stream, mixed);
      Values given = normed(stream, l.before_ffn);
      note(x, stream), note(h, given);
      Values own = ffn(l, rounded(given));
      note(z, own);
      norm(own.data(), l.after_ffn, c.D);
      note(r, own);
      add(stream, own);
      if (c.parallel) add(stream, mixed);
    }
    logits = product(c.head, Weights(), rounded(normed(stream, c.norm)), c.V);
    for (float& one : logits) one = capped(one, c.logits_cap);
  }
};

// a sequence

int64_t seed, number;

// Also when a sanitizer ends the program.
void name_it() {
  std::fprintf(stderr, "in sequence %lld of seed %lld\n", static_cast<long long>(number),
               static_cast<long long>(seed));
}

[[noreturn]] void fail() {
  name_it();
  std::exit(1);
}

void close(const Case& c, const char* what, const Values& found, const Values& wanted) {
  float allowed = c.dtype == Dtype::f32 ? 1e-3f : 6e-2f, size = 1;
  for (float one : wanted) size = std::max(size, std::fabs(one));
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (std::fabs(found[i] - wanted[i]) <= allowed * size) continue;
    std::printf("%s: place %zu is %g, not %g\n", what, i, double(found[i]), double(wanted[i]));
    fail();
  }
}

std::map<std::string, int64_t> counts;

// The caches as torch would hold them: one allocation per layer and side.
struct Memory {
  std::vector<std::vector<char>> blocks;
  Cache cache;
  Memory(const Case& c, int64_t rows) : blocks(2 * c.layers.size()), cache{{}, 0, rows} {
    for (std::vector<char>& one : blocks) one.resize(rows * c.K * c.capacity * c.S * bytes(c));
    cache.layers.resize(c.layers.size());
  }
  static int64_t bytes(const Case& c) { return c.dtype == Dtype::f32 ? 4 : 2; }
  // What each layer sees before a step at `position`: of a window the last positions.
  void show(const Case& c, int64_t position) {
    cache.position = position;
    for (size_t i = 0; i < c.layers.size(); ++i) {
      int64_t window = c.layers[i].window;
      int64_t seen = window ? std::min(position, window - 1) : position;
      int64_t before = (position - seen) * c.S * bytes(c);
      cache.layers[i] = {blocks[2 * i].data() + before, blocks[2 * i + 1].data() + before, seen,
                         c.capacity * c.S, c.K * c.capacity * c.S};
    }
  }
};

void run(const Case& c, const Decoder& d, Memory& memory, Scratch& scratch, const int64_t* tokens,
         const Plain& at, int64_t threads) {
  scratch.jobs.begin();
  auto work = [&](int64_t member) {
    step(*c.kernels, d, memory.cache, tokens, at.cosine.data(), at.sine.data(), scratch, member);
  };
  std::vector<std::thread> others;
  for (int64_t m = 1; m < threads; ++m) others.emplace_back(work, m);
  work(0);
  for (std::thread& one : others) one.join();
}

void count(const Case& c, const Scratch& scratch) {
  auto add = [&](const char* name, bool yes) { counts[name] += yes; };
  add("steps", true), add(c.dtype == Dtype::f32 ? "float32" : "bfloat16", true);
  add("two_threads", c.threads == 2), add("several_rows", c.rows > 1), add("observed", scratch.observed),
      add("odd_values", c.wild);
  add("grouped_heads", c.H > c.K), add("plain_ffn", !c.gated), add("odd_lengths", c.D % 2 == 1);
  auto some = [&](auto what) { return std::any_of(c.layers.begin(), c.layers.end(), what); };
  add("token_choice", some([](const LayerCase& l) { return l.keep > 0; }));
  add("low_rank", some([](const LayerCase& l) { return l.rank > 0; }));
  add("one_neuron", some([](const LayerCase& l) { return !l.all && l.ids.size() == 1; }));
  add("no_neuron", some([](const LayerCase& l) { return !l.all && l.ids.empty(); }));
  add("biases", some([](const LayerCase& l) { return l.q_bias.data() || l.up_bias.data(); }));
  add("head_norms", some([](const LayerCase& l) { return !l.q_norm.factor.empty(); }));
  add("norms_after", some([](const LayerCase& l) { return !l.after_ffn.factor.empty(); }));
  add("windows", some([](const LayerCase& l) { return l.window > 0; }));
  add("turns_nothing", some([](const LayerCase& l) { return l.table < 0; }));
  add("layer_norms", c.centred), add("fused", c.fused), add("by_heads", c.by_heads);
  add("norms_over_all", c.over_all), add("parallel", c.parallel), add("partly_turned", c.R < c.S);
  add("caps", c.attention_cap || c.logits_cap), add("positions", c.positions.data());
  add(c.kernels->name, true);
}

// Of row m.
void check(const Case& c, const Plain& plain, const Scratch& scratch, int64_t m) {
  auto part = [](const Values& from, int64_t begin, int64_t n) {
    return Values(from.begin() + begin, from.begin() + begin + n);
  };
  close(c, "logits", part(scratch.logits, m * c.V, c.V), plain.logits);
  if (!scratch.observed) return;
  int64_t layers = int64_t(c.layers.size());
  auto own = [&](const Values& from) {
    Values found;
    for (int64_t index = 0; index < layers; ++index) {
      Values one = part(from, (index * c.rows + m) * c.D, c.D);
      found.insert(found.end(), one.begin(), one.end());
    }
    return found;
  };
  close(c, "z", own(scratch.z), plain.z);
  close(c, "h", own(scratch.h), plain.h);
  close(c, "x", own(scratch.x), plain.x);
  if (!c.layers[0].after_ffn.factor.empty())
    close(c, "r", part(scratch.r, m * c.D, c.D), part(plain.r, 0, c.D));
  for (int64_t index = 0; index < layers; ++index) {
    const LayerCase& l = c.layers[size_t(index)];
    if (l.keep) continue;  // activations of tokens that select are not observed
    int64_t kept = l.all ? c.I : int64_t(l.ids.size());
    close(c, "u", part(scratch.u, (index * c.rows + m) * c.I, kept), part(plain.u, index * c.I, kept));
  }
}

void differ(const char* what) {
  std::printf("%s\n", what);
  fail();
}

// The number of threads changes no bit, nor do the other rows of a batch.
void compare(const Case& c, const Decoder& d, const Scratch& scratch, const Memory& memory,
             const std::vector<int64_t>& tokens, const Plain& at, Memory& alone, Scratch& single,
             std::vector<Memory>& apart) {
  auto same = [&](int64_t m, int64_t rows) {
    return !std::memcmp(&scratch.logits[m * c.V], single.logits.data(), rows * c.V * 4);
  };
  if (c.threads > 1) {
    run(c, d, alone, single, tokens.data(), at, 1);
    if (!same(0, c.rows) || memory.blocks != alone.blocks) differ("two threads give another result than one");
  }
  if (c.wild) return;  // which of two numbers that are none is handed on may differ
  for (int64_t m = 0; c.rows > 1 && m < c.rows; ++m) {
    run(c, d, apart[size_t(m)], single, &tokens[size_t(m)], at, 1);
    if (!same(m, 1)) differ("a row of a batch is not what it is alone");
  }
}

void sequence() {
  Case c = drawn_case();
  Memory memory(c, c.rows), alone(c, c.rows);
  std::vector<Memory> apart;
  for (int64_t m = 0; m < c.rows; ++m) apart.emplace_back(c, 1);
  std::vector<std::vector<Values>> none(c.layers.size());
  std::vector<Plain> plains(size_t(c.rows), Plain{c, none, none});
  Scratch scratch(decoder_of(c), c.threads, c.rows);
  Scratch single(decoder_of(c), 1, c.rows);
  for (int64_t length = 0; length < c.capacity; ++length) {
    if (chance(0.3)) mask(c, c.layers[size_t(any(0, int64_t(c.layers.size()) - 1))]);
    Decoder d = decoder_of(c);
    Values cosine = drawn(c.tables * c.R), sine(cosine.size());
    for (size_t i = 0; i < cosine.size(); ++i) {
      float angle = cosine[i];
      cosine[i] = std::cos(angle), sine[i] = std::sin(angle);
    }
    for (Plain& one : plains) one.cosine = cosine, one.sine = sine;
    memory.show(c, length), alone.show(c, length);
    for (Memory& one : apart) one.show(c, length);
    scratch.observed = single.observed = chance(0.4);
    std::vector<int64_t> tokens(size_t(c.rows));
    for (int64_t& token : tokens) token = any(0, c.V - 1);
    run(c, d, memory, scratch, tokens.data(), plains[0], c.threads);
    count(c, scratch);
    compare(c, d, scratch, memory, tokens, plains[0], alone, single, apart);
    if (c.wild) continue;
    for (int64_t m = 0; m < c.rows; ++m) plains[size_t(m)].step(tokens[size_t(m)], length);
    // a choice by a hair may fall either way; what follows differs
    if (!std::all_of(plains.begin(), plains.end(), [](const Plain& one) { return one.sure; })) return;
    for (int64_t m = 0; m < c.rows; ++m) check(c, plains[size_t(m)], scratch, m);
    ++counts["compared"];
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  seed = std::atoll(argv[1]), number = std::atoll(argv[2]);
  int64_t steps = std::atoll(argv[3]);
  __sanitizer_set_death_callback(name_it);
  for (; counts["steps"] < steps; ++number) {
    std::seed_seq both{seed, number};
    generator.seed(both);
    sequence();
    ++counts["sequences"];
  }
  for (const auto& [name, n] : counts) std::printf("%s %lld\n", name.c_str(), static_cast<long long>(n));
}
