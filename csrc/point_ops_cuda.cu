// CUDA point ops: kernels that read every point, and the choice between them and those over buckets of a sorted cloud.
#include "point_ops_cuda.cuh"
#include "point_ops_buckets.cuh"

namespace pointalign {
namespace {

// Where nobody chose a variant: predictions of benchmarks/simulate_point_ops.py, until a GPU has measured both.
constexpr int kScannedPoints = 2048;  // up to so many, reading every point is as fast
constexpr int kSortingPays = 64;      // centres from which on a search is worth a sort

// ---- farthest-point sampling ----

// Coordinates and distances stay in registers: kPoints per thread, thread t holding points t, t + kThreads, ...
template <int kThreads, int kPoints>
__global__ void __launch_bounds__(kThreads, 1)
    sample_in_registers(Points points, int num_samples, int start_index, int64_t* index) {
  __shared__ Farthest slots[2][kThreads / 32];
  const float* const rows = points.data + blockIdx.x * points.cloud_stride;
  int64_t* const out = index + static_cast<int64_t>(blockIdx.x) * num_samples;
  const int count = length_of(points, blockIdx.x), distinct = min(num_samples, count), thread = threadIdx.x;
  float x[kPoints], y[kPoints], z[kPoints], nearest[kPoints];
#pragma unroll
  for (int j = 0; j < kPoints; ++j) {
    const int i = j * kThreads + thread;
    const float* const row = rows + min(i, count - 1) * points.row_stride;
    x[j] = row[0], y[j] = row[1], z[j] = row[2];
    nearest[j] = i < count ? INFINITY : -1.0f;  // padding is never the farthest
  }
  int newest = min(start_index, count - 1);
  if (thread == 0) out[0] = newest;
  constexpr int kQuarters = kPoints < 4 ? 1 : 4, kQuarter = kPoints / kQuarters;
  for (int step = 1; step < distinct; ++step) {
    const float* const row = rows + newest * points.row_stride;
    const float qx = row[0], qy = row[1], qz = row[2];
    float highest[kQuarters];  // independent chains, and a shorter search below
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) highest[quarter] = -1.0f;
#pragma unroll
    for (int j = 0; j < kPoints; ++j) {
      nearest[j] = fminf(nearest[j], squared_distance(x[j], y[j], z[j], qx, qy, qz));
      highest[j / kQuarter] = fmaxf(highest[j / kQuarter], nearest[j]);
    }
    float high = highest[0];
#pragma unroll
    for (int quarter = 1; quarter < kQuarters; ++quarter) high = fmaxf(high, highest[quarter]);
    Farthest mine = {__reduce_max_sync(kAll, __float_as_int(high)), kLargest};
    if (__float_as_int(high) == mine.bits) {  // usually one lane: it looks for its first point at that distance
      bool found = false;
#pragma unroll
      for (int quarter = 0; quarter < kQuarters; ++quarter)
        if (!found && highest[quarter] == high) {
          found = true;
#pragma unroll
          for (int j = (quarter + 1) * kQuarter - 1; j >= quarter * kQuarter; --j)
            if (nearest[j] == high) mine.index = j * kThreads + thread;
        }
    }
    mine.index = __reduce_min_sync(kAll, mine.index);
    newest = block_farthest<kThreads>(mine, slots, step);
    if (thread == 0) out[step] = newest;
  }
  for (int step = distinct + thread; step < num_samples; step += kThreads) out[step] = newest;
}

// Any size: coordinates and distances are streamed from a float4 workspace, which the L2 cache holds.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    sample_in_workspace(Points points, int num_samples, int start_index, float4* workspace, int64_t* index) {
  __shared__ Farthest slots[2][kThreads / 32];
  const float* const rows = points.data + blockIdx.x * points.cloud_stride;
  float4* const cloud = workspace + static_cast<int64_t>(blockIdx.x) * points.count;
  int64_t* const out = index + static_cast<int64_t>(blockIdx.x) * num_samples;
  const int count = length_of(points, blockIdx.x), distinct = min(num_samples, count), thread = threadIdx.x;
  for (int i = thread; i < count; i += kThreads) {  // every thread reads back only what it wrote
    const float* const row = rows + i * points.row_stride;
    cloud[i] = make_float4(row[0], row[1], row[2], INFINITY);
  }
  int newest = min(start_index, count - 1);
  if (thread == 0) out[0] = newest;
  for (int step = 1; step < distinct; ++step) {
    const float* const row = rows + newest * points.row_stride;
    const float qx = row[0], qy = row[1], qz = row[2];
    float high = -1.0f;
    int mine = kLargest;
#pragma unroll 4
    for (int i = thread; i < count; i += kThreads) {
      const float4 point = cloud[i];
      const float nearest = fminf(point.w, squared_distance(point.x, point.y, point.z, qx, qy, qz));
      if (nearest < point.w) cloud[i].w = nearest;
      if (nearest > high) high = nearest, mine = i;  // the first, so the lowest index
    }
    newest = block_farthest<kThreads>(warp_farthest({__float_as_int(high), mine}), slots, step);
    if (thread == 0) out[step] = newest;
  }
  for (int step = distinct + thread; step < num_samples; step += kThreads) out[step] = newest;
}

// ---- nearest neighbours: one warp searches for kCentres centres at once ----

constexpr int kCentres = 4;  // of a warp
constexpr int kBufferBytes = kWarps * kCentres * 64 * sizeof(uint64_t);

// A step that visits every one of `count` places and scatters them: clouds in scan order would otherwise feed the
// selection ever nearer points.
__device__ int scattering_step(int count) {
  for (int step = count * 5 / 8 + 1;; ++step) {
    int a = count, b = step;
    while (b != 0) {
      const int rest = a % b;
      a = b, b = rest;
    }
    if (a == 1) return step % count;
  }
}

// Finds 32 neighbours of each centre per round, those after the last of the round before, so that any k works.
// Source gives the coordinates of centre q; Sink writes `kept` sorted keys from place `first` of centre q.
template <typename Source, typename Sink>
__global__ void __launch_bounds__(kWarps * 32, 2)
    search(Points points, int centres, int k, int tile_points, Source source, Sink sink) {
  DYNAMIC_SHARED(shared);
  float* const tile = reinterpret_cast<float*>(shared + kBufferBytes);  // x, y and z of tile_points each
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t* const buffers = reinterpret_cast<uint64_t*>(shared) + warp * kCentres * 64;
  const int blocks = (centres + kWarps * kCentres - 1) / (kWarps * kCentres);
  const int cloud = blockIdx.x / blocks, first_centre = (blockIdx.x % blocks * kWarps + warp) * kCentres;
  const int count = length_of(points, cloud);
  const float* const rows = points.data + cloud * points.cloud_stride;

  float centre[kCentres][3];
  uint64_t floor[kCentres];
  Selection selection[kCentres];
#pragma unroll
  for (int c = 0; c < kCentres; ++c) {
    const float* const row = source.row(points, cloud, min(first_centre + c, centres - 1));
    for (int axis = 0; axis < 3; ++axis) centre[c][axis] = row[axis];
    floor[c] = 0;
  }
  for (int first = 0; first < k; first += 32) {
    if (first < count) {
#pragma unroll
      for (int c = 0; c < kCentres; ++c) selection[c].clear();
      for (int tile_start = 0; tile_start < count; tile_start += tile_points) {
        const int size = min(tile_points, count - tile_start), steps = (size + 31) / 32;
        if (first == 0 || count > tile_points) {
          __syncthreads();
          for (int i = threadIdx.x; i < steps * 32; i += kWarps * 32) {
            const float* const row = rows + (tile_start + min(i, size - 1)) * points.row_stride;
            for (int axis = 0; axis < 3; ++axis) tile[axis * tile_points + i] = i < size ? row[axis] : NAN;
          }
          __syncthreads();
        }
        const int jump = scattering_step(steps);
        int place = 0;
        for (int step = 0; step < steps; ++step) {
          const int i = place * 32 + lane;
          place += jump;
          if (place >= steps) place -= steps;
          const float x = tile[i], y = tile[tile_points + i], z = tile[2 * tile_points + i];
          float distance[kCentres];
          bool near = false;
#pragma unroll
          for (int c = 0; c < kCentres; ++c) {
            distance[c] = squared_distance(x, y, z, centre[c][0], centre[c][1], centre[c][2]);
            near |= distance[c] <= selection[c].limit;  // false for NaN
          }
          if (!__any_sync(kAll, near)) continue;
#pragma unroll
          for (int c = 0; c < kCentres; ++c) {
            const uint64_t key = key_of(distance[c], tile_start + i);
            const bool wanted = distance[c] <= selection[c].limit && (first == 0 || key > floor[c]);
            selection[c].push(key, wanted, buffers + c * 64);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kCentres; ++c) {
        selection[c].finish(buffers + c * 64);
        floor[c] = selection[c].worst;
      }
    }
    // Places past the cloud repeat its last neighbour: lane `last` of this round, or of the final round that searched.
    const int last = first < count ? min(31, count - 1 - first) : (count - 1) % 32;
#pragma unroll
    for (int c = 0; c < kCentres; ++c) {
      const uint64_t key = __shfl_sync(kAll, selection[c].best, first < count ? min(lane, last) : last);
      if (first_centre + c < centres)
        sink.write(points, cloud, count, first_centre + c, centre[c], first, min(32, k - first), k, centres, key);
    }
  }
}

int shared_memory_limit(int* limit) {
  int device;
  if (const auto error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

template <typename Source, typename Sink>
int launch_search(const Points& points, int clouds, int centres, int k, Source source, Sink sink, Variant variant,
                  float* workspace, void* stream) {
  if (clouds == 0 || centres == 0) return cudaSuccess;
  if (variant == Variant::kBuckets)
    return launch_search_buckets(points, clouds, centres, k, source, sink, workspace, stream);
  int limit;
  if (const int error = shared_memory_limit(&limit)) return error;
  const int fitting = (limit - kBufferBytes) / (3 * static_cast<int>(sizeof(float)));
  const int whole = (points.count + 31) / 32 * 32;
  const int tile_points = whole <= fitting ? whole : fitting / 1024 * 1024;
  const int bytes = kBufferBytes + 3 * static_cast<int>(sizeof(float)) * tile_points;
  const int64_t blocks = static_cast<int64_t>(clouds) * ((centres + kWarps * kCentres - 1) / (kWarps * kCentres));
  if (blocks > kLargest) return cudaErrorInvalidConfiguration;
  return launch(search<Source, Sink>, static_cast<unsigned>(blocks), kWarps * 32, bytes, stream, points, centres, k,
                tile_points, source, sink);
}

}  // namespace

int choose_sampling(int count, Variant* variant) {
  if (count > kMostSorted) *variant = Variant::kScan;
  if (*variant != Variant::kChosen) return cudaSuccess;
  int limit, bytes;
  if (const int error = shared_memory_limit(&limit)) return error;
  const bool held = count <= kRegisterPoints;  // by the scan, in registers
  const bool buckets = !held || (count > kScannedPoints && fits_shared(count, limit, &bytes));
  *variant = buckets ? Variant::kBuckets : Variant::kScan;
  return cudaSuccess;
}

Variant choose_search(int count, int centres, Variant variant) {
  if (count > kMostSorted) return Variant::kScan;
  if (variant != Variant::kChosen) return variant;
  const bool buckets = count > kScannedPoints && centres >= kSortingPays;
  return buckets ? Variant::kBuckets : Variant::kScan;
}

int64_t sampling_workspace(int clouds, int count, Variant variant) {
  if (variant == Variant::kBuckets) return SortedClouds::floats(clouds, count);
  return count > kRegisterPoints ? static_cast<int64_t>(clouds) * count * 4 : 0;
}

int64_t search_workspace(int clouds, int count, Variant variant) {
  return variant == Variant::kBuckets ? SortedClouds::floats(clouds, count) : 0;
}

int launch_farthest_point_sample(const Points& points, int clouds, int num_samples, int start_index, Variant variant,
                                 float* workspace, int64_t* index, void* stream) {
  if (clouds == 0) return cudaSuccess;
  if (variant == Variant::kBuckets) {
    int limit;
    if (const int error = shared_memory_limit(&limit)) return error;
    return sample_buckets(points, clouds, num_samples, start_index, limit, workspace, index, stream);
  }
  const auto in_registers = [&](auto kernel) {
    return launch(kernel, clouds, 256, 0, stream, points, num_samples, start_index, index);
  };
  if (points.count <= 512) return in_registers(sample_in_registers<256, 2>);
  if (points.count <= 1024) return in_registers(sample_in_registers<256, 4>);
  if (points.count <= 2048) return in_registers(sample_in_registers<256, 8>);
  if (points.count <= 4096) return in_registers(sample_in_registers<256, 16>);
  if (points.count <= kRegisterPoints) return in_registers(sample_in_registers<256, 32>);
  return launch(sample_in_workspace<1024>, clouds, 1024, 0, stream, points, num_samples, start_index,
                reinterpret_cast<float4*>(workspace), index);
}

int launch_knn(const Points& points, const Points& query, int clouds, int k, Variant variant, float* workspace,
               float* distance, int64_t* index, void* stream) {
  return launch_search(points, clouds, query.count, k, QuerySource{query}, NeighbourSink{distance, index}, variant,
                       workspace, stream);
}

int launch_group_points(const Points& points, const int64_t* centre_index, int clouds, int centres, int k,
                        GroupType type, Variant variant, float* workspace, void* out, void* stream) {
  const auto search_into = [&](auto sink) {
    return launch_search(points, clouds, centres, k, CentreSource{centre_index, centres}, sink, variant, workspace,
                         stream);
  };
  if (type == GroupType::kHalf) return search_into(GroupSink<__half>{static_cast<__half*>(out)});
  if (type == GroupType::kBFloat16) return search_into(GroupSink<__nv_bfloat16>{static_cast<__nv_bfloat16*>(out)});
  return search_into(GroupSink<float>{static_cast<float*>(out)});
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pointalign
