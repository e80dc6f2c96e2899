// The register tile for few output channels: its lanes are positions, where those of MicroKernel are channels.
#pragma once

#include <cstdint>

namespace captum_dtd::cpu {

//   sum[o * pitch + p] = (accumulate ? sum[o * pitch + p] : 0)
//                      + sum over taps j, k of  a[k * plane + offsets[j] + p] * b[j][k][o]     p < vectors * lanes, o < channels
//
// `a` points into a slab with one plane of positions for each channel; `b` is dense.
template <typename T>
struct PlanarKernel {
  static constexpr int kMaxChannels = 6;

  int lanes;                          // positions of one vector
  int max_vectors[kMaxChannels + 1];  // of one call, by its channels
  void (*run)(int channels, int vectors, const T* a, int64_t plane, const int64_t* offsets, int64_t taps, int64_t depth,
              const T* b, T* sum, int64_t pitch, bool accumulate);
};

const PlanarKernel<float>* float_planar_avx512();
const PlanarKernel<float>* float_planar_avx2();
const PlanarKernel<float>* float_planar_generic();
const PlanarKernel<double>* double_planar_avx512();
const PlanarKernel<double>* double_planar_avx2();
const PlanarKernel<double>* double_planar_generic();

}  // namespace captum_dtd::cpu
