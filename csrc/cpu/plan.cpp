#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

namespace captum_dtd::cpu {
namespace {

// Of the second-level cache of current machines (1 MB and more), one chunk of a slab and of the weights take about a half.
constexpr int64_t kSlabBytes = 384 << 10;
constexpr int64_t kGroupsSlabBytes = 256 << 10;  // so that neighbouring groups find the lines that they share
constexpr int64_t kWeightBytes = 256 << 10;
constexpr int64_t kChunkBytes = 1024;  // longer chunks gain nothing
constexpr int64_t kDepthStep = 32;     // what kernels take at most in one instruction
constexpr int64_t kRunChannels = 64;   // packed at a time
constexpr int64_t kMergedBytes = 128;  // up to this depth, taps along W are merged
constexpr int64_t kPlanes = 16;        // of a chunk of a planar slab: more would leave it too few rows
constexpr int64_t kGroupRows = 16;     // of all lanes, in a chunk of a position of several groups
constexpr int64_t kCacheLine = 64;
constexpr int64_t kAliasing = 512;  // positions a multiple of this apart share too few lines of the first-level cache

// Sizes into which `size` can be cut evenly: ceil(size / 1), ceil(size / 2), ... without repetitions.
std::vector<int64_t> even_cuts(int64_t size) {
  std::vector<int64_t> cuts;
  for (int64_t cut = std::max<int64_t>(size, 1);;) {
    cuts.push_back(cut);
    if (cut == 1) return cuts;
    cut = ceil_div(size, ceil_div(size, cut) + 1);
    if (cut == cuts.back()) --cut;
  }
}

int64_t depth_of(const Sweep& sweep, int input_parts, const std::vector<Product>& products) {
  return static_cast<int64_t>(products.size()) * input_parts * sweep.c_in;
}

// Unit strides, and neighbouring taps that reach over whatever these read.
Sweep cover(const std::vector<Sweep>& sweeps) {
  Sweep all = sweeps[0];
  for (int a = 0; a < 3; ++a) {
    int64_t first = all.base[a], last = first;
    for (const Sweep& sweep : sweeps) {
      first = std::min(first, sweep.base[a]);
      last = std::max(last, sweep.base[a] + (sweep.taps[a] - 1) * sweep.step[a]);
      all.grid[a] = std::max(all.grid[a], sweep.grid[a]);
    }
    all.base[a] = first;
    all.taps[a] = last - first + 1;
    all.step[a] = 1;
  }
  return all;
}

// Of a position and a tap, where every group has tiles of its own.
int64_t padded_products(const Sweep& sweep, int output_parts, const Tiling& tiling) {
  return sweep.groups * round_up(sweep.c_out * output_parts, tiling.channels) * round_up(sweep.c_in, tiling.depth_multiple);
}

class Planner {
 public:
  explicit Planner(Plan& plan) : plan_(plan) {}

  void set_axes() {
    const Sweep& sweep = plan_.sweep;
    for (int a = 0; a < 3; ++a) {
      plan_.taps[a] = sweep.taps[a];
      plan_.grain[a] = sweep.taps[a] > 1 ? detail::gcd(sweep.stride[a], sweep.step[a]) : sweep.stride[a];
      plan_.stride[a] = sweep.stride[a] / plan_.grain[a];
      plan_.step[a] = sweep.taps[a] > 1 ? sweep.step[a] / plan_.grain[a] : 0;
    }
  }

  // A chunk's weights fit the cache if the sweep has no more taps than these.
  void set_depth(const std::vector<Product>& products, bool windows, int64_t most_taps) {
    const Sweep& sweep = plan_.sweep;
    const Tiling& tiling = plan_.tiling;
    const int64_t channels = plan_.of_groups() ? plan_.input_parts * round_up(sweep.c_in, tiling.depth_multiple)
                                               : depth_of(sweep, plan_.input_parts, products);
    if (windows) {
      plan_.grain[2] = sweep.stride[2];
      plan_.stride[2] = plan_.taps[2] = 1;
      plan_.step[2] = 0;
    }
    const int64_t shifts = windows ? sweep.taps[2] : 1;

    const int64_t depth = shifts * channels;
    const int64_t lane_bytes = tiling.channels * tiling.operand_bytes;
    const int64_t column = std::max<int64_t>(windows ? plan_.tap_volume() : most_taps, 1) * lane_bytes;
    const int64_t longest = plan_.planar() ? kPlanes * tiling.pair : kChunkBytes / tiling.operand_bytes;
    int64_t most = std::max<int64_t>(std::min(kWeightBytes / column, longest), 16);
    if (plan_.of_groups()) most = kGroupRows * tiling.depth_multiple;
    if (tiling.near_bytes > 0) {
      const int64_t plane = std::max<int64_t>(plan_.taps[1] * plan_.taps[2], 1) * lane_bytes;
      most = std::min(most, std::max(tiling.near_bytes / plane, kDepthStep));
    }
    if (most > kDepthStep) most -= most % kDepthStep;
    plan_.chunks = ceil_div(depth, most);
    plan_.chunk = round_up(ceil_div(depth, plan_.chunks), tiling.depth_multiple);
    plan_.chunks = ceil_div(depth, plan_.chunk);
    plan_.depth_pitch = plan_.of_groups() ? tiling.channels : 1;

    int64_t next = 0;
    for (int64_t shift = 0; shift < shifts; ++shift)
      for (const Product& product : products)
        for (int part = 0; part < plan_.input_parts; ++part)
          for (int64_t channel = 0; channel < sweep.c_in;) {
            const int64_t most_here = plan_.of_groups() ? tiling.depth_multiple : kRunChannels;
            const int64_t count = std::min({sweep.c_in - channel, plan_.chunk - next % plan_.chunk, most_here});
            plan_.runs.push_back({shift * sweep.step[2], part, product, shift, channel, count, next});
            channel += count;
            next += plan_.of_groups() ? tiling.depth_multiple : count;
          }
  }

  void set_blocks() {
    const Cut cut = plan_.tiling.cut;
    if (cut != Cut::SinglePositions) find_blocks();
    if (cut == Cut::SinglePositions) std::fill_n(plan_.block, 3, 1);
    if (cut != Cut::Fitting) plan_.block_n = 1;
    plan_.count(plan_.sweep.n, plan_.sweep.grid);
    for (int a = 0; a < 3; ++a) plan_.extent[a] = plan_.extent_of(a, plan_.block[a]);
    plan_.shared_padding = find_shared_padding();
    plan_.extent[2] -= plan_.shared_padding;
  }

  // How many positions of padding at the end of a row can be the next row's beginning, too: no more than lie between two rows of
  // the grid. So a kernel spans less there.
  int64_t find_shared_padding() const {
    const Sweep& sweep = plan_.sweep;
    if (plan_.windows() || plan_.stride[2] > 1 || plan_.block[2] < sweep.grid[2]) return 0;
    const int64_t width = plan_.extent[2], grain = plan_.grain[2];
    const int64_t left = ceil_div(std::max<int64_t>(-sweep.base[2], 0), grain);
    const int64_t right = width - ceil_div(std::max<int64_t>(sweep.in[2] - sweep.base[2], 0), grain);
    return std::clamp<int64_t>(std::min(left, right), 0, width - sweep.grid[2]);
  }

  // Whole rows where they fit, then the block of T and H that packs the fewest positions for each it serves.
  void find_blocks() {
    const Sweep& sweep = plan_.sweep;
    const int64_t elements = plan_.planar() ? plan_.chunk : plan_.channel_at(plan_.chunk);
    const int64_t most = plan_.of_groups() ? kGroupsSlabBytes : kSlabBytes;
    const int64_t budget = std::max<int64_t>(most / (elements * plan_.tiling.operand_bytes), 1);
    const auto volume = [&](int64_t t, int64_t h, int64_t w) {
      return plan_.extent_of(0, t) * plan_.extent_of(1, h) * plan_.extent_of(2, w);
    };

    const bool by_table = sweep.in_time != nullptr;  // then no cut along T would read less
    const std::vector<int64_t> cuts_t = by_table ? std::vector<int64_t>{sweep.grid[0]} : even_cuts(sweep.grid[0]);
    const std::vector<int64_t> cuts_h = even_cuts(sweep.grid[1]);
    int64_t* block = plan_.block;
    for (int64_t w : even_cuts(sweep.grid[2])) {
      block[0] = cuts_t.back();
      block[1] = 1;
      block[2] = w;
      if (volume(1, 1, w) <= budget) break;
    }
    double least = std::numeric_limits<double>::infinity();
    const auto search = [&](int64_t w, int64_t room) {
      for (int64_t t : cuts_t)
        for (int64_t h : cuts_h) {
          const int64_t packed = volume(t, h, w);
          const double each = static_cast<double>(packed) / static_cast<double>(t * h * w);
          if (packed > room || each >= least) continue;
          least = each;
          block[0] = t;
          block[1] = h;
          block[2] = w;
        }
    };
    search(block[2], budget);
    // What a single position reads may be too much already, as of widely dilated windows: then many had better share it.
    constexpr int64_t kMostBudgets = 64;
    if (least == std::numeric_limits<double>::infinity())
      for (int64_t w : even_cuts(sweep.grid[2])) search(w, kMostBudgets * budget);
    const bool whole = block[0] >= sweep.grid[0] && block[1] >= sweep.grid[1] && block[2] >= sweep.grid[2];
    plan_.block_n = 1;
    if (whole)
      for (int64_t n : even_cuts(sweep.n)) {
        plan_.block_n = n;
        if (n * volume(block[0], block[1], block[2]) <= budget) break;
      }
  }

  void set_pitches() {
    const int64_t bytes = plan_.tiling.operand_bytes;
    const auto apart = [&](int64_t elements) {
      return elements * bytes % kAliasing == 0 ? elements + kCacheLine / bytes : elements;
    };
    if (plan_.planar()) {
      plan_.position_pitch = plan_.tiling.pair;
      plan_.depth_pitch = apart(plan_.slab_positions() * plan_.tiling.pair);
      plan_.chunk_elements = plan_.chunk / plan_.tiling.pair * plan_.depth_pitch;
    } else {
      plan_.position_pitch = apart(plan_.channel_at(plan_.chunk));
      plan_.chunk_elements = plan_.slab_positions() * plan_.position_pitch;
    }
  }

  void set_channels() {
    plan_.block_channels = plan_.tiling.channels / plan_.output_parts;
    plan_.together = plan_.of_groups() ? plan_.block_channels / plan_.sweep.c_out : 1;
    if (plan_.of_groups()) plan_.block_channels = plan_.together * plan_.sweep.c_out;
    plan_.channel_blocks = ceil_div(plan_.together * plan_.sweep.c_out, plan_.block_channels);
  }

  // A sweep that reads this slab from `first` on.
  void set_sweep(const Sweep& sweep) {
    for (int a = 0; a < 3; ++a) {
      first_[a] = sweep.base[a] - plan_.sweep.base[a];
      plan_.taps[a] = sweep.taps[a];
      plan_.step[a] = sweep.step[a];
    }
    plan_.sweep = sweep;
  }

  void set_offsets() {
    const bool contiguous = plan_.chunks == 1 && plan_.position_pitch == plan_.channel_at(plan_.chunk) && plan_.step[2] == 1;
    const bool merged = !plan_.planar() && contiguous && plan_.chunk * plan_.tiling.operand_bytes <= kMergedBytes;
    plan_.kernel_depth = merged ? plan_.taps[2] * plan_.chunk : plan_.chunk;
    plan_.kernel_taps = merged ? std::min<int64_t>(plan_.taps[2], 1) : plan_.taps[2];
    if (plan_.sweep.in_time != nullptr) {
      for (const TimeSum& sum : plan_.sweep.in_time->sums) {
        plan_.offsets_in_time.emplace_back();
        for (int64_t frame : sum.frames) add_offsets(frame, plan_.offsets_in_time.back());
      }
    } else {
      for (int64_t t = 0; t < plan_.taps[0]; ++t) add_offsets(t * plan_.step[0], plan_.offsets);
    }
  }

 private:
  // Of the taps of H and W, at a time of the slab.
  void add_offsets(int64_t t, std::vector<int64_t>& offsets) const {
    for (int64_t h = 0; h < plan_.taps[1]; ++h)
      for (int64_t w = 0; w < plan_.kernel_taps; ++w) {
        const int64_t row = (first_[0] + t) * plan_.extent[1] + first_[1] + h * plan_.step[1];
        offsets.push_back((row * plan_.extent[2] + first_[2] + w * plan_.step[2]) * plan_.position_pitch);
      }
  }

  Plan& plan_;
  int64_t first_[3] = {0, 0, 0};  // position of the slab that the first tap reads
};

}  // namespace

Sweep reaching(Sweep sweep) {
  for (int a = sweep.in_time != nullptr ? 1 : 0; a < 3; ++a) {
    const int64_t across = (sweep.grid[a] - 1) * sweep.stride[a];
    const auto is_outside = [&](int64_t tap) {
      const int64_t first = sweep.base[a] + tap * sweep.step[a];
      return first + across < 0 || first >= sweep.in[a];
    };
    while (sweep.taps[a] > 1 && is_outside(sweep.taps[a] - 1)) --sweep.taps[a];
    while (sweep.taps[a] > 1 && is_outside(0)) {
      --sweep.taps[a];
      sweep.base[a] += sweep.step[a];
      sweep.first_tap[a] += sweep.tap_skip[a];
    }
  }
  return sweep;
}

Sweep ascending(Sweep sweep) {
  for (int a = 0; a < 3; ++a) {
    if (sweep.step[a] >= 0 || sweep.taps[a] == 0) continue;
    sweep.base[a] += sweep.step[a] * (sweep.taps[a] - 1);
    sweep.first_tap[a] += sweep.tap_skip[a] * (sweep.taps[a] - 1);
    sweep.step[a] = -sweep.step[a];
    sweep.tap_skip[a] = -sweep.tap_skip[a];
  }
  return sweep;
}

bool groups_pay(const Sweep& sweep, int output_parts, int lanes, const Tiling& tiling, double rate) {
  constexpr double kLoads = 1.3, kShuffles = 1.5;  // each product reads an input of its own, which of a wider group is shuffled
  const int64_t of_group = sweep.c_out * output_parts;
  // Each run of channels is picked out of all channels of its groups, which are therefore read as often as there are runs.
  constexpr int64_t kMostRuns = 16;
  if (sweep.groups == 1 || of_group > lanes || sweep.c_in > kMostRuns * sweep.c_out) return false;
  const int64_t bundles = ceil_div(sweep.groups, lanes / of_group);
  const int64_t own = bundles * lanes * round_up(sweep.c_in, sweep.c_out);
  const double padded = static_cast<double>(padded_products(sweep, output_parts, tiling));
  return (sweep.c_out > 1 ? kShuffles : kLoads) * rate * static_cast<double>(own) < padded;
}

// Found by trying, on one core of an EPYC (Zen 5).
bool direct_pays(const Sweep& sweep, int input_parts, int output_parts, const Tiling& tiling, double rate) {
  constexpr double kGain = 0.7;       // nothing is packed
  constexpr int64_t kManyTaps = 400;  // of which packing takes little time, but for parts that are packed apart
  if (input_parts == 1 && sweep.taps[0] * sweep.taps[1] * sweep.taps[2] > kManyTaps) return false;
  const int64_t own = sweep.groups * sweep.c_out * output_parts * sweep.c_in;
  return kGain * rate * static_cast<double>(own) < static_cast<double>(padded_products(sweep, output_parts, tiling));
}

bool planar_pays(const Sweep& sweep, int output_parts, int channels, double rate) {
  // Rows must follow each other in a plane, so lanes cover what is between them too.
  if (sweep.stride[1] != 1 || sweep.stride[2] != 1) return false;
  constexpr double kGain = 1.2;  // to be worth unaligned loads
  constexpr int64_t kLanes = 16;
  const int64_t row = sweep.grid[2] + (sweep.taps[2] > 1 ? (sweep.taps[2] - 1) * std::abs(sweep.step[2]) : 0);
  const int64_t line = (sweep.grid[1] - 1) * row + sweep.grid[2];
  const double positions = static_cast<double>(sweep.grid[1] * sweep.grid[2]) / static_cast<double>(round_up(line, kLanes));
  const int64_t lanes = sweep.c_out * output_parts;
  return positions > kGain * rate * static_cast<double>(lanes) / static_cast<double>(round_up(lanes, channels));
}

int planar_channels(const Sweep& sweep, int output_parts, int most) {
  const int64_t of_part = most / output_parts;
  return static_cast<int>(ceil_div(sweep.c_out, ceil_div(sweep.c_out, of_part))) * output_parts;
}

bool has_windows(const Sweep& sweep, int input_parts, const std::vector<Product>& products, const Tiling& tiling) {
  // Few channels would mostly be padding: the taps of W join them, and each position holds its whole window.
  const int64_t channels = depth_of(sweep, input_parts, products);
  const int64_t apart = sweep.taps[2] * round_up(channels, tiling.depth_multiple);
  const int64_t joined = round_up(sweep.taps[2] * channels, tiling.depth_multiple);
  return tiling.lanes == Lanes::Channels && sweep.taps[2] > 1 && 2 * joined <= apart;
}

Plans make_plans(std::vector<Sweep> sweeps, int input_parts, int output_parts, const std::vector<Product>& products,
                 const Tiling& tiling) {
  int64_t most_taps = 0;
  for (Sweep& sweep : sweeps) {
    sweep = ascending(sweep);
    most_taps = std::max(most_taps, sweep.taps[0] * sweep.taps[1] * sweep.taps[2]);
  }
  const bool alone = sweeps.size() == 1;
  Plans plans{};
  Plan& slab = plans.slab;
  slab.sweep = alone ? sweeps[0] : cover(sweeps);
  slab.tiling = tiling;
  slab.input_parts = input_parts;
  slab.output_parts = output_parts;
  Planner planner(slab);
  planner.set_axes();
  planner.set_depth(products, alone && has_windows(sweeps[0], input_parts, products, tiling), most_taps);
  planner.set_blocks();
  planner.set_pitches();
  planner.set_channels();
  for (const Sweep& sweep : sweeps) {
    Planner of_sweep(plans.sweeps.emplace_back(slab));
    if (!alone) of_sweep.set_sweep(sweep);
    of_sweep.set_offsets();
  }
  return plans;
}

}  // namespace captum_dtd::cpu
