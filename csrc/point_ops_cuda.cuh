// What the kernels that read every point (point_ops_cuda.cu) and those that open buckets of a sorted cloud
// (point_ops_buckets.cuh) share. Distances are (dx^2 + dy^2) + dz^2 in fp32 with explicit roundings, so that no
// multiply-add is fused and every index equals the CPU's and the reference's, ties included.
#pragma once

#include "point_ops_cuda.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
namespace pointalign {
template <typename... Parameters, typename... Arguments>
static int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int shared_bytes, void* stream,
                  Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}
}  // namespace pointalign
#endif

namespace pointalign {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kLargest = 0x7fffffff;

__device__ float squared_distance(float x, float y, float z, float qx, float qy, float qz) {
  const float dx = __fsub_rn(x, qx), dy = __fsub_rn(y, qy), dz = __fsub_rn(z, qz);
  return __fadd_rn(__fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy)), __fmul_rn(dz, dz));
}

__device__ int clamp_to(int64_t value, int low, int high) {
  return value < low ? low : value > high ? high : static_cast<int>(value);
}

__device__ int length_of(const Points& points, int cloud) {
  return points.lengths == nullptr ? points.count : clamp_to(points.lengths[cloud], 1, points.count);
}

// ---- farthest-point sampling: one block per cloud ----

struct Farthest {  // squared distance as int bits (they order like the floats, and -1 below all), lowest index
  int bits;
  int index;
};

__device__ Farthest warp_farthest(Farthest mine) {
  const int bits = __reduce_max_sync(kAll, mine.bits);
  return {bits, __reduce_min_sync(kAll, mine.bits == bits ? mine.index : kLargest)};
}

// One barrier per sample: the slots alternate, so nobody overwrites what a slow warp still reads.
template <int kThreads>
__device__ int block_farthest(Farthest of_warp, Farthest (*slots)[kThreads / 32], int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) slots[step % 2][warp] = of_warp;
  __syncthreads();
  return warp_farthest(lane < kThreads / 32 ? slots[step % 2][lane] : Farthest{-kLargest, kLargest}).index;
}

// ---- nearest neighbours: a warp holds the 32 best of a centre ----

constexpr int kWarps = 8;  // of a block
constexpr uint64_t kNoKey = ~0ull;

// (distance, index) as one number that orders like the pair.
__device__ uint64_t key_of(float distance, int index) {
  return static_cast<uint64_t>(static_cast<unsigned>(__float_as_int(distance))) << 32 | static_cast<unsigned>(index);
}

__device__ uint64_t exchange(uint64_t key, int distance, bool smaller) {
  const uint64_t other = __shfl_xor_sync(kAll, key, distance);
  return (key < other) == smaller ? key : other;
}

// Bitonic over the lanes, ascending.
__device__ uint64_t merge_lanes(uint64_t key) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) key = exchange(key, distance, (threadIdx.x & distance) == 0);
  return key;
}

__device__ uint64_t sort_lanes(uint64_t key) {
#pragma unroll
  for (int size = 2; size < 32; size *= 2)
#pragma unroll
    for (int distance = size / 2; distance > 0; distance /= 2)
      key = exchange(key, distance, ((threadIdx.x & distance) == 0) == ((threadIdx.x & size) == 0));
  return merge_lanes(key);
}

// The 32 best keys of one centre, sorted over the lanes, and a buffer in shared memory for those not yet merged.
struct Selection {
  uint64_t best, worst;  // worst: that of lane 31
  float limit;           // the distance in worst: nothing beyond it can enter
  int buffered;

  __device__ void clear() { best = worst = kNoKey, limit = INFINITY, buffered = 0; }

  __device__ void merge(uint64_t key) {
    const uint64_t reversed = __shfl_sync(kAll, sort_lanes(key), 31 - threadIdx.x % 32);
    best = merge_lanes(best < reversed ? best : reversed);
    worst = __shfl_sync(kAll, best, 31);
    if (worst != kNoKey) limit = __int_as_float(static_cast<int>(worst >> 32));
  }

  __device__ void push(uint64_t key, bool wanted, uint64_t* buffer) {
    const int lane = threadIdx.x % 32;
    wanted = wanted && key < worst;
    const unsigned votes = __ballot_sync(kAll, wanted);
    if (votes == 0) return;
    if (wanted) buffer[buffered + __popc(votes & ((1u << lane) - 1))] = key;
    buffered += __popc(votes);
    __syncwarp();
    if (buffered < 32) return;
    merge(buffer[lane]);
    buffered -= 32;
    if (lane < buffered) buffer[lane] = buffer[32 + lane];
    __syncwarp();
  }

  __device__ void finish(const uint64_t* buffer) {
    const int lane = threadIdx.x % 32;
    merge(lane < buffered ? buffer[lane] : kNoKey);
    __syncwarp();
  }
};

__device__ int index_of(uint64_t key, int count) {  // NaN coordinates leave places unfilled: any point will do
  return key == kNoKey ? count - 1 : static_cast<int>(key);
}

struct QuerySource {
  Points query;
  __device__ const float* row(const Points&, int cloud, int q) const {
    return query.data + cloud * query.cloud_stride + q * query.row_stride;
  }
};

struct NeighbourSink {
  float* distance;
  int64_t* index;
  __device__ void write(const Points&, int cloud, int count, int q, const float*, int first, int kept, int k,
                        int centres, uint64_t key) const {
    const int lane = threadIdx.x % 32;
    const int64_t place = (static_cast<int64_t>(cloud) * centres + q) * k + first + lane;
    if (lane >= kept) return;
    distance[place] = __int_as_float(static_cast<int>(key >> 32));
    index[place] = index_of(key, count);
  }
};

struct CentreSource {
  const int64_t* centre_index;
  int centres;
  __device__ const float* row(const Points& points, int cloud, int q) const {
    const int64_t index = centre_index[static_cast<int64_t>(cloud) * centres + q];
    const int row = clamp_to(index, 0, length_of(points, cloud) - 1);
    return points.data + cloud * points.cloud_stride + row * points.row_stride;
  }
};

__device__ void convert(float value, float* out) { *out = value; }
__device__ void convert(float value, __half* out) { *out = __float2half_rn(value); }
__device__ void convert(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

template <typename Out>
struct GroupSink {
  Out* out;
  __device__ void write(const Points& points, int cloud, int count, int q, const float* centre, int first, int kept,
                        int k, int centres, uint64_t key) const {
    const int index = index_of(key, count), columns = points.columns;
    const float* const rows = points.data + cloud * points.cloud_stride;
    Out* const group = out + ((static_cast<int64_t>(cloud) * centres + q) * k + first) * columns;
    // Neighbouring lanes take neighbouring columns: whole rows are read and the group is written in order.
    for (int start = 0; start < kept * columns; start += 32) {
      const int place = start + threadIdx.x % 32, neighbour = min(place / columns, kept - 1), column = place % columns;
      const int row = __shfl_sync(kAll, index, neighbour);
      if (place >= kept * columns) continue;
      const float value = rows[row * points.row_stride + column];
      const float origin = column == 0 ? centre[0] : column == 1 ? centre[1] : centre[2];
      convert(column < 3 ? __fsub_rn(value, origin) : value, group + place);
    }
  }
};

}  // namespace
}  // namespace pointalign
