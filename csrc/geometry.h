// Geometry of a 3D convolution and of its adjoint, free of torch and of any device.
//
// Both passes of a relevance rule are one loop: over a grid of output positions, sum over taps and channels. The forward
// convolution is one such `Sweep`. Its adjoint is one sweep for each residue of the input position modulo the stride
// (a phase): within a phase every position is reached by the same taps, so it is again an ordinary convolution with unit
// stride, written to a strided part of the output. Phases cover every input position exactly once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace captum_dtd {

struct TimeSums;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// A grouped 3D convolution; triples are in the order T, H, W. Padding is what lies before the input: what lies behind it
// follows from the output's size, so asymmetric padding needs no further number.
struct Conv3d {
  int64_t n;
  int64_t c_in, c_out;  // over all groups
  int64_t groups;
  int64_t in[3], out[3];
  int64_t kernel[3], stride[3], padding[3], dilation[3];
};

// For every n and every q in grid, over taps j < taps and channels c:
//
//   acc[q, k] = sum of  w[first_tap + j * tap_skip][c][k] * in[n, q * stride + base + j * step, c]
//   out[n, out_base + q * out_step, k] = epilogue(acc[q, k])
//
// A position outside the input contributes nothing. A sweep without taps writes epilogue(0). Along T, `in_time` says what is
// summed in place of stride, base and step.
struct Sweep {
  int64_t n;
  int64_t groups;
  int64_t c_in, c_out;  // of one group
  int64_t in[3];        // size of what is read
  int64_t grid[3];
  int64_t stride[3], base[3], step[3], taps[3];
  int64_t out[3];  // size of what is written into
  int64_t out_base[3], out_step[3];
  int64_t first_tap[3], tap_skip[3];  // which taps of the filter are used
  int64_t filter[3];                  // size of the whole filter
  const TimeSums* in_time = nullptr;  // outlives the sweep; where it is there, all taps of T are used, in their order
};

// Narrows taps of an axis from `begin` to `end` to those that reach into the input at a position of the grid.
inline void keep_reaching(const Sweep& sweep, int a, int64_t position, int64_t& begin, int64_t& end) {
  const auto outside = [&](int64_t tap) {
    const int64_t at = position * sweep.stride[a] + sweep.base[a] + tap * sweep.step[a];
    return at < 0 || at >= sweep.in[a];
  };
  while (begin < end && outside(begin)) ++begin;
  while (begin < end && outside(end - 1)) --end;
}

inline Sweep forward_sweep(const Conv3d& conv) {
  Sweep s{};
  s.n = conv.n;
  s.groups = conv.groups;
  s.c_in = conv.c_in / conv.groups;
  s.c_out = conv.c_out / conv.groups;
  for (int a = 0; a < 3; ++a) {
    s.in[a] = conv.in[a];
    s.grid[a] = s.out[a] = conv.out[a];
    s.stride[a] = conv.stride[a];
    s.base[a] = -conv.padding[a];
    s.step[a] = conv.dilation[a];
    s.taps[a] = s.filter[a] = conv.kernel[a];
    s.out_base[a] = s.first_tap[a] = 0;
    s.out_step[a] = s.tap_skip[a] = 1;
  }
  return s;
}

namespace detail {

inline int64_t gcd(int64_t a, int64_t b) {
  while (b != 0) {
    int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// One axis of one phase: input positions i = residue + stride * q. Tap k reaches i where i + padding - k * dilation is a
// multiple of the stride, and then reads the output at that multiple.
inline void set_phase(Sweep& s, const Conv3d& conv, int a, int64_t residue) {
  const int64_t stride = conv.stride[a], dilation = conv.dilation[a];
  s.in[a] = conv.out[a];
  s.out[a] = conv.in[a];
  s.grid[a] = conv.in[a] > residue ? (conv.in[a] - residue + stride - 1) / stride : 0;
  s.out_base[a] = residue;
  s.out_step[a] = stride;
  s.stride[a] = 1;
  s.filter[a] = conv.kernel[a];
  const int64_t period = stride / gcd(stride, dilation);  // taps that reach the same residue are this far apart
  s.first_tap[a] = 0;
  s.tap_skip[a] = period;
  s.taps[a] = 0;
  s.base[a] = 0;
  s.step[a] = -(period * dilation / stride);
  for (int64_t k = 0; k < conv.kernel[a] && k < period; ++k) {
    const int64_t reach = residue + conv.padding[a] - k * dilation;
    if (((reach % stride) + stride) % stride != 0) continue;
    s.first_tap[a] = k;
    s.taps[a] = (conv.kernel[a] - k + period - 1) / period;
    s.base[a] = reach / stride;  // exact, also where negative
    break;
  }
}

}  // namespace detail

// The phases of the adjoint: what they read has the convolution's output channels, what they write its input channels.
// Taps of an axis without taps are zero; the sweep then has no taps at all and writes epilogue(0).
inline std::vector<Sweep> adjoint_sweeps(const Conv3d& conv) {
  std::vector<Sweep> sweeps;
  for (int64_t t = 0; t < std::min(conv.stride[0], conv.in[0]); ++t)
    for (int64_t h = 0; h < std::min(conv.stride[1], conv.in[1]); ++h)
      for (int64_t w = 0; w < std::min(conv.stride[2], conv.in[2]); ++w) {
        Sweep s{};
        s.n = conv.n;
        s.groups = conv.groups;
        s.c_in = conv.c_out / conv.groups;
        s.c_out = conv.c_in / conv.groups;
        const int64_t residue[3] = {t, h, w};
        for (int a = 0; a < 3; ++a) detail::set_phase(s, conv, a, residue[a]);
        sweeps.push_back(s);
      }
  return sweeps;
}

}  // namespace captum_dtd
