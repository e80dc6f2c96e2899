// Which vector instructions this machine, its operating system and this process may use.
#pragma once

namespace captum_dtd::cpu {

struct Features {
  bool avx2 = false;         // with FMA
  bool avx512 = false;       // F, BW, DQ and VL
  bool avx512_bf16 = false;  // products of bfloat16 pairs
  bool avx512_fp16 = false;  // not used: tells apart CPUs whose bfloat16 pairs take longer than floats
  bool amx_bf16 = false;     // tiles of them, permitted to this process
};

// Found out once, on the first call.
const Features& features();

}  // namespace captum_dtd::cpu
