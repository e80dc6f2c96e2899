// One register tile of the implicit GEMM: some neighbouring positions times one block of output channels.
#pragma once

#include <cstdint>

namespace captum_dtd::cpu {

// Raw bits of a bfloat16: the upper half of a float.
struct bfloat16 {
  uint16_t bits;
};

// Weights that are multiplied later and meanwhile come to the second-level cache, so many elements at each step of the kernel.
// They are only read if they exist: the address may lie beyond the last.
template <typename Operand>
struct Ahead {
  const Operand* from;
  int64_t each_step;
};

// Goes through weights that are needed next, at an even pace over the steps until then.
template <typename Operand>
class Approach {
 public:
  Approach(const Operand* weights, int64_t count, int64_t steps, int64_t most_each_step)
      : from_(weights), end_(weights + count), each_step_(pace(count, steps, most_each_step)) {}

  // What comes nearer over the next so many steps.
  Ahead<Operand> over(int64_t steps) {
    const Ahead<Operand> ahead{from_, from_ < end_ ? each_step_ : 0};
    from_ += steps * ahead.each_step;
    return ahead;
  }

 private:
  static int64_t pace(int64_t count, int64_t steps, int64_t most) {
    constexpr int64_t kLine = 64 / sizeof(Operand);
    const int64_t needed = steps > 0 ? ((count + kLine - 1) / kLine + steps - 1) / steps * kLine : 0;
    return needed < most ? needed : most;
  }

  const Operand* from_;
  const Operand* end_;
  int64_t each_step_;
};

constexpr int kMostChannels = 64;  // of one block, of any kernel

// `Operand` is what is multiplied (float, double, bfloat16), `Sum` what is added up in (float, or double).
//
//   sum[p][o] = (accumulate ? sum[p][o] : 0)
//             + sum over taps j, k of  a[p * position_stride + offsets[j] + k] * b[j][k][o]      p < positions, o < channels
//
// `a` points into a slab of the lifted, zero-padded input whose channels are contiguous; `b` is packed as
// [taps][depth / pair][channels][pair], with pair = 1, or 2 for bfloat16; `sum` is [positions][channels], dense.
template <typename Operand, typename Sum>
struct MicroKernel {
  const char* isa;
  int max_positions;   // of one call
  int channels;        // of one block
  int depth_multiple;  // the slab's channel count is padded with zeros to a multiple of this
  void (*run)(int positions, const Operand* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
              const Operand* b, Sum* sum, bool accumulate, Ahead<Operand> ahead);
  int step = 1;               // of depth, at which weights come nearer
  void (*begin)() = nullptr;  // what a thread does before its calls, if anything
  bool spans_gaps = false;    // a call takes as long however few its positions: those between rows may as well be among them
  int64_t near_bytes = 0;     // weights that had better stay in a cache from call to call; 0: however many
};

// Each instruction set is compiled in a file of its own, with its own flags. Null where this machine cannot run it.
const MicroKernel<float, float>* float_kernel_avx512();
const MicroKernel<float, float>* float_kernel_avx2();
const MicroKernel<float, float>* float_kernel_generic();
const MicroKernel<double, double>* double_kernel_avx512();
const MicroKernel<double, double>* double_kernel_avx2();
const MicroKernel<double, double>* double_kernel_generic();

// Output channels of several groups of so many, and each reads its own group's: `depth` counts the channels that one group reads,
// padded to a multiple of those it writes, and of all lanes' groups as many lie next to each other.
//
//   sum[p][o] += sum over taps j, d, c of  a[p * position_stride + offsets[j] + d * channels + first(o) + c] * b[j][d][c][o]
//
// with c < of_group, d < depth / of_group, and first(o) the lane that o's group begins with. Null where there is none.
template <typename Sum>
using GroupsKernel = const MicroKernel<Sum, Sum>* (*)(int64_t of_group);

const MicroKernel<float, float>* float_groups_avx512(int64_t of_group);
const MicroKernel<float, float>* float_groups_avx2(int64_t of_group);
const MicroKernel<float, float>* float_groups_generic(int64_t of_group);
const MicroKernel<double, double>* double_groups_avx512(int64_t of_group);
const MicroKernel<double, double>* double_groups_avx2(int64_t of_group);
const MicroKernel<double, double>* double_groups_generic(int64_t of_group);

const MicroKernel<bfloat16, float>* bfloat16_kernel_amx();
const MicroKernel<bfloat16, float>* bfloat16_column_kernel_amx();  // of half as many channels
const MicroKernel<bfloat16, float>* bfloat16_kernel_avx512();
const MicroKernel<bfloat16, float>* bfloat16_kernel_generic();

}  // namespace captum_dtd::cpu
