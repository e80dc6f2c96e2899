// How long z+ takes on convolutions of C3D and r3d_18, 16 clips at once, by every kernel, tile and number of splits: what the
// rates in csrc/cuda/conv3d.cu and warpgroup.cu were read from. Prints one JSON object a line; without rows and columns it is the
// tile that serves.
//
//   nvcc -O3 -std=c++17 -arch=native -I csrc/cuda -c csrc/cuda/conv3d.cu -o conv3d.o
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -c csrc/cuda/warpgroup.cu -o warpgroup.o
//   nvcc -O3 -std=c++17 -arch=native -I csrc/cuda benchmarks/tile_rates.cu conv3d.o warpgroup.o -o tile_rates && ./tile_rates
//   [conv3b ...]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv3d.h"

namespace {

using namespace captum_dtd;

constexpr int kClips = 16, kRuns = 7, kWarmUps = 2;

struct Layer {
  const char* name;
  int c_in, c_out, size[3], kernel, stride;
};

constexpr Layer kLayers[] = {
    {"C3D conv2a", 64, 128, {16, 56, 56}, 3, 1},    {"C3D conv3a", 128, 256, {8, 28, 28}, 3, 1},
    {"C3D conv3b", 256, 256, {8, 28, 28}, 3, 1},    {"C3D conv4a", 256, 512, {4, 14, 14}, 3, 1},
    {"C3D conv4b", 512, 512, {4, 14, 14}, 3, 1},    {"C3D conv5a", 512, 512, {2, 7, 7}, 3, 1},
    {"r3d_18 layer1", 64, 64, {16, 56, 56}, 3, 1},  {"r3d_18 layer2, strided", 64, 128, {16, 56, 56}, 3, 2},
    {"r3d_18 layer2", 128, 128, {8, 28, 28}, 3, 1}, {"r3d_18 layer3, strided", 128, 256, {8, 28, 28}, 3, 2},
    {"r3d_18 layer3", 256, 256, {4, 14, 14}, 3, 1}, {"r3d_18 layer4, strided", 256, 512, {4, 14, 14}, 3, 2},
};

constexpr int kTiles[][2] = {{0, 0}, {128, 256}, {256, 128}, {192, 128}, {256, 64}, {128, 128}, {128, 64}, {64, 64}, {128, 16}};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// What a ReLU leaves, or numbers of either sign: never zeros alone, on which a GPU is faster.
__global__ void fill(void* to, int64_t count, Element element, bool is_signed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u + 12345;
    bits = (bits ^ bits >> 16) * 0x85EBCA6Bu;
    bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
    const float uniform = (bits >> 8) * 0x1p-23f - 1, value = is_signed ? uniform : fmaxf(uniform, 0);
    if (element == Element::Float32)
      static_cast<float*>(to)[i] = value;
    else
      static_cast<uint16_t*>(to)[i] = __float_as_uint(value) >> 16;  // bfloat16, cut off
  }
}

// Memory on the device, full of numbers.
class Numbers {
 public:
  Numbers(int64_t count, Element element, bool is_signed) {
    check(cudaMalloc(&data_, count * (element == Element::Float32 ? 4 : 2)));
    fill<<<1024, 256>>>(data_, count, element, is_signed);
    check(cudaDeviceSynchronize());
  }
  ~Numbers() { cudaFree(data_); }
  Numbers(const Numbers&) = delete;

  void* data() const { return data_; }
  View channels_last(int64_t channels, const int64_t (&size)[3]) const {
    const int64_t line = channels * size[2], plane = line * size[1];
    return {data_, {plane * size[0], 1, plane, line, channels}};
  }

 private:
  void* data_ = nullptr;
};

Conv3d convolution(const Layer& layer) {
  Conv3d conv{};
  conv.n = kClips;
  conv.c_in = layer.c_in;
  conv.c_out = layer.c_out;
  conv.groups = 1;
  for (int a = 0; a < 3; ++a) {
    conv.in[a] = layer.size[a];
    conv.kernel[a] = layer.kernel;
    conv.stride[a] = layer.stride;
    conv.padding[a] = layer.kernel / 2;
    conv.dilation[a] = 1;
    conv.out[a] = (conv.in[a] + 2 * conv.padding[a] - layer.kernel) / layer.stride + 1;
  }
  return conv;
}

int64_t elements(int64_t channels, const int64_t (&size)[3]) { return kClips * channels * size[0] * size[1] * size[2]; }

// The median of some runs, in milliseconds.
float time(const Conv3dRelevance& problem, const std::string& kernel, cuda::Tiling tiling) {
  void* workspace = nullptr;  // of all runs, which ask for the same
  const auto allocate = [&](size_t bytes) {
    if (workspace == nullptr) check(cudaMalloc(&workspace, bytes));
    return workspace;
  };
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run < kRuns; ++run) {
    check(cudaEventRecord(begin));
    cuda::conv3d_relevance(problem, kernel, allocate, nullptr, tiling);
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (run >= kWarmUps) times.push_back(milliseconds);
  }
  check(cudaFree(workspace));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void measure(const Layer& layer, Element element) {
  const Conv3d conv = convolution(layer);
  const int64_t weights = int64_t(layer.c_in) * layer.c_out * layer.kernel * layer.kernel * layer.kernel;
  const Numbers x(elements(layer.c_in, conv.in), element, false), weight(weights, element, true);
  const Numbers relevance(elements(layer.c_out, conv.out), Element::Float32, false),
      out(elements(layer.c_in, conv.in), Element::Float32, false);
  Conv3dRelevance problem{};
  problem.conv = conv;
  problem.element = element;
  problem.x = x.channels_last(layer.c_in, conv.in);
  problem.relevance = relevance.channels_last(layer.c_out, conv.out);
  problem.out = out.channels_last(layer.c_in, conv.in);
  problem.weight = weight.data();
  const double flops = 4.0 * weights * kClips * conv.out[0] * conv.out[1] * conv.out[2];
  for (const std::string& kernel : cuda::conv3d_kernels(element))
    for (const auto& tile : kTiles)
      for (int splits : {0, 1, 2, 4, 8}) {
        if ((tile[0] == 0) != (splits == 0)) continue;
        if (splits > 1 && elements(1, conv.out) > 50'000) continue;  // enough blocks without
        float milliseconds;
        try {
          milliseconds = time(problem, kernel, {tile[0], tile[1], splits});
        } catch (const std::invalid_argument&) {
          continue;  // the kernel has no such tile
        }
        std::printf("{\"layer\": \"%s\", \"kernel\": \"%s\", \"type\": \"%s\", ", layer.name, kernel.c_str(),
                    element == Element::Float32 ? "float32" : "bfloat16");
        if (tile[0] != 0) std::printf("\"rows\": %d, \"columns\": %d, \"splits\": %d, ", tile[0], tile[1], splits);
        std::printf("\"ms\": %.4f, \"TFLOP/s\": %.1f}\n", milliseconds, flops / milliseconds / 1e9);
      }
}

}  // namespace

// Of all layers, or of those whose names have one of the arguments in them.
int main(int count, char** names) {
  for (const Layer& layer : kLayers) {
    const auto is_asked_for = [&](const char* part) { return std::strstr(layer.name, part) != nullptr; };
    if (count > 1 && std::none_of(names + 1, names + count, is_asked_for)) continue;
    for (Element element : {Element::Float32, Element::BFloat16}) measure(layer, element);
  }
}
