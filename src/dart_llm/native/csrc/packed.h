// Matrices whose weights stay in low-bit blocks, and the vectors that they are multiplied with.
//
// A weight is scale * (level - bias) + offset; a block of 16 or 32 weights shares scale and offset.
// `Order::rows`: blocks lie along a row, and any rows can be read alone.  `Order::tiles`: the same,
// but TILE rows lie interleaved, which is the fastest to read as a whole.  `Order::neurons`: rows are
// neurons of a down projection, and the same column of 16 or 32 neurons shares scale and offset, so
// that a neuron is one run of levels, and others can be skipped.  A copy of kept neurons is read as
// quickly as all of them are, byte for byte, which rows here and there are not.
//
// A row holds its levels in units of 64 columns; columns beyond the last one are at `bias` or have
// scale 0.  Where the columns of a unit stand, four neighbouring ones to an entry (named by the first):
//
//                   Order::rows       Order::neurons    Order::tiles (16 rows together)
//   bytes  0..15     0 32 16 48        0 16 32 48       row 0:  0 | row 1:  0 | ... row 15:  0   (64 bytes)
//   bytes 16..31     4 36 20 52        4 20 36 52       row 0:  4 | row 1:  4 | ... row 15:  4
//   bytes 32..47     8 40 24 56        8 24 40 56       ...
//   bytes 48..63    12 44 28 60       12 28 44 60       row 0: 60 | row 1: 60 | ... row 15: 60
//
// In `rows` every 16 bytes have one four of each quarter of the unit (of each block), so that factors
// are repeated, not spread; in `neurons` four rows interleave by plain unpack instructions; in `tiles`
// four bytes of one row lie beside those of the next, 64 bytes of 16 rows for each four.
//
//   8 bits: a byte each.          4 bits: byte j of a pair of units  | high: place j of unit 1 |
//                                                                     | low:  place j of unit 0 |
//   a last unit without a second has 32 bytes: places 0..31 (low) and 32..63 (high).
//
// A copy of kept columns in tiles (of a down projection, whose columns are neurons) holds fewer fours: in
// every block the kept columns come first, in whole fours, and the factors are those of all columns.  Of
// 4 bits the two blocks of a unit share bytes, so that the fuller one decides how many fours there are.
#pragma once
#include <cstdint>

namespace dart {

constexpr int64_t UNIT = 64;    // columns that are laid out together
constexpr int64_t TILE = 16;    // rows that are interleaved
constexpr int64_t GROUP = 32;   // values of an input that share a scale
constexpr int64_t SUPER = 256;  // weights that share what their blocks' scales are multiplied by

enum class Dtype : int { f32 = 0, bf16 = 1 };

enum class Act : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, relu2 = 4 };

enum class Order : int { rows = 0, neurons = 1, tiles = 2 };

// Where quarter q (16 columns) of a unit stands among its four: 0, 2, 1, 3.
constexpr int64_t quarter_place(int64_t quarter) {
  return quarter == 1 || quarter == 2 ? 3 - quarter : quarter;
}

// Where four columns 4 k to 4 k + 3 of a unit stand among its sixteen fours, in a vector that is
// rounded to levels.
constexpr int64_t four_of(int64_t k) { return 4 * (k % 4) + quarter_place(k / 4); }

// Where column `c` of a unit stands in it.
constexpr int64_t place_of(Order order, int64_t c) {
  if (order == Order::tiles) return c;
  return order == Order::rows ? 4 * four_of(c / 4) + c % 4 : c % 16 / 4 * 16 + c / 16 * 4 + c % 4;
}

// Factors of blocks: of 16 bits each, or 8 bits times one of 16 bits for each SUPER weights.
struct Factors {
  const void* own;         // float16, or int8 where there are `supers`; null: none
  const uint16_t* supers;  // float16, or null
};

struct Packed {
  const uint8_t* levels;
  Factors scales, offsets;
  int64_t rows, columns;
  int64_t pitch;  // bytes of a row's levels
  int bits, block, bias;
  Order order;
  bool kept;  // the levels are those of kept neurons alone
  // Of kept columns, or null: how many fours of them there are [entries()], and where each stands.
  const uint8_t* fours;
  const int32_t* places;
  int64_t kept_columns;

  // Runs of fours of a row whose number may differ: those of a block, or of two that share bytes.
  int64_t entries() const { return units() * UNIT / block / (bits == 4 ? 2 : 1); }
  int64_t units() const { return (columns + UNIT - 1) / UNIT; }
  // Rows that there is room for.
  int64_t room() const { return order == Order::neurons ? rows : (rows + TILE - 1) / TILE * TILE; }
  // Blocks of a row, or columns of a group of neurons: what `own` holds for each of them.
  int64_t each() const { return order == Order::neurons ? units() * UNIT : units() * (block == 16 ? 4 : 2); }
  int64_t supers_each() const {
    return order == Order::neurons ? units() * UNIT : (units() * UNIT + SUPER - 1) / SUPER;
  }
  // Where the factor of block `b` of a row stands, and that of its block of SUPER weights; not
  // Order::neurons.
  int64_t factor_of(int64_t row, int64_t b) const {
    if (order == Order::tiles) return (row / TILE * each() + b) * TILE + row % TILE;
    return row * each() + (block == 16 ? b / 4 * 4 + quarter_place(b % 4) : b);
  }
  int64_t super_of(int64_t row, int64_t s) const {
    if (order == Order::tiles) return (row / TILE * supers_each() + s) * TILE + row % TILE;
    return row * supers_each() + s;
  }
};

// Vectors rounded to 8 bits, groups of 32 values; room for whole units, whose values stand as
// `four_of` says.  Scales, and scales times the sum of the levels, for blocks of 32 and of 16 values
// (the four of a unit as `quarter_place` says): [2, facts()], what is missing is 0.
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

// M vectors rounded to 8 bits, groups of 32 values, for products of many: `lot` of them side by side.
// What every four values, every block of 32 and every block of 16 has of each vector of a lot lies
// together; columns that are missing are 0.
struct Lots {
  int8_t* levels;       // [lots, size / 4, lot, 4]
  float* scales;        // [lots, size / 32, lot]
  int32_t* totals[2];   // of the levels of blocks of 32, and of 16
  float* sums[2];       // the same times the scale
  int64_t count, size;  // M; a multiple of UNIT
  int64_t lot;          // see PackedKernels
};

// Outputs `begin` to `end` of a product, and the units of inputs that count.  `begin` is a multiple of
// TILE; at `first` a block of SUPER weights begins.
struct Part {
  int64_t begin, end;
  int64_t first, last;
};

// An output head [V, D] along D directions in which hidden states lie, at 4 bits: what word v gains from
// z[i] of direction i is by[v] (level - MIDDLE) z[i].  Words lie in runs of RUN, [V / RUN, D, RUN / 2] bytes,
// so that a direction can be read alone; two units to 64 bytes as in `Order::neurons`.
constexpr int64_t RUN = 4096;
constexpr float MIDDLE = 7.5f;
struct Directions {
  const uint8_t* levels;
  const float* by;      // whole runs
  int64_t words, size;  // V, D

  int64_t runs() const { return (words + RUN - 1) / RUN; }
};

// The directions that a hidden state reads, ascending, in whole eights, and what it has along them.
struct Along {
  const int32_t* ids;
  int64_t count;
  Rounded values;
  float sum;  // of all values
};

struct Cut;  // see kernels.h

// Kernels of one CPU kind for packed matrices.
struct PackedKernels {
  // y[m, row] = rows[row] . x[m] for begin <= row < end; y: M rows of `stride`.  Not Order::neurons;
  // of Order::tiles whole tiles are quickest.
  void (*matvec)(const Packed&, const Rounded& x, int64_t begin, int64_t end, float* y, int64_t stride);
  // y[j] = rows[ids[j]] . x for n rows; ids null: rows first, first + 1, ..., of tiles too.
  void (*dots)(const Packed&, const Rounded& x, const int32_t* ids, int64_t first, int64_t n, float* y);
  // sums[:] += u[0] down[ids[0]] + ... + u[n - 1] down[ids[n - 1]]; neurons of one block, which lie
  // together, are rounded together.  Order::neurons.  sums: whole units.
  void (*add_neurons)(const Packed& down, const int32_t* ids, const float* u, int64_t n, float* sums);
  // Rounds values begin to end of [n] floats to a vector of whole units; both are multiples of GROUP, or
  // end is n.
  void (*round)(const float* from, int64_t begin, int64_t end, int64_t n, int8_t* levels, float* scales,
                float* sums);
  // Of a vector of n values rounded by `round`: levels that a cut does not take by their strengths become 0,
  // to[whole units], and the sums are those of the others.  What sums hold beyond the units stays.
  void (*mask)(const int8_t* levels, const float* scales, const float* strength, const Cut&, int64_t n,
               int8_t* to, float* sums);
  // up[i] = act(gate[i]) up[i], or act(up[i]) where gate is null, of n values; room for 32.
  void (*activate)(Act, const float* gate, float* up, int64_t n);
  // to[count, columns] = weights of `count` rows from `row` on, float32 or bfloat16; of Order::tiles
  // whole tiles are quickest.
  void (*dequantise)(const Packed&, int64_t row, int64_t count, Dtype, void* to);
  int64_t lot;  // vectors whose products are made together
  int64_t few;  // vectors up to which products on the blocks are quicker than with dequantised rows
  // Rounds [n] floats to vector m.
  void (*round_lot)(const float* from, int64_t n, const Lots& to, int64_t m);
  // y[m, i] of a part, M rows of `stride`: rows[i] . x[m].  Not Order::neurons, and never of what was
  // copied of kept neurons.
  void (*lots)(const Packed&, const Lots& x, const Part&, float* y, int64_t stride);
  // y[RUN] = scores of a run of words.
  void (*scores)(const Directions&, const Along&, int64_t run, float* y);
};

}  // namespace dart
