// Point ops on sorted clouds: points in Morton order, 32 to a bucket and 32 buckets to a group, each with its bounding
// box. Rounding is monotonic and box_distance has the operations of squared_distance, so it never exceeds the computed
// distance of a point inside: leaving a bucket out because of it is exact. The order inside a cell of the curve depends
// on which thread comes first; results do not, since ties go to the lowest row number.
#pragma once

#include "point_ops_cuda.cuh"

namespace pointalign {
namespace {

constexpr int kCellBits = 4, kCells = 1 << 3 * kCellBits;  // per axis, and in all
constexpr int kGroup = 32 * 32;                            // points
constexpr int kSortThreads = 1024;
constexpr int kMostBuckets = 2048;     // that sampling keeps in registers; larger clouds have larger buckets
constexpr int kMostSorted = 1 << 28;   // places are ints, and a last bucket may be half empty

// Consecutive points of a sorted cloud that sampling takes as a bucket, as multiples of 32: a power of two.
int bucket_rows(int count) {
  int rows = 1;
  while (static_cast<int64_t>(rows) * 32 * kMostBuckets < count) rows *= 2;
  return rows;
}

// The sorted clouds of a batch, in one workspace.
struct SortedClouds {
  float4* points;       // [clouds, padded]; w: squared distance to the samples so far; x, y, z NaN and w -1 in padding
  int* order;           // [clouds, padded], the row each point came from
  float* bounds;        // [clouds, 6, padded / 32]: lowest x, y, z, highest x, y, z; none of an empty bucket is finite
  float* group_bounds;  // [clouds, 6, padded / 1024]
  int padded;

  SortedClouds(float* workspace, int clouds, int count) : padded(padded_of(count)) {
    const int64_t total = static_cast<int64_t>(clouds) * padded;
    points = reinterpret_cast<float4*>(workspace);
    order = reinterpret_cast<int*>(workspace + total * 4);
    bounds = workspace + total * 5;
    group_bounds = bounds + total / 32 * 6;
  }

  static int padded_of(int count) {
    const int step = bucket_rows(count) * 32 > kGroup ? bucket_rows(count) * 32 : kGroup;
    return (count + step - 1) / step * step;
  }

  static int64_t floats(int clouds, int count) {
    const int64_t total = static_cast<int64_t>(clouds) * padded_of(count);
    return total * 5 + total / 32 * 6 + total / kGroup * 6;
  }

  __device__ SortedClouds at(int cloud) const {  // a batch of that cloud alone
    SortedClouds single = *this;
    const int64_t first = static_cast<int64_t>(cloud) * padded;
    single.points += first, single.order += first;
    single.bounds += first / 32 * 6, single.group_bounds += first / kGroup * 6;
    return single;
  }
};

// Floats as ints that order like them, and back.
__device__ int ordered(float value) {
  const int bits = __float_as_int(value);
  return bits ^ (bits >> 31 & kLargest);
}
__device__ float from_ordered(int bits) { return __int_as_float(bits ^ (bits >> 31 & kLargest)); }

struct Box {  // NaN is in no box
  float low[3] = {INFINITY, INFINITY, INFINITY}, high[3] = {-INFINITY, -INFINITY, -INFINITY};

  __device__ void include(const float* from, const float* to) {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = fminf(low[axis], from[axis]);
      high[axis] = fmaxf(high[axis], to[axis]);
    }
  }

  __device__ void load(const float* bounds, int count, int place) {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = bounds[axis * count + place];
      high[axis] = bounds[(axis + 3) * count + place];
    }
  }

  __device__ void store(float* bounds, int count, int place) const {
    for (int axis = 0; axis < 3; ++axis) {
      bounds[axis * count + place] = low[axis];
      bounds[(axis + 3) * count + place] = high[axis];
    }
  }

  __device__ void unite_lanes() {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = from_ordered(__reduce_min_sync(kAll, ordered(low[axis])));
      high[axis] = from_ordered(__reduce_max_sync(kAll, ordered(high[axis])));
    }
  }

  __device__ float distance(float x, float y, float z) const {
    const float query[3] = {x, y, z};
    float square[3];
    for (int axis = 0; axis < 3; ++axis) {
      const float below = __fsub_rn(low[axis], query[axis]), above = __fsub_rn(query[axis], high[axis]);
      const float gap = fmaxf(fmaxf(below, above), 0.0f);
      square[axis] = __fmul_rn(gap, gap);
    }
    return __fadd_rn(__fadd_rn(square[0], square[1]), square[2]);
  }
};

// ---- sorting: one block per cloud counts the points of every cell, then gives each its place ----

__device__ int cell_of(const float* row, const float* low, float scale) {
  int code = 0;
  for (int axis = 0; axis < 3; ++axis) {
    // An extent that overflows or underflows gives NaN or infinity here: fmaxf and fminf turn them into cells.
    const float cell = fminf(fmaxf((__ldg(row + axis) - low[axis]) * scale, 0.0f), (1 << kCellBits) - 1.0f);
    int bits = static_cast<int>(cell);
    bits = (bits | bits << 4) & 0x0c3;
    bits = (bits | bits << 2) & 0x249;
    code |= bits << axis;
  }
  return code;
}

// The sum of `value` over all threads before this one; `totals` has a place for every warp.
__device__ int sum_before(int value, int* totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;  // of this lane and those before it
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_sync(kAll, sum, (lane - distance) & 31);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) totals[warp] = sum;
  __syncthreads();
  return __reduce_add_sync(kAll, lane < warp ? totals[lane] : 0) + sum - value;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) sort_points(Points points, SortedClouds clouds) {
  constexpr int kPer = kCells / kThreads, kAhead = 4;
  __shared__ int offsets[kCells], bounds[6], totals[kThreads / 32];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, count = length_of(points, blockIdx.x);
  const float* const rows = points.data + blockIdx.x * points.cloud_stride;
  const SortedClouds cloud = clouds.at(blockIdx.x);

  for (int i = thread; i < kCells; i += kThreads) offsets[i] = 0;
  if (thread < 6) bounds[thread] = ordered(thread < 3 ? INFINITY : -INFINITY);
  Box box;
#pragma unroll 4
  for (int i = thread; i < count; i += kThreads) {
    const float* const row = rows + i * points.row_stride;
    box.include(row, row);
  }
  box.unite_lanes();
  __syncthreads();
  if (lane == 0)
    for (int axis = 0; axis < 3; ++axis) {
      atomicMin(bounds + axis, ordered(box.low[axis]));
      atomicMax(bounds + axis + 3, ordered(box.high[axis]));
    }
  __syncthreads();
  float low[3], extent = 0;
  for (int axis = 0; axis < 3; ++axis) {
    low[axis] = from_ordered(bounds[axis]);
    extent = fmaxf(extent, from_ordered(bounds[axis + 3]) - low[axis]);
  }
  const float scale = extent > 0 ? (1 << kCellBits) / extent : 0;

#pragma unroll 4
  for (int i = thread; i < count; i += kThreads)
    atomicAdd(offsets + cell_of(rows + i * points.row_stride, low, scale), 1);
  __syncthreads();
  int counts[kPer], sum = 0;
  for (int j = 0; j < kPer; ++j) sum += counts[j] = offsets[thread * kPer + j];
  int place = sum_before(sum, totals);
  for (int j = 0; j < kPer; ++j) {
    offsets[thread * kPer + j] = place;
    place += counts[j];
  }
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < count; i += kThreads) {
    const float* const row = rows + i * points.row_stride;
    const int target = atomicAdd(offsets + cell_of(row, low, scale), 1);
    cloud.points[target] = make_float4(__ldg(row), __ldg(row + 1), __ldg(row + 2), INFINITY);
    cloud.order[target] = i;
  }
  for (int i = count + thread; i < cloud.padded; i += kThreads) {
    cloud.points[i] = make_float4(NAN, NAN, NAN, -1.0f);
    cloud.order[i] = kLargest;
  }
  __syncthreads();
  const int buckets = cloud.padded / 32, groups = cloud.padded / kGroup;
  for (int first = warp; first < buckets; first += kThreads / 32 * kAhead) {
    float4 point[kAhead];  // all are on their way before the first is needed
#pragma unroll
    for (int j = 0; j < kAhead; ++j) point[j] = cloud.points[min(first + j * (kThreads / 32), buckets - 1) * 32 + lane];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const float xyz[3] = {point[j].x, point[j].y, point[j].z};
      Box around;
      around.include(xyz, xyz);
      around.unite_lanes();
      if (lane == 0) around.store(cloud.bounds, buckets, min(first + j * (kThreads / 32), buckets - 1));
    }
  }
  __syncthreads();
  for (int group = warp; group < groups; group += kThreads / 32) {
    Box around;
    around.load(cloud.bounds, buckets, group * 32 + lane);
    around.unite_lanes();
    if (lane == 0) around.store(cloud.group_bounds, groups, group);
  }
}

int launch_sort(const Points& points, int clouds, const SortedClouds& sorted, void* stream) {
  return launch(sort_points<kSortThreads>, clouds, kSortThreads, 0, stream, points, sorted);
}

}  // namespace
}  // namespace pointalign
