// The CUDA kernel of additions, run by the emulator on NumPy arrays of any strides.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/add.cu"
#include "arrays.h"

namespace py = pybind11;
using namespace captum_dtd;

namespace {

void relevance(const std::string& dtype, py::array x, py::array other, py::array relevance, py::array out, py::array out_other,
               double alpha, double stabilizer, int64_t threads) {
  AddRelevance problem{};
  for (int a = 0; a < 5; ++a) problem.size[a] = x.shape(a);
  problem.alpha = alpha;
  problem.stabilizer = stabilizer;
  problem.element = element_named(dtype);
  problem.x = view_of(x);
  problem.other = view_of(other);
  problem.relevance = view_of(relevance);
  problem.out = view_of(out);
  problem.out_other = view_of(out_other);
  cuda::add_relevance(problem, nullptr, threads);
}

}  // namespace

PYBIND11_MODULE(add_front, m) {
  m.def("set_seed", emulator::set_seed);
  m.def("kernels", cuda::add_kernels);
  m.def("relevance", relevance, py::arg("dtype"), py::arg("x"), py::arg("other"), py::arg("relevance"), py::arg("out"),
        py::arg("out_other"), py::arg("alpha") = 1.0, py::arg("stabilizer") = 0.0, py::arg("threads") = int64_t{1} << 30);
}
