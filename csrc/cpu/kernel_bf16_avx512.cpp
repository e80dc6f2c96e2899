// bfloat16 products by AVX512_BF16: vdpbf16ps adds the products of two neighbouring channels of the depth at once.
#include <cstring>
#include <utility>

#include "features.h"
#include "microkernel.h"
#include "planar_kernel.h"

#ifdef __AVX512BF16__

#include <immintrin.h>

namespace captum_dtd::cpu {
namespace {

// 14 x 2 sums, two vectors of b and one of a fill the 32 registers.
constexpr int kPositions = 14;
constexpr int kLanes = 16;
constexpr int kVectors = 2;
constexpr int kChannels = kVectors * kLanes;

// Addresses of positions are reached from one pointer for every four of them: the general registers would not hold more.
constexpr int kPositionsPerPointer = 4;

__m512bh broadcast_pair(const bfloat16* pair) {
  int bits;
  std::memcpy(&bits, pair, sizeof bits);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

__m512bh load_pairs(const bfloat16* pairs) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs)); }

// A tile's sums: zeros, or what is in memory.
template <int rows, int vectors>
[[gnu::always_inline]] inline void begin_sums(__m512 (&sums)[rows][vectors], const float* from, int64_t pitch, bool accumulate) {
#pragma GCC unroll 14
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      sums[row][v] = accumulate ? _mm512_loadu_ps(from + row * pitch + v * kLanes) : _mm512_setzero_ps();
}

template <int rows, int vectors>
[[gnu::always_inline]] inline void store_sums(const __m512 (&sums)[rows][vectors], float* to, int64_t pitch) {
#pragma GCC unroll 14
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(to + row * pitch + v * kLanes, sums[row][v]);
}

template <int positions>
void run_tile(const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth, const bfloat16* b,
              float* sum, bool accumulate) {
  constexpr int pointers = (positions + kPositionsPerPointer - 1) / kPositionsPerPointer;
  __m512 sums[positions][kVectors];
  begin_sums(sums, sum, kChannels, accumulate);

  for (int64_t tap = 0; tap < taps; ++tap) {
    const bfloat16* row[pointers];
#pragma GCC unroll 4
    for (int i = 0; i < pointers; ++i) row[i] = a + offsets[tap] + i * kPositionsPerPointer * position_stride;
    for (int64_t k = 0; k < depth; k += 2) {
      __m512bh weights[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weights[v] = load_pairs(b + v * 2 * kLanes);
#pragma GCC unroll 14
      for (int p = 0; p < positions; ++p) {
        const __m512bh pair = broadcast_pair(row[p / kPositionsPerPointer] + (p % kPositionsPerPointer) * position_stride);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[p][v] = _mm512_dpbf16_ps(sums[p][v], pair, weights[v]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < pointers; ++i) row[i] += 2;
      b += 2 * kChannels;
    }
  }

  store_sums(sums, sum, kChannels);
}

using RunTile = void (*)(const bfloat16*, int64_t, const int64_t*, int64_t, int64_t, const bfloat16*, float*, bool);

template <int... indices>
RunTile tile_of(int positions, std::integer_sequence<int, indices...>) {
  static constexpr RunTile tiles[] = {run_tile<indices + 1>...};
  return tiles[positions - 1];
}

void run(int positions, const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
         const bfloat16* b, float* sum, bool accumulate, Ahead<bfloat16>) {
  tile_of(positions, std::make_integer_sequence<int, kPositions>{})(a, position_stride, offsets, taps, depth, b, sum, accumulate);
}

// Positions in lanes: a vector has two neighbouring channels of sixteen of them.
constexpr int kRegisters = 32;

template <int channels, int vectors>
void run_planes(const bfloat16* a, int64_t plane, const int64_t* offsets, int64_t taps, int64_t depth, const bfloat16* b,
                float* sum, int64_t pitch) {
  __m512 sums[channels][vectors];
  begin_sums(sums, sum, pitch, true);

  for (int64_t tap = 0; tap < taps; ++tap) {
    const bfloat16* row = a + offsets[tap];
    for (int64_t k = 0; k < depth; k += 2) {
      __m512bh inputs[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) inputs[v] = load_pairs(row + v * 2 * kLanes);
#pragma GCC unroll 8
      for (int o = 0; o < channels; ++o) {
        const __m512bh weight = broadcast_pair(b + 2 * o);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sums[o][v] = _mm512_dpbf16_ps(sums[o][v], inputs[v], weight);
      }
      row += plane;
      b += 2 * channels;
    }
  }

  store_sums(sums, sum, pitch);
}

using RunPlanes = void (*)(const bfloat16*, int64_t, const int64_t*, int64_t, int64_t, const bfloat16*, float*, int64_t);

template <int channels, int... indices>
RunPlanes planes_of(int vectors, std::integer_sequence<int, indices...>) {
  static constexpr RunPlanes tiles[] = {run_planes<channels, indices + 1>...};
  return tiles[vectors - 1];
}

template <int channels = PlanarKernel<bfloat16, float>::kMaxChannels>
void run_planar(int wanted, int vectors, const bfloat16* a, int64_t plane, const int64_t* offsets, int64_t taps, int64_t depth,
                const bfloat16* b, float* sum, int64_t pitch) {
  if (wanted == channels) {
    constexpr auto kVectorCounts = std::make_integer_sequence<int, planar_vectors(kRegisters, channels)>{};
    planes_of<channels>(vectors, kVectorCounts)(a, plane, offsets, taps, depth, b, sum, pitch);
  } else if constexpr (channels > 1) {
    run_planar<channels - 1>(wanted, vectors, a, plane, offsets, taps, depth, b, sum, pitch);
  }
}

constexpr int most(int channels) { return planar_vectors(kRegisters, channels); }

constexpr PlanarKernel<bfloat16, float> kPlanar = {kLanes, {0, most(1), most(2), most(3), most(4), most(5), most(6)}, run_planar};

static_assert(kChannels <= kMostChannels);

constexpr MicroKernel<bfloat16, float> kKernel = {"avx512", kPositions, kChannels, 2, run};

}  // namespace

const MicroKernel<bfloat16, float>* bfloat16_kernel_avx512() { return features().avx512_bf16 ? &kKernel : nullptr; }
const PlanarKernel<bfloat16, float>* bfloat16_planar_avx512() { return features().avx512_bf16 ? &kPlanar : nullptr; }

}  // namespace captum_dtd::cpu

#else  // compiled for another architecture

namespace captum_dtd::cpu {

const MicroKernel<bfloat16, float>* bfloat16_kernel_avx512() { return nullptr; }
const PlanarKernel<bfloat16, float>* bfloat16_planar_avx512() { return nullptr; }

}  // namespace captum_dtd::cpu

#endif
