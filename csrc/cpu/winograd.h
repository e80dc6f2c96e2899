// Convolutions by Winograd's minimal filtering over H and W: 3x3 there, any number of taps along T, unit strides.
//
// A slab is rows of tiles at neighbouring times. Its patches are transformed once; then, for each block of output channels,
// the register tile sums each of the transformed numbers over taps of T and channels, and the sums are transformed back.
// Numbers lie by planes, each of which has those of one point; a smaller tile at the end of a row or column is in fewer of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "buffer.h"
#include "implicit_gemm.h"
#include "loops.h"
#include "microkernel.h"
#include "slab.h"
#include "streaming.h"
#include "weights.h"
#include "winograd_kernel.h"

namespace captum_dtd::cpu {

// Its grid has tiles along H and W; a block has whole rows of them.
struct WinogradPlan : Blocks {
  Sweep sweep;  // its taps in the order of rising input positions
  int input_parts, output_parts;
  Tiling tiling;
  int lanes;  // channels of the register tile

  int64_t grid[3];
  int last[3];                             // outputs of the last tile along H and W
  int64_t block_channels, channel_blocks;  // output channels of one block, and blocks in a group
  int64_t blocks_together;                 // blocks of channels that a transformed number is read for while it is near
  int64_t channels, depth;                 // of all parts; what the register tile sums over, some of it zeros perhaps
  int64_t width, pitch;                    // what is transformed, whole vectors; elements from patch to patch

  int64_t slabs() const { return sweep.groups * per_group(); }
  int64_t frames_of(int64_t times) const {  // that they read
    return sweep.in_time != nullptr ? sweep.in_time->slab_frames() : times + (sweep.taps[0] - 1) * sweep.step[0];
  }
  int64_t tiles() const { return block_n * block[0] * block[1] * block[2]; }
  int64_t patches() const { return block_n * frames_of(block[0]) * block[1] * block[2]; }  // of a slab
  int64_t packed_plane() const { return sweep.taps[0] * depth * lanes; }
  int64_t packed_block() const { return Winograd::kPlanes * packed_plane(); }
  int64_t packed_weights() const { return sweep.groups * channel_blocks * packed_block(); }
};

// Whether a sweep can be computed this way, and takes less time than by its definition.
bool winograd_pays(const Sweep& sweep, int input_parts, int output_parts, const Tiling& tiling);

WinogradPlan make_winograd_plan(const Sweep& sweep, int input_parts, int output_parts, const Tiling& tiling, int vector);

// Transformed filters, kept as those of packed_weights are:
// [group][block of channels][plane][tap of T][depth / pair][lanes][pair].
template <typename Operand>
std::shared_ptr<const Buffer> winograd_weights(const Filter& filter, const Use& use, const WinogradPlan& plan,
                                               const WinogradKernel<Operand, float>& transforms, const Loops<float>& loops,
                                               ParallelFor parallel_for);

// A region's tiles: how many rows and columns of them have a number in each plane.
struct TiledRegion : Region {
  int64_t rows[Winograd::kPlanes], columns[Winograd::kPlanes];

  TiledRegion(const WinogradPlan& plan, const Region& region);

  int64_t tiles_of_frame(int64_t plane) const { return rows[plane] * columns[plane]; }

  // A slab has all examples of a frame, then those of the next: [frame][n][tile][depth], and sums alike [time][n][tile][lane].
  int64_t tiles_of_time(int64_t plane) const { return count_n * tiles_of_frame(plane); }

  // Where the numbers of a row's first tile lie, in planes so many elements apart.
  void find_row(int64_t frame, int64_t of_n, int64_t row, int64_t stride, int64_t pitch,
                int64_t (&planes)[Winograd::kPlanes]) const {
    for (int64_t plane = 0; plane < Winograd::kPlanes; ++plane)
      planes[plane] = plane * stride + (((frame * count_n + of_n) * rows[plane] + row) * columns[plane]) * pitch;
  }
};

// Works off the items of a sweep: blocks of channels of its slabs. What cannot be trusted is written all the same, and noted as
// an item of a Plan of single positions.
template <typename Operand, typename Epilogue>
class WinogradRunner {
 public:
  WinogradRunner(const WinogradPlan& plan, const MicroKernel<Operand, float>& kernel,
                 const WinogradKernel<Operand, float>& transforms, const Loops<float>& loops, const Source& source,
                 const Operand* weights, const float* start, const Epilogue& epilogue)
      : plan_(plan),
        kernel_(kernel),
        transforms_(transforms),
        loops_(loops),
        source_(source),
        weights_(weights),
        start_(start),
        epilogue_(epilogue),
        rows_pitch_(Winograd::kTile * plan.grid[2] * plan.lanes),
        patch_columns_(Winograd::kTile * (plan.grid[2] - 1) + plan.last[2] + Winograd::kTaps - 1),
        input_plane_(odd_lines<Operand>(plan.patches() * plan.pitch)),
        output_plane_(odd_lines<float>(plan.blocks_together * plan.tiles() * plan.lanes)),
        part_(plan.block_n * plan.block[1] * plan.block[2] * plan.lanes) {}

  int64_t items() const { return plan_.slabs() * plan_.channel_blocks; }

  void run(int64_t begin, int64_t end) {
    if (kernel_.begin != nullptr) kernel_.begin();
    Scratch& mine = scratch();
    mine.patch.reserve(static_cast<size_t>((Winograd::kPatch + 2) * patch_columns_ * plan_.pitch) * sizeof(float));
    mine.slab.reserve(static_cast<size_t>(Winograd::kPlanes * input_plane_) * sizeof(Operand));
    mine.sums.reserve(static_cast<size_t>(Winograd::kPlanes * output_plane_ + part_) * sizeof(float));
    mine.outputs.reserve(static_cast<size_t>(Winograd::kTile * rows_pitch_) * sizeof(float));
    mine.blocks.reserve(static_cast<size_t>(kEpilogueBlocks * rows_pitch_) * sizeof(float));
    std::vector<int64_t> distrusted;
    std::vector<Stretch> stretches;
    TiledRegion here(plan_, Region{});
    for (int64_t item = begin; item < end;) {
      const int64_t channels = item % plan_.channel_blocks;
      if (item == begin || channels == 0) {
        here = TiledRegion(plan_, region(plan_, plan_.sweep.n, plan_.sweep.groups, plan_.grid, item / plan_.channel_blocks));
        transform_patches(here, mine);
        stretches = stretches_of(here);
      }
      const int64_t together = std::min({plan_.blocks_together, plan_.channel_blocks - channels, end - item});
      sum_products(here, stretches, channels, together, mine);
      for (int64_t i = 0; i < together; ++i)
        finish(here, channels + i, mine.sums.as<float>() + i * output_block(here), mine, distrusted);
      item += together;
    }
    settle_streams();
    const std::lock_guard<std::mutex> lock(mutex_);
    distrusted_.insert(distrusted_.end(), distrusted.begin(), distrusted.end());
  }

  // Single positions and blocks of channels to be computed again, in any order.
  std::vector<int64_t> distrusted() { return std::move(distrusted_); }

 private:
  // Planes an odd number of cache lines apart do not share the same few lines of the first-level cache.
  template <typename Element>
  static int64_t odd_lines(int64_t elements) {
    constexpr int64_t kLine = kLineBytes / sizeof(Element);
    return ((elements + kLine - 1) / kLine | 1) * kLine;
  }

  int64_t output_block(const Region& here) const { return here.positions() * plan_.lanes; }

  // Of the input, those whose sum is a frame of the slab.
  std::vector<int64_t> times_of(const Region& here, int64_t frame) const {
    if (plan_.sweep.in_time != nullptr) return plan_.sweep.in_time->times_of(frame);
    const int64_t t = here.first[0] + plan_.sweep.base[0] + frame;
    return t >= 0 && t < plan_.sweep.in[0] ? std::vector<int64_t>{t} : std::vector<int64_t>{};
  }

  static int size(int64_t tile, int64_t tiles, int last) { return tile + 1 < tiles ? Winograd::kTile : last; }
  int tile_height(int64_t row) const { return size(row, plan_.grid[1], plan_.last[1]); }
  int tile_width(int64_t column) const { return size(column, plan_.grid[2], plan_.last[2]); }

  // The kernel for a tile of this size.
  template <typename Transform>
  static Transform of_size(const Transform (&kernels)[Winograd::kSizes][Winograd::kSizes], int height, int width) {
    return kernels[height - Winograd::kFewest][width - Winograd::kFewest];
  }

  void transform_patches(const TiledRegion& here, const Scratch& mine) const {
    int64_t planes[Winograd::kPlanes];
    for (int64_t frame = 0; frame < plan_.frames_of(here.count[0]); ++frame) {
      const std::vector<int64_t> times = times_of(here, frame);
      if (times.empty()) continue;  // taps that reach there are left out
      for (int64_t n = 0; n < here.count_n; ++n)
        for (int64_t row = 0; row < here.count[1]; ++row) {
          const int height = tile_height(here.first[1] + row);
          load_patches(here, here.n + n, times, here.first[1] + row, height + Winograd::kTaps - 1, mine);
          here.find_row(frame, n, row, input_plane_, plan_.pitch, planes);
          for (int64_t tile = 0; tile < plan_.grid[2]; ++tile)
            of_size(transforms_.transform_input, height, tile_width(tile))(
                mine.patch.as<float>() + Winograd::kTile * tile * plan_.pitch, patch_columns_ * plan_.pitch, plan_.pitch,
                plan_.width, mine.slab.as<Operand>() + tile * plan_.pitch, planes);
        }
    }
  }

  // The rows of input that a row of tiles reads, all parts of a position's channels next to each other.
  void load_patches(const Region& here, int64_t n, const std::vector<int64_t>& times, int64_t tile_row, int rows,
                    const Scratch& mine) const {
    const Sweep& sweep = plan_.sweep;
    float* const patch = mine.patch.as<float>();
    float* const bound = patch + Winograd::kPatch * patch_columns_ * plan_.pitch;
    float* const more = bound + patch_columns_ * plan_.pitch;
    const int64_t w = sweep.base[2], first = std::max<int64_t>(-w, 0);
    const int64_t last = std::max(std::min(sweep.in[2] - w, patch_columns_), first);
    for (int row = 0; row < rows; ++row) {
      const int64_t h = tile_row * Winograd::kTile + sweep.base[1] + row;
      float* const to = patch + row * patch_columns_ * plan_.pitch;
      const bool inside = h >= 0 && h < sweep.in[1] && first < last;
      if (!inside || plan_.width != plan_.channels) {
        std::fill_n(to, patch_columns_ * plan_.pitch, 0.0f);
      } else {
        std::fill_n(to, first * plan_.pitch, 0.0f);
        std::fill_n(to + last * plan_.pitch, (patch_columns_ - last) * plan_.pitch, 0.0f);
      }
      if (!inside) continue;
      const auto load = [&](int64_t t, float* row_of_patch) {
        const Spot spot{n, here.group * sweep.c_in, t, h, w + first, last - first, sweep.c_in, 1, false};
        for (int part = 0; part < plan_.input_parts; ++part)
          load_lifted(loops_, source_, part, spot, row_of_patch + part * sweep.c_in, bound, plan_.pitch);
      };
      load(times[0], to + first * plan_.pitch);
      for (size_t i = 1; i < times.size(); ++i) {
        const int64_t count = (last - first) * plan_.pitch;
        std::fill_n(more, count, 0.0f);
        load(times[i], more);
        loops_.add(count, more, to + first * plan_.pitch);
      }
    }
  }

  // What the register tile adds up in one go: at some neighbouring times, the taps of T from the first on.
  struct Stretch {
    int64_t first_tap;
    std::vector<int64_t> frames;  // of the slab, that each tap reads
    int64_t times;
    std::vector<TimeSum::Output> outputs;  // of the first of these times, in the slab's sums
  };

  std::vector<Stretch> stretches_of(const Region& here) const {
    return plan_.sweep.in_time != nullptr ? stretches_by_table() : stretches_by_stride(here);
  }

  // Times that the same taps reach.
  std::vector<Stretch> stretches_by_stride(const Region& here) const {
    std::vector<Stretch> found;
    for (int64_t time = 0; time < here.count[0]; ++time) {
      int64_t begin = 0, end = plan_.sweep.taps[0];
      keep_reaching(plan_.sweep, 0, here.first[0] + time, begin, end);
      if (!found.empty() && found.back().first_tap == begin && static_cast<int64_t>(found.back().frames.size()) == end - begin) {
        ++found.back().times;
        continue;
      }
      Stretch stretch{begin, {}, 1, {{time, true}}};
      for (int64_t tap = begin; tap < end; ++tap) stretch.frames.push_back(time + tap * plan_.sweep.step[0]);
      found.push_back(std::move(stretch));
    }
    return found;
  }

  std::vector<Stretch> stretches_by_table() const {
    std::vector<Stretch> found;
    for (const TimeSum& sum : plan_.sweep.in_time->sums) found.push_back({sum.first_tap, sum.frames, 1, sum.outputs});
    return found;
  }

  // Plane by plane, so that what was transformed stays in the cache for all of these blocks.
  void sum_products(const TiledRegion& here, const std::vector<Stretch>& stretches, int64_t channels, int64_t together,
                    const Scratch& mine) const {
    float* const part = mine.sums.as<float>() + Winograd::kPlanes * output_plane_;
    for (int64_t plane = 0; plane < Winograd::kPlanes; ++plane)
      for (int64_t i = 0; i < together; ++i) {
        const int64_t packed = (here.group * plan_.channel_blocks + channels + i) * Winograd::kPlanes + plane;
        // The next block's, then the first block's of the next plane, and at last the next blocks' of the first.
        const bool is_last = plane + 1 == Winograd::kPlanes;
        const int64_t next = packed + (i + 1 < together ? Winograd::kPlanes : is_last ? 1 : 1 - i * Winograd::kPlanes);
        Approach<Operand> approach = approach_to(weights_ + next * plan_.packed_plane(), here.tiles_of_time(plane), stretches);
        for (const Stretch& stretch : stretches)
          sum_plane(here.tiles_of_time(plane), stretch, weights_ + packed * plan_.packed_plane(),
                    mine.slab.as<Operand>() + plane * input_plane_,
                    mine.sums.as<float>() + plane * output_plane_ + i * output_block(here), part, approach);
      }
  }

  // Towards those taps of the weights that are read.
  Approach<Operand> approach_to(const Operand* weights, int64_t tiles_of_time, const std::vector<Stretch>& stretches) const {
    int64_t steps = 0, begin = plan_.sweep.taps[0], end = 0;
    for (const Stretch& stretch : stretches) {
      const auto taps = static_cast<int64_t>(stretch.frames.size());
      steps += pieces_of(stretch.times * tiles_of_time) * taps * steps_of_tap();
      if (taps == 0) continue;
      begin = std::min(begin, stretch.first_tap);
      end = std::max(end, stretch.first_tap + taps);
    }
    const int64_t of_tap = plan_.depth * plan_.lanes;
    return Approach<Operand>(weights + begin * of_tap, std::max<int64_t>(end - begin, 0) * of_tap, steps,
                             kernel_.step * plan_.lanes);
  }

  int64_t steps_of_tap() const { return (plan_.depth + kernel_.step - 1) / kernel_.step; }

  int64_t pieces_of(int64_t count) const { return (count + kernel_.max_positions - 1) / kernel_.max_positions; }

  void sum_plane(int64_t tiles_of_time, const Stretch& stretch, const Operand* weights, const Operand* slab, float* sums,
                 float* part, Approach<Operand>& approach) const {
    const int64_t time = tiles_of_time * plan_.lanes;
    if (stretch.outputs.size() == 1) {
      const TimeSum::Output& output = stretch.outputs[0];
      return multiply(tiles_of_time, stretch, weights, slab, sums + output.time * time, !output.begins, approach);
    }
    multiply(tiles_of_time, stretch, weights, slab, part, false, approach);
    for (const TimeSum::Output& output : stretch.outputs) {
      if (output.begins)
        std::copy_n(part, time, sums + output.time * time);
      else
        loops_.add(time, part, sums + output.time * time);
    }
  }

  // As many taps at a time as the kernel wants the weights of near.
  void multiply(int64_t tiles_of_time, const Stretch& stretch, const Operand* weights, const Operand* slab, float* to,
                bool accumulate, Approach<Operand>& approach) const {
    std::vector<int64_t> offsets;
    for (const int64_t frame : stretch.frames) offsets.push_back(frame * tiles_of_time * plan_.pitch);
    const int64_t count = stretch.times * tiles_of_time, pieces = pieces_of(count);
    const int64_t taps = static_cast<int64_t>(offsets.size()), of_tap = plan_.depth * plan_.lanes;
    const int64_t near_taps = kernel_.near_bytes / (of_tap * static_cast<int64_t>(sizeof(Operand)));
    const int64_t most = kernel_.near_bytes > 0 ? std::max<int64_t>(near_taps, 1) : std::max<int64_t>(taps, 1);
    for (int64_t tap = 0; tap == 0 || tap < taps; tap += most) {
      const int64_t together = std::min(most, taps - tap);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = count * piece / pieces, last = count * (piece + 1) / pieces;
        kernel_.run(static_cast<int>(last - first), slab + first * plan_.pitch, plan_.pitch, offsets.data() + tap, together,
                    plan_.depth, weights + (stretch.first_tap + tap) * of_tap, to + first * plan_.lanes, accumulate || tap > 0,
                    approach.over(together * steps_of_tap()));
      }
    }
  }

  void finish(const TiledRegion& here, int64_t channels, const float* sums, const Scratch& mine,
              std::vector<int64_t>& distrusted) const {
    const Sweep& sweep = plan_.sweep;
    const int64_t first_channel = here.group * sweep.c_out + channels * plan_.block_channels;
    const int64_t valid = std::min(plan_.block_channels, sweep.c_out - channels * plan_.block_channels);
    std::vector<float> start(static_cast<size_t>(plan_.lanes), 0.0f);
    if (start_ != nullptr) std::copy_n(start_ + first_channel, valid, start.begin());
    float* const outputs = mine.outputs.as<float>();
    int64_t planes[Winograd::kPlanes];

    for (int64_t n = 0; n < here.count_n; ++n)
      for (int64_t time = 0; time < here.count[0]; ++time)
        for (int64_t row = 0; row < here.count[1]; ++row) {
          const int64_t h = (here.first[1] + row) * Winograd::kTile, t = here.first[0] + time;
          const int64_t height = std::min<int64_t>(Winograd::kTile, sweep.grid[1] - h);
          const auto approach = [&](int64_t tile) {
            const int64_t w = tile * Winograd::kTile, width = std::min<int64_t>(Winograd::kTile, sweep.grid[2] - w);
            for (int64_t r = 0; r < height; ++r)
              epilogue_.approach(written(sweep, {here.n + n, first_channel, t, h + r, w, width, valid, 1, false}));
          };
          here.find_row(time, n, row, output_plane_, plan_.lanes, planes);
          approach(0);
          for (int64_t tile = 0; tile < plan_.grid[2]; ++tile) {
            if (tile + 1 < plan_.grid[2]) approach(tile + 1);
            const auto transform = of_size(transforms_.transform_output, tile_height(here.first[1] + row), tile_width(tile));
            const uint32_t found =
                transform(sums + tile * plan_.lanes, planes, plan_.lanes, start_ != nullptr ? start.data() : nullptr,
                          outputs + tile * Winograd::kTile * plan_.lanes, rows_pitch_);
            for (int bit = 0; found >> bit != 0; ++bit) {
              const int64_t r = bit / Winograd::kTile, w = tile * Winograd::kTile + bit % Winograd::kTile;
              if ((found >> bit & 1) == 0 || r >= height || w >= sweep.grid[2]) continue;
              const int64_t position =
                  ((((here.n + n) * sweep.groups + here.group) * sweep.grid[0] + t) * sweep.grid[1] + h + r) * sweep.grid[2] + w;
              distrusted.push_back(position * plan_.channel_blocks + channels);
            }
          }
          for (int64_t r = 0; r < height; ++r)
            epilogue_(written(sweep, {here.n + n, first_channel, t, h + r, 0, sweep.grid[2], valid, 1, false}),
                      Sums<float>{outputs + r * rows_pitch_, plan_.lanes, plan_.block_channels, mine.blocks.as<float>()});
        }
  }

  const WinogradPlan& plan_;
  const MicroKernel<Operand, float>& kernel_;
  const WinogradKernel<Operand, float>& transforms_;
  const Loops<float>& loops_;
  const Source& source_;
  const Operand* weights_;
  const float* start_;
  const Epilogue& epilogue_;
  const int64_t rows_pitch_, patch_columns_;         // in elements, and in columns
  const int64_t input_plane_, output_plane_, part_;  // in elements
  std::mutex mutex_;
  std::vector<int64_t> distrusted_;
};

}  // namespace captum_dtd::cpu
