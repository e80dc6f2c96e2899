// Tensor cores as Hopper's warpgroups use them: four warps multiply matrices that lie in shared memory, and go on while tensor
// cores do it. nvcc takes this for sm_90a alone, which is what warpgroup.cu is compiled for.
//
// A matrix is 64 rows (of the left operand) or all columns (of the right one), 32 bytes deep. Rows lie 128 bytes apart, and
// eight of them, 1024 bytes, make a pattern that begins at a multiple of 1024: there chunk c of 16 bytes of row r lies at
// place c ^ r % 8 of its row (PTX ISA, "128-byte swizzle"). So banks do not conflict.
#pragma once

#include "device.h"

namespace captum_dtd::cuda {

#ifdef __CUDACC__

using Matrix = uint64_t;  // a descriptor of the PTX ISA

// The matrix whose first row begins there, at a multiple of 32 bytes within its row.
__device__ __forceinline__ Matrix matrix_at(const void* start) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32, kUnused = uint64_t(1) << 16;
  return kSwizzle128 | kEightRows | kUnused | (shared_address(start) >> 4 & 0x3FFF);
}

// The matrix that begins so many bytes further.
__device__ __forceinline__ Matrix further(Matrix matrix, int bytes) { return matrix + (bytes >> 4); }

// What this thread has written to shared memory, tensor cores see after the block's next barrier.
__device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before products whose sums were touched since the last ones.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of the products that were begun since the last group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups of products are not done.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving what touches sums to before this place.
template <int kRowBlocks, int kColumnBlocks>
__device__ __forceinline__ void hold(float (&sums)[kRowBlocks][kColumnBlocks][4]) {
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(sums[i][j][k])::"memory");
}

template <typename Operand, int kColumnBlocks>
struct GroupProduct;

#define CAPTUM_DTD_SUMS_1(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define CAPTUM_DTD_SUMS_2(i) CAPTUM_DTD_SUMS_1(i), CAPTUM_DTD_SUMS_1(i + 1)
#define CAPTUM_DTD_SUMS_4(i) CAPTUM_DTD_SUMS_2(i), CAPTUM_DTD_SUMS_2(i + 2)
#define CAPTUM_DTD_SUMS_8(i) CAPTUM_DTD_SUMS_4(i), CAPTUM_DTD_SUMS_4(i + 4)
#define CAPTUM_DTD_SUMS_16(i) CAPTUM_DTD_SUMS_8(i), CAPTUM_DTD_SUMS_8(i + 8)
#define CAPTUM_DTD_SUMS_32(i) CAPTUM_DTD_SUMS_16(i), CAPTUM_DTD_SUMS_16(i + 16)
#define CAPTUM_DTD_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CAPTUM_DTD_REGISTERS_32                                                    \
  CAPTUM_DTD_REGISTERS_8                                                           \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CAPTUM_DTD_REGISTERS_64                                                      \
  CAPTUM_DTD_REGISTERS_32                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CAPTUM_DTD_REGISTERS_128                                                                 \
  CAPTUM_DTD_REGISTERS_64                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// sums (64 rows x 8 kColumnBlocks, float32) += a b, of bfloat16 or float16; a lane of warp w holds rows 16 w + lane / 4 and 8
// more, columns 8 j + 2 (lane % 4) and the next, in sums[j] as multiply_add has them.
#define CAPTUM_DTD_GROUP_PRODUCT(operand, type, blocks, columns, registers, left, right, keeps)                     \
  template <>                                                                                                       \
  struct GroupProduct<operand, blocks> {                                                                            \
    static __device__ __forceinline__ void add(float (&sums)[blocks][4], Matrix a, Matrix b, bool keep) {           \
      asm volatile("{ .reg .pred keeps; setp.ne.b32 keeps, " keeps ", 0; wgmma.mma_async.sync.aligned.m64n" columns \
                   "k16.f32." type "." type " {" registers "}, " left ", " right ", keeps, 1, 1, 0, 0; }"           \
                   : CAPTUM_DTD_SUMS_##blocks(0)                                                                    \
                   : "l"(a), "l"(b), "r"(int(keep)));                                                               \
    }                                                                                                               \
  };
#define CAPTUM_DTD_GROUP_PRODUCTS(blocks, columns, registers, left, right, keeps)            \
  CAPTUM_DTD_GROUP_PRODUCT(bfloat16, "bf16", blocks, columns, registers, left, right, keeps) \
  CAPTUM_DTD_GROUP_PRODUCT(float16, "f16", blocks, columns, registers, left, right, keeps)
CAPTUM_DTD_GROUP_PRODUCTS(2, "16", CAPTUM_DTD_REGISTERS_8, "%8", "%9", "%10")
CAPTUM_DTD_GROUP_PRODUCTS(8, "64", CAPTUM_DTD_REGISTERS_32, "%32", "%33", "%34")
CAPTUM_DTD_GROUP_PRODUCTS(16, "128", CAPTUM_DTD_REGISTERS_64, "%64", "%65", "%66")
CAPTUM_DTD_GROUP_PRODUCTS(32, "256", CAPTUM_DTD_REGISTERS_128, "%128", "%129", "%130")
#undef CAPTUM_DTD_GROUP_PRODUCT
#undef CAPTUM_DTD_GROUP_PRODUCTS
#undef CAPTUM_DTD_SUMS_1
#undef CAPTUM_DTD_SUMS_2
#undef CAPTUM_DTD_SUMS_4
#undef CAPTUM_DTD_SUMS_8
#undef CAPTUM_DTD_SUMS_16
#undef CAPTUM_DTD_SUMS_32
#undef CAPTUM_DTD_REGISTERS_8
#undef CAPTUM_DTD_REGISTERS_32
#undef CAPTUM_DTD_REGISTERS_64
#undef CAPTUM_DTD_REGISTERS_128

// Begins sums += a b, or sums = a b where they do not `keep` what they are.
template <typename Operand, int kColumnBlocks>
__device__ __forceinline__ void multiply_add_async(float (&sums)[kColumnBlocks][4], Matrix a, Matrix b, bool keep) {
  GroupProduct<Operand, kColumnBlocks>::add(sums, a, b, keep);
}

#else

using Matrix = const unsigned char*;

inline Matrix matrix_at(const void* start) { return static_cast<Matrix>(start); }

inline Matrix further(Matrix matrix, int bytes) { return matrix + bytes; }

inline void show_to_tensor_cores() { emulator::show_to_tensor_cores(); }

inline void begin_products() {}

inline void commit_products() { emulator::commit_products(); }

template <int kPending>
void wait_products() {
  emulator::wait_products(kPending);
}

template <int kRowBlocks, int kColumnBlocks>
void hold(float (&)[kRowBlocks][kColumnBlocks][4]) {}

template <typename Operand, int kColumnBlocks>
void multiply_add_async(float (&sums)[kColumnBlocks][4], Matrix a, Matrix b, bool keep) {
  emulator::multiply_add_async(&sums[0][0], kColumnBlocks, a, b, keep, [](uint16_t bits) { return widen(Operand{bits}); });
}

#endif

// Whether the current device multiplies by warpgroups, as compute capability 9.0 alone does.
inline bool has_warpgroups() {
#ifdef __CUDACC__
  int device, major, minor;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  if (!known) cudaGetLastError();  // where there is no device nothing shall fail for having asked
  return known && major == 9 && minor == 0;
#else
  return true;
#endif
}

}  // namespace captum_dtd::cuda
