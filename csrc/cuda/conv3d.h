// The CUDA convolution kernels, and how one is asked for. The caller checks, allocates and names the stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../problems.h"

namespace captum_dtd::cuda {

// How a sweep is cut into blocks of positions, columns and depth. Zero: chosen from shapes and tables. Results do not depend on
// the device, but the order of sums, and so the last bits, depend on this.
struct Tiling {
  // 64 x 64, 128 x 16; not for tf32x3, or where a lifted input is read: 128 x 128, 128 x 64. Of warpgroups: 128 x 64, 128 x 16;
  // 256 x 64 for bf16x3, and for others 128 x 256, 256 x 128, 192 x 128, 128 x 128
  int rows = 0, columns = 0;
  int splits = 0;  // parts of the depth, summed up in a fixed order afterwards
};

// Kernels for inputs of this type, best first; none for Float64, which tensor cores would not serve faster:
//   wgmma/bf16x3  float32-grade: both operands split in two bfloat16, three products
//   wgmma/bf16    operands rounded to bfloat16
//   wgmma/f16     z from float16 operands; the adjoint as wgmma/bf16x3, since R / z leaves float16's range, and so are boxes
//   cuda/tf32x3   float32-grade: both operands split in two tfloat32, three products
//   cuda/tf32     operands rounded to tfloat32
//   cuda/bf16     operands rounded to bfloat16
//   cuda/f16      z from float16 operands; the adjoint as cuda/tf32, since R / z leaves float16's range, and so are boxes
// They need compute capability 8.0, those of warpgroups 9.0 (on others they are not listed). Groups of up to four channels are
// summed in float32 by all of them (small_groups.h).
std::vector<std::string> conv3d_kernels(Element element);

// Why neither these nor other kernels of ours run on the current device, as its driver says; empty where they do.
std::string refusal();

// Gives so many bytes of device memory, aligned to 256, that stay until the stream is done with what is launched now.
using Allocate = std::function<void*(size_t)>;

// Run a kernel by its name, which must be one of conv3d_kernels(problem.element), on `stream` (a cudaStream_t). Memory beside
// the tensors is asked for once at most, and nothing waited for; a launch that fails throws std::runtime_error.
void conv3d_relevance(const Conv3dRelevance& problem, const std::string& kernel, const Allocate& allocate, void* stream,
                      Tiling tiling = {});
void conv3d_forward(const Conv3dForward& problem, const std::string& kernel, const Allocate& allocate, void* stream,
                    Tiling tiling = {});

}  // namespace captum_dtd::cuda
