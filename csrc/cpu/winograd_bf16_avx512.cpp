// Winograd's transforms for products of AVX512_BF16: what is multiplied is rounded while it is stored, by an instruction for
// that.
#include "features.h"

#define CAPTUM_DTD_ISA "avx512"
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#include "vector_winograd.h"

namespace captum_dtd::cpu {

#ifdef __AVX512BF16__

const WinogradKernel<bfloat16, float>* bfloat16_winograd_avx512() {
  return features().avx512_bf16 ? &kWinograd<bfloat16> : nullptr;
}

#else  // compiled for another architecture

const WinogradKernel<bfloat16, float>* bfloat16_winograd_avx512() { return nullptr; }

#endif

}  // namespace captum_dtd::cpu
