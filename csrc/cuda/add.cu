// Relevance of the summands of an addition: every operand is read once and every result written once, by vectors of neighbours
// where all of them allow it. Nothing else is to be had from a kernel that is about memory alone.
#include <stdexcept>
#include <type_traits>

#include "../lockstep.h"
#include "add.h"
#include "elements.h"

namespace captum_dtd::cuda {
namespace {

enum Operand { kOut, kOutOther, kX, kOther, kRelevance, kOperands };

constexpr int kAxes = Lockstep<kOperands>::kMostAxes;

struct Addition {
  void* data[kOperands];
  int64_t stride[kAxes][kOperands];
  double alpha, stabilizer;
};

template <typename T>
__device__ inline T* locate(const Addition& addition, Operand operand, const int (&at)[kAxes]) {
  T* data = static_cast<T*>(addition.data[operand]);
#pragma unroll
  for (int a = 0; a < kAxes; ++a) data += addition.stride[a][operand] * at[a];
  return data;
}

template <int vector, typename T>
__global__ void __launch_bounds__(kThreads) share_between_summands(const Addition addition, const Work<kAxes> work) {
  using Sum = SumOf<T>;
  int at[kAxes];
  if (!coordinates(work, at)) return;
  at[kAxes - 1] *= vector;
  Sum x[vector], other[vector], relevance[vector];
  load<vector>(locate<const T>(addition, kX, at), x);
  load<vector>(locate<const T>(addition, kOther, at), other);
  load<vector>(locate<const Sum>(addition, kRelevance, at), relevance);
#pragma unroll
  for (int i = 0; i < vector; ++i) {
    x[i] = positive_part(x[i]);
    other[i] = positive_part(static_cast<Sum>(addition.alpha) * other[i]);
    const Sum s = divide(relevance[i], x[i] + other[i], static_cast<Sum>(addition.stabilizer));
    x[i] *= s;
    other[i] *= s;
  }
  store<vector>(locate<Sum>(addition, kOut, at), x);
  store<vector>(locate<Sum>(addition, kOutOther, at), other);
}

// Whether every operand can be read or written so many neighbours at a time.
bool in_vectors(const Addition& addition, const int64_t (&size)[kAxes], int64_t element_bytes) {
  bool can = size[kAxes - 1] % kVector == 0;
  for (int i = 0; i < kOperands; ++i) {
    const int64_t bytes = i == kX || i == kOther ? element_bytes : 4;
    can = can && addition.stride[kAxes - 1][i] == 1 && reinterpret_cast<uintptr_t>(addition.data[i]) % (bytes * kVector) == 0;
    for (int a = 0; a < kAxes - 1; ++a) can = can && (size[a] == 1 || addition.stride[a][i] % kVector == 0);
  }
  return can;
}

template <typename T>
void run(const AddRelevance& problem, void* stream, int64_t threads) {
  const View* const views[kOperands] = {&problem.out, &problem.out_other, &problem.x, &problem.other, &problem.relevance};
  const Lockstep<kOperands> walk(problem.size, views);
  Addition addition{};
  addition.alpha = problem.alpha;
  addition.stabilizer = problem.stabilizer;
  for (int i = 0; i < kOperands; ++i) addition.data[i] = views[i]->data;
  int64_t size[kAxes];
  const int missing = kAxes - walk.axes;
  for (int a = 0; a < kAxes; ++a) {
    size[a] = a < missing ? 1 : walk.size[a - missing];
    if (size[a] > INT32_MAX) throw std::invalid_argument("this addition is longer than its CUDA kernel can count");
    for (int i = 0; i < kOperands; ++i) addition.stride[a][i] = a < missing ? 0 : walk.stride[a - missing][i];
  }
  if constexpr (!std::is_same_v<T, double>) {
    if (in_vectors(addition, size, sizeof(T))) {
      size[kAxes - 1] /= kVector;
      return launch_each("z_plus_add", share_between_summands<kVector, T>, addition, size, stream, threads);
    }
  }
  launch_each("z_plus_add", share_between_summands<1, T>, addition, size, stream, threads);
}

}  // namespace

void add_relevance(const AddRelevance& problem, void* stream, int64_t threads) {
  switch (problem.element) {
    case Element::Float32: return run<float>(problem, stream, threads);
    case Element::Float64: return run<double>(problem, stream, threads);
    case Element::BFloat16: return run<bfloat16>(problem, stream, threads);
    case Element::Float16: return run<float16>(problem, stream, threads);
  }
}

}  // namespace captum_dtd::cuda
