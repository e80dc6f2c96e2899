// The CPU's convolution kernels, and how one is asked for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problems.h"

namespace captum_dtd::cpu {

// Splits [0, count) over threads; the caller's own, so that torch's thread settings hold.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);

// Kernels that this machine runs, best first, as "isa/arithmetic" ("avx512/ieee", "amx/bf16x3", ...).
std::vector<std::string> conv3d_kernels(Element element);

// Runs a kernel by its name; the name must be one of conv3d_kernels(element).
void conv3d_relevance(const Conv3dRelevance& problem, const std::string& kernel, ParallelFor parallel_for);
void conv3d_forward(const Conv3dForward& problem, const std::string& kernel, ParallelFor parallel_for);

}  // namespace captum_dtd::cpu
