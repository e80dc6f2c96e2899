// Big blocks of memory on huge pages, where the system has them. A page that is not in the processor's short list of them has to
// be looked up, and on a virtual machine that can take microseconds: on one, 64 MB on pages of 4 KB were read at 3.4 GB/s and on
// pages of 2 MB at 14.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace captum_dtd::cpu {

constexpr size_t kHugePage = size_t{2} << 20;

// The size of a block's memory: whole huge pages, if one of them is filled by three quarters at least.
inline size_t whole_pages(size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage / 4 * 3) return (bytes + kHugePage - 1) / kHugePage * kHugePage;
#endif
  return bytes;
}

// `whole_pages` of so many bytes, aligned to cache lines.
inline void* allocate_pages(size_t asked) {
  constexpr std::align_val_t kLine{64};
  const size_t bytes = whole_pages(asked);
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) {
    // A mapping of its own: the C library's heap hands out pages again, and those stay as small as they are.
    void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const start = static_cast<char*>(mapped);
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
    if (before > 0) munmap(start, before);
    munmap(start + before + bytes, kHugePage - before);
    // A huge page is taken as a whole, so that the last one is not asked for where a quarter of all would lie idle. This is
    // advice only: where it is refused, nothing changes but the time.
    madvise(start + before, bytes - asked <= bytes / 4 ? bytes : bytes - kHugePage, MADV_HUGEPAGE);
    return start + before;
  }
#endif
  return ::operator new(bytes, kLine);
}

// `bytes`: what `whole_pages` made of them.
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
