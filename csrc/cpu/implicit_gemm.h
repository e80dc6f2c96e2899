// A sweep as a matrix product that is never laid out as one: slabs of the input are packed, and register tiles run over them.
#pragma once

#include <algorithm>
#include <cstdint>
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

// What a sweep makes of slabs that are packed. `start` has what each output channel's sum begins with, or is null.
// Epilogue: void(const Spot&, const Sums<Sum>&), the spot being what is written.
template <typename Kernel, typename Operand, typename Sum, typename Epilogue>
class SweepRunner {
 public:
  SweepRunner(const Plan& plan, const Kernel& kernel, const Loops<Sum>& loops, const Operand* weights, const Sum* start,
              const Epilogue& epilogue)
      : plan_(plan), kernel_(kernel), loops_(loops), weights_(weights), start_(start), epilogue_(epilogue) {}

  // A planar kernel reads on to the end of its last vector.
  static constexpr int64_t kOverrun = std::is_same_v<Kernel, PlanarKernel<Sum>> ? 64 : 0;

  void reserve(Scratch& mine) const {
    mine.sums.reserve(static_cast<size_t>(sums_per_block()) * sizeof(Sum));
    mine.blocks.reserve(static_cast<size_t>(kEpilogueBlocks * spot_positions() * plan_.tiling.channels) * sizeof(Sum));
  }

  // A block of channels.
  void run(int64_t slab, int64_t block, const Scratch& mine) const {
    const Region here = region(plan_, slab);
    if (here.positions() == 0) return;  // another sweep's grid reaches further
    if constexpr (kPlanar) {
      run_planar_block(here, block, mine);
    } else if (plan_.sweep.in_time != nullptr) {
      run_block_in_time(here, block, mine);
    } else {
      run_block(here, block, mine);
    }
  }

 private:
  static constexpr bool kPlanar = std::is_same_v<Kernel, PlanarKernel<Sum>>;

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
    bool has(int64_t t, int64_t h) const { return t >= t_begin && t < t_end && h >= h_begin && h < h_end; }
  };

  // Those of positions that share their t and, where they are one row, their h.
  Taps taps_within(const Region& here, int64_t from, int64_t positions) const {
    const Position p = position(here, from);
    Taps taps{0, plan_.taps[0], 0, plan_.taps[1]};
    if (plan_.tap_volume() == 0) return {0, 0, 0, 0};
    if (plan_.sweep.in_time == nullptr && positions <= here.count[1] * here.count[2])
      keep_reaching(plan_.sweep, 0, here.first[0] + p.at[0], taps.t_begin, taps.t_end);
    if (positions <= here.count[2]) keep_reaching(plan_.sweep, 1, here.first[1] + p.at[1], taps.h_begin, taps.h_end);
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

  // What one call of the kernel takes: positions of a row, and of as many rows, whose first ones are `pitch` positions apart.
  struct Bundle {
    int64_t row, rows, pitch;

    int64_t positions() const { return (rows - 1) * pitch + row; }
  };

  // One call of the kernel for some of a block's positions.
  struct Call {
    Bundle shape;
    int64_t first, row;  // its first position, and how many it is to that of its next row
    int64_t slab_at;     // in elements
    int64_t sums_at;     // in positions, where sums outlast their call
    Taps taps;
  };

  // Bundles and pieces of nearly equal size.
  std::vector<Call> calls_of(const Region& here) const {
    const int64_t row = line_length(here), rows = here.positions() / row;
    const Bundle most = bundle(here, row);
    const int64_t together = most.rows > 1 ? here.count[1] : 1;  // rows that bundles are made of
    const int64_t bundles = (together + most.rows - 1) / most.rows;
    const int64_t pieces = (row + kernel_.max_positions - 1) / kernel_.max_positions;
    std::vector<Call> found;
    for (int64_t i = 0; i < rows / together * bundles; ++i) {
      const int64_t start = i / bundles * together;
      const int64_t begin = start + together * (i % bundles) / bundles, end = start + together * (i % bundles + 1) / bundles;
      const int64_t slab_at = slab_position(here, begin * row) * plan_.position_pitch;
      const Taps taps = taps_within(here, begin * row, (end - begin) * row);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = row * piece / pieces, last = row * (piece + 1) / pieces;
        found.push_back({{last - first, end - begin, most.pitch},
                         begin * row + first,
                         row,
                         slab_at + first * plan_.stride[2] * plan_.position_pitch,
                         begin * most.pitch + first,
                         taps});
      }
    }
    return found;
  }

  // Those of all sums that outlast their calls.
  static int64_t positions_of(const std::vector<Call>& calls) { return calls.back().sums_at + calls.back().shape.positions(); }

  // Chunk by chunk, so that a chunk's weights stay in the cache for all positions.
  void run_block(const Region& here, int64_t block, const Scratch& mine) const {
    const int64_t channels = plan_.tiling.channels;
    const std::vector<Call> calls = calls_of(here);
    const bool by_taps = weights_are_far(calls);
    const Operand* weights = block_weights(here, block);
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const Operand* slab = mine.slab.as<Operand>() + chunk * plan_.chunk_elements;
      // With one chunk the sums of a call are done at once and need not outlast it.
      const auto sums_of = [&](const Call& call) {
        return mine.sums.as<Sum>() + (plan_.chunks > 1 ? call.sums_at * channels : 0);
      };
      const auto multiply = [&](const Call& call, int64_t tap, int64_t tap_count, bool accumulate, Ahead<Operand> ahead) {
        kernel_.run(static_cast<int>(call.shape.positions()), slab + call.slab_at, plan_.stride[2] * plan_.position_pitch,
                    plan_.offsets.data() + tap, tap_count, plan_.kernel_depth, weights + tap * plan_.kernel_depth * channels,
                    sums_of(call), accumulate, ahead);
      };
      if (by_taps) {
        for (int64_t t = 0; t < plan_.taps[0]; ++t)
          for (int64_t h = 0; h < plan_.taps[1]; ++h) {
            const int64_t tap = (t * plan_.taps[1] + h) * plan_.kernel_taps, steps = plan_.kernel_taps * plan_.kernel_depth;
            const auto reached = std::count_if(calls.begin(), calls.end(), [&](const Call& call) { return call.taps.has(t, h); });
            const Operand* const next = weights + (tap + plan_.kernel_taps) * plan_.kernel_depth * channels;
            Approach<Operand> approach(next, steps * channels, reached * steps, channels);
            for (const Call& call : calls) {
              const bool is_first = t == call.taps.t_begin && h == call.taps.h_begin;
              if (call.taps.has(t, h))
                multiply(call, tap, plan_.kernel_taps,
                         !is_first || begin_sums(here, block, chunk, sums_of(call), call.shape.positions(), call.taps),
                         approach.over(steps));
            }
          }
      }
      for (const Call& call : calls) {
        if (!by_taps || call.taps.empty()) {
          bool accumulate = begin_sums(here, block, chunk, sums_of(call), call.shape.positions(), call.taps);
          each_stretch(call.taps, [&](int64_t tap, int64_t tap_count) {
            multiply(call, tap, tap_count, accumulate, ahead(weights + tap * plan_.kernel_depth * channels));
            accumulate = true;
          });
        }
        if (chunk + 1 == plan_.chunks) finish(here, block, call, sums_of(call), mine);
      }
      weights += plan_.tap_volume() * plan_.chunk * channels;
    }
  }

  // What comes nearer while weights are multiplied: those a little further on.
  Ahead<Operand> ahead(const Operand* weights) const {
    constexpr int64_t kSteps = 192;  // of depth
    return {weights + kSteps * plan_.tiling.channels, plan_.tiling.channels};
  }

  // Whether a chunk's weights had better come from afar only once, tap by tap for all positions: where these are few, and their
  // sums stay near. What is summed in which order is the same.
  bool weights_are_far(const std::vector<Call>& calls) const {
    constexpr int64_t kNearBytes = 16 << 10;
    const int64_t sums_bytes = positions_of(calls) * plan_.tiling.channels * static_cast<int64_t>(sizeof(Sum));
    return std::is_same_v<Operand, Sum> && plan_.chunks > 1 && calls.size() > 1 && sums_bytes <= kNearBytes;
  }

  // The same where a table says what is read along T: all times of a call in turn, so that products that several of them share
  // are taken once.
  void run_block_in_time(const Region& here, int64_t block, const Scratch& mine) const {
    Region plane = here;  // one time after the other
    plane.count[0] = 1;
    const int64_t channels = plan_.tiling.channels;
    const std::vector<Call> calls = calls_of(plane);
    const Operand* weights = block_weights(here, block);
    Sum* const part = mine.sums.as<Sum>() + sums_per_block() - kernel_.max_positions * channels;
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const Operand* slab = mine.slab.as<Operand>() + chunk * plan_.chunk_elements;
      for (const Call& call : calls) {
        const bool outlast = plan_.chunks > 1;
        const int64_t time_pitch = outlast ? positions_of(calls) : call.shape.positions();
        Sum* const sums = mine.sums.as<Sum>() + (outlast ? call.sums_at * channels : 0);
        add_times(here, block, chunk, call, slab, weights, sums, time_pitch, part);
        if (chunk + 1 < plan_.chunks) continue;
        for (int64_t time = 0; time < here.count[0]; ++time) {
          plane.first[0] = here.first[0] + time;
          finish(plane, block, call, sums + time * time_pitch * channels, mine);
        }
      }
      weights += plan_.tap_volume() * plan_.chunk * channels;
    }
  }

  // Adds one chunk's products at a call's positions to the sums of all times, which are `time_pitch` positions apart.
  void add_times(const Region& here, int64_t block, int64_t chunk, const Call& call, const Operand* slab, const Operand* weights,
                 Sum* sums, int64_t time_pitch, Sum* part) const {
    const int64_t channels = plan_.tiling.channels, positions = call.shape.positions();
    each_sum_in_time(here, [&](const TimeSum& sum, const std::vector<int64_t>& offsets, const auto& outputs) {
      const Taps own = taps_of(sum, call.taps);
      const auto run = [&](Sum* to, bool accumulate) {
        each_stretch(own, [&](int64_t tap, int64_t tap_count) {
          const int64_t at = sum.first_tap * plan_.taps[1] * plan_.kernel_taps + tap;
          kernel_.run(static_cast<int>(positions), slab + call.slab_at, plan_.stride[2] * plan_.position_pitch,
                      offsets.data() + tap, tap_count, plan_.kernel_depth, weights + at * plan_.kernel_depth * channels, to,
                      accumulate, ahead(weights + at * plan_.kernel_depth * channels));
          accumulate = true;
        });
      };
      const bool is_shared = outputs.size() > 1 && !own.empty();
      if (is_shared) run(part, false);
      for (const TimeSum::Output& output : outputs) {
        Sum* const to = sums + (output.time - here.first[0]) * time_pitch * channels;
        const bool accumulate = !output.begins || begin_sums(here, block, chunk, to, positions, own);
        if (!is_shared)
          run(to, accumulate);
        else if (accumulate)
          loops_.add(positions * channels, part, to);
        else
          std::copy_n(part, positions * channels, to);
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

  // As many rows as keep the kernel busy, with what lies between them: the least time for each position that counts.
  Bundle bundle(const Region& here, int64_t row) const {
    const int64_t apart = plan_.stride[1] * plan_.extent[2];
    Bundle best{row, 1, row};
    if (row != here.count[2] || apart % plan_.stride[2] != 0) return best;
    const auto time = [&](const Bundle& bundle) {
      return static_cast<double>(std::max<int64_t>(bundle.positions(), kernel_.busy_positions)) /
             static_cast<double>(bundle.rows * row);
    };
    for (int64_t rows = 2; rows <= here.count[1]; ++rows) {
      const Bundle more{row, rows, apart / plan_.stride[2]};
      if (more.positions() > kernel_.max_positions) break;
      if (time(more) < time(best)) best = more;
    }
    return best;
  }

  // Whether the sums of a tile have a beginning that is to be added to.
  bool begin_sums(const Region& here, int64_t block, int64_t chunk, Sum* sums, int64_t count, const Taps& taps) const {
    if (chunk > 0) return true;
    if (start_ == nullptr && !taps.empty()) return false;
    const int64_t channels = plan_.tiling.channels;
    std::fill_n(sums, count * channels, Sum(0));
    if (start_ != nullptr)
      for (int64_t i = 0; i < count; ++i) std::copy_n(start_ + first_channel(here, block), valid(block), sums + i * channels);
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

  void finish(const Region& here, int64_t block, const Call& call, const Sum* sums, const Scratch& mine) const {
    for (int64_t r = 0; r < call.shape.rows; ++r)
      finish(here, block, call.first + r * call.row, call.shape.row, sums + r * call.shape.pitch * plan_.tiling.channels, mine);
  }

  // The epilogue of a tile, row by row.
  void finish(const Region& here, int64_t block, int64_t first, int64_t count, const Sum* sums, const Scratch& mine) const {
    const int64_t channels = plan_.tiling.channels;
    for (int64_t done = 0; done < count;) {
      const Position p = position(here, first + done);
      const int64_t row = std::min(here.count[2] - p.at[2], count - done);
      epilogue_(spot(here, block, p, row),
                Sums<Sum>{sums + done * channels, channels, plan_.block_channels, mine.blocks.as<Sum>()});
      done += row;
    }
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
                    start_ != nullptr && channel < valid(block) ? start_[first_channel(here, block) + channel] : Sum(0));

      for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
        const Operand* slab = mine.slab.as<Operand>() + chunk * plan_.chunk_elements;
        for (int64_t i = 0; i < lines; ++i) {
          const int64_t n = i / here.count[0], t = i % here.count[0];
          const Taps taps = taps_within(here, i * plane, plane);
          const auto add = [&](int64_t time, const Taps& own, const std::vector<int64_t>& offsets, int64_t first_weight) {
            const Operand* a = slab + (n * plan_.extent[0] + time) * plan_.extent[1] * plan_.extent[2];
            for (int64_t piece = 0; piece < pieces; ++piece) {
              const int64_t first = vectors * piece / pieces, last = vectors * (piece + 1) / pieces;
              each_stretch(own, [&](int64_t tap, int64_t tap_count) {
                kernel_.run(channels, static_cast<int>(last - first), a + first * kernel_.lanes, plan_.depth_pitch,
                            offsets.data() + tap, tap_count, plan_.kernel_depth,
                            weights + (first_weight + tap) * plan_.kernel_depth * channels,
                            sums + i * line + first * kernel_.lanes, pitch, true);
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
    return here.group * plan_.sweep.c_out + block * plan_.block_channels;
  }

  // Channels of a block that are there.
  int64_t valid(int64_t block) const { return std::min(plan_.block_channels, plan_.sweep.c_out - block * plan_.block_channels); }

  Spot spot(const Region& here, int64_t block, const Position& p, int64_t positions) const {
    return written(plan_.sweep, {here.n + p.n, first_channel(here, block), here.first[0] + p.at[0], here.first[1] + p.at[1],
                                 here.first[2] + p.at[2], positions, valid(block), 1, kPlanar});
  }

  int64_t spot_positions() const {
    if constexpr (kPlanar)
      return plan_.block[2];
    else
      return kernel_.max_positions;
  }

  int64_t sums_per_block() const {
    const int64_t planes = plan_.block_n * plan_.block[0], channels = plan_.tiling.channels;
    if constexpr (kPlanar) {
      return channels * planes * planar_line(plan_.block[1], plan_.block[2]);
    } else {
      const int64_t row =
          std::max(plan_.block[2], plan_.stride[1] * plan_.extent[2] / plan_.stride[2]);  // with what is between rows
      const int64_t times = plan_.sweep.in_time != nullptr ? plan_.block[0] : 0;  // of a call each, and one for what they share
      return channels * (std::max<int64_t>(planes * plan_.block[1] * row, times * kernel_.max_positions) + kernel_.max_positions);
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
    SlabPacker<Operand, Sum> packer(slab_, loops_, source_, mine.slab.template as<Operand>());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t slab = item / of_slab(), of_this = item % of_slab();
      if ((item == begin || of_this == 0) && slab_.tap_volume() > 0) packer.pack(region(slab_, slab));
      sweeps_[static_cast<size_t>(of_this % count())].run(slab, of_this / count(), mine);
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
