// How a rule reads a layer's input: z+ and z-beta are the same sums over non-negative parts of the input.
//
//   part 0 goes with v+ = max(v, 0), part 1 with -v- = max(-v, 0):
//     None    u0 = x                                   (x is known not to be negative: one part only)
//     Signed  u0 = max(x, 0)    u1 = max(-x, 0)        (z+ of a signed input)
//     Box     u0 = x - low      u1 = high - x          (z-beta)
//
//   z = sum over parts p of  conv_{w_p}(u_p),   R_in = sum over parts p of  u_p * adj_{w_p}(R / z)
#pragma once

namespace captum_dtd {

enum class Lift { None, Signed, Box };

constexpr int parts(Lift lift) { return lift == Lift::None ? 1 : 2; }

}  // namespace captum_dtd
