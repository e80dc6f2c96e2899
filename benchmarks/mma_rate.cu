// How fast this GPU's tensor cores take mma.sync, the instruction that the convolution kernels are made of: every warp
// multiplies registers over and over, with nothing to load. Prints one JSON object, TFLOP/s by operand.
//
//   nvcc -O3 -std=c++17 -arch=native -I csrc/cuda benchmarks/mma_rate.cu -o mma_rate && ./mma_rate
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "device.h"

namespace {

using namespace captum_dtd::cuda;

constexpr int kSums = 8;  // independent accumulators of a warp: enough to hide an instruction's latency
constexpr int kRounds = 4096;
constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;

template <typename Operand>
__global__ void __launch_bounds__(kThreads) multiply(float* out, uint32_t seed) {
  float sums[kSums][4] = {};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = seed * (threadIdx.x + i + 1);
  for (int i = 0; i < 2; ++i) b[i] = seed * (threadIdx.x + i + 7);
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int s = 0; s < kSums; ++s) multiply_add<Operand>(sums[s], a, b);
  float total = 0;
  for (int s = 0; s < kSums; ++s)
    for (int i = 0; i < 4; ++i) total += sums[s][i];
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// The median of ten launches, in TFLOP/s.
template <typename Operand>
double rate(int blocks, float* out) {
  constexpr int kDepth = 32 / (sizeof(Operand) == 4 ? 4 : 2);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run < 13; ++run) {
    check(cudaEventRecord(begin));
    multiply<Operand><<<blocks, kThreads>>>(out, 0x3f803f80u + run);
    check(cudaGetLastError());
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (run >= 3) times.push_back(milliseconds);
  }
  std::sort(times.begin(), times.end());
  const double flops = 2.0 * 16 * 8 * kDepth * kSums * kRounds * (kThreads / 32) * blocks;
  return flops / (times[times.size() / 2] * 1e-3) / 1e12;
}

}  // namespace

int main() {
  int multiprocessors;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const int blocks = multiprocessors * kBlocksPerMultiprocessor;
  float* out;
  check(cudaMalloc(&out, blocks * kThreads * sizeof(float)));
  std::printf("{\"tf32\": %.1f, \"bf16\": %.1f, \"f16\": %.1f}\n", rate<tfloat32>(blocks, out), rate<bfloat16>(blocks, out),
              rate<float16>(blocks, out));
}
