// The CUDA kernels as torch operators, and the Python module that holds them: csrc/ops.cpp's counterpart. It runs on the
// tensors' device and its current stream; scratch memory is torch's, so that a CUDA graph captures all of it.
#include <torch/csrc/stable/accelerator.h>

#include "../module.h"
#include "add.h"
#include "conv3d.h"
#include "max_pool3d.h"

// Declared by torch's headers only where they are those of a CUDA build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace captum_dtd {
namespace {

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor scratch(const Tensor& x, int64_t bytes) {
  return torch::stable::empty(Numbers{bytes}, ScalarType::Byte, std::nullopt, x.device());
}

// Scratch memory whose size is found out on the way; it stays as long as `memory` does.
cuda::Allocate scratch_in(std::optional<Tensor>& memory, const Tensor& x) {
  return [&](size_t bytes) { return memory.emplace(scratch(x, static_cast<int64_t>(bytes))).mutable_data_ptr(); };
}

struct Cuda {
  struct Guard {
    explicit Guard(const Tensor& x) : guard(x.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  static std::vector<std::string> conv3d_kernels(Element element) { return cuda::conv3d_kernels(element); }
  static std::vector<std::string> max_pool3d_kernels() { return cuda::max_pool3d_kernels(); }
  static std::vector<std::string> add_kernels() { return cuda::add_kernels(); }

  // The first is the one whose precision is that of the type.
  static bool serves_auto(std::string_view) { return true; }

  static Tensor result_like(const Tensor& x, ScalarType type, const Numbers& shape) { return empty_like_x(x, type, shape); }

  static void run(const Conv3dRelevance& problem, const std::string& kernel, const Tensor& x) {
    std::optional<Tensor> memory;
    cuda::conv3d_relevance(problem, kernel, scratch_in(memory, x), current_stream(x));
  }
  static void run(const Conv3dForward& problem, const std::string& kernel, const Tensor& x) {
    std::optional<Tensor> memory;
    cuda::conv3d_forward(problem, kernel, scratch_in(memory, x), current_stream(x));
  }
  static void run(const MaxPool3dRelevance& problem, const std::string&, const Tensor& x) {
    const Tensor workspace = scratch(x, cuda::max_pool3d_workspace(problem));
    cuda::max_pool3d_relevance(problem, workspace.mutable_data_ptr(), current_stream(x));
  }
  static void run(const MaxPool3dForward& problem, const std::string&, const Tensor& x) {
    const Tensor workspace = scratch(x, cuda::max_pool3d_workspace(problem));
    cuda::max_pool3d_forward(problem, workspace.mutable_data_ptr(), current_stream(x));
  }
  static void run(const AddRelevance& problem, const std::string&, const Tensor& x) {
    cuda::add_relevance(problem, current_stream(x));
  }
};

PyObject* refusal(PyObject*, PyObject*) {
  const std::string reason = cuda::refusal();
  return PyUnicode_FromStringAndSize(reason.data(), static_cast<Py_ssize_t>(reason.size()));
}

STABLE_TORCH_LIBRARY_IMPL(captum_dtd, CUDA, library) { Operators<Cuda>::add_to(library); }

PyMethodDef functions[] = {kConv3dKernels<Cuda>,
                           kMaxPool3dKernels<Cuda>,
                           kAddKernels<Cuda>,
                           {"refusal", refusal, METH_NOARGS, "Why no kernel runs on the current device; empty where they do."},
                           {nullptr, nullptr, 0, nullptr}};

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
