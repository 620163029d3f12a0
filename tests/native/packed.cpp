// Kernels of packed matrices without torch, for sanitizers: every kind that this CPU has and every
// type of block against plain loops, on odd sizes, in buffers of exactly the right length.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "select.h"
#include "decode.h"
#include "held.h"
#include "packed_blocks.h"
#include "packed_ffn.h"
#include "prompt.h"

using namespace dart;

namespace {

using Values = std::vector<float>;
const char* const TYPES[] = {"q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"};

std::string about;  // what is compared

void near(const char* what, const Values& found, const std::vector<double>& wanted,
          const std::vector<double>& sizes, double allowed = 2e-6) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (std::fabs(double(found[i]) - wanted[i]) <= allowed * sizes[i] + 1e-9) continue;
    std::printf("%s, %s: place %zu is %g, not %g\n", about.c_str(), what, i, double(found[i]), wanted[i]);
    std::exit(1);
  }
}

float half(uint16_t bits) {
  int exponent = bits >> 10 & 31, rest = bits & 1023;
  float x = exponent ? std::ldexp(float(1024 + rest), exponent - 25) : std::ldexp(float(rest), -24);
  return bits & 0x8000 ? -x : x;
}

// A matrix as a file holds it, [rows, columns], and how the kernels read it.
struct Stored {
  const BlockType& type;
  Packed packed{};
  Values dense;  // [rows, columns] of the file
  std::vector<uint8_t> levels;
  std::vector<uint16_t> plain[2], supers[2];  // scales and offsets
  std::vector<int8_t> small[2];

  Stored(const BlockType& of, const Parts& parts, int64_t rows, int64_t columns, Order order)
      : type(of), dense(rows * columns) {
    bool neurons = order == Order::neurons;
    Packed& p = packed;
    p.rows = neurons ? columns : rows, p.columns = neurons ? rows : columns;
    p.bits = type.bits, p.block = type.block, p.bias = type.bias;
    p.order = order;
    p.pitch = p.units() * UNIT * p.bits / 8;
    levels.resize(p.room() * p.pitch + 64);  // as PackedMatrix leaves room
    p.levels = levels.data();
    std::vector<uint8_t> line(p.columns);
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t c = 0; c < p.columns; ++c)
        line[c] = parts.levels[neurons ? c * columns + r : r * columns + c];
      write_levels(p, r, line.data(), levels.data());
    }
    int64_t lines = neurons ? (columns + p.block - 1) / p.block : p.room();
    int64_t above = neurons ? (columns + SUPER - 1) / SUPER : p.room();
    auto lay = [&](const auto& from, int64_t each, int64_t room, int64_t count, auto& to) {
      to.resize(count * room + 64);
      bool super = each == columns / SUPER;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < each; ++i)
          to[neurons ? i * room + r : super ? p.super_of(r, i) : p.factor_of(r, i)] = from[r * each + i];
    };
    for (int which = 0; which < 1 + type.offsets; ++which) {
      Factors& f = which ? p.offsets : p.scales;
      if (type.supers) {
        lay(which ? parts.small_offsets : parts.small_scales, columns / p.block, p.each(), lines,
            small[which]);
        lay(which ? parts.offset_supers : parts.supers, columns / SUPER, p.supers_each(), above,
            supers[which]);
        f = {small[which].data(), supers[which].data()};
      } else {
        lay(which ? parts.offsets : parts.scales, columns / p.block, p.each(), lines, plain[which]);
        f = {plain[which].data(), nullptr};
      }
    }
    for (int64_t i = 0; i < rows * columns; ++i) {
      auto factor = [&](bool offset) {
        if (!type.supers) return half((offset ? parts.offsets : parts.scales)[i / p.block]);
        return float((offset ? parts.small_offsets : parts.small_scales)[i / p.block]) *
               half((offset ? parts.offset_supers : parts.supers)[i / SUPER]);
      };
      dense[i] = factor(false) * float(parts.levels[i] - p.bias) + (type.offsets ? factor(true) : 0);
    }
  }
  // Row and column as the kernels count them.
  float at(int64_t row, int64_t column) const {
    return packed.order != Order::neurons ? dense[row * packed.columns + column]
                                          : dense[column * packed.rows + row];
  }
};

// Levels come back as they were written.
void read_again(const Stored& m) {
  const Packed& p = m.packed;
  std::vector<uint8_t> once(p.columns), again(m.levels.size());
  for (int64_t r = 0; r < p.rows; ++r) {
    read_levels(p, r, once.data());
    write_levels(p, r, once.data(), again.data());
  }
  Packed copy = p;
  copy.levels = again.data();
  std::vector<uint8_t> twice(p.columns);
  for (int64_t r = 0; r < p.rows; ++r) {
    read_levels(p, r, once.data()), read_levels(copy, r, twice.data());
    for (int64_t c = 0; c < p.columns; ++c) {
      int low = p.bits == 4 ? 15 : 255;
      if (once[c] == twice[c] && once[c] <= low) continue;
      std::printf("%s: level %d is %d and %d\n", about.c_str(), int(c), once[c], twice[c]), std::exit(1);
    }
  }
}

Stored made(const char* name, int64_t rows, int64_t columns, Order order) {
  const BlockType& type = *block_type(name);
  std::vector<uint8_t> blocks(rows * (columns / type.columns) * type.bytes);
  for (uint8_t& byte : blocks) byte = uint8_t(generator());
  for (size_t i = 0; i < blocks.size(); i += size_t(type.bytes)) {
    int64_t first = type.supers && type.block == 16 ? 208 : 0;  // factors of a sensible size
    for (int64_t at = first; at < first + (type.offsets ? 4 : 2); at += 2)
      blocks[i + size_t(at) + 1] = uint8_t((generator() & 0x80) | 0x18 | (generator() & 7));
  }
  return Stored(type, take_apart(type, blocks.data(), rows, columns), rows, columns, order);
}

// Vectors rounded by the kernels, and in plain loops: `size` values of each.
struct Given {
  int64_t size, room;
  std::vector<int8_t> levels;
  Values scales, sums;
  std::vector<double> plain;
  Rounded view() const {
    return {levels.data(), scales.data(), sums.data(), int64_t(plain.size()) / size, room};
  }
};

std::vector<double> rounded(const Values& x, int64_t begin, int64_t size, int64_t group) {
  std::vector<double> found(size);
  for (int64_t g = 0; g < size; g += group) {
    int64_t end = std::min(g + group, size);
    float most = 0;
    for (int64_t i = g; i < end; ++i) most = std::max(most, std::fabs(x[begin + i]));
    for (int64_t i = g; i < end && most > 0; ++i)
      found[i] = double(std::nearbyint(x[begin + i] * (127.0f / most))) * double(most / 127.0f);
  }
  return found;
}

Given given(const Kernels& k, const Values& x, int64_t size) {
  int64_t room = (size + UNIT - 1) / UNIT * UNIT, each = 2 * Rounded::facts(room);
  int64_t count = int64_t(x.size()) / size;
  Given g{size, room, std::vector<int8_t>(count * room), Values(count * each, NAN), Values(count * each, NAN),
          {}};
  for (int64_t m = 0; m < count; ++m) {
    Values own(x.begin() + m * size, x.begin() + (m + 1) * size);  // its end is the memory's
    k.packed.round(own.data(), 0, size, size, &g.levels[m * room], &g.scales[m * each], &g.sums[m * each]);
    for (double one : rounded(x, m * size, size, GROUP)) g.plain.push_back(one);
  }
  return g;
}

// Of a rounded vector of n values what a cut takes: the levels stay, others become 0, and the sums follow.
void masks(const Kernels& k, int64_t n) {
  Values x = drawn(n), strength = drawn(n);
  for (float& one : strength) one = std::round(std::fabs(one) * 8);  // with ties
  Given all = given(k, x, n);
  std::vector<int32_t> orders(n);
  Cut cut = k.cut(strength.data(), n, 1 + n / 3, orders.data());
  std::vector<int8_t> levels(all.room, 1);
  Values sums(all.sums.size());
  k.packed.mask(all.levels.data(), all.scales.data(), strength.data(), cut, n, levels.data(), sums.data());
  int64_t facts = Rounded::facts(all.room), kept = 0;
  Values wanted(sums.size());
  for (int64_t i = 0; i < all.room; ++i) {
    int64_t unit = i / UNIT, at = unit * UNIT + 4 * four_of(i % UNIT / 4) + i % 4;
    bool taken = i < n && cut.takes(strength[i], int32_t(i));
    int level = taken ? all.levels[at] : 0;
    kept += taken;
    wanted[i / GROUP] += float(level),
        wanted[facts + unit * 4 + quarter_place(i % UNIT / 16)] += float(level);
    if (levels[at] == level) continue;
    std::printf("%s: masked level %d is %d, not %d\n", about.c_str(), int(i), levels[at], level),
        std::exit(1);
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    bool within =
        int64_t(i) < all.room / GROUP || (int64_t(i) >= facts && int64_t(i) < facts + all.room / 16);
    if (kept == 1 + n / 3 && sums[i] == (within ? wanted[i] * all.scales[i] : 0)) continue;
    std::printf("%s: masked sum %d is %g\n", about.c_str(), int(i), double(sums[i])), std::exit(1);
  }
}

void weights(const Kernels& k, const Stored& m) {
  const Packed& p = m.packed;
  std::vector<std::pair<int64_t, int64_t>> spans = {{0, p.rows}};  // first row, rows
  for (int64_t row = 0; row < p.rows; ++row) spans.push_back({row, 1});
  for (auto [first, count] : spans) {
    Values found(count * p.columns);
    std::vector<uint16_t> narrow(found.size());
    std::vector<double> wanted(found.size()), sizes(found.size());
    k.packed.dequantise(p, first, count, Dtype::f32, found.data());
    k.packed.dequantise(p, first, count, Dtype::bf16, narrow.data());
    for (int64_t i = 0; i < count * p.columns; ++i)
      wanted[i] = m.at(first + i / p.columns, i % p.columns), sizes[i] = std::fabs(wanted[i]) + 0.1;
    near("weights", found, wanted, sizes, 1e-6);
    Held as = hold(Dtype::bf16, found);
    if (std::equal(as.bytes.begin(), as.bytes.end(), reinterpret_cast<char*>(narrow.data()))) continue;
    std::printf("%s: other bfloat16\n", about.c_str());
    std::exit(1);
  }
}

void products(const Kernels& k, const Stored& m, int64_t count) {
  const Packed& p = m.packed;
  Given x = given(k, drawn(count * p.columns), p.columns);
  Values y(count * p.rows);
  std::vector<double> wanted(y.size()), sizes(y.size());
  for (int64_t c = 0; c < count; ++c)
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t i = 0; i < p.columns; ++i) {
        double term = x.plain[c * p.columns + i] * m.at(r, i);
        wanted[c * p.rows + r] += term, sizes[c * p.rows + r] += std::fabs(term);
      }
  int64_t middle = p.rows / 3;
  k.packed.matvec(p, x.view(), 0, middle, y.data(), p.rows);
  k.packed.matvec(p, x.view(), middle, p.rows, y.data(), p.rows);
  near("matvec", y, wanted, sizes);
  Values others(p.rows - middle);
  k.packed.dots(p, x.view().at(0), nullptr, middle, p.rows - middle, others.data());
  near("dots of a run", others, {wanted.begin() + middle, wanted.begin() + p.rows},
       {sizes.begin() + middle, sizes.begin() + p.rows});
  if (p.order == Order::tiles) return;
  std::vector<int32_t> ids;
  for (int64_t i = int64_t(generator() % 2); i < p.rows; i += 1 + int64_t(generator() % 3))
    ids.push_back(int32_t(i));
  Values some(ids.size());
  std::vector<double> of_some, size_of_some;
  for (int32_t i : ids) of_some.push_back(wanted[i]), size_of_some.push_back(sizes[i]);
  k.packed.dots(p, x.view().at(0), ids.data(), 0, int64_t(ids.size()), some.data());
  near("dots of some", some, of_some, size_of_some);
}

// Products of many vectors, in parts of outputs and of inputs.
void many(const Kernels& k, const Stored& m, int64_t count) {
  const Packed& p = m.packed;
  int64_t inputs = p.columns, outputs = p.rows, middle = 3 * TILE;
  Values from = drawn(count * inputs);
  RoundedLots x(k, count, inputs);
  Values y(count * outputs), rest(count * outputs);
  std::vector<double> wanted(y.size()), sizes(y.size());
  for (int64_t c = 0; c < count; ++c) {
    Values own(from.begin() + c * inputs, from.begin() + (c + 1) * inputs);  // its end is the memory's
    k.packed.round_lot(own.data(), inputs, x.view, c);
    std::vector<double> plain = rounded(from, c * inputs, inputs, GROUP);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; ++i) {
        double term = plain[i] * m.at(o, i);
        wanted[c * outputs + o] += term, sizes[c * outputs + o] += std::fabs(term);
      }
  }
  int64_t units = x.view.size / UNIT, half = units / 8 * 4;
  std::vector<std::pair<int64_t, int64_t>> spans = {{0, outputs}};
  if (middle < outputs) spans = {{0, middle}, {middle, outputs}};
  for (auto [begin, end] : spans) {
    k.packed.lots(p, x.view, {begin, end, half, units}, y.data(), outputs);
    if (half) k.packed.lots(p, x.view, {begin, end, 0, half}, rest.data(), outputs);
  }
  for (size_t i = 0; i < y.size(); ++i) y[i] += rest[i];
  near("products of many", y, wanted, sizes);
}

// Kept columns of a down projection in tiles, with means and a choice: a copy of them gives what all of
// them give where the others are 0, to the bit.  share: about one in so many is kept.
void kept_columns(const Kernels& k, const Stored& m, unsigned share) {
  const Packed& p = m.packed;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < p.columns; ++i)
    if (generator() % share == 0) ids.push_back(int32_t(i));
  if (ids.empty()) ids.push_back(int32_t(p.columns - 1));
  KeptColumns columns(p, ids.data(), int64_t(ids.size()));
  std::vector<uint8_t> levels(p.room() * columns.pitch());
  for (int64_t tile = 0; tile < p.room() / TILE; ++tile) columns.copy_tile(tile, levels.data());
  levels.resize(levels.size() + 64);
  Packed kept = p;
  kept.kept = true, kept.levels = levels.data(), kept.pitch = columns.pitch(),
  kept.fours = columns.fours().data();
  kept.places = columns.places().data(), kept.kept_columns = int64_t(ids.size());
  const int64_t M = 3;
  Values u = drawn(M * int64_t(ids.size())), mean = drawn(p.columns), strength(u.size());
  for (size_t i = 0; i < u.size(); ++i) strength[i] = std::fabs(u[i]);
  std::vector<int32_t> orders(ids.size());
  int64_t keep = 1 + int64_t(ids.size()) / 2;
  for (bool some : {false, true}) {
    Proxies proxies{};
    proxies.keep = keep;
    auto chosen = chosen_of(k, proxies, some ? M : 0, int64_t(ids.size()), strength.data(), orders.data());
    Values results[2];
    for (const Packed* matrix : {&p, (const Packed*)&kept}) {
      Ffn f{};
      f.packed_down = matrix, f.ids = ids.data(), f.kept = int64_t(ids.size()), f.mean = mean.data();
      Values active(M * p.columns), y(M * p.rows);
      for (int64_t i = 0; i < M; ++i)
        down_input(k, f, some ? &chosen[size_t(i)] : nullptr, &u[i * f.kept], 0, p.columns,
                   &active[i * p.columns]);
      Given x = given(k, active, p.columns);
      k.packed.matvec(*matrix, x.view(), 0, p.rows, y.data(), p.rows);
      results[matrix == &kept] = y;
    }
    if (results[0] != results[1]) std::printf("%s: kept columns differ\n", about.c_str()), std::exit(1);
  }
}

// Some of a down projection's neurons, block by block.
void neurons(const Kernels& k, const Stored& m) {
  const Packed& p = m.packed;
  int64_t room = p.units() * UNIT;
  Values sums(room);
  std::vector<double> wanted(p.columns), sizes(p.columns);
  for (int64_t first = 0; first < p.rows; first += p.block) {
    std::vector<int32_t> ids;
    for (int64_t i = first; i < std::min(first + p.block, p.rows); ++i)
      if (generator() % 2) ids.push_back(int32_t(i));
    if (ids.empty()) continue;
    Values u = drawn(int64_t(ids.size()));
    std::vector<double> plain = rounded(u, 0, int64_t(u.size()), GROUP);
    k.packed.add_neurons(p, ids.data(), u.data(), int64_t(u.size()), sums.data());
    for (size_t j = 0; j < ids.size(); ++j)
      for (int64_t c = 0; c < p.columns; ++c) {
        double term = plain[j] * m.at(ids[j], c);
        wanted[c] += term, sizes[c] += std::fabs(term);
      }
  }
  near("neurons", sums, wanted, sizes);
}

// Factors, levels and inputs of which no kernel has to round anything, the largest among them: every
// kind gives the very numbers of plain loops, and so of every other kind.
void exact(const Kernels& k, const char* name, int64_t rows, int64_t columns) {
  const BlockType& type = *block_type(name);
  auto any = [](int low, int high) { return low + int(generator() % unsigned(high - low + 1)); };
  std::vector<uint8_t> blocks(rows * (columns / type.columns) * type.bytes);
  Parts parts = take_apart(type, blocks.data(), rows, columns);
  int most = type.bits == 4 ? 15 : type.bias == 128 ? 255 : type.block == 16 ? 63 : 31;
  for (uint8_t& one : parts.levels) one = uint8_t(any(0, 1) ? any(0, most) : any(0, 1) * most);
  const uint16_t halves[] = {0x3c00, 0xbc00, 0x4000};  // 1, -1 and 2
  for (auto* factors : {&parts.scales, &parts.offsets, &parts.supers, &parts.offset_supers})
    for (uint16_t& one : *factors) one = halves[any(0, 2)];
  for (auto* factors : {&parts.small_scales, &parts.small_offsets})
    for (int8_t& one : *factors) one = int8_t(any(-2, 2));
  Values x(columns);  // rounded to steps of one
  for (int64_t i = 0; i < columns; ++i)
    x[i] = float(i % 16 && any(0, 1) ? any(-127, 127) : any(0, 1) ? 127 : -127);
  Stored rotary(type, parts, rows, columns, Order::neurons);
  std::vector<double> wanted(rows);
  for (int64_t i = 0; i < rows * columns; ++i)
    wanted[i / columns] += double(rotary.dense[i]) * x[i % columns];
  Given given_x = given(k, x, columns);
  Values y(rows), sums(rotary.packed.units() * UNIT);
  for (Order order : {Order::rows, Order::tiles}) {
    Stored m(type, parts, rows, columns, order);
    k.packed.matvec(m.packed, given_x.view(), 0, rows, y.data(), rows);
    near("exact products", y, wanted, wanted, 0);
  }
  for (int32_t first = 0; first < columns; first += type.block) {
    std::vector<int32_t> ids(type.block);
    for (int32_t i = 0; i < type.block; ++i) ids[i] = first + i;
    k.packed.add_neurons(rotary.packed, ids.data(), &x[first], type.block, sums.data());
  }
  near("exact neurons", sums, wanted, wanted, 0);
}

// A whole FFN of kept neurons; inputs that are no numbers, too.
void ffns(const Kernels& k, const char* name, int64_t hidden, int64_t width, Act act, bool odd) {
  Stored up = made(name, width, hidden, Order::rows), gate = made(name, width, hidden, Order::rows);
  Stored down = made(name, hidden, width, Order::neurons);
  Values given_x = drawn(hidden), x_wide = given_x;
  const float strange[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e-44f, -0.0f};
  if (odd)
    for (float& one : given_x) one = generator() % 3 ? one * 1e-41f : strange[generator() % 6];
  Given x = given(k, given_x, hidden);
  Held bias = hold(Dtype::bf16, drawn(width, 0.1f));
  Values mean = drawn(width, 0.1f);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < width; i += 1 + int64_t(generator() % 4)) ids.push_back(int32_t(i));
  Ffn f{};
  f.packed_gate = generator() % 2 ? &gate.packed : nullptr;
  f.packed_up = &up.packed, f.packed_down = &down.packed;
  f.gate_bias = f.up_bias = bias.bytes.data();
  f.ids = ids.data(), f.kept = int64_t(ids.size()), f.act = act, f.mean = mean.data();
  Input input{nullptr, x_wide.data(), 1, hidden, x.view()};
  int64_t room = down.packed.units() * UNIT, middle = f.kept / 2;
  Values sums(room), u(f.kept);
  packed_hidden(k, Dtype::bf16, f, input.rounded, 0, middle, u.data());
  packed_hidden(k, Dtype::bf16, f, input.rounded, middle, f.kept, u.data());
  packed_output(k, f, nullptr, u.data(), 0, middle, sums.data());
  packed_output(k, f, nullptr, u.data(), middle, f.kept, sums.data());
  if (odd) return;
  std::vector<double> wanted(f.kept), sizes(f.kept);
  for (int64_t j = 0; j < f.kept; ++j) {
    double first = bias.wide[ids[j]], second = first, size = 1;
    for (int64_t i = 0; i < hidden; ++i) {
      first += x.plain[i] * gate.at(ids[j], i), second += x.plain[i] * up.at(ids[j], i);
      size += std::fabs(x.plain[i] * gate.at(ids[j], i)) + std::fabs(x.plain[i] * up.at(ids[j], i));
    }
    double v = f.packed_gate ? first : second;
    double active = act == Act::silu   ? v / (1 + std::exp(-v))
                    : act == Act::gelu ? 0.5 * v * std::erfc(-v * 0.7071067811865476)
                    : act == Act::gelu_tanh
                        ? 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)))
                    : act == Act::relu ? std::fmax(v, 0)
                                       : std::fmax(v, 0) * std::fmax(v, 0);
    wanted[j] = f.packed_gate ? active * second : active, sizes[j] = size * size;
  }
  near("activations", u, wanted, sizes, 1e-5);
}

// Two tokens that select by their activations, out of all neurons or of some: the selected against a
// full sort, the output against that of a mask of them.
void own_choices(const Kernels& k, const char* name, int64_t hidden, int64_t width, bool some) {
  const int64_t M = 2;
  Order order = some ? Order::rows : Order::tiles;
  Stored up = made(name, width, hidden, order), gate = made(name, width, hidden, order);
  Stored down = made(name, hidden, width, Order::neurons);
  Given x = given(k, drawn(M * hidden), hidden);
  Values mean = drawn(width, 0.1f), saliency = drawn(width);
  std::vector<int32_t> ids;
  for (float& one : saliency) one = std::fabs(one);
  for (int64_t i = 0; i < width; i += 1 + int64_t(generator() % 2)) ids.push_back(int32_t(i));
  Ffn f{};
  f.packed_gate = &gate.packed, f.packed_up = &up.packed, f.packed_down = &down.packed;
  f.ids = some ? ids.data() : nullptr, f.kept = some ? int64_t(ids.size()) : width, f.mean = mean.data();
  Proxies proxies{};
  proxies.saliency = saliency.data(), proxies.keep = (f.kept + 2) / 3;
  Values u(M * f.kept), strength(u.size());
  std::vector<int32_t> orders(f.kept);
  for (int64_t m = 0; m < M; ++m) packed_hidden(k, Dtype::f32, f, x.view().at(m), 0, f.kept, &u[m * f.kept]);
  for (int64_t m = 0; m < M; ++m) strengths_of(proxies, f, &u[m * f.kept], 0, f.kept, &strength[m * f.kept]);
  std::vector<Chosen> chosen = chosen_of(k, proxies, M, f.kept, strength.data(), orders.data());
  int64_t room = down.packed.units() * UNIT;
  std::vector<int32_t> order_of(f.kept);
  for (int64_t m = 0; m < M; ++m) {
    const float* own = &u[m * f.kept];
    auto id = [&](int32_t j) { return some ? ids[j] : j; };
    auto by = [&](int32_t j) { return std::fabs(own[j]) * saliency[id(j)]; };
    for (int64_t j = 0; j < f.kept; ++j) order_of[j] = int32_t(j);
    std::stable_sort(order_of.begin(), order_of.end(), [&](int32_t a, int32_t b) { return by(a) > by(b); });
    std::sort(order_of.begin(), order_of.begin() + proxies.keep);
    std::vector<int32_t> wanted_ids;
    Values wanted_u, wanted(room);
    if (selected_ids(f, chosen[m], 0, f.kept, orders.data()) != proxies.keep) std::exit(1);
    for (int64_t j = 0; j < proxies.keep; ++j) {
      wanted_ids.push_back(id(order_of[j])), wanted_u.push_back(own[order_of[j]]);
      if (orders[j] == wanted_ids[j]) continue;
      std::printf("%s: other neurons were selected\n", about.c_str()), std::exit(1);
    }
    Ffn mask = f;
    mask.ids = wanted_ids.data(), mask.kept = proxies.keep;
    packed_output(k, mask, nullptr, wanted_u.data(), 0, mask.kept, wanted.data());
    for (bool skip : {false, true}) {
      Values sums(room);
      chosen[m].skip = skip;
      packed_output(k, f, &chosen[m], own, 0, f.kept, sums.data());
      if (sums != wanted) std::printf("%s: the selected give something else\n", about.c_str()), std::exit(1);
    }
  }
}

// Whole steps of a decoder whose matrices are packed: by threads as by one, of three rows as of one,
// and near those of the same weights in float32.
// With `selected` tokens select so many neurons of every layer by their activations; skip: down
// projections lie by neurons, and those of the others are skipped.
void steps(const Kernels& k, const char* name, int64_t D, int64_t S, int64_t I, int64_t selected = 0,
           bool skip = false) {
  const int64_t H = 4, K = 2, V = 33, capacity = 4;
  std::vector<std::unique_ptr<Stored>> stored;
  std::vector<Values> plain;
  std::vector<float> norm(D, 1.0f), bias = drawn(std::max(D, H * S), 0.1f), saliency(I, 1.0f);
  Decoder packed{};
  packed.dtype = Dtype::f32, packed.hidden = D, packed.heads = H, packed.kv_heads = K;
  packed.size = packed.rotary = S, packed.width = I, packed.vocabulary = packed.known = V;
  packed.eps = 1e-5f, packed.scale = 0.4f, packed.embedding_scale = 1;
  packed.norm = {norm.data(), nullptr, false};
  Decoder dense = packed;
  auto both = [&](int64_t rows, int64_t columns, Order order) {
    stored.push_back(std::make_unique<Stored>(made(name, rows, columns, order)));
    const Stored& one = *stored.back();
    plain.emplace_back(rows * columns);
    for (int64_t r = 0; r < one.packed.rows; ++r)
      for (int64_t c = 0; c < one.packed.columns; ++c)
        plain.back()[r * one.packed.columns + c] = one.at(r, c);
    return std::pair(static_cast<const void*>(plain.back().data()), &one.packed);
  };
  auto put = [&](Matrix& in_packed, Matrix& in_dense, int64_t rows, int64_t columns) {
    auto [values, blocks] = both(rows, columns, Order::tiles);
    in_packed.packed = blocks, in_dense.plain = values;
  };
  put(packed.embedding, dense.embedding, V, D), put(packed.head, dense.head, V, D);
  for (int index = 0; index < 2; ++index) {
    Layer a{}, b{};
    a.before_attention = b.before_attention = a.before_ffn = b.before_ffn = packed.norm;
    put(a.q, b.q, H * S, D), put(a.k, b.k, K * S, D), put(a.v, b.v, K * S, D), put(a.o, b.o, D, H * S);
    a.q_bias = b.q_bias = a.o_bias = b.o_bias = bias.data();
    Order order = index ? Order::rows : Order::tiles;
    std::tie(b.ffn.gate, a.ffn.packed_gate) = both(I, D, order);
    std::tie(b.ffn.up, a.ffn.packed_up) = both(I, D, order);
    a.ffn.packed_down = both(D, I, skip ? Order::neurons : Order::tiles).second;
    plain.emplace_back(I * D);
    for (int64_t n = 0; n < I * D; ++n) plain.back()[n] = stored.back()->dense[n % D * I + n / D];
    b.ffn.down = plain.back().data();
    a.ffn.kept = b.ffn.kept = I;
    a.proxies.saliency = saliency.data(), a.proxies.keep = selected, a.proxies.skip = skip;
    packed.layers.push_back(a), dense.layers.push_back(b);
  }
  std::vector<float> cosine(S, 0.8f), sine(S, 0.6f);
  Values hidden;  // of the last run: by positions, then rows
  auto run = [&](const Decoder& d, int64_t members, int64_t first, int64_t count, bool observed = true) {
    hidden.clear();
    const int64_t head = capacity * S, row = K * head;
    std::vector<std::vector<char>> memory(4, std::vector<char>(count * row * 4));
    Cache cache{{{memory[0].data(), memory[1].data(), 0, head, row},
                 {memory[2].data(), memory[3].data(), 0, head, row}},
                0,
                count};
    Scratch scratch(d, members, count);
    scratch.observed = observed;
    Values logits;
    for (; cache.position < capacity; ++cache.position) {
      for (Cache::Part& one : cache.layers) one.length = cache.position;
      scratch.jobs.begin();
      std::vector<std::thread> others;
      auto work = [&](int64_t member) {
        const int64_t tokens[] = {3 + cache.position, 4, 5 + 2 * cache.position};
        step(k, d, cache, tokens + first, cosine.data(), sine.data(), scratch, member);
      };
      for (int64_t m = 1; m < members; ++m) others.emplace_back(work, m);
      work(0);
      for (std::thread& one : others) one.join();
      logits.insert(logits.end(), scratch.logits.begin(), scratch.logits.end());
      hidden.insert(hidden.end(), scratch.normed.begin(), scratch.normed.begin() + count * D);
    }
    return logits;
  };
  Values alone = run(packed, 1, 0, 3), exact = run(dense, 1, 0, 3);
  if (run(packed, 3, 0, 3) != alone) {
    std::printf("%s: three threads give another result than one\n", about.c_str());
    std::exit(1);
  }
  if (run(packed, 3, 0, 3, false) != alone)
    std::printf("%s: what is not observed differs\n", about.c_str()), std::exit(1);
  float most = 0;
  for (float one : exact) most = std::max(most, std::fabs(one));
  std::vector<double> wanted(exact.begin(), exact.end()), sizes(exact.size(), most);
  if (!selected || selected == I)
    near("steps", alone, wanted, sizes, 0.15);  // inputs of 8 bits, through two random layers
  for (int64_t m = 0; m < 3; ++m) {
    Values single = run(packed, 1, m, 1);
    for (int64_t at = 0; at < capacity; ++at) std::copy_n(&single[at * V], V, &wanted[(at * 3 + m) * V]);
  }
  near("rows", alone, wanted, sizes, 1e-5);

  if (selected) return;
  auto read = [&](int64_t members) {  // the same three texts as a prompt
    std::vector<float> turns_cosine, turns_sine;
    for (int64_t i = 0; i < capacity; ++i) {
      turns_cosine.insert(turns_cosine.end(), cosine.begin(), cosine.end());
      turns_sine.insert(turns_sine.end(), sine.begin(), sine.end());
    }
    Text text{3, capacity, turns_cosine.data(), turns_sine.data(), S};
    PromptRoom room(k, packed, text, 2, members);
    Values stream(3 * capacity * D), normed(stream.size()), keys(2 * 3 * K * capacity * S),
        values(keys.size());
    Values u(2 * 3 * capacity * I), h(2 * stream.size());
    for (int64_t m = 0; m < 3 * capacity; ++m) {
      int64_t at = m % capacity;
      const int64_t tokens[] = {3 + at, 4, 5 + 2 * at};
      packed.row(k, packed.embedding, tokens[m / capacity], &stream[m * D]);
      packed.norm_row(packed.layers[0].before_attention, &stream[m * D], D, &normed[m * D]);
    }
    std::vector<Left> left;
    for (int64_t i = 0; i < 2; ++i)
      left.push_back({&keys[i * 3 * K * capacity * S], &values[i * 3 * K * capacity * S],
                      &u[i * 3 * capacity * I], &h[i * 3 * capacity * D]});
    room.jobs.begin();
    std::vector<std::thread> others;
    auto work = [&](int64_t member) {
      prompt_layers(k, packed, text, 0, 2, stream.data(), normed.data(), left.data(), room, member);
    };
    for (int64_t m = 1; m < members; ++m) others.emplace_back(work, m);
    work(0);
    for (std::thread& one : others) one.join();
    for (const Values& some : {keys, values, u, h}) normed.insert(normed.end(), some.begin(), some.end());
    return normed;
  };
  Values prompt = read(1);
  if (read(3) != prompt) std::printf("%s: three threads read another prompt\n", about.c_str()), std::exit(1);
  run(packed, 1, 0, 3);
  wanted.assign(3 * capacity * D, 0), sizes.assign(wanted.size(), 0);
  for (float one : hidden) most = std::max(most, std::fabs(one));
  for (int64_t m = 0; m < 3 * capacity; ++m)
    for (int64_t i = 0; i < D; ++i)
      wanted[m * D + i] = hidden[(m % capacity * 3 + m / capacity) * D + i], sizes[m * D + i] = most;
  prompt.resize(wanted.size());
  near("prompts", prompt, wanted, sizes, 2e-2);  // a level may fall to the other side
}

// Rounding to blocks: every weight within half a step, and what float16 cuts off the factors.
void rounding(const char* name) {
  const BlockType& type = *block_type(name);
  Values from = drawn(3 * 96);
  std::fill(from.begin() + 32, from.begin() + 64, 0.0f);
  std::fill(from.begin() + 64, from.begin() + 96, -2.5f);
  Stored m(type, round_to(type, from.data(), 3, 96), 3, 96, Order::rows);
  for (size_t i = 0; i < from.size(); ++i) {
    float high = 0, low = 0, most = 0;
    for (size_t j = i / 32 * 32; j < i / 32 * 32 + 32; ++j)
      most = std::max(most, std::fabs(from[j])), high = std::max(high, from[j]), low = std::min(low, from[j]);
    float step = type.bits == 8 ? most / 127 : type.offsets ? (high - low) / 15 : most / 8;
    // the far end of a symmetric grid of 16 levels is a whole step away
    if (std::fabs(m.dense[i] - from[i]) <=
        step * (name[3] == '0' && type.bits == 4 ? 1.01f : 0.51f) + 2e-3f * most)
      continue;
    std::printf("%s: %g became %g\n", name, double(from[i]), double(m.dense[i]));
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (const char* name : {"q8_0", "q4_0", "q4_1"}) rounding(name);
  for (const char* kind : KINDS) {
    const Kernels* k = kernels(kind);
    if (!k) continue;
    for (const char* name : TYPES) {
      int64_t each = block_type(name)->columns;
      for (int64_t rows : {1, 7, 101, 130})
        for (int64_t blocks : {1, each == 32 ? 3 : 2, each == 32 ? 5 : 2}) {
          int64_t columns = blocks * each;
          about =
              std::string(kind) + " " + name + " " + std::to_string(rows) + " x " + std::to_string(columns);
          Stored by_rows = made(name, rows, columns, Order::rows);
          Stored tiles = made(name, rows, columns, Order::tiles);
          Stored rotary = made(name, rows, columns, Order::neurons);
          weights(*k, by_rows), weights(*k, tiles), weights(*k, rotary);
          products(*k, by_rows, 1 + rows % 3), products(*k, tiles, 1 + rows % 6);
          neurons(*k, rotary);
          for (unsigned share : {1, 2, 9}) kept_columns(*k, tiles, share);
          for (const Stored* one : {&by_rows, &tiles}) many(*k, *one, 1 + (rows + blocks) % 7);
          read_again(by_rows), read_again(tiles), read_again(rotary);
        }
      about = std::string(kind) + " " + name + " of many inputs";  // more than are unpacked at a time
      for (Order order : {Order::rows, Order::tiles})
        many(*k, made(name, 40, each == 32 ? 1120 : 1280, order), 5);
      exact(*k, name, 101, each == 32 ? 160 : each);
      for (Act act : {Act::silu, Act::gelu, Act::gelu_tanh, Act::relu, Act::relu2})
        for (bool odd : {false, true}) ffns(*k, name, each == 32 ? 96 : each, each, act, odd);
      for (int64_t width : {each, 3 * each})
        for (bool some : {false, true}) own_choices(*k, name, each == 32 ? 96 : each, width, some);
    }
    for (const char* name : {"q8_0", "q4_0", "q4_1", "q5_0", "q5_1"}) {
      about = std::string(kind) + " " + name + " steps";
      steps(*k, name, 96, 8, 160), steps(*k, name, 32, 24, 32);
      for (int64_t selected : {1, 40, 160})
        for (bool skip : {false, true}) steps(*k, name, 96, 8, 160, selected, skip);
    }
    about = std::string(kind) + " masks";
    for (int64_t n : {32, 64, 96, 160, 1568}) masks(*k, n);
    about = std::string(kind) + " q4_k steps";
    steps(*k, "q4_k", 256, 64, 256);
    std::printf("%s agrees\n", kind);
  }
}
