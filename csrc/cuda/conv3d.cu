// Relevance of a convolution in two passes: the forward sweep leaves s = R / z in the workspace, the adjoint sweeps make
// u * adj(s) of it. The plain convolution is the forward sweep alone. Weights are packed before a pass and, where its depth
// is split, the splits added up after it.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "choice.h"
#include "conv3d.h"
#include "device.h"
#include "implicit_gemm.h"
#include "in_time.h"
#include "operands.h"
#include "pack.h"
#include "small_groups.h"

namespace captum_dtd::cuda {
namespace {

struct Kernel {
  const char* name;
  bool warpgroups;
  Arithmetic forward, adjoint;
};

constexpr Kernel kWarpgroupBf16x3{"wgmma/bf16x3", true, Arithmetic::BFloat16x3, Arithmetic::BFloat16x3};
constexpr Kernel kWarpgroupBf16{"wgmma/bf16", true, Arithmetic::BFloat16, Arithmetic::BFloat16};
constexpr Kernel kWarpgroupF16{"wgmma/f16", true, Arithmetic::Float16, Arithmetic::BFloat16x3};
constexpr Kernel kTf32x3{"cuda/tf32x3", false, Arithmetic::Tf32x3, Arithmetic::Tf32x3};
constexpr Kernel kTf32{"cuda/tf32", false, Arithmetic::Tf32, Arithmetic::Tf32};
constexpr Kernel kBf16{"cuda/bf16", false, Arithmetic::BFloat16, Arithmetic::BFloat16};
constexpr Kernel kF16{"cuda/f16", false, Arithmetic::Float16, Arithmetic::Tf32};

// Distances to a box may leave float16's range, though x is in it.
Arithmetic forward_arithmetic(const Kernel& kernel, Lift lift) {
  return lift == Lift::Box && kernel.forward == Arithmetic::Float16 ? kernel.adjoint : kernel.forward;
}

std::vector<Kernel> kernels_of(Element element) {
  const auto present = [warpgroups = warpgroups_serve()](std::initializer_list<Kernel> all) {
    std::vector<Kernel> found;
    for (const Kernel& kernel : all)
      if (!kernel.warpgroups || warpgroups) found.push_back(kernel);
    return found;
  };
  switch (element) {
    case Element::Float32: return present({kWarpgroupBf16x3, kTf32x3, kTf32, kWarpgroupBf16, kBf16});
    case Element::BFloat16: return present({kWarpgroupBf16, kBf16, kTf32, kWarpgroupBf16x3, kTf32x3});
    case Element::Float16: return present({kWarpgroupF16, kF16, kTf32, kWarpgroupBf16x3, kTf32x3});
    case Element::Float64: break;
  }
  return {};
}

Kernel kernel_named(const std::string& name, Element element) {
  std::string known;
  for (const Kernel& kernel : kernels_of(element)) {
    if (kernel.name == name) return kernel;
    known += std::string(known.empty() ? "" : ", ") + kernel.name;
  }
  throw std::invalid_argument("no CUDA convolution kernel is named " + name + " for this type; there are: " + known);
}

// Bytes of a channel in an operand, and how many channels make whole chunks.
int operand_bytes(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::BFloat16 || arithmetic == Arithmetic::Float16 ? 2 : 4;
}

int channels_together(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::Tf32 || arithmetic == Arithmetic::Tf32x3 ? 4 : 8;
}

int64_t volume(const int64_t (&size)[3]) { return size[0] * size[1] * size[2]; }

// ------------------------------------------------------------------------------------------------ the choice of tiles

using Large = WarpTile<128, 128, 64, 32>;
using Medium = WarpTile<128, 64, 32, 32>;
using Small = WarpTile<64, 64, 32, 32>;
using Narrow = WarpTile<128, 16, 16, 16>;

template <typename Arithmetic>
std::vector<Choice> choices(bool lifts) {
  constexpr bool kSplits = kSame<Arithmetic, Tf32x3>;
  if (lifts) return {choice<Arithmetic, Small, LiftingLoader>(kSplits ? 470 : 1100)};
  std::vector<Choice> all = {choice<Arithmetic, Small, DenseLoader>(kSplits ? 470 : 1100),
                             choice<Arithmetic, Narrow, DenseLoader>(kSplits ? 200 : 350)};
  // Two sets of sums and split operands leave no registers for larger tiles.
  if constexpr (!kSplits) {
    all.push_back(choice<Arithmetic, Large, DenseLoader>(1150));
    all.push_back(choice<Arithmetic, Medium, DenseLoader>(830));
  }
  return all;
}

std::vector<Choice> choices(bool warpgroups, Arithmetic arithmetic, bool lifts) {
  if (warpgroups) return warpgroup_choices(arithmetic);
  switch (arithmetic) {
    case Arithmetic::Tf32: return choices<Tf32>(lifts);
    case Arithmetic::Tf32x3: return choices<Tf32x3>(lifts);
    case Arithmetic::BFloat16: return choices<Bf16>(lifts);
    default: return choices<F16>(lifts);
  }
}

constexpr int64_t kMultiprocessors = 132;

// About how many clocks a sweep takes: blocks come in waves, each of which multiplies its stages, and begins and ends; splits
// are written, read and added up.
double clocks(const Choice& c, const std::vector<int64_t>& rows_of_phases, int64_t columns, int64_t groups, int64_t stages,
              int splits) {
  constexpr double kBytesPerClock = 16;  // of a multiprocessor
  const double area = double(c.tiling.rows) * c.tiling.columns;
  int64_t rows = 0, tiles = 0;
  for (int64_t of_phase : rows_of_phases) {
    rows += of_phase;
    tiles += ceil_div(of_phase, c.tiling.rows);
  }
  const int64_t blocks = tiles * ceil_div(columns, c.tiling.columns) * groups * splits;
  const int64_t waves = ceil_div(blocks, kMultiprocessors * c.blocks), of_split = ceil_div(stages, splits);
  const double of_block = of_split * area * c.stage_chunks * kChunk / c.rate + 2000 + area / 4;
  const double bytes_of_splits = splits > 1 ? 2.0 * sizeof(float) * splits * rows * columns * groups : 0;
  return waves * c.blocks * of_block + bytes_of_splits / kMultiprocessors / kBytesPerClock + (splits > 1 ? 4000 : 0);
}

// The tile and the splits of the depth that should take least. It depends on shapes and tables alone, so that results are the
// same on every device that has the kernel.
Choice choose(const std::vector<Choice>& all, const std::vector<int64_t>& rows, int64_t columns, int64_t groups, int64_t stages,
              Tiling forced) {
  constexpr int kMostSplits = 8;
  Choice best{};
  double least = 0;
  for (Choice c : all) {
    if (forced.rows != 0 && (c.tiling.rows != forced.rows || c.tiling.columns != forced.columns)) continue;
    for (int splits = 1; splits <= std::min<int64_t>(kMostSplits, std::max<int64_t>(stages, 1)); ++splits) {
      const double expected = clocks(c, rows, columns, groups, stages, splits);
      if (best.kernel != nullptr && expected >= least) continue;
      best = c;
      best.tiling.splits = splits;
      least = expected;
    }
  }
  if (best.kernel == nullptr) throw std::invalid_argument("this kernel has no such tile");
  if (forced.splits != 0) best.tiling.splits = forced.splits;
  return best;
}

// ------------------------------------------------------------------------------------------------ plans

// What both passes know of a convolution.
struct Layer {
  Conv3d conv;
  const void* weight;
  Lifted u;
  bool clips;  // its weights, to their positive and negative parts
  bool divided;
  TimeTables in_time;

  bool lifts() const { return u.lift != Lift::None; }
  // Whether quotients are computed here, and those of several times added up before they are pulled back.
  bool adds_quotients() const { return !divided && !in_time.members.empty(); }
  // Times of x, as far as they are read.
  int64_t times_of_x() const { return in_time.used() ? std::max<int64_t>(in_time.times_of_x, 1) : conv.in[0]; }
  // What is pulled back has other times than the output, where they are added up.
  int64_t frames() const { return in_time.used() ? in_time.frames : conv.out[0]; }
};

// All sweeps forward, or all of the adjoint, and what they share. Where tables say what is read, there is one for each pattern,
// over the pattern's slots in place of times.
struct Pass {
  Slots slots;
  std::vector<Sweep> sweeps;
  bool is_adjoint;
  Arithmetic arithmetic;
  int column_parts, depth_parts;  // how often a channel stands there: once for each part of its lift
  int64_t columns, width;         // of one group: computed, and written by the epilogue
  int64_t padded;                 // channels read for each tap, padded to whole chunks
  int stage_chunks;
  Choice choice;

  int64_t tap_chunks() const { return padded * operand_bytes(arithmetic) / kChunk; }
  int64_t stages(const Sweep& s) const { return ceil_div(volume(s.taps) * tap_chunks(), stage_chunks); }
  int64_t packed_columns() const { return round_up(columns, choice.tiling.columns); }
  int64_t weight_chunks(const Sweep& s) const { return s.groups * stages(s) * packed_columns() * stage_chunks; }
  int64_t rows(const Sweep& s) const { return s.n * volume(s.grid); }
  int64_t work(const Sweep& s) const { return rows(s) * stages(s); }
  const Pattern* pattern(size_t sweep) const {
    return slots.patterns.empty() ? nullptr : &slots.patterns[sweep % slots.patterns.size()];
  }

  template <typename Number>
  int64_t sum(Number number) const {
    int64_t total = 0;
    for (const Sweep& s : sweeps) total += (this->*number)(s);
    return total;
  }

  // Of one launch.
  int64_t most_weight_chunks() const {
    int64_t most = 0;
    for (size_t first = 0; first < sweeps.size(); first += kMaxPhases) {
      int64_t chunks = 0;
      for (size_t i = first; i < std::min<size_t>(first + kMaxPhases, sweeps.size()); ++i) chunks += weight_chunks(sweeps[i]);
      most = std::max(most, chunks);
    }
    return most;
  }

  int64_t partial_bytes() const {
    const int64_t splits = choice.tiling.splits;
    return splits == 1 ? 0 : splits * sum(&Pass::rows) * sweeps.front().groups * width * static_cast<int64_t>(sizeof(float));
  }
};

std::vector<Sweep> of_each_pattern(const std::vector<Sweep>& sweeps, const Slots& slots) {
  std::vector<Sweep> found;
  for (const Sweep& sweep : sweeps)
    for (const Pattern& pattern : slots.patterns) {
      Sweep s = sweep;
      s.n = slots.repeats;
      s.grid[0] = pattern.slots;
      s.taps[0] = slots.taps_of(pattern);
      found.push_back(s);
    }
  return found;
}

// `width_multiple`: to which the epilogue pads its columns.
Pass make_pass(const Layer& layer, bool is_adjoint, bool warpgroups, Arithmetic arithmetic, int64_t width_multiple,
               Tiling tiling) {
  Pass pass{};
  pass.is_adjoint = is_adjoint;
  pass.sweeps = is_adjoint ? adjoint_sweeps(layer.conv) : std::vector<Sweep>{forward_sweep(layer.conv)};
  if (const TimeTables& tables = layer.in_time; tables.used()) {
    const bool merged = arithmetic == Arithmetic::BFloat16x3 || arithmetic == Arithmetic::Tf32x3;
    pass.slots = is_adjoint ? slots_of(tables.gathers, tables.rows, tables.times, tables.taps, layer.conv.n, merged)
                            : slots_of(tables.reads, tables.rows, tables.outputs, tables.taps, layer.conv.n, merged);
    pass.sweeps = of_each_pattern(pass.sweeps, pass.slots);
  }
  pass.arithmetic = arithmetic;
  pass.column_parts = is_adjoint ? parts(layer.u.lift) : 1;
  pass.depth_parts = is_adjoint ? 1 : parts(layer.u.lift);
  const int64_t together = channels_together(arithmetic);
  const Sweep& any = pass.sweeps.front();
  const bool lifts = !is_adjoint && layer.lifts() && !warpgroups;
  const std::vector<Choice> all = choices(warpgroups, arithmetic, lifts);
  pass.stage_chunks = all.front().stage_chunks;  // of all of them
  pass.columns = any.c_out * pass.column_parts;
  pass.width = round_up(pass.columns, width_multiple);
  pass.padded = round_up(any.c_in * pass.depth_parts, together);
  int64_t most_stages = 0;
  for (const Sweep& s : pass.sweeps) most_stages = std::max(most_stages, pass.stages(s));
  if (std::max({pass.width, pass.padded, most_stages}) > INT32_MAX / pass.stage_chunks)
    throw std::invalid_argument("this convolution has more channels or taps than its CUDA kernels can count");
  for (const Sweep& s : pass.sweeps)
    if ((s.taps[1] - 1) * std::abs(s.step[1]) >= -kNowhere)
      throw std::invalid_argument("this convolution's windows are wider than its CUDA kernels can count");
  if (lifts) tiling.rows = tiling.columns = 0;  // there is but one tile
  std::vector<int64_t> rows;
  for (const Sweep& s : pass.sweeps) rows.push_back(pass.rows(s));
  const int64_t stages = ceil_div(pass.sum(&Pass::work), std::max<int64_t>(pass.sum(&Pass::rows), 1));
  pass.choice = choose(all, rows, pass.columns, any.groups, stages, tiling);
  return pass;
}

// A dense operand can be copied from x itself where its type is the operand's and 16 bytes of channels lie together.
bool is_dense(const Layer& layer, Arithmetic arithmetic) {
  if (arithmetic == Arithmetic::BFloat16x3) return false;
  const Element operand = arithmetic == Arithmetic::BFloat16  ? Element::BFloat16
                          : arithmetic == Arithmetic::Float16 ? Element::Float16
                                                              : Element::Float32;
  const int64_t elements = channels_together(arithmetic);
  const auto& stride = layer.u.x.stride;
  return layer.u.element == operand && layer.conv.c_in / layer.conv.groups % elements == 0 && stride[1] == 1 &&
         stride[0] % elements == 0 && stride[2] % elements == 0 && stride[3] % elements == 0 && stride[4] % elements == 0 &&
         reinterpret_cast<uintptr_t>(layer.u.x.data) % kChunk == 0;
}

// The passes, and where in the workspace their intermediates lie.
struct Plan {
  Pass forward, adjoint;
  bool arranges;  // x is copied to a dense operand first
  int64_t arranged, weights, s, quotients, tables, partial, bytes;
};

Plan make_plan(const Layer& layer, const Kernel& kernel, bool with_adjoint, Tiling tiling) {
  const Conv3d& conv = layer.conv;
  Plan plan{};
  plan.forward = make_pass(layer, false, kernel.warpgroups, forward_arithmetic(kernel, layer.u.lift),
                           with_adjoint ? channels_together(kernel.adjoint) : 4, tiling);
  if (with_adjoint) plan.adjoint = make_pass(layer, true, kernel.warpgroups, kernel.adjoint, 4, tiling);
  plan.arranges = layer.lifts() ? kernel.warpgroups : !is_dense(layer, kernel.forward);
  const auto reserve = [&plan](int64_t bytes) { return reserve_bytes(plan.bytes, bytes); };
  const Pass& forward = plan.forward;
  const Pass& widest = with_adjoint ? plan.adjoint : forward;
  plan.weights = reserve(std::max(forward.most_weight_chunks(), widest.most_weight_chunks()) * kChunk);
  plan.partial = reserve(std::max(forward.partial_bytes(), widest.partial_bytes()));
  const int64_t plane_in = conv.in[1] * conv.in[2], plane_out = conv.out[1] * conv.out[2];
  if (plan.arranges)
    plan.arranged = reserve(conv.n * layer.times_of_x() * plane_in * conv.groups * forward.tap_chunks() * kChunk);
  const int64_t s_channels = conv.groups * forward.width;
  if (with_adjoint) plan.s = reserve(conv.n * layer.frames() * plane_out * s_channels * operand_bytes(kernel.adjoint));
  if (layer.adds_quotients())
    plan.quotients = reserve(conv.n * conv.out[0] * plane_out * s_channels * static_cast<int64_t>(sizeof(float)));
  const int64_t more_numbers = static_cast<int64_t>(layer.in_time.stored.size() + layer.in_time.members.size());
  plan.tables =
      reserve(forward.slots.bytes() + plan.adjoint.slots.bytes() + more_numbers * static_cast<int64_t>(sizeof(int16_t)));
  return plan;
}

// ------------------------------------------------------------------------------------------------ launches

constexpr int kThreads = 256;  // of the kernels that work on one element each

// One of a kernel's instances.
#define CAPTUM_DTD_FOR_OPERAND(kernel, arithmetic, ...)                       \
  ((arithmetic) == Arithmetic::BFloat16     ? kernel<bfloat16, 1 __VA_ARGS__> \
   : (arithmetic) == Arithmetic::BFloat16x3 ? kernel<bfloat16, 2 __VA_ARGS__> \
   : (arithmetic) == Arithmetic::Float16    ? kernel<float16, 1 __VA_ARGS__>  \
                                            : kernel<float, 1 __VA_ARGS__>)

// Copies what `arrange` names to a dense operand of so many examples and positions.
void launch_arrange(Arrange arrange, int64_t n, const int64_t (&size)[3], Arithmetic arithmetic, void* stream) {
  arrange.n = static_cast<int>(n);
  copy(size, arrange.size);
  const int64_t channels = int64_t(arrange.groups) * arrange.padded, *stride = arrange.x.stride;
  if (arrange.padded == arrange.channels && (arrange.groups == 1 || arrange.group_stride == arrange.channels) &&
      (size[2] == 1 || stride[4] == channels) && (size[1] == 1 || stride[3] == size[2] * channels) &&
      has_quads(arrange.x, arrange.element)) {
    const int64_t chunks = size[1] * size[2] * channels * operand_bytes(arithmetic) / kChunk;
    dim3 grid = blocks_for(arithmetic == Arithmetic::BFloat16x3 ? chunks / 2 : chunks, kThreads);
    grid.y = static_cast<unsigned>(std::min<int64_t>(n * size[0], UINT16_MAX));
    launch("arrange_planes", CAPTUM_DTD_FOR_OPERAND(arrange_planes, arithmetic), grid, kThreads, 0, stream, arrange);
    return;
  }
  dim3 grid = blocks_for(n * volume(size), kSide);
  grid.y = blocks_for(channels, kSide).x;
  if (grid.y > UINT16_MAX) throw std::invalid_argument("this convolution has more channels than its CUDA kernels can count");
  const auto kernel = stride[1] == 1 ? CAPTUM_DTD_FOR_OPERAND(arrange_input, arithmetic, , true)
                                     : CAPTUM_DTD_FOR_OPERAND(arrange_input, arithmetic, , false);
  launch("arrange_input", kernel, grid, kThreads, 0, stream, arrange);
}

// Writes both parts of an input to a dense operand.
void launch_lift(const Lifted& u, int64_t n, const int64_t (&size)[3], int64_t channels, int64_t groups, const Pass& pass,
                 void* out, void* stream) {
  LiftInput input{};
  input.u = u;
  input.n = static_cast<int>(n);
  copy(size, input.size);
  input.channels = static_cast<int>(channels / groups);
  input.chunks = static_cast<int>(pass.padded / channels_together(pass.arithmetic));
  input.groups = static_cast<int>(groups);
  input.out = out;
  const dim3 grid = blocks_for(n * volume(size) * groups * input.chunks, kThreads);
  launch("lift_input", CAPTUM_DTD_FOR_OPERAND(lift_input, pass.arithmetic), grid, kThreads, 0, stream, input);
}

// A tensor's channels, to be padded in each group.
Arrange arrangement(const View& x, Element element, int64_t channels, int64_t groups, int64_t padded, void* out) {
  Arrange arrange{};
  arrange.x = x;
  arrange.element = element;
  arrange.channels = static_cast<int>(channels / groups);
  arrange.padded = static_cast<int>(padded);
  arrange.groups = static_cast<int>(groups);
  arrange.group_stride = channels / groups * x.stride[1];
  arrange.out = out;
  return arrange;
}

// Sweeps [first, first + gemm.phases) of a pass: packs their weights, multiplies, and adds the splits up.
void launch_phases(const Layer& layer, const Pass& pass, size_t first, Gemm gemm, unsigned char* packed, void* stream) {
  const Conv3d& conv = layer.conv;
  const Sweep& any = pass.sweeps.front();
  const Tiling& tiling = pass.choice.tiling;
  copy(any.in, gemm.in);
  copy(any.stride, gemm.stride);
  copy(any.out, gemm.out);
  copy(any.out_step, gemm.out_step);
  gemm.groups = static_cast<int>(conv.groups);
  gemm.channels_in = static_cast<int>(any.c_in);
  gemm.tap_chunks = static_cast<int>(pass.tap_chunks());
  gemm.columns = static_cast<int>(pass.columns);
  gemm.width = static_cast<int>(pass.width);
  gemm.column_tiles = static_cast<int>(ceil_div(pass.columns, tiling.columns));
  gemm.splits = tiling.splits;
  gemm.weights = packed;

  Weights weights{};
  weights.data = layer.weight;
  weights.element = layer.u.element;
  copy(conv.kernel, weights.filter);
  const int64_t taps = volume(conv.kernel), outwards = conv.c_in / conv.groups * taps;
  weights.group_stride = conv.c_out / conv.groups * outwards;
  weights.column_stride = pass.is_adjoint ? taps : outwards;
  weights.depth_stride = pass.is_adjoint ? outwards : taps;
  weights.columns = gemm.columns;
  weights.packed_columns = static_cast<int>(pass.packed_columns());
  weights.channels_in = gemm.channels_in;
  weights.tap_chunks = gemm.tap_chunks;
  weights.column_parts = pass.column_parts;
  weights.depth_parts = pass.depth_parts;
  weights.clips = layer.clips;
  weights.stage_chunks = pass.stage_chunks;
  weights.phases = gemm.phases;
  weights.packed = packed;

  int64_t rows = 0, tiles = 0;
  for (int p = 0; p < gemm.phases; ++p) {
    const Sweep& s = pass.sweeps[first + p];
    Phase& phase = gemm.phase[p];
    PackedPhase& packed_phase = weights.phase[p];
    copy(s.grid, phase.grid);
    copy(s.base, phase.base);
    copy(s.step, phase.step);
    copy(s.taps, phase.taps);
    copy(s.out_base, phase.out_base);
    copy(s.taps, packed_phase.taps);
    copy(s.first_tap, packed_phase.first_tap);
    copy(s.tap_skip, packed_phase.tap_skip);
    if (const Pattern* pattern = pass.pattern(first + p)) {
      phase.first_slot = pattern->first_slot;
      phase.first_frame = pattern->first_frame;
      packed_phase.adds_taps = pass.slots.taps == 0;
      std::copy(pattern->taps.begin(), pattern->taps.end(), packed_phase.sets);
    }
    phase.stages = packed_phase.stages = static_cast<int>(pass.stages(s));
    phase.rows = pass.rows(s);
    phase.first_row = rows;
    phase.first_tile = tiles;
    phase.weights = packed_phase.first_chunk = weights.chunks;
    rows += phase.rows;
    tiles += ceil_div(phase.rows, tiling.rows);
    weights.chunks += pass.weight_chunks(s);
  }

  if (weights.chunks > 0) {
    const auto pack = pass.arithmetic == Arithmetic::Tf32         ? pack_weights<tfloat32, 1>
                      : pass.arithmetic == Arithmetic::Tf32x3     ? pack_weights<float, 1>
                      : pass.arithmetic == Arithmetic::BFloat16   ? pack_weights<bfloat16, 1>
                      : pass.arithmetic == Arithmetic::BFloat16x3 ? pack_weights<bfloat16, 2>
                                                                  : pack_weights<float16, 1>;
    const int64_t halves = pass.arithmetic == Arithmetic::BFloat16x3 ? 2 : 1;
    launch("pack_weights", pack, blocks_for(weights.chunks / halves, kThreads), kThreads, 0, stream, weights);
  }
  dim3 grid = blocks_for(tiles * gemm.groups * gemm.column_tiles, 1);
  grid.y = static_cast<unsigned>(tiling.splits);
  launch("multiply_sweep", pass.choice.kernel, grid, pass.choice.threads, pass.choice.shared_bytes, stream, gemm);
  if (tiling.splits > 1)
    launch("add_splits", add_splits, blocks_for(rows * gemm.groups * gemm.width / 4, kThreads), kThreads, 0, stream, gemm);
}

// `gemm` says what is read and what the epilogue does; `neighbours` is the tensor whose layout decides the order of that.
void launch_pass(const Layer& layer, const Pass& pass, Gemm gemm, const View& neighbours, unsigned char* packed, void* stream) {
  gemm.along_rows = neighbours.stride[4] != 0 && neighbours.stride[4] < neighbours.stride[1];
  const bool adds = gemm.epilogue == Epilogue::Add, shares = gemm.epilogue == Epilogue::Share;
  gemm.in_quads = pass.columns % 4 == 0 && has_quads(neighbours, adds ? layer.u.element : Element::Float32) &&
                  (!shares || (!layer.lifts() && has_quads(layer.u.x, layer.u.element)));
  for (size_t first = 0; first < pass.sweeps.size(); first += kMaxPhases) {
    gemm.phases = static_cast<int>(std::min<size_t>(kMaxPhases, pass.sweeps.size() - first));
    launch_phases(layer, pass, first, gemm, packed, stream);
  }
}

// Channels-last memory (n, t, h, w, group, channel).
Dense dense_operand(const void* data, const int64_t (&size)[3], int64_t groups, int64_t group_bytes) {
  Dense dense{static_cast<const unsigned char*>(data), {0, 0, 0, groups * group_bytes}, group_bytes};
  for (int a = 2; a >= 0; --a) dense.stride[a] = dense.stride[a + 1] * size[a];
  return dense;
}

Form form_of(Arithmetic arithmetic) {
  if (arithmetic == Arithmetic::BFloat16x3) return Form::Halves;
  return arithmetic == Arithmetic::BFloat16 ? Form::Narrow : Form::Float;
}

// What the forward sweep reads: the lifted input, or x as a dense operand.
Gemm read_input(const Layer& layer, const Kernel& kernel, const Plan& plan, unsigned char* workspace, void* stream) {
  const Conv3d& conv = layer.conv;
  Gemm gemm{};
  if (plan.arranges) {
    const int64_t size[3] = {layer.times_of_x(), conv.in[1], conv.in[2]};
    const Pass& forward = plan.forward;
    void* arranged = workspace + plan.arranged;
    if (layer.lifts())
      launch_lift(layer.u, conv.n, size, conv.c_in, conv.groups, forward, arranged, stream);
    else
      launch_arrange(arrangement(layer.u.x, layer.u.element, conv.c_in, conv.groups, forward.padded, arranged), conv.n, size,
                     forward.arithmetic, stream);
    gemm.dense = dense_operand(arranged, size, conv.groups, forward.tap_chunks() * kChunk);
  } else if (layer.lifts()) {
    gemm.lifted = layer.u;
  } else {
    const int bytes = operand_bytes(kernel.forward);
    const auto& stride = layer.u.x.stride;
    gemm.dense = {static_cast<const unsigned char*>(layer.u.x.data),
                  {stride[0] * bytes, stride[2] * bytes, stride[3] * bytes, stride[4] * bytes},
                  conv.c_in / conv.groups * bytes};
  }
  gemm.partial = reinterpret_cast<float*>(workspace + plan.partial);
  return gemm;
}

// An axis of one position may have any stride; it counts as none.
View without_unit_axes(View view, int64_t n, const int64_t (&size)[3]) {
  if (n == 1) view.stride[0] = 0;
  for (int a = 0; a < 3; ++a)
    if (size[a] == 1) view.stride[2 + a] = 0;
  return view;
}

// The input has as many times as its tables read, which may be more than the result has, and fewer.
Layer reading(Layer layer) {
  const int64_t size[3] = {layer.times_of_x(), layer.conv.in[1], layer.conv.in[2]};
  layer.u.x = without_unit_axes(layer.u.x, layer.conv.n, size);
  return layer;
}

Layer layer_of(const Conv3dRelevance& p) {
  const Lifted u{p.lift, p.element, p.x, p.low, p.high};
  return reading({p.conv, p.weight, u, true, p.divided, time_tables(p.conv, p.reads, p.gives)});
}

Layer layer_of(const Conv3dForward& p) {
  const Lifted u{Lift::None, p.element, p.x, {}, {}};
  return reading({p.conv, p.weight, u, false, false, time_tables(p.conv, p.reads, {})});
}

}  // namespace

std::vector<std::string> conv3d_kernels(Element element) {
  std::vector<std::string> names;
  for (const Kernel& kernel : kernels_of(element)) names.push_back(kernel.name);
  return names;
}

std::string refusal() {
#ifdef __CUDACC__
  cudaFuncAttributes found;
  if (const cudaError_t error = cudaFuncGetAttributes(&found, add_splits); error != cudaSuccess) {
    cudaGetLastError();  // nothing shall fail for having asked
    // Whatever else there is may be gone at the next launch, as want of memory is, and is told there if it is not.
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion)
      return cudaGetErrorString(error);
  }
#endif
  return {};
}

void conv3d_relevance(const Conv3dRelevance& problem, const std::string& kernel, const Allocate& allocate, void* stream,
                      Tiling tiling) {
  const Kernel named = kernel_named(kernel, problem.element);
  if (problem.conv.n == 0) return;
  if (has_small_groups(problem.conv)) return small_groups_relevance(problem, allocate, stream);
  const Layer layer = layer_of(problem);
  const Plan plan = make_plan(layer, named, true, tiling);
  unsigned char* memory = static_cast<unsigned char*>(allocate(static_cast<size_t>(plan.bytes)));
  const Conv3d& conv = problem.conv;
  const View relevance = without_unit_axes(problem.relevance, conv.n, conv.out),
             out = without_unit_axes(problem.out, conv.n, conv.in);
  const int64_t width = plan.forward.width, pixel = conv.groups * width;
  TableWriter tables(memory + plan.tables);
  const DeviceSlots reads = add_slots(plan.forward.slots, tables), gathers = add_slots(plan.adjoint.slots, tables);
  const DeviceTable stored = tables.add(layer.in_time.stored, layer.in_time.rows);
  const DeviceTable members = tables.add(layer.in_time.members, layer.in_time.rows);
  tables.write(stream);
  const int64_t pulled[3] = {layer.frames(), conv.out[1], conv.out[2]};

  if (!problem.divided) {
    Gemm forward = read_input(layer, named, plan, memory, stream);
    forward.slots = reads;
    forward.epilogue = Epilogue::Divide;
    forward.divide = {relevance,
                      problem.bias,
                      problem.element,
                      static_cast<float>(problem.stabilizer),
                      layer.adds_quotients() ? Form::Float : form_of(named.adjoint),
                      memory + (layer.adds_quotients() ? plan.quotients : plan.s)};
    launch_pass(layer, plan.forward, forward, relevance, memory + plan.weights, stream);
  }
  if (problem.divided || layer.adds_quotients()) {
    const View quotients{
        memory + plan.quotients,
        {conv.out[0] * conv.out[1] * conv.out[2] * pixel, 1, conv.out[1] * conv.out[2] * pixel, conv.out[2] * pixel, pixel}};
    Arrange arrange =
        arrangement(problem.divided ? relevance : quotients, Element::Float32, conv.c_out, conv.groups, width, memory + plan.s);
    if (!problem.divided) arrange.group_stride = width;
    arrange.members = members;
    arrange.most = static_cast<int>(layer.in_time.most);
    launch_arrange(arrange, conv.n, pulled, named.adjoint, stream);
  }

  Gemm adjoint{};
  adjoint.slots = gathers;
  adjoint.dense = dense_operand(memory + plan.s, pulled, conv.groups, width * operand_bytes(named.adjoint));
  adjoint.partial = reinterpret_cast<float*>(memory + plan.partial);
  adjoint.epilogue = Epilogue::Share;
  adjoint.share = {layer.u, out, stored};
  launch_pass(layer, plan.adjoint, adjoint, out, memory + plan.weights, stream);
}

void conv3d_forward(const Conv3dForward& problem, const std::string& kernel, const Allocate& allocate, void* stream,
                    Tiling tiling) {
  const Kernel named = kernel_named(kernel, problem.element);
  if (problem.conv.n == 0) return;
  if (has_small_groups(problem.conv)) return small_groups_forward(problem, allocate, stream);
  const Layer layer = layer_of(problem);
  const Plan plan = make_plan(layer, named, false, tiling);
  unsigned char* memory = static_cast<unsigned char*>(allocate(static_cast<size_t>(plan.bytes)));
  TableWriter tables(memory + plan.tables);
  Gemm forward = read_input(layer, named, plan, memory, stream);
  forward.slots = add_slots(plan.forward.slots, tables);
  tables.write(stream);
  forward.epilogue = Epilogue::Add;
  const View out = without_unit_axes(problem.out, problem.conv.n, problem.conv.out);
  forward.add = {problem.bias, problem.element, problem.relu, out};
  launch_pass(layer, plan.forward, forward, out, memory + plan.weights, stream);
}

}  // namespace captum_dtd::cuda
