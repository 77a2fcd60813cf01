// Launchers of the CUDA point ops: raw pointers, a stream, and a cudaError_t as the result (0 is success). No kernel
// synchronises with the host, and whatever the coordinates, lengths or indices hold, nothing is read or written outside
// the arrays.
#pragma once

#include <cstdint>

namespace pointalign {

enum class GroupType { kFloat, kHalf, kBFloat16 };

struct Points {               // xyz of point i of cloud b at data + b * cloud_stride + i * row_stride
  const float* data;
  int64_t cloud_stride;
  int64_t row_stride;
  int count;                  // N
  int columns;                // 3 + features
  const int64_t* lengths;     // [clouds], clamped to 1..N; null means N
};

constexpr int kRegisterPoints = 8192;  // the largest cloud that scanning samplers hold in registers

// How an op goes about its work; results are the same. kScan reads every point, kBuckets sorts the cloud and opens only
// the buckets whose bounding box is near enough; kChosen is whichever of them should be faster.
enum class Variant { kChosen, kScan, kBuckets };

// Replace kChosen; choose_sampling returns a cudaError_t.
int choose_sampling(int count, Variant* variant);
Variant choose_search(int count, int centres, Variant variant);

// Floats of workspace that launching needs, aligned to 16 bytes; variants are never kChosen below here.
int64_t sampling_workspace(int clouds, int count, Variant variant);
int64_t search_workspace(int clouds, int count, Variant variant);

int launch_farthest_point_sample(const Points& points, int clouds, int num_samples, int start_index, Variant variant,
                                 float* workspace, int64_t* index, void* stream);

int launch_knn(const Points& points, const Points& query, int clouds, int k, Variant variant, float* workspace,
               float* distance, int64_t* index, void* stream);

// centre_index [clouds, centres], clamped to the cloud; out [clouds, centres, k, columns].
int launch_group_points(const Points& points, const int64_t* centre_index, int clouds, int centres, int k,
                        GroupType type, Variant variant, float* workspace, void* out, void* stream);

const char* cuda_error_text(int error);

}  // namespace pointalign
