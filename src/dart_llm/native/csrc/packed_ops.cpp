// Packed matrices as torch operators.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "huge_room.h"
#include "packed_ops.h"
#include "prompt.h"
#include "threads.h"

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
    held.push_back(HugeRoom::zeros(count + 64, of));
    return held.back().mutable_data_ptr();
  };
  packed.levels = static_cast<uint8_t*>(room(packed.room() * packed.pitch, at::kByte));
  int64_t lines = neurons ? (columns + type.block - 1) / type.block : packed.room();
  int64_t above = neurons ? (columns + SUPER - 1) / SUPER : packed.room();
  auto factors = [&] {
    Factors f{room(lines * packed.each(), type.supers ? at::kChar : at::kHalf), nullptr};
    if (type.supers) f.supers = static_cast<uint16_t*>(room(above * packed.supers_each(), at::kHalf));
    return f;
  };
  packed.scales = factors();
  if (type.offsets) packed.offsets = factors();
}

void PackedMatrix::fill(const Parts& parts, int64_t first, int64_t count) {
  bool neurons = packed.order == Order::neurons;
  auto* levels = held[0].mutable_data_ptr<uint8_t>();
  auto write = [&](const uint8_t* from, int64_t row) { write_levels(packed, row, from, levels); };
  if (neurons) {
    TORCH_CHECK(first == 0 && count == stored_rows, "native: neurons are laid out at once");
    at::parallel_for(0, (packed.rows + 63) / 64, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> rotary(size_t(64 * count));
      for (int64_t some = begin * 64; some < std::min(end * 64, packed.rows); some += 64) {
        int64_t n = std::min<int64_t>(64, packed.rows - some);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < n; ++j)
            rotary[size_t(j * count + i)] = parts.levels[size_t(i * stored_columns + some + j)];
        for (int64_t j = 0; j < n; ++j) write(rotary.data() + j * count, some + j);
      }
    });
  } else {
    for (int64_t row = 0; row < count; ++row) write(parts.levels.data() + row * stored_columns, first + row);
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

// Calls with(place in `held`, values of a row) for the levels, and the factors of blocks along a row.
template <class With>
void each_held(const PackedMatrix& of, const With& with) {
  size_t next = 0;
  with(next++, of.packed.pitch);
  for (const Factors* factors : {&of.packed.scales, &of.packed.offsets}) {
    if (!factors->own) continue;
    with(next++, of.packed.each());
    if (factors->supers) with(next++, of.packed.supers_each());
  }
}

// The pointers of a matrix that holds other tensors now.
void point(PackedMatrix& to) {
  size_t next = 0;
  auto* p = &to.packed;
  p->levels = static_cast<uint8_t*>(to.held[next++].mutable_data_ptr());
  for (Factors* factors : {&p->scales, &p->offsets}) {
    if (!factors->own) continue;
    factors->own = to.held[next++].mutable_data_ptr();
    if (factors->supers) factors->supers = static_cast<uint16_t*>(to.held[next++].mutable_data_ptr());
  }
}

void PackedMatrix::cut(int64_t begin, int64_t end) {
  packed.rows = stored_rows = end - begin;
  shared = true;
  each_held(*this, [&](size_t which, int64_t per_row) {  // with what is read behind the last row
    held[which] = held[which].narrow(0, begin * per_row, packed.room() * per_row + 64);
  });
  point(*this);
}

int64_t PackedMatrix::nbytes() const {
  int64_t total = 0;
  for (const Tensor& t : held) total += int64_t(t.nbytes());
  return packed.fours ? int64_t(held[0].nbytes()) : total;
}

Dtype dequantised(at::ScalarType as) {
  TORCH_CHECK(as == at::kFloat || as == at::kBFloat16, "native: weights become float32 or bfloat16");
  return as == at::kFloat ? Dtype::f32 : Dtype::bf16;
}

Tensor PackedMatrix::rows(const std::function<int64_t(int64_t)>& id, int64_t count, at::ScalarType as) const {
  TORCH_CHECK(!packed.kept, "native: kept neurons are no matrix of a model");
  Dtype dtype = dequantised(as);
  Tensor found = at::empty({count, packed.columns}, as);
  auto* to = static_cast<uint8_t*>(found.mutable_data_ptr());
  int64_t bytes = packed.columns * int64_t(found.element_size());
  const Kernels& kernels = best();
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.packed.dequantise(packed, id(i), 1, dtype, to + i * bytes);
  });
  return found;
}

// Rows `begin` to `end` of a matrix.
struct Rows {
  const Packed* matrix;
  int64_t begin, end;

  int64_t first() const { return begin / TILE; }
  int64_t tiles() const { return (end + TILE - 1) / TILE - first(); }
};

// to = rows one after the other, dequantised on torch's threads.
void dequantise(const std::vector<Rows>& all, const Tensor& to) {
  Dtype dtype = dequantised(to.scalar_type());
  auto* start = static_cast<uint8_t*>(to.mutable_data_ptr());
  int64_t bytes = int64_t(to.element_size()), tiles = 0;
  for (const Rows& one : all) tiles += one.tiles();
  const Kernels& kernels = best();
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    uint8_t* own = start;
    int64_t before = 0;
    for (const Rows& one : all) {
      int64_t from = std::max(first - before, int64_t(0)), till = std::min(last - before, one.tiles());
      int64_t row = std::max(one.begin, (one.first() + from) * TILE);
      int64_t end = std::min(one.end, (one.first() + till) * TILE), each = one.matrix->columns * bytes;
      if (from < till)
        kernels.packed.dequantise(*one.matrix, row, end - row, dtype, own + (row - one.begin) * each);
      own += (one.end - one.begin) * each, before += one.tiles();
    }
  });
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
  TORCH_CHECK(rows >= 0 && columns > 0 && columns % type.columns == 0 && blocks.is_contiguous() &&
                  blocks.scalar_type() == at::kByte &&
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
  TORCH_CHECK(columns > 0 && columns % type.columns == 0 && rows >= 0, "native: rows of ", columns,
              " weights of ", name);
  return c10::make_intrusive<PackedMatrix>(type, rows, columns, order_of(order));
}

// Rounds weights [n, columns] to rows `begin` to `begin` + n of what a file would hold.
void packed_round(const c10::intrusive_ptr<PackedMatrix>& matrix, int64_t begin, const Tensor& weights) {
  const BlockType& type = matrix->type;
  int64_t columns = matrix->stored_columns, rows = weights.size(0);
  TORCH_CHECK(!type.supers && (type.bits == 4 || type.bias == 128), "native: nothing rounds to ", type.name);
  TORCH_CHECK(
      weights.dim() == 2 && weights.size(1) == columns && begin >= 0 && begin + rows <= matrix->stored_rows,
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
    kernels.packed.round(x + m * columns, 0, columns, columns, levels.data() + m * size,
                         scales.data() + m * each, sums.data() + m * each);
}

// x [M, D] times the rows of matrices: [M, all outputs].
Tensor times_lots(const Tensor& x, const std::vector<const Packed*>& all) {
  const Kernels& kernels = best();
  Tensor wide = x.to(at::kFloat).contiguous();
  int64_t count = x.size(0), columns = x.size(1), outputs = 0;
  std::vector<LotsProduct> products;
  for (const Packed* one : all) {
    products.emplace_back(*one);
    outputs += products.back().outputs;
  }
  RoundedLots rounded(kernels, count, columns);
  Tensor y = at::empty({count, outputs}, wide.options());
  const float* from = wide.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  Jobs jobs(int64_t(products.size()) + 1);
  run_on_threads([&](int64_t) {
    Worker team(jobs);
    team.in_parts(std::min(count, PARTS), [&](int64_t one, int64_t parts) {
      Span own = part(count, one, parts, 1);
      for (int64_t m = own.begin; m < own.end; ++m)
        kernels.packed.round_lot(from + m * columns, columns, rounded.view, m);
    });
    team.finish();
    int64_t column = 0;
    for (const LotsProduct& one : products) {
      team.in_parts(one.parts, [&](int64_t index, int64_t) {
        one.run(kernels, rounded.view, index, to + column, outputs);
      });
      column += one.outputs;
    }
    team.finish();
  });
  return y.to(x.scalar_type());
}

// x [M, D] times a matrix of rows: [M, N].
Tensor times_few(const Tensor& x, const Packed& p) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == p.columns && p.order != Order::neurons,
              "native: shapes do not fit");
  Tensor wide = x.to(at::kFloat).contiguous();
  const Kernels& kernels = best();
  RoundedRows rounded(kernels, wide.const_data_ptr<float>(), x.size(0), p.columns);
  Tensor y = at::empty({x.size(0), p.rows}, wide.options());
  float* to = y.mutable_data_ptr<float>();
  std::atomic<int64_t> taken{0};
  run_on_threads([&](int64_t) {
    for (int64_t group; (group = taken++) < PARTS;) {
      Span own = part(p.rows, group, PARTS, TILE);
      kernels.packed.matvec(p, rounded.view(), own.begin, own.end, to, p.rows);
    }
  });
  return y.to(x.scalar_type());
}

Tensor packed_linear(const Tensor& x, const c10::intrusive_ptr<PackedMatrix>& matrix) {
  return times_few(x, matrix->packed);
}

// u [M, I], activations of all neurons, through a down projection by neurons: [M, D].
Tensor packed_down(const Tensor& u, const c10::intrusive_ptr<PackedMatrix>& matrix) {
  const Packed& p = matrix->packed;
  TORCH_CHECK(p.order == Order::neurons && u.dim() == 2 && u.size(1) == p.rows, "native: shapes do not fit");
  Tensor wide = u.to(at::kFloat).contiguous();
  int64_t columns = p.units() * UNIT, count = wide.size(0);
  Tensor parts = at::zeros({PARTS, count, columns}, wide.options());
  const float* values = wide.const_data_ptr<float>();
  float* sums = parts.mutable_data_ptr<float>();
  const Kernels& kernels = best();
  std::atomic<int64_t> taken{0};
  run_on_threads([&](int64_t) {
    for (int64_t one; (one = taken++) < PARTS;) {
      Span own = part(p.rows, one, PARTS, GROUP);
      int32_t ids[GROUP];
      for (int64_t at = own.begin; at < own.end; at += p.block) {
        int64_t n = std::min<int64_t>(p.block, own.end - at);
        for (int64_t i = 0; i < n; ++i) ids[i] = int32_t(at + i);
        for (int64_t m = 0; m < count; ++m)
          kernels.packed.add_neurons(p, ids, values + m * p.rows + at, n, sums + (one * count + m) * columns);
      }
    }
  });
  return parts.sum(0).narrow(1, 0, p.columns).to(u.scalar_type()).contiguous();
}

// Rows `ids` [n] int64 of a matrix: [n, M] float32 or bfloat16.
Tensor packed_rows(const c10::intrusive_ptr<PackedMatrix>& matrix, const Tensor& ids, at::ScalarType as) {
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
  dequantised(as);
  Tensor found = at::empty({end - begin, matrix->packed.columns}, as);
  dequantise({{&matrix->packed, begin, end}}, found);
  return found;
}

// Room for `rows` dequantised rows that are soon read: the same at every call of a thread, for new
// memory costs more than what is written to it.
Tensor room_for(int64_t rows, int64_t columns, at::ScalarType as) {
  thread_local Tensor kept[2];
  Tensor& own = kept[as == at::kFloat];
  if (!own.defined() || own.numel() < rows * columns) {
    c10::InferenceMode mode(false);
    own = at::empty({rows * columns}, as);
  }
  return own.narrow(0, 0, rows * columns).view({rows, columns});
}

constexpr int64_t PIECE = 1 << 20;  // weights that are dequantised at a time: they stay in the caches

// Calls work(rows, their number) for pieces of at most PIECE weights.
template <class Work>
void by_pieces(const std::vector<const Packed*>& all, const Work& work) {
  int64_t most = std::max<int64_t>(1, PIECE / all[0]->columns / TILE) * TILE, held = 0;
  std::vector<Rows> piece;
  for (const Packed* matrix : all)
    for (int64_t begin = 0, count; begin < matrix->rows; begin += count, held += count) {
      if (held + TILE > most) work(piece, held), piece.clear(), held = 0;
      count = std::min((most - held) / TILE * TILE, matrix->rows - begin);
      piece.push_back({matrix, begin, begin + count});
    }
  work(piece, held);
}

// The rows in a dtype, until the next call of a thread.
Tensor dequantised(const std::vector<Rows>& rows, int64_t count, int64_t columns, at::ScalarType as) {
  Tensor found = room_for(count, columns, as == at::kBFloat16 ? as : at::kFloat);
  dequantise(rows, found);
  return found.to(as);
}

// The dtype in which many rows are multiplied: without bfloat16 arithmetic in the CPU torch's
// products of it take six times as long as float32's.
at::ScalarType product_dtype(const Tensor& x) {
  static const bool fast = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mkldnn::_is_mkldnn_bf16_supported", "")
                               .typed<bool()>()
                               .call();
  return x.scalar_type() == at::kBFloat16 && !fast ? at::kFloat : x.scalar_type();
}

Tensor times_rows(const Tensor& x, const std::vector<const Packed*>& all, int64_t few) {
  for (const Packed* one : all)
    TORCH_CHECK(x.dim() == 2 && x.size(1) == one->columns, "native: shapes do not fit");
  std::vector<Tensor> found;
  bool on_blocks = all[0]->order != Order::neurons && x.size(0) <= few;
  if (on_blocks && x.size(0) > 1) return times_lots(x, all);
  if (on_blocks) {
    for (const Packed* one : all) found.push_back(times_few(x, *one));
  } else {
    Tensor own = x.to(product_dtype(x));
    by_pieces(all, [&](const std::vector<Rows>& rows, int64_t n) {
      Tensor part = at::mm(own, dequantised(rows, n, x.size(1), own.scalar_type()).t());
      found.push_back(part.to(x.scalar_type()));
    });
  }
  return found.size() == 1 ? found[0] : at::cat(found, 1);
}

// x [M, rows] times the matrix as it is stored: [M, columns].
Tensor times_stored(const Tensor& x, const Packed& p) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == p.rows, "native: shapes do not fit");
  Tensor sum, whole = x.to(product_dtype(x));
  by_pieces({&p}, [&](const std::vector<Rows>& rows, int64_t n) {
    Tensor own = rows.empty() ? whole : whole.narrow(1, rows[0].begin, n);
    Tensor part = at::mm(own, dequantised(rows, n, p.columns, own.scalar_type()));
    sum = sum.defined() ? sum.add_(part) : part;
  });
  return sum.to(x.scalar_type());
}

Tensor packed_product(const Tensor& x, const c10::intrusive_ptr<PackedMatrix>& matrix, bool rotary,
                      int64_t few) {
  return rotary ? times_rows(x, {&matrix->packed}, few) : times_stored(x, matrix->packed);
}

// The same rows, on the same memory.
c10::intrusive_ptr<PackedMatrix> packed_part(const c10::intrusive_ptr<PackedMatrix>& matrix, int64_t begin,
                                             int64_t end) {
  const Packed& p = matrix->packed;
  TORCH_CHECK_INDEX(p.order != Order::neurons && 0 <= begin && begin <= end && end <= p.rows &&
                        (p.order == Order::rows || begin % TILE == 0),
                    "native: no such rows");
  auto made = c10::make_intrusive<PackedMatrix>(*matrix);
  made->cut(begin, end);
  return made;
}

// What is copied of kept rows in tiles: values of `size` bytes, `per_row` of them in a row.
struct Kept {
  const char* from;
  char* to;
  int64_t per_row, size;
};

// to[tile] = rows ids[16 tile] to ids[16 tile + 15] of `from`, both in tiles.
template <class T>
void gather_tile(const Kept& kept, const int32_t* id, int64_t n, int64_t tile) {
  const T* lanes[TILE];
  for (int64_t r = 0; r < TILE; ++r) {
    int64_t row = id[std::min(tile * TILE + r, n - 1)];
    lanes[r] = reinterpret_cast<const T*>(kept.from) + row / TILE * TILE * kept.per_row + row % TILE;
  }
  T* own = reinterpret_cast<T*>(kept.to) + tile * TILE * kept.per_row;
  for (int64_t k = 0; k < kept.per_row * TILE; k += TILE)
    for (int64_t r = 0; r < TILE; ++r) own[k + r] = lanes[r][k];
}

void gather(const Kept& kept, const int32_t* id, int64_t n, int64_t tile) {
  if (kept.size == 4) gather_tile<uint32_t>(kept, id, n, tile);
  else if (kept.size == 2) gather_tile<uint16_t>(kept, id, n, tile);
  else gather_tile<uint8_t>(kept, id, n, tile);
}

using Packs = c10::intrusive_ptr<PackedMatrix>;

// A copy of kept rows or columns, empty as yet: on the memory of `old` for what it is enough for.
struct Room {
  HugeRoom& room;
  const PackedMatrix* old;

  // At least so many values; `wanted` of them where memory is taken anew.
  Tensor take(size_t which, int64_t values, int64_t wanted, at::ScalarType of) const {
    bool enough = old && old->held.at(which).numel() >= values;
    return enough ? old->held[which] : room.take(wanted, of);
  }
};

// Memory for `n` rows of a matrix; adds what is to be copied to it.
Packs room_for_rows(const Packs& matrix, int64_t n, const Room& room, std::vector<Kept>& all) {
  auto made = c10::make_intrusive<PackedMatrix>(*matrix);
  made->shared = false;
  made->packed.kept = true;
  made->packed.rows = made->stored_rows = n;
  each_held(*matrix, [&](size_t which, int64_t per_row) {
    const Tensor& source = matrix->held[which];
    int64_t needed = made->packed.room() * per_row + 64, size = which ? source.element_size() : 4;
    made->held[which] = room.take(which, needed, needed, source.scalar_type());
    all.push_back({static_cast<const char*>(source.const_data_ptr()),
                   static_cast<char*>(made->held[which].mutable_data_ptr()), which ? per_row : per_row / 4,
                   size});
  });
  point(*made);
  return made;
}

// Memory for kept columns.
Packs room_for_columns(const Packs& matrix, const std::shared_ptr<KeptColumns>& columns, const Room& room) {
  auto made = c10::make_intrusive<PackedMatrix>(*matrix);
  made->shared = false;
  made->packed.kept = true;
  made->packed.pitch = columns->pitch();
  // room for masks of as many columns that fill their fours less well
  int64_t rows = made->packed.room(), pitch = columns->pitch();
  made->held[0] = room.take(0, rows * pitch + 64,
                            rows * std::min(pitch + pitch / 8, matrix->packed.pitch) + 64, at::kByte);
  made->columns = columns;
  made->packed.fours = columns->fours().data(), made->packed.places = columns->places().data();
  made->packed.kept_columns = int64_t(columns->places().size());
  point(*made);
  return made;
}

// Compact weights of neurons `ids` (int32, ascending): rows of matrices, and columns of a down projection,
// or None, whose factors stay where they are; all in tiles.  `old`: none, or earlier ones out of the same
// matrices, whose memory is taken over where it is enough; nobody may use these any more.  Other memory is
// that of `room`.
std::vector<Packs> packed_kept(const std::vector<Packs>& matrices, const std::optional<Packs>& down,
                               const Tensor& ids, const std::vector<Packs>& old,
                               const c10::intrusive_ptr<HugeRoom>& room) {
  size_t count = matrices.size() + (down ? 1 : 0);
  TORCH_CHECK(ids.scalar_type() == at::kInt && ids.is_contiguous() && ids.numel() > 0 && count &&
                  (old.empty() || old.size() == count),
              "native: these neurons cannot be copied");
  const int32_t* id = ids.const_data_ptr<int32_t>();
  int64_t n = ids.numel(), width = down ? (*down)->packed.columns : matrices[0]->packed.rows;
  auto check = [&](const Packed& one, int64_t neurons) {
    TORCH_CHECK(one.order == Order::tiles && !one.kept && neurons == width,
                "native: these neurons cannot be copied");
  };
  for (const Packs& one : matrices) check(one->packed, one->packed.rows);
  if (down) check((*down)->packed, width);
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_INDEX(id[i] >= (i ? id[i - 1] + 1 : 0) && id[i] < width, "native: no such neurons");
  std::vector<Packs> made;
  std::vector<Kept> all;
  auto room_of = [&](size_t i) { return Room{*room, old.empty() ? nullptr : old[i].get()}; };
  for (size_t i = 0; i < matrices.size(); ++i) made.push_back(room_for_rows(matrices[i], n, room_of(i), all));
  constexpr int64_t SOME = 8;  // tiles of rows that a thread takes at a time
  int64_t tiles = (n + TILE - 1) / TILE, steps = (tiles + SOME - 1) / SOME,
          of_rows = int64_t(all.size()) * steps;
  std::shared_ptr<KeptColumns> columns;
  uint8_t* levels = nullptr;
  if (down) {
    columns = std::make_shared<KeptColumns>((*down)->packed, id, n);
    made.push_back(room_for_columns(*down, columns, room_of(matrices.size())));
    levels = made.back()->held[0].mutable_data_ptr<uint8_t>();
  }
  int64_t of_columns = down ? (*down)->packed.room() / TILE : 0;
  std::atomic<int64_t> taken{0};
  run_on_threads([&](int64_t) {
    for (int64_t step; (step = taken++) < of_rows + of_columns;) {
      if (step >= of_rows) {
        columns->copy_tile(step - of_rows, levels);
        continue;
      }
      int64_t first = step % steps * SOME;
      for (int64_t tile = first; tile < std::min(first + SOME, tiles); ++tile)
        gather(all[size_t(step / steps)], id, n, tile);
    }
  });
  return made;
}

// What a matrix in tiles or rows was made of.
Parts parts_of(const Packed& p, const BlockType& type) {
  Parts parts;
  parts.levels.resize(size_t(p.rows * p.columns));
  for (int64_t row = 0; row < p.rows; ++row) read_levels(p, row, parts.levels.data() + row * p.columns);
  auto read = [&](auto& to, const void* from, int64_t each, const auto& place) {
    using T = typename std::decay_t<decltype(to)>::value_type;
    for (int64_t row = 0; from && row < p.rows; ++row)
      for (int64_t i = 0; i < each; ++i) to.push_back(static_cast<const T*>(from)[place(row, i)]);
  };
  auto at = [&](int64_t row, int64_t i) { return p.factor_of(row, i); };
  auto at_super = [&](int64_t row, int64_t i) { return p.super_of(row, i); };
  int64_t blocks = p.columns / type.block, supers = p.columns / SUPER;
  read(parts.supers, p.scales.supers, supers, at_super);
  read(parts.offset_supers, p.offsets.supers, supers, at_super);
  if (type.supers) {
    read(parts.small_scales, p.scales.own, blocks, at), read(parts.small_offsets, p.offsets.own, blocks, at);
  } else {
    read(parts.scales, p.scales.own, blocks, at), read(parts.offsets, p.offsets.own, blocks, at);
  }
  return parts;
}

// Lays out the rows of a tile anew: `from` is on a copy of their memory.
void turn_tile(const Packed& from, int64_t first, PackedMatrix& to) {
  const Packed& p = to.packed;
  std::vector<uint8_t> levels(size_t(p.columns));
  auto factors = [&](const Factors& old, const Factors& now, int64_t row) {
    auto move = [&](auto* type, const void* source, const void* place, int64_t at, int64_t where) {
      using T = std::remove_pointer_t<decltype(type)>;
      const_cast<T*>(static_cast<const T*>(place))[where] = static_cast<const T*>(source)[at];
    };
    for (int64_t b = 0; old.own && b < p.each(); ++b) {
      int64_t at = from.factor_of(row, b), where = p.factor_of(first + row, b);
      if (old.supers) move(static_cast<uint8_t*>(nullptr), old.own, now.own, at, where);
      else move(static_cast<uint16_t*>(nullptr), old.own, now.own, at, where);
    }
    for (int64_t b = 0; old.supers && b < p.supers_each(); ++b)
      move(static_cast<uint16_t*>(nullptr), old.supers, now.supers, from.super_of(row, b),
           p.super_of(first + row, b));
  };
  for (int64_t row = 0; row < TILE && first + row < p.rows; ++row) {
    read_levels(from, row, levels.data());
    write_levels(p, first + row, levels.data(), const_cast<uint8_t*>(p.levels));
    factors(from.scales, p.scales, row), factors(from.offsets, p.offsets, row);
  }
}

// A matrix of rows or tiles in the order asked for: in its own memory, or a copy, as must be of what
// lies on another's, and for the order of neurons.
c10::intrusive_ptr<PackedMatrix> packed_turned(const c10::intrusive_ptr<PackedMatrix>& matrix,
                                               const std::string& name, bool copied) {
  Order order = order_of(name), before = matrix->packed.order;
  if (order == before) return matrix;
  TORCH_CHECK((order != Order::neurons || copied) && before != Order::neurons && !matrix->packed.kept,
              "native: this matrix has one order");
  auto to = matrix;
  if (order == Order::neurons) {
    int64_t rows = matrix->packed.rows, columns = matrix->packed.columns;
    to = c10::make_intrusive<PackedMatrix>(matrix->type, rows, columns, order);
    to->fill(parts_of(matrix->packed, matrix->type), 0, rows);
    return to;
  }
  if (matrix->shared || copied)
    to = c10::make_intrusive<PackedMatrix>(matrix->type, matrix->stored_rows, matrix->stored_columns, order);
  to->packed.order = order;
  at::parallel_for(0, to->packed.room() / TILE, 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      PackedMatrix copy = *matrix;
      copy.packed.order = before;
      each_held(*matrix, [&](size_t which, int64_t per_row) {
        copy.held[which] = matrix->held[which].narrow(0, tile * TILE * per_row, TILE * per_row).clone();
        to->held[which].narrow(0, tile * TILE * per_row, TILE * per_row).zero_();  // rows that are none
      });
      point(copy);
      turn_tile(copy.packed, tile * TILE, *to);
    }
  });
  return to;
}

// The same in memory of its own.
c10::intrusive_ptr<PackedMatrix> packed_copy(const c10::intrusive_ptr<PackedMatrix>& matrix) {
  auto made = c10::make_intrusive<PackedMatrix>(*matrix);
  for (Tensor& one : made->held) one = one.clone();
  made->shared = false;
  point(*made);
  return made;
}

void register_packed(torch::Library& library) {
  register_rooms(library);
  library.class_<PackedMatrix>("PackedMatrix")
      .def("nbytes", [](const c10::intrusive_ptr<PackedMatrix>& one) { return one->nbytes(); })
      .def("parts", [](const c10::intrusive_ptr<PackedMatrix>& one) { return one->held; })
      .def("order",
           [](const c10::intrusive_ptr<PackedMatrix>& one) {
             return std::string(one->packed.order == Order::rows    ? "rows"
                                : one->packed.order == Order::tiles ? "tiles"
                                                                    : "neurons");
           })
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
  library.def("packed_kept", packed_kept);
  library.def("packed_turned", packed_turned);
  library.def("packed_copy", packed_copy);
  library.def("packed_product", packed_product);
  library.def("packed_few", []() { return best().packed.few; });
}

}  // namespace dart
