// Sums along T by a table, for layers of frozen clips: equal times are kept once, so what an output time reads does not follow
// from a stride. A table has for each output time and tap the input time that is read, -1 for none.
//
// Products that several output times share are taken once. Forward, several outputs read one input by the same tap; in the
// adjoint one output gathers several inputs by the same tap, which are added before they are multiplied. Both are one thing:
//
//   out[q] = sum over the TimeSums that q is an output of:  sum over their taps j of  w[first_tap + j] * frame[frames[j]]
//   frame[f] = sum over times t of frames[f] of  in[t]
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace captum_dtd {

struct TimeSum {
  int64_t first_tap;
  std::vector<int64_t> frames;  // of each tap from the first on
  struct Output {
    int64_t time;
    bool begins;  // whether nothing has been added to it before
  };
  std::vector<Output> outputs;
};

struct TimeSums {
  std::vector<std::vector<int64_t>> frames;
  std::vector<TimeSum> sums;  // every output time is in one at least, perhaps one without taps

  std::vector<int64_t> times_of(int64_t frame) const { return frames.empty() ? std::vector<int64_t>{} : frames[frame]; }
  int64_t slab_frames() const { return std::max<int64_t>(static_cast<int64_t>(frames.size()), 1); }  // one even if none is read
};

// Which input time reaches which output time by which tap; any of the three may be read by any other.
struct Reach {
  int64_t tap, in, out;
};

inline TimeSums time_sums(const std::vector<Reach>& reaches, int64_t taps, int64_t outputs) {
  TimeSums found;
  std::vector<std::vector<int64_t>> members;  // the output times of each sum

  const auto frame_of = [&](const std::vector<int64_t>& times) {
    const auto at = std::find(found.frames.begin(), found.frames.end(), times);
    if (at == found.frames.end()) found.frames.push_back(times);
    return static_cast<int64_t>(std::find(found.frames.begin(), found.frames.end(), times) - found.frames.begin());
  };
  const auto add = [&](int64_t tap, const std::vector<int64_t>& times, const std::vector<int64_t>& to) {
    const int64_t frame = frame_of(times);
    for (size_t i = 0; i < found.sums.size(); ++i) {
      TimeSum& sum = found.sums[i];
      if (members[i] != to || sum.first_tap + static_cast<int64_t>(sum.frames.size()) != tap) continue;
      sum.frames.push_back(frame);
      return;
    }
    found.sums.push_back({tap, {frame}, {}});
    members.push_back(to);
  };

  std::vector<bool> is_reached(static_cast<size_t>(outputs), false);
  for (int64_t tap = 0; tap < taps; ++tap) {
    std::vector<std::vector<int64_t>> read(static_cast<size_t>(outputs));
    for (const Reach& reach : reaches)
      if (reach.tap == tap) read[reach.out].push_back(reach.in);
    std::vector<bool> is_done(static_cast<size_t>(outputs), false);
    for (int64_t out = 0; out < outputs; ++out) {
      if (read[out].empty() || is_done[out]) continue;
      std::vector<int64_t> together;
      for (int64_t other = out; other < outputs; ++other)
        if (read[other] == read[out]) {
          together.push_back(other);
          is_done[other] = is_reached[other] = true;
        }
      add(tap, read[out], together);
    }
  }
  for (int64_t out = 0; out < outputs; ++out)
    if (!is_reached[out]) {
      found.sums.push_back({0, {}, {}});
      members.push_back({out});
    }

  std::vector<bool> has_begun(static_cast<size_t>(outputs), false);
  for (size_t i = 0; i < found.sums.size(); ++i)
    for (const int64_t out : members[i]) {
      found.sums[i].outputs.push_back({out, !has_begun[out]});
      has_begun[out] = true;
    }
  return found;
}

}  // namespace captum_dtd
