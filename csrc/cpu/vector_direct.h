// The register tile of DirectKernel on the compiler's portable vectors; included by each kernel_<isa>.cpp after vector_kernel.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "direct_kernel.h"
#include "vector_kernel.h"

namespace captum_dtd::cpu {
namespace {

// Beside weights of both parts, inputs and what spreads them; with half as many registers, weights had better come from the
// cache.
constexpr int kMaxDirectPositions = kRegisters == 32 ? 16 : kVectorBytes == 32 ? 10 : 6;

// How a lane gets the input that it multiplies.
enum class Spread { Own, Shuffled, OneForAll };

template <Spread kSpread, typename T, typename Source>
inline Register<T> spread_inputs(const Source* from, const Register<Index<T>>& lanes) {
  if constexpr (kSpread == Spread::OneForAll) return Register<T>{} + T(widen(*from));
  if constexpr (kSpread == Spread::Shuffled) return __builtin_shuffle(load_widened<T>(from), lanes);
  return load_widened<T>(from);
}

// What lies outside is read from a vector of zeros: that costs less than to leave it out.
template <int kTaps, bool kHasParts, Spread kSpread, typename Source, typename T, int kPositions>
inline void add_row(const DirectRow<T>& row, const DirectCall<T>& call, const Register<Index<T>>& first,
                    Register<T> (&sums)[kPositions]) {
  static constexpr Source zeros[kLanes<T>]{};
  const Source* const inputs = static_cast<const Source*>(row.from) + call.channel;
  const T* weights = row.weights + call.weight;
  const int of_group = kSpread == Spread::Own ? 1 : kSpread == Spread::OneForAll ? kLanes<T> : call.of_group;
  for (int channel = 0; channel < of_group; ++channel) {
    Register<T> own[kTaps], of_negative[kTaps];
#pragma GCC unroll 4
    for (int k = 0; k < kTaps; ++k) {
      const T* const tap = weights + (k * of_group + channel) * kLanes<T>;
      own[k] = load_vector(tap);
      if constexpr (kHasParts) of_negative[k] = load_vector(tap + call.of_part);
    }
    const Register<Index<T>> lanes = first + channel;
    const Source* from = inputs + (kSpread == Spread::OneForAll ? channel : 0);
#pragma GCC unroll 32
    for (int at = 0; at < kPositions + kTaps - 1; ++at) {
      const Register<T> input = spread_inputs<kSpread, T>(at >= row.begin && at < row.end ? from : zeros, lanes);
      from += call.step;
      const auto is_negative = input < Register<T>{};
#pragma GCC unroll 4
      for (int k = 0; k < kTaps; ++k)
        if (at >= k && at - k < kPositions) {
          if constexpr (kHasParts)
            sums[at - k] += input * (is_negative ? of_negative[k] : own[k]);
          else
            sums[at - k] += input * own[k];
        }
    }
  }
}

template <bool kHasParts, Spread kSpread, typename Source, typename T, int kPositions>
void direct_tile(const DirectCall<T>& call) {
  constexpr int kJoined = DirectKernel<T>::kJoined;
  const Register<Index<T>> first = first_lanes<T>(call.of_group, std::make_integer_sequence<int, kLanes<T>>{});
  const Register<T> start = call.start == nullptr ? Register<T>{} : load_vector(call.start + call.channel);
  Register<T> sums[kPositions];
#pragma GCC unroll 32
  for (int p = 0; p < kPositions; ++p) sums[p] = start;
  for (const DirectRow<T>* row = call.rows; row != call.rows + call.count; ++row) {
    if (row->taps == kJoined)
      add_row<kJoined, kHasParts, kSpread, Source>(*row, call, first, sums);
    else
      add_row<1, kHasParts, kSpread, Source>(*row, call, first, sums);
  }
#pragma GCC unroll 32
  for (int p = 0; p < kPositions; ++p) store_vector(sums[p], call.sums + p * call.pitch);
}

template <typename T, int kPositions = kMaxDirectPositions>
void run_direct(const DirectCall<T>& call) {
  if (call.positions != kPositions) {
    if constexpr (kPositions > 1) run_direct<T, kPositions - 1>(call);
    return;
  }
  const auto run = [&](auto source, auto has_parts) {
    using Source = decltype(source);
    if (call.of_group == 1) return direct_tile<has_parts(), Spread::Own, Source, T, kPositions>(call);
    if (call.of_group == kLanes<T>) return direct_tile<has_parts(), Spread::OneForAll, Source, T, kPositions>(call);
    if constexpr (kShuffles) direct_tile<has_parts(), Spread::Shuffled, Source, T, kPositions>(call);
  };
  const auto run_from = [&](auto source) {
    if (call.of_part > 0)
      run(source, std::true_type{});
    else
      run(source, std::false_type{});
  };
  if (call.type == element_of<T>()) return run_from(T{});
  if constexpr (sizeof(T) == sizeof(float)) run_from(bfloat16{});
}

template <typename T>
constexpr DirectKernel<T> kDirect{kLanes<T>, kMaxDirectPositions, kShuffles, run_direct<T>};

}  // namespace
}  // namespace captum_dtd::cpu
