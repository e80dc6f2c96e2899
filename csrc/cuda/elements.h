// What kernels have in common that take elements by themselves: one thread for each, or for a few neighbours in memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "device.h"

namespace captum_dtd::cuda {

constexpr int kThreads = 128;  // of a block
constexpr int kVector = 4;     // neighbours that a thread reads and writes at once: 16 bytes of relevance

template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename Sum>
constexpr Sum kTiny = std::numeric_limits<Sum>::min();  // smaller sums are subnormal: dividing by them overflows

template <typename Sum>
__device__ inline Sum positive_part(Sum value) {
  return value < 0 ? Sum{0} : value;  // keeps NaN
}

// What is passed on for one unit of what was summed. A sum of nothing, or too small to divide by, passes nothing; NaN passes.
template <typename Sum>
__device__ inline Sum divide(Sum relevance, Sum sum, Sum stabilizer) {
  if (stabilizer == 0 && sum < kTiny<Sum>) return 0;
  return relevance / (sum + stabilizer);
}

// `count` neighbours in memory, read and written at once where there are several.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T value[count];
};

template <int count, typename T>
__device__ inline void load(const T* from, SumOf<T> (&to)[count]) {
  const Pack<T, count> pack = *reinterpret_cast<const Pack<T, count>*>(from);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, double>)
      to[i] = pack.value[i];
    else
      to[i] = widen(pack.value[i]);
  }
}

template <int count, typename T>
__device__ inline void store(T* to, const T (&from)[count]) {
  if constexpr (sizeof from == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, from, sizeof bits);
    store_global(to, bits);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = from[i];
  }
}

// Threads of one launch: thread i works on the coordinates of number first + i, in mixed radix.
template <int kLoops>
struct Work {
  unsigned size[kLoops], first[kLoops];
  unsigned count;
};

// Whether this thread has work, and its coordinates. Unsigned 32-bit digits cover work of any size, as launches are limited.
template <int kLoops>
__device__ inline bool coordinates(const Work<kLoops>& work, int (&at)[kLoops]) {
  unsigned rest = blockIdx.x * kThreads + threadIdx.x;
  if (rest >= work.count) return false;
#pragma unroll
  for (int a = kLoops - 1; a >= 0; --a) {
    rest += work.first[a];
    at[a] = static_cast<int>(rest % work.size[a]);
    rest /= work.size[a];
  }
  return true;
}

// Runs a kernel once for each place of a box, by launches of at most `threads` threads.
template <typename Problem, int kLoops>
void launch_each(const char* name, void (*kernel)(Problem, Work<kLoops>), const Problem& problem, const int64_t (&sizes)[kLoops],
                 void* stream, int64_t threads) {
  Work<kLoops> work{};
  int64_t total = 1;
  for (int a = 0; a < kLoops; ++a) {
    work.size[a] = static_cast<unsigned>(sizes[a]);
    total *= sizes[a];
  }
  for (int64_t first = 0; first < total; first += threads) {
    int64_t rest = first;
    for (int a = kLoops - 1; a >= 0; --a) {
      work.first[a] = static_cast<unsigned>(rest % sizes[a]);
      rest /= sizes[a];
    }
    work.count = static_cast<unsigned>(std::min(threads, total - first));
    launch(name, kernel, dim3((work.count + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, problem, work);
  }
}

}  // namespace captum_dtd::cuda
