// The CUDA convolution kernels for NumPy arrays, run by the emulator. bfloat16 arrays come as uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "../../csrc/cuda/conv3d.cu"
#include "../../csrc/cuda/small_groups.cu"
#include "../../csrc/cuda/warpgroup.cu"
#include "arrays.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace captum_dtd;
using namespace captum_dtd::cuda;

namespace {

Element element_of(const py::array& array) {
  if (array.itemsize() == 4) return Element::Float32;
  return array.dtype().kind() == 'u' ? Element::BFloat16 : Element::Float16;
}

using Triple = std::array<int64_t, 3>;

const void* data_of(const py::object& object) { return object.is_none() ? nullptr : py::cast<py::array>(object).data(); }

Conv3d conv_of(const py::array& x, const py::array& weight, const py::array& out, Triple stride, Triple padding, Triple dilation,
               int64_t groups) {
  Conv3d conv{};
  conv.n = x.shape(0);
  conv.c_in = x.shape(1);
  conv.c_out = weight.shape(0);
  conv.groups = groups;
  for (int a = 0; a < 3; ++a) {
    conv.in[a] = x.shape(2 + a);
    conv.out[a] = out.shape(2 + a);
    conv.kernel[a] = weight.shape(2 + a);
    conv.stride[a] = stride[a];
    conv.padding[a] = padding[a];
    conv.dilation[a] = dilation[a];
  }
  return conv;
}

// Runs with a workspace of exactly the size that is asked for, full of NaN patterns.
template <typename Problem, typename Run>
void with_workspace(const Problem& problem, const std::string& kernel, Triple tiling, Run run) {
  const Tiling tiles{static_cast<int>(tiling[0]), static_cast<int>(tiling[1]), static_cast<int>(tiling[2])};
  std::unique_ptr<void, decltype(&std::free)> workspace(nullptr, std::free);
  const auto allocate = [&](size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes) != 0) throw std::bad_alloc();
    workspace.reset(memory);
    return std::memset(memory, emulator::kPoison, bytes);
  };
  run(problem, kernel, allocate, nullptr, tiles);
}

void relevance(py::array x, py::array weight, py::object bias, py::array relevance, py::object low, py::object high,
               py::array out, Triple stride, Triple padding, Triple dilation, int64_t groups, const std::string& lift,
               double stabilizer, bool divided, const std::string& kernel, Triple tiling, py::object reads, py::object gives) {
  const Lift lifts = lift == "box" ? Lift::Box : lift == "signed" ? Lift::Signed : Lift::None;
  Conv3d conv = conv_of(x, weight, relevance, stride, padding, dilation, groups);
  conv.in[0] = out.shape(2);  // of which a frozen clip's x may have fewer
  const Conv3dRelevance problem{
      conv,         lifts,         element_of(x), view_of(x), view_of(low), view_of(high),   view_of(relevance),
      view_of(out), weight.data(), data_of(bias), stabilizer, divided,      table_of(reads), table_of(gives)};
  with_workspace(problem, kernel, tiling, conv3d_relevance);
}

void forward(py::array x, py::array weight, py::object bias, py::array out, Triple stride, Triple padding, Triple dilation,
             int64_t groups, const std::string& kernel, Triple tiling, py::object reads, bool relu) {
  const Conv3dForward problem{conv_of(x, weight, out, stride, padding, dilation, groups),
                              element_of(x),
                              view_of(x),
                              view_of(out),
                              weight.data(),
                              data_of(bias),
                              relu,
                              table_of(reads)};
  with_workspace(problem, kernel, tiling, conv3d_forward);
}

}  // namespace

PYBIND11_MODULE(conv3d_front, m) {
  m.def("set_seed", emulator::set_seed);
  m.def("take_bank_conflicts", emulator::take_bank_conflicts);
  m.def("kernels", [](const py::array& x) { return conv3d_kernels(element_of(x)); });
  m.def("relevance", relevance, "x"_a, "weight"_a, "bias"_a, "relevance"_a, "low"_a, "high"_a, "out"_a, "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a, "lift"_a, "stabilizer"_a, "divided"_a, "kernel"_a, "tiling"_a, "reads"_a = py::none(),
        "gives"_a = py::none());
  m.def("forward", forward, "x"_a, "weight"_a, "bias"_a, "out"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "kernel"_a,
        "tiling"_a, "reads"_a = py::none(), "relu"_a = false);
}
