// Kernels of one CPU kind: spans of rows and of neurons, for one thread.  No torch, no allocation.
//
// Weights are float32 or bfloat16 rows of D values.  Inputs come twice: in the weights' dtype
// (bfloat16 products) and as float32; sums and results are float32.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "packed.h"

namespace dart {

// M vectors of D values each, one after the other.
struct Input {
  const void* raw;    // in the weights' dtype
  const float* wide;  // the same as float32
  int64_t count;      // M
  int64_t size;       // D
  Rounded rounded{};  // the same for packed matrices
};

// Vector m of x alone.
inline Input one_of(Dtype dtype, const Input& x, int64_t m) {
  int64_t bytes = dtype == Dtype::f32 ? 4 : 2;
  return {static_cast<const char*>(x.raw) + m * x.size * bytes, x.wide + m * x.size, 1, x.size,
          x.rounded.at(m)};
}

// Rows of weights, in the dtype of a model or packed.
struct Matrix {
  const void* plain;
  const Packed* packed;
};

// One FFN; neurons are rows of D values in every matrix, in `down` too.
struct Ffn {
  const void* gate;  // null: a plain FFN
  const void* up;
  const void* down;
  const Packed *packed_gate, *packed_up, *packed_down;  // in place of these three, or null
  const void* gate_bias;                                // [I] in the weights' dtype, or null
  const void* up_bias;
  const void* basis;     // [r, D], or null: features of the input ...
  const void* features;  // [r, D]: ... and what each adds to the output
  const float* mean;     // [I], or null: taken off each activation before `down`
  const int32_t* ids;    // kept neurons; null: all of them
  int64_t kept;
  int64_t rank;
  Act act;
};

// Low-bit proxies of gate and up, by which a token selects its neurons.  Of 4 bits: byte j of a row
// holds level + 8 of input j in its low bits and of input j + (D + 1) / 2 in its high ones; of 8:
// levels as int8.  `up` null: there are none, and the exact activations decide.
struct Proxies {
  const uint8_t *gate, *up;                 // [I, (D + 1) / 2 or D]; gate null: a plain FFN
  const uint16_t *gate_scales, *up_scales;  // bfloat16 [I, D / group, rounded up]
  const float* saliency;                    // [I]: of a unit of each activation
  int64_t bits, group;
  int64_t keep;  // neurons of one token; 0: no selection
  bool skip;     // by exact activations: whether the down rows of the others are skipped

  bool own() const { return keep && !up; }
};

constexpr int64_t QUERIES = 16;    // of a prompt that attend together, at most
constexpr int64_t LANES = 16;      // floats of the widest vectors
constexpr int64_t POSITIONS = 64;  // of a token's attention that are in the first cache at a time

// Rounded up to whole vectors of any kind.
inline int64_t whole_lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Some queries of one head, each of which sees all positions up to its own.
struct Queries {
  const float* queries;  // [count, S], `pitch` apart
  int64_t pitch;
  int64_t first, count;  // position of the first one in its text; at most QUERIES
  const float* keys;     // [S, keys_pitch] by positions, whole vectors of them
  int64_t keys_pitch;
  const float* values;  // [positions, whole_lanes(S)]
  int64_t size;         // S
  float scale;
  float* scores;  // scratch: QUERIES (whole_lanes(first + count) + whole_lanes(S))
  float* out;     // [count, S], `out_pitch` apart
  int64_t out_pitch;
};

constexpr int64_t LOST = 4;  // tokens whose sums over what they lose are made together

// Where the largest of some values end: those of a higher order, and of the same the first ones.
struct Cut {
  int32_t order;
  int32_t last;  // the last place of a value of this order that is among them

  // Magnitudes are ordered as their bits are.  One kind of not-a-number: they tie too.
  static int32_t order_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return std::min(bits & 0x7fffffff, 0x7f800001);
  }
  bool takes(float value, int32_t place) const {
    int32_t own = order_of(value);
    return (own > order) | ((own == order) & (place <= last));
  }
};

struct Kernels {
  const char* name;
  // y[m, row] = rows[row] . x[m] (+ bias[row]) for begin <= row < end; y: M rows of `stride`.
  void (*matvec)(Dtype, const void* rows, const void* bias, const Input&, int64_t begin, int64_t end,
                 float* y, int64_t stride);
  // sums[m, :] += the output of kept neurons begin to end; u[m, begin..end) if not null.
  void (*ffn)(Dtype, const Ffn&, const Input&, int64_t begin, int64_t end, float* sums, float* u,
              int64_t u_stride);
  // sums[m, :] += features begin to end of the low-rank part.
  void (*low_rank)(Dtype, const Ffn&, const Input&, int64_t begin, int64_t end, float* sums);
  // strength[j] = abs(u~_i) saliency_i of kept neurons i, the j-th for begin <= j < end, u~ from the
  // proxies; x is one vector.
  void (*estimate)(Dtype, const Proxies&, const Ffn&, const Input&, int64_t begin, int64_t end,
                   float* strength);
  // Separates the k of n values that are largest, whatever their signs.  Ties go to the lower place;
  // not-a-number is the largest, as torch sorts.  orders: scratch, [n].
  Cut (*cut)(const float* values, int64_t n, int64_t k, int32_t* orders);
  // Of tokens u [count, n], adds to sums [n] and what follows after `pitch`, 2 and 3 `pitch`: weight u^2,
  // weight u, the same of those that are not among the k largest of abs(u) saliency, and weight for each of
  // these.  Scratch: strength [n]; orders [LOST, n], not negative.
  void (*lose)(const float* u, const float* saliency, int64_t n, int64_t k, const float* weights,
               int64_t count, float* strength, int32_t* orders, float* sums, int64_t pitch);
  // to[f, d] = sum over k of rows[ids[k], d] factors[k, f] for begin <= d < end; rows: [., size].
  void (*fold)(Dtype, const void* rows, const int32_t* ids, int64_t n, int64_t size, const float* factors,
               int64_t count, int64_t begin, int64_t end, float* to);
  // Some query heads [count, size] over n positions, at least one, of the keys and values that they share
  // [n, size], in the weights' dtype; cap: c tanh(x / c) of every score, 0: none.  to: [count, size + 2]:
  // for each query the values times their shares, not divided by the sum of these, the largest score
  // and that sum.  scores: count (POSITIONS + 1) of scratch.
  void (*attend)(Dtype, const float* queries, int64_t count, const void* keys, const void* values, int64_t n,
                 int64_t size, float cap, float* scores, float* to);
  // to [size]: one query's attention over `count` parts of the positions, at most POSITIONS: what
  // attend() left of each, `stride` apart.
  void (*merge)(const float* parts, int64_t count, int64_t stride, int64_t size, float* to);
  // out[i] = the values up to the position of query i, weighed by softmax(scale query . key).
  void (*attend_some)(const Queries&);
  void (*round)(Dtype, const float* from, void* to, int64_t n);
  void (*widen)(Dtype, const void* from, float* to, int64_t n);
  // y[i - begin] += bias[i] for begin <= i < end.
  void (*add)(Dtype, const void* bias, int64_t begin, int64_t end, float* y);
  // y[i] += bias[ids[i]] of n values.
  void (*add_at)(Dtype, const void* bias, const int32_t* ids, int64_t n, float* y);
  // to[i] = u[i] - mean[i], or u[i] where mean is null, of those neurons begin to end that the cut takes by
  // their strengths, else 0.
  void (*select)(const float* u, const float* mean, const float* strength, const Cut&, int64_t begin,
                 int64_t end, float* to);
  PackedKernels packed;
};

// The best that this CPU has; `name` (avx512bf16, avx512, avxvnni, avx2, neon, portable): that one, or
// null when the CPU has it not.
const Kernels* kernels();
const Kernels* kernels(const char* name);

namespace avx512bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avxvnni {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace neon {
extern const Kernels table;
}
namespace portable {
extern const Kernels table;
}

}  // namespace dart
