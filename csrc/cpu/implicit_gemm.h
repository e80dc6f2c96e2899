// A sweep as a matrix product that is never laid out as one: slabs of the input are packed, and register tiles run over them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "loops.h"
#include "microkernel.h"
#include "plan.h"
#include "planar_kernel.h"
#include "slab.h"
#include "streaming.h"

namespace captum_dtd::cpu {

// One thread's memory, kept for its next sweep.
struct Scratch {
  Buffer slab, sums, blocks;
  Buffer patch, outputs;  // of Winograd's tiles
};

inline Scratch& scratch() {
  thread_local Scratch mine;
  return mine;
}

// Sums of a spot of the grid: `of_part` apart where there are two output parts; `room` holds kEpilogueBlocks more such blocks.
template <typename Sum>
struct Sums {
  const Sum* data;
  int64_t pitch, of_part;
  Sum* room;
};

constexpr int kEpilogueBlocks = 3;

// What a sweep makes of slabs that are packed. `start` has what each output channel's sum begins with, and as many numbers more
// as a block has channels, or is null, as where there are two output parts. Epilogue: void(const Spot&, const Sums<Sum>&), the
// spot being what is written, and approach(const Spot&), called a while before.
template <typename Kernel, typename Operand, typename Sum, typename Epilogue>
class SweepRunner {
 public:
  SweepRunner(const Plan& plan, const Kernel& kernel, const Loops<Sum>& loops, const Operand* weights, const Sum* start,
              const Epilogue& epilogue)
      : plan_(plan), kernel_(kernel), loops_(loops), weights_(weights), start_(start), epilogue_(epilogue) {}

  // A planar kernel reads on to the end of its last vector.
  static constexpr int64_t kOverrun = std::is_same_v<Kernel, PlanarKernel<Operand, Sum>> ? 64 : 0;

  void reserve(Scratch& mine) const {
    mine.sums.reserve(static_cast<size_t>(sums_per_block()) * sizeof(Sum));
    mine.blocks.reserve(static_cast<size_t>(kEpilogueBlocks * spot_positions() * plan_.tiling.channels) * sizeof(Sum));
  }

  // Before blocks, on each thread.
  void begin() const {
    if constexpr (!kPlanar)
      if (kernel_.begin != nullptr) kernel_.begin();
  }

  // Blocks of channels.
  void run(int64_t slab, int64_t first, int64_t last, const Scratch& mine) const {
    const Region here = region(plan_, slab);
    if (here.positions() == 0) return;  // another sweep's grid reaches further
    const int64_t together = take_turns(last - first) ? last - first : 1;
    for (int64_t block = first; block < last; block += together) {
      if constexpr (kPlanar) {
        run_planar_block(here, block, mine);
      } else if (plan_.sweep.in_time != nullptr) {
        run_block_in_time(here, block, mine);
      } else {
        run_blocks(here, block, block + together, mine);
      }
    }
  }

 private:
  static constexpr bool kPlanar = std::is_same_v<Kernel, PlanarKernel<Operand, Sum>>;

  struct Position {
    int64_t n, at[3];
  };

  // The i-th position of a block, counted from the block's first.
  static Position position(const Region& here, int64_t i) {
    Position found{};
    for (int a = 2; a >= 0; --a) {
      found.at[a] = i % here.count[a];
      i /= here.count[a];
    }
    found.n = i;
    return found;
  }

  // Taps of T and H that reach into the input: padding is not multiplied where whole rows of it can be left out.
  struct Taps {
    int64_t t_begin, t_end, h_begin, h_end;

    bool empty() const { return t_begin >= t_end || h_begin >= h_end; }
    int64_t rows() const { return empty() ? 0 : (t_end - t_begin) * (h_end - h_begin); }
    bool begin_with(const Taps& first) const { return t_begin == first.t_begin && h_begin == first.h_begin; }
    Taps within(const Taps& some) const {
      return {std::max(t_begin, some.t_begin), std::min(t_end, some.t_end), std::max(h_begin, some.h_begin),
              std::min(h_end, some.h_end)};
    }
  };

  // Those of neighbouring positions, both ends included; narrowed where all lie in one plane.
  Taps taps_within(const Region& here, int64_t first, int64_t last) const {
    const Position from = position(here, first), to = position(here, last);
    Taps taps{0, plan_.taps[0], 0, plan_.taps[1]};
    if (plan_.tap_volume() == 0) return {0, 0, 0, 0};
    if (from.n != to.n || from.at[0] != to.at[0]) return taps;
    if (plan_.sweep.in_time == nullptr) keep_reaching(plan_.sweep, 0, here.first[0] + from.at[0], taps.t_begin, taps.t_end);
    Taps of_last = taps;
    keep_reaching(plan_.sweep, 1, here.first[1] + from.at[1], taps.h_begin, taps.h_end);
    keep_reaching(plan_.sweep, 1, here.first[1] + to.at[1], of_last.h_begin, of_last.h_end);
    // Rows that reach nothing say nothing of those between them.
    const bool all_reach = taps.h_begin < taps.h_end && of_last.h_begin < of_last.h_end;
    if (from.at[1] != to.at[1]) {
      taps.h_begin = all_reach ? std::min(taps.h_begin, of_last.h_begin) : 0;
      taps.h_end = all_reach ? std::max(taps.h_end, of_last.h_end) : plan_.taps[1];
    }
    return taps;
  }

  // The same of a sum by a table.
  static Taps taps_of(const TimeSum& sum, Taps taps) {
    taps.t_begin = 0;
    taps.t_end = static_cast<int64_t>(sum.frames.size());
    return taps;
  }

  // Calls body(first, count) for each stretch of taps that follow each other in the offsets and the packed weights.
  template <typename Body>
  void each_stretch(const Taps& taps, Body body) const {
    if (taps.empty()) return;
    const int64_t row = plan_.kernel_taps;
    if (taps.h_end - taps.h_begin == plan_.taps[1]) {
      body(taps.t_begin * plan_.taps[1] * row, (taps.t_end - taps.t_begin) * plan_.taps[1] * row);
    } else {
      for (int64_t t = taps.t_begin; t < taps.t_end; ++t)
        body((t * plan_.taps[1] + taps.h_begin) * row, (taps.h_end - taps.h_begin) * row);
    }
  }

  // ------------------------------------------------------------------------------------------- channels in lanes

  // Positions that are equally far apart in the slab: a row, or several `pitch` positions apart, with what lies between them.
  struct Line {
    int64_t row, rows, pitch;

    int64_t length() const { return (rows - 1) * pitch + row; }
  };

  // One call of the kernel: for a piece of a line.
  struct Call {
    int64_t start;         // the line's first position, of those of a block
    int64_t first, count;  // of the line's, the gaps counted too
    int64_t slab_at;       // in elements
    int64_t sums_at;       // in positions, where sums outlast their call
    Taps taps;
  };

  struct Calls {
    Line line;
    std::vector<Call> each;

    // Those of all sums that outlast their calls.
    int64_t positions() const { return each.back().sums_at + each.back().count; }
  };

  // Pieces of one size, and of what is left.
  Calls calls_of(const Region& here) const {
    Calls calls{line(here), {}};
    const auto& [row, rows, pitch] = calls.line;
    const int64_t length = calls.line.length(), pieces = pieces_of(length), most = (length + pieces - 1) / pieces;
    for (int64_t start = 0, sums_at = 0; start < here.positions(); start += rows * row, sums_at += length) {
      const int64_t slab_at = slab_position(here, start) * plan_.position_pitch;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = piece * most, last = std::min(first + most, length) - 1;
        const auto position_of = [&](int64_t i) { return start + i / pitch * row + std::min(i % pitch, row - 1); };
        calls.each.push_back({start, first, last + 1 - first, slab_at + first * plan_.stride[2] * plan_.position_pitch,
                              sums_at + first, taps_within(here, position_of(first), position_of(last))});
      }
    }
    return calls;
  }

  int64_t pieces_of(int64_t positions) const { return (positions + kernel_.max_positions - 1) / kernel_.max_positions; }

  // The rows of a plane are one line where gaps between them cost a kernel less than ends of rows.
  Line line(const Region& here) const {
    const int64_t row = line_length(here), rows = here.count[1], apart = plan_.stride[1] * plan_.extent[2];
    const Line plane{row, rows, apart / plan_.stride[2]};
    const bool can_span = kernel_.spans_gaps && row == here.count[2] && apart % plan_.stride[2] == 0;
    return can_span && pieces_of(plane.length()) < rows * pieces_of(row) ? plane : Line{row, 1, row};
  }

  // Whether blocks take turns, call by call: what a call reads of the slab comes to the first-level cache once for all of them,
  // and all channels of its positions end together. The weights of all these stay near then, and no sums outlast their call.
  bool take_turns(int64_t blocks) const {
    if constexpr (kPlanar) {
      return false;
    } else {
      const int64_t bytes = plan_.packed_block() * static_cast<int64_t>(sizeof(Operand));
      return plan_.sweep.in_time == nullptr && plan_.chunks == 1 && blocks > 1 && blocks * bytes <= 2 * kernel_.near_bytes;
    }
  }

  // Chunk by chunk, and perhaps some taps after the others, so that their weights stay in a cache for all positions.
  void run_blocks(const Region& here, int64_t first, int64_t last, const Scratch& mine) const {
    const int64_t channels = plan_.tiling.channels;
    const Calls calls = calls_of(here);
    const bool are_far = weights_are_far(calls);
    const std::vector<Taps> groups = groups_of({0, plan_.taps[0], 0, plan_.taps[1]}, are_far ? 1 : near_taps());
    const bool in_groups = are_far || kernel_.near_bytes > 0, outlast = plan_.chunks > 1 || groups.size() > 1;
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const Operand* slab = mine.slab.as<Operand>() + chunk * plan_.chunk_elements;
      const int64_t chunk_at = chunk * plan_.tap_volume() * plan_.chunk * channels;
      for (const Taps& group : groups) {
        const auto taps_in = [&](const Call& call) { return call.taps.within(group); };
        Approach<Operand> approach = approach_behind(group, block_weights(here, last - 1) + chunk_at,
                                                     (last - first) * rows_of(calls.each.data(), calls.each.size(), taps_in));
        for (const Call& call : calls.each)
          for (int64_t block = first; block < last; ++block) {
            const Operand* const weights = block_weights(here, block) + chunk_at;
            Sum* const sums = mine.sums.as<Sum>() + (outlast ? call.sums_at * channels : 0);
            const Taps taps = taps_in(call);
            const bool ends = chunk + 1 == plan_.chunks && &group == &groups.back();
            if (ends && &call == calls.each.data()) approach_end(here, block, calls.line, call);
            if (ends && &call != &calls.each.back()) approach_end(here, block, calls.line, (&call)[1]);
            const bool begins = call.taps.empty() ? &group == &groups.front() : !taps.empty() && taps.begin_with(call.taps);
            bool accumulate = !begins || begin_sums(here, block, chunk, sums, call.count, call.taps);
            each_stretch(taps, [&](int64_t tap, int64_t tap_count) {
              const Operand* const own = weights + tap * plan_.kernel_depth * channels;
              kernel_.run(static_cast<int>(call.count), slab + call.slab_at, plan_.stride[2] * plan_.position_pitch,
                          plan_.offsets.data() + tap, tap_count, plan_.kernel_depth, own, sums, accumulate,
                          in_groups ? approach.over(tap_count * steps_of_tap()) : ahead(own));
              accumulate = true;
            });
            if (ends) finish(here, block, calls.line, call, sums, mine);
          }
      }
    }
  }

  // What comes nearer while weights are multiplied: those a little further on.
  Ahead<Operand> ahead(const Operand* weights) const {
    constexpr int64_t kSteps = 192;  // of depth
    return {weights + kSteps * plan_.tiling.channels, plan_.tiling.channels};
  }

  int64_t steps_of_tap() const { return (plan_.kernel_depth + kernel_.step - 1) / kernel_.step; }

  // As many weights as a group's, of those behind them, while `calls` multiply it.
  Approach<Operand> approach_behind(const Taps& group, const Operand* weights, int64_t rows_multiplied) const {
    const int64_t channels = plan_.tiling.channels, row = plan_.kernel_taps * plan_.kernel_depth * channels;
    const int64_t behind = (group.t_end - 1) * plan_.taps[1] + group.h_end;
    return Approach<Operand>(weights + behind * row, group.rows() * row, rows_multiplied * plan_.kernel_taps * steps_of_tap(),
                             kernel_.step * channels);
  }

  // Rows of taps that calls multiply, all together.
  template <typename TapsOf>
  static int64_t rows_of(const Call* calls, int64_t count, TapsOf taps_of) {
    int64_t rows = 0;
    for (const Call* call = calls; call != calls + count; ++call) rows += taps_of(*call).rows();
    return rows;
  }

  // Whether a chunk's weights had better come from afar only once, tap by tap for all positions: where these are few, and their
  // sums stay near. What is summed in which order is the same.
  bool weights_are_far(const Calls& calls) const {
    constexpr int64_t kNearBytes = 16 << 10;
    const int64_t sums_bytes = calls.positions() * plan_.tiling.channels * static_cast<int64_t>(sizeof(Sum));
    return std::is_same_v<Operand, Sum> && plan_.chunks > 1 && calls.each.size() > 1 && sums_bytes <= kNearBytes;
  }

  // Rows of taps along W whose weights stay as near as the kernel wants them; all where it does not care.
  int64_t near_taps() const {
    const int64_t row_bytes =
        plan_.kernel_taps * plan_.kernel_depth * plan_.tiling.channels * static_cast<int64_t>(sizeof(Operand));
    return kernel_.near_bytes == 0 || row_bytes == 0 ? std::numeric_limits<int64_t>::max()
                                                     : std::max<int64_t>(kernel_.near_bytes / row_bytes, 1);
  }

  // Taps in so many rows at a time: whole planes of them, or rows of one.
  static std::vector<Taps> groups_of(const Taps& taps, int64_t rows) {
    const int64_t height = taps.h_end - taps.h_begin, depth = taps.t_end - taps.t_begin;
    if (taps.empty() || rows / height >= depth) return {taps};
    const int64_t planes = std::max<int64_t>(rows / height, 1), most = std::min(rows, height);
    std::vector<Taps> groups;
    for (int64_t t = taps.t_begin; t < taps.t_end; t += planes)
      for (int64_t h = taps.h_begin; h < taps.h_end; h += most)
        groups.push_back({t, std::min(t + planes, taps.t_end), h, std::min(h + most, taps.h_end)});
    return groups;
  }

  // The same where a table says what is read along T: products that several times share are taken once. A call's times follow
  // each other, or, where weights shall be near, all calls for some taps.
  void run_block_in_time(const Region& here, int64_t block, const Scratch& mine) const {
    const int64_t channels = plan_.tiling.channels;
    const Calls calls = calls_of(at_time(here, 0));
    const bool in_groups = plan_.chunks > 1 || plan_.taps[0] * plan_.taps[1] > near_taps();
    const int64_t together = in_groups && kernel_.near_bytes > 0 ? static_cast<int64_t>(calls.each.size()) : 1;
    const bool outlast = plan_.chunks > 1 || together > 1;
    const int64_t time_pitch = outlast ? calls.positions() : kernel_.max_positions;
    const Operand* weights = block_weights(here, block);
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const Operand* slab = mine.slab.as<Operand>() + chunk * plan_.chunk_elements;
      for (const Call* call = calls.each.data(); call != calls.each.data() + calls.each.size(); call += together) {
        Sum* const sums = mine.sums.as<Sum>() + (together == 1 && outlast ? call->sums_at * channels : 0);
        add_times(here, block, chunk, call, together, slab, weights, sums, time_pitch);
        if (chunk + 1 < plan_.chunks) continue;
        const int64_t ends = here.count[0] * together;
        for (int64_t i = 0; i < ends; ++i) {
          const Call& ending = call[i % together];
          if (i + 1 < ends) approach_end(at_time(here, (i + 1) / together), block, calls.line, call[(i + 1) % together]);
          finish(at_time(here, i / together), block, calls.line, ending,
                 sums + (i / together * time_pitch + (together > 1 ? ending.sums_at : 0)) * channels, mine);
        }
      }
      weights += plan_.tap_volume() * plan_.chunk * channels;
    }
  }

  static Region at_time(Region here, int64_t time) {
    here.first[0] += time;
    here.count[0] = 1;
    return here;
  }

  // Adds one chunk's products for some calls to the sums of all times, which are `time_pitch` positions apart; behind them is
  // room for what several times share.
  void add_times(const Region& here, int64_t block, int64_t chunk, const Call* calls, int64_t count, const Operand* slab,
                 const Operand* weights, Sum* sums, int64_t time_pitch) const {
    const int64_t channels = plan_.tiling.channels, row = plan_.kernel_taps * plan_.kernel_depth * channels;
    const auto sums_of = [&](const Call& call, int64_t time) {
      return sums + (time * time_pitch + (count > 1 ? call.sums_at : 0)) * channels;
    };
    each_sum_in_time(here, [&](const TimeSum& sum, const std::vector<int64_t>& offsets, const auto& outputs) {
      const auto to = [&](const Call& call, const TimeSum::Output& output) { return sums_of(call, output.time - here.first[0]); };
      const auto begin = [&](const Call& call, const TimeSum::Output& output) {
        return !output.begins || begin_sums(here, block, chunk, to(call, output), call.count, taps_of(sum, call.taps));
      };
      const bool is_shared = outputs.size() > 1;
      const std::vector<Taps> groups = groups_of(taps_of(sum, {0, 0, 0, plan_.taps[1]}), near_taps());
      const Operand* const first_weights = weights + sum.first_tap * plan_.taps[1] * row;
      for (const Taps& group : groups) {
        const auto taps_in = [&](const Call& call) { return taps_of(sum, call.taps).within(group); };
        Approach<Operand> approach = approach_behind(group, first_weights, rows_of(calls, count, taps_in));
        for (const Call* call = calls; call != calls + count; ++call) {
          const Taps own = taps_of(sum, call->taps), taps = taps_in(*call);
          if (taps.empty()) continue;
          Sum* const into = is_shared ? sums_of(*call, here.count[0]) : to(*call, outputs[0]);
          bool accumulate = !taps.begin_with(own) || (!is_shared && begin(*call, outputs[0]));
          each_stretch(taps, [&](int64_t tap, int64_t tap_count) {
            const Operand* const own_weights = first_weights + tap * plan_.kernel_depth * channels;
            kernel_.run(static_cast<int>(call->count), slab + call->slab_at, plan_.stride[2] * plan_.position_pitch,
                        offsets.data() + tap, tap_count, plan_.kernel_depth, own_weights, into, accumulate,
                        count > 1 ? approach.over(tap_count * steps_of_tap()) : ahead(own_weights));
            accumulate = true;
          });
        }
      }
      for (const Call* call = calls; call != calls + count; ++call) {
        const bool is_empty = taps_of(sum, call->taps).empty();
        if (!is_empty && !is_shared) continue;
        const Sum* const part = sums_of(*call, here.count[0]);
        for (const TimeSum::Output& output : outputs) {
          const bool accumulate = begin(*call, output);
          if (is_empty) continue;
          if (accumulate)
            loops_.add(call->count * channels, part, to(*call, output));
          else
            std::copy_n(part, call->count * channels, to(*call, output));
        }
      }
    });
  }

  // Calls body(sum, its offsets, its outputs that are here) for the sums of a table.
  template <typename Body>
  void each_sum_in_time(const Region& here, Body body) const {
    std::vector<TimeSum::Output> outputs;
    for (size_t i = 0; i < plan_.offsets_in_time.size(); ++i) {
      const TimeSum& sum = plan_.sweep.in_time->sums[i];
      outputs.clear();
      for (const TimeSum::Output& output : sum.outputs)
        if (output.time >= here.first[0] && output.time < here.first[0] + here.count[0]) outputs.push_back(output);
      if (!outputs.empty()) body(sum, plan_.offsets_in_time[i], outputs);
    }
  }

  // Whether the sums of a tile have a beginning that is to be added to.
  bool begin_sums(const Region& here, int64_t block, int64_t chunk, Sum* sums, int64_t count, const Taps& taps) const {
    if (chunk > 0) return true;
    if (start_ == nullptr && !taps.empty()) return false;
    const int64_t channels = plan_.tiling.channels;
    if (start_ == nullptr)
      std::fill_n(sums, count * channels, Sum(0));
    else
      loops_.load(element_of<Sum>(), start_ + first_channel(here, block), 0, 1, count, channels, sums, channels);
    return true;
  }

  // How many positions of a block are equally far apart in the slab: a row, or several where nothing is between them.
  int64_t line_length(const Region& here) const {
    int64_t line = here.count[2];
    const int64_t apart = plan_.stride[2];
    if (plan_.stride[1] * plan_.extent[2] != line * apart) return line;
    line *= here.count[1];
    if (plan_.stride[0] * plan_.extent[1] * plan_.extent[2] != line * apart) return line;
    line *= here.count[0];
    if (plan_.extent[0] * plan_.extent[1] * plan_.extent[2] != line * apart) return line;
    return line * here.count_n;
  }

  int64_t slab_position(const Region& here, int64_t i) const {
    const Position p = position(here, i);
    return ((p.n * plan_.extent[0] + p.at[0] * plan_.stride[0]) * plan_.extent[1] + p.at[1] * plan_.stride[1]) * plan_.extent[2] +
           p.at[2] * plan_.stride[2];
  }

  // Calls body(spot, which of the call's positions comes first) for each stretch of rows that a call computes.
  template <typename Body>
  void each_spot(const Region& here, int64_t block, const Line& line, const Call& call, Body body) const {
    const int64_t end = call.first + call.count;
    for (int64_t row = call.first / line.pitch; row * line.pitch < end; ++row) {
      const int64_t at = row * line.pitch, last = std::min(end, at + line.row);
      for (int64_t first = std::max(call.first, at); first < last;) {
        const Position p = position(here, call.start + row * line.row + first - at);
        const int64_t count = std::min(here.count[2] - p.at[2], last - first);
        body(spot(here, block, p, count), first - call.first);
        first += count;
      }
    }
  }

  void finish(const Region& here, int64_t block, const Line& line, const Call& call, const Sum* sums, const Scratch& mine) const {
    const int64_t channels = plan_.tiling.channels;
    each_spot(here, block, line, call, [&](const Spot& spot, int64_t first) {
      epilogue_(spot, Sums<Sum>{sums + first * channels, channels, plan_.block_channels, mine.blocks.as<Sum>()});
    });
  }

  void approach_end(const Region& here, int64_t block, const Line& line, const Call& call) const {
    each_spot(here, block, line, call, [&](const Spot& spot, int64_t) { epilogue_.approach(spot); });
  }

  // ------------------------------------------------------------------------------------------ positions in lanes

  // A line is all rows of a plane of the slab, with what is between them; a block's lines are sums next to each other.
  void run_planar_block(const Region& here, int64_t block, const Scratch& mine) const {
    if constexpr (kPlanar) {
      const int channels = plan_.tiling.channels;
      const int64_t line = planar_line(here.count[1], here.count[2]), vectors = line / kernel_.lanes;
      const int64_t lines = here.count_n * here.count[0], pitch = lines * line, plane = here.count[1] * here.count[2];
      const int64_t most = kernel_.max_vectors[channels], pieces = (vectors + most - 1) / most;
      const Operand* weights = block_weights(here, block);
      Sum* sums = mine.sums.as<Sum>();
      for (int channel = 0; channel < channels; ++channel)
        std::fill_n(sums + channel * pitch, pitch,
                    start_ != nullptr && channel < valid(here, block) ? start_[first_channel(here, block) + channel] : Sum(0));

      for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
        const Operand* slab = mine.slab.as<Operand>() + chunk * plan_.chunk_elements;
        for (int64_t i = 0; i < lines; ++i) {
          const int64_t n = i / here.count[0], t = i % here.count[0];
          const Taps taps = taps_within(here, i * plane, (i + 1) * plane - 1);
          const auto add = [&](int64_t time, const Taps& own, const std::vector<int64_t>& offsets, int64_t first_weight) {
            const Operand* a = slab + (n * plan_.extent[0] + time) * plan_.extent[1] * plan_.extent[2] * plan_.position_pitch;
            for (int64_t piece = 0; piece < pieces; ++piece) {
              const int64_t first = vectors * piece / pieces, last = vectors * (piece + 1) / pieces;
              each_stretch(own, [&](int64_t tap, int64_t tap_count) {
                kernel_.run(channels, static_cast<int>(last - first), a + first * kernel_.lanes * plan_.position_pitch,
                            plan_.depth_pitch, offsets.data() + tap, tap_count, plan_.kernel_depth,
                            weights + (first_weight + tap) * plan_.kernel_depth * channels,
                            sums + i * line + first * kernel_.lanes, pitch);
              });
            }
          };
          if (plan_.sweep.in_time == nullptr) {
            add(t * plan_.stride[0], taps, plan_.offsets, 0);
          } else {
            Region now = here;
            now.first[0] += t;
            now.count[0] = 1;
            each_sum_in_time(now, [&](const TimeSum& sum, const std::vector<int64_t>& offsets, const auto&) {
              add(0, taps_of(sum, taps), offsets, sum.first_tap * plan_.taps[1] * plan_.kernel_taps);
            });
          }
        }
        weights += plan_.tap_volume() * plan_.chunk * channels;
      }

      for (int64_t i = 0; i < lines * here.count[1]; ++i) {
        const int64_t h = i % here.count[1], t = i / here.count[1] % here.count[0], n = i / here.count[1] / here.count[0];
        const Sum* row = sums + i / here.count[1] * line + h * plan_.extent[2];
        epilogue_(spot(here, block, {n, {t, h, 0}}, here.count[2]),
                  Sums<Sum>{row, pitch, plan_.block_channels * pitch, mine.blocks.as<Sum>()});
      }
    }
  }

  int64_t planar_line(int64_t rows, int64_t width) const {
    if constexpr (kPlanar) return ((rows - 1) * plan_.extent[2] + width + kernel_.lanes - 1) / kernel_.lanes * kernel_.lanes;
    return 0;
  }

  // -------------------------------------------------------------------------------------------------------- both

  const Operand* block_weights(const Region& here, int64_t block) const {
    return weights_ + (here.group * plan_.channel_blocks + block) * plan_.packed_block();
  }

  int64_t first_channel(const Region& here, int64_t block) const {
    return here.group * plan_.together * plan_.sweep.c_out + block * plan_.block_channels;
  }

  // Channels of a block that are there.
  int64_t valid(const Region& here, int64_t block) const {
    return std::min(plan_.block_channels, plan_.groups_of(here.group) * plan_.sweep.c_out - block * plan_.block_channels);
  }

  Spot spot(const Region& here, int64_t block, const Position& p, int64_t positions) const {
    return written(plan_.sweep, {here.n + p.n, first_channel(here, block), here.first[0] + p.at[0], here.first[1] + p.at[1],
                                 here.first[2] + p.at[2], positions, valid(here, block), 1, kPlanar});
  }

  int64_t spot_positions() const {
    if constexpr (kPlanar)
      return plan_.block[2];
    else
      return kernel_.max_positions;
  }

  int64_t sums_per_block() const {
    const int64_t channels = plan_.tiling.channels;
    if constexpr (kPlanar) {
      return channels * plan_.block_n * plan_.block[0] * planar_line(plan_.block[1], plan_.block[2]);
    } else {
      const int64_t row =
          std::max(plan_.block[2], plan_.stride[1] * plan_.extent[2] / plan_.stride[2]);  // with what is between rows
      // With a table, what several times share has room of its own.
      const int64_t times = plan_.sweep.in_time != nullptr ? plan_.block[0] + 1 : plan_.block[0];
      return channels * times * std::max<int64_t>(plan_.block_n * plan_.block[1] * row, kernel_.max_positions);
    }
  }

  const Plan& plan_;
  const Kernel& kernel_;
  const Loops<Sum>& loops_;
  const Operand* weights_;
  const Sum* start_;
  const Epilogue& epilogue_;
};

// Works off the items of sweeps that share slabs. An item is a block of channels of a slab, in one sweep; a slab's items follow
// each other, so that it is packed once, and sweeps alternate in them, so that threads get as much of each.
template <typename Kernel, typename Operand, typename Sum, typename Epilogue>
class SlabRunner {
 public:
  using Runner = SweepRunner<Kernel, Operand, Sum, Epilogue>;

  SlabRunner(const Plan& slab, const Loops<Sum>& loops, const Source& source, const std::vector<Runner>& sweeps)
      : slab_(slab), loops_(loops), source_(source), sweeps_(sweeps) {}

  int64_t items() const { return slab_.slabs() * of_slab(); }

  void run(int64_t begin, int64_t end) const {
    Scratch& mine = scratch();
    mine.slab.reserve(static_cast<size_t>(slab_.chunks * slab_.chunk_elements + Runner::kOverrun) * sizeof(Operand));
    for (const Runner& sweep : sweeps_) sweep.reserve(mine);
    sweeps_[0].begin();
    SlabPacker<Operand, Sum> packer(slab_, loops_, source_, mine.slab.template as<Operand>());
    for (int64_t item = begin; item < end;) {
      const int64_t slab = item / of_slab(), first = item % of_slab(), last = std::min(of_slab(), first + end - item);
      if (slab_.tap_volume() > 0) packer.pack(region(slab_, slab));
      // Item i is of sweep i % count().
      for (int64_t i = 0; i < count(); ++i)
        sweeps_[static_cast<size_t>(i)].run(slab, ceil_div(first - i, count()), ceil_div(last - i, count()), mine);
      item += last - first;
    }
    settle_streams();
  }

 private:
  int64_t count() const { return static_cast<int64_t>(sweeps_.size()); }
  int64_t of_slab() const { return slab_.channel_blocks * count(); }

  const Plan& slab_;
  const Loops<Sum>& loops_;
  const Source& source_;
  const std::vector<Runner>& sweeps_;
};

}  // namespace captum_dtd::cpu
