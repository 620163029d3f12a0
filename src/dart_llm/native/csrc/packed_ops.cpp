// Packed matrices as torch operators.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "packed_ops.h"
#include "together.h"

namespace dart {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// Lays factors of `rows` rows, `each` of a row, out from row `first` on: where `place` says.
template <class T, class Place>
void lay_out(const std::vector<T>& from, int64_t first, int64_t rows, int64_t each, const Tensor& to,
             const Place& place) {
  if (from.empty()) return;
  T* values = static_cast<T*>(to.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < each; ++i) values[place(first + row, i)] = from[size_t(row * each + i)];
}

Packed shape_of(const BlockType& type, int64_t rows, int64_t columns, Order order) {
  Packed p{};
  p.rows = rows, p.columns = columns, p.bits = type.bits, p.block = type.block, p.bias = type.bias;
  p.order = order;
  p.pitch = p.units() * UNIT * type.bits / 8;
  return p;
}

Order order_of(const std::string& name) {
  if (name == "rows") return Order::rows;
  if (name == "tiles") return Order::tiles;
  TORCH_CHECK(name == "neurons", "native: matrices lie by rows, tiles or neurons, not by ", name);
  return Order::neurons;
}

const BlockType& known(const std::string& name) {
  const BlockType* type = block_type(name);
  TORCH_CHECK(type, "native: there are no blocks of type ", name);
  return *type;
}

}  // namespace

PackedMatrix::PackedMatrix(const BlockType& type, int64_t rows, int64_t columns, Order order)
    : name(type.name), type(type), stored_rows(rows), stored_columns(columns) {
  bool neurons = order == Order::neurons;
  packed = shape_of(type, neurons ? columns : rows, neurons ? rows : columns, order);
  // Whole vectors are read at the end of the last row.
  auto room = [&](int64_t count, at::ScalarType of) {
    held.push_back(at::zeros({count + 64}, of));
    return held.back().mutable_data_ptr();
  };
  packed.levels = static_cast<uint8_t*>(room(packed.room() * packed.pitch, at::kByte));
  int64_t lines = neurons ? (columns + type.block - 1) / type.block : packed.room();
  int64_t above = neurons ? (columns + SUPER - 1) / SUPER : packed.room();
  auto factors = [&] {
    Factors f{room(lines * packed.each(), type.supers ? at::kChar : at::kHalf), nullptr};
    if (type.supers)
      f.supers = static_cast<uint16_t*>(room(above * packed.supers_each(), at::kHalf));
    return f;
  };
  packed.scales = factors();
  if (type.offsets) packed.offsets = factors();
}

void PackedMatrix::fill(const Parts& parts, int64_t first, int64_t count) {
  bool neurons = packed.order == Order::neurons;
  auto* levels = held[0].mutable_data_ptr<uint8_t>();
  auto write = [&](const uint8_t* from, int64_t row) {
    write_levels(packed, row, from, levels);
  };
  if (neurons) {
    TORCH_CHECK(first == 0 && count == stored_rows, "native: neurons are laid out at once");
    at::parallel_for(0, (packed.rows + 63) / 64, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> turned(size_t(64 * count));
      for (int64_t some = begin * 64; some < std::min(end * 64, packed.rows); some += 64) {
        int64_t n = std::min<int64_t>(64, packed.rows - some);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < n; ++j)
            turned[size_t(j * count + i)] = parts.levels[size_t(i * stored_columns + some + j)];
        for (int64_t j = 0; j < n; ++j) write(turned.data() + j * count, some + j);
      }
    });
  } else {
    for (int64_t row = 0; row < count; ++row)
      write(parts.levels.data() + row * stored_columns, first + row);
  }
  int64_t blocks = stored_columns / type.block, supers = stored_columns / SUPER;
  int64_t next = 1;
  auto at = [&](int64_t row, int64_t i) {
    return neurons ? i * packed.each() + row : packed.factor_of(row, i);
  };
  auto at_super = [&](int64_t row, int64_t i) {
    return neurons ? i * packed.supers_each() + row : packed.super_of(row, i);
  };
  auto lay = [&](const std::vector<uint16_t>& plain, const std::vector<int8_t>& small,
                 const std::vector<uint16_t>& by) {
    if (!type.supers) {
      lay_out(plain, first, count, blocks, held[next++], at);
    } else {
      lay_out(small, first, count, blocks, held[next++], at);
      lay_out(by, first, count, supers, held[next++], at_super);
    }
  };
  lay(parts.scales, parts.small_scales, parts.supers);
  if (type.offsets) lay(parts.offsets, parts.small_offsets, parts.offset_supers);
}

void PackedMatrix::cut(int64_t begin, int64_t end) {
  packed.rows = stored_rows = end - begin;
  int64_t rows = packed.room();
  size_t next = 0;
  auto part = [&](int64_t each) {  // with what is read behind the last row
    Tensor& t = held[next++];
    t = t.narrow(0, begin * each, rows * each + 64);
    return t.mutable_data_ptr();
  };
  packed.levels = static_cast<uint8_t*>(part(packed.pitch));
  for (Factors* factors : {&packed.scales, &packed.offsets}) {
    if (!factors->own) continue;
    factors->own = part(packed.each());
    if (factors->supers) factors->supers = static_cast<uint16_t*>(part(packed.supers_each()));
  }
}

int64_t PackedMatrix::nbytes() const {
  int64_t total = 0;
  for (const Tensor& t : held) total += int64_t(t.nbytes());
  return total;
}

Tensor PackedMatrix::rows(const std::function<int64_t(int64_t)>& id, int64_t count,
                          at::ScalarType as) const {
  TORCH_CHECK(as == at::kFloat || as == at::kBFloat16, "native: weights become float32 or bfloat16");
  Dtype dtype = as == at::kFloat ? Dtype::f32 : Dtype::bf16;
  Tensor found = at::empty({count, packed.columns}, as);
  auto* to = static_cast<uint8_t*>(found.mutable_data_ptr());
  int64_t bytes = packed.columns * int64_t(found.element_size());
  const Kernels& kernels = best();
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.packed.dequantise(packed, id(i), dtype, to + i * bytes);
  });
  return found;
}

// Calls work(first row, rows) for pieces of a matrix that are small beside it, on torch's threads.
template <class Work>
void in_pieces(int64_t rows, int64_t columns, bool whole, const Work& work) {
  int64_t each = whole ? rows : std::max<int64_t>(1, (int64_t(1) << 18) / columns);
  if (whole) return work(int64_t(0), rows);
  at::parallel_for(0, (rows + each - 1) / each, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i * each, std::min(each, rows - i * each));
  });
}

c10::intrusive_ptr<PackedMatrix> from_blocks(const Tensor& blocks, const std::string& name, int64_t rows,
                                             int64_t columns, const std::string& order) {
  const BlockType& type = known(name);
  TORCH_CHECK(rows >= 0 && columns > 0 && columns % type.columns == 0 && blocks.is_contiguous() && blocks.scalar_type() == at::kByte &&
                  blocks.numel() == rows * (columns / type.columns) * type.bytes,
              "native: ", blocks.numel(), " bytes do not hold [", rows, ", ", columns, "] of ", name);
  auto made = c10::make_intrusive<PackedMatrix>(type, rows, columns, order_of(order));
  const uint8_t* from = blocks.const_data_ptr<uint8_t>();
  int64_t pitch = columns / type.columns * type.bytes;
  in_pieces(rows, columns, order == "neurons", [&](int64_t first, int64_t count) {
    made->fill(take_apart(type, from + first * pitch, count, columns), first, count);
  });
  return made;
}

// A matrix of `rows` x `columns` weights as a file would hold them, all 0.
c10::intrusive_ptr<PackedMatrix> packed_zeros(const std::string& name, int64_t rows, int64_t columns,
                                              const std::string& order) {
  const BlockType& type = known(name);
  TORCH_CHECK(columns > 0 && columns % type.columns == 0 && rows >= 0, "native: rows of ", columns, " weights of ", name);
  return c10::make_intrusive<PackedMatrix>(type, rows, columns, order_of(order));
}

// Rounds weights [n, columns] to rows `begin` to `begin` + n of what a file would hold.
void packed_round(const c10::intrusive_ptr<PackedMatrix>& matrix, int64_t begin, const Tensor& weights) {
  const BlockType& type = matrix->type;
  int64_t columns = matrix->stored_columns, rows = weights.size(0);
  TORCH_CHECK(!type.supers && (type.bits == 4 || type.bias == 128), "native: nothing rounds to ", type.name);
  TORCH_CHECK(weights.dim() == 2 && weights.size(1) == columns && begin >= 0 &&
                  begin + rows <= matrix->stored_rows,
              "native: shapes do not fit");
  bool neurons = matrix->packed.order == Order::neurons;
  in_pieces(rows, columns, neurons, [&](int64_t first, int64_t count) {
    Tensor wide = weights.narrow(0, first, count).to(at::kFloat).contiguous();
    matrix->fill(round_to(type, wide.const_data_ptr<float>(), count, columns), begin + first, count);
  });
}

RoundedRows::RoundedRows(const Kernels& kernels, const float* x, int64_t count, int64_t columns)
    : size((columns + UNIT - 1) / UNIT * UNIT), count(count) {
  int64_t each = 2 * Rounded::facts(size);
  levels.resize(size_t(count * size)), scales.resize(size_t(count * each));
  sums.resize(size_t(count * each));
  for (int64_t m = 0; m < count; ++m)
    kernels.packed.round(x + m * columns, columns, levels.data() + m * size, scales.data() + m * each,
                         sums.data() + m * each);
}

// x [M, D] times a matrix of rows: [M, N].
Tensor packed_linear(const Tensor& x, const c10::intrusive_ptr<PackedMatrix>& matrix) {
  const Packed& p = matrix->packed;
  TORCH_CHECK(x.dim() == 2 && x.size(1) == p.columns && p.order != Order::neurons,
              "native: shapes do not fit");
  Tensor wide = x.to(at::kFloat).contiguous();
  const Kernels& kernels = best();
  RoundedRows rounded(kernels, wide.const_data_ptr<float>(), x.size(0), p.columns);
  Tensor y = at::empty({x.size(0), p.rows}, wide.options());
  float* to = y.mutable_data_ptr<float>();
  std::atomic<int64_t> taken{0};
  together([&](int64_t) {
    for (int64_t group; (group = taken++) < PARTS;) {
      Span own = part(p.rows, group, PARTS, TILE);
      kernels.packed.matvec(p, rounded.view(), own.begin, own.end, to, p.rows);
    }
  });
  return y.to(x.scalar_type());
}

// u [M, I], activations of all neurons, through a down projection: [M, D].
Tensor packed_down(const Tensor& u, const c10::intrusive_ptr<PackedMatrix>& matrix) {
  const Packed& p = matrix->packed;
  TORCH_CHECK(p.order == Order::neurons && u.dim() == 2 && u.size(1) == p.rows,
              "native: shapes do not fit");
  Tensor wide = u.to(at::kFloat).contiguous();
  int64_t columns = p.units() * UNIT, count = wide.size(0);
  Tensor parts = at::zeros({PARTS, count, columns}, wide.options());
  Tensor scratch = at::empty({PARTS, columns}, wide.options().dtype(at::kInt));
  const float* values = wide.const_data_ptr<float>();
  float* sums = parts.mutable_data_ptr<float>();
  int32_t* whole = scratch.mutable_data_ptr<int32_t>();
  const Kernels& kernels = best();
  std::atomic<int64_t> taken{0};
  together([&](int64_t) {
    for (int64_t one; (one = taken++) < PARTS;) {
      Span own = part(p.rows, one, PARTS, GROUP);
      int32_t ids[GROUP];
      for (int64_t at = own.begin; at < own.end; at += p.block) {
        int64_t n = std::min<int64_t>(p.block, own.end - at);
        for (int64_t i = 0; i < n; ++i) ids[i] = int32_t(at + i);
        for (int64_t m = 0; m < count; ++m)
          kernels.packed.add_neurons(p, ids, values + m * p.rows + at, n, sums + (one * count + m) * columns,
                                     whole + one * columns);
      }
    }
  });
  return parts.sum(0).narrow(1, 0, p.columns).to(u.scalar_type());
}

// Rows `ids` [n] int64 of a matrix: [n, M] float32 or bfloat16.
Tensor packed_rows(const c10::intrusive_ptr<PackedMatrix>& matrix, const Tensor& ids,
                   at::ScalarType as) {
  const Packed& p = matrix->packed;
  Tensor which = ids.to(at::kLong).contiguous();
  const int64_t* row = which.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < which.numel(); ++i)
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < p.rows, "row ", row[i], " is outside the ", p.rows,
                      " of a weight");
  return matrix->rows([&](int64_t i) { return row[i]; }, which.numel(), as);
}

// Rows begin to end of a matrix, as they are stored.
Tensor packed_span(const c10::intrusive_ptr<PackedMatrix>& matrix, int64_t begin, int64_t end,
                   at::ScalarType as) {
  TORCH_CHECK_INDEX(0 <= begin && begin <= end && end <= matrix->packed.rows, "native: no such rows");
  return matrix->rows([&](int64_t i) { return begin + i; }, end - begin, as);
}

// The same rows, on the same memory.
c10::intrusive_ptr<PackedMatrix> packed_part(const c10::intrusive_ptr<PackedMatrix>& matrix,
                                             int64_t begin, int64_t end) {
  const Packed& p = matrix->packed;
  TORCH_CHECK_INDEX(p.order != Order::neurons && 0 <= begin && begin <= end && end <= p.rows &&
                        (p.order == Order::rows || begin % TILE == 0),
                    "native: no such rows");
  auto made = c10::make_intrusive<PackedMatrix>(*matrix);
  made->cut(begin, end);
  return made;
}

void register_packed(torch::Library& library) {
  library.class_<PackedMatrix>("PackedMatrix")
      .def("by_neurons", [](const c10::intrusive_ptr<PackedMatrix>& one) {
        return one->packed.order == Order::neurons;
      })
      .def("nbytes", [](const c10::intrusive_ptr<PackedMatrix>& one) { return one->nbytes(); })
      .def("parts", [](const c10::intrusive_ptr<PackedMatrix>& one) { return one->held; })
      .def("type", [](const c10::intrusive_ptr<PackedMatrix>& one) { return one->name; })
      .def("shape", [](const c10::intrusive_ptr<PackedMatrix>& one) {
        return std::vector<int64_t>{one->packed.rows, one->packed.columns};
      });
  library.def("packed_from_blocks", from_blocks);
  library.def("packed_zeros", packed_zeros);
  library.def("packed_round", packed_round);
  library.def("packed_linear", packed_linear);
  library.def("packed_down", packed_down);
  library.def("packed_rows", packed_rows);
  library.def("packed_span", packed_span);
  library.def("packed_part", packed_part);
}

}  // namespace dart
