// The kernels without torch, for sanitizers: every kind that this CPU has against plain loops, on
// odd sizes, in buffers of exactly the right length.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "select.h"
#include "decode.h"
#include "held.h"

using namespace dart;

namespace {

void same(const char* what, const std::vector<float>& found, const std::vector<float>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (std::fabs(found[i] - wanted[i]) <= 2e-3f * (1 + std::fabs(wanted[i]))) continue;
    std::printf("%s: place %zu is %g, not %g\n", what, i, double(found[i]), double(wanted[i]));
    std::exit(1);
  }
}

float dot(const float* a, const float* b, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += double(a[i]) * b[i];
  return float(total);
}

void products(const Kernels& k, Dtype dtype, int64_t rows, int64_t size, int64_t count) {
  Held w = hold(dtype, drawn(rows * size)), bias = hold(dtype, drawn(rows));
  Held x = hold(dtype, drawn(count * size));
  Input given{x.bytes.data(), x.wide.data(), count, size};
  std::vector<float> y(count * rows), wanted(count * rows);
  int64_t middle = rows / 3;
  k.matvec(dtype, w.bytes.data(), bias.bytes.data(), given, 0, middle, y.data(), rows);
  k.matvec(dtype, w.bytes.data(), bias.bytes.data(), given, middle, rows, y.data(), rows);
  for (int64_t m = 0; m < count; ++m)
    for (int64_t r = 0; r < rows; ++r)
      wanted[m * rows + r] = dot(&w.wide[r * size], &x.wide[m * size], size) + bias.wide[r];
  same("matvec", y, wanted);
}

void ffns(const Kernels& k, Dtype dtype, int64_t width, int64_t size, int64_t count, bool gated) {
  Held up = hold(dtype, drawn(width * size, 0.2f)), gate = hold(dtype, drawn(width * size, 0.2f));
  Held down = hold(dtype, drawn(width * size)), bias = hold(dtype, drawn(width));
  Held basis = hold(dtype, drawn(3 * size, 0.2f)), adds = hold(dtype, drawn(3 * size));
  Held x = hold(dtype, drawn(count * size));
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < width; i += 1 + int64_t(generator() % 3)) ids.push_back(int32_t(i));
  Ffn f{};
  f.gate = gated ? gate.bytes.data() : nullptr;
  f.up = up.bytes.data(), f.down = down.bytes.data();
  f.up_bias = bias.bytes.data();
  f.basis = basis.bytes.data(), f.features = adds.bytes.data();
  f.ids = ids.data(), f.kept = int64_t(ids.size()), f.rank = 3, f.act = Act::relu;
  Input given{x.bytes.data(), x.wide.data(), count, size};
  std::vector<float> sums(count * size), u(count * f.kept), wanted(count * size);
  int64_t middle = f.kept / 2;
  k.ffn(dtype, f, given, 0, middle, sums.data(), u.data(), f.kept);
  k.ffn(dtype, f, given, middle, f.kept, sums.data(), u.data(), f.kept);
  k.low_rank(dtype, f, given, 0, f.rank, sums.data());
  for (int64_t m = 0; m < count; ++m) {
    const float* in = &x.wide[m * size];
    for (int64_t place = 0; place < f.kept; ++place) {
      int64_t i = ids[place];
      float v = dot(&up.wide[i * size], in, size) + bias.wide[i];
      float first = gated ? dot(&gate.wide[i * size], in, size) : v;
      float act = std::fmax(first, 0.0f);
      for (int64_t d = 0; d < size; ++d)
        wanted[m * size + d] += (gated ? act * v : act) * down.wide[i * size + d];
    }
    for (int64_t r = 0; r < 3; ++r)
      for (int64_t d = 0; d < size; ++d)
        wanted[m * size + d] += dot(&basis.wide[r * size], in, size) * adds.wide[r * size + d];
  }
  same(gated ? "gated FFN" : "plain FFN", sums, wanted);
}

// Queries over n positions that they share, in three parts, against plain loops.
void heads(const Kernels& k, Dtype dtype, int64_t count, int64_t size, int64_t n, float cap) {
  Held keys = hold(dtype, drawn(n * size)), values = hold(dtype, drawn(n * size));
  std::vector<float> queries = drawn(count * size), scores(count * (POSITIONS + 1));
  int64_t stride = count * (size + 2), parts = std::min<int64_t>(n, 3), bytes = dtype == Dtype::f32 ? 4 : 2;
  std::vector<float> made(parts * stride), found(count * size), wanted(count * size);
  for (int64_t one = 0; one < parts; ++one) {
    int64_t begin = n * one / parts, end = n * (one + 1) / parts, at = begin * size * bytes;
    k.attend(dtype, queries.data(), count, keys.bytes.data() + at, values.bytes.data() + at, end - begin,
             size, cap, scores.data(), made.data() + one * stride);
  }
  for (int64_t q = 0; q < count; ++q) {
    k.merge(made.data() + q * (size + 2), parts, stride, size, found.data() + q * size);
    std::vector<double> shares;
    double total = 0;
    for (int64_t t = 0; t < n; ++t) {
      double x = dot(&queries[q * size], &keys.wide[t * size], size);
      shares.push_back(std::exp(cap ? cap * std::tanh(x / cap) : x)), total += shares.back();
    }
    for (int64_t i = 0; i < size; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < n; ++t) sum += shares[t] / total * values.wide[t * size + i];
      wanted[q * size + i] = float(sum);
    }
  }
  same("attend", found, wanted);
}

// What rounds at most once: the same bits as of the plain kernels.
void bits(const Kernels& k, Dtype dtype, int64_t n) {
  const float odd[] = {NAN, -INFINITY, INFINITY, 3.4e38f, 1e-44f, -0.0f, 1.00390625f, 1.01171875f};
  std::vector<float> values = drawn(n), wide(n), y = drawn(n), wanted = y;
  Held bias = hold(dtype, drawn(n));
  for (float& one : values)
    if (generator() % 3 == 0) one = odd[generator() % 8];
  Held held = hold(dtype, values);
  std::vector<char> narrow(held.bytes.size());
  k.round(dtype, values.data(), narrow.data(), n);
  k.widen(dtype, narrow.data(), wide.data(), n);
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = int32_t(n - 1 - i);
  k.add(dtype, bias.bytes.data(), n / 3, n, y.data() + n / 3);
  k.add_at(dtype, bias.bytes.data(), ids.data(), n, y.data());
  for (int64_t i = 0; i < n; ++i) {
    if (i >= n / 3) wanted[i] += bias.wide[i];
    wanted[i] += bias.wide[n - 1 - i];
  }
  bool alike = narrow == held.bytes && !std::memcmp(wide.data(), held.wide.data(), size_t(n) * 4);
  if (alike && y == wanted) return;
  std::printf("%s: other bits\n", k.name);
  std::exit(1);
}

// Rows times factors, against plain loops.
void folds(const Kernels& k, Dtype dtype, int64_t rows, int64_t size, int64_t count) {
  Held held = hold(dtype, drawn(rows * size));
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < rows; i += 2) ids.push_back(int32_t(i));
  int64_t n = int64_t(ids.size());
  std::vector<float> factors = drawn(n * count), found(count * size), wanted(count * size);
  int64_t middle = size / 2;
  for (int64_t begin : {int64_t(0), middle})
    k.fold(dtype, held.bytes.data(), ids.data(), n, size, factors.data(), count, begin, begin ? size : middle,
           found.data());
  for (int64_t f = 0; f < count; ++f)
    for (int64_t d = 0; d < size; ++d)
      for (int64_t i = 0; i < n; ++i)
        wanted[f * size + d] += held.wide[ids[i] * size + d] * factors[i * count + f];
  same("fold", found, wanted);
}

// A low-bit copy [width, size] as `Proxies` has it, and the values that it stands for.
struct Copy {
  std::vector<uint8_t> levels;
  Held scales;
  std::vector<float> wide;
  const uint16_t* by() const { return reinterpret_cast<const uint16_t*>(scales.bytes.data()); }
};

Copy copied(int64_t width, int64_t size, int64_t bits, int64_t group) {
  int64_t bytes = bits == 8 ? size : (size + 1) / 2, groups = (size + group - 1) / group;
  Copy made{std::vector<uint8_t>(width * bytes), hold(Dtype::bf16, drawn(width * groups, 0.1f)),
            std::vector<float>(width * size)};
  for (int64_t i = 0; i < width; ++i)
    for (int64_t d = 0; d < size; ++d) {
      int level = int(generator() % 15) - 7;
      uint8_t& byte = made.levels[i * bytes + (bits == 8 ? d : d % bytes)];
      if (bits == 8) byte = uint8_t(int8_t(level));
      else byte |= uint8_t(d < bytes ? level + 8 : (level + 8) << 4);
      made.wide[i * size + d] = float(level) * made.scales.wide[i * groups + d / group];
    }
  return made;
}

// A token that chooses out of some neurons of a gated FFN, by several threads: estimates against
// plain loops, the choice against a full sort, the output against that of the selected.
void choices(const Kernels& k, Dtype dtype, int64_t width, int64_t size, int64_t bits, int64_t group,
             int64_t threads) {
  Copy up_copy = copied(width, size, bits, group), gate_copy = copied(width, size, bits, group);
  Held x = hold(dtype, drawn(size)), up = hold(dtype, drawn(width * size, 0.2f));
  Held down = hold(dtype, drawn(width * size)), bias = hold(dtype, drawn(width));
  std::vector<float> saliency = drawn(width), mean = drawn(width);
  std::vector<int32_t> ids;
  for (float& one : saliency) one = std::fabs(one);
  for (int64_t i = 0; i < width; i += 1 + int64_t(generator() % 2)) ids.push_back(int32_t(i));
  int64_t count = int64_t(ids.size()), keep = (count + 2) / 3;
  Proxies c{gate_copy.levels.data(),
            up_copy.levels.data(),
            gate_copy.by(),
            up_copy.by(),
            saliency.data(),
            bits,
            group,
            keep,
            true};
  Ffn f{};
  f.gate = f.up = up.bytes.data(), f.down = down.bytes.data(), f.mean = mean.data();
  f.gate_bias = bias.bytes.data(), f.up_bias = bias.bytes.data();
  f.ids = ids.data(), f.kept = count, f.act = Act::gelu_tanh;
  Input given{x.bytes.data(), x.wide.data(), 1, size};
  std::vector<float> strength(count), wanted(count), sums(PARTS * size), z(size), plain(size);
  std::vector<int32_t> places(count), order(count);
  Jobs jobs(3);
  auto member = [&] {
    Worker team(jobs);
    std::vector<int32_t> own_ids(count);
    team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
      Span span = part(count, one, parts);
      k.estimate(dtype, c, f, given, span.begin, span.end, strength.data());
    });
    team.finish();
    Once chosen([&] { return chosen_of(k, c, 1, count, strength.data(), own_ids.data()); });
    team.in_parts(PARTS, [&](int64_t one, int64_t parts) {
      Span span = part(count, one, parts);
      Ffn own = f;
      own.kept = selected_ids(f, chosen()[0], span.begin, span.end, own_ids.data());
      own.ids = own_ids.data();
      k.ffn(dtype, own, given, 0, own.kept, sums.data() + one * size, nullptr, 0);
    });
  };
  std::vector<std::thread> others;
  for (int64_t m = 1; m < threads; ++m) others.emplace_back(member);
  member();
  for (std::thread& one : others) one.join();
  auto act = [](float v) { return 0.5f * v * (1 + std::tanh(0.79788456f * (v + 0.044715f * v * v * v))); };
  for (int64_t j = 0; j < count; ++j) {
    int64_t at = ids[j] * size;
    float b = bias.wide[ids[j]], first = dot(&gate_copy.wide[at], x.wide.data(), size) + b;
    wanted[j] = std::fabs(act(first) * (dot(&up_copy.wide[at], x.wide.data(), size) + b)) * saliency[ids[j]];
    order[j] = int32_t(j);
  }
  same("estimate", strength, wanted);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return strength[a] > strength[b]; });
  std::sort(order.begin(), order.begin() + keep);
  std::vector<Chosen> chosen = chosen_of(k, c, 1, count, strength.data(), places.data());
  if (selected_ids(f, chosen[0], 0, count, places.data()) != keep) std::exit(1);
  for (int64_t j = 0; j < keep; ++j) {
    int64_t i = ids[order[j]];
    if (places[j] != i) {
      std::printf("select: other neurons\n");
      std::exit(1);
    }
    float u = dot(&up.wide[i * size], x.wide.data(), size) + bias.wide[i];
    u = act(u) * u - mean[i];
    for (int64_t d = 0; d < size; ++d) plain[d] += u * down.wide[i * size + d];
  }
  for (int64_t one = 0; one < PARTS; ++one)
    for (int64_t d = 0; d < size; ++d) z[d] += sums[one * size + d];
  same("selected FFN", z, plain);
}

// Places of the k largest of n values.
void top_k(const Kernels& k, const float* values, int64_t n, int64_t keep, int32_t* places) {
  Cut cut = k.cut(values, n, keep, places);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (cut.takes(values[i], int32_t(i))) places[count++] = int32_t(i);
  if (count != keep) std::printf("cut: %d in place of %d values\n", int(count), int(keep)), std::exit(1);
}

// The k largest against a full sort, with ties.
void largest(const Kernels& k, int64_t width) {
  std::vector<float> found = drawn(width);
  for (float& one : found) one = std::fabs(one);
  found[width - 1] = found[0] = found[width / 2];
  std::vector<int32_t> places(width), order(width);
  for (int64_t keep : {int64_t(1), width / 3, width}) {
    top_k(k, found.data(), width, keep, places.data());
    for (int64_t i = 0; i < width; ++i) order[i] = int32_t(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return found[a] > found[b]; });
    std::sort(order.begin(), order.begin() + keep);
    if (!std::equal(order.begin(), order.begin() + keep, places.begin())) {
      std::printf("top_k: other places\n");
      std::exit(1);
    }
  }
}

// Values that no token should have: of any bits, not-a-number is the largest, and ties among its own.
void odd_choices(const Kernels& k) {
  const float odd[] = {0.0f, -0.0f, 1.0f, 1e-44f, INFINITY, std::nanf("1"), -std::nanf("2")};
  std::vector<float> values(97);
  for (float& value : values) value = odd[generator() % 7];
  auto rank = [&](int32_t i) { return std::isnan(values[i]) ? 2 : std::isinf(values[i]) ? 1 : 0; };
  std::vector<int32_t> order(values.size()), places(values.size());
  for (int64_t keep = 0; keep <= int64_t(values.size()); ++keep) {
    top_k(k, values.data(), int64_t(values.size()), keep, places.data());
    for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return rank(a) != rank(b) ? rank(a) > rank(b) : rank(a) == 0 && values[a] > values[b];
    });
    std::sort(order.begin(), order.begin() + keep);
    if (!std::equal(order.begin(), order.begin() + keep, places.begin())) {
      std::printf("top_k: other places of odd values\n");
      std::exit(1);
    }
  }
}

// A decoder of two layers, three rows: several threads against one, from an empty cache on.
void decoder(const Kernels& k, Dtype dtype, int64_t threads) {
  const int64_t D = 20, H = 4, K = 2, S = 6, I = 17, V = 33, capacity = 5, M = 3;
  std::vector<Held> held;
  held.reserve(64);
  auto made = [&](int64_t n) {
    held.push_back(hold(dtype, drawn(n, 0.3f)));
    return static_cast<const void*>(held.back().bytes.data());
  };
  std::vector<float> ones(D, 1.0f), factors = drawn(S);
  Decoder d{};
  d.dtype = dtype, d.hidden = D, d.heads = H, d.kv_heads = K, d.size = d.rotary = S, d.width = I;
  d.vocabulary = d.known = V, d.eps = 1e-5f, d.scale = 0.4f, d.embedding_scale = 1;
  d.embedding.plain = made(V * D), d.head.plain = made(V * D);
  d.norm = {ones.data(), nullptr, false};
  for (int index = 0; index < 2; ++index) {
    Layer layer{};
    layer.before_attention = layer.before_ffn = d.norm;
    layer.q.plain = made(H * S * D), layer.k.plain = made(K * S * D), layer.v.plain = made(K * S * D);
    layer.o.plain = made(D * H * S), layer.q_bias = made(H * S);
    layer.k_norm = {factors.data(), nullptr, false};
    layer.ffn.gate = made(I * D), layer.ffn.up = made(I * D), layer.ffn.down = made(I * D);
    layer.ffn.kept = I;
    d.layers.push_back(layer);
  }
  std::vector<float> cosine(S, 0.8f), sine(S, 0.6f);
  auto run = [&](int64_t members) {
    const int64_t head = capacity * S, row = K * head;
    std::vector<std::vector<char>> memory(4, std::vector<char>(M * row * 4));
    Cache cache{{{memory[0].data(), memory[1].data(), 0, head, row},
                 {memory[2].data(), memory[3].data(), 0, head, row}},
                0,
                M};
    Scratch scratch(d, members, M);
    scratch.observed = true;
    std::vector<float> logits;
    for (; cache.position < capacity; ++cache.position) {
      for (Cache::Part& one : cache.layers) one.length = cache.position;
      scratch.jobs.begin();
      std::vector<std::thread> others;
      auto work = [&](int64_t member) {
        int64_t tokens[M] = {3 + cache.position, 4, 5 + 2 * cache.position};
        step(k, d, cache, tokens, cosine.data(), sine.data(), scratch, member);
      };
      for (int64_t m = 1; m < members; ++m) others.emplace_back(work, m);
      work(0);
      for (std::thread& one : others) one.join();
      logits.insert(logits.end(), scratch.logits.begin(), scratch.logits.end());
    }
    return logits;
  };
  same("threads", run(threads), run(1));
}

}  // namespace

int main() {
  int kinds = 0;
  for (const char* kind : KINDS) {
    const Kernels* found = kernels(kind);
    if (!found) continue;
    ++kinds;
    odd_choices(*found);
    for (int64_t n : {1, 21, 300, 1537}) largest(*found, n);
    for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
      for (int64_t size : {1, 7, 16, 31, 64, 100}) {
        products(*found, dtype, 13, size, 1);
        products(*found, dtype, 4, size, 3);
        ffns(*found, dtype, 19, size, 1, true);
        ffns(*found, dtype, 9, size, 2, false);
      }
      for (int64_t size : {1, 20, 64, 80, 131})
        for (int64_t count : {1, 2, 3, 4, 7, 16})
          for (int64_t n : {1, 9, 150, 300}) heads(*found, dtype, count, size, n, n == 9 ? 2.5f : 0);
      for (int64_t n : {1, 8, 61}) bits(*found, dtype, n);
      for (int64_t size : {2, 33, 100}) folds(*found, dtype, 12, size, 14);
      for (int64_t size : {64, 192}) choices(*found, dtype, 21, size, 4, 32, 2);
      for (int64_t size : {1, 31, 96, 100})
        for (int64_t bits : {4, 8}) choices(*found, dtype, 33, size, bits, 12, 3);
      choices(*found, dtype, 5, 200, 8, 200, 1);
      for (int64_t threads : {2, 3}) decoder(*found, dtype, threads);
    }
    std::printf("%s agrees\n", kind);
  }
  return kinds ? 0 : 1;
}
