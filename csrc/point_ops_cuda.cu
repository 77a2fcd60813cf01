// CUDA point ops. Distances are (dx^2 + dy^2) + dz^2 in fp32 with explicit roundings, so that no multiply-add is fused
// and every index equals the CPU's and the reference's, ties included.
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

constexpr int kWarps = 8, kCentres = 4;
constexpr int kBufferBytes = kWarps * kCentres * 64 * sizeof(uint64_t);
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

template <typename Source, typename Sink>
int launch_search(const Points& points, int clouds, int centres, int k, Source source, Sink sink, void* stream) {
  if (clouds == 0 || centres == 0) return cudaSuccess;
  int device, limit;
  if (const auto error = cudaGetDevice(&device)) return error;
  if (const auto error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
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

int launch_farthest_point_sample(const Points& points, int clouds, int num_samples, int start_index, float* workspace,
                                 int64_t* index, void* stream) {
  if (clouds == 0) return cudaSuccess;
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

int launch_knn(const Points& points, const Points& query, int clouds, int k, float* distance, int64_t* index,
               void* stream) {
  return launch_search(points, clouds, query.count, k, QuerySource{query}, NeighbourSink{distance, index}, stream);
}

int launch_group_points(const Points& points, const int64_t* centre_index, int clouds, int centres, int k,
                        GroupType type, void* out, void* stream) {
  const CentreSource source{centre_index, centres};
  if (type == GroupType::kHalf)
    return launch_search(points, clouds, centres, k, source, GroupSink<__half>{static_cast<__half*>(out)}, stream);
  if (type == GroupType::kBFloat16)
    return launch_search(points, clouds, centres, k, source,
                         GroupSink<__nv_bfloat16>{static_cast<__nv_bfloat16*>(out)}, stream);
  return launch_search(points, clouds, centres, k, source, GroupSink<float>{static_cast<float*>(out)}, stream);
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pointalign
