// Sweeps (../geometry.h) as matrix products on tensor cores.
//
//   rows     positions of the grid, of every example and of every phase
//   columns  output channels of one group
//   depth    taps, and within a tap the channels read, padded with zeros to whole chunks of 16 bytes
//
// A lifted channel stands twice, u0 beside u1, wherever channels are counted: along the depth when x is read, along the
// columns when relevance is written. One thread then holds both parts of a channel.
//
// The left operand (rows x depth) is never laid out in memory: a thread follows the depth from tap to tap and copies the
// chunks of its rows. A block goes through its depth in stages of 64 bytes, kStages of them in shared memory, loading one
// while it multiplies another.
#pragma once

#include "conv3d.h"
#include "device.h"
#include "in_time.h"

namespace captum_dtd::cuda {

constexpr int kChunk = 16;       // bytes of one asynchronous copy
constexpr int kStageChunks = 4;  // along the depth
constexpr int kStages = 4;
constexpr int kMaxPhases = 8;  // of one launch

// ------------------------------------------------------------------------------------------------ parameters

struct Phase {
  int grid[3], base[3], step[3], taps[3], out_base[3];
  int stages;          // of the whole depth
  int64_t rows;        // all examples
  int64_t first_row;   // rows of the phases before
  int64_t first_tile;  // row tiles of the phases before
  int64_t weights;     // offset of the phase's packed weights, in chunks
};

// Channels-last operands, ready to be copied: one chunk never reaches beyond the channels of a group.
struct Dense {
  const unsigned char* data;
  int64_t stride[4];  // of n, t, h, w, in bytes
  int64_t group_stride;
};

// An input as the caller gave it, lifted while it is read.
struct Lifted {
  Lift lift;
  Element element;
  View x, low, high;
};

enum class Epilogue { Divide, Share, Add };

// s = R / (z + bias+ + stabilizer sign(z)), written as an operand of the adjoint: dense, channels last.
struct Divide {
  View relevance;
  const void* bias;
  Element element;  // of the bias
  float stabilizer;
  bool narrow;  // s is bfloat16, otherwise float
  void* s;
};

// R_in = sum over parts p of u_p * acc_p.
struct Share {
  Lifted u;
  View out;
  DeviceTable stored;  // at which time u is kept that stands for one of the result's
};

// out = acc + bias.
struct Add {
  const void* bias;
  Element element;  // of the bias and of out
  View out;
};

struct Gemm {
  int phases;
  Phase phase[kMaxPhases];
  int in[3], stride[3], out[3], out_step[3];
  int groups;
  int channels_in;   // of one group, unlifted
  int tap_chunks;    // chunks of the depth that a tap takes
  int columns;       // of one group
  int width;         // columns that the epilogue writes: even, and for s padded to whole chunks
  int column_tiles;  // of one group
  int splits;
  DeviceTable in_time;  // [grid time][tap]: the time that is read, or -1; none: as stride and padding say
  Dense dense;          // what is read, unless it is lifted on the way
  Lifted lifted;
  const unsigned char* weights;  // packed: [phase][group][stage][column][chunk]
  Epilogue epilogue;
  bool along_rows;  // in the tensor that the epilogue reads or writes, neighbouring positions are neighbours, not channels
  Divide divide;
  Share share;
  Add add;
  float* partial;  // [split][row][group][width], where there is more than one split
};

// ------------------------------------------------------------------------------------------------ arithmetic

struct Tf32 {
  using Operand = tfloat32;
  using Product = tfloat32;
};

struct Tf32x3 {
  using Operand = float;
  using Product = tfloat32;
};

struct Bf16 {
  using Operand = bfloat16;
  using Product = bfloat16;
};

struct F16 {
  using Operand = float16;
  using Product = float16;
};

template <typename T, typename U>
constexpr bool kSame = false;
template <typename T>
constexpr bool kSame<T, T> = true;

// A float32 as the sum of two tfloat32: `high` is the nearest one; of `low`, the exact rest, tensor cores cut at most the last
// bit. Three instructions, where cvt takes more to keep a NaN: here it is in `low`.
__device__ __forceinline__ void split(uint32_t word, uint32_t& high, uint32_t& low) {
  high = (word + 0x1000) & 0xFFFFE000;
  low = __float_as_uint(__uint_as_float(word) - __uint_as_float(high));
}

// ------------------------------------------------------------------------------------------------ elements and lifts

__device__ __forceinline__ uint32_t load_bits(const void* data, int64_t offset, Element element) {
  if (element == Element::Float32) return __ldg(static_cast<const uint32_t*>(data) + offset);
  return __ldg(static_cast<const uint16_t*>(data) + offset);
}

__device__ __forceinline__ float widen_bits(uint32_t bits, Element element) {
  if (element == Element::Float32) return __uint_as_float(bits);
  const uint16_t half = static_cast<uint16_t>(bits);
  return element == Element::BFloat16 ? widen(bfloat16{half}) : widen(float16{half});
}

__device__ __forceinline__ float load_element(const void* data, int64_t offset, Element element) {
  return widen_bits(load_bits(data, offset, element), element);
}

__device__ __forceinline__ int64_t offset_of(const View& view, int n, int t, int h, int w) {
  return n * view.stride[0] + t * view.stride[2] + h * view.stride[3] + w * view.stride[4];
}

// Positive and negative part, of which a NaN is both.
__device__ __forceinline__ float positive(float value) { return value < 0 ? 0 : value; }
__device__ __forceinline__ float negative(float value) { return value > 0 ? 0 : -value; }

__device__ __forceinline__ float2 lift_value(Lift lift, float x, float low, float high) {
  if (lift == Lift::Box) return {x - low, high - x};
  return {positive(x), negative(x)};
}

// ------------------------------------------------------------------------------------------------ tiles

template <int kRows_, int kColumns_, int kWarpRows, int kWarpColumns>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kRows / kWarpRows * kWarpsAcross * 32;
  static constexpr int kRowBlocks = kWarpRows / 16, kColumnBlocks = kWarpColumns / 8;  // products of one warp
  static constexpr int kStageBytes = (kRows + kColumns) * kStageChunks * kChunk;
  static constexpr int kSharedBytes = kStages * kStageBytes + kRows * static_cast<int>(sizeof(int4));
  static constexpr int kLoads = kRows * kStageChunks / kThreads;  // chunks of the left operand that a thread loads
  static_assert(kStages * kStageBytes >= kRows * kColumns * int(sizeof(float)), "the sums take the stages' place");
};

using Large = Tile<128, 128, 64, 32>;
using Medium = Tile<128, 64, 32, 32>;
using Small = Tile<64, 64, 32, 32>;
using Narrow = Tile<128, 16, 16, 16>;

// Where a chunk of a row lies in a stage. Two rows fill the 32 banks once. ldmatrix reads one chunk of each of eight rows,
// which are four such pairs: shifting the chunks of each pair differently puts the eight into different banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return (row * kStageChunks + (chunk ^ (row / 2 % kStageChunks))) * kChunk;
}

// Where a pair of columns of a row lies once all sums are in shared memory, in pairs. Half a warp is served at once: 16
// pairs, which must differ modulo 16. They are 4 pairs of 4 rows when the sums are written, 16 pairs of one row (or 8 of
// two) when they are read along the columns, and one pair of 16 rows when they are read along the rows.
template <typename Tile>
__device__ __forceinline__ int pair_offset(int row, int pair) {
  constexpr int kPairs = Tile::kColumns / 2, kSpan = kPairs < 16 ? kPairs : 16, kFours = kSpan / 4;
  const int line = row / (16 / kSpan);
  return row * kPairs + (pair ^ (line % kFours * 4 + line / kFours % 4));
}

// ------------------------------------------------------------------------------------------------ the left operand

// A thread's place in the depth: every fourth chunk, counted within its tap.
struct Cursor {
  int chunk, t, h, w;

  __device__ __forceinline__ void move_to(int depth_chunk, const Gemm& gemm, const Phase& phase) {
    const int tap = depth_chunk / gemm.tap_chunks;
    chunk = depth_chunk % gemm.tap_chunks;
    w = tap % phase.taps[2];
    h = tap / phase.taps[2] % phase.taps[1];
    t = tap / phase.taps[2] / phase.taps[1];
  }

  // Whether another time is read from now on.
  __device__ __forceinline__ bool advance(const Gemm& gemm, const Phase& phase) {
    const int before = t;
    chunk += kStageChunks;
    while (chunk >= gemm.tap_chunks) {
      chunk -= gemm.tap_chunks;
      if (++w < phase.taps[2]) continue;
      w = 0;
      if (++h < phase.taps[1]) continue;
      h = 0;
      ++t;
    }
    return t != before;
  }
};

// The time that a row reads by a tap; -1 where there is none.
__device__ __forceinline__ int time_read(const Gemm& gemm, const Phase& phase, int4 row, int tap) {
  if (row.x < 0 || tap >= phase.taps[0]) return -1;
  const DeviceTable& table = gemm.in_time;
  if (table.data != nullptr) return __ldg(table.row(row.x) + row.y * phase.taps[0] + tap);
  const int t = row.y * gemm.stride[0] + phase.base[0] + tap * phase.step[0];
  return static_cast<unsigned>(t) < static_cast<unsigned>(gemm.in[0]) ? t : -1;
}

__device__ __forceinline__ bool inside(const Gemm& gemm, int h, int w) {
  return static_cast<unsigned>(h) < static_cast<unsigned>(gemm.in[1]) &&
         static_cast<unsigned>(w) < static_cast<unsigned>(gemm.in[2]);
}

constexpr int kNowhere = -(1 << 30);  // a row that no tap brings inside

// Copies chunks as they lie in memory, past the registers.
template <typename Operand, typename Tile>
struct DenseLoader {
  static constexpr bool kThroughRegisters = false;
  const int4* rows;
  int64_t of_group;
  int64_t origin[Tile::kLoads];  // of the row's window at the time that is read, in bytes: it may lie outside the input
  int h[Tile::kLoads], w[Tile::kLoads];
  Cursor cursor;

  __device__ __forceinline__ void start(const Gemm& gemm, const Phase& phase, int group, const int4* of_tile, int stage) {
    rows = of_tile;
    of_group = group * gemm.dense.group_stride;
    cursor.move_to(stage * kStageChunks + threadIdx.x % kStageChunks, gemm, phase);
    find_windows(gemm, phase);
  }

  __device__ __forceinline__ void find_windows(const Gemm& gemm, const Phase& phase) {
    const Dense& dense = gemm.dense;
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int4 at = rows[(threadIdx.x + i * Tile::kThreads) / kStageChunks];
      const int t = time_read(gemm, phase, at, cursor.t);
      h[i] = at.z * gemm.stride[1] + phase.base[1];
      w[i] = at.w * gemm.stride[2] + phase.base[2];
      origin[i] = of_group + at.x * dense.stride[0] + t * dense.stride[1] + h[i] * dense.stride[2] + w[i] * dense.stride[3];
      if (t < 0) h[i] = kNowhere;
    }
  }

  __device__ __forceinline__ void fetch(const Gemm& gemm, const Phase& phase, unsigned char* stage) {
    const Dense& dense = gemm.dense;
    const int dh = cursor.h * phase.step[1], dw = cursor.w * phase.step[2];
    const int64_t offset = dh * dense.stride[2] + dw * dense.stride[3] + cursor.chunk * kChunk;
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int index = threadIdx.x + i * Tile::kThreads;
      const bool present = inside(gemm, h[i] + dh, w[i] + dw);
      copy_async<kChunk>(stage + chunk_offset(index / kStageChunks, index % kStageChunks),
                         dense.data + (present ? origin[i] + offset : 0), present);
    }
    if (cursor.advance(gemm, phase)) find_windows(gemm, phase);
  }

  __device__ __forceinline__ void store(const Gemm&, unsigned char*) {}
};

// Reads x and its bounds into registers while a stage is multiplied, then lifts them into shared memory.
template <typename Operand, typename Tile>
struct LiftingLoader {
  static constexpr bool kThroughRegisters = true;
  static constexpr int kElements = kChunk / sizeof(Operand), kChannels = kElements / 2;
  const int4* rows;
  int4 at[Tile::kLoads];  // the example, the time that is read, and where the row's window begins
  Cursor cursor;
  int first_channel;  // of the group
  uint32_t x[Tile::kLoads][kChannels];
  float low[Tile::kLoads][kChannels], high[Tile::kLoads][kChannels];
  unsigned present;  // one bit for each x

  __device__ __forceinline__ void start(const Gemm& gemm, const Phase& phase, int group, const int4* of_tile, int stage) {
    rows = of_tile;
    cursor.move_to(stage * kStageChunks + threadIdx.x % kStageChunks, gemm, phase);
    first_channel = group * gemm.channels_in;
    find_windows(gemm, phase);
  }

  __device__ __forceinline__ void find_windows(const Gemm& gemm, const Phase& phase) {
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int4 row = rows[(threadIdx.x + i * Tile::kThreads) / kStageChunks];
      const int t = time_read(gemm, phase, row, cursor.t);
      at[i] = {row.x, t, t < 0 ? kNowhere : row.z * gemm.stride[1] + phase.base[1], row.w * gemm.stride[2] + phase.base[2]};
    }
  }

  __device__ __forceinline__ void fetch(const Gemm& gemm, const Phase& phase, unsigned char*) {
    const Lifted& u = gemm.lifted;
    present = 0;
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int n = at[i].x, t = at[i].y, h = at[i].z + cursor.h * phase.step[1], w = at[i].w + cursor.w * phase.step[2];
      const bool reached = inside(gemm, h, w);
      const int64_t x_at = offset_of(u.x, n, t, h, w), low_at = offset_of(u.low, n, t, h, w),
                    high_at = offset_of(u.high, n, t, h, w);
#pragma unroll
      for (int e = 0; e < kChannels; ++e) {
        const int c = cursor.chunk * kChannels + e;
        if (!reached || c >= gemm.channels_in) continue;
        const int64_t channel = first_channel + c;
        present |= 1u << (i * kChannels + e);
        x[i][e] = load_bits(u.x.data, x_at + channel * u.x.stride[1], u.element);
        if (u.lift == Lift::Box) {
          low[i][e] = __ldg(static_cast<const float*>(u.low.data) + low_at + channel * u.low.stride[1]);
          high[i][e] = __ldg(static_cast<const float*>(u.high.data) + high_at + channel * u.high.stride[1]);
        }
      }
    }
    if (cursor.advance(gemm, phase)) find_windows(gemm, phase);
  }

  __device__ __forceinline__ void store(const Gemm& gemm, unsigned char* stage) {
    const Lifted& u = gemm.lifted;
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int index = threadIdx.x + i * Tile::kThreads;
      union {
        Operand operands[kElements];
        uint4 chunk;
      };
#pragma unroll
      for (int e = 0; e < kChannels; ++e) {
        float2 parts = {0, 0};
        if (present >> (i * kChannels + e) & 1) parts = lift_value(u.lift, widen_bits(x[i][e], u.element), low[i][e], high[i][e]);
        operands[2 * e] = narrow<Operand>(parts.x);
        operands[2 * e + 1] = narrow<Operand>(parts.y);
      }
      store_shared(stage + chunk_offset(index / kStageChunks, index % kStageChunks), chunk);
    }
  }
};

// ------------------------------------------------------------------------------------------------ the right operand

template <typename Tile>
__device__ __forceinline__ void fetch_weights(const unsigned char* stage_weights, int first_column, int columns,
                                              unsigned char* stage) {
  constexpr int kAll = Tile::kColumns * kStageChunks;
#pragma unroll
  for (int begin = 0; begin < kAll; begin += Tile::kThreads) {
    const int index = begin + threadIdx.x, column = index / kStageChunks;
    if (kAll % Tile::kThreads != 0 && index >= kAll) break;
    const bool present = first_column + column < columns;
    copy_async<kChunk>(stage + chunk_offset(column, index % kStageChunks),
                       stage_weights + (present ? (first_column * int64_t(kStageChunks) + index) * kChunk : 0), present);
  }
}

// ------------------------------------------------------------------------------------------------ the epilogue

__device__ __forceinline__ float divide(float relevance, float z, float stabilizer) {
  if (stabilizer != 0) return relevance / (z < 0 ? z - stabilizer : z + stabilizer);
  constexpr float kSmallestNormal = 0x1p-126f;
  return (z < 0 ? -z : z) < kSmallestNormal ? 0 : relevance / z;
}

__device__ __forceinline__ void finish_divide(const Gemm& gemm, int n, int t, int h, int w, int group, int column, float2 sums) {
  const Divide& d = gemm.divide;
  const int64_t relevance_at = offset_of(d.relevance, n, t, h, w);
  float values[2] = {sums.x, sums.y};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int64_t channel = int64_t(group) * gemm.columns + column + e;
    if (column + e < gemm.columns) {
      const float relevance = __ldg(static_cast<const float*>(d.relevance.data) + relevance_at + channel * d.relevance.stride[1]);
      if (d.bias != nullptr) values[e] += positive(load_element(d.bias, channel, d.element));
      values[e] = divide(relevance, values[e], d.stabilizer);
    } else {
      values[e] = 0;  // padding, which the adjoint reads
    }
  }
  const int64_t position = ((int64_t(n) * gemm.out[0] + t) * gemm.out[1] + h) * gemm.out[2] + w;
  const int64_t pair = ((position * gemm.groups + group) * gemm.width + column) / 2;
  if (d.narrow)
    static_cast<uint32_t*>(d.s)[pair] = narrow<bfloat16>(values[0]).bits | uint32_t(narrow<bfloat16>(values[1]).bits) << 16;
  else
    static_cast<float2*>(d.s)[pair] = {values[0], values[1]};
}

__device__ __forceinline__ void finish_share(const Gemm& gemm, int n, int t, int h, int w, int group, int column, float2 sums) {
  const Lifted& u = gemm.share.u;
  const View& out = gemm.share.out;
  const DeviceTable& stored = gemm.share.stored;
  const int kept = stored.data != nullptr ? __ldg(stored.row(n) + t) : t;
  const int64_t x_at = offset_of(u.x, n, kept, h, w), first = int64_t(group) * gemm.columns + column;
  float* relevance = static_cast<float*>(out.data) + offset_of(out, n, t, h, w);
  if (u.lift == Lift::None) {
    relevance[first * out.stride[1]] = sums.x * load_element(u.x.data, x_at + first * u.x.stride[1], u.element);
    if (column + 1 < gemm.columns)
      relevance[(first + 1) * out.stride[1]] = sums.y * load_element(u.x.data, x_at + (first + 1) * u.x.stride[1], u.element);
    return;
  }
  const int64_t channel = first / 2;
  float low = 0, high = 0;
  if (u.lift == Lift::Box) {
    low = __ldg(static_cast<const float*>(u.low.data) + offset_of(u.low, n, kept, h, w) + channel * u.low.stride[1]);
    high = __ldg(static_cast<const float*>(u.high.data) + offset_of(u.high, n, kept, h, w) + channel * u.high.stride[1]);
  }
  const float2 parts = lift_value(u.lift, load_element(u.x.data, x_at + channel * u.x.stride[1], u.element), low, high);
  relevance[channel * out.stride[1]] = parts.x * sums.x + parts.y * sums.y;
}

__device__ __forceinline__ void finish_add(const Gemm& gemm, int n, int t, int h, int w, int group, int column, float2 sums) {
  const Add& a = gemm.add;
  const int64_t at = offset_of(a.out, n, t, h, w);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (column + e >= gemm.columns) break;
    const int64_t channel = int64_t(group) * gemm.columns + column + e, out_at = at + channel * a.out.stride[1];
    float value = e == 0 ? sums.x : sums.y;
    if (a.bias != nullptr) value += load_element(a.bias, channel, a.element);
    if (a.element == Element::Float32)
      static_cast<float*>(a.out.data)[out_at] = value;
    else if (a.element == Element::BFloat16)
      static_cast<bfloat16*>(a.out.data)[out_at] = narrow<bfloat16>(value);
    else
      static_cast<float16*>(a.out.data)[out_at] = narrow<float16>(value);
  }
}

// Of two neighbouring columns at one position (grid coordinates).
__device__ __forceinline__ void finish(const Gemm& gemm, const Phase& phase, int4 at, int group, int column, float2 sums) {
  const int t = phase.out_base[0] + at.y * gemm.out_step[0], h = phase.out_base[1] + at.z * gemm.out_step[1],
            w = phase.out_base[2] + at.w * gemm.out_step[2];
  if (gemm.epilogue == Epilogue::Divide)
    finish_divide(gemm, at.x, t, h, w, group, column, sums);
  else if (gemm.epilogue == Epilogue::Share)
    finish_share(gemm, at.x, t, h, w, group, column, sums);
  else
    finish_add(gemm, at.x, t, h, w, group, column, sums);
}

// Example and grid position of a row of a phase, as (n, t, h, w); n is -1 beyond the last row.
__device__ __forceinline__ int4 locate(const Phase& phase, int64_t row) {
  if (row >= phase.rows) return {-1, 0, 0, 0};
  const int64_t w = row / phase.grid[2], h = w / phase.grid[1], t = h / phase.grid[0];
  return {static_cast<int>(t), static_cast<int>(h - t * phase.grid[0]), static_cast<int>(w - h * phase.grid[1]),
          static_cast<int>(row - w * phase.grid[2])};
}

// ------------------------------------------------------------------------------------------------ kernels

// Multiplies one stage: sums += left (rows x 64 bytes) right (columns x 64 bytes), of one warp.
template <typename Arithmetic, typename Tile>
__device__ __forceinline__ void multiply_stage(float (&sums)[Tile::kRowBlocks][Tile::kColumnBlocks][4], const unsigned char* left,
                                               const unsigned char* right) {
  using Product = typename Arithmetic::Product;
  constexpr bool kSplit = kSame<Arithmetic, Tf32x3>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp / Tile::kWarpsAcross * Tile::kRowBlocks * 16;
  const int first_column = warp % Tile::kWarpsAcross * Tile::kColumnBlocks * 8;
#pragma unroll
  for (int step = 0; step < kStageChunks / 2; ++step) {
    uint32_t a[Tile::kRowBlocks][4], a_low[kSplit ? Tile::kRowBlocks : 1][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) {
      load_matrices(a[i], left + chunk_offset(first_row + 16 * i + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (kSplit)
          split(a[i][k], a[i][k], a_low[i][k]);
        else if constexpr (kSame<Arithmetic, Tf32>)  // it is a float, which tensor cores would cut off instead of rounding it
          a[i][k] = narrow<tfloat32>(__uint_as_float(a[i][k])).bits;
      }
    }
#pragma unroll
    for (int j = 0; j < Tile::kColumnBlocks; j += 2) {
      uint32_t b[4];  // of two blocks of columns
      load_matrices(b, right + chunk_offset(first_column + 8 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      uint32_t b_low[4];
      if constexpr (kSplit)
#pragma unroll
        for (int k = 0; k < 4; ++k) split(b[k], b[k], b_low[k]);
#pragma unroll
      for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t high[2] = {b[2 * half], b[2 * half + 1]};
          if constexpr (kSplit) {
            const uint32_t low[2] = {b_low[2 * half], b_low[2 * half + 1]};
            multiply_add<Product>(sums[i][j + half], a_low[i], high);
            multiply_add<Product>(sums[i][j + half], a[i], low);
          }
          multiply_add<Product>(sums[i][j + half], a[i], high);
        }
    }
  }
}

template <typename Arithmetic, typename Tile, template <typename, typename> class Loader>
__global__ void __launch_bounds__(Tile::kThreads, 2) multiply_sweep(const __grid_constant__ Gemm gemm) {
  unsigned char* stages = dynamic_shared();
  int4* rows = reinterpret_cast<int4*>(stages + kStages * Tile::kStageBytes);
  const int columns_of_all = gemm.groups * gemm.column_tiles;
  const int group = blockIdx.x % columns_of_all / gemm.column_tiles;
  const int first_column = blockIdx.x % columns_of_all % gemm.column_tiles * Tile::kColumns;
  const int64_t tile = blockIdx.x / columns_of_all;
  int p = 0;
  while (p + 1 < gemm.phases && tile >= gemm.phase[p + 1].first_tile) ++p;
  const Phase& phase = gemm.phase[p];
  const int64_t first_row = (tile - phase.first_tile) * Tile::kRows;

  for (int i = threadIdx.x; i < Tile::kRows; i += Tile::kThreads) rows[i] = locate(phase, first_row + i);
  __syncthreads();

  // This block's share of the stages is counted from 0.
  const int per_split = (phase.stages + gemm.splits - 1) / gemm.splits, before = static_cast<int>(blockIdx.y) * per_split;
  const int count = max(min(per_split, phase.stages - before), 0);
  const int64_t stage_bytes = int64_t(gemm.columns) * kStageChunks * kChunk;
  const unsigned char* weights = gemm.weights + phase.weights * kChunk + (int64_t(group) * phase.stages + before) * stage_bytes;

  using Load = Loader<typename Arithmetic::Operand, Tile>;
  Load loader;
  if (count > 0) loader.start(gemm, phase, group, rows, before);
  const auto left = [&](int stage) { return stages + stage % kStages * Tile::kStageBytes; };
  const auto right = [&](int stage) { return left(stage) + Tile::kRows * kStageChunks * kChunk; };
  const auto fetch = [&](int stage) {
    if (stage < count) {
      loader.fetch(gemm, phase, left(stage));
      fetch_weights<Tile>(weights, first_column, gemm.columns, right(stage));
      weights += stage_bytes;
    }
    commit_copies();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) {
    fetch(stage);
    if (Load::kThroughRegisters && stage < count) loader.store(gemm, left(stage));
  }

  float sums[Tile::kRowBlocks][Tile::kColumnBlocks][4] = {};
  for (int stage = 0; stage < count; ++stage) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this stage is there, and the one before it has been read by all
    fetch(stage + kStages - 1);
    if constexpr (kSame<Arithmetic, Tf32x3>) {
      // Tensor cores cut sums off, which over a long depth costs more bits than the three products gain.
      float partial[Tile::kRowBlocks][Tile::kColumnBlocks][4] = {};
      multiply_stage<Arithmetic, Tile>(partial, left(stage), right(stage));
#pragma unroll
      for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kColumnBlocks; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[i][j][k] += partial[i][j][k];
    } else {
      multiply_stage<Arithmetic, Tile>(sums, left(stage), right(stage));
    }
    if (Load::kThroughRegisters && stage + kStages - 1 < count) loader.store(gemm, left(stage + kStages - 1));
  }
  wait_copies<0>();
  __syncthreads();

  // Sums change hands, so that neighbouring threads finish what are neighbours in memory.
  float2* pairs = reinterpret_cast<float2*>(stages);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumnBlocks; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (warp / Tile::kWarpsAcross * Tile::kRowBlocks + i) * 16 + half * 8 + lane / 4;
        const int pair = (warp % Tile::kWarpsAcross * Tile::kColumnBlocks + j) * 4 + lane % 4;
        store_shared(pairs + pair_offset<Tile>(row, pair), float2{sums[i][j][2 * half], sums[i][j][2 * half + 1]});
      }
  __syncthreads();

  constexpr int kPairs = Tile::kColumns / 2;
  const Phase& last = gemm.phase[gemm.phases - 1];
  const int64_t first_line = blockIdx.y * (last.first_row + last.rows) + phase.first_row + first_row;
#pragma unroll 2
  for (int index = threadIdx.x; index < Tile::kRows * kPairs; index += Tile::kThreads) {
    const int row = gemm.along_rows ? index % Tile::kRows : index / kPairs;
    const int pair = gemm.along_rows ? index / Tile::kRows : index % kPairs;
    const float2 both = load_shared<float2>(pairs + pair_offset<Tile>(row, pair));
    const int column = first_column + 2 * pair;
    const int4 at = rows[row];
    if (at.x < 0 || column >= gemm.width) continue;
    if (gemm.splits == 1)
      finish(gemm, phase, at, group, column, both);
    else
      reinterpret_cast<float2*>(gemm.partial)[(((first_line + row) * gemm.groups + group) * gemm.width + column) / 2] = both;
  }
}

// Adds up the splits, first to last, and finishes: one thread for each pair of columns.
static __global__ void __launch_bounds__(256, 1) add_splits(const __grid_constant__ Gemm gemm) {
  const Phase& last = gemm.phase[gemm.phases - 1];
  const int64_t pairs = gemm.groups * gemm.width / 2, all = (last.first_row + last.rows) * pairs;
  const int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= all) return;
  float2 sums = {0, 0};
  for (int split = 0; split < gemm.splits; ++split) {
    const float2 part = reinterpret_cast<const float2*>(gemm.partial)[split * all + index];
    sums.x += part.x;
    sums.y += part.y;
  }
  const int64_t row = index / pairs;
  int p = 0;
  while (p + 1 < gemm.phases && row >= gemm.phase[p + 1].first_row) ++p;
  const int column = static_cast<int>(index % pairs) * 2;
  finish(gemm, gemm.phase[p], locate(gemm.phase[p], row - gemm.phase[p].first_row), column / gemm.width, column % gemm.width,
         sums);
}

}  // namespace captum_dtd::cuda
