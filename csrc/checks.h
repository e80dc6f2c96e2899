// Every refusal of the fused operations, the same on every device: what is wrong, with its argument's name and what was
// given. captum_dtd/ops.py refuses the same in the same words where no compiled kernel serves.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.h"
#include "pooling.h"

namespace captum_dtd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;

// Relevance and sums are kept in float32, or float64 for float64.
inline ScalarType accumulator(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

namespace checks {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Refuses, in these words, where the condition does not hold. A macro, so that words are only found then: they take longer than a
// small layer.
#define CAPTUM_DTD_REQUIRE(condition, ...) ((condition) ? void() : ::captum_dtd::checks::refuse(__VA_ARGS__))

// Shapes, lists, types and devices are written as Python does.

template <typename Values>
std::string joined(const Values& values, const char* open = "", const char* close = "") {
  std::ostringstream text;
  text << open;
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << close;
  return text.str();
}

template <typename Values>
std::string tuple(const Values& values) {
  return joined(values, "(", values.size() == 1 ? ",)" : ")");
}

inline std::string list(const Numbers& values) { return joined(values, "[", "]"); }

inline std::string shape(const Tensor& tensor) { return tuple(tensor.sizes()); }

inline std::string name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Bool: return "torch.bool";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string device(const Tensor& tensor) {
  const auto kind = tensor.device().type();
  if (kind == torch::headeronly::DeviceType::CPU) return "cpu";
  std::ostringstream text;
  if (kind == torch::headeronly::DeviceType::CUDA)
    text << "cuda";
  else
    text << "device type " << static_cast<int>(kind);
  text << ":" << tensor.get_device_index();
  return text.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin(), b.sizes().end());
}

constexpr int64_t kLargestNumber = 2147483647;
constexpr double kMostElements = 1099511627776.0;

inline void check_tensor(const char* argument, const Tensor& tensor, int64_t dims, ScalarType type, const Tensor& x) {
  CAPTUM_DTD_REQUIRE(tensor.dim() == dims, argument, " must have ", dims, " dimensions, got shape ", shape(tensor));
  CAPTUM_DTD_REQUIRE(tensor.scalar_type() == type, argument, " must be ", name(type), ", got ", name(tensor.scalar_type()),
                     " of shape ", shape(tensor));
  CAPTUM_DTD_REQUIRE(tensor.device() == x.device(), argument, " must be on ", device(x), " as x is, got ", device(tensor));
}

inline void check_numbers(const char* argument, const Numbers& values, size_t count, int64_t least) {
  CAPTUM_DTD_REQUIRE(values.size() == count, argument, " must have ", count, " numbers, got ", list(values));
  CAPTUM_DTD_REQUIRE(std::all_of(values.begin(), values.end(), [&](int64_t value) { return value >= least; }), argument,
                     " must be at least ", least, ", got ", list(values));
  CAPTUM_DTD_REQUIRE(std::all_of(values.begin(), values.end(), [](int64_t value) { return value <= kLargestNumber; }), argument,
                     " must be at most ", kLargestNumber, ", got ", list(values));
}

// With this, no product of sizes that a kernel forms leaves 64 bits.
inline void check_padded(const Tensor& x, const Numbers& padded, const Numbers& padding) {
  double elements = static_cast<double>(x.size(1));
  for (const int64_t size : padded) elements *= static_cast<double>(size);
  CAPTUM_DTD_REQUIRE(elements <= kMostElements, "padding ", list(padding), " makes an example of x of shape ", shape(x),
                     " larger than 2**40 elements");
}

inline void check_x(const Tensor& x) {
  CAPTUM_DTD_REQUIRE(x.dim() == 5, "x must have 5 dimensions (N, C, T, H, W), got shape ", shape(x));
  const ScalarType type = x.scalar_type();
  CAPTUM_DTD_REQUIRE(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Double,
      "x must be float32, bfloat16, float16 or float64, got ", name(type));
}

inline void check_stabilizer(double stabilizer) {
  CAPTUM_DTD_REQUIRE(stabilizer >= 0, "stabilizer must be zero or positive, got ", stabilizer);
}

inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }  // b > 0

// Number of windows along one axis that lie in `room` elements.
inline int64_t windows(int64_t room, int64_t kernel, int64_t stride, int64_t dilation) {
  return floor_divide(room - dilation * (kernel - 1) - 1, stride) + 1;
}

// Where a table says what is read.
inline void check_no_window_in_time(int64_t stride, int64_t front, int64_t back, int64_t dilation) {
  CAPTUM_DTD_REQUIRE(stride == 1 && front == 0 && back == 0 && dilation == 1,
                     "reads takes the place of stride, padding and dilation along T: they must be 1, 0 and 1, got ", stride,
                     ", (", front, ", ", back, ") and ", dilation);
}

}  // namespace checks

// Checks a convolution's arguments and returns its geometry. `relevance` is of its output; a convolution alone has none.
// `padding` is (front, back) of T, of H, of W. `times` is how many times the output has where a table says so, not a window.
inline Conv3d check_conv3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& relevance, const Numbers& stride, const Numbers& padding,
                           const Numbers& dilation, int64_t groups, double stabilizer = 0,
                           std::optional<int64_t> times = std::nullopt) {
  using namespace checks;
  check_x(x);
  check_tensor("weight", weight, 5, x.scalar_type(), x);
  const Numbers kernel(weight.sizes().begin() + 2, weight.sizes().end());
  check_numbers("weight's kernel", kernel, 3, 1);
  check_numbers("stride", stride, 3, 1);
  check_numbers("padding", padding, 6, 0);
  check_numbers("dilation", dilation, 3, 1);
  CAPTUM_DTD_REQUIRE(weight.size(1) >= 1, "weight must have at least one input channel, got shape ", shape(weight));
  CAPTUM_DTD_REQUIRE(groups >= 1, "groups must be at least 1, got ", groups);
  CAPTUM_DTD_REQUIRE(x.size(1) == weight.size(1) * groups && weight.size(0) % groups == 0, "weight of shape ", shape(weight),
                     " does not fit x of shape ", shape(x), " with groups=", groups);
  if (bias) {
    check_tensor("bias", *bias, 1, x.scalar_type(), x);
    CAPTUM_DTD_REQUIRE(bias->size(0) == weight.size(0), "bias must have ", weight.size(0),
                       " elements as weight has output channels, got ", bias->size(0));
  }
  check_stabilizer(stabilizer);
  Numbers padded;
  for (int a = 0; a < 3; ++a) padded.push_back(x.size(a + 2) + padding[2 * a] + padding[2 * a + 1]);
  check_padded(x, padded, padding);
  Conv3d conv{};
  conv.n = x.size(0);
  conv.c_in = x.size(1);
  conv.c_out = weight.size(0);
  conv.groups = groups;
  for (int a = 0; a < 3; ++a) {
    conv.in[a] = x.size(a + 2);
    conv.kernel[a] = kernel[a];
    conv.stride[a] = stride[a];
    conv.padding[a] = padding[2 * a];
    conv.dilation[a] = dilation[a];
    conv.out[a] = windows(conv.in[a] + padding[2 * a] + padding[2 * a + 1], kernel[a], stride[a], dilation[a]);
  }
  if (times) {
    check_no_window_in_time(stride[0], padding[0], padding[1], dilation[0]);
    conv.out[0] = *times;
  }
  CAPTUM_DTD_REQUIRE(std::all_of(conv.out, conv.out + 3, [](int64_t size) { return size > 0; }), "weight's kernel ",
                     tuple(kernel), " with dilation ", list(dilation), " does not fit into x of shape ", shape(x),
                     " with padding ", list(padding));
  if (relevance) {
    check_tensor("relevance", *relevance, 5, accumulator(x.scalar_type()), x);
    const Numbers expected{conv.n, conv.c_out, conv.out[0], conv.out[1], conv.out[2]};
    CAPTUM_DTD_REQUIRE(std::equal(expected.begin(), expected.end(), relevance->sizes().begin()), "relevance must have the shape ",
                       tuple(expected), " of the convolution's output, got ", shape(*relevance));
  }
  return conv;
}

// Checks what says for every output time and tap which time is read ("reads") or given to ("gives"): one row for all examples or
// one for each, of numbers from -1 to less than `size`.
inline void check_table(const char* argument, const Numbers& table, int64_t n, int64_t times, int64_t taps, int64_t size) {
  using namespace checks;
  const int64_t count = static_cast<int64_t>(table.size()), row = times * taps;
  CAPTUM_DTD_REQUIRE(size >= 1, argument, " must be times of x, and x has none");
  CAPTUM_DTD_REQUIRE(count == row || (n > 0 && count == n * row), argument, " must have ", row,
                     " numbers, one for each output time and tap, or ", n, " times as many, got ", count);
  CAPTUM_DTD_REQUIRE(std::all_of(table.begin(), table.end(), [&](int64_t time) { return time >= -1 && time < size; }), argument,
                     " must be times from 0 to ", size - 1, ", or -1 for none, got ", list(table));
}

// Checks that a time of the result is always given to by what reads one time of x.
inline void check_tables_agree(const Numbers& reads, const Numbers& gives, int64_t row, int64_t size) {
  const size_t rows = std::max(reads.size(), gives.size()) / static_cast<size_t>(row);
  for (size_t n = 0; n < rows; ++n) {
    const size_t from = reads.size() > static_cast<size_t>(row) ? n * row : 0,
                 to = gives.size() > static_cast<size_t>(row) ? n * row : 0;
    Numbers stored(static_cast<size_t>(size), -1);
    for (int64_t i = 0; i < row; ++i) {
      const int64_t read = reads[from + i], given = gives[to + i];
      if (read < 0 || given < 0) continue;
      CAPTUM_DTD_REQUIRE(stored[given] < 0 || stored[given] == read,
                         "gives must name a time of the result for one time of x only, got ", given, " for the times ",
                         stored[given], " and ", read);
      stored[given] = read;
    }
  }
}

// Checks a pixel bound ("low" or "high"), which broadcasts to x.
inline void check_bound(const char* argument, const Tensor& bound, const Tensor& x) {
  using namespace checks;
  check_tensor(argument, bound, bound.dim(), accumulator(x.scalar_type()), x);
  bool fits = bound.dim() <= 5;
  for (int64_t a = 0; fits && a < bound.dim(); ++a) fits = bound.size(a) == 1 || bound.size(a) == x.size(5 - bound.dim() + a);
  CAPTUM_DTD_REQUIRE(fits, argument, " of shape ", shape(bound), " does not broadcast to x of shape ", shape(x));
}

// Checks a max pooling's arguments and returns its geometry. `relevance` is of its output; a pooling alone has none.
// `times` is how many times the output has where a table says so, not a window.
inline MaxPool3d check_max_pool3d(const Tensor& x, const std::optional<Tensor>& relevance, const Numbers& kernel,
                                  const Numbers& stride, const Numbers& padding, const Numbers& dilation, bool ceil_mode,
                                  double stabilizer = 0, std::optional<int64_t> times = std::nullopt) {
  using namespace checks;
  check_x(x);
  const bool has_times = times.has_value() || x.size(2) > 0;  // of a table's it is told what is wrong with it
  CAPTUM_DTD_REQUIRE(has_times && x.size(1) > 0 && x.size(3) > 0 && x.size(4) > 0,
                     "x must have channels, times and positions, got ", shape(x));
  check_numbers("kernel_size", kernel, 3, 1);
  check_numbers("stride", stride, 3, 1);
  check_numbers("padding", padding, 3, 0);
  check_numbers("dilation", dilation, 3, 1);
  bool half = true;
  for (int a = 0; a < 3; ++a) half = half && padding[a] <= kernel[a] / 2;
  CAPTUM_DTD_REQUIRE(half, "padding must be at most half of kernel_size ", list(kernel), ", got ", list(padding));
  check_stabilizer(stabilizer);
  Numbers padded;
  for (int a = 0; a < 3; ++a) padded.push_back(x.size(a + 2) + 2 * padding[a]);
  check_padded(x, padded, padding);
  if (relevance) check_tensor("relevance", *relevance, 5, accumulator(x.scalar_type()), x);
  MaxPool3d pool{};
  pool.n = x.size(0);
  pool.c = x.size(1);
  for (int a = 0; a < 3; ++a) {
    pool.in[a] = x.size(a + 2);
    pool.kernel[a] = kernel[a];
    pool.stride[a] = stride[a];
    pool.padding[a] = padding[a];
    pool.dilation[a] = dilation[a];
    const int64_t over = ceil_mode ? stride[a] - 1 : 0;
    pool.out[a] = windows(pool.in[a] + 2 * padding[a] + over, kernel[a], stride[a], dilation[a]);
    // The last window must begin inside the input or its front padding, as torch has it.
    if (ceil_mode && (pool.out[a] - 1) * stride[a] >= pool.in[a] + padding[a]) --pool.out[a];
  }
  if (times) {
    check_no_window_in_time(stride[0], padding[0], padding[0], dilation[0]);
    pool.out[0] = *times;
  }
  CAPTUM_DTD_REQUIRE(std::all_of(pool.out, pool.out + 3, [](int64_t size) { return size > 0; }), "kernel_size ", list(kernel),
                     " with dilation ", list(dilation), " does not fit into x of shape ", shape(x), " with padding ",
                     list(padding));
  const Numbers expected{pool.n, pool.c, pool.out[0], pool.out[1], pool.out[2]};
  if (relevance)
    CAPTUM_DTD_REQUIRE(std::equal(expected.begin(), expected.end(), relevance->sizes().begin()), "relevance must have the shape ",
                       tuple(expected), " of the pooling's output, got ", shape(*relevance));
  return pool;
}

// Checks the summands of x + alpha * other, of one shape, and the relevance of their sum.
inline void check_add(const Tensor& x, const Tensor& other, const Tensor& relevance, double alpha, double stabilizer) {
  using namespace checks;
  check_x(x);
  check_tensor("other", other, 5, x.scalar_type(), x);
  CAPTUM_DTD_REQUIRE(same_shape(other, x), "other must have the shape ", shape(x), " of x, got ", shape(other));
  CAPTUM_DTD_REQUIRE(std::isfinite(alpha), "alpha must be finite, got ", alpha);
  check_stabilizer(stabilizer);
  check_tensor("relevance", relevance, 5, accumulator(x.scalar_type()), x);
  CAPTUM_DTD_REQUIRE(same_shape(relevance, x), "relevance must have the shape ", shape(x), " of the sum, got ", shape(relevance));
}

// Whether a part of a tensor is dense with these dimensions in this order, the innermost first.
inline bool is_dense(const Tensor& tensor, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (const int axis : order) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
  }
  return true;
}

// Whether each frame is dense in channels_last_3d, and no example contiguous as well: then results are laid out so, else
// contiguous. Frames may be apart, or one and the same, as in a slice along T or a frozen clip.
inline bool is_channels_last(const Tensor& tensor) {
  return tensor.numel() != 0 && !is_dense(tensor, {4, 3, 2, 1}) && is_dense(tensor, {1, 4, 3});
}

// A result, not yet written, of a type and shape of its own on x's device and in x's layout.
inline Tensor empty_like_x(const Tensor& x, ScalarType type, const Numbers& shape) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(shape, type, std::nullopt, x.device(), std::nullopt,
                              is_channels_last(x) ? MemoryFormat::ChannelsLast3d : MemoryFormat::Contiguous);
}

}  // namespace captum_dtd
