#include "buffer.h"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

namespace captum_dtd::cpu {
namespace {

constexpr size_t kKeptBytes = size_t{256} << 20;  // over all buffers that wait

std::mutex mutex;

std::vector<Buffer>& waiting() {
  static std::vector<Buffer> buffers;
  return buffers;
}

}  // namespace

Workspace::Workspace(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<Buffer>& buffers = waiting();
    const auto smaller = [](const Buffer& a, const Buffer& b) { return a.bytes() < b.bytes(); };
    const auto largest = std::max_element(buffers.begin(), buffers.end(), smaller);
    if (largest != buffers.end()) {
      buffer_ = std::move(*largest);
      buffers.erase(largest);
    }
  }
  buffer_.reserve(bytes);
}

Workspace::~Workspace() {
  const std::lock_guard<std::mutex> lock(mutex);
  size_t kept = buffer_.bytes();
  for (const Buffer& buffer : waiting()) kept += buffer.bytes();
  if (kept <= kKeptBytes) waiting().push_back(std::move(buffer_));
}

}  // namespace captum_dtd::cpu
