// Matrices whose weights stay in low-bit blocks, and the vectors that they are multiplied with.
//
// A weight is scale * (level - bias) + offset; a block of 16 or 32 weights shares scale and offset.
// `Order::rows`: blocks lie along a row, and a product needs whole rows.  `Order::neurons`: rows are
// neurons of a down projection, and the same column of 16 or 32 neurons shares them, so that a kept
// neuron is one run of levels.
//
// A row holds its levels in units of 64 columns; columns beyond the last one are at `bias` or have
// scale 0.  Of 8 bits: a byte each.  Of 4: byte j of a pair of units holds column j of the first one
// in its low bits and of the second one in its high ones; a last unit without a second has 32 bytes,
// of its columns 0..31 (low) and 32..63 (high).  In `Order::neurons` column 16 v + 4 l + e of a unit
// stands at place 16 l + 4 v + e: four such rows interleave by plain unpack instructions.
#pragma once
#include <cstdint>

namespace dart {

constexpr int64_t UNIT = 64;     // columns that are laid out together
constexpr int64_t GROUP = 32;    // values of an input that share a scale
constexpr int64_t SUPER = 256;   // weights that share what their blocks' scales are multiplied by

enum class Dtype : int { f32 = 0, bf16 = 1 };

enum class Act : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, relu2 = 4 };

enum class Order : int { rows = 0, neurons = 1 };

// Factors of blocks: of 16 bits each, or 8 bits times one of 16 bits for each SUPER weights.
struct Factors {
  const void* own;         // float16, or int8 where there are `supers`; null: none
  const uint16_t* supers;  // float16, or null
};

struct Packed {
  const uint8_t* levels;
  Factors scales, offsets;
  int64_t rows, columns;
  int64_t pitch;         // bytes of a row's levels
  int bits, block, bias;
  Order order;

  int64_t units() const { return (columns + UNIT - 1) / UNIT; }
  // Blocks of a row, or columns of a group of neurons: what `own` holds for each of them.
  int64_t each() const { return order == Order::rows ? units() * UNIT / block : units() * UNIT; }
  int64_t supers_each() const {
    return order == Order::rows ? (units() * UNIT + SUPER - 1) / SUPER : units() * UNIT;
  }
};

// Vectors rounded to 8 bits, groups of 32 values; room for whole units.  Scales, and scales times
// the sum of the levels, for blocks of 32 and of 16 values: [2, facts()], what is missing is 0.
struct Rounded {
  const int8_t* levels;  // [M, size]
  const float* scales;   // [M, 2, facts]
  const float* sums;     // [M, 2, facts]
  int64_t count, size;   // M; a multiple of UNIT

  // Factors of a vector of that size, for each kind of block: those of 16, and whole vectors of them.
  static int64_t facts(int64_t size) { return (size / 16 + 31) / 32 * 32; }
  Rounded at(int64_t m) const {
    int64_t each = 2 * facts(size);
    return {levels + m * size, scales + m * each, sums + m * each, 1, size};
  }
  const float* scales_of(int block) const { return scales + (block == 16 ? facts(size) : 0); }
  const float* sums_of(int block) const { return sums + (block == 16 ? facts(size) : 0); }
};

// Kernels of one CPU kind for packed matrices.
struct PackedKernels {
  // y[m, row] = rows[row] . x[m] for begin <= row < end; y: M rows of `stride`.  Order::rows.
  void (*matvec)(const Packed&, const Rounded& x, int64_t begin, int64_t end, float* y,
                 int64_t stride);
  // y[j] = rows[ids[j]] . x for n rows; ids null: rows first, first + 1, ...
  void (*dots)(const Packed&, const Rounded& x, const int32_t* ids, int64_t first, int64_t n,
               float* y);
  // sums[:] += u[0] down[ids[0]] + ... + u[n - 1] down[ids[n - 1]], all neurons of one block;
  // Order::neurons.  sums: whole units; whole: as many int32 of scratch.
  void (*add_neurons)(const Packed& down, const int32_t* ids, const float* u, int64_t n, float* sums,
                      int32_t* whole);
  // Rounds [n] floats to a vector of whole units.
  void (*round)(const float* from, int64_t n, int8_t* levels, float* scales, float* sums);
  // up[i] = act(gate[i]) up[i], or act(up[i]) where gate is null, of n values; room for 32.
  void (*activate)(Act, const float* gate, float* up, int64_t n);
  // to[columns] = a row's weights, float32 or bfloat16.
  void (*dequantise)(const Packed&, int64_t row, Dtype, void* to);
};

}  // namespace dart
