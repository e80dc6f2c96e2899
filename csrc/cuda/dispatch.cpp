// The CUDA kernels as torch operators, and the Python module that holds them: csrc/ops.cpp's counterpart. It runs on the
// tensors' device and its current stream; scratch memory is torch's, so that a CUDA graph captures all of it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../module.h"
#include "conv3d.h"
#include "max_pool3d.h"

// Declared by torch's headers only where they are those of a CUDA build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace captum_dtd {
namespace {

using cuda::Element;
using cuda::View;

// The kernel that a name asks for; "auto" is the first, whose precision is that of the type.
std::string choose(const std::string& asked, const std::vector<std::string>& there, const Tensor& x) {
  for (const std::string& kernel : there)
    if (kernel == asked || asked == "auto") return kernel;
  checks::require(!there.empty(), "no CUDA kernel serves ", checks::name(x.scalar_type()),
                  ": use captum_dtd.ops with kernel='reference'");
  checks::require(false, "kernel '", asked, "' does not exist here: there are ", checks::joined(there));
  return {};
}

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor scratch(const Tensor& x, int64_t bytes) {
  return torch::stable::empty(Numbers{bytes}, ScalarType::Byte, std::nullopt, x.device());
}

Tensor share(const Tensor& x, const Tensor* low, const Tensor* high, const Tensor& weight, const std::optional<Tensor>& bias,
             const Tensor& relevance, const Conv3d& conv, Lift lift, double stabilizer, const std::string& asked) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Element type = element<Element>(x.scalar_type());
  const std::string kernel = choose(asked, cuda::conv3d_kernels(type), x);
  Tensor out = empty_like_x(x, relevance.scalar_type(), {x.sizes().begin(), x.sizes().end()});
  if (relevance.numel() == 0) return torch::stable::zero_(out);
  if (out.numel() == 0) return out;
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_bias = bias ? torch::stable::contiguous(*bias) : Tensor();
  cuda::Conv3dRelevance problem{};
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
  const Tensor workspace = scratch(x, static_cast<int64_t>(cuda::conv3d_workspace(problem, kernel)));
  cuda::conv3d_relevance(problem, kernel, workspace.mutable_data_ptr(), current_stream(x));
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
  cuda::MaxPool3dRelevance problem{};
  problem.pool = check_max_pool3d(x, relevance, kernel_size, stride, padding, dilation, ceil_mode, stabilizer);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  choose(kernel, cuda::max_pool3d_kernels(), x);
  Tensor out = empty_like_x(x, relevance.scalar_type(), {x.sizes().begin(), x.sizes().end()});
  if (out.numel() == 0) return out;
  problem.winner_takes_all = winner_takes_all;
  problem.stabilizer = stabilizer;
  problem.element = element<Element>(x.scalar_type());
  problem.x = view<View>(x);
  problem.relevance = view<View>(relevance);
  problem.out = view<View>(out);
  const Tensor workspace = scratch(x, cuda::max_pool3d_workspace(problem));
  problem.workspace = workspace.mutable_data_ptr();
  cuda::max_pool3d_relevance(problem, current_stream(x));
  return out;
}

Tensor conv3d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Numbers& stride,
              const Numbers& padding, const Numbers& dilation, int64_t groups, const std::string& asked) {
  cuda::Conv3dForward problem{};
  problem.conv = check_conv3d(x, weight, bias, std::nullopt, stride, padding, dilation, groups);
  problem.element = element<Element>(x.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::string kernel = choose(asked, cuda::conv3d_kernels(problem.element), x);
  const int64_t (&size)[3] = problem.conv.out;
  Tensor out = empty_like_x(x, x.scalar_type(), {problem.conv.n, problem.conv.c_out, size[0], size[1], size[2]});
  if (out.numel() == 0) return out;
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_bias = bias ? torch::stable::contiguous(*bias) : Tensor();
  problem.x = view<View>(x);
  problem.out = view<View>(out);
  problem.weight = dense_weight.const_data_ptr();
  problem.bias = bias ? dense_bias.const_data_ptr() : nullptr;
  const Tensor workspace = scratch(x, static_cast<int64_t>(cuda::conv3d_workspace(problem, kernel)));
  cuda::conv3d_forward(problem, kernel, workspace.mutable_data_ptr(), current_stream(x));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(captum_dtd, CUDA, m) {
  m.impl("conv3d", TORCH_BOX(&conv3d));
  m.impl("z_plus_conv3d", TORCH_BOX(&z_plus_conv3d));
  m.impl("z_beta_conv3d", TORCH_BOX(&z_beta_conv3d));
  m.impl("max_pool3d_relevance", TORCH_BOX(&max_pool3d_relevance));
}

// What Python asks the module itself.

PyObject* conv3d_kernels(PyObject*, PyObject* arguments) {
  const std::optional<Element> asked = parse_element<Element>(arguments);
  return asked ? to_python(cuda::conv3d_kernels(*asked)) : nullptr;
}

PyObject* max_pool3d_kernels(PyObject*, PyObject* arguments) {
  return parse_element<Element>(arguments) ? to_python(cuda::max_pool3d_kernels()) : nullptr;
}

PyMethodDef functions[] = {
    {"conv3d_kernels", conv3d_kernels, METH_VARARGS,
     "Kernels of convolutions for inputs of a type ('float32', ...), best first."},
    {"max_pool3d_kernels", max_pool3d_kernels, METH_VARARGS, "Kernels of max pooling for inputs of a type, best first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C_cuda",
                      "CUDA's compiled kernels; importing it registers them.",
                      -1,
                      functions,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace captum_dtd

// Visible by name where everything else is hidden.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() { return PyModule_Create(&captum_dtd::module); }
