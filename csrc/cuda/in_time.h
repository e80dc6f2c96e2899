// Which times a layer of frozen clips reads and gives to (TimeTable, ../problems.h), as its CUDA kernels look them up.
//
// Forward, an output time reads a time of x by each tap. Pulled back, a time of the result gathers, by each tap, what some output
// times left: nothing, one of them, or several, which are added before they are multiplied. Such a sum is a *frame*.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../problems.h"
#include "../time_sums.h"
#include "device.h"

namespace captum_dtd::cuda {

// In a row for all examples, or in one for each.
struct TimeTables {
  int64_t rows = 0, taps = 0, outputs = 0, times = 0;  // of the result, which has as many as x where there is none
  int64_t times_of_x = 0;                              // as far as they are read
  int64_t frames = 0, most = 0;                        // most output times of one frame
  std::vector<int16_t> reads;                          // [row][output time][tap]: a time of x, or -1
  std::vector<int16_t> gathers;                        // [row][time][tap]: a frame, or -1
  std::vector<int16_t> stored;                         // [row][time]: the time of x that stands there
  std::vector<int16_t> members;                        // [row][frame][most]: output times, then -1; none if these are the frames

  bool used() const { return rows > 0; }
  // On the device.
  int64_t bytes() const {
    return static_cast<int64_t>((reads.size() + gathers.size() + stored.size() + members.size()) * sizeof(int16_t));
  }
};

namespace detail {

inline int16_t number(int64_t time) {
  if (time > INT16_MAX)
    throw std::invalid_argument(
        "a layer of frozen clips has more times, or examples to tell apart, than its CUDA kernels can count");
  return static_cast<int16_t>(time);
}

// Where several output times give to one time of the result by the same tap: the sums that ../time_sums.h makes of them.
// each(row, visit) calls visit(output time, place) for whatever a row gives, with its place in `gathers`.
template <typename Each>
void find_frames(TimeTables& tables, Each each) {
  std::vector<TimeSums> rows;
  tables.frames = 1;
  for (int64_t row = 0; row < tables.rows; ++row) {
    const int64_t first = row * tables.times * tables.taps;
    std::vector<Reach> reaches;
    each(row, [&](int64_t out, int64_t place) { reaches.push_back({place % tables.taps, out, (place - first) / tables.taps}); });
    rows.push_back(time_sums(reaches, tables.taps, tables.times));
    for (const TimeSum& sum : rows.back().sums)
      for (const TimeSum::Output& output : sum.outputs)
        std::transform(sum.frames.begin(), sum.frames.end(),
                       tables.gathers.begin() + first + output.time * tables.taps + sum.first_tap, number);
    tables.frames = std::max(tables.frames, rows.back().slab_frames());
  }
  tables.members.assign(static_cast<size_t>(tables.rows * tables.frames * tables.most), -1);
  for (int64_t row = 0; row < tables.rows; ++row)
    for (size_t frame = 0; frame < rows[row].frames.size(); ++frame) {
      const std::vector<int64_t>& outputs = rows[row].frames[frame];
      std::transform(outputs.begin(), outputs.end(), &tables.members[(row * tables.frames + frame) * tables.most], number);
    }
}

}  // namespace detail

// Of a convolution or a pooling. None without a table of what is read; `gives` may be absent.
template <typename Windows>
TimeTables time_tables(const Windows& windows, const TimeTable& reads, const TimeTable& gives) {
  TimeTables tables;
  if (reads.data == nullptr) return tables;
  tables.rows = reads.of_each_example || gives.of_each_example ? windows.n : 1;
  tables.taps = windows.kernel[0];
  tables.outputs = tables.frames = windows.out[0];
  tables.times = windows.in[0];
  const int64_t size = tables.outputs * tables.taps;
  for (int64_t row = 0; row < tables.rows; ++row)
    for (int64_t i = 0; i < size; ++i) {
      const int64_t time = reads.row(windows, row)[i];
      tables.reads.push_back(detail::number(time));
      tables.times_of_x = std::max(tables.times_of_x, time + 1);
    }
  if (gives.data == nullptr) return tables;

  tables.stored.assign(static_cast<size_t>(tables.rows * tables.times), 0);  // where nothing is given it does not matter
  tables.gathers.assign(static_cast<size_t>(tables.rows * tables.times * tables.taps), -1);
  const auto each = [&](int64_t row, auto visit) {
    for (int64_t i = 0; i < size; ++i)
      if (const int64_t read = reads.row(windows, row)[i], given = gives.row(windows, row)[i]; read >= 0 && given >= 0) {
        tables.stored[row * tables.times + given] = detail::number(read);
        visit(i / tables.taps, (row * tables.times + given) * tables.taps + i % tables.taps);
      }
  };
  std::vector<int64_t> counts(tables.gathers.size(), 0);
  for (int64_t row = 0; row < tables.rows; ++row)
    each(row, [&](int64_t out, int64_t place) {
      tables.gathers[place] = detail::number(out);
      tables.most = std::max(tables.most, ++counts[place]);
    });
  if (tables.most > 1) detail::find_frames(tables, each);
  return tables;
}

// How a pass goes through what a table says of its outputs, which are *slots*: those that read by the same taps follow each
// other, of whatever example and time; taps by which a slot reads nothing are left out. Where taps are `merged`, those by which a
// slot reads one frame become one, whose weights are added up: what equal frames have in common is multiplied once. Where weights
// are rounded coarsely they had better not be: errors that a clip and its frozen frames share would no longer cancel.
struct Pattern {
  static constexpr int64_t kMostTaps = 32;  // of filters whose taps are told apart; longer ones stay as they are

  std::vector<uint32_t> taps;  // a set of the filter's for each that is left
  int64_t slots = 0;
  int64_t first_slot = 0, first_frame = 0;
};

struct Slots {
  int64_t repeats = 1;  // of all slots: for every example, where these share a row
  int64_t taps = 0;     // of the filter, where they are not told apart
  std::vector<Pattern> patterns;
  std::vector<int16_t> examples, times;  // of each slot; of repeated ones the first example
  std::vector<int16_t> frames;           // [slot][tap that is left]: what is read, or -1

  int64_t taps_of(const Pattern& pattern) const { return taps > 0 ? taps : static_cast<int64_t>(pattern.taps.size()); }
  int64_t bytes() const { return static_cast<int64_t>((examples.size() + times.size() + frames.size()) * sizeof(int16_t)); }
};

// Of a table [row][time][tap], for so many examples; the deepest first, so that no block is left alone with them in the end.
inline Slots slots_of(const std::vector<int16_t>& table, int64_t rows, int64_t times, int64_t taps, int64_t examples,
                      bool merged) {
  Slots found;
  if (rows == 1) found.repeats = examples;
  if (taps > Pattern::kMostTaps) found.taps = taps;
  struct Slot {
    int64_t row, time;
    std::vector<int16_t> frames;
  };
  std::vector<std::pair<Pattern, std::vector<Slot>>> groups;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t time = 0; time < times; ++time) {
      const int16_t* const read = table.data() + (row * times + time) * taps;
      Slot slot{row, time, {}};
      std::vector<uint32_t> sets;
      if (found.taps > 0) {
        slot.frames.assign(read, read + taps);
      } else {
        for (int64_t tap = 0; tap < taps; ++tap) {
          if (read[tap] < 0) continue;
          const auto known = merged ? std::find(slot.frames.begin(), slot.frames.end(), read[tap]) : slot.frames.end();
          const size_t at = known - slot.frames.begin();
          if (at == slot.frames.size()) {
            slot.frames.push_back(read[tap]);
            sets.push_back(0);
          }
          sets[at] |= uint32_t(1) << tap;
        }
      }
      const auto same = [&](const auto& group) { return group.first.taps == sets; };
      auto group = std::find_if(groups.begin(), groups.end(), same);
      if (group == groups.end()) group = groups.insert(groups.end(), {Pattern{sets}, {}});
      group->second.push_back(std::move(slot));
    }
  std::stable_sort(groups.begin(), groups.end(),
                   [](const auto& a, const auto& b) { return a.first.taps.size() > b.first.taps.size(); });
  for (auto& [pattern, slots] : groups) {
    pattern.slots = static_cast<int64_t>(slots.size());
    pattern.first_slot = static_cast<int64_t>(found.times.size());
    pattern.first_frame = static_cast<int64_t>(found.frames.size());
    for (const Slot& slot : slots) {
      found.examples.push_back(detail::number(slot.row));
      found.times.push_back(detail::number(slot.time));
      found.frames.insert(found.frames.end(), slot.frames.begin(), slot.frames.end());
    }
    found.patterns.push_back(pattern);
  }
  return found;
}

// A table on the device; `of_example` is how far apart the rows of examples are, 0 where they share one.
struct DeviceTable {
  const int16_t* data = nullptr;
  int64_t of_example = 0;

  __device__ __forceinline__ const int16_t* row(int example) const { return data + example * of_example; }
};

struct DeviceTables {
  DeviceTable reads, gathers, stored, members;
  int most = 0;
};

// Numbers go to the device as parameters of a launch: nothing of the host's is read later, as a captured copy would do.
struct Numbers {
  static constexpr int kMost = 1984;  // parameters take 4 KiB
  int16_t values[kMost];
  int count;
  int16_t* to;
};

static __global__ void __launch_bounds__(256, 1) write_numbers(const __grid_constant__ Numbers numbers) {
  for (int i = threadIdx.x; i < numbers.count; i += blockDim.x) numbers.to[i] = numbers.values[i];
}

// Tables that go to the device together.
class TableWriter {
 public:
  explicit TableWriter(void* memory) : to_(static_cast<int16_t*>(memory)) {}

  // Where these numbers will be; null where there are none.
  const int16_t* add(const std::vector<int16_t>& numbers) {
    const int16_t* const place = numbers.empty() ? nullptr : to_ + numbers_.size();
    numbers_.insert(numbers_.end(), numbers.begin(), numbers.end());
    return place;
  }

  DeviceTable add(const std::vector<int16_t>& numbers, int64_t rows) {
    return {add(numbers), rows > 1 ? static_cast<int64_t>(numbers.size()) / rows : 0};
  }

  void write(void* stream) const {
    const int64_t count = static_cast<int64_t>(numbers_.size());
    for (int64_t first = 0; first < count; first += Numbers::kMost) {
      Numbers some{};
      some.count = static_cast<int>(std::min<int64_t>(Numbers::kMost, count - first));
      some.to = to_ + first;
      std::copy_n(numbers_.begin() + first, some.count, some.values);
      launch("write_numbers", write_numbers, dim3(1), dim3(256), 0, stream, some);
    }
  }

 private:
  int16_t* to_;
  std::vector<int16_t> numbers_;
};

// Brings tables to `bytes()` of memory on the device.
inline DeviceTables write_tables(const TimeTables& tables, void* memory, void* stream) {
  TableWriter writer(memory);
  const DeviceTable reads = writer.add(tables.reads, tables.rows), gathers = writer.add(tables.gathers, tables.rows);
  const DeviceTable stored = writer.add(tables.stored, tables.rows), members = writer.add(tables.members, tables.rows);
  writer.write(stream);
  return {reads, gathers, stored, members, static_cast<int>(tables.most)};
}

struct DeviceSlots {
  const int16_t *examples = nullptr, *times = nullptr, *frames = nullptr;
};

inline DeviceSlots add_slots(const Slots& slots, TableWriter& writer) {
  const int16_t *const examples = writer.add(slots.examples), *const times = writer.add(slots.times);
  return {examples, times, writer.add(slots.frames)};
}

}  // namespace captum_dtd::cuda
