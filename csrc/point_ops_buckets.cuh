// Sampling and nearest neighbours on sorted clouds (sorted_clouds.cuh): buckets whose box is too far away stay closed.
#pragma once

#include "sorted_clouds.cuh"

namespace pointalign {
namespace {

constexpr int kSharedPoints = 8192;  // sampling holds up to so many in shared memory, where that is large enough

// ---- farthest-point sampling: one block per cloud, buckets dealt out to the warps in turn ----

constexpr int kSampleWarps = 16;

// The farthest point of a warp and a bound on all of its others, as bits of squared distances.
struct Offer {
  int bits, tag, others;
  float x, y, z;
};

// In every round the warps offer their farthest points. The farthest of these is the next sample; so is each that
// follows, with its distance to the new samples taken into account, while it is farther than any point not offered.
// That makes one barrier serve several samples. A lane holds kHeld buckets: box, largest and second largest distance.
// Points lie in shared memory (kShared, buckets of 32) or in the workspace. A tag orders like the row number: it is
// that, or has the place below it where both fit.
template <int kHeld, bool kShared>
__global__ void __launch_bounds__(kSampleWarps * 32, 1)
    sample_in_buckets(Points points, SortedClouds clouds, int rows_of_bucket, int num_samples, int start_index,
                      int64_t* index) {
  DYNAMIC_SHARED(shared);
  __shared__ Offer offers[2][kSampleWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, count = length_of(points, blockIdx.x);
  const float* const rows = points.data + blockIdx.x * points.cloud_stride;
  int64_t* const out = index + static_cast<int64_t>(blockIdx.x) * num_samples;
  const SortedClouds cloud = clouds.at(blockIdx.x);
  float4* const held = kShared ? reinterpret_cast<float4*>(shared) : cloud.points;
  uint16_t* const held_order = reinterpret_cast<uint16_t*>(shared + cloud.padded * sizeof(float4));
  const int height = kShared ? 1 : rows_of_bucket, distinct = min(num_samples, count);
  const int buckets = cloud.padded / (32 * height), rounds = (buckets + kSampleWarps * 32 - 1) / (kSampleWarps * 32);
  constexpr int kRow = kShared ? kSharedPoints : 1;  // what a tag is divided by to give the row number
  const auto tag_of = [&](int place) { return kShared ? held_order[place] * kRow + place : cloud.order[place]; };
  const auto bucket_of = [&](int h, int of_lane) { return (h * 32 + of_lane) * kSampleWarps + warp; };
  if (kShared) {
#pragma unroll 4
    for (int i = thread; i < cloud.padded; i += kSampleWarps * 32) {
      held[i] = cloud.points[i];
      held_order[i] = static_cast<uint16_t>(cloud.order[i]);
    }
    __syncthreads();
  }

  Box box[kHeld];
  Offer best[kHeld];  // of each bucket; without coordinates
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    best[h] = {__float_as_int(-1.0f), kLargest, __float_as_int(-1.0f), 0, 0, 0};
    if (h >= rounds) continue;
    if (bucket_of(h, lane) < buckets)
      for (int row = 0; row < height; ++row) {
        Box part;
        part.load(cloud.bounds, cloud.padded / 32, bucket_of(h, lane) * height + row);
        box[h].include(part.low, part.high);
      }
#pragma unroll 1
    for (int member = 0; member < 32 && bucket_of(h, member) < buckets; ++member) {
      int lowest = kLargest;  // before the first sample the farthest point is that of the lowest row
      for (int row = 0; row < height; ++row) {
        const int place = (bucket_of(h, member) * height + row) * 32 + lane;
        if (place < count) lowest = min(lowest, tag_of(place));
      }
      lowest = __reduce_min_sync(kAll, lowest);
      const int infinite = __float_as_int(INFINITY);
      if (lane == member && lowest != kLargest) best[h] = {infinite, lowest, infinite, 0, 0, 0};
    }
  }

  // Lowers the distances of the bucket of lane member[u], of two buckets at a time: each hides the other's latency.
  const auto update = [&](int h, const int* member, float qx, float qy, float qz) {
    Offer mine[2] = {};
#pragma unroll 1
    for (int row = 0; row < height; ++row) {
      int place[2], tag[2];
      float4 point[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        place[u] = (bucket_of(h, member[u]) * height + row) * 32 + lane;
        point[u] = held[place[u]];
        tag[u] = tag_of(place[u]);
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const float distance = squared_distance(point[u].x, point[u].y, point[u].z, qx, qy, qz);
        const int bits = __float_as_int(fminf(point[u].w, distance));
        if (distance < point[u].w) held[place[u]].w = distance;
        if (row == 0)
          mine[u].bits = bits, mine[u].tag = tag[u], mine[u].others = -kLargest;
        else if (bits > mine[u].bits || (bits == mine[u].bits && tag[u] < mine[u].tag))
          mine[u].others = mine[u].bits, mine[u].bits = bits, mine[u].tag = tag[u];
        else
          mine[u].others = max(mine[u].others, bits);
      }
    }
    int bits[2], tag[2], others[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) bits[u] = __reduce_max_sync(kAll, mine[u].bits);
#pragma unroll
    for (int u = 0; u < 2; ++u) tag[u] = __reduce_min_sync(kAll, mine[u].bits == bits[u] ? mine[u].tag : kLargest);
#pragma unroll
    for (int u = 0; u < 2; ++u)
      others[u] = __reduce_max_sync(kAll, mine[u].tag == tag[u] ? mine[u].others : mine[u].bits);
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (lane == member[u]) best[h].bits = bits[u], best[h].tag = tag[u], best[h].others = others[u];
  };

  int newest = min(start_index, count - 1);
  const float* coordinates = rows + newest * points.row_stride;
  Offer candidate = {lane == 0 ? kLargest : -kLargest, newest * kRow, 0,
                     coordinates[0], coordinates[1], coordinates[2]};
  Offer of_warp = candidate;
  int others = kLargest, step = 0;
  for (int round = 0;; round ^= 1) {
    bool changed = false;
    for (bool certain = true; step < distinct; certain = false) {
      const Farthest farthest = warp_farthest({candidate.bits, candidate.tag});
      if (!certain && farthest.bits <= others) break;
      const bool is_it = candidate.bits == farthest.bits && candidate.tag == farthest.index;
      const int winner = __ffs(static_cast<int>(__ballot_sync(kAll, is_it))) - 1;
      const float qx = __shfl_sync(kAll, candidate.x, winner), qy = __shfl_sync(kAll, candidate.y, winner);
      const float qz = __shfl_sync(kAll, candidate.z, winner);
      newest = farthest.index / kRow;
      if (thread == 0) out[step] = newest;
      ++step;
      const float distance = squared_distance(candidate.x, candidate.y, candidate.z, qx, qy, qz);
      candidate.bits = __float_as_int(fminf(__int_as_float(candidate.bits), distance));
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        if (h >= rounds) break;
        unsigned open = __ballot_sync(kAll, box[h].distance(qx, qy, qz) < __int_as_float(best[h].bits));
        changed |= open != 0;
        while (open != 0) {  // a last one is its own partner
          int member[2];
          member[0] = __ffs(static_cast<int>(open)) - 1, open &= open - 1;
          member[1] = open == 0 ? member[0] : __ffs(static_cast<int>(open)) - 1, open &= open - 1;
          update(h, member, qx, qy, qz);
        }
      }
    }
    if (step == distinct) break;

    if (changed || others == kLargest) {
      Offer mine = best[0];
#pragma unroll
      for (int h = 1; h < kHeld; ++h)
        if (best[h].bits > mine.bits || (best[h].bits == mine.bits && best[h].tag < mine.tag)) {
          const int bound = max(mine.bits, best[h].others);
          mine = best[h], mine.others = bound;
        } else {
          mine.others = max(mine.others, best[h].bits);
        }
      const Farthest farthest = warp_farthest({mine.bits, mine.tag});
      const int bound = __reduce_max_sync(kAll, mine.tag == farthest.index ? mine.others : mine.bits);
      of_warp = {farthest.bits, farthest.index, bound, 0, 0, 0};
      if (farthest.index != kLargest) {
        coordinates = kShared ? &held[farthest.index % kRow].x : rows + farthest.index * points.row_stride;
        of_warp.x = coordinates[0], of_warp.y = coordinates[1], of_warp.z = coordinates[2];
      }
    }
    if (lane == 0) offers[round][warp] = of_warp;
    __syncthreads();  // the offers alternate, so nobody overwrites what a slow warp still reads
    candidate = lane < kSampleWarps ? offers[round][lane] : Offer{-kLargest, kLargest, -kLargest, 0, 0, 0};
    others = __reduce_max_sync(kAll, candidate.others);
  }
  for (int step = distinct + thread; step < num_samples; step += kSampleWarps * 32) out[step] = newest;
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
  if (count > kSharedPoints) return false;
  *bytes = SortedClouds::padded_of(count) * static_cast<int>(sizeof(float4) + sizeof(uint16_t));
  return *bytes + 1024 <= limit;  // 1,024 for the kernel's static arrays
}

int sample_buckets(const Points& points, int clouds, int num_samples, int start_index, int limit, float* workspace,
                   int64_t* index, void* stream) {
  const SortedClouds sorted(workspace, clouds, points.count);
  if (const int error = launch_sort(points, clouds, sorted, stream)) return error;
  int bytes;
  if (fits_shared(points.count, limit, &bytes))
    return launch(sample_in_buckets<1, true>, clouds, kSampleWarps * 32, bytes, stream, points, sorted, 1, num_samples,
                  start_index, index);
  return launch(sample_in_buckets<kMostBuckets / (kSampleWarps * 32), false>, clouds, kSampleWarps * 32, 0, stream,
                points, sorted, bucket_rows(points.count), num_samples, start_index, index);
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
