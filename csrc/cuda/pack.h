// What the matrix products read, laid out for them: the weights' parts always, an input that is not lifted where its own
// layout or type will not do.
#pragma once

#include "implicit_gemm.h"

namespace captum_dtd::cuda {

// ------------------------------------------------------------------------------------------------ weights

struct PackedPhase {
  int taps[3], first_tap[3], tap_skip[3];
  int stages;
  int64_t first_chunk;  // chunks of the phases before
};

struct Weights {
  const void* data;  // (c_out, c_in / groups, kT, kH, kW)
  Element element;
  int filter[3];
  int64_t group_stride, column_stride, depth_stride;  // between groups, between channels of the columns and of the depth
  int columns, channels_in;                           // of one group: columns with both parts, channels unlifted
  int tap_chunks;
  int column_parts, depth_parts;  // how often a channel stands there: once, or once for each part of its lift
  bool clips;                     // v+ and -v-, otherwise v itself
  int phases;
  PackedPhase phase[kMaxPhases];
  int64_t chunks;  // of all phases
  unsigned char* packed;
};

// Writes [phase][group][stage][column][chunk]: for a rule v+ where the input's part 0 is read or written, -v- for part 1, and
// zeros where the depth is padded. One thread for each chunk.
template <typename Operand>
__global__ void __launch_bounds__(256, 1) pack_weights(const __grid_constant__ Weights weights) {
  constexpr int kElements = kChunk / sizeof(Operand);
  const int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= weights.chunks) return;
  int p = 0;
  while (p + 1 < weights.phases && index >= weights.phase[p + 1].first_chunk) ++p;
  const PackedPhase& phase = weights.phase[p];
  const int taps = phase.taps[0] * phase.taps[1] * phase.taps[2];
  const int64_t of_group = int64_t(weights.columns) * phase.stages * kStageChunks, group = (index - phase.first_chunk) / of_group;
  const int64_t i = (index - phase.first_chunk) % of_group, filled = int64_t(weights.columns) * taps * weights.tap_chunks;

  // Neighbouring threads read neighbouring weights: taps, then whichever channels are nearer.
  const bool columns_nearer = weights.column_stride < weights.depth_stride;
  const int64_t channels = i / taps;
  const int tap = i < filled ? static_cast<int>(i % taps) : taps;
  const int column = static_cast<int>(i >= filled      ? (i - filled) % weights.columns
                                      : columns_nearer ? channels % weights.columns
                                                       : channels / weights.tap_chunks);
  const int tap_chunk = static_cast<int>(i >= filled      ? (i - filled) / weights.columns
                                         : columns_nearer ? channels / weights.columns
                                                          : channels % weights.tap_chunks);
  const int depth = tap * weights.tap_chunks + tap_chunk, first_channel = tap_chunk * kElements;
  const int w = tap % phase.taps[2], h = tap / phase.taps[2] % phase.taps[1], t = tap / phase.taps[2] / phase.taps[1];
  const int64_t filter_at =
      (int64_t(phase.first_tap[0] + t * phase.tap_skip[0]) * weights.filter[1] + phase.first_tap[1] + h * phase.tap_skip[1]) *
          weights.filter[2] +
      phase.first_tap[2] + w * phase.tap_skip[2];
  const int64_t start = group * weights.group_stride + column / weights.column_parts * weights.column_stride + filter_at;
  union {
    Operand operands[kElements];
    uint4 chunk;
  };
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int depth_channel = first_channel + e;
    const int channel = depth_channel / weights.depth_parts;
    const int part = column % weights.column_parts + depth_channel % weights.depth_parts;
    float value = 0;
    if (tap < taps && channel < weights.channels_in) {
      value = load_element(weights.data, start + channel * weights.depth_stride, weights.element);
      if (weights.clips) value = part == 0 ? positive(value) : negative(value);
    }
    operands[e] = narrow<Operand>(value);
  }
  const int64_t line = (group * phase.stages + depth / kStageChunks) * weights.columns + column;
  reinterpret_cast<uint4*>(weights.packed)[phase.first_chunk + line * kStageChunks + depth % kStageChunks] = chunk;
}

// ------------------------------------------------------------------------------------------------ inputs

struct Arrange {
  View x;
  Element element;
  int n, size[3];
  int channels, padded;  // of one group
  int groups;
  int64_t group_stride;  // between groups of x, in elements
  DeviceTable members;   // [t][most]: the times of x that are added up at a time, then -1; none: that time alone
  int most;
  void* out;  // [n][t][h][w][group][padded]
};

constexpr int kSide = 32;  // positions and channels of a block

// Copies an input to a dense operand, channels last. A block reads along the axis whose elements are neighbours in x and
// writes along the channels, turning a square of both in shared memory.
template <typename Operand>
__global__ void __launch_bounds__(256, 1) arrange_input(const __grid_constant__ Arrange arrange) {
  using Square = float[kSide][kSide + 1];
  CAPTUM_DTD_SHARED(Square, square);
  const int64_t volume = int64_t(arrange.size[0]) * arrange.size[1] * arrange.size[2], positions = arrange.n * volume;
  const int64_t first_position = blockIdx.x * int64_t(kSide), channels = int64_t(arrange.groups) * arrange.padded;
  const int64_t first_channel = blockIdx.y * int64_t(kSide);
  const bool along_channels = arrange.x.stride[1] == 1;
  for (int i = threadIdx.x; i < kSide * kSide; i += blockDim.x) {
    const int channel = along_channels ? i % kSide : i / kSide, position = along_channels ? i / kSide : i % kSide;
    const int64_t p = first_position + position, c = first_channel + channel;
    float value = 0;
    if (p < positions && c < channels && c % arrange.padded < arrange.channels) {
      const int64_t h = p / arrange.size[2], t = h / arrange.size[1], n = t / arrange.size[0];
      const int64_t time = t - n * arrange.size[0];
      const int64_t at = n * arrange.x.stride[0] + c / arrange.padded * arrange.group_stride +
                         c % arrange.padded * arrange.x.stride[1] + (h - t * arrange.size[1]) * arrange.x.stride[3] +
                         (p - h * arrange.size[2]) * arrange.x.stride[4];
      if (arrange.members.data == nullptr) {
        value = load_element(arrange.x.data, at + time * arrange.x.stride[2], arrange.element);
      } else {
        const int16_t* members = arrange.members.row(n) + time * arrange.most;
        for (int i = 0; i < arrange.most && members[i] >= 0; ++i)
          value += load_element(arrange.x.data, at + members[i] * arrange.x.stride[2], arrange.element);
      }
    }
    square[position][channel] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSide * kSide; i += blockDim.x) {
    const int64_t p = first_position + i / kSide, c = first_channel + i % kSide;
    if (p < positions && c < channels)
      static_cast<Operand*>(arrange.out)[p * channels + c] = narrow<Operand>(square[i / kSide][i % kSide]);
  }
}

}  // namespace captum_dtd::cuda
