// CPU point ops without any torch header: the bindings, the sanitizer driver and the tests share them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace pointalign {

// Memory aligned for the widest vectors.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(size_t bytes) : memory_(operator new(bytes, kAlignment)) {}
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const { operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Free> memory_;
};

// One cloud sorted along a Morton curve and boxed as a 16-ary tree: a leaf is 16 points, a group 16 leaves.
// Every level is a row of 16-float vectors, whatever the instruction set; places past the last point hold NaN, which
// no comparison selects. Built once, then read by any number of threads.
struct Cloud {
  int64_t count = 0;   // points
  int64_t groups = 0;  // ceil(count / 256)
  float* xyz[3] = {};           // [groups * 256] each
  int32_t* index = nullptr;     // [groups * 256], the row each point came from
  float* leaf_bounds[6] = {};   // lowest x, y, z, highest x, y, z: [groups * 16] each
  float* group_bounds[6] = {};  // the same for groups, rounded up to a multiple of 16
  Scratch memory;
};

struct PointOps {
  const char* instruction_set;
  // Sorts `count` rows of `stride` floats, xyz first. Returns the first row with a non-finite coordinate, or -1.
  int64_t (*build)(Cloud& cloud, const float* rows, int64_t count, int64_t stride);
  // Writes num_samples row numbers.
  void (*farthest_point_sample)(const Cloud& cloud, int64_t num_samples, const float* start, int64_t start_index,
                                int64_t* index);
  // Writes k (squared distance, row) keys of one query, sorted: the bits of the distance above the row number.
  // `scratch` holds knn_scratch_bytes.
  void (*knn)(const Cloud& cloud, const float* query, int64_t k, void* scratch, uint64_t* keys);
};

size_t knn_scratch_bytes(int64_t groups, int64_t k);

// The variants this machine can run, best first; the list ends with a null pointer.
const PointOps* const* point_ops_variants();
// The best variant, or what torch's own variable ATEN_CPU_CAPABILITY (default, avx2, avx512) asks for.
const PointOps& point_ops();

// Both round to nearest even.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (bits < 0x38800000) {                       // subnormal halves: the addition aligns and rounds the significand
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace pointalign
