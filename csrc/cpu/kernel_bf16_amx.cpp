// bfloat16 products on AMX tiles, of up to 32 positions with 32 channels:
//
//               b: channels 0..15   16..31
//                         tile 6    tile 7
//   a: first half  tile 4  tile 0    tile 1
//      second half tile 5  tile 2    tile 3
//
// or, where there are no more than 16 channels, of up to 64 positions, since a product takes as long whether or not its channels
// are there:
//
//                              b: channels 0..15
//                                        tile 6
//   a: all parts but the last  tile 4, 5, 4  tiles 0, 1, 2
//      the last part           tile 7        tile 3
//
// Numbers of tiles are part of the instructions: the intrinsics take literals only.
#include "features.h"
#include "microkernel.h"

#if defined(__AMX_BF16__) || defined(EMULATE_AMX)

#include <immintrin.h>

#include <initializer_list>

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

// What tiles hold: the rows of two kinds of them, none in the second where there is but one kind, pairs of depth, columns of
// sums.
struct Layout {
  int first, second;
  int pairs, columns;

  bool operator==(const Layout& other) const {
    return first == other.first && second == other.second && pairs == other.pairs && columns == other.columns;
  }
};

// Parts are as equal as can be: a short product waits for the one before it.
int part_of(int positions) {
  const int parts = (positions + kRows - 1) / kRows;
  return (positions + parts - 1) / parts;
}

// What this thread has loaded; whatever else runs on it may load something else (a matrix library, say).
thread_local Layout loaded{};

void begin() { loaded = {}; }

// Loading a configuration takes as long as several products.
void configure(const Layout& layout) {
  if (layout == loaded) return;
  loaded = layout;
  TileConfig wanted;
  const auto set = [&wanted](std::initializer_list<int> tiles, int rows, int row_bytes) {
    for (int tile : tiles) {
      wanted.rows[tile] = static_cast<uint8_t>(rows);
      wanted.row_bytes[tile] = static_cast<uint16_t>(rows > 0 ? row_bytes : 0);
    }
  };
  const int depth_bytes = layout.pairs * 2 * static_cast<int>(sizeof(bfloat16));
  if (layout.columns == 2) {
    set({0, 1}, layout.first, kRowBytes);
    set({2, 3}, layout.second, kRowBytes);
    set({4}, layout.first, depth_bytes);
    set({5}, layout.second, depth_bytes);
    set({6, 7}, layout.pairs, kRowBytes);
  } else {
    set({0, 1, 2}, layout.second, kRowBytes);
    set({3}, layout.first, kRowBytes);
    set({4, 5}, layout.second, depth_bytes);
    set({7}, layout.first, depth_bytes);
    set({6}, layout.pairs, kRowBytes);
  }
  // The intrinsic tells the compiler of eight bytes of a configuration only; this makes it keep the others in memory.
  asm volatile("" : : "r"(&wanted) : "memory");
  _tile_loadconfig(&wanted);
}

// Weights that are needed later, those of one step.
inline void prefetch(Ahead<bfloat16>& ahead) {
  for (int64_t line = 0; line < ahead.each_step; line += kTileDepth) __builtin_prefetch(ahead.from + line, 0, 2);
  ahead.from += ahead.each_step;
}

// Adds the products over `steps` tiles of b and a, as deep as configured: `step_depth`. `first` positions are in the first half.
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
      prefetch(ahead);
      // All loads come first: a product that waits for its tile keeps those behind it waiting.
      _tile_loadd(4, row, position_bytes);
      _tile_loadd(6, block, pair_bytes);
      _tile_loadd(7, block + 2 * kTileChannels, pair_bytes);
      if constexpr (two_halves) _tile_loadd(5, second_row, position_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (two_halves) {
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

// The same of one column of channels, in so many parts of `part` positions; what is left is in the last.
template <int kParts>
void multiply_column(int part, const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t steps,
                     int64_t step_depth, const bfloat16* b, int64_t tap_stride, float* sum, bool accumulate,
                     Ahead<bfloat16>& ahead) {
  constexpr int64_t row_bytes = kRowBytes;  // of sums, and of pairs of the depth
  const int64_t position_bytes = position_stride * sizeof(bfloat16), part_stride = part * position_stride;
  float* sums[kParts];
  for (int i = 0; i < kParts; ++i) sums[i] = sum + i * part * kTileChannels;
  if (accumulate) {
    if constexpr (kParts > 1) _tile_loadd(0, sums[0], row_bytes);
    if constexpr (kParts > 2) _tile_loadd(1, sums[1], row_bytes);
    if constexpr (kParts > 3) _tile_loadd(2, sums[2], row_bytes);
    _tile_loadd(3, sums[kParts - 1], row_bytes);
  } else {
    if constexpr (kParts > 1) _tile_zero(0);
    if constexpr (kParts > 2) _tile_zero(1);
    if constexpr (kParts > 3) _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const bfloat16* row = a + offsets[tap];
    const bfloat16* block = b + tap * tap_stride;
    for (int64_t step = 0; step < steps; ++step) {
      prefetch(ahead);
      _tile_loadd(6, block, row_bytes);
      if constexpr (kParts > 1) {
        _tile_loadd(4, row, position_bytes);
        _tile_dpbf16ps(0, 4, 6);
      }
      if constexpr (kParts > 2) {
        _tile_loadd(5, row + part_stride, position_bytes);
        _tile_dpbf16ps(1, 5, 6);
      }
      if constexpr (kParts > 3) {
        _tile_loadd(4, row + 2 * part_stride, position_bytes);
        _tile_dpbf16ps(2, 4, 6);
      }
      _tile_loadd(7, row + (kParts - 1) * part_stride, position_bytes);
      _tile_dpbf16ps(3, 7, 6);
      row += step_depth;
      block += step_depth * kTileChannels;
    }
  }
  if constexpr (kParts > 1) _tile_stored(0, sums[0], row_bytes);
  if constexpr (kParts > 2) _tile_stored(1, sums[1], row_bytes);
  if constexpr (kParts > 3) _tile_stored(2, sums[2], row_bytes);
  _tile_stored(3, sums[kParts - 1], row_bytes);
}

// Steps as few as the depth allows; equal ones where they can be, for they share a configuration. Else they are full, and
// what they leave is a step of its own after all others. Calls multiply(taps' a, steps, their depth, their b, accumulate).
template <int kColumns, typename Multiply>
void in_steps(int first, int second, const bfloat16* a, int64_t depth, const bfloat16* b, bool accumulate, Multiply multiply) {
  const int64_t fewest = (depth + kTileDepth - 1) / kTileDepth;
  const int64_t step_depth = depth % (2 * fewest) == 0 ? depth / fewest : kTileDepth;
  const int64_t steps = depth / step_depth, rest = depth % step_depth;
  configure({first, second, static_cast<int>(step_depth / 2), kColumns});
  multiply(a, steps, step_depth, b, accumulate);
  if (rest == 0) return;
  configure({first, second, static_cast<int>(rest / 2), kColumns});
  multiply(a + depth - rest, int64_t{1}, rest, b + (depth - rest) * kColumns * kTileChannels, true);
}

void run(int positions, const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
         const bfloat16* b, float* sum, bool accumulate, Ahead<bfloat16> ahead) {
  const int first = part_of(positions);
  const auto multiply_halves = positions > first ? multiply<true> : multiply<false>;
  in_steps<2>(first, positions - first, a, depth, b, accumulate,
              [&](const bfloat16* from, int64_t steps, int64_t step_depth, const bfloat16* weights, bool adds) {
                multiply_halves(first, from, position_stride, offsets, taps, steps, step_depth, weights, depth * kChannels, sum,
                                adds, ahead);
              });
}

void run_column(int positions, const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
                const bfloat16* b, float* sum, bool accumulate, Ahead<bfloat16> ahead) {
  constexpr decltype(&multiply_column<1>) of_parts[] = {multiply_column<1>, multiply_column<2>, multiply_column<3>,
                                                        multiply_column<4>};
  const int part = part_of(positions), parts = (positions + part - 1) / part, last = positions - (parts - 1) * part;
  in_steps<1>(last, parts > 1 ? part : 0, a, depth, b, accumulate,
              [&](const bfloat16* from, int64_t steps, int64_t step_depth, const bfloat16* weights, bool adds) {
                of_parts[parts - 1](part, from, position_stride, offsets, taps, steps, step_depth, weights, depth * kTileChannels,
                                    sum, adds, ahead);
              });
}

// Loading four tiles and multiplying them takes 64 cycles, of however few rows: hence `spans_gaps`.
// Sums that are stored and loaded again cost more than weights from the second-level cache, 2 MB: these are what all 27 taps of
// 128 channels have, and some more.
constexpr int64_t kNearBytes = 288 << 10;

static_assert(kChannels <= kMostChannels);

constexpr MicroKernel<bfloat16, float> kKernel = {"amx", kPositions, kChannels, 2, run, kTileDepth, begin, true, kNearBytes};
constexpr MicroKernel<bfloat16, float> kColumnKernel = {"amx",      4 * kRows, kTileChannels, 2,         run_column,
                                                        kTileDepth, begin,     true,          kNearBytes};

}  // namespace

const MicroKernel<bfloat16, float>* bfloat16_kernel_amx() { return features().amx_bf16 ? &kKernel : nullptr; }
const MicroKernel<bfloat16, float>* bfloat16_column_kernel_amx() { return features().amx_bf16 ? &kColumnKernel : nullptr; }

}  // namespace captum_dtd::cpu

#else  // compiled for another architecture

namespace captum_dtd::cpu {

const MicroKernel<bfloat16, float>* bfloat16_kernel_amx() { return nullptr; }
const MicroKernel<bfloat16, float>* bfloat16_column_kernel_amx() { return nullptr; }

}  // namespace captum_dtd::cpu

#endif
