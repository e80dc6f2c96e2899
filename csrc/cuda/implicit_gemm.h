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
// chunks of its rows. A block goes through its depth in stages of 64 or 128 bytes, several of them in shared memory, loading
// one while it multiplies another.
#pragma once

#include "conv3d.h"
#include "device.h"
#include "in_time.h"
#include "warpgroup.h"

namespace captum_dtd::cuda {

constexpr int kChunk = 16;     // bytes of one asynchronous copy
constexpr int kMaxPhases = 8;  // of one launch

// ------------------------------------------------------------------------------------------------ parameters

struct Phase {
  int grid[3], base[3], step[3], taps[3], out_base[3];
  int stages;                       // of the whole depth
  int64_t rows;                     // all examples
  int64_t first_row;                // rows of the phases before
  int64_t first_tile;               // row tiles of the phases before
  int64_t weights;                  // offset of the phase's packed weights, in chunks
  int64_t first_slot, first_frame;  // of a pattern (in_time.h), whose slots the grid has in place of times
};

// Channels-last operands, ready to be copied: one chunk never reaches beyond the channels of a group.
struct Dense {
  const unsigned char* data;
  int64_t stride[4];  // of n, t, h, w, in bytes
  int64_t group_stride;
};

// An input as the caller gave it, lifted when it is read.
struct Lifted {
  Lift lift;
  Element element;
  View x, low, high;
};

enum class Epilogue { Divide, Share, Add };

// How an operand of tensor cores stands in memory; in Halves every eight channels are a chunk of what bfloat16 keeps of them
// and a chunk of what it keeps of the rest.
enum class Form { Float, Narrow, Halves };

// s = R / (z + bias+ + stabilizer sign(z)), written as an operand of the adjoint: dense, channels last.
struct Divide {
  View relevance;
  const void* bias;
  Element element;  // of the bias
  float stabilizer;
  Form form;  // of s, where Narrow is bfloat16
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
  bool relu;
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
  int width;         // columns that the epilogue writes: a multiple of four, and for s padded to whole chunks
  int column_tiles;  // of one group
  int splits;
  DeviceSlots slots;  // none: times are read and written as stride and padding say
  Dense dense;        // what is read, unless it is lifted on the way
  Lifted lifted;
  const unsigned char* weights;  // packed: [phase][group][stage][column, padded to whole tiles][chunk]
  Epilogue epilogue;
  bool along_rows;  // in the tensor that the epilogue reads or writes, neighbouring positions are neighbours, not channels
  bool in_quads;    // four channels can be read and written at once
  Divide divide;
  Share share;
  Add add;
  float* partial;  // [split][row][group][width], where there is more than one split
};

// ------------------------------------------------------------------------------------------------ arithmetic

// `Operand` is what lies in shared memory, `Product` what tensor cores multiply. Operands of two halves stand in two chunks.
struct Tf32 {
  using Operand = tfloat32;
  using Product = tfloat32;
  static constexpr int kHalves = 1;
};

struct Tf32x3 {
  using Operand = float;
  using Product = tfloat32;
  static constexpr int kHalves = 1;
};

struct Bf16 {
  using Operand = bfloat16;
  using Product = bfloat16;
  static constexpr int kHalves = 1;
};

struct Bf16x3 {
  using Operand = bfloat16;
  using Product = bfloat16;
  static constexpr int kHalves = 2;
};

struct F16 {
  using Operand = float16;
  using Product = float16;
  static constexpr int kHalves = 1;
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

// What an operand's first or second half keeps of a value.
template <typename Operand>
__device__ __forceinline__ Operand half_of(float value, int half) {
  const Operand first = narrow<Operand>(value);
  if (half == 0) return first;
  const float rest = value - widen(first);
  return narrow<Operand>(rest == rest ? rest : 0);  // infinity, less itself, is nothing
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

// Elements at some offsets, zero where one is negative: all are asked for before the first is needed.
template <int kCount>
__device__ __forceinline__ void load_elements(const void* data, const int64_t (&at)[kCount], Element element,
                                              float (&values)[kCount]) {
  const auto load = [&](Element known) {
    uint32_t bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i] = at[i] >= 0 ? load_bits(data, at[i], known) : 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = widen_bits(bits[i], known);
  };
  if (element == Element::Float32)
    load(Element::Float32);
  else if (element == Element::BFloat16)
    load(Element::BFloat16);
  else
    load(Element::Float16);
}

// Four neighbours, aligned to as many.
__device__ __forceinline__ void load_quad(const void* data, int64_t offset, Element element, float (&values)[4]) {
  if (element == Element::Float32) {
    const float4 four = __ldg(static_cast<const float4*>(data) + (offset >> 2));
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  } else {
    const uint2 four = __ldg(static_cast<const uint2*>(data) + (offset >> 2));
    values[0] = widen_bits(four.x & 0xFFFF, element);
    values[1] = widen_bits(four.x >> 16, element);
    values[2] = widen_bits(four.y & 0xFFFF, element);
    values[3] = widen_bits(four.y >> 16, element);
  }
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

// What a block multiplies: a stage is so many chunks deep.
template <int kRows_, int kColumns_, int kThreads_, int kStageChunks_, int kStages_, int kBlocks_>
struct BlockTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kThreads = kThreads_;
  static constexpr int kStageChunks = kStageChunks_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // that share a multiprocessor
  static constexpr int kLeftBytes = kRows * kStageChunks * kChunk;
  static constexpr int kStageBytes = kLeftBytes + kColumns * kStageChunks * kChunk;
  static constexpr int kSharedBytes = kStages * kStageBytes + kRows * static_cast<int>(sizeof(int4));
  static constexpr int kLoads = kRows * kStageChunks / kThreads;  // chunks of the left operand that a thread loads
  // A thread's next chunk of an operand lies so many rows further, with the same pattern: so many bytes, in shared memory too.
  static constexpr int kNextChunk = kThreads * kChunk;
  static_assert(kThreads / kStageChunks % 8 == 0, "patterns repeat every eight rows");
  static_assert(kStages * kStageBytes >= kRows * kColumns * int(sizeof(float)), "the sums take the stages' place");
};

// Multiplied by warps, each its part of rows and columns, in products of 16 x 8.
template <int kRows, int kColumns, int kWarpRows, int kWarpColumns>
struct WarpTile : BlockTile<kRows, kColumns, kRows / kWarpRows*(kColumns / kWarpColumns) * 32, 4, 4, 2> {
  static constexpr bool kWarpgroups = false;
  static constexpr int kAhead = WarpTile::kStages - 1;  // stages that are loaded before they are multiplied
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kRowBlocks = kWarpRows / 16, kColumnBlocks = kWarpColumns / 8;  // products of one warp

  static __device__ __forceinline__ int first_row(int warp, int block) { return (warp / kWarpsAcross * kRowBlocks + block) * 16; }
  static __device__ __forceinline__ int first_column(int warp) { return warp % kWarpsAcross * kWarpColumns; }

  // Where a chunk of a row lies in a stage. Two rows fill the 32 banks once. ldmatrix reads one chunk of each of eight rows,
  // which are four such pairs: shifting the chunks of each pair differently puts the eight into different banks.
  static __device__ __forceinline__ int chunk_offset(int row, int chunk) { return (row * 4 + (chunk ^ (row / 2 % 4))) * kChunk; }
};

// Multiplied by groups of four warps, each its rows and all columns, in products of 64 rows.
template <int kRows, int kColumns, int kGroupRows, int kStages, int kBlocks>
struct GroupTile : BlockTile<kRows, kColumns, kRows / kGroupRows * 128, 8, kStages, kBlocks> {
  static constexpr bool kWarpgroups = true;
  // Stages that a group still multiplies when it begins with the next: their places are not free yet. Where there are few
  // places, another block keeps the tensor cores busy meanwhile.
  static constexpr int kPending = kStages > 3 ? 1 : 0;
  static constexpr int kAhead = kStages - 1 - kPending;
  static constexpr int kGroups = kRows / kGroupRows;
  static constexpr int kRowBlocks = kGroupRows / 64, kColumnBlocks = kColumns / 8;

  static __device__ __forceinline__ int first_row(int warp, int block) {
    return warp / 4 * kGroupRows + block * 64 + warp % 4 * 16;
  }
  static __device__ __forceinline__ int first_column(int) { return 0; }

  // As warpgroups read it (warpgroup.h).
  static __device__ __forceinline__ int chunk_offset(int row, int chunk) { return (row * 8 + (chunk ^ row % 8)) * kChunk; }
};

// Where a chunk of the depth stands in its stage: first halves before second ones.
template <typename Arithmetic>
__device__ __forceinline__ int place_in_stage(int chunk) {
  return Arithmetic::kHalves == 2 ? chunk / 2 + chunk % 2 * 4 : chunk;
}

// Where four columns of a row lie once all sums are in shared memory, in quads. Eight quads fill the banks. They are served
// together when sums are read, from one row (or two, where rows are short) or from eight, and must differ modulo 8; sums are
// written in pairs, 4 pairs of 4 rows at once, which must fill different quarters.
template <typename Tile>
__device__ __forceinline__ int quad_offset(int row, int quad) {
  constexpr int kQuads = Tile::kColumns / 4, kSpan = kQuads < 8 ? kQuads : 8, kTwos = kSpan / 2;
  const int line = row / (8 / kSpan);
  return row * kQuads + (quad ^ (line % kTwos * 2 + line / kTwos % 2));
}

// ------------------------------------------------------------------------------------------------ the left operand

// A thread's place in the depth: one chunk of every stage, counted within its tap.
struct Cursor {
  int chunk, t, h, w;

  __device__ __forceinline__ void move_to(int depth_chunk, const Gemm& gemm, const Phase& phase) {
    const int tap = depth_chunk / gemm.tap_chunks;
    chunk = depth_chunk % gemm.tap_chunks;
    w = tap % phase.taps[2];
    h = tap / phase.taps[2] % phase.taps[1];
    t = tap / phase.taps[2] / phase.taps[1];
  }

  // To the tap that the chunk belongs to, after it has run over the end of one tap, or of several short ones.
  __device__ __forceinline__ void carry(const Gemm& gemm, const Phase& phase) {
    chunk -= gemm.tap_chunks;
    ++w;
    if (chunk >= gemm.tap_chunks) {
      const int further = chunk / gemm.tap_chunks;
      chunk -= further * gemm.tap_chunks;
      w += further;
    }
    while (w >= phase.taps[2]) {
      w -= phase.taps[2];
      if (++h < phase.taps[1]) continue;
      h = 0;
      ++t;
    }
  }
};

// The time that a row reads by a tap; -1 where there is none.
__device__ __forceinline__ int time_read(const Gemm& gemm, const Phase& phase, int4 row, int tap) {
  if (row.x < 0 || tap >= phase.taps[0]) return -1;
  if (gemm.slots.times != nullptr) return __ldg(gemm.slots.frames + phase.first_frame + row.y * phase.taps[0] + tap);
  const int t = row.y * gemm.stride[0] + phase.base[0] + tap * phase.step[0];
  return static_cast<unsigned>(t) < static_cast<unsigned>(gemm.in[0]) ? t : -1;
}

__device__ __forceinline__ bool inside(const Gemm& gemm, int h, int w) {
  return static_cast<unsigned>(h) < static_cast<unsigned>(gemm.in[1]) &&
         static_cast<unsigned>(w) < static_cast<unsigned>(gemm.in[2]);
}

constexpr int kNowhere = -(1 << 30);  // a row that no tap brings inside

// Copies chunks as they lie in memory, past the registers. All of this runs for every stage, so what can be known before is.
template <typename Arithmetic, typename Tile>
struct DenseLoader {
  static constexpr bool kThroughRegisters = false;
  static constexpr int kStageChunks = Tile::kStageChunks;
  const int4* rows;
  int of_group;
  int64_t window[Tile::kLoads];          // of each row, at the time that is read, in memory: it may begin outside the input
  int h[Tile::kLoads], w[Tile::kLoads];  // that the tap reads
  Cursor cursor;
  int64_t offset;  // from a window's begin to the tap's chunk, in bytes

  __device__ __forceinline__ void start(const Gemm& gemm, const Phase& phase, int group, const int4* of_tile, int stage) {
    rows = of_tile;
    of_group = group;
    cursor.move_to(stage * kStageChunks + threadIdx.x % kStageChunks, gemm, phase);
    find_windows(gemm, phase);
    find_chunk(gemm, phase);
  }

  __device__ __forceinline__ void find_windows(const Gemm& gemm, const Phase& phase) {
    const Dense& dense = gemm.dense;
    const int64_t group = reinterpret_cast<int64_t>(dense.data) + of_group * dense.group_stride;
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int4 at = rows[(threadIdx.x + i * Tile::kThreads) / kStageChunks];
      const int t = time_read(gemm, phase, at, cursor.t);
      const int first_h = at.z * gemm.stride[1] + phase.base[1], first_w = at.w * gemm.stride[2] + phase.base[2];
      window[i] = group + at.x * dense.stride[0] + t * dense.stride[1] + first_h * dense.stride[2] + first_w * dense.stride[3];
      h[i] = t < 0 ? kNowhere : first_h + cursor.h * phase.step[1];
      w[i] = first_w + cursor.w * phase.step[2];
    }
  }

  __device__ __forceinline__ void find_chunk(const Gemm& gemm, const Phase& phase) {
    offset =
        cursor.h * phase.step[1] * gemm.dense.stride[2] + cursor.w * phase.step[2] * gemm.dense.stride[3] + cursor.chunk * kChunk;
  }

  // `first` is where this thread's first chunk of the stage stands.
  __device__ __forceinline__ void fetch(const Gemm& gemm, const Phase& phase, unsigned char* first) {
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const bool reached = inside(gemm, h[i], w[i]);
      // Where nothing is read the address does not matter, but compute-sanitizer takes one outside for an error.
      const void* const from = reached ? reinterpret_cast<const void*>(window[i] + offset) : gemm.dense.data;
      copy_async<kChunk, true>(first + i * Tile::kNextChunk, from, reached);
    }
    cursor.chunk += kStageChunks;
    offset += kStageChunks * kChunk;
    if (cursor.chunk < gemm.tap_chunks) return;
    const Cursor before = cursor;
    cursor.carry(gemm, phase);
    if (cursor.t != before.t) {
      find_windows(gemm, phase);
    } else {
      const int down = (cursor.h - before.h) * phase.step[1], across = (cursor.w - before.w) * phase.step[2];
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        h[i] += down;
        w[i] += across;
      }
    }
    find_chunk(gemm, phase);
  }

  __device__ __forceinline__ void store(const Gemm&, unsigned char*) {}
};

// Reads x and its bounds into registers while a stage is multiplied, then lifts them into shared memory.
template <typename Arithmetic, typename Tile>
struct LiftingLoader {
  using Operand = typename Arithmetic::Operand;
  static_assert(!Tile::kWarpgroups && Arithmetic::kHalves == 1, "warpgroups read dense operands");
  static constexpr bool kThroughRegisters = true;
  static constexpr int kStageChunks = Tile::kStageChunks;
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
    cursor.chunk += kStageChunks;
    if (cursor.chunk < gemm.tap_chunks) return;
    const int t = cursor.t;
    cursor.carry(gemm, phase);
    if (cursor.t != t) find_windows(gemm, phase);
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
      store_shared(stage + Tile::chunk_offset(index / kStageChunks, index % kStageChunks), chunk);
    }
  }
};

// ------------------------------------------------------------------------------------------------ the right operand

// Copies a stage of as many columns as the tile has; what is packed is padded to that.
template <typename Tile>
struct WeightLoader {
  static constexpr int kAll = Tile::kColumns * Tile::kStageChunks;
  static constexpr int kTileBytes = kAll * kChunk;
  const unsigned char* next;

  __device__ __forceinline__ void start(const Gemm& gemm, const Phase& phase, int group, int column_tile, int stage) {
    const int64_t tiles = (int64_t(group) * phase.stages + stage) * gemm.column_tiles + column_tile;
    next = gemm.weights + phase.weights * kChunk + tiles * kTileBytes + threadIdx.x * kChunk;
  }

  __device__ __forceinline__ void fetch(const Gemm& gemm, unsigned char* first) {
#pragma unroll
    for (int begin = 0; begin < kAll; begin += Tile::kThreads) {
      if (kAll % Tile::kThreads != 0 && begin + threadIdx.x >= kAll) break;
      copy_async<kChunk>(first + begin * kChunk, next + begin * kChunk, true);
    }
    next += int64_t(gemm.column_tiles) * kTileBytes;
  }
};

// ------------------------------------------------------------------------------------------------ the epilogue

__device__ __forceinline__ float divide(float relevance, float z, float stabilizer) {
  if (stabilizer != 0) return relevance / (z < 0 ? z - stabilizer : z + stabilizer);
  constexpr float kSmallestNormal = 0x1p-126f;
  return (z < 0 ? -z : z) < kSmallestNormal ? 0 : relevance / z;
}

// Four neighbouring columns at one position (grid coordinates), as far as there are so many. What their epilogue reads is asked
// for at the beginning, long before it is needed.
class Quad {
 public:
  __device__ __forceinline__ void begin(const Gemm& gemm, const Phase& phase, int4 at, int group, int column) {
    const int16_t* const times = gemm.slots.times;
    place_ = {at.x, times != nullptr ? __ldg(times + phase.first_slot + at.y) : phase.out_base[0] + at.y * gemm.out_step[0],
              phase.out_base[1] + at.z * gemm.out_step[1], phase.out_base[2] + at.w * gemm.out_step[2]};
    group_ = group;
    column_ = column;
    if (gemm.epilogue == Epilogue::Divide) {
      const View& relevance = gemm.divide.relevance;
      load(gemm, relevance, offset(relevance, place_.y), first_channel(gemm), Element::Float32);
    } else if (gemm.epilogue == Epilogue::Share) {
      begin_share(gemm);
    }
  }

  __device__ __forceinline__ void finish(const Gemm& gemm, float (&sums)[4]) const {
    if (gemm.epilogue == Epilogue::Divide)
      finish_divide(gemm, sums);
    else if (gemm.epilogue == Epilogue::Share)
      finish_share(gemm, sums);
    else
      finish_add(gemm, sums);
  }

 private:
  __device__ __forceinline__ int64_t first_channel(const Gemm& gemm) const { return int64_t(group_) * gemm.columns + column_; }

  __device__ __forceinline__ int64_t offset(const View& view, int t) const {
    return offset_of(view, place_.x, t, place_.z, place_.w);
  }

  __device__ __forceinline__ void load(const Gemm& gemm, const View& view, int64_t at, int64_t channel, Element element) {
    if (column_ >= gemm.columns) return;  // padding
    if (gemm.in_quads) {
      load_quad(view.data, at + channel, element, read_);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column_ + e < gemm.columns) read_[e] = load_element(view.data, at + (channel + e) * view.stride[1], element);
  }

  __device__ __forceinline__ void begin_share(const Gemm& gemm) {
    const Lifted& u = gemm.share.u;
    const DeviceTable& stored = gemm.share.stored;
    const int t = stored.data != nullptr ? __ldg(stored.row(place_.x) + place_.y) : place_.y;
    const int64_t x_at = offset(u.x, t);
    if (u.lift == Lift::None) return load(gemm, u.x, x_at, first_channel(gemm), u.element);
#pragma unroll
    for (int part = 0; part < 4; part += 2) {  // two channels
      if (column_ + part >= gemm.columns) break;
      const int64_t channel = first_channel(gemm) / 2 + part / 2;
      float low = 0, high = 0;
      if (u.lift == Lift::Box) {
        low = __ldg(static_cast<const float*>(u.low.data) + offset(u.low, t) + channel * u.low.stride[1]);
        high = __ldg(static_cast<const float*>(u.high.data) + offset(u.high, t) + channel * u.high.stride[1]);
      }
      const float2 lifted = lift_value(u.lift, load_element(u.x.data, x_at + channel * u.x.stride[1], u.element), low, high);
      read_[part] = lifted.x;
      read_[part + 1] = lifted.y;
    }
  }

  __device__ __forceinline__ void finish_divide(const Gemm& gemm, float (&sums)[4]) const {
    const Divide& d = gemm.divide;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column_ + e < gemm.columns) {
        if (d.bias != nullptr) sums[e] += positive(load_element(d.bias, first_channel(gemm) + e, d.element));
        sums[e] = divide(read_[e], sums[e], d.stabilizer);
      } else {
        sums[e] = 0;  // padding, which the adjoint reads
      }
    }
    const int64_t position = ((int64_t(place_.x) * gemm.out[0] + place_.y) * gemm.out[1] + place_.z) * gemm.out[2] + place_.w;
    const int64_t quad = ((position * gemm.groups + group_) * gemm.width + column_) / 4;
    if (d.form == Form::Float) {
      static_cast<float4*>(d.s)[quad] = {sums[0], sums[1], sums[2], sums[3]};
    } else if (d.form == Form::Narrow) {
      static_cast<uint2*>(d.s)[quad] = narrowed<bfloat16>(sums, 0);
    } else {  // quads 2 i and 2 i + 1 make a chunk of first halves and a chunk of second ones
      uint2* first = static_cast<uint2*>(d.s) + quad / 2 * 4 + quad % 2;
      first[0] = narrowed<bfloat16>(sums, 0);
      first[2] = narrowed<bfloat16>(sums, 1);
    }
  }

  __device__ __forceinline__ void finish_share(const Gemm& gemm, float (&sums)[4]) const {
    const View& out = gemm.share.out;
    float* relevance = static_cast<float*>(out.data) + offset(out, place_.y);
    const int64_t channel = first_channel(gemm);
    if (gemm.in_quads) {
      reinterpret_cast<float4*>(relevance)[channel / 4] = {sums[0] * read_[0], sums[1] * read_[1], sums[2] * read_[2],
                                                           sums[3] * read_[3]};
      return;
    }
    const bool lifts = gemm.share.u.lift != Lift::None;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column_ + e >= gemm.columns) break;
      if (!lifts)
        relevance[(channel + e) * out.stride[1]] = sums[e] * read_[e];
      else if (e % 2 == 0)
        relevance[(channel / 2 + e / 2) * out.stride[1]] = read_[e] * sums[e] + read_[e + 1] * sums[e + 1];
    }
  }

  __device__ __forceinline__ void finish_add(const Gemm& gemm, float (&sums)[4]) const {
    const Add& a = gemm.add;
    const int64_t at = offset(a.out, place_.y), channel = first_channel(gemm);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (a.bias != nullptr && column_ + e < gemm.columns) sums[e] += load_element(a.bias, channel + e, a.element);
    if (a.relu) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] = positive(sums[e]);
    }
    if (gemm.in_quads) {
      const int64_t quad = (at + channel) / 4;
      if (a.element == Element::Float32)
        static_cast<float4*>(a.out.data)[quad] = {sums[0], sums[1], sums[2], sums[3]};
      else
        static_cast<uint2*>(a.out.data)[quad] =
            a.element == Element::BFloat16 ? narrowed<bfloat16>(sums, 0) : narrowed<float16>(sums, 0);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column_ + e >= gemm.columns) break;
      const int64_t to = at + (channel + e) * a.out.stride[1];
      if (a.element == Element::Float32)
        static_cast<float*>(a.out.data)[to] = sums[e];
      else if (a.element == Element::BFloat16)
        static_cast<bfloat16*>(a.out.data)[to] = narrow<bfloat16>(sums[e]);
      else
        static_cast<float16*>(a.out.data)[to] = narrow<float16>(sums[e]);
    }
  }

  template <typename Operand>
  static __device__ __forceinline__ uint2 narrowed(const float (&values)[4], int half) {
    uint32_t bits[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) bits[e] = half_of<Operand>(values[e], half).bits;
    return {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
  }

  int4 place_;  // n, t, h, w of the output
  int group_, column_;
  float read_[4];  // relevance, or what the sums are multiplied by
};

// Example and grid position of a row of a phase, as (n, t, h, w), of which t may be a slot; n is -1 beyond the last row.
__device__ __forceinline__ int4 locate(const Gemm& gemm, const Phase& phase, int64_t row) {
  if (row >= phase.rows) return {-1, 0, 0, 0};
  const int64_t w = row / phase.grid[2], h = w / phase.grid[1], n = h / phase.grid[0], t = h - n * phase.grid[0];
  const int first = gemm.slots.examples != nullptr ? __ldg(gemm.slots.examples + phase.first_slot + t) : 0;
  return {first + static_cast<int>(n), static_cast<int>(t), static_cast<int>(w - h * phase.grid[1]),
          static_cast<int>(row - w * phase.grid[2])};
}

// ------------------------------------------------------------------------------------------------ kernels

template <typename Tile>
using Sums = float[Tile::kRowBlocks][Tile::kColumnBlocks][4];

template <typename Tile>
__device__ __forceinline__ void clear(Sums<Tile>& sums) {
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumnBlocks; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;
}

template <typename Tile>
__device__ __forceinline__ void add_to(Sums<Tile>& sums, const Sums<Tile>& partial) {
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumnBlocks; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] += partial[i][j][k];
}

// Multiplies one stage: sums += left (rows x 64 bytes) right (columns x 64 bytes), of one warp.
template <typename Arithmetic, typename Tile>
__device__ __forceinline__ void multiply_by_warp(Sums<Tile>& sums, const unsigned char* left, const unsigned char* right) {
  using Product = typename Arithmetic::Product;
  constexpr bool kSplit = kSame<Arithmetic, Tf32x3>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = Tile::first_row(warp, 0), first_column = Tile::first_column(warp);
#pragma unroll
  for (int step = 0; step < Tile::kStageChunks / 2; ++step) {
    uint32_t a[Tile::kRowBlocks][4], a_low[kSplit ? Tile::kRowBlocks : 1][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) {
      load_matrices(a[i], left + Tile::chunk_offset(first_row + 16 * i + lane % 16, 2 * step + lane / 16));
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
      load_matrices(b, right + Tile::chunk_offset(first_column + 8 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
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

// Begins to multiply one stage: sums += left (rows x 128 bytes) right (columns x 128 bytes), of one group of warps. What the
// sums were before counts unless they are `fresh`.
template <typename Arithmetic, typename Tile>
__device__ __forceinline__ void multiply_by_group(Sums<Tile>& sums, Matrix left, Matrix right, bool fresh) {
  constexpr int kSteps = 4, kStepBytes = 2 * kChunk, kHalf = kSteps / 2 * kStepBytes;
  constexpr bool kSplit = Arithmetic::kHalves == 2;
  hold(sums);
  begin_products();
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i) {
    const Matrix rows = further(left, i * 64 * Tile::kStageChunks * kChunk);
    const auto multiply = [&](int a, int b, bool keep) {
      multiply_add_async<typename Arithmetic::Product>(sums[i], further(rows, a), further(right, b), keep);
    };
#pragma unroll
    for (int step = 0; step < (kSplit ? kSteps / 2 : kSteps); ++step) {
      const int at = step * kStepBytes;
      if constexpr (kSplit) {
        multiply(at + kHalf, at, !fresh || step > 0);
        multiply(at, at + kHalf, true);
        multiply(at, at, true);
      } else {
        multiply(at, at, !fresh || step > 0);
      }
    }
  }
  commit_products();
}

template <typename Arithmetic, typename Tile, template <typename, typename> class Loader>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) multiply_sweep(const __grid_constant__ Gemm gemm) {
  constexpr int kStages = Tile::kStages;
  unsigned char* stages = dynamic_shared();
  int4* rows = reinterpret_cast<int4*>(stages + kStages * Tile::kStageBytes);
  const int columns_of_all = gemm.groups * gemm.column_tiles;
  const int group = blockIdx.x % columns_of_all / gemm.column_tiles;
  const int column_tile = blockIdx.x % columns_of_all % gemm.column_tiles, first_column = column_tile * Tile::kColumns;
  const int64_t tile = blockIdx.x / columns_of_all;
  int p = 0;
  while (p + 1 < gemm.phases && tile >= gemm.phase[p + 1].first_tile) ++p;
  const Phase& phase = gemm.phase[p];
  const int64_t first_row = (tile - phase.first_tile) * Tile::kRows;

  for (int i = threadIdx.x; i < Tile::kRows; i += Tile::kThreads) rows[i] = locate(gemm, phase, first_row + i);
  __syncthreads();

  // This block's share of the stages is counted from 0.
  const int per_split = (phase.stages + gemm.splits - 1) / gemm.splits, before = static_cast<int>(blockIdx.y) * per_split;
  const int count = max(min(per_split, phase.stages - before), 0);

  constexpr int kAhead = Tile::kAhead;
  using Load = Loader<Arithmetic, Tile>;
  Load loader;
  WeightLoader<Tile> weights;
  if (count > 0) loader.start(gemm, phase, group, rows, before);
  weights.start(gemm, phase, group, column_tile, before);
  constexpr int kStageChunks = Tile::kStageChunks;
  const int chunk = Tile::chunk_offset(threadIdx.x / kStageChunks, place_in_stage<Arithmetic>(threadIdx.x % kStageChunks));
  const auto place = [](int stage) { return stage % kStages * Tile::kStageBytes; };
  const auto fetch = [&](int stage) {
    if (stage < count) {
      unsigned char* first = stages + place(stage) + chunk;
      loader.fetch(gemm, phase, first);
      weights.fetch(gemm, first + Tile::kLeftBytes);
    }
    commit_copies();
  };
  const auto store = [&](int stage) {
    if (Load::kThroughRegisters && stage < count) loader.store(gemm, stages + place(stage));
  };
  for (int stage = 0; stage < kAhead; ++stage) {
    fetch(stage);
    store(stage);
  }

  // Tensor cores cut sums off, which over a long depth costs more bits than three products gain: there sums are taken over a
  // part of it, and added up in float32.
  Sums<Tile> sums;
  if constexpr (Tile::kWarpgroups) {
    constexpr bool kInParts = Arithmetic::kHalves == 2;
    constexpr int kPart = kInParts ? 8 : 1 << 30;  // stages
    Sums<Tile> partial;
    Sums<Tile>& current = kInParts ? partial : sums;
    if (kInParts) clear<Tile>(sums);
    const Matrix left = matrix_at(stages + __shfl_sync(0xffffffff, threadIdx.x / 128, 0) * (Tile::kLeftBytes / Tile::kGroups));
    const Matrix right = matrix_at(stages + Tile::kLeftBytes);
    for (int stage = 0; stage < count; ++stage) {
      wait_copies<kAhead - 1>();
      show_to_tensor_cores();
      __syncthreads();        // this stage is there, and the one whose place is loaded next has been multiplied by all
      fetch(stage + kAhead);  // first: copies would wait behind products that are still to be issued
      multiply_by_group<Arithmetic, Tile>(current, further(left, place(stage)), further(right, place(stage)), stage % kPart == 0);
      if (!kInParts || ((stage + 1) % kPart != 0 && stage + 1 < count)) {
        wait_products<Tile::kPending>();
      } else {
        wait_products<0>();
        hold(partial);
        add_to<Tile>(sums, partial);
      }
    }
    wait_products<0>();
    hold(sums);
    if (!kInParts && count == 0) clear<Tile>(sums);
  } else {
    clear<Tile>(sums);
    for (int stage = 0; stage < count; ++stage) {
      wait_copies<kAhead - 1>();
      __syncthreads();  // this stage is there, and the one before it has been read by all
      fetch(stage + kAhead);
      const unsigned char* now = stages + place(stage);
      if constexpr (kSame<Arithmetic, Tf32x3>) {
        Sums<Tile> partial = {};
        multiply_by_warp<Arithmetic, Tile>(partial, now, now + Tile::kLeftBytes);
        add_to<Tile>(sums, partial);
      } else {
        multiply_by_warp<Arithmetic, Tile>(sums, now, now + Tile::kLeftBytes);
      }
      store(stage + kAhead);
    }
  }
  wait_copies<0>();
  __syncthreads();

  // Sums change hands, so that neighbouring threads finish what are neighbours in memory.
  float4* quads = reinterpret_cast<float4*>(stages);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumnBlocks; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Tile::first_row(warp, i) + half * 8 + lane / 4;
        const int quad = (Tile::first_column(warp) + 8 * j) / 4 + lane % 4 / 2;
        store_shared(reinterpret_cast<float2*>(quads + quad_offset<Tile>(row, quad)) + lane % 2,
                     float2{sums[i][j][2 * half], sums[i][j][2 * half + 1]});
      }
  __syncthreads();

  constexpr int kQuads = Tile::kColumns / 4, kEach = Tile::kRows * kQuads / Tile::kThreads;
  constexpr int kTogether = kEach < 4 ? kEach : 4;  // quads of a thread that wait for memory at the same time
  const Phase& last = gemm.phase[gemm.phases - 1];
  const int64_t first_line = blockIdx.y * (last.first_row + last.rows) + phase.first_row + first_row;
  for (int begin = threadIdx.x; begin < Tile::kRows * kQuads; begin += kTogether * Tile::kThreads) {
    Quad finishing[kTogether];
    const auto row_of = [&](int i) { return gemm.along_rows ? i % Tile::kRows : i / kQuads; };
    const auto quad_of = [&](int i) { return gemm.along_rows ? i / Tile::kRows : i % kQuads; };
    const auto is_written = [&](int i) { return rows[row_of(i)].x >= 0 && first_column + 4 * quad_of(i) < gemm.width; };
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int i = begin + k * Tile::kThreads;
      if (gemm.splits == 1 && is_written(i))
        finishing[k].begin(gemm, phase, rows[row_of(i)], group, first_column + 4 * quad_of(i));
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int i = begin + k * Tile::kThreads;
      const float4 four = load_shared<float4>(quads + quad_offset<Tile>(row_of(i), quad_of(i)));
      if (!is_written(i)) continue;
      if (gemm.splits == 1) {
        float values[4] = {four.x, four.y, four.z, four.w};
        finishing[k].finish(gemm, values);
      } else {
        const int64_t line = (first_line + row_of(i)) * gemm.groups + group;
        reinterpret_cast<float4*>(gemm.partial)[(line * gemm.width + first_column) / 4 + quad_of(i)] = four;
      }
    }
  }
}

// Adds up the splits, first to last, and finishes: one thread for each four columns.
static __global__ void __launch_bounds__(256, 1) add_splits(const __grid_constant__ Gemm gemm) {
  const Phase& last = gemm.phase[gemm.phases - 1];
  const int64_t quads = gemm.groups * gemm.width / 4, all = (last.first_row + last.rows) * quads;
  const int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= all) return;
  const int64_t row = index / quads;
  int p = 0;
  while (p + 1 < gemm.phases && row >= gemm.phase[p + 1].first_row) ++p;
  const int column = static_cast<int>(index % quads) * 4;
  Quad quad;
  quad.begin(gemm, gemm.phase[p], locate(gemm, gemm.phase[p], row - gemm.phase[p].first_row), column / gemm.width,
             column % gemm.width);
  float sums[4] = {};
  for (int split = 0; split < gemm.splits; ++split) {
    const float4 part = reinterpret_cast<const float4*>(gemm.partial)[split * all + index];
    sums[0] += part.x;
    sums[1] += part.y;
    sums[2] += part.z;
    sums[3] += part.w;
  }
  quad.finish(gemm, sums);
}

}  // namespace captum_dtd::cuda
