// Depthwise convolutions, and those whose groups have a few channels: too little is made of what is read for packing it to pay.
// Rows of the output are summed straight from memory, whose positions have all their channels next to each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "../geometry.h"
#include "../time_sums.h"
#include "buffer.h"
#include "direct_kernel.h"
#include "implicit_gemm.h"
#include "loops.h"
#include "slab.h"
#include "weights.h"

namespace captum_dtd::cpu {

struct DirectPlan {
  Sweep sweep;
  int lanes;
  int input_parts, output_parts;
  int64_t width, rows;  // of the output, summed before they are written

  int64_t of_group() const { return sweep.c_out; }
  int64_t channels() const { return sweep.groups * of_group(); }

  // The last channels of the last vector may be some of the last but one's, too.
  int64_t vectors() const { return (channels() + lanes - 1) / lanes; }
  int64_t first_channel(int64_t vector) const { return std::min(vector * lanes, channels() - lanes); }

  // Weights are packed as [part][vector][tap][channel that is read, of a group][lane].
  int64_t taps() const { return sweep.taps[0] * sweep.taps[1] * sweep.taps[2]; }
  int64_t of_tap() const { return of_group() * lanes; }
  int64_t of_part() const { return vectors() * taps() * of_tap(); }

  // Blocks of rows in a plane, and of the planes of an example: those of neighbouring times, which read much of the same, follow
  // each other.
  int64_t items() const { return (sweep.grid[1] + rows - 1) / rows * sweep.grid[0]; }
};

// Whether a kernel can serve a sweep, given what it reads.
template <typename Sum>
bool reads_directly(const DirectKernel<Sum>& kernel, const Sweep& sweep, const Source& source) {
  const int64_t of_group = sweep.c_out;
  const bool has_few = sweep.groups > 1 && sweep.c_in == of_group && of_group > 0 && sweep.groups * of_group >= kernel.lanes;
  const bool fills_lanes =
      has_few && kernel.lanes % of_group == 0 && (kernel.shuffles || of_group == 1 || of_group == kernel.lanes);
  const bool is_known = source.element == element_of<Sum>() || source.element == Element::BFloat16;
  return fills_lanes && is_known && source.lift != Lift::Box && source.x.stride[1] == 1;
}

inline DirectPlan make_direct_plan(const Sweep& sweep, int input_parts, int output_parts, int lanes, int64_t sum_bytes) {
  constexpr int64_t kSumsBytes = 32 << 10;  // of the first-level cache
  DirectPlan plan{sweep, lanes, input_parts, output_parts, 0, 0};
  const int64_t positions = std::max<int64_t>(kSumsBytes / (plan.channels() * output_parts * sum_bytes), lanes);
  const auto evenly = [](int64_t size, int64_t most) {
    const int64_t pieces = std::max<int64_t>((size + most - 1) / most, 1);
    return std::max<int64_t>((size + pieces - 1) / pieces, 1);
  };
  plan.width = evenly(sweep.grid[2], positions);
  plan.rows = evenly(sweep.grid[1], std::max<int64_t>(positions / plan.width, 1));
  return plan;
}

template <typename Sum>
std::shared_ptr<const Buffer> direct_weights(const Filter& filter, const Use& use, const DirectPlan& plan,
                                             const Loops<Sum>& loops, ParallelFor parallel_for) {
  constexpr int64_t kDirectly = -2;  // where other descriptions have how many channels are packed together
  const int parts = plan.input_parts * plan.output_parts;
  Description how{kDirectly, plan.lanes, parts, static_cast<int64_t>(sizeof(Sum))};
  const Sweep& sweep = plan.sweep;
  describe(filter, use, sweep, how);
  return kept(filter, loops, parallel_for, how, static_cast<size_t>(parts * plan.of_part()) * sizeof(Sum),
              [&](const Buffer& buffer) {
                const FilterStrides stride(filter, use);
                const int64_t of_group = plan.of_group(), next_group = filter.c_out * filter.c_in * filter.volume;
                Sum* to = buffer.as<Sum>();
                for (int part = 0; part < parts; ++part)
                  for (int64_t vector = 0; vector < plan.vectors(); ++vector)
                    for (int64_t tap = 0; tap < plan.taps(); ++tap)
                      for (int64_t channel = 0; channel < of_group; ++channel, to += plan.lanes) {
                        const int64_t at = plan.first_channel(vector) / of_group * next_group + channel * stride.depth +
                                           filter_tap(sweep, tap / (sweep.taps[1] * sweep.taps[2]),
                                                      tap / sweep.taps[2] % sweep.taps[1], tap % sweep.taps[2]);
                        loops.load(filter.element, static_cast<const char*>(filter.data) + at * element_bytes(filter.element),
                                   next_group, stride.lane, plan.lanes / of_group, of_group, to, of_group);
                        if (use.split) loops.lift(Lift::Signed, part, 1, plan.lanes, to, nullptr, to, plan.lanes);
                        // -v- times -x is v- times x, and kernels read x as it is.
                        if (part > 0 && plan.input_parts > 1) std::transform(to, to + plan.lanes, to, std::negate<Sum>());
                      }
              });
}

// Epilogue: as of a SweepRunner.
template <typename Sum, typename Epilogue>
class DirectRunner {
 public:
  DirectRunner(const DirectPlan& plan, const DirectKernel<Sum>& kernel, const Source& source, const Sum* weights,
               const Sum* start, const Epilogue& epilogue)
      : plan_(plan), kernel_(kernel), source_(source), weights_(weights), start_(start), epilogue_(epilogue) {}

  int64_t items() const { return plan_.sweep.n * plan_.items(); }

  void run(int64_t begin, int64_t end) const {
    Scratch& mine = scratch();
    const int64_t size = plan_.rows * plan_.width * plan_.channels();
    mine.sums.reserve(static_cast<size_t>(plan_.output_parts * size) * sizeof(Sum));
    mine.blocks.reserve(static_cast<size_t>(kEpilogueBlocks * plan_.width * plan_.channels()) * sizeof(Sum));
    const Sweep& sweep = plan_.sweep;
    std::vector<DirectRow<Sum>> rows;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / plan_.items(), t = item % sweep.grid[0];
      const int64_t first = item % plan_.items() / sweep.grid[0] * plan_.rows;
      Block block{n, t, first, std::min(plan_.rows, sweep.grid[1] - first), 0, 0, times_of(t), {}};
      if (t + 1 < sweep.grid[0]) block.next = times_of(t + 1);
      for (; block.w < sweep.grid[2]; block.w += plan_.width) {
        block.width = std::min(plan_.width, sweep.grid[2] - block.w);
        run_block(block, mine, rows);
      }
    }
    settle_streams();
  }

 private:
  // By which tap of T an input time is read.
  struct Reading {
    int64_t time, tap;
  };

  // Some rows of an output time, or a stretch of each.
  struct Block {
    int64_t n, t, h, rows, w, width;
    std::vector<Reading> times, next;  // that it reads, and the time behind it
  };

  std::vector<Reading> times_of(int64_t t) const {
    const Sweep& sweep = plan_.sweep;
    std::vector<Reading> found;
    if (sweep.in_time == nullptr) {
      int64_t begin = 0, end = sweep.taps[0];
      keep_reaching(sweep, 0, t, begin, end);
      for (int64_t tap = begin; tap < end; ++tap)
        found.push_back({t * sweep.stride[0] + sweep.base[0] + tap * sweep.step[0], tap});
      return found;
    }
    for (const TimeSum& sum : sweep.in_time->sums) {
      const auto is_here = [&](const TimeSum::Output& output) { return output.time == t; };
      if (std::none_of(sum.outputs.begin(), sum.outputs.end(), is_here)) continue;
      for (size_t i = 0; i < sum.frames.size(); ++i)
        for (const int64_t time : sweep.in_time->frames[sum.frames[i]])
          found.push_back({time, sum.first_tap + static_cast<int64_t>(i)});
    }
    return found;
  }

  void run_block(const Block& block, const Scratch& mine, std::vector<DirectRow<Sum>>& rows) const {
    const int64_t channels = plan_.channels(), of_part = block.rows * block.width * channels;
    const int64_t pieces = (block.width + kernel_.max_positions - 1) / kernel_.max_positions;
    const int64_t most = (block.width + pieces - 1) / pieces;
    Sum* const sums = mine.sums.template as<Sum>();
    for (int64_t w = 0; w < block.width; w += most) {
      const int64_t positions = std::min(most, block.width - w);
      rows.clear();
      std::vector<size_t> ends{0};  // of each output's
      for (int64_t h = block.h; h < block.h + block.rows; ++h) {
        add_rows(block, h, block.w + w, rows);
        ends.push_back(rows.size());
      }
      approach_new(block, block.w + w, positions);
      // What a vector of channels reads stays near for all rows.
      for (int part = 0; part < plan_.output_parts; ++part)
        for (int64_t vector = 0; vector < plan_.vectors(); ++vector)
          for (int64_t h = 0; h < block.rows; ++h)
            kernel_.run({source_.element, static_cast<int>(plan_.of_group()), static_cast<int>(positions), rows.data() + ends[h],
                         static_cast<int64_t>(ends[h + 1] - ends[h]), plan_.first_channel(vector),
                         part * plan_.of_part() + vector * plan_.taps() * plan_.of_tap(),
                         plan_.input_parts > 1 ? plan_.of_part() : 0, plan_.sweep.stride[2] * source_.x.stride[4], start_,
                         sums + part * of_part + (h * block.width + w) * channels + plan_.first_channel(vector), channels});
    }
    for (int64_t h = 0; h < block.rows; ++h)
      epilogue_(written(plan_.sweep, {block.n, 0, block.t, block.h + h, block.w, block.width, channels, 1, false}),
                Sums<Sum>{sums + h * block.width * channels, channels, of_part, mine.blocks.template as<Sum>()});
  }

  int64_t input(int a, int64_t position, int64_t tap) const {
    return position * plan_.sweep.stride[a] + plan_.sweep.base[a] + tap * plan_.sweep.step[a];
  }

  // What output positions from w on read, in a row.
  void add_rows(const Block& block, int64_t h, int64_t w, std::vector<DirectRow<Sum>>& rows) const {
    constexpr int64_t kJoined = DirectKernel<Sum>::kJoined;
    const Sweep& sweep = plan_.sweep;
    int64_t h_begin = 0, h_end = sweep.taps[1];
    keep_reaching(sweep, 1, h, h_begin, h_end);
    const bool are_neighbours = sweep.stride[2] == 1 && sweep.step[2] == 1;
    for (const Reading& reading : block.times)
      for (int64_t tap_h = h_begin; tap_h < h_end; ++tap_h)
        for (int64_t tap = 0, taps; tap < sweep.taps[2]; tap += taps) {
          taps = are_neighbours && sweep.taps[2] - tap >= kJoined ? kJoined : 1;
          const int64_t at = input(2, w, tap);
          const auto steps_to = [&](int64_t position) {  // until it is reached
            const int64_t distance = position - at, step = sweep.stride[2];
            return distance > 0 ? (distance + step - 1) / step : -(-distance / step);
          };
          const Spot spot{block.n, 0, reading.time, input(1, h, tap_h), at, 1, 1, 1, false};
          const int64_t weights = ((reading.tap * sweep.taps[1] + tap_h) * sweep.taps[2] + tap) * plan_.of_tap();
          rows.push_back({place(source_.x, source_.element, spot).data, steps_to(0), steps_to(sweep.in[2]), weights_ + weights,
                          static_cast<int>(taps)});
        }
  }

  // Lets come nearer what the next time reads and this does not.
  void approach_new(const Block& block, int64_t w, int64_t positions) const {
    const Sweep& sweep = plan_.sweep;
    const auto clipped = [&](int a, int64_t at) { return std::clamp<int64_t>(at, 0, sweep.in[a]); };
    const int64_t end_h = clipped(1, input(1, block.h + block.rows - 1, sweep.taps[1] - 1) + 1);
    const int64_t first = clipped(2, w * sweep.stride[2]), end = clipped(2, (w + positions) * sweep.stride[2]);
    for (const Reading& reading : block.next) {
      const auto is_it = [&](const Reading& known) { return known.time == reading.time; };
      if (std::any_of(block.times.begin(), block.times.end(), is_it)) continue;
      for (int64_t h = clipped(1, input(1, block.h, 0)); h < end_h; ++h)
        approach(source_.x, source_.element, {block.n, 0, reading.time, h, first, end - first, plan_.channels(), 1, false});
    }
  }

  const DirectPlan& plan_;
  const DirectKernel<Sum>& kernel_;
  const Source& source_;
  const Sum* weights_;
  const Sum* start_;
  const Epilogue& epilogue_;
};

}  // namespace captum_dtd::cpu
