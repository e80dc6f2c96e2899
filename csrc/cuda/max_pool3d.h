// The CUDA kernels of max pooling. The caller checks, allocates and names the stream.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problems.h"

namespace captum_dtd::cuda {

// Names of the kernels, the same for every type.
inline std::vector<std::string> max_pool3d_kernels() { return {"cuda/ieee"}; }

// Bytes of device memory, aligned to 16, that are needed beside the tensors: none where no two windows overlap, else one number
// for each window; and for layers of frozen clips their tables.
int64_t max_pool3d_workspace(const MaxPool3dRelevance& problem);

// Queues the kernels on a stream (a cudaStream_t). Every element of `out` is written once; nothing is allocated and nothing
// is waited for, so that a CUDA graph can capture it. Throws std::runtime_error where a launch is refused.
// A launch covers at most `threads` threads; more work takes several.
void max_pool3d_relevance(const MaxPool3dRelevance& problem, void* workspace, void* stream, int64_t threads = int64_t{1} << 30);

// The same of the pooling itself, which needs memory for its table alone.
int64_t max_pool3d_workspace(const MaxPool3dForward& problem);
void max_pool3d_forward(const MaxPool3dForward& problem, void* workspace, void* stream, int64_t threads = int64_t{1} << 30);

}  // namespace captum_dtd::cuda
