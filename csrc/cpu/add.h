// The CPU's kernels for the summands of an addition, and how one is asked for.
#pragma once

#include <string>
#include <vector>

#include "conv3d.h"

namespace captum_dtd::cpu {

// Kernels that this machine runs, best first: "avx512/ieee", "avx2/ieee", "generic/ieee".
std::vector<std::string> add_kernels();

// Runs a kernel by its name; the name must be one of add_kernels().
void add_relevance(const AddRelevance& problem, const std::string& kernel, ParallelFor parallel_for);

}  // namespace captum_dtd::cpu
