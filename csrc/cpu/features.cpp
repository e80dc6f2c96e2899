#include "features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace captum_dtd::cpu {
namespace {

#if defined(__x86_64__)

// Linux gives the tile registers only to a process that asks for them; the answer holds for all of its threads.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

constexpr unsigned kAmxBf16 = 1u << 22, kAvx512Fp16 = 1u << 23, kAmxTile = 1u << 24;

// Whether the CPU has all of these, of what CPUID's leaf 7 tells in EDX.
bool has(unsigned bits) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & bits) == bits;
}

Features detect() {
  __builtin_cpu_init();
  Features found;
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  found.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
  found.avx512_bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
  found.avx512_fp16 = found.avx512_bf16 && has(kAvx512Fp16);
  found.amx_bf16 = found.avx512_bf16 && has(kAmxBf16 | kAmxTile) && tiles_permitted();
  return found;
}

#else

Features detect() { return {}; }

#endif

}  // namespace

const Features& features() {
  static const Features found = detect();
  return found;
}

}  // namespace captum_dtd::cpu
