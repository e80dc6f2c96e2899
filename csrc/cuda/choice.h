// Kernels of a sweep to choose from: an arithmetic and a tile. Those of warpgroups are compiled by themselves (warpgroup.cu).
#pragma once

#include <vector>

#include "conv3d.h"
#include "implicit_gemm.h"

namespace captum_dtd::cuda {

enum class Arithmetic { Tf32, Tf32x3, BFloat16, BFloat16x3, Float16 };

using MultiplySweep = void (*)(Gemm);

// `rate` is rows x columns x bytes of the depth that a multiprocessor multiplies in a clock, where nothing else holds it up:
// fitted to what an H100 took for 256 channels to 256, 8 x 28 x 28 positions of 16 clips, in bfloat16 (tile_rates.cu), of which
// tf32 had the same. Guesses are the rates of 128 x 16 by warps, and of 128 x 128 by warpgroups.
struct Choice {
  Tiling tiling;
  MultiplySweep kernel;
  int threads, shared_bytes, stage_chunks, blocks, rate;
};

template <typename Arithmetic, typename Tile, template <typename, typename> class Loader>
Choice choice(int rate) {
  return {{Tile::kRows, Tile::kColumns, 1},
          multiply_sweep<Arithmetic, Tile, Loader>,
          Tile::kThreads,
          Tile::kSharedBytes,
          Tile::kStageChunks,
          Tile::kBlocks,
          rate};
}

// Whether there are such kernels, and the current device runs them.
bool warpgroups_serve();

// For bfloat16 (in halves too) and float16. They read dense operands alone.
std::vector<Choice> warpgroup_choices(Arithmetic arithmetic);

}  // namespace captum_dtd::cuda
