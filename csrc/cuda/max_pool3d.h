// What the CUDA kernels of max pooling are given. Free of torch and of CUDA: the caller checks and allocates.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../pooling.h"
#include "view.h"

namespace captum_dtd::cuda {

// Relevance of a max pooling's input x, given that of its output. `x` has the type `element`; `relevance` and `out` are
// float (double for Float64).
//
//   proportional        out = u * sum over windows of  R / (sum of u in the window + stabilizer),   u = max(x, 0)
//   winner_takes_all    each window's R goes to its maximum: the first of equals, the last of NaNs, as in torch
struct MaxPool3dRelevance {
  MaxPool3d pool;
  bool winner_takes_all;
  double stabilizer;
  Element element;
  View x, relevance, out;
  void* workspace;  // max_pool3d_workspace() bytes, aligned to 16
};

// Names of the kernels, the same for every type.
inline std::vector<std::string> max_pool3d_kernels() { return {"cuda/ieee"}; }

// Bytes of scratch memory: none where no two windows overlap, else one number for each window.
int64_t max_pool3d_workspace(const MaxPool3dRelevance& problem);

// Queues the kernels on a stream (a cudaStream_t). Every element of `out` is written once; nothing is allocated and nothing
// is waited for, so that a CUDA graph can capture it. Throws std::runtime_error where a launch is refused.
// A launch covers at most `threads` threads; more work takes several.
void max_pool3d_relevance(const MaxPool3dRelevance& problem, void* stream, int64_t threads = int64_t{1} << 30);

}  // namespace captum_dtd::cuda
