// Relevance of the summands of an addition on the CPU, block by block: the arithmetic is in loops.h, and is done where the
// operands lie if they are dense numbers of the sums' type, else on a copy of a block.
#include "add.h"

#include <algorithm>

#include "../lockstep.h"
#include "instructions.h"
#include "parallel.h"
#include "streaming.h"

namespace captum_dtd::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // numbers of every operand

template <typename Sum>
class Sharing {
 public:
  Sharing(const AddRelevance& problem, const Loops<Sum>& loops)
      : problem_(problem),
        loops_(loops),
        walk_(problem.size, {&problem.out, &problem.out_other, &problem.x, &problem.other, &problem.relevance}) {
    const int columns = walk_.axes - 1, rows = columns - 1;
    block_[1] = std::min(kBlock, walk_.size[columns]);
    block_[0] = rows >= 0 ? std::min(kBlock / block_[1], walk_.size[rows]) : 1;
    if (block_[1] < walk_.size[columns]) block_[0] = 1;  // so that a block of the results is dense
    int64_t numbers = 1;
    for (int a = 0; a < walk_.axes; ++a) {
      numbers *= walk_.size[a];
      const int64_t side = a == columns ? block_[1] : a == rows ? block_[0] : 1;
      count_[a] = (walk_.size[a] + side - 1) / side;
      blocks_ *= count_[a];
    }
    stream_ = numbers * static_cast<int64_t>(sizeof(Sum)) >= kStreamedBytes;
  }

  int64_t blocks() const { return blocks_; }

  void run(int64_t begin, int64_t end) const {
    alignas(64) Sum x[kBlock], other[kBlock], relevance[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      int64_t at[kTensors] = {}, rows = 1, columns = 1, rest = block;
      for (int a = walk_.axes - 1; a >= 0; --a) {
        const bool is_column = a == walk_.axes - 1, is_row = a == walk_.axes - 2;
        const int64_t side = is_column ? block_[1] : is_row ? block_[0] : 1, first = rest % count_[a] * side;
        rest /= count_[a];
        if (is_column) columns = std::min(side, walk_.size[a] - first);
        if (is_row) rows = std::min(side, walk_.size[a] - first);
        for (int i = 0; i < kTensors; ++i) at[i] += first * walk_.stride[a][i];
      }
      constexpr Element own = element_of<Sum>();
      loops_.share(
          rows * columns, dense(kX, problem_.x, problem_.element, at, rows, columns, x),
          dense(kOther, problem_.other, problem_.element, at, rows, columns, other), static_cast<Sum>(problem_.alpha),
          static_cast<Sum>(problem_.stabilizer), dense(kRelevance, problem_.relevance, own, at, rows, columns, relevance),
          static_cast<Sum*>(problem_.out.data) + at[kOut], static_cast<Sum*>(problem_.out_other.data) + at[kOutOther], stream_);
    }
    if (stream_) settle_streams();
  }

 private:
  enum Operand { kOut, kOutOther, kX, kOther, kRelevance, kTensors };

  // An operand's block where it lies if it is dense there, else a copy in `room`.
  const Sum* dense(Operand operand, const View& view, Element element, const int64_t (&at)[kTensors], int64_t rows,
                   int64_t columns, Sum* room) const {
    const int64_t across_columns = walk_.stride[walk_.axes - 1][operand];
    const int64_t across_rows = rows > 1 ? walk_.stride[walk_.axes - 2][operand] : 0;
    const char* from = static_cast<const char*>(view.data) + at[operand] * element_bytes(element);
    if (element == element_of<Sum>() && (columns == 1 || across_columns == 1) && (rows == 1 || across_rows == columns))
      return reinterpret_cast<const Sum*>(from);
    loops_.load(element, from, across_rows, across_columns, rows, columns, room, columns);
    return room;
  }

  const AddRelevance& problem_;
  const Loops<Sum>& loops_;
  Lockstep<kTensors> walk_;
  int64_t block_[2];                              // rows and columns: of the last axes but one, and of the last
  int64_t count_[Lockstep<kTensors>::kMostAxes];  // of blocks along every axis
  int64_t blocks_ = 1;
  bool stream_;
};

template <typename Sum>
void run(const AddRelevance& problem, const std::string& isa, ParallelFor parallel_for) {
  const Sharing<Sum> sharing(problem, *loops_of<Sum>(isa));
  parallel(parallel_for, sharing.blocks(), [&](int64_t begin, int64_t end) { sharing.run(begin, end); });
}

}  // namespace

std::vector<std::string> add_kernels() {
  return ieee_kernels([](const std::string& isa) { return loops_of<float>(isa) != nullptr; });
}

void add_relevance(const AddRelevance& problem, const std::string& kernel, ParallelFor parallel_for) {
  with_sum_of(problem.element, [&](auto sum) { run<decltype(sum)>(problem, isa_of(kernel), parallel_for); });
}

}  // namespace captum_dtd::cpu
