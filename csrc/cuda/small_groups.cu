#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "device.h"
#include "implicit_gemm.h"
#include "in_time.h"
#include "operands.h"
#include "small_groups.h"

namespace captum_dtd::cuda {
namespace {

constexpr int64_t kMostChannels = 4;  // of a group
constexpr int kGroupThreads = 256;    // of a block

// A sweep, and what becomes of its sums.
struct GroupSums {
  Lifted from;      // what is read
  int c_in, c_out;  // of one group
  int channels;     // written, of all groups
  int parts;        // of the weights: of what is read where that is lifted, else of what is written
  int in[3], grid[3], stride[3], base[3], step[3], taps[3], out_base[3], out_step[3];
  int first_tap[3], tap_skip[3], filter[3];
  int examples;
  const float* weights;             // [part][tap of the filter][channel that is read, of a group][channel that is written]
  DeviceTable times, taps_of_time;  // [time][most]: what is read by which tap, then -1; null where geometry says so
  int most;

  Epilogue epilogue;
  View relevance;  // Divide
  const void* bias;
  Element bias_element;
  float stabilizer;
  bool relu;           // Add
  Lifted u;            // Share
  DeviceTable stored;  // at which time u is kept that stands for one of the result's
  View to;
  Element to_element;
  bool in_quads;  // four channels of what is written, and of what the epilogue reads, are neighbours
};

__device__ __forceinline__ int64_t place_of(const View& view, int n, int t, int h, int w) {
  return n * view.stride[0] + t * view.stride[2] + h * view.stride[3] + w * view.stride[4];
}

// Both parts of a number that is read, or itself.
__device__ __forceinline__ float2 lifted_at(const Lifted& u, int n, int channel, int t, int h, int w) {
  const float x = load_element(u.x.data, place_of(u.x, n, t, h, w) + channel * u.x.stride[1], u.element);
  if (u.lift == Lift::None) return {x, 0};
  float low = 0, high = 0;
  if (u.lift == Lift::Box) {
    low = __ldg(static_cast<const float*>(u.low.data) + place_of(u.low, n, t, h, w) + channel * u.low.stride[1]);
    high = __ldg(static_cast<const float*>(u.high.data) + place_of(u.high, n, t, h, w) + channel * u.high.stride[1]);
  }
  return lift_value(u.lift, x, low, high);
}

// Calls body(tap of the filter, time, row and column that it reads) for what an output position reads.
template <typename Body>
__device__ __forceinline__ void each_tap(const GroupSums& s, int n, int t, int h, int w, Body body) {
  const bool by_table = s.times.data != nullptr;
  const int count = by_table ? s.most : s.taps[0];
  for (int i = 0; i < count; ++i) {
    int time = t * s.stride[0] + s.base[0] + i * s.step[0], tap_t = s.first_tap[0] + i * s.tap_skip[0];
    if (by_table) {
      time = __ldg(s.times.row(n) + t * s.most + i);
      tap_t = __ldg(s.taps_of_time.row(n) + t * s.most + i);
      if (time < 0) break;
    }
    if (time < 0 || (!by_table && time >= s.in[0])) continue;
    for (int j = 0; j < s.taps[1]; ++j) {
      const int row = h * s.stride[1] + s.base[1] + j * s.step[1];
      if (row < 0 || row >= s.in[1]) continue;
      const int of_row = (tap_t * s.filter[1] + s.first_tap[1] + j * s.tap_skip[1]) * s.filter[2] + s.first_tap[2];
      for (int k = 0; k < s.taps[2]; ++k) {
        const int column = w * s.stride[2] + s.base[2] + k * s.step[2];
        if (column >= 0 && column < s.in[2]) body(of_row + k * s.tap_skip[2], time, row, column);
      }
    }
  }
}

__device__ __forceinline__ void write(const View& to, Element element, int64_t at, float value) {
  if (element == Element::Float32)
    static_cast<float*>(to.data)[at] = value;
  else if (element == Element::BFloat16)
    static_cast<bfloat16*>(to.data)[at] = narrow<bfloat16>(value);
  else
    static_cast<float16*>(to.data)[at] = narrow<float16>(value);
}

// `sums` are of both parts of what is written, or the first is all there is.
__device__ __forceinline__ void finish_sum(const GroupSums& s, int n, int channel, int t, int h, int w, float2 sums) {
  t = s.out_base[0] + t * s.out_step[0];
  h = s.out_base[1] + h * s.out_step[1];
  w = s.out_base[2] + w * s.out_step[2];
  const int64_t at = place_of(s.to, n, t, h, w) + channel * s.to.stride[1];
  float value = sums.x;
  if (s.epilogue == Epilogue::Share) {
    const int time = s.stored.data != nullptr ? __ldg(s.stored.row(n) + t) : t;
    const float2 u = lifted_at(s.u, n, channel, time, h, w);
    value = s.u.lift == Lift::None ? u.x * sums.x : u.x * sums.x + u.y * sums.y;
  } else {
    if (s.bias != nullptr) {
      const float bias = load_element(s.bias, channel, s.bias_element);
      value += s.epilogue == Epilogue::Divide ? positive(bias) : bias;
    }
    if (s.epilogue == Epilogue::Divide) {
      const int64_t given = place_of(s.relevance, n, t, h, w) + channel * s.relevance.stride[1];
      value = divide(__ldg(static_cast<const float*>(s.relevance.data) + given), value, s.stabilizer);
    }
    if (s.relu) value = positive(value);
  }
  write(s.to, s.to_element, at, value);
}

// The same of four neighbouring channels, where nothing is lifted.
__device__ __forceinline__ void finish_quad(const GroupSums& s, int n, int channel, int t, int h, int w, float (&sums)[4]) {
  t = s.out_base[0] + t * s.out_step[0];
  h = s.out_base[1] + h * s.out_step[1];
  w = s.out_base[2] + w * s.out_step[2];
  float read[4];
  if (s.epilogue == Epilogue::Share) {
    const int time = s.stored.data != nullptr ? __ldg(s.stored.row(n) + t) : t;
    load_quad(s.u.x.data, place_of(s.u.x, n, time, h, w) + channel, s.u.element, read);
  } else if (s.epilogue == Epilogue::Divide) {
    load_quad(s.relevance.data, place_of(s.relevance, n, t, h, w) + channel, Element::Float32, read);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (s.epilogue == Epilogue::Share) {
      sums[e] *= read[e];
      continue;
    }
    if (s.bias != nullptr) {
      const float bias = load_element(s.bias, channel + e, s.bias_element);
      sums[e] += s.epilogue == Epilogue::Divide ? positive(bias) : bias;
    }
    if (s.epilogue == Epilogue::Divide) sums[e] = divide(read[e], sums[e], s.stabilizer);
    if (s.relu) sums[e] = positive(sums[e]);
  }
  const int64_t quad = (place_of(s.to, n, t, h, w) + channel) >> 2;
  if (s.to_element == Element::Float32) {
    static_cast<float4*>(s.to.data)[quad] = {sums[0], sums[1], sums[2], sums[3]};
    return;
  }
  uint32_t bits[4];
#pragma unroll
  for (int e = 0; e < 4; ++e)
    bits[e] = s.to_element == Element::BFloat16 ? narrow<bfloat16>(sums[e]).bits : narrow<float16>(sums[e]).bits;
  static_cast<uint2*>(s.to.data)[quad] = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
}

// A thread's numbers: so many channels of an output position, neighbours in memory where there are several. Threads go along
// channels or, where neighbours along W are closer, along rows.
template <int kChannels, bool kAlongRows>
__global__ void __launch_bounds__(kGroupThreads, 1) sum_groups(const __grid_constant__ GroupSums s) {
  const unsigned blocks = s.channels / kChannels, rows = s.grid[1], width = s.grid[2];
  const unsigned i = blockIdx.x * kGroupThreads + threadIdx.x;
  if (i >= blocks * rows * width) return;
  const int w = kAlongRows ? i % width : i / blocks % width, h = kAlongRows ? i / width % rows : i / blocks / width;
  const int channel = static_cast<int>(kAlongRows ? i / width / rows : i % blocks) * kChannels;
  const int of_part = s.filter[0] * s.filter[1] * s.filter[2] * s.c_in * s.channels;
  const int first = channel / s.c_out * s.c_in;
  for (int nt = blockIdx.y; nt < s.examples * s.grid[0]; nt += gridDim.y) {
    const int n = nt / s.grid[0], t = nt % s.grid[0];
    float sums[2][kChannels] = {};
    each_tap(s, n, t, h, w, [&](int tap, int time, int row, int column) {
      const int c_in = kChannels == 4 ? 1 : s.c_in;  // quads are of depthwise layers
      for (int c = 0; c < c_in; ++c) {
        const float* const weights = s.weights + (tap * c_in + c) * s.channels + channel;
        if constexpr (kChannels == 4) {
          float x[4], own[4];
          load_quad(s.from.x.data, place_of(s.from.x, n, time, row, column) + channel, s.from.element, x);
          load_quad(weights, 0, Element::Float32, own);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[0][e] += x[e] * own[e];
        } else {
          const float2 x = lifted_at(s.from, n, first + c, time, row, column);
          const float own = __ldg(weights), other = s.parts > 1 ? __ldg(weights + of_part) : 0;
          const bool lifts = s.from.lift != Lift::None;
          sums[0][0] += lifts ? x.x * own + x.y * other : x.x * own;
          sums[1][0] += lifts ? 0 : x.x * other;
        }
      }
    });
    if constexpr (kChannels == 4)
      if (s.in_quads) {
        finish_quad(s, n, channel, t, h, w, sums[0]);
        continue;
      }
#pragma unroll
    for (int e = 0; e < kChannels; ++e) finish_sum(s, n, channel + e, t, h, w, {sums[0][e], sums[1][e]});
  }
}

// A filter as threads read it.
struct GroupWeights {
  const void* filter;
  Element element;
  bool is_adjoint, clips;
  int c_in, c_out, channels, volume, parts;  // as of the sums
  float* to;

  int64_t count() const { return int64_t(parts) * volume * c_in * channels; }
};

__global__ void __launch_bounds__(kGroupThreads, 1) lay_weights(const __grid_constant__ GroupWeights weights) {
  const int i = blockIdx.x * kGroupThreads + threadIdx.x;
  if (i >= weights.parts * weights.volume * weights.c_in * weights.channels) return;
  const int channel = i % weights.channels, c = i / weights.channels % weights.c_in;
  const int tap = i / weights.channels / weights.c_in % weights.volume,
            part = i / weights.channels / weights.c_in / weights.volume;
  const int group = channel / weights.c_out, lane = channel % weights.c_out;
  const int of_filter = weights.is_adjoint ? (group * weights.c_in + c) * weights.c_out + lane : channel * weights.c_in + c;
  const float value = load_element(weights.filter, int64_t(of_filter) * weights.volume + tap, weights.element);
  weights.to[i] = !weights.clips ? value : part == 0 ? positive(value) : negative(value);
}

// What every time of a pass reads, by which taps, of each row of tables.
struct TimeLists {
  int64_t rows = 0, most = 0;
  std::vector<int16_t> times, taps;
  std::vector<int16_t> stored;  // of the adjoint: at which time of x each time of the result stands
};

// Forward, an output time reads times of x; in the adjoint, a time of the result reads what output times left, perhaps several by
// the same tap. `reads` is null where there are no tables.
TimeLists time_lists(const Conv3d& conv, const TimeTable& reads, const TimeTable& gives, bool is_adjoint) {
  TimeLists lists;
  if (reads.data == nullptr) return lists;
  lists.rows = reads.of_each_example || gives.of_each_example ? conv.n : 1;
  const int64_t size = is_adjoint ? conv.in[0] : conv.out[0];
  std::vector<std::vector<std::pair<int64_t, int64_t>>> read(static_cast<size_t>(lists.rows * size));
  if (is_adjoint) lists.stored.assign(read.size(), 0);  // where nothing is given it does not matter
  for (int64_t row = 0; row < lists.rows; ++row)
    for (int64_t out = 0; out < conv.out[0]; ++out)
      for (int64_t tap = 0; tap < conv.kernel[0]; ++tap) {
        const int64_t from = reads.row(conv, row)[out * conv.kernel[0] + tap];
        if (from < 0) continue;
        if (!is_adjoint) {
          read[row * size + out].emplace_back(from, tap);
        } else if (const int64_t to = gives.row(conv, row)[out * conv.kernel[0] + tap]; to >= 0) {
          read[row * size + to].emplace_back(out, tap);
          lists.stored[row * size + to] = detail::number(from);
        }
      }
  for (const auto& list : read) lists.most = std::max(lists.most, static_cast<int64_t>(list.size()));
  lists.most = std::max<int64_t>(lists.most, 1);  // a time that reads nothing says so, too
  lists.times.assign(read.size() * lists.most, -1);
  lists.taps.assign(read.size() * lists.most, 0);
  for (size_t i = 0; i < read.size(); ++i)
    for (size_t j = 0; j < read[i].size(); ++j) {
      lists.times[i * lists.most + j] = detail::number(read[i][j].first);
      lists.taps[i * lists.most + j] = detail::number(read[i][j].second);
    }
  return lists;
}

// Threads are numbered in 31 bits.
dim3 blocks_of(int64_t threads) {
  if (threads > INT32_MAX) throw std::invalid_argument("this convolution is too large for one launch of its CUDA kernels");
  return blocks_for(threads, kGroupThreads);
}

// One pass: lays the weights, then sums by sweeps, which differ in geometry.
void run_pass(const Conv3d& conv, const void* filter, Element element, bool clips, GroupSums sums, float* weights,
              bool is_adjoint, const View& neighbours, void* stream) {
  const std::vector<Sweep> sweeps = is_adjoint ? adjoint_sweeps(conv) : std::vector<Sweep>{forward_sweep(conv)};
  const Sweep& any = sweeps.front();
  sums.c_in = static_cast<int>(any.c_in);
  sums.c_out = static_cast<int>(any.c_out);
  sums.channels = static_cast<int>(any.c_out * any.groups);
  sums.examples = static_cast<int>(conv.n);
  sums.weights = weights;
  const int64_t volume = conv.kernel[0] * conv.kernel[1] * conv.kernel[2];
  const GroupWeights laid{filter,     element, is_adjoint, clips, sums.c_in, sums.c_out, sums.channels, static_cast<int>(volume),
                          sums.parts, weights};
  if (laid.count() > 0) launch("lay_weights", lay_weights, blocks_of(laid.count()), dim3(kGroupThreads), 0, stream, laid);
  const bool are_depthwise = sums.c_in == 1 && sums.c_out == 1 && sums.channels % 4 == 0;
  const bool in_quads = are_depthwise && sums.parts == 1 && has_quads(sums.from.x, sums.from.element);
  sums.in_quads = in_quads && has_quads(sums.to, sums.to_element) &&
                  (sums.epilogue != Epilogue::Divide || has_quads(sums.relevance, Element::Float32)) &&
                  (sums.epilogue != Epilogue::Share || has_quads(sums.u.x, sums.u.element));
  const bool along_rows = neighbours.stride[4] != 0 && neighbours.stride[4] < neighbours.stride[1];
  for (const Sweep& sweep : sweeps) {
    copy(sweep.in, sums.in);
    copy(sweep.grid, sums.grid);
    copy(sweep.stride, sums.stride);
    copy(sweep.base, sums.base);
    copy(sweep.step, sums.step);
    copy(sweep.taps, sums.taps);
    copy(sweep.out_base, sums.out_base);
    copy(sweep.out_step, sums.out_step);
    copy(sweep.first_tap, sums.first_tap);
    copy(sweep.tap_skip, sums.tap_skip);
    copy(sweep.filter, sums.filter);
    const int64_t of_plane = sweep.grid[1] * sweep.grid[2] * sums.channels, planes = conv.n * sweep.grid[0];
    if (of_plane == 0 || planes == 0) continue;
    if (planes > INT32_MAX - UINT16_MAX)
      throw std::invalid_argument("this convolution has more times than its CUDA kernels can count");
    dim3 grid = blocks_of(of_plane / (in_quads ? 4 : 1));
    grid.y = static_cast<unsigned>(std::min<int64_t>(planes, UINT16_MAX));
    const auto kernel = in_quads ? sum_groups<4, false> : along_rows ? sum_groups<1, true> : sum_groups<1, false>;
    launch("sum_groups", kernel, grid, dim3(kGroupThreads), 0, stream, sums);
  }
}

int64_t floats_of_weights(const Conv3d& conv, int parts) {
  return parts * conv.kernel[0] * conv.kernel[1] * conv.kernel[2] * conv.c_out * (conv.c_in / conv.groups);
}

int64_t bytes_of(const TimeLists& lists) {
  return static_cast<int64_t>((lists.times.size() + lists.taps.size() + lists.stored.size()) * sizeof(int16_t));
}

void set_times(GroupSums& sums, const TimeLists& lists, TableWriter& writer) {
  sums.most = static_cast<int>(lists.most);
  sums.times = writer.add(lists.times, lists.rows);
  sums.taps_of_time = writer.add(lists.taps, lists.rows);
}

}  // namespace

bool has_small_groups(const Conv3d& conv) {
  return conv.groups > 1 && std::max(conv.c_in, conv.c_out) / conv.groups <= kMostChannels;
}

void small_groups_relevance(const Conv3dRelevance& p, const Allocate& allocate, void* stream) {
  const Conv3d& conv = p.conv;
  const TimeLists reads = p.divided ? TimeLists{} : time_lists(conv, p.reads, {}, false);
  const TimeLists gathers = time_lists(conv, p.reads, p.gives, true);
  const int lifted = parts(p.lift);
  const int64_t positions = conv.out[0] * conv.out[1] * conv.out[2];
  int64_t bytes = 0;
  const int64_t weights = reserve_bytes(bytes, floats_of_weights(conv, lifted) * static_cast<int64_t>(sizeof(float)));
  const int64_t shares =
      reserve_bytes(bytes, p.divided ? 0 : conv.n * positions * conv.c_out * static_cast<int64_t>(sizeof(float)));
  const int64_t tables = reserve_bytes(bytes, bytes_of(reads) + bytes_of(gathers));
  unsigned char* const data = static_cast<unsigned char*>(allocate(static_cast<size_t>(bytes)));
  TableWriter writer(data + tables);
  const Lifted u{p.lift, p.element, p.x, p.low, p.high};
  float* const laid = reinterpret_cast<float*>(data + weights);
  const int64_t row = conv.out[2] * conv.c_out;
  const View s{data + shares, {positions * conv.c_out, 1, conv.out[1] * row, row, conv.c_out}};

  GroupSums forward{}, adjoint{};
  if (!p.divided) set_times(forward, reads, writer);
  set_times(adjoint, gathers, writer);
  adjoint.stored = writer.add(gathers.stored, gathers.rows);
  writer.write(stream);
  if (!p.divided) {
    forward.from = u;
    forward.parts = lifted;
    forward.epilogue = Epilogue::Divide;
    forward.relevance = p.relevance;
    forward.bias = p.bias;
    forward.bias_element = p.element;
    forward.stabilizer = static_cast<float>(p.stabilizer);
    forward.to = s;
    forward.to_element = Element::Float32;
    run_pass(conv, p.weight, p.element, true, forward, laid, false, p.relevance, stream);
  }
  adjoint.from = {Lift::None, Element::Float32, p.divided ? p.relevance : s, {}, {}};
  adjoint.parts = lifted;
  adjoint.epilogue = Epilogue::Share;
  adjoint.u = u;
  adjoint.to = p.out;
  adjoint.to_element = Element::Float32;
  run_pass(conv, p.weight, p.element, true, adjoint, laid, true, p.out, stream);
}

void small_groups_forward(const Conv3dForward& p, const Allocate& allocate, void* stream) {
  const TimeLists reads = time_lists(p.conv, p.reads, {}, false);
  int64_t bytes = 0;
  const int64_t weights = reserve_bytes(bytes, floats_of_weights(p.conv, 1) * static_cast<int64_t>(sizeof(float)));
  const int64_t tables = reserve_bytes(bytes, bytes_of(reads));
  unsigned char* const data = static_cast<unsigned char*>(allocate(static_cast<size_t>(bytes)));
  TableWriter writer(data + tables);
  GroupSums sums{};
  set_times(sums, reads, writer);
  writer.write(stream);
  sums.from = {Lift::None, p.element, p.x, {}, {}};
  sums.parts = 1;
  sums.epilogue = Epilogue::Add;
  sums.bias = p.bias;
  sums.bias_element = p.element;
  sums.relu = p.relu;
  sums.to = p.out;
  sums.to_element = p.element;
  run_pass(p.conv, p.weight, p.element, false, sums, reinterpret_cast<float*>(data + weights), false, p.out, stream);
}

}  // namespace captum_dtd::cuda
