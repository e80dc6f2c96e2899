// The inner loops of max pooling and of its relevance, along one row of windows or of the input; compiled once for each
// instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

namespace captum_dtd::cpu {

// Along one axis, the positions that a window contains, or the windows that contain a position, each with the tap by which it
// does: those of `i` are list[first[i]] to list[first[i + 1]].
struct Meeting {
  int64_t at, tap;
};
struct Meetings {
  const int64_t* first;
  const Meeting* list;
};

// How windows lie along a row.
struct PoolRow {
  int64_t positions, windows;
  Meetings of_windows, of_positions;
};

// A row is dense: `lanes` channels side by side at each of its positions or windows.
template <typename Sum>
struct PoolLoops {
  using Tap = std::conditional_t<std::is_same_v<Sum, double>, int64_t, int32_t>;  // as wide as what it goes with

  // The largest of every window, given the input rows that they contain. `columns` has room for a row of positions.
  void (*largest)(const PoolRow& row, int64_t lanes, int64_t rows, const Sum* const* x, Sum* columns, Sum* to);

  // Proportional, in two steps. A row's sums over windows of u = max(x, 0), given the input rows that they contain, all of them
  // or those of one time: added up along T and H first and then along W. And what the windows pass to a unit of u at each
  // position, R / (sum of u + stabilizer) added up along W, given rows of sums that make theirs. `columns` has room for a row of
  // positions or of windows.
  void (*sum)(const PoolRow& row, int64_t lanes, int64_t rows, const Sum* const* x, Sum* columns, Sum* sums);
  void (*share)(const PoolRow& row, int64_t lanes, int64_t rows, const Sum* const* sums, const Sum* relevance, Sum stabilizer,
                Sum* columns, Sum* shares);
  // to = sum of rows.
  void (*total)(int64_t count, int64_t rows, const Sum* const* from, Sum* to);

  // out = u * sum of the shares, given all rows of windows that contain this row of x.
  void (*gather)(int64_t count, int64_t rows, const Sum* const* shares, const Sum* x, Sum* out, bool stream);

  // Winner takes all: the number, among a window's taps, of its maximum. A row's taps are numbered from its first_tap on; the
  // rows are in the order of these numbers. `columns` and `column_winners` have room for a row of positions.
  void (*compete)(const PoolRow& row, int64_t lanes, int64_t rows, const Sum* const* x, const int64_t* first_tap, Sum* columns,
                  Tap* column_winners, Tap* winners);
  // out = sum of R of the windows that it has won, given their rows.
  void (*award)(const PoolRow& row, int64_t lanes, int64_t rows, const Tap* const* winners, const Sum* const* relevance,
                const int64_t* first_tap, Sum* out);
};

const PoolLoops<float>* float_pool_loops_avx512();
const PoolLoops<float>* float_pool_loops_avx2();
const PoolLoops<float>* float_pool_loops_generic();
const PoolLoops<double>* double_pool_loops_avx512();
const PoolLoops<double>* double_pool_loops_avx2();
const PoolLoops<double>* double_pool_loops_generic();

}  // namespace captum_dtd::cpu
