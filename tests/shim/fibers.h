// Threads of a CUDA block as fibers of one CPU thread: barriers, warp exchanges, shared memory, asynchronous copies.
//
// What it checks beside the results: a barrier or a warp operation that some threads don't reach, different warp
// operations meeting each other, shared memory read before it is written (filled with NaN for every block),
// asynchronous copies read before they are waited for (the bytes arrive at the wait, not before), misaligned 16-byte
// accesses. Threads run until they block, in ascending or, after emu::set_reversed, in descending order: the results
// must be the same bits, and a missing barrier shows in one of the two.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

namespace emu {

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;
enum Wait : int { RUNNING = 0, BLOCK = 1 };  // and 2 + n: warp operation n

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false, done = false;
  int wait = RUNNING, parity = 0;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // copies not committed yet
};
struct Exchange {
  uint64_t word[2][WARP][8];
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<Exchange> exchange;
inline std::unique_ptr<char[]> memory;  // the block's shared memory
inline size_t memory_bytes = 0;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline int current = 0;
inline dim3 thread, block, block_size, grid_size;
inline bool reversed = false;
inline cudaError_t status = cudaSuccess;
inline std::string message;

inline void set_reversed(bool value) { reversed = value; }
inline void fail(const std::string& text) {
  if (status == cudaSuccess) status = cudaErrorLaunchFailure, message = text;
}
inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.get()) + 15) / 16 * 16);
}

inline void entry() {
  body();
  fibers[current]->done = true;
  _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void yield(int wait) {
  Fiber& fiber = *fibers[current];
  fiber.wait = wait;
  if (_setjmp(fiber.jump) == 0) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void resume(int index) {
  Fiber& fiber = *fibers[index];
  current = index;
  thread = dim3(index % block_size.x, index / block_size.x % block_size.y, index / (block_size.x * block_size.y));
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Runs the lanes of one warp until all of them are done or wait for the block; false after an error.
inline bool run_warp(int first) {
  for (;;) {
    for (int k = 0; k < WARP; ++k) {
      const int index = first + (reversed ? WARP - 1 - k : k);
      if (!fibers[index]->done && fibers[index]->wait == RUNNING) resume(index);
      if (status != cudaSuccess) return false;
    }
    const Fiber& lead = *fibers[first];
    for (int k = 1; k < WARP; ++k) {
      const Fiber& other = *fibers[first + k];
      if (other.done != lead.done || (!lead.done && other.wait != lead.wait))
        return fail("lanes of a warp part at a barrier or warp operation"), false;
    }
    if (lead.done || lead.wait == BLOCK) return true;
    for (int k = 0; k < WARP; ++k) fibers[first + k]->wait = RUNNING;
  }
}
inline void run_block(int threads) {
  const int warps = threads / WARP;
  for (;;) {
    int done = 0;
    for (int k = 0; k < warps; ++k) {
      const int warp = reversed ? warps - 1 - k : k;
      if (!run_warp(warp * WARP)) return;
    }
    for (int index = 0; index < threads; ++index) done += fibers[index]->done;
    if (done == threads) return;
    if (done > 0) return fail("__syncthreads reached by a part of the block");
    for (int index = 0; index < threads; ++index) fibers[index]->wait = RUNNING;
  }
}

template <typename Kernel>
void launch(dim3 grid, dim3 size, size_t shared_bytes, Kernel kernel) {
  const int threads = int(size.x * size.y * size.z);
  if (threads == 0 || threads > 1024 || threads % WARP != 0)
    return fail("threads of a block: a multiple of 32, at most 1024");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return fail("invalid grid");
  body = kernel, grid_size = grid, block_size = size;
  while (int(fibers.size()) < threads) fibers.emplace_back(new Fiber), stacks.emplace_back(new char[STACK]);
  exchange.resize(threads / WARP);
  if (memory_bytes < shared_bytes + 16) memory_bytes = shared_bytes + 16, memory.reset(new char[memory_bytes]);
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  for (int64_t k = 0; k < blocks && status == cudaSuccess; ++k) {
    const int64_t index = reversed ? blocks - 1 - k : k;
    block =
        dim3(unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / (int64_t(grid.x) * grid.y)));
    std::memset(memory.get(), 0xff, memory_bytes);  // NaN
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = *fibers[t];
      fiber.started = fiber.done = false, fiber.wait = RUNNING, fiber.parity = 0;
      fiber.groups.clear(), fiber.open.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks[t].get(), fiber.context.uc_stack.ss_size = STACK,
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
    }
    run_block(threads);
  }
}

// Every lane gives `count` words and reads any lane's; one barrier, since the next exchange uses the other half.
inline const uint64_t (*swap_words(int operation, const uint64_t* words, int count))[8] {
  Fiber& fiber = *fibers[current];
  Exchange& slots = exchange[current / WARP];
  const int half = fiber.parity;
  fiber.parity ^= 1;
  for (int k = 0; k < count; ++k) slots.word[half][current % WARP][k] = words[k];
  yield(2 + operation);
  return slots.word[half];
}
template <typename T>
T shuffle(T value, int source) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = swap_words(1, &word, 1)[source][0];
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    return fail("misaligned asynchronous copy");
  fibers[current]->open.push_back({to, from, bytes});
}
inline void commit() {
  fibers[current]->groups.push_back(std::move(fibers[current]->open));
  fibers[current]->open.clear();
}
inline void wait_group(int left) {
  auto& groups = fibers[current]->groups;
  while (int(groups.size()) > left) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emu
