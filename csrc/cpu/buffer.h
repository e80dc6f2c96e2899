// Memory that is used again, since the C library gives big blocks back to the system at once.
#pragma once

#include <cstddef>
#include <memory>

#include "huge_pages.h"

namespace captum_dtd::cpu {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : data_(allocate_pages(bytes), Free{whole_pages(bytes)}) {}

  // As many as were asked for, or more.
  size_t bytes() const { return data_.get_deleter().bytes; }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }

  // At least as big as this; what was in it is lost where it has to grow.
  void reserve(size_t bytes) {
    if (bytes <= this->bytes()) return;
    *this = Buffer();
    *this = Buffer(bytes);
  }

 private:
  struct Free {
    size_t bytes;
    void operator()(void* data) const { free_pages(data, bytes); }
  };

  std::unique_ptr<void, Free> data_;
};

// Big blocks for the duration of a call or of a result. The process keeps those that were given back, up to limits: memory that
// is new to it costs more time than what is done with it.
void* take_block(size_t bytes);
void give_back_block(void* block);

class Workspace {
 public:
  explicit Workspace(size_t bytes) : data_(bytes > 0 ? take_block(bytes) : nullptr) {}
  ~Workspace() {
    if (data_ != nullptr) give_back_block(data_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace captum_dtd::cpu
