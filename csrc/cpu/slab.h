// What a sweep reads, and how it gets from memory of any layout into a slab.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "conv3d.h"
#include "loops.h"
#include "plan.h"
#include "streaming.h"

namespace captum_dtd::cpu {

// A sweep's input: x under a lift. Bounds are there where the lift is Box.
struct Source {
  View x;
  Element element;
  Lift lift = Lift::None;
  View low, high;
};

// Neighbouring channels of positions along W that are `step` apart. As a block, its rows are positions and its columns
// channels, or the other way round where it is planar.
struct Spot {
  int64_t n, channel, t, h, w;
  int64_t positions, channels;
  int64_t step;
  bool planar;

  int64_t rows() const { return planar ? channels : positions; }
  int64_t columns() const { return planar ? positions : channels; }
};

// Where neighbouring positions of a sweep's grid are written.
inline Spot written(const Sweep& sweep, Spot spot) {
  spot.t = sweep.out_base[0] + spot.t * sweep.out_step[0];
  spot.h = sweep.out_base[1] + spot.h * sweep.out_step[1];
  spot.w = sweep.out_base[2] + spot.w * sweep.out_step[2];
  spot.step = sweep.out_step[2];
  return spot;
}

// A spot in a view's memory.
struct Place {
  char* data;
  int64_t row_stride, column_stride;
};

inline Place place(const View& view, Element element, const Spot& spot) {
  const int64_t* stride = view.stride;
  const int64_t at = spot.n * stride[0] + spot.channel * stride[1] + spot.t * stride[2] + spot.h * stride[3] + spot.w * stride[4];
  const int64_t across_positions = spot.step * stride[4], across_channels = stride[1];
  return {static_cast<char*>(view.data) + at * element_bytes(element), spot.planar ? across_channels : across_positions,
          spot.planar ? across_positions : across_channels};
}

template <typename Sum>
void load(const Loops<Sum>& loops, const View& view, Element element, const Spot& spot, Sum* to, int64_t pitch) {
  const Place from = place(view, element, spot);
  loops.load(element, from.data, from.row_stride, from.column_stride, spot.rows(), spot.columns(), to, pitch);
}

template <typename Sum>
void store(const Loops<Sum>& loops, const Sum* from, int64_t pitch, const View& view, Element element, const Spot& spot,
           bool stream) {
  const Place to = place(view, element, spot);
  loops.store(element, from, pitch, spot.rows(), spot.columns(), to.data, to.row_stride, to.column_stride, stream);
}

// Lets a spot come nearer that is read soon: a block's rows are too short for the processor to see what follows.
inline void approach(const View& view, Element element, const Spot& spot) {
  asm volatile("");  // GCC drops calls of functions without effects, and it knows none of prefetching
  const Place from = place(view, element, spot);
  if (from.column_stride != 1) return;
  const int64_t pitch = from.row_stride * element_bytes(element), bytes = spot.columns() * element_bytes(element);
  for (int64_t row = 0; row < spot.rows(); ++row)
    for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(from.data + row * pitch + at, 0, 2);
}

// Columns next to each other, rows `pitch` apart.
template <typename Sum>
struct Block {
  Sum* data;
  int64_t pitch;
};

// The spot's own memory where it is a block of such numbers, else `room`.
template <typename Sum>
Block<Sum> block_of(const View& view, Element element, const Spot& spot, Sum* room) {
  const Place at = place(view, element, spot);
  if (element == element_of<Sum>() && at.column_stride == 1) return {reinterpret_cast<Sum*>(at.data), at.row_stride};
  return {room, spot.columns()};
}

// The same, filled with what the spot has.
template <typename Sum>
Block<const Sum> loaded(const Loops<Sum>& loops, const View& view, Element element, const Spot& spot, Sum* room) {
  const Block<Sum> block = block_of(view, element, spot, room);
  if (block.data == room) load(loops, view, element, spot, room, block.pitch);
  return {block.data, block.pitch};
}

// One part of the lifted input; `bound` is room for as many numbers.
template <typename Sum>
void load_lifted(const Loops<Sum>& loops, const Source& source, int part, const Spot& spot, Sum* to, Sum* bound, int64_t pitch) {
  load(loops, source.x, source.element, spot, to, pitch);
  if (source.lift == Lift::None) return;
  if (source.lift == Lift::Box) load(loops, part == 0 ? source.low : source.high, element_of<Sum>(), spot, bound, pitch);
  loops.lift(source.lift, part, spot.rows(), spot.columns(), to, bound, to, pitch);
}

// A block of a grid's positions, in one group of channels, or those that a plan takes together.
struct Region {
  int64_t n, count_n, group;
  int64_t first[3], count[3];

  int64_t positions() const { return count_n * count[0] * count[1] * count[2]; }
};

// Slabs of an example follow each other, and in it those of a group.
inline Region region(const Blocks& cut, int64_t n, int64_t groups, const int64_t (&grid)[3], int64_t slab) {
  Region region{};
  int64_t index[3];
  for (int a = 2; a >= 0; --a) {
    index[a] = slab % cut.blocks[a];
    slab /= cut.blocks[a];
  }
  region.group = slab % groups;
  region.n = slab / groups * cut.block_n;
  region.count_n = std::min(cut.block_n, n - region.n);
  for (int a = 0; a < 3; ++a) {
    region.first[a] = index[a] * cut.block[a];
    region.count[a] = std::clamp<int64_t>(grid[a] - region.first[a], 0, cut.block[a]);
  }
  return region;
}

inline Region region(const Plan& plan, int64_t slab) {
  if (!plan.of_groups()) return region(plan, plan.sweep.n, plan.sweep.groups, plan.sweep.grid, slab);
  // Neighbouring groups share cache lines, so those of a block follow each other.
  const int64_t bundles = plan.bundles();
  Region here = region(plan, plan.sweep.n, 1, plan.sweep.grid, slab / bundles);
  here.group = slab % bundles;
  return here;
}

template <typename Operand, typename Sum>
class SlabPacker {
 public:
  SlabPacker(const Plan& plan, const Loops<Sum>& loops, const Source& source, Operand* slab)
      : plan_(plan), loops_(loops), source_(source), slab_(slab) {}

  void pack(const Region& region) {
    const int64_t t_count = plan_.extent_of(0, region.count[0]), h_count = plan_.extent_of(1, region.count[1]);
    for (int64_t n = 0; n < region.count_n; ++n)
      for (int64_t t = 0; t < t_count; ++t) {
        const std::vector<int64_t> times = times_of(region, t);
        for (int64_t h = 0; h < h_count; ++h) {
          const int64_t row = ((n * plan_.extent[0] + t) * plan_.extent[1] + h) * plan_.extent[2];
          pack_row(region, region.n + n, times, input(region, 1, h), row);
        }
      }
  }

 private:
  static constexpr int64_t kBuffered = 4096;  // numbers lifted at a time

  // Where in the input a position of the slab lies.
  int64_t input(const Region& region, int a, int64_t position) const {
    return region.first[a] * plan_.sweep.stride[a] + plan_.sweep.base[a] + position * plan_.grain[a];
  }

  // Of the input, those whose sum is a time of the slab.
  std::vector<int64_t> times_of(const Region& region, int64_t t) const {
    if (plan_.sweep.in_time != nullptr) return plan_.sweep.in_time->times_of(t);
    const int64_t time = input(region, 0, t);
    return time >= 0 && time < plan_.sweep.in[0] ? std::vector<int64_t>{time} : std::vector<int64_t>{};
  }

  void pack_row(const Region& region, int64_t n, const std::vector<int64_t>& times, int64_t h, int64_t row) {
    const int64_t width = plan_.extent_of(2, region.count[2]), grain = plan_.grain[2];
    if (times.empty() || h < 0 || h >= plan_.sweep.in[1]) return clear(row, row + width);
    const int64_t groups = plan_.groups_of(region.group);
    const bool fills_lanes = !plan_.of_groups() || groups * plan_.sweep.c_out * plan_.output_parts == plan_.tiling.channels;
    const bool dense = !plan_.windows() && fills_lanes && plan_.depth() == plan_.chunks * plan_.chunk;
    if (!dense) clear(row, row + width);
    for (const Run& run : plan_.runs) {
      // The first position that lies within the input, and the one behind the last.
      const int64_t origin = input(region, 2, 0) + run.shift;
      const int64_t first = std::min(width, origin < 0 ? (-origin + grain - 1) / grain : 0);
      const int64_t last = std::clamp((plan_.sweep.in[2] - origin + grain - 1) / grain, first, width);
      if (dense && run.depth == 0) {
        clear(row, row + first);
        clear(row + last, row + width);
      }
      // Of several groups all channels are read at once, of which the run's are taken.
      const int64_t own = region.group * plan_.together * plan_.sweep.c_in;
      const int64_t channel = plan_.of_groups() ? own : own + run.channel;
      const int64_t channels = plan_.of_groups() ? groups * plan_.sweep.c_in : run.channels;
      Operand* to = slab_ + run.depth / plan_.chunk * plan_.chunk_elements + plan_.channel_at(run.depth % plan_.chunk);
      const int64_t most = kBuffered / channels;
      for (int64_t w = first; w < last; w += most)
        pack_run(run, times,
                 {n, channel, times[0], h, origin + w * grain, std::min(most, last - w), channels, grain, plan_.planar()},
                 to + (row + w) * plan_.position_pitch);
    }
  }

  // Zeros at neighbouring positions of the slab, in all of its depth.
  void clear(int64_t from, int64_t to) {
    if (from == to) return;
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      Operand* slab = slab_ + chunk * plan_.chunk_elements;
      if (plan_.planar()) {
        for (int64_t channel = 0; channel < plan_.chunk; channel += plan_.tiling.pair)
          fill_zeros(slab + plan_.channel_at(channel) + from * plan_.position_pitch, (to - from) * plan_.position_pitch);
      } else {
        fill_zeros(slab + from * plan_.position_pitch, (to - from) * plan_.position_pitch);
      }
    }
  }

  static void fill_zeros(Operand* at, int64_t count) {
    std::memset(static_cast<void*>(at), 0, static_cast<size_t>(count) * sizeof(Operand));
  }

  // `spot` is at the first of these times.
  void pack_run(const Run& run, const std::vector<int64_t>& times, Spot spot, Operand* to) {
    const int64_t pitch = spot.planar ? plan_.depth_pitch : plan_.position_pitch;
    const bool is_moved = plan_.of_groups() && (plan_.sweep.c_in != plan_.sweep.c_out || plan_.output_parts > 1);
    const bool is_sum = source_.lift != Lift::None || times.size() > 1;
    if (!is_moved && !is_sum && pack_as_it_is(run.product.operand, spot, to, pitch)) return;
    load_lifted(loops_, source_, run.part, spot, lifted_, bound_, spot.columns());
    for (size_t i = 1; i < times.size(); ++i) {
      spot.t = times[i];
      load_lifted(loops_, source_, run.part, spot, more_, bound_, spot.columns());
      loops_.add(spot.rows() * spot.columns(), more_, lifted_);
    }
    if (spot.planar && plan_.tiling.pair == 2) return write_pairs(run.product.operand, spot, to, pitch);
    if (is_moved) return write_groups(run, spot, to, pitch);
    if constexpr (std::is_same_v<Operand, Sum>) {
      loops_.store(element_of<Sum>(), lifted_, spot.columns(), spot.rows(), spot.columns(), to, pitch, 1, false);
    } else {
      loops_.round(run.product.operand, spot.rows(), spot.columns(), lifted_, spot.columns(), to, pitch);
    }
  }

  // Two neighbouring channels of a position next to each other.
  void write_pairs(Digit digit, const Spot& spot, Operand* to, int64_t pitch) {
    if constexpr (std::is_same_v<Operand, bfloat16>) {
      const int64_t columns = spot.columns();
      loops_.round(digit, spot.rows(), columns, lifted_, columns, rounded_, columns);
      for (int64_t row = 0; row < spot.rows(); row += 2)
        for (int64_t column = 0; column < columns; ++column) {
          Operand* const pair = to + row / 2 * pitch + 2 * column;
          pair[0] = rounded_[row * columns + column];
          pair[1] = rounded_[(row + 1) * columns + column];
        }
    }
  }

  // A run's channels of every group, as far apart as the channels that it writes, and once for each output part.
  void write_groups(const Run& run, const Spot& spot, Operand* to, int64_t pitch) {
    if constexpr (std::is_same_v<Operand, Sum>) {
      const int64_t c_in = plan_.sweep.c_in;
      for (int part = 0; part < plan_.output_parts; ++part)
        loops_.regroup(spot.positions, spot.channels / c_in, run.channels, lifted_ + run.channel, spot.channels, c_in,
                       to + part * plan_.block_channels, pitch, plan_.sweep.c_out);
    }
  }

  // What needs neither lifting nor adding: in one pass over memory, if it lies there as it must.
  bool pack_as_it_is(Digit digit, const Spot& spot, Operand* to, int64_t pitch) const {
    if constexpr (std::is_same_v<Operand, Sum>) {
      load(loops_, source_.x, source_.element, spot, to, pitch);
      return true;
    } else {
      const Place from = place(source_.x, source_.element, spot);
      if (spot.planar) return pack_pairs_as_they_are(digit, from, spot, to, pitch);
      if (from.column_stride != 1) return false;
      if (source_.element == element_of<Sum>()) {
        const Sum* const numbers = reinterpret_cast<const Sum*>(from.data);
        loops_.round(digit, spot.rows(), spot.columns(), numbers, from.row_stride, to, pitch);
        return true;
      }
      if (source_.element != Element::BFloat16 || digit != Digit::High) return false;
      const int64_t row_bytes = from.row_stride * static_cast<int64_t>(sizeof(Operand));
      const bool is_dense = from.row_stride == spot.columns() && pitch == spot.columns();
      const int64_t rows = is_dense ? 1 : spot.rows(), columns = is_dense ? spot.rows() * spot.columns() : spot.columns();
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(to + row * pitch, from.data + row * row_bytes, static_cast<size_t>(columns) * sizeof(Operand));
      return true;
    }
  }

  // Pairs that lie next to each other in memory, too, are moved like floats.
  bool pack_pairs_as_they_are(Digit digit, const Place& from, const Spot& spot, Operand* to, int64_t pitch) const {
    const bool is_aligned = reinterpret_cast<uintptr_t>(from.data) % sizeof(Sum) == 0;
    const bool are_pairs =
        source_.element == Element::BFloat16 && from.row_stride == 1 && from.column_stride % 2 == 0 && is_aligned;
    if (!are_pairs || digit != Digit::High || sizeof(Sum) != 2 * sizeof(Operand)) return false;
    loops_.load(Element::Float32, from.data, 1, from.column_stride / 2, spot.rows() / 2, spot.columns(),
                reinterpret_cast<Sum*>(to), pitch / 2);
    return true;
  }

  const Plan& plan_;
  const Loops<Sum>& loops_;
  const Source& source_;
  Operand* slab_;
  alignas(64) bfloat16 rounded_[kBuffered];
  alignas(64) Sum lifted_[kBuffered];
  alignas(64) Sum more_[kBuffered];
  alignas(64) Sum bound_[kBuffered];
};

}  // namespace captum_dtd::cpu
