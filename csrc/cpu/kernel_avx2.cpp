// AVX2 with FMA.
#include "features.h"

#define CAPTUM_DTD_ISA "avx2"
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#include "vector_direct.h"
#include "vector_kernel.h"
#include "vector_winograd.h"

namespace captum_dtd::cpu {

#ifdef __AVX2__

const MicroKernel<float, float>* float_kernel_avx2() { return features().avx2 ? &kTile<float> : nullptr; }
const MicroKernel<float, float>* float_groups_avx2(int64_t of_group) {
  return features().avx2 ? groups_kernel<float>(of_group) : nullptr;
}
const DirectKernel<float>* float_direct_avx2() { return features().avx2 ? &kDirect<float> : nullptr; }
const PlanarKernel<float, float>* float_planar_avx2() { return features().avx2 ? &kPlanar<float> : nullptr; }
const Loops<float>* float_loops_avx2() { return features().avx2 ? &kLoops<float> : nullptr; }
const WinogradKernel<float, float>* float_winograd_avx2() { return features().avx2 ? &kWinograd<float> : nullptr; }
const MicroKernel<double, double>* double_kernel_avx2() { return features().avx2 ? &kTile<double> : nullptr; }
const MicroKernel<double, double>* double_groups_avx2(int64_t of_group) {
  return features().avx2 ? groups_kernel<double>(of_group) : nullptr;
}
const DirectKernel<double>* double_direct_avx2() { return features().avx2 ? &kDirect<double> : nullptr; }
const PlanarKernel<double, double>* double_planar_avx2() { return features().avx2 ? &kPlanar<double> : nullptr; }
const Loops<double>* double_loops_avx2() { return features().avx2 ? &kLoops<double> : nullptr; }

#else  // compiled for another architecture

const MicroKernel<float, float>* float_kernel_avx2() { return nullptr; }
const MicroKernel<float, float>* float_groups_avx2(int64_t) { return nullptr; }
const DirectKernel<float>* float_direct_avx2() { return nullptr; }
const PlanarKernel<float, float>* float_planar_avx2() { return nullptr; }
const Loops<float>* float_loops_avx2() { return nullptr; }
const WinogradKernel<float, float>* float_winograd_avx2() { return nullptr; }
const MicroKernel<double, double>* double_kernel_avx2() { return nullptr; }
const MicroKernel<double, double>* double_groups_avx2(int64_t) { return nullptr; }
const DirectKernel<double>* double_direct_avx2() { return nullptr; }
const PlanarKernel<double, double>* double_planar_avx2() { return nullptr; }
const Loops<double>* double_loops_avx2() { return nullptr; }

#endif

}  // namespace captum_dtd::cpu
