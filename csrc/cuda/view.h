// Tensors as the CUDA kernels' callers describe them, free of torch and of CUDA.
#pragma once

#include <cstdint>

namespace captum_dtd::cuda {

enum class Element { Float32, Float64, BFloat16, Float16 };

// A tensor (N, C, T, H, W) with any strides, counted in elements (zero where a bound is broadcast).
struct View {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

}  // namespace captum_dtd::cuda
