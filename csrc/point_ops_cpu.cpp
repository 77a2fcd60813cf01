// Compiles point_ops_cpu.inl once per instruction set and picks one at run time, so that one binary serves any CPU.
// Nothing with external linkage may be instantiated inside the .inl: the linker could keep the copy with AVX code.
#include "point_ops_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pointalign {

namespace {

struct Bump {  // hands out aligned arrays; with a null base it only counts
  char* base;
  size_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return array;
  }
};

struct Unsorted {
  uint64_t* order;  // [count] (Morton code, row)
  uint64_t* swap;   // [count]
  float* xyz[3];    // [groups * 256] in file order
};

size_t carve(Cloud& cloud, Unsorted& unsorted, char* base) {
  Bump bump{base};
  const int64_t points = cloud.groups * 256, tops = (cloud.groups + 15) / 16 * 16;
  for (auto& axis : cloud.xyz) axis = bump.take<float>(points);
  cloud.index = bump.take<int32_t>(points);
  for (auto& bound : cloud.leaf_bounds) bound = bump.take<float>(cloud.groups * 16);
  for (auto& bound : cloud.group_bounds) bound = bump.take<float>(tops);
  unsorted.order = bump.take<uint64_t>(points);
  unsorted.swap = bump.take<uint64_t>(points);
  for (auto& axis : unsorted.xyz) axis = bump.take<float>(points);
  return bump.used;
}

Unsorted allocate(Cloud& cloud, int64_t count) {
  Unsorted unsorted;
  cloud.count = count;
  cloud.groups = (count + 255) / 256;
  const size_t bytes = carve(cloud, unsorted, nullptr);
  cloud.memory = Scratch(bytes);
  carve(cloud, unsorted, cloud.memory.as<char>());
  return unsorted;
}

// Two stable passes of 11 bits over 21-bit Morton codes in the upper half of each key.
void radix_sort(uint64_t* keys, uint64_t* swap, int64_t count) {
  uint32_t offsets[2][2048] = {};
  for (int64_t i = 0; i < count; ++i) {
    ++offsets[0][keys[i] >> 32 & 2047];
    ++offsets[1][keys[i] >> 43];
  }
  for (auto& row : offsets) {
    uint32_t total = 0;
    for (auto& offset : row) {
      const uint32_t here = offset;
      offset = total;
      total += here;
    }
  }
  for (int64_t i = 0; i < count; ++i) swap[offsets[0][keys[i] >> 32 & 2047]++] = keys[i];
  for (int64_t i = 0; i < count; ++i) keys[offsets[1][swap[i] >> 43]++] = swap[i];
}

void sort_keys(uint64_t* keys, int64_t count, int64_t kept) {
  if (kept < count) std::nth_element(keys, keys + kept, keys + count);
  std::sort(keys, keys + kept);
}

}  // namespace

#define POINTALIGN_LEVEL 0
namespace baseline {
#include "point_ops_cpu.inl"
}
#undef POINTALIGN_LEVEL

#if defined(__x86_64__)
#define POINTALIGN_LEVEL 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
#include "point_ops_cpu.inl"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef POINTALIGN_LEVEL

#define POINTALIGN_LEVEL 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512dq")
#endif
namespace avx512 {
#include "point_ops_cpu.inl"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef POINTALIGN_LEVEL
#endif

const PointOps* const* point_ops_variants() {
  static const PointOps* variants[4] = {};
  static const bool filled = [] {
    int count = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) variants[count++] = &avx512::ops;
    if (__builtin_cpu_supports("avx2")) variants[count++] = &avx2::ops;
#endif
    variants[count] = &baseline::ops;
    return true;
  }();
  (void)filled;
  return variants;
}

const PointOps& point_ops() {
  static const PointOps* chosen = [] {
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    for (auto variant = point_ops_variants(); *variant != nullptr; ++variant)
      if (asked != nullptr && std::strcmp((*variant)->instruction_set, asked) == 0) return *variant;
    return *point_ops_variants();
  }();
  return *chosen;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (bits < 0x38800000) {                       // subnormal halves: the addition aligns and rounds the significand
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace pointalign
