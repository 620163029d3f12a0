// The kernels without torch, for sanitizers: every kind that this CPU has against plain loops, on
// odd sizes, in buffers of exactly the right length.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "choose.h"
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
      wanted[m * rows + r] =
          dot(&w.wide[r * size], &x.wide[m * size], size) + bias.wide[r];
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

// Rows times factors, against plain loops.
void folds(const Kernels& k, Dtype dtype, int64_t rows, int64_t size, int64_t count) {
  Held held = hold(dtype, drawn(rows * size));
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < rows; i += 2) ids.push_back(int32_t(i));
  int64_t n = int64_t(ids.size());
  std::vector<float> factors = drawn(n * count), found(count * size), wanted(count * size);
  int64_t middle = size / 2;
  for (int64_t begin : {int64_t(0), middle})
    k.fold(dtype, held.bytes.data(), ids.data(), n, size, factors.data(), count, begin,
           begin ? size : middle, found.data());
  for (int64_t f = 0; f < count; ++f)
    for (int64_t d = 0; d < size; ++d)
      for (int64_t i = 0; i < n; ++i)
        wanted[f * size + d] += held.wide[ids[i] * size + d] * factors[i * count + f];
  same("fold", found, wanted);
}

// Estimates from 4-bit copies against plain loops, and the choice against a full sort.
void choices(const Kernels& k, Dtype dtype, int64_t width, int64_t size) {
  std::vector<uint8_t> levels(width * size / 2);
  for (uint8_t& byte : levels) byte = uint8_t((1 + generator() % 15) | ((1 + generator() % 15) << 4));
  Held scales = hold(Dtype::bf16, drawn(width * size / GROUP, 0.1f));
  Held x = hold(dtype, drawn(size));
  std::vector<float> worth(width, 0.5f), found(width), wanted(width);
  Copies c{};
  c.up = levels.data();
  c.up_scales = reinterpret_cast<const uint16_t*>(scales.bytes.data());
  c.worth = worth.data(), c.keep = width / 3;
  Ffn f{};
  f.act = Act::gelu_tanh;
  Input given{x.bytes.data(), x.wide.data(), 1, size};
  k.estimate(dtype, c, f, given, 0, width / 2, found.data());
  k.estimate(dtype, c, f, given, width / 2, width, found.data());
  for (int64_t i = 0; i < width; ++i) {
    float sum = 0;
    for (int64_t d = 0; d < size; ++d) {
      uint8_t byte = levels[i * (size / 2) + d % (size / 2)];
      int level = int(d < size / 2 ? byte & 15 : byte >> 4) - 8;
      sum += float(level) * scales.wide[i * (size / GROUP) + d / GROUP] * x.wide[d];
    }
    float inner = 0.79788456f * (sum + 0.044715f * sum * sum * sum);
    wanted[i] = 0.5f * std::fabs(0.5f * sum * (1 + std::tanh(inner)));
  }
  same("estimate", found, wanted);
  found[width - 1] = found[0] = found[width / 2];  // ties
  std::vector<int32_t> places(width), order(width);
  for (int64_t keep : {int64_t(1), c.keep, width}) {
    strongest(found.data(), width, keep, places.data());
    for (int64_t i = 0; i < width; ++i) order[i] = int32_t(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return found[a] > found[b]; });
    std::sort(order.begin(), order.begin() + keep);
    if (!std::equal(order.begin(), order.begin() + keep, places.begin())) {
      std::printf("strongest: other places\n");
      std::exit(1);
    }
  }
}

// Values that no token should have: of any bits, not-a-number is the largest, and ties among its own.
void odd_choices() {
  const float odd[] = {0.0f, -0.0f, 1.0f, 1e-44f, INFINITY, std::nanf("1"), -std::nanf("2")};
  std::vector<float> values(97);
  for (float& value : values) value = odd[generator() % 7];
  auto rank = [&](int32_t i) { return std::isnan(values[i]) ? 2 : std::isinf(values[i]) ? 1 : 0; };
  std::vector<int32_t> order(values.size()), places(values.size());
  for (int64_t keep = 0; keep <= int64_t(values.size()); ++keep) {
    strongest(values.data(), int64_t(values.size()), keep, places.data());
    for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return rank(a) != rank(b) ? rank(a) > rank(b) : rank(a) == 0 && values[a] > values[b];
    });
    std::sort(order.begin(), order.begin() + keep);
    if (!std::equal(order.begin(), order.begin() + keep, places.begin())) {
      std::printf("strongest: other places of odd values\n");
      std::exit(1);
    }
  }
}

// A decoder of two layers: several threads against one, from an empty cache on.
void decoder(const Kernels& k, Dtype dtype, int64_t threads) {
  const int64_t D = 20, H = 4, K = 2, S = 6, I = 17, V = 33, capacity = 5;
  std::vector<Held> held;
  held.reserve(64);
  auto made = [&](int64_t n) {
    held.push_back(hold(dtype, drawn(n, 0.3f)));
    return static_cast<const void*>(held.back().bytes.data());
  };
  Decoder d{dtype, D, H, K, S, I, V, 1e-5f, 0.4f, made(V * D), made(D), made(V * D), {}};
  for (int index = 0; index < 2; ++index) {
    Layer layer{};
    layer.attention_norm = made(D), layer.ffn_norm = made(D);
    layer.q = made(H * S * D), layer.k = made(K * S * D), layer.v = made(K * S * D);
    layer.o = made(D * H * S), layer.q_bias = made(H * S), layer.k_norm = made(S);
    layer.ffn.gate = made(I * D), layer.ffn.up = made(I * D), layer.ffn.down = made(I * D);
    layer.ffn.kept = I;
    d.layers.push_back(layer);
  }
  std::vector<float> cosine(S, 0.8f), sine(S, 0.6f);
  auto run = [&](int64_t members) {
    std::vector<std::vector<char>> memory(4, std::vector<char>(K * capacity * S * 4));
    Cache cache{{memory[0].data(), memory[1].data()}, {memory[2].data(), memory[3].data()}, 0,
                capacity};
    Scratch scratch(d, members, capacity + 1);
    scratch.observed = true;
    std::vector<float> logits;
    for (cache.length = 0; cache.length < capacity; ++cache.length) {
      scratch.begin();
      std::vector<std::thread> others;
      auto work = [&](int64_t member) {
        step(k, d, cache, 3 + cache.length, cosine.data(), sine.data(), scratch, member);
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
  odd_choices();
  int kinds = 0;
  for (const char* kind : KINDS) {
    const Kernels* found = kernels(kind);
    if (!found) continue;
    ++kinds;
    for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
      for (int64_t size : {1, 7, 16, 31, 64, 100}) {
        products(*found, dtype, 13, size, 1);
        products(*found, dtype, 4, size, 3);
        ffns(*found, dtype, 19, size, 1, true);
        ffns(*found, dtype, 9, size, 2, false);
      }
      for (int64_t size : {2, 33, 100}) folds(*found, dtype, 12, size, 14);
      for (int64_t size : {64, 192}) choices(*found, dtype, 21, size);
      for (int64_t threads : {2, 3}) decoder(*found, dtype, threads);
    }
    std::printf("%s agrees\n", kind);
  }
  return kinds ? 0 : 1;
}
