#include "packed_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels_common.h"

namespace dart {
namespace {

const BlockType TYPES[] = {
    {"q8_0", 32, 34, 8, 32, 128, false, false}, {"q4_0", 32, 18, 4, 32, 8, false, false},
    {"q4_1", 32, 20, 4, 32, 0, false, true},    {"q5_0", 32, 22, 8, 32, 16, false, false},
    {"q5_1", 32, 24, 8, 32, 0, false, true},    {"q4_k", 256, 144, 4, 32, 0, true, true},
    {"q5_k", 256, 176, 8, 32, 0, true, true},   {"q6_k", 256, 210, 8, 16, 32, true, false},
};

uint16_t half_at(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return half;
}

// Rounded to the nearest float16, ties to even.
uint16_t to_half(float x) {
  uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (rest < 0x38800000u) return uint16_t(sign | uint32_t(std::lrint(from_bits(rest) * 0x1p24f)));
  uint32_t odd = rest >> 13 & 1;
  return uint16_t(sign | ((rest + 0xfffu + odd - (112u << 23)) >> 13));
}

// 32 columns of two levels a byte, column j beside column j + 16.
void nibbles(const uint8_t* bytes, uint8_t* to) {
  for (int j = 0; j < 16; ++j) to[j] = bytes[j] & 15, to[j + 16] = bytes[j] >> 4;
}

void fifth_bits(const uint8_t* bytes, uint8_t* to) {
  uint32_t bits;
  std::memcpy(&bits, bytes, 4);
  for (int j = 0; j < 32; ++j) to[j] |= uint8_t((bits >> j & 1) << 4);
}

// Scale and offset of one of the eight blocks of q4_k and q5_k, of 6 bits each.
void six_bits(const uint8_t* from, int block, int8_t* scale, int8_t* offset) {
  if (block < 4) {
    *scale = int8_t(from[block] & 63), *offset = int8_t(from[block + 4] & 63);
  } else {
    *scale = int8_t((from[block + 4] & 15) | (from[block - 4] >> 6) << 4);
    *offset = int8_t((from[block + 4] >> 4) | (from[block] >> 6) << 4);
  }
}

struct Reader {
  const BlockType& type;
  Parts& parts;

  void plain(const uint8_t* from, int64_t index, uint8_t* levels) {
    parts.scales[index] = half_at(from);
    from += 2;
    if (type.offsets) parts.offsets[index] = half_at(from), from += 2;
    if (type.bits == 8 && type.bias == 128) {
      for (int j = 0; j < 32; ++j) levels[j] = uint8_t(from[j] ^ 128);
      return;
    }
    bool five = type.bits == 8;
    nibbles(from + (five ? 4 : 0), levels);
    if (five) fifth_bits(from, levels);
  }

  void k45(const uint8_t* from, int64_t index, uint8_t* levels) {
    parts.supers[index] = half_at(from);
    parts.offset_supers[index] = half_at(from + 2) ^ 0x8000u;
    bool five = type.bits == 8;
    const uint8_t *high = from + 16, *low = from + (five ? 48 : 16);
    for (int block = 0; block < 8; ++block) {
      six_bits(from + 4, block, &parts.small_scales[index * 8 + block],
               &parts.small_offsets[index * 8 + block]);
      for (int j = 0; j < 32; ++j) {
        int both = low[block / 2 * 32 + j], level = block % 2 ? both >> 4 : both & 15;
        if (five) level |= (high[j] >> block & 1) << 4;
        levels[block * 32 + j] = uint8_t(level);
      }
    }
  }

  void k6(const uint8_t* from, int64_t index, uint8_t* levels) {
    for (int column = 0; column < 256; ++column) {
      int half = column / 128, part = column % 128 / 32, j = column % 32;
      int low = from[half * 64 + part % 2 * 32 + j];
      int high = from[128 + half * 32 + j] >> (2 * part) & 3;
      levels[column] = uint8_t((part < 2 ? low & 15 : low >> 4) | high << 4);
    }
    std::memcpy(&parts.small_scales[index * 16], from + 192, 16);
    parts.supers[index] = half_at(from + 208);
  }

  void read(const uint8_t* from, int64_t index, uint8_t* levels) {
    if (!type.supers) plain(from, index, levels);
    else if (type.block == 16) k6(from, index, levels);
    else k45(from, index, levels);
  }
};

Parts room(const BlockType& type, int64_t rows, int64_t columns) {
  Parts parts;
  size_t blocks = size_t(rows * (columns / type.block));
  parts.levels.resize(size_t(rows * columns));
  if (type.supers) {
    parts.small_scales.resize(blocks), parts.supers.resize(size_t(rows * (columns / SUPER)));
    if (type.offsets) parts.small_offsets.resize(blocks), parts.offset_supers.resize(parts.supers.size());
  } else {
    parts.scales.resize(blocks);
    if (type.offsets) parts.offsets.resize(blocks);
  }
  return parts;
}

void round_block(const BlockType& type, const float* x, uint16_t* scale, uint16_t* offset, uint8_t* levels) {
  float most = 0, signed_most = 0, low = x[0], high = x[0];
  for (int j = 0; j < 32; ++j) {
    if (std::fabs(x[j]) > most) most = std::fabs(x[j]), signed_most = x[j];
    low = std::min(low, x[j]), high = std::max(high, x[j]);
  }
  float step = type.bits == 8 ? most / 127 : type.offsets ? (high - low) / 15 : signed_most / -8;
  float back = step ? 1 / step : 0;
  *scale = to_half(step);
  if (offset) *offset = to_half(low);
  for (int j = 0; j < 32; ++j) {
    int level = type.bits == 8 ? int(std::round(x[j] * back)) + 128
                : type.offsets ? int((x[j] - low) * back + 0.5f)
                               : int(x[j] * back + 8.5f);
    levels[j] = uint8_t(std::min(level, type.bits == 8 ? 255 : 15));
  }
}

}  // namespace

const BlockType* block_type(const std::string& name) {
  for (const BlockType& one : TYPES)
    if (name == one.name) return &one;
  return nullptr;
}

Parts take_apart(const BlockType& type, const uint8_t* blocks, int64_t rows, int64_t columns) {
  Parts parts = room(type, rows, columns);
  Reader reader{type, parts};
  for (int64_t index = 0; index < rows * (columns / type.columns); ++index)
    reader.read(blocks + index * type.bytes, index, parts.levels.data() + index * type.columns);
  return parts;
}

Parts round_to(const BlockType& type, const float* weights, int64_t rows, int64_t columns) {
  Parts parts = room(type, rows, columns);
  for (int64_t index = 0; index < rows * (columns / 32); ++index)
    round_block(type, weights + index * 32, &parts.scales[index],
                type.offsets ? &parts.offsets[index] : nullptr, parts.levels.data() + index * 32);
  return parts;
}

namespace {

// Of one unit of a row of Order::tiles; `to`: where the tile's unit begins.
void write_in_tile(const uint8_t* own, int bits, int64_t row, uint8_t* to) {
  uint8_t bytes[UNIT];
  std::memcpy(bytes, own, UNIT);
  if (bits == 4)
    for (int64_t c = 0; c < UNIT / 2; ++c) bytes[c] = uint8_t(own[c] | own[c + UNIT / 2] << 4);
  for (int64_t four = 0; four < UNIT * bits / 32; ++four)
    std::memcpy(to + (four * TILE + row % TILE) * 4, bytes + 4 * four, 4);
}

}  // namespace

void write_levels(const Packed& p, int64_t row, const uint8_t* levels, uint8_t* matrix) {
  uint8_t* to = matrix + row * p.pitch;
  for (int64_t unit = 0; unit < p.units(); ++unit) {
    uint8_t own[UNIT];
    for (int64_t c = 0; c < UNIT; ++c) {
      int64_t at = unit * UNIT + c;
      own[place_of(p.order, c)] = at < p.columns ? levels[at] : uint8_t(p.bias);
    }
    if (p.order == Order::tiles) {
      int64_t bytes = TILE * UNIT * p.bits / 8;
      write_in_tile(own, p.bits, row, matrix + row / TILE * TILE * p.pitch + unit * bytes);
    } else if (p.bits == 8) {
      std::memcpy(to + unit * UNIT, own, UNIT);
    } else if (unit % 2 == 0 && unit + 1 == p.units()) {
      for (int64_t j = 0; j < 32; ++j) to[unit * 32 + j] = uint8_t(own[j] | own[j + 32] << 4);
    } else {
      uint8_t* pair = to + unit / 2 * UNIT;
      for (int64_t j = 0; j < UNIT; ++j) pair[j] = unit % 2 ? uint8_t(pair[j] | own[j] << 4) : own[j];
    }
  }
}

void read_levels(const Packed& p, int64_t row, uint8_t* levels) {
  for (int64_t unit = 0; unit < p.units(); ++unit) {
    uint8_t own[UNIT];
    if (p.order == Order::tiles) {
      int64_t bytes = UNIT * p.bits / 8;
      const uint8_t* from = p.levels + row / TILE * TILE * p.pitch + unit * TILE * bytes + row % TILE * 4;
      for (int64_t c = 0; c < bytes; ++c) {
        uint8_t both = from[c / 4 * 4 * TILE + c % 4];
        if (p.bits == 8) own[c] = both;
        else own[c] = both & 15, own[c + bytes] = both >> 4;
      }
    } else {
      const uint8_t* from = p.levels + row * p.pitch + unit * UNIT;
      bool alone = unit % 2 == 0 && unit + 1 == p.units();
      if (p.bits == 4) from = p.levels + row * p.pitch + unit / 2 * UNIT;
      for (int64_t j = 0; j < UNIT; ++j) {
        if (p.bits == 8) own[j] = from[j];
        else if (alone) own[j] = from[j % 32] >> (j < 32 ? 0 : 4) & 15;
        else own[j] = from[j] >> (unit % 2 ? 4 : 0) & 15;
      }
    }
    int64_t left = std::min(UNIT, p.columns - unit * UNIT);
    for (int64_t c = 0; c < left; ++c) levels[unit * UNIT + c] = own[place_of(p.order, c)];
  }
}

KeptColumns::KeptColumns(const Packed& p, const int32_t* ids, int64_t n) : from_(p) {
  int64_t beside = p.bits == 4 ? 2 : 1, next = 0;
  for (int64_t entry = 0; entry < p.entries(); ++entry) {
    std::vector<Source> own[2];
    for (int64_t b = 0; b < beside; ++b)
      for (; next < n && ids[next] / p.block == entry * beside + b; ++next) {
        places_.push_back(int32_t((entry * beside + b) * p.block + int64_t(own[b].size())));
        own[b].push_back(source_of(ids[next]));
      }
    size_t fours = (std::max(own[0].size(), own[1].size()) + 3) / 4;
    fours_.push_back(uint8_t(fours));
    for (int64_t b = 0; b < beside; ++b) {
      own[b].resize(4 * fours, Source{});  // stands for columns that are none, and are multiplied with 0
      sources_[b].insert(sources_[b].end(), own[b].begin(), own[b].end());
    }
  }
}

KeptColumns::Source KeptColumns::source_of(int64_t column) const {
  int64_t unit = column / UNIT, c = column % UNIT;
  if (from_.bits != 4) return {column / 4 * TILE, int(8 * (c % 4))};
  return {(unit * UNIT / 2 + c % 32) / 4 * TILE, int(8 * (c % 4) + c / 32 * 4)};
}

void KeptColumns::copy_tile(int64_t tile, uint8_t* to) const {
  const uint8_t* from = from_.levels + tile * TILE * from_.pitch;
  uint32_t mask = from_.bits == 4 ? 15 : 255;
  to += tile * TILE * pitch();
  for (size_t four = 0; four < sources_[0].size(); four += 4, to += 4 * TILE) {
    uint32_t own[TILE] = {}, words[TILE];
    for (size_t b = 0; b < 2 && !sources_[b].empty(); ++b)
      for (size_t c = 0; c < 4; ++c) {
        Source source = sources_[b][four + c];
        std::memcpy(words, from + 4 * source.word, sizeof words);
        for (int64_t r = 0; r < TILE; ++r) own[r] |= (words[r] >> source.shift & mask) << (8 * c + 4 * b);
      }
    std::memcpy(to, own, sizeof own);
  }
}

}  // namespace dart
