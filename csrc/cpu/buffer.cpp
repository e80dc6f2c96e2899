#include "buffer.h"

#include <iterator>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace captum_dtd::cpu {
namespace {

constexpr size_t kKeptBytes = size_t{192} << 20;  // over all blocks that wait

class Blocks {
 public:
  // The smallest that waits and is not far too big, of equals the last, which may still be in the cache; or a new one.
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = waiting_.end();
      for (auto block = waiting_.begin(); block != waiting_.end(); ++block)
        if (block->bytes() >= bytes && block->bytes() / 2 <= bytes && (best == waiting_.end() || block->bytes() <= best->bytes()))
          best = block;
      if (best != waiting_.end()) {
        waiting_bytes_ -= best->bytes();
        return lend(best);
      }
    }
    std::list<Buffer> fresh;
    fresh.emplace_back(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting_.splice(waiting_.end(), fresh);
    return lend(std::prev(waiting_.end()));
  }

  void give_back(void* data) {
    std::list<Buffer> freed;  // outside of the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lent_.find(data);
    waiting_bytes_ += found->second.front().bytes();
    waiting_.splice(waiting_.end(), found->second);
    lent_.erase(found);
    while (waiting_bytes_ > kKeptBytes) {
      waiting_bytes_ -= waiting_.front().bytes();
      freed.splice(freed.end(), waiting_, waiting_.begin());
    }
  }

 private:
  void* lend(std::list<Buffer>::iterator block) {
    void* const data = block->as<void>();
    lent_[data].splice(lent_[data].end(), waiting_, block);
    return data;
  }

  std::mutex mutex_;
  std::list<Buffer> waiting_;  // the longest first
  size_t waiting_bytes_ = 0;
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
