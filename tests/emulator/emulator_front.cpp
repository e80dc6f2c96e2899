// What the emulator is held to: number formats, and kernels with planted bugs beside the same kernels without.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "warpgroup.h"

namespace py = pybind11;
using captum_dtd::cuda::launch;

namespace {

constexpr int kThreads = 64;

// Every thread writes its index and reads its neighbour's.
__global__ void neighbour(float* out, bool with_barrier) {
  using Line = float[kThreads];
  CAPTUM_DTD_SHARED(Line, line);
  const int i = threadIdx.x;
  line[i] = i;
  if (with_barrier) __syncthreads();
  out[i] = line[(i + 1) % kThreads];
}

// The same, written and read again: the second round must not start before the first has been read.
__global__ void two_rounds(float* out, bool with_barrier) {
  float* line = reinterpret_cast<float*>(captum_dtd::cuda::dynamic_shared());
  const int i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    line[i] = i + 100 * round;
    __syncthreads();
    out[kThreads * round + i] = line[(i + 1) % kThreads];
    if (with_barrier) __syncthreads();
  }
}

__global__ void copied(const float* in, float* out, bool with_wait) {
  float* line = reinterpret_cast<float*>(captum_dtd::cuda::dynamic_shared());
  const int i = threadIdx.x;
  captum_dtd::cuda::copy_async<4>(line + i, in + i, i != 0);
  captum_dtd::cuda::commit_copies();
  if (with_wait) captum_dtd::cuda::wait_copies<0>();
  out[i] = line[i];
  captum_dtd::cuda::wait_copies<0>();
}

__global__ void uneven(bool diverges) {
  if (!diverges || threadIdx.x < 40) __syncthreads();
}

__global__ void summed(float* out, bool diverges) {
  float sum = threadIdx.x;
  if (!diverges || threadIdx.x % 2 == 0)
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  out[threadIdx.x] = sum;
}

__global__ void overrun(float* out, int index) {
  float* line = reinterpret_cast<float*>(captum_dtd::cuda::dynamic_shared());
  line[index] = 1;
  out[0] = line[index];
}

// Eight rows of a matrix, `pitch` bytes apart.
__global__ void rows(float* out, int pitch) {
  unsigned char* memory = captum_dtd::cuda::dynamic_shared();
  uint32_t registers[4];
  captum_dtd::cuda::store_shared(memory + threadIdx.x % 32 * pitch, uint4{1, 2, 3, 4});
  __syncthreads();
  captum_dtd::cuda::load_matrices(registers, memory + threadIdx.x % 32 * pitch);
  out[threadIdx.x] = static_cast<float>(registers[0]);
}

// out (64 x 16) = a (64 x 64) b (16 x 64), transposed, of numbers that bfloat16 holds, by one warpgroup.
__global__ void grouped(const float* a, const float* b, float* out, const char* mistake) {
  using namespace captum_dtd::cuda;
  constexpr int kDepth = 64;
  unsigned char *left = dynamic_shared(), *right = left + 64 * 128;
  const auto made = [&](const char* name) { return std::string(mistake) == name; };
  const auto write = [](unsigned char* matrix, const float* from, int rows, float factor) {
    for (int i = threadIdx.x; i < rows * kDepth; i += blockDim.x) {
      const int row = i / kDepth, k = i % kDepth;
      store_shared(matrix + row * 128 + (k / 8 ^ row % 8) * 16 + k % 8 * 2, narrow<bfloat16>(factor * from[i]).bits);
    }
  };
  write(left, a, 64, 1);
  write(right, b, 16, 1);
  if (!made("not shown")) show_to_tensor_cores();
  __syncthreads();
  float sums[2][4] = {{-1, -1, -1, -1}, {-1, -1, -1, -1}};
  begin_products();
  for (int step = 0; step < 4; ++step) {
    const int at = 32 * step + (made("between patterns") ? 128 : 0);
    multiply_add_async<bfloat16>(sums, further(matrix_at(left), at), further(matrix_at(right), at), step > 0);
  }
  commit_products();
  if (made("overwritten")) write(left, a, 64, 2);
  if (!made("not waited for")) wait_products<0>();
  for (int block = 0; block < 2; ++block)
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 * 8, column = 8 * block + threadIdx.x % 4 * 2 + i % 2;
      out[row * 16 + column] = sums[block][i];
    }
  wait_products<0>();
}

using Array = py::array_t<float, py::array::c_style>;
using Bits = py::array_t<uint16_t, py::array::c_style>;

template <typename Format>
void define_format(py::module_& m, const char* name) {
  m.def((std::string("widen_") + name).c_str(), [](Bits in, Array out) {
    for (py::ssize_t i = 0; i < in.size(); ++i) out.mutable_data()[i] = captum_dtd::cuda::widen(Format{in.data()[i]});
  });
  m.def((std::string("narrow_") + name).c_str(), [](Array in, Bits out) {
    for (py::ssize_t i = 0; i < in.size(); ++i) out.mutable_data()[i] = captum_dtd::cuda::narrow<Format>(in.data()[i]).bits;
  });
}

}  // namespace

PYBIND11_MODULE(emulator_front, m) {
  define_format<captum_dtd::cuda::bfloat16>(m, "bfloat16");
  define_format<captum_dtd::cuda::float16>(m, "float16");
  m.def("set_seed", emulator::set_seed);
  m.def("take_bank_conflicts", emulator::take_bank_conflicts);
  m.def("neighbour", [](Array out, bool with_barrier) {
    launch("neighbour", neighbour, 1, kThreads, 0, nullptr, out.mutable_data(), with_barrier);
  });
  m.def("two_rounds", [](Array out, bool with_barrier) {
    launch("two_rounds", two_rounds, 1, kThreads, 4 * kThreads, nullptr, out.mutable_data(), with_barrier);
  });
  m.def("copied", [](Array in, Array out, bool with_wait) {
    launch("copied", copied, 1, kThreads, 4 * kThreads, nullptr, in.data(), out.mutable_data(), with_wait);
  });
  m.def("uneven", [](bool diverges) { launch("uneven", uneven, 1, kThreads, 0, nullptr, diverges); });
  m.def("summed",
        [](Array out, bool diverges) { launch("summed", summed, 1, kThreads, 0, nullptr, out.mutable_data(), diverges); });
  m.def("overrun",
        [](Array out, int index) { launch("overrun", overrun, 1, 1, 4 * kThreads, nullptr, out.mutable_data(), index); });
  m.def("grouped", [](Array a, Array b, Array out, const std::string& mistake) {
    launch("grouped", grouped, 1, 128, 80 * 128, nullptr, a.data(), b.data(), out.mutable_data(), mistake.c_str());
  });
  m.def("rows", [](Array out, int pitch) { launch("rows", rows, 1, kThreads, 32 * pitch, nullptr, out.mutable_data(), pitch); });
}
