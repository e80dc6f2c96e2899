// The CUDA kernel for the summands of an addition. The caller checks, allocates and names the stream.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problems.h"

namespace captum_dtd::cuda {

// Names of the kernels, the same for every type.
inline std::vector<std::string> add_kernels() { return {"cuda/ieee"}; }

// Queues the kernel on a stream (a cudaStream_t). Every element of the results is written once; nothing is allocated and nothing
// is waited for, so that a CUDA graph can capture it. Throws std::runtime_error where a launch is refused.
// A launch covers at most `threads` threads; more work takes several.
void add_relevance(const AddRelevance& problem, void* stream, int64_t threads = int64_t{1} << 30);

}  // namespace captum_dtd::cuda
