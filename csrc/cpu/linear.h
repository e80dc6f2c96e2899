// A 1x1x1 convolution of few positions: a linear layer with a small batch.
//
// Its weights are far more than its numbers, so their way from memory is all that counts: they are read once, in their order. A
// row of the filter gives an output its denominator, and while it is still in the cache, takes the output's share back. This is
// done in the accumulator's own arithmetic, which costs nothing here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "conv3d.h"
#include "loops.h"
#include "parallel.h"
#include "slab.h"

namespace captum_dtd::cpu {

constexpr int64_t kFewPositions = 8;  // more take longer than the weights do

inline bool is_linear(const Conv3d& conv) {
  int64_t positions = conv.n;
  for (int a = 0; a < 3; ++a) {
    if (conv.kernel[a] != 1 || conv.stride[a] != 1 || conv.padding[a] != 0 || conv.out[a] != conv.in[a]) return false;
    positions *= conv.in[a];
  }
  return positions <= kFewPositions;
}

// As rows of inputs, one for each output channel; `holder` keeps them, where they are not the caller's own.
struct LinearWeights {
  const char* data;
  Element element;
  std::shared_ptr<const Buffer> holder;
};

template <typename Sum>
class LinearLayer {
 public:
  LinearLayer(const Conv3d& conv, Element element, const LinearWeights& weights, const Sum* bias, const Loops<Sum>& loops,
              ParallelFor parallel_for)
      : conv_(conv),
        element_(element),
        weights_(weights),
        bias_(bias),
        loops_(loops),
        parallel_for_(parallel_for),
        positions_(conv.n * conv.in[0] * conv.in[1] * conv.in[2]),
        c_in_(conv.c_in / conv.groups),
        c_out_(conv.c_out / conv.groups) {}

  void forward(const View& x, const View& out, bool relu) const {
    const std::vector<Sum> u = gather({x, element_, Lift::None, {}, {}}, 0);
    each_stretch([&](int64_t group, int64_t first, int64_t rows, int64_t) {
      Sum z[kFewPositions * kRows];
      for (int64_t row = first; row < first + rows; row += kRows) {
        const int64_t count = std::min(kRows, first + rows - row), channel = group * c_out_ + row;
        for (int64_t p = 0; p < positions_; ++p) std::copy_n(bias_ + channel, count, z + p * kRows);
        loops_.dot(weights_.element, weights(channel), count, c_in_, Sign::Both, positions_, &u[input(0, group)], conv_.c_in, z,
                   kRows);
        for (int64_t p = 0; p < positions_; ++p) {
          if (relu) loops_.lift(Lift::Signed, 0, 1, count, z + p * kRows, nullptr, z + p * kRows, count);
          store(loops_, z + p * kRows, count, out, element_, spot(p, channel, count), false);
        }
      }
    });
  }

  void relevance(const Source& x, const View& relevance, Sum stabilizer, bool divided, const View& out) const {
    const int parts = captum_dtd::parts(x.lift);
    std::vector<std::vector<Sum>> u, pulled;
    for (int part = 0; part < parts; ++part) {
      u.push_back(gather(x, part));
      pulled.emplace_back(static_cast<size_t>(kStretches * positions_ * conv_.c_in), Sum(0));
    }
    each_stretch([&](int64_t group, int64_t first, int64_t rows, int64_t stretch) {
      Sum z[kFewPositions * kRows], s[kFewPositions * kRows];
      for (int64_t row = first; row < first + rows; row += kRows) {
        const int64_t count = std::min(kRows, first + rows - row), channel = group * c_out_ + row;
        for (int64_t p = 0; p < positions_; ++p) {
          load(loops_, relevance, element_of<Sum>(), spot(p, channel, count), s + p * kRows, count);
          std::copy_n(bias_ + channel, count, z + p * kRows);
        }
        if (!divided) {
          for (int part = 0; part < parts; ++part)
            loops_.dot(weights_.element, weights(channel), count, c_in_, sign(part), positions_, &u[part][input(0, group)],
                       conv_.c_in, z, kRows);
          loops_.divide(positions_, count, z, kRows, stabilizer, s, kRows, s, kRows, false);
        }
        for (int part = 0; part < parts; ++part)
          loops_.spread(weights_.element, weights(channel), count, c_in_, sign(part), positions_, s, kRows,
                        &pulled[part][stretch * positions_ * conv_.c_in + input(0, group)], conv_.c_in);
      }
    });
    parallel(parallel_for_, positions_, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) give(u, pulled, p, out);
    });
  }

 private:
  static constexpr int64_t kStretches = 16;  // of a group's rows: what is worked on at once, each with sums of its own
  static constexpr int64_t kRows = 4;        // in the cache between their two uses

  static Sign sign(int part) { return part == 0 ? Sign::Positive : Sign::Negative; }

  const void* weights(int64_t channel) const { return weights_.data + channel * c_in_ * element_bytes(weights_.element); }

  int64_t input(int64_t p, int64_t group) const { return p * conv_.c_in + group * c_in_; }

  Spot spot(int64_t p, int64_t channel, int64_t channels) const {
    const int64_t w = p % conv_.in[2], h = p / conv_.in[2] % conv_.in[1], t = p / (conv_.in[2] * conv_.in[1]) % conv_.in[0];
    return {p / (conv_.in[2] * conv_.in[1] * conv_.in[0]), channel, t, h, w, 1, channels, 1, false};
  }

  // A part of the lifted input as (positions, channels).
  std::vector<Sum> gather(const Source& x, int part) const {
    std::vector<Sum> u(static_cast<size_t>(positions_ * conv_.c_in)), bound(static_cast<size_t>(conv_.c_in));
    for (int64_t p = 0; p < positions_; ++p)
      load_lifted(loops_, x, part, spot(p, 0, conv_.c_in), &u[p * conv_.c_in], bound.data(), conv_.c_in);
    return u;
  }

  // Calls body(group, first row, rows, index of the stretch) for all rows of the filter.
  template <typename Body>
  void each_stretch(Body body) const {
    parallel(parallel_for_, conv_.groups * kStretches, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t stretch = i % kStretches;
        const int64_t first = c_out_ * stretch / kStretches, last = c_out_ * (stretch + 1) / kStretches;
        if (first < last) body(i / kStretches, first, last - first, stretch);
      }
    });
  }

  // R_in of a position, the stretches added in their order.
  void give(const std::vector<std::vector<Sum>>& u, const std::vector<std::vector<Sum>>& pulled, int64_t p,
            const View& out) const {
    std::vector<Sum> shared(static_cast<size_t>(conv_.c_in)), sum(shared.size());
    for (size_t part = 0; part < u.size(); ++part) {
      std::fill(sum.begin(), sum.end(), Sum(0));
      for (int64_t stretch = 0; stretch < kStretches; ++stretch) {
        const Sum* some = &pulled[part][(stretch * positions_ + p) * conv_.c_in];
        for (int64_t c = 0; c < conv_.c_in; ++c) sum[c] += some[c];
      }
      loops_.multiply(1, conv_.c_in, sum.data(), 0, &u[part][p * conv_.c_in], 0, part > 0, shared.data(), 0, false);
    }
    store(loops_, shared.data(), conv_.c_in, out, element_of<Sum>(), spot(p, 0, conv_.c_in), false);
  }

  const Conv3d& conv_;
  Element element_;
  LinearWeights weights_;
  const Sum* bias_;
  const Loops<Sum>& loops_;
  ParallelFor parallel_for_;
  int64_t positions_, c_in_, c_out_;
};

}  // namespace captum_dtd::cpu
