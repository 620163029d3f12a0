// A token of each row through a decoder of norms, attention and FFNs, whole.
#pragma once
#include <array>
#include <chrono>
#include <optional>
#include <vector>

#include "kernels.h"
#include "likeliest.h"
#include "screen.h"
#include "team.h"

namespace dart {

// An RMS norm, or one that takes the mean off first; factors [n] float32, null: no norm.
struct Norm {
  const float *factor, *bias;  // bias [n] or null
  bool centred;
};

struct Layer {
  Norm before_attention, before_ffn;  // [D]: of the stream
  Norm after_attention, after_ffn;    // [D]: of what is added to it
  Matrix q, k, v, o;  // [H S, D], [K S, D], [K S, D], [D, H S]; fused: q [(H + 2 K) S, D], no k and v
  const void *q_bias, *k_bias, *v_bias, *o_bias;  // or null
  Norm q_norm, k_norm;                            // [S], or [H S] and [K S] where they are `over_all` heads
  int64_t table;                                  // whose angles turn its heads; -1: none
  Ffn ffn;
  Proxies proxies;
  const float* bias;  // [D] float32: what is added to the FFN's output, or null
};

struct Decoder {
  Dtype dtype;
  int64_t hidden, heads, kv_heads, size, width, vocabulary;  // D, H, K, S, I, V
  int64_t rotary;  // R: of a head's S values, those that rotary embedding rotates
  int64_t known;   // rows of the embedding
  int64_t places;  // rows of the learned positions
  bool fused;      // one matrix for q, k and v ...
  bool by_heads;   // ... which holds those of one head after those of another
  bool over_all;   // the norms of q and k are those of all heads together
  bool parallel;   // the FFN reads the stream that the attention read
  float eps, scale;
  float embedding_scale;              // of the embedding's rows
  float attention_cap, logits_cap;    // c tanh(x / c) of scores and of logits; 0: none
  Matrix embedding, positions, head;  // [V, D], [places, D] or none, [V, D]
  Norm norm;                          // [D]
  std::optional<Screen> screen;       // of the head: what scores the tokens of steps
  std::vector<Layer> layers;

  // Values from the logits of one row to those of the next.
  int64_t logits_pitch() const { return screen ? screen->pitch() : vocabulary; }
  // Values of the queries, keys and values of one row.
  int64_t in_qkv() const { return (heads + 2 * kv_heads) * size; }
  // Where head `one` of queries (0), keys (1) or values (2) stands among them.
  int64_t head_at(int64_t kind, int64_t one) const {
    const int64_t before[] = {0, heads, heads + kv_heads};
    return (by_heads ? 3 * one + kind : before[kind] + one) * size;
  }
  // to[n] = from[n], normed where there is a norm.
  void norm_row(const Norm&, const float* from, int64_t n, float* to) const;
  // A head's query or key, normed where heads have norms each, and rotated by the angles of `table`.
  void rotate(float* head, const Norm&, int64_t table, const float* cosine, const float* sine) const;
  // Row `index` of the embedding or of the positions.
  void row(const Kernels&, const Matrix&, int64_t index, float* to) const;
};

// The caches of M rows of one length; what a layer no longer sees is not in its part.
struct Cache {
  struct Part {
    void *keys, *values;  // [M, K, length + 1, S]: `length` positions are filled, the next is written
    int64_t length;
    int64_t pitch, row_pitch;  // values from one head to the next, and from one row
  };
  std::vector<Part> layers;
  int64_t position;  // of the tokens in their texts
  int64_t rows;      // M
};

// The parts of a step, in order; an FFN that is not packed computes its activations in `ffn`.
enum class StepPart { embedding, qkv, attention, output, activations, ffn, sums, head };
constexpr size_t STEP_PARTS = 8;

// The seconds of a step's parts, each until all members have finished it; summed over the layers.
struct StepTimes {
  using Clock = std::chrono::steady_clock;
  void begin() { seconds.fill(0), last = Clock::now(); }
  void end(StepPart part) {
    Clock::time_point now = Clock::now();
    seconds[size_t(part)] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
  std::array<double, STEP_PARTS> seconds{};
  Clock::time_point last;
};

// What a step leaves behind; all float32.  Has room for `rows`; a step of fewer leaves the rest.
struct Scratch {
  Scratch(const Decoder&, int64_t threads, int64_t rows);
  Jobs jobs;  // begin() them before the members of a step begin
  std::vector<float> stream, qkv, attended, logits, inputs, normed, scores;
  std::vector<float> parts;  // [PARTS, M, D]: what each part of an FFN adds
  // Of every layer, where it is observed: activations [L, M, I] unless tokens select, and [L, M, D] each the
  // FFN's input, its output, the stream before it and, where that is normed, what is added to the stream.
  std::vector<float> u, h, z, x, r;
  std::vector<uint16_t> narrow;
  std::vector<int8_t> levels;  // of inputs, rounded for packed matrices: by member
  std::vector<float> scales, group_sums;
  std::vector<float> strength;  // of a layer's candidates, where tokens select: [M, candidates]
  std::vector<int32_t> orders;  // for selections: [threads, I]
  // What down projections by outputs are given, [M, I], and rounded.
  std::vector<float> active, active_scales, active_sums;
  std::vector<int8_t> active_levels;
  std::vector<int8_t> masked_levels;  // what of it tokens select: by member
  std::vector<float> masked_sums;
  std::vector<uint8_t> marks;  // what tokens select as bits, where it is watched: [L, M, I / 8 rounded up]
  std::vector<Likeliest> likeliest;  // [threads, M]: of the words that each member saw; empty them first
  ScreenRoom screened;
  int64_t threads, rows;
  bool observed = false, watched = false;
  std::optional<StepTimes> times;  // begin() them with the step; its caller ends the last part, the head
  bool greedy = false;             // whether `likeliest` is wanted, of all words but the `forbidden` ones
  std::vector<int64_t> forbidden;
};

// Runs one member's share of the step that decodes after `tokens` [M]; all members call it at once.
// cosine, sine: [tables, R] of the position.  Leaves logits [M, V], `logits_pitch` apart, and the
// normed last hidden states [M, D].
void step(const Kernels&, const Decoder&, const Cache&, const int64_t* tokens, const float* cosine,
          const float* sine, Scratch&, int64_t member);

}  // namespace dart
