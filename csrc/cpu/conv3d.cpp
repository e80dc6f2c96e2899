// The CPU's fused convolutions: which kernel serves, and what each pass reads and writes.
#include "conv3d.h"

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "../time_sums.h"
#include "direct.h"
#include "direct_kernel.h"
#include "implicit_gemm.h"
#include "linear.h"
#include "loops.h"
#include "microkernel.h"
#include "parallel.h"
#include "plan.h"
#include "planar_kernel.h"
#include "slab.h"
#include "streaming.h"
#include "weights.h"
#include "winograd.h"
#include "winograd_kernel.h"

namespace captum_dtd::cpu {
namespace {

constexpr int64_t kManyDistrusted = 32;               // one in so many; each takes several times its share of a whole sweep
constexpr int64_t kSharesBytes = int64_t{128} << 20;  // of s, the examples of a batch that are walked together

// ------------------------------------------------------------------------------------------------- epilogues

// s = R / z, into the workspace between the two passes.
template <typename Sum>
struct Divide {
  const Loops<Sum>& loops;
  View relevance, shares;
  Element element;  // of the shares
  Sum stabilizer;
  bool stream;

  void approach(const Spot& spot) const { cpu::approach(relevance, element_of<Sum>(), spot); }

  void operator()(const Spot& spot, const Sums<Sum>& sums) const {
    const Block<const Sum> given = loaded(loops, relevance, element_of<Sum>(), spot, sums.room);
    const Block<Sum> to = block_of(shares, element, spot, sums.room);
    loops.divide(spot.rows(), spot.columns(), sums.data, sums.pitch, stabilizer, given.data, given.pitch, to.data, to.pitch,
                 stream && to.data != sums.room);
    if (to.data == sums.room) store(loops, sums.room, to.pitch, shares, element, spot, stream);
  }
};

// R_in = sum over parts of u * sums. Where an input is kept once for several times, `stored` says at which of its times each time
// of the result reads it.
template <typename Sum>
struct Share {
  const Loops<Sum>& loops;
  const Source& source;
  View out;
  const int64_t* stored;
  bool stream;

  void approach(const Spot& spot) const { cpu::approach(source.x, source.element, read_by(spot)); }

  void operator()(const Spot& spot, const Sums<Sum>& sums) const {
    const int64_t pitch = spot.columns(), size = spot.rows() * pitch;
    Sum *room = sums.room, *bound = room + size, *shared = bound + size;
    const Spot of_input = read_by(spot);
    const int last = parts(source.lift) - 1;
    Block<Sum> to = block_of(out, element_of<Sum>(), spot, shared);
    if (stream && last > 0) to = {shared, pitch};  // parts are added up before they are written
    for (int part = 0; part <= last; ++part) {
      Block<const Sum> u{room, pitch};
      if (source.lift == Lift::None)
        u = loaded(loops, source.x, source.element, of_input, room);
      else
        load_lifted(loops, source, part, of_input, room, bound, pitch);
      loops.multiply(spot.rows(), spot.columns(), sums.data + part * sums.of_part, sums.pitch, u.data, u.pitch, part > 0, to.data,
                     to.pitch, stream && to.data != shared);
    }
    if (to.data == shared) store(loops, shared, pitch, out, element_of<Sum>(), spot, stream);
  }

 private:
  Spot read_by(Spot spot) const {
    if (stored != nullptr) spot.t = stored[spot.t];
    return spot;
  }
};

// The plain convolution's output.
template <typename Sum>
struct Keep {
  const Loops<Sum>& loops;
  View out;
  Element element;
  bool relu, stream;

  void approach(const Spot&) const {}

  void operator()(const Spot& spot, const Sums<Sum>& sums) const {
    if (!relu) return store(loops, sums.data, sums.pitch, out, element, spot, stream);
    const int64_t pitch = spot.columns(), rows = sums.pitch == pitch ? spot.rows() : 1;  // so many at once
    for (int64_t row = 0; row < spot.rows(); row += rows)
      loops.lift(Lift::Signed, 0, rows, pitch, sums.data + row * sums.pitch, nullptr, sums.room + row * pitch, pitch);
    store(loops, static_cast<const Sum*>(sums.room), pitch, out, element, spot, stream);
  }
};

// --------------------------------------------------------------------------------------------------- kernels

// Which products of digits an arithmetic takes, of the lifted input in z and of s in the adjoint.
struct Arithmetic {
  const char* name;
  std::vector<Product> forward, adjoint;
  bool transformed = false;  // by Winograd's method, where it pays
};

const std::vector<Arithmetic>& bfloat16_arithmetics() {
  constexpr Product whole{Digit::High, Digit::High}, rest_of_operand{Digit::Low, Digit::High},
      rest_of_weight{Digit::High, Digit::Low};
  static const std::vector<Arithmetic> known{
      {"bf16x3", {whole, rest_of_weight, rest_of_operand}, {whole, rest_of_weight, rest_of_operand}},
      {"mixed", {whole}, {whole, rest_of_operand}},
      {"bf16", {whole}, {whole}},
      {"winograd_bf16", {whole}, {whole}, true},
  };
  return known;
}

// Products in the type of the sums: of every input with every weight, or of what Winograd's transforms make of them.
const std::vector<Arithmetic>& full_arithmetics() {
  constexpr Product whole{Digit::Whole, Digit::Whole};
  static const std::vector<Arithmetic> known{{"ieee", {whole}, {whole}}, {"winograd", {whole}, {whole}, true}};
  return known;
}

const Arithmetic& ieee() { return full_arithmetics()[0]; }

// What computes in one instruction set. `groups` serves all arithmetics where groups have few channels, since its own is the
// accumulator's: more exact than any. Where few channels are written, `pairs` serves arithmetics that multiply nothing but
// rounded numbers, and `planar` every other, likewise.
template <typename Operand, typename Sum>
struct Engine {
  const MicroKernel<Operand, Sum>* tile;
  GroupsKernel<Sum> groups;
  const DirectKernel<Sum>* direct;
  const PlanarKernel<Sum, Sum>* planar;
  const PlanarKernel<Operand, Sum>* pairs;  // null but of bfloat16
  const Loops<Sum>* loops;
  const WinogradKernel<Operand, Sum>* winograd;  // null where there is none
  double rate;  // of the tile's products, compared with those of the accumulator's type in the same instruction set
  const MicroKernel<Operand, Sum>* column = nullptr;  // for as many channels as it has, or fewer; null where `tile` is as fast
};

template <typename Operand, typename Sum>
std::vector<Engine<Operand, Sum>> runnable(std::initializer_list<Engine<Operand, Sum>> engines) {
  std::vector<Engine<Operand, Sum>> found;
  for (const Engine<Operand, Sum>& engine : engines)
    if (engine.tile != nullptr && engine.loops != nullptr) found.push_back(engine);
  return found;
}

// Best first; those that this machine does not run are left out.
template <typename Operand, typename Sum>
std::vector<Engine<Operand, Sum>> engines();

template <>
std::vector<Engine<float, float>> engines() {
  return runnable<float, float>({{float_kernel_avx512(), float_groups_avx512, float_direct_avx512(), float_planar_avx512(),
                                  nullptr, float_loops_avx512(), float_winograd_avx512(), 1},
                                 {float_kernel_avx2(), float_groups_avx2, float_direct_avx2(), float_planar_avx2(), nullptr,
                                  float_loops_avx2(), float_winograd_avx2(), 1},
                                 {float_kernel_generic(), float_groups_generic, float_direct_generic(), float_planar_generic(),
                                  nullptr, float_loops_generic(), float_winograd_generic(), 1}});
}

template <>
std::vector<Engine<double, double>> engines() {
  return runnable<double, double>({{double_kernel_avx512(), double_groups_avx512, double_direct_avx512(), double_planar_avx512(),
                                    nullptr, double_loops_avx512(), nullptr, 1},
                                   {double_kernel_avx2(), double_groups_avx2, double_direct_avx2(), double_planar_avx2(), nullptr,
                                    double_loops_avx2(), nullptr, 1},
                                   {double_kernel_generic(), double_groups_generic, double_direct_generic(),
                                    double_planar_generic(), nullptr, double_loops_generic(), nullptr, 1}});
}

template <>
std::vector<Engine<bfloat16, float>> engines() {
  return runnable<bfloat16, float>(
      {{bfloat16_kernel_amx(), float_groups_avx512, float_direct_avx512(), float_planar_avx512(), bfloat16_planar_avx512(),
        float_loops_avx512(), bfloat16_winograd_avx512(), 16, bfloat16_column_kernel_amx()},
       {bfloat16_kernel_avx512(), float_groups_avx512, float_direct_avx512(), float_planar_avx512(), bfloat16_planar_avx512(),
        float_loops_avx512(), bfloat16_winograd_avx512(), 2},
       {bfloat16_kernel_generic(), float_groups_generic, float_direct_generic(), float_planar_generic(),
        bfloat16_planar_generic(), float_loops_generic(), bfloat16_winograd_generic(), 1}});
}

std::string kernel_name(const char* isa, const char* arithmetic) { return std::string(isa) + "/" + arithmetic; }

// Calls body(engine, arithmetic) for the kernel of this name.
template <typename Body>
void with_kernel(Element element, const std::string& kernel, Body body) {
  if (element == Element::Float64) {
    for (const auto& engine : engines<double, double>())
      if (kernel == kernel_name(engine.tile->isa, ieee().name)) return body(engine, ieee());
  } else {
    for (const auto& engine : engines<float, float>())
      for (const Arithmetic& arithmetic : full_arithmetics())
        if (kernel == kernel_name(engine.tile->isa, arithmetic.name)) return body(engine, arithmetic);
    for (const auto& engine : engines<bfloat16, float>())
      for (const Arithmetic& arithmetic : bfloat16_arithmetics())
        if (kernel == kernel_name(engine.tile->isa, arithmetic.name)) return body(engine, arithmetic);
  }
  throw std::invalid_argument("kernel: this machine runs no CPU kernel \"" + kernel + "\" for this type");
}

// ---------------------------------------------------------------------------------------------------- passes

template <typename Sum>
Filter filter(const Loops<Sum>& loops, const Conv3d& conv, Element element, const void* weight, ParallelFor parallel_for) {
  Filter filter{};
  filter.data = weight;
  filter.element = element;
  filter.c_out = conv.c_out / conv.groups;
  filter.c_in = conv.c_in / conv.groups;
  filter.volume = conv.kernel[0] * conv.kernel[1] * conv.kernel[2];
  filter.count = conv.c_out * filter.c_in * filter.volume;
  filter.hash = hash_bytes(loops, weight, filter.count * element_bytes(element), parallel_for);
  return filter;
}

// The bias, or zeros, as the accumulator's numbers; more zeros follow, so that every block of channels is a whole one.
template <typename Sum>
std::vector<Sum> bias_of(const Loops<Sum>& loops, const Conv3d& conv, Element element, const void* bias) {
  std::vector<Sum> values(static_cast<size_t>(conv.c_out + kMostChannels), Sum(0));
  if (bias != nullptr) loops.load(element, bias, 0, 1, 1, conv.c_out, values.data(), 0);
  return values;
}

// What sweeps over one source do, beside where they write.
struct Task {
  std::vector<Sweep> sweeps;
  const std::vector<Product>& products;
  int input_parts, output_parts;
  const Source& source;
  const Filter& filter;
  Use use;
  bool transformed;
  bool channels_last;  // whether results are written with the channels of a position next to each other
};

// Calls body(runner) with what works off the items of these plans.
template <typename Operand, typename Sum, typename Kernel, typename Epilogue, typename Body>
void with_runner(const Task& task, const Plans& plans, const Kernel& kernel, const Loops<Sum>& loops, const Sum* start,
                 const Epilogue& epilogue, ParallelFor parallel_for, Body body) {
  std::vector<std::shared_ptr<const Buffer>> weights;
  std::vector<SweepRunner<Kernel, Operand, Sum, Epilogue>> sweeps;
  for (const Plan& plan : plans.sweeps) {
    weights.push_back(packed_weights<Operand, Sum>(task.filter, task.use, plan, loops, parallel_for));
    sweeps.emplace_back(plan, kernel, loops, weights.back()->template as<Operand>(), start, epilogue);
  }
  body(SlabRunner<Kernel, Operand, Sum, Epilogue>(plans.slab, loops, task.source, sweeps));
}

template <typename Operand, typename Sum, typename Kernel, typename Epilogue>
void run_plans(const Task& task, const Plans& plans, const Kernel& kernel, const Loops<Sum>& loops, const Sum* start,
               const Epilogue& epilogue, ParallelFor parallel_for) {
  with_runner<Operand>(task, plans, kernel, loops, start, epilogue, parallel_for, [&](const auto& runner) {
    parallel(parallel_for, runner.items(), [&](int64_t begin, int64_t end) { runner.run(begin, end); });
  });
}

template <typename Operand, typename Sum>
Tiling tiling_of(const MicroKernel<Operand, Sum>& tile, Cut cut = Cut::Fitting) {
  const int pair = std::is_same_v<Operand, bfloat16> ? 2 : 1;
  return {Lanes::Channels, tile.channels, tile.depth_multiple, pair, sizeof(Operand), tile.near_bytes, cut};
}

// The kernel of several groups that serves a sweep; null where another is faster.
template <typename Operand, typename Sum>
const MicroKernel<Sum, Sum>* groups_kernel(const Sweep& sweep, int output_parts, const std::vector<Product>& products,
                                           const Engine<Operand, Sum>& engine) {
  const MicroKernel<Sum, Sum>* const kernel = engine.groups(sweep.c_out);
  const double rate = engine.rate / static_cast<double>(products.size());
  const bool pays = kernel != nullptr && groups_pay(sweep, output_parts, kernel->channels, tiling_of(*engine.tile), rate);
  return pays ? kernel : nullptr;
}

template <typename Operand, typename Sum>
bool runs_planar(const Sweep& sweep, int output_parts, const std::vector<Product>& products, const Engine<Operand, Sum>& engine) {
  return planar_pays(sweep, output_parts, engine.tile->channels, engine.rate / static_cast<double>(products.size()));
}

// Whether a planar sweep multiplies rounded numbers, two channels at once.
template <typename Operand, typename Sum>
bool multiplies_pairs(const Sweep& sweep, const std::vector<Product>& products, const Engine<Operand, Sum>& engine) {
  const auto are_rounded = [](const Product& product) { return product.operand == Digit::High && product.weight == Digit::High; };
  return engine.pairs != nullptr && sweep.c_in % 2 == 0 && std::all_of(products.begin(), products.end(), are_rounded);
}

template <typename Operand, typename Sum>
bool runs_directly(const Task& task, const Sweep& sweep, const Engine<Operand, Sum>& engine) {
  const double rate = engine.rate / static_cast<double>(task.products.size());
  return task.channels_last && reads_directly(*engine.direct, sweep, task.source) &&
         direct_pays(sweep, task.input_parts, task.output_parts, tiling_of(*engine.tile), rate);
}

template <typename Operand, typename Sum, typename Epilogue>
void run_directly(const Task& task, const Sweep& sweep, const Engine<Operand, Sum>& engine, const Sum* start,
                  const Epilogue& epilogue, ParallelFor parallel_for) {
  const DirectKernel<Sum>& kernel = *engine.direct;
  const DirectPlan plan = make_direct_plan(ascending(sweep), task.input_parts, task.output_parts, kernel.lanes, sizeof(Sum));
  const auto weights = direct_weights(task.filter, task.use, plan, *engine.loops, parallel_for);
  const DirectRunner<Sum, Epilogue> runner(plan, kernel, task.source, weights->template as<Sum>(), start, epilogue);
  parallel(parallel_for, runner.items(), [&](int64_t begin, int64_t end) { runner.run(begin, end); });
}

template <typename Operand, typename Sum, typename Epilogue>
void run_packed(const Task& task, const std::vector<Sweep>& sweeps, const Engine<Operand, Sum>& engine, const Sum* start,
                const Epilogue& epilogue, ParallelFor parallel_for) {
  if (sweeps.empty()) return;
  const bool is_column = engine.column != nullptr && sweeps[0].c_out * task.output_parts <= engine.column->channels;
  const MicroKernel<Operand, Sum>& tile = is_column ? *engine.column : *engine.tile;
  const Tiling tiling = tiling_of(tile);
  const auto run_tiles = [&](const std::vector<Sweep>& tiled) {
    const Plans plans = make_plans(tiled, task.input_parts, task.output_parts, task.products, tiling);
    run_plans<Operand, Sum>(task, plans, tile, *engine.loops, start, epilogue, parallel_for);
  };
  if (const auto* groups = groups_kernel(sweeps[0], task.output_parts, task.products, engine)) {
    Tiling tiling = tiling_of(*groups);
    tiling.lanes = Lanes::Groups;
    const Plans plans = make_plans(sweeps, task.input_parts, task.output_parts, ieee().forward, tiling);
    return run_plans<Sum, Sum>(task, plans, *groups, *engine.loops, start, epilogue, parallel_for);
  }
  std::vector<Sweep> planar, tiled;
  for (const Sweep& sweep : sweeps) {
    if (runs_planar(sweep, task.output_parts, task.products, engine))
      planar.push_back(sweep);
    else if (has_windows(sweep, task.input_parts, task.products, tiling))
      run_tiles({sweep});
    else
      tiled.push_back(sweep);
  }
  if (!tiled.empty()) run_tiles(tiled);
  if (planar.empty()) return;
  const int channels = planar_channels(planar[0], task.output_parts, PlanarKernel<Sum, Sum>::kMaxChannels);
  if (multiplies_pairs(planar[0], task.products, engine)) {
    const Tiling pairs{Lanes::Positions, channels, 2, 2, sizeof(Operand)};
    const Plans plans = make_plans(planar, task.input_parts, task.output_parts, task.products, pairs);
    run_plans<Operand, Sum>(task, plans, *engine.pairs, *engine.loops, start, epilogue, parallel_for);
  } else {
    const Tiling whole{Lanes::Positions, channels, 1, 1, sizeof(Sum)};
    const Plans plans = make_plans(planar, task.input_parts, task.output_parts, ieee().forward, whole);
    run_plans<Sum, Sum>(task, plans, *engine.planar, *engine.loops, start, epilogue, parallel_for);
  }
}

// What cannot be trusted is computed again by definition: position by position, or the whole example where that is much of it.
template <typename Operand, typename Epilogue>
class Definition {
 public:
  Definition(const Task& task, const Sweep& sweep, const Engine<Operand, float>& engine, const float* start,
             const Epilogue& epilogue, ParallelFor parallel_for)
      : task_(task), sweep_(sweep), engine_(engine), start_(start), epilogue_(epilogue), parallel_for_(parallel_for) {}

  // Items of a plan of single positions.
  void replace(const std::vector<int64_t>& items) const {
    if (items.empty()) return;
    const Plans single = plans(Cut::SinglePositions);
    const int64_t of_example = items_of_example(single);
    std::vector<int64_t> counts(static_cast<size_t>(sweep_.n)), few;
    for (int64_t item : items) ++counts[item / of_example];
    for (int64_t item : items)
      if (counts[item / of_example] <= of_example / kManyDistrusted) few.push_back(item);
    std::sort(few.begin(), few.end(), [&](int64_t a, int64_t b) {  // neighbours share weights, which are more than what they read
      const int64_t blocks = single.slab.channel_blocks;
      return std::pair(a % blocks, a / blocks) < std::pair(b % blocks, b / blocks);
    });
    if (!few.empty())
      run(single, [&](const auto& runner) {
        parallel(parallel_for_, static_cast<int64_t>(few.size()), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) runner.run(few[i], few[i] + 1);
        });
      });
    if (few.size() == items.size()) return;
    const Plans whole = plans(Cut::OfOneExample);
    run(whole, [&](const auto& runner) {
      for (int64_t n = 0; n < sweep_.n; ++n) {
        if (counts[n] <= of_example / kManyDistrusted) continue;
        const int64_t first = n * items_of_example(whole);
        parallel(parallel_for_, items_of_example(whole),
                 [&](int64_t begin, int64_t end) { runner.run(first + begin, first + end); });
      }
    });
  }

 private:
  Plans plans(Cut cut) const {
    return make_plans({sweep_}, task_.input_parts, task_.output_parts, task_.products, tiling_of(*engine_.tile, cut));
  }

  int64_t items_of_example(const Plans& plans) const { return plans.slab.slabs() / sweep_.n * plans.slab.channel_blocks; }

  template <typename Body>
  void run(const Plans& plans, Body body) const {
    with_runner<Operand>(task_, plans, *engine_.tile, *engine_.loops, start_, epilogue_, parallel_for_, body);
  }

  const Task& task_;
  const Sweep& sweep_;
  const Engine<Operand, float>& engine_;
  const float* start_;
  const Epilogue& epilogue_;
  ParallelFor parallel_for_;
};

template <typename Operand, typename Epilogue>
void run_winograd(const Task& task, const Sweep& sweep, const Engine<Operand, float>& engine, const float* start,
                  const Epilogue& epilogue, ParallelFor parallel_for) {
  const WinogradPlan plan =
      make_winograd_plan(sweep, task.input_parts, task.output_parts, tiling_of(*engine.tile), engine.winograd->lanes);
  const auto weights = winograd_weights(task.filter, task.use, plan, *engine.winograd, *engine.loops, parallel_for);
  WinogradRunner<Operand, Epilogue> runner(plan, *engine.tile, *engine.winograd, *engine.loops, task.source,
                                           weights->template as<Operand>(), start, epilogue);
  parallel(parallel_for, runner.items(), [&](int64_t begin, int64_t end) { runner.run(begin, end); });
  Definition<Operand, Epilogue>(task, sweep, engine, start, epilogue, parallel_for).replace(runner.distrusted());
}

template <typename Operand, typename Sum, typename Epilogue>
void run_task(const Task& task, const Engine<Operand, Sum>& engine, const Sum* start, const Epilogue& epilogue,
              ParallelFor parallel_for) {
  std::vector<Sweep> packed;
  for (const Sweep& whole : task.sweeps) {
    const Sweep sweep = reaching(whole);
    if (runs_directly(task, sweep, engine)) {
      run_directly(task, sweep, engine, start, epilogue, parallel_for);
      continue;
    }
    if constexpr (std::is_same_v<Sum, float>) {
      if (task.transformed && groups_kernel(sweep, task.output_parts, task.products, engine) == nullptr &&
          winograd_pays(sweep, task.input_parts, task.output_parts, tiling_of(*engine.tile))) {
        run_winograd(task, sweep, engine, start, epilogue, parallel_for);
        continue;
      }
    }
    packed.push_back(sweep);
  }
  run_packed(task, packed, engine, start, epilogue, parallel_for);
}

// Relevance of positions that no window reaches, u * 0, written row by row to all positions: phases without taps would each
// write every second position or fewer.
template <typename Sum>
void share_nothing(const Conv3d& conv, const Loops<Sum>& loops, const Source& source, const View& out, const int64_t* stored,
                   bool stream, ParallelFor parallel_for) {
  const Share<Sum> share{loops, source, out, stored, stream};
  const int64_t row = conv.in[2] * conv.c_in;
  parallel(parallel_for, conv.n * conv.in[0] * conv.in[1], [&](int64_t begin, int64_t end) {
    const std::vector<Sum> zeros(static_cast<size_t>(row), Sum(0));
    std::vector<Sum> room(static_cast<size_t>(kEpilogueBlocks * row));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i % conv.in[1], t = i / conv.in[1] % conv.in[0], n = i / conv.in[1] / conv.in[0];
      share(Spot{n, 0, t, h, 0, conv.in[2], conv.c_in, 1, false}, Sums<Sum>{zeros.data(), conv.c_in, 0, room.data()});
    }
    settle_streams();
  });
}

// Whether a result had better be written past the caches.
bool is_big(int64_t channels, const int64_t (&size)[3], Element element) {
  return channels * size[0] * size[1] * size[2] * element_bytes(element) >= kStreamedBytes;
}

View skip_examples(View view, Element element, int64_t n) {
  view.data = static_cast<char*>(view.data) + n * view.stride[0] * element_bytes(element);
  return view;
}

// Which times some examples of a frozen clip's layer read and give to; empty where stride and padding say so.
struct InTime {
  TimeSums reads, gives;
  std::vector<int64_t> stored;  // at which time of the input each time of the result is kept
};

// How many examples from n on have the same rows of tables.
int64_t alike(const Conv3d& conv, const TimeTable& reads, const TimeTable& gives, int64_t n) {
  const auto is_like_it = [&](const TimeTable& table, int64_t other) {
    const int64_t* const row = table.row(conv, n);
    return row == nullptr || std::equal(row, row + conv.out[0] * conv.kernel[0], table.row(conv, other));
  };
  int64_t end = n + 1;
  while (end < conv.n && is_like_it(reads, end) && is_like_it(gives, end)) ++end;
  return end - n;
}

InTime in_time(const Conv3d& conv, const TimeTable& reads, const TimeTable& gives, int64_t n) {
  InTime found;
  const int64_t* const read = reads.row(conv, n);
  std::vector<Reach> reaches;
  for (int64_t out = 0; out < conv.out[0]; ++out)
    for (int64_t tap = 0; tap < conv.kernel[0]; ++tap)
      if (const int64_t in = read[out * conv.kernel[0] + tap]; in >= 0) reaches.push_back({tap, in, out});
  found.reads = time_sums(reaches, conv.kernel[0], conv.out[0]);
  if (gives.data == nullptr) return found;

  const int64_t* const given = gives.row(conv, n);
  found.stored.assign(static_cast<size_t>(conv.in[0]), 0);  // what is read where nothing is given does not matter
  reaches.clear();
  for (int64_t out = 0; out < conv.out[0]; ++out)
    for (int64_t tap = 0; tap < conv.kernel[0]; ++tap) {
      const int64_t at = out * conv.kernel[0] + tap;
      if (read[at] < 0 || given[at] < 0) continue;
      reaches.push_back({tap, out, given[at]});
      found.stored[given[at]] = read[at];
    }
  found.gives = time_sums(reaches, conv.kernel[0], conv.in[0]);
  return found;
}

Sweep by_table(Sweep sweep, const Conv3d& conv, const TimeSums& sums) {
  sweep.taps[0] = conv.kernel[0];
  sweep.base[0] = sweep.first_tap[0] = 0;
  sweep.step[0] = sweep.tap_skip[0] = 1;
  sweep.in_time = &sums;
  return sweep;
}

// Whether the adjoint reads nothing of s but its nearest bfloat16, however s is kept: where it adds several times up, or
// multiplies whole numbers, it reads all of it.
template <typename Operand, typename Sum>
bool reads_rounded_shares(const Conv3dRelevance& problem, const std::vector<InTime>& times, const Arithmetic& arithmetic,
                          const Engine<Operand, Sum>& engine) {
  if constexpr (!std::is_same_v<Operand, bfloat16>) return false;
  if (arithmetic.transformed) return false;  // what is rounded are the transformed numbers
  const auto& products = arithmetic.adjoint;
  const auto is_rounded = [](const Product& product) { return product.operand == Digit::High; };
  const auto reads_all = [&](const Sweep& whole) {
    const Sweep phase = reaching(whole);
    const int output_parts = parts(problem.lift);
    return groups_kernel(phase, output_parts, products, engine) != nullptr ||
           (runs_planar(phase, output_parts, products, engine) && !multiplies_pairs(phase, products, engine));
  };
  const auto adds_up = [](const InTime& example) {
    const auto& frames = example.gives.frames;
    return std::any_of(frames.begin(), frames.end(), [](const auto& frame) { return frame.size() > 1; });
  };
  const std::vector<Sweep> phases = adjoint_sweeps(problem.conv);
  return std::all_of(products.begin(), products.end(), is_rounded) && std::none_of(phases.begin(), phases.end(), reads_all) &&
         std::none_of(times.begin(), times.end(), adds_up);
}

// A linear layer's weights: where an arithmetic takes nothing of them but their nearest bfloat16s, these, which are half as many
// bytes.
template <typename Operand, typename Sum, typename Problem>
LinearWeights linear_weights(const Problem& problem, const Arithmetic& arithmetic, const Loops<Sum>& loops,
                             ParallelFor parallel_for) {
  if constexpr (std::is_same_v<Operand, bfloat16>) {
    const auto is_rounded = [](const Product& product) { return product.weight == Digit::High; };
    const auto are_rounded = [&](const auto& pass) { return std::all_of(pass.begin(), pass.end(), is_rounded); };
    if (problem.element == Element::Float32 && are_rounded(arithmetic.forward) && are_rounded(arithmetic.adjoint)) {
      const Filter whole = filter(loops, problem.conv, problem.element, problem.weight, parallel_for);
      const auto rounded = rounded_weights(whole, loops, parallel_for);
      return {rounded->template as<char>(), Element::BFloat16, rounded};
    }
  }
  return {static_cast<const char*>(problem.weight), problem.element, nullptr};
}

template <typename Operand, typename Sum>
void relevance(const Conv3dRelevance& problem, const Engine<Operand, Sum>& engine, const Arithmetic& arithmetic,
               ParallelFor parallel_for) {
  constexpr Element sum = element_of<Sum>();
  const Loops<Sum>& loops = *engine.loops;
  std::vector<Sum> bias = bias_of(loops, problem.conv, problem.element, problem.bias);
  loops.lift(Lift::Signed, 0, 1, problem.conv.c_out, bias.data(), nullptr, bias.data(), 0);
  const bool has_tables = problem.reads.data != nullptr;
  if (!has_tables && is_linear(problem.conv)) {
    const Source x{problem.x, problem.element, problem.lift, problem.low, problem.high};
    const LinearWeights weights = linear_weights<Operand>(problem, arithmetic, loops, parallel_for);
    return LinearLayer<Sum>(problem.conv, problem.element, weights, bias.data(), loops, parallel_for)
        .relevance(x, problem.relevance, static_cast<Sum>(problem.stabilizer), problem.divided, problem.out);
  }

  const Filter weights = filter(loops, problem.conv, problem.element, problem.weight, parallel_for);
  const int64_t* out = problem.conv.out;
  const int64_t positions = out[0] * out[1] * out[2], c_out = problem.conv.c_out;
  const bool of_each = problem.reads.of_each_example || problem.gives.of_each_example;
  std::vector<InTime> times(has_tables ? (of_each ? problem.conv.n : 1) : 0);
  for (size_t n = 0; n < times.size(); ++n)
    times[n] = in_time(problem.conv, problem.reads, problem.gives, static_cast<int64_t>(n));
  const Element kept = !problem.divided && reads_rounded_shares(problem, times, arithmetic, engine) ? Element::BFloat16 : sum;
  // Positions begin with cache lines.
  const int64_t of_line = kLineBytes / element_bytes(kept), pitch = round_up(c_out, of_line);
  const int64_t example_bytes = std::max<int64_t>(positions * pitch * element_bytes(kept), 1);
  const bool stream = is_big(problem.conv.n * problem.conv.c_in, problem.conv.in, sum);
  const int64_t together = problem.divided
                               ? problem.conv.n
                               : std::clamp<int64_t>(kSharesBytes / example_bytes, 1, std::max<int64_t>(problem.conv.n, 1));
  const auto run_from = [&](int64_t n) { return std::min(together, alike(problem.conv, problem.reads, problem.gives, n)); };
  int64_t longest = 0;
  for (int64_t n = 0; n < problem.conv.n; n += run_from(n)) longest = std::max(longest, run_from(n));
  const Workspace workspace(problem.divided ? 0 : static_cast<size_t>(longest * example_bytes));

  Conv3d conv = problem.conv;
  for (int64_t n = 0; n < problem.conv.n; n += conv.n) {
    conv.n = run_from(n);
    const Source x{skip_examples(problem.x, problem.element, n), problem.element, problem.lift,
                   skip_examples(problem.low, sum, n), skip_examples(problem.high, sum, n)};
    const View given = skip_examples(problem.relevance, sum, n);
    const View channels_last{workspace.as<void>(), {positions * pitch, 1, out[1] * out[2] * pitch, out[2] * pitch, pitch}};
    const Source shares{problem.divided ? given : channels_last, kept, Lift::None, {}, {}};
    const InTime* const here = has_tables ? &times[of_each ? n : 0] : nullptr;
    const int64_t* const stored = has_tables ? here->stored.data() : nullptr;

    if (!problem.divided) {
      const Divide<Sum> divide{
          loops, given, channels_last, kept, static_cast<Sum>(problem.stabilizer), is_big(conv.n * c_out, conv.out, kept)};
      const Sweep all = has_tables ? by_table(forward_sweep(conv), conv, here->reads) : forward_sweep(conv);
      const Task denominator{{all},         arithmetic.forward,     parts(problem.lift), 1, x, weights,
                             {false, true}, arithmetic.transformed, given.stride[1] == 1};
      run_task(denominator, engine, problem.bias != nullptr ? bias.data() : nullptr, divide, parallel_for);
    }
    const std::vector<Sweep> phases = adjoint_sweeps(conv);
    const auto has_no_taps = [](const Sweep& sweep) { return sweep.taps[0] * sweep.taps[1] * sweep.taps[2] == 0; };
    if (std::any_of(phases.begin(), phases.end(), has_no_taps))
      share_nothing(conv, loops, x, skip_examples(problem.out, sum, n), stored, stream, parallel_for);
    const Share<Sum> share{loops, x, skip_examples(problem.out, sum, n), stored, stream};
    Task pull{{},
              arithmetic.adjoint,
              1,
              parts(problem.lift),
              shares,
              weights,
              {true, true},
              arithmetic.transformed,
              problem.out.stride[1] == 1};
    for (const Sweep& phase : phases)
      if (!has_no_taps(phase)) pull.sweeps.push_back(has_tables ? by_table(phase, conv, here->gives) : phase);
    run_task(pull, engine, static_cast<const Sum*>(nullptr), share, parallel_for);
  }
}

// What transforms on the way forward, of all arithmetics: signed sums cancel, and what is rounded of transformed numbers is of
// the size of the largest nearby.
Engine<float, float> floats_of(const Engine<bfloat16, float>& engine) {
  for (const Engine<float, float>& found : engines<float, float>())
    if (found.loops == engine.loops) return found;
  throw std::logic_error("an instruction set for bfloat16 multiplies floats, too");
}

template <typename Operand, typename Sum>
void forward(const Conv3dForward& problem, const Engine<Operand, Sum>& engine, const Arithmetic& arithmetic,
             ParallelFor parallel_for) {
  const Loops<Sum>& loops = *engine.loops;
  const std::vector<Sum> bias = bias_of(loops, problem.conv, problem.element, problem.bias);
  const bool has_table = problem.reads.data != nullptr;
  if (!has_table && is_linear(problem.conv)) {
    const LinearWeights weights = linear_weights<Operand>(problem, arithmetic, loops, parallel_for);
    return LinearLayer<Sum>(problem.conv, problem.element, weights, bias.data(), loops, parallel_for)
        .forward(problem.x, problem.out, problem.relu);
  }

  const Filter weights = filter(loops, problem.conv, problem.element, problem.weight, parallel_for);
  const bool stream = is_big(problem.conv.n * problem.conv.c_out, problem.conv.out, problem.element);
  Conv3d conv = problem.conv;
  for (int64_t n = 0; n < problem.conv.n; n += conv.n) {
    conv.n = alike(problem.conv, problem.reads, {}, n);
    const Source x{skip_examples(problem.x, problem.element, n), problem.element, Lift::None, {}, {}};
    const Keep<Sum> keep{loops, skip_examples(problem.out, problem.element, n), problem.element, problem.relu, stream};
    const InTime times = has_table ? in_time(conv, problem.reads, {}, n) : InTime{};
    const Sweep sweep = has_table ? by_table(forward_sweep(conv), conv, times.reads) : forward_sweep(conv);
    const Sum* const start = problem.bias != nullptr ? bias.data() : nullptr;
    const Use use{false, false};
    const bool channels_last = problem.out.stride[1] == 1;
    constexpr bool kIsRounded = std::is_same_v<Operand, bfloat16>;
    if constexpr (kIsRounded) {
      if (arithmetic.transformed) {
        const Engine<float, float> floats = floats_of(engine);
        if (winograd_pays(sweep, 1, 1, tiling_of(*floats.tile))) {
          run_task({{sweep}, ieee().forward, 1, 1, x, weights, use, true, channels_last}, floats, start, keep, parallel_for);
          continue;
        }
      }
    }
    const Task task{{sweep}, arithmetic.forward, 1, 1, x, weights, use, arithmetic.transformed && !kIsRounded, channels_last};
    run_task(task, engine, start, keep, parallel_for);
  }
}

// Kernels go along W. Where that is no axis, another one takes its place: the filter's memory stays as it is.
template <typename Problem>
Problem along_width(Problem problem, std::initializer_list<View Problem::*> views) {
  Conv3d& conv = problem.conv;
  const auto is_none = [&](int a) { return conv.in[a] == 1 && conv.out[a] == 1 && conv.kernel[a] == 1 && conv.padding[a] == 0; };
  if (problem.reads.data != nullptr || !is_none(2)) return problem;
  const int axis = is_none(1) ? 0 : 1;
  for (auto* numbers : {&conv.in, &conv.out, &conv.kernel, &conv.stride, &conv.padding, &conv.dilation})
    std::swap((*numbers)[axis], (*numbers)[2]);
  for (const auto view : views) std::swap((problem.*view).stride[2 + axis], (problem.*view).stride[4]);
  return problem;
}

}  // namespace

std::vector<std::string> conv3d_kernels(Element element) {
  std::vector<std::string> names;
  if (element == Element::Float64) {
    for (const auto& engine : engines<double, double>()) names.push_back(kernel_name(engine.tile->isa, ieee().name));
    return names;
  }
  for (const auto& engine : engines<float, float>())
    for (const Arithmetic& arithmetic : full_arithmetics()) names.push_back(kernel_name(engine.tile->isa, arithmetic.name));
  for (const auto& engine : engines<bfloat16, float>())
    for (const Arithmetic& arithmetic : bfloat16_arithmetics()) names.push_back(kernel_name(engine.tile->isa, arithmetic.name));
  return names;
}

void conv3d_relevance(const Conv3dRelevance& given, const std::string& kernel, ParallelFor parallel_for) {
  using P = Conv3dRelevance;
  const P problem = along_width(given, {&P::x, &P::low, &P::high, &P::relevance, &P::out});
  with_kernel(problem.element, kernel,
              [&](const auto& engine, const Arithmetic& arithmetic) { relevance(problem, engine, arithmetic, parallel_for); });
}

void conv3d_forward(const Conv3dForward& given, const std::string& kernel, ParallelFor parallel_for) {
  const Conv3dForward problem = along_width(given, {&Conv3dForward::x, &Conv3dForward::out});
  with_kernel(problem.element, kernel,
              [&](const auto& engine, const Arithmetic& arithmetic) { forward(problem, engine, arithmetic, parallel_for); });
}

}  // namespace captum_dtd::cpu
