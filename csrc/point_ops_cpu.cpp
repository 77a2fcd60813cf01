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

// Memory of one cloud and of its construction; both forget what they held before.
size_t carve(Cloud& cloud, char* base) {
  Bump bump{base};
  const int64_t points = cloud.groups * 256, tops = (cloud.groups + 15) / 16 * 16;
  for (auto& axis : cloud.xyz) axis = bump.take<float>(points);
  cloud.index = bump.take<int32_t>(points);
  for (auto& bound : cloud.leaf_bounds) bound = bump.take<float>(cloud.groups * 16);
  for (auto& bound : cloud.group_bounds) bound = bump.take<float>(tops);
  return bump.used;
}

struct Unsorted {
  uint64_t* order;  // [count] (Morton code, row)
  uint64_t* swap;   // [count]
  float* xyz[3];    // [groups * 256] in file order
  Scratch memory;
  explicit Unsorted(int64_t points) : memory(carve(nullptr, points)) { carve(memory.as<char>(), points); }

 private:
  size_t carve(char* base, int64_t points) {
    Bump bump{base};
    order = bump.take<uint64_t>(points);
    swap = bump.take<uint64_t>(points);
    for (auto& axis : xyz) axis = bump.take<float>(points);
    return bump.used;
  }
};

void allocate(Cloud& cloud, int64_t count) {
  cloud.count = count;
  cloud.groups = (count + 255) / 256;
  cloud.memory = Scratch(carve(cloud, nullptr));
  carve(cloud, cloud.memory.as<char>());
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

struct NeighbourScratch {
  float* smallest;          // [ceil(k / 16) * 16]
  float* visited_distance;  // [groups * 256]
  int32_t* leaf;            // [groups * 16]
  float* distance;          // [groups * 256], of candidates
  int32_t* index;           // [groups * 256]
  uint64_t* keys;           // [groups * 256]
  size_t bytes;
  NeighbourScratch(void* base, int64_t groups, int64_t k) {
    Bump bump{static_cast<char*>(base)};
    smallest = bump.take<float>((k + 15) / 16 * 16);
    visited_distance = bump.take<float>(groups * 256);
    leaf = bump.take<int32_t>(groups * 16);
    distance = bump.take<float>(groups * 256);
    index = bump.take<int32_t>(groups * 256);
    keys = bump.take<uint64_t>(groups * 256);
    bytes = bump.used;
  }
};

constexpr int64_t kRankSorted = 256;  // candidates up to which counting ranks is faster than comparing keys

void select_sort(const float* distance, const int32_t* index, int64_t count, int64_t kept, uint64_t* keys) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, distance + i, sizeof(bits));
    keys[i] = static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(index[i]);
  }
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

size_t knn_scratch_bytes(int64_t groups, int64_t k) { return NeighbourScratch(nullptr, groups, k).bytes; }

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

}  // namespace pointalign
