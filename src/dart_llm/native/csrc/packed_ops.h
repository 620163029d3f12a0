// A packed matrix that torch holds, and inputs rounded for it.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "packed_blocks.h"

namespace dart {

struct PackedMatrix : torch::CustomClassHolder {
  // Of `rows` x `columns` weights as a file holds them, all of level 0 and scale 0; in
  // Order::neurons the columns become rows.
  PackedMatrix(const BlockType&, int64_t rows, int64_t columns, Order);
  // Takes over `count` rows of the file from `first` on.
  void fill(const Parts&, int64_t first, int64_t count);
  // Leaves rows `begin` to `end`, on the same memory; not Order::neurons, and of whole tiles.
  void cut(int64_t begin, int64_t end);
  // Of memory of its own.
  int64_t nbytes() const;
  // Rows id(0) to id(count - 1), [count, columns].
  at::Tensor rows(const std::function<int64_t(int64_t)>& id, int64_t count, at::ScalarType) const;

  std::string name;
  const BlockType& type;
  int64_t stored_rows, stored_columns;
  Packed packed;
  std::vector<at::Tensor> held;                // keeps what is pointed at alive
  std::shared_ptr<const KeptColumns> columns;  // of a copy of kept ones
  bool shared = false;                         // on the memory of another
};

struct RoundedRows {
  RoundedRows(const Kernels&, const float* x, int64_t count, int64_t columns);
  Rounded view() const { return {levels.data(), scales.data(), sums.data(), count, size}; }

  int64_t size, count;
  std::vector<int8_t> levels;
  std::vector<float> scales, sums;
};

// x [M, columns] times the rows of all matrices: [M, rows of all]; the rows are dequantised, a piece at
// a time, or the product is one on the blocks where x has at most `few` vectors.
at::Tensor times_rows(const at::Tensor& x, const std::vector<const Packed*>&, int64_t few);

// Adds the class and its operators.
void register_packed(torch::Library&);

}  // namespace dart
