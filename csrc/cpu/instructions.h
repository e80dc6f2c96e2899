// Instruction sets by their names, for operations that need no register tiles. Not to be included by what is compiled for one of
// them.
#pragma once

#include <string>
#include <vector>

#include "loops.h"

namespace captum_dtd::cpu {

// Null where this machine does not run it.
template <typename Sum>
const Loops<Sum>* loops_of(const std::string& isa);

template <>
inline const Loops<float>* loops_of(const std::string& isa) {
  return isa == "avx512" ? float_loops_avx512() : isa == "avx2" ? float_loops_avx2() : float_loops_generic();
}

template <>
inline const Loops<double>* loops_of(const std::string& isa) {
  return isa == "avx512" ? double_loops_avx512() : isa == "avx2" ? double_loops_avx2() : double_loops_generic();
}

inline const Loops<float>& best_loops() {
  for (const char* isa : {"avx512", "avx2"})
    if (const Loops<float>* found = loops_of<float>(isa)) return *found;
  return *loops_of<float>("generic");
}

// Kernels in the sums' own arithmetic, one for each instruction set that `runs`, best first.
template <typename Runs>
std::vector<std::string> ieee_kernels(Runs runs) {
  std::vector<std::string> names;
  for (const std::string isa : {"avx512", "avx2", "generic"})
    if (runs(isa)) names.push_back(isa + "/ieee");
  return names;
}

// Calls body with a number of the type in which sums of such elements are taken.
template <typename Body>
void with_sum_of(Element element, Body body) {
  element == Element::Float64 ? body(double{}) : body(float{});
}

inline std::string isa_of(const std::string& kernel) { return kernel.substr(0, kernel.find('/')); }

}  // namespace captum_dtd::cpu
