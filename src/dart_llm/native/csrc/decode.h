// One token through a decoder of RMS norms, rotary attention and gated FFNs, whole.
#pragma once
#include <vector>

#include "kernels.h"
#include "team.h"

namespace dart {

struct Layer {
  const void *attention_norm, *ffn_norm;                // [D]
  const void *q, *k, *v, *o;                            // [H S, D], [K S, D], [K S, D], [D, H S]
  const void *q_bias, *k_bias, *v_bias, *o_bias;        // or null
  const void *q_norm, *k_norm;                          // [S], or null
  Ffn ffn;
  Copies copies;
  const float* bias;  // [D] float32: what is added to the FFN's output, or null
};

struct Decoder {
  Dtype dtype;
  int64_t hidden, heads, kv_heads, size, width, vocabulary;  // D, H, K, S, I, V
  float eps, scale;
  const void *embedding, *norm, *head;  // [V, D], [D], [V, D]
  std::vector<Layer> layers;
};

// The caches of one sequence: [K, capacity, S] per layer, `length` positions filled.
struct Cache {
  std::vector<void*> keys, values;
  int64_t length, capacity;
};

// What a step leaves behind; all float32.
struct Scratch {
  Scratch(const Decoder&, int64_t threads, int64_t positions);
  Jobs jobs;  // begin() them before the members of a step begin
  std::vector<float> stream, qkv, attended, logits, sums, normed, scores;
  std::vector<float> parts;  // [PARTS, D]: what each part of an FFN adds
  // Of every layer, where it is observed: activations [L, I], and [L, D] each the FFN's input, its
  // output and the stream before it.
  std::vector<float> u, h, z, x;
  std::vector<uint16_t> narrow;
  std::vector<float> strength;       // of a layer's neurons
  std::vector<int32_t> chosen;       // the token's neurons
  int64_t threads, positions;
  bool observed = false;
};

// Runs one member's share of the step that decodes after `token`; all members call it at once.
// cosine, sine: [S] of the position.  Leaves logits [V] and the normed last hidden state.
void step(const Kernels&, const Decoder&, const Cache&, int64_t token, const float* cosine,
          const float* sine, Scratch&, int64_t member);

}  // namespace dart
