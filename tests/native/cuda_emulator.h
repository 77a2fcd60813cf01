// Runs a .cu file on the CPU, one fiber per CUDA thread: enough of CUDA C++ for csrc/point_ops_cuda.cu and what
// it includes. Blocks run one
// after the other. Within a block any thread that is not waiting may run next, in an order drawn at random, so that a
// missing barrier shows as a wrong result. A warp operation that not all 32 lanes reach, or a barrier that not all
// threads reach, aborts. Shared memory starts as NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) char* name = emulator::dynamic_shared.data()

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
static Index3 threadIdx, blockIdx;

struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

// swapcontext would make two system calls per switch, a hundred times the cost of these instructions (x86-64 only).
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
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

struct Thread {
  void* stack_pointer;
  std::unique_ptr<char[]> stack;
  bool finished = false;
  uint64_t warp_operations = 0, barriers = 0;
};

struct Warp {
  uint64_t deposited[32], result[2][32];
  const char* name = nullptr;
  int arrived = 0;
  uint64_t completed = 0;
};

inline std::vector<char> dynamic_shared;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline std::function<void()> body;
inline std::mt19937 random_order{1};
inline unsigned current, barrier_arrived;
inline uint64_t barriers_completed, progress;
inline int shared_memory_limit = 99 * 1024;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", why, blockIdx.x, current);
  std::abort();
}

inline void* scheduler;

inline void yield() { emulator_switch(&threads[current].stack_pointer, scheduler); }

inline void entry() {
  body();
  threads[current].finished = true;
  yield();
}

// Every lane gives a value and, when all have, reads all 32.
inline const uint64_t* warp_operation(const char* name, unsigned mask, uint64_t value) {
  const unsigned self = current;
  Warp& warp = warps[self / 32];
  if (mask != ~0u) fail("only full masks are supported");
  if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0) fail("lanes of one warp are at different operations");
  const uint64_t number = threads[self].warp_operations++;
  warp.name = name;
  ++progress;
  warp.deposited[self % 32] = value;
  if (++warp.arrived == 32) {
    std::memcpy(warp.result[number % 2], warp.deposited, sizeof(warp.deposited));
    warp.arrived = 0;
    ++warp.completed;
  }
  while (warp.completed <= number) yield();
  return warp.result[number % 2];
}

inline void run_block(unsigned count) {
  if (count % 32 != 0) fail("blocks are whole warps");
  threads.resize(count);
  warps.assign(count / 32, Warp());
  barrier_arrived = 0, barriers_completed = 0;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    constexpr size_t kStack = 64 * 1024;
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.finished = false;
    thread.warp_operations = thread.barriers = 0;
    void** top = reinterpret_cast<void**>(thread.stack.get() + kStack - 56);
    *top = nullptr;  // where entry would return; 8 off a multiple of 16, as after a call
    *--top = reinterpret_cast<void*>(entry);
    thread.stack_pointer = top - 6;
  }
  std::vector<unsigned> pace(count / 32);  // warps drift apart: some are up to four times as fast as others
  for (unsigned& value : pace) value = random_order() % 4;
  int idle = 0;
  for (unsigned left = count; left > 0;) {
    const uint64_t before = progress;
    const unsigned left_before = left;
    for (unsigned i = 0; i < pace.size(); ++i) {
      const unsigned warp = random_order() % pace.size(), first = random_order() % 32;
      if (random_order() % 4 < pace[warp]) continue;
      for (unsigned lane = 0; lane < 32; ++lane) {
        current = warp * 32 + (lane + first) % 32;
        if (threads[current].finished) continue;
        threadIdx.x = current;
        emulator_switch(&scheduler, threads[current].stack_pointer);
        left -= threads[current].finished;
      }
    }
    idle = left == left_before && progress == before ? idle + 1 : 0;
    if (idle == 1000) fail("deadlock: some threads never reach a barrier");
  }
}

template <typename To, typename From>
To bits(From value) {
  static_assert(sizeof(To) >= sizeof(From));
  To result{};
  std::memcpy(&result, &value, sizeof(From));
  return result;
}

}  // namespace emulator

inline void __syncthreads() {
  using namespace emulator;
  const uint64_t number = threads[current].barriers++;
  ++progress;
  if (++barrier_arrived == threads.size()) barrier_arrived = 0, ++barriers_completed;
  while (barriers_completed <= number) yield();
}
inline void __syncwarp() { emulator::warp_operation("syncwarp", ~0u, 0); }
inline int __reduce_max_sync(unsigned mask, int value) {
  const uint64_t* all = emulator::warp_operation("reduce_max", mask, static_cast<uint32_t>(value));
  int best = static_cast<int>(all[0]);
  for (int i = 1; i < 32; ++i) best = static_cast<int>(all[i]) > best ? static_cast<int>(all[i]) : best;
  return best;
}
inline int __reduce_min_sync(unsigned mask, int value) {
  const uint64_t* all = emulator::warp_operation("reduce_min", mask, static_cast<uint32_t>(value));
  int best = static_cast<int>(all[0]);
  for (int i = 1; i < 32; ++i) best = static_cast<int>(all[i]) < best ? static_cast<int>(all[i]) : best;
  return best;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  const uint64_t* all = emulator::warp_operation("reduce_add", mask, static_cast<uint32_t>(value));
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<int>(all[i]);
  return sum;
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* all = emulator::warp_operation("ballot", mask, vote);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(all[i]) << i;
  return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  const uint64_t got = emulator::warp_operation("shfl", mask, emulator::bits<uint64_t>(value))[lane & 31];
  T result;
  std::memcpy(&result, &got, sizeof(T));
  return result;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>((threadIdx.x % 32) ^ distance));
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float __ldg(const float* place) { return *place; }
// Threads switch only where they wait, so that a plain update is atomic.
inline int atomicAdd(int* place, int value) { return std::exchange(*place, *place + value); }
inline int atomicMin(int* place, int value) { return std::exchange(*place, std::min(*place, value)); }
inline int atomicMax(int* place, int value) { return std::exchange(*place, std::max(*place, value)); }
inline int __float_as_int(float value) { return emulator::bits<int>(value); }
inline float __int_as_float(int value) { return emulator::bits<float>(value); }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
__half __float2half_rn(float value);
__nv_bfloat16 __float2bfloat16_rn(float value);

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::shared_memory_limit;
  return 0;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "error"; }

namespace pointalign {
template <typename... Parameters, typename... Arguments>
static int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int shared_bytes, void*,
                  Arguments... arguments) {
  if (shared_bytes > emulator::shared_memory_limit) emulator::fail("too much shared memory");
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    emulator::dynamic_shared.assign(shared_bytes, static_cast<char>(0xff));
    emulator::body = [&] { kernel(arguments...); };
    emulator::run_block(threads);
  }
  return cudaSuccess;
}
}  // namespace pointalign
