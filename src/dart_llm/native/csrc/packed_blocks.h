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

}  // namespace dart
