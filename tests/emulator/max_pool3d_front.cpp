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

MaxPool3d pool_of(const py::array& x, const py::array& out, int64_t times, Triple kernel, Triple stride, Triple padding,
                  Triple dilation) {
  MaxPool3d pool{};
  pool.n = x.shape(0);
  pool.c = x.shape(1);
  for (int a = 0; a < 3; ++a) {
    pool.in[a] = a == 0 ? times : x.shape(2 + a);
    pool.out[a] = out.shape(2 + a);
    pool.kernel[a] = kernel[a];
    pool.stride[a] = stride[a];
    pool.padding[a] = padding[a];
    pool.dilation[a] = dilation[a];
  }
  return pool;
}

// Returns how many bytes of workspace were asked for.
template <typename Problem>
int64_t run(const Problem& problem, void (*kernel)(const Problem&, void*, void*, int64_t), int64_t threads) {
  const int64_t bytes = cuda::max_pool3d_workspace(problem);
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::malloc(bytes), std::free);
  std::memset(workspace.get(), emulator::kPoison, bytes);
  kernel(problem, workspace.get(), nullptr, threads);
  return bytes;
}

int64_t forward(const std::string& dtype, py::array x, py::array out, Triple kernel, Triple stride, Triple padding,
                Triple dilation, int64_t threads, py::object reads) {
  MaxPool3dForward problem{};
  problem.pool = pool_of(x, out, x.shape(2), kernel, stride, padding, dilation);
  problem.reads = table_of(reads);
  problem.element = element_named(dtype);
  problem.x = view_of(x);
  problem.out = view_of(out);
  return run(problem, cuda::max_pool3d_forward, threads);
}

int64_t relevance(const std::string& dtype, py::array x, py::array relevance, py::array out, Triple kernel, Triple stride,
                  Triple padding, Triple dilation, bool winner_takes_all, double stabilizer, int64_t threads, py::object reads,
                  py::object gives) {
  MaxPool3dRelevance problem{};
  // Of times a frozen clip's x may have others than the result.
  problem.pool = pool_of(x, relevance, out.shape(2), kernel, stride, padding, dilation);
  problem.times = x.shape(2);
  problem.reads = table_of(reads);
  problem.gives = table_of(gives);
  problem.winner_takes_all = winner_takes_all;
  problem.stabilizer = stabilizer;
  problem.element = element_named(dtype);
  problem.x = view_of(x);
  problem.relevance = view_of(relevance);
  problem.out = view_of(out);
  return run(problem, cuda::max_pool3d_relevance, threads);
}

}  // namespace

PYBIND11_MODULE(max_pool3d_front, m) {
  m.def("set_seed", emulator::set_seed);
  m.def("kernels", cuda::max_pool3d_kernels);
  m.def("forward", forward, py::arg("dtype"), py::arg("x"), py::arg("out"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("threads") = int64_t{1} << 30, py::arg("reads") = py::none());
  m.def("relevance", relevance, py::arg("dtype"), py::arg("x"), py::arg("relevance"), py::arg("out"), py::arg("kernel"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("winner_takes_all"), py::arg("stabilizer") = 0.0,
        py::arg("threads") = int64_t{1} << 30, py::arg("reads") = py::none(), py::arg("gives") = py::none());
}
