// A ParallelFor of a callable.
#pragma once

#include <cstdint>

#include "conv3d.h"

namespace captum_dtd::cpu {

template <typename Body>  // void(int64_t begin, int64_t end)
void parallel(ParallelFor parallel_for, int64_t count, Body body) {
  if (count == 0) return;
  parallel_for(count, 1, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace captum_dtd::cpu
