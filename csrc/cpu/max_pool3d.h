// The CPU's max pooling kernels, and how one is asked for.
#pragma once

#include <string>
#include <vector>

#include "conv3d.h"

namespace captum_dtd::cpu {

// Kernels that this machine runs, best first: "avx512/ieee", "avx2/ieee", "generic/ieee".
std::vector<std::string> max_pool3d_kernels();

// Run a kernel by its name; the name must be one of max_pool3d_kernels().
void max_pool3d_relevance(const MaxPool3dRelevance& problem, const std::string& kernel, ParallelFor parallel_for);
void max_pool3d_forward(const MaxPool3dForward& problem, const std::string& kernel, ParallelFor parallel_for);

}  // namespace captum_dtd::cpu
