// What the modules of all devices share: the operators, written over what a device does differently, and the answers to
// Python.
#pragma once

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "checks.h"
#include "problems.h"

namespace captum_dtd {

inline Element element(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Element::Float32;
    case ScalarType::Double: return Element::Float64;
    case ScalarType::BFloat16: return Element::BFloat16;
    default: return Element::Float16;
  }
}

// A tensor of at most five dimensions, broadcast over those that it lacks and those of size 1 if it is a bound. Inputs are only
// read: a view serves them and the result alike.
inline View view(const Tensor& tensor, bool broadcasts = false) {
  View v;
  v.data = const_cast<void*>(tensor.const_data_ptr());
  const int64_t leading = 5 - tensor.dim();
  for (int64_t a = 0; a < tensor.dim(); ++a) v.stride[leading + a] = broadcasts && tensor.size(a) == 1 ? 0 : tensor.stride(a);
  return v;
}

// The operators on one device. Beside its kernels' own names, `conv3d_kernels(Element)`, `max_pool3d_kernels()` and
// `add_kernels()`, it has
//
//   Guard                            whose lifetime is spent on x's device
//   serves_auto(kernel)              whether "auto" may mean this kernel; the first that it may is taken
//   result_like(x, type, shape)      a result, not yet written, in x's layout
//   run(problem, kernel, x)          for each kind of problem
template <typename Device>
struct Operators {
  static Tensor z_plus_conv3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& relevance,
                              const Numbers& stride, const Numbers& padding, const Numbers& dilation, int64_t groups,
                              bool non_negative, double stabilizer, bool divided, const std::string& kernel) {
    const Conv3d conv = check_conv3d(x, weight, bias, relevance, stride, padding, dilation, groups, stabilizer);
    Conv3dRelevance problem = z_plus(conv, non_negative, stabilizer, divided);
    return share(problem, x, weight, bias, relevance, kernel);
  }

  static Tensor z_beta_conv3d(const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& weight,
                              const std::optional<Tensor>& bias, const Tensor& relevance, const Numbers& stride,
                              const Numbers& padding, const Numbers& dilation, int64_t groups, double stabilizer, bool divided,
                              const std::string& kernel) {
    const Conv3d conv = check_conv3d(x, weight, bias, relevance, stride, padding, dilation, groups, stabilizer);
    Conv3dRelevance problem = z_beta(conv, x, low, high, stabilizer, divided);
    return share(problem, x, weight, bias, relevance, kernel);
  }

  static Tensor max_pool3d_relevance(const Tensor& x, const Tensor& relevance, const Numbers& kernel_size, const Numbers& stride,
                                     const Numbers& padding, const Numbers& dilation, bool ceil_mode, bool winner_takes_all,
                                     double stabilizer, const std::string& asked) {
    MaxPool3dRelevance problem{};
    problem.pool = check_max_pool3d(x, relevance, kernel_size, stride, padding, dilation, ceil_mode, stabilizer);
    return share(problem, x, relevance, winner_takes_all, stabilizer, asked);
  }

  static Tensor frozen_max_pool3d_relevance(const Tensor& x, const Tensor& relevance, const Numbers& reads, const Numbers& gives,
                                            int64_t times, const Numbers& kernel_size, const Numbers& stride,
                                            const Numbers& padding, const Numbers& dilation, bool ceil_mode,
                                            bool winner_takes_all, double stabilizer, const std::string& asked) {
    MaxPool3dRelevance problem{};
    problem.pool =
        check_max_pool3d(x, relevance, kernel_size, stride, padding, dilation, ceil_mode, stabilizer, times_of(relevance));
    set_tables(problem, problem.pool, x, reads, gives, times);
    return share(problem, x, relevance, winner_takes_all, stabilizer, asked);
  }

  static Tensor max_pool3d(const Tensor& x, const Numbers& kernel_size, const Numbers& stride, const Numbers& padding,
                           const Numbers& dilation, bool ceil_mode, const std::string& asked) {
    MaxPool3dForward problem{};
    problem.pool = check_max_pool3d(x, std::nullopt, kernel_size, stride, padding, dilation, ceil_mode);
    return pool(problem, x, asked);
  }

  static Tensor frozen_max_pool3d(const Tensor& x, const Numbers& reads, int64_t times, const Numbers& kernel_size,
                                  const Numbers& stride, const Numbers& padding, const Numbers& dilation, bool ceil_mode,
                                  const std::string& asked) {
    MaxPool3dForward problem{};
    problem.pool = check_max_pool3d(x, std::nullopt, kernel_size, stride, padding, dilation, ceil_mode, 0, times);
    check_table("reads", reads, x.size(0), times, kernel_size[0], x.size(2));
    problem.reads = table(reads, problem.pool);
    return pool(problem, x, asked);
  }

  static std::tuple<Tensor, Tensor> z_plus_add(const Tensor& x, const Tensor& other, const Tensor& relevance, double alpha,
                                               double stabilizer, const std::string& asked) {
    AddRelevance problem{};
    check_add(x, other, relevance, alpha, stabilizer);
    const typename Device::Guard guard(x);
    const std::string kernel = choose(asked, Device::add_kernels(), x);
    const Numbers shape{x.sizes().begin(), x.sizes().end()};
    Tensor out = Device::result_like(x, relevance.scalar_type(), shape);
    Tensor out_other = Device::result_like(x, relevance.scalar_type(), shape);
    if (out.numel() == 0) return {out, out_other};
    std::copy(shape.begin(), shape.end(), problem.size);
    problem.alpha = alpha;
    problem.stabilizer = stabilizer;
    problem.element = element(x.scalar_type());
    problem.x = view(x);
    problem.other = view(other);
    problem.relevance = view(relevance);
    problem.out = view(out);
    problem.out_other = view(out_other);
    Device::run(problem, kernel, x);
    return {out, out_other};
  }

  static Tensor conv3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Numbers& stride,
                       const Numbers& padding, const Numbers& dilation, int64_t groups, bool relu, const std::string& asked) {
    Conv3dForward problem{};
    problem.relu = relu;
    problem.conv = check_conv3d(x, weight, bias, std::nullopt, stride, padding, dilation, groups);
    const int64_t (&size)[3] = problem.conv.out;
    const typename Device::Guard guard(x);
    return run(problem, x, weight, bias, x.scalar_type(), {x.size(0), weight.size(0), size[0], size[1], size[2]}, asked);
  }

  static Tensor frozen_z_plus_conv3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                     const Tensor& relevance, const Numbers& reads, const Numbers& gives, int64_t times,
                                     const Numbers& stride, const Numbers& padding, const Numbers& dilation, int64_t groups,
                                     bool non_negative, double stabilizer, bool divided, const std::string& kernel) {
    const Conv3d conv =
        check_conv3d(x, weight, bias, relevance, stride, padding, dilation, groups, stabilizer, times_of(relevance));
    Conv3dRelevance problem = z_plus(conv, non_negative, stabilizer, divided);
    set_tables(problem, problem.conv, x, reads, gives, times);
    return share(problem, x, weight, bias, relevance, kernel);
  }

  static Tensor frozen_z_beta_conv3d(const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& weight,
                                     const std::optional<Tensor>& bias, const Tensor& relevance, const Numbers& reads,
                                     const Numbers& gives, int64_t times, const Numbers& stride, const Numbers& padding,
                                     const Numbers& dilation, int64_t groups, double stabilizer, bool divided,
                                     const std::string& kernel) {
    const Conv3d conv =
        check_conv3d(x, weight, bias, relevance, stride, padding, dilation, groups, stabilizer, times_of(relevance));
    Conv3dRelevance problem = z_beta(conv, x, low, high, stabilizer, divided);
    set_tables(problem, problem.conv, x, reads, gives, times);
    return share(problem, x, weight, bias, relevance, kernel);
  }

  static Tensor frozen_conv3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Numbers& reads,
                              int64_t times, const Numbers& stride, const Numbers& padding, const Numbers& dilation,
                              int64_t groups, bool relu, const std::string& asked) {
    Conv3dForward problem{};
    problem.relu = relu;
    problem.conv = check_conv3d(x, weight, bias, std::nullopt, stride, padding, dilation, groups, 0, times);
    check_table("reads", reads, x.size(0), times, weight.size(2), x.size(2));
    problem.reads = table(reads, problem.conv);
    const int64_t (&size)[3] = problem.conv.out;
    const typename Device::Guard guard(x);
    return run(problem, x, weight, bias, x.scalar_type(), {x.size(0), weight.size(0), size[0], size[1], size[2]}, asked);
  }

  // Adds the operators' kernels to torch's dispatcher.
  template <typename Library>
  static void add_to(Library& library) {
    library.impl("frozen_conv3d", TORCH_BOX(&frozen_conv3d));
    library.impl("frozen_z_plus_conv3d", TORCH_BOX(&frozen_z_plus_conv3d));
    library.impl("frozen_z_beta_conv3d", TORCH_BOX(&frozen_z_beta_conv3d));
    library.impl("frozen_max_pool3d_relevance", TORCH_BOX(&frozen_max_pool3d_relevance));
    library.impl("conv3d", TORCH_BOX(&conv3d));
    library.impl("z_plus_conv3d", TORCH_BOX(&z_plus_conv3d));
    library.impl("z_beta_conv3d", TORCH_BOX(&z_beta_conv3d));
    library.impl("max_pool3d_relevance", TORCH_BOX(&max_pool3d_relevance));
    library.impl("max_pool3d", TORCH_BOX(&max_pool3d));
    library.impl("frozen_max_pool3d", TORCH_BOX(&frozen_max_pool3d));
    library.impl("z_plus_add", TORCH_BOX(&z_plus_add));
  }

 private:
  static Conv3dRelevance z_plus(const Conv3d& conv, bool non_negative, double stabilizer, bool divided) {
    Conv3dRelevance problem{};
    problem.conv = conv;
    problem.lift = non_negative ? Lift::None : Lift::Signed;
    problem.stabilizer = stabilizer;
    problem.divided = divided;
    return problem;
  }

  static Conv3dRelevance z_beta(const Conv3d& conv, const Tensor& x, const Tensor& low, const Tensor& high, double stabilizer,
                                bool divided) {
    check_bound("low", low, x);
    check_bound("high", high, x);
    Conv3dRelevance problem = z_plus(conv, false, stabilizer, divided);
    problem.lift = Lift::Box;
    problem.low = view(low, true);
    problem.high = view(high, true);
    return problem;
  }

  // Of an output; check_conv3d refuses what has other dimensions.
  static int64_t times_of(const Tensor& relevance) { return relevance.dim() == 5 ? relevance.size(2) : 1; }

  // One row for all examples, or one for each.
  template <typename Geometry>
  static TimeTable table(const Numbers& numbers, const Geometry& geometry) {
    return {numbers.data(), static_cast<int64_t>(numbers.size()) > geometry.out[0] * geometry.kernel[0]};
  }

  // Checks tables, and takes them for what windows along T read and give to.
  template <typename Problem, typename Geometry>
  static void set_tables(Problem& problem, Geometry& geometry, const Tensor& x, const Numbers& reads, const Numbers& gives,
                         int64_t times) {
    CAPTUM_DTD_REQUIRE(times >= 1, "times must be at least 1, got ", times);
    check_table("reads", reads, geometry.n, geometry.out[0], geometry.kernel[0], x.size(2));
    check_table("gives", gives, geometry.n, geometry.out[0], geometry.kernel[0], times);
    check_tables_agree(reads, gives, geometry.out[0] * geometry.kernel[0], times);
    problem.reads = table(reads, geometry);
    problem.gives = table(gives, geometry);
    geometry.in[0] = times;
  }

  static Tensor share(MaxPool3dRelevance& problem, const Tensor& x, const Tensor& relevance, bool winner_takes_all,
                      double stabilizer, const std::string& asked) {
    const typename Device::Guard guard(x);
    const std::string kernel = choose(asked, Device::max_pool3d_kernels(), x);
    const Numbers shape{x.size(0), x.size(1), problem.pool.in[0], x.size(3), x.size(4)};
    Tensor out = Device::result_like(x, relevance.scalar_type(), shape);
    if (out.numel() == 0) return out;
    problem.times = x.size(2);
    problem.winner_takes_all = winner_takes_all;
    problem.stabilizer = stabilizer;
    problem.element = element(x.scalar_type());
    problem.x = view(x);
    problem.relevance = view(relevance);
    problem.out = view(out);
    Device::run(problem, kernel, x);
    return out;
  }

  static Tensor pool(MaxPool3dForward& problem, const Tensor& x, const std::string& asked) {
    const typename Device::Guard guard(x);
    const std::string kernel = choose(asked, Device::max_pool3d_kernels(), x);
    const int64_t (&size)[3] = problem.pool.out;
    Tensor out = Device::result_like(x, x.scalar_type(), {x.size(0), x.size(1), size[0], size[1], size[2]});
    if (out.numel() == 0) return out;
    problem.element = element(x.scalar_type());
    problem.x = view(x);
    problem.out = view(out);
    Device::run(problem, kernel, x);
    return out;
  }

  static Tensor share(Conv3dRelevance& problem, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& relevance, const std::string& asked) {
    const typename Device::Guard guard(x);
    problem.relevance = view(relevance);
    const Numbers shape{x.size(0), x.size(1), problem.conv.in[0], x.size(3), x.size(4)};
    if (relevance.numel() == 0) {
      choose(asked, Device::conv3d_kernels(element(x.scalar_type())), x);
      Tensor nothing = Device::result_like(x, relevance.scalar_type(), shape);
      return torch::stable::zero_(nothing);
    }
    return run(problem, x, weight, bias, relevance.scalar_type(), shape, asked);
  }

  // Fills in what all convolutions have, and runs them.
  template <typename Problem>
  static Tensor run(Problem& problem, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, ScalarType type,
                    const Numbers& shape, const std::string& asked) {
    problem.element = element(x.scalar_type());
    const std::string kernel = choose(asked, Device::conv3d_kernels(problem.element), x);
    Tensor out = Device::result_like(x, type, shape);
    if (out.numel() == 0) return out;
    const Tensor dense_weight = torch::stable::contiguous(weight);
    const Tensor dense_bias = bias ? torch::stable::contiguous(*bias) : Tensor();
    problem.x = view(x);
    problem.out = view(out);
    problem.weight = dense_weight.const_data_ptr();
    problem.bias = bias ? dense_bias.const_data_ptr() : nullptr;
    Device::run(problem, kernel, x);
    return out;
  }

  // The kernel that a name asks for.
  static std::string choose(const std::string& asked, const std::vector<std::string>& there, const Tensor& x) {
    for (const std::string& kernel : there)
      if (kernel == asked || (asked == "auto" && Device::serves_auto(kernel))) return kernel;
    CAPTUM_DTD_REQUIRE(!there.empty(), "kernel '", asked, "': no compiled kernel serves ", checks::name(x.scalar_type()),
                       " here: use captum_dtd.ops with kernel='reference'");
    CAPTUM_DTD_REQUIRE(false, "kernel '", asked, "' does not exist here: there are ", checks::joined(there));
    return {};
  }
};

inline PyObject* to_python(const std::vector<std::string>& names) {
  PyObject* result = PyList_New(0);
  for (const std::string& name : names) {
    PyObject* item = result ? PyUnicode_FromString(name.c_str()) : nullptr;
    if (!item || PyList_Append(result, item) != 0) Py_CLEAR(result);
    Py_XDECREF(item);
  }
  return result;
}

// The element type that a Python argument names; null, with an exception set, where there is none.
inline std::optional<Element> parse_element(PyObject* arguments) {
  const char* dtype = nullptr;
  if (!PyArg_ParseTuple(arguments, "s", &dtype)) return std::nullopt;
  const std::string_view asked = dtype;
  if (asked == "float32") return Element::Float32;
  if (asked == "float64") return Element::Float64;
  if (asked == "bfloat16") return Element::BFloat16;
  if (asked == "float16") return Element::Float16;
  PyErr_Format(PyExc_ValueError, "dtype must be 'float32', 'float64', 'bfloat16' or 'float16', got '%s'", dtype);
  return std::nullopt;
}

// What Python asks a module itself.

template <typename Device>
PyObject* conv3d_kernels(PyObject*, PyObject* arguments) {
  const std::optional<Element> asked = parse_element(arguments);
  return asked ? to_python(Device::conv3d_kernels(*asked)) : nullptr;
}

template <typename Device>
PyObject* max_pool3d_kernels(PyObject*, PyObject* arguments) {
  return parse_element(arguments) ? to_python(Device::max_pool3d_kernels()) : nullptr;
}

template <typename Device>
PyObject* add_kernels(PyObject*, PyObject* arguments) {
  return parse_element(arguments) ? to_python(Device::add_kernels()) : nullptr;
}

template <typename Device>
constexpr PyMethodDef kConv3dKernels = {"conv3d_kernels", conv3d_kernels<Device>, METH_VARARGS,
                                        "Kernels of convolutions for inputs of a type ('float32', ...), best first."};

template <typename Device>
constexpr PyMethodDef kMaxPool3dKernels = {"max_pool3d_kernels", max_pool3d_kernels<Device>, METH_VARARGS,
                                           "Kernels of max pooling for inputs of a type, best first."};

template <typename Device>
constexpr PyMethodDef kAddKernels = {"add_kernels", add_kernels<Device>, METH_VARARGS,
                                     "Kernels of additions for summands of a type, best first."};

}  // namespace captum_dtd
