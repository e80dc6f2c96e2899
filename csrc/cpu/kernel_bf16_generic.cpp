// bfloat16 products in portable C++: widened to float, multiplied and added there. What every machine can run.
#include <cstring>

#include "microkernel.h"
#include "planar_kernel.h"

namespace captum_dtd::cpu {
namespace {

// Four positions share each widened pair of b; four positions times eight channels of sums fit the registers of any
// vector unit of 128 bits.
constexpr int kPositions = 4;
constexpr int kChannels = 8;

float widened(bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <int positions>
void run_tile(const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth, const bfloat16* b,
              float* sum, bool accumulate) {
  float sums[positions][kChannels] = {};
  if (accumulate) std::memcpy(sums, sum, sizeof sums);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const bfloat16* row = a + offsets[tap];
    for (int64_t k = 0; k < depth; k += 2, b += 2 * kChannels) {
      float even[kChannels], odd[kChannels];
      for (int o = 0; o < kChannels; ++o) {
        even[o] = widened(b[2 * o]);
        odd[o] = widened(b[2 * o + 1]);
      }
      for (int p = 0; p < positions; ++p) {
        const float first = widened(row[p * position_stride + k]);
        const float second = widened(row[p * position_stride + k + 1]);
        for (int o = 0; o < kChannels; ++o) sums[p][o] += first * even[o] + second * odd[o];
      }
    }
  }
  std::memcpy(sum, sums, sizeof sums);
}

void run(int positions, const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
         const bfloat16* b, float* sum, bool accumulate, Ahead<bfloat16>) {
  constexpr decltype(&run_tile<1>) tiles[kPositions] = {run_tile<1>, run_tile<2>, run_tile<3>, run_tile<4>};
  tiles[positions - 1](a, position_stride, offsets, taps, depth, b, sum, accumulate);
}

// Positions in lanes.
constexpr int kLanes = 4;

void run_planar(int channels, int vectors, const bfloat16* a, int64_t plane, const int64_t* offsets, int64_t taps, int64_t depth,
                const bfloat16* b, float* sum, int64_t pitch) {
  const int positions = vectors * kLanes;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const bfloat16* row = a + offsets[tap];
    for (int64_t k = 0; k < depth; k += 2, row += plane, b += 2 * channels)
      for (int o = 0; o < channels; ++o) {
        const float even = widened(b[2 * o]), odd = widened(b[2 * o + 1]);
        for (int p = 0; p < positions; ++p) sum[o * pitch + p] += widened(row[2 * p]) * even + widened(row[2 * p + 1]) * odd;
      }
  }
}

constexpr PlanarKernel<bfloat16, float> kPlanar = {kLanes, {0, 4, 4, 4, 4, 4, 4}, run_planar};

static_assert(kChannels <= kMostChannels);

constexpr MicroKernel<bfloat16, float> kKernel = {"generic", kPositions, kChannels, 2, run};

}  // namespace

const MicroKernel<bfloat16, float>* bfloat16_kernel_generic() { return &kKernel; }
const PlanarKernel<bfloat16, float>* bfloat16_planar_generic() { return &kPlanar; }

}  // namespace captum_dtd::cpu
