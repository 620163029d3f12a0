#include "decode.h"
#include "select.h"
#include "packed_blocks.h"
#include "packed_ffn.h"

#include <algorithm>
#include <cmath>

namespace dart {
namespace {

constexpr int64_t JOBS = 14;      // of a layer, at most: q, k, v, their norms, attention, o, its norm,
                                  // the choice (2), activations, their levels, low rank, FFN, its sum
constexpr int64_t LEAST = 32768;  // weights that are worth a part of their own
constexpr int64_t CHUNK = 64;     // positions that are worth a part of their own ...
constexpr int64_t CHUNKS = 8;     // ... and the most parts, each of which the next job adds up

int64_t padded(int64_t n) { return (n + UNIT - 1) / UNIT * UNIT; }

const void* at(const void* base, Dtype dtype, int64_t values) {
  return static_cast<const char*>(base) + values * (dtype == Dtype::f32 ? 4 : 2);
}

void* at(void* base, Dtype dtype, int64_t values) {
  return static_cast<char*>(base) + values * (dtype == Dtype::f32 ? 4 : 2);
}

float capped(float x, float cap) { return cap * std::tanh(x / cap); }

template <class Value>
float sum(int64_t n, const Value& value) {
  float lanes[8] = {}, total = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < 8; ++j) lanes[j] += value(i + j);
  for (; i < n; ++i) lanes[0] += value(i);
  for (float lane : lanes) total += lane;
  return total;
}

// One member at work: the step's parts in order, with its own share of the scratch.  Vectors of the
// M rows lie one after the other: [M, n].
struct Member : Worker {
  const Kernels& kernels;
  const Decoder& decoder;
  const Cache& cache;
  const float *cosine, *sine;
  Scratch& scratch;
  float *normed, *x, *scores;  // x [M, D]: what a part of a layer is given
  uint16_t* narrow;
  int8_t* levels;
  float *scales, *group_sums;
  int32_t* orders;  // [I]
  int8_t* masked_levels;
  float* masked_sums;
  Likeliest* likeliest;  // [M]

  // Returns when all jobs begun so far are finished, which ends a part of the step.
  void finish(StepPart part) {
    Worker::finish();
    if (scratch.times && is_first()) scratch.times->end(part);
  }

  static int64_t parts_of(int64_t values) { return std::min(PARTS, 1 + values / LEAST); }

  // `from` [M, n] rounded to the weights' dtype, as the model's own modules hand it on.
  Input input(const float* from, int64_t n) {
    int64_t rows = cache.rows, each = 2 * Rounded::facts(padded(n));
    for (int64_t m = 0; m < rows; ++m)
      kernels.packed.round(from + m * n, 0, n, n, levels + m * padded(n), scales + m * each,
                           group_sums + m * each);
    Rounded rounded{levels, scales, group_sums, rows, padded(n)};
    if (decoder.dtype == Dtype::f32) return {from, from, rows, n, rounded};
    kernels.round(decoder.dtype, from, narrow, rows * n);
    kernels.widen(decoder.dtype, narrow, normed, rows * n);
    return {narrow, normed, rows, n, rounded};
  }

  void norm_rows(const Norm& by, const float* from, int64_t n, float* to) const {
    for (int64_t m = 0; m < cache.rows; ++m) decoder.norm_row(by, from + m * n, n, to + m * n);
  }

  // y[m] = weights x[m] + bias, `stride` values apart, and then(m, begin, end) for what is done;
  // given(): the vectors x of `size` values.
  template <class MakeInput, class Then>
  void project(const Matrix& weights, const void* bias, MakeInput& given, int64_t size, int64_t count,
               float* y, int64_t stride, const Then& then) {
    in_parts(parts_of(count * size), [&](int64_t one, int64_t parts) {
      Span own = part(count, one, parts, weights.packed ? TILE : 4);
      const Input& in = given();
      if (weights.packed) kernels.packed.matvec(*weights.packed, in.rounded, own.begin, own.end, y, stride);
      else kernels.matvec(decoder.dtype, weights.plain, bias, in, own.begin, own.end, y, stride);
      for (int64_t m = 0; m < in.count; ++m) {
        if (weights.packed && bias)
          kernels.add(decoder.dtype, bias, own.begin, own.end, y + m * stride + own.begin);
        then(m, own.begin, own.end);
      }
    });
  }

  template <class MakeInput>
  void project(const Matrix& weights, const void* bias, MakeInput& given, int64_t count, float* y) {
    project(weights, bias, given, decoder.hidden, count, y, in_qkv(), [](int64_t, int64_t, int64_t) {});
  }

  int64_t in_qkv() const { return decoder.in_qkv(); }

  void rotate(float* head, const Norm& by, int64_t table) const {
    decoder.rotate(head, by, table, cosine, sine);
  }

  // Where head number `one` of queries (0), keys (1) or values (2) of row m stands in qkv.
  float* head(int64_t m, int64_t kind, int64_t one) const {
    return scratch.qkv.data() + m * in_qkv() + decoder.head_at(kind, one);
  }

  int64_t group() const { return decoder.heads / decoder.kv_heads; }  // heads that share keys and values

  // Parts of the positions that a layer sees.
  int64_t chunks(int64_t index) const { return std::min(CHUNKS, 1 + cache.layers[index].length / CHUNK); }

  // What a part of the positions gives, [group, size + 2]: see Kernels::attend.
  float* attended(int64_t m, int64_t kv, int64_t chunk) const {
    int64_t place = (m * decoder.kv_heads + kv) * CHUNKS + chunk;
    return scratch.attended.data() + place * group() * (decoder.size + 2);
  }

  // The query heads of row m that share keys and values `kv`, over a part of the positions; the last part
  // also writes the new position to the cache.
  void attend(int64_t index, int64_t m, int64_t kv, int64_t chunk) {
    const Layer& layer = decoder.layers[index];
    const Cache::Part& held = cache.layers[index];
    Dtype dtype = decoder.dtype;
    int64_t size = decoder.size, base = m * held.row_pitch + kv * held.pitch;
    Span own = part(held.length + 1, chunk, chunks(index));
    if (own.end > held.length) {
      float* key = head(m, 1, kv);
      rotate(key, layer.k_norm, layer.table);
      kernels.round(dtype, key, at(held.keys, dtype, base + held.length * size), size);
      kernels.round(dtype, head(m, 2, kv), at(held.values, dtype, base + held.length * size), size);
    }
    for (int64_t one = 0; one < group(); ++one) {  // copies, which are rotated: other parts read them too
      float* query = normed + one * size;
      std::copy_n(head(m, 0, kv * group() + one), size, query);
      rotate(query, layer.q_norm, layer.table);
      for (int64_t i = 0; i < size; ++i) query[i] *= decoder.scale;
    }
    kernels.attend(dtype, normed, group(), at(held.keys, dtype, base + own.begin * size),
                   at(held.values, dtype, base + own.begin * size), own.end - own.begin, size,
                   decoder.attention_cap, scores, attended(m, kv, chunk));
  }

  // Values from the sums of one row to those of the next: packed matrices add to whole units.
  int64_t sums_pitch(const Ffn& ffn) const {
    return ffn.packed_down ? padded(decoder.hidden) : decoder.hidden;
  }

  // What a part of an FFN adds, [M, sums_pitch].
  float* sums(const Ffn& ffn, int64_t one) const {
    return scratch.parts.data() + one * padded(cache.rows * sums_pitch(ffn));
  }

  // How many there are: each adds its neurons' output; of tiles the first has all of it, and the others
  // have parts of the low-rank output.
  static int64_t sums_of(const Ffn& ffn) { return !by_outputs(ffn) ? PARTS : ffn.rank ? 1 + PARTS : 1; }

  void ffn(int64_t index) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden;
    Once given([&] {
      norm_rows(layer.before_ffn, scratch.stream.data(), hidden, x);
      return input(x, hidden);
    });
    const Ffn& ffn = layer.ffn;
    const Proxies& proxies = layer.proxies;
    if (proxies.keep && !proxies.own())
      estimate_strengths(*this, kernels, decoder.dtype, proxies, ffn, given, scratch.strength.data());
    Once selections([&] {
      return chosen_of(kernels, proxies, proxies.keep ? cache.rows : 0, ffn.kept, scratch.strength.data(),
                       orders);
    });
    float* u = scratch.u.data() + index * cache.rows * decoder.width;
    if (ffn.packed_down) activations(layer, selections, given, u);
    if (by_outputs(ffn)) return down(index, selections, given, u);
    in_parts(PARTS, [&](int64_t one, int64_t parts) {
      if (one == 0) record(index, selections, given);
      float* to = sums(ffn, one);
      std::fill_n(to, cache.rows * sums_pitch(ffn), 0.0f);
      Span own = part(ffn.kept, one, parts, ffn.packed_down ? GROUP : 4);
      neurons(ffn, selections(), given(), own, to, u);
      low_rank(ffn, given(), one, to);
    });
    finish(StepPart::ffn);
    add_sums(index);
  }

  // The output of activations u [M, I] through a down projection in tiles: a part of its rows has whole
  // sums, which are added to the stream at once if nothing else is to be done with them.
  template <class Selections, class MakeInput>
  void down(int64_t index, Selections& selections, MakeInput& make_input, float* u) {
    const Layer& layer = decoder.layers[index];
    const Ffn& ffn = layer.ffn;
    bool direct = !layer.after_ffn.factor && !decoder.parallel && !ffn.rank && !scratch.observed;
    if (scratch.observed || scratch.watched || ffn.rank)  // before the stream may change
      in_parts(ffn.rank ? PARTS : 1, [&](int64_t one, int64_t) {
        if (one == 0) record(index, selections, make_input);
        if (!ffn.rank) return;
        float* to = sums(ffn, 1 + one);
        std::fill_n(to, cache.rows * sums_pitch(ffn), 0.0f);
        low_rank(ffn, make_input(), one, to);
      });
    if (!rounds_early(layer)) {
      in_parts(FEW_PARTS, [&](int64_t one, int64_t parts) {
        Span own = part(decoder.width, one, parts, UNIT);
        for (int64_t m = 0; m < cache.rows; ++m) {
          float* to = scratch.active.data() + m * decoder.width;
          const Chosen* chosen = layer.proxies.keep ? &selections()[size_t(m)] : nullptr;
          down_input(kernels, ffn, chosen, u + m * decoder.width, own.begin, own.end, to);
          round_active(m, own, to);
        }
      });
      finish(StepPart::activations);
    }
    Once given([&] {
      bool some = layer.proxies.keep && rounds_early(layer);
      return Input{nullptr, nullptr, cache.rows, decoder.width,
                   some ? selected(selections()) : active_levels()};
    });
    float *y = sums(ffn, 0), *stream = scratch.stream.data();
    int64_t pitch = sums_pitch(ffn);
    project({nullptr, ffn.packed_down}, nullptr, given, decoder.width, decoder.hidden, y, pitch,
            [&](int64_t m, int64_t begin, int64_t end) {
              float* to = stream + m * decoder.hidden;
              for (int64_t i = begin; direct && i < end; ++i)
                to[i] += (layer.bias ? layer.bias[i] : 0.0f) + y[m * pitch + i];
            });
    finish(StepPart::ffn);
    if (!direct) add_sums(index);
  }

  // Whether each part of the activations rounds its own: where tokens select by them, levels are set to 0
  // later.
  static bool rounds_early(const Layer& layer) {
    return by_outputs(layer.ffn) && !layer.ffn.ids && (!layer.proxies.keep || layer.proxies.own());
  }

  // A part of row m's activations, without the neurons' means where tokens select.
  const float* centred(const Layer& layer, int64_t m, Span own, const float* of_row) {
    const float* mean = layer.ffn.mean;
    if (!layer.proxies.keep || !mean) return of_row;
    float* to = scratch.active.data() + m * decoder.width;
    for (int64_t i = own.begin; i < own.end; ++i) to[i] = of_row[i] - mean[i];
    return to;
  }

  // The rounded activations that each row selected; this member's own copy.
  Rounded selected(const std::vector<Chosen>& chosen) {
    Rounded all = active_levels();
    int64_t each = 2 * Rounded::facts(all.size);
    for (int64_t m = 0; m < cache.rows; ++m) {
      const Chosen& own = chosen[size_t(m)];
      kernels.packed.mask(all.levels + m * all.size, all.scales + m * each, own.strength, own.cut,
                          decoder.width, masked_levels + m * all.size, masked_sums + m * each);
    }
    return {masked_levels, all.scales, masked_sums, all.count, all.size};
  }

  Rounded active_levels() const {
    return {scratch.active_levels.data(), scratch.active_scales.data(), scratch.active_sums.data(),
            cache.rows, padded(decoder.width)};
  }

  // A part of the low-rank output of each row.
  void low_rank(const Ffn& ffn, const Input& given, int64_t one, float* to) {
    Span own = part(ffn.rank, one, PARTS, 1);
    for (int64_t m = 0; m < cache.rows; ++m)
      kernels.low_rank(decoder.dtype, ffn, one_of(decoder.dtype, given, m), own.begin, own.end,
                       to + m * sums_pitch(ffn));
  }

  // Leaves what others want of an FFN; once for each.
  template <class Selections, class MakeInput>
  void record(int64_t index, Selections& selections, MakeInput& make_input) {
    if (scratch.observed) make_input(), observe(index);
    if (scratch.watched) mark_selected(index, selections());
  }

  // Bits of what each row selected; zeros without selection.
  void mark_selected(int64_t index, const std::vector<Chosen>& chosen) {
    const Ffn& ffn = decoder.layers[index].ffn;
    int64_t bytes = marked_bytes(decoder.width);
    uint8_t* to = scratch.marks.data() + index * cache.rows * bytes;
    std::fill_n(to, cache.rows * bytes, uint8_t(0));
    for (const Chosen& of_row : chosen) mark(ffn.ids, ffn.kept, of_row, to), to += bytes;
  }

  // u [M, I] of packed matrices, for the part of the FFN that comes next: of all kept neurons, or of those
  // that each row selected.
  template <class Selections, class MakeInput>
  void activations(const Layer& layer, Selections& selections, MakeInput& make_input, float* u) {
    const Ffn& ffn = layer.ffn;
    bool own_strengths = layer.proxies.own(), some = layer.proxies.keep && !own_strengths;
    in_parts(PARTS, [&](int64_t one, int64_t parts) {
      const Input& given = make_input();
      Span own = part(ffn.kept, one, parts, GROUP);
      // few at a time: what one row has read is in the core's cache for the next
      int64_t step = given.count == 1 ? std::max<int64_t>(1, own.end - own.begin) : GROUP;
      for (int64_t begin = own.begin; begin < own.end; begin += step)
        for (int64_t m = 0; m < given.count; ++m) {
          int64_t end = std::min(begin + step, own.end);
          float* of_row = u + m * decoder.width;
          Rounded x = given.rounded.at(m);
          if (some)
            packed_hidden_of(kernels, decoder.dtype, ffn, selections()[size_t(m)], x, begin, end, of_row);
          else packed_hidden(kernels, decoder.dtype, ffn, x, begin, end, of_row);
          if (rounds_early(layer)) round_active(m, {begin, end}, centred(layer, m, {begin, end}, of_row));
          if (own_strengths)
            strengths_of(layer.proxies, ffn, of_row, begin, end, scratch.strength.data() + m * ffn.kept);
        }
    });
    finish(StepPart::activations);
  }

  // Rounds a part of row m's activations.
  void round_active(int64_t m, Span own, const float* of_row) {
    Rounded row = active_levels();
    int64_t factors = m * 2 * Rounded::facts(row.size);
    kernels.packed.round(of_row, own.begin, own.end, decoder.width,
                         scratch.active_levels.data() + m * row.size, scratch.active_scales.data() + factors,
                         scratch.active_sums.data() + factors);
  }

  // to[m] += the output of kept neurons `own` for each row, or of those among them that it has chosen.
  void neurons(const Ffn& ffn, const std::vector<Chosen>& chosen, const Input& given, Span own, float* to,
               float* u) {
    if (!ffn.packed_down) return plain_neurons(ffn, chosen, given, own, to, u);
    bool apart = given.count == 1 || (!chosen.empty() && chosen[0].skip);  // few rows have neurons in common
    int64_t step = apart ? std::max<int64_t>(1, own.end - own.begin) : GROUP;
    for (int64_t begin = own.begin; begin < own.end; begin += step)
      for (int64_t m = 0; m < given.count; ++m)
        packed_output(kernels, ffn, chosen.empty() ? nullptr : &chosen[size_t(m)], u + m * decoder.width,
                      begin, std::min(begin + step, own.end), to + m * sums_pitch(ffn));
  }

  void plain_neurons(const Ffn& ffn, const std::vector<Chosen>& chosen, const Input& given, Span own,
                     float* to, float* u) {
    if (chosen.empty())
      kernels.ffn(decoder.dtype, ffn, given, own.begin, own.end, to, scratch.observed ? u : nullptr,
                  decoder.width);
    for (int64_t m = 0; m < int64_t(chosen.size()); ++m) {
      Ffn mine = ffn;
      mine.ids = orders, mine.kept = selected_ids(ffn, chosen[size_t(m)], own.begin, own.end, orders);
      kernels.ffn(decoder.dtype, mine, one_of(decoder.dtype, given, m), 0, mine.kept,
                  to + m * sums_pitch(ffn), nullptr, 0);
    }
  }

  void observe(int64_t index) {
    int64_t count = cache.rows * decoder.hidden;
    std::copy_n(scratch.stream.data(), count, scratch.x.data() + index * count);
    std::copy_n(x, count, scratch.h.data() + index * count);
  }

  // Adds what the parts of an FFN gave, and the attention's output where both read one stream.
  void add_sums(int64_t index) {
    int64_t hidden = decoder.hidden, rows = cache.rows;
    bool last = decoder.layers[index].after_ffn.factor;  // a norm of the whole row comes after
    in_parts(last ? rows : FEW_PARTS, [&](int64_t one, int64_t parts) {
      Span own = last ? Span{0, hidden} : part(hidden, one, parts);
      for (int64_t m = last ? one : 0; m < (last ? one + 1 : rows); ++m) add_sum(index, m, own);
    });
    finish(StepPart::sums);
  }

  void add_sum(int64_t index, int64_t m, Span own) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden, place = (index * cache.rows + m) * hidden;
    int64_t pitch = sums(layer.ffn, 1) - sums(layer.ffn, 0);
    const float* from = sums(layer.ffn, 0) + m * sums_pitch(layer.ffn);
    const float* mixed = scratch.qkv.data() + m * hidden;
    float *to = x + m * hidden, *stream = scratch.stream.data() + m * hidden;
    for (int64_t i = own.begin; i < own.end; ++i) to[i] = layer.bias ? layer.bias[i] : 0.0f;
    for (int64_t one = 0; one < sums_of(layer.ffn); ++one)
      for (int64_t i = own.begin; i < own.end; ++i) to[i] += from[one * pitch + i];
    if (scratch.observed) std::copy(to + own.begin, to + own.end, scratch.z.data() + place + own.begin);
    if (layer.after_ffn.factor) {
      decoder.norm_row(layer.after_ffn, to, hidden, to);
      if (scratch.observed) std::copy_n(to, hidden, scratch.r.data() + place);
    }
    for (int64_t i = own.begin; i < own.end; ++i) stream[i] += decoder.parallel ? to[i] + mixed[i] : to[i];
  }

  void attention(int64_t index) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden, q = decoder.heads * decoder.size, rows = cache.rows;
    int64_t kv = decoder.kv_heads * decoder.size;
    Once given([&] {
      norm_rows(layer.before_attention, scratch.stream.data(), hidden, x);
      return input(x, hidden);
    });
    float* qkv = scratch.qkv.data();
    project(layer.q, layer.q_bias, given, decoder.fused ? in_qkv() : q, qkv);
    if (!decoder.fused) {
      project(layer.k, layer.k_bias, given, kv, qkv + q);
      project(layer.v, layer.v_bias, given, kv, qkv + q + kv);
    }
    finish(StepPart::qkv);
    if (decoder.over_all) {
      in_parts(2 * rows, [&](int64_t one, int64_t) {
        float *queries = qkv + one / 2 * in_qkv(), *keys = queries + q;
        one % 2 ? decoder.norm_row(layer.k_norm, keys, kv, keys)
                : decoder.norm_row(layer.q_norm, queries, q, queries);
      });
      finish(StepPart::qkv);
    }
    int64_t parts = chunks(index);  // those of one head come one after the other, as they lie in memory
    in_parts(rows * decoder.kv_heads * parts, [&](int64_t one, int64_t) {
      attend(index, one / parts / decoder.kv_heads, one / parts % decoder.kv_heads, one % parts);
    });
    finish(StepPart::attention);
    add_attention(index);
  }

  // The attention of all heads [M, H S], from what the parts of the positions gave.
  const float* merged(int64_t index) {
    int64_t size = decoder.size, stride = group() * (size + 2);
    float* to = normed;
    for (int64_t m = 0; m < cache.rows; ++m)
      for (int64_t one = 0; one < decoder.heads; ++one, to += size)
        kernels.merge(attended(m, one / group(), 0) + one % group() * (size + 2), chunks(index), stride, size,
                      to);
    return normed;
  }

  void add_attention(int64_t index) {
    const Layer& layer = decoder.layers[index];
    int64_t hidden = decoder.hidden;
    float *y = scratch.qkv.data(), *stream = scratch.stream.data();  // y [M, D]
    int64_t size = decoder.heads * decoder.size;
    Once given([&] { return input(merged(index), size); });
    bool last = !layer.after_attention.factor && !decoder.parallel;
    project(layer.o, layer.o_bias, given, size, hidden, y, hidden,
            [&](int64_t m, int64_t begin, int64_t end) {
              if (last)
                for (int64_t i = m * hidden + begin; i < m * hidden + end; ++i) stream[i] += y[i];
            });
    if (decoder.parallel) return;
    finish(StepPart::output);
    if (last) return;
    in_parts(cache.rows, [&](int64_t m, int64_t) {
      float *own = y + m * hidden, *to = stream + m * hidden;
      decoder.norm_row(layer.after_attention, own, hidden, own);
      for (int64_t i = 0; i < hidden; ++i) to[i] += own[i];
    });
    finish(StepPart::output);
  }

  void embed(int64_t m, int64_t token) {
    float* to = scratch.stream.data() + m * decoder.hidden;
    decoder.row(kernels, decoder.embedding, token, to);
    for (int64_t i = 0; i < decoder.hidden; ++i) to[i] *= decoder.embedding_scale;
    if (!decoder.places) return;
    decoder.row(kernels, decoder.positions, cache.position, x);
    for (int64_t i = 0; i < decoder.hidden; ++i) to[i] += x[i];
  }

  void run(const int64_t* tokens) {
    int64_t hidden = decoder.hidden, rows = cache.rows;
    in_parts(rows, [&](int64_t m, int64_t) { embed(m, tokens[m]); });
    finish(StepPart::embedding);
    for (int64_t index = 0; index < int64_t(decoder.layers.size()); ++index) {
      attention(index);
      ffn(index);
    }
    Once given([&] {
      norm_rows(decoder.norm, scratch.stream.data(), hidden, x);
      return input(x, hidden);
    });
    in_parts(1, [&](int64_t, int64_t) { std::copy_n(given().wide, rows * hidden, scratch.normed.data()); });
    float* logits = scratch.logits.data();
    auto then = [&](int64_t m, int64_t begin, int64_t end) { scored(m, begin, end); };
    if (decoder.screen)
      score_by_screen(*this, kernels, decoder.dtype, *decoder.screen, decoder.head, given, rows,
                      scratch.screened, logits, then);
    else project(decoder.head, nullptr, given, hidden, decoder.vocabulary, logits, decoder.vocabulary, then);
  }

  // Words `begin` to `end` of row m have their scores.
  void scored(int64_t m, int64_t begin, int64_t end) {
    float* own = scratch.logits.data() + m * decoder.logits_pitch();
    if (decoder.logits_cap)
      for (int64_t i = begin; i < end; ++i) own[i] = capped(own[i], decoder.logits_cap);
    if (!scratch.greedy) return;
    for (int64_t i : scratch.forbidden)
      if (i >= begin && i < end) own[i] = -INFINITY;
    likeliest[m].see(decoder.dtype, own, begin, end);
  }
};

int64_t scores_of(const Decoder& d) { return whole_lanes(d.heads / d.kv_heads * (POSITIONS + 1)); }

int64_t widest(const Decoder& d) { return std::max(d.hidden, d.heads * d.size); }

}  // namespace

void Decoder::norm_row(const Norm& by, const float* from, int64_t n, float* to) const {
  if (!by.factor) {
    if (to != from) std::copy_n(from, n, to);
    return;
  }
  float mean = by.centred ? sum(n, [&](int64_t i) { return from[i]; }) / float(n) : 0.0f;
  float squares = sum(n, [&](int64_t i) { return (from[i] - mean) * (from[i] - mean); });
  float factor = 1.0f / std::sqrt(squares / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) to[i] = (from[i] - mean) * factor * by.factor[i];
  if (by.bias)
    for (int64_t i = 0; i < n; ++i) to[i] += by.bias[i];
}

void Decoder::rotate(float* head, const Norm& by, int64_t table, const float* cosine,
                     const float* sine) const {
  if (!over_all) norm_row(by, head, size, head);
  if (table < 0) return;
  int64_t half = rotary / 2;
  const float *cosines = cosine + table * rotary, *sines = sine + table * rotary;
  for (int64_t i = 0; i < half; ++i) {
    float a = head[i], b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i + half] + a * sines[i + half];
  }
}

void Decoder::row(const Kernels& kernels, const Matrix& rows, int64_t index, float* to) const {
  if (rows.packed) kernels.packed.dequantise(*rows.packed, index, 1, Dtype::f32, to);
  else kernels.widen(dtype, at(rows.plain, dtype, index * hidden), to, hidden);
}

Scratch::Scratch(const Decoder& d, int64_t threads_, int64_t rows_)
    : jobs(int64_t(d.layers.size()) * JOBS + 2 + SCREEN_JOBS, threads_), threads(threads_), rows(rows_) {
  int64_t all = int64_t(d.layers.size()) * rows, each = threads * rows;
  stream.resize(rows * d.hidden);
  qkv.resize(rows * std::max((d.heads + 2 * d.kv_heads) * d.size, d.hidden));
  attended.resize(rows * d.heads * CHUNKS * (d.size + 2));
  logits.resize(rows * d.logits_pitch());
  if (d.screen) screened = ScreenRoom(*d.screen, rows);
  inputs.resize(each * d.hidden);
  parts.resize((1 + PARTS) * rows * padded(d.hidden));
  normed.resize(rows * d.hidden + each * widest(d));
  narrow.resize(each * widest(d));
  levels.resize(each * padded(widest(d)));
  scales.resize(each * 2 * Rounded::facts(padded(widest(d))));
  group_sums.resize(scales.size());
  likeliest.resize(each);
  strength.resize(rows * d.width);
  orders.resize(threads * d.width);
  active.resize(rows * d.width);
  active_levels.resize(rows * padded(d.width));
  active_scales.resize(rows * 2 * Rounded::facts(padded(d.width))), active_sums.resize(active_scales.size());
  masked_levels.resize(threads * active_levels.size()), masked_sums.resize(threads * active_sums.size());
  marks.resize(all * marked_bytes(d.width));
  scores.resize(threads * scores_of(d));
  u.resize(all * d.width);
  x.resize(all * d.hidden);
  h.resize(all * d.hidden);
  z.resize(all * d.hidden);
  r.resize(all * d.hidden);
}

void step(const Kernels& kernels, const Decoder& decoder, const Cache& cache, const int64_t* tokens,
          const float* cosine, const float* sine, Scratch& scratch, int64_t member) {
  int64_t wide = widest(decoder), own = member * scratch.rows;
  Member one{Worker(scratch.jobs, member),
             kernels,
             decoder,
             cache,
             cosine,
             sine,
             scratch,
             scratch.normed.data() + scratch.rows * decoder.hidden + own * wide,
             scratch.inputs.data() + own * decoder.hidden,
             scratch.scores.data() + member * scores_of(decoder),
             scratch.narrow.data() + own * wide,
             scratch.levels.data() + own * padded(wide),
             scratch.scales.data() + own * 2 * Rounded::facts(padded(wide)),
             scratch.group_sums.data() + own * 2 * Rounded::facts(padded(wide)),
             scratch.orders.data() + member * decoder.width,
             scratch.masked_levels.data() + own * padded(decoder.width),
             scratch.masked_sums.data() + own * 2 * Rounded::facts(padded(decoder.width)),
             scratch.likeliest.data() + own};
  one.run(tokens);
}

}  // namespace dart
