// The CPU's kernels as torch operators, and the Python module that holds them. The operators are defined in
// captum_dtd/ops.py; importing this module adds their CPU kernels. Only libtorch's stable ABI and Python's limited API are
// used, so that one build serves all versions of both.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "cpu/conv3d.h"
#include "cpu/features.h"
#include "cpu/huge_pages.h"
#include "cpu/max_pool3d.h"
#include "module.h"

namespace captum_dtd {
namespace {

using cpu::Element;
using cpu::View;

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

// A result in x's layout.
Tensor result_like(const Tensor& x, ScalarType type, const Numbers& shape) {
  Tensor result = empty_like_x(x, type, shape);
  cpu::prefer_huge_pages(result.mutable_data_ptr(), static_cast<size_t>(result.numel() * result.element_size()));
  return result;
}

// The kernel that a name asks for; "auto" is the best one whose arithmetic is IEEE.
std::string choose(const std::string& asked, const std::vector<std::string>& there) {
  for (const std::string& kernel : there) {
    const std::string_view arithmetic = std::string_view(kernel).substr(kernel.find('/') + 1);
    if (kernel == asked || (asked == "auto" && arithmetic == "ieee")) return kernel;
  }
  checks::require(false, "kernel '", asked, "' does not exist here: there are ", checks::joined(there));
  return {};
}

Tensor share(const Tensor& x, const Tensor* low, const Tensor* high, const Tensor& weight, const std::optional<Tensor>& bias,
             const Tensor& relevance, const Conv3d& conv, Lift lift, double stabilizer, const std::string& asked) {
  const Element type = element<Element>(x.scalar_type());
  const std::string kernel = choose(asked, cpu::conv3d_kernels(type));
  Tensor out = result_like(x, relevance.scalar_type(), {x.sizes().begin(), x.sizes().end()});
  if (relevance.numel() == 0) return torch::stable::zero_(out);
  if (out.numel() == 0) return out;
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_bias = bias ? torch::stable::contiguous(*bias) : Tensor();
  cpu::Conv3dRelevance problem{};
  problem.conv = conv;
  problem.lift = lift;
  problem.element = type;
  problem.x = view<View>(x);
  if (low) problem.low = view<View>(*low, true);
  if (high) problem.high = view<View>(*high, true);
  problem.relevance = view<View>(relevance);
  problem.out = view<View>(out);
  problem.weight = dense_weight.const_data_ptr();
  problem.bias = bias ? dense_bias.const_data_ptr() : nullptr;
  problem.stabilizer = stabilizer;
  cpu::conv3d_relevance(problem, kernel, parallel_for);
  return out;
}

Tensor z_plus_conv3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& relevance,
                     const Numbers& stride, const Numbers& padding, const Numbers& dilation, int64_t groups, bool non_negative,
                     double stabilizer, const std::string& kernel) {
  const Conv3d conv = check_conv3d(x, weight, bias, relevance, stride, padding, dilation, groups, stabilizer);
  const Lift lift = non_negative ? Lift::None : Lift::Signed;
  return share(x, nullptr, nullptr, weight, bias, relevance, conv, lift, stabilizer, kernel);
}

Tensor z_beta_conv3d(const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& weight,
                     const std::optional<Tensor>& bias, const Tensor& relevance, const Numbers& stride, const Numbers& padding,
                     const Numbers& dilation, int64_t groups, double stabilizer, const std::string& kernel) {
  const Conv3d conv = check_conv3d(x, weight, bias, relevance, stride, padding, dilation, groups, stabilizer);
  check_bound("low", low, x);
  check_bound("high", high, x);
  return share(x, &low, &high, weight, bias, relevance, conv, Lift::Box, stabilizer, kernel);
}

Tensor max_pool3d_relevance(const Tensor& x, const Tensor& relevance, const Numbers& kernel_size, const Numbers& stride,
                            const Numbers& padding, const Numbers& dilation, bool ceil_mode, bool winner_takes_all,
                            double stabilizer, const std::string& kernel) {
  cpu::MaxPool3dRelevance problem{};
  problem.pool = check_max_pool3d(x, relevance, kernel_size, stride, padding, dilation, ceil_mode, stabilizer);
  const std::string chosen = choose(kernel, cpu::max_pool3d_kernels());
  Tensor out = result_like(x, relevance.scalar_type(), {x.sizes().begin(), x.sizes().end()});
  if (out.numel() == 0) return out;
  problem.winner_takes_all = winner_takes_all;
  problem.element = element<Element>(x.scalar_type());
  problem.x = view<View>(x);
  problem.relevance = view<View>(relevance);
  problem.out = view<View>(out);
  problem.stabilizer = stabilizer;
  cpu::max_pool3d_relevance(problem, chosen, parallel_for);
  return out;
}

Tensor conv3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Numbers& stride,
              const Numbers& padding, const Numbers& dilation, int64_t groups, const std::string& kernel) {
  cpu::Conv3dForward problem{};
  problem.conv = check_conv3d(x, weight, bias, std::nullopt, stride, padding, dilation, groups);
  problem.element = element<Element>(x.scalar_type());
  const std::string chosen = choose(kernel, cpu::conv3d_kernels(problem.element));
  const int64_t (&size)[3] = problem.conv.out;
  Tensor out = result_like(x, x.scalar_type(), {problem.conv.n, problem.conv.c_out, size[0], size[1], size[2]});
  if (out.numel() == 0) return out;
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_bias = bias ? torch::stable::contiguous(*bias) : Tensor();
  problem.x = view<View>(x);
  problem.out = view<View>(out);
  problem.weight = dense_weight.const_data_ptr();
  problem.bias = bias ? dense_bias.const_data_ptr() : nullptr;
  cpu::conv3d_forward(problem, chosen, parallel_for);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(captum_dtd, CPU, m) {
  m.impl("conv3d", TORCH_BOX(&conv3d));
  m.impl("z_plus_conv3d", TORCH_BOX(&z_plus_conv3d));
  m.impl("z_beta_conv3d", TORCH_BOX(&z_beta_conv3d));
  m.impl("max_pool3d_relevance", TORCH_BOX(&max_pool3d_relevance));
}

// What Python asks the module itself.

PyObject* conv3d_kernels(PyObject*, PyObject* arguments) {
  const std::optional<Element> asked = parse_element<Element>(arguments);
  return asked ? to_python(cpu::conv3d_kernels(*asked)) : nullptr;
}

PyObject* max_pool3d_kernels(PyObject*, PyObject* arguments) {
  return parse_element<Element>(arguments) ? to_python(cpu::max_pool3d_kernels()) : nullptr;
}

PyObject* cpu_features(PyObject*, PyObject*) {
  const cpu::Features& found = cpu::features();
  const std::pair<bool, const char*> features[] = {
      {found.avx2, "avx2"}, {found.avx512, "avx512"}, {found.avx512_bf16, "avx512_bf16"}, {found.amx_bf16, "amx_bf16"}};
  std::string names;
  for (const auto& [there, name] : features)
    if (there) names.append(names.empty() ? "" : " ").append(name);
  return PyUnicode_FromString(names.c_str());
}

PyMethodDef functions[] = {
    {"conv3d_kernels", conv3d_kernels, METH_VARARGS,
     "Kernels of convolutions for inputs of a type ('float32', ...), best first."},
    {"max_pool3d_kernels", max_pool3d_kernels, METH_VARARGS, "Kernels of max pooling for inputs of a type, best first."},
    {"cpu_features", cpu_features, METH_NOARGS, "What this process may use of avx2, avx512, avx512_bf16 and amx_bf16."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "The CPU's compiled kernels; importing it registers them.",
                      -1,
                      functions,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace captum_dtd

// Visible by name where everything else is hidden.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&captum_dtd::module); }
