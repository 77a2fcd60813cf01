// Sampling and nearest neighbours on sorted clouds (sorted_clouds.cuh): buckets whose box is too far away stay closed.
#pragma once

#include "sorted_clouds.cuh"

namespace pointalign {
namespace {

constexpr int kSharedPoints = 8192;  // sampling holds up to so many in shared memory, where that is large enough

// ---- farthest-point sampling: one block per cloud, buckets dealt out to the warps in turn ----

// A lane holds the box, the largest distance and where it is of kHeld buckets. Points lie in shared memory (kShared,
// buckets of 32) or in the workspace. A tag orders like the row number: with the place below it where both fit.
template <int kBlockWarps, int kHeld, bool kShared>
__global__ void __launch_bounds__(kBlockWarps * 32, 1)
    sample_in_buckets(Points points, SortedClouds clouds, int rows_of_bucket, int num_samples, int start_index,
                      int64_t* index) {
  DYNAMIC_SHARED(shared);
  __shared__ Farthest slots[2][kBlockWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, count = length_of(points, blockIdx.x);
  const float* const rows = points.data + blockIdx.x * points.cloud_stride;
  int64_t* const out = index + static_cast<int64_t>(blockIdx.x) * num_samples;
  const SortedClouds cloud = clouds.at(blockIdx.x);
  float4* const held = kShared ? reinterpret_cast<float4*>(shared) : cloud.points;
  uint16_t* const held_order = reinterpret_cast<uint16_t*>(shared + cloud.padded * sizeof(float4));
  const int height = kShared ? 1 : rows_of_bucket, distinct = min(num_samples, count);
  const int buckets = cloud.padded / (32 * height), rounds = (buckets + kBlockWarps * 32 - 1) / (kBlockWarps * 32);
  const auto tag_of = [&](int place) {
    return kShared ? held_order[place] * kSharedPoints + place : cloud.order[place];
  };
  const auto bucket_of = [&](int held_number, int of_lane) {
    return (held_number * 32 + of_lane) * kBlockWarps + warp;
  };

  Box box[kHeld];
  float highest[kHeld];
  int tag[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    highest[h] = -1.0f, tag[h] = kLargest;
    if (h >= rounds) continue;
    if (bucket_of(h, lane) < buckets)
      for (int row = 0; row < height; ++row) {
        Box part;
        part.load(cloud.bounds, cloud.padded / 32, bucket_of(h, lane) * height + row);
        box[h].include(part.low, part.high);
      }
#pragma unroll 4
    for (int member = 0; member < 32; ++member) {  // before the first sample the lowest row is the farthest point
      const int bucket = bucket_of(h, member);
      if (bucket >= buckets) break;
      int lowest = kLargest;
      for (int row = 0; row < height; ++row) {
        const int place = (bucket * height + row) * 32 + lane;
        if (kShared) held[place] = cloud.points[place], held_order[place] = static_cast<uint16_t>(cloud.order[place]);
        if (place < count) lowest = min(lowest, tag_of(place));
      }
      lowest = __reduce_min_sync(kAll, lowest);
      if (lane == member && lowest != kLargest) highest[h] = INFINITY, tag[h] = lowest;
    }
  }
  __syncthreads();

  int newest = min(start_index, count - 1);
  if (thread == 0) out[0] = newest;
  const float* coordinates = rows + newest * points.row_stride;
  Farthest of_warp = {-kLargest, kLargest};
  for (int step = 1; step < distinct; ++step) {
    const float qx = coordinates[0], qy = coordinates[1], qz = coordinates[2];
    bool changed = step == 1;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (h >= rounds) break;
      unsigned open = __ballot_sync(kAll, box[h].distance(qx, qy, qz) < highest[h]);
      changed |= open != 0;
      while (open != 0) {  // two at a time hide each other's latency; a last one is its own partner
        int member[2];
        member[0] = __ffs(static_cast<int>(open)) - 1, open &= open - 1;
        member[1] = open == 0 ? member[0] : __ffs(static_cast<int>(open)) - 1, open &= open - 1;
        Farthest mine[2] = {{-kLargest, kLargest}, {-kLargest, kLargest}};
        for (int row = 0; row < height; ++row) {
          int place[2], point_tag[2];
          float4 point[2];
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            place[u] = (bucket_of(h, member[u]) * height + row) * 32 + lane;
            point[u] = held[place[u]];
            point_tag[u] = tag_of(place[u]);
          }
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            const float distance = squared_distance(point[u].x, point[u].y, point[u].z, qx, qy, qz);
            const int bits = __float_as_int(fminf(point[u].w, distance));
            if (distance < point[u].w) held[place[u]].w = distance;
            if (bits > mine[u].bits || (bits == mine[u].bits && point_tag[u] < mine[u].index))
              mine[u] = {bits, point_tag[u]};
          }
        }
        int bits[2], lowest[2];
#pragma unroll
        for (int u = 0; u < 2; ++u) bits[u] = __reduce_max_sync(kAll, mine[u].bits);
#pragma unroll
        for (int u = 0; u < 2; ++u) lowest[u] = __reduce_min_sync(kAll, mine[u].bits == bits[u] ? mine[u].index : kLargest);
#pragma unroll
        for (int u = 0; u < 2; ++u)
          if (lane == member[u]) highest[h] = __int_as_float(bits[u]), tag[h] = lowest[u];
      }
    }
    if (changed) {
      Farthest mine = {-kLargest, kLargest};
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int bits = __float_as_int(highest[h]);
        if (bits > mine.bits || (bits == mine.bits && tag[h] < mine.index)) mine = {bits, tag[h]};
      }
      of_warp = warp_farthest(mine);
    }
    newest = block_farthest<kBlockWarps * 32>(of_warp, slots, step);
    coordinates = kShared ? &held[newest % kSharedPoints].x : rows + newest * points.row_stride;
    if (kShared) newest /= kSharedPoints;
    if (thread == 0) out[step] = newest;
  }
  for (int step = distinct + thread; step < num_samples; step += kBlockWarps * 32) out[step] = newest;
}

// ---- nearest neighbours: one warp per centre, the buckets of the nearest group first ----

template <typename Source, typename Sink>
__global__ void __launch_bounds__(kWarps * 32, 4)
    search_buckets(Points points, SortedClouds clouds, int centres, int k, Source source, Sink sink) {
  __shared__ uint64_t buffers[kWarps][64];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = (centres + kWarps - 1) / kWarps;
  const int number = blockIdx.x / blocks, q = blockIdx.x % blocks * kWarps + warp;
  if (q >= centres) return;
  const SortedClouds cloud = clouds.at(number);
  const int count = length_of(points, number), groups = cloud.padded / kGroup;
  const float* const row = source.row(points, number, q);
  const float centre[3] = {row[0], row[1], row[2]};
  uint64_t floor = 0;
  Selection selection;

  for (int first = 0; first < k; first += 32) {
    if (first < count) {
      selection.clear();
      const auto group_distance = [&](int group) {
        if (group >= groups) return __int_as_float(kLargest);  // NaN: not near
        Box box;
        box.load(cloud.group_bounds, groups, group);
        return box.distance(centre[0], centre[1], centre[2]);
      };
      const auto visit = [&](int group) {
        Box box;
        box.load(cloud.bounds, groups * 32, group * 32 + lane);
        int left = __float_as_int(box.distance(centre[0], centre[1], centre[2]));  // of buckets not yet visited
        for (;;) {
          const int nearest = __reduce_min_sync(kAll, left);
          if (!(__int_as_float(nearest) <= selection.limit)) return;  // kLargest is a NaN
          const int member = __ffs(static_cast<int>(__ballot_sync(kAll, left == nearest))) - 1;
          if (lane == member) left = kLargest;
          const int place = (group * 32 + member) * 32 + lane;
          const float4 point = cloud.points[place];
          const float distance = squared_distance(point.x, point.y, point.z, centre[0], centre[1], centre[2]);
          const bool near = distance <= selection.limit;  // false for NaN
          if (!__any_sync(kAll, near)) continue;
          const uint64_t key = key_of(distance, cloud.order[place]);
          selection.push(key, near && (first == 0 || key > floor), buffers[warp]);
        }
      };

      float least = INFINITY;
      int home = 0;  // the group around the centre: its bound closes most others
      for (int group = lane; group < groups; group += 32) {
        const float distance = group_distance(group);
        if (distance < least) least = distance, home = group;
      }
      const int lowest = __reduce_min_sync(kAll, __float_as_int(least));
      home = __shfl_sync(kAll, home, __ffs(static_cast<int>(__ballot_sync(kAll, __float_as_int(least) == lowest))) - 1);
      visit(home);
      for (int start = 0; start < groups; start += 32) {
        const float distance = start + lane == home ? __int_as_float(kLargest) : group_distance(start + lane);
        unsigned open = __ballot_sync(kAll, distance <= selection.limit);
        while (open != 0) {
          visit(start + __ffs(static_cast<int>(open)) - 1);
          open &= open - 1;
          open &= __ballot_sync(kAll, distance <= selection.limit);
        }
      }
      selection.finish(buffers[warp]);
      floor = selection.worst;
    }
    // Places past the cloud repeat its last neighbour: lane `last` of this round, or of the final round that searched.
    const int last = first < count ? min(31, count - 1 - first) : (count - 1) % 32;
    const uint64_t key = __shfl_sync(kAll, selection.best, first < count ? min(lane, last) : last);
    sink.write(points, number, count, q, centre, first, min(32, k - first), k, centres, key);
  }
}

// ---- launching ----

// Whether sampling has room for the cloud in shared memory; `bytes` is what it takes.
bool fits_shared(int count, int limit, int* bytes) {
  *bytes = count <= kSharedPoints ? SortedClouds::padded_of(count) * static_cast<int>(sizeof(float4) + sizeof(uint16_t)) : 0;
  return count <= kSharedPoints && *bytes + 1024 <= limit;  // of the kernel's static arrays
}

int sample_buckets(const Points& points, int clouds, int num_samples, int start_index, int limit, float* workspace,
                   int64_t* index, void* stream) {
  const SortedClouds sorted(workspace, clouds, points.count);
  if (const int error = launch_sort(points, clouds, sorted, stream)) return error;
  int bytes;
  if (fits_shared(points.count, limit, &bytes))
    return launch(sample_in_buckets<8, 1, true>, clouds, 256, bytes, stream, points, sorted, 1, num_samples,
                  start_index, index);
  return launch(sample_in_buckets<16, 8, false>, clouds, 512, 0, stream, points, sorted, bucket_rows(points.count),
                num_samples, start_index, index);
}

template <typename Source, typename Sink>
int launch_search_buckets(const Points& points, int clouds, int centres, int k, Source source, Sink sink,
                          float* workspace, void* stream) {
  if (clouds == 0 || centres == 0) return cudaSuccess;
  const int64_t blocks = static_cast<int64_t>(clouds) * ((centres + kWarps - 1) / kWarps);
  if (blocks > kLargest) return cudaErrorInvalidConfiguration;
  const SortedClouds sorted(workspace, clouds, points.count);
  if (const int error = launch_sort(points, clouds, sorted, stream)) return error;
  return launch(search_buckets<Source, Sink>, static_cast<unsigned>(blocks), kWarps * 32, 0, stream, points, sorted,
                centres, k, source, sink);
}

}  // namespace
}  // namespace pointalign
