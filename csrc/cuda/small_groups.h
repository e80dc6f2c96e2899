// Convolutions whose groups have few channels, depthwise ones above all. Tensor cores would mostly multiply padding; here each
// thread sums a number of its own, or four neighbours, in float32, whatever arithmetic was asked for.
#pragma once

#include "../problems.h"
#include "conv3d.h"

namespace captum_dtd::cuda {

// Whether a convolution is one of them.
bool has_small_groups(const Conv3d& conv);

// As conv3d_relevance and conv3d_forward, of at least one example.
void small_groups_relevance(const Conv3dRelevance& problem, const Allocate& allocate, void* stream);
void small_groups_forward(const Conv3dForward& problem, const Allocate& allocate, void* stream);

}  // namespace captum_dtd::cuda
