// What the CPU's max pooling kernel is given. Free of torch: the caller checks and allocates.
#pragma once

#include <string>
#include <vector>

#include "../pooling.h"
#include "conv3d.h"

namespace captum_dtd::cpu {

// Relevance of a max pooling's input x, given that of its output. `x` has the type `element`; `relevance` and `out` that of
// the accumulator (float, or double for Float64).
//
//   proportional        out = u * sum over windows of  R / (sum of u in the window + stabilizer),   u = max(x, 0)
//   winner_takes_all    each window's R goes to its maximum: the first of equals, the last of NaNs, as in torch
struct MaxPool3dRelevance {
  MaxPool3d pool;
  bool winner_takes_all;
  Element element;
  View x, relevance, out;
  double stabilizer;
};

// Kernels that this machine runs, best first: "avx512/ieee", "avx2/ieee", "generic/ieee".
std::vector<std::string> max_pool3d_kernels();

// Runs a kernel by its name; the name must be one of max_pool3d_kernels().
void max_pool3d_relevance(const MaxPool3dRelevance& problem, const std::string& kernel, ParallelFor parallel_for);

}  // namespace captum_dtd::cpu
