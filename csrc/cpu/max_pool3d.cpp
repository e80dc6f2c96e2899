// Max pooling and its relevance on the CPU: which rows meet which; the arithmetic along a row is in pool_loops.h.
//
// Of relevance the work is cut into tiles: some channels of one example, and the input rows from where a few windows begin to
// where the next begin. A tile's windows write down what they pass on (their share, or their winner), then its input rows gather
// from all windows that contain them, in a fixed order. Windows that reach into a neighbouring tile are computed for both. So a
// tile stays in the cache: where windows do not overlap, every tensor is read or written once.
#include "max_pool3d.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "buffer.h"
#include "instructions.h"
#include "parallel.h"
#include "pool_loops.h"
#include "streaming.h"

namespace captum_dtd::cpu {
namespace {

// Channels that are taken together where they do not lie side by side: their rows are turned into lanes and back.
constexpr int64_t kLanes = 16;

// Bytes of a tile, at least. Overlapping windows gain from bigger ones, as long as a second level cache holds them.
constexpr int64_t kTileBytes = 1 << 17;
constexpr int64_t kOverlappingTileBytes = 1 << 19;

// Where windows overlap much along T, or by tables, a tile has all of its times, or this many, so that their sums need not be
// taken again for a neighbour: of these lanes, and of rows that fill so many bytes with all that is worked out on the way. Rows
// that no neighbour needs too had better be whole, of all lanes, if those of a window fill no more than this: memory is then
// read and written in its order.
constexpr int64_t kDeepTimes = 16;
constexpr int64_t kDeepLanes = 32;
constexpr int64_t kDeepTileBytes = 1 << 20;
constexpr int64_t kDeepRowBytes = 1 << 21;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The windows of one axis, the positions of the input that they read, and those of the result that they give to: the same, but
// where tables say otherwise.
class Axis {
 public:
  Axis(const MaxPool3d& pool, int axis)
      : positions(pool.in[axis]),
        windows(pool.out[axis]),
        overlap((pool.kernel[axis] - 1) * pool.dilation[axis] >= pool.stride[axis]),
        stride_(pool.stride[axis]),
        padding_(pool.padding[axis]) {
    // Taps in the padding are not gone through: a window may be far larger than the input.
    meet([&](auto visit) {
      for (int64_t window = 0; window < windows; ++window) {
        const int64_t at = window * stride_ - padding_, step = pool.dilation[axis];
        const int64_t first = at < 0 ? (-at + step - 1) / step : 0;
        const int64_t end = at < positions ? std::min((positions - at + step - 1) / step, pool.kernel[axis]) : 0;
        for (int64_t tap = first; tap < end; ++tap) visit(window, tap, at + tap * step, at + tap * step);
      }
    });
    for (int64_t position = 0; position < positions; ++position) sources_[position] = position;
  }

  // T by a row of both tables.
  Axis(const MaxPool3d& pool, const int64_t* reads, const int64_t* gives)
      : positions(pool.in[0]), windows(pool.out[0]), overlap(true), stride_(0), padding_(0) {
    meet([&](auto visit) {
      for (int64_t i = 0; i < windows * pool.kernel[0]; ++i)
        if (reads[i] >= 0) visit(i / pool.kernel[0], i % pool.kernel[0], reads[i], gives[i]);
    });
  }

  Meetings of_windows() const { return {first_of_window_.data(), of_window_.data()}; }
  Meetings of_positions() const { return {first_of_position_.data(), of_position_.data()}; }

  // The position of the input that one of the result stands for; -1 where nothing is given to it.
  int64_t source(int64_t position) const { return sources_[position]; }

  // Positions from where these windows begin to where the next begins; the first and the last window have the rest. Not of
  // tables, whose windows are in no order.
  Range own(Range window) const { return {begin(window.begin), begin(window.end)}; }

  // Everything that one of these meets.
  static Range met(const Meetings& meetings, Range range) {
    Range all{INT64_MAX, 0};
    for (int64_t m = meetings.first[range.begin]; m < meetings.first[range.end]; ++m) {
      all.begin = std::min(all.begin, meetings.list[m].at);
      all.end = std::max(all.end, meetings.list[m].at + 1);
    }
    return all.end ? all : Range{0, 0};
  }

  const int64_t positions, windows;
  const bool overlap;

 private:
  // each(visit) calls visit(window, tap, position read, position given to) for what each window reads, one after the other; where
  // -1 is given to it is nothing.
  template <typename Each>
  void meet(Each each) {
    sources_.assign(positions, -1);
    first_of_window_.assign(windows + 1, 0);
    first_of_position_.assign(positions + 1, 0);
    each([&](int64_t window, int64_t tap, int64_t read, int64_t given) {
      of_window_.push_back({read, tap});
      ++first_of_window_[window + 1];
      if (given >= 0) ++first_of_position_[given + 1];
    });
    std::partial_sum(first_of_window_.begin(), first_of_window_.end(), first_of_window_.begin());
    std::partial_sum(first_of_position_.begin(), first_of_position_.end(), first_of_position_.begin());
    of_position_.resize(first_of_position_[positions]);
    std::vector<int64_t> next(first_of_position_.begin(), first_of_position_.end() - 1);
    each([&](int64_t window, int64_t tap, int64_t read, int64_t given) {
      if (given < 0) return;
      of_position_[next[given]++] = {window, tap};
      sources_[given] = read;
    });
  }

  int64_t begin(int64_t window) const {
    if (window == 0) return 0;
    return window == windows ? positions : std::clamp<int64_t>(window * stride_ - padding_, 0, positions);
  }

  int64_t stride_, padding_;
  std::vector<int64_t> first_of_window_, first_of_position_, sources_;
  std::vector<Meeting> of_window_, of_position_;
};

// T, by itself or by tables: one for all examples, or one for each.
std::vector<Axis> axes_of_time(const MaxPool3d& pool, const TimeTable& reads, const TimeTable& gives) {
  if (reads.data == nullptr) return {Axis(pool, 0)};
  std::vector<Axis> axes;
  for (int64_t n = 0; n < (reads.of_each_example || gives.of_each_example ? pool.n : 1); ++n)
    axes.emplace_back(pool, reads.row(pool, n), gives.row(pool, n));
  return axes;
}

PoolRow row_of(const Axis& w) { return {w.positions, w.windows, w.of_windows(), w.of_positions()}; }

// Calls body(meeting) for what one of an axis meets.
template <typename Body>
void each(const Meetings& meetings, int64_t i, Body body) {
  for (int64_t m = meetings.first[i]; m < meetings.first[i + 1]; ++m) body(meetings.list[m]);
}

template <typename Sum>
struct Instructions {
  const Loops<Sum>* memory;
  const PoolLoops<Sum>* pool;
};

template <typename Sum>
Instructions<Sum> instructions(const std::string& isa);

template <>
Instructions<float> instructions(const std::string& isa) {
  const auto* pool = isa == "avx512" ? float_pool_loops_avx512()
                     : isa == "avx2" ? float_pool_loops_avx2()
                                     : float_pool_loops_generic();
  return {loops_of<float>(isa), pool};
}

template <>
Instructions<double> instructions(const std::string& isa) {
  const auto* pool = isa == "avx512" ? double_pool_loops_avx512()
                     : isa == "avx2" ? double_pool_loops_avx2()
                                     : double_pool_loops_generic();
  return {loops_of<double>(isa), pool};
}

// Rows of some channels of a tensor: a box of T and H, all of W. In memory they are dense, or a dense copy is worked with.
template <typename Sum>
class Rows {
 public:
  Rows(const View& view, Element element, int64_t width, const Loops<Sum>* memory)
      : view_(view), element_(element), width_(width), memory_(memory) {}

  // Whether no copy is needed.
  bool dense(int64_t lanes) const {
    return element_ == element_of<Sum>() && view_.stride[4] == lanes && (lanes == 1 || view_.stride[1] == 1);
  }

  void set(int64_t n, int64_t channel, int64_t lanes, Range t, Range h) {
    lanes_ = lanes;
    t_ = t;
    h_ = h;
    const auto& stride = view_.stride;
    from_ = static_cast<char*>(view_.data) + (n * stride[0] + channel * stride[1]) * element_bytes(element_);
    if (!dense(lanes)) copy_.reserve(t.size() * h.size() * width_ * lanes * sizeof(Sum));
  }

  Sum* row(int64_t t, int64_t h) const {
    if (dense(lanes_)) return static_cast<Sum*>(at(t, h));
    return copy_.template as<Sum>() + ((t - t_.begin) * h_.size() + h - h_.begin) * width_ * lanes_;
  }

  void load() const {
    each_copy([&](void* there, int64_t positions, Sum* here) {
      memory_->load(element_, there, view_.stride[4], view_.stride[1], positions, lanes_, here, lanes_);
    });
  }

  void store() const {
    each_copy([&](void* there, int64_t positions, Sum* here) {
      memory_->store(element_, here, lanes_, positions, lanes_, there, view_.stride[4], view_.stride[1], false);
    });
  }

 private:
  void* at(int64_t t, int64_t h) const {
    return static_cast<char*>(from_) + (t * view_.stride[2] + h * view_.stride[3]) * element_bytes(element_);
  }

  // In as few pieces as memory allows.
  template <typename Body>
  void each_copy(Body body) const {
    if (dense(lanes_)) return;
    const bool whole = view_.stride[3] == width_ * view_.stride[4];
    for (int64_t t = t_.begin; t < t_.end; ++t) {
      if (whole) {
        if (h_.size()) body(at(t, h_.begin), h_.size() * width_, row(t, h_.begin));
      } else {
        for (int64_t h = h_.begin; h < h_.end; ++h) body(at(t, h), width_, row(t, h));
      }
    }
  }

  View view_;
  Element element_;
  int64_t width_;
  const Loops<Sum>* memory_;
  int64_t lanes_ = 0;
  Range t_{}, h_{};
  void* from_ = nullptr;
  Buffer copy_;
};

template <typename Sum>
class Pooling {
 public:
  Pooling(const MaxPool3dRelevance& problem, Instructions<Sum> run)
      : problem_(problem),
        run_(run),
        t_(axes_of_time(problem.pool, problem.reads, problem.gives)),
        h_(problem.pool, 1),
        w_(problem.pool, 2),
        row_(row_of(w_)) {
    const MaxPool3d& pool = problem.pool;
    const bool side_by_side = problem.x.stride[1] == 1 && problem.out.stride[1] == 1;
    const bool overlap = t_[0].overlap || h_.overlap;
    deep_ = pool.kernel[0] > 1 && (by_table() || (pool.kernel[0] - 1) * pool.dilation[0] >= 2 * pool.stride[0]) &&
            !problem.winner_takes_all;
    if (deep_) tile_t_ = by_table() ? pool.out[0] : std::min(pool.out[0], kDeepTimes);
    const bool has_few_lanes = deep_ && (h_.overlap || deep_row_bytes(pool.c) * pool.stride[1] > kDeepRowBytes);
    lanes_ = side_by_side ? (has_few_lanes ? std::min(pool.c, kDeepLanes) : pool.c) : std::min(pool.c, kLanes);
    blocks_ = (pool.c + lanes_ - 1) / lanes_;
    const int64_t bytes = pool.n * pool.c * t_[0].positions * h_.positions * w_.positions * static_cast<int64_t>(sizeof(Sum));
    stream_ = bytes >= kStreamedBytes && Rows<Sum>(problem.out, element_of<Sum>(), w_.positions, run_.memory).dense(lanes_);
    if (deep_) {
      tile_h_ = kDeepTileBytes / deep_row_bytes(lanes_) / pool.stride[1] - pool.kernel[1] + 1;
      tile_h_ = std::clamp<int64_t>(tile_h_, 1, h_.windows);
    } else {
      // As many windows as fill a tile, first along H and then along T.
      const int64_t row_bytes = w_.positions * lanes_ * sizeof(Sum) * pool.stride[0];
      const bool is_small = bytes / pool.n / blocks_ <= 2 * kTileBytes;  // not worth cutting
      const int64_t tile_bytes = overlap ? kOverlappingTileBytes : is_small ? 2 * kTileBytes : kTileBytes;
      const int64_t rows = std::max<int64_t>(1, tile_bytes / row_bytes);
      tile_h_ = std::clamp<int64_t>(rows / pool.stride[1], 1, h_.windows);
      tile_t_ = by_table() ? pool.out[0] : std::clamp<int64_t>(rows / h_.positions, 1, pool.out[0]);
    }
    tiles_h_ = (h_.windows + tile_h_ - 1) / tile_h_;
    tiles_t_ = (pool.out[0] + tile_t_ - 1) / tile_t_;
  }

  int64_t tiles() const { return problem_.pool.n * blocks_ * tiles_t_ * tiles_h_; }

  void run(int64_t begin, int64_t end) const {
    Scratch scratch(*this);
    for (int64_t tile = begin; tile < end; ++tile) run_tile(scratch, tile);
    settle_streams();
  }

 private:
  using Tap = typename PoolLoops<Sum>::Tap;

  bool by_table() const { return problem_.reads.data != nullptr; }

  // Of a deep tile: x, the result and relevance, and of windows their sums, their shares and the totals of these.
  int64_t deep_row_bytes(int64_t lanes) const {
    const MaxPool3d& pool = problem_.pool;
    const int64_t times = 2 * problem_.times + 2 * pool.in[0] + 2 * pool.out[0];
    return std::max<int64_t>(1, times * tile_t_ / pool.out[0]) * w_.positions * lanes * sizeof(Sum);
  }

  const Axis& time(int64_t n) const { return t_.size() > 1 ? t_[n] : t_[0]; }

  // What a thread works with.
  struct Scratch {
    explicit Scratch(const Pooling& p)
        : x(p.problem_.x, p.problem_.element, p.w_.positions, p.run_.memory),
          relevance(p.problem_.relevance, element_of<Sum>(), p.w_.windows, p.run_.memory),
          out(p.problem_.out, element_of<Sum>(), p.w_.positions, p.run_.memory),
          columns(std::max(p.w_.positions, p.w_.windows) * p.lanes_ * sizeof(Sum)),
          windows(p.w_.windows * p.lanes_ * sizeof(Sum)),
          column_winners(p.problem_.winner_takes_all ? p.w_.positions * p.lanes_ * sizeof(Tap) : 0) {}
    Rows<Sum> x, relevance, out;
    Buffer columns, windows, column_winners;
    Buffer passed;  // shares of positions, or winners of windows
    Buffer summed, totals;
    // The rows that one row meets.
    std::vector<const Sum*> sums;
    std::vector<const Tap*> winners;
    std::vector<int64_t> first_taps;
  };

  void run_tile(Scratch& scratch, int64_t tile) const {
    const auto windows_of = [](int64_t i, int64_t size, int64_t count) {
      return Range{i * size, std::min(i * size + size, count)};
    };
    const Range own_h = h_.own(windows_of(tile % tiles_h_, tile_h_, h_.windows));
    const int64_t block = tile / (tiles_h_ * tiles_t_);
    const int64_t n = block / blocks_, channel = block % blocks_ * lanes_;
    const int64_t lanes = std::min(lanes_, problem_.pool.c - channel);
    const Axis& times = time(n);
    const auto also = [](Range a, Range b) { return Range{std::min(a.begin, b.begin), std::max(a.end, b.end)}; };

    Range own_t{0, times.positions}, windows_t{0, times.windows}, read_t{0, problem_.times};
    if (!by_table()) {
      own_t = times.own(windows_of(tile / tiles_h_ % tiles_t_, tile_t_, times.windows));
      windows_t = Axis::met(times.of_positions(), own_t);
      read_t = also(own_t, Axis::met(times.of_windows(), windows_t));
    }
    const Range windows_h = Axis::met(h_.of_positions(), own_h), reached_h = Axis::met(h_.of_windows(), windows_h);
    scratch.x.set(n, channel, lanes, read_t, also(own_h, reached_h));
    scratch.x.load();
    scratch.relevance.set(n, channel, lanes, windows_t, windows_h);
    scratch.relevance.load();
    scratch.out.set(n, channel, lanes, own_t, own_h);

    if (deep_) return share_deeply(scratch, times, lanes, {own_t, own_h, windows_t, windows_h, read_t});
    const int64_t passed_row = (problem_.winner_takes_all ? w_.windows : w_.positions) * lanes;
    scratch.passed.reserve(windows_t.size() * windows_h.size() * passed_row * sizeof(Sum));
    const auto passed = [&](int64_t t, int64_t h) {
      return ((t - windows_t.begin) * windows_h.size() + h - windows_h.begin) * passed_row;
    };
    for (int64_t t = windows_t.begin; t < windows_t.end; ++t)
      for (int64_t h = windows_h.begin; h < windows_h.end; ++h) pass(scratch, times, lanes, t, h, passed(t, h));
    for (int64_t t = own_t.begin; t < own_t.end; ++t)
      for (int64_t h = own_h.begin; h < own_h.end; ++h) receive(scratch, times, lanes, t, h, passed);
    scratch.out.store();
  }

  struct Box {
    Range own_t, own_h, windows_t, windows_h, read_t;
  };

  // What is summed in one time serves all windows that read it, and what all of these give to a time is added before the rows
  // along H gather it.
  void share_deeply(Scratch& scratch, const Axis& times, int64_t lanes, const Box& box) const {
    const int64_t of_windows = w_.windows * lanes, of_positions = w_.positions * lanes, rows = box.windows_h.size();
    const auto reserved = [&](Buffer& buffer, Range t, int64_t row) {
      buffer.reserve(t.size() * rows * row * sizeof(Sum));
      return [=, at = buffer.template as<Sum>()](int64_t time, int64_t h) {
        return at + ((time - t.begin) * rows + h - box.windows_h.begin) * row;
      };
    };
    const auto sums = reserved(scratch.summed, box.read_t, of_windows),
               shares = reserved(scratch.passed, box.windows_t, of_positions),
               totals = reserved(scratch.totals, box.own_t, of_positions);
    auto& met = scratch.sums;
    Sum* const columns = scratch.columns.template as<Sum>();
    for (int64_t h = box.windows_h.begin; h < box.windows_h.end; ++h) {
      for (int64_t t = box.read_t.begin; t < box.read_t.end; ++t) {
        met.clear();
        each(h_.of_windows(), h, [&](Meeting b) { met.push_back(scratch.x.row(t, b.at)); });
        run_.pool->sum(row_, lanes, met.size(), met.data(), columns, sums(t, h));
      }
      for (int64_t t = box.windows_t.begin; t < box.windows_t.end; ++t) {
        met.clear();
        each(times.of_windows(), t, [&](Meeting a) { met.push_back(sums(a.at, h)); });
        run_.pool->share(row_, lanes, met.size(), met.data(), scratch.relevance.row(t, h), static_cast<Sum>(problem_.stabilizer),
                         columns, shares(t, h));
      }
      for (int64_t t = box.own_t.begin; t < box.own_t.end; ++t) {
        met.clear();
        each(times.of_positions(), t, [&](Meeting a) { met.push_back(shares(a.at, h)); });
        run_.pool->total(of_positions, met.size(), met.data(), totals(t, h));
      }
    }
    for (int64_t t = box.own_t.begin; t < box.own_t.end; ++t)
      for (int64_t h = box.own_h.begin; h < box.own_h.end; ++h) {
        if (times.source(t) < 0) {
          std::fill_n(scratch.out.row(t, h), of_positions, Sum(0));
          continue;
        }
        met.clear();
        each(h_.of_positions(), h, [&](Meeting b) { met.push_back(totals(t, b.at)); });
        run_.pool->gather(of_positions, met.size(), met.data(), scratch.x.row(times.source(t), h), scratch.out.row(t, h),
                          stream_);
      }
    scratch.out.store();
  }

  // What a row of windows passes on.
  void pass(Scratch& scratch, const Axis& times, int64_t lanes, int64_t t, int64_t h, int64_t passed) const {
    scratch.sums.clear();
    scratch.first_taps.clear();
    each(times.of_windows(), t, [&](Meeting a) {
      each(h_.of_windows(), h, [&](Meeting b) {
        scratch.sums.push_back(scratch.x.row(a.at, b.at));
        scratch.first_taps.push_back(first_tap(a, b));
      });
    });
    const int64_t rows = scratch.sums.size();
    Sum* const columns = scratch.columns.template as<Sum>();
    if (problem_.winner_takes_all) {
      Tap* const winners = scratch.passed.template as<Tap>() + passed;
      if (rows == 0)
        std::fill_n(winners, w_.windows * lanes, Tap(-1));
      else
        run_.pool->compete(row_, lanes, rows, scratch.sums.data(), scratch.first_taps.data(), columns,
                           scratch.column_winners.template as<Tap>(), winners);
      return;
    }
    Sum* const sums = scratch.windows.template as<Sum>();
    run_.pool->sum(row_, lanes, rows, scratch.sums.data(), columns, sums);
    run_.pool->share(row_, lanes, 1, &sums, scratch.relevance.row(t, h), static_cast<Sum>(problem_.stabilizer), columns,
                     scratch.passed.template as<Sum>() + passed);
  }

  // What a row receives from all windows that give to it.
  template <typename Passed>
  void receive(Scratch& scratch, const Axis& times, int64_t lanes, int64_t t, int64_t h, Passed passed) const {
    scratch.sums.clear();
    scratch.winners.clear();
    scratch.first_taps.clear();
    if (times.source(t) < 0) {
      std::fill_n(scratch.out.row(t, h), row_.positions * lanes, Sum(0));
      return;
    }
    each(times.of_positions(), t, [&](Meeting a) {
      each(h_.of_positions(), h, [&](Meeting b) {
        if (problem_.winner_takes_all) {
          scratch.sums.push_back(scratch.relevance.row(a.at, b.at));
          scratch.winners.push_back(scratch.passed.template as<Tap>() + passed(a.at, b.at));
          scratch.first_taps.push_back(first_tap(a, b));
        } else {
          scratch.sums.push_back(scratch.passed.template as<Sum>() + passed(a.at, b.at));
        }
      });
    });
    const int64_t rows = scratch.sums.size();
    if (problem_.winner_takes_all)
      run_.pool->award(row_, lanes, rows, scratch.winners.data(), scratch.sums.data(), scratch.first_taps.data(),
                       scratch.out.row(t, h));
    else
      run_.pool->gather(row_.positions * lanes, rows, scratch.sums.data(), scratch.x.row(times.source(t), h),
                        scratch.out.row(t, h), stream_);
  }

  // Taps are numbered in the order T, H, W.
  int64_t first_tap(Meeting t, Meeting h) const { return (t.tap * problem_.pool.kernel[1] + h.tap) * problem_.pool.kernel[2]; }

  const MaxPool3dRelevance& problem_;
  Instructions<Sum> run_;
  std::vector<Axis> t_;
  Axis h_, w_;
  PoolRow row_;
  bool deep_;                                    // whether times share their sums
  bool stream_;                                  // the result past the caches
  int64_t lanes_, blocks_;                       // of channels
  int64_t tile_t_, tile_h_, tiles_t_, tiles_h_;  // of windows
};

// The pooling itself. The work is cut into some channels of one example and a few rows of windows of one time.
template <typename Sum>
class Largest {
 public:
  Largest(const MaxPool3dForward& problem, Instructions<Sum> run)
      : problem_(problem),
        run_(run),
        t_(axes_of_time(problem.pool, problem.reads, problem.reads)),
        h_(problem.pool, 1),
        w_(problem.pool, 2),
        row_(row_of(w_)) {
    const MaxPool3d& pool = problem.pool;
    const bool side_by_side = problem.x.stride[1] == 1 && problem.out.stride[1] == 1;
    lanes_ = side_by_side ? pool.c : std::min(pool.c, kLanes);
    blocks_ = (pool.c + lanes_ - 1) / lanes_;
    const int64_t row_bytes = w_.positions * lanes_ * sizeof(Sum) * pool.kernel[0] * pool.stride[1];
    tile_h_ = std::clamp<int64_t>(kTileBytes / row_bytes, 1, h_.windows);
    tiles_h_ = (h_.windows + tile_h_ - 1) / tile_h_;
  }

  int64_t tiles() const { return problem_.pool.n * blocks_ * problem_.pool.out[0] * tiles_h_; }

  void run(int64_t begin, int64_t end) const {
    Rows<Sum> x(problem_.x, problem_.element, w_.positions, run_.memory);
    Rows<Sum> out(problem_.out, problem_.element, w_.windows, run_.memory);
    const Buffer columns(w_.positions * lanes_ * sizeof(Sum));
    std::vector<const Sum*> met;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile % tiles_h_ * tile_h_, t = tile / tiles_h_ % problem_.pool.out[0];
      const int64_t block = tile / tiles_h_ / problem_.pool.out[0], n = block / blocks_, channel = block % blocks_ * lanes_;
      const int64_t lanes = std::min(lanes_, problem_.pool.c - channel);
      const Range windows_h{first, std::min(first + tile_h_, h_.windows)};
      const Axis& times = t_.size() > 1 ? t_[n] : t_[0];
      x.set(n, channel, lanes, Axis::met(times.of_windows(), {t, t + 1}), Axis::met(h_.of_windows(), windows_h));
      x.load();
      out.set(n, channel, lanes, {t, t + 1}, windows_h);
      for (int64_t h = windows_h.begin; h < windows_h.end; ++h) {
        met.clear();
        each(times.of_windows(), t,
             [&](Meeting a) { each(h_.of_windows(), h, [&](Meeting b) { met.push_back(x.row(a.at, b.at)); }); });
        run_.pool->largest(row_, lanes, met.size(), met.data(), columns.as<Sum>(), out.row(t, h));
      }
      out.store();
    }
  }

 private:
  const MaxPool3dForward& problem_;
  Instructions<Sum> run_;
  std::vector<Axis> t_;
  Axis h_, w_;
  PoolRow row_;
  int64_t lanes_, blocks_;    // of channels
  int64_t tile_h_, tiles_h_;  // of windows
};

template <typename Pool>
void run_all(const Pool& pool, ParallelFor parallel_for) {
  parallel(parallel_for, pool.tiles(), [&](int64_t begin, int64_t end) { pool.run(begin, end); });
}

}  // namespace

std::vector<std::string> max_pool3d_kernels() {
  return ieee_kernels([](const std::string& isa) { return instructions<float>(isa).pool != nullptr; });
}

void max_pool3d_relevance(const MaxPool3dRelevance& problem, const std::string& kernel, ParallelFor parallel_for) {
  with_sum_of(problem.element, [&](auto sum) {
    using Sum = decltype(sum);
    run_all(Pooling<Sum>(problem, instructions<Sum>(isa_of(kernel))), parallel_for);
  });
}

void max_pool3d_forward(const MaxPool3dForward& problem, const std::string& kernel, ParallelFor parallel_for) {
  with_sum_of(problem.element, [&](auto sum) {
    using Sum = decltype(sum);
    run_all(Largest<Sum>(problem, instructions<Sum>(isa_of(kernel))), parallel_for);
  });
}

}  // namespace captum_dtd::cpu
