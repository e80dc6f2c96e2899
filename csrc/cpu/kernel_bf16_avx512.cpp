// bfloat16 products by AVX512_BF16: vdpbf16ps adds the products of two neighbouring channels of the depth at once.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "features.h"
#include "microkernel.h"

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

template <int positions>
void run_tile(const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth, const bfloat16* b,
              float* sum, bool accumulate) {
  constexpr int pointers = (positions + kPositionsPerPointer - 1) / kPositionsPerPointer;
  __m512 sums[positions][kVectors];
#pragma GCC unroll 14
  for (int p = 0; p < positions; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      sums[p][v] = accumulate ? _mm512_loadu_ps(sum + p * kChannels + v * kLanes) : _mm512_setzero_ps();

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

#pragma GCC unroll 14
  for (int p = 0; p < positions; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sum + p * kChannels + v * kLanes, sums[p][v]);
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

constexpr MicroKernel<bfloat16, float> kKernel = {"avx512", kPositions, kChannels, 2, run};

}  // namespace

const MicroKernel<bfloat16, float>* bfloat16_kernel_avx512() { return features().avx512_bf16 ? &kKernel : nullptr; }

}  // namespace captum_dtd::cpu
