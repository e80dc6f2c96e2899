#include "winograd.h"

#include <cstring>
#include <type_traits>

#include "parallel.h"

namespace captum_dtd::cpu {
namespace {

// Of each slab. So often are weights used that come from memory, and so much of it stays in the caches.
constexpr int64_t kPositions = 256;        // tiles
constexpr int64_t kPatchBytes = 16 << 20;  // of transformed patches, of which a plane is read at a time
constexpr int64_t kSumsBytes = 4 << 20;    // of the blocks of channels that are worked on together

constexpr int64_t kFewestChannels = 16;  // in depth: fewer leave the transforms too little to save
constexpr double kStreamed = 20;         // tiles that could be multiplied while their weights come from memory

constexpr int64_t kAliasing = 512;  // bytes; patches a multiple of this apart share too few lines of the first-level cache

int64_t tiles(int64_t size) { return ceil_div(size, Winograd::kTile); }

// Outputs of the last tile, at least as many as there are to compute.
int last_tile(int64_t size) { return std::max(static_cast<int>(size - (tiles(size) - 1) * Winograd::kTile), Winograd::kFewest); }

// Products along H or W.
int64_t points(int64_t size) { return (tiles(size) - 1) * Winograd::kPatch + last_tile(size) + Winograd::kTaps - 1; }

// So many parts of nearly one size that none is larger than `most`.
int64_t even_part(int64_t size, int64_t most) { return ceil_div(size, ceil_div(size, std::clamp<int64_t>(most, 1, size))); }

// Transforms the weights of one block of channels at a time.
template <typename Operand>
class Packer {
 public:
  Packer(const Filter& filter, const Use& use, const WinogradPlan& plan, const WinogradKernel<Operand, float>& transforms,
         const Loops<float>& loops, Operand* to)
      : filter_(filter), use_(use), plan_(plan), transforms_(transforms), loops_(loops), to_(to) {}

  void pack(int64_t group, int64_t block) const {
    Operand* const to = to_ + (group * plan_.channel_blocks + block) * plan_.packed_block();
    const int64_t first = block * plan_.block_channels, lanes = plan_.lanes;
    const int64_t count = std::min(plan_.block_channels, plan_.sweep.c_out - first);
    if (plan_.depth != plan_.channels)
      std::memset(static_cast<void*>(to), 0, static_cast<size_t>(plan_.packed_block()) * sizeof(Operand));
    std::vector<float> taps(static_cast<size_t>(kArea * kRows * lanes), 0.0f);
    std::vector<float> numbers(static_cast<size_t>(Winograd::kPlanes * kRows * lanes));
    std::vector<float> smallest(static_cast<size_t>(lanes), 0.0f), largest(smallest);

    for (int64_t tap = 0; tap < plan_.sweep.taps[0]; ++tap)
      for (int part = 0; part < plan_.input_parts; ++part)
        for (int64_t channel = 0; channel < plan_.sweep.c_in; channel += kRows) {
          const int64_t rows = std::min(kRows, plan_.sweep.c_in - channel);
          for (int64_t of_plane = 0; of_plane < kArea; ++of_plane)
            for (int output_part = 0; output_part < plan_.output_parts; ++output_part)
              load({group, tap, of_plane, channel, rows, first, count, use_.adjoint ? output_part : part},
                   &taps[static_cast<size_t>(of_plane * kRows * lanes + output_part * plan_.block_channels)]);
          for (int64_t row = 0; row < rows; ++row)
            transforms_.transform_filter(&taps[static_cast<size_t>(row * lanes)], kRows * lanes, lanes,
                                         &numbers[static_cast<size_t>(row * lanes)], kRows * lanes, smallest.data(),
                                         largest.data());
          if constexpr (!std::is_same_v<Operand, float>)
            for (auto bound = numbers.end() - kRows * lanes; bound != numbers.end(); ++bound) *bound *= Winograd::kOfRounded;
          for (int64_t plane = 0; plane < Winograd::kPlanes; ++plane)
            write_packed(loops_, Digit::High, rows, lanes, &numbers[static_cast<size_t>(plane * kRows * lanes)],
                         to + plane * plan_.packed_plane() + tap * plan_.depth * lanes, plan_.tiling,
                         {part * plan_.sweep.c_in + channel, 0});
        }

    // Sums over weights of either sign cancel by their nature, so what is small is nothing special. What lies in the dark beside
    // the bright is: its sum is zero, or as small as rounding alone could make it. Rounded operands have one sign always.
    if constexpr (std::is_same_v<Operand, float>) {
      float* const bounds = to + (Winograd::kPlanes - 1) * plan_.packed_plane();
      for (int64_t lane = 0; lane < lanes; ++lane)
        if (smallest[static_cast<size_t>(lane)] < 0 && largest[static_cast<size_t>(lane)] > 0)
          for (int64_t row = 0; row < plan_.sweep.taps[0] * plan_.depth; ++row)
            bounds[row * lanes + lane] *= static_cast<float>(Winograd::kOfEitherSign);
    }
  }

 private:
  static constexpr int64_t kArea = Winograd::kTaps * Winograd::kTaps;
  static constexpr int64_t kRows = 32;  // channels in depth at a time

  struct Piece {
    int64_t group, tap, of_plane;  // the tap of T, and that of H and W
    int64_t channel, rows;         // in depth
    int64_t lane, lanes;           // the first output channel, and how many
    int part;
  };

  void load(const Piece& piece, float* weights) const {
    const Sweep& sweep = plan_.sweep;
    const FilterStrides stride(filter_, use_);
    const int64_t at = piece.group * filter_.c_out * filter_.c_in * filter_.volume + piece.lane * stride.lane +
                       piece.channel * stride.depth +
                       filter_tap(sweep, piece.tap, piece.of_plane / Winograd::kTaps, piece.of_plane % Winograd::kTaps);
    const char* from = static_cast<const char*>(filter_.data) + at * element_bytes(filter_.element);
    loops_.load(filter_.element, from, stride.depth, stride.lane, piece.rows, piece.lanes, weights, plan_.lanes);
    if (use_.split) loops_.lift(Lift::Signed, piece.part, piece.rows, piece.lanes, weights, nullptr, weights, plan_.lanes);
  }

  const Filter& filter_;
  const Use& use_;
  const WinogradPlan& plan_;
  const WinogradKernel<Operand, float>& transforms_;
  const Loops<float>& loops_;
  Operand* to_;
};

}  // namespace

bool winograd_pays(const Sweep& sweep, int input_parts, int output_parts, const Tiling& tiling) {
  for (int a = 0; a < 3; ++a)
    if (sweep.stride[a] != 1 || (sweep.taps[a] > 1 && std::abs(sweep.step[a]) != 1)) return false;
  if (sweep.taps[0] == 0 || sweep.taps[1] != Winograd::kTaps || sweep.taps[2] != Winograd::kTaps) return false;
  if (sweep.c_in * input_parts < kFewestChannels || 2 * sweep.c_out * output_parts < tiling.channels) return false;
  const int64_t fewest_frames = sweep.in_time != nullptr ? sweep.in_time->slab_frames() : sweep.taps[0];
  const int64_t row_bytes =
      Winograd::kPlanes * tiles(sweep.grid[2]) * fewest_frames * sweep.c_in * input_parts * tiling.operand_bytes;
  if (row_bytes > kPatchBytes) return false;
  const int64_t frames = sweep.n * sweep.grid[0];
  const double direct = static_cast<double>(Winograd::kTaps * Winograd::kTaps * sweep.grid[1] * sweep.grid[2] * frames);
  const double transformed =
      static_cast<double>((points(sweep.grid[1]) * points(sweep.grid[2]) + tiles(sweep.grid[1]) * tiles(sweep.grid[2])) *
                          frames) +
      Winograd::kPlanes * kStreamed;
  return transformed < direct;
}

WinogradPlan make_winograd_plan(const Sweep& sweep, int input_parts, int output_parts, const Tiling& tiling, int vector) {
  WinogradPlan plan{};
  plan.sweep = ascending(sweep);
  if (plan.sweep.taps[0] == 1) plan.sweep.step[0] = 0;
  plan.input_parts = input_parts;
  plan.output_parts = output_parts;
  plan.tiling = tiling;
  plan.lanes = tiling.channels;
  plan.block_channels = plan.lanes / output_parts;
  plan.channel_blocks = ceil_div(sweep.c_out, plan.block_channels);
  plan.channels = sweep.c_in * input_parts;
  plan.depth = round_up(plan.channels, tiling.depth_multiple);
  plan.width = round_up(plan.depth, vector);
  const int64_t line = kLineBytes / tiling.operand_bytes;
  plan.pitch = round_up(plan.width, line);
  if (plan.pitch * tiling.operand_bytes % kAliasing == 0) plan.pitch += line;

  plan.grid[0] = sweep.grid[0];
  for (int a = 1; a < 3; ++a) {
    plan.grid[a] = tiles(sweep.grid[a]);
    plan.last[a] = last_tile(sweep.grid[a]);
  }
  plan.block[2] = plan.grid[2];

  // All times, then rows, then examples, as long as what is transformed stays near.
  const int64_t patch_bytes = Winograd::kPlanes * plan.pitch * tiling.operand_bytes;
  const int64_t patches = kPatchBytes / patch_bytes / plan.grid[2], tiles = kPositions / plan.grid[2];  // rows of them
  const bool by_table = sweep.in_time != nullptr;  // then no cut along T would transform less
  plan.block[0] = by_table ? plan.grid[0] : even_part(plan.grid[0], std::min(tiles, patches - plan.frames_of(0)));
  plan.block[1] = plan.block[0] < plan.grid[0]
                      ? 1
                      : even_part(plan.grid[1], std::min(tiles / plan.block[0], patches / plan.frames_of(plan.block[0])));
  const int64_t of_example = plan.block[0] * plan.block[1];
  plan.block_n =
      plan.block[1] < plan.grid[1]
          ? 1
          : even_part(sweep.n, std::min(tiles / of_example, patches / (plan.frames_of(plan.block[0]) * plan.block[1])));
  plan.count(sweep.n, plan.grid);
  const int64_t sums_bytes = Winograd::kPlanes * plan.tiles() * plan.lanes * static_cast<int64_t>(sizeof(float));
  plan.blocks_together = std::clamp<int64_t>(kSumsBytes / sums_bytes, 1, plan.channel_blocks);
  return plan;
}

TiledRegion::TiledRegion(const WinogradPlan& plan, const Region& region) : Region(region) {
  const bool ends = first[1] + count[1] == plan.grid[1];
  for (int plane = 0; plane < Winograd::kPlanes; ++plane) {
    rows[plane] = count[1] - (ends && !Winograd::takes(plane, plan.last[1], Winograd::kTile) ? 1 : 0);
    columns[plane] = count[2] - (Winograd::takes(plane, Winograd::kTile, plan.last[2]) ? 0 : 1);
  }
}

template <typename Operand>
std::shared_ptr<const Buffer> winograd_weights(const Filter& filter, const Use& use, const WinogradPlan& plan,
                                               const WinogradKernel<Operand, float>& transforms, const Loops<float>& loops,
                                               ParallelFor parallel_for) {
  Description how{Winograd::kPlanes, plan.lanes, plan.tiling.operand_bytes, plan.input_parts, plan.output_parts, plan.depth};
  describe(filter, use, plan.sweep, how);
  return kept(filter, loops, parallel_for, how, static_cast<size_t>(plan.packed_weights()) * sizeof(Operand),
              [&](const Buffer& buffer) {
                const Packer<Operand> packer(filter, use, plan, transforms, loops, buffer.as<Operand>());
                parallel(parallel_for, plan.sweep.groups * plan.channel_blocks, [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) packer.pack(i / plan.channel_blocks, i % plan.channel_blocks);
                });
              });
}

template std::shared_ptr<const Buffer> winograd_weights(const Filter&, const Use&, const WinogradPlan&,
                                                        const WinogradKernel<float, float>&, const Loops<float>&, ParallelFor);
template std::shared_ptr<const Buffer> winograd_weights(const Filter&, const Use&, const WinogradPlan&,
                                                        const WinogradKernel<bfloat16, float>&, const Loops<float>&, ParallelFor);

}  // namespace captum_dtd::cpu
