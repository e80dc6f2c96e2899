// What kernels of every device are given. Free of torch and of any device: the caller checks and allocates.
#pragma once

#include <cstdint>

#include "geometry.h"
#include "lift.h"
#include "pooling.h"

namespace captum_dtd {

enum class Element { Float32, Float64, BFloat16, Float16 };

// A tensor (N, C, T, H, W) with any strides, counted in elements (zero where a bound is broadcast).
struct View {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

// Relevance of x, given relevance of the convolution's output. `x`, `weight` (c_out, c_in / groups, kT, kH, kW) and `bias`
// have the type `element`; `relevance`, `low`, `high` and `out` that of the accumulator (float, or double for Float64).
// Where `divided`, `relevance` is R / z already, by whatever denominators: what is left is the adjoint, times the input.
struct Conv3dRelevance {
  Conv3d conv;
  Lift lift;
  Element element;
  View x, low, high, relevance, out;
  const void* weight;  // contiguous
  const void* bias;    // c_out values or null; its positive part joins the denominator
  double stabilizer;
  bool divided;
};

// The plain convolution, out = conv(x, weight) + bias; everything has the type `element`.
struct Conv3dForward {
  Conv3d conv;
  Element element;
  View x, out;
  const void* weight;  // contiguous
  const void* bias;    // c_out values or null
};

// Relevance of a max pooling's input x, given that of its output. `x` has the type `element`; `relevance` and `out` that of
// the accumulator (float, or double for Float64).
//
//   proportional        out = u * sum over windows of  R / (sum of u in the window + stabilizer),   u = max(x, 0)
//   winner_takes_all    each window's R goes to its maximum: the first of equals, the last of NaNs, as in torch
struct MaxPool3dRelevance {
  MaxPool3d pool;
  bool winner_takes_all;
  double stabilizer;
  Element element;
  View x, relevance, out;
};

}  // namespace captum_dtd
