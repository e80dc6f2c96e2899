// The loops of pool_loops.h, a vector of lanes at a time, on the compiler's portable vectors.
//
// Included once by each max_pool3d_<isa>.cpp, which is compiled with that set's own flags. As in vector_kernel.h everything is in
// an anonymous namespace and nothing of the standard library is called.
#pragma once

#include <cstring>

#include "pool_loops.h"
#include "streaming.h"

namespace captum_dtd::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename Sum>
constexpr int64_t kVectorLanes = kVectorBytes / sizeof(Sum);

// Some lanes of a row. All of a vector is the usual case, which the compiler must know to be one instruction.
template <typename T>
inline Vector<T> load(const T* from, int64_t lanes) {
  Vector<T> v = {};
  if (lanes == kVectorLanes<T>)
    std::memcpy(&v, from, sizeof v);
  else
    std::memcpy(&v, from, lanes * sizeof(T));
  return v;
}

template <typename T>
inline void store(Vector<T> v, T* to, int64_t lanes) {
  if (lanes == kVectorLanes<T>)
    std::memcpy(to, &v, sizeof v);
  else
    std::memcpy(to, &v, lanes * sizeof(T));
}

// Calls body(element, number of elements) for vector after vector of a row. The last vector may reach back into the one before:
// what is computed there once more must not have been overwritten.
template <typename Sum, typename Body>
inline void each_vector(int64_t elements, Body body) {
  constexpr int64_t kLanes = kVectorLanes<Sum>;
  if (elements < kLanes) return body(0, elements);
  for (int64_t i = 0; i + kLanes <= elements; i += kLanes) body(i, kLanes);
  if (elements % kLanes) body(elements - kLanes, kLanes);
}

// Calls body(begin, end) for what i meets. Few meetings are told apart, so that the compiler sees how many there are.
template <typename Body>
inline void with_meetings(const Meetings& meetings, int64_t i, Body body) {
  const Meeting* begin = meetings.list + meetings.first[i];
  const int64_t count = meetings.first[i + 1] - meetings.first[i];
  if (count == 1) return body(begin, begin + 1);
  if (count == 2) return body(begin, begin + 2);
  if (count == 3) return body(begin, begin + 3);
  body(begin, begin + count);
}

// Comparisons are written so that a NaN is kept.
template <typename Sum>
inline Vector<Sum> positive(Vector<Sum> x) {
  const Vector<Sum> zero = {};
  return x < zero ? zero : x;
}

// to[i] = sum of what i meets.
template <typename Sum>
inline void sum_met(const Meetings& meetings, int64_t count, int64_t lanes, const Sum* from, Sum* to) {
  for (int64_t i = 0; i < count; ++i)
    with_meetings(meetings, i, [=](const Meeting* begin, const Meeting* end) __attribute__((always_inline)) {
      each_vector<Sum>(lanes, [=](int64_t lane, int64_t some) {
        Vector<Sum> sum = {};
        for (const Meeting* m = begin; m < end; ++m) sum += load(from + m->at * lanes + lane, some);
        store(sum, to + i * lanes + lane, some);
      });
    });
}

// The larger of two, or the last that is NaN.
template <typename Sum>
inline Vector<Sum> larger(Vector<Sum> best, Vector<Sum> x) {
  return (x > best) | (x != x) ? x : best;
}

// Lets what a row of the input has a little further on come nearer, beyond its end too, where the next tile's rows begin: the
// processor's own looking ahead ends with each page. Such rows are read once, and that takes most of the time.
template <typename T>
inline void approach(const T* row) {
  __builtin_prefetch(reinterpret_cast<const char*>(row) + 2048, 0, 2);
}

template <typename Sum>
void largest(const PoolRow& row, int64_t lanes, int64_t rows, const Sum* const* x, Sum* columns, Sum* to) {
  const Vector<Sum> none = Vector<Sum>{} - static_cast<Sum>(__builtin_inf());
  each_vector<Sum>(row.positions * lanes, [=](int64_t i, int64_t some) {
    Vector<Sum> best = none;
    for (int64_t r = 0; r < rows; ++r) {
      approach(x[r] + i);
      best = larger<Sum>(best, load(x[r] + i, some));
    }
    store(best, columns + i, some);
  });
  for (int64_t o = 0; o < row.windows; ++o)
    with_meetings(row.of_windows, o, [=](const Meeting* begin, const Meeting* end) __attribute__((always_inline)) {
      each_vector<Sum>(lanes, [=](int64_t lane, int64_t some) {
        Vector<Sum> best = none;
        for (const Meeting* m = begin; m < end; ++m) best = larger<Sum>(best, load(columns + m->at * lanes + lane, some));
        store(best, to + o * lanes + lane, some);
      });
    });
}

template <typename Sum>
void sum(const PoolRow& row, int64_t lanes, int64_t rows, const Sum* const* x, Sum* columns, Sum* sums) {
  each_vector<Sum>(row.positions * lanes, [=](int64_t i, int64_t some) {
    Vector<Sum> sum = {};
    for (int64_t r = 0; r < rows; ++r) {
      approach(x[r] + i);
      sum += positive<Sum>(load(x[r] + i, some));
    }
    store(sum, columns + i, some);
  });
  sum_met(row.of_windows, row.windows, lanes, columns, sums);
}

template <typename Sum>
void total(int64_t count, int64_t rows, const Sum* const* from, Sum* to) {
  each_vector<Sum>(count, [=](int64_t i, int64_t some) {
    Vector<Sum> sum = {};
    for (int64_t r = 0; r < rows; ++r) sum += load(from[r] + i, some);
    store(sum, to + i, some);
  });
}

template <typename Sum>
void share(const PoolRow& row, int64_t lanes, int64_t rows, const Sum* const* sums, const Sum* relevance, Sum stabilizer,
           Sum* columns, Sum* shares) {
  // A subnormal sum counts as zero, since the quotient would overflow; a window without a sum passes nothing.
  constexpr Sum kSmallestNormal = sizeof(Sum) == sizeof(double) ? Sum(0x1p-1022) : Sum(0x1p-126);
  const Vector<Sum> zero = {}, least = zero + (stabilizer > 0 ? Sum(0) : kSmallestNormal);
  each_vector<Sum>(row.windows * lanes, [=](int64_t o, int64_t some) {
    Vector<Sum> sum = zero;
    for (int64_t r = 0; r < rows; ++r) sum += load(sums[r] + o, some);
    sum += stabilizer;
    const auto vanishes = sum < least;
    const Vector<Sum> quotient = load(relevance + o, some) / (vanishes ? zero + 1 : sum);
    store(vanishes ? zero : quotient, columns + o, some);
  });

  sum_met(row.of_positions, row.positions, lanes, columns, shares);
}

template <typename Sum>
void gather(int64_t count, int64_t rows, const Sum* const* shares, const Sum* x, Sum* out, bool stream) {
  const auto gathered = [=](int64_t i, int64_t some) {
    Vector<Sum> sum = {};
    for (int64_t r = 0; r < rows; ++r) sum += load(shares[r] + i, some);
    return positive<Sum>(load(x + i, some)) * sum;
  };
  if (stream && count * sizeof(Sum) % kLineBytes == 0 && reinterpret_cast<uintptr_t>(out) % kLineBytes == 0)
    return each_vector<Sum>(count, [=](int64_t i, int64_t some) { stream_vector(gathered(i, some), out + i); });
  each_vector<Sum>(count, [=](int64_t i, int64_t some) { store(gathered(i, some), out + i, some); });
}

template <typename Sum>
void compete(const PoolRow& row, int64_t lanes, int64_t rows, const Sum* const* x, const int64_t* first_tap, Sum* columns,
             typename PoolLoops<Sum>::Tap* column_winners, typename PoolLoops<Sum>::Tap* winners) {
  using Tap = typename PoolLoops<Sum>::Tap;
  const Vector<Tap> none = Vector<Tap>{} - 1;
  // Within a column the first maximum wins, or the last NaN.
  each_vector<Sum>(row.positions * lanes, [=](int64_t i, int64_t some) {
    Vector<Sum> best = load(x[0] + i, some);
    Vector<Tap> winner = Vector<Tap>{} + static_cast<Tap>(first_tap[0]);
    approach(x[0] + i);
    for (int64_t r = 1; r < rows; ++r) {
      approach(x[r] + i);
      const Vector<Sum> value = load(x[r] + i, some);
      const auto wins = (value > best) | (value != value);
      best = wins ? value : best;
      winner = wins ? Vector<Tap>{} + static_cast<Tap>(first_tap[r]) : winner;
    }
    store(best, columns + i, some);
    store(winner, column_winners + i, some);
  });
  // Among columns likewise, in the order of all taps: that of rows comes before that along W.
  for (int64_t o = 0; o < row.windows; ++o)
    with_meetings(row.of_windows, o, [=](const Meeting* begin, const Meeting* end) __attribute__((always_inline)) {
      each_vector<Sum>(lanes, [=](int64_t lane, int64_t some) {
        Vector<Sum> best = {};
        Vector<Tap> winner = none;
        for (const Meeting* m = begin; m < end; ++m) {
          const Vector<Sum> value = load(columns + m->at * lanes + lane, some);
          const Vector<Tap> tap = load(column_winners + m->at * lanes + lane, some) + static_cast<Tap>(m->tap);
          const auto wins = (winner == none) | (value > best) | ((value == best) & (tap < winner)) |
                            ((value != value) & ((best == best) | (tap > winner)));
          best = wins ? value : best;
          winner = wins ? tap : winner;
        }
        store(winner, winners + o * lanes + lane, some);
      });
    });
}

template <typename Sum>
void award(const PoolRow& row, int64_t lanes, int64_t rows, const typename PoolLoops<Sum>::Tap* const* winners,
           const Sum* const* relevance, const int64_t* first_tap, Sum* out) {
  using Tap = typename PoolLoops<Sum>::Tap;
  for (int64_t i = 0; i < row.positions; ++i)
    with_meetings(row.of_positions, i, [=](const Meeting* begin, const Meeting* end) __attribute__((always_inline)) {
      each_vector<Sum>(lanes, [=](int64_t lane, int64_t some) {
        const Vector<Sum> zero = {};
        Vector<Sum> sum = zero;
        for (int64_t r = 0; r < rows; ++r)
          for (const Meeting* m = begin; m < end; ++m) {
            const int64_t o = m->at * lanes + lane;
            const auto won = load(winners[r] + o, some) == static_cast<Tap>(first_tap[r] + m->tap);
            sum += won ? load(relevance[r] + o, some) : zero;
          }
        store(sum, out + i * lanes + lane, some);
      });
    });
}

template <typename Sum>
constexpr PoolLoops<Sum> kPoolLoops{largest<Sum>, sum<Sum>, share<Sum>, total<Sum>, gather<Sum>, compete<Sum>, award<Sum>};

}  // namespace
}  // namespace captum_dtd::cpu
