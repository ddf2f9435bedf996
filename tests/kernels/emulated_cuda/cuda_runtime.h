// What csrc/pack_kv.cu uses of CUDA, for a C++ compiler: a kernel runs block after block and warp after warp. The lanes
// of a warp are coroutines that meet at every shuffle, which is checked as the PTX manual defines it: all lanes of the
// mask that have not exited are at the same shuffle, and none is given the value of a lane that is not.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(threads)

using std::min;

struct Index {
  uint32_t x;
};
inline Index threadIdx, blockIdx;

// An error is its own message. The last one stays until it is asked for.
using cudaError_t = const char*;
using cudaStream_t = void*;
struct cudaFuncAttributes {};
constexpr cudaError_t cudaSuccess = nullptr;
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) { return error; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

namespace emulated {

constexpr uint32_t WARP = 32;

struct Lane {
  ucontext_t context;
  alignas(16) char stack[1 << 15];
  bool exited;
  uint32_t mask, sent;
  int line;  // that of the shuffle at which the lane waits
};
inline Lane lanes[WARP];
inline Lane* running;
inline ucontext_t scheduler;
inline int64_t shuffles;  // how often a warp met

inline void fail(cudaError_t error) { last_error = last_error == cudaSuccess ? error : last_error; }

inline void meet() {
  shuffles++;
  const Lane* first = std::find_if(lanes, lanes + WARP, [](const Lane& lane) { return !lane.exited; });
  for (const Lane& lane : lanes) {
    if (lane.exited) continue;
    if (lane.line != first->line || lane.mask != first->mask) fail("lanes wait at different shuffles");
    if (!(lane.mask >> (&lane - lanes) & 1)) fail("a lane shuffles without being in the mask");
  }
}

template <class Value>
Value shuffled(uint32_t mask, Value value, uint32_t source, int line) {
  static_assert(sizeof value == sizeof running->sent);
  Lane& self = *running;
  memcpy(&self.sent, &value, sizeof value);
  self.mask = mask, self.line = line;
  swapcontext(&self.context, &scheduler);
  if (lanes[source].exited) fail("a lane is given the value of one that has exited");
  memcpy(&value, &lanes[source].sent, sizeof value);
  // Nobody sends again before everybody has received.
  swapcontext(&self.context, &scheduler);
  return value;
}

template <class Body>
void run_warp(uint32_t first_thread, Body& body) {
  static Body* entered;
  entered = &body;
  const auto step = [&](Lane& lane) {
    running = &lane, threadIdx.x = first_thread + (&lane - lanes);
    swapcontext(&scheduler, &lane.context);
  };
  for (Lane& lane : lanes) {
    lane.exited = false;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack, lane.context.uc_stack.ss_size = sizeof lane.stack;
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, +[] { (*entered)(), running->exited = true; }, 0);
  }
  const auto alive = [](const Lane& lane) { return !lane.exited; };
  for (bool sending = true; std::any_of(lanes, lanes + WARP, alive); sending = !sending) {
    for (Lane& lane : lanes) {
      if (!lane.exited) step(lane);
    }
    if (sending && std::any_of(lanes, lanes + WARP, alive)) meet();
  }
}

// In place of kernel<<<blocks, threads>>>.
template <class... Parameters>
auto launch(void (*kernel)(Parameters...), int64_t blocks, uint32_t threads) {
  return [=](Parameters... arguments) {
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
      const auto body = [&] { kernel(arguments...); };
      for (uint32_t warp = 0; warp < threads; warp += WARP) run_warp(warp, body);
    }
  };
}

}  // namespace emulated

// -fsanitize=alignment calls this before an access that is not aligned. The lane ends there, as the kernel would.
extern "C" inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(void*, uintptr_t) {
  emulated::fail("an access is not aligned");
  emulated::running->exited = true;
  setcontext(&emulated::scheduler);
}

using Place = std::source_location;

template <class Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int apart, Place place = Place::current()) {
  return emulated::shuffled(mask, value, (threadIdx.x ^ apart) % emulated::WARP, place.line());
}

template <class Value>
Value __shfl_sync(uint32_t mask, Value value, int lane, int width, Place place = Place::current()) {
  return emulated::shuffled(mask, value, (threadIdx.x / width * width + lane % width) % emulated::WARP, place.line());
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float max_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::max(x, y); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; i++) found |= (bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return found;
}
