// Tensors of one shape, walked element by element together; free of torch and of any device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problems.h"

namespace captum_dtd {

// The axes along which all of the tensors move, the innermost last, in the order of the first tensor's memory. Axes that are one
// in every tensor's memory are one here, as long as 32 bits can count it.
template <int kTensors>
struct Lockstep {
  static constexpr int kMostAxes = 5;

  int axes = 0;
  int64_t size[kMostAxes];
  int64_t stride[kMostAxes][kTensors];

  Lockstep(const int64_t (&sizes)[kMostAxes], const View* const (&views)[kTensors]) {
    int order[kMostAxes], count = 0;
    for (int a = 0; a < kMostAxes; ++a)
      if (sizes[a] != 1) order[count++] = a;
    std::stable_sort(order, order + count, [&](int a, int b) { return views[0]->stride[a] > views[0]->stride[b]; });
    for (int i = 0; i < count; ++i) add(sizes[order[i]], order[i], views);
    if (axes == 0) add(1, kMostAxes - 1, views);
  }

 private:
  void add(int64_t length, int axis, const View* const (&views)[kTensors]) {
    bool continues = axes > 0 && size[axes - 1] * length <= INT32_MAX;
    for (int i = 0; continues && i < kTensors; ++i) continues = stride[axes - 1][i] == length * views[i]->stride[axis];
    if (!continues) size[axes++] = 1;
    size[axes - 1] *= length;
    for (int i = 0; i < kTensors; ++i) stride[axes - 1][i] = views[i]->stride[axis];
  }
};

}  // namespace captum_dtd
