// The inner loops over memory that packing and epilogues are made of, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "../lift.h"
#include "conv3d.h"
#include "microkernel.h"

namespace captum_dtd::cpu {

inline int64_t element_bytes(Element element) { return element == Element::Float64 ? 8 : element == Element::Float32 ? 4 : 2; }

template <typename Sum>
constexpr Element element_of() {
  return sizeof(Sum) == sizeof(double) ? Element::Float64 : Element::Float32;
}

// What a number is replaced by before it is multiplied: itself, its nearest bfloat16, or the nearest bfloat16 of what that
// rounding left over. A number is High + Low to float32's own accuracy, nearly.
enum class Digit { Whole, High, Low };

// Which weights take part: all as they are, v+ = max(v, 0), or -v- = max(-v, 0).
enum class Sign { Both, Positive, Negative };

// A block is `rows` positions by `columns` channels, its rows `pitch` elements apart and its columns next to each other.
template <typename Sum>
struct Loops {
  // Between memory of any strides and element type, and a block.
  void (*load)(Element type, const void* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Sum* to,
               int64_t pitch);
  void (*store)(Element type, const Sum* from, int64_t pitch, int64_t rows, int64_t columns, void* to, int64_t row_stride,
                int64_t column_stride, bool stream);

  // to[row][group][channel] = from[row][group][channel], for some neighbouring channels of all groups, which are `of_group` apart
  // and get `to_group` apart.
  void (*regroup)(int64_t rows, int64_t groups, int64_t channels, const Sum* from, int64_t from_pitch, int64_t of_group, Sum* to,
                  int64_t to_pitch, int64_t to_group);

  // to = u_part of x (and of low or high, whichever bounds this part), in place where to is x.
  void (*lift)(Lift lift, int part, int64_t rows, int64_t columns, const Sum* x, const Sum* bound, Sum* to, int64_t pitch);

  // to = one digit of from.
  void (*round)(Digit digit, int64_t rows, int64_t columns, const Sum* from, int64_t from_pitch, bfloat16* to, int64_t to_pitch);

  // to = relevance / (sums + stabilizer * sign): what an output position passes to each unit of its denominator.
  void (*divide)(int64_t rows, int64_t columns, const Sum* sums, int64_t sums_pitch, Sum stabilizer, const Sum* relevance,
                 int64_t pitch, Sum* to, int64_t to_pitch, bool stream);

  // to = u * sums, or with `add` to += u * sums.
  void (*multiply)(int64_t rows, int64_t columns, const Sum* sums, int64_t sums_pitch, const Sum* u, int64_t pitch, bool add,
                   Sum* to, int64_t to_pitch, bool stream);

  // What the summands of x + alpha * other get of its relevance, so many numbers of each next to each other; a summand counts
  // where it is positive.
  void (*share)(int64_t count, const Sum* x, const Sum* other, Sum alpha, Sum stabilizer, const Sum* relevance, Sum* to,
                Sum* to_other, bool stream);

  // 128 bits that tell what these bytes are, at the speed of memory; the same on one machine only.
  void (*digest)(const void* data, int64_t bytes, uint64_t (&to)[2]);

  // sums += more, of so many numbers next to each other.
  void (*add)(int64_t count, const Sum* more, Sum* sums);

  // Straight from `rows` neighbouring rows of a filter in memory, for so many vectors i, which are their pitches apart:
  //   z[i][row] += weights[row] . u[i]        to[i] += sum over rows of  s[i][row] * weights[row]
  void (*dot)(Element type, const void* weights, int64_t rows, int64_t columns, Sign sign, int64_t vectors, const Sum* u,
              int64_t u_pitch, Sum* z, int64_t z_pitch);
  void (*spread)(Element type, const void* weights, int64_t rows, int64_t columns, Sign sign, int64_t vectors, const Sum* s,
                 int64_t s_pitch, Sum* to, int64_t to_pitch);
};

const Loops<float>* float_loops_avx512();
const Loops<float>* float_loops_avx2();
const Loops<float>* float_loops_generic();
const Loops<double>* double_loops_avx512();
const Loops<double>* double_loops_avx2();
const Loops<double>* double_loops_generic();

}  // namespace captum_dtd::cpu
