// bfloat16 products on AMX tiles: up to 32 positions times 32 channels, summed in four tiles.
//
//               b: channels 0..15   16..31
//                         tile 6    tile 7
//   a: first half  tile 4  tile 0    tile 1
//      second half tile 5  tile 2    tile 3
//
// Numbers of tiles are part of the instructions: the intrinsics take literals only.
#include "features.h"
#include "microkernel.h"

#if defined(__AMX_BF16__) || defined(EMULATE_AMX)

#include <immintrin.h>

namespace captum_dtd::cpu {
namespace {

constexpr int kRows = 16;      // of a tile at most
constexpr int kRowBytes = 64;  // of a tile at most
constexpr int kTileChannels = kRowBytes / sizeof(float);
constexpr int kTileDepth = kRowBytes / sizeof(bfloat16);
constexpr int kPositions = 2 * kRows;
constexpr int kChannels = 2 * kTileChannels;

// What ldtilecfg loads.
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Positions of the two halves; none in the second leaves its tiles unconfigured.
struct Halves {
  int first, second;
};

// Halves are as equal as can be: a short product waits for the one before it.
Halves halves_of(int positions) {
  const int first = positions <= kRows ? positions : (positions + 1) / 2;
  return {first, positions - first};
}

// What this thread has loaded; whatever else runs on it may load something else (a matrix library, say).
thread_local Halves loaded{0, 0};
thread_local int loaded_depth = 0;

void begin() { loaded_depth = 0; }

// Loading a configuration takes as long as several products.
void configure(Halves halves, int depth) {
  if (halves.first == loaded.first && halves.second == loaded.second && depth == loaded_depth) return;
  loaded = halves;
  loaded_depth = depth;
  TileConfig wanted;
  const auto set = [&wanted](int tile, int rows, int row_bytes) {
    wanted.rows[tile] = static_cast<uint8_t>(rows);
    wanted.row_bytes[tile] = static_cast<uint16_t>(rows > 0 ? row_bytes : 0);
  };
  const int pair_bytes = 2 * sizeof(bfloat16);
  const int pairs = depth / 2;
  for (int column = 0; column < 2; ++column) {
    set(column, halves.first, kRowBytes);
    set(2 + column, halves.second, kRowBytes);
    set(6 + column, pairs, kRowBytes);
  }
  set(4, halves.first, pairs * pair_bytes);
  set(5, halves.second, pairs * pair_bytes);
  // The intrinsic tells the compiler of eight bytes of a configuration only; this makes it keep the others in memory.
  asm volatile("" : : "r"(&wanted) : "memory");
  _tile_loadconfig(&wanted);
}

// Adds the products over `steps` tiles of b and a, as deep as configured: `step_depth`.
template <bool two_halves>
void multiply(int first, const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t steps,
              int64_t step_depth, const bfloat16* b, int64_t tap_stride, float* sum, bool accumulate, Ahead<bfloat16>& ahead) {
  constexpr int64_t sum_bytes = kChannels * sizeof(float);          // from one position to the next
  constexpr int64_t pair_bytes = 2 * kChannels * sizeof(bfloat16);  // from one pair of the depth to the next
  const int64_t position_bytes = position_stride * sizeof(bfloat16);
  float* second_sum = sum + first * kChannels;
  if (accumulate) {
    _tile_loadd(0, sum, sum_bytes);
    _tile_loadd(1, sum + kTileChannels, sum_bytes);
    if constexpr (two_halves) {
      _tile_loadd(2, second_sum, sum_bytes);
      _tile_loadd(3, second_sum + kTileChannels, sum_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (two_halves) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const bfloat16* row = a + offsets[tap];
    const bfloat16* second_row = row + first * position_stride;
    const bfloat16* block = b + tap * tap_stride;
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t line = 0; line < ahead.each_step; line += kTileDepth) __builtin_prefetch(ahead.from + line, 0, 2);
      ahead.from += ahead.each_step;
      _tile_loadd(6, block, pair_bytes);
      _tile_loadd(4, row, position_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, block + 2 * kTileChannels, pair_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (two_halves) {
        _tile_loadd(5, second_row, position_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      row += step_depth;
      second_row += step_depth;
      block += step_depth * kChannels;
    }
  }
  _tile_stored(0, sum, sum_bytes);
  _tile_stored(1, sum + kTileChannels, sum_bytes);
  if constexpr (two_halves) {
    _tile_stored(2, second_sum, sum_bytes);
    _tile_stored(3, second_sum + kTileChannels, sum_bytes);
  }
}

// Steps as few as the depth allows; equal ones where they can be, for they share a configuration. Else they are full, and
// what they leave is a step of its own after all others.
void run(int positions, const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
         const bfloat16* b, float* sum, bool accumulate, Ahead<bfloat16> ahead) {
  const Halves halves = halves_of(positions);
  const auto multiply_halves = halves.second > 0 ? multiply<true> : multiply<false>;
  const int64_t fewest = (depth + kTileDepth - 1) / kTileDepth;
  const int64_t step_depth = depth % (2 * fewest) == 0 ? depth / fewest : kTileDepth;
  const int64_t steps = depth / step_depth, rest = depth % step_depth;
  const int64_t tap_stride = depth * kChannels;
  configure(halves, static_cast<int>(step_depth));
  multiply_halves(halves.first, a, position_stride, offsets, taps, steps, step_depth, b, tap_stride, sum, accumulate, ahead);
  if (rest > 0) {
    configure(halves, static_cast<int>(rest));
    multiply_halves(halves.first, a + depth - rest, position_stride, offsets, taps, 1, rest, b + (depth - rest) * kChannels,
                    tap_stride, sum, true, ahead);
  }
}

// Loading four tiles and multiplying them takes 64 cycles, of however few rows: hence `spans_gaps`.
constexpr int64_t kNearBytes = 36 << 10;  // of the first-level cache, 48 KB

constexpr MicroKernel<bfloat16, float> kKernel = {"amx", kPositions, kChannels, 2, run, kTileDepth, begin, true, kNearBytes};

}  // namespace

const MicroKernel<bfloat16, float>* bfloat16_kernel_amx() { return features().amx_bf16 ? &kKernel : nullptr; }

}  // namespace captum_dtd::cpu

#else  // compiled for another architecture

namespace captum_dtd::cpu {

const MicroKernel<bfloat16, float>* bfloat16_kernel_amx() { return nullptr; }

}  // namespace captum_dtd::cpu

#endif
