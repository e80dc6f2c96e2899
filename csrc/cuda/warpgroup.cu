// Sweeps by warpgroups. nvcc compiles this file for sm_90a alone, or not at all.
#include "choice.h"
#include "warpgroup.h"

namespace captum_dtd::cuda {

#ifdef CAPTUM_DTD_WITHOUT_WARPGROUPS

bool warpgroups_serve() { return false; }

std::vector<Choice> warpgroup_choices(Arithmetic) { return {}; }

#else

namespace {

// Rows, columns, rows of a group, stages, blocks on a multiprocessor; and the rate.
template <typename Arithmetic, int... kTile>
Choice dense(int rate) {
  return choice<Arithmetic, GroupTile<kTile...>, DenseLoader>(rate);
}

template <typename Arithmetic>
std::vector<Choice> choices_of_groups() {
  if constexpr (Arithmetic::kHalves == 2)  // two sets of sums leave no registers for larger ones
    return {dense<Arithmetic, 256, 64, 64, 4, 1>(1212), dense<Arithmetic, 128, 64, 64, 4, 2>(885),
            dense<Arithmetic, 128, 16, 64, 4, 2>(456)};
  else
    return {dense<Arithmetic, 128, 256, 64, 4, 1>(1905), dense<Arithmetic, 256, 128, 64, 4, 1>(1892),
            dense<Arithmetic, 192, 128, 64, 5, 1>(1593), dense<Arithmetic, 128, 128, 64, 3, 2>(1550),
            dense<Arithmetic, 128, 64, 64, 4, 2>(1364),  dense<Arithmetic, 128, 16, 64, 4, 2>(508)};
}

}  // namespace

bool warpgroups_serve() { return has_warpgroups(); }

std::vector<Choice> warpgroup_choices(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::BFloat16: return choices_of_groups<Bf16>();
    case Arithmetic::BFloat16x3: return choices_of_groups<Bf16x3>();
    default: return choices_of_groups<F16>();
  }
}

#endif

}  // namespace captum_dtd::cuda
