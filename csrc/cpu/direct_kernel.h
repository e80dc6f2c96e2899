// The register tile of convolutions whose groups have few channels, straight from memory with channels last.
#pragma once

#include <cstdint>

#include "../problems.h"

namespace captum_dtd::cpu {

// Neighbouring taps of a filter's row. Positions before `begin` and from `end` on are padding.
template <typename Sum>
struct DirectRow {
  const void* from;  // what the first tap of position 0 reads, of the first channel
  int64_t begin, end;
  const Sum* weights;  // [tap][channel of the group][lane]
  int taps;            // one or kJoined
};

//   sums[p * pitch + o] = start[o] + sum over rows r, taps k, c < of_group of
//                         weights[(k * of_group + c) * lanes + o] * r.from[(p + k) * step + first(o) + c]
//
// for as many output channels o as there are lanes, first(o) being the lane that o's group begins with. Weights are those of r,
// or for negative inputs, where these have weights of their own, those `of_part` numbers further on. `start` may be null.
template <typename Sum>
struct DirectCall {
  Element type;  // of what is read: the accumulator's or BFloat16
  int of_group, positions;
  const DirectRow<Sum>* rows;
  int64_t count;
  int64_t channel, weight;  // of the first lane, in numbers behind where rows and their weights begin
  int64_t of_part;          // 0 where there is one part
  int64_t step;
  const Sum* start;
  Sum* sums;
  int64_t pitch;
};

template <typename Sum>
struct DirectKernel {
  static constexpr int kJoined = 3;  // taps that share what they read

  int lanes, max_positions;
  bool shuffles;  // where not, groups have one channel or as many as there are lanes
  void (*run)(const DirectCall<Sum>& call);
};

const DirectKernel<float>* float_direct_avx512();
const DirectKernel<float>* float_direct_avx2();
const DirectKernel<float>* float_direct_generic();
const DirectKernel<double>* double_direct_avx512();
const DirectKernel<double>* double_direct_avx2();
const DirectKernel<double>* double_direct_generic();

}  // namespace captum_dtd::cpu
