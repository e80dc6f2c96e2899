// Big blocks of memory on huge pages, where the system has them. A page that is not in the processor's short list of them has to
// be looked up, and on a virtual machine that can take microseconds: there, memory on pages of 4 KB was read at 3.4 GB/s and on
// pages of 2 MB at 14, and written for the first time at 1.9 and 8.5 GB/s.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace captum_dtd::cpu {

constexpr size_t kHugePage = size_t{2} << 20;

// What a block really takes: whole pages, once that wastes less than it gains.
inline size_t whole_pages(size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage / 4 * 3) return (bytes + kHugePage - 1) / kHugePage * kHugePage;
#endif
  return bytes;
}

// Aligned to cache lines; `bytes` is what `whole_pages` made of them.
inline void* allocate_pages(size_t bytes) {
  constexpr std::align_val_t kLine{64};
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) {
    // A mapping of its own: the C library's heap hands out pages again, and those stay as small as they are.
    void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const start = static_cast<char*>(mapped);
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
    if (before > 0) munmap(start, before);
    munmap(start + before + bytes, kHugePage - before);
    madvise(start + before, bytes, MADV_HUGEPAGE);  // advice only: where it is refused, nothing changes but the time
    return start + before;
  }
#endif
  return ::operator new(bytes, kLine);
}

inline void free_pages(void* data, size_t bytes) {
  constexpr std::align_val_t kLine{64};
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) {
    munmap(data, bytes);
    return;
  }
#endif
  ::operator delete(data, kLine);
}

// Moves what somebody else's memory holds to huge pages, where it lies, as far as it fills whole ones. The system does it or
// not (Linux does since 6.1); what is written and read there stays the same.
inline void move_to_huge_pages(const void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage, end = (first + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace captum_dtd::cpu
