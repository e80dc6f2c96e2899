// The CUDA machine that the kernels of csrc/cuda see, on the host: their own source, compiled by a C++ compiler, runs with
// one fiber for each CUDA thread, block after block. It computes what a GPU computes and is stricter about how:
//
//  - A warp runs on until it meets a barrier of its block, and warps and lanes run in an order drawn from a seed. So a
//    missing barrier is a read of what has not been written.
//  - Shared memory holds NaN patterns until it is written. An asynchronous copy leaves them in its destination until the
//    thread that issued it waits for it. So a missing wait, and a copy into a buffer still being read, turn up as NaN.
//  - Warp-wide operations (mma, ldmatrix, shuffles) exchange registers by the fragment layouts of the PTX ISA. A product
//    is exact, and a sum is rounded towards zero once per operation, as tensor cores do.
//  - Threads that meet different barriers, or leave while others wait, are an error, and so is a misaligned copy.
//  - Warpgroups' products read shared memory when they are begun or, by the seed, when they are waited for; what was written
//    without a fence before the last barrier they must not read.
//  - Shared memory accesses made through device.h are checked for bank conflicts, and the conflicts are counted.
//
// It is compatible with AddressSanitizer and UndefinedBehaviorSanitizer, which find what runs over the end of a buffer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) int4 {
  int x, y, z, w;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating-point format
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif
constexpr uint64_t kCanary = 0x5ca1ab1edeadbea7;

// ------------------------------------------------------------------------------------------------ fibers

#ifdef __x86_64__
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.weak emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

// Where a flow of control stands while it does not run.
struct Context {
  const void* stack = nullptr;
  size_t size = 0;
#ifdef __x86_64__
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif

  void begin(void* memory, size_t bytes, void (*entry)()) {
    stack = memory;
    size = bytes;
#ifdef __x86_64__
    // What emulator_switch pops: six registers, the address of `entry`, and above it a return address never used.
    void** top = reinterpret_cast<void**>(static_cast<char*>(memory) + bytes);
    std::fill(top - 8, top, nullptr);
    top[-2] = reinterpret_cast<void*>(entry);
    pointer = top - 8;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = memory;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
  }
};

inline void enter(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.size);
#endif
#ifdef __x86_64__
  emulator_switch(&from.pointer, to.pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// ------------------------------------------------------------------------------------------------ state

enum class State { Ready, AtWarp, AtBlock, Done, Failed };
enum class Collective { None, Sync, Shuffle, LoadMatrices, MultiplyAdd };

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool present;
};

struct Access {
  uintptr_t address;
  int bytes;
};

// What a warpgroup has been told to multiply.
struct Product {
  float* sums;
  int column_blocks;
  const unsigned char *a, *b;
  bool keep;
  float (*widen)(uint16_t);
};

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack;
  State state = State::Done;
  int line = 0;  // of the block barrier at which it waits
  Index index;
  std::vector<Copy> issued;
  std::deque<std::vector<Copy>> in_flight;  // committed groups, oldest first
  std::vector<Access> accesses;             // since the last block barrier
  std::vector<Product> begun;
  std::deque<std::vector<Product>> products;  // committed groups, oldest first
  bool hides = false;                         // something in shared memory that it wrote from tensor cores
};

struct Warp {
  Collective collective = Collective::None;
  int arrived = 0, lanes = 0;
  void* in[kWarp];
  void* out[kWarp];
};

struct Machine {
  Context scheduler;
  std::deque<Thread> threads;  // of the largest block so far; they stay where they are
  int count = 0;               // of this block
  std::vector<Warp> warps;
  int current = 0;
  dim3 block_size, grid_size;
  Index block;
  unsigned char* dynamic = nullptr;
  std::vector<std::pair<void*, size_t>> statics;  // statically declared shared memory
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  std::string error;
  unsigned seed = 0;
  std::mt19937 random;
  int64_t bank_conflicts = 0;
  bool hidden = false;  // from warpgroups' tensor cores, at the last block barrier
};

inline Machine machine;

inline Thread& thread() { return machine.threads[machine.current]; }
inline Warp& warp() { return machine.warps[machine.current / kWarp]; }
inline int lane() { return machine.current % kWarp; }

// The order of threads: ascending for 0, otherwise shuffled.
inline void set_seed(unsigned seed) { machine.seed = seed; }

// How often shared memory had to be accessed once more than without conflicts since the last call.
inline int64_t take_bank_conflicts() { return std::exchange(machine.bank_conflicts, 0); }

inline void suspend(State state) {
  Thread& self = thread();
  self.state = state;
  enter(self.context, machine.scheduler);
}

[[noreturn]] inline void fail(const std::string& reason) {
  const Thread& self = thread();
  const auto text = [](Index i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  machine.error = "thread " + text(self.index) + " of block " + text(machine.block) + ": " + reason;
  for (;;) suspend(State::Failed);
}

// ------------------------------------------------------------------------------------------------ shared memory

// Of the lanes served together (128 bytes), the most different words that one bank must give, less one.
inline void count_conflicts(const Access* lanes, int count) {
  constexpr int kBanks = 32;
  const int together = count == 0 ? 1 : 128 / std::max(lanes[0].bytes, 4);
  for (int begin = 0; begin < count; begin += together) {
    uintptr_t words[kBanks][kBanks];
    int different[kBanks] = {}, worst = 1;
    for (int i = begin; i < std::min(begin + together, count); ++i)
      for (uintptr_t word = lanes[i].address / 4; word <= (lanes[i].address + lanes[i].bytes - 1) / 4; ++word) {
        uintptr_t* bank = words[word % kBanks];
        int& n = different[word % kBanks];
        if (std::find(bank, bank + n, word) == bank + n) bank[n++] = word;
        worst = std::max(worst, n);
      }
    machine.bank_conflicts += worst - 1;
  }
}

inline void record_access(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("misaligned access to shared memory");
  thread().accesses.push_back({reinterpret_cast<uintptr_t>(address), bytes});
}

// The n-th access of each lane of a warp belongs to one instruction: lanes access shared memory in step.
inline void settle_accesses() {
  Machine& m = machine;
  for (int begin = 0; begin < m.count; begin += kWarp) {
    const int end = std::min(begin + kWarp, m.count);
    for (size_t n = 0; n < m.threads[begin].accesses.size(); ++n) {
      Access lanes[kWarp];
      int count = 0;
      for (int i = begin; i < end; ++i)
        if (n < m.threads[i].accesses.size()) lanes[count++] = m.threads[i].accesses[n];
      count_conflicts(lanes, count);
    }
    for (int i = begin; i < end; ++i) m.threads[i].accesses.clear();
  }
}

template <typename T>
struct Static {
  T value;
  Static() {
    std::memset(static_cast<void*>(&value), kPoison, sizeof value);
    machine.statics.emplace_back(&value, sizeof value);
  }
};

// ------------------------------------------------------------------------------------------------ asynchronous copies

inline void issue_copy(void* to, const void* from, int bytes, bool present) {
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("asynchronous copy from a misaligned address");
  record_access(to, bytes);
  std::memset(to, kPoison, bytes);
  thread().issued.push_back({to, from, bytes, present});
}

inline void commit_copies() {
  thread().in_flight.push_back(std::move(thread().issued));
  thread().issued.clear();
}

inline void wait_copies(size_t pending) {
  auto& in_flight = thread().in_flight;
  thread().hides |= in_flight.size() > pending;
  for (; in_flight.size() > pending; in_flight.pop_front())
    for (const Copy& copy : in_flight.front())
      if (copy.present)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
}

// ------------------------------------------------------------------------------------------------ barriers and collectives

inline void block_barrier(int line) {
  thread().line = line;
  suspend(State::AtBlock);
}

// The last lane to arrive does the work of all, then lets the others go.
template <typename Work>
void collective(Collective kind, void* in, void* out, Work work) {
  Warp& w = warp();
  if (w.arrived++ == 0)
    w.collective = kind;
  else if (w.collective != kind)
    fail("lanes of one warp meet different warp-wide operations");
  w.in[lane()] = in;
  w.out[lane()] = out;
  if (w.arrived < w.lanes) return suspend(State::AtWarp);
  work(w);
  w.arrived = 0;
  const int first = machine.current - lane();
  for (int i = first; i < first + w.lanes; ++i) machine.threads[i].state = State::Ready;
}

inline void warp_barrier() {
  collective(Collective::Sync, nullptr, nullptr, [](Warp&) {});
}

template <typename T>
T shuffle(T value, int source) {
  struct Argument {
    T value;
    int source;
  } argument{value, source};
  T result;
  collective(Collective::Shuffle, &argument, &result, [](Warp& w) {
    for (int i = 0; i < w.lanes; ++i) {
      const int from = static_cast<Argument*>(w.in[i])->source;
      if (from < 0 || from >= w.lanes) fail("shuffle from a lane that does not exist");
      *static_cast<T*>(w.out[i]) = static_cast<Argument*>(w.in[from])->value;
    }
  });
  return result;
}

// ldmatrix: lane 8 i + r holds the address of row r of matrix i; lane l gets the l-th pair of elements of each matrix.
template <int kMatrices>
void load_matrices(uint32_t (&registers)[kMatrices], const void* row) {
  collective(Collective::LoadMatrices, const_cast<void*>(row), registers, [](Warp& w) {
    if (w.lanes != kWarp) fail("ldmatrix of a warp that is not full");
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t elements[8][8];
      Access rows[8];
      for (int r = 0; r < 8; ++r) {
        const void* address = w.in[8 * matrix + r];
        if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("ldmatrix of a misaligned row");
        std::memcpy(elements[r], address, sizeof elements[r]);
        rows[r] = {reinterpret_cast<uintptr_t>(address), 16};
      }
      count_conflicts(rows, 8);
      for (int l = 0; l < kWarp; ++l) {
        const uint16_t* pair = elements[l / 4] + l % 4 * 2;
        static_cast<uint32_t*>(w.out[l])[matrix] = pair[0] | uint32_t(pair[1]) << 16;
      }
    }
  });
}

inline float round_towards_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::isfinite(value) && std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// mma.sync.m16n8: sums (16 x 8) += a (16 x depth) b (depth x 8). Registers hold 32 bits: 2 elements of 16 bits or one of 32;
// `widen(register, i)` is the i-th of them.
template <int kPerRegister, typename Widen>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen) {
  struct Argument {
    const uint32_t *a, *b;
  } argument{a, b};
  collective(Collective::MultiplyAdd, &argument, sums, [widen](Warp& w) {
    constexpr int kDepth = 8 * kPerRegister;
    if (w.lanes != kWarp) fail("mma of a warp that is not full");
    double left[16][kDepth], right[8][kDepth];
    for (int l = 0; l < kWarp; ++l) {
      const auto& in = *static_cast<Argument*>(w.in[l]);
      const int group = l / 4, k = l % 4 * kPerRegister;
      for (int i = 0; i < kPerRegister; ++i)
        for (int half = 0; half < 2; ++half) {
          left[group][k + i + half * kDepth / 2] = widen(in.a[2 * half], i);
          left[group + 8][k + i + half * kDepth / 2] = widen(in.a[2 * half + 1], i);
          right[group][k + i + half * kDepth / 2] = widen(in.b[half], i);
        }
    }
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) {
        const double *u = left[l / 4 + i / 2 * 8], *v = right[l % 4 * 2 + i % 2];
        double sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += u[k] * v[k];
        float& total = static_cast<float*>(w.out[l])[i];
        total = round_towards_zero(total + sum);
      }
  });
}

// ------------------------------------------------------------------------------------------------ warpgroups

inline void show_to_tensor_cores() { thread().hides = false; }

// Element k of row r of a matrix in the pattern of 128 bytes.
inline float element_of(const Product& product, const unsigned char* matrix, int r, int k) {
  const uintptr_t plain = reinterpret_cast<uintptr_t>(matrix) + r * 128 + k * 2, address = plain ^ (plain >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const void*>(address), sizeof bits);
  return product.widen(bits);
}

// This thread's part of one product.
inline void multiply(const Product& product) {
  constexpr int kDepth = 16;
  const int row = machine.current / kWarp % 4 * 16 + lane() / 4;
  float left[2][kDepth];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < kDepth; ++k) left[half][k] = element_of(product, product.a, row + 8 * half, k);
  for (int j = 0; j < product.column_blocks; ++j)
    for (int e = 0; e < 2; ++e) {
      double sums[2] = {0, 0};
      for (int k = 0; k < kDepth; ++k) {
        const double right = element_of(product, product.b, 8 * j + 2 * (lane() % 4) + e, k);
        for (int half = 0; half < 2; ++half) sums[half] += left[half][k] * right;
      }
      for (int half = 0; half < 2; ++half) {
        float& total = product.sums[4 * j + 2 * half + e];
        total = round_towards_zero((product.keep ? total : 0) + sums[half]);
      }
    }
}

// Tensor cores may take their time or not: by the seed, products are taken at once or when somebody waits for them.
inline void multiply_add_async(float* sums, int column_blocks, const unsigned char* a, const unsigned char* b, bool keep,
                               float (*widen)(uint16_t)) {
  if (machine.hidden) fail("a matrix was written without being shown to tensor cores");
  for (const unsigned char* matrix : {a, b})
    if (reinterpret_cast<uintptr_t>(matrix) % 32 != 0 || reinterpret_cast<uintptr_t>(matrix) % 1024 >= 128)
      fail("a matrix does not begin where its pattern does");
  const Product product{sums, column_blocks, a, b, keep, widen};
  if (machine.seed % 2 != 0)
    multiply(product);
  else
    thread().begun.push_back(product);
}

inline void commit_products() {
  thread().products.push_back(std::move(thread().begun));
  thread().begun.clear();
}

inline void wait_products(size_t pending) {
  auto& products = thread().products;
  for (; products.size() > pending; products.pop_front())
    for (const Product& product : products.front()) multiply(product);
}

// ------------------------------------------------------------------------------------------------ launches

inline void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler.stack, &machine.scheduler.size);
#endif
  for (;;) {
    machine.entry(machine.argument);
    suspend(State::Done);
  }
}

inline void prepare(int count) {
  Machine& m = machine;
  m.count = count;
  while (static_cast<int>(m.threads.size()) < count) {
    Thread& t = m.threads.emplace_back();
    t.stack.reset(new char[kStack]);
    std::memcpy(t.stack.get(), &kCanary, sizeof kCanary);
    t.context.begin(t.stack.get(), kStack, run_thread);
  }
  m.warps.assign((count + kWarp - 1) / kWarp, {});
}

inline void resume(int i) {
  machine.current = i;
  Thread& t = machine.threads[i];
  enter(machine.scheduler, t.context);
  if (std::memcmp(t.stack.get(), &kCanary, sizeof kCanary) != 0) std::abort();  // the fiber's stack has overflowed
  if (t.state == State::Failed) throw std::runtime_error(machine.error);
}

// Calls visit(i) for begin <= i < end, in the order of the seed.
template <typename Visit>
void in_order(int begin, int end, Visit visit) {
  int all[1024 / kWarp + kWarp];  // warps of a block, or lanes of a warp
  for (int i = begin; i < end; ++i) all[i - begin] = i;
  if (machine.seed != 0) std::shuffle(all, all + (end - begin), machine.random);
  for (int i = 0; i < end - begin; ++i) visit(all[i]);
}

// Runs a warp until every lane waits for the block or is done.
inline void run_warp(int w) {
  Machine& m = machine;
  const int begin = w * kWarp, end = begin + m.warps[w].lanes;
  for (bool any = true; any;) {
    any = false;
    in_order(begin, end, [&](int i) {
      if (m.threads[i].state != State::Ready) return;
      resume(i);
      any = true;
    });
  }
  for (int i = begin; i < end; ++i)
    if (m.threads[i].state == State::AtWarp)
      throw std::runtime_error("a warp-wide operation waits for lanes that left or wait at a barrier of the block");
}

inline void run_block() {
  Machine& m = machine;
  for (int i = 0; i < m.count; ++i) {
    Thread& t = m.threads[i];
    const unsigned x = m.block_size.x, y = m.block_size.y;
    t.index = {i % x, i / x % y, i / (x * y)};
    t.state = State::Ready;
    t.issued.clear();
    t.in_flight.clear();
    t.begun.clear();
    t.products.clear();
    t.hides = false;
  }
  m.hidden = false;
  const int warps = static_cast<int>(m.warps.size());
  for (int w = 0; w < warps; ++w) m.warps[w].lanes = std::min(kWarp, m.count - w * kWarp);
  for (auto& [address, bytes] : m.statics) std::memset(address, kPoison, bytes);
  for (bool running = true; running;) {
    in_order(0, warps, run_warp);
    settle_accesses();
    int done = 0;
    for (int i = 0; i < m.count; ++i) done += m.threads[i].state == State::Done;
    running = done == 0;
    if (done != 0 && done != m.count)
      throw std::runtime_error("threads left the kernel while others wait at a barrier of the block");
    m.hidden = false;
    for (int i = 0; running && i < m.count; ++i) {
      Thread& t = m.threads[i];
      m.hidden |= t.hides;
      if (t.line != m.threads[0].line) throw std::runtime_error("threads of one block wait at different barriers");
      t.state = State::Ready;
    }
  }
  for (int i = 0; i < m.count; ++i) {
    const auto& groups = m.threads[i].in_flight;
    if (!m.threads[i].issued.empty() || std::any_of(groups.begin(), groups.end(), [](auto& group) { return !group.empty(); }))
      throw std::runtime_error("the kernel ends while asynchronous copies are in flight");
    const auto& products = m.threads[i].products;
    if (!m.threads[i].begun.empty() || std::any_of(products.begin(), products.end(), [](auto& group) { return !group.empty(); }))
      throw std::runtime_error("the kernel ends while products are in flight");
  }
}

template <typename Body>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Body body) {
  Machine& m = machine;
  m.block_size = block;
  m.grid_size = grid;
  m.random.seed(m.seed);
  m.argument = &body;
  m.entry = [](void* argument) { (*static_cast<Body*>(argument))(); };
  void* memory = nullptr;  // of exactly this size, so that an overrun of one byte is one
  if (posix_memalign(&memory, 1024, shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> shared(memory, std::free);
  m.dynamic = static_cast<unsigned char*>(memory);
  try {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw std::runtime_error("a launch without blocks");
    if (size_t(block.x) * block.y * block.z > 1024) throw std::runtime_error("a block has at most 1024 threads");
    prepare(static_cast<int>(block.x * block.y * block.z));
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          m.block = {x, y, z};
          std::memset(m.dynamic, kPoison, shared_bytes);
          run_block();
        }
  } catch (...) {
    m.threads.clear();  // fibers that were left in the middle of a kernel cannot run another
    throw;
  }
}

}  // namespace emulator

#define threadIdx (::emulator::thread().index)
#define blockIdx (::emulator::machine.block)
#define blockDim (::emulator::machine.block_size)
#define gridDim (::emulator::machine.grid_size)
#define __syncthreads() ::emulator::block_barrier(__LINE__)
#define __syncwarp() ::emulator::warp_barrier()

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::shuffle(value, source);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, emulator::lane() ^ mask);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int source = emulator::lane() + delta;
  return emulator::shuffle(value, source < emulator::kWarp ? source : emulator::lane());
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using std::max;
using std::min;
