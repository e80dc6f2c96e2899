// The device as the kernels use it: number formats, asynchronous copies, matrix fragments, tensor-core products, launches.
// A kernel writes no PTX of its own, so the same source also runs on a host: compiled without nvcc, cuda_emulator.h takes
// the device's place.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace captum_dtd::cuda {

// ------------------------------------------------------------------------------------------------ number formats

// Raw bits of the 16-bit formats, in memory and as operands of tensor cores.
struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// A float32 whose last 13 bits tensor cores do not look at.
struct tfloat32 {
  uint32_t bits;
};

__device__ __forceinline__ float widen(float value) { return value; }

__device__ __forceinline__ float widen(tfloat32 value) { return __uint_as_float(value.bits); }

__device__ __forceinline__ float widen(bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }

__device__ __forceinline__ float widen(float16 value) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return __uint_as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Shifting the exponent into place leaves it too small by 127 - 15; the product is exact, also for subnormals.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
#endif
}

// To the nearest, ties to even; tfloat32: ties away from zero.
template <typename To>
__device__ __forceinline__ To narrow(float value);

template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ tfloat32 narrow<tfloat32>(float value) {
#ifdef __CUDACC__
  tfloat32 nearest;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(nearest.bits) : "f"(value));
  return nearest;
#else
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return {finite ? (bits + 0x1000) & 0xFFFFE000 : bits};
#endif
}

template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float value) {
  bfloat16 nearest;
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(nearest.bits) : "f"(value));
#else
  const uint32_t bits = __float_as_uint(value);
  nearest.bits = value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#endif
  return nearest;
}

template <>
__device__ __forceinline__ float16 narrow<float16>(float value) {
  float16 nearest;
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(nearest.bits) : "f"(value));
#else
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFF;
  uint32_t result;
  if (magnitude > 0x7F800000)
    result = 0x7FFF;
  else if (magnitude >= 0x477FF000)  // rounds to 65536 or more
    result = 0x7C00;
  else if (magnitude < 0x38800000)  // subnormal: adding 0.5 rounds to multiples of 2^-24
    result = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000;
  else
    result = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  nearest.bits = static_cast<uint16_t>((bits >> 16 & 0x8000) | result);
#endif
  return nearest;
}

// ------------------------------------------------------------------------------------------------ global memory

// Writes 16 aligned bytes in one instruction; the compiler may take an assignment apart into four.
__device__ __forceinline__ void store_global(void* to, uint4 value) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = value;
#endif
}

// ------------------------------------------------------------------------------------------------ shared memory

// The launch's dynamic shared memory, aligned as warpgroups want their matrices.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
#else
  return emulator::machine.dynamic;
#endif
}

// Declares `name`, of a type without constructor, in the block's shared memory.
#ifdef __CUDACC__
#define CAPTUM_DTD_SHARED(type, name) __shared__ type name
#else
#define CAPTUM_DTD_SHARED(type, name)          \
  static ::emulator::Static<type> name##_held; \
  type& name = name##_held.value
#endif

// Accesses that the emulator checks for bank conflicts.
template <typename T>
__device__ __forceinline__ void store_shared(void* to, T value) {
#ifndef __CUDACC__
  emulator::record_access(to, sizeof value);
  emulator::thread().hides = true;
#endif
  *static_cast<T*>(to) = value;
}

template <typename T>
__device__ __forceinline__ T load_shared(const void* from) {
#ifndef __CUDACC__
  emulator::record_access(from, sizeof(T));
#endif
  return *static_cast<const T*>(from);
}

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Starts to copy 4, 8 or 16 aligned bytes into shared memory; what is not `present` is zero, and then not read. What is `kept`
// near stays in the first-level cache, as far as there is any beside shared memory.
template <int kBytes, bool kKept = false>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool present) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  const int read = present ? kBytes : 0;
  if constexpr (kBytes == 16 && !kKept)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes), "r"(read)
                 : "memory");
#else
  emulator::issue_copy(to, from, kBytes, present);
#endif
}

// Closes a group of the copies that this thread has started since the last group.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::commit_copies();
#endif
}

// Waits until at most kPending of this thread's groups are still on their way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::wait_copies(kPending);
#endif
}

// Four 8 x 8 matrices of 16-bit elements (8 x 4 of 32-bit ones): lane 8 i + r gives the address of row r of matrix i, and
// gets the 32 bits at column lane % 4 of row lane / 4 of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulator::load_matrices(registers, row);
#endif
}

// ------------------------------------------------------------------------------------------------ tensor cores

// sums (16 x 8, float32) += a (16 rows, 32 bytes deep) b (8 columns, 32 bytes deep): 16 elements of 16 bits or 8 of 32.
// With g = lane / 4 and t = lane % 4, counting 32-bit words along the depth, a lane holds
//   a: (row g, word t), (g + 8, t), (g, t + 4), (g + 8, t + 4)      b: (column g, word t), (g, t + 4)
//   sums: (row g, column 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
template <typename Operand>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef __CUDACC__
#define CAPTUM_DTD_MULTIPLY_ADD(operand, shape_and_types)                                                                   \
  template <>                                                                                                               \
  __device__ __forceinline__ void multiply_add<operand>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                       \
  }
CAPTUM_DTD_MULTIPLY_ADD(tfloat32, "m16n8k8.row.col.f32.tf32.tf32.f32")
CAPTUM_DTD_MULTIPLY_ADD(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
CAPTUM_DTD_MULTIPLY_ADD(float16, "m16n8k16.row.col.f32.f16.f16.f32")
#undef CAPTUM_DTD_MULTIPLY_ADD
#else
template <typename Operand>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(Operand) == 2)
    emulator::multiply_add<2>(sums, a, b,
                              [](uint32_t word, int i) { return widen(Operand{static_cast<uint16_t>(word >> 16 * i)}); });
  else
    emulator::multiply_add<1>(sums, a, b, [](uint32_t word, int) { return __uint_as_float(word & 0xFFFFE000); });
}
#endif

// ------------------------------------------------------------------------------------------------ launches

// Launches on a stream (a cudaStream_t); `name` is for the message where the launch fails. A grid without blocks, which CUDA
// takes for a mistake, does nothing.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  constexpr size_t kWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t last = cudaGetLastError();  // asked in any case: what is left there would fail the next launch
  if (error == cudaSuccess) error = last;
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
#else
  static_cast<void>(name);
  static_cast<void>(stream);
  emulator::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
#endif
}

}  // namespace captum_dtd::cuda
