// The register tile for few output channels: its lanes are positions, where those of MicroKernel are channels.
#pragma once

#include <cstdint>

#include "microkernel.h"

namespace captum_dtd::cpu {

//   sum[o * pitch + p] += sum over taps j, k of  a[k * plane + offsets[j] + p] * b[j][k][o]     p < vectors * lanes, o < channels
//
// `a` points into a slab with one plane of positions for each channel; `b` is dense. Of bfloat16, two neighbouring channels share
// a plane, and lie next to each other at every position, as they do in b: [taps][depth / 2][channels][2].
template <typename Operand, typename Sum>
struct PlanarKernel {
  static constexpr int kMaxChannels = 6;

  int lanes;                          // positions of one vector
  int max_vectors[kMaxChannels + 1];  // of one call, by its channels
  void (*run)(int channels, int vectors, const Operand* a, int64_t plane, const int64_t* offsets, int64_t taps, int64_t depth,
              const Operand* b, Sum* sum, int64_t pitch);
};

// As many vectors of positions as leave a register for a weight.
constexpr int planar_vectors(int registers, int channels) {
  const int vectors = (registers - 1) / (channels + 1);
  return vectors < 8 ? vectors : 8;
}

const PlanarKernel<float, float>* float_planar_avx512();
const PlanarKernel<float, float>* float_planar_avx2();
const PlanarKernel<float, float>* float_planar_generic();
const PlanarKernel<double, double>* double_planar_avx512();
const PlanarKernel<double, double>* double_planar_avx2();
const PlanarKernel<double, double>* double_planar_generic();
const PlanarKernel<bfloat16, float>* bfloat16_planar_avx512();
const PlanarKernel<bfloat16, float>* bfloat16_planar_generic();

}  // namespace captum_dtd::cpu
