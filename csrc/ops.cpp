// The CPU's kernels as torch operators, and the Python module that holds them. The operators are defined in
// captum_dtd/ops.py; importing this module adds their CPU kernels. Only libtorch's stable ABI and Python's limited API are
// used, so that one build serves all versions of both.
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>
#include <utility>

#include "cpu/add.h"
#include "cpu/buffer.h"
#include "cpu/conv3d.h"
#include "cpu/features.h"
#include "cpu/instructions.h"
#include "cpu/max_pool3d.h"
#include "cpu/weights.h"
#include "module.h"

namespace captum_dtd {
namespace {

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static std::vector<std::string> conv3d_kernels(Element element) { return cpu::conv3d_kernels(element); }
  static std::vector<std::string> max_pool3d_kernels() { return cpu::max_pool3d_kernels(); }
  static std::vector<std::string> add_kernels() { return cpu::add_kernels(); }

  // "auto" rounds no more than the sums do.
  static bool serves_auto(std::string_view kernel) { return kernel.substr(kernel.find('/') + 1) == "ieee"; }

  static Tensor result_like(const Tensor& x, ScalarType type, const Numbers& shape) {
    constexpr int64_t kBigBytes = int64_t{1} << 20;
    int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
    for (const int64_t size : shape) bytes *= size;
    if (bytes < kBigBytes) return empty_like_x(x, type, shape);
    Numbers strides(5);
    int64_t stride = 1;
    for (const int axis : is_channels_last(x) ? std::array{1, 4, 3, 2, 0} : std::array{4, 3, 2, 1, 0}) {
      strides[axis] = stride;
      stride *= shape[axis];
    }
    void* const data = cpu::take_block(static_cast<size_t>(bytes));
    return torch::stable::from_blob(data, shape, strides, x.device(), type, cpu::give_back_block);
  }

  static void run(const Conv3dRelevance& problem, const std::string& kernel, const Tensor&) {
    cpu::conv3d_relevance(problem, kernel, parallel_for);
  }
  static void run(const Conv3dForward& problem, const std::string& kernel, const Tensor&) {
    cpu::conv3d_forward(problem, kernel, parallel_for);
  }
  static void run(const MaxPool3dRelevance& problem, const std::string& kernel, const Tensor&) {
    cpu::max_pool3d_relevance(problem, kernel, parallel_for);
  }
  static void run(const MaxPool3dForward& problem, const std::string& kernel, const Tensor&) {
    cpu::max_pool3d_forward(problem, kernel, parallel_for);
  }
  static void run(const AddRelevance& problem, const std::string& kernel, const Tensor&) {
    cpu::add_relevance(problem, kernel, parallel_for);
  }
};

// What ATen's operations may write to; see captum_dtd/room.py.
Tensor room(const Tensor& like, const Numbers& size) {
  checks::check_x(like);
  checks::check_numbers("size", size, 5, 0);
  return Cpu::result_like(like, like.scalar_type(), size);
}

STABLE_TORCH_LIBRARY_FRAGMENT(captum_dtd, library) { library.def("room(Tensor like, int[] size) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(captum_dtd, CPU, library) {
  Operators<Cpu>::add_to(library);
  library.impl("room", TORCH_BOX(&room));
}

PyObject* cpu_features(PyObject*, PyObject*) {
  const cpu::Features& found = cpu::features();
  const std::pair<bool, const char*> features[] = {{found.avx2, "avx2"},
                                                   {found.avx512, "avx512"},
                                                   {found.avx512_bf16, "avx512_bf16"},
                                                   {found.avx512_fp16, "avx512_fp16"},
                                                   {found.amx_bf16, "amx_bf16"}};
  std::string names;
  for (const auto& [there, name] : features)
    if (there) names.append(names.empty() ? "" : " ").append(name);
  return PyUnicode_FromString(names.c_str());
}

// Calls `what` on every place in memory that Python names, an address and a size each. One call for all: an interrupt comes
// before or after it.
template <void (*what)(const void*, int64_t)>
PyObject* on_memory(PyObject*, PyObject* places) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(places); ++i) {
    unsigned long long address = 0;
    long long bytes = 0;
    if (!PyArg_ParseTuple(PyTuple_GetItem(places, i), "KL", &address, &bytes)) return nullptr;
    what(reinterpret_cast<const void*>(static_cast<uintptr_t>(address)), bytes);
  }
  Py_RETURN_NONE;
}

PyObject* digest(PyObject*, PyObject* place) {
  unsigned long long address = 0;
  long long bytes = 0;
  if (!PyArg_ParseTuple(place, "KL", &address, &bytes)) return nullptr;
  const cpu::Hash found =
      cpu::hash_bytes(cpu::best_loops(), reinterpret_cast<const void*>(static_cast<uintptr_t>(address)), bytes, parallel_for);
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&found), sizeof(found));
}

PyMethodDef functions[] = {
    kConv3dKernels<Cpu>,
    kMaxPool3dKernels<Cpu>,
    kAddKernels<Cpu>,
    {"cpu_features", cpu_features, METH_NOARGS,
     "What this process may use of avx2, avx512, avx512_bf16, avx512_fp16 and amx_bf16."},
    {"hold", on_memory<cpu::hold>, METH_VARARGS,
     "hold(*(address, bytes)): weights lie there that nothing changes until they are released as often; of this thread."},
    {"release", on_memory<cpu::release>, METH_VARARGS, "release(*(address, bytes)): the end of a `hold`."},
    {"digest", digest, METH_VARARGS, "digest(address, bytes): 16 bytes that tell what lies there, the same on one machine only."},
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
