// One bfloat16 microkernel, named by the macro KERNEL, behind plain C functions: to be called from Python by ctypes.
//
// Built with amx_emulation.h included ahead (and EMULATE_AMX defined), a processor with tiles is pretended.
#include <exception>
#include <string>

#include "../../csrc/cpu/features.h"
#include "../../csrc/cpu/microkernel.h"

using captum_dtd::cpu::bfloat16;

#ifdef EMULATE_AMX
const captum_dtd::cpu::Features& captum_dtd::cpu::features() {
  static const Features emulated = [] {
    Features found;
    found.amx_bf16 = true;
    return found;
  }();
  return emulated;
}
#endif

extern "C" {

// False where this machine cannot run the kernel.
bool describe(int* max_positions, int* channels, int* depth_multiple) {
  const auto* kernel = captum_dtd::cpu::KERNEL();
  if (kernel == nullptr) return false;
  *max_positions = kernel->max_positions;
  *channels = kernel->channels;
  *depth_multiple = kernel->depth_multiple;
  return true;
}

// Before the first call, and after whatever else may have run on this thread.
void begin() {
  if (const auto* kernel = captum_dtd::cpu::KERNEL(); kernel->begin != nullptr) kernel->begin();
}

// Null, or what went wrong.
const char* run(int positions, const bfloat16* a, int64_t position_stride, const int64_t* offsets, int64_t taps, int64_t depth,
                const bfloat16* b, float* sum, bool accumulate) {
  static thread_local std::string error;
  try {
    captum_dtd::cpu::KERNEL()->run(positions, a, position_stride, offsets, taps, depth, b, sum, accumulate, {nullptr, 0});
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}

#ifdef EMULATE_AMX
// What another library on the same thread may do.
void release_tiles() { _tile_release(); }
#endif

}  // extern "C"
