// Filters as the kernels read them, kept from call to call.
//
// What is kept is found by its content: a hash of all bytes of the filter beside the way it is packed. A filter that was
// changed in place, or folded anew, is another filter; an equal one is found again wherever it lies.
#pragma once

#include <cstdint>
#include <memory>

#include "buffer.h"
#include "conv3d.h"
#include "plan.h"

namespace captum_dtd::cpu {

struct Hash {
  uint64_t low, high;
};

// Of all bytes, at the speed of memory.
Hash hash_bytes(const void* data, int64_t bytes, ParallelFor parallel_for);

struct Filter {
  const void* data;  // (c_out, c_in / groups, kT, kH, kW), contiguous
  Element element;
  Hash hash;
  int64_t c_out, c_in;  // of one group
  int64_t volume;       // taps of one channel
};

// Which weights a sweep sums over. A forward sweep has the filter's output channels in its lanes and its input channels in
// its depth, an adjoint the other way round. With `split`, part 0 has v+ and part 1 has -v-; else weights are as they are.
struct Use {
  bool adjoint;
  bool split;
};

// Packed as plan says: [group][block of channels][chunk][tap][depth / pair][channels][pair], zero where nothing is.
template <typename Operand, typename Sum>
std::shared_ptr<const Buffer> packed_weights(const Filter& filter, const Use& use, const Plan& plan, const Loops<Sum>& loops,
                                             ParallelFor parallel_for);

}  // namespace captum_dtd::cpu
