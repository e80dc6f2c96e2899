// Winograd's transforms on the compiler's portable vectors; included by each kernel_<isa>.cpp after vector_kernel.h.
#pragma once

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vector_kernel.h"
#include "winograd_kernel.h"

namespace captum_dtd::cpu {
namespace {

// Bits of floats without their sign are in the order of their values, and those of a NaN come last.
typedef typename VectorOf<int32_t, kLanes<float>>::Register Bits;

// As what is multiplied.
inline void store_operand(const Register<float>& vector, float* to) { store_vector(vector, to); }
inline void store_operand(const Register<float>& vector, bfloat16* to) {  // to nearest, ties to even; a NaN stays one
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(vector);
  std::memcpy(to, &rounded, sizeof(rounded));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) narrow(vector[lane], to[lane]);
#endif
}

inline Bits magnitude_of(const Register<float>& value) { return bits_as<Bits>(value) & 0x7fffffff; }

// G g: values of the filter at the points, over the product of each one's distances to the others. In double, since what is
// rounded here is the same at every position.
template <typename Wide>
inline void filter_transform(const Wide (&g)[Winograd::kTaps], Wide (&u)[Winograd::kPatch]) {
  constexpr double near = Winograd::kNear, far = Winograd::kFar, near2 = near * near, far2 = far * far;
  const Wide near_even = (g[0] + near2 * g[2]) * (0.5 / (near2 * (near2 - far2)));
  const Wide near_odd = g[1] * (0.5 / (near * (near2 - far2)));
  const Wide far_even = (g[0] + far2 * g[2]) * (0.5 / (far2 * (far2 - near2)));
  const Wide far_odd = g[1] * (0.5 / (far * (far2 - near2)));
  u[0] = g[0] * (1 / (near2 * far2));
  u[1] = near_even + near_odd;
  u[2] = near_even - near_odd;
  u[3] = far_even + far_odd;
  u[4] = far_even - far_odd;
  u[5] = g[2];
}

void transform_filter(const float* taps, int64_t tap_stride, int64_t channels, float* to, int64_t plane_stride, float* smallest,
                      float* largest) {
  constexpr int kSize = Winograd::kPatch, kTaps = Winograd::kTaps, kStep = kLanes<double>;
  typedef typename VectorOf<double, kStep>::Register Wide;
  typedef typename VectorOf<float, kStep>::Register Narrow;
  for (int64_t channel = 0; channel < channels; channel += kStep) {
    Wide columns[kTaps][kSize];
    Narrow least, most, sum{};
    std::memcpy(&least, smallest + channel, sizeof(least));
    std::memcpy(&most, largest + channel, sizeof(most));
#pragma GCC unroll 3
    for (int column = 0; column < kTaps; ++column) {
      Wide g[kTaps];
#pragma GCC unroll 3
      for (int row = 0; row < kTaps; ++row) {
        Narrow tap;
        std::memcpy(&tap, taps + (row * kTaps + column) * tap_stride + channel, sizeof(tap));
        least = tap < least ? tap : least;
        most = tap > most ? tap : most;
        sum += tap < 0 ? -tap : tap;
        g[row] = __builtin_convertvector(tap, Wide);
      }
      filter_transform(g, columns[column]);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kSize; ++row) {
      const Wide g[kTaps] = {columns[0][row], columns[1][row], columns[2][row]};
      Wide u[kSize];
      filter_transform(g, u);
#pragma GCC unroll 6
      for (int column = 0; column < kSize; ++column) {
        const Narrow rounded = __builtin_convertvector(u[column], Narrow);
        std::memcpy(to + (row * kSize + column) * plane_stride + channel, &rounded, sizeof(rounded));
      }
    }
    std::memcpy(to + kSize * kSize * plane_stride + channel, &sum, sizeof(sum));
    std::memcpy(smallest + channel, &least, sizeof(least));
    std::memcpy(largest + channel, &most, sizeof(most));
  }
}

// B' d: polynomials whose roots are all points but one, at the inputs; where points are left out, times what the filter's numbers
// lack, the distances to these.
template <int kOutputs>
inline void input_transform(const Register<float>* d, Register<float>* v) {
  constexpr float near = Winograd::kNear, far = Winograd::kFar, near2 = near * near, far2 = far * far;
  const Register<float> even = d[2] - near2 * d[0], odd = d[3] - near2 * d[1];
  if constexpr (kOutputs == 2) {
    v[0] = -far2 * even;
    v[1] = (near2 - far2) * (d[2] + near * d[1]);
    v[2] = (near2 - far2) * (d[2] - near * d[1]);
    v[5] = odd;
  } else if constexpr (kOutputs == 3) {
    const Register<float> near_even = d[3] - far * d[2], near_odd = near * (d[2] - far * d[1]);
    v[0] = far * (odd - far * even);
    v[1] = (far + near) * (near_even + near_odd);
    v[2] = (far - near) * (near_even - near_odd);
    v[3] = 2 * far * odd;
    v[5] = (d[4] - near2 * d[2]) - far * odd;
  } else {
    const Register<float> near_even = d[4] - far2 * d[2], near_odd = near * (d[3] - far2 * d[1]);
    const Register<float> far_even = d[4] - near2 * d[2], far_odd = far * odd;
    v[0] = near2 * far2 * d[0] + (d[4] - (near2 + far2) * d[2]);
    v[1] = near_even + near_odd;
    v[2] = near_even - near_odd;
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = near2 * far2 * d[1] + (d[5] - (near2 + far2) * d[3]);
  }
}

// A' m: the values at the outputs of what has the values m at the points.
template <int kOutputs>
inline void output_transform(const Register<float>* m, Register<float>* y) {
  constexpr float near = Winograd::kNear, far = Winograd::kFar, near2 = near * near, far2 = far * far;
  const Register<float> near_sum = m[1] + m[2], near_rest = m[1] - m[2];
  if constexpr (kOutputs == 2) {
    y[0] = m[0] + near_sum;
    y[1] = near * near_rest + m[5];
  } else if constexpr (kOutputs == 3) {
    y[0] = m[0] + (near_sum + m[3]);
    y[1] = near * near_rest + far * m[3];
    y[2] = near2 * near_sum + far2 * m[3] + m[5];
  } else {
    const Register<float> far_sum = m[3] + m[4], far_rest = m[3] - m[4];
    y[0] = m[0] + (near_sum + far_sum);
    y[1] = near * near_rest + far * far_rest;
    y[2] = near2 * near_sum + far2 * far_sum;
    y[3] = near2 * near * near_rest + far2 * far * far_rest + m[5];
  }
}

template <typename Operand, int kHeight, int kWidth>
void transform_input(const float* patch, int64_t row_stride, int64_t column_stride, int64_t channels, Operand* to,
                     const int64_t* planes) {
  constexpr int kSize = Winograd::kPatch, kRows = kHeight + Winograd::kTaps - 1, kColumns = kWidth + Winograd::kTaps - 1;
  for (int64_t channel = 0; channel < channels; channel += kLanes<float>) {
    Register<float> rows[kRows][kSize];
    Bits largest{};
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      Register<float> d[kColumns];
#pragma GCC unroll 6
      for (int column = 0; column < kColumns; ++column) {
        d[column] = load_vector(patch + row * row_stride + column * column_stride + channel);
        const Bits magnitude = magnitude_of(d[column]);
        largest = magnitude > largest ? magnitude : largest;
      }
      input_transform<kWidth>(d, rows[row]);
    }
#pragma GCC unroll 6
    for (int column = 0; column < kSize; ++column) {
      if (!Winograd::takes(column, kWidth)) continue;
      Register<float> d[kRows], v[kSize];
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) d[row] = rows[row][column];
      input_transform<kHeight>(d, v);
#pragma GCC unroll 6
      for (int row = 0; row < kSize; ++row)
        if (Winograd::takes(row, kHeight)) store_operand(v[row], to + planes[row * kSize + column] + channel);
    }
    store_operand(bits_as<Register<float>>(largest), to + planes[kSize * kSize] + channel);
  }
}

// Whether a lane has a bit set.
inline bool any(const Bits& bits) {
  int32_t lanes[kLanes<float>], all = 0;
  std::memcpy(lanes, &bits, sizeof(lanes));
  for (int32_t lane : lanes) all |= lane;
  return all != 0;
}

template <int kHeight, int kWidth>
uint32_t transform_output(const float* products, const int64_t* planes, int64_t channels, const float* start, float* to,
                          int64_t row_stride) {
  constexpr int kSize = Winograd::kPatch;
  uint32_t found = 0;
  for (int64_t channel = 0; channel < channels; channel += kLanes<float>) {
    Register<float> rows[kSize][kWidth];
#pragma GCC unroll 6
    for (int row = 0; row < kSize; ++row) {
      if (!Winograd::takes(row, kHeight)) continue;
      Register<float> m[kSize];
#pragma GCC unroll 6
      for (int column = 0; column < kSize; ++column)
        if (Winograd::takes(column, kWidth)) m[column] = load_vector(products + planes[row * kSize + column] + channel);
      output_transform<kWidth>(m, rows[row]);
    }

    const Register<float> bound = load_vector(products + planes[kSize * kSize] + channel);
    const Bits least = magnitude_of(bound * static_cast<float>(Winograd::kTooSmall));
    const Register<float> first = start != nullptr ? load_vector(start + channel) : Register<float>{};
    Register<float> y[kWidth][kHeight];
    Bits wrong{};
#pragma GCC unroll 4
    for (int column = 0; column < kWidth; ++column) {
      Register<float> m[kSize];
#pragma GCC unroll 6
      for (int row = 0; row < kSize; ++row)
        if (Winograd::takes(row, kHeight)) m[row] = rows[row][column];
      output_transform<kHeight>(m, y[column]);
#pragma GCC unroll 4
      for (int row = 0; row < kHeight; ++row) {
        const Bits magnitude = magnitude_of(y[column][row]);
        wrong |= (magnitude < least) | (magnitude >= 0x7f800000);
        store_vector(y[column][row] + first, to + row * row_stride + column * channels + channel);
      }
    }
    if (!any(wrong)) continue;
    for (int column = 0; column < kWidth; ++column)
      for (int row = 0; row < kHeight; ++row) {
        const Bits magnitude = magnitude_of(y[column][row]);
        if (any((magnitude < least) | (magnitude >= 0x7f800000))) found |= 1u << (Winograd::kTile * row + column);
      }
  }
  return found;
}

template <typename Operand>
constexpr WinogradKernel<Operand, float> kWinograd{
    kLanes<float>,
    transform_filter,
    {{transform_input<Operand, 2, 2>, transform_input<Operand, 2, 3>, transform_input<Operand, 2, 4>},
     {transform_input<Operand, 3, 2>, transform_input<Operand, 3, 3>, transform_input<Operand, 3, 4>},
     {transform_input<Operand, 4, 2>, transform_input<Operand, 4, 3>, transform_input<Operand, 4, 4>}},
    {{transform_output<2, 2>, transform_output<2, 3>, transform_output<2, 4>},
     {transform_output<3, 2>, transform_output<3, 3>, transform_output<3, 4>},
     {transform_output<4, 2>, transform_output<4, 3>, transform_output<4, 4>}}};

}  // namespace
}  // namespace captum_dtd::cpu
