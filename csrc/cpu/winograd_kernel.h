// The transforms of Winograd's minimal filtering F(4x4, 3x3), in every instruction set.
//
// A tile is 4x4 outputs of a 3x3 filter over a plane. Its patch, 6x6 inputs d, and the filter g are each transformed into 36
// numbers, whose products summed over channels are transformed back:
//
//   y = A' [ sum over channels of (G g G') * (B' d B) ] A
//
// That is 36 products instead of the 144 of their definition (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308). The matrices
// are those of Cook and Toom for the points 0, 5/8, -5/8, 3/2, -3/2 and infinity, which round least of those with few bits: as
// much as the definition does, compared with the largest terms of a patch.
//
// The last tile of a row or column may have fewer outputs: n of them, from n + 2 inputs, need n + 2 of the points only, and the
// numbers of the filter at these are those of a whole tile but for constants, which go into the transform of the inputs. So one
// transformed filter serves tiles of every size, and 14 outputs take 6 + 6 + 6 + 4 products a channel.
//
// *Compared with the largest*: an output that is far smaller than what its neighbours read comes out as noise. So there is a
// 37th product, for a bound on all terms of a tile, sum over channels of max|d| * sum|g|; an output that is less than
// kTooSmall of it (of which kOfEitherSign, where weights have both signs) is reported, to be computed by its definition.
#pragma once

#include <cstdint>

#include "microkernel.h"

namespace captum_dtd::cpu {

struct Winograd {
  static constexpr int kTaps = 3, kTile = 4, kPatch = 6;
  static constexpr int kPlanes = kPatch * kPatch + 1;  // transformed numbers, then the bound
  static constexpr int kFewest = 2;                    // outputs of a tile, along H or W
  static constexpr int kSizes = kTile - kFewest + 1;

  // The points but zero and infinity, with either sign.
  static constexpr double kNear = 0.625, kFar = 1.5;

  // The points are, in this order, 0, near, -near, far, -far and infinity.
  [[gnu::always_inline]] static constexpr bool takes(int point, int outputs) { return point <= outputs || point == kPatch - 1; }
  [[gnu::always_inline]] static constexpr bool takes(int plane, int height, int width) {
    return plane == kPlanes - 1 || (takes(plane / kPatch, height) && takes(plane % kPatch, width));
  }

  // Rounding typically leaves an error of 1e-6 of the bound, and so of 1e-4 of the smallest that is not reported: of whole maps,
  // 1e-6. It grows with the depth, as that of any sum does, the more so the more alike the channels are.
  static constexpr double kTooSmall = 0x1p-7;
  static constexpr double kOfEitherSign = 0x1p-12;

  // How much larger the bound is where bfloat16 is multiplied: where all channels are alike, what rounding leaves does not
  // average out over them.
  static constexpr float kOfRounded = 4;
};

// `Operand` is what is multiplied. The filter's numbers are rounded to it where they are packed.
template <typename Operand, typename Sum>
struct WinogradKernel {
  int lanes;  // channels of one vector

  // G g G' of 3x3 taps of so many lanes, a multiple of `lanes`, and sum|g|: from taps[tap * tap_stride + lane] to
  // to[plane * plane_stride + lane]. Each lane's smallest and largest tap are noted where they exceed what is there.
  void (*transform_filter)(const Sum* taps, int64_t tap_stride, int64_t channels, Sum* to, int64_t plane_stride, Sum* smallest,
                           Sum* largest);

  // B' d B of patches of so many channels, a multiple of `lanes`, and max|d|: to[planes[plane] + channel].
  typedef void (*TransformInput)(const Sum* patch, int64_t row_stride, int64_t column_stride, int64_t channels, Operand* to,
                                 const int64_t* planes);

  // A' m A, one tile of so many channels: from products[planes[plane] + channel] to to[row * row_stride + column * channels +
  // channel]. `start`, what each channel's sum begins with, may be null. Returns bit 4 * row + column where an output is too
  // small to be trusted, or not finite.
  typedef uint32_t (*TransformOutput)(const Sum* products, const int64_t* planes, int64_t channels, const Sum* start, Sum* to,
                                      int64_t row_stride);

  // By a tile's height and width, from kFewest on.
  TransformInput transform_input[Winograd::kSizes][Winograd::kSizes];
  TransformOutput transform_output[Winograd::kSizes][Winograd::kSizes];
};

const WinogradKernel<float, float>* float_winograd_avx512();
const WinogradKernel<float, float>* float_winograd_avx2();
const WinogradKernel<float, float>* float_winograd_generic();
const WinogradKernel<bfloat16, float>* bfloat16_winograd_avx512();  // with its conversions of bfloat16
const WinogradKernel<bfloat16, float>* bfloat16_winograd_generic();

}  // namespace captum_dtd::cpu
