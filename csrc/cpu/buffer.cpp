#include "buffer.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace captum_dtd::cpu {
namespace {

// What waits and what is lent are together at most a quarter more than was ever lent at once, or this much.
constexpr size_t kLeastBytes = size_t{192} << 20;
constexpr size_t kMostWaitingBytes = size_t{1} << 30;

class Blocks {
 public:
  // The smallest that waits and is not far too big, of equals the last, which may still be in the cache; or a new one.
  void* take(size_t bytes) {
    std::list<Buffer> freed;  // outside of the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = waiting_.end();
    for (auto block = waiting_.begin(); block != waiting_.end(); ++block)
      if (block->bytes() >= bytes && block->bytes() / 4 <= bytes && (best == waiting_.end() || block->bytes() <= best->bytes()))
        best = block;
    if (best != waiting_.end()) return lend(best);
    Buffer fresh(bytes);
    const size_t lent = lent_bytes_ + fresh.bytes();
    most_lent_ = std::max(most_lent_, lent);
    free_down_to(std::max(most_lent_ + most_lent_ / 4, kLeastBytes) - lent, freed);
    waiting_bytes_ += fresh.bytes();
    waiting_.push_back(std::move(fresh));
    return lend(std::prev(waiting_.end()));
  }

  void give_back(void* data) {
    std::list<Buffer> freed;  // outside of the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lent_.find(data);
    const size_t bytes = found->second.front().bytes();
    lent_bytes_ -= bytes;
    waiting_bytes_ += bytes;
    waiting_.splice(waiting_.end(), found->second);
    lent_.erase(found);
    free_down_to(kMostWaitingBytes, freed);
  }

 private:
  void* lend(std::list<Buffer>::iterator block) {
    void* const data = block->as<void>();
    waiting_bytes_ -= block->bytes();
    lent_bytes_ += block->bytes();
    lent_[data].splice(lent_[data].end(), waiting_, block);
    return data;
  }

  // Lets go of those that wait the longest, until no more bytes wait than this.
  void free_down_to(size_t bytes, std::list<Buffer>& freed) {
    while (waiting_bytes_ > bytes) {
      waiting_bytes_ -= waiting_.front().bytes();
      freed.splice(freed.end(), waiting_, waiting_.begin());
    }
  }

  std::mutex mutex_;
  std::list<Buffer> waiting_;  // the longest first
  size_t waiting_bytes_ = 0, lent_bytes_ = 0, most_lent_ = 0;
  std::unordered_map<void*, std::list<Buffer>> lent_;
};

// Never destroyed: results may outlive everything else in the process.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

}  // namespace

void* take_block(size_t bytes) { return blocks().take(bytes); }

void give_back_block(void* block) { blocks().give_back(block); }

}  // namespace captum_dtd::cpu
