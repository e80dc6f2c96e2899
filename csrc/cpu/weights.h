// Filters as the kernels read them, kept from call to call.
//
// What is kept is found by its content: a hash of all bytes of the filter beside the way it is packed. A filter that was
// changed in place, or folded anew, is another filter; an equal one is found again wherever it lies.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "conv3d.h"
#include "plan.h"

namespace captum_dtd::cpu {

struct Hash {
  uint64_t low, high;
};

// Of all bytes, at the speed of memory: weights are hashed whenever they are used, since their owner may change them, but once
// while they are held.
template <typename Sum>
Hash hash_bytes(const Loops<Sum>& loops, const void* data, int64_t bytes, ParallelFor parallel_for);

// The promise that nothing writes to weights, and nothing else comes to lie there, until they were released as often as they were
// held. It is for what this thread computes.
void hold(const void* data, int64_t bytes);
void release(const void* data, int64_t bytes);

struct Filter {
  const void* data;  // (c_out, c_in / groups, kT, kH, kW), contiguous
  Element element;
  Hash hash;
  int64_t c_out, c_in;  // of one group
  int64_t volume;       // taps of one channel
  int64_t count;        // of all weights
};

// Which weights a sweep sums over. A forward sweep has the filter's output channels in its lanes and its input channels in
// its depth, an adjoint the other way round. With `split`, part 0 has v+ and part 1 has -v-; else weights are as they are.
struct Use {
  bool adjoint;
  bool split;
};

// Of a filter, from output lane to lane and from depth to depth of a sweep, in elements.
struct FilterStrides {
  int64_t lane, depth;

  FilterStrides(const Filter& filter, const Use& use)
      : lane(use.adjoint ? filter.volume : filter.c_in * filter.volume),
        depth(use.adjoint ? filter.c_in * filter.volume : filter.volume) {}
};

// Where a channel of a filter has the tap of a sweep.
int64_t filter_tap(const Sweep& sweep, int64_t t, int64_t h, int64_t w);

// What weights are found by: which filter, what of it a sweep sums over, and how they are packed.
using Description = std::vector<int64_t>;

// Adds which filter and what of it; the rest is the caller's.
void describe(const Filter& filter, const Use& use, const Sweep& sweep, Description& how);

// The buffer that is kept under this description of a filter, or a new one of so many bytes that `fill` has filled. It is kept if
// nobody wrote to the filter meanwhile, as another thread may that does not know of the promise.
template <typename Sum>
std::shared_ptr<const Buffer> kept(const Filter& filter, const Loops<Sum>& loops, ParallelFor parallel_for,
                                   const Description& how, size_t bytes, const std::function<void(const Buffer&)>& fill);

// Packed as plan says: [group][block of channels][chunk][tap][depth / pair][channels][pair], zero where nothing is.
template <typename Operand, typename Sum>
std::shared_ptr<const Buffer> packed_weights(const Filter& filter, const Use& use, const Plan& plan, const Loops<Sum>& loops,
                                             ParallelFor parallel_for);

// Where rows of weights go among packed ones.
struct PackedPlace {
  int64_t depth, lane;  // of the first
};

// Rows of so many lanes, one below the other in depth, as a kernel reads them: [depth / pair][channels][pair].
template <typename Operand, typename Sum>
void write_packed(const Loops<Sum>& loops, Digit digit, int64_t rows, int64_t lanes, const Sum* weights, Operand* to,
                  const Tiling& tiling, const PackedPlace& place) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = place.depth + row;
    Operand* const target = to + (at / tiling.pair * tiling.channels + place.lane) * tiling.pair + at % tiling.pair;
    if constexpr (std::is_same_v<Operand, Sum>) {
      std::memcpy(target, weights + row * lanes, static_cast<size_t>(lanes) * sizeof(Sum));
    } else {
      constexpr int64_t kMostLanes = 256;
      bfloat16 rounded[kMostLanes];
      loops.round(digit, 1, lanes, weights + row * lanes, lanes, rounded, lanes);
      for (int64_t lane = 0; lane < lanes; ++lane) target[lane * tiling.pair] = rounded[lane];
    }
  }
}

// The nearest bfloat16s of a filter, in its own order.
template <typename Sum>
std::shared_ptr<const Buffer> rounded_weights(const Filter& filter, const Loops<Sum>& loops, ParallelFor parallel_for);

}  // namespace captum_dtd::cpu
