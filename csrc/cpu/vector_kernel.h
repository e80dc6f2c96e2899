// The register tile and the memory loops of every instruction set, on the compiler's portable vectors.
//
// Included once by each kernel_<isa>.cpp, which is compiled with that set's own flags. Everything here is in an anonymous
// namespace and nothing of the standard library is called: a function shared between those files could otherwise be the copy
// that was compiled for a larger instruction set than the machine has.
//
// The file defines before: CAPTUM_DTD_ISA, the set's name; kVectorBytes and kRegisters, the size and number of its registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "loops.h"
#include "microkernel.h"
#include "planar_kernel.h"
#include "streaming.h"

namespace captum_dtd::cpu {
namespace {

template <typename T, int kLanes>
struct VectorOf {
  typedef T Register __attribute__((vector_size(kLanes * sizeof(T))));
  typedef T Memory __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T)), may_alias));  // at any address
};

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <typename T>
using Register = typename VectorOf<T, kLanes<T>>::Register;
// Numbers of the lanes of such a register, in lanes of its own.
template <typename T>
using Index = std::conditional_t<sizeof(T) == sizeof(int32_t), int32_t, int64_t>;
template <typename T>
using Memory = typename VectorOf<T, kLanes<T>>::Memory;

template <typename T>
inline Register<T> load_vector(const T* from) {
  return *reinterpret_cast<const Memory<T>*>(from);
}

template <typename T>
inline void store_vector(const Register<T>& vector, T* to) {
  *reinterpret_cast<Memory<T>*>(to) = vector;
}

// --------------------------------------------------------------------------------- register tile, channels in lanes

constexpr int kVectors = 2;  // of weights; with one register for the input, the rest holds sums
constexpr int kMaxPositions = (kRegisters - kVectors - 1) / kVectors;

template <typename T, int kPositions>
void tile(const T* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth, const T* b, T* sum,
          bool accumulate, Ahead<T> ahead) {
  constexpr int kHalf = (kPositions + 1) / 2;
  constexpr int kStep = kLanes<T>;

  Register<T> sums[kPositions][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[p][v] = accumulate ? load_vector(sum + (p * kVectors + v) * kStep) : Register<T>{};

  for (int64_t tap = 0; tap < taps; ++tap) {
    // Two pointers that the compiler must not derive from each other: from one alone, more multiples of the stride would be
    // needed than there are registers to index with.
    const T* halves[2] = {a + offsets[tap], a + offsets[tap] + (kPositions > 1 ? kHalf * position_stride : 0)};
    asm("" : "+r"(halves[1]));
    for (int64_t k = 0; k < depth; ++k) {
      Register<T> weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[v] = load_vector(b + v * kStep);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        if (v * kStep < ahead.each_step) __builtin_prefetch(ahead.from + v * kStep, 0, 2);
      ahead.from += ahead.each_step;
      b += kVectors * kStep;
#pragma GCC unroll 16
      for (int p = 0; p < kPositions; ++p) {
        const T value = halves[p / kHalf][p % kHalf * position_stride + k];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[p][v] += value * weights[v];
      }
    }
  }

#pragma GCC unroll 16
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_vector(sums[p][v], sum + (p * kVectors + v) * kStep);
}

// The tile of exactly as many positions as asked for.
template <typename T, int kPositions = kMaxPositions>
void run_tile(int positions, const T* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth, const T* b,
              T* sum, bool accumulate, Ahead<T> ahead) {
  if (positions == kPositions) {
    tile<T, kPositions>(a, position_stride, offsets, taps, depth, b, sum, accumulate, ahead);
  } else if constexpr (kPositions > 1) {
    run_tile<T, kPositions - 1>(positions, a, position_stride, offsets, taps, depth, b, sum, accumulate, ahead);
  }
}

// ----------------------------------------------------------------------- register tile, channels of groups in lanes

constexpr bool kShuffles = kVectorBytes > 16;  // whether registers are shuffled by numbers that are in another

constexpr int kMaxGroupPositions = kRegisters - 4;  // one each for weights, inputs, which of these, and what is shuffled

// Of every lane, which lane its group begins with, where groups have so many channels.
template <typename T, int... kLane>
constexpr Register<Index<T>> first_lanes(int of_group, std::integer_sequence<int, kLane...>) {
  return Register<Index<T>>{Index<T>(kLane / of_group * of_group)...};
}

template <typename T, bool kAlone, int kPositions>
void groups_tile(int of_group, const T* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
                 const T* b, T* sum, bool accumulate) {
  constexpr int kStep = kLanes<T>, kPiece = 7, kPieces = (kPositions + kPiece - 1) / kPiece;
  const Register<Index<T>> first = first_lanes<T>(of_group, std::make_integer_sequence<int, kStep>{});

  Register<T> sums[kPositions];
#pragma GCC unroll 32
  for (int p = 0; p < kPositions; ++p) sums[p] = accumulate ? load_vector(sum + p * kStep) : Register<T>{};

  for (int64_t tap = 0; tap < taps; ++tap) {
    const T* pieces[kPieces];  // as in `tile`
#pragma GCC unroll 8
    for (int i = 0; i < kPieces; ++i) {
      pieces[i] = a + offsets[tap] + i * kPiece * position_stride;
      asm("" : "+r"(pieces[i]));
    }
    for (int64_t k = 0; k < depth; k += of_group) {
      for (int of_channel = 0; of_channel < (kAlone ? 1 : of_group); ++of_channel) {
        const Register<T> weights = load_vector(b);
        const Register<Index<T>> own = first + of_channel;
        b += kStep;
#pragma GCC unroll 32
        for (int p = 0; p < kPositions; ++p) {
          const Register<T> inputs = load_vector(pieces[p / kPiece] + p % kPiece * position_stride);
          sums[p] += (kAlone ? inputs : __builtin_shuffle(inputs, own)) * weights;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kPieces; ++i) pieces[i] += kStep;
    }
  }

#pragma GCC unroll 32
  for (int p = 0; p < kPositions; ++p) store_vector(sums[p], sum + p * kStep);
}

// The tile of exactly as many positions as asked for.
template <typename T, bool kAlone, int kPositions = kMaxGroupPositions>
void run_groups_tile(int of_group, int positions, const T* a, int64_t position_stride, const int64_t* offsets, int64_t taps,
                     int64_t depth, const T* b, T* sum, bool accumulate) {
  if (positions == kPositions) {
    groups_tile<T, kAlone, kPositions>(of_group, a, position_stride, offsets, taps, depth, b, sum, accumulate);
  } else if constexpr (kPositions > 1) {
    run_groups_tile<T, kAlone, kPositions - 1>(of_group, positions, a, position_stride, offsets, taps, depth, b, sum, accumulate);
  }
}

template <typename T, int kOfGroup>
void run_groups(int positions, const T* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
                const T* b, T* sum, bool accumulate, Ahead<T>) {
  run_groups_tile<T, kOfGroup == 1>(kOfGroup, positions, a, position_stride, offsets, taps, depth, b, sum, accumulate);
}

// -------------------------------------------------------------------------------- register tile, positions in lanes

template <typename T, int kChannels, int kColumns>
void planar_tile(const T* a, int64_t plane, const int64_t* offsets, int64_t taps, int64_t depth, const T* b, T* sum,
                 int64_t pitch) {
  constexpr int kStep = kLanes<T>;
  Register<T> sums[kChannels][kColumns];
#pragma GCC unroll 8
  for (int o = 0; o < kChannels; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) sums[o][v] = load_vector(sum + o * pitch + v * kStep);

  for (int64_t tap = 0; tap < taps; ++tap) {
    const T* row = a + offsets[tap];
    for (int64_t k = 0; k < depth; ++k) {
      Register<T> inputs[kColumns];
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) inputs[v] = load_vector(row + v * kStep);
#pragma GCC unroll 8
      for (int o = 0; o < kChannels; ++o) {
        const T weight = b[o];
#pragma GCC unroll 8
        for (int v = 0; v < kColumns; ++v) sums[o][v] += weight * inputs[v];
      }
      row += plane;
      b += kChannels;
    }
  }

#pragma GCC unroll 8
  for (int o = 0; o < kChannels; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) store_vector(sums[o][v], sum + o * pitch + v * kStep);
}

constexpr int max_columns(int channels) { return planar_vectors(kRegisters, channels); }

template <typename T, int kChannels = PlanarKernel<T, T>::kMaxChannels, int kColumns = max_columns(kChannels)>
void run_planar(int channels, int vectors, const T* a, int64_t plane, const int64_t* offsets, int64_t taps, int64_t depth,
                const T* b, T* sum, int64_t pitch) {
  if (channels != kChannels) {
    if constexpr (kChannels > 1 && kColumns == max_columns(kChannels))
      run_planar<T, kChannels - 1>(channels, vectors, a, plane, offsets, taps, depth, b, sum, pitch);
  } else if (vectors == kColumns) {
    planar_tile<T, kChannels, kColumns>(a, plane, offsets, taps, depth, b, sum, pitch);
  } else if constexpr (kColumns > 1) {
    run_planar<T, kChannels, kColumns - 1>(channels, vectors, a, plane, offsets, taps, depth, b, sum, pitch);
  }
}

// ------------------------------------------------------------------------------------------------ element types

struct float16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "only the type of the same bits changes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) { return bits_as<float>(uint32_t{value.bits} << 16); }

// By integers, and a difference of normal numbers: subnormal floats count as zero where the caller has flushing on.
inline float widen(float16 value) {
  const uint32_t magnitude = (uint32_t{value.bits} & 0x7fff) << 13;
  const uint32_t sign = (uint32_t{value.bits} & 0x8000) << 16;
  // A subnormal is a multiple of 2^-24, which is the unit of 1/2 in a float.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(0x3f000000 + (magnitude >> 13)) - 0.5f);
  const uint32_t normal = magnitude + 0x38000000;   // exponent bias 127 for 15
  const uint32_t special = magnitude + 0x70000000;  // infinities and NaN
  const uint32_t finite = magnitude < 0x00800000 ? subnormal : normal;
  return bits_as<float>(sign | (magnitude >= 0x0f800000 ? special : finite));
}

inline void narrow(float value, float& to) { to = value; }
inline void narrow(double value, double& to) { to = value; }

// To nearest, ties to even; a NaN stays one.
inline void narrow(float value, bfloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40 : rounded);
}

inline void narrow(float value, float16& to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Adding 1/2 rounds a subnormal to a multiple of its unit 2^-24, which is that of 1/2 in a float.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  to.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000) | (magnitude >= 0x47800000 ? special : finite));
}

// ---------------------------------------------------------------------------------------------------- memory

// Which lanes of two rows, one after the other, make up the upper or the lower of them once their halves are exchanged at a
// distance. Written out as constants, which the compiler does not make of a loop.
template <typename T, bool kLower, int kDistance, int... kLane>
inline Register<Index<T>> exchange(std::integer_sequence<int, kLane...>) {
  constexpr int kSize = sizeof...(kLane);
  return Register<Index<T>>{Index<T>((kLane & kDistance ? kSize + kLane - kDistance : kLane) + (kLower ? kDistance : 0))...};
}

// A square of vectors turned over its diagonal: halves are exchanged at every distance that is a power of two.
template <typename T, int kDistance = 1>
inline void transpose(Register<T> (&rows)[kLanes<T>]) {
  constexpr int kSize = kLanes<T>;
  using Lanes = std::make_integer_sequence<int, kSize>;
  const Register<Index<T>> first = exchange<T, false, kDistance>(Lanes{}), second = exchange<T, true, kDistance>(Lanes{});
#pragma GCC unroll 16
  for (int row = 0; row < kSize; ++row) {
    if (row & kDistance) continue;
    const Register<T> upper = rows[row], lower = rows[row + kDistance];
    rows[row] = __builtin_shuffle(upper, lower, first);
    rows[row + kDistance] = __builtin_shuffle(upper, lower, second);
  }
  if constexpr (2 * kDistance < kSize) transpose<T, 2 * kDistance>(rows);
}

template <typename T, typename Source>
inline Register<T> load_widened(const Source* from) {
  if constexpr (std::is_same_v<T, Source>) return load_vector(from);
  T wide[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) wide[i] = widen(from[i]);
  return load_vector(wide);
}

template <typename T, typename Target>
inline void store_narrowed(const Register<T>& vector, Target* to) {
  if constexpr (std::is_same_v<T, Target>) return store_vector(vector, to);
  T wide[kLanes<T>];
  store_vector(vector, wide);
  for (int i = 0; i < kLanes<T>; ++i) narrow(wide[i], to[i]);
}

// The first `count` lanes alone.
template <typename T, typename Source>
inline Register<T> load_widened(const Source* from, int64_t count) {
  if (count == kLanes<T>) return load_widened<T>(from);
  T wide[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) wide[i] = widen(from[i]);
  return load_vector(wide);
}

template <typename T, typename Target>
inline void store_narrowed(const Register<T>& vector, Target* to, int64_t count) {
  if (count == kLanes<T>) return store_narrowed<T>(vector, to);
  T wide[kLanes<T>];
  store_vector(vector, wide);
  for (int64_t i = 0; i < count; ++i) narrow(wide[i], to[i]);
}

// to[column * to_pitch + row] = from[row * from_pitch + column], in squares of vectors; T is the wider of the two types.
template <typename T, typename Source, typename Target>
void turn(const Source* from, int64_t from_pitch, int64_t rows, int64_t columns, Target* to, int64_t to_pitch) {
  constexpr int64_t kSize = kLanes<T>;
  for (int64_t row = 0; row < rows; row += kSize)
    for (int64_t column = 0; column < columns; column += kSize) {
      const int64_t height = rows - row < kSize ? rows - row : kSize, width = columns - column < kSize ? columns - column : kSize;
      const Source* corner = from + row * from_pitch + column;
      Target* turned = to + column * to_pitch + row;
      if (2 * height < kSize || 2 * width < kSize) {  // too little for shuffles to pay
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) narrow(T(widen(corner[i * from_pitch + j])), turned[j * to_pitch + i]);
        continue;
      }
      Register<T> square[kSize];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSize; ++i)
        square[i] = i < height ? load_widened<T>(corner + i * from_pitch, width) : Register<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kSize; ++j)
        if (j < width) store_narrowed<T>(square[j], turned + j * to_pitch, height);
    }
}

// A block whose rows follow each other is one row: few columns would be too short for vectors.
template <typename... Pitches>
inline void join_rows(int64_t& rows, int64_t& columns, Pitches... pitches) {
  if (!((pitches == columns) && ...)) return;
  columns *= rows;
  rows = 1;
}

// to[row * to_row + column * to_column] = from[row * from_row + column * from_column], whichever way is contiguous.
template <typename T, typename Source, typename Target>
void copy(const Source* from, int64_t from_row, int64_t from_column, int64_t rows, int64_t columns, Target* to, int64_t to_row,
          int64_t to_column) {
  if (from_column == 1 && to_column == 1) {
    join_rows(rows, columns, from_row, to_row);
    const int64_t all = rows * columns;
    const bool repeats = from_row == 0 && to_row == columns;  // as bounds of channels do
    if (repeats && rows > 1) rows = 1;
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC ivdep
      for (int64_t column = 0; column < columns; ++column)
        narrow(T(widen(from[row * from_row + column])), to[row * to_row + column]);
    if (repeats)
      for (int64_t done = columns; done < all; done *= 2)
        std::memcpy(to + done, to, static_cast<size_t>(done < all - done ? done : all - done) * sizeof(Target));
  } else if (from_row == 1 && to_column == 1) {
    turn<T>(from, from_column, columns, rows, to, to_row);
  } else if (from_column == 1 && to_row == 1) {
    turn<T>(from, from_row, rows, columns, to, to_column);
  } else {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column)
        narrow(T(widen(from[row * from_row + column * from_column])), to[row * to_row + column * to_column]);
  }
}

// Calls body with a pointer to elements of their own type.
template <typename Sum, typename Pointer, typename Body>
inline void typed(Element type, Pointer pointer, Body body) {
  constexpr bool kConstant = std::is_same_v<Pointer, const void*>;
  const auto as = [&](auto element) {
    using Type = std::conditional_t<kConstant, const decltype(element), decltype(element)>;
    body(static_cast<Type*>(pointer));
  };
  if constexpr (sizeof(Sum) == sizeof(double)) {
    as(double{});
  } else {
    if (type == Element::BFloat16) return as(bfloat16{});
    if (type == Element::Float16) return as(float16{});
    as(float{});
  }
}

template <typename Sum>
void load(Element type, const void* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Sum* to,
          int64_t pitch) {
  typed<Sum>(type, from, [&](auto* data) { copy<Sum>(data, row_stride, column_stride, rows, columns, to, pitch, 1); });
}

// Streams body(row, column), a vector, to all of a block; false, and nothing done, where the block is not made of whole lines.
template <typename Sum, typename Body>
inline bool streamed(int64_t rows, int64_t columns, Sum* to, int64_t pitch, Body body) {
  constexpr int64_t kStep = kLanes<Sum>, kLine = kLineBytes / sizeof(Sum);
  const bool is_aligned = reinterpret_cast<uintptr_t>(to) % kLineBytes == 0 && (rows == 1 || pitch % kLine == 0);
  if (!is_aligned || columns % kLine != 0) return false;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += kStep) stream_vector(body(row, column), to + row * pitch + column);
  return true;
}

// The same of narrower numbers, line by line.
template <typename Sum, typename Target>
inline bool stream_narrowed(const Sum* from, int64_t pitch, int64_t rows, int64_t columns, Target* to, int64_t to_pitch) {
  constexpr int64_t kLine = kLineBytes / sizeof(Target), kStep = kVectorBytes / sizeof(Target);
  const bool is_aligned = reinterpret_cast<uintptr_t>(to) % kLineBytes == 0 && (rows == 1 || to_pitch % kLine == 0);
  if (!is_aligned || columns % kLine != 0) return false;
  using Bits = typename VectorOf<uint16_t, kStep>::Register;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += kLine) {
      alignas(kLineBytes) Target line[kLine];
      for (int64_t i = 0; i < kLine; ++i) narrow(from[row * pitch + column + i], line[i]);
      for (int64_t i = 0; i < kLine; i += kStep) {
        Bits bits;
        std::memcpy(&bits, line + i, sizeof(bits));
        stream_vector(bits, to + row * to_pitch + column + i);
      }
    }
  return true;
}

template <typename Sum>
void store(Element type, const Sum* from, int64_t pitch, int64_t rows, int64_t columns, void* to, int64_t row_stride,
           int64_t column_stride, bool stream) {
  typed<Sum>(type, to, [&](auto* data) {
    using Target = std::remove_pointer_t<decltype(data)>;
    if (stream && column_stride == 1) {
      if constexpr (std::is_same_v<Target, Sum>) {
        const auto vector = [=](int64_t row, int64_t column) { return load_vector(from + row * pitch + column); };
        if (streamed(rows, columns, data, row_stride, vector)) return;
      } else {
        if (stream_narrowed(from, pitch, rows, columns, data, row_stride)) return;
      }
    }
    copy<Sum>(from, pitch, 1, rows, columns, data, row_stride, column_stride);
  });
}

// ------------------------------------------------------------------------------------------------ arithmetic

// Calls body(row * pitch + column) for the elements of a block.
template <typename Body>
inline void each(int64_t rows, int64_t columns, Body body) {
  for (int64_t row = 0; row < rows; ++row)
#pragma GCC ivdep
    for (int64_t column = 0; column < columns; ++column) body(row, column);
}

// Rows of few columns are too short for vectors: so many numbers are put next to each other, or apart, on their way.
constexpr int64_t kGathered = 1024;

template <typename T>
inline bool has_few(int64_t rows, int64_t columns) {
  return rows > 1 && columns > 0 && 2 * columns < kLanes<T>;
}

// Calls body(first, count) for as many rows at a time as can be gathered.
template <typename Body>
inline void each_gathered(int64_t rows, int64_t columns, Body body) {
  const int64_t most = kGathered / columns;
  for (int64_t row = 0; row < rows; row += most) body(row, rows - row < most ? rows - row : most);
}

// to[row * to_pitch + column] = from[row * from_pitch + column], of few columns.
template <typename T, int kColumns = 4>
inline void move_rows(int64_t rows, int64_t columns, const T* from, int64_t from_pitch, T* to, int64_t to_pitch) {
  if (columns == kColumns) {
    for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * to_pitch, from + row * from_pitch, kColumns * sizeof(T));
  } else if constexpr (kColumns > 1) {
    move_rows<T, kColumns - 1>(rows, columns, from, from_pitch, to, to_pitch);
  } else {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column) to[row * to_pitch + column] = from[row * from_pitch + column];
  }
}

template <typename Sum>
void regroup(int64_t rows, int64_t groups, int64_t channels, const Sum* from, int64_t from_pitch, int64_t of_group, Sum* to,
             int64_t to_pitch, int64_t to_group) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t channel = 0; channel < channels; ++channel)
        to[row * to_pitch + group * to_group + channel] = from[row * from_pitch + group * of_group + channel];
}

// Comparisons are written so that a NaN is kept.
template <typename Sum>
void lift(Lift lift, int part, int64_t rows, int64_t columns, const Sum* x, const Sum* bound, Sum* to, int64_t pitch) {
  join_rows(rows, columns, pitch);
  if (lift == Lift::Signed && part == 0)
    each(rows, columns, [=](int64_t r, int64_t c) { to[r * pitch + c] = x[r * pitch + c] < 0 ? Sum(0) : x[r * pitch + c]; });
  if (lift == Lift::Signed && part == 1)
    each(rows, columns, [=](int64_t r, int64_t c) { to[r * pitch + c] = x[r * pitch + c] > 0 ? Sum(0) : -x[r * pitch + c]; });
  if (lift == Lift::Box && part == 0)
    each(rows, columns, [=](int64_t r, int64_t c) { to[r * pitch + c] = x[r * pitch + c] - bound[r * pitch + c]; });
  if (lift == Lift::Box && part == 1)
    each(rows, columns, [=](int64_t r, int64_t c) { to[r * pitch + c] = bound[r * pitch + c] - x[r * pitch + c]; });
}

template <typename Sum>
void round(Digit digit, int64_t rows, int64_t columns, const Sum* from, int64_t from_pitch, bfloat16* to, int64_t to_pitch) {
  join_rows(rows, columns, from_pitch, to_pitch);
  if (has_few<Sum>(rows, columns) && from_pitch == columns)
    return each_gathered(rows, columns, [=](int64_t row, int64_t count) {
      bfloat16 rounded[kGathered];
      round(digit, 1, count * columns, from + row * columns, 0, rounded, 0);
      move_rows(count, columns, rounded, columns, to + row * to_pitch, to_pitch);
    });
  if (digit == Digit::High) {
    each(rows, columns,
         [=](int64_t r, int64_t c) { narrow(static_cast<float>(from[r * from_pitch + c]), to[r * to_pitch + c]); });
  } else {
    each(rows, columns, [=](int64_t r, int64_t c) {
      const float value = static_cast<float>(from[r * from_pitch + c]);
      bfloat16 high;
      narrow(value, high);
      const float rest = value - widen(high);
      narrow(rest - rest == 0 ? rest : 0.0f, to[r * to_pitch + c]);  // of an infinity or a NaN nothing is left over
    });
  }
}

template <typename Sum>
constexpr Sum smallest_normal() {
  return sizeof(Sum) == sizeof(double) ? Sum(0x1p-1022) : Sum(0x1p-126);
}

// R / z, of scalars or vectors. A subnormal denominator counts as zero, since the quotient would overflow; nothing is passed
// where it vanishes.
template <typename Sum, typename Value>
inline Value quotient(Value relevance, Value z, Sum stabilizer) {
  const Value zero{}, one = zero + Sum(1), added = zero + stabilizer;
  if (stabilizer != 0) return relevance / (z < zero ? z - added : z + added);
  const auto vanishes = (z < zero ? -z : z) < zero + smallest_normal<Sum>();
  const Value passed = relevance / (vanishes ? one : z);
  return vanishes ? zero : passed;
}

template <typename Sum>
void divide(int64_t rows, int64_t columns, const Sum* sums, int64_t sums_pitch, Sum stabilizer, const Sum* relevance,
            int64_t pitch, Sum* to, int64_t to_pitch, bool stream) {
  if (stream && streamed(rows, columns, to, to_pitch, [=](int64_t row, int64_t column) {
        return quotient(load_vector(relevance + row * pitch + column), load_vector(sums + row * sums_pitch + column), stabilizer);
      }))
    return;
  each(rows, columns, [=](int64_t r, int64_t c) {
    to[r * to_pitch + c] = quotient(relevance[r * pitch + c], sums[r * sums_pitch + c], stabilizer);
  });
}

template <typename Sum>
void multiply(int64_t rows, int64_t columns, const Sum* sums, int64_t sums_pitch, const Sum* u, int64_t pitch, bool add, Sum* to,
              int64_t to_pitch, bool stream) {
  if (stream && !add && streamed(rows, columns, to, to_pitch, [=](int64_t row, int64_t column) {
        return load_vector(u + row * pitch + column) * load_vector(sums + row * sums_pitch + column);
      }))
    return;
  join_rows(rows, columns, sums_pitch, pitch, to_pitch);
  if (has_few<Sum>(rows, columns) && pitch == columns && to_pitch == columns)
    return each_gathered(rows, columns, [=](int64_t row, int64_t count) {
      Sum gathered[kGathered];
      move_rows(count, columns, sums + row * sums_pitch, sums_pitch, gathered, columns);
      multiply(1, count * columns, gathered, 0, u + row * columns, 0, add, to + row * columns, 0, false);
    });
  if (add) {
    each(rows, columns, [=](int64_t r, int64_t c) { to[r * to_pitch + c] += u[r * pitch + c] * sums[r * sums_pitch + c]; });
  } else {
    each(rows, columns, [=](int64_t r, int64_t c) { to[r * to_pitch + c] = u[r * pitch + c] * sums[r * sums_pitch + c]; });
  }
}

template <typename Sum>
void share(int64_t count, const Sum* x, const Sum* other, Sum alpha, Sum stabilizer, const Sum* relevance, Sum* to, Sum* to_other,
           bool stream) {
  using Vector = Register<Sum>;
  constexpr int64_t kStep = kLanes<Sum>;
  const Vector zero = {}, one = zero + 1, least = zero + (stabilizer > 0 ? Sum(0) : smallest_normal<Sum>());
  const auto shared = [=](Vector first, Vector second, Vector given, Vector(&shares)[2]) {
    second *= alpha;
    first = first < zero ? zero : first;
    second = second < zero ? zero : second;
    const Vector sum = first + second + stabilizer;
    const auto vanishes = sum < least;
    const Vector quotient = given / (vanishes ? one : sum), s = vanishes ? zero : quotient;
    shares[0] = first * s;
    shares[1] = second * s;
  };
  const bool is_aligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(to_other)) % kLineBytes == 0;
  const bool whole_lines = stream && is_aligned && count * static_cast<int64_t>(sizeof(Sum)) % kLineBytes == 0;
  Vector shares[2];
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    shared(load_vector(x + i), load_vector(other + i), load_vector(relevance + i), shares);
    if (whole_lines) {
      stream_vector(shares[0], to + i);
      stream_vector(shares[1], to_other + i);
    } else {
      store_vector(shares[0], to + i);
      store_vector(shares[1], to_other + i);
    }
  }
  if (i == count) return;
  const auto rest = [=](const Sum* from) { return load_widened<Sum>(from + i, count - i); };
  shared(rest(x), rest(other), rest(relevance), shares);
  store_narrowed<Sum>(shares[0], to + i, count - i);
  store_narrowed<Sum>(shares[1], to_other + i, count - i);
}

// Words of 32 bits in streams, one for each lane of a few vectors: every step is one to one in the word and in what came before,
// so no change of a word is lost; rotations bring high bits to where multiplication spreads them.
inline void digest(const void* data, int64_t bytes, uint64_t (&to)[2]) {
  constexpr int kPlaces = 4, kNeighbours = 2, kStreams = kPlaces * kNeighbours, kWords = kVectorBytes / sizeof(uint32_t);
  constexpr uint32_t kOdd = 0x9e3779b1, kSum = 0x85ebca77;
  typedef typename VectorOf<uint32_t, kWords>::Register Words;
  const auto* from = static_cast<const unsigned char*>(data);
  Words sums[kStreams];
  for (int i = 0; i < kStreams; ++i)
    for (int lane = 0; lane < kWords; ++lane) sums[i][lane] = kSum * static_cast<uint32_t>(i * kWords + lane + 1);
  const auto mix = [&](const unsigned char* first, int64_t pitch) {
#pragma GCC unroll 8
    for (int i = 0; i < kStreams; ++i) {
      Words word;
      std::memcpy(&word, first + i / kNeighbours * pitch + i % kNeighbours * kVectorBytes, sizeof(word));
      word ^= sums[i];
      sums[i] = (word << 13 | word >> 19) * kOdd + kSum;
    }
  };
  // Memory is read at several places at once: 15 GB/s come from them, 10.5 from one, measured on one core of a Xeon.
  constexpr int64_t kBlock = kStreams * kVectorBytes, kStep = kNeighbours * kVectorBytes, kAhead = 1024;
  const int64_t place = bytes / kBlock * kStep;
  for (int64_t at = 0; at < place; at += kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < kPlaces; ++i)
      for (int64_t line = 0; line < kStep; line += kLineBytes) __builtin_prefetch(from + i * place + at + kAhead + line);
    mix(from + at, place);
  }
  if (const int64_t done = place * kPlaces; done < bytes) {
    unsigned char rest[kBlock] = {};
    std::memcpy(rest, from + done, static_cast<size_t>(bytes - done));
    mix(rest, kStep);
  }
  to[0] = to[1] = static_cast<uint64_t>(bytes);
  for (int i = 0; i < kStreams; ++i)
    for (int lane = 0; lane < kWords; ++lane) {
      to[0] = (to[0] ^ sums[i][lane]) * 0x9e3779b97f4a7c15;
      to[0] ^= to[0] >> 29;
      to[1] = (to[1] ^ sums[i][lane]) * 0xc2b2ae3d27d4eb4f;
      to[1] ^= to[1] >> 31;
    }
}

template <typename Sum>
void add(int64_t count, const Sum* more, Sum* sums) {
  each(1, count, [=](int64_t, int64_t i) { sums[i] += more[i]; });
}

// --------------------------------------------------------------------------------------------- rows of a filter

// Scalars or vectors; a NaN is kept.
template <Sign kSign, typename Value>
inline Value part_of(Value weight) {
  if constexpr (kSign == Sign::Positive) return weight < Value{} ? Value{} : weight;
  if constexpr (kSign == Sign::Negative) return weight > Value{} ? Value{} : -weight;
  return weight;
}

// So many rows times so many vectors of numbers are summed at once: weights are taken from the cache once for all of them.
constexpr int kRowsAtOnce = 4, kVectorsAtOnce = kVectorBytes == 64 ? 4 : 2;

// Half of the rows that are needed next, one half while sums are taken and the other while they are given back, so that memory is
// never idle.
template <int kRows, bool kSecondHalf, typename Source>
inline void approach_rows(const Source* weights, int64_t columns, int64_t column) {
  constexpr int kHalf = (kRows + 1) / 2;
#pragma GCC unroll 4
  for (int row = kSecondHalf ? kHalf : 0; row < (kSecondHalf ? kRows : kHalf); ++row)
    __builtin_prefetch(weights + (kRows + row) * columns + column, 0, 2);
}

template <Sign kSign, int kRows, int kVectors, typename Source, typename Sum>
void dot_rows(const Source* weights, int64_t columns, const Sum* u, int64_t u_pitch, Sum* z, int64_t z_pitch) {
  constexpr int kStep = kLanes<Sum>;
  Register<Sum> sums[kVectors][kRows]{};
  int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) {
    Register<Sum> parts[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) parts[row] = part_of<kSign>(load_widened<Sum>(weights + row * columns + column));
    if constexpr (kSign != Sign::Both) approach_rows<kRows, false>(weights, columns, column);  // spread comes between
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const Register<Sum> input = load_vector(u + i * u_pitch + column);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) sums[i][row] += input * parts[row];
    }
  }
  for (int i = 0; i < kVectors; ++i)
    for (int row = 0; row < kRows; ++row) {
      Sum total = 0;
      for (int lane = 0; lane < kStep; ++lane) total += sums[i][row][lane];
      for (int64_t rest = column; rest < columns; ++rest)
        total += u[i * u_pitch + rest] * part_of<kSign>(Sum(widen(weights[row * columns + rest])));
      z[i * z_pitch + row] += total;
    }
}

template <Sign kSign, int kRows, int kVectors, typename Source, typename Sum>
void spread_rows(const Source* weights, int64_t columns, const Sum* s, int64_t s_pitch, Sum* to, int64_t to_pitch) {
  constexpr int kStep = kLanes<Sum>;
  int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) {
    Register<Sum> parts[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) parts[row] = part_of<kSign>(load_widened<Sum>(weights + row * columns + column));
    approach_rows<kRows, true>(weights, columns, column);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      Register<Sum> sum = load_vector(to + i * to_pitch + column);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) sum += s[i * s_pitch + row] * parts[row];
      store_vector(sum, to + i * to_pitch + column);
    }
  }
  for (; column < columns; ++column)
    for (int i = 0; i < kVectors; ++i)
      for (int row = 0; row < kRows; ++row)
        to[i * to_pitch + column] += s[i * s_pitch + row] * part_of<kSign>(Sum(widen(weights[row * columns + column])));
}

// Calls body(how many, first) until all are done, `kMost` at once or one by one.
template <int kMost, typename Body>
inline void each_few(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kMost <= count; i += kMost) body(std::integral_constant<int, kMost>{}, i);
  for (; i < count; ++i) body(std::integral_constant<int, 1>{}, i);
}

// Calls body(sign, how many rows, how many vectors, first row, first vector) until all are done.
template <typename Body>
inline void each_few_of_both(Sign sign, int64_t rows, int64_t vectors, Body body) {
  const auto with_sign = [&](auto of_sign) {
    each_few<kRowsAtOnce>(rows, [&](auto row_count, int64_t row) {
      each_few<kVectorsAtOnce>(vectors, [&](auto count, int64_t i) { body(of_sign, row_count, count, row, i); });
    });
  };
  if (sign == Sign::Both) with_sign(std::integral_constant<Sign, Sign::Both>{});
  if (sign == Sign::Positive) with_sign(std::integral_constant<Sign, Sign::Positive>{});
  if (sign == Sign::Negative) with_sign(std::integral_constant<Sign, Sign::Negative>{});
}

template <typename Sum>
void dot(Element type, const void* weights, int64_t rows, int64_t columns, Sign sign, int64_t vectors, const Sum* u,
         int64_t u_pitch, Sum* z, int64_t z_pitch) {
  typed<Sum>(type, weights, [&](auto* data) {
    each_few_of_both(sign, rows, vectors, [&](auto of_sign, auto row_count, auto count, int64_t row, int64_t i) {
      dot_rows<of_sign(), row_count(), count()>(data + row * columns, columns, u + i * u_pitch, u_pitch, z + i * z_pitch + row,
                                                z_pitch);
    });
  });
}

template <typename Sum>
void spread(Element type, const void* weights, int64_t rows, int64_t columns, Sign sign, int64_t vectors, const Sum* s,
            int64_t s_pitch, Sum* to, int64_t to_pitch) {
  typed<Sum>(type, weights, [&](auto* data) {
    each_few_of_both(sign, rows, vectors, [&](auto of_sign, auto row_count, auto count, int64_t row, int64_t i) {
      spread_rows<of_sign(), row_count(), count()>(data + row * columns, columns, s + i * s_pitch + row, s_pitch,
                                                   to + i * to_pitch, to_pitch);
    });
  });
}

template <typename Sum>
constexpr Loops<Sum> kLoops{load<Sum>,     store<Sum>, regroup<Sum>, lift<Sum>, round<Sum>, divide<Sum>,
                            multiply<Sum>, share<Sum>, digest,       add<Sum>,  dot<Sum>,   spread<Sum>};

static_assert(kLanes<float> * kVectors <= kMostChannels);

template <typename T>
constexpr MicroKernel<T, T> kTile{CAPTUM_DTD_ISA, kMaxPositions, kLanes<T> * kVectors, 1, run_tile<T>};

template <typename T, int... kOfGroup>
inline const MicroKernel<T, T>* groups_kernel(int64_t of_group, std::integer_sequence<int, kOfGroup...>) {
  static constexpr MicroKernel<T, T> kKernels[] = {
      {CAPTUM_DTD_ISA, kMaxGroupPositions, kLanes<T>, kOfGroup + 1, run_groups<T, kOfGroup + 1>, 1, nullptr, kOfGroup == 0}...};
  return of_group <= int64_t{sizeof...(kOfGroup)} ? &kKernels[of_group - 1] : nullptr;
}

// One for groups of one channel alone, where registers cannot be shuffled.
template <typename T>
inline const MicroKernel<T, T>* groups_kernel(int64_t of_group) {
  constexpr int kMost = kShuffles ? kLanes<T> : 1;
  return groups_kernel<T>(of_group, std::make_integer_sequence<int, kMost>{});
}

template <typename T>
constexpr PlanarKernel<T, T> kPlanar{
    kLanes<T>,
    {0, max_columns(1), max_columns(2), max_columns(3), max_columns(4), max_columns(5), max_columns(6)},
    run_planar<T>};

}  // namespace
}  // namespace captum_dtd::cpu
