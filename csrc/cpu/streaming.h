// Stores past the caches, for results that are too big to be found there when they are read again: a line need not be fetched,
// only to be overwritten, before it is written.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace captum_dtd::cpu {

// Of a whole result: as much as a second-level cache holds. Whole jobs of C3D and s3d took 3 % longer where this was eight times
// as much, measured on one core of an EPYC (Zen 5).
constexpr int64_t kStreamedBytes = int64_t{1} << 20;

// What is streamed is whole lines: parts of one would be written to memory one by one.
constexpr int64_t kLineBytes = 64;

// Before another thread may read what was streamed.
void settle_streams();

// In an anonymous namespace, as everything is that is compiled for each instruction set by itself.
namespace {

// To an address that is a multiple of the vector's size.
template <typename Vector>
inline void stream_vector(const Vector& value, void* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Vector) == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(value));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(Vector) == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(value));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(Vector) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<const __m128i&>(value));
#endif
  std::memcpy(to, &value, sizeof value);
}

}  // namespace
}  // namespace captum_dtd::cpu
