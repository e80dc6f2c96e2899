// AMX tiles in plain C++, for machines without them. Included ahead of a source (g++ -include), it takes the place of the
// intrinsics, so that the very source which runs on the tiles is tested.
//
// It does what Intel's manual (Software Developer's Manual, volume 2) says of LDTILECFG, STTILECFG, TILELOADD, TILESTORED,
// TILEZERO, TILERELEASE and TDPBF16PS, and throws where the processor would raise a fault.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace amx_emulation {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  unsigned char byte[kMaxRows][kMaxRowBytes];
};

struct State {
  Config config;
  Tile tile[kTiles];
};

inline State& state() {
  thread_local State registers{};
  return registers;
}

inline void require(bool condition, const std::string& fault) {
  if (!condition) throw std::runtime_error("AMX fault: " + fault);
}

inline void release() { state() = State{}; }

inline void load_config(const void* memory) {
  Config config;
  std::memcpy(&config, memory, sizeof config);
  release();
  if (config.palette == 0) return;
  require(config.palette == 1, "palette " + std::to_string(config.palette));
  require(config.start_row == 0, "a start row, which only an interrupted instruction has");
  for (const uint8_t reserved : config.reserved) require(reserved == 0, "a reserved byte of the configuration is set");
  for (int t = 0; t < 16; ++t) {
    const std::string tile = "tile " + std::to_string(t);
    const int rows = config.rows[t], row_bytes = config.row_bytes[t];
    require(t < kTiles || (rows == 0 && row_bytes == 0), tile + " does not exist");
    require(rows <= kMaxRows && row_bytes <= kMaxRowBytes, tile + " is larger than a register");
    require((rows == 0) == (row_bytes == 0), tile + " has rows without bytes, or bytes without rows");
  }
  state().config = config;
}

inline void store_config(void* memory) { std::memcpy(memory, &state().config, sizeof(Config)); }

inline int rows_of(int tile) { return state().config.rows[tile]; }
inline int row_bytes_of(int tile) { return state().config.row_bytes[tile]; }

inline void require_configured(int tile) {
  require(state().config.palette == 1 && rows_of(tile) > 0, "tile " + std::to_string(tile) + " is not configured");
}

template <int tile>
void zero() {
  require_configured(tile);
  state().tile[tile] = Tile{};
}

template <int tile>
void load(const void* memory, int64_t stride) {
  zero<tile>();
  const auto* from = static_cast<const unsigned char*>(memory);
  for (int row = 0; row < rows_of(tile); ++row) {
    std::memcpy(state().tile[tile].byte[row], from + row * stride, row_bytes_of(tile));
  }
}

template <int tile>
void store(void* memory, int64_t stride) {
  require_configured(tile);
  require(stride >= row_bytes_of(tile), "rows of a stored tile overlap");  // no fault of the processor's, but no use either
  auto* to = static_cast<unsigned char*>(memory);
  for (int row = 0; row < rows_of(tile); ++row) {
    std::memcpy(to + row * stride, state().tile[tile].byte[row], row_bytes_of(tile));
  }
}

inline float without_denormals(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

// Element `index` of a row of bfloat16, as a float; a denormal counts as zero.
inline float bfloat16_of(const unsigned char* row, int index) {
  uint16_t bits;
  std::memcpy(&bits, row + index * sizeof bits, sizeof bits);
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return without_denormals(value);
}

// Even and odd elements of the depth are summed apart, by fused multiply-adds, and meet in the end.
template <int sums, int a, int b>
void multiply_bfloat16() {
  static_assert(sums != a && sums != b && a != b, "AMX fault: one tile in two roles");
  require_configured(sums);
  require_configured(a);
  require_configured(b);
  require(row_bytes_of(a) % 4 == 0 && row_bytes_of(b) % 4 == 0 && row_bytes_of(sums) % 4 == 0, "a row ends within a pair");
  require(rows_of(sums) == rows_of(a), "sums and a differ in rows");
  require(row_bytes_of(sums) == row_bytes_of(b), "sums and b differ in columns");
  require(row_bytes_of(a) / 4 == rows_of(b), "a and b differ in depth");
  State& registers = state();
  for (int row = 0; row < rows_of(sums); ++row) {
    const unsigned char* left = registers.tile[a].byte[row];
    for (int column = 0; column < row_bytes_of(sums) / 4; ++column) {
      float parity_sum[2] = {0.0f, 0.0f};
      for (int pair = 0; pair < rows_of(b); ++pair) {
        const unsigned char* right = registers.tile[b].byte[pair];
        for (int parity = 0; parity < 2; ++parity) {
          parity_sum[parity] = without_denormals(
              std::fma(bfloat16_of(left, 2 * pair + parity), bfloat16_of(right, 2 * column + parity), parity_sum[parity]));
        }
      }
      unsigned char* where = registers.tile[sums].byte[row] + column * sizeof(float);
      float sum;
      std::memcpy(&sum, where, sizeof sum);
      sum = without_denormals(without_denormals(sum) + without_denormals(parity_sum[0] + parity_sum[1]));
      std::memcpy(where, &sum, sizeof sum);
    }
  }
}

}  // namespace amx_emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(memory) amx_emulation::load_config(memory)
#define _tile_storeconfig(memory) amx_emulation::store_config(memory)
#define _tile_release() amx_emulation::release()
#define _tile_loadd(tile, memory, stride) amx_emulation::load<tile>(memory, stride)
#define _tile_stored(tile, memory, stride) amx_emulation::store<tile>(memory, stride)
#define _tile_zero(tile) amx_emulation::zero<tile>()
#define _tile_dpbf16ps(sums, a, b) amx_emulation::multiply_bfloat16<sums, a, b>()
