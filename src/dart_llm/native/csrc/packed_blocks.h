// Blocks as GGUF files hold them, and rounding to such blocks.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "packed.h"

namespace dart {

// One type of block.  levels: 4 or 8 bits are kept of a level, whatever the file takes.
struct BlockType {
  const char* name;
  int64_t columns, bytes;  // of one block in the file
  int bits, block, bias;   // of what is kept: see Packed
  bool supers, offsets;
};

// The type of that name (q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k), or null.
const BlockType* block_type(const std::string& name);

// Rows of blocks taken apart; [rows, .] each.  Levels in the order of columns.
struct Parts {
  std::vector<uint8_t> levels;                      // [rows, columns]
  std::vector<uint16_t> scales, offsets;            // float16 [rows, blocks], without supers
  std::vector<int8_t> small_scales, small_offsets;  // [rows, blocks], with supers
  std::vector<uint16_t> supers, offset_supers;      // float16 [rows, SUPER blocks]
};

// columns: a multiple of the type's.
Parts take_apart(const BlockType&, const uint8_t* blocks, int64_t rows, int64_t columns);

// Rounds as llama.cpp does: q8_0, q4_0 and q4_1 alone.
Parts round_to(const BlockType&, const float* weights, int64_t rows, int64_t columns);

// Writes the levels [columns] of a row to those of a matrix; missing columns are at its bias.
void write_levels(const Packed&, int64_t row, const uint8_t* levels, uint8_t* matrix);
// levels [columns] = those of a row.
void read_levels(const Packed&, int64_t row, uint8_t* levels);

// Kept columns of a matrix in tiles, and how packed.h lays out a copy of them.
class KeptColumns {
 public:
  // ids: ascending.  The matrix is read by copy_tile() again.
  KeptColumns(const Packed&, const int32_t* ids, int64_t n);
  const std::vector<uint8_t>& fours() const { return fours_; }
  const std::vector<int32_t>& places() const { return places_; }
  int64_t pitch() const { return int64_t(sources_[0].size()); }  // of the copy
  // Copies the levels of one tile to a matrix of this pitch.
  void copy_tile(int64_t tile, uint8_t* to) const;

 private:
  // Where the levels of a column are, in the first row of a tile: the word of its four, and their bits.
  struct Source {
    int64_t word;
    int shift;
  };
  Source source_of(int64_t column) const;

  Packed from_;
  std::vector<Source> sources_[2];  // of columns, four to a four, and of those that share their bytes
  std::vector<uint8_t> fours_;
  std::vector<int32_t> places_;
};

}  // namespace dart
