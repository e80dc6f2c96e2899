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

// What an output time of a frozen clip's layer reads by each tap of T: table[time][tap], for every example one after the other
// or one for all. -1 reads nothing. Its layer has stride 1 and no padding along T.
struct TimeTable {
  const int64_t* data = nullptr;  // null: times are read as stride and padding say
  bool of_each_example = false;

  // That of an example, of a convolution or a pooling; null where there is none.
  template <typename Windows>
  const int64_t* row(const Windows& windows, int64_t n) const {
    return data + (of_each_example ? n * windows.out[0] * windows.kernel[0] : 0);
  }
};

// Relevance of x, given relevance of the convolution's output. `x`, `weight` (c_out, c_in / groups, kT, kH, kW) and `bias`
// have the type `element`; `relevance`, `low`, `high` and `out` that of the accumulator (float, or double for Float64).
// Where `divided`, `relevance` is R / z already, by whatever denominators: what is left is the adjoint, times the input.
// With tables, `reads` are times of x and `gives` those of the result, at which an input that is kept once may stand for several.
struct Conv3dRelevance {
  Conv3d conv;
  Lift lift;
  Element element;
  View x, low, high, relevance, out;
  const void* weight;  // contiguous
  const void* bias;    // c_out values or null; its positive part joins the denominator
  double stabilizer;
  bool divided;
  TimeTable reads, gives;  // conv.in has the times of the result, which x may have fewer of
};

// The plain convolution, out = conv(x, weight) + bias, or what of it is positive; everything has the type `element`.
struct Conv3dForward {
  Conv3d conv;
  Element element;
  View x, out;
  const void* weight;  // contiguous
  const void* bias;    // c_out values or null
  bool relu;
  TimeTable reads;
};

// Relevance of a max pooling's input x, given that of its output. `x` has the type `element`; `relevance` and `out` that of
// the accumulator (float, or double for Float64).
//
//   proportional        out = u * sum over windows of  R / (sum of u in the window + stabilizer),   u = max(x, 0)
//   winner_takes_all    each window's R goes to its maximum: the first of equals, the last of NaNs, as in torch
//
// With tables, windows along T read times of x and give to times of the result.
struct MaxPool3dRelevance {
  MaxPool3d pool;
  TimeTable reads, gives;  // pool.in has the times of the result, and the input `times` of its own
  int64_t times;
  bool winner_takes_all;
  double stabilizer;
  Element element;
  View x, relevance, out;
};

// The pooling itself: every window's largest number, or its last NaN; -inf where it reads nothing. `x` and `out` have the type
// `element`.
struct MaxPool3dForward {
  MaxPool3d pool;  // pool.in has the times of x
  TimeTable reads;
  Element element;
  View x, out;
};

// Relevance of the summands of x + alpha * other, given that of the sum; all are of one size, and the results are dense. `x` and
// `other` have the type `element`; `relevance` and the results that of the accumulator (float, or double for Float64).
//
//   out = u s,   out_other = v s,   s = R / (u + v + stabilizer),   u = max(x, 0),   v = max(alpha * other, 0)
struct AddRelevance {
  int64_t size[5];
  double alpha, stabilizer;
  Element element;
  View x, other, relevance, out, out_other;
};

}  // namespace captum_dtd
