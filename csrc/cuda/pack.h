// What the matrix products read, laid out for them: the weights' parts always, an input where its own layout or type will not
// do, and a lifted one for warpgroups, which read nothing that is made on the way.
#pragma once

#include "implicit_gemm.h"

namespace captum_dtd::cuda {

// ------------------------------------------------------------------------------------------------ weights

struct PackedPhase {
  int taps[3], first_tap[3], tap_skip[3];
  bool adds_taps;  // along T, those of each set
  uint32_t sets[Pattern::kMostTaps];
  int stages;
  int64_t first_chunk;  // chunks of the phases before
};

struct Weights {
  const void* data;  // (c_out, c_in / groups, kT, kH, kW)
  Element element;
  int filter[3];
  int64_t group_stride, column_stride, depth_stride;  // between groups, between channels of the columns and of the depth
  int columns, channels_in;                           // of one group: columns with both parts, channels unlifted
  int packed_columns;                                 // padded to whole tiles
  int tap_chunks;
  int column_parts, depth_parts;  // how often a channel stands there: once, or once for each part of its lift
  bool clips;                     // v+ and -v-, otherwise v itself
  int stage_chunks;
  int phases;
  PackedPhase phase[kMaxPhases];
  int64_t chunks;  // of all phases
  unsigned char* packed;
};

// A chunk of an operand's values, and the chunk of their second halves behind it.
template <typename Operand, int kHalves>
__device__ __forceinline__ void store_chunks(void* to, int64_t chunk, const float (&values)[kChunk / sizeof(Operand)]) {
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    union {
      Operand operands[kChunk / sizeof(Operand)];
      uint4 bits;
    };
#pragma unroll
    for (int e = 0; e < int(kChunk / sizeof(Operand)); ++e) operands[e] = half_of<Operand>(values[e], half);
    store_global(static_cast<uint4*>(to) + chunk * kHalves + half, bits);
  }
}

// Writes [phase][group][stage][column][chunk]: for a rule v+ where the input's part 0 is read or written, -v- for part 1, and
// zeros where the depth is padded. One thread for each chunk, or for both halves of one.
template <typename Operand, int kHalves>
__global__ void __launch_bounds__(256, 4) pack_weights(const __grid_constant__ Weights weights) {
  constexpr int kElements = kChunk / sizeof(Operand);
  const int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= weights.chunks / kHalves) return;
  int p = 0;
  while (p + 1 < weights.phases && index >= weights.phase[p + 1].first_chunk / kHalves) ++p;
  const PackedPhase& phase = weights.phase[p];
  const int taps = phase.taps[0] * phase.taps[1] * phase.taps[2];
  const int stage_chunks = weights.stage_chunks / kHalves, tap_chunks = weights.tap_chunks / kHalves;
  const int64_t first = phase.first_chunk / kHalves, of_group = int64_t(weights.packed_columns) * phase.stages * stage_chunks;
  const int64_t group = (index - first) / of_group, i = index - first - group * of_group,
                filled = int64_t(weights.packed_columns) * taps * tap_chunks;

  // Neighbouring threads read neighbouring weights: taps, then whichever channels are nearer.
  const bool columns_nearer = weights.column_stride < weights.depth_stride;
  const int64_t channels = i / taps, rest = i - filled;
  const int64_t far =
      i >= filled ? rest / weights.packed_columns : channels / (columns_nearer ? weights.packed_columns : tap_chunks);
  const int64_t near =
      i >= filled ? rest - far * weights.packed_columns : channels - far * (columns_nearer ? weights.packed_columns : tap_chunks);
  const int tap = i < filled ? static_cast<int>(i - channels * taps) : taps;
  const int column = static_cast<int>(i >= filled || columns_nearer ? near : far);
  const int tap_chunk = static_cast<int>(i >= filled || columns_nearer ? far : near);
  const int depth = tap * tap_chunks + tap_chunk, first_channel = tap_chunk * kElements;
  const int w = tap % phase.taps[2], line_of_tap = tap / phase.taps[2], h = line_of_tap % phase.taps[1],
            t = line_of_tap / phase.taps[1];
  const int64_t plane = int64_t(weights.filter[1]) * weights.filter[2];
  // A channel stands there once or twice: what a division by that would be.
  const int of_column = weights.column_parts - 1, of_depth = weights.depth_parts - 1;
  const int64_t start = group * weights.group_stride + (column >> of_column) * weights.column_stride +
                        int64_t(phase.first_tap[1] + h * phase.tap_skip[1]) * weights.filter[2] + phase.first_tap[2] +
                        w * phase.tap_skip[2];
  const bool there = tap < taps && column < weights.columns;
  const auto channel_of = [&](int e) { return (first_channel + e) >> of_depth; };
  const auto is_there = [&](int e) { return there && channel_of(e) < weights.channels_in; };
  const auto part_of = [&](int e, float one) {
    const int part = (column & of_column) + ((first_channel + e) & of_depth);
    return !weights.clips ? one : part == 0 ? positive(one) : negative(one);
  };
  float values[kElements] = {};
  if (!phase.adds_taps) {
    const int64_t from = start + (phase.first_tap[0] + t * phase.tap_skip[0]) * plane;
    int64_t at[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) at[e] = is_there(e) ? from + channel_of(e) * weights.depth_stride : -1;
    load_elements(weights.data, at, weights.element, values);
#pragma unroll
    for (int e = 0; e < kElements; ++e) values[e] = part_of(e, values[e]);
  } else {
    for (int of_filter = 0; of_filter < weights.filter[0]; ++of_filter) {
      if (tap >= taps || !(phase.sets[t] >> of_filter & 1)) continue;
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (is_there(e))
          values[e] += part_of(
              e, load_element(weights.data, start + channel_of(e) * weights.depth_stride + of_filter * plane, weights.element));
    }
  }
  const int stage = depth / stage_chunks;
  const int64_t line = (group * phase.stages + stage) * weights.packed_columns + column;
  store_chunks<Operand, kHalves>(weights.packed, first + line * stage_chunks + (depth - stage * stage_chunks), values);
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
template <typename Operand, int kHalves, bool kAlongChannels>
__global__ void __launch_bounds__(256, 1) arrange_input(const __grid_constant__ Arrange arrange) {
  using Square = float[kSide][kSide + 1];
  CAPTUM_DTD_SHARED(Square, square);
  const int64_t volume = int64_t(arrange.size[0]) * arrange.size[1] * arrange.size[2], positions = arrange.n * volume;
  const int64_t first_position = blockIdx.x * int64_t(kSide), channels = int64_t(arrange.groups) * arrange.padded;
  const int64_t first_channel = blockIdx.y * int64_t(kSide);
  // A lane keeps its place along the one axis and goes along the other: places are found once, by division, and moved on.
  constexpr int kLines = 256 / kSide, kRounds = kSide / kLines;
  const int lane = threadIdx.x % kSide, line = threadIdx.x / kSide;
  const int position = kAlongChannels ? line : lane, channel = kAlongChannels ? lane : line;
  constexpr int down = kAlongChannels ? kLines : 0, across = kLines - down;
  const int64_t p = first_position + position, row = p / arrange.size[2], plane = row / arrange.size[1];
  int64_t n = plane / arrange.size[0];
  int t = static_cast<int>(plane - n * arrange.size[0]), h = static_cast<int>(row - plane * arrange.size[1]);
  int w = static_cast<int>(p - row * arrange.size[2]);
  int group = static_cast<int>(first_channel + channel) / arrange.padded;
  int of_group = static_cast<int>(first_channel + channel) - group * arrange.padded;
  int64_t at[kRounds];  // -1 where nothing is
  float values[kRounds] = {};
  int64_t from_position = 0, from_channel = 0;
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const bool there = p + k * down < positions && first_channel + channel + k * across < channels && of_group < arrange.channels;
    if (kAlongChannels || k == 0) from_position = n * arrange.x.stride[0] + h * arrange.x.stride[3] + w * arrange.x.stride[4];
    if (!kAlongChannels || k == 0) from_channel = group * arrange.group_stride + of_group * arrange.x.stride[1];
    const int64_t from = from_position + from_channel;
    at[k] = there ? from + t * arrange.x.stride[2] : -1;
    if (there && arrange.members.data != nullptr) {
      const int16_t* members = arrange.members.row(static_cast<int>(n)) + int64_t(t) * arrange.most;
      for (int i = 0; i < arrange.most && members[i] >= 0; ++i)
        values[k] += load_element(arrange.x.data, from + members[i] * arrange.x.stride[2], arrange.element);
    }
    for (w += down; kAlongChannels && w >= arrange.size[2]; w -= arrange.size[2]) {
      if (++h < arrange.size[1]) continue;
      h = 0;
      if (++t < arrange.size[0]) continue;
      t = 0;
      ++n;
    }
    for (of_group += across; !kAlongChannels && of_group >= arrange.padded; of_group -= arrange.padded) ++group;
  }
  if (arrange.members.data == nullptr) load_elements(arrange.x.data, at, arrange.element, values);
#pragma unroll
  for (int k = 0; k < kRounds; ++k) square[position + k * down][channel + k * across] = values[k];
  __syncthreads();
  constexpr int kTogether = kChunk / sizeof(Operand), kChunks = kSide / kTogether;  // no chunk reaches beyond the channels
  for (int i = threadIdx.x; i < kSide * kChunks; i += 256) {
    const int64_t to_position = first_position + i / kChunks, to_channel = first_channel + i % kChunks * kTogether;
    if (to_position >= positions || to_channel >= channels) continue;
    float chunk[kTogether];
#pragma unroll
    for (int e = 0; e < kTogether; ++e) chunk[e] = square[i / kChunks][i % kChunks * kTogether + e];
    store_chunks<Operand, kHalves>(arrange.out, (to_position * channels + to_channel) / kTogether, chunk);
  }
}

// The same where channels are neighbours, planes of x have no gaps and no group is padded: a row of blocks for each plane.
template <typename Operand, int kHalves>
__global__ void __launch_bounds__(256, 1) arrange_planes(const __grid_constant__ Arrange arrange) {
  constexpr int kElements = kChunk / sizeof(Operand);
  const int64_t chunks = int64_t(arrange.size[1]) * arrange.size[2] * arrange.groups * arrange.padded / kElements;
  const int64_t chunk = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (chunk >= chunks) return;
  for (int plane = blockIdx.y; plane < arrange.n * arrange.size[0]; plane += gridDim.y) {
    const int n = plane / arrange.size[0], t = plane % arrange.size[0];
    const int64_t at = n * arrange.x.stride[0] + chunk * kElements;
    float values[kElements] = {};
    const auto add = [&](int time) {
#pragma unroll
      for (int e = 0; e < kElements; e += 4) {
        float four[4];
        load_quad(arrange.x.data, at + time * arrange.x.stride[2] + e, arrange.element, four);
#pragma unroll
        for (int k = 0; k < 4; ++k) values[e + k] += four[k];
      }
    };
    if (arrange.members.data == nullptr) {
      add(t);
    } else {
      const int16_t* members = arrange.members.row(n) + t * arrange.most;
      for (int i = 0; i < arrange.most && members[i] >= 0; ++i) add(members[i]);
    }
    store_chunks<Operand, kHalves>(arrange.out, plane * chunks + chunk, values);
  }
}

// Both parts of an input's channels, side by side: a thread for each chunk, along whichever axis has neighbours in x.
struct LiftInput {
  Lifted u;
  int n, size[3];
  int channels, chunks;  // of one group: unlifted, and of the operand
  int groups;
  void* out;  // [n][t][h][w][group][chunk]
};

template <typename Operand, int kHalves>
__global__ void __launch_bounds__(256, 1) lift_input(const __grid_constant__ LiftInput input) {
  constexpr int kElements = kChunk / sizeof(Operand);
  const Lifted& u = input.u;
  const int64_t positions = int64_t(input.n) * input.size[0] * input.size[1] * input.size[2];
  const int64_t across = int64_t(input.groups) * input.chunks, index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= positions * across) return;
  const bool along_channels = u.x.stride[1] == 1;
  const int64_t p = along_channels ? index / across : index % positions, c = along_channels ? index % across : index / positions;
  const int64_t line = p / input.size[2], plane = line / input.size[1];
  const int w = static_cast<int>(p - line * input.size[2]), h = static_cast<int>(line - plane * input.size[1]);
  const int n = static_cast<int>(plane / input.size[0]), t = static_cast<int>(plane - int64_t(n) * input.size[0]);
  const int first = static_cast<int>(c % input.chunks) * (kElements / 2);
  const int64_t of_group = c / input.chunks * input.channels;
  float values[kElements] = {};
#pragma unroll
  for (int e = 0; e < kElements / 2; ++e) {
    if (first + e >= input.channels) break;
    const int64_t channel = of_group + first + e;
    const auto element = [&](const View& view, Element type) {
      return load_element(view.data, offset_of(view, n, t, h, w) + channel * view.stride[1], type);
    };
    const bool is_box = u.lift == Lift::Box;
    const float low = is_box ? element(u.low, Element::Float32) : 0, high = is_box ? element(u.high, Element::Float32) : 0;
    const float2 parts = lift_value(u.lift, element(u.x, u.element), low, high);
    values[2 * e] = parts.x;
    values[2 * e + 1] = parts.y;
  }
  store_chunks<Operand, kHalves>(input.out, p * across + c, values);
}

}  // namespace captum_dtd::cuda
