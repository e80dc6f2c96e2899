#include "weights.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "huge_pages.h"
#include "parallel.h"

namespace captum_dtd::cpu {
namespace {

// ------------------------------------------------------------------------------------------------------ hash

constexpr int64_t kPiece = 1 << 20;  // bytes hashed as one

struct Held {
  int64_t holders = 0;
  std::optional<Hash> hash;  // once it was asked for
};

thread_local std::map<std::pair<const void*, int64_t>, Held> held;

template <typename Sum>
Hash digest(const Loops<Sum>& loops, const void* data, int64_t bytes) {
  uint64_t found[2];
  loops.digest(data, bytes, found);
  return {found[0], found[1]};
}

template <typename Sum>
Hash hash_now(const Loops<Sum>& loops, const void* data, int64_t bytes, ParallelFor parallel_for) {
  const auto* from = static_cast<const unsigned char*>(data);
  std::vector<Hash> pieces(static_cast<size_t>((bytes + kPiece - 1) / kPiece));
  parallel(parallel_for, static_cast<int64_t>(pieces.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pieces[static_cast<size_t>(i)] = digest(loops, from + i * kPiece, std::min(kPiece, bytes - i * kPiece));
  });
  return digest(loops, pieces.data(), static_cast<int64_t>(pieces.size() * sizeof(Hash)));
}

// Which weights were met before, where they lie now: those are worth moving to huge pages, which takes longer than a few calls
// gain. Between two explanations their small ones are forgotten: hashing 300 MB again took 230 ms on a virtual machine, and 21
// on huge pages.
class Familiar {
 public:
  void meet(const void* data, int64_t bytes, const Hash& hash) {
    if (static_cast<size_t>(bytes) < 2 * kHugePage) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (times_.size() >= kMost) times_.clear();
      if (++times_[{data, bytes, hash.low}] != 2) return;
    }
    move_to_huge_pages(data, static_cast<size_t>(bytes));
  }

 private:
  static constexpr size_t kMost = 1 << 12;

  std::mutex mutex_;
  std::map<std::tuple<const void*, int64_t, uint64_t>, int64_t> times_;
};

Familiar& familiar() {
  static Familiar weights;
  return weights;
}

// ----------------------------------------------------------------------------------------------------- cache

class Cache {
 public:
  std::shared_ptr<const Buffer> find(const Description& how) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(how);
    if (found == entries_.end()) return nullptr;
    recent_.splice(recent_.begin(), recent_, found->second);
    return found->second->buffer;
  }

  // Whether there is room for a buffer, if others go.
  bool takes(const Buffer& buffer) const { return buffer.bytes() <= limit_; }

  void insert(const Description& how, const std::shared_ptr<const Buffer>& buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!takes(*buffer) || entries_.count(how) != 0) return;
    recent_.push_front({how, buffer});
    entries_[how] = recent_.begin();
    bytes_ += buffer->bytes();
    while (bytes_ > limit_) {
      bytes_ -= recent_.back().buffer->bytes();
      entries_.erase(recent_.back().how);
      recent_.pop_back();
    }
  }

 private:
  struct Entry {
    Description how;
    std::shared_ptr<const Buffer> buffer;
  };

  static size_t limit() {
    const char* given = std::getenv("CAPTUM_DTD_WEIGHT_CACHE_MB");
    if (given == nullptr || *given == '\0') return size_t{2048} << 20;
    char* end = nullptr;
    const unsigned long long megabytes = std::strtoull(given, &end, 10);
    if (end == given || *end != '\0' || *given == '-' || megabytes >= (1ull << 40))
      throw std::invalid_argument(std::string("CAPTUM_DTD_WEIGHT_CACHE_MB must be a number of megabytes, got '") + given + "'");
    return static_cast<size_t>(megabytes) << 20;
  }

  std::mutex mutex_;
  std::list<Entry> recent_;  // the most recently used first
  std::map<Description, std::list<Entry>::iterator> entries_;
  size_t bytes_ = 0;
  const size_t limit_ = limit();
};

Cache& cache() {
  static Cache kept;
  return kept;
}

// ----------------------------------------------------------------------------------------------------- packing

constexpr int64_t kInItsOrder = -1;  // where other descriptions have how many channels are packed together

Description description(const Filter& filter, const Use& use, const Plan& plan) {
  Description how{plan.tiling.channels, plan.tiling.pair, plan.tiling.operand_bytes, static_cast<int64_t>(plan.tiling.lanes),
                  plan.output_parts,    plan.together,    plan.block_channels,       plan.chunk,
                  plan.chunks};
  describe(filter, use, plan.sweep, how);
  how.insert(how.end(), plan.taps, plan.taps + 3);
  for (const Run& run : plan.runs)
    how.insert(how.end(), {run.part, static_cast<int64_t>(run.product.weight), run.tap_w, run.channel, run.channels, run.depth});
  return how;
}

// Packs the weights of one block of channels at a time: a run's channels by the block's lanes, tap by tap.
template <typename Operand, typename Sum>
class Packer {
 public:
  Packer(const Filter& filter, const Use& use, const Plan& plan, const Loops<Sum>& loops, Operand* to)
      : filter_(filter), use_(use), plan_(plan), loops_(loops), to_(to) {}

  void pack(int64_t group, int64_t block) const {
    const Tiling& tiling = plan_.tiling;
    Operand* to = to_ + (group * plan_.channel_blocks + block) * plan_.packed_block();
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(plan_.packed_block()) * sizeof(Operand));

    const int64_t first = block * plan_.block_channels;
    const int64_t lanes = std::min(plan_.block_channels, plan_.groups_of(group) * plan_.sweep.c_out - first);
    std::vector<Sum> weights(static_cast<size_t>(kMostRows * tiling.channels));
    for (const Run& run : plan_.runs)
      for (int64_t tap = 0; tap < plan_.tap_volume(); ++tap) {
        const int64_t chunk = run.depth / plan_.chunk, depth = run.depth % plan_.chunk;
        Operand* const tap_weights = to + (chunk * plan_.tap_volume() + tap) * plan_.chunk * tiling.channels;
        for (int part = 0; part < plan_.output_parts; ++part) {
          load(group, run, tap, first, lanes, part, weights.data());
          write_packed(loops_, run.product.weight, run.channels, lanes, weights.data(), tap_weights, tiling,
                       {depth, part * plan_.block_channels});
        }
      }
  }

 private:
  static constexpr int64_t kMostRows = 64;

  // v of the filter, or its part, as [channel of the run][lane].
  void load(int64_t group, const Run& run, int64_t tap, int64_t first, int64_t lanes, int part, Sum* weights) const {
    const FilterStrides stride(filter_, use_);
    const int64_t of_group = filter_.c_out * filter_.c_in * filter_.volume;
    const int64_t at = group * plan_.together * of_group + first * stride.lane + run.channel * stride.depth +
                       filter_tap(plan_.sweep, tap / (plan_.taps[1] * plan_.taps[2]), tap / plan_.taps[2] % plan_.taps[1],
                                  tap % plan_.taps[2] + run.tap_w);
    const char* from = static_cast<const char*>(filter_.data) + at * element_bytes(filter_.element);
    if (plan_.of_groups()) {
      for (int64_t i = 0; i < run.channels; ++i)
        loops_.load(filter_.element, from + i * stride.depth * element_bytes(filter_.element), of_group, stride.lane,
                    lanes / plan_.sweep.c_out, plan_.sweep.c_out, weights + i * lanes, plan_.sweep.c_out);
    } else {
      loops_.load(filter_.element, from, stride.depth, stride.lane, run.channels, lanes, weights, lanes);
    }
    if (use_.split)
      loops_.lift(Lift::Signed, use_.adjoint ? part : run.part, run.channels, lanes, weights, nullptr, weights, lanes);
  }

  const Filter& filter_;
  const Use& use_;
  const Plan& plan_;
  const Loops<Sum>& loops_;
  Operand* to_;
};

}  // namespace

void hold(const void* data, int64_t bytes) { ++held[{data, bytes}].holders; }

void release(const void* data, int64_t bytes) {
  const auto found = held.find({data, bytes});
  if (found != held.end() && --found->second.holders == 0) held.erase(found);
}

template <typename Sum>
Hash hash_bytes(const Loops<Sum>& loops, const void* data, int64_t bytes, ParallelFor parallel_for) {
  const auto known = held.find({data, bytes});
  if (known == held.end()) return hash_now(loops, data, bytes, parallel_for);
  std::optional<Hash>& hash = known->second.hash;
  if (!hash) {
    hash = hash_now(loops, data, bytes, parallel_for);
    familiar().meet(data, bytes, *hash);
  }
  return *hash;
}

template Hash hash_bytes<float>(const Loops<float>&, const void*, int64_t, ParallelFor);
template Hash hash_bytes<double>(const Loops<double>&, const void*, int64_t, ParallelFor);

int64_t filter_tap(const Sweep& sweep, int64_t t, int64_t h, int64_t w) {
  const int64_t index[3] = {t, h, w};
  int64_t at = 0;
  for (int a = 0; a < 3; ++a) at = at * sweep.filter[a] + sweep.first_tap[a] + index[a] * sweep.tap_skip[a];
  return at;
}

void describe(const Filter& filter, const Use& use, const Sweep& sweep, Description& how) {
  how.insert(how.end(), {static_cast<int64_t>(filter.hash.low), static_cast<int64_t>(filter.hash.high),
                         static_cast<int64_t>(filter.element), use.adjoint, use.split, sweep.groups, filter.c_out, filter.c_in});
  for (int a = 0; a < 3; ++a) how.insert(how.end(), {sweep.filter[a], sweep.taps[a], sweep.first_tap[a], sweep.tap_skip[a]});
}

template <typename Sum>
std::shared_ptr<const Buffer> kept(const Filter& filter, const Loops<Sum>& loops, ParallelFor parallel_for,
                                   const Description& how, size_t bytes, const std::function<void(const Buffer&)>& fill) {
  if (auto found = cache().find(how)) return found;
  const auto buffer = std::make_shared<const Buffer>(bytes);
  fill(*buffer);
  if (!cache().takes(*buffer)) return buffer;
  const Hash now = hash_now(loops, filter.data, filter.count * element_bytes(filter.element), parallel_for);
  if (now.low == filter.hash.low && now.high == filter.hash.high) cache().insert(how, buffer);
  return buffer;
}

template std::shared_ptr<const Buffer> kept<float>(const Filter&, const Loops<float>&, ParallelFor, const Description&, size_t,
                                                   const std::function<void(const Buffer&)>&);
template std::shared_ptr<const Buffer> kept<double>(const Filter&, const Loops<double>&, ParallelFor, const Description&, size_t,
                                                    const std::function<void(const Buffer&)>&);

template <typename Operand, typename Sum>
std::shared_ptr<const Buffer> packed_weights(const Filter& filter, const Use& use, const Plan& plan, const Loops<Sum>& loops,
                                             ParallelFor parallel_for) {
  const size_t bytes = static_cast<size_t>(plan.packed_weights()) * sizeof(Operand);
  return kept(filter, loops, parallel_for, description(filter, use, plan), bytes, [&](const Buffer& buffer) {
    const Packer<Operand, Sum> packer(filter, use, plan, loops, buffer.as<Operand>());
    parallel(parallel_for, plan.bundles() * plan.channel_blocks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) packer.pack(i / plan.channel_blocks, i % plan.channel_blocks);
    });
  });
}

template std::shared_ptr<const Buffer> packed_weights<float>(const Filter&, const Use&, const Plan&, const Loops<float>&,
                                                             ParallelFor);
template std::shared_ptr<const Buffer> packed_weights<double>(const Filter&, const Use&, const Plan&, const Loops<double>&,
                                                              ParallelFor);
template std::shared_ptr<const Buffer> packed_weights<bfloat16>(const Filter&, const Use&, const Plan&, const Loops<float>&,
                                                                ParallelFor);

template <typename Sum>
std::shared_ptr<const Buffer> rounded_weights(const Filter& filter, const Loops<Sum>& loops, ParallelFor parallel_for) {
  const int64_t columns = filter.c_in * filter.volume, rows = filter.count / columns;
  const Description how{kInItsOrder,
                        static_cast<int64_t>(filter.hash.low),
                        static_cast<int64_t>(filter.hash.high),
                        static_cast<int64_t>(filter.element),
                        rows,
                        columns};
  return kept(filter, loops, parallel_for, how, static_cast<size_t>(filter.count) * sizeof(bfloat16), [&](const Buffer& buffer) {
    parallel(parallel_for, rows, [&](int64_t begin, int64_t end) {
      std::vector<Sum> row(static_cast<size_t>(columns));
      for (int64_t i = begin; i < end; ++i) {
        const char* from = static_cast<const char*>(filter.data) + i * columns * element_bytes(filter.element);
        loops.load(filter.element, from, 0, 1, 1, columns, row.data(), columns);
        loops.round(Digit::High, 1, columns, row.data(), columns, buffer.as<bfloat16>() + i * columns, columns);
      }
    });
  });
}

template std::shared_ptr<const Buffer> rounded_weights<float>(const Filter&, const Loops<float>&, ParallelFor);

}  // namespace captum_dtd::cpu
