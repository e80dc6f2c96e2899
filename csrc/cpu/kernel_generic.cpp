// The instruction set that every machine of this architecture has.
#define CAPTUM_DTD_ISA "generic"
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#include "vector_direct.h"
#include "vector_kernel.h"
#include "vector_winograd.h"

namespace captum_dtd::cpu {

const MicroKernel<float, float>* float_kernel_generic() { return &kTile<float>; }
const MicroKernel<float, float>* float_groups_generic(int64_t of_group) { return groups_kernel<float>(of_group); }
const DirectKernel<float>* float_direct_generic() { return &kDirect<float>; }
const PlanarKernel<float, float>* float_planar_generic() { return &kPlanar<float>; }
const Loops<float>* float_loops_generic() { return &kLoops<float>; }
const WinogradKernel<float, float>* float_winograd_generic() { return &kWinograd<float>; }
const WinogradKernel<bfloat16, float>* bfloat16_winograd_generic() { return &kWinograd<bfloat16>; }
const MicroKernel<double, double>* double_kernel_generic() { return &kTile<double>; }
const MicroKernel<double, double>* double_groups_generic(int64_t of_group) { return groups_kernel<double>(of_group); }
const DirectKernel<double>* double_direct_generic() { return &kDirect<double>; }
const PlanarKernel<double, double>* double_planar_generic() { return &kPlanar<double>; }
const Loops<double>* double_loops_generic() { return &kLoops<double>; }

}  // namespace captum_dtd::cpu
