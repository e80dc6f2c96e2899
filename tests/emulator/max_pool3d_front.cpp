// The CUDA kernels of max pooling, run by the emulator on NumPy arrays of any strides.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/max_pool3d.cu"
#include "arrays.h"

namespace py = pybind11;
using namespace captum_dtd;
using Triple = std::array<int64_t, 3>;

namespace {

// Returns how many bytes of workspace were asked for.
int64_t relevance(const std::string& dtype, py::array x, py::array relevance, py::array out, Triple kernel, Triple stride,
                  Triple padding, Triple dilation, bool winner_takes_all, double stabilizer, int64_t threads, py::object reads,
                  py::object gives) {
  MaxPool3dRelevance problem{};
  problem.pool.n = x.shape(0);
  problem.pool.c = x.shape(1);
  for (int a = 0; a < 3; ++a) {
    problem.pool.in[a] = out.shape(2 + a);  // of which a frozen clip's x may have other times
    problem.pool.out[a] = relevance.shape(2 + a);
    problem.pool.kernel[a] = kernel[a];
    problem.pool.stride[a] = stride[a];
    problem.pool.padding[a] = padding[a];
    problem.pool.dilation[a] = dilation[a];
  }
  problem.times = x.shape(2);
  problem.reads = table_of(reads);
  problem.gives = table_of(gives);
  problem.winner_takes_all = winner_takes_all;
  problem.stabilizer = stabilizer;
  problem.element = element_named(dtype);
  problem.x = view_of(x);
  problem.relevance = view_of(relevance);
  problem.out = view_of(out);
  const int64_t bytes = cuda::max_pool3d_workspace(problem);
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::malloc(bytes), std::free);
  std::memset(workspace.get(), emulator::kPoison, bytes);
  cuda::max_pool3d_relevance(problem, workspace.get(), nullptr, threads);
  return bytes;
}

}  // namespace

PYBIND11_MODULE(max_pool3d_front, m) {
  m.def("set_seed", emulator::set_seed);
  m.def("kernels", cuda::max_pool3d_kernels);
  m.def("relevance", relevance, py::arg("dtype"), py::arg("x"), py::arg("relevance"), py::arg("out"), py::arg("kernel"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("winner_takes_all"), py::arg("stabilizer") = 0.0,
        py::arg("threads") = int64_t{1} << 30, py::arg("reads") = py::none(), py::arg("gives") = py::none());
}
