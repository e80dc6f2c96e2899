// What the hosts of convolutions ask before they launch: how operands lie in memory, how many blocks there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "../problems.h"
#include "device.h"

namespace captum_dtd::cuda {

inline dim3 blocks_for(int64_t count, int64_t each) {
  const int64_t blocks = ceil_div(count, each);
  if (blocks > INT32_MAX) throw std::invalid_argument("this convolution is too large for one launch of its CUDA kernels");
  return dim3(static_cast<unsigned>(blocks));
}

template <typename From, typename To>
void copy(const From (&from)[3], To (&to)[3]) {
  std::copy(from, from + 3, to);
}

// Whether four channels of a tensor are neighbours in memory, and aligned, wherever they begin.
inline bool has_quads(const View& view, Element element) {
  const auto& stride = view.stride;
  const auto whole = [](int64_t elements) { return elements % 4 == 0; };
  return stride[1] == 1 && whole(stride[0]) && whole(stride[2]) && whole(stride[3]) && whole(stride[4]) &&
         reinterpret_cast<uintptr_t>(view.data) % (element == Element::Float32 ? 16 : 8) == 0;
}

// Where so many more bytes of a workspace begin, of which `taken` are taken.
inline int64_t reserve_bytes(int64_t& taken, int64_t bytes) {
  constexpr int64_t kAlignment = 256;
  return std::exchange(taken, taken + round_up(bytes, kAlignment));
}

}  // namespace captum_dtd::cuda
