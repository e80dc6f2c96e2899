// Max pooling and relevance through it. Both rules move few bytes per operation, so the kernels are about memory: neighbouring
// threads read neighbouring addresses, in vectors where the layout allows, and each result is written once.
//
// Windows that do not overlap (the usual stride == kernel): the input is tiled by cells, one per window; a thread reads its
// cell and the window's relevance, and writes the cell. Bytes moved: x, R and the result, once each - the least possible.
//
// Windows that overlap: one pass leaves what a window passes on (its R / sum, or its winner) in a workspace, a second lets
// every input position gather from the windows that contain it. Bytes moved: x twice (once for winner-takes-all), the
// workspace twice, R and the result once. Recomputing each window for each of its members would read x once but take its
// kernel^3 taps (kernel / stride)^3 times through the L1 cache, which by count is the tighter limit for kernels above 2.
//
// Layers of frozen clips read and give to times by a table (in_time.h); there every window is one of those that overlap.
//
// The pooling itself is one pass: a thread reads the taps of its window, of which neighbours share most through the caches.
//
// Every sum has a fixed order (T, H, W), so results do not change from run to run.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "elements.h"
#include "in_time.h"
#include "max_pool3d.h"

namespace captum_dtd::cuda {
namespace {

constexpr int kBlocks = 8;         // of a multiprocessor, where a kernel asks for it: leaves it 64 registers
constexpr int kSummaryBlocks = 6;  // leaves 80, with which nothing is spilled
constexpr int kBatch = 8;          // taps whose loads are in flight together: a whole 2x2x2 window

template <typename Sum>
constexpr Sum kNothing = -std::numeric_limits<Sum>::infinity();  // the largest of no numbers

// The six nested loops of a tensor: two axes without windows, the three that are pooled, and lanes. Lanes are what
// neighbouring threads take: channels in channels_last_3d; in other layouts a single one, since there the threads run along W,
// or all of W where its windows are pairs, which lie within a vector.
constexpr int kLoops = 6;
constexpr int kPooled = 2;  // the first loop over a pooled axis
constexpr int kLane = 5;

struct Tensor {
  void* data;
  int64_t stride[kLoops];
};

struct Pooling {
  int in[3], windows[3];
  int kernel[3], stride[3], padding[3], dilation[3];
  int taps;   // of a window; in a vector of pairs only those off the lanes
  bool gaps;  // whether cells have positions that no window reads
  double stabilizer;
  Tensor x, relevance, out, workspace;
  DeviceTables in_time;
};

// The taps of one window in the order T, H, W, and where they lie.
struct Tap {
  int number = 0;
  int at[3] = {0, 0, 0};

  __device__ void next(const Pooling& p) {
    ++number;
    if (++at[2] < p.kernel[2]) return;
    at[2] = 0;
    if (++at[1] < p.kernel[1]) return;
    at[1] = 0;
    ++at[0];
  }

  // How far it reaches along T, or by a table, the time that it reads: -1 where there is none.
  template <bool by_table = false>
  __device__ int time(const Pooling& p, const int16_t* times = nullptr) const {
    if constexpr (by_table) return number < p.taps ? __ldg(times + at[0]) : -1;
    return at[0] * p.dilation[0];
  }

  // `begin` is the window's first position, perhaps in the padding.
  template <bool by_table = false>
  __device__ bool inside(const Pooling& p, const int (&begin)[3], int time) const {
    bool within = number < p.taps && begin[0] + time >= 0 && (by_table || begin[0] + time < p.in[0]);
#pragma unroll
    for (int a = 1; a < 3; ++a) {
      const int position = begin[a] + at[a] * p.dilation[a];
      within = within && position >= 0 && position < p.in[a];
    }
    return within;
  }

  __device__ int64_t offset(const Pooling& p, const Tensor& tensor, int time) const {
    int64_t sum = tensor.stride[kPooled] * time;
#pragma unroll
    for (int a = 1; a < 3; ++a) sum += tensor.stride[kPooled + a] * (at[a] * p.dilation[a]);
    return sum;
  }
};

template <int vector, typename T>
struct Batch {
  SumOf<T> value[kBatch][vector];
  bool inside[kBatch];

  // Reads the next taps of a window whose first position is at `x`; those outside the input count as zero. By a table, `times`
  // are those that its taps of T read.
  template <bool by_table = false>
  __device__ void read(const Pooling& p, const int (&begin)[3], const T* x, Tap& tap, const int16_t* times = nullptr) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b, tap.next(p)) {
      const int time = tap.time<by_table>(p, times);
      inside[b] = tap.inside<by_table>(p, begin, time);
      if (inside[b]) {
        load<vector>(x + tap.offset(p, p.x, time), value[b]);
      } else {
#pragma unroll
        for (int i = 0; i < vector; ++i) value[b][i] = 0;
      }
    }
  }
};

// Of `windows` windows that lie side by side in a vector, or one below each of its lanes: their sums or their winners.
// A winner is told by the number of its tap, in the order T, H, W; -1 where the window holds no input.
template <int vector, int pair, bool winner_takes_all, typename T>
struct Windows {
  static constexpr int count = vector / pair;
  SumOf<T> sum[count], largest[count];
  int winner[count];

  __device__ Windows() {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      sum[i] = largest[i] = 0;
      winner[i] = -1;
    }
  }

  // Takes in the batch whose first tap has the number `first`.
  __device__ void add(const Batch<vector, T>& batch, int first) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        const SumOf<T> value = batch.value[b][i];
        const int w = i / pair;
        if constexpr (!winner_takes_all) {
          sum[w] += positive_part(value);
        } else if (batch.inside[b] && (winner[w] < 0 || value > largest[w] || value != value)) {
          largest[w] = value;
          winner[w] = (first + b) * pair + i % pair;
        }
      }
    }
  }
};

template <typename T>
__device__ inline T* locate(const Tensor& tensor, const int (&at)[kLoops]) {
  T* data = static_cast<T*>(tensor.data);
#pragma unroll
  for (int a = 0; a < kLoops; ++a) data += tensor.stride[a] * at[a];
  return data;
}

// Windows that do not overlap: a thread writes its cell, the positions from its window's first up to the next window's.
// Cells tile the input, also where windows have stopped before its end; such positions get zero, as gaps between taps do.
// `pair` windows lie side by side along a vector of W if it is 2, and none do if it is 1.
template <int vector, int pair, bool winner_takes_all, typename T>
__global__ void __launch_bounds__(kThreads) relevance_of_cells(const Pooling p, const Work<kLoops> work) {
  using Sum = SumOf<T>;
  int at[kLoops];
  if (!coordinates(work, at)) return;
  bool pooled = true;
  int begin[3];
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    begin[a] = at[kPooled + a] * p.stride[a] - p.padding[a];
    pooled = pooled && at[kPooled + a] < p.windows[a];
  }
  constexpr int windows_of_vector = vector / pair;
  Sum given[windows_of_vector] = {};
  at[kLane] *= windows_of_vector;
  if (pooled) load<windows_of_vector>(locate<const Sum>(p.relevance, at), given);
  at[kLane] *= pair;
#pragma unroll
  for (int a = 0; a < 3; ++a) at[kPooled + a] = begin[a];
  const T* x = locate<const T>(p.x, at);
  Sum* out = locate<Sum>(p.out, at);

  Batch<vector, T> batch;
  Windows<vector, pair, winner_takes_all, T> windows;
  for (Tap tap; pooled && tap.number < p.taps;) {
    const int first = tap.number;
    batch.read(p, begin, x, tap);
    windows.add(batch, first);
  }
  if constexpr (!winner_takes_all) {
#pragma unroll
    for (int w = 0; w < windows_of_vector; ++w)
      given[w] = pooled ? divide(given[w], windows.sum[w], static_cast<Sum>(p.stabilizer)) : 0;
  }

  Tap read;
  for (Tap tap; tap.number < p.taps;) {
    // A window of one batch is still held; a larger one is read again, from the caches.
    if (!winner_takes_all && pooled && p.taps > kBatch) batch.read(p, begin, x, read);
#pragma unroll
    for (int b = 0; b < kBatch; ++b, tap.next(p)) {
      const int time = tap.time(p);
      if (!tap.inside(p, begin, time)) continue;
      Sum share[vector];
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        const int w = i / pair;
        if constexpr (winner_takes_all) {
          share[i] = windows.winner[w] == tap.number * pair + i % pair ? given[w] : 0;
        } else {
          share[i] = pooled ? positive_part(batch.value[b][i]) * given[w] : 0;
        }
      }
      store<vector>(out + tap.offset(p, p.out, time), share);
    }
  }
  if (!p.gaps) return;
  const Sum none[vector] = {};
  for (int t = 0; t < p.stride[0]; ++t)
    for (int h = 0; h < p.stride[1]; ++h)
      for (int w = 0; w < p.stride[2]; ++w) {
        const int place[3] = {t, h, w};
        bool tap = true, within = true;
        int64_t offset = 0;
#pragma unroll
        for (int a = 0; a < 3; ++a) {
          tap = tap && place[a] % p.dilation[a] == 0 && place[a] / p.dilation[a] < p.kernel[a];
          within = within && begin[a] + place[a] >= 0 && begin[a] + place[a] < p.in[a];
          offset += p.out.stride[kPooled + a] * place[a];
        }
        if (within && !tap) store<vector>(out + offset, none);
      }
}

// Windows that overlap, first pass: what each passes on for one unit of its inputs, or which of them it passes all to.
template <int vector, bool winner_takes_all, bool by_table, typename T>
__global__ void __launch_bounds__(kThreads, kSummaryBlocks) summarize_windows(const Pooling p, const Work<kLoops> work) {
  using Sum = SumOf<T>;
  int at[kLoops];
  if (!coordinates(work, at)) return;
  at[kLane] *= vector;
  Sum given[vector];
  if constexpr (!winner_takes_all) load<vector>(locate<const Sum>(p.relevance, at), given);
  void* summary = winner_takes_all ? static_cast<void*>(locate<int>(p.workspace, at)) : locate<Sum>(p.workspace, at);
  const int16_t* times = by_table ? p.in_time.reads.row(at[0]) + at[kPooled] * p.kernel[0] : nullptr;
  int begin[3];
#pragma unroll
  for (int a = 0; a < 3; ++a) at[kPooled + a] = begin[a] = a == 0 && by_table ? 0 : at[kPooled + a] * p.stride[a] - p.padding[a];
  const T* x = locate<const T>(p.x, at);
  Batch<vector, T> batch;
  Windows<vector, 1, winner_takes_all, T> windows;
  for (Tap tap; tap.number < p.taps;) {
    const int first = tap.number;
    batch.template read<by_table>(p, begin, x, tap, times);
    windows.add(batch, first);
  }
  if constexpr (winner_takes_all) {
    store<vector>(static_cast<int*>(summary), windows.winner);
  } else {
#pragma unroll
    for (int i = 0; i < vector; ++i) given[i] = divide(given[i], windows.sum[i], static_cast<Sum>(p.stabilizer));
    store<vector>(static_cast<Sum*>(summary), given);
  }
}

// The pooling itself; `pair` windows lie side by side along a vector of W if it is 2.
template <int vector, int pair, bool by_table, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) largest_of_windows(const Pooling p, const Work<kLoops> work) {
  using Sum = SumOf<T>;
  constexpr int windows = vector / pair;
  int at[kLoops];
  if (!coordinates(work, at)) return;
  at[kLane] *= windows;
  auto* const to = reinterpret_cast<Pack<T, windows>*>(locate<T>(p.out, at));
  at[kLane] *= pair;
  const int16_t* times = by_table ? p.in_time.reads.row(at[0]) + at[kPooled] * p.kernel[0] : nullptr;
  int begin[3];
#pragma unroll
  for (int a = 0; a < 3; ++a) at[kPooled + a] = begin[a] = a == 0 && by_table ? 0 : at[kPooled + a] * p.stride[a] - p.padding[a];
  const T* x = locate<const T>(p.x, at);
  Sum largest[windows];
#pragma unroll
  for (int w = 0; w < windows; ++w) largest[w] = kNothing<Sum>;
  Batch<vector, T> batch;
  for (Tap tap; tap.number < p.taps;) {
    batch.template read<by_table>(p, begin, x, tap, times);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        const Sum value = batch.value[b][i];
        if (batch.inside[b] && (value > largest[i / pair] || value != value)) largest[i / pair] = value;
      }
    }
  }
  Pack<T, windows> pack;
#pragma unroll
  for (int w = 0; w < windows; ++w) {
    if constexpr (std::is_same_v<T, double>)
      pack.value[w] = largest[w];
    else
      pack.value[w] = narrow<T>(largest[w]);
  }
  *to = pack;
}

// The windows of one axis that contain a position: from first to last, `step` apart. The position is tap `tap` of the first
// of them, and the tap falls by `fall` from one to the next.
struct Containing {
  int first, last, step, tap, fall;

  __device__ Containing(const Pooling& p, int a, int position) {
    const int stride = p.stride[a], dilation = p.dilation[a];
    const int reach = position + p.padding[a];
    const int before = reach - (p.kernel[a] - 1) * dilation;  // of a window that the position is the last tap of
    first = before > 0 ? (before + stride - 1) / stride : 0;
    last = min(reach / stride, p.windows[a] - 1);
    step = 1;
    tap = reach - first * stride;
    fall = stride;
    if (dilation == 1) return;
    while (first <= last && (reach - first * stride) % dilation != 0) ++first;
    while (step * stride % dilation != 0) ++step;
    tap = (reach - first * stride) / dilation;
    fall = step * stride / dilation;
  }
};

// Windows that overlap, second pass: every input position gathers from the windows that contain it.
template <int vector, bool winner_takes_all, bool by_table, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) gather_from_windows(const Pooling p, const Work<kLoops> work) {
  using Sum = SumOf<T>;
  int at[kLoops];
  if (!coordinates(work, at)) return;
  at[kLane] *= vector;
  Sum* out = locate<Sum>(p.out, at);
  const int time = at[kPooled];
  if constexpr (by_table) at[kPooled] = p.in_time.stored.row(at[0])[time];
  [[maybe_unused]] const T* x = locate<const T>(p.x, at);
  const Containing h(p, 1, at[3]), w(p, 2, at[4]);
  at[2] = at[3] = at[4] = 0;
  using Summary = std::conditional_t<winner_takes_all, int, Sum>;
  const Summary* summary = locate<const Summary>(p.workspace, at);
  const Sum* relevance = locate<const Sum>(p.relevance, at);

  Sum gathered[vector] = {};
  // From the windows that begin at the i-th time, of which the position is the given tap of T.
  const auto gather = [&](int i, int tap_t) {
    for (int j = h.first, tap_h = h.tap; j <= h.last; j += h.step, tap_h -= h.fall) {
      const Summary* row = summary + p.workspace.stride[2] * i + p.workspace.stride[3] * j;
      const Sum* given_row = relevance + p.relevance.stride[2] * i + p.relevance.stride[3] * j;
      for (int k = w.first, tap_w = w.tap; k <= w.last; k += w.step, tap_w -= w.fall) {
        const auto of_window = *reinterpret_cast<const Pack<Summary, vector>*>(row + p.workspace.stride[4] * k);
        if constexpr (winner_takes_all) {
          const int here = (tap_t * p.kernel[1] + tap_h) * p.kernel[2] + tap_w;
          Sum given[vector];
          load<vector>(given_row + p.relevance.stride[4] * k, given);
#pragma unroll
          for (int v = 0; v < vector; ++v) gathered[v] += of_window.value[v] == here ? given[v] : 0;
        } else {
#pragma unroll
          for (int v = 0; v < vector; ++v) gathered[v] += of_window.value[v];
        }
      }
    }
  };
  bool contained = h.first <= h.last && w.first <= w.last;
  if constexpr (by_table) {
    const DeviceTables& tables = p.in_time;
    const int16_t* frames = tables.gathers.row(at[0]) + time * p.kernel[0];
    bool is_given = false;
    for (int tap_t = 0; tap_t < p.kernel[0]; ++tap_t) {
      if (frames[tap_t] < 0) continue;
      is_given = true;
      if (tables.members.data == nullptr) {
        gather(frames[tap_t], tap_t);
        continue;
      }
      const int16_t* members = tables.members.row(at[0]) + frames[tap_t] * tables.most;
      for (int i = 0; i < tables.most && members[i] >= 0; ++i) gather(members[i], tap_t);
    }
    contained = contained && is_given;
  } else {
    const Containing t(p, 0, time);
    for (int i = t.first, tap_t = t.tap; i <= t.last; i += t.step, tap_t -= t.fall) gather(i, tap_t);
    contained = contained && t.first <= t.last;
  }
  if constexpr (!winner_takes_all) {
    Sum value[vector];
    load<vector>(x, value);
#pragma unroll
    for (int v = 0; v < vector; ++v) gathered[v] = contained ? gathered[v] * positive_part(value[v]) : 0;
  }
  store<vector>(out, gathered);
}

// How a problem is laid out for the kernels: which axes are the loops, and how wide the vectors are.
struct Plan {
  Pooling pooling;
  int64_t outer[2];
  int64_t lanes;  // of x
  int vector, pair;
  bool overlapping, by_table;
};

int64_t extent(const MaxPool3d& pool, int a) { return pool.dilation[a] * (pool.kernel[a] - 1) + 1; }

bool overlapping(const MaxPool3d& pool) {
  for (int a = 0; a < 3; ++a)
    if (pool.out[a] > 1 && pool.stride[a] < extent(pool, a)) return true;
  return false;
}

int64_t size_of_sum(Element element) { return element == Element::Float64 ? 8 : 4; }

// Of what windows pass on, aligned so that tables may follow.
int64_t summary_bytes(const MaxPool3dRelevance& problem) {
  const MaxPool3d& pool = problem.pool;
  const int64_t windows = pool.n * pool.c * pool.out[0] * pool.out[1] * pool.out[2];
  return windows * (problem.winner_takes_all ? 4 : size_of_sum(problem.element));
}

// Whether a tensor (N, C, ...) of these sizes can be read `vector` neighbours at a time along an axis.
bool in_vectors(const View& view, const MaxPool3d& pool, const int64_t (&size)[3], int axis, int64_t bytes, int vector) {
  if (view.stride[axis] != 1 || reinterpret_cast<uintptr_t>(view.data) % (bytes * vector) != 0) return false;
  const int64_t sizes[5] = {pool.n, pool.c, size[0], size[1], size[2]};
  for (int a = 0; a < 5; ++a)
    if (a != axis && sizes[a] > 1 && view.stride[a] % vector != 0) return false;
  return true;
}

Tensor over_channels(const View& view) {
  return {view.data, {view.stride[0], 0, view.stride[2], view.stride[3], view.stride[4], view.stride[1]}};
}

Tensor over_planes(const View& view) {
  return {view.data, {view.stride[0], view.stride[1], view.stride[2], view.stride[3], view.stride[4], 0}};
}

Tensor over_rows(const View& view) {
  return {view.data, {view.stride[0], view.stride[1], view.stride[2], view.stride[3], 0, view.stride[4]}};
}

Plan plan_for(const MaxPool3dRelevance& problem, void* workspace) {
  Plan plan{};
  Pooling& p = plan.pooling;
  const MaxPool3d& pool = problem.pool;
  int64_t taps = 1, largest = std::max(pool.n, pool.c);
  for (int a = 0; a < 3; ++a) {
    taps *= pool.kernel[a];
    largest =
        std::max({largest, taps, pool.in[a] + pool.padding[a] + pool.stride[a], pool.in[a] + pool.padding[a] + extent(pool, a)});
  }
  if (largest > INT32_MAX) throw std::invalid_argument("this max pooling is larger than its CUDA kernels can count");
  for (int a = 0; a < 3; ++a) {
    p.in[a] = static_cast<int>(pool.in[a]);
    p.windows[a] = static_cast<int>(pool.out[a]);
    p.kernel[a] = static_cast<int>(pool.kernel[a]);
    p.stride[a] = static_cast<int>(pool.stride[a]);
    p.padding[a] = static_cast<int>(pool.padding[a]);
    p.dilation[a] = static_cast<int>(pool.dilation[a]);
    // A single window may be wider than its stride: one cell then takes the whole axis.
    if (pool.out[a] == 1) p.stride[a] = std::max(p.in[a] + p.padding[a], static_cast<int>(extent(pool, a)));
  }
  p.stabilizer = problem.stabilizer;
  plan.by_table = problem.reads.data != nullptr;
  plan.overlapping = plan.by_table || overlapping(pool);

  // `relevance_vector` windows lie along a vector of x.
  const int64_t size_of_x[3] = {plan.by_table ? problem.times : pool.in[0], pool.in[1], pool.in[2]};
  const auto vectors_along = [&](int axis, int64_t size, int relevance_vector) {
    const int64_t bytes = problem.element == Element::Float32 ? 4 : 2;
    return problem.element != Element::Float64 && size % kVector == 0 &&
           in_vectors(problem.x, pool, size_of_x, axis, bytes, kVector) &&
           in_vectors(problem.out, pool, pool.in, axis, 4, kVector) &&
           in_vectors(problem.relevance, pool, pool.out, axis, 4, relevance_vector);
  };
  const bool pairs = pool.kernel[2] == 2 && pool.stride[2] == 2 && pool.dilation[2] == 1 && pool.padding[2] == 0 &&
                     pool.in[2] == 2 * pool.out[2];
  auto lay_out = [&](Tensor (*loops)(const View&)) {
    p.x = loops(problem.x);
    p.relevance = loops(problem.relevance);
    p.out = loops(problem.out);
  };
  plan.vector = plan.pair = 1;
  plan.outer[0] = pool.n;
  if (problem.x.stride[1] == 1 && pool.c > 1) {
    lay_out(over_channels);
    plan.outer[1] = 1;
    plan.lanes = pool.c;
    if (vectors_along(1, pool.c, kVector)) plan.vector = kVector;
  } else if (pairs && !plan.overlapping && vectors_along(4, pool.in[2], kVector / 2)) {
    lay_out(over_rows);
    plan.outer[1] = pool.c;
    plan.lanes = pool.in[2];
    plan.vector = kVector;
    plan.pair = 2;
    p.in[2] = p.windows[2] = p.kernel[2] = p.stride[2] = 1;
  } else {
    lay_out(over_planes);
    plan.outer[1] = pool.c;
    plan.lanes = 1;
  }
  p.taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  for (int a = 0; a < 3; ++a) p.gaps = p.gaps || p.dilation[a] > 1 || p.stride[a] > p.kernel[a];

  p.workspace.data = workspace;
  int64_t step = 1;
  const int64_t sizes[kLoops] = {plan.outer[0], plan.outer[1], p.windows[0], p.windows[1], p.windows[2], plan.lanes};
  for (int a = kLoops - 1; a >= 0; --a) {
    p.workspace.stride[a] = step;
    step *= sizes[a];
  }
  return plan;
}

// Runs a kernel once for each vector at the given positions of the pooled axes.
void launch_over(void (*kernel)(Pooling, Work<kLoops>), const Plan& plan, const int64_t (&positions)[3], void* stream,
                 int64_t threads, const char* name = "max_pool3d_relevance") {
  const int64_t sizes[kLoops] = {plan.outer[0], plan.outer[1], positions[0],
                                 positions[1],  positions[2],  plan.lanes / plan.vector};
  launch_each(name, kernel, plan.pooling, sizes, stream, threads);
}

template <int vector, bool winner_takes_all, bool by_table, typename T>
void run_overlapping(const Plan& plan, void* stream, int64_t threads) {
  const Pooling& p = plan.pooling;
  const int64_t windows[3] = {p.windows[0], p.windows[1], p.windows[2]}, in[3] = {p.in[0], p.in[1], p.in[2]};
  launch_over(summarize_windows<vector, winner_takes_all, by_table, T>, plan, windows, stream, threads);
  using Read = std::conditional_t<winner_takes_all, SumOf<T>, T>;  // winners are told without x: one kernel for all types
  launch_over(gather_from_windows<vector, winner_takes_all, by_table, Read>, plan, in, stream, threads);
}

template <int vector, int pair, bool winner_takes_all, typename T>
void run(const Plan& plan, void* stream, int64_t threads) {
  const Pooling& p = plan.pooling;
  if (!plan.overlapping) {
    int64_t cells[3];
    for (int a = 0; a < 3; ++a) cells[a] = (int64_t{p.in[a]} + p.padding[a] + p.stride[a] - 1) / p.stride[a];
    launch_over(relevance_of_cells<vector, pair, winner_takes_all, T>, plan, cells, stream, threads);
    return;
  }
  if constexpr (pair == 1)
    return plan.by_table ? run_overlapping<vector, winner_takes_all, true, T>(plan, stream, threads)
                         : run_overlapping<vector, winner_takes_all, false, T>(plan, stream, threads);
}

template <bool winner_takes_all, typename T>
void run_rule(const Plan& plan, void* stream, int64_t threads) {
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.pair == 2) return run<kVector, 2, winner_takes_all, T>(plan, stream, threads);
    if (plan.vector == kVector) return run<kVector, 1, winner_takes_all, T>(plan, stream, threads);
  }
  run<1, 1, winner_takes_all, T>(plan, stream, threads);
}

template <int vector, int pair, typename T>
void run_forward(const Plan& plan, void* stream, int64_t threads) {
  const Pooling& p = plan.pooling;
  const int64_t windows[3] = {p.windows[0], p.windows[1], p.windows[2]};
  auto kernel = largest_of_windows<vector, pair, false, T>;
  if constexpr (pair == 1)
    if (plan.by_table) kernel = largest_of_windows<vector, pair, true, T>;
  launch_over(kernel, plan, windows, stream, threads, "max_pool3d");
}

template <typename T>
void run_forward_type(const Plan& plan, void* stream, int64_t threads) {
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.pair == 2) return run_forward<kVector, 2, T>(plan, stream, threads);
    if (plan.vector == kVector) return run_forward<kVector, 1, T>(plan, stream, threads);
  }
  run_forward<1, 1, T>(plan, stream, threads);
}

template <typename T>
void run_type(bool winner_takes_all, const Plan& plan, void* stream, int64_t threads) {
  winner_takes_all ? run_rule<true, T>(plan, stream, threads) : run_rule<false, T>(plan, stream, threads);
}

}  // namespace

int64_t max_pool3d_workspace(const MaxPool3dRelevance& problem) {
  if (problem.reads.data != nullptr)
    return summary_bytes(problem) + time_tables(problem.pool, problem.reads, problem.gives).bytes();
  return overlapping(problem.pool) ? summary_bytes(problem) : 0;
}

void max_pool3d_relevance(const MaxPool3dRelevance& problem, void* workspace, void* stream, int64_t threads) {
  Plan plan = plan_for(problem, workspace);
  if (plan.by_table)
    plan.pooling.in_time = write_tables(time_tables(problem.pool, problem.reads, problem.gives),
                                        static_cast<char*>(workspace) + summary_bytes(problem), stream);
  switch (problem.element) {
    case Element::Float32: return run_type<float>(problem.winner_takes_all, plan, stream, threads);
    case Element::Float64: return run_type<double>(problem.winner_takes_all, plan, stream, threads);
    case Element::BFloat16: return run_type<bfloat16>(problem.winner_takes_all, plan, stream, threads);
    case Element::Float16: return run_type<float16>(problem.winner_takes_all, plan, stream, threads);
  }
}

int64_t max_pool3d_workspace(const MaxPool3dForward& problem) { return time_tables(problem.pool, problem.reads, {}).bytes(); }

void max_pool3d_forward(const MaxPool3dForward& problem, void* workspace, void* stream, int64_t threads) {
  // Laid out as relevance is that comes back from its windows.
  MaxPool3dRelevance back{};
  back.pool = problem.pool;
  back.reads = problem.reads;
  back.times = problem.pool.in[0];
  back.element = problem.element;
  back.x = back.out = problem.x;
  back.relevance = problem.out;
  Plan plan = plan_for(back, nullptr);
  plan.pooling.out = plan.pooling.relevance;
  if (plan.by_table) plan.pooling.in_time = write_tables(time_tables(problem.pool, problem.reads, {}), workspace, stream);
  switch (problem.element) {
    case Element::Float32: return run_forward_type<float>(plan, stream, threads);
    case Element::Float64: return run_forward_type<double>(plan, stream, threads);
    case Element::BFloat16: return run_forward_type<bfloat16>(plan, stream, threads);
    case Element::Float16: return run_forward_type<float16>(plan, stream, threads);
  }
}

}  // namespace captum_dtd::cuda
