// How a sweep is cut up: into slabs that fit the caches, chunks of depth, and blocks of output channels.
//
// A slab is what a block of output positions reads, lifted, padded and with its channels contiguous. Everything here follows
// from shapes alone, never from the number of threads, so that sums are taken in one order always.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../geometry.h"
#include "../time_sums.h"
#include "loops.h"

namespace captum_dtd::cpu {

// One product of digits of a slab's number and a weight; an arithmetic is the sum of a few of them.
struct Product {
  Digit operand, weight;
};

// Neighbouring channels of the depth that have one origin. A run lies within one chunk.
struct Run {
  int64_t shift;  // along W, in positions of the input: a tap of W that became part of the depth
  int part;
  Product product;
  int64_t tap_w;              // whose weights these are, where shifted; else 0
  int64_t channel, channels;  // of the sweep's input, within its group
  int64_t depth;              // of the first channel
};

// What a plan cuts its positions into. Whatever is chosen, sums are the same.
enum class Cut { Fitting, OfOneExample, SinglePositions };

// What the lanes of a kernel's registers are.
//
//   Channels   output channels, which all read one number at a time: a position has its channels next to each other
//   Positions  neighbouring positions: each channel or pair of them has a plane of its own (a PlanarKernel's)
//   Groups     output channels of several groups, and each reads its own group's: a position has as many input channels of all
//              these groups next to each other as there are output channels
enum class Lanes { Channels, Positions, Groups };

// What a kernel asks of a plan.
struct Tiling {
  Lanes lanes;
  int channels;        // of one block
  int depth_multiple;  // of a chunk
  int pair;            // neighbours in depth that packed weights keep together
  int operand_bytes;
  int64_t near_bytes = 0;  // as of the MicroKernel
  Cut cut = Cut::Fitting;
};

// How a grid is cut: examples, and positions along T, H, W.
struct Blocks {
  int64_t block_n, block[3];    // of one block
  int64_t blocks_n, blocks[3];  // how many blocks

  void count(int64_t n, const int64_t (&grid)[3]) {
    blocks_n = (n + block_n - 1) / block_n;
    for (int a = 0; a < 3; ++a) blocks[a] = (grid[a] + block[a] - 1) / block[a];
  }
  int64_t per_group() const { return blocks_n * blocks[0] * blocks[1] * blocks[2]; }
};

struct Plan : Blocks {
  Sweep sweep;  // its taps in the order of rising input positions; of several that share slabs, what reads all that they read
  Tiling tiling;
  int input_parts, output_parts;

  // The slab holds every grain-th position of the input; a block's taps and positions are these many of them apart.
  int64_t grain[3], stride[3], step[3], taps[3];
  int64_t extent[3];       // of a block's slab, from row to row and plane to plane
  int64_t shared_padding;  // positions that are the end of a row and the beginning of the next one: zeros

  int64_t together;  // groups that share a slab: one, but where lanes are of several

  std::vector<Run> runs;
  int64_t chunk, chunks;                // depth of one, and how many
  int64_t position_pitch, depth_pitch;  // elements of a slab from position to position, and from channels or planes to the next
  int64_t chunk_elements;               // of a slab

  // Elements of a chunk that come before a channel's, at the first position.
  int64_t channel_at(int64_t channel) const { return channel / of_pitch() * depth_pitch; }

  int64_t block_channels, channel_blocks;  // output channels of one block, and blocks in a group

  // What the kernel is told: taps next to each other in the slab are one tap of more depth.
  std::vector<int64_t> offsets;
  std::vector<std::vector<int64_t>> offsets_in_time;  // of the taps of each TimeSum
  int64_t kernel_depth, kernel_taps;                  // of a tap, and how many along W

  bool planar() const { return tiling.lanes == Lanes::Positions; }
  bool of_groups() const { return tiling.lanes == Lanes::Groups; }
  int64_t of_pitch() const { return planar() ? tiling.pair : of_groups() ? tiling.depth_multiple : 1; }
  int64_t bundles() const { return (sweep.groups + together - 1) / together; }
  int64_t groups_of(int64_t bundle) const { return std::min(together, sweep.groups - bundle * together); }
  int64_t slabs() const { return bundles() * per_group(); }
  // Whether each position holds its window along W, instead of reading its neighbours.
  bool windows() const { return runs.back().tap_w > 0; }
  int64_t depth() const { return runs.back().depth + runs.back().channels; }

  // How many positions of the slab so many of the grid reach over.
  int64_t extent_of(int a, int64_t positions) const {
    if (a == 0 && sweep.in_time != nullptr) return sweep.in_time->slab_frames();
    return (positions - 1) * stride[a] + (taps[a] > 1 ? (taps[a] - 1) * step[a] : 0) + 1;
  }
  int64_t slab_positions() const { return block_n * extent[0] * extent[1] * extent[2] + shared_padding; }
  int64_t tap_volume() const { return taps[0] * taps[1] * taps[2]; }
  int64_t packed_block() const { return chunks * tap_volume() * chunk * tiling.channels; }  // weights of a block of channels
  int64_t packed_weights() const { return bundles() * channel_blocks * packed_block(); }
};

// Without taps that reach the input from no position, but for one: a widely dilated window has such, and one over T of few
// frames.
Sweep reaching(Sweep sweep);

// Taps that run backwards (an adjoint's) are counted from the other end.
Sweep ascending(Sweep sweep);

// Whether a kernel with channels of several groups in so many lanes is faster than one with those of one group, `rate` times as
// fast with full lanes.
bool groups_pay(const Sweep& sweep, int output_parts, int lanes, const Tiling& tiling, double rate);

// Whether a kernel that reads groups of few channels where they lie is faster than one that packs those of one group, `rate`
// times as fast with full lanes.
bool direct_pays(const Sweep& sweep, int input_parts, int output_parts, const Tiling& tiling, double rate);

// Whether a kernel with positions in its lanes is faster than one with so many channels, `rate` times as fast with full lanes.
bool planar_pays(const Sweep& sweep, int output_parts, int channels, double rate);

// How many channels a planar kernel of at most so many shall have in its blocks.
int planar_channels(const Sweep& sweep, int output_parts, int most);

// Whether a sweep of so few channels is planned with windows. Those that are share no slabs.
bool has_windows(const Sweep& sweep, int input_parts, const std::vector<Product>& products, const Tiling& tiling);

// Sweeps that read the same slabs, each with offsets of its own.
struct Plans {
  Plan slab;  // for packing
  std::vector<Plan> sweeps;
};

// Of one sweep, or of an adjoint's phases, which read neighbouring positions each: they differ in where they begin and in their
// taps. What they read is then packed once for all of them.
Plans make_plans(std::vector<Sweep> sweeps, int input_parts, int output_parts, const std::vector<Product>& products,
                 const Tiling& tiling);

}  // namespace captum_dtd::cpu
