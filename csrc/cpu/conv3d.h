// What the CPU's convolution kernels are given, and how one is asked for. Free of torch: the caller checks and allocates.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../geometry.h"
#include "../lift.h"

namespace captum_dtd::cpu {

enum class Element { Float32, Float64, BFloat16, Float16 };

// A tensor (N, C, T, H, W) with any strides, counted in elements (zero where a bound is broadcast).
struct View {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

// Relevance of x, given relevance of the convolution's output. `x`, `weight` (c_out, c_in / groups, kT, kH, kW) and `bias`
// have the type `element`; `relevance`, `low`, `high` and `out` that of the accumulator (float, or double for Float64).
struct Conv3dRelevance {
  Conv3d conv;
  Lift lift;
  Element element;
  View x, low, high, relevance, out;
  const void* weight;  // contiguous
  const void* bias;    // c_out values or null; its positive part joins the denominator
  double stabilizer;
};

// The plain convolution, out = conv(x, weight) + bias; everything has the type `element`.
struct Conv3dForward {
  Conv3d conv;
  Element element;
  View x, out;
  const void* weight;  // contiguous
  const void* bias;    // c_out values or null
};

// Splits [0, count) over threads; the caller's own, so that torch's thread settings hold.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);

// Kernels that this machine runs, best first, as "isa/arithmetic" ("avx512/ieee", "amx/bf16x3", ...).
std::vector<std::string> conv3d_kernels(Element element);

// Runs a kernel by its name; the name must be one of conv3d_kernels(element).
void conv3d_relevance(const Conv3dRelevance& problem, const std::string& kernel, ParallelFor parallel_for);
void conv3d_forward(const Conv3dForward& problem, const std::string& kernel, ParallelFor parallel_for);

}  // namespace captum_dtd::cpu
